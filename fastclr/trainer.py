"""The training loop. Open this file first.

`train_step` is algorithm 1 of Chen et al. 2020; the rest keeps it fed, logged, saved and on time.
"""

from __future__ import annotations

import functools
import logging
import math
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from torch import nn

from fastclr import agreement, checkpointing, collectives, engine, fencing, ledger
from fastclr.batch import Batch
from fastclr.batch_norm import has_batch_norm
from fastclr.checkpointing import Retention
from fastclr.clock import Clock
from fastclr.config import ConfigError, FaultsConfig, raise_all
from fastclr.contracts import BatchSource, Evaluation, Summary
from fastclr.ds_config import JSON, read
from fastclr.evaluation.linear_joint import JointProbe
from fastclr.files import write_json
from fastclr.finite import FiniteGuard, NonFiniteLoss
from fastclr.interruption import Interruption, Preempted, WaitInterrupted
from fastclr.losses import gradient_cache
from fastclr.metrics import MetricsLog, RowLog
from fastclr.monitors import Monitors
from fastclr.optim import LARS
from fastclr.optim.schedules import Schedule
from fastclr.simclr import SimCLR
from fastclr.stragglers import Stragglers
from fastclr.watchdog_timer import Watchdog
from fastclr.window import Window
from fastclr.world import World

logger = logging.getLogger(__name__)

ScheduleKind = Literal["cosine", "constant", "none"]


class Trainer:
    """Trains a SimCLR model on a DeepSpeed engine and goes on where an earlier start stopped.

    Args:
        model: Encoder and head.
        loss: Maps two projections (B, D) to this rank's mean loss, exact over ranks; given a
            dictionary ``statistics``, it puts ``contrastive_accuracy`` and other scalars there.
        ds_config: DeepSpeed JSON, as a path or loaded.
        run_dir: Folder of the run; a checkpoint in it is gone on from.
        optimizer: Optimizer object; None if the JSON describes one. Its rates are the peak.
        warmup_epochs: Epochs over which the rate rises from 0.
        schedule: What follows; ``none`` where the JSON has a scheduler.
        batch_norm: Statistics of all ranks or of each alone, which leaks the positives; ``none``
            for a model that must not have any.
        seed: Seed of dropout and the like; a function of it, the step and the rank.
        world: Which rank of how many; None for what the launcher says.
        log_every: Steps between log rows.
        checkpoint_every: Steps between checkpoints; 0 for the end of each epoch.
        keep_checkpoints: Last checkpoints kept.
        keep_every: Checkpoints at multiples of so many steps are kept too; 0 for none.
        start_from: Checkpoint of another run that a new run goes on from.
        evaluation: Called every ``evaluate_every`` steps; the best checkpoint by it is kept.
        evaluate_every: Steps between evaluations; 0 for the end of each epoch.
        probe: Classifier that is trained beside the model, which does not notice it.
        faults: What is done when something goes wrong.
        interruption: Catches signals; None to catch them in :meth:`fit`.
    """

    def __init__(
        self,
        model: SimCLR,
        *,
        loss: nn.Module,
        ds_config: str | Path | JSON,
        run_dir: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        warmup_epochs: float = 10.0,
        schedule: ScheduleKind = "cosine",
        batch_norm: Literal["global", "local", "none"] = "global",
        seed: int = 0,
        world: World | None = None,
        log_every: int = 10,
        checkpoint_every: int = 0,
        keep_checkpoints: int = 2,
        keep_every: int = 0,
        start_from: str | Path | None = None,
        evaluation: Evaluation | None = None,
        evaluate_every: int = 0,
        probe: JointProbe | None = None,
        faults: FaultsConfig = FaultsConfig(),  # noqa: B008
        interruption: Interruption | None = None,
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.ds_config = dict(ds_config) if isinstance(ds_config, dict) else read(ds_config)
        self.run_dir, self.seed, self.world = Path(run_dir), seed, world or World.detect()
        self.warmup_epochs = warmup_epochs
        self.schedule_kind: ScheduleKind = schedule
        self.batch_norm = batch_norm
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.retention = Retention(keep_checkpoints, keep_every)
        self.start_from = Path(start_from) if start_from else None
        self.evaluation, self.evaluate_every, self.probe = evaluation, evaluate_every, probe
        self.faults, self.interruption = faults, interruption or Interruption()
        self.device = engine.device_of(self.world)
        self.engine: Any = None  # DeepSpeed's types deny what its engines have
        self.step = 0
        self.images = 0
        self.skipped_steps = 0
        self.damaged_samples = 0  # of all ranks, at the last log row
        self.best_score = -math.inf
        self.total_steps: int | None = None
        self.clock = Clock()
        self._seconds_before = 0.0  # training time of earlier starts
        self._saved_step = -1
        self._scores: RowLog | None = None
        self._ledger: Any = None  # from fit on, as is the next
        self._fence: Any = None
        self._finite = FiniteGuard(self.world)
        self._stragglers = Stragglers(self.world)
        self._watchdog = Watchdog(
            faults.watchdog_seconds, self.world.rank, self.world.num_ranks, self.run_dir
        )

    def train_step(
        self, batch: Batch, statistics: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Take one optimizer step on a batch; the device is never left waiting.

        Returns:
            The loss of this rank's anchors, detached.

        Raises:
            NonFiniteLoss: On every rank if one's loss is not finite; nothing was updated.
        """
        loss_of = functools.partial(self._watched_loss, statistics=statistics)
        self._set_rate()
        # Randomness inside the model is a function of its coordinates: nothing to save or restore.
        place = self.step * self.world.num_ranks + self.world.rank
        torch.manual_seed((self.seed * 2**32 + place) % 2**63)
        views_VBCHW = batch.views_VBCHW.to(self.device, non_blocking=True)
        chunks = views_VBCHW.chunk(self.engine.gradient_accumulation_steps(), dim=1)
        if len(chunks) > 1:
            loss = gradient_cache(
                self.engine.module, self._project, chunks, loss_of, self._accumulate
            )
        else:
            loss = loss_of(*self._project(views_VBCHW).chunk(2))
            self.engine.backward(loss)
            self._update()
        if self.probe:
            self.probe.learn(batch.label_B, self.total_steps)
        self._count(batch)
        return loss.detach()

    def _watched_loss(self, *views_BD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the loss, and ask all ranks whether theirs is finite."""
        loss = self.loss(*views_BD, **kwargs)
        self._finite.watch(loss)
        if self.faults.non_finite == "skip":
            self._finite.check()  # before anything of it is in a gradient
        return loss

    def _count(self, batch: Batch) -> None:
        self.step += 1
        self.images += batch.views_VBCHW.shape[1] * self.world.num_ranks

    def _project(self, views_VBCHW: torch.Tensor) -> torch.Tensor:
        """Return the projections of views, view-major."""
        h_NF, z_ND = self.engine(views_VBCHW)
        if self.probe and torch.is_grad_enabled():  # not in a gradient cache's first pass
            self.probe.see(h_NF, len(views_VBCHW), self.step)
        return z_ND

    def _accumulate(self, part: torch.Tensor) -> None:
        """Add a chunk's part of the gradient; the engine steps after the last one."""
        # The engine takes parts for losses to be averaged, and divides by their number.
        self.engine.backward(part * self.engine.gradient_accumulation_steps())
        self._update()

    def _update(self) -> None:
        """Let the engine step, or count a part of a batch, unless a loss is not finite."""
        self._finite.check()
        self._stragglers.begin()
        self.engine.step()

    def fit(
        self, loader: BatchSource, *, epochs: float | None = None, minutes: float | None = None
    ) -> Summary:
        """Train to the end, from the last checkpoint in ``run_dir`` if there is one.

        Args:
            loader: Endless batches.
            epochs: Length of the run; excludes ``minutes``.
            minutes: Length in minutes of training. The number of steps, and with it the rate,
                follows the speed so far, anew at each log row: the run ends in time on a busy
                machine, but two such runs are not the same. Give epochs to repeat a run.

        Raises:
            ConfigError: If the length, the engine's configuration or a checkpoint is unusable.
            FloatingPointError: If the loss or a weight is not finite; nothing of it was saved.
            Preempted: After SIGTERM, SIGUSR1 or SIGUSR2, once what was done is saved.
            KeyboardInterrupt: After SIGINT, likewise.
            PeerLost: If another rank is gone.
        """
        if (epochs is None) == (minutes is None):
            raise ConfigError(f"epochs is {epochs} and minutes is {minutes}: give exactly one.")
        self.check(loader)
        with ExitStack() as stack:
            stack.enter_context(engine.launcher_variables(self.world))
            stack.enter_context(self.interruption)
            stack.enter_context(self._watchdog)
            stack.enter_context(self._watchdog.names_lost_peers())
            self._start_engine(loader)
            self._fence = stack.enter_context(fencing.taken(self.run_dir))
            self._resume(loader)
            if epochs is not None:
                self.total_steps = max(1, round(epochs * loader.batches_per_epoch))
            begun = ledger.begin(self.run_dir, loader, self.step, self.world, self.device)
            self._ledger = stack.enter_context(closing(begun))
            self._loop(loader, minutes, self._open_log(stack))
        return self._summary(loader)

    def _loop(self, loader: BatchSource, minutes: float | None, log: MetricsLog | None) -> None:
        """Step until the end; log, evaluate and save on the way."""
        save_every = self.checkpoint_every or loader.batches_per_epoch
        evaluate_every = self.evaluate_every or loader.batches_per_epoch
        window = Window(self, loader)
        position = loader.state_dict()
        batches = iter(loader)
        self.clock.start()
        while self.total_steps is None or self.step < self.total_steps:
            batch = self._next(batches)
            if batch is None:
                self._leave(position)
            coming = self.step + 1
            is_last = coming == self.total_steps
            should_log = coming % self.log_every == 0
            statistics: dict[str, torch.Tensor] | None = {} if should_log or is_last else None
            loss = self._step_or_skip(batch, statistics)
            position = loader.state_dict()
            self._ledger.add(self.step, batch, loss, loader.num_damaged)
            self._stragglers.end()
            if minutes is not None and should_log:
                self._plan(minutes)
                is_last = self.step == self.total_steps  # a plan ends a run at a log row
            if statistics is not None and loss is not None:
                row = window.close(loss, statistics)
                self._stragglers.compare(self.log_every)
                self._ledger.write()
                if log:
                    self._fence.check()  # the file is the last start's
                    log.write(row, self.total_steps)
            is_best = False
            if self.step % self.faults.compare_every == 0:
                self._compare_ranks()
            if self.evaluation and (is_last or self.step % evaluate_every == 0):
                is_best = self._evaluate(self.evaluation, self.step / loader.batches_per_epoch)
            if is_last or is_best or self.step % save_every == 0:
                self._save(position, is_best)
            if self._saved_step == self.step or is_best:
                window.reopen()
        self.clock.pause()

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch, or None on every rank if one of them got a signal.

        Raises:
            Exception: On every rank, what one of them could not read its batch for.
        """
        batch, error = None, None
        self._stragglers.begin()
        try:
            with self._watchdog.phase("data", self.step), self.interruption.breaks_waits():
                batch = next(batches)
        except WaitInterrupted:
            pass
        except StopIteration:
            error = RuntimeError(f"the loader ended after step {self.step}: it has to be endless")
        except Exception as caught:  # the others learn of it here, and not by waiting
            error = caught
        self._stragglers.end()
        with self._watchdog.phase("waiting for the other ranks", self.step):
            stops = self.interruption.requested is not None
            if not collectives.any_rank(stops or error is not None):
                return batch
            with collectives.together():
                if error is not None:
                    raise error
        return None

    def _leave(self, position: dict[str, Any]) -> NoReturn:
        """Save and stop, because of a signal to one of the ranks."""
        if self._saved_step != self.step:
            self._save(position)
        number = self.interruption.requested
        message = (
            f"stopped by {number.name if number else 'a signal to another rank'} after step "
            f"{self.step}, which is saved: start the same command again to go on"
        )
        raise KeyboardInterrupt(message) if number == signal.SIGINT else Preempted(message)

    def _step_or_skip(
        self, batch: Batch, statistics: dict[str, torch.Tensor] | None
    ) -> torch.Tensor | None:
        """Take a step; on a loss that is not finite stop, or return None where that is allowed."""
        try:
            return self.train_step(batch, statistics)
        except NonFiniteLoss as error:
            file = self._note_batch(batch)
            self.skipped_steps += 1
            message = f"{error} at step {self.step + 1}; the batches are named in {file}"
            is_tolerated = self.skipped_steps <= self.faults.most_skipped
            if self.faults.non_finite == "stop" or not is_tolerated:
                raise FloatingPointError(
                    f"{message}. The run stopped before the update: lower the learning rate or "
                    "raise the temperature, and go on or start anew."
                ) from error
            logger.warning("%s. The step is skipped.", message)
            self._count(batch)
            return None

    def _note_batch(self, batch: Batch) -> Path:
        """Write down which images this rank's step would have learned from."""
        file = self.run_dir / "non_finite" / f"step-{self.step + 1:07d}-rank{self.world.rank}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        sample_ids = batch.sample_id_B.tolist()
        write_json(file, {"step": self.step + 1, "seed": self.seed, "sample_ids": sample_ids})
        return file

    def _compare_ranks(self) -> None:
        """Stop if a rank's weights are not those of the others."""
        with self._watchdog.phase("comparing the ranks", self.step):
            local = self.batch_norm == "local"
            agreement.check(self.engine, self.step, self.world, has_local_statistics=local)

    def _evaluate(self, evaluation: Evaluation, epoch: float) -> bool:
        """Score the encoder; return whether it is the best so far."""
        with self.clock.apart("evaluation"), self._watchdog.phase("evaluation", self.step):
            scores = evaluation(self.engine.module)
        is_best = scores["knn_top1"] > self.best_score
        self.best_score = max(self.best_score, scores["knn_top1"])
        if self._scores:
            self._fence.check()
            seconds = self.clock.apart_seconds["evaluation"]
            place = {"step": self.step, "images": self.images, "epoch": epoch}
            self._scores.write({**place, **scores, "evaluation_seconds": seconds})
        return is_best

    def _set_rate(self) -> None:
        """Set every group's rate for this step, unless the JSON's scheduler owns it."""
        if self.schedule is None:
            return
        factor = self.schedule.factor(self.step, self.total_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _plan(self, minutes: float) -> None:
        """Count the steps that fit at the speed so far; rank 0's clock decides for all."""
        fitting = self.step * minutes * 60 / self.clock.training_seconds
        steps = torch.tensor([max(self.step, int(fitting))], device=self.device)
        dist.broadcast(steps, src=0)
        self.total_steps = int(steps.item())

    def check(self, loader: BatchSource) -> None:
        """Refuse what cannot work, before any device is touched; ``fit`` begins with this.

        Raises:
            ConfigError: If optimizer, precision, views or batch sizes do not go together, or the
                data of the evaluation cannot be scored.
        """
        images = loader.micro_batch_size
        found = engine.problems(self.model, self.optimizer, self.ds_config, images, self.world)
        if loader.num_views != 2:  # all losses take two
            found.append(
                f"the loader makes {loader.num_views} views of each image, and the loss compares "
                "two: give make_loader one policy or two."
            )
        if self.batch_norm == "none" and has_batch_norm(self.model):
            found.append(
                "batch_norm is none and the model has BatchNorm: replace it with "
                "fastclr.batch_norm.without_batch_norm(model), or choose global."
            )
        raise_all(found)
        if self.evaluation:
            self.evaluation.check()

    def _start_engine(self, loader: BatchSource) -> None:
        """Build the DeepSpeed engine and the schedule."""
        self.engine = engine.start(
            self.model,
            self.optimizer,
            self.ds_config,
            images_per_rank=loader.micro_batch_size,
            world=self.world,
            global_batch_norm=self.batch_norm == "global",
            timeout_seconds=self.faults.watchdog_seconds,
        )
        warmup_steps = round(self.warmup_epochs * loader.batches_per_epoch)
        kind = self.schedule_kind
        self.schedule = Schedule(warmup_steps, kind) if kind != "none" else None

    def _open_log(self, stack: ExitStack) -> MetricsLog | None:
        """Open the log on the main rank, monitors included."""
        if not self.world.is_main:
            return None
        monitors = {k: v for k, v in self.ds_config.items() if k in engine.MONITORS}
        default = {"enabled": True, "output_path": str(self.run_dir), "job_name": "tensorboard"}
        monitors = monitors or {"tensorboard": default}
        master = MonitorMaster(get_monitor_config(monitors))
        write = stack.enter_context(Monitors(master.write_events)).write
        file = self.run_dir / "evaluations.jsonl"
        if self.evaluation or file.exists():  # then rows of steps that are taken again are dropped
            self._scores = RowLog(file, self.step, write, "evaluation")
            stack.callback(self._scores.close)
        file = self.run_dir / "metrics.jsonl"
        return stack.enter_context(MetricsLog(file, self.step, write))

    @property
    def _lars(self) -> LARS | None:
        return self.optimizer if isinstance(self.optimizer, LARS) else None

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def _save(self, position: dict[str, Any], is_best: bool = False) -> None:
        """Write a checkpoint; every rank."""
        facts = {
            "step": self.step,
            "images": self.images,
            "skipped_steps": self.skipped_steps,
            "best_score": None if math.isinf(self.best_score) else self.best_score,
            "total_steps": self.total_steps,
            "training_seconds": self.clock.training_seconds,
            "num_ranks": self.world.num_ranks,
            "seed": self.seed,  # with the step, all of the generators' state
            "loader": position,
        }
        probe = self.probe.state_dict() if self.probe else None
        self._compare_ranks()
        with self.clock.apart("checkpoint"), self._watchdog.phase("checkpoint", self.step):
            with collectives.together():  # a full disk is one rank's, and all stop
                self._ledger.commit()
            checkpointing.save(
                self.engine, self._checkpoints, facts, self.retention, self._fence, self._lars,
                is_best, probe,
            )  # fmt: skip
        self._saved_step = self.step

    def _resume(self, loader: BatchSource) -> None:
        """Load what there is to go on from."""
        # 1. The run's own newest whole checkpoint; 2. the one that was given; 3. the model as it
        # is, with the initial weights it was given, or 4. those that are a function of the seed.
        checkpoint = checkpointing.choose(self._checkpoints, self.start_from, self._fence)
        if checkpoint is None:
            return
        facts = checkpointing.load(self.engine, checkpoint, self._lars, self.probe)
        loader.load_state_dict(facts["loader"])
        self.step, self.images = facts["step"], facts["images"]
        self.skipped_steps = facts["skipped_steps"]
        if facts["best_score"] is not None:
            self.best_score = facts["best_score"]
        self.total_steps = facts["total_steps"]
        self._seconds_before = facts["training_seconds"]
        self.clock = Clock(self._seconds_before)
        if checkpoint.parent == self._checkpoints:
            self._saved_step = self.step
        logger.warning("going on from %s, step %d", checkpoint, self.step)

    def _summary(self, loader: BatchSource) -> Summary:
        """Say what the run was."""
        seconds = self.clock.training_seconds
        return Summary(
            steps=self.step,
            images=self.images,
            epochs=self.step / loader.batches_per_epoch,
            training_seconds=seconds,
            checkpoint_seconds=self.clock.apart_seconds["checkpoint"],
            evaluation_seconds=self.clock.apart_seconds["evaluation"],
            program_seconds=self.clock.program_seconds,
            images_per_second=self.images / max(seconds, 1e-9),
            data_wait_fraction=loader.wait_seconds / max(seconds - self._seconds_before, 1e-9),
            num_ranks=self.world.num_ranks,
            skipped_steps=self.skipped_steps,
            damaged_samples=self.damaged_samples,
            checkpoint=str(checkpointing.latest(self._checkpoints)),
        )

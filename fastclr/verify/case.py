"""What is verified: the user's DeepSpeed JSON at a tiny size, on this rank's device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastclr import ds_config, losses
from fastclr.config import Config, ConfigError, DataConfig, LossConfig, OptimizerConfig
from fastclr.ds_config import JSON
from fastclr.optim import LARS
from fastclr.simclr import SimCLR
from fastclr.trainer import Trainer
from fastclr.verify.model import make_model
from fastclr.verify.rows import limit_for
from fastclr.world import World

IMAGES = 3  # of a rank and micro-batch
RATE = 1.0  # a step of LARS goes by the length of the weights: this shows above fp32's rounding
LOSS = LossConfig(temperature=0.3)
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")  # blocks of the JSON
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu")


class NotApplicable(Exception):
    """A check that has no meaning here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One verification, on one rank.

    Attributes:
        ds: DeepSpeed JSON: the user's, but for batch sizes, monitors and the first loss scale.
        config: The run's settings, merged with it.
        world: Which rank of how many.
        device: Where the trainer would compute.
        scratch: A new folder that all ranks see.
    """

    ds: JSON
    config: Config
    world: World
    device: torch.device
    scratch: Path

    @property
    def num_chunks(self) -> int:
        """Micro-batches of a step."""
        return self.ds["gradient_accumulation_steps"]

    @property
    def images_per_rank(self) -> int:
        """Images of a rank and step."""
        return IMAGES * self.num_chunks

    @property
    def uses_lars(self) -> bool:
        """Whether a run under this JSON trains with LARS."""
        return self.config.optimizer.name == "LARS"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the engine's weights."""
        if any(self.ds.get(key, {}).get("enabled") for key in ("bf16", "bfloat16")):
            return torch.bfloat16
        return torch.float16 if self.ds.get("fp16", {}).get("enabled") else torch.float32

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Precision that the engine computes in beside that of the weights."""
        block = self.ds.get("torch_autocast", {})
        if not block.get("enabled"):
            return None
        if "dtype" not in block:
            return torch.get_autocast_dtype(self.device.type)
        return torch.bfloat16 if "bf" in block["dtype"] else torch.float16

    def limit_for(self, own_error: float, rounded_to: torch.dtype | None = None) -> float:
        """Return the limit of what is computed in the engine's precision; see ``rows``.

        Args:
            own_error: Of plain torch in one process and this precision.
            rounded_to: What a kernel on the way rounds to, if it does.
        """
        lowest = self.autocast_dtype or self.dtype
        if lowest == torch.float32 and rounded_to is not None:
            lowest = rounded_to
        # Convolutions take it unless told otherwise.
        tf32 = self.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return limit_for(own_error, lowest, tf32)

    def autocast(self) -> torch.autocast:
        """Return the context that the engine's forward runs in."""
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def lars(self, model: nn.Module) -> LARS:
        """Make LARS with the run's numbers."""
        settings = self.lars_settings()
        return LARS.for_module(model, settings.pop("learning_rate"), **settings)

    def lars_settings(self) -> dict[str, Any]:
        """Return LARS's numbers and forms; the defaults where the JSON names another optimizer."""
        ours = replace(ds_config.DEFAULT_OPTIMIZER, learning_rate=RATE)
        settings = asdict(self.config.optimizer if self.uses_lars else ours)
        return {name: settings[name] for name in (*ds_config.NUMBERS, *ds_config.FORMS)}

    def trainer(self, model: SimCLR, run_dir: Path, ds: JSON, **options: Any) -> Trainer:
        """Make the trainer of a run, silent."""
        silent = {**ds, "tensorboard": {"enabled": False}}
        options.setdefault("checkpoint_every", 10**9)
        return Trainer(
            model,
            loss=losses.from_config(LOSS),
            ds_config=silent,
            run_dir=run_dir,
            world=self.world,
            **options,
        )

    def hindrance(self, model: SimCLR, loader: Any) -> str:
        """Return why the trainer refuses a model under this JSON; "" if it does not."""
        try:
            self.trainer(model, self.scratch, self.ds, optimizer=self.lars(model)).check(loader)
        except ConfigError as error:
            return str(error)
        return ""


def device_of(world: World) -> torch.device:
    """Return where a trainer on this rank computes."""
    model = make_model(batch_norm=False)
    loss = losses.from_config(LOSS)
    return Trainer(model, loss=loss, ds_config={}, run_dir="-", world=world).device


def prepare(ds: JSON, world: World) -> tuple[JSON, Config]:
    """Check the user's JSON as a run would, then bring it to verify's size.

    Raises:
        ConfigError: If a run under it would be refused.
    """
    ds = {key: value for key, value in ds.items() if key not in MONITORS}
    steps = ds.get("gradient_accumulation_steps", 1)
    is_lars = ds.get("optimizer", {}).get("type", "LARS") == "LARS"
    has_rate = "lr" in ds.get("optimizer", {}).get("params", {})
    optimizer = OptimizerConfig(
        learning_rate=RATE if is_lars and not has_rate else None,
        schedule="none" if "scheduler" in ds else "cosine",
    )
    nowhere = Config(data=DataConfig("-"), run_dir="-", epochs=1, optimizer=optimizer)
    has_batch = any(key in ds for key in BATCH_KEYS)
    images = IMAGES * world.num_ranks * (steps if type(steps) is int else 1)
    tiny = {key: value for key, value in ds.items() if key not in BATCH_KEYS}
    tiny |= {"train_batch_size": images}
    ds_config.resolve(nowhere, ds if has_batch else tiny, world)
    config, tiny = ds_config.resolve(nowhere, tiny, world)
    if "fp16" in tiny:  # a larger first scale overflows, and steps are skipped until it fits
        tiny["fp16"] = {**tiny["fp16"], "initial_scale_power": 8}
    return tiny, config

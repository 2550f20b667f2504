"""Where a run's time goes, and how it runs faster on this machine: the first command to try.

    fastclr bench [--budget-minutes 5] [--data SHARDS | --synthetic] [--recipe NAME]
        [--ds-config FILE] [--profile] [--out FOLDER] [flags of fastclr train]

Without options: the recipe ``cifar10-cpu`` on a CPU, ``simclr-v1-paper`` on GPUs (all of this
machine), on synthetic images. First every stage of a training run is measured, inside it and alone,
so that the wall time is accounted for; then settings that change speed, and nothing silently, are
searched by successive halving, each in processes of its own; then before and after are compared in
turn. Writes ``tuned.json`` and ``tuned.flags`` for ``fastclr train``.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from fastclr.cli import guard, joined
from fastclr.config import Config, ConfigError
from fastclr.facts import typed
from fastclr.recipes import RECIPES


@dataclass
class Options:
    """What is measured, and for how long; all further flags are those of ``fastclr train``.

    Attributes:
        budget_minutes: How long all may take.
        data: Data set to measure with, as ``--data.train``; empty for synthetic images.
        synthetic: Measure with synthetic images, said aloud.
        recipe: Its name; empty for the one that fits the machine.
        ds_config: DeepSpeed JSON that is begun with; empty for none.
        profile: Also leave a trace of the tuned setting, for Chrome or https://ui.perfetto.dev.
        ranks: Processes on this machine; 0 for one a GPU, or one on a CPU.
        out: Folder of ``tuned.json``, ``tuned.flags`` and the trace.
        page: Page of results, replaced below "Measured"; its rows go beside it, ``.jsonl``. None
            for ``throughput.md`` in ``out``.
    """

    budget_minutes: float = 5.0
    data: str = ""
    synthetic: bool = False
    recipe: str = ""
    ds_config: str = ""
    profile: bool = False
    ranks: int = 0
    out: Path = Path("runs/throughput")
    page: Path | None = None


def measure(options: Options, words: list[str]) -> None:
    """Run a session, write and print what it found."""
    started = time.monotonic()  # a second after the process, in one that does only this
    import torch

    from fastclr import ds_config
    from fastclr.throughput import page, synthetic
    from fastclr.throughput.search import NothingRuns
    from fastclr.throughput.session import Session, write_tuned

    on_cuda = torch.cuda.is_available()
    recipe = options.recipe or ("simclr-v1-paper" if on_cuda else "cifar10-cpu")
    if recipe not in RECIPES:
        raise ConfigError(f"recipe {recipe!r} is unknown: choose from {', '.join(RECIPES)}.")
    config = tyro.cli(joined(Config), default=RECIPES[recipe](), args=words)
    data = options.data or config.data.train
    if data and options.synthetic:
        raise ConfigError(f"--synthetic and the data {data}: give one of them.")
    ds = ds_config.read(options.ds_config) if options.ds_config else {}
    ranks = options.ranks or max(1, torch.cuda.device_count() if on_cuda else 1)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="fastclr-images-") as folder:
        batch = ds.get("train_batch_size") or config.global_batch_size or 256
        if not data:
            say(f"making synthetic images for {recipe}")
            size = config.views.size
            data = str(synthetic.write(Path(folder), size, synthetic.enough(size, batch)))
        session = Session(
            replace(config, data=replace(config.data, train=data)), ds, ranks=ranks,
            budget_seconds=60 * options.budget_minutes, started=started, say=say,
            trace=options.out / "trace.json.gz" if options.profile else None,
        )  # fmt: skip
        try:
            results = session.run()
        except NothingRuns as error:
            raise ConfigError(
                f"{error}. Give more --budget-minutes, or a smaller recipe."
            ) from error
        is_real = bool(options.data or config.data.train)
        best = session.base
        if results.found:
            best = results.found.best
            shown = ["--data.train", data if is_real else "SHARDS"]
            results.command = write_tuned(options.out, session, recipe, [*words, *shown], best)
        command = shlex.join(typed())
        images = data if is_real else "synthetic images"
        about = f"Recipe `{recipe}` on {images}; `{command}`."
        text = page.text_of(session, results, about, is_real)
        file = options.page or options.out / "throughput.md"
        page.write(file, session, results, text)
        print(f"\n{text}")
    say(f"done; {file} and {options.out} hold it")


def main(words: Sequence[str]) -> int:
    """Parse the flags, measure, return the exit code."""
    options, rest = tyro.cli(
        joined(Options),
        args=words,
        return_unknown_args=True,
        prog="fastclr bench",
        description=__doc__,
    )
    return guard(lambda: measure(options, rest))

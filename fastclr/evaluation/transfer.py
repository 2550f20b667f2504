"""Transfer to other data sets: a linear probe, fine-tuning, and the same network untrained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fastclr.config import ConfigError
from fastclr.evaluation.draws import Int64, balanced_split
from fastclr.evaluation.features import Features, extract
from fastclr.evaluation.finetune import (
    Classifier,
    FinetuneSettings,
    LabelledImages,
    answers,
    finetune,
)
from fastclr.evaluation.linear import check_labels
from fastclr.evaluation.linear_lbfgs import lbfgs_probe
from fastclr.evaluation.scoring import metric

Grid = tuple[tuple[float, float], ...]  # rates and weight decays


def _grid(rates: Iterable[float], decays: Iterable[float]) -> Grid:
    """Return every rate with every decay."""
    return tuple((float(rate), float(decay)) for rate, decay in itertools.product(rates, decays))


# Chen et al. 2020, B.8: steps, and (rate for 256 images, weight decay).
STEPS, RANDOM_STEPS = 20_000, 40_000
TUNED_GRID = _grid(np.logspace(-4, -1, 7), (0.0, *np.logspace(-6, -3, 7)))
RANDOM_GRID = _grid(np.logspace(-3, 0, 7), np.logspace(-5, -1.5, 8))
ROWS = ("linear", "finetune", "random_init")
PROTOCOL = (
    "linear: L-BFGS logistic regression, 45 penalties. finetune and random_init: all weights, SGD "
    "with Nesterov momentum 0.9 and cosine, batch 256, BatchNorm momentum max(1 - 10 / steps of an "
    "epoch, 0.9), rate and weight decay from a grid by successive halving: each round keeps the "
    "best third on validation images and takes three times the steps; the best of the last round "
    "is trained on training and validation images for all steps. Chen et al. 2020, B.8, which "
    "tries the whole grid at full length."
)
_BATCH, _KEEP, _ROUNDS = 256, 3, 3


@dataclass(frozen=True)
class TransferSet:
    """A data set to transfer to.

    Attributes:
        name: What the table calls it.
        metric: Key of :data:`~fastclr.evaluation.scoring.METRICS`: what the set's papers report.
        train: Labelled images.
        test: Labelled images of the same classes.
    """

    name: str
    metric: str
    train: LabelledImages
    test: LabelledImages


class Network(NamedTuple):
    """A network to transfer, made anew for each training.

    Attributes:
        make: Returns a network from float images in 0..1 to features.
        feature_dim: Width of the features.
    """

    make: Callable[[], nn.Module]
    feature_dim: int


class TransferRow(NamedTuple):
    """A row's result on a set.

    Attributes:
        score: Test score in the set's metric, 0..1.
        chosen: Hyper-parameters that validation images chose.
        answer_X: int64 answers to the test images, in order.
    """

    score: float
    chosen: dict[str, Any]
    answer_X: Int64


def check_set(chosen: TransferSet) -> None:
    """Refuse a set that cannot be transferred to; no image is read.

    Raises:
        ConfigError: If labels are missing or too few, or the metric is unknown.
    """
    metric(chosen.metric)
    for images in (chosen.train, chosen.test):
        if not len(images.label_X) or (images.label_X < 0).any():
            raise ConfigError(
                f"{images.name} has images without a label, or none: transfer needs labelled ones. "
                "Leave the set out, or pack it with labels."
            )
    try:
        check_labels(chosen.train.label_X)
    except ConfigError as error:
        raise ConfigError(f"{chosen.train.name}: {error}") from error


def transfer_row(
    row: str,
    chosen: TransferSet,
    pretrained: Network,
    untrained: Network,
    *,
    steps: int | None = None,
    grid: Grid | None = None,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    say: Callable[[str], None] = lambda _: None,
) -> TransferRow:
    """Make one row of a set's table; see :data:`PROTOCOL`.

    Args:
        row: One of :data:`ROWS`.
        chosen: The set.
        pretrained: The network of ``linear`` and ``finetune``.
        untrained: The network of ``random_init``.
        steps: Steps of the last training; None for the paper's.
        grid: Rates and decays; None for the paper's.
        seed: Seed of the split and of the order of images.
        device: Where to train.
        say: Told what is being done.

    Raises:
        ConfigError: If the row is unknown, or the set cannot be used.
        FloatingPointError: If a feature or every fine-tuned network is not finite.
    """
    check_set(chosen)
    if row not in ROWS:
        raise ConfigError(f"transfer row {row!r} is unknown: choose from {', '.join(ROWS)}.")
    if row == "linear":
        return _linear(chosen, pretrained, seed, device)
    is_random = row == "random_init"
    return _tuned(
        chosen,
        untrained if is_random else pretrained,
        steps or (RANDOM_STEPS if is_random else STEPS),
        grid or (RANDOM_GRID if is_random else TUNED_GRID),
        seed,
        device,
        say,
    )


def successive_halving(
    candidates: Sequence[Any],
    score: Callable[[Any, int], float],
    budgets: Sequence[int],
    keep: int = _KEEP,
) -> Any:
    """Return the best candidate: all get the first budget, the best ``1 / keep`` of them the next.

    Source: Karnin et al. 2013; Jamieson & Talwalkar 2016.

    Args:
        candidates: One or more; of equals the first wins.
        score: Given a candidate and a budget, its score; NaN is worse than all.
        budgets: Rising budgets, a round each; one candidate left ends it.
        keep: The divisor.
    """
    left = list(candidates)
    for number, budget in enumerate(budgets):
        if len(left) == 1:
            break
        scored = [(score(candidate, budget), candidate) for candidate in left]
        scored.sort(key=lambda pair: -pair[0] if pair[0] == pair[0] else float("inf"))
        is_last = number == len(budgets) - 1
        left = [candidate for _, candidate in scored[: 1 if is_last else -(-len(left) // keep)]]
    return left[0]


def _linear(chosen: TransferSet, network: Network, seed: int, device: torch.device) -> TransferRow:
    """Fit the linear probe."""
    encoder = network.make().to(device)
    train, test = (
        Features(*extract(encoder, images.plain(np.arange(len(images.label_X))), device))
        for images in (chosen.train, chosen.test)
    )
    probe = lbfgs_probe(train, test, metric=chosen.metric, seed=seed, device=device)
    return TransferRow(probe.score, {"l2": probe.l2}, probe.answer_X)


def _tuned(
    chosen: TransferSet,
    network: Network,
    steps: int,
    grid: Grid,
    seed: int,
    device: torch.device,
    say: Callable[[str], None],
) -> TransferRow:
    """Choose rate and decay on held-out images, train once more on all, and answer."""
    train, test = chosen.train, chosen.test
    known_C, measure = np.unique(train.label_X), metric(chosen.metric)
    fitting, held_out = balanced_split(train.label_X, seed)
    if not len(held_out):
        raise ConfigError(
            f"{train.name}: no class has 5 images, so that none can be held out to choose a rate. "
            "Take a set with more images."
        )

    def tune(rows: Int64, candidate: tuple[float, float], num_steps: int) -> Classifier:
        rate, decay = candidate
        settings = FinetuneSettings(
            epochs=0,
            steps=num_steps,
            batch_size=_BATCH,
            rate=rate * _BATCH / min(_BATCH, len(rows)),
            weight_decay=decay,
            adapt_batch_norm=True,
            seed=seed,
        )
        model = Classifier(network.make(), network.feature_dim, len(known_C))
        finetune(model, train, rows, known_C, settings, device)
        return model

    def score(candidate: tuple[float, float], num_steps: int) -> float:
        try:
            model = tune(fitting, candidate, num_steps)
        except FloatingPointError:
            found = float("nan")  # too high a rate is one of the grid's answers
        else:
            answer_X = answers(model, train, held_out, known_C, device)
            found = measure(answer_X, train.label_X[held_out])
        rate, decay = candidate
        say(f"{chosen.name}: rate {rate:.2g}, decay {decay:.2g}, {num_steps} steps: {found:.1%}")
        return found

    budgets = [max(1, steps // _KEEP**k) for k in range(_ROUNDS, 0, -1)]
    best = successive_halving(grid, score, budgets)
    model = tune(np.arange(len(train.label_X)), best, steps)
    answer_X = answers(model, test, np.arange(len(test.label_X)), known_C, device)
    rate, decay = best
    return TransferRow(
        measure(answer_X, test.label_X), {"rate": rate, "weight_decay": decay}, answer_X
    )

"""Transfer's rows: held-out images choose, the test set is only scored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastclr.config import ConfigError
from fastclr.evaluation import transfer
from fastclr.evaluation.transfer import (
    RANDOM_GRID,
    ROWS,
    TUNED_GRID,
    Network,
    TransferSet,
    successive_halving,
    transfer_row,
)
from tests.evaluation.tuning import FEATURES, encoder, labelled

SET = TransferSet("tiles", "top1", labelled("train", 90, 1), labelled("test", 60, 2))
NETWORKS = Network(lambda: encoder(0), FEATURES), Network(lambda: encoder(9), FEATURES)


def test_the_papers_grids():
    assert len(TUNED_GRID) == 7 * 8 and len(RANDOM_GRID) == 7 * 8
    rates, decays = ({pair[k] for pair in TUNED_GRID} for k in (0, 1))
    assert (min(rates), max(rates)) == pytest.approx((1e-4, 0.1))
    assert min(decays) == 0 and sorted(decays)[1] == pytest.approx(1e-6)
    assert max(decays) == pytest.approx(1e-3)
    rates, decays = ({pair[k] for pair in RANDOM_GRID} for k in (0, 1))
    assert (min(rates), max(rates)) == pytest.approx((1e-3, 1))
    assert (min(decays), max(decays)) == pytest.approx((1e-5, 10**-1.5))


def test_successive_halving_gives_the_longest_budgets_to_the_best():
    seen: dict[int, list[int]] = {}

    def score(candidate, budget):
        seen.setdefault(budget, []).append(candidate)
        return float("nan") if candidate == 26 else -abs(candidate - 17) / budget

    assert successive_halving(range(27), score, (1, 3, 9)) == 17
    assert [len(seen[b]) for b in (1, 3, 9)] == [27, 9, 3]
    assert sorted(seen[9]) == [16, 17, 18] and 26 not in seen[3]
    assert successive_halving([5], score, (1,)) == 5
    assert successive_halving([1, 2], lambda c, b: 0.0, (1,)) == 1, "of equals the first"


@pytest.mark.parametrize("row", ROWS)
def test_each_row_learns_and_is_repeatable(row):
    grid = ((0.3, 1e-5), (1e-9, 0.0), (1e14, 0.0))
    found = [
        transfer_row(row, SET, *NETWORKS, steps=27, grid=grid) for _ in range(2)
    ]  # the highest rate is no number, and no error
    assert found[0].score > 0.8 and found[0].score == found[1].score
    assert found[0].score == (found[0].answer_X == SET.test.label_X).mean()
    if row != "linear":
        assert found[0].chosen == {"rate": 0.3, "weight_decay": 1e-5}


def test_rows_take_the_networks_they_are_named_for():
    made = []
    networks = [
        Network(lambda name=name, k=k: made.append(name) or encoder(k), FEATURES)
        for k, name in enumerate(("pretrained", "untrained"))
    ]
    grid = ((0.1, 0.0), (0.2, 0.0))
    for row, name in zip(ROWS, ("pretrained", "pretrained", "untrained"), strict=True):
        made.clear()
        transfer_row(row, SET, *networks, steps=3, grid=grid)
        assert set(made) == {name}


def test_test_images_choose_nothing():
    grid = ((0.3, 0.0), (1e-9, 0.0))
    spoiled = replace(SET, test=labelled("test", 60, 2, noise=4000.0))
    chosen = [transfer_row("finetune", s, *NETWORKS, steps=9, grid=grid) for s in (SET, spoiled)]
    assert chosen[0].chosen == chosen[1].chosen and chosen[0].score > chosen[1].score


def test_the_metric_is_the_sets():
    train = labelled("train", 90, 1)
    uneven = np.flatnonzero((train.label_X != 4) | (np.arange(90) < 20))
    few = replace(
        train,
        label_X=train.label_X[uneven],
        plain=lambda rows: train.plain(uneven[rows]),
    )
    found = transfer_row("linear", TransferSet("few", "mean_per_class", few, few), *NETWORKS)
    rights = found.answer_X == few.label_X
    assert found.score == pytest.approx(
        np.mean([rights[few.label_X == k].mean() for k in (0, 2, 4)])
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "top5"}, "metric 'top5' is unknown"),
        ({"test": replace(SET.test, label_X=np.full(60, -1))}, "test has images without a label"),
        ({"train": replace(SET.train, label_X=np.zeros(90, int))}, "train: a linear probe needs"),
    ],
)
def test_sets_that_cannot_be_used(changes, message):
    with pytest.raises(ConfigError, match=message):
        transfer_row("linear", replace(SET, **changes), *NETWORKS)


def test_unknown_rows():
    with pytest.raises(ConfigError, match="transfer row 'knn' is unknown"):
        transfer_row("knn", SET, *NETWORKS)


def test_too_few_to_hold_any_out():
    small = replace(SET, train=labelled("small", 24, 1, classes=12))
    with pytest.raises(ConfigError, match="small: no class has 5 images"):
        transfer.transfer_row("finetune", small, *NETWORKS, steps=3)

"""The subsets are balanced, the same for all, and written down."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fastclr.config import ConfigError
from fastclr.evaluation.semi_supervised import (
    balanced_subset,
    load_subset,
    save_subset,
    settings_for,
)

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))


@pytest.mark.parametrize(("fraction", "each"), [(0.01, 5), (0.1, 50), (1.0, 500), (1e-6, 1)])
def test_each_class_has_its_share(fraction, each):
    rows = balanced_subset(LABELS, fraction)
    assert (np.diff(rows) > 0).all()
    assert np.bincount(LABELS[rows]).tolist() == [each] * 10


def test_it_is_a_function_of_labels_and_seed_that_never_changes():
    """Golden: others have published scores on these images."""
    assert balanced_subset(np.arange(40) % 4, 0.25, seed=0).tolist() == GOLDEN
    again = balanced_subset(LABELS, 0.01, 3)
    np.testing.assert_array_equal(again, balanced_subset(LABELS, 0.01, 3))
    assert len(np.intersect1d(again, balanced_subset(LABELS, 0.01, 4))) < 5


GOLDEN = [0, 2, 15, 17, 29, 31, 32, 34]


def test_one_percent_is_part_of_ten():
    assert np.isin(balanced_subset(LABELS, 0.01, 1), balanced_subset(LABELS, 0.1, 1)).all()


def test_the_choice_is_even_over_places():
    chosen = np.concatenate([balanced_subset(LABELS, 0.1, seed) for seed in range(40)])
    parts = np.bincount(chosen // 500)
    assert parts.min() > 0.9 * parts.mean() and parts.max() < 1.1 * parts.mean()


def test_small_classes_give_what_they_have_and_unlabelled_images_nothing():
    label_X = np.concatenate([np.zeros(100, int), np.ones(3, int), np.full(50, -1), [7]])
    rows = balanced_subset(label_X, 0.5)
    values, counts = np.unique(label_X[rows], return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {0: 17, 1: 3, 7: 1}


@pytest.mark.parametrize("fraction", [0, 1.01, -1, float("nan")])
def test_a_share_out_of_range(fraction):
    with pytest.raises(ConfigError, match="more than 0, at most 1"):
        balanced_subset(LABELS, fraction)


def test_no_labels():
    with pytest.raises(ConfigError, match="no image has a label"):
        balanced_subset(np.full(5, -1), 0.1)


def test_the_papers_schedule():
    one = settings_for(0.01, 12_811)
    assert (one.epochs, one.batch_size, one.weight_decay) == (60, 4096, 0)
    assert one.rate * one.batch_size / 256 == pytest.approx(0.8)
    assert (settings_for(0.1, 128_116).epochs, settings_for(0.1, 128_116).batch_size) == (30, 4096)
    assert settings_for(1.0, 50_000).epochs == 30
    for share, paper in ((0.01, 12_811), (0.1, 128_116), (1.0, 1_281_167)):
        small = settings_for(share, round(share * 50_000))
        assert small.batch_size == 160
        steps = math.ceil(share * 50_000 / small.batch_size)
        assert steps == math.ceil(paper / 4096), "as many steps an epoch as the paper"
    assert settings_for(0.01, 2).batch_size == 2
    assert settings_for(1.0, 10**7).batch_size == 4096


def test_lists_are_kept_and_checked(tmp_path):
    rows = balanced_subset(LABELS, 0.01, 9)
    save_subset(tmp_path / "a.json", rows, LABELS, fraction=0.01, seed=9)
    np.testing.assert_array_equal(load_subset(tmp_path / "a.json", LABELS), rows)
    facts = json.loads((tmp_path / "a.json").read_text())
    assert (facts["fraction"], facts["seed"], facts["num_images"]) == (0.01, 9, 5000)
    for labels in (LABELS[::-1], LABELS[:-1]):
        with pytest.raises(ConfigError, match="another set"):
            load_subset(tmp_path / "a.json", labels)
    for ids in ([0, 0], [-1], [5000], [[1]], []):
        (tmp_path / "b.json").write_text(json.dumps({**facts, "ids": ids}))
        with pytest.raises(ConfigError, match="another set"):
            load_subset(tmp_path / "b.json", LABELS)
    for text in ("", "[]", "{}", '{"ids": "x", "labels_sha256": 1}', '{"ids": null}'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ConfigError, match="no list of images"):
            load_subset(tmp_path / "b.json", LABELS)

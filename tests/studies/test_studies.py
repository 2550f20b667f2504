"""Every study runs on a toy grid, and its pages say what it did."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastclr.evaluation import transfer
from fastclr.studies import STUDIES
from fastclr.studies.images import with_target
from fastclr.studies.pages import write_pages, write_study
from fastclr.studies.scales import TOY
from fastclr.studies.summaries import summary

# Arms that between them use all that a study has; the others differ in numbers only.
GRIDS = {
    "heads": ("untrained", "none", "linear 4", "mlp 8"),
    "head_spectrum": None,
    "layers": None,
    "forgetting": ("crop, colour, rotation",),
    "alternating": ("joint", "K = 4", "K = 4, four batches", "K = 4, new head at half time",
                    "random head, fixed", "low-rank projection, fixed", "first half of h"),
    "autoencoder_heads": ("autoencoder, frozen", "orthogonal, frozen", "PCA of h, frozen",
                          "learned, tanh", "autoencoder, frozen, z-score"),
    "losses": ("NT-Xent 0.1", "NT-Logistic 0.2", "margin 0.4, semi-hard"),
    "temperature": ("cosine, 0.05", "dot product, 10"),
    "augmentations": ("crop", "crop + colour", "rotate + cutout", "sobel + noise"),
    "color_strength": ("no colour distortion", "1", "supervised, 1/2"),
    "blur_flip": ("blur alone",),
    "batch_epochs": ("small batch, sqrt, a third of the epochs",),
    "optimizer": ("LARS, small batch", "SGD, small batch"),
    "batch_statistics": ("quarters",),
    "encoder_size": ("supervised, resnet14, full width", "SimCLR, resnet8, double width"),
    "color_histogram": None,
    "semi_supervised": None,
    "transfer": ("SimCLR", "untrained"),
    "cifar10": ("rate 1.0, temperature 0.5", "supervised"),
}  # fmt: skip


def some(name):
    """Return a study with a few of its arms."""
    study, wanted = STUDIES[name], GRIDS[name]
    return replace(
        study,
        arms=lambda scale: {
            arm: found
            for arm, found in study.arms(scale).items()
            if wanted is None or arm in wanted
        },
        claims=lambda arms: study.claims(list(study.arms(TOY))),
    )


def test_every_study_has_a_toy_grid():
    assert list(GRIDS) == list(STUDIES)
    for name, wanted in GRIDS.items():
        assert set(wanted or ()) <= set(STUDIES[name].arms(TOY))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_on_a_toy_grid(name, study, images, toy, tmp_path, monkeypatch):
    chosen = some(name)
    if name == "transfer":
        images = with_target(images, (str(toy.train), str(toy.test)), TOY)
        for grid in ("TUNED_GRID", "RANDOM_GRID"):
            monkeypatch.setattr(transfer, grid, ((0.1, 0.0), (0.01, 0.0)))
    rows = study(name, chosen, of=images)
    facts = {**images.facts, "name": "tiles", "num_train": 96, "num_test": 64}
    found = summary(name, chosen, "toy", TOY, facts, rows, 1)
    folder = tmp_path / "results" / name / "toy"
    write_study(folder, found)
    write_pages(tmp_path)

    assert found["done"] == found["runs"] == len(rows) == len(chosen.arms(TOY))
    for arm in found["arms"]:
        values = [cell for cell in arm["values"].values() if cell[0] is not None]
        assert values
        assert all(cell[2] == 1 and cell[1] is None for cell in values)
    assert found["headings"] == list(STUDIES[name].columns), "no arm has a score of the others"
    assert all(v["verdict"].startswith(("no verdict", "not judged")) for v in found["verdicts"])
    assert json.loads((folder / "study.json").read_text()) == found
    assert (folder / "figure.svg").read_text().startswith("<svg xmlns=")
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"## {STUDIES[name].title} (toy)" in text
    assert all(arm in text for arm in chosen.arms(TOY))
    assert list(tmp_path.glob("work/*/")) == []

"""Scoring a run: what is done is kept, what is missing is done, and bad input is told in a line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastclr import answers, protocols, runs
from fastclr.cli import guard
from fastclr.commands.evaluate import evaluate
from fastclr.config import Config, ConfigError, EncoderConfig, HeadConfig, ViewsConfig
from fastclr.evaluation import (
    forgetting,
    linear_sgd,
    picture_file,
    semi_supervised,
    transfer,
)
from fastclr.files import sha256_of
from fastclr.protocols import PROTOCOLS, Outcome, Protocol, score
from fastclr.simclr import SimCLR
from fastclr.subject import Options, Subject
from pipelines.evaluation_views import evaluation_rows
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

CONFIG = Config(
    epochs=1,
    run_dir="-",
    encoder=EncoderConfig(name="resnet10", width=0.25, stem="small_stride2"),
    head=HeadConfig(hidden_dim=8, output_dim=8),
    views=ViewsConfig(size=16),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack 160 training and 32 test tiles of 16 classes."""
    folder = tmp_path_factory.mktemp("photos")
    write_photo_tiles(folder / "images", train_per_photo=10, test_per_photo=2)
    for split in ("train", "test"):
        write_shards(folder / "images" / split, folder / split)
    return folder


def make_run(folder: Path, config: Config = CONFIG, built: Config | None = None) -> Path:
    """Make a run of untrained weights; ``built`` is what they are of."""
    checkpoint = folder / "checkpoints" / "step-0000001"
    checkpoint.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": asdict(config)}))
    model = SimCLR.from_config(replace(built or config, seed=1))
    save(model.state_dict(), checkpoint)
    return folder


def save(state: dict[str, torch.Tensor], checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    facts = {"step": 1, "sha256": {file.name: sha256_of(file)}}
    (checkpoint / "fastclr.json").write_text(json.dumps(facts))
    (checkpoint.parent / "latest").write_text(json.dumps(checkpoint.name))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every schedule one of seconds."""
    settings = linear_sgd.SGDSettings(epochs=3, batch_size=64)
    monkeypatch.setattr(linear_sgd, "SMALL_IMAGES", settings)
    monkeypatch.setattr(semi_supervised, "EPOCHS", {0.01: 2, 0.1: 1})
    monkeypatch.setattr(forgetting, "EPOCHS", 1)
    monkeypatch.setattr(transfer, "TUNED_GRID", ((0.01, 0.0), (0.1, 0.0)))
    monkeypatch.setattr(transfer, "RANDOM_GRID", ((0.1, 1e-5),))


def opened(run: Path, data: Path, said: list[str] | None = None, **options) -> Subject:
    say = (said if said is not None else []).append
    return Subject.open(run, f"{data}/train", f"{data}/test", Options(**options), say)


def entries(run: Path) -> dict:
    return json.loads((run / "scores.json").read_text())["protocols"]


@pytest.mark.usefixtures("short")
def test_all_of_them_once_and_only_once(run: Path, data: Path, capsys) -> None:
    sets = (run, f"{data}/train", f"{data}/test", ("all",))
    options = {
        "transfer": (f"{data}:mean_per_class",),
        "transfer_steps": 4,
        "head_layers": 1,
        "cached_views": 2,
        "finetune_epochs": 1,
        "maps": ("tsne",),
    }
    assert guard(lambda: evaluate(*sets, **options)) == 0
    rows = [f"transfer/{data.name}/{row}" for row in transfer.ROWS]
    kept = entries(run)
    # No probe was trained beside this encoder.
    assert list(kept) == [*(name for name in PROTOCOLS if name != "linear-joint"), *rows]
    shown = capsys.readouterr().out
    for name, entry in kept.items():
        assert all(0 <= value <= 1 for value in entry["scores"].values()) and entry["minutes"] > 0
        assert len(entry["settings"]["text"]) > 50 and entry["of"]["checkpoint"] == "step-0000001"
        assert name[:12] in shown or name.startswith("transfer")
    assert kept["semi-1"]["settings"]["head_layers"] == 1
    assert kept["semi-1"]["settings"]["epochs"] == 2 and kept["semi-10"]["settings"]["epochs"] == 1
    assert kept["finetune"]["settings"]["epochs"] == 1
    assert kept["linear-sgd"]["settings"]["cached_views"] == 2
    assert kept[rows[0]]["scores"].keys() == {"mean_per_class"}
    ids = json.loads(next((run / "subsets").glob("*-0.1-0.json")).read_text())["ids"]
    assert len(ids) == 16 and kept["semi-10"]["chosen"] == {"num_images": 16}
    # The top of the file is the quick protocol's, as the report reads it.
    whole = json.loads((run / "scores.json").read_text())
    assert whole["scores"]["trained"]["knn_top1"] == kept["quick"]["scores"]["knn_top1"]
    assert whole["scores"]["trained"]["knn_top1"] == kept["knn"]["scores"]["top1"]

    before = (run / "scores.json").read_bytes()
    assert guard(lambda: evaluate(*sets, **options)) == 0
    assert (run / "scores.json").read_bytes() == before, "done before"
    sheet = (run / "scores.md").read_text().splitlines()
    assert sheet[0] == "| protocol | score | % | minutes |"
    for name, entry in kept.items():
        metric, value = next(iter(entry["scores"].items()))
        line = f"| {name} | {metric} | {100 * value:.2f} | {entry['minutes']:.1f} |"
        assert line in sheet
    assert "Every layer:" in sheet and "What can be told of an image:" in sheet

    other = make_run(run.parent / "other")
    shutil.copytree(run / "answers", other / "answers")
    found = answers.compare(run, other)
    assert {"linear-lbfgs", "semi-1", rows[2]} <= found.keys()
    assert all(f.p_value == 1 and f.num_different == 0 for f in found.values())


def counted(calls: list[str], name: str, error: BaseException | None = None) -> Protocol:
    def run(subject: Subject) -> Outcome:
        calls.append(name)
        if error:
            raise error
        return Outcome({"top1": 0.5}, {})

    return Protocol(lambda s: {"text": "-", "seed": s.options.seed}, run)


def test_an_interrupted_call_goes_on_with_what_is_missing(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fakes = {name: counted(calls, name) for name in ("ridge", "knn", "semi-1")}
    interrupted = {**fakes, "knn": counted(calls, "knn", KeyboardInterrupt())}
    monkeypatch.setattr(protocols, "PROTOCOLS", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(opened(run, data), ["all"])
    assert list(entries(run)) == ["ridge"]
    monkeypatch.setattr(protocols, "PROTOCOLS", fakes)
    assert list(score(opened(run, data), ["all"])) == ["ridge", "knn", "semi-1"]
    assert calls == ["ridge", "knn", "knn", "semi-1"]
    calls.clear()
    score(opened(run, data), ["knn"])
    assert calls == []
    score(opened(run, data), ["knn"], again=True)
    score(opened(run, data, seed=4), ["knn"])  # other settings
    assert calls == ["knn", "knn"] and entries(run)["knn"]["settings"]["seed"] == 4
    calls.clear()
    later = (run / "checkpoints" / "step-0000001").rename(run / "checkpoints" / "step-0000002")
    facts = json.loads((later / "fastclr.json").read_text())
    (later / "fastclr.json").write_text(json.dumps({**facts, "step": 2}))
    score(opened(run, data, seed=4), ["knn"])  # another checkpoint
    assert calls == ["knn"]


def test_the_quick_protocol_keeps_the_others(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(protocols, "PROTOCOLS", {"ridge": counted(calls, "ridge")})
    score(opened(run, data), ["ridge"])
    runs.evaluate(run, f"{data}/train", f"{data}/test", lambda _: None)
    whole = json.loads((run / "scores.json").read_text())
    assert whole["protocols"]["ridge"]["scores"] == {"top1": 0.5} and "trained" in whole["scores"]


@pytest.mark.usefixtures("short")
def test_views_on_the_fly(run: Path, data: Path) -> None:
    found = score(opened(run, data, cached_views=0), ["linear-sgd"])["linear-sgd"]
    assert found["settings"]["cached_views"] == 0 and 0 < found["scores"]["top1"] <= 1


def packed(folder: Path, classes: dict[str, int]) -> Path:
    """Pack images of classes; unlabelled ones where there is no name."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / "images" / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{k}.png")
    write_shards(folder / "images", folder / "set")
    return folder / "set"


def refused(capsys, *arguments, code: int = 78) -> str:
    assert guard(lambda: evaluate(arguments[0], *map(str, arguments[1:3]), *arguments[3:])) == code
    lines = capsys.readouterr().err.splitlines()
    return next(line for line in lines if line.startswith("error: "))


def with_weights(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    checkpoint = run / "checkpoints" / "step-0000001"
    state = load_file(checkpoint / "model.safetensors")
    change(state)
    save(state, checkpoint)


@pytest.mark.parametrize(
    "protocol", ["quick", "knn", "linear-lbfgs", "semi-1", "layers", "forgetting", "pictures"]
)
def test_weights_of_another_architecture(tmp_path: Path, data: Path, capsys, protocol) -> None:
    wide = replace(CONFIG, encoder=replace(CONFIG.encoder, width=0.5))
    run = make_run(tmp_path / "run", built=wide)
    said = refused(capsys, run, f"{data}/train", f"{data}/test", (protocol,))
    assert "step-0000001 do not fit the model" in said and "Use the encoder" in said
    assert not (run / "scores.json").exists()


def test_a_tensor_more_or_less(run: Path, data: Path, capsys) -> None:
    with_weights(run, lambda state: state.update(extra=torch.zeros(1)))
    said = refused(capsys, run, f"{data}/train", f"{data}/test", ("knn",))
    assert "1 tensors differ, the first is extra: (1,) there, missing here" in said
    with_weights(run, lambda state: [state.pop("extra"), state.pop("encoder.network.conv1.weight")])
    said = refused(capsys, run, f"{data}/train", f"{data}/test", ("knn",))
    assert "encoder.network.conv1.weight: missing there" in said


def test_features_that_are_not_finite(run: Path, data: Path, capsys) -> None:
    with_weights(run, lambda state: state["encoder.network.conv1.weight"].fill_(float("nan")))
    for name in ("quick", "ridge", "linear-sgd", "layers", "forgetting", "pictures"):
        said = refused(capsys, run, f"{data}/train", f"{data}/test", (name,), code=70)
        assert "not finite" in said and "earlier checkpoint" in said


def test_labels_and_classes_that_do_not_do(run: Path, data: Path, tmp_path: Path, capsys) -> None:
    two = packed(tmp_path / "two", {"a": 12, "b": 12})
    three = packed(tmp_path / "three", {"a": 12, "b": 12, "c": 12})
    one = packed(tmp_path / "one", {"a": 24})
    none = packed(tmp_path / "none", {"": 24})
    assert "a probe of one says nothing of the other" in refused(capsys, run, two, three)
    assert "images of one class alone" in refused(capsys, run, one, one)
    assert "images without a label" in refused(capsys, run, none, none)
    assert "images without a label" in refused(capsys, run, two, none)


def test_what_is_asked_for_makes_no_sense(run: Path, data: Path, tmp_path: Path, capsys) -> None:
    sets = (run, f"{data}/train", f"{data}/test")
    assert "name folders" in refused(capsys, *sets, ("transfer",))
    twice = (str(data), str(tmp_path / data.name))
    assert "two transfer sets are called" in refused(capsys, *sets, ("transfer",), twice)
    said = refused(capsys, *sets, ("transfer",), (f"{data}:top5",))
    assert "metric 'top5' is unknown" in said
    assert "it has 2" in refused(capsys, *sets, ("semi-1",), (), 0, 7)
    assert "config.json cannot be read" in refused(capsys, tmp_path, *sets[1:], ("knn",))
    with pytest.raises(ConfigError, match="protocol 'knm' is unknown: choose from quick"):
        score(opened(run, data), ["knm"])
    (run / "scores.json").write_text('{"protocols": 3}')
    assert "scores.json is damaged" in refused(capsys, *sets, ("knn",))


def test_what_is_not_there_is_asked_for(run: Path, data: Path, capsys, monkeypatch) -> None:
    sets = (run, f"{data}/train", f"{data}/test")
    said = refused(capsys, *sets, ("linear-joint",))
    assert "step-0000001 has no probe: only a run with --evaluation.joint-probe" in said

    def tried(**options) -> str:
        command = guard(lambda: evaluate(*sets, **options))
        assert command == 78
        lines = capsys.readouterr().err.splitlines()
        return next(line for line in lines if line.startswith("error: "))

    monkeypatch.setitem(sys.modules, "faiss", None)
    said = tried(protocol=("knn",), neighbours_by="faiss")
    assert "faiss cannot be imported" in said and "install faiss-cpu" in said
    for module, package, name in (
        ("openTSNE", "openTSNE", "opentsne"),
        ("umap", "umap-learn", "umap"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        said = tried(protocol=("pictures",), maps=(name,))
        assert f"needs {package}, which cannot be imported" in said and "pip install" in said
    said = tried(protocol=("pictures",), layers=("h", "encoder.layer9"))
    assert "no layer 'encoder.layer9': choose from encoder." in said
    assert not (run / "pictures.npz").exists()


def test_pictures_are_of_this_run_s_images(run: Path, data: Path) -> None:
    subject = opened(run, data, maps=("tsne",), map_points=24, layers=("h", "encoder.layer1"))
    entry = score(subject, ["pictures"])["pictures"]
    made = picture_file.load(run)
    assert entry["settings"]["num_points"] == 24 and list(made.layers) == ["encoder.layer1", "h"]
    row_N = np.linspace(0, 31, 24).round().astype(int)
    np.testing.assert_array_equal(made.label_N, subject.test.label_N[row_N])
    wanted, _ = evaluation_rows(subject.test, 16, row_N)
    np.testing.assert_array_equal(made.image_NHWC, wanted.permute(0, 2, 3, 1).numpy())
    assert len(set(made.label_N[made.query_Q])) == len(made.query_Q) == 10
    assert made.confusion_CC.sum() == 32
    right = np.trace(made.confusion_CC) / 32
    quick = score(subject, ["quick"])["quick"]["scores"]["linear_top1"]
    assert right == entry["scores"]["linear_top1"] == quick
    for name, layer in made.layers.items():
        train, test = (part[name].h_XF for part in subject.layer_features(("h", "encoder.layer1")))
        unit, keys = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (test[row_N], train))
        similarity = unit[made.query_Q] @ keys.T
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :8]
        np.testing.assert_allclose(
            layer.similarity_QK, np.take_along_axis(similarity, order, 1), atol=1e-5
        )
        found, _ = evaluation_rows(subject.train, 16, order[0])
        shown = made.found_MHWC[layer.near_QK[0]]
        np.testing.assert_array_equal(shown, found.permute(0, 2, 3, 1).numpy())
        values = np.linalg.eigvalsh(np.cov(test.T, bias=True))[::-1]
        np.testing.assert_allclose(layer.spectrum_F, values, atol=1e-6 * values[0])
        assert all(np.isfinite(value) for value in layer.numbers.values())
    assert score(opened(run, data), ["knn"])  # others do not touch them
    (run / "pictures.npz").unlink()
    score(subject, ["pictures"])
    assert (run / "pictures.npz").exists(), "made again where the file is gone"


def test_runs_that_cannot_be_compared(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    with pytest.raises(ConfigError, match="no answers to the same test images"):
        answers.compare(run, other)
    label_X = np.arange(30) % 3
    right = [label_X.copy(), label_X.copy()]
    right[1][:9] = 7
    for folder, answer_X in zip((run, other), right, strict=True):
        answers.keep_answers(folder, "a/b", answer_X, label_X, "digest", "top1")
    found = answers.compare(run, other)["a/b"]
    assert found.difference == pytest.approx(0.3) and found.p_value == pytest.approx(2 / 2**9)
    (other / "answers" / "a--b.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ConfigError, match="is damaged"):
        answers.compare(run, other)

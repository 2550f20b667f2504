"""A sound build passes on any number of ranks; each broken one fails, in the rows about it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import deepspeed
import pytest

SCRIPT = Path(__file__).with_name("verify_ranks.py")
pytestmark = pytest.mark.slow

CHECKED = {
    "loss value", "loss gradient", "BatchNorm", "gradient", "LARS", "order", "views", "resume",
    "clipping",
}  # fmt: skip
NO_BATCH_NORM = {("BatchNorm", "over all ranks"), ("gradient", "model with BatchNorm")}
NOT_APPLICABLE = {
    "bf16": NO_BATCH_NORM,
    "fp16": NO_BATCH_NORM,
    "AdamW": {("LARS", "trust ratio of each layer"), ("LARS", "weights after two steps")},
}
RATIOS = {("LARS", "trust ratio of each layer"), ("LARS", "weights after 2 steps")}
GRADIENT = {("gradient", "model with BatchNorm")}
RESUME = {("resume", "losses of steps 3, 4"), ("resume", "weights and momenta after step 4")}
SAME_PIXELS = ("views", "pixels of all ranks' batches")


def of_losses(*names, ways=("gather", "ring"), kinds=("loss value", "loss gradient")):
    return {(kind, f"{name}, {way}") for kind in kinds for name in names for way in ways}


NORMS = {
    ("BatchNorm", "output of each rank's rows"),
    ("BatchNorm", "gradient by each rank's rows"),
    ("BatchNorm", "gradients of weight and bias"),
}
FAILING = {
    "gather without gradient": GRADIENT
    | of_losses("nt_xent", ways=["gather"], kinds=["loss gradient"]),
    "ranks weighted unequally": GRADIENT | of_losses("nt_xent"),
    "loss summed over ranks": GRADIENT | of_losses("nt_xent"),
    "projections rounded": GRADIENT | of_losses("nt_xent"),
    "no number": of_losses("nt_xent"),
    "mask without offset": GRADIENT | of_losses("nt_xent", "nt_logistic", "margin_triplet"),
    "ratios of partitions": RATIOS,
    "weights that stay": GRADIENT,
    "local BatchNorm": GRADIENT | NORMS | {("BatchNorm", "running mean and variance")},
    "BatchNorm's eps": GRADIENT | NORMS,
    "chunks alone": GRADIENT,
    "an id twice": RESUME
    | {
        ("order", "each image once"),
        ("order", "global batches"),
        ("order", "resumed within an epoch"),
        SAME_PIXELS,
    },
    "a batch fewer": {
        ("order", "batches in an epoch"),
        ("order", "images left over"),
        ("order", "each image once"),
    },
    "views by rank": {("views", "numbers drawn"), SAME_PIXELS},
    "views by place": {SAME_PIXELS},
    "a level off": {("views", "pixels of kornia")},
    "a pixel off": {("views", "pixels of kornia")},
    "forgotten momentum": RESUME,
    "momentum a millionth off": {("resume", "weights and momenta after step 4")},
    "a run that starts over": RESUME,
    "dropout by a generator": RESUME,
    "clipping unasked": {("clipping", "norm that gradients are clipped to")},
    "an error in order": {("order", "which image when")},
    "no fp16 here": {("engine", "two steps"), ("resume", "a run that stops")},
    "an error in loss": {("loss", "losses over all ranks")},  # of both ranks
}
NOT_RUN = {
    "a batch fewer": {("order", "global batches"), ("order", "resumed within an epoch")},
    "an error in loss": {
        ("BatchNorm", "over all ranks"),
        ("engine", "two steps"),
        ("resume", "a run that"),
    },
}


@pytest.fixture(scope="module")
def script():
    """Return what each rank runs, for its names."""
    spec = importlib.util.spec_from_file_location("verify_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(run_ranks):
    """Verify everything on two ranks, and a part on one."""
    return {ranks: run_ranks(SCRIPT, ranks, timeout_seconds=600) for ranks in (1, 2)}


def assert_rows(rows, status, expected):
    """Ask for rows of a status that begin as expected, one each, and for no other."""
    found = {(row["check"], row["what"]) for row in rows if row["status"] == status}
    for check, what in expected:
        alike = {f for f in found if f[0] == check and f[1].startswith(what)}
        assert len(alike) == 1, f"{status} is missing: {check}, {what} among {found}"
        found -= alike
    assert not found, f"{status} without a reason"


def sound(ranks):
    names = ("fp32", "accumulation 4", "bf16")
    more = ("stage 3", "fp16", "AdamW", "LARS of You", "autocast")
    return [(ranks, name) for name in (names if ranks == 1 else names + more)]


def test_everything_was_measured(measured, script):
    assert set(measured[1]) == {name for _, name in sound(1)} == set(script.ON_ONE_RANK)
    assert {name for _, name in sound(2)} == set(script.SOUND)
    assert set(FAILING) == set(script.BROKEN)
    assert set(measured[2]) == set(script.SOUND) | set(script.BROKEN)


@pytest.mark.parametrize(("ranks", "name"), sound(1) + sound(2))
def test_a_sound_build_passes(measured, ranks, name):
    rows = measured[ranks][name]["rows"]
    assert_rows(rows, "FAIL", set())
    assert_rows(rows, "not run", set())
    assert_rows(rows, "not applicable", NOT_APPLICABLE.get(name, set()))
    assert {row["check"] for row in rows} == CHECKED
    for row in rows:
        if row["status"] == "pass":
            assert 0 <= row["deviation"] <= row["limit"] < 1
        else:
            assert row["note"], "no reason"


def test_limits_are_those_of_the_precision(measured):
    limits = {
        name: max(
            r["limit"] for r in measured[2][name]["rows"] if r["check"] == "gradient" and r["limit"]
        )
        for name in ("fp32", "fp16", "bf16")
    }
    assert limits["fp32"] < 5e-5 < 2e-3 < limits["fp16"] < limits["bf16"] <= 0.3


def test_what_a_sound_fp32_build_is_off(measured):
    for row in measured[2]["fp32"]["rows"]:
        least = {"loss value": 0, "order": 0, "resume": 0, "clipping": 0}.get(row["check"])
        if row["check"] in ("loss gradient", "BatchNorm", "gradient", "LARS"):
            assert 0 < row["deviation"] < 1e-4, "nothing was compared"
        elif least is not None:
            assert row["deviation"] < 1e-6


def test_the_json_at_verify_size(measured):
    clipped = {
        name: [r["what"] for r in measured[2][name]["rows"] if r["check"] == "clipping"]
        for name in ("fp32", "accumulation 4")
    }
    assert clipped["fp32"][0].endswith("which names none")
    assert clipped["accumulation 4"] == [
        "norm that gradients are clipped to: the engine's 0.5, the JSON's 0.5"
    ]


@pytest.mark.parametrize("name", FAILING)
def test_a_broken_build_fails_where_it_is_broken(measured, name):
    rows = measured[2][name]["rows"]
    expected = FAILING[name]
    if name == "projections rounded":  # the mean loss may come out right by luck
        luck = of_losses("nt_xent", kinds=["loss value"])
        values = [r for r in rows if r["status"] == "FAIL" and r["check"] == "loss value"]
        assert_rows(values, "FAIL", luck if values else set())
        rows, expected = [r for r in rows if r["check"] != "loss value"], expected - luck
    assert_rows(rows, "FAIL", expected)
    assert_rows(rows, "not run", NOT_RUN.get(name, set()))


def test_a_failed_rank_is_named(measured):
    def notes(name, check):
        return [r["note"] for r in measured[2][name]["rows"] if r["check"] == check]

    assert notes("an error in order", "order") == ["rank 1: OSError: no such device"]
    refusal = f"DeepSpeed {deepspeed.__version__} refuses its JSON: Type fp16 is not supported"
    both = f"ranks [0, 1]: ConfigError: {refusal} on your device."
    assert notes("no fp16 here", "engine") == notes("no fp16 here", "resume") == [both]
    first, second = notes("an error in loss", "loss")
    assert first.startswith("rank 0: ") and second == "rank 1: OSError: no such device"


def test_ranks_out_of_step_do_what_they_can_alone(measured):
    found = measured[2]["an error in loss"]
    rows = found["rows"]
    assert all("lost each other in 'loss'" in r["note"] for r in rows if r["status"] == "not run")
    assert {r["status"] for r in rows if r["check"] in ("order", "views")} == {"pass"}
    assert found["seconds"] < 60, "they waited for each other again and again"


def test_threads_are_as_before(measured):
    assert {found["threads"] for found in measured[2].values()} == {2}


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_left_behind(measured, ranks):
    assert {name: found["left"] for name, found in measured[ranks].items() if found["left"]} == {}

"""What else the DeepSpeed JSON may say reaches the engine through the trainer, and works there."""

from __future__ import annotations

import csv
import io
import re

import pytest

from tests.matrix import cells
from tests.matrix.cells import NUM_STEPS, Cell
from tests.matrix.deviations import EXACT, from_exact, of, over_bounds

pytestmark = pytest.mark.slow
HARMLESS = (
    "small buckets",
    "weights offloaded",
    "prescaled",
    "predivided",
    "prescaled, no reduce-scatter",
    "profiled",
    "timed",
    "csv",
)
# The first two: only without reduce-scatter, which is the default from stage 2 on.
REFUSED_BY_DEEPSPEED = {
    Cell(stage=2, extra="prescaled"): "pre-scale gradients is not yet supported",
    Cell(stage=3, extra="predivided"): "gradient_predivide_factor != 1.0 is not yet supported",
    Cell(extra="unknown in zero"): "offload_optimiser",
}


@pytest.fixture(scope="module")
def measured(train_cells):
    """Train the cells whose JSON says something else."""
    return train_cells("json_keys_ranks.py")


def having(*extras: str) -> list[Cell]:
    """Return the cells of two ranks with these pieces of JSON that train."""
    found = [cell for cell in cells.ON_TWO_RANKS if cell.extra in extras]
    assert {cell.extra for cell in found} == set(extras)
    return [cell for cell in found if cell not in REFUSED_BY_DEEPSPEED]


@pytest.mark.parametrize("cell", having(*HARMLESS), ids=str)
def test_training_stays_that_of_one_process(measured, cell):
    (quotient,) = over_bounds(measured, 2, cell)
    assert quotient.worst < 1, quotient


@pytest.mark.parametrize("cell", having("prescaled", "prescaled, no reduce-scatter"), ids=str)
def test_gradients_are_scaled_before_they_are_added(measured, cell):
    assert not of(measured, 2, cell)["engine"]["scales_afterwards"]


@pytest.mark.parametrize("cell", having("predivided"), ids=str)
def test_gradients_are_divided_before_they_are_added(measured, cell):
    assert of(measured, 2, cell)["engine"]["predivides_by"] == 4


@pytest.mark.parametrize("cell", REFUSED_BY_DEEPSPEED, ids=str)
def test_what_deepspeed_refuses_ends_the_run(measured, cell):
    refused = measured[2]["cells"][str(cell)]["refused"]
    assert refused.startswith("ConfigError") and REFUSED_BY_DEEPSPEED[cell] in refused


@pytest.mark.parametrize("cell", having("communicated in bf16"), ids=str)
def test_gradients_travel_in_bf16(measured, cell):
    away, half = from_exact(measured, 2, cell), from_exact(measured, 1, Cell("bf16"))
    assert 100 * EXACT.weights < away.weights < half.weights
    assert 10 * EXACT.loss < away.loss < half.loss


@pytest.mark.parametrize("cell", having("profiled"), ids=str)
def test_the_profile_is_written(measured, cell):
    text = of(measured, 2, cell)["files"]["flops.txt"]
    assert "Profile Summary at step 4" in text  # profile_step counts from 0
    (macs,) = re.findall(r"fwd MACs per GPU: +([\d.]+) KMACs", text)
    # Multiplications of the convolution (27 a pixel) and the linear layers, and of the norms.
    rows, per_row = 16 / cell.chunks, 9 * 5 * 27 + 45 * 33 + 33 * 17 + 17 * 7
    assert rows * per_row < 1000 * float(macs) < 2 * rows * per_row


@pytest.mark.parametrize("cell", having("timed", "profiled"), ids=str)
def test_the_time_of_each_pass_is_printed(measured, cell):
    printed = of(measured, 2, cell)["printed"]
    micro = re.findall(r"fwd_microstep: [\d.]+ \| bwd_microstep: [\d.]+ ", printed)
    steps = re.findall(r"\| fwd: [\d.]+ \| bwd: [\d.]+ ", printed)
    assert len(micro) == NUM_STEPS * cell.chunks and len(steps) == NUM_STEPS


@pytest.mark.parametrize("cell", having("csv"), ids=str)
def test_the_monitor_writes_what_the_log_has(measured, cell):
    found = of(measured, 2, cell)
    rows = list(csv.DictReader(io.StringIO(found["files"]["train_loss.csv"])))
    assert [float(row["loss"]) for row in rows] == found["losses"]
    assert [int(row["step"]) for row in rows] == [16 * (i + 1) for i in range(NUM_STEPS)]


@pytest.mark.parametrize("cell", having("clipping left out"), ids=str)
def test_nothing_is_clipped_unless_the_json_says_so(measured, cell):
    (quotient,) = over_bounds(measured, 2, cell)
    assert quotient.worst < 1, quotient


@pytest.mark.parametrize(
    "cell", having("unknown", "summed", "unmanaged", "activation checkpointing"), ids=str
)
def test_keys_that_would_train_something_else_are_refused(measured, cell):
    assert measured[2]["cells"][str(cell)].get("refused", "").startswith("ConfigError")

"""Every ZeRO stage, precision, number of ranks and of chunks trains what one process trains."""

from __future__ import annotations

import numpy as np
import pytest

from tests.matrix import cells
from tests.matrix.cells import RANKS, Cell
from tests.matrix.deviations import EXACT, between, from_exact, of, over_bounds, table

pytestmark = pytest.mark.slow
TRAINED = [
    (ranks, cell)
    for ranks in RANKS
    for cell in cells.MATRIX[ranks]
    if cell not in cells.REFUSED + cells.WRONG
]
PLAIN = sorted({cell.exact for _, cell in TRAINED if cell.exact.chunks == 1}, key=str)
ROUNDED = sorted({cell.rounded for _, cell in TRAINED if cell.precision != "fp32"}, key=str)


@pytest.fixture(scope="module")
def measured(train_cells):
    """Train every cell; ``pytest -s`` shows how far the product is from one process in fp32."""
    found = train_cells("matrix_ranks.py")
    print("\nway of the weights, loss; from one process in fp32\n" + table(found))
    return found


def test_the_product_is_complete():
    found = {(ranks, c) for ranks in RANKS for c in cells.MATRIX[ranks]}
    for precision in ("fp32", "autocast", "bf16", "fp16"):
        for stage in range(4):
            for chunks in (1, 4):
                assert {(ranks, Cell(precision, stage, chunks)) for ranks in (1, 2, 4)} <= found


@pytest.mark.parametrize("cell", PLAIN, ids=str)
def test_one_process_trains_what_a_plain_loop_trains(measured, cell):
    plain, start = measured[1]["plain"][str(cell)], measured[1]["start"][cell.norm]
    assert between(measured, of(measured, 1, cell), plain, cell.norm).over(EXACT).worst < 1
    # Were there little training, there would be little to be wrong.
    way = np.subtract(plain["weights"], start)
    assert np.linalg.norm(way) > 0.02 * np.linalg.norm(start)
    assert np.ptp(plain["losses"]) > 0.1


@pytest.mark.parametrize("cell", [c for c in PLAIN if "clipped" in c.extra], ids=str)
def test_clipping_has_something_to_clip(measured, cell):
    clipped, unclipped = (
        measured[1]["plain"][str(c)] for c in (cell, Cell(optimizer=cell.optimizer))
    )
    assert min(clipped["norms"]) > 2
    assert between(measured, clipped, unclipped, cell.norm).weights > 0.05


@pytest.mark.parametrize(("ranks", "cell"), TRAINED, ids=lambda value: str(value))
def test_ranks_stages_precisions_and_chunks_train_what_one_process_trains(measured, ranks, cell):
    quotients = over_bounds(measured, ranks, cell)
    assert max(q.worst for q in quotients) < 1, quotients


@pytest.mark.parametrize("cell", ROUNDED, ids=str)
def test_one_process_in_half_precision_is_close_to_fp32(measured, cell):
    away = from_exact(measured, 1, cell)
    bound = 0.03 if cell.precision == "fp16" else 0.08
    assert 1e-3 < away.weights < bound and 1e-4 < away.loss < bound


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("cell", cells.REFUSED, ids=str)
def test_fp16_without_zero_is_refused(measured, ranks, cell):
    message = measured[ranks]["cells"][str(cell)]["refused"]
    assert message.startswith("ConfigError: fp16 at ZeRO stage 0 is refused")


@pytest.mark.parametrize("cell", cells.WRONG, ids=str)
def test_an_error_exceeds_every_bound(measured, cell):
    for quotient in over_bounds(measured, 2, cell):
        assert min(quotient.loss, quotient.weights) > 1.5, quotient
        assert cell.norm == "layer" or quotient.buffers > 1.5, quotient


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("cell", [c for c in cells.OTHERS if "offloaded" in c.extra], ids=str)
def test_offloading_reaches_the_engine(measured, ranks, cell):
    if cell in cells.MATRIX[ranks]:
        assert of(measured, ranks, cell)["engine"]["offloads"]

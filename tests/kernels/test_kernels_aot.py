"""What the Triton kernels compile to, for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXAMINED = r"(forward|gradient) bounded D=(64|128|256)$"
CHIPS = {80: ("HMMA", 163), 90: ("HGMMA", 227)}  # tensor cores; KiB that a program may share

# Launchers get tensors without data: reading one on the host would raise, and so does a launch
# with other types, constants or options than were examined, as another program.
LAUNCHES = """
import json, torch, aot
from fastclr.kernels import nt_xent

CONFIGURATIONS = [aot.Configuration(*c) for c in nt_xent.configurations()]
rows = torch.empty(600, 16, dtype=torch.float16, device="meta")
stat = torch.empty(600, device="meta")
views = torch.empty(600, dtype=torch.int8, device="meta")

def launch(bound):
    nt_xent.forward(rows[14:44], rows, 14, bound)
    nt_xent.forward(rows[:44], rows, -1, bound, views)
    nt_xent.gradient(rows[2:16], stat[2:16], rows, stat, 2, bound)

launched = {}
for variant, bound in (("bounded", torch.empty((), device="meta")), ("online", None)):
    kernels = aot.requested(lambda: launch(bound), 90)
    names = [f"nt_xent {kind} {variant} D=16" for kind in ("forward", "ranking", "gradient")]
    for name, kernel in zip(names, kernels, strict=True):
        (configuration,) = [c for c in CONFIGURATIONS if c.name == name]
        launched[name] = aot.code(kernel) == aot.code(aot.build(configuration, 90))

(good,) = [c for c in CONFIGURATIONS if c.name == "nt_xent gradient bounded D=256"]
print(json.dumps({
    "launched": launched,
    "unavailable": nt_xent.unavailable(torch.device("cpu")),
    "stack of 4 warps": aot.read(aot.build(good._replace(num_warps=4), 80)).stack,
}))
"""


def run(*command: str) -> subprocess.CompletedProcess:
    """Run Python in a process that compiles instead of interpreting."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = str(BENCHMARKS)
    return subprocess.run(
        [sys.executable, *command], env=environ, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Examine the programs that training takes, once."""
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    done = run(
        str(BENCHMARKS / "kernels_aot.py"),
        *("--json", str(file), "--match", EXAMINED, "--chips", *map(str, CHIPS)),
    )
    assert file.exists(), done.stderr
    return json.loads(file.read_text())


def test_nothing_is_left_out(rows):
    names = [f"nt_xent {p} bounded D={d}" for p in ("forward", "gradient") for d in (64, 128, 256)]
    assert sorted((r["kernel"], r["chip"]) for r in rows) == sorted(
        (name, chip) for name in names for chip in CHIPS
    )


def test_everything_stays_in_registers(rows):
    assert {(r["kernel"], r["chip"]): r["stack"] for r in rows if r["stack"]} == {}
    for r in rows:
        assert r["registers"] * r["warps"] * 32 <= 65536, "or the program does not start"


def test_shared_memory_suffices(rows):
    for r in rows:
        assert 0 < r["shared"] <= CHIPS[r["chip"]][1] * 1024, r


def test_hot_loops_multiply_on_tensor_cores(rows):
    for r in rows:
        assert [*r["tensor_core"]] == [CHIPS[r["chip"]][0]], r


def test_hot_loops_take_one_exponential_an_element_and_no_more(rows):
    assert {r["exps"] for r in rows} == {1.0}


def test_hot_loops_load_ahead(rows):
    assert all(r["async_copies"] > 0 for r in rows)


def test_pointers_move_by_64_bits(rows):
    assert {r["narrow_bases"] for r in rows} == {0}


def test_the_report_finds_no_fault_either(rows):
    assert [r["faults"] for r in rows] == [[]] * len(rows)


@pytest.fixture(scope="module")
def launches():
    """Compile what launchers ask for."""
    done = run("-c", LAUNCHES)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_launches_ask_for_the_programs_that_are_examined(launches):
    assert len(launches["launched"]) == 6
    assert [name for name, same in launches["launched"].items() if not same] == []


def test_a_spill_would_be_seen(launches):
    assert launches["stack of 4 warps"] > 0


def test_without_a_gpu_it_says_why(launches):
    assert launches["unavailable"] == "rows are on cpu, and Triton compiles for CUDA devices"

"""What LARS's Triton kernels compile to, for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHIPS = (80, 90, 100)

PROGRAM = """
import json, re, subprocess, sys, tempfile
from unittest import mock

import aot, torch
from fastclr.kernels import lars

def loads(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [aot.CUOBJDUMP, "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"\\b((?:LDG|STG|ATOM|RED)[\\w.]*)", code)

configurations = {c[0]: aot.Configuration(*c) for c in lars.configurations()}
rows = []
for name, configuration in configurations.items():
    for chip in CHIPS:
        kernel = aot.build(configuration, chip)
        program = aot.read(kernel)
        rows.append({
            "kernel": name, "chip": chip, "stack": program.stack, "shared": program.shared,
            "threads": program.registers * configuration.num_warps * 32,
            "narrow_bases": program.narrow_bases, "operations": loads(kernel),
        })

def launch(dtype, nesterov):
    w, g, v = (list(torch.ones(10000, dtype=dtype).split(5000)) for _ in range(3))
    sumsq_S2 = lars.sums_of_squares(w, g, 0.1)
    lars.update(w, g, v, scale=0.1, rate=1.0, weight_decay=0.1, momentum=0.9, nesterov=nesterov)

launched = {}
for dtype in lars.TYPES:
    for nesterov in (False, True):
        with mock.patch.object(lars, "check"):
            kernels = aot.requested(lambda: launch(dtype, nesterov), 90)
        suffix = str(dtype).removeprefix("torch.")
        names = (f"sums {suffix}", "sums of sums float32",
                 f"update {'nesterov ' * nesterov}{suffix}")
        for name, kernel in zip(names, kernels, strict=True):
            built = aot.build(configurations[f"lars {name}"], 90)
            launched[name] = aot.code(kernel) == aot.code(built)
try:
    lars.check(torch.ones(1))
except lars.KernelUnavailable as error:
    print(json.dumps({"rows": rows, "launched": launched, "cpu": str(error)}))
"""


@pytest.fixture(scope="module")
def found():
    """Compile everything in a process that does not interpret."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = str(BENCHMARKS)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("CHIPS", str(CHIPS))],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_and_type_is_examined(found):
    names = {row["kernel"].removeprefix("lars ") for row in found["rows"]}
    types = ("float16", "bfloat16", "float32")
    each = {f"{kind} {t}" for kind in ("sums", "update", "update nesterov") for t in types}
    assert names == each | {"sums of sums float32"}
    assert len(found["rows"]) == len(names) * len(CHIPS)


def test_nothing_spills(found):
    assert [row["kernel"] for row in found["rows"] if row["stack"]] == []


def test_programs_fit_a_processor(found):
    for row in found["rows"]:
        assert row["threads"] <= 65536 and row["shared"] <= 16 * 1024


def test_pointers_move_by_64_bits(found):
    assert {row["narrow_bases"] for row in found["rows"]} == {0}


def test_whole_chunks_move_16_bytes_at_a_time(found):
    for row in found["rows"]:
        if "sums of sums" not in row["kernel"]:
            assert "LDG.E.128" in row["operations"], row["kernel"]
        if "update" in row["kernel"]:
            assert "STG.E.128" in row["operations"], row["kernel"]


def test_no_atomics(found):
    for row in found["rows"]:
        assert not any(op.startswith(("ATOM", "RED")) for op in row["operations"])


def test_launches_ask_for_the_programs_that_are_examined(found):
    assert len(found["launched"]) == 10
    assert [name for name, same in found["launched"].items() if not same] == []


def test_without_a_gpu_it_says_why(found):
    assert "was given weights on cpu: Triton's kernels run on CUDA" in found["cpu"]

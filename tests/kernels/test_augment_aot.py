"""What the fused augmentation's kernels compile to, for GPUs that are not here."""

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
import json, re, subprocess, tempfile
from unittest import mock

import aot, numpy as np, torch
from fastclr.config import ConfigError
from pipelines import augment_triton, kernels_triton
from pipelines.backends import BACKENDS
from pipelines.policy import SimCLRPolicy

def memory(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [aot.CUOBJDUMP, "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"\\b((?:LDG|STG|ATOM|RED|LDL|STL)[\\w.]*)", code)

configurations = {c[0]: aot.Configuration(*c) for c in kernels_triton.configurations()}
rows = []
for name, configuration in configurations.items():
    for chip in CHIPS if name.endswith(" 224") else ():
        kernel = aot.build(configuration, chip)
        program = aot.read(kernel)
        rows.append({
            "kernel": name, "chip": chip, "stack": program.stack, "shared": program.shared,
            "registers": program.registers, "narrow_bases": program.narrow_bases,
            "operations": memory(kernel),
        })

policy = SimCLRPolicy(blur_prob=1.0)
images = [np.zeros((50, 40, 3), np.uint8)] * 3
params = policy.draw(seed=0, epoch=0, positions=np.arange(3), view=0,
                     sizes_N2=np.full((3, 2), 40, np.int32))

def launch(dtype):
    augment_triton.augment(images, [params] * 2, [policy] * 2, torch.device("cpu"), dtype)

launched = {}
for dtype in kernels_triton.OUTPUTS:
    kernels = aot.requested(lambda: launch(dtype), 90)
    suffix = str(dtype).removeprefix("torch.")
    names = ("resize", "pivots", f"colour {suffix}", f"blur {suffix}")
    for name, kernel in zip(names, kernels, strict=True):
        built = aot.build(configurations[f"augment {name} 224"], 90)
        launched[f"{name}, {suffix}"] = aot.code(kernel) == aot.code(built)
try:
    BACKENDS["triton"]([policy] * 2, torch.device("cpu"), 1)
except ConfigError as error:
    print(json.dumps({"names": [*configurations], "rows": rows, "launched": launched,
                      "cpu": str(error)}))
"""


@pytest.fixture(scope="module")
def found():
    """Compile in a process that does not interpret."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
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
    kinds = ["resize", "pivots"]
    kinds += [f"{kind} {t}" for kind in ("colour", "blur") for t in ("uint8", "bfloat16")]
    assert {*found["names"]} == {f"augment {k} {size}" for k in kinds for size in (32, 96, 224)}
    assert len(found["rows"]) == len(kinds) * len(CHIPS)


def test_nothing_spills(found):
    for row in found["rows"]:
        assert row["stack"] == 0 and row["registers"] < 255, row["kernel"]
        assert not {"LDL", "STL"} & {op[:3] for op in row["operations"]}, row["kernel"]


def test_several_programs_fit_a_processor(found):
    """16 warps at least of the filters, which wait for their loads; more of the others."""
    for row in found["rows"]:
        at_once = 4 if "resize" in row["kernel"] or "blur" in row["kernel"] else 6
        assert at_once * row["registers"] * 32 * 4 <= 65536, row
        assert row["shared"] <= 16 * 1024


def test_pointers_move_by_64_bits(found):
    assert {row["narrow_bases"] for row in found["rows"]} == {0}


def test_filtered_tiles_are_stored_densely(found):
    for row in found["rows"]:
        if "resize" in row["kernel"] or "blur" in row["kernel"]:
            stores = {op for op in row["operations"] if op.startswith("STG")}
            assert stores == {"STG.E.128"}, row


def test_no_atomics(found):
    for row in found["rows"]:
        assert not any(op.startswith(("ATOM", "RED")) for op in row["operations"])


def test_launches_ask_for_the_programs_that_are_examined(found):
    assert len(found["launched"]) == 8
    assert [name for name, same in found["launched"].items() if not same] == []


def test_without_a_gpu_it_says_why(found):
    assert "was given the device cpu: its kernels run on CUDA" in found["cpu"]

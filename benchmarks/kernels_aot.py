"""Write what every Triton kernel compiles to: registers, spills, tensor cores, exponentials.

python benchmarks/kernels_aot.py [--match 'gradient.*D=128'] [--chips 80 90] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import aot
import numpy as np
import triton
from rich.progress import track

from fastclr.facts import now
from fastclr.files import write_durably
from fastclr.kernels import lars, nt_xent
from pipelines import kernels_triton
from pipelines.policy import SimCLRPolicy

MODULES = (nt_xent, lars, kernels_triton)  # of kernels; each has configurations()
HEADER = (
    *("kernel", "columns", "tile", "warps", "stages", "chip", "registers", "stack, B"),
    *("shared, KiB", "tensor core", "exp per element", "async copies", "verdict"),
)


def configurations() -> Iterator[aot.Configuration]:
    """Yield the configurations of all kernel modules."""
    for module in MODULES:
        for configuration in module.configurations():
            yield aot.Configuration(*configuration)


def examine(job: tuple[str, int]) -> dict[str, Any]:
    """Compile a configuration by its name for a chip, and return a row of the report."""
    name, chip = job
    configuration = next(c for c in configurations() if c.name == name)
    program = aot.read(aot.build(configuration, chip))
    sizes, hot = configuration.constexprs, program.hot
    tile = [sizes[k] for k in ("ROWS", "KEYS", "CHUNK", "BLOCK", "ACROSS", "AT_ONCE") if k in sizes]
    exps = 0.0
    if "D" in sizes:
        exps = hot.get("MUFU.EX2", 0) * 32 * configuration.num_warps / math.prod(tile)
    row = {
        "kernel": name,
        "columns": sizes.get("D"),  # of matrices; others have none
        "tile": tile,
        "warps": configuration.num_warps,
        "stages": configuration.num_stages,
        "chip": chip,
        "registers": program.registers,
        "stack": program.stack,
        "shared": program.shared,
        "tensor_core": {op: count for op, count in hot.items() if "MMA" in op},
        "exps": exps,
        "async_copies": hot.get("LDGSTS", 0),
        "narrow_bases": program.narrow_bases,
    }
    return {**row, "faults": faults(row)}


def faults(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with a row."""
    chip = row["chip"]
    checks = {
        f"spills {row['stack']} B": row["stack"] == 0,
        f"shared memory over {aot.SHARED_LIMIT[chip] // 1024} KiB": (
            row["shared"] <= aot.SHARED_LIMIT[chip]
        ),
        "32-bit bases": row["narrow_bases"] == 0,
    }
    if row["columns"]:
        on_tensor_cores = [*row["tensor_core"]] == [aot.TENSOR_CORE[chip]]
        checks[f"not {aot.TENSOR_CORE[chip]}"] = on_tensor_cores
        checks["no async copies"] = row["async_copies"] > 0
    return [fault for fault, passed in checks.items() if not passed]


def report(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    bad = sum(bool(row["faults"]) for row in rows)
    command = shlex.join(["python", *sys.argv])
    lines = [
        "# What the kernels compile to",
        "",
        f"{now()[:10]}, Triton {triton.__version__}, `{command}`.",
        "Compiled ahead of time; **nothing here ran on a GPU**, and no time is claimed.",
        "",
        "Chip: compute capability times 10 (89 stands for 86 too). Stack above 0 is a spill.",
        "Tensor core, exponentials (of an element of the similarity matrix; online variants add",
        "those that rescale a row) and asynchronous copies are counted in the hot loop's machine",
        "code. The sizes N and M are not specialised: one program serves all of them.",
        "",
        f"{len(rows)} programs, {bad} with a fault.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'|'.join(['---', *['--:'] * (len(HEADER) - 2), '---'])}|",
    ]
    for row in rows:
        cells = [
            row["kernel"],
            row["columns"] or "",
            "x".join(map(str, row["tile"])),
            row["warps"],
            row["stages"],
            row["chip"],
            row["registers"],
            row["stack"],
            f"{row['shared'] / 1024:.0f}",
            " ".join(f"{count} {op}" for op, count in row["tensor_core"].items()),
            f"{row['exps']:.2f}",
            row["async_copies"],
            ", ".join(row["faults"]) or "ok",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, *traffic()]) + "\n"


def traffic(num_views: int = 4096) -> list[str]:
    """Count what the augmentation's launches move, for views as they are drawn."""
    policy = SimCLRPolicy()
    side = policy.size
    sizes_N2 = np.full((num_views, 2), side, np.int32)
    drawn = policy.draw(seed=0, epoch=0, positions=np.arange(num_views), view=0, sizes_N2=sizes_N2)
    crop = drawn.box_N4[:, 2:].astype(float).prod(1).mean() * 3
    view, jittered, blurred = 3 * side**2, drawn.jitter_N.mean(), drawn.blur_N.mean()
    lines = [
        "",
        f"## What the augmentation moves, {side} to {side} pixels",
        "",
        "kB of GPU memory a view, derived: each byte that a launch needs, once. What tiles read",
        "twice comes from caches. Planned were 1,300 kB a view and 4 to 5 launches for all views;",
        "Kornia's classes move about 80,000 kB in 490 launches for a view.",
        "",
        "| launch | reads | writes uint8 | writes bfloat16 |",
        "|---|--:|--:|--:|",
    ]
    launches = {
        "resize": (crop, view, view),
        "pivots": (jittered * view, 0, 0),
        "colour": (view, view, (blurred + 2 * (1 - blurred)) * view),
        "blur": (blurred * view, blurred * view, 2 * blurred * view),
    }
    totals = np.array([*launches.values()]).sum(0)
    for name, counts in launches.items():
        lines.append(f"| {name} | " + " | ".join(f"{n / 1e3:.0f}" for n in counts) + " |")
    return [
        *lines,
        "",
        f"In all {(totals[0] + totals[1]) / 1e3:.0f} kB a view to uint8, "
        f"{(totals[0] + totals[2]) / 1e3:.0f} to bfloat16.",
    ]


def main() -> None:
    """Examine, write, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    results = Path(__file__).with_name("results") / "kernels_aot.md"
    parser.add_argument("--out", type=Path, default=results, help="the report, Markdown")
    parser.add_argument("--json", type=Path, help="write the rows here, and no report")
    parser.add_argument("--match", default="", help="regular expression over kernels' names")
    parser.add_argument("--chips", type=int, nargs="+", default=[*aot.TENSOR_CORE])
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 makes kernels that are not compiled: unset it.")
    names = [c.name for c in configurations() if re.search(args.match, c.name)]
    jobs = [(name, chip) for name in names for chip in args.chips]
    with ProcessPoolExecutor(args.processes) as pool:
        rows = list(track(pool.map(examine, jobs), "compiling", total=len(jobs)))
    if args.json:
        write_durably(args.json, json.dumps(rows))
    else:
        write_durably(args.out, report(rows))
    for row in rows:
        if row["faults"]:
            print(f"{row['kernel']} sm_{row['chip']}: {', '.join(row['faults'])}")
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()

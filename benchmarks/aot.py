"""Compile Triton kernels for GPUs this machine need not have, and read the programs.

No driver is asked: Triton's compiler takes a target, and the tools in its wheel read registers,
stack and machine code. Nothing runs.

Pointers are declared divisible by 16, as the just-in-time compiler finds them at a launch (torch's
allocations are): undeclared, another program comes out, with 2-byte loads and spills. Whether
products and sums fuse is set explicitly, as the launchers must too, since Triton's default is to
change.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

# A pointer, not a tensor of them, moved by a 32-bit number that is not a constant.
NARROW_BASE = re.compile(r"addptr %\w+, %(?!c\d)\w+ : !tt\.ptr<\w+>, i32")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# What a program of each chip (compute capability times 10) may have, and how it multiplies.
SHARED_LIMIT = {
    80: 163 * 1024,
    89: 99 * 1024,  # of 86 too
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


class Configuration(NamedTuple):
    """One way to compile one kernel; kernel modules yield such tuples from ``configurations()``.

    Attributes:
        name: What it is and for which columns, unique.
        function: The jit function.
        signature: Triton type of every argument, in order; ``constexpr`` of constants.
        constexprs: Values of the constants.
        num_warps: Warps of a program.
        num_stages: Stages of its pipelined loads.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


class Program(NamedTuple):
    """What the compiler made.

    Attributes:
        registers: Of a thread.
        stack: Bytes of a thread in slow memory; more than 0 is a spill.
        shared: Bytes of shared memory of a program.
        hot: Count of each operation in the loop that multiplies matrices; in all code if none does.
        narrow_bases: Pointer arguments that are moved by a 32-bit number: overflow at 2^31.
    """

    registers: int
    stack: int
    shared: int
    hot: dict[str, int]
    narrow_bases: int


def build(configuration: Configuration, capability: int) -> CompiledKernel:
    """Compile for sm_<capability>, from Triton's cache if it is there."""
    _, function, signature, constexprs, num_warps, num_stages = configuration
    attrs = {
        (place,): [["tt.divisibility", 16]]
        for place, type_ in enumerate(signature.values())
        if type_.startswith("*")
    }
    return triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attrs),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )


def requested(call: Callable[[], object], capability: int) -> list[CompiledKernel]:
    """Return what a call compiles on its way to launches; nothing is launched.

    The tensors may lie anywhere. It shows whether launchers ask for what :func:`build` was given.
    """

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _: 0)

    def compile_only(function: triton.JITFunction, *args: Any, **kwargs: Any) -> None:
        kernel = run(function, *args, **{**kwargs, "warmup": True})
        assert isinstance(kernel, CompiledKernel)
        kernels.append(kernel)

    kernels: list[CompiledKernel] = []
    run = triton.JITFunction.run
    driver = mock.patch.object(triton.runtime.driver, "_active", Driver)
    with driver, mock.patch.object(triton.JITFunction, "run", compile_only):
        call()
    return kernels


def code(kernel: CompiledKernel) -> str:
    """Return a kernel's PTX without what follows it: where its source lay.

    Triton's cache gives what another checkout compiled, and that names its own folders.
    """
    return str(kernel.asm["ptx"]).partition("\n\t.file\t")[0]


def read(kernel: CompiledKernel) -> Program:
    """Read a compiled kernel with the tools of Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Program(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=kernel.metadata.shared,
        hot=hot_loop(code),
        narrow_bases=len(NARROW_BASE.findall(str(kernel.asm["ttir"]))),
    )


def hot_loop(sass: str) -> dict[str, int]:
    """Count the operations of the loop that loads, multiplies matrices and exponentiates.

    It is the shortest stretch before a jump back that does all three: compilers also jump back out
    of retries that they put behind the loop, and peel iterations off it.
    """
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);")
    code = [(int(m[1], 16), m[2], m[3]) for m in line.finditer(sass)]
    loops = []
    for address, operation, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            loop = _count([op for at, op, _ in code if int(target[1], 16) <= at <= address])
            if loop["LDGSTS"] and loop["MUFU.EX2"] and any("MMA" in op for op in loop):
                loops.append(loop)
    return dict(min(loops, key=Counter.total, default=_count([op for _, op, _ in code])))


def _count(operations: list[str]) -> Counter[str]:
    """Count by name; of MUFU and the like the first suffix is the operation."""
    return Counter(
        ".".join(op.split(".")[: 2 if op.startswith("MUFU") else 1]) for op in operations
    )

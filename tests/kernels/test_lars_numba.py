"""LARS in numba: threads, forks, autograd's watch, and where compiled code is kept."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastclr.kernels import lars_numba

SIZES = (3, 0, 200_001, lars_numba.BLOCK, 77, 40 * lars_numba.BLOCK + 5)
OPTIONS = {"weight_decay": 0.05, "momentum": 0.9, "nesterov": False, "rate": 0.3}


@pytest.fixture
def threads():
    """Return a function that sets the number of torch's threads, which is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors(sizes=SIZES, shift=0):
    """Return weights, gradients and momenta; the same whatever the shift of their addresses."""
    generator = torch.Generator().manual_seed(0)
    kinds = []
    for _ in range(3):
        made = [torch.randn(n, generator=generator) for n in sizes]
        kinds.append([torch.cat([torch.empty(shift), t])[shift:] for t in made])
    return kinds


def step(kinds=None):
    """Do both passes; return every bit they give."""
    w, g, v = kinds or tensors()
    sums = lars_numba.sums_of_squares(w, g, 0.05)
    lars_numba.update(w, g, v, scale=sums[:, 0] / sums.max(), **OPTIONS)
    return [t.numpy().tobytes() for t in (sums.contiguous(), *w, *v)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, threads, count):
    threads(1)
    expected = step()
    threads(count)
    for name in ("_sum_blocks", "_update_blocks"):
        meeting, seen = threading.Barrier(count), set()

        def kernel(*args, run, meeting=meeting, seen=seen):
            if threading.get_ident() not in seen:
                seen.add(threading.get_ident())
                meeting.wait(timeout=30)  # all threads take part, or this raises
            run(*args)

        run = getattr(lars_numba, name)
        monkeypatch.setattr(lars_numba, name, functools.partial(kernel, run=run))
    assert step() == expected
    assert len(seen) == count


def test_any_address_gives_the_same_bits():
    assert step() == step(tensors(shift=1)) == step(tensors(shift=5))


def test_little_work_wakes_no_thread(monkeypatch, threads):
    threads(4)
    monkeypatch.setattr(lars_numba, "_helpers", None)
    step(tensors((100, 1000)))
    with pytest.raises(TypeError):
        step()


def test_an_error_of_a_helping_thread_comes_out(monkeypatch, threads):
    threads(2)
    here, meeting = threading.get_ident(), threading.Barrier(2)

    def kernel(*args):
        meeting.wait(timeout=30)
        if threading.get_ident() != here:
            raise MemoryError("of a helper")

    monkeypatch.setattr(lars_numba, "RUNS", 1)  # one for each
    monkeypatch.setattr(lars_numba, "_sum_blocks", kernel)
    w, g, _ = tensors((2 * lars_numba.WORTH_THREADS,))
    with pytest.raises(MemoryError, match="of a helper"):
        lars_numba.sums_of_squares(w, g, 0.05)


def test_a_forked_process_has_threads_of_its_own(threads):
    threads(2)
    kinds, expected = tensors(), step()  # by a helper that the child has not

    def child():
        assert step(kinds) == expected  # torch's own operations on many elements could hang here

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=30)
    code = process.exitcode
    process.kill()
    assert code == 0, "None: it hangs"
    assert step() == expected


def test_autograd_sees_that_weights_changed():
    w, g, v = (torch.ones(3, requires_grad=r) for r in (True, False, False))
    product = (w * w).sum()
    with torch.no_grad():
        lars_numba.update([w], [g], [v], scale=1.0, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    assert v._version > 0 and g._version == 0


SCRIPT = """
import json, sys, torch
from fastclr.kernels import lars_numba
w = [torch.full((3,), 2.0)]
assert lars_numba.sums_of_squares(w, w, 0.0).tolist() == [[12.0, 12.0]]
assert lars_numba.__file__.startswith(sys.argv[1])
print(json.dumps(sum(lars_numba._sum_blocks.stats.cache_hits.values())))
"""


def test_an_installation_that_cannot_be_written_works(tmp_path):
    # Not by permissions: whoever runs this may write anywhere.
    kernels, cache = tmp_path / "fastclr" / "kernels", tmp_path / "cache"
    kernels.mkdir(parents=True)
    for name in ("__init__.py", "lars_numba.py"):
        shutil.copy(Path(lars_numba.__file__).with_name(name), kernels)
    (tmp_path / "fastclr" / "__init__.py").touch()
    (kernels / "__pycache__").touch()

    def cache_hits(place):
        environ = {name: value for name, value in os.environ.items() if "NUMBA" not in name}
        environ |= {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(place)}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert [cache_hits(cache), cache_hits(cache)] == [0, 1], "kept in the user's cache"
    assert list(cache.rglob("*.nbc"))
    nowhere = kernels / "__init__.py" / "cache"
    assert cache_hits(nowhere) == 0, "compiled anew"

"""LARS's implementations: which is taken, what is said, that none waits for a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastclr.kernels import KernelUnavailable, lars_numba, lars_torch
from fastclr.optim import LARS

ROOT = Path(__file__).parents[2]
STEPS = 10


def ends_of(impl):
    """Return weights after some steps in single precision."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    lars = LARS.for_module(module, 0.7, weight_decay=0.05, trust_coefficient=0.02, impl=impl)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        lars.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_all_step_like_torch(impl):
    torch.testing.assert_close(ends_of(impl), ends_of("torch"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("impl", "module"),
    [("numba", "fastclr.kernels.lars_numba"), ("triton", "fastclr.kernels.lars")],
)
def test_what_is_not_installed_is_refused_by_name(monkeypatch, impl, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(KernelUnavailable, match=f"needs {impl} .*pip install {impl}.*impl='auto'"):
        LARS([torch.ones(2, 2, requires_grad=True)], lr=0.1, impl=impl)


@pytest.mark.parametrize(
    ("dtype", "fastest"),
    [
        (torch.float32, lars_numba),
        (torch.float64, lars_numba),
        (torch.bfloat16, lars_torch),
        (torch.float16, lars_torch),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_what_is_taken_on_the_cpu(monkeypatch, caplog, impl, dtype, fastest):
    taken = []
    for module in (lars_torch, lars_numba):
        for name in ("sums_of_squares", "update"):

            def recording(*args, run=getattr(module, name), module=module, **options):  # noqa: B008
                taken.append(module)
                return run(*args, **options)

            monkeypatch.setattr(module, name, recording)
    w = torch.ones(4, 5, dtype=dtype, requires_grad=True)
    w.grad = torch.ones_like(w)
    LARS([w], lr=0.5, impl=impl).step()
    assert taken == [fastest if impl == "auto" else lars_torch] * 2
    assert not caplog.records


def test_numba_is_imported_at_the_first_step():
    code = (
        "import sys, torch; from fastclr.optim import LARS\n"
        "w = torch.ones(2, 3, requires_grad=True); w.grad = torch.ones(2, 3)\n"
        "optimizer = LARS([w], lr=0.1)\n"
        "assert 'numba' not in sys.modules\n"
        "optimizer.step(); assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


def cuda_step(impl, **options):
    """Take a step on tensors of a GPU that is not there and have shapes alone."""
    with FakeTensorMode():
        parameters = [torch.ones(n, 3, device="cuda", requires_grad=True) for n in (4, 5)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        lars = LARS(parameters, lr=0.1, impl=impl, **options)
        lars.step()
        lars.step()


def test_auto_says_once_why_it_takes_torch(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fastclr.kernels.lars", None)
    cuda_step("auto")
    assert len(caplog.records) == 1
    assert "goes on with impl='torch'" in caplog.text and "pip install triton" in caplog.text


def test_auto_says_once_why_it_takes_torch_on_the_cpu(monkeypatch, caplog):
    expected = ends_of("torch")
    monkeypatch.setitem(sys.modules, "fastclr.kernels.lars_numba", None)
    assert torch.equal(ends_of("auto"), expected)
    assert len(caplog.records) == 1
    assert "goes on with impl='torch'" in caplog.text and "pip install numba" in caplog.text


@pytest.mark.parametrize("denominator", ["decayed_gradient", "sum_of_norms"])
@pytest.mark.parametrize("rate_inside_momentum", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_step_on_the_gpu_never_waits_for_it(denominator, rate_inside_momentum, clip, nesterov):
    # Tensors without values: whatever reads one on the host raises.
    form = {"rate_inside_momentum": rate_inside_momentum, "clip": clip, "nesterov": nesterov}
    cuda_step("torch", denominator=denominator, **form)


def test_a_wait_would_be_seen(monkeypatch):
    update = lars_torch.update

    def reading(w, g, v, *, scale, **options):
        update(w, g, v, scale=scale[0].item(), **options)

    monkeypatch.setattr(lars_torch, "update", reading)
    with pytest.raises(DataDependentOutputException):
        cuda_step("torch")


@pytest.fixture
def stand_in(monkeypatch):
    """Put modules in apex's place whose functions have the signatures of its own."""
    calls = []

    def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
        assert chunk_size == 65536 and noop_flag.dtype == torch.int32 and per_tensor is True
        (tensors,) = tensor_lists
        calls.append(len(tensors))
        norms = torch.stack([t.float().norm() for t in tensors])
        return norms.norm()[None], norms

    def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
        return op(65536, noop_flag_buffer, tensor_lists, *args)

    amp_c = SimpleNamespace(multi_tensor_l2norm=multi_tensor_l2norm)
    apply = SimpleNamespace(multi_tensor_applier=multi_tensor_applier)
    for name, module in {
        "amp_C": amp_c, "apex": SimpleNamespace(), "apex.multi_tensor_apply": apply,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_apex_steps_like_torch(stand_in):
    torch.testing.assert_close(ends_of("apex"), ends_of("torch"), rtol=1e-6, atol=1e-6)
    assert stand_in == [2, 2] * STEPS, "two launches a step, each over all adapted layers"


@pytest.mark.parametrize("missing", ["amp_C", "apex.multi_tensor_apply"])
def test_without_apex_the_explicit_choice_is_refused(monkeypatch, stand_in, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(KernelUnavailable, match=r"build it as fastclr/optim/apex.py says"):
        LARS([torch.ones(2, 2, requires_grad=True)], lr=0.1, impl="apex")


def test_another_apex_is_refused(monkeypatch, stand_in):
    monkeypatch.setitem(sys.modules, "amp_C", SimpleNamespace())
    with pytest.raises(KernelUnavailable, match="multi_tensor_l2norm"):
        LARS([torch.ones(2, 2, requires_grad=True)], lr=0.1, impl="apex")

"""The two torch operators: what torch.compile and autocast see of them, and what they hold."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastclr.kernels import KernelUnavailable, tiles
from fastclr.losses import LOSSES, NTXent, contrastive, nt_xent, passes
from fastclr.losses.contrastive import choose_implementation
from fastclr.losses.kernels import KERNELS
from tests.losses.formulas import CASES, EXPLICIT, gradients, pair

every_case = pytest.mark.parametrize("case", CASES, ids=str)


# As torch's own checks see them


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(
    ("kernel", "other_view"),
    [(k, other) for k in KERNELS for other in (False, True) if not (other and "triton" in k)],
)
def test_opcheck(kernel, other_view, bounded):
    rows = torch.nn.functional.normalize(torch.cat(pair(3, 4, dtype=torch.float32)))
    rows = rows.detach().requires_grad_()
    settings = (kernel, other_view, bounded, 0.4, [3], 0, "", False)
    bound = torch.ones(())
    for ranked in (False, True):
        torch.library.opcheck(passes.contrast, (rows, bound, *settings, ranked))
    known = passes.contrast(rows.detach(), bound, *settings, False)[2:]
    torch.library.opcheck(passes.contrast_gradient, (rows.detach(), bound, *known, *settings))


@pytest.mark.parametrize(
    ("case", "is_learned"),
    [(case, learned) for case in CASES for learned in {False, not case.is_cosine}],
    ids=str,
)
def test_compiled_it_is_bitwise_the_same(case, is_learned):
    torch.compiler.reset()
    temperature = nn.Parameter(torch.tensor(0.3)) if is_learned else 0.3
    z, results = pair(5, dtype=torch.float32), []
    eager = case.build(temperature)
    for loss in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        statistics: dict[str, torch.Tensor] = {}
        value = loss(*z, statistics=statistics)
        leaves = [*z, *loss.parameters()]
        results.append([value, gradients(value, *leaves), *statistics.values()])
    assert all(map(torch.equal, *results))
    assert len(results[0]) > 3, "statistics are there"


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_takes_it_whole():
    z = pair(5, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(nt_xent, fullgraph=True, backend="inductor")
    loss, expected = compiled(*z), nt_xent(*z)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(loss, *z), gradients(expected, *z), rtol=1e-4, atol=1e-6)


@every_case
@pytest.mark.parametrize("impl", EXPLICIT)
def test_autocast_does_not_change_a_bit(case, impl):
    z, results = pair(32, 32, dtype=torch.float32), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = case.build(impl=impl)(*z)
        results.append((loss, gradients(loss, *z)))
    assert all(map(torch.equal, *results))


@every_case
def test_a_backward_under_autocast_does_not_either(case):
    z = pair(32, 32, dtype=torch.float32)
    expected = gradients(case.build()(*z), *z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradients(case.build()(*z), *z), expected)


@every_case
def test_twice_is_bitwise_the_same(case):
    z = pair(300, 32, dtype=torch.float32)
    first, second = (gradients(case.build()(*z), *z) for _ in range(2))
    assert torch.equal(first, second)


# What they hold


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made, inside our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.opened: set[str] = set()
        ours = (passes.contrast, passes.contrast_gradient)
        self.bodies = {op._opoverload: op._init_fn for op in ours}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.bodies:
            self.opened.add(func.name())
            with self:
                return self.bodies[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(out):
            if isinstance(made, torch.Tensor):
                self.numel = max(self.numel, made.numel())
        return out


NUM_IMAGES, DIM, BLOCK = 600, 16, 64


def most_elements(loss) -> tuple[int, set[str]]:
    """Return the size of the largest tensor of a forward and backward; our operators in it."""
    z = pair(NUM_IMAGES, DIM)
    with Largest() as largest:
        gradients(loss(*z, statistics={}), *z)
    return largest.numel, largest.opened


@every_case
def test_blocked_makes_no_matrix(case, monkeypatch):
    monkeypatch.setattr(tiles, "BLOCK", BLOCK)
    most, opened = most_elements(case.build(impl="blocked"))
    assert opened == {"fastclr::contrast", "fastclr::contrast_gradient"}
    assert most == max(2 * NUM_IMAGES * DIM, BLOCK**2)


def test_the_check_sees_matrices():
    most, _ = most_elements(NTXent(impl="reference"))
    assert most == (2 * NUM_IMAGES) ** 2


@every_case
def test_blocked_saves_rows_and_a_few_numbers_about_each(case):
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        case.build(impl="blocked")(*pair(NUM_IMAGES, DIM))
    assert max(sizes) == 2 * NUM_IMAGES * DIM


# Which implementation


def test_auto_says_why(caplog):
    rows = torch.ones(4, 3)
    name, reason = choose_implementation(rows, "nt_xent")
    assert name == "blocked" and "CPU" in reason
    contrastive._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastclr"):
        for _ in range(2):
            nt_xent(*pair(3))
    assert [r.message for r in caplog.records] == [f"contrastive loss: blocked, because {reason}"]


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        (torch.ones(4, 3), ("nt_logistic",), "NT-Xent with the negatives of both views only"),
        (torch.ones(4, 3), ("nt_xent", True, True), "NT-Xent with the negatives of both views"),
        (torch.ones(4, 3), ("nt_xent", False), "similarities without a bound"),
        (torch.ones(4, 3).double(), ("nt_xent",), "float64 would be rounded"),
        (torch.ones(4, 513), ("nt_xent",), "513 dimensions, more than 512"),
    ],
)
def test_off_the_cpu_auto_says_what_triton_cannot(rows, settings, reason):
    name, why = choose_implementation(rows.to("meta"), *settings)
    assert name == "blocked" and why.startswith("triton cannot: ") and reason in why


@pytest.mark.parametrize("name", LOSSES)
def test_an_explicit_choice_never_falls_back(name):
    with pytest.raises(KernelUnavailable, match=r"impl='triton' cannot.*Use impl='auto'"):
        LOSSES[name](impl="triton")(*pair(3))

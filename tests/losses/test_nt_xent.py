"""NT-Xent against its formula, its symmetries, its limits, and over ranks."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.kernels import blocked
from fastclr.losses import LOSSES, NTXent, contrastive_accuracy, nt_xent
from fastclr.losses.nt_xent import IMPLEMENTATIONS, choose_implementation

SCRIPT = Path(__file__).with_name("nt_xent_ranks.py")


def slow_nt_xent(z0_BD: torch.Tensor, z1_BD: torch.Tensor, temperature: float) -> torch.Tensor:
    """Write out equation 1 of Chen et al. 2020, one term at a time."""
    rows = [row / max(row.norm(), 1e-12) for row in (*z0_BD.double(), *z1_BD.double())]
    num_images = len(z0_BD)
    total = torch.zeros((), dtype=torch.float64)
    for i, anchor in enumerate(rows):
        similar = [anchor @ row / temperature for row in rows]
        positive = similar[(i + num_images) % (2 * num_images)]
        total += torch.stack([s for k, s in enumerate(similar) if k != i]).logsumexp(0) - positive
    return total / len(rows)


# The proof of each entry of LOSSES: an entry without one fails.
FORMULAS = {"nt_xent": slow_nt_xent}


def pair(
    num_images: int, dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return projections of two views that are somewhat alike."""
    generator = torch.Generator().manual_seed(seed)
    content, *noise = torch.randn(3, num_images, dim, generator=generator, dtype=torch.float64)
    return tuple((content + 0.7 * n).to(dtype).requires_grad_() for n in noise)


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """Return the gradients as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)])


batches = st.builds(pair, st.integers(1, 9), st.integers(2, 12), st.integers(0, 10**6))
temperatures = st.floats(0.02, 5)
quick = settings(max_examples=40, deadline=None)


@pytest.mark.parametrize("name", LOSSES)
@quick
@given(z=batches, temperature=temperatures)
def test_value_and_gradient_are_those_of_the_formula(name, z, temperature):
    ours, theirs = LOSSES[name](temperature=temperature)(*z), FORMULAS[name](*z, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours, *z), gradients(theirs, *z), rtol=1e-9, atol=1e-11)


def test_a_number_by_hand():
    # Views equal, images orthogonal: each anchor has similarity 1 once and 0 twice.
    z = torch.eye(2, dtype=torch.float64)
    expected = math.log(math.exp(1 / 0.5) + 2) - 1 / 0.5
    assert nt_xent(z, z, temperature=0.5).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_gradcheck(num_images):
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature=0.3), pair(num_images))


@quick
@given(z=batches, seed=st.integers(0, 99), exponent=st.floats(-4, 4))
def test_lengths_of_rows_do_not_matter(z, seed, exponent):
    scale = torch.rand(z[0].shape[0], 1, generator=torch.Generator().manual_seed(seed)).double()
    scale = (scale + 0.1) * 10**exponent
    scaled = (z[0].detach() * scale, z[1].detach() * 3)
    torch.testing.assert_close(nt_xent(*scaled), nt_xent(*z), rtol=1e-10, atol=1e-10)


@quick
@given(z=batches)
def test_the_gradient_is_orthogonal_to_the_row(z):
    for row, grad in zip(z, torch.autograd.grad(nt_xent(*z), z), strict=True):
        torch.testing.assert_close(
            (row * grad).sum(1), torch.zeros(len(row), dtype=torch.float64), atol=1e-11, rtol=0
        )


@quick
@given(z=batches, temperature=temperatures)
def test_views_may_be_swapped(z, temperature):
    swapped = nt_xent(z[1], z[0], temperature=temperature)
    torch.testing.assert_close(swapped, nt_xent(*z, temperature=temperature))


@quick
@given(z=batches, data=st.data())
def test_pairs_may_be_permuted(z, data):
    order = data.draw(st.permutations(range(len(z[0]))))
    torch.testing.assert_close(nt_xent(z[0][order], z[1][order]), nt_xent(*z))


def test_pairs_may_not_be_broken():
    z0, z1 = pair(6)
    assert nt_xent(z0, z1.roll(1, 0)) > nt_xent(z0, z1) + 0.5


@quick
@given(num_images=st.integers(1, 40), temperature=temperatures)
def test_collapse_costs_the_logarithm_of_the_candidates(num_images, temperature):
    z = torch.ones(num_images, 4, dtype=torch.float64)
    expected = math.log(2 * num_images - 1)
    assert nt_xent(z, z, temperature=temperature).item() == pytest.approx(expected, abs=1e-10)


@quick
@given(z=batches, temperature=temperatures)
def test_bounds(z, temperature):
    loss = nt_xent(*z, temperature=temperature).item()
    assert -1e-12 <= loss <= math.log(max(1, 2 * len(z[0]) - 1)) + 2 / temperature + 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_image_has_no_loss_and_no_gradient(dtype):
    z = pair(1, dtype=dtype)
    loss = nt_xent(*z)
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    assert abs(loss.item()) < rounding
    assert gradients(loss, *z).abs().max() < rounding
    assert nt_xent(*z, impl="reference").item() == 0


def test_duplicates_are_negatives_like_any_other():
    z0, z1 = (torch.cat([z, z[:2]]) for z in pair(3))
    torch.testing.assert_close(nt_xent(z0, z1), slow_nt_xent(z0, z1, 0.1))
    same = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradients(nt_xent(same, same), same).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_zeros_give_finite_numbers(dtype):
    z0, z1 = pair(4, dtype=dtype)
    with torch.no_grad():
        z0[1] = 0
    loss = nt_xent(z0, z1)
    torch.testing.assert_close(loss.double(), slow_nt_xent(z0, z1, 0.1), rtol=1e-5, atol=1e-6)
    assert gradients(loss, z0, z1).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    z = pair(8, dtype=dtype)
    loss = nt_xent(*z)
    assert loss.dtype == torch.float32
    # Against the formula on the rounded rows: nothing more is lost.
    assert loss.item() == pytest.approx(slow_nt_xent(*z, 0.1).item(), rel=1e-5)
    assert all(g.dtype == dtype for g in torch.autograd.grad(loss, z))


@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_low_temperatures_do_not_overflow(temperature):
    z = pair(8, dtype=torch.float32)
    loss = nt_xent(*z, temperature=temperature)
    expected = slow_nt_xent(*z, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradients(loss, *z), gradients(expected, *z), rtol=1e-2, atol=1e-4)


def test_autocast_does_not_round_the_similarities():
    z = pair(32, 32, dtype=torch.float32)
    plain = nt_xent(*z)
    with torch.autocast("cpu", torch.bfloat16):
        cast = nt_xent(*z)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert torch.equal(gradients(cast, *z), gradients(plain, *z))


def test_rows_that_are_not_contiguous():
    z0, z1 = pair(5, 4)
    views = (z0.detach().T.contiguous().T, torch.stack([z1, z1], 2)[..., 0])
    torch.testing.assert_close(nt_xent(*views), nt_xent(z0, z1))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (5, 3)), r"\(4, 3\) and \(5, 3\).*one shape"),
        (((4, 3), (4, 2)), "one shape"),
        (((4,), (4,)), "one shape"),
        (((2, 4, 3), (2, 4, 3)), "one shape"),
        (((0, 3), (0, 3)), "B >= 1"),
        (((4, 0), (4, 0)), "one shape"),
    ],
)
def test_shapes_without_meaning_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(*map(torch.zeros, shapes))


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"torch.int64: give floating point"):
        nt_xent(torch.ones(2, 3).long(), torch.ones(2, 3).long())


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan")])
def test_temperatures_without_meaning_are_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        nt_xent(*pair(2), temperature=temperature)


def test_accuracy_counts_nearest_images_of_the_other_view():
    z0 = torch.eye(4)
    assert contrastive_accuracy(z0, 3 * z0).item() == 1
    assert contrastive_accuracy(z0, z0.roll(1, 0)).item() == 0
    assert contrastive_accuracy(z0, z0[[0, 1, 3, 2]]).item() == 0.5
    # The other views 0 are no candidates, however near.
    assert contrastive_accuracy(1 + 0.1 * z0, z0).item() == 1


def test_accuracy_of_a_collapsed_model_is_chance():
    assert contrastive_accuracy(torch.ones(5, 3), torch.ones(5, 3)).item() == pytest.approx(0.2)


# Implementations

explicit = [impl for impl in IMPLEMENTATIONS if impl != "auto"]


@pytest.mark.parametrize("impl", explicit)
@pytest.mark.parametrize("block", [1, 3, 8, 512])
@quick
@given(z=batches, temperature=st.floats(0.025, 5))
def test_each_implementation_is_the_formula_in_any_blocks(impl, block, z, temperature):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "BLOCK", block)
        ours = nt_xent(*z, temperature=temperature, impl=impl)
        ours_grad = gradients(ours, *z)
    theirs = slow_nt_xent(*z, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours_grad, gradients(theirs, *z), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", explicit)
def test_each_implementation_passes_gradcheck(impl):
    z = pair(5)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature=0.3, impl=impl), z)


@pytest.mark.parametrize("num_images", [300, 700])  # one and three blocks a side
def test_blocked_in_single_precision_is_as_exact_as_the_reference(num_images):
    z = pair(num_images, 64)
    truth = gradients(nt_xent(*z, impl="reference"), *z)
    error = {}
    for impl in explicit:
        single = tuple(row.detach().float().requires_grad_() for row in z)
        found = gradients(nt_xent(*single, impl=impl), *single)
        error[impl] = ((found - truth).norm() / truth.norm()).item()
    assert error["blocked"] <= 2 * error["reference"] + 1e-7, error


def test_blocked_keeps_no_matrix():
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    z = pair(600, 16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        nt_xent(*z, impl="blocked")
    assert max(sizes) == 1200 * 16
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        nt_xent(*z, impl="reference")
    assert max(sizes) == 1200 * 1200, "the check sees matrices"


def test_blocked_twice_is_bitwise_the_same():
    z = pair(700, 32, dtype=torch.float32)
    first, second = (gradients(nt_xent(*z, impl="blocked"), *z) for _ in range(2))
    assert torch.equal(first, second)


def test_auto_says_why():
    assert choose_implementation(torch.float32, 0.1)[0] == "blocked"
    name, reason = choose_implementation(torch.float32, 0.01)
    assert name == "reference" and "0.01" in reason and "0.025" in reason
    assert choose_implementation(torch.float64, 0.01)[0] == "blocked"


def test_an_explicit_choice_never_falls_back():
    z = pair(3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"below blocked's 0.025.*use impl='auto'"):
        nt_xent(*z, temperature=0.01, impl="blocked")
    with pytest.raises(ValueError, match="impl 'triton' is unknown: choose from auto"):
        nt_xent(*z, impl="triton")


# Over ranks


def load_script():
    """Import the ranks' script, for its data."""
    spec = importlib.util.spec_from_file_location("nt_xent_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks():
    """Return the module that runs on the ranks."""
    return load_script()


@pytest.fixture(scope="module", params=[1, 2, 4])
def measured(request, run_ranks):
    """Run all measurements on R ranks once."""
    return request.param, run_ranks(SCRIPT, request.param)


def assert_equal(found: dict, expected: dict) -> None:
    """Compare measurements."""
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-12)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-7)
    assert found["grad"] == pytest.approx(expected["grad"], abs=1e-12, rel=0)


@pytest.mark.parametrize("name", LOSSES)
def test_over_ranks_it_is_the_loss_of_one_process(ranks, measured, name):
    expected = ranks.measure(LOSSES[name](temperature=0.1), ranks.images_VGP())
    assert 0 < expected["accuracy"] < 1
    assert max(map(abs, expected["grad"])) > 1e-2
    assert_equal(measured[1][name], expected)


@pytest.mark.parametrize("impl", explicit)
def test_each_implementation_is_exact_over_ranks(ranks, measured, impl):
    assert_equal(measured[1][impl], ranks.measure(NTXent(impl=impl), ranks.images_VGP()))


def test_blocked_has_no_collective_in_the_backward(measured):
    num_ranks, found = measured
    assert found["collectives"]["blocked"] == []
    assert bool(found["collectives"]["reference"]) == (num_ranks > 1), "the check sees collectives"


def test_the_temperature_reaches_every_rank(ranks, measured):
    assert_equal(measured[1]["warm"], ranks.measure(NTXent(temperature=0.7), ranks.images_VGP()))


def test_a_gather_without_gradient_would_be_seen(ranks, measured):
    num_ranks, found = measured
    expected = ranks.measure(NTXent(), ranks.images_VGP())
    assert found["blind"]["loss"] == pytest.approx(expected["loss"], abs=1e-12)
    if num_ranks == 1:
        assert_equal(found["blind"], expected)
    else:
        with pytest.raises(AssertionError):
            assert_equal(found["blind"], expected)


def test_the_backward_changes_no_gradient_of_others(measured):
    num_ranks, found = measured
    assert found["shared_gradient"] == [2.0] * 2 * num_ranks + [float(num_ranks)] * 2


def test_a_group_is_a_world_of_its_own(ranks, measured):
    num_ranks, found = measured
    halves = ranks.images_VGP().chunk(2, dim=1)
    if num_ranks == 4:
        for half, group in zip(halves, found["groups"], strict=True):
            assert_equal(group, ranks.measure(NTXent(), half))
    else:
        assert "groups" not in found, "4 ranks make 2 groups of 2"

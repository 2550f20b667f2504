"""Gradient caching: the whole batch's gradient, chunk by chunk."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

from fastclr.losses import gradient_cache, nt_logistic, nt_xent

VIEWS, IMAGES, CHUNKS, PIXELS = 2, 12, 4, 10


def views(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(VIEWS, IMAGES, PIXELS, dtype=torch.float64, generator=generator)


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Linear(PIXELS, 16)
    return nn.Sequential(inner, *layers, nn.ReLU(), nn.Linear(16, 6)).double()


def projector(module):
    return lambda chunk: module(chunk.flatten(0, 1))


def cached_step(module, chunks, loss=nt_xent):
    return gradient_cache(module, projector(module), chunks, loss, torch.Tensor.backward)


def direct_step(module, chunks, loss=nt_xent):
    """Keep the graph of every chunk: the same function, in the memory of the whole batch."""
    parts = [module(chunk.flatten(0, 1)).unflatten(0, (VIEWS, -1)) for chunk in chunks]
    value = loss(*torch.cat(parts, 1))
    value.backward()
    return value


def train(module, step, num_chunks=CHUNKS):
    """Take five steps; the same random numbers for whoever draws them in the same order."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)
    for i in range(5):
        torch.manual_seed(i)
        optimizer.zero_grad()
        step(module, views(i).chunk(num_chunks, dim=1))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("loss", [nt_xent, nt_logistic])
def test_five_steps_with_dropout_equal_the_uncached_run(loss):
    module = network(nn.Dropout(0.4))
    steps = [functools.partial(step, loss=loss) for step in (cached_step, direct_step)]
    cached, direct = (train(copy.deepcopy(module), step) for step in steps)
    torch.testing.assert_close(cached, direct, rtol=0, atol=1e-12)
    others = train(network(nn.Dropout(0.4)), steps[1], num_chunks=1)
    assert (cached - others).abs().max() > 1e-3, "dropout did nothing"


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 12])
def test_any_number_of_chunks_is_the_whole_batch(num_chunks):
    whole = train(network(nn.LayerNorm(16)), direct_step, num_chunks=1)
    chunked = train(network(nn.LayerNorm(16)), cached_step, num_chunks)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


def test_plain_accumulation_would_be_another_gradient():
    def accumulated_step(module, chunks):
        for chunk in chunks:
            (nt_xent(*module(chunk.flatten(0, 1)).unflatten(0, (VIEWS, -1))) / CHUNKS).backward()

    whole = train(network(nn.LayerNorm(16)), direct_step, num_chunks=1)
    assert (train(network(nn.LayerNorm(16)), accumulated_step) - whole).abs().max() > 1e-2


def test_running_statistics_are_those_of_one_pass_over_the_chunks():
    module = network(nn.BatchNorm1d(16))
    other = copy.deepcopy(module)
    cached, direct = train(module, cached_step), train(other, direct_step)
    torch.testing.assert_close(cached, direct, rtol=0, atol=1e-12)
    norm, expected = module[1], other[1]
    assert norm.num_batches_tracked == expected.num_batches_tracked == 5 * CHUNKS
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    torch.testing.assert_close(norm.running_var, expected.running_var)
    assert norm.track_running_stats


def test_running_statistics_track_again_after_an_error():
    module = network(nn.BatchNorm1d(16))

    def broken(chunk):
        raise RuntimeError("the encoder broke")

    with pytest.raises(RuntimeError, match="the encoder broke"):
        gradient_cache(module, broken, views(0).chunk(2, 1), nt_xent, torch.Tensor.backward)
    assert module[1].track_running_stats


def test_both_passes_run_under_the_callers_autocast():
    dtypes = []
    module = network()
    module.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    chunks = views(0).chunk(CHUNKS, dim=1)
    results = []
    for step in (cached_step, direct_step):
        single = copy.deepcopy(module).float()
        with torch.autocast("cpu", torch.bfloat16):
            step(single, [chunk.float() for chunk in chunks])
        results.append(torch.cat([p.grad.flatten() for p in single.parameters()]))
    assert dtypes == [torch.bfloat16] * 3 * CHUNKS
    cached, direct = results  # to the rounding of bfloat16
    assert (cached - direct).norm() <= 1e-2 * direct.norm()


def test_statistics_are_those_of_the_whole_batch():
    module, found, expected = network(), {}, {}
    chunks = views(0).chunk(CHUNKS, dim=1)
    cached_step(module, chunks, functools.partial(nt_xent, statistics=found))
    direct_step(module, chunks, functools.partial(nt_xent, statistics=expected))
    assert found == expected
    assert 0 < found["contrastive_entropy"] < math.log(IMAGES)


def test_the_loss_is_that_of_the_whole_batch_without_a_graph():
    module = network()
    loss = cached_step(module, views(0).chunk(CHUNKS, dim=1))
    expected = nt_xent(*module(views(0).flatten(0, 1)).chunk(2))
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad


class Held:
    """A saved tensor that counts while it lives."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Held.now += tensor.numel()
        Held.most = max(Held.most, Held.now)

    def __del__(self):
        Held.now -= self.tensor.numel()


def test_one_chunk_is_held_at_a_time():
    most = {}
    for step in (direct_step, cached_step):
        Held.now = Held.most = 0
        module = network(nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            step(module, views(0).repeat(1, 40, 1).chunk(20, dim=1))
        most[step] = Held.most
    assert most[cached_step] < most[direct_step] / 3

"""Reading DeepSpeed's buffers: what does not add up is refused; layers' state by name."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastclr.config import ConfigError
from fastclr.optim import LARS, segments

KNOWN = rf"This is DeepSpeed {deepspeed.__version__}; 0\.19\.8 is known to fit"


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """Make a group of one rank."""
    file = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class DeepSpeedZeroOptimizer:
    """What LARS reads of DeepSpeed's class of this name."""

    def __init__(self, module, places, size=40):
        self.dp_process_group = None
        self.bit16_groups = [list(module.parameters())]
        self.single_partition_of_fp32_groups = [torch.zeros(size)]
        for parameter, place in zip(module.parameters(), places, strict=True):
            parameter._hp_mapping = place and SimpleNamespace(
                hp_fragment_address=SimpleNamespace(start=place[0], numel=place[1]),
                lp_fragment_address=SimpleNamespace(start=place[2]),
            )


def engine(module, optimizer, basic_optimizer=None):
    """Return what LARS reads of an engine."""
    device = torch.device("cpu")
    return SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=basic_optimizer, device=device
    )


def test_a_buffer_is_read_as_it_is():
    module = nn.Linear(5, 6)
    wrapper = DeepSpeedZeroOptimizer(module, [(0, 30, 0), (32, 6, 0)])
    table = segments.read(engine(module, wrapper))
    (buffer,) = table.buffers.values()
    assert buffer.tensor is wrapper.single_partition_of_fp32_groups[0]
    assert buffer.segments == [(0, 0, 30, 0), (1, 32, 6, 0)]
    assert (table.names, buffer.layer_S.tolist()) == (["weight", "bias"], [0, 1])


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(0, 30, 0), (29, 6, 0)], "layer bias lies at 29 in a buffer of 40 elements .* at 30"),
        ([(0, 30, 0), (35, 6, 0)], "layer bias lies at 35 in a buffer of 40"),
        ([(0, 29, 0), (30, 6, 0)], "layer weight has 30 elements, the ranks hold 29 of it"),
        ([(0, 30, 0), None], "layer bias has 6 elements, the ranks hold 0 of it"),
    ],
)
def test_what_does_not_add_up_is_refused(places, message):
    module = nn.Linear(5, 6)
    with pytest.raises(ConfigError, match=f"{message}.*{KNOWN}"):
        segments.read(engine(module, DeepSpeedZeroOptimizer(module, places)))


def test_another_layout_of_deepspeed_is_refused():
    module = nn.Linear(5, 6)
    wrapper = DeepSpeedZeroOptimizer(module, [(0, 30, 0), (30, 6, 0)])
    del wrapper.bit16_groups
    with pytest.raises(ConfigError, match=f"no longer what LARS reads.*bit16_groups.*{KNOWN}"):
        segments.read(engine(module, wrapper))


def test_an_unknown_wrapper_is_refused():
    with pytest.raises(ConfigError, match=f"does not know DeepSpeed's SimpleNamespace.*{KNOWN}"):
        segments.read(engine(nn.Linear(5, 6), SimpleNamespace()))


def trained(seed=0, steps=3):
    """Return a model and its LARS, attached, after some steps."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2))
    optimizer = LARS.for_module(module, 0.5, trust_coefficient=0.1)
    optimizer.attach(engine(module, optimizer, optimizer))
    step(module, optimizer, steps)
    return module, optimizer


def step(module, optimizer, steps):
    for i in range(steps):
        generator = torch.Generator().manual_seed(i)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_layers_go_from_one_optimizer_to_another():
    module, optimizer = trained()
    state = optimizer.layer_state()
    names = [name for name, _ in module.named_parameters()]
    kinds = ("weight", "momentum_buffer")
    assert sorted(state) == sorted(f"{kind}/{name}" for kind in kinds for name in names)
    other, its_optimizer = trained(seed=1, steps=0)
    its_optimizer.load_layer_state(state)
    for pair in ((module, optimizer), (other, its_optimizer)):
        step(*pair, 2)
    assert all(map(torch.equal, module.parameters(), other.parameters()))


@pytest.mark.parametrize("kind", ["weight", "momentum_buffer"])
def test_the_state_of_another_model_is_refused(kind):
    module, optimizer = trained()
    before = [p.detach().clone() for p in module.parameters()]
    state = {name: tensor + 1 for name, tensor in optimizer.layer_state().items()}
    for change in ({}, {f"{kind}/1.weight": torch.zeros(2, 7)}):
        damaged = {**state, **change}
        if not change:
            del damaged[f"{kind}/1.weight"]
        has = r"shape \(2, 7\)" if change else "nothing"
        with pytest.raises(ConfigError, match=rf"{kind}/1.weight .* has {has}, the model \(2, 6\)"):
            optimizer.load_layer_state(damaged)
    assert all(map(torch.equal, before, module.parameters())), "refused, and half of it loaded"

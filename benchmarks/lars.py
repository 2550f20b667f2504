"""Time of a step of LARS: ours, other libraries', plain loops, SGD, and what memory allows.

python benchmarks/lars.py [--models resnet50 vit_base_patch16_224 1000-tensors] [--device cuda]

Everything runs in turn in one process, on weights, gradients and momenta of its own. Two floors are
measured beside it on flat buffers of the same size: two norms and torch's fused SGD, the least that
this rule takes of torch's operations; and the time in which a triad, c = a + s * b, moves the
7 numbers a weight that two passes read and write.
"""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
import verdicts
from harness import facts, interleaved, measurement, write_rows
from torch import nn

from fastclr.facts import now
from fastclr.files import write_durably
from fastclr.kernels.reference import lars_step
from fastclr.optim import LARS

LR, MOMENTUM, DECAY, TRUST = 0.1, 0.9, 1e-4, 1e-3
YOU: dict[str, Any] = {"denominator": "sum_of_norms", "rate_inside_momentum": False}
FLOOR, TRIAD = "floor: two flat norms, fused SGD", "floor: memory, by a triad"
RESULTS = Path(__file__).with_name("results") / "lars.md"
HEADING = "## Measured\n"  # what stands below is replaced

Groups = list[dict[str, Any]]
Step = Callable[[], object]


def shapes(model: str) -> list[torch.Size]:
    """Return the shapes of a model's parameters; ``1000-tensors`` is a thousand of 64 x 64."""
    if model == "1000-tensors":
        return [torch.Size((64, 64))] * 1000
    with torch.device("meta"):
        return [p.shape for p in timm.create_model(model).parameters()]


def groups(sizes: list[torch.Size]) -> Groups:
    """Make weights and gradients: adapted and decayed, and those of fewer than 2 dimensions."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    parameters = [nn.Parameter(0.05 * torch.randn(s, generator=generator)) for s in sizes]
    for p in parameters:
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)
    large, small = ([p for p in parameters if (p.ndim > 1) is big] for big in (True, False))
    both = [{"params": large, "weight_decay": DECAY}, {"params": small, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def ours(made: Groups, **form: Any) -> Step:
    """Return the step of our LARS."""
    adapted = [{**group, "adapt": group["weight_decay"] > 0} for group in made]
    return LARS(adapted, LR, MOMENTUM, trust_coefficient=TRUST, **form).step


def lightly_lars(made: Groups) -> Step:
    """Return the step of lightly's LARS."""
    from lightly.utils.lars import LARS as Lightly  # noqa: N811

    return Lightly(made, LR, MOMENTUM, trust_coefficient=TRUST).step


def torch_optimizer_lars(made: Groups) -> Step:
    """Return the step of torch-optimizer's LARS."""
    from torch_optimizer import LARS as TorchOptimizer  # noqa: N811

    return TorchOptimizer(made, LR, MOMENTUM, trust_coefficient=TRUST).step


def plain_loop(made: Groups) -> Step:
    """Return a step that takes the reference tensor by tensor."""
    momenta = [[torch.zeros_like(p) for p in group["params"]] for group in made]

    @torch.no_grad()
    def step() -> None:
        for group, held in zip(made, momenta, strict=True):
            decay = group["weight_decay"]
            options: Any = {"weight_decay": decay, "adapt": decay > 0, "trust_coefficient": TRUST}
            for p, momentum in zip(group["params"], held, strict=True):
                w, v = lars_step(p, p.grad, momentum, lr=LR, momentum=MOMENTUM, **options)
                p.copy_(w)
                momentum.copy_(v)

    return step


def foreach_loop(made: Groups) -> Step:
    """Return a step of torch's multi-tensor operations, each over the whole model."""
    momenta = [[torch.zeros_like(p) for p in group["params"]] for group in made]

    @torch.no_grad()
    def step() -> None:
        for group, v in zip(made, momenta, strict=True):
            w, g = group["params"], [p.grad for p in group["params"]]
            if decay := group["weight_decay"]:
                g = torch._foreach_add(g, w, alpha=decay)
                norms = zip(torch._foreach_norm(w), torch._foreach_norm(g), strict=True)
                torch._foreach_mul_(g, [TRUST * a / b for a, b in norms])
            torch._foreach_mul_(v, MOMENTUM)
            torch._foreach_add_(v, g, alpha=LR)
            torch._foreach_sub_(w, v)

    return step


def sgd(made: Groups, **how: bool) -> Step:
    """Return the step of torch's SGD, which takes no norms."""
    return torch.optim.SGD(made, LR, MOMENTUM, **how).step


CONTENDERS: dict[str, Callable[[Groups], Step]] = {
    "fastclr": ours,
    "fastclr, in the form of the next two": lambda made: ours(made, **YOU),
    "lightly": lightly_lars,
    "torch-optimizer": torch_optimizer_lars,
    "plain loop": plain_loop,
    "foreach loop": foreach_loop,
    "SGD, foreach": lambda made: sgd(made, foreach=True),
    "SGD, fused": lambda made: sgd(made, fused=True),
}


def floors(numel: int) -> dict[str, Step]:
    """Return what memory and torch allow at best, on flat buffers."""
    a, b, c = (torch.randn(numel) for _ in range(3))
    options: dict[str, Any] = {"weight_decay": DECAY, "momentum": MOMENTUM, "lr": LR}
    options |= {"dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}

    def norms_and_fused() -> None:
        torch.linalg.vector_norm(a)
        torch.linalg.vector_norm(b)
        torch._fused_sgd_([a], [b], [c], **options)

    return {FLOOR: norms_and_fused, TRIAD: lambda: torch.add(a, b, alpha=1e-9, out=c)}


def whole_triads(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return times with the triad's for as many bytes as a step moves: 7 numbers, not 3."""
    return seconds | {TRIAD: [s * 7 / 3 for s in seconds[TRIAD]]}


def check(sizes: list[torch.Size]) -> None:
    """Check that all take the same step where their rule is the same; then a time means something.

    Raises:
        AssertionError: If they do not.
    """
    pairs = (("fastclr", "plain loop", "foreach loop"), tuple(CONTENDERS)[1:4])
    for names in pairs:
        made = {name: groups(sizes) for name in names}
        for name in names:
            CONTENDERS[name](made[name])()
        first, *others = ([p for group in made[n] for p in group["params"]] for n in names)
        start = [p for group in groups(sizes) for p in group["params"]]
        for other in others:
            for p, q, before in zip(first, other, start, strict=True):
                # Norms in single precision are right to 1e-4 in a layer of millions.
                torch.testing.assert_close(p - before, q - before, rtol=1e-3, atol=1e-7)


def measure(model: str, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time everything on one model; return a row each, with the seconds of every round."""
    sizes = shapes(model)
    numel = sum(size.numel() for size in sizes)
    with torch.device(device):  # not while they run: it costs each torch function microseconds
        check(sizes)
        steps = {name: make(groups(sizes)) for name, make in CONTENDERS.items()}
        steps |= floors(numel)
    seconds = whole_triads(interleaved(steps, rounds))
    common = {"model": model, "tensors": len(sizes), "parameters": numel}
    return [
        {**measurement("optimizer step", name, values, sizes=common, warm_ups=2), "seconds": values}
        for name, values in seconds.items()
    ]


def times(rows: list[dict[str, Any]], slow: str, fast: str) -> float:
    """Return how many times faster one was than another: the median over rounds."""
    seconds = {row["variant"]: row["seconds"] for row in rows}
    return statistics.median(s / f for s, f in zip(seconds[slow], seconds[fast], strict=True))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return one model's rows as Markdown."""
    sizes = rows[0]["sizes"]
    lines = [
        f"### {sizes['model']}: {sizes['tensors']} tensors, {sizes['parameters'] / 1e6:.1f} M",
        "",
        "| step | ms, median | lowest | highest | times fastclr's |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        low, middle, high = (1e3 * f(row["seconds"]) for f in (min, statistics.median, max))
        factor = times(rows, row["variant"], "fastclr")
        lines.append(f"| {row['variant']} | {middle:.1f} | {low:.1f} | {high:.1f} | {factor:.2f} |")
    return [*lines, ""]


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """Return what was asked of ResNet-50 on the CPU, and what came of it."""
    lines = verdicts.head("of ResNet-50")
    for what, slow, fast, limit, at_least in (
        ("times faster than lightly", "lightly", "fastclr", 3.0, True),
        ("times faster than torch-optimizer", "torch-optimizer", "fastclr", 1.5, True),
        ("times the floor of norms and fused SGD", "fastclr", FLOOR, 1.4, False),
    ):
        found = times(rows, slow, fast)
        met = found >= limit if at_least else found <= limit
        bound = f"{'>=' if at_least else '<='} {limit}"
        lines.append(verdicts.row(what, bound, f"{found:.2f}", met))
    return [*lines, ""]


def main(
    models: tuple[str, ...] = ("resnet50", "vit_base_patch16_224", "1000-tensors"),
    rounds: int = 15,
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path | None = None,
) -> None:
    """Measure, and write the rows and the tables.

    Args:
        models: timm models, or 1000-tensors.
        rounds: Rounds of each model; a round calls everything once.
        device: Where the weights lie.
        out: Page whose tables are replaced, results/lars.md or lars_cuda.md if not given; the rows
            go beside it, as .jsonl.
    """
    on_cpu = device == "cpu"
    out = out or (RESULTS if on_cpu else RESULTS.with_stem("lars_cuda"))
    rows, page = [], []
    for model in models:
        found = measure(model, rounds, device)
        rows += found
        page += [*(targets(found) if model == "resnet50" and on_cpu else []), *table(found)]
        print("\n".join(table(found)))
    about = facts()
    hardware, versions = about["hardware"], about["versions"]
    where = f"{hardware['processor']}, {about['threads']} threads" if on_cpu else hardware["device"]
    head = (
        f"{now()[:10]}, `python benchmarks/lars.py{'' if on_cpu else ' --device cuda'}`, {where}, "
        f"torch {versions['torch']} fp32. Times in one run, "
        f"{rounds} rounds; factors are medians of those within a round."
    )
    before = out.read_text(encoding="utf-8").partition(HEADING)[0] if out.exists() else "# LARS\n\n"
    write_durably(out, "\n".join([before + HEADING, head, "", *page]).rstrip() + "\n")
    write_rows(out.with_suffix(".jsonl"), rows)


if __name__ == "__main__":
    tyro.cli(main)

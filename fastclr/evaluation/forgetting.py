"""What the head forgets: which change was made to an image, told from h and from g(h).

Source: Chen et al. 2020, section 4.2 and Table 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastclr.config import ConfigError
from fastclr.evaluation.features import Features, check_pair
from fastclr.evaluation.linear import standardised

HIDDEN, EPOCHS, BATCH, RATE, DECAY = 512, 30, 128, 1e-3, 1e-4
PROTOCOL = (
    f"An MLP with one hidden layer of {HIDDEN} ReLUs on frozen, standardised features ({EPOCHS} "
    f"epochs of AdamW, batch {BATCH}, rate {RATE:g} with cosine decay, weight decay {DECAY:g}) "
    "tells how an image was changed. All views of an image are on one side of the split. Chance is "
    "the share of the commonest answer. Accuracy on the views of the test images."
)

# task -> view -> of every how many images this view is shown. One gray image beside four coloured
# ones is the 80 % of the paper's chance level; the other answers are equally frequent.
TASKS: dict[str, dict[str, int]] = {
    "colour or grayscale": {"original": 1, "grayscale": 4},
    "rotation": {"original": 1, "rotated 90": 1, "rotated 180": 1, "rotated 270": 1},
    "original or noise": {"original": 1, "noise": 1},
    "original or Sobel": {"original": 1, "sobel": 1},
}
VIEWS = tuple(dict.fromkeys(view for views in TASKS.values() for view in views))

Views = Mapping[str, Mapping[str, Features]]  # view -> layer -> features of the same images


class Forgotten(NamedTuple):
    """How well one change can be told.

    Attributes:
        task: Key of :data:`TASKS`.
        chance: Share of the commonest answer among the test views, 0..1.
        top1: Test accuracy by layer, 0..1.
    """

    task: str
    chance: float
    top1: dict[str, float]


def forgetting_scores(
    train: Views,
    test: Views,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    say: Callable[[str], None] = lambda _: None,
    seed: int = 0,
) -> list[Forgotten]:
    """Tell every change of :data:`TASKS` from every layer; see :data:`PROTOCOL`.

    Args:
        train: Features of every view of :data:`VIEWS`: row i is image i in each.
        test: The same views and layers of other images.
        device: Where the probes are trained.
        say: Told the probe that is being trained.
        seed: Of the probes' first weights and order.

    Raises:
        ConfigError: If a view is missing, or views do not hold the same images.
        FloatingPointError: If a feature is not finite.
    """
    for of in (train, test):
        _refuse_unpaired(of)
    table = []
    for task, views in TASKS.items():
        chance, top1 = 0.0, {}
        for layer in test["original"]:
            say(f"{task} from {layer}")
            fitting, held_out = (task_features(of, layer, views) for of in (train, test))
            chance = float(np.bincount(held_out.label_X).max() / len(held_out.label_X))
            top1[layer] = mlp_probe(fitting, held_out, device=device, seed=seed)
        table.append(Forgotten(task, chance, top1))
    return table


def task_features(of: Views, layer: str, views: Mapping[str, int]) -> Features:
    """Stack a task's views of one layer; the label is the place of the view."""
    parts = [of[view][layer].h_XF[::every] for view, every in views.items()]
    label_X = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Features(np.concatenate(parts), label_X)


def _refuse_unpaired(of: Views) -> None:
    """Refuse views that are not of the same images.

    Raises:
        ConfigError: With the first such view.
    """
    for view in VIEWS:
        layers = of.get(view, {})
        for layer, (_, label_X) in of.get("original", {}).items():
            if layer not in layers or not np.array_equal(layers[layer].label_X, label_X):
                raise ConfigError(
                    f"view {view!r} at layer {layer} is missing or holds other images than the "
                    "original view: pairs are of one image. Take all views of the same images."
                )


def mlp_probe(
    train: Features,
    test: Features,
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    seed: int = 0,
) -> float:
    """Train a small MLP on features and return its test accuracy, 0..1; see :data:`PROTOCOL`.

    Args:
        train: Labelled features.
        test: Labelled features of the same width.
        device: Where it is trained.
        seed: Of its first weights and of the order of the rows.

    Raises:
        ConfigError: If labels are missing or sets do not fit each other.
        FloatingPointError: If a feature is not finite.
    """
    check_pair(train, test)
    train, test = standardised(train, test)
    num_rows, num_features = train.h_XF.shape
    num_classes = int(max(train.label_X.max(), test.label_X.max())) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(num_features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_classes)
        probe = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=DECAY)
    num_steps = EPOCHS * -(-num_rows // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    h_XF, label_X = (torch.from_numpy(rows).to(device) for rows in train)
    for epoch in range(EPOCHS):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        for rows in torch.from_numpy(order).to(device).split(BATCH):
            loss = F.cross_entropy(probe(h_XF[rows]), label_X[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        found_X = [
            probe(part.to(device)).argmax(1) for part in torch.from_numpy(test.h_XF).split(8192)
        ]
    return float((torch.cat(found_X).cpu().numpy() == test.label_X).mean())


def forgetting_markdown(table: Sequence[Forgotten]) -> str:
    """Return the table in Markdown."""
    layers = list(table[0].top1)
    rows = [f"| what changed | chance | {' | '.join(layers)} |", "|---" * (len(layers) + 2) + "|"]
    for task, chance, top1 in table:
        scores = " | ".join(f"{top1[layer]:.1%}" for layer in layers)
        rows.append(f"| {task} | {chance:.1%} | {scores} |")
    return "\n".join(rows)

"""Scores while training: the frozen encoder on a few labelled images, every rank its part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from fastclr import collectives
from fastclr.config import ConfigError, raise_all
from fastclr.evaluation.collapse import Monitors, monitors
from fastclr.evaluation.features import Features
from fastclr.evaluation.knn import knn_accuracy
from fastclr.evaluation.linear import check_labels
from fastclr.evaluation.linear_joint import JointProbe
from fastclr.evaluation.ridge import ridge_probe
from fastclr.evaluation.scoring import top1

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of which each rank reads a part.

    Attributes:
        name: What messages call it, such as its path.
        label_X: int64 labels 0..num_classes - 1 of all X images.
        num_classes: Classes there are, whether or not these images show all.
        batches: Called anew in every evaluation. Gives this rank's part: uint8 images
            (n, 3, H, W) and int64 labels (n,). The ranks' parts, in the order of the ranks, hold
            every image once in the order of ``label_X``; they may be unequal, or empty.
    """

    name: str
    label_X: npt.NDArray[np.int64]
    num_classes: int
    batches: Callable[[], Batches]


class OnlineEvaluation:
    """Scores a model in the middle of its training and leaves it as it was.

    It runs in evaluation mode and without gradients; no weight, no buffer and no generator of
    random numbers changes, and nothing of it is a parameter of the model.

    Args:
        fitting: Images whose features vote and are regressed on.
        held_out: Images that are classified.
        pairs_VBCHW: This rank's part of a fixed batch of views for the monitors of collapse, uint8
            (2, B, 3, H, W), one forward pass; None for none of them, on every rank.
        probe: Classifier that is trained beside the model and scored here too.
    """

    def __init__(
        self,
        fitting: ImageSet,
        held_out: ImageSet,
        pairs_VBCHW: torch.Tensor | None = None,
        probe: JointProbe | None = None,
    ) -> None:
        self.fitting, self.held_out, self.pairs_VBCHW = fitting, held_out, pairs_VBCHW
        self.probe = probe

    def check(self) -> None:
        """Refuse images that cannot be scored; no image is read.

        Raises:
            ConfigError: If labels are missing, the sets differ in classes, or the fitting images
                are too few or of one class.
        """
        sets = (self.fitting, self.held_out)
        problems = []
        for images in sets:
            missing = int((images.label_X < 0).sum())
            if missing or not len(images.label_X):
                problems.append(
                    f"{images.name} has {missing} images without a label of {len(images.label_X)}: "
                    "online evaluation needs labelled ones. Name another set, or switch it off."
                )
        if self.fitting.num_classes != self.held_out.num_classes:
            problems.append(
                " and ".join(f"{s.name} has {s.num_classes} classes" for s in sets)
                + ": features of one cannot classify the other. Name sets of the same classes."
            )
        try:
            check_labels(self.fitting.label_X)
        except ConfigError as error:
            problems.append(f"{self.fitting.name}: {error} Take more of its images.")
        raise_all(problems)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Score the model; every rank calls this, with the same module in the same state.

        Args:
            model: Maps uint8 views (V, n, 3, H, W) to h (Vn, F) and z (Vn, D), in any floating
                dtype; :class:`~fastclr.simclr.SimCLR`, inside an engine or alone.

        Returns:
            ``knn_top1`` and ``linear_top1`` (ridge regression), ``joint_top1`` where there is a
            probe, all 0..1, and the fields of :class:`~fastclr.evaluation.collapse.Monitors` where
            there are pairs. The same on every rank, and up to rounding for every number of ranks.

        Raises:
            FloatingPointError: If a feature is not finite; on every rank.
            ValueError: If the batches do not hold what ``label_X`` says; on every rank.
        """
        device = next(model.parameters()).device
        with _evaluating(model), torch.no_grad():
            fitting = _features(model, self.fitting, device)
            held_out = _features(model, self.held_out, device)
            views = self.pairs_VBCHW
            pairs = None if views is None else _projected(model, views.to(device))
        names = ["knn_top1", "linear_top1", *(["joint_top1"] if self.probe else [])]
        names += Monitors._fields if pairs else ()
        values = torch.zeros(len(names), dtype=torch.float64, device=device)
        if collectives.rank() == 0:  # of one rank: rounding on another could tip a vote
            scores = [knn_accuracy(fitting, held_out), ridge_probe(fitting, held_out).top1]
            if self.probe:
                answer_X = self.probe.answers(torch.from_numpy(held_out.h_XF)).cpu().numpy()
                scores.append(top1(answer_X, held_out.label_X))
            scores += monitors(*pairs) if pairs else ()
            values = values.new_tensor(scores)
        if collectives.num_ranks() > 1:
            dist.broadcast(values, src=0)
        return dict(zip(names, values.tolist(), strict=True))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and every module back to the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _features(model: nn.Module, images: ImageSet, device: torch.device) -> Features:
    """Return the features of all ranks' images, in order."""
    features, labels = [], []
    for images_NCHW, label_N in _in_step(images.batches(), device):
        h_NF, _ = model(images_NCHW.to(device).unsqueeze(0))
        features.append(h_NF[: len(label_N)].float())
        labels.append(label_N.to(device))
    h_XF = _gather(torch.cat(features), images.name)
    label_X = _gather(torch.cat(labels).unsqueeze(1), images.name).squeeze(1).cpu().numpy()
    if not np.array_equal(label_X, images.label_X):
        raise ValueError(
            f"the batches of {images.name} hold {len(label_X)} images, other ones or in another "
            f"order than the {len(images.label_X)} they should: the scores would be of other "
            "images. Give every rank its part, in the order of the ranks."
        )
    return Features(h_XF.cpu().numpy(), label_X)


def _in_step(batches: Batches, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield equally many batches on every rank: under ZeRO 3 a forward pass is a collective.

    A rank that has none left gets a black image without a label.
    """
    mine = iter(batches)
    while True:
        images_NCHW, label_N = next(mine, _NOTHING)
        shape = torch.tensor(images_NCHW.shape, device=device)
        if collectives.num_ranks() > 1:
            dist.all_reduce(shape, dist.ReduceOp.MAX)
        most, *shape_CHW = shape.tolist()
        if not most:
            return
        if not len(images_NCHW):
            images_NCHW = images_NCHW.new_zeros(1, *shape_CHW)
        yield images_NCHW, label_N


_NOTHING = torch.empty(0, 0, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)


def _projected(model: nn.Module, views_VBCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h and z of all ranks' views, view-major."""
    h_NF, z_ND = model(views_VBCHW)
    # The two views of an image in one row: parts of the ranks can then be stacked.
    both_VBK = torch.cat([h_NF, z_ND], 1).unflatten(0, views_VBCHW.shape[:2])
    rows_BK = _gather(both_VBK.transpose(0, 1).flatten(1), "pairs")
    both_NK = rows_BK.unflatten(1, (len(views_VBCHW), -1)).transpose(0, 1).flatten(0, 1)
    return both_NK[:, : h_NF.shape[1]], both_NK[:, h_NF.shape[1] :]


def _gather(rows_ND: torch.Tensor, name: str) -> torch.Tensor:
    """Stack the rows of all ranks; all refuse one that is not finite."""
    num_rows_R = [num_rows for num_rows, _ in collectives.shapes(rows_ND)]
    gathered = collectives.all_gather(rows_ND, num_rows_R)
    if not gathered.isfinite().all():
        raise FloatingPointError(
            f"features of {name} are not finite: the encoder has diverged, or overflows in half "
            "precision. Lower the learning rate or use bf16, and start a new run."
        )
    return gathered

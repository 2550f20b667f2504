"""Weighted nearest neighbours (Wu et al. 2018): no training, no rate to tune."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastclr.evaluation.features import Features

NEIGHBOURS, TEMPERATURE = 20, 0.07
PROTOCOL = (
    f"Vote of the {NEIGHBOURS} nearest training images by cosine similarity of un-augmented "
    f"features, weighted by exp(similarity / {TEMPERATURE}). Accuracy on the whole test set."
)


@torch.inference_mode()
def knn_accuracy(
    train: Features,
    test: Features,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    block: int = 512,
) -> float:
    """Return the top-1 test accuracy, 0..1, of the weighted vote.

    Args:
        train: Labelled features.
        test: Labelled features of the same width.
        neighbours: Neighbours that vote; all if there are fewer.
        temperature: Divides the similarities in the weights.
        block: Test rows handled at a time; memory is block * train rows * 4 bytes.
    """
    keys_XF = F.normalize(torch.from_numpy(train.h_XF), dim=1)
    key_label_X = torch.from_numpy(train.label_X)
    label_X = torch.from_numpy(test.label_X)
    num_classes = int(max(key_label_X.max(), label_X.max())) + 1
    right = 0
    for query_NF, truth_N in zip(
        F.normalize(torch.from_numpy(test.h_XF), dim=1).split(block),
        label_X.split(block),
        strict=True,
    ):
        similarity_NK, nearest_NK = (query_NF @ keys_XF.T).topk(min(neighbours, len(keys_XF)))
        votes_NC = torch.zeros(len(query_NF), num_classes)
        votes_NC.scatter_add_(1, key_label_X[nearest_NK], (similarity_NK / temperature).exp())
        right += int((votes_NC.argmax(1) == truth_N).sum())
    return right / len(label_X)

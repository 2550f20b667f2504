"""The specification: dense, slow, obvious, differentiable, in any floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def nt_xent(
    u_ND: torch.Tensor, keys_MD: torch.Tensor, first: int, temperature: float
) -> torch.Tensor:
    """Return the mean NT-Xent loss of N anchors (Chen et al. 2020, equation 1), in nats.

    Args:
        u_ND: Anchors, unit rows, view-major: the positive of row i is row (i + N/2) mod N.
        keys_MD: Unit rows that every anchor is compared with; rows first .. first + N are u_ND.
        first: Place of the anchors among the keys.
        temperature: Divides the similarities.
    """
    num_rows = len(u_ND)
    self_N = torch.arange(num_rows, device=u_ND.device) + first
    logits_NM = u_ND @ keys_MD.T / temperature
    # Masked before the exponential: subtracting exp(1/temperature) afterwards cancels.
    logits_NM = logits_NM.scatter(1, self_N[:, None], float("-inf"))
    return F.cross_entropy(logits_NM, self_N.roll(num_rows // 2))

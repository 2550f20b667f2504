"""Contrastive losses; an entry of LOSSES is a class built with its settings."""

from __future__ import annotations

from fastclr.losses.gradient_cache import gradient_cache
from fastclr.losses.nt_xent import NTXent, contrastive_accuracy, nt_xent

LOSSES = {"nt_xent": NTXent}

__all__ = ["LOSSES", "NTXent", "contrastive_accuracy", "gradient_cache", "nt_xent"]

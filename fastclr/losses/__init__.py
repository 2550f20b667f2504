"""Contrastive losses; an entry of LOSSES is a class built with its settings."""

from __future__ import annotations

from fastclr.losses.nt_xent import NTXent, contrastive_accuracy, nt_xent

LOSSES = {"nt_xent": NTXent}

__all__ = ["LOSSES", "NTXent", "contrastive_accuracy", "nt_xent"]

"""Optimizers and rates."""

from fastclr.optim.lars import LARS, parameter_groups

__all__ = ["LARS", "parameter_groups"]

"""Optimizers."""

from torchweld.optim.adamw import AdamW, Statistics

__all__ = ["AdamW", "Statistics"]

"""Optimizers."""

from torchweld.optim._observed import Statistics
from torchweld.optim.adamw import AdamW

__all__ = ["AdamW", "Statistics"]

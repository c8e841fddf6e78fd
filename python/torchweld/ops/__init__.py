"""Documented functions over ``torch.ops.torchweld``."""

from torchweld.ops.adamw import adamw_step_ as adamw_step_
from torchweld.ops.adamw import grad_norm as grad_norm

"""Fake kernels of the AdamW operators. They have no autograd: a step is not differentiated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.register_fake("torchweld::adamw_step_")
def _adamw_step(*args: Any, **kwargs: Any) -> None:
    pass


@torch.library.register_fake("torchweld::grad_norm")
def _grad_norm(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float64)

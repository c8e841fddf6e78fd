"""The linear layers of an inference snapshot."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from torchweld.convert import _rules
from torchweld.nn.packed_linear import SMALLEST, PackedLinear


def pack_linears(snapshot: nn.Module) -> None:
    """Make every linear layer large enough to gain a :class:`PackedLinear`, in place."""
    for module in snapshot.modules():
        if _gains(module):
            module.__class__ = PackedLinear
            PackedLinear._start(module)  # type: ignore[arg-type]


def _gains(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or _rules.FOLDED in module.__dict__:
        return False
    if is_parametrized(module) or "forward" in module.__dict__:
        return False
    weight = module.weight
    can = weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16)
    return can and weight.numel() >= SMALLEST

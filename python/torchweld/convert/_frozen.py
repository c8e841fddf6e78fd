"""Recognizes the frozen batch normalization that detection models bring with them.

torchvision, detectron2, DETR and others each have a class ``FrozenBatchNorm2d`` of their own. None
is imported here; what makes one is its name, its buffers, and that it computes the right thing.
"""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

_BUFFERS = ("running_mean", "running_var", "weight", "bias")
_known: WeakKeyDictionary[type[nn.Module], bool] = WeakKeyDictionary()


def has_frozen_name(module: nn.Module | None) -> bool:
    """Whether a module says it is a frozen batch normalization."""
    return type(module).__name__ == "FrozenBatchNorm2d"


def is_frozen(module: nn.Module | None) -> bool:
    """Whether a module is one: it normalizes by its buffers, in any mode, and does no more."""
    if module is None or not has_frozen_name(module):
        return False
    if [*module.parameters(), *module.children()]:
        return False
    if {name for name, _ in module.named_buffers()} != set(_BUFFERS):
        return False
    kind = type(module)
    if kind not in _known:
        _known[kind] = _is_right(module)
    return _known[kind]


def eps_of(module: nn.Module) -> float:
    """The number added to the variance; DETR's class has it in the code of its forward."""
    return float(getattr(module, "eps", 1e-5))


def _is_right(module: nn.Module) -> bool:
    """Whether the class computes a batch normalization, tried on a copy with values of our own."""
    twin = copy.deepcopy(module)
    values = torch.linspace(0.5, 2.0, 12, dtype=torch.float64, device="cpu").view(4, 3)
    for name, value in zip(_BUFFERS, values, strict=True):
        twin._buffers[name] = value.clone()
    if hasattr(twin, "eps"):
        twin.__dict__["eps"] = 0.25
    x = torch.arange(24, dtype=torch.float64, device="cpu").sin().view(2, 3, 2, 2)
    mean, var, weight, bias = values
    expected = F.batch_norm(x, mean, var, weight, bias, eps=eps_of(twin))
    try:
        for twin.training in (True, False):
            for leaf in (x, x.clone().requires_grad_()):
                if not torch.allclose(type(twin).forward(twin, leaf), expected):
                    return False
    except Exception:  # another signature, another shape, another type: not what we know
        return False
    return True

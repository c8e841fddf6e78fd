"""Which stock modules a fused unit may stand for, and why not."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from torchweld.convert._frozen import has_frozen_name, is_frozen
from torchweld.convert._values import stock_class
from torchweld.nn import ConvReLU2d, MaxPool2d, SyncBatchNorm

FOLDED = "_torchweld_folded"  # marks a linear layer that holds a batch normalization as well


def is_conv(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether a module is a convolution of any kind, or the 1x1 one a linear layer is."""
    if _is_quantized(module):
        return type(module).__name__.startswith(("Conv", "Linear"))
    return isinstance(module, (_ConvNd, nn.Linear))


def is_batch_norm(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether a module is a batch normalization of any kind."""
    return isinstance(module, _BatchNorm) or has_frozen_name(module)


def words(conv: type[nn.Module], bn: type[nn.Module]) -> tuple[str, str]:
    """Name the classes of a pair, for reports."""
    first = "linear" if conv is nn.Linear else "conv"
    if bn in (SyncBatchNorm, nn.SyncBatchNorm):
        return first, "sync_bn"
    return first, "frozen_bn" if bn.__name__ == "FrozenBatchNorm2d" else "bn"


def is_folded(conv: nn.Module | None, bn: nn.Module | None) -> bool:
    """Whether a pair is what folding left of conv and bn."""
    if type(conv) is nn.Linear and FOLDED not in conv.__dict__:
        return False
    if type(conv) is ConvReLU2d and conv.activation != "identity":
        return False  # a user's own, whose activation the pair would lose
    return type(conv) in (ConvReLU2d, nn.Linear) and type(bn) is nn.Identity


def is_hooked(module: nn.Module | None) -> bool:
    """Whether calling the module does more than the forward of its class."""
    return bool(
        module is None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def activation_of(module: nn.Module | None) -> tuple[str, float] | None:
    """Return the name and slope of the fused activation equal to a module."""
    kind = type(module)
    if kind in _ACTIVATIONS:
        return _ACTIVATIONS[kind], 0.01
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return "leaky_relu", float(module.negative_slope)
    if isinstance(module, nn.Hardtanh) and kind is nn.Hardtanh:
        return ("relu6", 0.01) if (module.min_val, module.max_val) == (0, 6) else None
    return None


_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


def reason_against(conv: nn.Module, bn: nn.Module) -> str:
    """Return why a pair cannot be fused, or nothing."""
    if is_folded(conv, bn):
        return "has hooks" if is_hooked(conv) or is_hooked(bn) else ""
    stock_conv = nn.Linear if isinstance(conv, nn.Linear) else nn.Conv2d
    stock_bn = nn.BatchNorm1d if stock_conv is nn.Linear else nn.BatchNorm2d
    for module, stock in ((conv, stock_conv), (bn, stock_bn)):
        kind = type(module)
        if is_parametrized(module):
            return f"{stock.__name__} is parametrized"
        if isinstance(module, LazyModuleMixin):
            return f"{kind.__name__} is lazy: run the model once first"
        if _is_quantized(module):
            return f"{kind.__name__} is quantized"
        if "forward" in module.__dict__:
            return f"the forward of this {kind.__name__} was replaced"
        if is_hooked(module):
            return f"{stock.__name__} has hooks"
        if kind is not stock and not (module is bn and _is_relative(bn)):
            what = "a subclass of" if isinstance(module, stock) else "not"
            return f"{kind.__name__} is {what} {stock.__name__}"
    if is_frozen(bn) and stock_conv is nn.Linear:
        return f"{type(bn).__name__} is not BatchNorm1d"
    channels = conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels
    features = bn.num_features if isinstance(bn, _BatchNorm) else bn.running_mean.shape[0]  # type: ignore[index]
    if channels != features:
        return f"{channels} channels meet a batch normalization of {features}"
    return ""


def _is_quantized(module: nn.Module | None) -> bool:
    return type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized"))


def _is_relative(bn: nn.Module) -> bool:
    return type(bn) in (SyncBatchNorm, nn.SyncBatchNorm) or is_frozen(bn)


def reason_against_folding(bn: nn.Module) -> str:
    """Return why a pair that can be fused cannot be folded, or nothing."""
    if bn.running_mean is None or bn.running_var is None:
        return "the batch normalization has no running statistics to fold"
    return ""


def has_open_forward(module: nn.Module) -> bool:
    """Whether a module's forward calls others: is a user's, or that of a Sequential."""
    forward = getattr(type(module), "forward", None)
    if isinstance(module, torch.jit.ScriptModule) or forward is None:
        return False
    return not _is_torchs(forward) or stock_class(module).forward is nn.Sequential.forward


def is_pure(module: nn.Module) -> bool:
    """Whether calling a module surely leaves its arguments as they are."""
    return all(
        (_is_torchs(type(part).forward) or is_frozen(part) or type(part) is MaxPool2d)
        and not getattr(part, "inplace", False)
        and not is_hooked(part)
        for part in module.modules()
    )


def _is_torchs(forward: object) -> bool:
    return (getattr(forward, "__module__", None) or "").startswith("torch.nn.")

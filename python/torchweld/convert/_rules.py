"""Which stock modules a fused unit may stand for, and why not."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from torchweld.nn import ConvReLU2d


def is_conv(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether a module is a convolution of any kind."""
    return isinstance(module, _ConvNd)


def is_batch_norm(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether a module is a batch normalization of any kind."""
    return isinstance(module, _BatchNorm)


def is_folded(conv: nn.Module | None, bn: nn.Module | None) -> bool:
    """Whether a pair is what folding left of conv and bn."""
    return type(conv) is ConvReLU2d and type(bn) is nn.Identity


def is_hooked(module: nn.Module | None) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module is None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
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


def is_ready(conv: nn.Module | None, bn: nn.Module | None) -> bool:
    """Whether a pair may be fused in the call at hand; the quick form of :func:`reason_against`."""
    stock = type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d
    if not stock and not is_folded(conv, bn):
        return False
    return not is_hooked(conv) and not is_hooked(bn)


def reason_against(conv: nn.Module, bn: nn.Module) -> str:
    """Return why a pair cannot be fused, or nothing."""
    if is_folded(conv, bn):
        return "has hooks" if is_hooked(conv) or is_hooked(bn) else ""
    for module, stock in ((conv, nn.Conv2d), (bn, nn.BatchNorm2d)):
        kind = type(module)
        if is_parametrized(module):
            return f"{stock.__name__} is parametrized"
        if isinstance(module, LazyModuleMixin):
            return f"{kind.__name__} is lazy: run the model once first"
        if is_hooked(module):
            return f"{stock.__name__} has hooks"
        if kind is not stock:
            what = "a subclass of" if isinstance(module, stock) else "not"
            return f"{kind.__name__} is {what} {stock.__name__}"
        if "forward" in module.__dict__:
            return f"the forward of this {kind.__name__} was replaced"
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, nn.BatchNorm2d)
    if conv.out_channels != bn.num_features:
        return f"{conv.out_channels} channels meet a batch normalization of {bn.num_features}"
    return ""


def reason_against_folding(bn: nn.Module) -> str:
    """Return why a pair that can be fused cannot be folded, or nothing."""
    if bn.running_mean is None or bn.running_var is None:
        return "the batch normalization has no running statistics to fold"
    return ""


def is_pure(module: nn.Module) -> bool:
    """Whether calling a module surely leaves its arguments as they are."""
    return all(
        (getattr(type(part).forward, "__module__", None) or "").startswith("torch.nn.")
        and not getattr(part, "inplace", False)
        and not is_hooked(part)
        for part in module.modules()
    )

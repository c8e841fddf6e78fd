"""What a rewritten forward calls in place of conv, bn, add and activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchweld.nn.functional as TF
from torchweld import ops
from torchweld.nn import ConvReLU2d


def fused(
    input: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """Run a pattern of a model that trains."""
    if residual is None or _adds_in_place(residual, input, conv):
        return TF.conv_bn_relu(input, conv, bn, activation, negative_slope, residual)
    # Broadcast or promoted: the addition is torch's.
    output = TF.conv_bn_relu(input, conv, bn, "identity") + residual
    return _ACTIVATIONS[activation](output, negative_slope)


def folded(
    input: Tensor,
    conv: ConvReLU2d,
    bn: nn.Identity,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """Run a pattern of an inference snapshot, where ``conv`` holds the folded tensors."""
    if residual is not None and not _adds_in_place(residual, input, conv):
        return _ACTIVATIONS[activation](conv(input) + residual, negative_slope)
    return conv.run(input, activation, negative_slope, residual)


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "relu6": lambda x, _: F.relu6(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, _: F.silu(x),
    "hardswish": lambda x, _: F.hardswish(x),
}


def _adds_in_place(residual: Tensor, input: Tensor, conv: nn.Conv2d | ConvReLU2d) -> bool:
    """Whether a residual has the very shape, dtype and device of the conv's output."""
    if not isinstance(residual, Tensor) or residual.dim() != 4 or residual.device != input.device:
        return False
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
    if residual.dtype != dtype or residual.shape[:2] != (input.shape[0], conv.out_channels):
        return False
    for i in range(2):
        size, span = input.shape[2 + i], conv.dilation[i] * (conv.kernel_size[i] - 1)
        if conv.padding == "same":
            padding = span
        else:
            padding = 0 if isinstance(conv.padding, str) else 2 * conv.padding[i]
        if residual.shape[2 + i] != (size + padding - span - 1) // conv.stride[i] + 1:
            return False
    return True

"""What a rewritten forward calls in place of conv, bn, add and activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchweld.nn import ConvReLU2d
from torchweld.nn.functional import _both_sides, _pad, conv_bn_relu

# Where the fused ops run; "meta" is where shapes are worked out.
_DEVICES = ("cpu", "meta")


def fused(
    input: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """Run a pattern of a model that trains."""
    if input.device.type not in _DEVICES:
        output: Tensor = bn(conv(input))
    elif residual is None or _fits(residual, input, conv, _both_sides(conv)):
        return conv_bn_relu(input, conv, bn, activation, negative_slope, residual)
    else:  # broadcast, or of another dtype: the addition is torch's
        output = conv_bn_relu(input, conv, bn, "identity")
    return _finish(output, residual, activation, negative_slope)


def folded(
    input: Tensor,
    conv: ConvReLU2d,
    bn: nn.Identity,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """Run a pattern of an inference snapshot, where ``conv`` holds the folded tensors."""
    both_sides, where = conv.both_sides, [conv.both_sides[2], conv.both_sides[0]]
    padded, padding = _pad(input, where, both_sides, conv.padding_mode)
    if input.device.type not in _DEVICES:
        output = F.conv2d(
            padded, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups
        )
    elif residual is None or _fits(residual, input, conv, both_sides):
        if not torch.compiler.is_compiling():
            conv._pack()
        fused_output: Tensor = torch.ops.torchweld.conv_relu(
            padded, conv.weight, conv.packed_weight, conv.bias, residual, conv.stride, padding,
            conv.dilation, conv.groups, activation, negative_slope,
        )  # fmt: skip
        return fused_output
    else:
        output = conv(input)
    return _finish(output, residual, activation, negative_slope)


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "relu6": lambda x, _: F.relu6(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, _: F.silu(x),
    "hardswish": lambda x, _: F.hardswish(x),
}


def _finish(
    output: Tensor, residual: Tensor | None, activation: str, negative_slope: float
) -> Tensor:
    if residual is not None:
        output = output + residual
    return _ACTIVATIONS[activation](output, negative_slope)


def _fits(
    residual: Tensor, input: Tensor, conv: nn.Conv2d | ConvReLU2d, both_sides: list[int]
) -> bool:
    """Whether a residual has the very shape, dtype and device of the conv's output."""
    if not isinstance(residual, Tensor) or residual.dim() != 4 or residual.device != input.device:
        return False
    dtype = input.dtype
    kind = input.device.type
    # Asked about "meta", autocast raises.
    if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    if residual.dtype != dtype or residual.shape[:2] != (input.shape[0], conv.weight.shape[0]):
        return False
    left, right, top, bottom = both_sides
    padding = top + bottom, left + right
    for i in range(2):
        span = int(conv.dilation[i]) * (conv.weight.shape[2 + i] - 1)
        size = (input.shape[2 + i] + padding[i] - span - 1) // int(conv.stride[i]) + 1
        if residual.shape[2 + i] != size:
            return False
    return True

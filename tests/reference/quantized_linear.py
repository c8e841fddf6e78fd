"""The quantized linear layer as its documentation defines it, in float64 and int64.

Only the scales are float32, because their rounding is part of the definition.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = torch.finfo(torch.float32).tiny

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int64 values and float32 scale [...] of finite rows."""
    x = x.float()
    scale = (F.pad(x.abs(), (0, 1)).amax(-1) / 127).clamp_min(TINY)
    return (x * (1 / scale)[..., None]).round().long(), scale


def accumulators(x: Tensor, qweight: Tensor) -> tuple[Tensor, Tensor]:
    """int64 sums [..., N] and float32 scale [...]."""
    q, scale = quantize_rows(x)
    return q @ qweight.long().T, scale


def quantized_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "identity",
    group_size: int = 0,
) -> Tensor:
    """The layer in float64: no rounding after the scales."""
    k = max(x.shape[-1], 1)
    y = torch.zeros(*x.shape[:-1], qweight.shape[0], dtype=torch.float64)
    for first in range(0, k, group_size or k):
        group = slice(first, first + (group_size or k))
        sums, scale = accumulators(x[..., group], qweight[:, group])
        y += sums.double() * scale.double()[..., None]
    y = y * weight_scale.double()
    if bias is not None:
        y = y + bias.double()
    return ACTIVATIONS[activation](y)


def dequantize(qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The float weight whose product with the gradient is the gradient of the input."""
    return (qweight.float() * weight_scale[:, None]).to(dtype)


def straight_through(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    preactivation: Tensor,
) -> Tensor:
    """A float layer with the value of `preactivation` and the derivatives of a linear layer."""
    linear = F.linear(x, dequantize(qweight, weight_scale, x.dtype))
    z = linear + (preactivation - linear).detach()
    if bias is not None:
        z = z + (bias - bias.detach())
    return ACTIVATIONS[activation](z)


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal to quantization noise in dB."""
    signal = expected.detach().double()
    noise = actual.detach().double() - signal
    return float(20 * torch.log10(signal.norm() / noise.norm()))

"""The int4 linear layer as its documentation defines it, in float64 and int64.

Only the scales are float32, because their rounding is part of the definition.
"""

import torch
from torch import Tensor

from tests.reference.quantized_linear import ACTIVATIONS, quantize_rows


def unpack(qweight: Tensor, in_features: int) -> Tensor:
    """int64 values 0 to 15, [N, K]."""
    columns = [
        qweight[:, k // 2] >> 4 if k % 2 else qweight[:, k // 2] & 15 for k in range(in_features)
    ]
    if not columns:
        return torch.zeros(qweight.shape[0], 0, dtype=torch.int64)
    return torch.stack(columns, 1).long()


def integers(qweight: Tensor, zero: Tensor, in_features: int, group_size: int) -> Tensor:
    """int64 u - zero, [N, K]."""
    of_k = torch.arange(in_features) // group_size
    return unpack(qweight, in_features) - zero.long()[:, of_k]


def dequantize(
    qweight: Tensor, scale: Tensor, zero: Tensor, in_features: int, group_size: int
) -> Tensor:
    """The weight in float64, [N, K]."""
    of_k = torch.arange(in_features) // group_size
    values = integers(qweight, zero, in_features, group_size)
    return values.double() * scale.double()[:, of_k]


def accumulators(x: Tensor, values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int64 sums [..., G, N] of every group, and float32 scale [...]."""
    q, scale = quantize_rows(x)
    k = x.shape[-1]
    parts = [
        q[..., first : first + group_size] @ values[:, first : first + group_size].T
        for first in range(0, k, group_size)
    ]
    if not parts:
        return torch.zeros(*x.shape[:-1], 0, values.shape[0], dtype=torch.int64), scale
    return torch.stack(parts, -2), scale


def quantized_linear_int4(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    group_size: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """The layer in float64: no rounding after the scales."""
    qweight, weight_scale, zero = weight
    sums, scale = accumulators(x, integers(qweight, zero, x.shape[-1], group_size), group_size)
    y = (sums.double() * weight_scale.double().T).sum(-2) * scale.double()[..., None]
    if bias is not None:
        y = y + bias.double()
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.double()

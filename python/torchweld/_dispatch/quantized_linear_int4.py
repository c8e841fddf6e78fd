"""What torch's machinery needs to know about the int4 linear ops."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld._dispatch.fake import register_fake
from torchweld._dispatch.linear import (
    check_columns,
    register_autocast,
    register_backward,
    register_layer,
)
from torchweld.ops.quantized_linear_int4 import OCTET, dequantize_int4, unpack_weight_int4


@register_fake("torchweld::quantized_linear_int4")
def _fake(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str = "identity",
) -> Tensor:
    check_columns("quantized_linear_int4", "input", input, in_features)
    return input.new_empty([*input.shape[:-1], out_features])


@register_fake("torchweld::quantized_linear_int4_accumulators")
def _fake_accumulators(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    in_features: int,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    check_columns("quantized_linear_int4_accumulators", "input", input, in_features)
    rows = input.shape[:-1]
    return (
        input.new_empty([*rows, weight_scale.shape[1], out_features], dtype=torch.int32),
        input.new_empty(rows, dtype=torch.float32),
    )


@register_fake("torchweld::quantized_linear_int4_backward")
def _fake_backward(
    grad: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    in_features: int,
    out_features: int,
) -> Tensor:
    check_columns("quantized_linear_int4_backward", "grad", grad, out_features)
    return grad.new_empty([*grad.shape[:-1], in_features])


def _double_backward(
    grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, in_features: int, out_features: int
) -> Tensor:
    # The one place that makes a whole float weight: no kernel multiplies floats by 4 bits.
    weight = unpack_weight_int4(packed, scale, zero, in_features, out_features)
    group_size = packed.shape[1] * OCTET // max(1, scale.shape[1])
    return grad @ dequantize_int4(*weight, in_features, group_size or OCTET).T.to(grad.dtype)


register_layer(
    "quantized_linear_int4", "quantized_linear_int4_backward", weights=3, backward_weights=3
)
register_backward("quantized_linear_int4_backward", _double_backward)
register_autocast("quantized_linear_int4", casts=True)
register_autocast("quantized_linear_int4_backward", casts=False)

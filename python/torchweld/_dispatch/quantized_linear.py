"""What torch's machinery needs to know about the int8 linear ops."""

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
from torchweld.ops.quantized_linear import unpack_weight


@register_fake("torchweld::quantized_linear")
def _fake(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    activation: str = "identity",
    input_group_size: int = 0,
) -> Tensor:
    check_columns("quantized_linear", "input", input, in_features)
    return input.new_empty([*input.shape[:-1], weight_scale.shape[0]])


@register_fake("torchweld::quantized_linear_accumulators")
def _fake_accumulators(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    in_features: int,
) -> tuple[Tensor, Tensor]:
    check_columns("quantized_linear_accumulators", "input", input, in_features)
    rows = input.shape[:-1]
    return (
        input.new_empty([*rows, weight_scale.shape[0]], dtype=torch.int32),
        input.new_empty(rows, dtype=torch.float32),
    )


@register_fake("torchweld::quantized_linear_backward")
def _fake_backward(
    grad: Tensor, packed_weight: Tensor, weight_scale: Tensor, in_features: int
) -> Tensor:
    check_columns("quantized_linear_backward", "grad", grad, weight_scale.shape[0])
    return grad.new_empty([*grad.shape[:-1], in_features])


def _double_backward(
    grad: Tensor, packed_weight: Tensor, weight_scale: Tensor, in_features: int
) -> Tensor:
    qweight = unpack_weight(packed_weight, weight_scale.shape[0], in_features)
    return grad @ (qweight * weight_scale[:, None]).to(grad.dtype).T


register_layer("quantized_linear", "quantized_linear_backward", weights=3, backward_weights=2)
register_backward("quantized_linear_backward", _double_backward)
register_autocast("quantized_linear", casts=True)
register_autocast("quantized_linear_backward", casts=False)

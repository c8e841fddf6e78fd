"""What torch's machinery needs to know about the weight-only linear op."""

from __future__ import annotations

from torch import Tensor

from torchweld._dispatch.fake import register_fake
from torchweld._dispatch.linear import check_columns, register_autocast, register_layer


@register_fake("torchweld::weight_only_linear")
def _fake(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    activation: str = "identity",
) -> Tensor:
    check_columns("weight_only_linear", "input", input, in_features)
    return input.new_empty([*input.shape[:-1], weight_scale.shape[0]])


register_layer("weight_only_linear", "quantized_linear_backward", weights=2, backward_weights=2)
register_autocast("weight_only_linear", casts=True)

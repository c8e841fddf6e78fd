"""Documented functions over ``torch.ops.torchweld``."""

from torchweld.ops.adamw import adamw_step_, grad_norm
from torchweld.ops.batch_norm import (
    batch_norm_relu,
    batch_norm_relu_backward,
    batch_norm_relu_backward_reduce,
    batch_norm_stats,
    update_running_stats,
)
from torchweld.ops.conv_bn_relu import conv_bn_relu, conv_bn_relu_frozen, conv_relu, conv_relu_pack
from torchweld.ops.max_pool2d import max_pool2d, max_pool2d_with_positions
from torchweld.ops.quantized_linear import (
    pack_weight,
    quantize_weight,
    quantized_linear,
    unpack_weight,
)
from torchweld.ops.quantized_linear_int4 import (
    dequantize_weight_int4,
    pack_weight_int4,
    quantize_weight_int4,
    quantized_linear_int4,
    unpack_weight_int4,
)
from torchweld.ops.weight_only_linear import weight_only_linear

__all__ = [
    "adamw_step_",
    "batch_norm_relu",
    "batch_norm_relu_backward",
    "batch_norm_relu_backward_reduce",
    "batch_norm_stats",
    "conv_bn_relu",
    "conv_bn_relu_frozen",
    "conv_relu",
    "conv_relu_pack",
    "dequantize_weight_int4",
    "grad_norm",
    "max_pool2d",
    "max_pool2d_with_positions",
    "pack_weight",
    "pack_weight_int4",
    "quantize_weight",
    "quantize_weight_int4",
    "quantized_linear",
    "quantized_linear_int4",
    "unpack_weight",
    "unpack_weight_int4",
    "update_running_stats",
    "weight_only_linear",
]

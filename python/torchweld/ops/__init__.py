"""Documented functions over ``torch.ops.torchweld``."""

from torchweld.ops.adamw import adamw_step_, grad_norm
from torchweld.ops.conv_bn_relu import (
    batch_norm_relu,
    batch_norm_relu_backward,
    batch_norm_relu_backward_reduce,
    batch_norm_stats,
    conv_bn_relu,
    conv_bn_relu_frozen,
    conv_relu,
    conv_relu_pack,
    update_running_stats,
)
from torchweld.ops.quantized_linear import (
    pack_weight,
    quantize_weight,
    quantized_linear,
    unpack_weight,
)

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
    "grad_norm",
    "pack_weight",
    "quantize_weight",
    "quantized_linear",
    "unpack_weight",
    "update_running_stats",
]

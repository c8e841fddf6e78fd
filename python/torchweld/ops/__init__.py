"""Documented functions over ``torch.ops.torchweld``."""

from torchweld.ops.adamw import adamw_step_, grad_norm
from torchweld.ops.quantized_linear import (
    pack_weight,
    quantize_weight,
    quantized_linear,
    unpack_weight,
)

__all__ = [
    "adamw_step_",
    "grad_norm",
    "pack_weight",
    "quantize_weight",
    "quantized_linear",
    "unpack_weight",
]

"""Documented functions over ``torch.ops.torchweld``."""

from torchweld.ops.quantized_linear import (
    pack_weight,
    quantize_weight,
    quantized_linear,
    unpack_weight,
)

__all__ = ["pack_weight", "quantize_weight", "quantized_linear", "unpack_weight"]

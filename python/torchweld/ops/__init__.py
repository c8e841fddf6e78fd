"""Functional ops, documented; each calls the operator of its name in ``torch.ops.torchweld``."""

from torchweld.ops.quantized_linear import (
    pack_weight,
    quantize_weight,
    quantized_linear,
    unpack_weight,
)

__all__ = ["pack_weight", "quantize_weight", "quantized_linear", "unpack_weight"]

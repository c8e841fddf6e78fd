"""Modules that stand in for stock ones."""

from torchweld.nn import functional
from torchweld.nn.conv_bn_relu import ConvBNReLU2d, ConvReLU2d
from torchweld.nn.packed_linear import PackedLinear
from torchweld.nn.quantized_linear import QuantizedLinear
from torchweld.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "ConvBNReLU2d",
    "ConvReLU2d",
    "PackedLinear",
    "QuantizedLinear",
    "SyncBatchNorm",
    "functional",
]

"""Modules that stand in for stock ones."""

from torchweld.nn import functional
from torchweld.nn.conv_bn_relu import ConvBNReLU2d, ConvReLU2d
from torchweld.nn.int4_linear import Int4Linear
from torchweld.nn.max_pool2d import MaxPool2d
from torchweld.nn.multihead_attention import MultiheadAttention
from torchweld.nn.packed_linear import PackedLinear
from torchweld.nn.qat_linear import QATLinear
from torchweld.nn.quantized_linear import QuantizedLinear, WeightOnlyLinear
from torchweld.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "ConvBNReLU2d",
    "ConvReLU2d",
    "Int4Linear",
    "MaxPool2d",
    "MultiheadAttention",
    "PackedLinear",
    "QATLinear",
    "QuantizedLinear",
    "SyncBatchNorm",
    "WeightOnlyLinear",
    "functional",
]

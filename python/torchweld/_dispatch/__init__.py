"""What torch needs to know of each operator beyond its kernels: shapes, gradients, autocast."""

# The operators must be registered before anything is registered for them.
from torchweld import _library as _library  # isort: skip

from torchweld._dispatch import (
    adamw,
    conv_bn_relu,
    max_pool2d,
    quantized_linear,
    quantized_linear_int4,
    weight_only_linear,
)

__all__ = [
    "adamw",
    "conv_bn_relu",
    "max_pool2d",
    "quantized_linear",
    "quantized_linear_int4",
    "weight_only_linear",
]

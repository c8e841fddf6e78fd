"""Neural network modules."""

from torchweld.nn.quantized_linear import QuantizedLinear

__all__ = ["QuantizedLinear"]

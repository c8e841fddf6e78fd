"""Shapes, gradients and autocast of the operators, registered on import."""

from torchweld._dispatch import quantized_linear

__all__ = ["quantized_linear"]

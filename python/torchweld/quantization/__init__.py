"""Turns the linear layers of a model into layers with an integer weight."""

from torchweld.quantization._configs import Config, Int4, Int8, Int8WeightOnly
from torchweld.quantization._exclusions import Exclusion
from torchweld.quantization._quantize import prepare_qat, quantize
from torchweld.quantization._rule import worth_quantizing

__all__ = [
    "Config",
    "Exclusion",
    "Int4",
    "Int8",
    "Int8WeightOnly",
    "prepare_qat",
    "quantize",
    "worth_quantizing",
]

"""What a layer can be quantized to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchweld.nn.int4_linear import Int4Linear
from torchweld.nn.qat_linear import Kind
from torchweld.nn.quantized_linear import (
    QuantizedLinear,
    WeightOnlyLinear,
    invalid_input_group_size,
)
from torchweld.ops.quantized_linear_int4 import MAX_GROUP_SIZE, invalid_group_size


@dataclass(frozen=True)
class Int8:
    """Int8 weights per output channel, int8 activations quantized on the fly.

    Needs no calibration. See :func:`torchweld.ops.quantized_linear` for the arithmetic.

    Args:
        input_group_size: activations that share a scale, a multiple of 4: more accurate where a few
            channels are far louder than the rest. None: all of a row do.

    Raises:
        ValueError: ``input_group_size`` is not as above.
    """

    input_group_size: int | None = None

    def __post_init__(self) -> None:
        size = self.input_group_size
        problem = invalid_input_group_size(0 if size is None else size)
        if problem:
            raise ValueError(f"Int8: input_group_size: {problem}")


@dataclass(frozen=True)
class Int8WeightOnly:
    """Int8 weights per output channel, float activations.

    See :func:`torchweld.ops.weight_only_linear` for the arithmetic.
    """


@dataclass(frozen=True)
class Int4:
    """Int4 weights in groups along the input features, int8 activations quantized on the fly.

    See :func:`torchweld.ops.quantized_linear_int4` for the arithmetic.

    Args:
        group_size: input features that share a scale, a multiple of 8.

    Raises:
        ValueError: ``group_size`` is not as above.
    """

    group_size: int = 128

    def __post_init__(self) -> None:
        problem = invalid_group_size(self.group_size, MAX_GROUP_SIZE)
        if problem:
            raise ValueError(f"Int4: group_size: {problem}")


Config = Int8 | Int8WeightOnly | Int4


def check_config(function: str, config: object) -> Config:
    """The argument of a function, if it is a config; TypeError otherwise."""
    if not isinstance(config, (Int8, Int8WeightOnly, Int4)):
        raise TypeError(
            f"{function}: config: expected torchweld.Int8(), Int8WeightOnly() or Int4(), got "
            f"{config!r}"
        )
    return config


def layer_of(config: Config) -> tuple[Kind, dict[str, Any]]:
    """The module a config stands for, and the options of its ``from_float``."""
    if isinstance(config, Int8):
        return QuantizedLinear, {"input_group_size": config.input_group_size or 0}
    if isinstance(config, Int8WeightOnly):
        return WeightOnlyLinear, {}
    return Int4Linear, {"group_size": config.group_size}

"""Values a forward depends on, in a form that can be compared again before each call."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class UnwatchableError(Exception):
    """A value whose change could go unseen."""


# Classes as marks: they stay themselves through copy and pickle, and torch.compile knows them.
class MISSING:
    """Stands for an attribute that is not there."""


class TENSOR:
    """Stands for a tensor in a call's arguments."""


STOCK = "_torchweld_stock"  # where a welded class keeps the class it was made from

_CONSTANT = (
    bool, int, float, complex, str, bytes, type(None), type(...), slice, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_OBJECTS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, enum.Enum)
UNCHANGING = _CONSTANT + _OBJECTS


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before it was welded."""
    kind: type[nn.Module] = getattr(type(module), STOCK, type(module))
    return kind


def fingerprint(value: Any) -> object:
    """Return something equal for two values exactly when a traced forward treats them alike.

    Raises:
        UnwatchableError: the value may change inside without comparing different.
    """
    if isinstance(value, nn.Module):
        return stock_class(value)
    if isinstance(value, torch.Tensor):
        return TENSOR, tuple(value.shape), value.dtype
    if isinstance(value, _OBJECTS):
        return value
    if isinstance(value, _CONSTANT):
        return type(value), value  # True == 1 == 1.0
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), *[fingerprint(item) for item in value]
    if isinstance(value, dict):
        return type(value), *[(key, fingerprint(item)) for key, item in value.items()]
    raise UnwatchableError(f"a {type(value).__name__} that may change unseen")


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, list[torch.Tensor]]:
    """Split a call's arguments into what they look like and their tensors in order.

    Raises:
        UnwatchableError: an argument is an object whose content cannot be compared.
    """
    if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
        return _ONE_TENSOR, [args[0]]  # what most calls are
    leaves: list[torch.Tensor] = []
    return _flatten((args, kwargs), leaves), leaves


_ONE_TENSOR = (tuple, (tuple, TENSOR), (dict,))


def _flatten(value: Any, leaves: list[torch.Tensor]) -> object:
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return TENSOR
    kind = type(value)
    if kind is list or kind is tuple:
        return kind, *[_flatten(item, leaves) for item in value]
    if kind is dict:
        return kind, *[(key, _flatten(item, leaves)) for key, item in value.items()]
    if isinstance(value, _CONSTANT):
        return kind, value
    raise UnwatchableError(f"an argument of type {kind.__name__}")


def unflatten(spec: Any, leaves: Iterator[Any]) -> Any:
    """Put a call's arguments together again."""
    if spec is TENSOR:
        return next(leaves)
    kind, *rest = spec
    if kind is list or kind is tuple:
        return kind(unflatten(item, leaves) for item in rest)
    if kind is dict:
        return {key: unflatten(item, leaves) for key, item in rest}
    return rest[0]

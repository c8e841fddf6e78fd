"""The max poolings of a welded model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from torchweld.nn import MaxPool2d
from torchweld.report import Row

CONVERSION = "max_pool2d"


def weld_pools(model: nn.Module) -> list[nn.Module]:
    """Make every plain ``nn.MaxPool2d`` a :class:`torchweld.nn.MaxPool2d`; return them.

    In place, as the module has no state and decides by itself, with every input, whose kernels are
    to pool it. Hooks and shared modules are therefore as before.
    """
    pools: list[nn.Module] = [
        module
        for module in model.modules()
        if type(module) is nn.MaxPool2d
        and not module.return_indices
        and "forward" not in module.__dict__
    ]
    for pool in pools:
        pool.__class__ = MaxPool2d
    return pools


def unweld_pools(pools: list[nn.Module]) -> None:
    """Give poolings their stock class back."""
    for pool in pools:
        pool.__class__ = nn.MaxPool2d


def rows(model: nn.Module) -> Iterator[Row]:
    """Yield a row for every max pooling of a welded model."""
    for path, module in model.named_modules():
        if isinstance(module, nn.MaxPool2d):
            yield Row(path, CONVERSION, *_outcome(module))


def _outcome(pool: nn.MaxPool2d) -> tuple[bool, str]:
    if type(pool) is MaxPool2d:
        return True, "max_pool2d"
    if type(pool) is not nn.MaxPool2d:
        return False, f"{type(pool).__name__} is a subclass of MaxPool2d"
    if pool.return_indices:
        return False, "returns indices"
    return False, "its forward was replaced"

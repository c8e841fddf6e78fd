"""Counts what a training step keeps between its forward and its backward."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(values: Any) -> dict[StorageWeakRef, int]:
    """Bytes of every storage among some values."""
    storages = (t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor))
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


class _Made(TorchDispatchMode):
    """Notes every storage an operator hands out, and keeps none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}
        self.older: set[StorageWeakRef] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.older |= _storages((args, kwargs)).keys() - self.made.keys()
        result = func(*args, **kwargs)
        self.made |= {ref: size for ref, size in _storages(result).items() if ref not in self.older}
        return result


def kept_bytes(forward: Callable[[], Tensor], *, keeping: Any = ()) -> int:
    """Return the bytes that are alive after a forward because its backward may need them.

    Whatever way they are kept: every tensor an operator made is watched, and those still there when
    only the result is held are counted, each storage once. Parameters, buffers and inputs, which
    were there before, do not count.

    Args:
        forward: runs the model and returns a tensor to differentiate, such as the loss.
        keeping: tensors made in ``forward`` and kept by somebody else, which do not count either.

    Returns:
        Bytes, the result's own not among them.
    """
    gc.collect()
    with _Made() as watch:
        result = forward()
    gc.collect()
    others = _storages((result, keeping))
    return sum(size for ref, size in watch.made.items() if ref not in others and not ref.expired())

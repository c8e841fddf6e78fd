"""Counts what a training step keeps between its forward and its backward.

``python -m benchmarks.kept`` prints it for a model, stock and welded.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
import torchweld as tw
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import models


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
    with _Made() as watch:
        result = forward()
    gc.collect()
    others = _storages((result, keeping))
    return sum(size for ref, size in watch.made.items() if ref not in others and not ref.expired())


def main() -> None:
    """Print the bytes one model keeps, by the ways to weld it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kept", description=main.__doc__)
    parser.add_argument("--model", default="resnet50", help="a function of benchmarks/models.py")
    parser.add_argument("--shape", default=[8, 3, 224, 224], nargs=4, type=int, help="of the input")
    args = parser.parse_args()
    torch.manual_seed(0)
    stock = getattr(models, args.model)().train()
    ways = {"stock": stock, "weld(model)": tw.weld(stock)} | {
        f"weld(model, memory_saving={how!r})": tw.weld(stock, memory_saving=how)
        for how in (True, "recompute")
    }
    x, first = torch.randn(args.shape), 0
    for name, model in ways.items():
        kept = kept_bytes(lambda model=model: model(x).square().mean())  # type: ignore[misc]
        first = first or kept
        print(f"{name:40} {kept / 2**20:8.1f} MiB  {kept / first:.3f}")


if __name__ == "__main__":
    main()

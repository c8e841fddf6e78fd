"""Counts what a training step keeps between its forward and its backward.

``python -m benchmarks.kept`` prints it for a model, stock and welded.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchweld as tw
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import models
from benchmarks.harness import Contender, interleave


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
    """Print the bytes one model keeps, and the time of its step, by the ways to weld it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kept", description=main.__doc__)
    parser.add_argument("--model", default="resnet50", help="a function of benchmarks/models.py")
    parser.add_argument("--shape", default=[8, 3, 224, 224], nargs=4, type=int, help="of the input")
    parser.add_argument("--rounds", default=0, type=int, help="steps to time, interleaved")
    args = parser.parse_args()
    torch.manual_seed(0)
    stock = getattr(models, args.model)().train()
    ways = {"stock": stock, "weld(model)": tw.weld(stock)} | {
        f"weld(model, memory_saving={how!r})": tw.weld(stock, memory_saving=how)
        for how in (True, "recompute")
    }
    x = torch.randn(args.shape)

    def loss(model: torch.nn.Module) -> Tensor:
        result: Tensor = model(x).square().mean()
        return result

    def step(model: torch.nn.Module) -> tuple[()]:
        model.zero_grad()
        loss(model).backward()
        return ()

    kept = {name: kept_bytes(partial(loss, model)) for name, model in ways.items()}
    steps = [Contender(name, partial(step, model), 0.0) for name, model in ways.items()]
    times = interleave(steps, args.rounds, dict.fromkeys(ways, 1))
    for name, size in kept.items():
        # The first round is cold.
        ours, welded = (statistics.median(times[n][1:] or [0]) for n in (name, "weld(model)"))
        timed = f"{ours:8.0f} ms  {ours / welded:.3f}" if ours else ""
        print(f"{name:38} {size / 2**20:7.1f} MiB  {size / kept['stock']:.3f} {timed}")


if __name__ == "__main__":
    main()

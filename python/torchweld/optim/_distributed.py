"""What an optimizer must know about sharded parameters: their local part and its place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether this is a DTensor, without importing them: who never did has none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: the very object, not a view of it."""
    return cast("DTensor", tensor)._local_tensor if is_dtensor(tensor) else tensor


def device(tensor: Tensor) -> torch.device:
    """Return where this process holds a tensor."""
    return local(tensor).device


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """Return this process's part of a gradient, laid out as the parameter is."""
    if not is_dtensor(grad):
        return grad
    grad = cast("DTensor", grad)
    if grad.placements != cast("DTensor", param).placements:
        grad = grad.redistribute(placements=cast("DTensor", param).placements)
    part = grad._local_tensor
    wait: Callable[[], Tensor] | None = getattr(part, "wait", None)
    return part if wait is None else wait()  # an AsyncCollectiveTensor


def like(param: Tensor, part: Tensor) -> Tensor:
    """Return `part` as a DTensor placed as `param` is, if that is one."""
    if not is_dtensor(param):
        return part
    from torch.distributed.tensor import DTensor

    param = cast("DTensor", param)
    return DTensor.from_local(
        part,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


class Place(NamedTuple):
    """Where a shard lies: its element i is element offset + i // row * stride + i % row."""

    offset: int = 0
    row: int = 0
    stride: int = 0


def place(param: Tensor) -> Place:
    """Return where the local part of a parameter lies in the whole of it.

    A shard cut along two dimensions of which neither is the first has no such place; its elements
    are counted on from its first one: random bits as good as any, but others than unsharded.
    """
    if not is_dtensor(param):
        return Place()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    param = cast("DTensor", param)
    shape, offsets = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    if 0 in shape:
        return Place()
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * param.shape[dim]
    offset = sum(o * s for o, s in zip(offsets, strides, strict=True))
    cut = [dim for dim in range(len(shape)) if shape[dim] != param.shape[dim]]
    if not cut or cut[-1] == 0 or any(0 < dim < cut[-1] for dim in cut):
        return Place(offset)
    # Rows run from the last dimension that is cut to the end.
    row = shape[cut[-1]] * strides[cut[-1]]
    return Place(offset, row, strides[cut[-1] - 1])


def reduce_sum(value: Tensor, reduction: Reduction | None) -> Tensor:
    """Add up a value over the processes that hold other shards."""
    if reduction is not None:
        for dim in reduction.dims:
            torch.distributed.all_reduce(value, group=reduction.mesh.get_group(dim))
    return value


class Reduction(NamedTuple):
    """The dimensions of a device mesh over which parameters are sharded."""

    mesh: Any
    dims: tuple[int, ...]


def reduction(param: Tensor) -> Reduction | None:
    """Return over what a sum over elements of a parameter must be reduced."""
    if not is_dtensor(param):
        return None
    param = cast("DTensor", param)
    if param.device_mesh.get_coordinate() is None:
        return None  # only other processes hold it
    dims = tuple(i for i, p in enumerate(param.placements) if not p.is_replicate())
    return Reduction(param.device_mesh, dims)


def enclosing_zero() -> Any:
    """Return the ZeroRedundancyOptimizer whose local optimizer is being made, if any."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    # torch's own affair: where it goes by another name, nobody is found.
    init = getattr(module.ZeroRedundancyOptimizer, "_init_local_optimizer", None)
    code = getattr(init, "__code__", None)
    frame = sys._getframe(1)
    # Locals only of the one frame: to look at them keeps them alive until it ends.
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals["self"]

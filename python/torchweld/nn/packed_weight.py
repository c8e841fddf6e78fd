"""A weight kept once more as the kernels read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import List, Optional  # noqa: UP035

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


def packed_weight(
    module: nn.Module,
    weight: Tensor,
    stride: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    dilation: List[int],  # noqa: UP006
    groups: int,
) -> Optional[Tensor]:  # noqa: UP045
    """Return ``module.packed_weight``, packed again if the weight has changed; None for no use.

    Args:
        module: keeps the packed weight, a buffer that is in no state_dict.
        weight: one of its tensors, of a convolution, or of a linear layer as the 1x1 one it is.
        stride: the convolution's.
        padding: the convolution's.
        dilation: the convolution's.
        groups: the convolution's.
    """
    # A graph would keep it when the weight changes, and what transforms functions wraps tensors.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    # Where writes are not counted they cannot be seen.
    if not weight.is_cpu or weight.is_inference():
        return None
    state = module.__dict__  # found as an attribute, a buffer takes longer than all the rest
    # The weak reference keeps the address of a storage from being used again. One to the tensor
    # would keep torch from swapping it.
    storage = weight.untyped_storage()
    packed_from = id(weight), storage._cdata, weight._version
    if state.get("_packed_from") != packed_from:
        with torch.no_grad(), _untraced() as is_tracing:
            packed = torch.ops.torchweld.conv_relu_pack(
                weight if weight.dim() == 4 else weight[:, :, None, None],
                stride, padding, dilation, groups,
            )  # fmt: skip
            if is_tracing and packed.shape == module.packed_weight.shape:
                module.packed_weight.copy_(packed)  # type: ignore[operator]
            else:
                module.packed_weight = packed
        state.update(_packed_from=packed_from, _storage=StorageWeakRef(storage))
    result: Tensor = state["_buffers"]["packed_weight"]
    return result


def without_pack(state: dict[str, object]) -> dict[str, object]:
    """Return what a copy of a module takes: it packs its own weight."""
    return {k: v for k, v in state.items() if k not in ("_packed_from", "_storage")}


@contextmanager
def _untraced() -> Iterator[bool]:
    """Keep what is done once out of a graph that torch.jit.trace is recording, if it is."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield False
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield True
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

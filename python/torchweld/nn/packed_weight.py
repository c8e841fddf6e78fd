"""A weight kept once more as the kernels read it."""

import weakref
from typing import List, Optional  # noqa: UP035

import torch
from torch import Tensor, nn


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
    if torch.compiler.is_compiling():
        return None  # a graph would keep it when the weight changes
    # Where writes are not counted they cannot be seen.
    if not weight.is_cpu or weight.is_inference():
        return None
    packed_from, version = module.__dict__.get("_packed_from", (None, -1))
    if packed_from is None or packed_from() is not weight or version != weight._version:
        with torch.no_grad():
            module.packed_weight = torch.ops.torchweld.conv_relu_pack(
                weight if weight.dim() == 4 else weight[:, :, None, None],
                stride, padding, dilation, groups,
            )  # fmt: skip
        module.__dict__["_packed_from"] = weakref.ref(weight), weight._version
    packed: Tensor = module.packed_weight  # type: ignore[assignment]
    return packed

"""Max pooling as a module."""

# TorchScript takes one type or none for what forward returns.
# mypy: disable-error-code="no-untyped-def"

import torch.nn.functional as F
from torch import Tensor, fx, nn

from torchweld.nn.functional import _max_pool2d

# It looks at its input, which torch.fx cannot follow; torch.nn.MaxPool2d is one call there too.
fx.wrap("_max_pool2d")


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d``, faster where its input is in channels_last memory.

    Arguments, shapes and outputs are those of ``nn.MaxPool2d``, which it is a subclass of.
    :func:`torchweld.nn.functional.max_pool2d` says when kernels of ours pool, and what they keep
    for the backward.

    Args:
        kernel_size: of the window, a number or a pair, as all but the last two.
        stride: of the window; ``kernel_size`` if absent.
        padding: of the input with -inf, on both sides.
        dilation: from one tap of the window to the next.
        return_indices: also return where in the input each output is; then all of it is torch's.
        ceil_mode: whether a last window may reach beyond the padded input.

    Example:
        >>> import torch, torchweld as tw
        >>> x = torch.randn(2, 16, 28, 28).contiguous(memory_format=torch.channels_last)
        >>> tw.nn.MaxPool2d(3, stride=2, padding=1)(x).shape
        torch.Size([2, 16, 14, 14])
    """

    def forward(self, input: Tensor):
        """Pool ``[N, C, H, W]`` or ``[C, H, W]``."""
        if self.return_indices:
            return F.max_pool2d(
                input, self.kernel_size, self.stride, self.padding, self.dilation,
                ceil_mode=self.ceil_mode, return_indices=True,
            )  # fmt: skip
        return _max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )

"""Max pooling over channels_last images as functional ops."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.torchweld


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Compute ``torch.max_pool2d``, faster where the input is in channels_last memory.

    Kernels of ours pool 4-D float32 and bfloat16 in channels_last memory on the CPU, with windows
    of at most 256 taps and 32 times the stride; torch's own operator everything else.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size: of the window.
        stride: of the window; ``kernel_size`` if absent.
        padding: of the input with -inf, on both sides.
        dilation: from one tap of the window to the next.
        ceil_mode: whether a last window may reach beyond the padded input.

    Returns:
        ``[N, C, H_out, W_out]``, equal to torch's: a NaN in a window is its maximum.

    Raises:
        RuntimeError: if an argument does not fit.

    Note:
        The backward keeps a byte for each output, which tap of its window it is (torch: 8 bytes,
        and the input), and writes each pixel of the gradient once: the sum of the outputs' it is
        the first maximum of, in float32 and in the order of the outputs, the same bits for any
        number of threads. Gradients of gradients are right; forward mode and the transforms of
        ``torch.func`` are torch's.

    Example:
        >>> import torch, torchweld as tw
        >>> x = torch.arange(32.0).view(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
        >>> tw.ops.max_pool2d(x, 2)[0, 1].tolist()
        [[21.0, 23.0], [29.0, 31.0]]
    """
    stride = kernel_size if stride is None else stride
    result: Tensor = _ops.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    return result


def max_pool2d_with_positions(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`max_pool2d` by kernels of ours, and which tap of its window each output is.

    Args:
        input: ``[N, C, H, W]`` of float32 or bfloat16 on the CPU, in channels_last memory.
        kernel_size: as in :func:`max_pool2d`, of at most 256 taps; so all others.
        stride: see there.
        padding: see there.
        dilation: see there.
        ceil_mode: see there.

    Returns:
        The output, and uint8 of its shape: row tap times the window's width plus column tap, of
        the first maximum, or of the last NaN.

    Raises:
        RuntimeError: if an argument does not fit.

    Example:
        >>> import torch, torchweld as tw
        >>> x = torch.arange(32.0).view(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
        >>> tw.ops.max_pool2d_with_positions(x, 2)[1].unique().tolist()
        [3]
    """
    stride = kernel_size if stride is None else stride
    result: tuple[Tensor, Tensor] = _ops.max_pool2d_with_positions(
        input, kernel_size, stride, padding, dilation, ceil_mode
    )
    return result

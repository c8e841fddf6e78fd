"""Fake kernels and derivatives of the max_pool2d ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchweld import _recipes
from torchweld._dispatch.derivative import library, register_autograd

_ops = torch.ops.torchweld


def is_ours(input: Tensor, kernel_size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether kernels of ours pool this input, as the operator itself decides."""
    # Of a list of one number, that one is the last as well.
    taps = kernel_size[0] * kernel_size[-1]
    # A position is a byte, and an input pixel looks at every window that covers it.
    most = min(256, 32 * stride[0] * stride[-1]) if stride else 256
    return taps <= most and has_kernels(input)


def has_kernels(input: Tensor) -> bool:
    """Whether it is a tensor of the kind that kernels of ours pool."""
    return (
        input.dtype in (torch.float32, torch.bfloat16)
        and input.dim() == 4
        and input.device.type == "cpu"
        and input.layout == torch.strided
        and input.is_contiguous(memory_format=torch.channels_last)
        and not input.is_contiguous()
    )


# --- fake kernels: shapes and strides, no data ----------------------------------------------------
def _pooled(input: Tensor, *args: Any) -> Tensor:
    output: Tensor = torch.ops.aten.max_pool2d_with_indices(input, *args)[0]
    # torch may call strides contiguous where a size is 1.
    return output.contiguous(memory_format=torch.channels_last) if has_kernels(input) else output


@torch.library.register_fake("torchweld::max_pool2d")
def _fake(input: Tensor, *args: Any) -> Tensor:
    return _pooled(input, *args)


@torch.library.register_fake("torchweld::max_pool2d_with_positions")
def _fake_with_positions(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    output = _pooled(input, *args)
    return output, torch.empty_like(output, dtype=torch.uint8)


@torch.library.register_fake("torchweld::max_pool2d_backward")
def _fake_backward(
    grad_output: Tensor, positions: Tensor, height: int, width: int, *args: Any
) -> Tensor:
    return torch.empty(
        (*grad_output.shape[:2], height, width), dtype=grad_output.dtype,
        device=grad_output.device, memory_format=torch.channels_last,
    )  # fmt: skip


# --- derivatives ----------------------------------------------------------------------------------
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, kernel_size, stride, padding, dilation, ceil_mode = inputs
    pooled, positions = output
    ctx.mark_non_differentiable(positions)
    ctx.size = input.shape[2:]
    ctx.window = kernel_size, stride or kernel_size, padding, dilation
    if _recipes.recipe_of(input) is not None:
        _recipes.remember(pooled, _ops.max_pool2d, (input,), (*ctx.window, ceil_mode))
    ctx.save_for_backward(positions)


def _backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    grad = _ops.max_pool2d_backward(grad_output, positions, *ctx.size, *ctx.window)
    return grad, None, None, None, None, None


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, _, _, *ctx.window = inputs
    ctx.save_for_backward(positions)


def _backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward sends each value to one pixel: its derivative fetches it from there."""
    (positions,) = ctx.saved_tensors
    kernel_size, stride, padding, dilation = ctx.window
    taps = positions.long()
    height, width = grad.shape[2:]
    row, column = taps // kernel_size[-1] * dilation[0], taps % kernel_size[-1] * dilation[-1]
    row += (torch.arange(taps.shape[2]) * stride[0] - padding[0])[:, None]
    column += torch.arange(taps.shape[3]) * stride[-1] - padding[-1]
    # A window may hold nothing but padding; its gradient goes nowhere.
    nothing = (row >= height) | (column >= width)
    place = (row * width + column).masked_fill_(nothing, 0)
    fetched = grad.flatten(2).gather(2, place.flatten(2)).view_as(taps)
    return (fetched.masked_fill(nothing, 0), *[None] * 7)


register_autograd("max_pool2d_with_positions", _setup_context, _backward)
register_autograd("max_pool2d_backward", _setup_context_backward, _backward_of_backward)


def _autograd(
    keyset: Any,
    input: Tensor,
    kernel_size: list[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    args = input, kernel_size, stride, padding, dilation, ceil_mode
    output: Tensor
    special = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if special or (input.requires_grad and torch.is_grad_enabled()):
        if special or not is_ours(input, kernel_size, stride):
            output = torch.ops.aten.max_pool2d(*args)
        else:
            output = _ops.max_pool2d_with_positions.default(*args)[0]
        return output
    output = _redispatch(keyset & torch._C._after_autograd_keyset, *args)
    return output


_redispatch = _ops.max_pool2d.default._handle.redispatch_boxed
library.impl("max_pool2d", _autograd, "Autograd", with_keyset=True)

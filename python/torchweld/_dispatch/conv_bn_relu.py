"""Fake kernels, derivatives and autocast of the conv_bn_relu ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import _cast

from torchweld import _recipes
from torchweld._dispatch.derivative import library as _library
from torchweld._dispatch.derivative import register_autograd

_ops = torch.ops.torchweld


# --- fake kernels: shapes and strides, no data ----------------------------------------------------
def _channels(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float64)


def _empty_like(x: Tensor) -> Tensor:
    contiguous = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(
        x, memory_format=torch.contiguous_format if contiguous else torch.channels_last
    )


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    # ATen's own fake convolution also says which memory format comes out.
    output: Tensor = torch.ops.aten.convolution(
        input, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )
    return output


@torch.library.register_fake("torchweld::conv_bn_relu")
def _(input, weight, bias, bn_weight, bn_bias, residual, *args):  # type: ignore[no-untyped-def]
    conv_output = _convolution(input, weight, bias, *args[:4])
    channels = weight.shape[0]
    statistics = (_channels(input, channels) for _ in range(3))
    return (_empty_like(conv_output), conv_output, *statistics)


@torch.library.register_fake("torchweld::conv_bn_relu_frozen")
def _(input, weight, bias, bn_weight, bn_bias, mean, var, residual, *args):  # type: ignore[no-untyped-def]
    conv_output = _convolution(input, weight, bias, *args[:4])
    return _empty_like(conv_output), conv_output


@torch.library.register_fake("torchweld::conv_relu")
def _(input, weight, packed, bias, residual, stride, padding, dilation, groups, *args):  # type: ignore[no-untyped-def]
    return _convolution(input, weight, bias, stride, padding, dilation, groups)


@torch.library.register_fake("torchweld::conv_relu_pack")
def _(weight, *args):  # type: ignore[no-untyped-def]
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty((1, 1, 1, size), dtype=torch.float32)


def _fake_gradients(
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    conv_output: Tensor,
    conv: tuple[Any, ...],
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    channels = weight.shape[0]
    stride, padding, dilation, groups = conv
    gradients = [input.new_empty(0) for _ in output_mask]
    if output_mask[0] or output_mask[1]:
        of_conv = torch.ops.aten.convolution_backward(
            _empty_like(conv_output), input, weight, None, stride, padding, dilation, False,
            [0, 0], groups, [output_mask[0], output_mask[1], False],
        )  # fmt: skip
        for i in (0, 1):
            if output_mask[i]:
                gradients[i] = of_conv[i]
    for i, like in ((2, input), (3, bn_weight), (4, bn_bias)):
        if output_mask[i]:
            gradients[i] = (input if like is None else like).new_empty(channels)
    if output_mask[5]:
        gradients[5] = _empty_like(conv_output)
    return tuple(gradients)


@torch.library.register_fake("torchweld::conv_bn_relu_backward")
def _(grad_output, input, weight, bn_weight, bn_bias, residual, conv_output, mean, invstd, *args):  # type: ignore[no-untyped-def]
    return _fake_gradients(input, weight, bn_weight, bn_bias, conv_output, args[:4], args[-1])


@torch.library.register_fake("torchweld::conv_bn_relu_frozen_backward")
def _(grad_output, input, weight, bn_weight, bn_bias, mean, var, residual, conv_output, *args):  # type: ignore[no-untyped-def]
    return _fake_gradients(input, weight, bn_weight, bn_bias, conv_output, args[:4], args[-1])


@torch.library.register_fake("torchweld::update_running_stats")
def _(running_mean, running_var, mean, var, count, momentum):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("torchweld::batch_norm_stats")
def _(input):  # type: ignore[no-untyped-def]
    channels = input.shape[1]
    return _channels(input, 1), _channels(input, channels), _channels(input, channels)


@torch.library.register_fake("torchweld::batch_norm_relu")
def _(input, *args):  # type: ignore[no-untyped-def]
    return _empty_like(input)


@torch.library.register_fake("torchweld::batch_norm_relu_backward_reduce")
def _(grad_output, input, *args):  # type: ignore[no-untyped-def]
    return _channels(input, input.shape[1]), _channels(input, input.shape[1])


@torch.library.register_fake("torchweld::batch_norm_relu_backward")
def _(grad_output, input, mean, invstd, weight, bias, residual, *args):  # type: ignore[no-untyped-def]
    grad_residual = input.new_empty(0) if residual is None else _empty_like(input)
    return _empty_like(input), grad_residual


# --- derivatives ----------------------------------------------------------------------------------
def _mask(ctx: Any, positions: tuple[int, ...]) -> list[bool]:
    return [ctx.needs_input_grad[1 + i] for i in positions]  # the first is the key set


def _once(op: str) -> Callable[..., Any]:
    """Return a backward op, past the kernel that refuses its derivative where none is recorded."""
    overload, below = getattr(_ops, op).default, torch._C._AutoDispatchBelowAutograd

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return overload(*args)
        with below():
            return overload(*args)

    return call


_conv_bn_relu_backward = _once("conv_bn_relu_backward")
_conv_bn_relu_frozen_backward = _once("conv_bn_relu_frozen_backward")


def _gradients(
    count: int, positions: tuple[int, ...], mask: list[bool], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Spread the gradients a backward op returned over the forward op's `count` arguments."""
    result: list[Tensor | None] = [None] * count
    for position, wanted, gradient in zip(positions, mask, gradients, strict=True):
        if wanted:
            result[position] = gradient
    return tuple(result)


# To convolve again, the op itself: nothing else is sure to give the same bits.
def _convolve(conv: list[Any], input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tail = *conv, 1.0, "identity", 0.0
    output: Tensor = _ops.conv_bn_relu(input, weight, bias, None, None, None, *tail)[1]
    return output


def _convolve_frozen(conv: list[Any], input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    zeros = input.new_zeros(weight.shape[0])
    tail = *conv, 1.0, "identity", 0.0
    output: Tensor = _ops.conv_bn_relu_frozen(
        input, weight, bias, None, None, zeros, zeros, None, *tail
    )[1]
    return output


def _remember(
    ctx: Any,
    output: Tensor,
    conv_output: Tensor,
    batch_norm: tuple[Tensor | None, ...],
    residual: Tensor | None,
    convolve: Callable[..., Tensor],
    convolved: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Note what a unit's output can be made from, before anything saves it."""
    if _recipes.recomputes():
        # A conv's input is kept, or its recipe would go back to the start of the network.
        _recipes.forget(convolved[0])
        _recipes.remember(conv_output, convolve, convolved)
    # Copies, as an optimizer may step before the last who saved the output has had it.
    mean, invstd, *parameters = batch_norm
    copies = (None if p is None else p.detach().clone() for p in parameters)
    _recipes.remember(
        output, _ops.batch_norm_relu, (conv_output, mean, invstd, *copies, residual),
        (ctx.activation, ctx.slope),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (input, weight, bias, bn_weight, bn_bias, residual,
     *ctx.conv, _, ctx.activation, ctx.slope) = inputs  # fmt: skip
    y, conv_output, mean, invstd, var = output
    ctx.mark_non_differentiable(conv_output, mean, invstd, var)
    ctx.set_materialize_grads(False)
    if _recipes.is_recording():
        batch_norm = mean, invstd, bn_weight, bn_bias
        again = partial(_convolve, ctx.conv)
        _remember(ctx, y, conv_output, batch_norm, residual, again, (input, weight, bias))
    ctx.save_for_backward(input, weight, bn_weight, bn_bias, residual, conv_output, mean, invstd)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 13
    positions = (0, 1, 2, 3, 4, 5)
    mask = _mask(ctx, positions)
    gradients = _conv_bn_relu_backward(
        grad_output, *ctx.saved_tensors, *ctx.conv, ctx.activation, ctx.slope, mask
    )
    return _gradients(13, positions, mask, gradients)


def _setup_context_frozen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (input, weight, bias, bn_weight, bn_bias, mean, var, residual,
     *ctx.conv, ctx.eps, ctx.activation, ctx.slope) = inputs  # fmt: skip
    y, conv_output = output
    ctx.mark_non_differentiable(conv_output)
    ctx.set_materialize_grads(False)
    if _recipes.is_recording():
        batch_norm = mean.double(), 1 / (var.double() + ctx.eps).sqrt(), bn_weight, bn_bias
        again = partial(_convolve_frozen, ctx.conv)
        _remember(ctx, y, conv_output, batch_norm, residual, again, (input, weight, bias))
    ctx.save_for_backward(input, weight, bn_weight, bn_bias, mean, var, residual, conv_output)


def _backward_frozen(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 15
    positions = (0, 1, 2, 3, 4, 7)
    mask = _mask(ctx, positions)
    gradients = _conv_bn_relu_frozen_backward(
        grad_output, *ctx.saved_tensors, *ctx.conv, ctx.eps, ctx.activation, ctx.slope, mask
    )
    return _gradients(15, positions, mask, gradients)


def _refuse(op: str, sentence: str) -> None:
    """Give an op a derivative that raises: without one, autograd would only warn."""

    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"torchweld::{op}: {sentence}")

    register_autograd(op, lambda ctx, inputs, output: None, backward)


register_autograd("conv_bn_relu", _setup_context, _backward)
register_autograd("conv_bn_relu_frozen", _setup_context_frozen, _backward_frozen)
_TWICE = "expected to be differentiated once, got a second derivative; use the stock modules for it"
_refuse("conv_bn_relu_backward", _TWICE)
_refuse("conv_bn_relu_frozen_backward", _TWICE)
# conv_relu has none: under TorchScript it would call Python for every layer. torch's own fallback
# warns there, and inference_only() raises everywhere else.
_refuse("conv_relu_pack", "inference only, no gradient")
_BETWEEN = (
    "no gradient, as its backward needs an exchange between processes; write a "
    "torch.autograd.Function with batch_norm_relu_backward_reduce and batch_norm_relu_backward"
)
for _op in ("batch_norm_stats", "batch_norm_relu"):
    _refuse(_op, _BETWEEN)
for _op in ("batch_norm_relu_backward_reduce", "batch_norm_relu_backward"):
    _refuse(_op, _TWICE)


# --- autocast and version counters ----------------------------------------------------------------


def _register_autocast(op: str, cast: tuple[int, ...], device_type: str) -> None:
    """Cast the arguments at these positions to autocast's dtype, and no other.

    ``torch.library.register_autocast`` would cast batch norm's parameters too, which stay float32.
    """
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device_type]
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    overload = getattr(_ops, op).default

    def autocast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(
                *(_cast(a, device_type, dtype) if i in cast else a for i, a in enumerate(args))
            )

    _library.impl(op, autocast, key)


for _device_type in ("cpu", "cuda"):
    _register_autocast("conv_bn_relu", (0, 1, 2, 5), _device_type)
    _register_autocast("conv_bn_relu_frozen", (0, 1, 2, 7), _device_type)
    _register_autocast("conv_relu", (0, 1, 3, 4), _device_type)


def _bump_versions(keyset: Any, running_mean: Tensor, running_var: Tensor, *args: Any) -> Any:
    """Count the write, so that a backward that saved the old values notices it."""
    torch.autograd.graph.increment_version((running_mean, running_var))
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return _ops.update_running_stats.default.redispatch(
            keyset & torch._C._after_ADInplaceOrView_keyset, running_mean, running_var, *args
        )


_library.impl("update_running_stats", _bump_versions, "ADInplaceOrView", with_keyset=True)

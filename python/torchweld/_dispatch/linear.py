"""What the linear layers with packed weights have in common: their gradients, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import _cast

from torchweld._dispatch.derivative import register_autograd

_ops = torch.ops.torchweld
_autocast = torch.library.Library("torchweld", "IMPL")


@torch.library.register_fake("torchweld::_in_huge_pages")
def _fake_in_huge_pages(packed_weight: Tensor) -> Tensor:
    return packed_weight.new_empty(packed_weight.shape)


def check_columns(op: str, argument: str, matrix: Tensor, columns: int) -> None:
    """Raise what the operator raises where ``matrix`` does not have so many columns."""
    torch._check(
        matrix.dim() >= 1 and matrix.shape[-1] == columns,
        lambda: f"torchweld::{op}: {argument}: expected [..., {columns}], got {list(matrix.shape)}",
    )


def register_layer(op: str, backward: str, weights: int, backward_weights: int) -> None:
    """Register the derivative of ``op(input, *weight, bias, residual, *sizes, activation, ...)``.

    ``weight`` is so many tensors, the second of them the scale, and ``sizes`` are integers. The
    operator ``backward(grad, *weight[:backward_weights], *sizes)`` gives the gradient of the input.
    Every step is itself differentiable, so gradients of gradients come out of the same lines.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight = inputs[0], inputs[1 : 1 + weights]
        bias, residual, *ctx.how = inputs[1 + weights :]
        if weight[1].requires_grad:
            raise RuntimeError(
                f"torchweld::{op}: weight_scale: has no gradient; expected a tensor with "
                "requires_grad=False"
            )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.activation = next(x for x in ctx.how if isinstance(x, str))
        # ReLU is read off its output; the others need their input, which costs a second product.
        from_output = ctx.activation == "relu" and residual is None
        again = ctx.activation != "identity" and not from_output
        ctx.save_for_backward(
            input if again else None,
            bias if again else None,
            output if from_output else None,
            *weight,
        )

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, bias, output, *weight = ctx.saved_tensors
        _, need_input, *needed = ctx.needs_input_grad  # the first is the key set
        need_bias, need_residual = needed[weights : weights + 2]
        grad_input = grad_bias = grad_residual = None
        if need_residual:
            grad_residual = grad.to(ctx.residual_dtype)
        if ctx.activation != "identity" and (need_input or need_bias):
            if output is None:
                how = ["identity" if isinstance(x, str) else x for x in ctx.how]
                output = getattr(_ops, op)(input, *weight, bias, None, *how)
            grad = activation_gradient(ctx.activation, grad, output)
        if need_input:
            sizes = ctx.how[: ctx.how.index(ctx.activation)]
            grad_input = getattr(_ops, backward)(grad, *weight[:backward_weights], *sizes)
        if need_bias:
            grad_bias = grad.sum_to_size(grad.shape[-1:]).to(ctx.bias_dtype)
        return (grad_input, *[None] * weights, grad_bias, grad_residual, *[None] * len(ctx.how))

    register_autograd(op, setup, gradient)


def activation_gradient(activation: str, grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` times the derivative of the activation at ``x``; ReLU's may be its output."""
    result: Tensor
    if activation == "relu":
        result = torch.ops.aten.threshold_backward(grad, x, 0)
    elif activation == "silu" and torch.is_grad_enabled():
        sigmoid = torch.sigmoid(x)  # aten.silu_backward has no derivative of its own
        result = grad * (sigmoid * (1 + x * (1 - sigmoid)))
    elif activation == "silu":
        result = torch.ops.aten.silu_backward(grad, x)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        result = torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
    return result


def register_backward(op: str, double: Callable[..., Tensor]) -> None:
    """Register the derivative of ``op(grad, *weight, *sizes)``, which ``double`` computes."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight = [x for x in inputs[1:] if isinstance(x, Tensor)]
        ctx.sizes = inputs[1 + len(weight) :]
        ctx.save_for_backward(*weight)

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.saved_tensors
        return (double(grad, *weight, *ctx.sizes), *[None] * (len(weight) + len(ctx.sizes)))

    register_autograd(op, setup, gradient)


def register_autocast(op: str, casts: bool) -> None:
    """Under autocast, cast the first argument of an operator, or nothing.

    Scales, bias and residual enter in float32 anyway, and a gradient keeps its dtype.
    """
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _register_autocast(op, casts, device_type, key)


def _register_autocast(op: str, casts: bool, device_type: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(matrix: Tensor, *args: Any) -> Any:
        if casts:
            matrix = _cast(matrix, device_type, torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(_ops, op)(matrix, *args)

    _autocast.impl(op, autocast, key)

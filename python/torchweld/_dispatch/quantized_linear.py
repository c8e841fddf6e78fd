"""What torch's machinery needs to know about the int8 linear ops: shapes, gradients, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import _cast

from torchweld._dispatch.derivative import register_autograd
from torchweld._dispatch.fake import register_fake
from torchweld.ops.quantized_linear import unpack_weight

_ops = torch.ops.torchweld


def _output_shape(input: Tensor, weight_scale: Tensor, in_features: int) -> list[int]:
    torch._check(
        input.dim() >= 1 and input.shape[-1] == in_features,
        lambda: (
            f"torchweld::quantized_linear: input: expected [..., {in_features}], got "
            f"{list(input.shape)}"
        ),
    )
    return [*input.shape[:-1], weight_scale.shape[0]]


@register_fake("torchweld::quantized_linear")
def _fake(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    activation: str = "identity",
    input_group_size: int = 0,
) -> Tensor:
    return input.new_empty(_output_shape(input, weight_scale, in_features))


@register_fake("torchweld::quantized_linear_accumulators")
def _fake_accumulators(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    in_features: int,
) -> tuple[Tensor, Tensor]:
    shape = _output_shape(input, weight_scale, in_features)
    return (
        input.new_empty(shape, dtype=torch.int32),
        input.new_empty(shape[:-1], dtype=torch.float32),
    )


@register_fake("torchweld::quantized_linear_backward")
def _fake_backward(
    grad: Tensor, packed_weight: Tensor, weight_scale: Tensor, in_features: int
) -> Tensor:
    return grad.new_empty([*grad.shape[:-1], in_features])


# --- gradients -----------------------------------------------------------------------------------
# Every step is itself differentiable, so gradients of gradients come out of the same lines.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, packed_weight, weight_scale, weight_sum, bias, residual, *ctx.how = inputs
    if ctx.needs_input_grad[3]:  # the first is the key set
        raise RuntimeError(
            "torchweld::quantized_linear: weight_scale: has no gradient; expected a tensor with "
            "requires_grad=False"
        )
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    # ReLU is read off its output; the others need their input, which costs a second product.
    activation = ctx.how[1]
    from_output = activation == "relu" and residual is None
    again = activation != "identity" and not from_output
    ctx.save_for_backward(
        input if again else None,
        output if from_output else None,
        packed_weight,
        weight_scale,
        weight_sum if again else None,
        bias if again else None,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, output, packed_weight, weight_scale, weight_sum, bias = ctx.saved_tensors
    in_features, activation, group_size = ctx.how
    _, need_input, _, _, _, need_bias, need_residual = ctx.needs_input_grad[:7]
    grad_input = grad_bias = grad_residual = None
    if need_residual:
        grad_residual = grad.to(ctx.residual_dtype)
    if activation != "identity" and (need_input or need_bias):
        if output is None:
            output = _ops.quantized_linear(
                input, packed_weight, weight_scale, weight_sum, bias, None, in_features,
                "identity", group_size,
            )  # fmt: skip
        grad = activation_gradient(activation, grad, output)
    if need_input:
        grad_input = _ops.quantized_linear_backward(grad, packed_weight, weight_scale, in_features)
    if need_bias:
        grad_bias = grad.sum_to_size(grad.shape[-1:]).to(ctx.bias_dtype)
    return grad_input, None, None, None, grad_bias, grad_residual, None, None, None


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


register_autograd("quantized_linear", _setup, _backward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed_weight, weight_scale, ctx.in_features = inputs
    ctx.save_for_backward(packed_weight, weight_scale)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed_weight, weight_scale = ctx.saved_tensors
    qweight = unpack_weight(packed_weight, weight_scale.shape[0], ctx.in_features)
    weight = (qweight * weight_scale[:, None]).to(grad.dtype)
    return grad @ weight.T, None, None, None


register_autograd("quantized_linear_backward", _setup_backward, _double_backward)


# --- autocast ------------------------------------------------------------------------------------

_autocast = torch.library.Library("torchweld", "IMPL")


def _register_autocast(device_type: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    # Only the input is cast: weights are int8, and everything else enters in float32 anyway.
    def quantized_linear(input: Tensor, *args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _ops.quantized_linear(_cast(input, device_type, dtype), *args)

    # Its gradient keeps its dtype: autocast would have the product inside cast.
    def quantized_linear_backward(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _ops.quantized_linear_backward(*args)

    _autocast.impl("quantized_linear", quantized_linear, key)
    _autocast.impl("quantized_linear_backward", quantized_linear_backward, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")

"""What torch's machinery needs to know about the int8 linear ops: shapes, gradients, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import _cast

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


@torch.library.register_fake("torchweld::quantized_linear")
def _fake(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    in_features: int,
    activation: str = "identity",
) -> Tensor:
    return input.new_empty(_output_shape(input, weight_scale, in_features))


@torch.library.register_fake("torchweld::quantized_linear_accumulators")
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


@torch.library.register_fake("torchweld::quantized_linear_backward")
def _fake_backward(
    grad: Tensor, packed_weight: Tensor, weight_scale: Tensor, in_features: int
) -> Tensor:
    return grad.new_empty([*grad.shape[:-1], in_features])


# --- gradients -----------------------------------------------------------------------------------
# Every step is itself differentiable, so gradients of gradients come out of the same lines.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, packed_weight, weight_scale, weight_sum, bias, in_features, activation = inputs
    if ctx.needs_input_grad[2]:
        raise RuntimeError(
            "torchweld::quantized_linear: weight_scale: has no gradient; expected a tensor with "
            "requires_grad=False"
        )
    ctx.in_features, ctx.activation = in_features, activation
    ctx.bias_dtype = None if bias is None else bias.dtype
    # ReLU is read off its output; GELU and SiLU need their input, which costs a second product.
    is_smooth = activation not in ("identity", "relu")
    ctx.save_for_backward(
        input if is_smooth else None,
        output if activation == "relu" else None,
        packed_weight,
        weight_scale,
        weight_sum if is_smooth else None,
        bias if is_smooth else None,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, output, packed_weight, weight_scale, weight_sum, bias = ctx.saved_tensors
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    elif ctx.activation != "identity":
        x = _ops.quantized_linear(
            input, packed_weight, weight_scale, weight_sum, bias, ctx.in_features, "identity"
        )
        if ctx.activation == "silu" and torch.is_grad_enabled():
            sigmoid = torch.sigmoid(x)  # aten.silu_backward has no derivative of its own
            grad = grad * (sigmoid * (1 + x * (1 - sigmoid)))
        elif ctx.activation == "silu":
            grad = torch.ops.aten.silu_backward(grad, x)
        else:
            approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
            grad = torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _ops.quantized_linear_backward(
            grad, packed_weight, weight_scale, ctx.in_features
        )
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum_to_size(grad.shape[-1:]).to(ctx.bias_dtype)
    return grad_input, None, None, None, grad_bias, None, None


torch.library.register_autograd("torchweld::quantized_linear", _backward, setup_context=_setup)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed_weight, weight_scale, ctx.in_features = inputs
    ctx.save_for_backward(packed_weight, weight_scale)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed_weight, weight_scale = ctx.saved_tensors
    qweight = unpack_weight(packed_weight, weight_scale.shape[0], ctx.in_features)
    weight = (qweight * weight_scale[:, None]).to(grad.dtype)
    return grad @ weight.T, None, None, None


torch.library.register_autograd(
    "torchweld::quantized_linear_backward", _double_backward, setup_context=_setup_backward
)


# --- autocast ------------------------------------------------------------------------------------

_autocast = torch.library.Library("torchweld", "IMPL")


def _register_autocast(device_type: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    # Only the input is cast: weights are int8, and scales and bias enter in float32 anyway.
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

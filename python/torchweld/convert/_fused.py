"""What a rewritten forward calls in place of conv, bn, add and activation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchweld import _library
from torchweld.convert import _rules
from torchweld.convert._frozen import eps_of
from torchweld.nn import ConvReLU2d
from torchweld.nn.conv_bn_relu import _fold
from torchweld.nn.functional import _bn_state, _both_sides, _conv_bn_relu, _conv_state
from torchweld.nn.sync_batch_norm import SyncBatchNorm, exchanges, sync_batch_norm_relu
from torchweld.ops.conv_bn_relu import conv_relu

# Where the fused ops run; "meta" is where shapes are worked out.
_DEVICES = ("cpu", "meta", *(("cuda",) if _library.cuda_status == "loaded" else ()))


def fused(
    input: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """Run a pattern of a model that trains.

    A linear layer is a 1x1 convolution whose pixels are the rows of its input.
    """
    linear = isinstance(conv, nn.Linear)
    if not _takes(input, conv, bn):
        return _finish(bn(conv(input)), residual, activation, negative_slope)
    if residual is not None and not _fits(residual, input, conv):
        # Broadcast, or of another dtype: the addition is torch's.
        output = fused(input, conv, bn, "identity", negative_slope, None)
        return _finish(output, residual, activation, negative_slope)
    if residual is not None and linear:
        residual = _as_image(residual)
    if exchanges(bn):
        assert isinstance(bn, (SyncBatchNorm, nn.SyncBatchNorm))
        image = _as_image(conv(input)) if linear else conv(input)
        output = sync_batch_norm_relu(image, bn, activation, negative_slope, residual)
    else:
        image = _as_image(input) if linear else input
        state = (*_state_of_conv(conv), *_state_of_bn(bn), activation, negative_slope, residual)
        output = _conv_bn_relu(image, *state)
    return _as_rows(output) if linear else output


def _takes(input: Tensor, conv: nn.Module, bn: nn.Module) -> bool:
    """Whether the fused ops compute what the modules would on this input."""
    if input.device.type not in _DEVICES:
        return False
    if isinstance(conv, nn.Linear):
        if input.dim() != 2 or exchanges(bn):
            return input.dim() == 2
        # There the convolution is cuDNN's, which by default rounds to TF32 where a linear layer
        # does not.
        if input.is_cuda:
            return False
        # An image has pixels; one row is an error in training, which stock words better.
        return _is_tracing() or input.shape[0] > int(bn.training)
    if input.dim() != 4:
        return False
    # Written as a product and a sum, a frozen batch norm promotes where the op would round.
    return isinstance(bn, _BatchNorm) or bn.running_mean.dtype == _dtype_after(input)


def _as_image(rows: Tensor) -> Tensor:
    """View [N, C] as [1, C, N, 1], which is its memory read as channels_last."""
    return rows.reshape(1, rows.shape[0], 1, rows.shape[1]).permute(0, 3, 1, 2)


def _as_rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(image.shape[2], image.shape[1])


def _state_of_conv(conv: nn.Module) -> tuple[Any, ...]:
    if isinstance(conv, nn.Linear):
        weight = conv.weight[:, :, None, None]
        return weight, conv.bias, [1, 1], [0, 0, 0, 0], [1, 1], 1, "zeros"
    assert isinstance(conv, nn.Conv2d)
    return _conv_state(conv)


def _state_of_bn(bn: nn.Module) -> tuple[Any, ...]:
    if isinstance(bn, _BatchNorm):
        return _bn_state(bn)
    statistics = bn.running_mean, bn.running_var
    return bn.weight, bn.bias, *statistics, None, False, True, None, eps_of(bn)


def fold(conv: nn.Module, bn: nn.Module) -> nn.Module:
    """Return the module that does in inference what a pair does.

    The activation stays the forward's: so the stock forward is right on folded modules as well.
    """
    weight, bias, *_ = _state_of_conv(conv)
    bn_weight, bn_bias, mean, var, *_, eps = _state_of_bn(bn)
    weight, bias = _fold(weight, bias, bn_weight, bn_bias, mean, var, eps)
    if isinstance(conv, nn.Linear):
        linear = nn.Linear(conv.in_features, conv.out_features, device="meta")
        linear.weight = nn.Parameter(weight[:, :, 0, 0], requires_grad=False)
        linear.bias = nn.Parameter(bias, requires_grad=False)
        linear.__dict__[_rules.FOLDED] = True
        return linear
    assert isinstance(conv, nn.Conv2d)
    return ConvReLU2d(
        weight, bias, conv.stride, _both_sides(conv), conv.dilation, conv.groups,
        conv.padding_mode, "identity",
    )  # fmt: skip


def folded_linear(
    input: Tensor,
    linear: nn.Linear,
    bn: nn.Identity,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """Run a pattern of an inference snapshot, where ``linear`` holds the folded tensors."""
    if not _takes(input, linear, bn) or not (residual is None or _fits(residual, input, linear)):
        return _finish(linear(input), residual, activation, negative_slope)
    weight, bias, stride, _, dilation, groups, _ = _state_of_conv(linear)
    output = conv_relu(
        _as_image(input), weight, bias, None if residual is None else _as_image(residual),
        stride, 0, dilation, groups, activation, negative_slope,
    )  # fmt: skip
    return _as_rows(output)


def folded(
    input: Tensor,
    conv: ConvReLU2d,
    bn: nn.Identity,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """Run a pattern of an inference snapshot, where ``conv`` holds the folded tensors."""
    if not input.is_cpu and input.device.type not in _DEVICES:
        padded, padding = conv._padded(input)
        output = F.conv2d(
            padded, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups
        )
    elif residual is None or _fits(residual, input, conv):
        return conv._convolve(input, residual, activation, negative_slope)
    else:
        output = conv(input)
    return _finish(output, residual, activation, negative_slope)


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "relu6": lambda x, _: F.relu6(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, _: F.silu(x),
    "hardswish": lambda x, _: F.hardswish(x),
}


def _finish(
    output: Tensor, residual: Tensor | None, activation: str, negative_slope: float
) -> Tensor:
    if residual is not None:
        output = output + residual
    return _ACTIVATIONS[activation](output, negative_slope)


def _dtype_after(input: Tensor) -> torch.dtype:
    """The dtype of a convolution of the input."""
    kind = input.device.type
    # Asked about "meta", autocast raises.
    if kind != "meta" and torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return input.dtype


def _fits(residual: Tensor, input: Tensor, conv: nn.Module) -> bool:
    """Whether a residual has the very shape, dtype and device of the conv's output."""
    if not isinstance(residual, Tensor) or residual.device != input.device:
        return False
    if residual.dtype != _dtype_after(input):
        return False
    if not _is_tracing():
        return _has_shape_after(residual, input, conv)
    # A trace keeps the answer, and the op it leads to looks at the shapes again.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return _has_shape_after(residual, input, conv)


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def _has_shape_after(residual: Tensor, input: Tensor, conv: nn.Module) -> bool:
    if residual.dim() != (2 if isinstance(conv, nn.Linear) else 4):
        return False
    if residual.shape[:2] != (input.shape[0], conv.weight.shape[0]):  # type: ignore[index]
        return False
    if isinstance(conv, nn.Linear):
        return True
    assert isinstance(conv, (nn.Conv2d, ConvReLU2d))
    sides = conv.both_sides if isinstance(conv, ConvReLU2d) else _both_sides(conv)
    padding = sides[2] + sides[3], sides[0] + sides[1]
    for i in range(2):
        span = int(conv.dilation[i]) * (conv.weight.shape[2 + i] - 1)
        size = (input.shape[2 + i] + padding[i] - span - 1) // int(conv.stride[i]) + 1
        if residual.shape[2 + i] != size:
            return False
    return True

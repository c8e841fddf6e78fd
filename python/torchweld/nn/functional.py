"""Functional forms of :mod:`torchweld.nn`."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._jit_internal import BroadcastingList2  # type: ignore[attr-defined]

__all__ = ["conv_bn_relu", "max_pool2d"]


# TorchScript compiles the functions below; it reads Optional[X] and List[int] in every torch we
# support, X | None only in newer ones.
def _pad(
    input: Tensor,
    padding: List[int],  # noqa: UP006
    both_sides: List[int],  # noqa: UP006
    mode: str,
) -> Tuple[Tensor, List[int]]:  # noqa: UP006
    """Apply what a convolution's own zero padding cannot: other modes, or uneven sides.

    Args:
        input: the convolution's input.
        padding: per dimension, used if it can be.
        both_sides: left, right, top, bottom, as ``nn.Conv2d`` keeps it.
        mode: ``nn.Conv2d.padding_mode``.

    Returns:
        The input, padded if need be, and the padding left for the convolution.
    """
    if mode == "zeros":
        if both_sides[0] == both_sides[1] and both_sides[2] == both_sides[3]:
            return input, padding
        return F.pad(input, both_sides), [0, 0]
    return F.pad(input, both_sides, mode=mode), [0, 0]


# A trace would keep the count of values of its example for a constant.
@torch.jit.script_if_tracing
def _update_running_stats(
    output: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float,
) -> Tensor:
    count = output.size(0) * output.size(2) * output.size(3)
    torch.ops.torchweld.update_running_stats(running_mean, running_var, mean, var, count, momentum)
    return running_mean  # a trace can record no call that returns nothing


def _conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    stride: List[int],  # noqa: UP006
    both_sides: List[int],  # noqa: UP006
    dilation: List[int],  # noqa: UP006
    groups: int,
    padding_mode: str,
    bn_weight: Optional[Tensor],  # noqa: UP045
    bn_bias: Optional[Tensor],  # noqa: UP045
    running_mean: Optional[Tensor],  # noqa: UP045
    running_var: Optional[Tensor],  # noqa: UP045
    num_batches_tracked: Optional[Tensor],  # noqa: UP045
    training: bool,
    track_running_stats: bool,
    momentum: Optional[float],  # noqa: UP045
    eps: float,
    activation: str,
    negative_slope: float,
    residual: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    if input.dim() != 4:
        raise ValueError(f"expected 4D input (got {input.dim()}D input)")
    input, padding = _pad(input, [both_sides[2], both_sides[0]], both_sides, padding_mode)

    if not training and running_mean is not None and running_var is not None:
        if eps <= 0.0:  # torch's own check: which values it refuses changed between releases
            F.batch_norm(torch.zeros(2, 1), torch.zeros(1), torch.ones(1), eps=eps)
        frozen: Tensor = torch.ops.torchweld.conv_bn_relu_frozen(
            input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual,
            stride, padding, dilation, groups, eps, activation, negative_slope,
        )[0]  # fmt: skip
        return frozen
    if not training and (running_mean is not None or running_var is not None):
        raise ValueError("expected both of running_mean and running_var or neither, got one")

    # As nn.BatchNorm2d.forward: the count moves first, then the input is looked at.
    factor = 0.0 if momentum is None else momentum
    if training and track_running_stats and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = 1.0 / float(num_batches_tracked)
    if eps <= 0.0:
        F.batch_norm(torch.zeros(2, 1), None, None, training=True, eps=eps)
    output, _, mean, _, var = torch.ops.torchweld.conv_bn_relu(
        input, weight, bias, bn_weight, bn_bias, residual,
        stride, padding, dilation, groups, eps, activation, negative_slope,
    )  # fmt: skip
    F._verify_batch_size(output.size())  # type: ignore[attr-defined]
    updates = training and track_running_stats
    if updates and running_mean is not None and running_var is not None:
        _update_running_stats(output, running_mean, running_var, mean, var, factor)
    result: Tensor = output
    return result


def _check_modules(op: str, conv: nn.Module, bn: nn.Module) -> None:
    """Raise TypeError unless both compute what the stock classes compute."""
    for name, module, stock in (("conv", conv, nn.Conv2d), ("bn", bn, nn.BatchNorm2d)):
        if not isinstance(module, stock) or type(module).forward is not stock.forward:
            raise TypeError(
                f"{op}: {name}: expected nn.{stock.__name__}, or a subclass with its forward, "
                f"got {type(module).__name__}"
            )


def _both_sides(conv: nn.Conv2d) -> list[int]:
    """Return the padding on left, right, top and bottom."""
    # What nn.Conv2d.forward reads: models change `padding` in place to dilate a network.
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return [conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0]]
    return conv._reversed_padding_repeated_twice


def conv_bn_relu(
    input: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Compute ``activation(bn(conv(input)) + residual)`` fused, with stock semantics.

    .. math::
        y = \operatorname{act}\left(\gamma \frac{a - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta
            + r\right), \qquad a = \operatorname{conv}(x)

    The two modules are read, not called: their forward hooks do not run. ``bn.training`` decides
    between batch and running statistics, running buffers and ``num_batches_tracked`` move exactly
    when ``bn`` itself would move them.

    Args:
        input: ``[N, C_in, H, W]`` of float32, float64, bfloat16 or float16, contiguous or
            channels_last (others are copied).
        conv: the convolution; any stride, padding, padding mode, dilation and groups.
        bn: the batch norm over its output; float32 parameters beside 16-bit input are fine.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"`` or
            ``"hardswish"``.
        negative_slope: slope of ``"leaky_relu"`` below zero.
        residual: added before the activation; shape and dtype of the output.

    Returns:
        ``[N, C_out, H_out, W_out]`` in the dtype and memory format the convolution alone gives.

    Raises:
        TypeError: if ``conv`` is no ``nn.Conv2d`` or ``bn`` no ``nn.BatchNorm2d`` (synchronized
            batch norm is not one), or is a subclass with a forward of its own.
        ValueError: if the input is not 4-D; if batch statistics are asked of one value per channel;
            if ``eps`` is one the installed torch refuses.
        RuntimeError: if shapes, dtypes or the activation's name do not fit.

    Note:
        Statistics accumulate in float64 and come out the same whatever the thread count;
        normalize, residual and activation are one pass computed in float32 (float64 for float64)
        and rounded once. The convolution is one of ours where that is expected to be faster
        (float32, channels_last; see ``torchweld.config``), else ATen's. The derivative of the
        activation is recomputed from the convolution's output and the residual, so the output is
        not kept for it. Second derivatives raise.

    Reference:
        Ioffe and Szegedy, Batch Normalization, https://arxiv.org/abs/1502.03167; Chan, Golub and
        LeVeque, Algorithms for Computing the Sample Variance (1983), for the statistics.

    Example:
        >>> import torch, torchweld as tw
        >>> conv, bn = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8)
        >>> y = tw.nn.functional.conv_bn_relu(torch.randn(2, 3, 16, 16), conv, bn)
        >>> y.shape, int(bn.num_batches_tracked)
        (torch.Size([2, 8, 16, 16]), 1)
    """
    _check_modules("conv_bn_relu", conv, bn)
    state = (*_conv_state(conv), *_bn_state(bn), activation, negative_slope, residual)
    return _conv_bn_relu(input, *state)


def _conv_state(conv: nn.Conv2d) -> tuple[Any, ...]:
    """Return what ``_conv_bn_relu`` takes of a convolution."""
    return (
        conv.weight,
        conv.bias,
        list(conv.stride),
        _both_sides(conv),
        list(conv.dilation),
        conv.groups,
        conv.padding_mode,
    )


def _bn_state(bn: nn.modules.batchnorm._BatchNorm) -> tuple[Any, ...]:
    """Return what ``_conv_bn_relu`` takes of a batch norm of any kind."""
    return (
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        bn.num_batches_tracked,
        bn.training,
        bn.track_running_stats,
        bn.momentum,
        bn.eps,
    )


def _max_pool2d(
    input: Tensor,
    kernel_size: BroadcastingList2[int],
    stride: BroadcastingList2[int],
    padding: BroadcastingList2[int],
    dilation: BroadcastingList2[int],
    ceil_mode: bool,
) -> Tensor:
    # The operator sends what it has no kernels for to torch's own; from here it is not as far.
    transformed = False
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        transformed = torch._C._are_functorch_transforms_active()
    ours = (
        not transformed
        and input.dim() == 4
        and (input.dtype == torch.float32 or input.dtype == torch.bfloat16)
        and input.device.type == "cpu"
        and input.layout == torch.strided
        and input.is_contiguous(memory_format=torch.channels_last)
    )
    if not ours:
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    output: Tensor = torch.ops.torchweld.max_pool2d(
        input, kernel_size, stride, padding, dilation, ceil_mode
    )
    return output


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Compute ``torch.nn.functional.max_pool2d``, faster on channels_last images on the CPU.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size: of the window.
        stride: of the window; ``kernel_size`` if absent.
        padding: of the input with -inf, on both sides.
        dilation: from one tap of the window to the next.
        ceil_mode: whether a last window may reach beyond the padded input.
        return_indices: also return where in the input each output is.

    Returns:
        ``[N, C, H_out, W_out]``, equal to torch's, and with ``return_indices`` torch's indices.

    Raises:
        RuntimeError: if an argument does not fit.

    Note:
        Kernels of ours pool 4-D float32 and bfloat16 in channels_last memory on the CPU, with
        windows of at most 256 taps and 32 times the stride. Everything else is torch's own
        function: other dtypes, contiguous memory, CUDA, ``return_indices``. Numerics, and what is
        kept for the backward: :func:`torchweld.ops.max_pool2d`.

    Example:
        >>> import torch, torchweld as tw
        >>> x = torch.randn(2, 16, 28, 28).contiguous(memory_format=torch.channels_last)
        >>> torch.equal(tw.nn.functional.max_pool2d(x, 2), torch.nn.functional.max_pool2d(x, 2))
        True
    """
    stride = kernel_size if stride is None else stride
    if return_indices:
        return F.max_pool2d(
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    return _max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)

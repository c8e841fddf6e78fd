"""Batch statistics, and normalization apart from the convolution, as functional ops.

Tensors, activations and errors are as :mod:`torchweld.ops.conv_bn_relu` describes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.torchweld


def update_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """Move running statistics towards those of a batch, in place.

    ``running = (1 - momentum) * running + momentum * batch``, computed in float64, with the
    unbiased variance ``var * count / (count - 1)``.

    Args:
        running_mean: ``[C]``, floating point.
        running_var: ``[C]``, floating point.
        mean: float64 ``[C]``.
        var: float64 ``[C]``, biased.
        count: values per channel; 0 (an empty batch) changes nothing.
        momentum: weight of the batch.

    Raises:
        RuntimeError: if an argument does not fit, or ``count`` is 1.

    Example:
        >>> import torch, torchweld as tw
        >>> mean, var, one = torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.float64)
        >>> tw.ops.update_running_stats(mean, var, one, one, 2, 0.5)
        >>> mean, var
        (tensor([0.5000]), tensor([1.5000]))
    """
    _ops.update_running_stats(running_mean, running_var, mean, var, count, momentum)


def batch_norm_stats(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values per channel, their mean, and the sum of squared deviations from it.

    What processes exchange to normalize with the statistics of all of them.

    Args:
        input: ``[N, C, H, W]``; empty gives zeros.

    Returns:
        ``count`` float64 ``[1]``, ``mean`` and ``m2`` float64 ``[C]``.

    Raises:
        RuntimeError: if the input is not 4-D of a supported dtype.

    Note:
        Per tile about the tile's own mean, tiles merged in float64: a mean far larger than the
        deviation costs no accuracy.

    Reference:
        Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983.

    Example:
        >>> import torch, torchweld as tw
        >>> count, mean, m2 = tw.ops.batch_norm_stats(torch.tensor([1.0, 3.0]).view(1, 1, 1, 2))
        >>> count.item(), mean.item(), m2.item()
        (2.0, 2.0, 2.0)
    """
    result: tuple[Tensor, Tensor, Tensor] = _ops.batch_norm_stats(input)
    return result


def batch_norm_relu(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """Compute ``activation(bn_weight * (input - mean) * invstd + bn_bias + residual)``.

    Args:
        input: ``[N, C, H, W]``.
        mean: float64 ``[C]``.
        invstd: float64 ``[C]``.
        bn_weight: as in :func:`conv_bn_relu`, and so all others.
        bn_bias: see there.
        residual: see there.
        activation: see there.
        negative_slope: see there.

    Returns:
        The output, in the shape, dtype and memory format of the input.

    Raises:
        RuntimeError: if an argument does not fit; in the backward, which needs an exchange between
            processes (see :func:`batch_norm_relu_backward`).

    Example:
        >>> import torch, torchweld as tw
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> tw.ops.batch_norm_relu(torch.full((1, 1, 1, 1), 3.0), one, 2 * one).item()
        4.0
    """
    result: Tensor = _ops.batch_norm_relu(
        input, mean, invstd, bn_weight, bn_bias, residual, activation, negative_slope
    )
    return result


def batch_norm_relu_backward_reduce(
    grad_output: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    """Sum what the backward of :func:`batch_norm_relu` needs from every process.

    Args:
        grad_output: of the input's shape and dtype.
        input: as given to :func:`batch_norm_relu`.
        mean: see there.
        invstd: see there.
        *args: ``bn_weight, bn_bias, residual, activation, negative_slope`` as given there.

    Returns:
        Float64 ``[C]``: the sum of ``g``, the gradient of ``bn_bias``, and of ``g * xhat``, that of
        ``bn_weight``, where ``g`` is ``grad_output`` times the activation's derivative.

    Raises:
        RuntimeError: if an argument does not fit.

    Example:
        >>> import torch, torchweld as tw
        >>> x, one = torch.full((1, 1, 1, 2), 3.0), torch.ones(1, dtype=torch.float64)
        >>> g, g_xhat = tw.ops.batch_norm_relu_backward_reduce(
        ...     x, x, one, one, None, None, None, "relu", 0.0)
        >>> g.item(), g_xhat.item()
        (6.0, 12.0)
    """
    result: tuple[Tensor, Tensor] = _ops.batch_norm_relu_backward_reduce(
        grad_output, input, mean, invstd, *args
    )
    return result


def batch_norm_relu_backward(
    grad_output: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`batch_norm_relu` for input and residual.

    Args:
        grad_output: of the input's shape and dtype.
        input: as given to :func:`batch_norm_relu`.
        mean: see there.
        invstd: see there.
        *args: ``bn_weight, bn_bias, residual, sum_g, sum_g_xhat, count, activation,
            negative_slope``, where the sums of :func:`batch_norm_relu_backward_reduce` and the
            count (float64 ``[1]``) are over all processes.

    Returns:
        The gradient of the input, and of the residual (an empty tensor without one).

    Raises:
        RuntimeError: if an argument does not fit.

    Example:
        >>> import torch, torchweld as tw
        >>> x, one = torch.full((1, 1, 1, 2), 3.0), torch.ones(1, dtype=torch.float64)
        >>> tw.ops.batch_norm_relu_backward(
        ...     x, x, one, one, None, None, None, 0 * one, 0 * one, 2 * one, "relu", 0.0)[0].sum()
        tensor(6.)
    """
    result: tuple[Tensor, Tensor] = _ops.batch_norm_relu_backward(
        grad_output, input, mean, invstd, *args
    )
    return result

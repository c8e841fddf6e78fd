r"""Convolution, batch norm, residual and activation as functional ops.

Common to all of them. Activation tensors (input, weight, bias, residual, output, their gradients)
share one dtype: float32, float64, bfloat16 or float16; ``bn_*`` and ``running_*`` have ``[C]``
elements of that dtype, or float32 beside a 16-bit one. Memory is contiguous or channels_last;
others are copied. All tensors are on one device: the CPU, or a GPU where :func:`torchweld.info`
says that the CUDA half is there; it is compiled and tested in an emulator, not yet run on a GPU.
Batch statistics are float64 ``[C]``. ``activation`` is ``"identity"``,
``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"`` or ``"hardswish"``; ``negative_slope`` is that
of ``"leaky_relu"``. Every op raises RuntimeError, naming op, argument, expected and got, where a
shape, a dtype or a name does not fit.

Statistics and reductions accumulate in float64 and give the same bits whatever the thread count;
elementwise arithmetic is float32 (float64 for float64), rounded once. The
convolution is one of ours where that is expected to be faster (see ``torchweld.config``), else
ATen's; on a GPU it is always ATen's. There nothing waits for the device, and everything may be
captured in a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.torchweld


class _InferenceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.mark_dirty(output)  # the tensor itself and no view, which could not be written to
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "torchweld::conv_relu: inference only, no gradient; use conv_bn_relu_frozen to train "
            "through it"
        )


def inference_only(output: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return the output of ``torchweld::conv_relu`` such that a gradient through it raises.

    Args:
        output: what the operator returned.
        inputs: what it was computed from.
    """
    if not torch.is_grad_enabled():
        return output
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return output
    if not any(x is not None and x.requires_grad for x in inputs):
        return output
    result: Tensor = _InferenceOnly.apply(output.detach(), *inputs)
    return result


def _pair(value: int | tuple[int, int] | list[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Compute ``activation(batch_norm(conv2d(input)) + residual)`` with this batch's statistics.

    .. math::
        y = \operatorname{act}\left(\gamma (a - \mu) \cdot \tfrac{1}{\sqrt{\sigma^2 + \epsilon}}
            + \beta + r\right), \qquad a = \operatorname{conv}(x)

    Args:
        input: ``[N, C_in, H, W]``.
        weight: ``[C, C_in / groups, kH, kW]``.
        bias: ``[C]`` of the convolution; its gradient is exactly zero, as the mean takes it out.
        bn_weight: gamma, 1 if absent.
        bn_bias: beta, 0 if absent.
        residual: of the output's shape, added before the activation.
        stride: of the convolution, as ``padding``, ``dilation`` and ``groups``.
        padding: zeros on both sides.
        dilation: see ``stride``.
        groups: see ``stride``.
        eps: added to the variance.
        activation: see the module's description.
        negative_slope: see the module's description.

    Returns:
        ``output`` and, for :func:`update_running_stats` and the backward, not differentiable:
        ``conv_output``, ``mean``, ``invstd`` and the biased ``var``.

    Raises:
        RuntimeError: if an argument does not fit; if a second derivative is asked for.

    Note:
        One value per channel is taken as it is (variance 0); the module raises as torch does.
        The backward recomputes the activation's derivative from ``conv_output``.

    Reference:
        Ioffe and Szegedy, https://arxiv.org/abs/1502.03167.

    Example:
        >>> import torch, torchweld as tw
        >>> x, w = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 1, 1)
        >>> output, _, mean, _, _ = tw.ops.conv_bn_relu(x, w)
        >>> output.shape, mean.tolist()
        (torch.Size([2, 4, 8, 8]), [3.0, 3.0, 3.0, 3.0])
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _ops.conv_bn_relu(
        input, weight, bias, bn_weight, bn_bias, residual, _pair(stride), _pair(padding),
        _pair(dilation), groups, eps, activation, negative_slope,
    )  # fmt: skip
    return result


def conv_bn_relu_frozen(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`conv_bn_relu` does, with given statistics, which get no gradient.

    Args:
        input: as in :func:`conv_bn_relu`, and so all others.
        weight: see there.
        bias: see there; here it has a gradient.
        bn_weight: see there.
        bn_bias: see there.
        running_mean: ``[C]``.
        running_var: ``[C]``.
        residual: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.
        eps: see there.
        activation: see there.
        negative_slope: see there.

    Returns:
        ``output``, and ``conv_output`` for the backward, not differentiable.

    Raises:
        RuntimeError: if an argument does not fit; if a second derivative is asked for.

    Example:
        >>> import torch, torchweld as tw
        >>> x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> tw.ops.conv_bn_relu_frozen(x, w, None, None, None, zero, one, eps=0.0)[0].sum()
        tensor(4.)
    """
    result: tuple[Tensor, Tensor] = _ops.conv_bn_relu_frozen(
        input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, _pair(stride),
        _pair(padding), _pair(dilation), groups, eps, activation, negative_slope,
    )  # fmt: skip
    return result


def conv_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """Compute ``activation(conv2d(input) + residual)``, for a batch norm folded into the weights.

    Args:
        input: as in :func:`conv_bn_relu`, and so all others.
        weight: see there.
        bias: see there.
        residual: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.
        activation: see there.
        negative_slope: see there.
        packed_weight: what :func:`conv_relu_pack` made of this very weight; it saves packing it
            again. Ignored where it does not fit the algorithm chosen for the input.

    Returns:
        The output, ``[N, C, H_out, W_out]``.

    Raises:
        RuntimeError: if an argument does not fit; in the backward, as it has no gradient (in
            TorchScript and under ``torch.compile`` torch warns instead).

    Example:
        >>> import torch, torchweld as tw
        >>> tw.ops.conv_relu(torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 1, 1)).sum()
        tensor(0.)
    """
    result: Tensor = _ops.conv_relu(
        input, weight, packed_weight, bias, residual, _pair(stride), _pair(padding),
        _pair(dilation), groups, activation, negative_slope,
    )  # fmt: skip
    return inference_only(result, input, weight, bias, residual)


def conv_relu_pack(
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Lay a weight out as the kernels of :func:`conv_relu` read it.

    Args:
        weight: as in :func:`conv_relu`, and so all others.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.

    Returns:
        Float32 ``[1, 1, 1, L]``, the same for every instruction set. ``L`` is 0 where the
        convolution is ATen's: for shapes it is faster at, for dtypes but float32 and bfloat16, for
        bfloat16 without AVX512-BF16, and on a GPU. In bfloat16 an element may hold two values.

    Raises:
        RuntimeError: if an argument does not fit.

    Example:
        >>> import torch, torchweld as tw
        >>> x, w = torch.ones(1, 16, 8, 8), torch.ones(16, 16, 1, 1)
        >>> tw.ops.conv_relu(x, w, packed_weight=tw.ops.conv_relu_pack(w)).unique()
        tensor([16.])
    """
    result: Tensor = _ops.conv_relu_pack(
        weight, _pair(stride), _pair(padding), _pair(dilation), groups
    )
    return result

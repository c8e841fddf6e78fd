"""Functional form of the linear layer with an int8 weight and float activations."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_only_linear(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    activation: str = "identity",
) -> Tensor:
    """Apply ``activation(input @ weight.T + bias) + residual`` with an int8 weight.

    The activations stay floating point: the weight is the only thing that was rounded. It becomes
    floats in registers and is never written out as such.

    Args:
        input: ``[..., in_features]`` in float32, bfloat16 or float16, any strides.
        packed_weight: int8 weight in the layout :func:`torchweld.ops.pack_weight` gives.
        weight_scale: float32 ``[out_features]``; column ``n`` of the weight is
            ``weight_scale[n] * qweight[n]``.
        bias: floating point ``[out_features]``, or None. Used in float32.
        residual: floating point ``[..., out_features]``, or None. Added last, in float32.
        in_features: the number of input features K.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.

    Returns:
        ``[..., out_features]`` in the dtype of ``input``.

    Raises:
        RuntimeError: a tensor's shape or dtype, ``in_features`` or ``activation`` is not as above;
            the message names it. Also when ``weight_scale`` requires grad.

    Note:
        In float32, products with the integers are summed by one chain of fused multiply-adds over
        K; then ``fma(sum, weight_scale, bias)``, the activation, the residual, and one rounding to
        the dtype of ``input``. The result has the same bits on every CPU instruction set, for any
        number of threads, and whatever other rows are in the batch. Scales meet the sum and not the
        weight, so a sum may overflow where a float layer's would not: inputs beyond 1e36 or so.

        On CUDA tensor cores form the same products, exactly, also of float32 activations, and sum
        them in float32 in an order of their own: deterministic, and the same for every row, but
        another one for up to 8, up to 32 and more rows (compiled and emulated, not yet run).

        Differentiable in ``input``, ``bias`` and ``residual``. Under autocast ``input`` is cast to
        the autocast dtype, everything else is left as it is.

    Reference:
        :func:`torch.nn.functional.linear` with the dequantized weight.

    Example:
        >>> import torch, torchweld as tw
        >>> qweight, scale = tw.ops.quantize_weight(torch.randn(8, 32))
        >>> packed, _ = tw.ops.pack_weight(qweight)
        >>> tw.ops.weight_only_linear(torch.randn(4, 32), packed, scale, None, None, 32).shape
        torch.Size([4, 8])
    """
    result: Tensor = torch.ops.torchweld.weight_only_linear(
        input, packed_weight, weight_scale, bias, residual, in_features, activation
    )
    return result

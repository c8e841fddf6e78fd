"""Functional form of the int8 linear layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")

PANEL = 16
QUAD = 4

# Sums of more weights could overflow int32.
MAX_IN_FEATURES = 2**24


def quantized_linear(
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
    """Apply ``activation(input @ weight.T + bias) + residual`` in int8 x int8.

    Every row of ``input`` is quantized on the fly and by itself (per token), in float32:
    ``scale = max(absmax / 127, 2**-126)`` and ``q = round_half_to_even(input * (1 / scale))``. A
    row that holds a NaN or an infinity gives a row of NaN and touches no other row.

    Args:
        input: ``[..., in_features]`` in float32, bfloat16 or float16, any strides.
        packed_weight: int8 weight in the layout :func:`pack_weight` gives.
        weight_scale: float32 ``[out_features]``; column ``n`` of the weight is
            ``weight_scale[n] * qweight[n]``.
        weight_sum: int32 sums of the weight's columns, from :func:`pack_weight`.
        bias: floating point ``[out_features]``, or None. Used in float32.
        residual: floating point ``[..., out_features]``, exactly the output's shape, or None. Added
            behind the activation, in float32. Read without a copy if it is contiguous and in the
            dtype of ``input`` or float32.
        in_features: the number of input features K, at most 2**24.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        input_group_size: 0 for one scale per row of ``input``; else every so many features of a
            row have their own, against outlier channels: a multiple of 4, up to 65536.

    Returns:
        ``[..., out_features]`` in the dtype of ``input``.

    Raises:
        RuntimeError: a tensor's shape or dtype, ``in_features`` or ``activation`` is not as above;
            the message names it. Also when ``weight_scale`` requires grad.

    Note:
        Products are summed exactly (in int32; more than 133144 of them in blocks, joined in int64).
        Then, in float32, ``float(sum) * scale``, or the groups' one by one in fused multiply-adds;
        one fused multiply-add with ``weight_scale`` and ``bias``, the activation, the residual, and
        one rounding to the dtype of ``input``. The result has the same bits on every CPU
        instruction set, for any number of threads, and whatever other rows are in the batch. The
        CUDA kernels are written to give those bits too, but for the payload of a NaN (compiled and
        emulated, not yet run). The weight's scale comes last, so a row may overflow where a float
        layer's would not: from inputs of 1e32 on, or so.

        Differentiable in ``input``, ``bias`` and ``residual``; rounding counts as the identity
        (straight-through estimator), so the gradient of ``input`` is that of a linear layer with
        the dequantized weight; it is not quantized. On CUDA it is summed in float32 by tensor
        cores, to which a float32 gradient, times the weight's scale, is given in full, and a 16-bit
        one rounded to 16 bits.

        Under autocast ``input`` is cast to the autocast dtype, everything else is left as it is.

    Reference:
        Symmetric quantization as in https://arxiv.org/abs/2004.09602; straight-through estimator:
        https://arxiv.org/abs/1308.3432.

    Example:
        >>> import torch, torchweld as tw
        >>> qweight, scale = tw.ops.quantize_weight(torch.randn(8, 32))
        >>> packed, weight_sum = tw.ops.pack_weight(qweight)
        >>> x = torch.randn(4, 32)
        >>> tw.ops.quantized_linear(x, packed, scale, weight_sum, None, None, 32).shape
        torch.Size([4, 8])
    """
    result: Tensor = torch.ops.torchweld.quantized_linear(
        input,
        packed_weight,
        weight_scale,
        weight_sum,
        bias,
        residual,
        in_features,
        activation,
        input_group_size,
    )
    return result


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a linear weight to int8, symmetrically and per output channel.

    Args:
        weight: finite floating point ``[out_features, in_features]``.

    Returns:
        ``qweight``, int8 of the same shape within [-127, 127], and ``weight_scale``, float32
        ``[out_features]``, so that ``qweight * weight_scale[:, None]`` approximates ``weight``.

    Raises:
        ValueError: ``weight`` is not two-dimensional floating point, or holds a NaN or infinity.

    Note:
        ``scale = max(absmax / 127, 2**-126)``, ``q = round_half_to_even(weight * (1 / scale))``, in
        float32. A row of zeros gives zeros.

    Example:
        >>> import torch, torchweld as tw
        >>> tw.ops.quantize_weight(torch.tensor([[1.0, -0.5]]))[0].tolist()
        [[127, -64]]
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            "quantize_weight: weight: expected floating point [out_features, in_features], got "
            f"{weight.dtype} {list(weight.shape)}"
        )
    weight = weight.detach().to(torch.float32)
    if not bool(weight.isfinite().all()):
        raise ValueError(
            "quantize_weight: weight: expected finite values in float32, got NaN or infinity"
        )
    # A column of zeros gives absmax a defined value when there are no input features.
    absmax = F.pad(weight.abs(), (0, 1)).amax(1)
    scale = scale_of(absmax)
    qweight = (weight * (1 / scale)[:, None]).round().to(torch.int8)
    return qweight, scale


def scale_of(absmax: Tensor) -> Tensor:
    """Return the scale of values of at most these magnitudes, float32, rounded as on the CPU."""
    # By a tensor: on CUDA torch multiplies by the inverse of a number, which rounds differently.
    return (absmax / torch.full_like(absmax, 127)).clamp_min(torch.finfo(torch.float32).tiny)


def pack_weight(qweight: Tensor) -> tuple[Tensor, Tensor]:
    """Lay an int8 weight out for the kernels.

    Args:
        qweight: int8 ``[out_features, in_features]`` within [-127, 127].

    Returns:
        ``packed_weight``, int8 ``[ceil(out_features / 16), ceil(in_features / 4), 16, 4]``, zero
        padded; and ``weight_sum``, int32 ``[ceil(out_features / 16) * 16]``, the sum of each row of
        ``qweight``. The layout is the same for every instruction set.

    Raises:
        ValueError: ``qweight`` is not two-dimensional int8, has more than 2**24 columns, or holds
            -128, which the exact integer arithmetic of AVX2 leaves no room for.

    Example:
        >>> import torch, torchweld as tw
        >>> packed, weight_sum = tw.ops.pack_weight(torch.ones(10, 30, dtype=torch.int8))
        >>> packed.shape, weight_sum[0].item()
        (torch.Size([1, 8, 16, 4]), 30)
    """
    problem = invalid_qweight(qweight)
    if problem:
        raise ValueError(f"pack_weight: qweight: {problem}")
    n, k = qweight.shape
    padded = F.pad(qweight, (0, -k % QUAD, 0, -n % PANEL))
    panels, quads = padded.shape[0] // PANEL, padded.shape[1] // QUAD
    packed = place_packed(padded.view(panels, PANEL, quads, QUAD).transpose(1, 2))
    return packed, padded.sum(1, dtype=torch.int32)


def unpack_weight(packed_weight: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return the int8 ``[out_features, in_features]`` weight :func:`pack_weight` was given.

    Args:
        packed_weight: int8 ``[ceil(out_features / 16), ceil(in_features / 4), 16, 4]``.
        out_features: number of output features.
        in_features: number of input features.

    Returns:
        A new contiguous tensor.

    Example:
        >>> import torch, torchweld as tw
        >>> qweight = torch.ones(10, 30, dtype=torch.int8)
        >>> torch.equal(tw.ops.unpack_weight(tw.ops.pack_weight(qweight)[0], 10, 30), qweight)
        True
    """
    panels, quads = packed_weight.shape[:2]
    padded = packed_weight.transpose(1, 2).reshape(panels * PANEL, quads * QUAD)
    return padded[:out_features, :in_features].clone(memory_format=torch.contiguous_format)


def place_packed(packed_weight: Tensor) -> Tensor:
    """Make a packed weight contiguous, in memory the kernels read fastest."""
    if packed_weight.device.type != "cpu":
        return packed_weight.contiguous()
    result: Tensor = torch.ops.torchweld._in_huge_pages(packed_weight)
    return result


def invalid_qweight(qweight: Tensor) -> str | None:
    """Say why a tensor cannot be an int8 weight ("expected ..., got ..."), or None if it can."""
    if qweight.dtype != torch.int8 or qweight.dim() != 2:
        return (
            f"expected int8 [out_features, in_features], got {qweight.dtype} {list(qweight.shape)}"
        )
    if qweight.shape[1] > MAX_IN_FEATURES:
        return f"expected at most {MAX_IN_FEATURES} input features, got {qweight.shape[1]}"
    if not qweight.is_meta and bool((qweight == -128).any()):
        return "expected values within [-127, 127], got -128"
    return None

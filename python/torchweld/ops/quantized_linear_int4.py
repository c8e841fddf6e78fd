"""Functional form of the int4 linear layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchweld.ops.quantized_linear import PANEL, place_packed

# Two quads: what a byte of a packed weight's octet holds side by side.
OCTET = 8

# Sums over more products of a group, those of the high bits counted 16 times, could overflow int32.
MAX_GROUP_SIZE = 1 << 17

# A group may be longer than the weight is wide up to here, so that usual sizes fit any layer.
_USUAL_GROUP_SIZE = 128


def quantized_linear_int4(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str = "identity",
) -> Tensor:
    """Apply ``activation(input @ weight.T + bias) + residual`` with an int4 weight.

    Every row of ``input`` is quantized to int8 by itself, as in
    :func:`torchweld.ops.quantized_linear`. A row that holds a NaN or an infinity gives a row of NaN
    and touches no other row.

    Args:
        input: ``[..., in_features]`` in float32, bfloat16 or float16, any strides.
        packed_weight: 4-bit weight in the layout :func:`pack_weight_int4` gives, as are
            ``weight_scale`` and ``weight_zero``.
        weight_scale: bfloat16 ``[ceil(out_features / 16), groups, 16]``.
        weight_zero: uint8 of the same shape, within 0 to 15.
        bias: floating point ``[out_features]``, or None. Used in float32.
        residual: floating point ``[..., out_features]``, or None. Added last, in float32.
        in_features: the number of input features K.
        out_features: the number of output features N.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.

    Returns:
        ``[..., out_features]`` in the dtype of ``input``.

    Raises:
        RuntimeError: a tensor's shape or dtype or another argument is not as above; the message
            names it. Also when ``weight_scale`` requires grad.

    Note:
        With ``sum[g]`` the exact int32 sum over group ``g`` of int8 times ``u - zero``, and in
        float32: ``total = fma(sum[g], weight_scale[g], total)`` in the order of the groups, then
        ``total * input_scale + bias``, the activation, the residual, and one rounding to the
        dtype of ``input``. The result has the same bits on every CPU instruction set, for any
        number of threads, and whatever other rows are in the batch. The CUDA kernels are written to
        give those bits too, but for the payload of a NaN (compiled and emulated, not yet run). They
        cannot check that ``weight_zero`` is within 15, for which the host would have to wait.

        Differentiable in ``input``, ``bias`` and ``residual``; rounding the activations counts as
        the identity (straight-through estimator), so the gradient of ``input`` is that of a linear
        layer with the dequantized weight. On CUDA tensor cores multiply it exactly and sum in
        float32. Under autocast ``input`` is cast to the autocast dtype, everything else is left as
        it is.

    Reference:
        Groups with a scale and an integer zero, as in https://arxiv.org/abs/2306.00978;
        straight-through estimator: https://arxiv.org/abs/1308.3432.

    Example:
        >>> import torch, torchweld as tw
        >>> weight = tw.ops.quantize_weight_int4(torch.randn(8, 64), group_size=32)
        >>> packed = tw.ops.pack_weight_int4(*weight, in_features=64, group_size=32)
        >>> x = torch.randn(4, 64)
        >>> tw.ops.quantized_linear_int4(x, *packed, None, None, 64, 8).shape
        torch.Size([4, 8])
    """
    result: Tensor = torch.ops.torchweld.quantized_linear_int4(
        input,
        packed_weight,
        weight_scale,
        weight_zero,
        bias,
        residual,
        in_features,
        out_features,
        activation,
    )
    return result


def quantize_weight_int4(weight: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a linear weight to 4 bits, asymmetrically and by groups of input features.

    Args:
        weight: finite floating point ``[out_features, in_features]``.
        group_size: input features that share a scale and a zero: a multiple of 8, at most
            ``in_features`` rounded up to such, or 128 if that is more, and at most 131072. The last
            group may have fewer.

    Returns:
        ``qweight``, uint8 ``[out_features, ceil(in_features / 2)]``, two values a byte, the even
        ones in the low bits; ``weight_scale``, bfloat16, and ``weight_zero``, uint8, both
        ``[out_features, ceil(in_features / group_size)]``. A value is ``(u - zero) * scale`` with
        ``u`` and ``zero`` in 0 to 15; see :func:`dequantize_weight_int4`.

    Raises:
        ValueError: ``weight`` is not two-dimensional floating point, or holds a NaN or infinity, or
            ``group_size`` is not as above.

    Note:
        In float32, over the range of a group widened to hold 0: ``scale = max((high - low) / 15,
        2**-126)`` rounded to bfloat16, then against this scale ``zero = round(-low / scale)`` and
        ``u = round(weight / scale) + zero``, clamped to 0..15, halves rounded to even. 0 is exact,
        and a group of zeros gives zeros.

    Example:
        >>> import torch, torchweld as tw
        >>> q, scale, zero = tw.ops.quantize_weight_int4(torch.tensor([[7.0, 0.0, -8.0]]), 8)
        >>> q.tolist(), scale.tolist(), zero.tolist()
        ([[143, 0]], [[1.0]], [[8]])
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            "quantize_weight_int4: weight: expected floating point [out_features, in_features], "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    n, k = weight.shape
    problem = invalid_group_size(group_size, k)
    if problem:
        raise ValueError(f"quantize_weight_int4: group_size: {problem}")
    weight = weight.detach().to(torch.float32)
    if not bool(weight.isfinite().all()):
        raise ValueError(
            "quantize_weight_int4: weight: expected finite values in float32, got NaN or infinity"
        )
    groups = _groups(k, group_size)
    values = F.pad(weight, (0, groups * group_size - k)).view(n, groups, group_size)
    low, high = values.amin(2).clamp_max(0), values.amax(2).clamp_min(0)
    # Divided before the difference, which could be infinite.
    # By a tensor: on CUDA torch multiplies by the inverse of a number, which rounds differently.
    most = torch.full_like(high, 15)
    scale = (high / most - low / most).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale.to(torch.bfloat16)
    inverse = 1 / scale.float()
    zero = (-low * inverse).round().clamp(0, 15)
    u = ((values * inverse[..., None]).round() + zero[..., None]).clamp(0, 15)
    u = F.pad(u.view(n, groups * group_size)[:, :k].to(torch.uint8), (0, k % 2))
    return u[:, ::2] | (u[:, 1::2] << 4), scale, zero.to(torch.uint8)


def dequantize_weight_int4(
    qweight: Tensor, weight_scale: Tensor, weight_zero: Tensor, in_features: int, group_size: int
) -> Tensor:
    """Return the float32 weight that :func:`quantize_weight_int4` made its result stand for.

    Args:
        qweight: uint8 ``[out_features, ceil(in_features / 2)]``.
        weight_scale: bfloat16 ``[out_features, ceil(in_features / group_size)]``.
        weight_zero: uint8 of that shape.
        in_features: number of input features.
        group_size: input features of a group.

    Returns:
        float32 ``[out_features, in_features]``, exactly ``(u - zero) * scale``.

    Raises:
        ValueError: the tensors are not a valid int4 weight.

    Example:
        >>> import torch, torchweld as tw
        >>> weight = tw.ops.quantize_weight_int4(torch.tensor([[7.0, 0.0, -8.0]]), 8)
        >>> tw.ops.dequantize_weight_int4(*weight, in_features=3, group_size=8).tolist()
        [[7.0, 0.0, -8.0]]
    """
    _check("dequantize_weight_int4", qweight, weight_scale, weight_zero, in_features, group_size)
    return dequantize_int4(qweight, weight_scale, weight_zero, in_features, group_size)


def pack_weight_int4(
    qweight: Tensor, weight_scale: Tensor, weight_zero: Tensor, in_features: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay an int4 weight out for the kernels.

    Args:
        qweight: uint8 ``[out_features, ceil(in_features / 2)]``.
        weight_scale: bfloat16 ``[out_features, ceil(in_features / group_size)]``.
        weight_zero: uint8 of that shape.
        in_features: number of input features.
        group_size: input features of a group.

    Returns:
        ``packed_weight``, uint8 ``[ceil(out_features / 16), groups * group_size / 8, 16, 4]``, and
        scales and zeros as ``[ceil(out_features / 16), groups, 16]``. Byte ``i`` of an octet ``j``
        holds input feature ``8 j + i`` in the low bits and ``8 j + 4 + i`` in the high ones. The
        layout is the same for every instruction set.

    Raises:
        ValueError: a shape, dtype or size is not as above, a scale is negative or not finite, a
            zero is more than 15, or the half byte beyond an odd ``in_features`` is not 0.

    Example:
        >>> import torch, torchweld as tw
        >>> weight = tw.ops.quantize_weight_int4(torch.randn(10, 100), group_size=32)
        >>> packed, scale, zero = tw.ops.pack_weight_int4(*weight, in_features=100, group_size=32)
        >>> packed.shape, scale.shape
        (torch.Size([1, 16, 16, 4]), torch.Size([1, 4, 16]))
    """
    _check("pack_weight_int4", qweight, weight_scale, weight_zero, in_features, group_size)
    n = qweight.shape[0]
    panels, groups = -(-n // PANEL), _groups(in_features, group_size)
    rows = panels * PANEL - n
    u = _unpack_nibbles(qweight)[:, :in_features]
    u = F.pad(u, (0, groups * group_size - in_features, 0, rows))
    octets = groups * group_size // OCTET
    low, high = u.view(panels, PANEL, octets, 2, OCTET // 2).unbind(3)
    packed = place_packed((low | (high << 4)).transpose(1, 2))

    def pack(of_group: Tensor) -> Tensor:
        padded = F.pad(of_group, (0, 0, 0, rows)).view(panels, PANEL, groups)
        return padded.transpose(1, 2).contiguous()

    return packed, pack(weight_scale), pack(weight_zero)


def unpack_weight_int4(
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    in_features: int,
    out_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors :func:`pack_weight_int4` was given.

    Args:
        packed_weight: uint8 ``[ceil(out_features / 16), groups * group_size / 8, 16, 4]``.
        weight_scale: bfloat16 ``[ceil(out_features / 16), groups, 16]``.
        weight_zero: uint8 of that shape.
        in_features: number of input features.
        out_features: number of output features.

    Returns:
        New contiguous tensors ``qweight``, ``weight_scale`` and ``weight_zero``.

    Example:
        >>> import torch, torchweld as tw
        >>> weight = tw.ops.quantize_weight_int4(torch.randn(10, 100), group_size=32)
        >>> packed = tw.ops.pack_weight_int4(*weight, in_features=100, group_size=32)
        >>> unpacked = tw.ops.unpack_weight_int4(*packed, in_features=100, out_features=10)
        >>> all(torch.equal(a, b) for a, b in zip(weight, unpacked))
        True
    """
    panels, octets = packed_weight.shape[:2]
    by_column = packed_weight.transpose(1, 2)
    u = torch.stack((by_column & 15, by_column >> 4), 3).reshape(panels * PANEL, octets * OCTET)
    u = F.pad(u[:out_features, :in_features], (0, in_features % 2))

    def unpack(of_group: Tensor) -> Tensor:
        columns = of_group.transpose(1, 2).reshape(panels * PANEL, of_group.shape[1])
        return columns[:out_features].clone(memory_format=torch.contiguous_format)

    return u[:, ::2] | (u[:, 1::2] << 4), unpack(weight_scale), unpack(weight_zero)


def dequantize_int4(
    qweight: Tensor, weight_scale: Tensor, weight_zero: Tensor, in_features: int, group_size: int
) -> Tensor:
    """:func:`dequantize_weight_int4` of what is known to be valid."""
    u = _unpack_nibbles(qweight)[:, :in_features]
    of_k = torch.arange(in_features, device=qweight.device) // group_size
    return (u.float() - weight_zero.float()[:, of_k]) * weight_scale.float()[:, of_k]


def invalid_group_size(group_size: int, in_features: int) -> str | None:
    """Say why a group cannot have this size ("expected ..., got ..."), or None if it can."""
    most = min(max(-(-in_features // OCTET) * OCTET, _USUAL_GROUP_SIZE), MAX_GROUP_SIZE)
    is_int = isinstance(group_size, int)
    if is_int and group_size % OCTET == 0 and OCTET <= group_size <= most:
        return None
    return (
        f"expected a multiple of {OCTET} from {OCTET} to {most} for {in_features} input features, "
        f"got {group_size!r}"
    )


def invalid_qweight_int4(
    qweight: Tensor, weight_scale: Tensor, weight_zero: Tensor, in_features: int, group_size: int
) -> str | None:
    """Say why tensors cannot be an int4 weight ("argument: expected ..., got ..."), or None."""
    problem = invalid_group_size(group_size, in_features)
    if problem:
        return f"group_size: {problem}"
    if (
        qweight.dtype != torch.uint8
        or qweight.dim() != 2
        or qweight.shape[1] != -(-in_features // 2)
    ):
        return (
            f"qweight: expected uint8 [out_features, {-(-in_features // 2)}], got {qweight.dtype} "
            f"{list(qweight.shape)}"
        )
    shape = [qweight.shape[0], _groups(in_features, group_size)]
    for name, tensor, dtype in (
        ("weight_scale", weight_scale, torch.bfloat16),
        ("weight_zero", weight_zero, torch.uint8),
    ):
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            return f"{name}: expected {dtype} {shape}, got {tensor.dtype} {list(tensor.shape)}"
    if qweight.is_meta or weight_scale.is_meta or weight_zero.is_meta:
        return None
    if not bool((weight_scale.isfinite() & (weight_scale >= 0)).all()):
        return "weight_scale: expected finite values from 0 on, got negative ones, NaN or infinity"
    if bool((weight_zero > 15).any()):
        return f"weight_zero: expected values within 0 to 15, got {int(weight_zero.max())}"
    if in_features % 2 and bool((qweight[:, -1] > 15).any()):
        return "qweight: expected 0 in the half bytes beyond in_features, got other values"
    return None


def _check(name: str, *weight: Tensor | int) -> None:
    problem = invalid_qweight_int4(*weight)  # type: ignore[arg-type]
    if problem:
        raise ValueError(f"{name}: {problem}")


def _groups(in_features: int, group_size: int) -> int:
    return -(-in_features // group_size)


def _unpack_nibbles(qweight: Tensor) -> Tensor:
    """uint8 of twice the columns."""
    return torch.stack((qweight & 15, qweight >> 4), 2).flatten(1)

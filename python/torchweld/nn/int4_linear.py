"""The linear layer with an int4 weight."""

# No postponed annotations here: TorchScript evaluates those of the buffers.
from typing import Optional

import torch
from torch import Tensor, nn
from typing_extensions import Self

from torchweld.nn.integer_linear import IntegerLinear, infer
from torchweld.nn.quantized_linear import fake_quantized
from torchweld.ops.quantized_linear_int4 import (
    dequantize_weight_int4,
    invalid_group_size,
    invalid_qweight_int4,
    pack_weight_int4,
    quantize_weight_int4,
    unpack_weight_int4,
)


class Int4Linear(IntegerLinear):
    """A linear layer with an int4 weight in groups, and activations quantized to int8 on the fly.

    Computes ``activation(input @ weight.T + bias) + residual``; see
    :func:`torchweld.ops.quantized_linear_int4` for the arithmetic. Build it from a float layer with
    :meth:`from_float`; the constructor makes a layer of zeros to load a state_dict into.

    The ``state_dict`` holds ``qweight`` (uint8 ``[out_features, ceil(in_features / 2)]``, two
    values a byte), ``weight_scale`` (bfloat16 ``[out_features, groups]``), ``weight_zero`` (uint8,
    the same shape) and ``bias``: a value is ``(u - zero) * scale``. Memory and TorchScript files
    hold all three only in the layout of the kernels.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether there is a bias.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        device: device of the tensors.
        dtype: dtype of the bias. Input may be float32, bfloat16 or float16 whatever it is.
        group_size: input features that share a scale and a zero, a multiple of 8.

    Raises:
        ValueError: a size is negative or does not fit, or ``activation`` is unknown.

    Shape:
        ``[..., in_features]`` to ``[..., out_features]``, in the dtype of the input; ``residual``
        is floating point of the output's shape.

    Note:
        ``half()``, ``to(dtype)``, ``type(dtype)`` and the like cast the bias only.
        Input, residual and bias have gradients, the weight has none.

    Example:
        >>> import torch, torchweld as tw
        >>> layer = tw.nn.Int4Linear.from_float(torch.nn.Linear(64, 10), group_size=32)
        >>> layer(torch.randn(3, 64)).shape
        torch.Size([3, 10])
    """

    packed_weight: Tensor
    packed_scale: Tensor
    packed_zero: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "identity",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        group_size: int = 128,
    ):
        super().__init__(in_features, out_features, bias, activation, device, dtype)
        problem = invalid_group_size(group_size, in_features)
        if problem:
            raise ValueError(f"Int4Linear: group_size: {problem}")
        self.group_size = group_size
        groups, pairs = -(-in_features // group_size), -(-in_features // 2)
        u8, n = torch.uint8, out_features
        self._register(
            {
                "qweight": torch.zeros(n, pairs, dtype=u8, device=device),
                "weight_scale": torch.ones(n, groups, dtype=torch.bfloat16, device=device),
                "weight_zero": torch.zeros(n, groups, dtype=u8, device=device),
            }
        )

    @classmethod
    def from_float(
        cls, linear: nn.Module, activation: str = "identity", *, group_size: int = 128
    ) -> Self:
        """Quantize a float layer. The new module shares no memory with it.

        Args:
            linear: an ``nn.Linear``, or what has ``weight`` and ``bias`` like one; read once.
            activation: applied to the result, as in the constructor.
            group_size: as in the constructor.

        Returns:
            The quantized layer, on the same device and in the same train/eval mode.

        Raises:
            ValueError: the weight or the bias holds a NaN or an infinity, is float64 or not
                floating point, or ``group_size`` does not fit.
        """
        return cls._from_float(linear, activation, group_size=group_size)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """``qweight``, ``weight_scale`` and ``weight_zero``."""
        return _named(quantize_weight_int4(weight, self.group_size))

    def packed(self, canonical: dict[str, Tensor]) -> dict[str, Tensor]:
        """The nibbles, scales and zeros in panels."""
        packed = pack_weight_int4(*_weight(canonical), self.in_features, self.group_size)
        return dict(zip(("packed_weight", "packed_scale", "packed_zero"), packed, strict=True))

    def canonical(self) -> dict[str, Tensor]:
        """``qweight``, ``weight_scale`` and ``weight_zero``: copies."""
        return _named(
            unpack_weight_int4(
                self.packed_weight,
                self.packed_scale,
                self.packed_zero,
                self.in_features,
                self.out_features,
            )
        )

    def weight(self) -> Tensor:
        """Return the weight the integers stand for: float32 ``[out_features, in_features]``.

        A method, as in ``torch.ao.nn.quantized``: there is no float weight to be read or written.
        """
        weight = _weight(self.canonical())
        return dequantize_weight_int4(*weight, self.in_features, self.group_size)

    def rounded(self, input: Tensor) -> Tensor:
        """Return the input as the product sees it, in float32: what of it rounding leaves."""
        return fake_quantized(input, 0)

    def invalid(self, canonical: dict[str, Tensor]) -> list[str]:
        """What is wrong with tensors read from a state_dict: "name: expected ..., got ..."."""
        weight = _weight(canonical)
        problem = invalid_qweight_int4(*weight, self.in_features, self.group_size)
        rows = len(canonical["qweight"]) if canonical["qweight"].dim() else 0
        if not problem and rows != self.out_features:
            problem = f"qweight: expected {self.out_features} rows, got {rows}"
        return [problem] if problem else []

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """Apply the layer to ``[..., in_features]`` and add ``residual``."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            inferred = self._infer(input, residual)
            if inferred is not None:
                return inferred
        output: Tensor = torch.ops.torchweld.quantized_linear_int4(
            input,
            self.packed_weight,
            self.packed_scale,
            self.packed_zero,
            self.bias,
            residual,
            self.in_features,
            self.out_features,
            self.activation,
        )
        return output

    @torch.jit.unused
    def _infer(self, input: Tensor, residual: Optional[Tensor]) -> Optional[Tensor]:  # noqa: UP045
        return infer(
            torch.ops.torchweld.quantized_linear_int4.default,
            self,
            ("packed_weight", "packed_scale", "packed_zero"),
            input,
            residual,
            self.in_features,
            self.out_features,
            self.activation,
        )

    def extra_repr(self) -> str:
        """Sizes and activation, as ``print(module)`` shows them."""
        return f"{super().extra_repr()}, group_size={self.group_size}"


_NAMES = ("qweight", "weight_scale", "weight_zero")


def _weight(canonical: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    qweight, scale, zero = (canonical[name] for name in _NAMES)
    return qweight, scale, zero


def _named(weight: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(_NAMES, weight, strict=True))

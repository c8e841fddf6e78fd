"""The linear layers with an int8 weight, with quantized and with float activations."""

# No postponed annotations here: TorchScript evaluates those of the buffers.
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from torchweld.nn.integer_linear import IntegerLinear, infer
from torchweld.ops.quantized_linear import (
    MAX_IN_FEATURES,
    QUAD,
    invalid_qweight,
    pack_weight,
    quantize_weight,
    scale_of,
    unpack_weight,
)

# Sums of more products of a group could overflow int32.
_MAX_GROUP_SIZE = 1 << 16


class _Int8Linear(IntegerLinear):
    """What both layers with an int8 weight share: they read each other's state_dict."""

    packed_weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "identity",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, activation, device, dtype)
        if in_features > MAX_IN_FEATURES:
            raise ValueError(
                f"{type(self).__name__}: in_features: expected 0 to {MAX_IN_FEATURES}, got "
                f"{in_features}"
            )
        qweight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        scale = torch.ones(out_features, dtype=torch.float32, device=device)
        self._register({"qweight": qweight, "weight_scale": scale})

    @classmethod
    def from_integers(
        cls,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        activation: str = "identity",
        **options: Any,
    ) -> Self:
        """Build a layer of a weight that is quantized already. It shares no memory with it.

        Args:
            qweight: int8 ``[out_features, in_features]`` within [-127, 127].
            weight_scale: positive float32 ``[out_features]``.
            bias: floating point ``[out_features]``, or None.
            activation: as in the constructor.
            options: other arguments of the constructor.

        Raises:
            ValueError: a tensor is not as above, or ``activation`` is unknown.
        """
        where = f"{cls.__name__}.from_integers: "
        if qweight.dim() != 2:
            raise ValueError(
                f"{where}qweight: expected int8 [out_features, in_features], got {qweight.dtype} "
                f"{list(qweight.shape)}"
            )
        n, k = qweight.shape
        module = cls(k, n, False, activation, device="meta", **options)
        canonical = {"qweight": qweight, "weight_scale": weight_scale}
        for problem in module.invalid(canonical):
            raise ValueError(where + problem)
        like = nn.Module()
        like.bias = bias  # type: ignore[assignment]
        canonical["weight_scale"] = weight_scale.detach().clone()
        return module._set(canonical, like, where.removesuffix(": "))

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """``qweight`` and ``weight_scale``."""
        qweight, scale = quantize_weight(weight)
        return {"qweight": qweight, "weight_scale": scale}

    def packed(self, canonical: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weight in panels, and its scales."""
        packed, _ = pack_weight(canonical["qweight"])
        return {"packed_weight": packed, "weight_scale": canonical["weight_scale"].contiguous()}

    def canonical(self) -> dict[str, Tensor]:
        """``qweight`` int8 ``[N, K]`` and ``weight_scale`` float32 ``[N]``."""
        return {"qweight": self.qweight(), "weight_scale": self.weight_scale}

    def qweight(self) -> Tensor:
        """Return the weight as int8 ``[out_features, in_features]``, a copy."""
        return unpack_weight(self.packed_weight, self.out_features, self.in_features)

    def weight(self) -> Tensor:
        """Return the weight the integers stand for: float32 ``[out_features, in_features]``.

        A method, as in ``torch.ao.nn.quantized``: there is no float weight to be read or written.
        """
        return self.qweight() * self.weight_scale[:, None]

    def invalid(self, canonical: dict[str, Tensor]) -> list[str]:
        """What is wrong with tensors read from a state_dict: "name: expected ..., got ..."."""
        problems = []
        qweight, scale = canonical["qweight"], canonical["weight_scale"]
        problem = invalid_qweight(qweight)
        shape = [self.out_features, self.in_features]
        if not problem and list(qweight.shape) != shape:
            problem = f"expected int8 {shape}, got {list(qweight.shape)}"
        if problem:
            problems.append(f"qweight: {problem}")
        got = None
        if scale.dtype != torch.float32 or list(scale.shape) != [self.out_features]:
            got = f"{scale.dtype} {list(scale.shape)}"
        elif not scale.is_meta and not bool((scale.isfinite() & (scale > 0)).all()):
            got = "a zero, negative or non-finite scale"
        if got:
            problems.append(
                f"weight_scale: expected positive float32 [{self.out_features}], got {got}"
            )
        return problems


class QuantizedLinear(_Int8Linear):
    """A linear layer with an int8 weight and activations quantized to int8 on the fly.

    Computes ``activation(input @ weight.T + bias) + residual``; see
    :func:`torchweld.ops.quantized_linear` for the arithmetic. Build it from a float layer with
    :meth:`from_float`; the constructor makes a layer of zeros to load a state_dict into.

    The ``state_dict`` holds ``qweight`` (int8 ``[out_features, in_features]``), ``weight_scale``
    (float32 ``[out_features]``) and ``bias``. Memory and TorchScript files hold the weight only in
    the layout of the kernels, so ``qweight`` is a copy made for the occasion, and loading packs it.

    Args:
        in_features: size of each input row, at most 16777216.
        out_features: size of each output row.
        bias: whether there is a bias.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        device: device of the tensors.
        dtype: dtype of the bias. Input may be float32, bfloat16 or float16 whatever it is.
        input_group_size: input features that share a scale of the input; 0: all of a row do.

    Raises:
        ValueError: a size is negative or too large, or ``activation`` is unknown.

    Shape:
        ``[..., in_features]`` to ``[..., out_features]``, in the dtype of the input; ``residual``
        is floating point of the output's shape.

    Note:
        ``half()``, ``to(dtype)``, ``type(dtype)`` and the like cast the bias only.
        Input, residual and bias have gradients, the weight has none.

    Example:
        >>> import torch, torchweld as tw
        >>> layer = tw.nn.QuantizedLinear.from_float(torch.nn.Linear(64, 10), activation="relu")
        >>> layer(torch.randn(3, 64)).shape
        torch.Size([3, 10])
    """

    weight_sum: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "identity",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        input_group_size: int = 0,
    ):
        problem = invalid_input_group_size(input_group_size)
        if problem:
            raise ValueError(f"QuantizedLinear: input_group_size: {problem}")
        super().__init__(in_features, out_features, bias, activation, device, dtype)
        self.input_group_size = input_group_size

    @classmethod
    def from_float(
        cls, linear: nn.Module, activation: str = "identity", *, input_group_size: int = 0
    ) -> Self:
        """Quantize a float layer. The new module shares no memory with it.

        Args:
            linear: an ``nn.Linear``, or what has ``weight`` and ``bias`` like one; read once.
            activation: applied to the result, as in the constructor.
            input_group_size: as in the constructor.

        Returns:
            The quantized layer, on the same device and in the same train/eval mode.

        Raises:
            ValueError: the weight or the bias holds a NaN or an infinity, is float64 or not
                floating point, or has more than 16777216 columns.
        """
        return cls._from_float(linear, activation, input_group_size=input_group_size)

    def packed(self, canonical: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weight in panels, its scales, and its sums."""
        packed, weight_sum = pack_weight(canonical["qweight"])
        scale = canonical["weight_scale"].contiguous()
        return {"packed_weight": packed, "weight_scale": scale, "weight_sum": weight_sum}

    def rounded(self, input: Tensor) -> Tensor:
        """Return the input as the product sees it, in float32: what of it rounding leaves."""
        return fake_quantized(input, self.input_group_size)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """Apply the layer to ``[..., in_features]`` and add ``residual``."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            inferred = self._infer(input, residual)
            if inferred is not None:
                return inferred
        output: Tensor = torch.ops.torchweld.quantized_linear(
            input,
            self.packed_weight,
            self.weight_scale,
            self.weight_sum,
            self.bias,
            residual,
            self.in_features,
            self.activation,
            self.input_group_size,
        )
        return output

    @torch.jit.unused
    def _infer(self, input: Tensor, residual: Optional[Tensor]) -> Optional[Tensor]:  # noqa: UP045
        return infer(
            torch.ops.torchweld.quantized_linear.default,
            self,
            ("packed_weight", "weight_scale", "weight_sum"),
            input,
            residual,
            self.in_features,
            self.activation,
            self.input_group_size,
        )

    def extra_repr(self) -> str:
        """Sizes and activation, as ``print(module)`` shows them."""
        groups = f", input_group_size={self.input_group_size}" if self.input_group_size else ""
        return super().extra_repr() + groups


class WeightOnlyLinear(_Int8Linear):
    """A linear layer with an int8 weight and activations that stay float.

    Computes ``activation(input @ weight.T + bias) + residual``; see
    :func:`torchweld.ops.weight_only_linear` for the arithmetic. The weight is that of
    :class:`QuantizedLinear`, in memory, in files and in a ``state_dict``, which may be loaded into
    either.

    Args:
        in_features: size of each input row, at most 16777216.
        out_features: size of each output row.
        bias: whether there is a bias.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        device: device of the tensors.
        dtype: dtype of the bias. Input may be float32, bfloat16 or float16 whatever it is.

    Raises:
        ValueError: a size is negative or too large, or ``activation`` is unknown.

    Shape:
        ``[..., in_features]`` to ``[..., out_features]``, in the dtype of the input; ``residual``
        is floating point of the output's shape.

    Note:
        ``half()``, ``to(dtype)``, ``type(dtype)`` and the like cast the bias only.
        Input, residual and bias have gradients, the weight has none.

    Example:
        >>> import torch, torchweld as tw
        >>> layer = tw.nn.WeightOnlyLinear.from_float(torch.nn.Linear(64, 10))
        >>> layer(torch.randn(3, 64), residual=torch.randn(3, 10)).shape
        torch.Size([3, 10])
    """

    @classmethod
    def from_float(cls, linear: nn.Module, activation: str = "identity") -> Self:
        """Quantize a float layer, as :meth:`QuantizedLinear.from_float` does."""
        return cls._from_float(linear, activation)

    def rounded(self, input: Tensor) -> Tensor:
        """Return the input, which is not rounded."""
        return input.float()

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """Apply the layer to ``[..., in_features]`` and add ``residual``."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            inferred = self._infer(input, residual)
            if inferred is not None:
                return inferred
        output: Tensor = torch.ops.torchweld.weight_only_linear(
            input,
            self.packed_weight,
            self.weight_scale,
            self.bias,
            residual,
            self.in_features,
            self.activation,
        )
        return output

    @torch.jit.unused
    def _infer(self, input: Tensor, residual: Optional[Tensor]) -> Optional[Tensor]:  # noqa: UP045
        return infer(
            torch.ops.torchweld.weight_only_linear.default,
            self,
            ("packed_weight", "weight_scale"),
            input,
            residual,
            self.in_features,
            self.activation,
        )


def fake_quantized(input: Tensor, group_size: int) -> Tensor:
    """What quantizing an input to int8 and back gives, in float32: as the kernels define it."""
    k = input.shape[-1]
    size = group_size or max(k, 1)
    # A row quantizes as a row of a weight does; the last group's missing values are zeros.
    rows = F.pad(input.detach().float(), (0, -k % size)).reshape(-1, size)
    scale = scale_of(rows.abs().amax(1))[:, None]
    rounded = (rows * (1 / scale)).round() * scale
    return rounded.view(*input.shape[:-1], k + -k % size)[..., :k]


def invalid_input_group_size(size: int) -> str | None:
    """Say why inputs cannot be scaled in groups of a size ("expected ..., got ..."), or None."""
    if isinstance(size, int) and 0 <= size <= _MAX_GROUP_SIZE and size % QUAD == 0:
        return None
    return (
        f"expected 0, for a scale per row, or a multiple of {QUAD} up to {_MAX_GROUP_SIZE}, got "
        f"{size!r}"
    )

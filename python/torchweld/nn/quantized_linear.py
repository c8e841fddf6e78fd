"""The int8 linear layer as a module."""

# No postponed annotations here: TorchScript evaluates those of the buffers.
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchweld.ops.quantized_linear import (
    ACTIVATIONS,
    MAX_IN_FEATURES,
    PANEL,
    QUAD,
    invalid_qweight,
    pack_weight,
    quantize_weight,
    unpack_weight,
)

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


class QuantizedLinear(nn.Module):
    """A linear layer with an int8 weight and activations quantized to int8 on the fly.

    Computes ``activation(input @ weight.T + bias)``; see
    :func:`torchweld.ops.quantized_linear` for the arithmetic. Build it from a float layer with
    :meth:`from_float`; the constructor makes a layer of zeros to load a state_dict into.

    The ``state_dict`` holds ``qweight`` (int8 ``[out_features, in_features]``), ``weight_scale``
    (float32 ``[out_features]``) and ``bias``. Memory and TorchScript files hold the weight only in
    the layout of the kernels, so ``qweight`` is a copy made for the occasion, and loading packs it.

    Args:
        in_features: size of each input row, at most 133144.
        out_features: size of each output row.
        bias: whether there is a bias.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        device: device of the tensors.
        dtype: dtype of the bias. Input may be float32, bfloat16 or float16 whatever it is.

    Raises:
        ValueError: a size is negative or too large, or ``activation`` is unknown.

    Shape:
        ``[..., in_features]`` to ``[..., out_features]``, in the dtype of the input.

    Note:
        ``half()``, ``to(dtype)``, ``type(dtype)`` and the like cast the bias only.
        The input and the bias have gradients, the weight has none.

    Example:
        >>> import torch, torchweld as tw
        >>> layer = tw.nn.QuantizedLinear.from_float(torch.nn.Linear(64, 10), activation="relu")
        >>> layer(torch.randn(3, 64)).shape
        torch.Size([3, 10])
    """

    packed_weight: Tensor
    weight_scale: Tensor
    weight_sum: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "identity",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 0 <= in_features <= MAX_IN_FEATURES:
            raise ValueError(
                f"QuantizedLinear: in_features: expected 0 to {MAX_IN_FEATURES}, got {in_features}"
            )
        if out_features < 0:
            raise ValueError(
                f"QuantizedLinear: out_features: expected 0 or more, got {out_features}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"QuantizedLinear: activation: expected one of {', '.join(ACTIVATIONS)}, got "
                f"{activation!r}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        panels, quads = -(-out_features // PANEL), -(-in_features // QUAD)
        packed = torch.zeros(panels, quads, PANEL, QUAD, dtype=torch.int8, device=device)
        weight_sum = torch.zeros(panels * PANEL, dtype=torch.int32, device=device)
        self.register_buffer("packed_weight", packed, persistent=False)
        self.register_buffer("weight_sum", weight_sum, persistent=False)
        self.register_buffer("weight_scale", torch.ones(out_features, device=device))
        self.weight_scale = self.weight_scale.float()
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_float(cls, linear: nn.Linear, activation: str = "identity") -> "QuantizedLinear":
        """Quantize a float layer. The new module shares no memory with it.

        Args:
            linear: the layer; its weight is read once.
            activation: applied to the result, as in the constructor.

        Returns:
            The quantized layer, on the same device and in the same train/eval mode.

        Raises:
            ValueError: the weight or the bias holds a NaN or an infinity, is float64 or not
                floating point, or has more than 133144 columns.
        """
        if linear.weight.dtype == torch.float64:
            raise ValueError(
                "QuantizedLinear.from_float: linear.weight: expected float32, bfloat16 or float16, "
                "got torch.float64"
            )
        if linear.bias is not None and not bool(linear.bias.isfinite().all()):
            raise ValueError(
                "QuantizedLinear.from_float: linear.bias: expected finite values, got NaN or "
                "infinity"
            )
        qweight, weight_scale = quantize_weight(linear.weight)
        out_features, in_features = qweight.shape
        has_bias = linear.bias is not None
        module = cls(in_features, out_features, has_bias, activation, device="meta")
        module.packed_weight, module.weight_sum = pack_weight(qweight)
        module.weight_scale = weight_scale
        if has_bias:
            bias = linear.bias.detach().clone()
            module.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
        return module.train(linear.training)

    def to_float(self) -> nn.Module:
        """Return a float layer with the dequantized weight.

        Returns:
            An ``nn.Linear`` in the dtype of the bias, float32 without one; with an activation, an
            ``nn.Sequential`` of it and the activation. Shares no memory with this module.
        """
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        device = self.weight_scale.device
        has_bias = self.bias is not None
        linear: nn.Linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, has_bias, device=device, dtype=dtype
        )
        with torch.no_grad():
            linear.weight.copy_(self.qweight() * self.weight_scale[:, None])
            if self.bias is not None:
                linear.bias.copy_(self.bias)
                linear.bias.requires_grad_(self.bias.requires_grad)
        linear.train(self.training)
        if self.activation == "identity":
            return linear
        return nn.Sequential(linear, _ACTIVATION_MODULES[self.activation]()).train(self.training)

    def qweight(self) -> Tensor:
        """Return the weight as int8 ``[out_features, in_features]``, a copy."""
        return unpack_weight(self.packed_weight, self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``[..., in_features]``."""
        output: Tensor = torch.ops.torchweld.quantized_linear(
            input,
            self.packed_weight,
            self.weight_scale,
            self.weight_sum,
            self.bias,
            None,
            self.in_features,
            self.activation,
        )
        return output

    def extra_repr(self) -> str:
        """Sizes and activation, as ``print(module)`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        # half() casts the scales, type(dtype) the integers too: keep the device, undo the cast.
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "qweight"] = self.qweight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if prefix + "weight" in state_dict and prefix + "qweight" not in state_dict:
            error_msgs.append(
                f"{prefix}qweight: expected the state_dict of a QuantizedLinear, got one of a "
                "float layer; load it into the float model and convert that with torchweld.quantize"
            )
            return
        problems = self._problems(state_dict, prefix)
        if problems:  # then nothing of this module is loaded
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "qweight"
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        if key not in state_dict:
            if strict:
                missing_keys.append(key)
            return
        packed, weight_sum = pack_weight(state_dict[key].detach())
        if local_metadata.get("assign_to_params_buffers", False):
            self.packed_weight, self.weight_sum = packed, weight_sum
        else:
            self.packed_weight.copy_(packed)
            self.weight_sum.copy_(weight_sum)

    def _problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        problems = []
        qweight = state_dict.get(prefix + "qweight")
        if qweight is not None:
            problem = invalid_qweight(qweight)
            shape = [self.out_features, self.in_features]
            if not problem and list(qweight.shape) != shape:
                problem = f"expected int8 {shape}, got {list(qweight.shape)}"
            if problem:
                problems.append(f"{prefix}qweight: {problem}")
        scale = state_dict.get(prefix + "weight_scale")
        if scale is not None:
            got = None
            if scale.dtype != torch.float32 or list(scale.shape) != [self.out_features]:
                got = f"{scale.dtype} {list(scale.shape)}"
            elif not scale.is_meta and not bool((scale.isfinite() & (scale > 0)).all()):
                got = "a zero, negative or non-finite scale"
            if got:
                problems.append(
                    f"{prefix}weight_scale: expected positive float32 [{self.out_features}], "
                    f"got {got}"
                )
        return problems

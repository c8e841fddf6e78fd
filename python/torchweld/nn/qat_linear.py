"""Training a linear layer as it will run quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchweld._dispatch.linear import activation_gradient
from torchweld.nn.int4_linear import Int4Linear
from torchweld.nn.integer_linear import IntegerLinear, float_layer
from torchweld.nn.quantized_linear import QuantizedLinear, WeightOnlyLinear

Kind = type[QuantizedLinear] | type[WeightOnlyLinear] | type[Int4Linear]

_KINDS = (QuantizedLinear, WeightOnlyLinear, Int4Linear)


class QATLinear(nn.Linear):
    """An ``nn.Linear`` that computes, bit for bit, what it will after quantization.

    Each call quantizes the float weight and runs the deployed layer, so there is nothing that
    training sees and deployment does not. Rounding counts as the identity in the backward
    (straight-through estimator): the gradients are those of a linear layer with the rounded weight
    and the rounded input. Parameters, state_dict and optimizer are those of an ``nn.Linear``.
    Prepare a model with :func:`torchweld.prepare_qat`; :func:`torchweld.quantize` then makes each
    of these layers the deployed one.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether there is a bias.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        kind: the deployed layer: :class:`QuantizedLinear`, :class:`WeightOnlyLinear` or
            :class:`Int4Linear`.
        options: arguments of its ``from_float``, such as ``{"group_size": 32}``.
        device: device of the parameters.
        dtype: dtype of the parameters: float32, bfloat16 or float16.

    Raises:
        TypeError: ``kind`` is none of the three.
        ValueError: a size, ``activation`` or an option does not fit.

    Note:
        A weight that is no longer finite raises ValueError in the forward. Gradients of gradients
        are refused. ``torch.compile`` runs a call outside of its graph.

    Reference:
        https://arxiv.org/abs/1308.3432; https://arxiv.org/abs/1712.05877.

    Example:
        >>> import torch, torchweld as tw
        >>> layer = tw.nn.QATLinear(64, 10)
        >>> x = torch.randn(3, 64)
        >>> layer(x).sum().backward()
        >>> torch.equal(layer(x), layer.deployed()(x))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "identity",
        kind: Kind = QuantizedLinear,
        options: dict[str, Any] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        if kind not in _KINDS:
            names = ", ".join(kind.__name__ for kind in _KINDS)
            raise TypeError(f"QATLinear: kind: expected one of {names}, got {kind!r}")
        options = dict(options or {})
        kind(in_features, out_features, bias, activation, device="meta", **options)  # checks
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation, self.kind, self.options = activation, kind, options

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        activation: str = "identity",
        kind: Kind = QuantizedLinear,
        options: dict[str, Any] | None = None,
    ) -> QATLinear:
        """Build one from a float layer. It shares no memory with it.

        Args:
            linear: an ``nn.Linear``, or what has ``weight`` and ``bias`` like one.
            activation: as in the constructor.
            kind: as in the constructor.
            options: as in the constructor.
        """
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        n, k = weight.shape
        module = cls(k, n, bias is not None, activation, kind, options, device="meta")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                assert isinstance(tensor, Tensor)
                copy = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
                setattr(module, name, copy)
        return module.train(linear.training)

    def deployed(self) -> IntegerLinear:
        """Return the layer that a quantized model has in this one's place."""
        return self.kind.from_float(self, self.activation, **self.options)

    def to_float(self) -> nn.Module:
        """Return a float layer with the weight as it is trained, not rounded.

        Returns:
            An ``nn.Linear``; with an activation, an ``nn.Sequential`` of it and the activation.
            Shares no memory with this module.
        """
        return float_layer(self.weight, self.bias, self.activation).train(self.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the layer to ``[..., in_features]`` and add ``residual``."""
        return _through(self, input, residual)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Sizes and what is trained for, as ``print(module)`` shows them."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return (
            f"{super().extra_repr()}, activation={self.activation!r}, "
            f"kind={self.kind.__name__}{options}"
        )


@torch.compiler.disable
def _through(layer: QATLinear, input: Tensor, residual: Tensor | None) -> Tensor:
    deployed = layer.deployed().requires_grad_(False)
    output: Tensor = _StraightThrough.apply(input, layer.weight, layer.bias, residual, deployed)
    return output


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        deployed: IntegerLinear,
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.deployed = deployed
        ctx.dtypes = [None if x is None else x.dtype for x in (input, weight, bias, residual)]
        output: Tensor = deployed(input, residual)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "QATLinear: expected to be differentiated once, got a second derivative "
                "(create_graph=True)"
            )
        (input,) = ctx.saved_tensors
        layer: IntegerLinear = ctx.deployed
        before = grad.float()  # of what goes into the activation
        if layer.activation != "identity":
            activation, layer.activation = layer.activation, "identity"
            before = activation_gradient(activation, before, layer(input).float())
            layer.activation = activation
        rows = before.flatten(0, -2) if before.dim() > 1 else before[None]
        grads: list[Tensor | None] = [None] * 4
        if ctx.needs_input_grad[0]:
            grads[0] = before @ layer.weight()
        if ctx.needs_input_grad[1]:
            seen = layer.rounded(input)
            grads[1] = rows.T @ seen.reshape(-1, layer.in_features)
        if ctx.needs_input_grad[2]:
            grads[2] = rows.sum(0)
        if ctx.needs_input_grad[3]:
            grads[3] = grad
        return *(g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)), None

"""What the linear layers with an integer weight share: sizes, bias, state_dict, casts."""

# No postponed annotations here: TorchScript evaluates those of the attributes.
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import Self

from torchweld.ops.quantized_linear import ACTIVATIONS, place_packed

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


class IntegerLinear(nn.Module):
    """Base of the linear layers whose weight is integers in the layout of the kernels.

    A subclass says which tensors a weight consists of, in two forms: the canonical ones, which a
    state_dict holds, and the packed ones, the buffers, which memory and TorchScript files hold.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether there is a bias.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        device: device of the tensors.
        dtype: dtype of the bias.

    Raises:
        ValueError: a size is negative or too large, or ``activation`` is unknown.

    Note:
        ``half()``, ``to(dtype)``, ``type(dtype)`` and the like cast the bias only.
        Input, residual and bias have gradients, the weight has none.
    """

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
        name = type(self).__name__
        for size, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 0:
                raise ValueError(f"{name}: {size}: expected 0 or more, got {value}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{name}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    # --- what a subclass defines ------------------------------------------------------------------

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """Canonical tensors of a float weight ``[out_features, in_features]``."""
        raise NotImplementedError

    def packed(self, canonical: dict[str, Tensor]) -> dict[str, Tensor]:
        """Buffers that hold what the canonical tensors hold."""
        raise NotImplementedError

    def canonical(self) -> dict[str, Tensor]:
        """Canonical tensors, made from the buffers: copies."""
        raise NotImplementedError

    def invalid(self, canonical: dict[str, Tensor]) -> list[str]:
        """What is wrong with tensors read from a state_dict: "name: expected ..., got ..."."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """Return the weight the integers stand for: float32 ``[out_features, in_features]``.

        A method, as in ``torch.ao.nn.quantized``: there is no float weight to be read or written.
        """
        raise NotImplementedError

    def rounded(self, input: Tensor) -> Tensor:
        """Return the input as the product sees it, in float32: what of it rounding leaves."""
        raise NotImplementedError

    # --- from and to float ------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()  # a weight made in inference mode cannot be detached
    def _from_float(cls, linear: nn.Module, activation: str, **options: Any) -> Self:
        weight = linear.weight
        assert isinstance(weight, Tensor)
        where = f"{cls.__name__}.from_float: linear"
        if weight.dtype == torch.float64:
            raise ValueError(
                f"{where}.weight: expected float32, bfloat16 or float16, got torch.float64"
            )
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"{where}.weight: expected floating point [out_features, in_features], got "
                f"{weight.dtype} {list(weight.shape)}"
            )
        module = cls(weight.shape[1], weight.shape[0], False, activation, device="meta", **options)
        return module._set(module.quantized(weight.detach()), linear, where)

    def _set(self, canonical: dict[str, Tensor], like: nn.Module, where: str) -> Self:
        """Take over canonical tensors, and bias and mode of another layer."""
        bias = like.bias
        if bias is not None:
            assert isinstance(bias, Tensor)
            if not bool(bias.isfinite().all()):
                raise ValueError(f"{where}.bias: expected finite values, got NaN or infinity")
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        for name, tensor in self.packed(canonical).items():
            setattr(self, name, tensor)
        return self.train(like.training)

    def to_float(self) -> nn.Module:
        """Return a float layer with the dequantized weight.

        Returns:
            An ``nn.Linear`` in the dtype of the bias, float32 without one; with an activation, an
            ``nn.Sequential`` of it and the activation. Shares no memory with this module.
        """
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        weight = nn.Parameter(self.weight().to(dtype))
        return float_layer(weight, self.bias, self.activation).train(self.training)

    # --- nn.Module --------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """Sizes and activation, as ``print(module)`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation!r}"
        )

    def _register(self, canonical: dict[str, Tensor]) -> None:
        for name, tensor in self.packed(canonical).items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        # half() casts the scales, type(dtype) the integers too: keep the device, undo the cast.
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is None or after is None:
                continue
            if after.dtype != buffer.dtype:
                self._buffers[name] = after = buffer.to(after.device)
            if name == "packed_weight" and after.is_cpu and not buffer.is_cpu:
                self._buffers[name] = place_packed(after)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor
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
                f"{prefix}qweight: expected the state_dict of a {type(self).__name__}, got one of "
                "a float layer; load it into the float model and convert that with "
                "torchweld.quantize"
            )
            return
        own, assigns = self.canonical(), local_metadata.get("assign_to_params_buffers", False)
        found = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        problems = [
            f"{name}: expected {'a dense tensor' if assigns else 'a dense tensor with data'}, got "
            f"{_kind_of(tensor)}"
            for name, tensor in found.items()
            if not _is_loadable(tensor, own[name], assigns)
        ] or self.invalid(own | found)
        if problems:  # then nothing of this module is loaded
            error_msgs.extend(prefix + problem for problem in problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in own:
            if name not in found and strict:
                missing_keys.append(prefix + name)
            elif prefix + name in unexpected_keys:
                unexpected_keys.remove(prefix + name)
        if not found:
            return
        canonical = {name: tensor.detach() for name, tensor in (own | found).items()}
        for name, tensor in self.packed(canonical).items():
            if assigns:
                setattr(self, name, tensor)
            else:
                getattr(self, name).copy_(tensor)


def infer(
    op: Callable[..., Tensor],
    module: IntegerLinear,
    names: tuple[str, ...],
    input: Tensor,
    residual: Tensor | None,
    *options: Any,
) -> Tensor | None:
    """Call an operator past autograd, which by way of Python takes as long as a small product.

    Args:
        op: takes ``input``, the buffers, the bias of the module, ``residual`` and ``options``.
        module: the layer.
        names: the buffers; the module's own look-up takes long.
        input: as ``op`` takes it.
        residual: likewise.
        options: likewise.

    Returns:
        What the operator does; None, and nothing is called, if somebody could want a gradient of
        this call or a record of it, or keeps what was a buffer elsewhere, as a parametrization.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return None
    try:
        buffers = [module._buffers[name] for name in names]
    except KeyError:
        return None
    with torch._C._AutoDispatchBelowAutograd():
        return op(input, *buffers, module.bias, residual, *options)


def float_layer(weight: Tensor, bias: Tensor | None, activation: str) -> nn.Linear | nn.Sequential:
    """An ``nn.Linear`` of copies of the tensors, and the activation if there is one."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            copy = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            setattr(linear, name, copy)
    if activation == "identity":
        return linear
    return nn.Sequential(linear, _ACTIVATION_MODULES[activation]())


def _is_loadable(value: object, own: Tensor, assigns: bool) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return assigns or own.is_meta or not value.is_meta


def _kind_of(value: object) -> str:
    """What to call a value of a state_dict in an error."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "a meta tensor" if value.is_meta else f"a {value.layout} one"

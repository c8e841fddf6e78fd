"""The kinds of modules that hold linear layers: how to read one, and what to put in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchweld.nn.multihead_attention import MultiheadAttention, projections_of
from torchweld.nn.packed_linear import PackedLinear
from torchweld.nn.qat_linear import Kind, QATLinear
from torchweld.nn.quantized_linear import QuantizedLinear, WeightOnlyLinear
from torchweld.quantization._configs import Config, layer_of


@dataclass(frozen=True)
class Target:
    """What float layers become: the layers of a config, or those that train for it."""

    TRAINING: ClassVar[str] = "qat_linear"

    config: Config
    trains: bool = False

    @property
    def name(self) -> str:
        """Name of the conversion, for reports."""
        return self.TRAINING if self.trains else "quantized_linear"

    @property
    def function(self) -> str:
        """Name of the function that was called, for errors."""
        return "prepare_qat" if self.trains else "quantize"

    @property
    def kind(self) -> Kind:
        """Class of the deployed layer."""
        return layer_of(self.config)[0]

    def convert(self, linear: nn.Module) -> nn.Module:
        """Make the layer of a float one, or of what has weight and bias like one."""
        kind, options = layer_of(self.config)
        if self.trains:
            return QATLinear.from_float(linear, "identity", kind, options)
        return kind.from_float(linear, "identity", **options)


@dataclass(frozen=True)
class Adapter:
    """A kind of module.

    Attributes:
        takes: whether a module is of the kind.
        linears: the linear layers inside, which share its memory; by name, of what replaces it.
        convert: what replaces it.
        note: what the report says beside the class of the new layer.
    """

    takes: Callable[[nn.Module], bool]
    linears: Callable[[nn.Module], dict[str, nn.Linear]]
    convert: Callable[[nn.Module, Target], nn.Module]
    note: Callable[[nn.Module], str] = lambda module: ""


def is_taken(module: nn.Module) -> bool:
    """Whether there is an adapter for a module."""
    return any(adapter.takes(module) for adapter in _ADAPTERS)


def adapter_of(module: nn.Module) -> Adapter:
    """The adapter that takes a module."""
    return next(adapter for adapter in _ADAPTERS if adapter.takes(module))


def is_candidate(module: nn.Module) -> bool:
    """Whether a module is of interest to a report, even where none takes it."""
    if isinstance(module, (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)):
        return True
    return is_conv1d(module) or _is_of_torch_ao(module, ("Linear", "LSTM", "GRU", "RNN"))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of Hugging Face's transformers, which is not imported."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_imported(module: nn.Module) -> bool:
    """Whether a module is a dynamically quantized linear layer of torch.ao."""
    return _is_of_torch_ao(module, ("Linear",)) and ".dynamic." in type(module).__module__


def _is_of_torch_ao(module: nn.Module, names: tuple[str, ...]) -> bool:
    kind = type(module)
    rooms = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")
    if not kind.__module__.startswith(rooms):
        return False
    return kind.__name__.startswith(names) and not kind.__name__.endswith("PackedParams")


def linear_of(weight: Tensor, bias: Tensor | None, like: nn.Module) -> nn.Linear:
    """A linear layer of given tensors, in the mode of another module."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            trains = tensor.is_floating_point() and tensor.requires_grad
            setattr(linear, name, nn.Parameter(tensor.detach(), requires_grad=trains))
    return linear.train(like.training)


# --- transformers' Conv1D ------------------------------------------------------------------------


def _linear_of_conv1d(module: nn.Module) -> dict[str, nn.Linear]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    linear = linear_of(weight.T, bias, module)
    linear.weight.requires_grad_(weight.requires_grad)
    return {"": linear}


# --- torch.ao's dynamic Linear -------------------------------------------------------------------
# Symmetric int8 as here, but for -128, which the exact arithmetic of AVX2 leaves no room for.


def integers_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """int8 weight within [-128, 127] and float32 scale per output channel."""
    weight = module.weight()  # type: ignore[operator]
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        scale = weight.q_per_channel_scales().float()
    else:
        scale = torch.full((weight.shape[0],), weight.q_scale(), dtype=torch.float32)
    return weight.int_repr(), scale


def why_not_imported(module: nn.Module, target: Target) -> str | None:
    """Why the integers of a module cannot be taken over, or None."""
    weight = module.weight()  # type: ignore[operator]
    if not weight.is_quantized:
        return f"holds a {module._packed_params.dtype} weight"
    if target.trains or not issubclass(target.kind, (QuantizedLinear, WeightOnlyLinear)):
        return "is int8 already"
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    zero = (
        weight.q_per_channel_zero_points() if per_channel else torch.tensor(weight.q_zero_point())
    )
    return "its weight has a zero point" if bool(zero.any()) else None


def _linear_of_imported(module: nn.Module) -> dict[str, nn.Linear]:
    weight, bias = module.weight(), module.bias()  # type: ignore[operator]
    return {"": linear_of(weight.dequantize() if weight.is_quantized else weight, bias, module)}


def _import(module: nn.Module, target: Target) -> nn.Module:
    qweight, scale = integers_of(module)
    activation = "relu" if type(module).__name__ == "LinearReLU" else "identity"
    options = layer_of(target.config)[1]
    kind = target.kind
    assert issubclass(kind, (QuantizedLinear, WeightOnlyLinear))
    bias = module.bias()  # type: ignore[operator]
    layer = kind.from_integers(qweight.clamp_min(-127), scale, bias, activation, **options)
    return layer.train(module.training)


def _note_on_import(module: nn.Module) -> str:
    lowest = int((integers_of(module)[0] == -128).sum())
    note = ", integers of torch.ao"
    return f"{note} ({lowest} of -128 became -127)" if lowest else note


# --- layers that train for it --------------------------------------------------------------------


def _deploy(module: nn.Module, target: Target) -> nn.Module:
    assert isinstance(module, QATLinear)
    return module.deployed()


def _attention(module: nn.Module, target: Target) -> nn.Module:
    assert isinstance(module, nn.MultiheadAttention)
    return MultiheadAttention.from_float(module, target.convert)


_ADAPTERS = (
    Adapter(
        lambda module: type(module) in (nn.Linear, PackedLinear),
        lambda module: {"": module},  # type: ignore[dict-item]
        lambda module, target: target.convert(module),
    ),
    Adapter(
        lambda module: type(module) is nn.MultiheadAttention,
        projections_of,  # type: ignore[arg-type]
        _attention,
        lambda module: " in tw.nn.MultiheadAttention",
    ),
    Adapter(
        is_conv1d,
        _linear_of_conv1d,
        lambda module, target: target.convert(_linear_of_conv1d(module)[""]),
    ),
    Adapter(is_imported, _linear_of_imported, _import, _note_on_import),
    Adapter(
        lambda module: type(module) is QATLinear,
        lambda module: {"": module},  # type: ignore[dict-item]
        _deploy,
        lambda module: ", as trained",
    ),
)

"""Turns the linear layers of a model into int8 layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from torchweld.nn.packed_linear import PackedLinear
from torchweld.nn.quantized_linear import QuantizedLinear
from torchweld.ops.quantized_linear import MAX_IN_FEATURES
from torchweld.report import Report, Row, record

# A name pattern, a module type, or a predicate on the name and the layer.
Exclusion = str | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Int8:
    """Int8 weights per output channel, int8 activations per row, quantized on the fly.

    Needs no calibration. See :func:`torchweld.ops.quantized_linear` for the arithmetic.
    """


@dataclass(frozen=True)
class Int8WeightOnly:
    """Int8 weights, float activations. Not implemented yet."""


@dataclass(frozen=True)
class Int4:
    """Int4 weights in groups along the input features. Not implemented yet.

    Args:
        group_size: input features that share a scale.
    """

    group_size: int = 128


Config = Int8 | Int8WeightOnly | Int4


def quantize(
    model: nn.Module,
    config: Config = Int8(),
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
) -> nn.Module:
    """Return a copy of a model with its ``nn.Linear`` layers quantized.

    The copy shares no tensor with the model, which is left as it is, also when an error is raised.
    A layer reachable by several names is converted once and still reachable by all of them.
    :func:`torchweld.report` says what became of each layer. Left alone, with the reason reported:

    - subclasses of ``nn.Linear``, the one in ``nn.MultiheadAttention`` and parametrized or
      weight-normed layers among them: they may compute something else;
    - layers with hooks or a replaced ``forward``;
    - layers whose weight or bias is also another module's: what was tied would come apart;
    - the layers of ``nn.TransformerEncoderLayer``, whose forward reads their float weight;
    - weights that are not finite, not float32, bfloat16 or float16, not on the CPU, or that have
      more than 133144 input features.

    A module whose ``forward`` reads the weight of a layer instead of calling the layer needs that
    layer excluded: the copy has no float weight there.

    Args:
        model: any module, or a single ``nn.Linear``.
        config: what to quantize to. Only ``Int8()`` is implemented.
        exclude: layers to leave alone. A string is matched against the qualified names of a layer
            and of the modules that hold it (``"encoder"``, ``"*.head"``, as in ``fnmatch``), a type
            against those modules; a function is called with name and layer.

    Returns:
        The converted copy, in the same train/eval mode.

    Raises:
        TypeError: ``model``, ``config`` or an element of ``exclude`` has another type.
        ValueError: a string in ``exclude`` matches no module of the model.
        NotImplementedError: ``config`` is ``Int8WeightOnly()`` or ``Int4()``.

    Example:
        >>> import torch, torchweld as tw
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> tw.quantize(model)
        Sequential(
          (0): QuantizedLinear(in_features=64, out_features=64, bias=True, activation='identity')
          (1): ReLU()
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(config, Int8WeightOnly | Int4):
        raise NotImplementedError(
            f"quantize: config: {config} is not implemented yet; use torchweld.Int8()"
        )
    if not isinstance(config, Int8):
        raise TypeError(f"quantize: config: expected torchweld.Int8(), got {config!r}")
    is_one = isinstance(exclude, str) or callable(exclude)
    exclusions: list[Exclusion] = [exclude] if is_one else list(exclude)  # type: ignore[arg-type, list-item]
    _check_exclusions(model, exclusions)

    names: dict[int, list[str]] = {}
    linears: dict[int, nn.Linear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(id(module), []).append(name)
            linears[id(module)] = module

    users = _users_of_parameters(model)
    rows: list[Row] = []
    replacements: dict[int, object] = {}
    for key, linear in linears.items():
        also = f" (also {', '.join(names[key][1:])})" if len(names[key]) > 1 else ""
        reason = _excluded_by(model, names[key], linear, exclusions) or _obstacle(
            model, names[key], linear, users
        )
        if reason is None:
            replacements[key] = QuantizedLinear.from_float(linear)
        detail = f"QuantizedLinear, int8{also}" if reason is None else reason + also
        rows.append(Row(names[key][0], "quantized_linear", reason is None, detail))

    # deepcopy takes what stands in its memo for already copied: one pass replaces a layer
    # everywhere it is referred to, copies no weight in vain, and never touches the original.
    converted: nn.Module = copy.deepcopy(model, dict(replacements))
    for key in replacements:
        for name in names[key]:
            if not isinstance(converted.get_submodule(name), QuantizedLinear):
                raise RuntimeError(
                    f"quantize: {name or 'model'}: its owner's __deepcopy__ did not take the "
                    "converted layer; exclude it"
                )
    record(converted, Report(rows))
    return converted


def _check_exclusions(model: nn.Module, exclusions: list[Exclusion]) -> None:
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for exclusion in exclusions:
        if isinstance(exclusion, str):
            if not any(fnmatchcase(name, exclusion) for name in names):
                raise ValueError(
                    f"quantize: exclude: expected the name of a module, got {exclusion!r}, which "
                    "matches none"
                )
        elif not callable(exclusion):
            raise TypeError(
                "quantize: exclude: expected name patterns, module types or functions of name and "
                f"module, got {exclusion!r}"
            )


def _excluded_by(
    model: nn.Module, names: list[str], linear: nn.Linear, exclusions: list[Exclusion]
) -> str | None:
    for exclusion in exclusions:
        for name in names:
            path = [(part, model.get_submodule(part)) for part in _path(name)]
            if isinstance(exclusion, str):
                hit = any(fnmatchcase(part, exclusion) for part, _ in path)
            elif isinstance(exclusion, type):
                hit = any(isinstance(module, exclusion) for _, module in path)
            else:
                hit = exclusion(name, linear)
            if hit:
                what = exclusion if isinstance(exclusion, str) else exclusion.__name__
                return f"excluded by {what!r}"
    return None


def _path(name: str) -> list[str]:
    """``"a.b"`` to ``["", "a", "a.b"]``: the names of a module and of all that hold it."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _users_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters each Parameter is registered under, once per owning module."""
    users: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{name}" if prefix else name
                users.setdefault(id(parameter), []).append(full)
    return users


def _obstacle(
    model: nn.Module, names: list[str], linear: nn.Linear, users: dict[int, list[str]]
) -> str | None:
    """Why a layer cannot be converted, or None."""
    if type(linear) not in (nn.Linear, PackedLinear):
        return f"{type(linear).__name__} is not nn.Linear itself"
    if any(value for key, value in vars(linear).items() if key.endswith("_hooks")):
        return "has hooks"
    if "forward" in vars(linear):
        return "its forward is replaced"
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.TransformerEncoderLayer):
            return "nn.TransformerEncoderLayer reads its weight"
    tensors = {"weight": linear.weight, "bias": linear.bias}
    for kind, tensor in tensors.items():
        own = f"{names[0]}.{kind}".lstrip(".")
        others = [user for user in users.get(id(tensor), []) if user != own]
        if others:
            return f"{kind} is shared with {', '.join(others)}"
    weight = linear.weight
    if weight.device.type != "cpu":
        return f"weight is on {weight.device}; int8 runs on the CPU so far"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"weight is {weight.dtype}"
    if linear.in_features > MAX_IN_FEATURES:
        return f"more than {MAX_IN_FEATURES} input features"
    for kind, tensor in tensors.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            return f"{kind} holds a NaN or an infinity"
    return None

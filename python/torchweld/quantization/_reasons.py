"""Why a layer is left alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchweld.nn.int4_linear import Int4Linear
from torchweld.nn.qat_linear import QATLinear
from torchweld.nn.quantized_linear import QuantizedLinear, WeightOnlyLinear
from torchweld.ops.quantized_linear import MAX_IN_FEATURES
from torchweld.ops.quantized_linear_int4 import invalid_group_size
from torchweld.quantization._adapters import (
    Target,
    adapter_of,
    is_imported,
    is_taken,
    why_not_imported,
)
from torchweld.quantization._configs import Int4
from torchweld.quantization._rule import worth_quantizing

_OPERATORS = {
    QuantizedLinear: "quantized_linear",
    WeightOnlyLinear: "weight_only_linear",
    Int4Linear: "quantized_linear_int4",
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def users_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters each Parameter is registered under, once per owning module."""
    users: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{name}" if prefix else name
                users.setdefault(id(parameter), []).append(full)
    return users


def unknown(module: nn.Module) -> str | None:
    """Why no module of this type is converted, or None."""
    if is_taken(module):
        return None
    for kind in (nn.Linear, nn.MultiheadAttention):
        if isinstance(module, kind):
            return f"{type(module).__name__} is not nn.{kind.__name__} itself"
    return f"{type(module).__name__} is not converted"


def obstacle(
    module: nn.Module,
    name: str,
    target: Target,
    keep_small: bool,
    users: dict[int, list[str]],
) -> str | None:
    """Why a module that an adapter takes cannot be converted, or None."""
    parts = list(module.modules())
    if any(value for part in parts for key, value in vars(part).items() if key.endswith("_hooks")):
        return "has hooks"
    if any("forward" in vars(part) for part in parts):
        return "its forward is replaced"
    for kind, parameter in module.named_parameters():
        own = f"{name}.{kind}".lstrip(".")
        others = [user for user in users.get(id(parameter), []) if user != own]
        if others:
            return f"{kind} is shared with {', '.join(others)}"
    if is_imported(module):
        reason = why_not_imported(module, target)
        if reason is not None:
            return reason
    if isinstance(module, QATLinear) and target.trains:
        return "trains for quantization already"
    made_already = is_imported(module) or isinstance(module, QATLinear)
    for linear in adapter_of(module).linears(module).values():
        reason = _obstacle_of_tensors(linear, target)
        if reason is None and not made_already:
            reason = _obstacle_of_size(linear, target, keep_small)
        if reason is not None:
            return reason
    return None


def _obstacle_of_tensors(linear: nn.Linear, target: Target) -> str | None:
    weight = linear.weight
    if not _runs_on(target, weight.device):
        return f"weight is on {weight.device}, where {target.kind.__name__} does not run"
    if weight.dtype not in _FLOATS:
        return f"weight is {weight.dtype}"
    for kind, tensor in (("weight", weight), ("bias", linear.bias)):
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
            return f"{kind} is a {type(tensor).__name__}"
        if tensor is not None and not bool(tensor.isfinite().all()):
            return f"{kind} holds a NaN or an infinity"
    return None


def _runs_on(target: Target, device: torch.device) -> bool:
    """Whether a target's layer has a kernel for a device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    op = f"torchweld::{_OPERATORS[target.kind]}"
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


def _obstacle_of_size(linear: nn.Linear, target: Target, keep_small: bool) -> str | None:
    k, n = linear.in_features, linear.out_features
    if target.kind is not Int4Linear and k > MAX_IN_FEATURES:
        return f"more than {MAX_IN_FEATURES} input features"
    if keep_small and not worth_quantizing(target.config, k, n):
        return f"too small to gain ({k} x {n})"
    if isinstance(target.config, Int4):
        problem = invalid_group_size(target.config.group_size, k)
        if problem:
            return f"group_size: {problem}"
    return None

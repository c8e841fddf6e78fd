"""What a conversion costs in accuracy and saves in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchweld.nn.integer_linear import IntegerLinear
from torchweld.nn.qat_linear import QATLinear
from torchweld.quantization._adapters import adapter_of, integers_of, is_imported


def describe(module: nn.Module, replacement: nn.Module) -> str:
    """What a module became, in words."""
    adapter = adapter_of(module)
    layer = replacement.get_submodule(next(iter(adapter.linears(module))))
    group = getattr(layer, "group_size", None) or getattr(layer, "input_group_size", None)
    groups = f" in groups of {group}" if group else ""
    return f"{type(layer).__name__}{groups}{adapter.note(module)}"


def measure(module: nn.Module, replacement: nn.Module) -> dict[str, Any]:
    """The fields of a report's row about a replaced module: its weights and bytes."""
    signal = noise = 0.0
    for name, linear in adapter_of(module).linears(module).items():
        layer = replacement.get_submodule(name)
        deployed = layer.deployed() if isinstance(layer, QATLinear) else layer
        assert isinstance(deployed, IntegerLinear)
        weight = linear.weight.detach().float()
        signal += float(weight.norm()) ** 2
        noise += float((weight - deployed.weight()).norm()) ** 2
    return {
        "weight_sqnr": _decibel(signal, noise),
        "bytes_before": _bytes(module),
        "bytes_after": sum(t.nbytes for t in replacement.state_dict().values()),
    }


def output_sqnr(
    model: nn.Module,
    replacements: dict[str, nn.Module],
    example_inputs: Tensor | Sequence[Any] | None,
) -> dict[str, float]:
    """Signal to noise in dB of each replaced module's output, on what the model's run gives it."""
    if example_inputs is None:
        return {}
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    sums: dict[str, list[float]] = {}
    hooks = []

    def listen(name: str, replacement: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            mode = replacement.training
            got = tree_leaves(replacement.eval()(*args, **kwargs))[0].double()
            replacement.train(mode)
            expected = tree_leaves(output)[0].double()
            sums.setdefault(name, [0.0, 0.0])[0] += float(expected.norm()) ** 2
            sums[name][1] += float((got - expected).norm()) ** 2

        return hook

    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, replacement in replacements.items():
            module, hook = model.get_submodule(name), listen(name, replacement)
            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return {name: _decibel(*pair) for name, pair in sums.items()}


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return float(10 * torch.tensor(signal / noise, dtype=torch.float64).log10())


def _bytes(module: nn.Module) -> int:
    if is_imported(module):
        bias = module.bias()  # type: ignore[operator]
        tensors = [*integers_of(module), *([] if bias is None else [bias])]
        return sum(tensor.nbytes for tensor in tensors)
    return sum(parameter.nbytes for parameter in module.parameters())

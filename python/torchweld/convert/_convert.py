"""``weld`` and ``unweld``: which modules of a model get fused patterns."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from torchweld.convert import _fused, _match, _rules, _welded
from torchweld.convert._inline import inline
from torchweld.convert._layout import seen_by
from torchweld.convert._trace import Traced, trace, usual_call
from torchweld.convert._values import stock_class
from torchweld.convert._watch import UntraceableError
from torchweld.nn import SyncBatchNorm
from torchweld.report import Report, Row, record

_CONVERSION = "conv_bn_relu"


def weld(
    model: nn.Module,
    *,
    example_inputs: Tensor | Sequence[Any] | None = None,
    inference: bool = False,
    memory_saving: bool = False,
) -> nn.Module:
    """Fuse every convolution, batch normalization, addition and activation that belong together.

    Only the smallest module that owns such a pattern gets a new forward. Its class keeps its name
    and stays a subclass of the stock one; conv, bn and activation stay registered where they are,
    so state_dict keys, parameter order, attributes and everything above are as before.
    A forward that torch.fx cannot trace, or a pattern that fusing would change (see
    :func:`torchweld.report`), is left alone.

    Args:
        model: the model; it is not changed.
        example_inputs: a batch, or the positional arguments of a call. If given, the welded model
            must give the outputs of the stock one on them, in evaluation mode.
        inference: fold the batch normalizations into the convolutions. The result is a snapshot in
            evaluation mode with tensors of its own, none of which requires a gradient; ``train()``
            raises.
        memory_saving: not available yet.

    Returns:
        A copy of the model which shares its parameters and buffers: train either, or load a
        state_dict into either, and both change. ``train()`` and ``eval()`` act on each alone.
        With ``inference=True`` nothing is shared.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``example_inputs`` neither tensor, list
            nor tuple.
        ValueError: a copy of the model would not share its parameters (TorchScript modules), or
            ``inference=True`` and a module is lazy.
        RuntimeError: the outputs on ``example_inputs`` differ.
        NotImplementedError: ``memory_saving=True``.

    Note:
        A forward is traced with torch.fx, in training and in evaluation. What it reads from its
        module, such as ``self.training`` or a list of layers, is compared again before every
        call, and a call that no trace fits is traced anew or runs the stock forward. A hook
        registered on a fused module later gets its module to run by itself again.
        ``torch.jit.trace``, ``torch.compile`` and ``torch.export`` take a welded model;
        ``torch.jit.script`` does not.

    Example:
        >>> import torch, torchweld as tw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> welded = tw.weld(model)
        >>> [row.detail for row in tw.report(welded)]
        ['conv-bn-relu']
        >>> welded[0].weight is model[0].weight
        True
    """
    _check_module("weld", model)
    if not (example_inputs is None or isinstance(example_inputs, (Tensor, list, tuple))):
        raise TypeError(
            "torchweld.weld: expected example_inputs to be a tensor or a list or tuple of "
            f"positional arguments, got {type(example_inputs).__name__}"
        )
    if memory_saving:
        raise NotImplementedError("torchweld.weld: memory_saving=True is not available yet")
    if inference and any(map(nn.parameter.is_lazy, [*model.parameters(), *model.buffers()])):
        raise ValueError(
            "torchweld.weld: inference=True needs values to fold, and a lazy module has none yet; "
            "run the model once first"
        )
    welded = copy.deepcopy(model, _kept(model)) if inference else _copy(model)
    for module in welded.modules():
        if _welded.is_welded(module) and not _welded.is_snapshot(module):
            _welded.uninstall(module)
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = SyncBatchNorm  # type: ignore[assignment]
    if inference:
        welded.eval().requires_grad_(False)
    found = Report(_weld_all(welded, inference))
    record(welded, found, replacing=_CONVERSION)
    if any(row.converted for row in found) and not seen_by(model):
        _welded.hide_channels_last(welded, snapshot=inference)
    if inference and not _welded.is_snapshot(welded):
        _welded.install(welded, _welded.Weld(frozenset()), snapshot=True)
    if example_inputs is not None:
        _check_outputs(model, welded, example_inputs)
    return welded


def unweld(model: nn.Module) -> nn.Module:
    """Return a model with the stock forwards again.

    Args:
        model: a model from :func:`weld`; it is not changed.

    Returns:
        A copy of stock classes only, which shares the model's parameters and buffers.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: the model is an inference snapshot, whose batch normalizations are gone.

    Example:
        >>> import torchweld as tw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> type(tw.unweld(tw.weld(model))) is nn.Sequential
        True
    """
    _check_module("unweld", model)
    if any(map(_welded.is_snapshot, model.modules())):
        raise ValueError(
            "torchweld.unweld: the model was welded with inference=True, which folds the batch "
            "normalizations away; keep the model it was made from"
        )
    stock = _copy(model)
    for module in stock.modules():
        if _welded.is_welded(module):
            _welded.uninstall(module)
        if type(module) is SyncBatchNorm:
            module.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
    record(stock, Report(), replacing=_CONVERSION)
    return stock


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"torchweld.{function}: expected model to be an nn.Module, got {type(model).__name__}"
        )


def _copy(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, _kept(model) | {id(tensor): tensor for tensor in tensors})
    if any(
        ours is not theirs
        for ours, theirs in zip([*copied.parameters(), *copied.buffers()], tensors, strict=True)
    ):
        raise ValueError(
            "torchweld: a copy of the model does not share its parameters; is a part of it "
            "TorchScript? Convert before torch.jit"
        )
    return copied


def _kept(model: nn.Module) -> dict[int, Any]:
    """What deepcopy refuses to copy: results left on modules, as weight_norm's hook leaves one."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return {id(v): v for v in values if isinstance(v, Tensor) and not v.is_leaf}


@dataclass
class _Owner:
    """A module whose forward may own patterns, and what its graphs show, by training mode."""

    path: str
    module: nn.Module
    traced: dict[bool, Traced] = field(default_factory=dict)
    failure: str = ""

    def qualified(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def find(self, once: set[int], inference: bool) -> dict[tuple[str, ...], _Finding]:
        """Return what it owns, by names of conv and bn, as the first mode that has it shows it."""

        def may_open(path: str) -> bool:
            return id(self.module.get_submodule(path)) in once

        found: dict[tuple[str, ...], _Finding] = {}
        for training, traced in self.traced.items():
            with _welded.mode(self.module, training):
                graph = inline(self.module, traced, may_open).graph
            for match in _match.find(self.module, graph):
                reason = match.reason or _reason_here(self.module, graph, match, once, inference)
                key = match.names[:2]
                if key not in found or found[key][0] is None:
                    unit = None if reason else match.unit
                    found[key] = unit, reason or match.unit.detail  # type: ignore[union-attr]
        return found


_Finding = tuple[_match.Unit | None, str]  # a pattern and its name, or none and why


def _weld_all(model: nn.Module, inference: bool) -> list[Row]:
    """Weld a model in place; return a row for every batch normalization."""
    owners = [*_owners(model, (False,) if inference else (True, False))]
    once = _used_once(model, owners)
    rows: dict[str, Row] = {}  # by names of conv and bn: a parent may have claimed its child's
    failed: list[str] = []
    for owner in owners:
        if owner.failure and not owner.traced:
            if _has_direct_pair(owner.module):
                rows[owner.path] = Row(owner.path, _CONVERSION, False, owner.failure)
                failed.append(owner.path)
            continue
        found = owner.find(once, inference)
        units = [unit for unit, _ in found.values() if unit is not None]
        failure = _install(owner, units, inference)
        for key, (unit, detail) in found.items():
            names = key if unit is None or unit.act is None else (*key, unit.act)
            name = " + ".join(map(owner.qualified, names)) or owner.path
            converted = unit is not None and not failure
            row = Row(name, _CONVERSION, converted, failure if unit and failure else detail)
            pair = " + ".join(map(owner.qualified, key)) or owner.path
            if pair not in rows or (converted and not rows[pair].converted):
                rows[pair] = row
    return [*rows.values(), *_never_seen(model, rows, failed)]


def _never_seen(model: nn.Module, rows: dict[str, Row], failed: list[str]) -> Iterator[Row]:
    """Yield a row for each batch normalization no row speaks of, by itself or by its owner."""
    seen = {name for key in rows for name in key.split(" + ")}
    explained = tuple(f"{path}." if path else "" for path in failed)
    for path, module in model.named_modules():
        if _rules.is_batch_norm(module) and path not in seen and not path.startswith(explained):
            reason = "no forward that could be traced calls it after a convolution"
            yield Row(path, _CONVERSION, False, reason)


def _owners(model: nn.Module, modes: tuple[bool, ...]) -> Iterator[_Owner]:
    for path, module in model.named_modules():
        if not _may_own(module):
            continue
        owner = _Owner(path, module)
        forward = stock_class(module).forward
        for training in modes:
            if "forward" in module.__dict__:
                owner.failure = "its forward was replaced"
                break
            try:
                with _welded.mode(module, training):
                    spec = usual_call(forward)
                    owner.traced[training] = trace(module, forward, spec)
            except UntraceableError as error:
                owner.failure = owner.failure or f"cannot be traced: {error}"
        yield owner


def _may_own(module: nn.Module) -> bool:
    if _welded.is_welded(module) or not _rules.has_open_forward(module):
        return False
    # Linear layers alone, as in transformers, are none of our business.
    return any(
        _rules.is_batch_norm(part) or (_rules.is_conv(part) and not isinstance(part, nn.Linear))
        for part in module.modules()
    ) or any(parameter.dim() == 4 for parameter in module.parameters(recurse=False))


def _used_once(model: nn.Module, owners: list[_Owner]) -> set[int]:
    """Ids of the modules registered in one place and called in one place."""
    registered = Counter(id(child) for m in model.modules() for child in m._modules.values())
    called: Counter[int] = Counter()
    for owner in owners:
        most: Counter[int] = Counter()
        for traced in owner.traced.values():
            calls = [n.target for n in traced.graph.nodes if n.op == "call_module"]
            most |= Counter(id(owner.module.get_submodule(str(target))) for target in calls)
        called += most
    return {key for key in called if called[key] == 1 and registered[key] == 1}


def _reason_here(
    owner: nn.Module, graph: fx.Graph, match: _match.Found, once: set[int], inference: bool
) -> str:
    assert match.unit is not None
    conv, bn = (owner.get_submodule(path) for path in match.unit.pair)
    for module in (conv, bn):
        if id(module) not in once:
            return f"the {type(module).__name__} is used more than once"
    if not inference:
        return ""
    for node in graph.nodes:
        path = str(node.target)
        if node.op == "get_attr" and path.startswith(tuple(f"{p}." for p in match.unit.pair)):
            return f"its forward reads {path} by itself"
    return _rules.reason_against_folding(bn)


def _has_direct_pair(module: nn.Module) -> bool:
    children = []
    for child in module.children():
        children += (
            [*child.children()] if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
        )
    return any(map(_rules.is_conv, children)) and any(map(_rules.is_batch_norm, children))


def _install(owner: _Owner, units: list[_match.Unit], inference: bool) -> str:
    """Weld one module; return why that failed, or nothing."""
    if not units:
        return ""
    module = owner.module
    weld = _welded.Weld(frozenset(unit.pair for unit in units))
    try:
        _welded.install(module, weld, snapshot=inference)
    except TypeError as error:
        return f"its class cannot be subclassed: {error}"
    if inference:
        for unit in units:
            if not _rules.is_folded(*map(module.get_submodule, unit.pair)):
                _fold(module, unit)
    weld.prepare(module)
    return ""


def _fold(owner: nn.Module, unit: _match.Unit) -> None:
    conv, bn = (owner.get_submodule(path) for path in unit.pair)
    for path, module in ((unit.conv, _fused.fold(conv, bn)), (unit.bn, nn.Identity())):
        parent, _, name = path.rpartition(".")
        owner.get_submodule(parent)._modules[name] = module.eval()


def _check_outputs(model: nn.Module, welded: nn.Module, example_inputs: Any) -> None:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    with torch.no_grad(), _welded.mode(model, False), _welded.mode(welded, False):
        expected, got = tree_leaves(model(*inputs)), tree_leaves(welded(*inputs))
    for ours, theirs in zip(got, expected, strict=True):
        if not isinstance(theirs, Tensor) or not theirs.is_floating_point():
            continue
        # Two orders of the same sums; anything wrong is larger by far.
        scale = theirs.abs().nan_to_num(0, 0, 0).amax().item() if theirs.numel() else 0.0
        bound = torch.finfo(theirs.dtype).eps ** 0.5 * max(scale, 1.0)
        if not torch.allclose(ours, theirs, rtol=0.0, atol=bound, equal_nan=True):
            error = (ours - theirs).abs().max().item()
            raise RuntimeError(
                "torchweld.weld: the welded model's output on example_inputs differs from the "
                f"model's: expected at most {bound:.3g} apart, got {error:.3g}"
            )

"""Looks through a model for the modules whose forwards own patterns, and welds each in place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from torchweld.convert import _fused, _match, _rules, _welded
from torchweld.convert._inline import inline
from torchweld.convert._trace import Traced, form, trace, usual_call
from torchweld.convert._values import stock_class
from torchweld.convert._watch import UntraceableError
from torchweld.report import Row

CONVERSION = "conv_bn_relu"


def weld_patterns(model: nn.Module, inference: bool) -> list[Row]:
    """Weld a model in place; return a row for every batch normalization."""
    owners = [*_owners(model, (False,) if inference else (True, False))]
    # Modules are known by their ids here, which what folding puts in their place must not get.
    alive = [*model.modules()]
    once = _used_once(model, owners)
    # Folded modules are others, which nobody may look into.
    fixed: dict[int, str] = _looked_into(owners) if inference else {}
    calls = _calls(owners)
    rows: dict[str, Row] = {}  # by names of conv and bn: a parent may have claimed its child's
    failed: list[str] = []
    for owner in owners:
        if owner.failure and not owner.traced:
            if _has_direct_pair(owner.module):
                rows[owner.path] = Row(owner.path, CONVERSION, False, owner.failure)
                failed.append(owner.path)
            continue
        found = owner.find(once, fixed, inference)
        units = [unit for unit, _ in found.values() if unit is not None]
        failure = _install(owner, units, calls[id(owner.module)], inference)
        for key, (unit, detail) in found.items():
            names = key if unit is None or unit.act is None else (*key, unit.act)
            name = " + ".join(map(owner.qualified, names)) or owner.path
            converted = unit is not None and not failure
            detail = failure if unit and failure else detail + (owner.limits() if unit else "")
            row = Row(name, CONVERSION, converted, detail)
            pair = " + ".join(map(owner.qualified, key)) or owner.path
            if pair not in rows or (converted and not rows[pair].converted):
                rows[pair] = row
    del alive
    return [*rows.values(), *_never_seen(model, rows, failed)]


_Finding = tuple[_match.Unit | None, str]  # a pattern and its name, or none and why


@dataclass
class _Owner:
    """A module whose forward may own patterns, and what its graphs show, by training mode."""

    path: str
    module: nn.Module
    traced: dict[bool, Traced] = field(default_factory=dict)
    failure: str = ""

    def qualified(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def limits(self) -> str:
        """Say in which mode it cannot be looked into, if in one."""
        if not self.failure:
            return ""
        seen, unseen = ("training", "evaluation")[:: 1 if True in self.traced else -1]
        return f" in {seen}; in {unseen} it {self.failure}"

    def find(
        self, once: set[int], fixed: dict[int, str], inference: bool
    ) -> dict[tuple[str, ...], _Finding]:
        """Return what it owns, by names of conv and bn, as the first mode that has it shows it."""

        def may_open(path: str) -> bool:
            return id(self.module.get_submodule(path)) in once

        found: dict[tuple[str, ...], _Finding] = {}
        for training, traced in self.traced.items():
            with _welded.mode(self.module, training):
                graph = inline(self.module, traced, may_open).graph
            for match in _match.find(self.module, graph):
                reason = match.reason or _reason_here(self.module, match, once, fixed, inference)
                key = match.names[:2]
                if key not in found or found[key][0] is None:
                    unit = None if reason else match.unit
                    found[key] = unit, reason or match.unit.detail  # type: ignore[union-attr]
        return found


def _never_seen(model: nn.Module, rows: dict[str, Row], failed: list[str]) -> Iterator[Row]:
    """Yield a row for each batch normalization no row speaks of, by itself or by its owner."""
    seen = {name for key in rows for name in key.split(" + ")}
    explained = tuple(f"{path}." if path else "" for path in failed)
    for path, module in model.named_modules():
        if _rules.is_batch_norm(module) and path not in seen and not path.startswith(explained):
            reason = "no forward that could be traced calls it after a convolution"
            yield Row(path, CONVERSION, False, reason)


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


def _looked_into(owners: list[_Owner]) -> dict[int, str]:
    """Return what forwards read of other modules, tensors and settings, by the modules' ids."""
    found: dict[int, str] = {}
    for owner in owners:
        for traced in owner.traced.values():
            names = [str(n.target) for n in traced.graph.nodes if n.op == "get_attr"]
            # torch.fx itself goes through `_modules`.
            reads = [r for r in traced.reads if isinstance(r.holder, str) and r.name[0] != "_"]
            names += [f"{read.holder}.{read.name}" for read in reads]
            for name in names:
                path = name.rpartition(".")[0]
                if path:  # a module may look into itself, as FrozenBatchNorm2d does
                    found.setdefault(id(owner.module.get_submodule(path)), owner.qualified(name))
    return found


def _calls(owners: list[_Owner]) -> defaultdict[int, list[object]]:
    """Return the forms in which the traced forwards call each module, by its id."""
    calls: defaultdict[int, list[object]] = defaultdict(list)
    for owner in owners:
        for traced in owner.traced.values():
            for node in traced.graph.nodes:
                if node.op == "call_module":
                    known = calls[id(owner.module.get_submodule(str(node.target)))]
                    call = form((node.args, node.kwargs))
                    if call not in known:
                        known.append(call)
    return calls


def _reason_here(
    owner: nn.Module, match: _match.Found, once: set[int], fixed: dict[int, str], inference: bool
) -> str:
    assert match.unit is not None
    conv, bn = (owner.get_submodule(path) for path in match.unit.pair)
    for module in (conv, bn):
        if id(module) not in once:
            return f"the {type(module).__name__} is used more than once"
        if id(module) in fixed:
            return f"a forward reads {fixed[id(module)]} by itself"
    return _rules.reason_against_folding(bn) if inference else ""


def _has_direct_pair(module: nn.Module) -> bool:
    children = []
    for child in module.children():
        children += (
            [*child.children()] if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
        )
    return any(map(_rules.is_conv, children)) and any(map(_rules.is_batch_norm, children))


def _install(
    owner: _Owner, units: list[_match.Unit], calls: Iterable[object], inference: bool
) -> str:
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
    weld.prepare(module, calls)
    return ""


def _fold(owner: nn.Module, unit: _match.Unit) -> None:
    conv, bn = (owner.get_submodule(path) for path in unit.pair)
    for path, module in ((unit.conv, _fused.fold(conv, bn)), (unit.bn, nn.Identity())):
        parent, _, name = path.rpartition(".")
        owner.get_submodule(parent)._modules[name] = module.eval()

"""Finds conv-bn(-add)-activation in the graph of a forward, and fuses it there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchweld.convert import _fused, _inplace, _rules


@dataclass(frozen=True)
class Unit:
    """A pattern by the names its modules have in their owner."""

    conv: str
    bn: str
    kinds: tuple[type[nn.Module], type[nn.Module]]
    act: str | None = None
    activation: str = "identity"
    negative_slope: float = 0.01
    residual: bool = False

    @property
    def pair(self) -> tuple[str, str]:
        """What identifies the pattern, whatever follows it in a given graph."""
        return self.conv, self.bn

    @property
    def detail(self) -> str:
        """The pattern in words."""
        act = [] if self.activation == "identity" else [self.activation]
        return "-".join([*_rules.words(*self.kinds), *["add"][: self.residual], *act])


@dataclass(frozen=True)
class Found:
    """A conv followed by a batch normalization: what they make up, or why they do not."""

    names: tuple[str, ...]
    unit: Unit | None
    reason: str
    conv_node: fx.Node
    bn_node: fx.Node
    add_node: fx.Node | None = None
    act_node: fx.Node | None = None
    residual: fx.Node | None = None


_CONVS = (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip
_BATCH_NORMS = (F.batch_norm, torch.batch_norm)


def find(owner: nn.Module, graph: fx.Graph) -> Iterator[Found]:
    """Yield what every batch normalization makes up with its neighbours, in the order of the graph.

    An addition of two patterns belongs to the first of them.
    """
    taken: set[fx.Node] = set()
    for bn_node in graph.nodes:
        conv_node = _input(bn_node)
        if not is_pair(owner, bn_node):
            if _rules.is_batch_norm(_module(owner, bn_node)):
                yield _alone(owner, bn_node)
            continue
        assert conv_node is not None
        conv, bn = _module(owner, conv_node), _module(owner, bn_node)
        names = tuple(str(n.target) for n in (conv_node, bn_node) if n.op == "call_module")
        if conv is None or bn is None:
            reason = "conv2d or batch_norm is called as a function"
        elif len(conv_node.users) > 1:
            reason = "the convolution's output is used elsewhere too"
        elif not (is_plain_call(conv_node) and is_plain_call(bn_node)):
            reason = "called with more than one positional tensor"
        else:
            reason = _rules.reason_against(conv, bn)
        if reason:
            yield Found(names, None, reason, conv_node, bn_node)
        else:
            found = _extend(owner, graph, conv_node, bn_node, taken)
            if found.add_node is not None:
                taken.add(found.add_node)
            yield found


def is_pair(owner: nn.Module, bn_node: fx.Node) -> bool:
    """Whether a node is a batch normalization that reads a convolution's output."""
    conv_node = _input(bn_node)
    if conv_node is None:
        return False
    conv, bn = _module(owner, conv_node), _module(owner, bn_node)
    is_bn = _rules.is_batch_norm(bn) or bn_node.target in _BATCH_NORMS
    return (is_bn and _is_conv(owner, conv_node)) or _rules.is_folded(conv, bn)


def _input(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def _is_conv(owner: nn.Module, node: fx.Node) -> bool:
    return _rules.is_conv(_module(owner, node)) or node.target in _CONVS


def _alone(owner: nn.Module, bn_node: fx.Node) -> Found:
    """Say why a batch normalization has no convolution to be fused with."""
    name = str(bn_node.target)
    between: list[str] = []
    node = _input(bn_node)
    while node is not None and node.op != "placeholder" and len(between) < 3:
        if _is_conv(owner, node):
            names = (str(node.target), name) if node.op == "call_module" else (name,)
            what = ", then ".join(reversed(between))
            reason = f"{what} between the convolution and the batch normalization"
            return Found(names, None, reason, node, bn_node)
        module = _module(owner, node)
        target = getattr(node.target, "__name__", node.target)
        between.append(str(target) if module is None else type(module).__name__)
        node = _input(node)
    source = f"the output of {between[0]}" if between else "what this forward was given"
    reason = f"no convolution right before it: it normalizes {source}"
    return Found((name,), None, reason, bn_node, bn_node)


def can_join(owner: nn.Module, node: fx.Node, value: fx.Node) -> bool:
    """Whether an addition or activation of a value could be part of a pattern that makes it."""
    return _other_addend(node, value) is not None or _activation(owner, node, value) is not None


def fuse(owner: nn.Module, graph: fx.Graph, pairs: Collection[tuple[str, str]]) -> list[Unit]:
    """Rewrite the graph so that each pattern among ``pairs`` is one call; return the patterns.

    The graph takes conv and bn of each in turn as one more argument, its first.
    """
    with graph.inserting_before(next(iter(graph.nodes))):
        modules = graph.placeholder("pairs")
    units: list[Unit] = []
    fused: dict[fx.Node | None, fx.Node] = {}  # by the last node of what a call stands for
    for found in list(find(owner, graph)):
        if found.unit is None or found.unit.pair not in pairs:
            continue
        unit = found.unit
        chain = [found.conv_node, found.bn_node, found.add_node, found.act_node]
        nodes = [node for node in chain if node is not None]
        run: Callable[..., Any] = _fused.fused
        if _rules.is_folded(*(_module(owner, node) for node in nodes[:2])):
            run = _fused.folded_linear if unit.kinds[0] is nn.Linear else _fused.folded
        # Without a residual everything after the conv touches only what the conv made, so it may
        # run where the conv stood. The residual may not be read before its own place.
        with graph.inserting_before(found.add_node or found.conv_node):
            places = 2 * len(units), 2 * len(units) + 1
            pair = (graph.call_function(operator.getitem, (modules, i)) for i in places)
            call = graph.call_function(
                run,
                (found.conv_node.args[0], *pair, unit.activation, unit.negative_slope,
                 fused.get(found.residual, found.residual)),
            )  # fmt: skip
        nodes[-1].replace_all_uses_with(call)
        fused[nodes[-1]] = call
        for node in reversed(nodes):
            graph.erase_node(node)
        units.append(unit)
    return units


def _extend(
    owner: nn.Module, graph: fx.Graph, conv_node: fx.Node, bn_node: fx.Node, taken: set[fx.Node]
) -> Found:
    add_node = residual = None
    last = bn_node
    user = only_user(last)
    if user is not None and user not in taken:
        other = _other_addend(user, last)
        if other is not None and _nothing_changes_between(owner, graph, conv_node, user, bn_node):
            add_node, residual, last = user, other, user
            user = only_user(last)
    act = _activation(owner, user, last) if user is not None else None
    path, activation, slope = act or (None, "identity", 0.01)
    conv, bn = str(conv_node.target), str(bn_node.target)
    kinds = type(owner.get_submodule(conv)), type(owner.get_submodule(bn))
    unit = Unit(conv, bn, kinds, path, activation, slope, residual is not None)
    names = (conv, bn) if path is None else (conv, bn, path)
    return Found(names, unit, "", conv_node, bn_node, add_node, user if act else None, residual)


def _module(owner: nn.Module, node: fx.Node) -> nn.Module | None:
    return owner.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_plain_call(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


_ADDS = (operator.add, _inplace.iadd, torch.add, "add", "add_")


def _other_addend(node: fx.Node, addend: fx.Node) -> fx.Node | None:
    if node.op not in ("call_function", "call_method") or node.target not in _ADDS:
        return None
    if len(node.args) != 2 or (node.kwargs and dict(node.kwargs) != {"alpha": 1}):
        return None
    left, right = node.args
    # x += out changes x itself, which others may still read.
    in_place = node.target in (_inplace.iadd, "add_")
    if left is addend and isinstance(right, fx.Node) and right is not addend:
        return right
    if right is addend and isinstance(left, fx.Node) and not in_place:
        return left if left is not addend else None
    return None


_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.hardtanh: "hardtanh", F.hardtanh_: "hardtanh",
    F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu",
    F.silu: "silu", F.hardswish: "hardswish",
}  # fmt: skip


def _activation(
    owner: nn.Module, node: fx.Node, value: fx.Node
) -> tuple[str | None, str, float] | None:
    if not node.args or node.args[0] is not value:
        return None
    if node.op == "call_module":
        module = _module(owner, node)
        found = _rules.activation_of(module)
        if found is None or not is_plain_call(node) or _rules.is_hooked(module):
            return None
        return str(node.target), *found
    name = _ACTIVATIONS.get(node.target)
    arguments = dict(zip(("negative_slope",), node.args[1:], strict=False)) | dict(node.kwargs)
    arguments.pop("inplace", None)
    if name == "hardtanh":
        arguments = dict(zip(("min_val", "max_val"), node.args[1:], strict=False)) | arguments
        arguments.pop("negative_slope", None)
        bounds = arguments.get("min_val", -1.0), arguments.get("max_val", 1.0)
        return (None, "relu6", 0.01) if bounds == (0, 6) else None
    if name is None:
        return None
    slope = arguments.get("negative_slope", 0.01) if name == "leaky_relu" else 0.01
    return (None, name, float(slope)) if isinstance(slope, (int, float)) else None


def _nothing_changes_between(
    owner: nn.Module, graph: fx.Graph, start: fx.Node, end: fx.Node, ours: fx.Node
) -> bool:
    """Whether a conv that runs at ``end`` instead of ``start`` still reads the same input."""
    between = False
    for node in graph.nodes:
        if node is end:
            return True
        if between and node is not ours and not _is_pure(owner, node):
            return False
        between = between or node is start
    return False


def _is_pure(owner: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _rules.is_pure(owner.get_submodule(str(node.target)))
    if node.op == "call_method":
        return not str(node.target).endswith("_")
    if node.op == "call_function":
        home = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
        name = getattr(node.target, "__name__", "_")
        changes = name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        return home in ("torch", "_operator", "builtins", "math") and not changes
    return True

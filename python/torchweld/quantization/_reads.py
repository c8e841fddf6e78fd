"""Which weights a module reads from its parts, instead of calling the part."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterable
from types import FunctionType
from weakref import WeakKeyDictionary

from torch import nn


def reader(
    model: nn.Module, module: nn.Module, names: Iterable[str], gone: Collection[int]
) -> str | None:
    """Why a layer must stay because an owner reads its weight, or None.

    Args:
        model: the model.
        module: the layer, with its ``names`` in the model.
        names: the names.
        gone: ids of the attention modules that are replaced.
    """
    parameters = [name for name, _ in module.named_parameters() if not name.endswith("bias")]
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            owner, below = model.get_submodule(".".join(parts[:i])), ".".join(parts[i:])
            if _takes_fast_path(owner, module, gone):
                return f"{type(owner).__name__} reads its weight, as its attention stays float"
            if any(f"{below}.{parameter}" in read_by(type(owner)) for parameter in parameters):
                return f"the forward of {type(owner).__name__} reads its weight"
    return None


def _takes_fast_path(owner: nn.Module, module: nn.Module, gone: Collection[int]) -> bool:
    """Whether an owner may take the fast path of the stock layer once the module is replaced.

    In evaluation, it reads every weight of the layer. It is off where the attention is ours.
    """
    if not isinstance(owner, nn.TransformerEncoderLayer):
        return False
    attention = owner.self_attn
    if attention is module or id(attention) in gone:
        return False
    return isinstance(attention, nn.MultiheadAttention)


def read_by(kind: type[nn.Module]) -> set[str]:
    """What the forward of a class, and the methods it calls, read from self: dotted names.

    Those of its bases count, as ``super()`` may call them. What ``isinstance`` tells to be a tensor
    first does not count, nor does what has no source.
    """
    if kind not in _read:
        _read[kind] = _search(kind)
    return _read[kind]


_read: WeakKeyDictionary[type[nn.Module], set[str]] = WeakKeyDictionary()


def _search(kind: type[nn.Module]) -> set[str]:
    found: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        for base in kind.__mro__:
            function = _source_of(base.__dict__.get(name)) if base not in _KNOWN else None
            if function is not None and function.args.args:
                _collect(function, function.args.args[0].arg, frozenset(), found)
        methods = {name for name in found if _is_method(kind, name)} - seen
        waiting.extend(methods)
        seen |= methods
    return found


# What they read is known.
_KNOWN = (nn.Module, nn.TransformerEncoderLayer, object)


def _is_method(kind: type[nn.Module], name: str) -> bool:
    value = getattr(kind, name, None)
    return isinstance(value, property | FunctionType)


def _source_of(value: object) -> ast.FunctionDef | None:
    value = value.fget if isinstance(value, property) else value
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if tree.body and isinstance(tree.body[0], ast.FunctionDef) else None


def _collect(node: ast.AST, self_name: str, guarded: frozenset[str], found: set[str]) -> None:
    """Add what a node reads from self, but for what isinstance guards."""
    if isinstance(node, ast.If | ast.IfExp):
        within = guarded | _guards(node.test, self_name)
        body = node.body if isinstance(node.body, list) else [node.body]
        otherwise = node.orelse if isinstance(node.orelse, list) else [node.orelse]
        parts = [(part, within) for part in (node.test, *body)]
        parts += [(part, guarded) for part in otherwise]
    else:
        parts = [(part, guarded) for part in ast.iter_child_nodes(node)]
    if isinstance(node, ast.Attribute):
        chain = _chain(node, self_name)
        if chain and chain not in guarded:
            found.add(chain)
    for part, names in parts:
        _collect(part, self_name, names, found)


def _guards(test: ast.expr, self_name: str) -> frozenset[str]:
    """What a condition tells the type of: ``isinstance(self.a, ...) and ...``."""
    is_and = isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And)
    calls = [x for x in (test.values if is_and else [test]) if isinstance(x, ast.Call)]  # type: ignore[attr-defined]
    return frozenset(
        _chain(call.args[0], self_name)
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "isinstance" and call.args
    )


def _chain(node: ast.expr, self_name: str) -> str:
    """``a.b`` of ``self.a.b``; empty for anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    is_self = isinstance(node, ast.Name) and node.id == self_name
    return ".".join(reversed(names)) if is_self else ""

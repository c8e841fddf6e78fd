"""Opens children that end in conv-bn where their parent goes on with an addition or activation.

The forward of an inverted residual is ``x + self.conv(x)``, where ``self.conv`` is a Sequential
whose last two modules are conv and bn. With the child's nodes in the place of its call, the pattern
is whole. The child keeps a welded forward of its own for whoever else calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx, nn

from torchweld.convert import _match, _rules
from torchweld.convert._trace import Traced, trace, usual_call
from torchweld.convert._values import stock_class
from torchweld.convert._watch import Read, UntraceableError


def inline(owner: nn.Module, traced: Traced, may: Callable[[str], bool]) -> Traced:
    """Open such children in a graph, in place.

    Args:
        owner: the module the graph was traced from, still in the mode it was traced in.
        traced: its graph, and what the graph took for granted.
        may: whether the child of this name may be opened.

    Returns:
        The graph, with what the children's graphs took for granted besides.
    """
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and _match.is_plain_call(node):
            user = _match.only_user(node)
            if user is not None and _match.can_join(owner, user, node):
                name = str(node.target)
                child = _open(owner.get_submodule(name), name, may)
                if child is not None:
                    traced = _splice(traced, node, child, name)
    return traced


def _open(module: nn.Module, name: str, may: Callable[[str], bool]) -> Traced | None:
    """Trace a module of one argument that ends in conv-bn; None for any other."""
    if not may(name) or _rules.is_hooked(module) or not _rules.has_open_forward(module):
        return None
    forward = stock_class(module).forward
    try:
        traced = trace(module, forward, usual_call(forward))
    except UntraceableError:
        return None
    nodes = list(traced.graph.nodes)
    last = nodes[-1].args[0]
    if sum(node.op == "placeholder" for node in nodes) != 1 or not isinstance(last, fx.Node):
        return None
    if last.op != "call_module" or not _match.is_plain_call(last):
        return None
    if _match.is_pair(module, last):
        return traced
    path = str(last.target)
    child = _open(module.get_submodule(path), path, lambda below: may(f"{name}.{below}"))
    return None if child is None else _splice(traced, last, child, path)


def _splice(outer: Traced, call: fx.Node, inner: Traced, name: str) -> Traced:
    """Put a child's nodes in the place of its call."""
    values: dict[fx.Node, fx.Node] = {}
    with outer.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                values[node] = call.all_input_nodes[0]
            elif node.op == "output":
                call.replace_all_uses_with(values[node.args[0]])
            else:
                values[node] = outer.graph.node_copy(node, values.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    values[node].target = f"{name}.{node.target}"
    outer.graph.erase_node(call)
    return Traced(
        outer.graph,
        (*outer.reads, *(_below(read, name) for read in inner.reads)),
        (*outer.opened, name, *(f"{name}.{path}" for path in inner.opened)),
    )


def _below(read: Read, name: str) -> Read:
    if isinstance(read.holder, dict):
        return read
    return replace(read, holder=f"{name}.{read.holder}" if read.holder else name)

"""Records one module's forward as a graph, and everything the graph took for granted.

torch.fx runs a forward once with stand-ins for its tensors and writes down what happens to them.
Whatever else the forward looks at is baked into the graph: ``self.training``, ``len(self.layers)``,
a module-level constant, the random number behind a stochastic depth, a surrounding ``no_grad``.
Here every such look is seen: what can be compared again before each call becomes a
:class:`torchweld.convert._watch.Read`; what cannot makes the forward untraceable.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from torchweld.convert._inplace import IN_PLACE
from torchweld.convert._values import TENSOR, unflatten
from torchweld.convert._watch import Read, UntraceableError, Watch


@dataclass(frozen=True)
class Traced:
    """The graph of a forward, and what must hold for it to be right.

    Attributes:
        graph: the graph.
        reads: what the forward looked at besides its tensors.
        opened: children whose own nodes stand in the place of their calls.
    """

    graph: fx.Graph
    reads: tuple[Read, ...]
    opened: tuple[str, ...] = ()


def usual_call(forward: Callable[..., Any]) -> object:
    """The call to expect of a forward: a tensor for each argument that has no default."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    names = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
    count = len(needed) - len(names)
    return tuple, (tuple, *[TENSOR] * count), (dict, *[(name, TENSOR) for name in names])


def form(arguments: Any) -> object:
    """Return the call that a node's arguments make, each value in them taken for a tensor."""
    if isinstance(arguments, fx.Node):
        return TENSOR
    if isinstance(arguments, (list, tuple)):
        kind = list if isinstance(arguments, list) else tuple
        return kind, *map(form, arguments)
    if isinstance(arguments, dict):
        return dict, *[(key, form(value)) for key, value in arguments.items()]
    return type(arguments), arguments


_lock = threading.RLock()  # torch.fx, and the watch below, patch nn.Module itself while they trace


def trace(owner: nn.Module, forward: Callable[..., Any], spec: object) -> Traced:
    """Trace ``forward(owner, ...)`` alone: every module below the owner is one node.

    Args:
        owner: the module.
        forward: the unbound forward to run.
        spec: the call to trace, from :func:`torchweld.convert._values.flatten`; the graph's inputs
            are its tensors in order.

    Raises:
        UntraceableError: the forward depends on values, or has effects, that a graph loses.
    """
    with _lock:
        watch = Watch(owner)

        def run(_: nn.Module, *leaves: fx.Proxy) -> Any:
            arguments = unflatten(spec, iter(leaves))
            kept = unflatten(spec, iter(leaves))
            with watch.watching():
                args, kwargs = arguments
                output = forward(owner, *args, **kwargs)
            if not _same(arguments, kept):
                raise UntraceableError("its forward changes its arguments")
            return output

        names = "".join(f", x{i}" for i in range(_count_tensors(spec)))
        # torch.fx makes one input of each parameter it sees in the code of a forward.
        code = f"lambda self{names}: run(self{names})"
        kind = type("_Shell", (nn.Module,), {"forward": eval(code, {"run": run})})
        shell = kind()
        shell.owner = owner
        watch.run_code = run.__code__
        try:
            graph = _Tracer(watch).trace(shell)
        except Exception as error:
            raise UntraceableError(watch.refusal or _first_line(error)) from error
        if watch.refusal:
            raise UntraceableError(watch.refusal)
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = node.target.removeprefix("owner").removeprefix(".")
        return Traced(graph, tuple(watch.reads()))


def _count_tensors(spec: object) -> int:
    if isinstance(spec, tuple):
        return sum(map(_count_tensors, spec))
    return int(spec is TENSOR)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0]


def _same(left: Any, right: Any) -> bool:
    if type(left) in (list, tuple):
        return (
            type(left) is type(right) and len(left) == len(right) and all(map(_same, left, right))
        )
    if type(left) is dict:
        return (
            type(right) is dict
            and list(left) == list(right)
            and all(_same(left[key], right[key]) for key in left)
        )
    return left is right or (not isinstance(left, fx.Proxy) and bool(left == right))


class _Value(fx.Proxy):
    """A stand-in that knows when the forward asks what it is."""

    # An answer that is baked into the graph must be the one a real call gives.
    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        tracer = self.tracer
        assert isinstance(tracer, _Tracer)
        known = self.node.op == "placeholder" and hasattr(torch.Tensor, k)
        if tracer.watch.asking in ("hasattr", "getattr") and not known:
            tracer.watch.refuse(f"its forward asks whether a value has {k}")
        return fx.proxy.Attribute(self, k)

    # isinstance() asks for it.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        tracer = self.tracer
        assert isinstance(tracer, _Tracer)
        if not tracer.watch.asking:
            return _Value
        if self.node.op == "placeholder" and tracer.watch.asking == "isinstance":
            return torch.Tensor
        tracer.watch.refuse("its forward asks what type a value has")
        return _Value

    # torch.fx would let x.requires_grad = True pass unseen.
    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("node", "tracer"):
            assert isinstance(self.tracer, _Tracer)
            self.tracer.watch.refuse(f"its forward sets {name} of a value")
        object.__setattr__(self, name, value)


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


# torch.fx would write x += y down as x + y, and lose what other names for x see of it.
for _operation in IN_PLACE:
    setattr(_Value, f"__{_operation.__name__}__", _in_place(_operation))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch
        self.thread = threading.get_ident()

    # While one thread traces, torch.fx has every module call and attribute read of the process come
    # here; those of other threads are none of its business.
    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        # torch.fx would make a dict of it.
        if type(a) is OrderedDict:
            proxy = self.create_proxy("call_function", OrderedDict, ([*a.items()],), {})
            return proxy.node
        if isinstance(a, dict) and type(a) is not dict:
            self.watch.refuse(f"its forward makes a {type(a).__name__}")
        # torch.fx would store a constant on the user's module.
        if (
            isinstance(a, torch.Tensor)
            and a not in self.tensor_attrs
            and not any(a is t for t in self.root.parameters())
            and not any(a is t for t in self.root.buffers())
        ):
            self.watch.refuse("its forward uses a tensor that is no attribute of it")
        return super().create_arg(a)

"""Records one module's forward as a graph, and everything the graph took for granted.

torch.fx runs a forward once with stand-ins for its tensors and writes down what happens to them.
Whatever else the forward looks at is baked into the graph: ``self.training``, ``len(self.layers)``,
a module-level constant, the random number behind a stochastic depth, a surrounding ``no_grad``.
Here every such look is seen: what can be compared again before each call becomes a
:class:`Read`; what cannot makes the forward untraceable.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchweld.convert._inplace import IN_PLACE
from torchweld.convert._values import MISSING, TENSOR, UnwatchableError, fingerprint, unflatten


class UntraceableError(Exception):
    """A forward that a graph cannot stand for; the message says why."""


@dataclass(frozen=True)
class Read:
    """A value other than its tensors that a forward looked at, by where it is found again."""

    # A module's path below the owner, or a Python module's globals.
    holder: str | dict[str, Any] = field(repr=False)
    name: str
    value: object


@dataclass(frozen=True)
class Traced:
    """The graph of a forward and the reads under which it holds."""

    graph: fx.Graph
    reads: tuple[Read, ...]


_lock = threading.RLock()  # torch.fx, and the watch below, patch nn.Module itself while they trace


def trace(owner: nn.Module, forward: Callable[..., Any], spec: object) -> Traced:
    """Trace ``forward(owner, ...)`` alone: every module below the owner is one node.

    Args:
        owner: the module.
        forward: the unbound forward to run.
        spec: the call to trace, from :func:`torchweld.convert._values.flatten`; the graph's inputs
            are its tensors in order.

    Raises:
        UntraceableError: the forward's course depends on values, or has effects, that a graph loses.
    """
    with _lock:
        watch = _Watch(owner)

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
    @property
    def __class__(self) -> type:  # type: ignore[override]
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

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
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


class _NoCompute(TorchDispatchMode):
    """While tracing nothing real may be computed: it would be computed once and for all."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.refuse(f"its forward computes {func} apart from its inputs")


_TORCH, _OURS = (str(Path(file).parent) + "/" for file in (torch.__file__, __file__))
# Parts of torch whose functions, given a stand-in, leave a node and do nothing else.
_TRANSPARENT = tuple(
    _TORCH + part
    for part in ("fx/", "nn/functional.py", "functional.py", "nn/modules/", "_tensor.py",
                 "_jit_internal.py", "_ops.py", "_VF.py")
)  # fmt: skip
_PURE_MODULES = {"math", "_operator", "itertools", "_functools", "_collections"}
_TORCH_MODULES = {"torch._C._nn", "torch._C._linalg", "torch._C._special", "torch._C._fft"}
_IMPURE_BUILTINS = {
    "breakpoint", "compile", "eval", "exec", "globals", "id", "input", "open", "print", "vars",
    "__import__",
}  # fmt: skip
_QUESTIONS = {"isinstance", "hasattr", "getattr", "callable"}
_DATA = (
    str, bytes, int, float, complex, list, tuple, dict, set, frozenset, type, enum.Enum,
    types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()),
    torch.Tensor, fx.Proxy,
)  # fmt: skip
_NOT_STATE = set(dir(nn.Module)) | set(vars(nn.Module())) - {"training", "_modules"}


class _Watch:
    """While entered, sees what the forward reads, refuses what a graph cannot repeat."""

    def __init__(self, owner: nn.Module):
        self.paths = {id(module): path for path, module in reversed([*owner.named_modules()])}
        self.refusal = ""
        self.asking = ""
        self.run_code: types.CodeType | None = None
        self._values: dict[tuple[object, str], tuple[object, Read]] = {}

    def refuse(self, reason: str) -> None:
        # Kept as well as raised: the forward may catch what it likes.
        self.refusal = self.refusal or reason
        raise UntraceableError(reason)

    def reads(self) -> Iterator[Read]:
        for _, read in self._values.values():
            yield read

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See and refuse, in this thread, until the block ends."""
        self._thread = threading.get_ident()
        profile = sys.getprofile()
        patched = {
            "__getattribute__": self._make_getattribute(),
            "__setattr__": self._make_refusal("sets", nn.Module.__setattr__),
            "__delattr__": self._make_refusal("deletes", nn.Module.__delattr__),
        }
        stock = {name: vars(nn.Module)[name] for name in patched if name in vars(nn.Module)}
        try:
            for name, function in patched.items():
                setattr(nn.Module, name, function)
            with _NoCompute(self):
                sys.setprofile(self._on_call)
                try:
                    yield
                finally:
                    # A profiler written in C, such as cProfile, cannot be set again from here.
                    sys.setprofile(profile if callable(profile) else None)
        finally:
            for name in patched:
                if name in stock:
                    setattr(nn.Module, name, stock[name])
                else:
                    delattr(nn.Module, name)
        for value, read in self._values.values():
            if not _is_fingerprint(value, read.value):
                _remove_stand_ins(value)
                self.refusal = self.refusal or f"its forward changes {read.name}"

    def _make_getattribute(self) -> Callable[[nn.Module, str], Any]:
        def __getattribute__(module: nn.Module, name: str) -> Any:  # noqa: N807
            try:
                value = object.__getattribute__(module, name)
            except AttributeError:
                # Parameters, buffers and modules, which nn.Module.__getattr__ finds next.
                state = object.__getattribute__(module, "__dict__")
                tables = [state.get(k, {}) for k in ("_parameters", "_buffers", "_modules")]
                found = [table[name] for table in tables if name in table]
                self._saw(module, name, found[0] if found else MISSING)
                raise
            self._saw(module, name, value)
            return value

        return __getattribute__

    def _make_refusal(self, verb: str, stock: Any) -> Callable[..., None]:
        def refusal(module: nn.Module, name: str, *value: Any) -> None:
            if threading.get_ident() == self._thread:
                self.refuse(f"its forward {verb} self.{name}")
            stock(module, name, *value)

        return refusal

    def _saw(self, module: nn.Module, name: str, value: object) -> None:
        path = self.paths.get(id(module))
        if path is None or name in _NOT_STATE or threading.get_ident() != self._thread:
            return
        if isinstance(value, types.MethodType) and value.__self__ is module:
            return
        if isinstance(getattr(type(module), name, None), (property, functools.cached_property)):
            return  # what it reads is seen
        self._keep(path, path, name, value)

    def _keep(self, key: object, holder: Any, name: str, value: object) -> None:
        if (key, name) not in self._values:
            try:
                read = Read(holder, name, fingerprint(value))
            except UnwatchableError as unwatchable:
                self.refuse(f"its forward reads {name}, {unwatchable}")
            self._values[key, name] = value, read

    def _on_call(self, frame: types.FrameType, event: str, callee: Any) -> None:
        if event == "call":
            self._on_python_call(frame)
        elif not frame.f_code.co_filename.startswith(_OURS) and self._is_users(frame):
            self.asking = ""
            if event == "c_call":
                self._on_c_call(callee)

    def _is_users(self, frame: types.FrameType | None) -> bool:
        """Whether a frame is the forward's own code, reached without going through torch."""
        while frame is not None and not frame.f_code.co_filename.startswith(_TORCH):
            if frame.f_code is self.run_code:
                return True
            frame = frame.f_back
        return False

    def _on_python_call(self, frame: types.FrameType) -> None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS):
            return
        if file.startswith(_TORCH):
            if not file.startswith(_TRANSPARENT) and self._is_users(frame.f_back):
                self.refuse(f"its forward calls {frame.f_code.co_name} of {_module_name(file)}")
        elif self._is_users(frame):
            for name in _globals_of(frame.f_code):
                if name in frame.f_globals:
                    self._saw_global(frame.f_globals, name)

    def _saw_global(self, namespace: dict[str, Any], name: str) -> None:
        value = namespace[name]
        if callable(value) or isinstance(value, types.ModuleType):
            return
        self._keep(id(namespace), namespace, name, value)

    def _on_c_call(self, callee: Any) -> None:
        name, home = callee.__name__, getattr(callee, "__self__", None)
        if home is builtins:
            allowed = name not in _IMPURE_BUILTINS
            self.asking = name if name in _QUESTIONS else ""
        elif isinstance(home, types.ModuleType):
            allowed = home.__name__ in _PURE_MODULES | _TORCH_MODULES
        elif home is None or isinstance(home, _DATA):
            allowed = True
        else:
            allowed = False
        if not allowed:
            self.refuse(f"its forward calls {name}()")


def _module_name(file: str) -> str:
    return "torch." + file.removeprefix(_TORCH).removesuffix(".py").replace("/", ".")


@functools.lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> frozenset[str]:
    return frozenset(
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )


def _is_fingerprint(value: object, expected: object) -> bool:
    try:
        return fingerprint(value) == expected
    except UnwatchableError:
        return False


def _remove_stand_ins(value: Any) -> None:
    """Take out of a list or dict what the forward put into it."""
    if isinstance(value, list):
        value[:] = [item for item in value if not isinstance(item, fx.Proxy)]
    elif isinstance(value, dict):
        for key in [key for key in value if isinstance(value[key], fx.Proxy)]:
            del value[key]

"""Sees what a forward does while it is traced, besides computing on its inputs."""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import gc
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

from torchweld.convert._values import MISSING, UnwatchableError, fingerprint


class UntraceableError(Exception):
    """A forward that a graph cannot stand for; the message says why."""


@dataclass(frozen=True)
class Read:
    """A value other than its tensors that a forward looked at, by where it is found again."""

    # A module's path below the owner, or a Python module's globals.
    holder: str | dict[str, Any] = field(repr=False)
    name: str
    value: object


class _NoCompute(TorchDispatchMode):
    """While tracing nothing real may be computed: it would be computed once and for all."""

    def __init__(self, watch: Watch):
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
_DATA: tuple[type, ...] = (
    str, bytes, int, float, complex, list, tuple, dict, set, frozenset, type, enum.Enum,
    types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()),
    torch.Tensor, fx.Proxy,
)  # fmt: skip
_NOT_STATE = set(dir(nn.Module)) | set(vars(nn.Module())) - {"training", "_modules"}


class Watch:
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
        # A collection could run anybody's finalizers in the middle of the forward.
        collects = gc.isenabled()
        gc.disable()
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
            if collects:
                gc.enable()
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

"""The forward of a module that owns fused patterns, and the class that carries it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from torchweld import _recipes
from torchweld.convert import _match, _rules
from torchweld.convert._inline import inline
from torchweld.convert._sight import Sight, find, holds
from torchweld.convert._trace import Traced, trace, usual_call
from torchweld.convert._values import STOCK, UnwatchableError, flatten, stock_class
from torchweld.convert._watch import Read, UntraceableError

_STATE = "_torchweld"
_MOST_PLANS = 8

Forward = Callable[..., Any]
MemorySaving: TypeAlias = bool | Literal["recompute"]


@dataclass(frozen=True)
class Plan:
    """A rewritten forward for calls of one form, and what must hold for it to be right.

    Attributes:
        spec: the form of the call.
        reads: what the stock forward looked at besides its tensors.
        opened: children whose own calls stand in the forward in the place of theirs.
        units: what is fused.
        run: the rewritten forward, which takes the owner and its :meth:`pairs` before the tensors;
            None where the stock one has to run.
    """

    spec: object
    reads: tuple[Read, ...]
    opened: tuple[str, ...]
    units: tuple[_match.Unit, ...]
    run: Forward | None

    def fits(self, owner: nn.Module) -> bool:
        """Whether the owner still is as this plan found it."""
        return (
            all(holds(owner, read) for read in self.reads)
            and not any(_rules.is_hooked(find(owner, path)) for path in self.opened)
            and all(_is_ready(owner, unit) for unit in self.units)
        )

    def pairs(self, owner: nn.Module) -> list[nn.Module | None]:
        """Conv and bn of each unit in turn."""
        return [find(owner, path) for unit in self.units for path in unit.pair]


class Weld:
    """What a welded module keeps.

    Attributes:
        pairs: what may be fused.
        plans: those made so far.
        memory_saving: as :func:`torchweld.weld` takes it.
        channels_last: whether its images are put in that memory order first, which nobody sees.
    """

    def __init__(
        self,
        pairs: frozenset[tuple[str, str]],
        plans: tuple[Plan, ...] = (),
        memory_saving: MemorySaving = False,
        channels_last: bool = False,
    ):
        self.pairs = pairs
        self.plans = list(plans)
        self.memory_saving = memory_saving
        self.channels_last = channels_last
        self.sight: Sight | None = None  # of the plan that fitted last

    # A plan names modules and holds none, so a copy of the module can use it.
    def __deepcopy__(self, memo: dict[int, Any]) -> Weld:
        return Weld(self.pairs, tuple(self.plans), self.memory_saving, self.channels_last)

    def __reduce__(self) -> tuple[Any, ...]:
        return Weld, (self.pairs, (), self.memory_saving, self.channels_last)

    def add(self, owner: nn.Module, spec: object, traced: Traced) -> None:
        """Make a plan of a traced forward. The graph is rewritten in place."""
        traced = inline(owner, traced, self._reaches)
        units = tuple(_match.fuse(owner, traced.graph, self.pairs))
        code = traced.graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<torchweld: {type(owner).__name__}.forward>", "exec"), namespace)
        self.plans.append(Plan(spec, traced.reads, traced.opened, units, namespace["forward"]))

    def _reaches(self, path: str) -> bool:
        return any(bn.startswith(f"{path}.") for _, bn in self.pairs)

    def prepare(self, owner: nn.Module, calls: Iterable[object] = ()) -> None:
        """Make the plans of the usual call and of others, in training and in evaluation."""
        forward = stock_class(owner).forward
        for spec in (*calls, usual_call(forward)):
            for training in (True, False):
                with mode(owner, training), suppress(UntraceableError):
                    if self._known(owner, spec) is None and len(self.plans) < _MOST_PLANS:
                        self.add(owner, spec, trace(owner, forward, spec))

    def plan_for(self, owner: nn.Module, stock: Forward, spec: object) -> Plan | None:
        """Return the plan for a call, making it if it is the first of its form."""
        known = self._known(owner, spec)
        if known is not None:
            return known
        if len(self.plans) >= _MOST_PLANS or torch.compiler.is_compiling():
            return None
        try:
            self.add(owner, spec, trace(owner, stock, spec))
        except UntraceableError:
            # Last in the list: a plan that holds under other reads comes first.
            self.plans.append(Plan(spec, (), (), (), None))
        return self.plans[-1]

    def _known(self, owner: nn.Module, spec: object) -> Plan | None:
        for plan in self.plans:
            if plan.spec == spec and plan.fits(owner):
                self._see(owner, plan)
                return plan
        return None

    def _see(self, owner: nn.Module, plan: Plan) -> None:
        if plan.run is not None and not torch.compiler.is_compiling():
            self.sight = Sight(owner, plan)


def install(owner: nn.Module, weld: Weld, snapshot: bool = False) -> None:
    """Give a module the welded form of its class; a snapshot cannot go back to training."""
    owner.__class__ = _welded_class(stock_class(owner), snapshot)  # type: ignore[arg-type]
    owner.__dict__[_STATE] = weld


def hide_channels_last(root: nn.Module, snapshot: bool) -> None:
    """Have a model compute in channels_last memory whatever order its input comes in."""
    if not is_welded(root):
        try:
            install(root, Weld(frozenset()), snapshot)
        except TypeError:
            return  # a class that cannot be subclassed
    root.__dict__[_STATE].channels_last = True


def uninstall(owner: nn.Module) -> None:
    """Give a welded module its stock class back."""
    owner.__class__ = stock_class(owner)
    owner.__dict__.pop(_STATE, None)


def save_memory(model: nn.Module, how: MemorySaving) -> None:
    """Have a welded model save recipes: from its root on, and from wherever it is entered."""
    if not is_welded(model):
        install(model, Weld(frozenset()))
    for module in model.modules():
        weld = module.__dict__.get(_STATE)
        if weld is not None:
            weld.memory_saving = how


def is_welded(module: nn.Module) -> bool:
    """Whether a module owns fused patterns."""
    return STOCK in type(module).__dict__


def is_snapshot(module: nn.Module) -> bool:
    """Whether a module is part of an inference snapshot."""
    return is_welded(module) and "train" in type(module).__dict__


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a whole tree in one mode for a while; past ``train()``, which may do more."""
    flags = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in flags:
            part.__dict__["training"] = training
        yield
    finally:
        for part, flag in flags:
            part.__dict__["training"] = flag


def _is_ready(owner: nn.Module, unit: _match.Unit) -> bool:
    pair = find(owner, unit.conv), find(owner, unit.bn)
    if (type(pair[0]), type(pair[1])) != unit.kinds or any(map(_rules.is_hooked, pair)):
        return False
    if unit.act is None:
        return True
    act = find(owner, unit.act)
    same = _rules.activation_of(act) == (unit.activation, unit.negative_slope)
    return same and not _rules.is_hooked(act)


def _form(args: Any, kwargs: Any) -> object:
    try:
        return flatten(args, kwargs)[0]
    except UnwatchableError:
        return None


def _in_channels_last(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.device.type != "cpu":
        return value
    if value.requires_grad:
        return value  # whoever reads its gradient would see the order
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if not tracing and value.shape[1] == 1 and value.is_contiguous():
        # The same memory, but called so: a convolution goes by the strides.
        n, _, h, w = value.shape
        return value.as_strided((n, 1, h, w), (h * w, 1, w, 1))
    return value.contiguous(memory_format=torch.channels_last)


@functools.cache
def _welded_class(stock: type[nn.Module], snapshot: bool) -> type[nn.Module]:
    stock_forward = stock.forward
    usual = usual_call(stock_forward)  # the form of call that was looked at

    @functools.wraps(stock_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weld = getattr(self, _STATE, None)
        if weld is not None and weld.channels_last and _form(args, kwargs) == usual:
            args = tuple(_in_channels_last(value) for value in args)
        if weld is not None and weld.memory_saving and self.training and _recipes.can_record():
            with _recipes.recording(recompute=weld.memory_saving == "recompute"):
                return run(self, weld, args, kwargs)
        return run(self, weld, args, kwargs)

    def run(self: nn.Module, weld: Weld | None, args: Any, kwargs: Any) -> Any:
        # Hooks on every module of the process are to see every module.
        if weld is None or not weld.pairs or _has_any_global_hook():
            return stock_forward(self, *args, **kwargs)
        try:
            spec, leaves = flatten(args, kwargs)
        except UnwatchableError:
            return stock_forward(self, *args, **kwargs)
        sight = weld.sight
        # A compiled graph has guards of its own on modules, by their paths.
        if (
            sight is not None
            and not torch.compiler.is_compiling()
            and sight.plan.spec == spec
            and sight.holds(self)
        ):
            return sight.plan.run(self, sight.pairs, *leaves)  # type: ignore[misc]
        plan = weld.plan_for(self, stock_forward, spec)
        if plan is None or plan.run is None:
            return stock_forward(self, *args, **kwargs)
        return plan.run(self, plan.pairs(self), *leaves)

    # torch.compile gives up on a code object after a few compilations, whosever they were.
    functions: tuple[Any, ...] = forward, run
    for function in functions:
        code = function.__code__
        function.__code__ = code.replace(co_name=f"{code.co_name} of {stock.__qualname__}")

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = stock.__reduce_ex__(self, protocol)
        function, arguments, *rest = reduced
        if arguments and arguments[0] is type(self):
            return _rebuild, (function, stock, snapshot, *arguments[1:]), *rest
        return reduced

    def setstate(self: nn.Module, state: Any) -> None:
        stock.__setstate__(self, state)
        weld = self.__dict__.get(_STATE)
        if weld is not None and weld.pairs and not weld.plans:
            weld.prepare(self)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(
                "torchweld: this model was welded with inference=True and cannot train; "
                "train the model it was made from"
            )
        return stock.train(self, mode)

    def prepare_scriptable(self: nn.Module) -> nn.Module:
        raise RuntimeError(
            "torchweld: torch.jit.script cannot take a welded model; use torch.jit.trace or "
            "torch.export, or script torchweld.unweld(model)"
        )

    members: dict[str, Any] = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__prepare_scriptable__": prepare_scriptable,
        "__reduce_ex__": reduce_ex,
        "__setstate__": setstate,
        "forward": forward,
        STOCK: stock,
    }
    if snapshot:
        members["train"] = train
    meta: Any = type(stock)
    kind: type[nn.Module] = meta(stock.__name__, (stock,), members)
    return kind


def _rebuild(
    function: Callable[..., Any], stock: type[nn.Module], snapshot: bool, *rest: Any
) -> Any:
    return function(_welded_class(stock, snapshot), *rest)  # type: ignore[arg-type]

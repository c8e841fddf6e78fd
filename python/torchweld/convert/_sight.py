"""What a plan depends on, held by identity: quick to look at again before every call.

Finding each module by its path and comparing what a forward read takes longer than the convolution
of a small layer. What is the same object as before needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchweld.convert._values import MISSING, UNCHANGING, UnwatchableError, fingerprint
from torchweld.convert._watch import Read

if TYPE_CHECKING:
    from torchweld.convert._welded import Plan

_OF_ACTIVATIONS = ("negative_slope", "min_val", "max_val")


def find(owner: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = owner
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def holds(owner: nn.Module, read: Read) -> bool:
    if isinstance(read.holder, dict):
        # A compiled graph has its own guards on globals.
        return torch.compiler.is_compiling() or (
            read.name in read.holder and _is(read.holder[read.name], read.value)
        )
    holder = find(owner, read.holder)
    return holder is not None and _is(getattr(holder, read.name, MISSING), read.value)


def _is(value: object, expected: object) -> bool:
    try:
        return fingerprint(value) == expected
    except UnwatchableError:
        return False


class Sight:
    """That a plan fits its owner, as it did when this was made.

    The owner keeps this, which therefore holds its children and not the owner itself: else a model
    would stay until the next garbage collection.

    Attributes:
        plan: the plan.
        pairs: conv and bn of each of its units in turn.
    """

    def __init__(self, owner: nn.Module, plan: Plan):
        self.plan = plan
        self._own: dict[str, object] = {}
        # By the ids of their dicts, which they hold.
        self._entries: dict[tuple[int, str], tuple[dict[str, Any], str, object]] = {}
        self._children: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self._kinds: dict[nn.Module, type] = {}
        self._compared: list[Read] = []  # what may change while it stays the same object

        for read in plan.reads:
            self._see(owner, read)
        acts = [self._reach(owner, unit.act) for unit in plan.units if unit.act is not None]
        for act in acts:
            for name in _OF_ACTIVATIONS:
                self._see_entry(owner, act.__dict__, name, act.__dict__.get(name, MISSING))
        self.pairs = [self._reach(owner, path) for unit in plan.units for path in unit.pair]
        opened = [self._reach(owner, path) for path in plan.opened]
        self._states = [module.__dict__ for module in dict.fromkeys((*self.pairs, *acts, *opened))]
        for children, items in self._children:  # compared whole
            for name, _ in items:
                self._entries.pop((id(children), name), None)

    def holds(self, owner: nn.Module) -> bool:
        """Whether all of it is as it was."""
        own = owner.__dict__
        for name, value in self._own.items():
            if own.get(name, MISSING) is not value:
                return False
        for values, name, value in self._entries.values():
            if values.get(name, MISSING) is not value:
                return False
        for children, items in self._children:
            if tuple(children.items()) != items:
                return False
        for module, kind in self._kinds.items():
            if type(module) is not kind:
                return False
        for state in self._states:  # as _rules.is_hooked
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
                or "forward" in state
            ):
                return False
        return all(holds(owner, read) for read in self._compared)

    def _reach(self, owner: nn.Module, path: str) -> nn.Module:
        module = owner
        for name in path.split(".") if path else ():
            module = self._see_child(owner, module, name)
        return module

    def _see_child(self, owner: nn.Module, holder: nn.Module, name: str) -> nn.Module:
        children: Any = holder._modules
        child: nn.Module = children[name]
        self._see_table(owner, holder)
        self._kinds[child] = type(child)
        self._entries[id(children), name] = children, name, child
        return child

    def _see_table(self, owner: nn.Module, holder: nn.Module) -> None:
        # A replica shares everything with its original but this.
        self._see_entry(owner, holder.__dict__, "_modules", holder._modules)

    def _see(self, owner: nn.Module, read: Read) -> None:
        if isinstance(read.holder, dict):
            self._see_value(owner, read.holder, read, read.holder.get(read.name, MISSING))
            return
        holder = self._reach(owner, read.holder)
        children = holder._modules
        if read.name == "_modules":
            self._see_table(owner, holder)
            self._children.append((children, tuple(children.items())))
            self._kinds.update((m, type(m)) for m in children.values() if m is not None)
        elif children.get(read.name) is not None:
            self._see_child(owner, holder, read.name)
        else:
            self._see_value(owner, holder.__dict__, read, getattr(holder, read.name, MISSING))

    def _see_value(
        self, owner: nn.Module, values: dict[str, Any], read: Read, value: object
    ) -> None:
        # What is nowhere may appear in any of several places.
        if read.name in values and values[read.name] is value and _is_unchanging(value):
            self._see_entry(owner, values, read.name, value)
        else:
            self._compared.append(read)

    def _see_entry(
        self, owner: nn.Module, values: dict[str, Any], name: str, value: object
    ) -> None:
        if values is owner.__dict__:
            self._own[name] = value
        else:
            self._entries[id(values), name] = values, name, value


def _is_unchanging(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_unchanging, value))
    return isinstance(value, UNCHANGING)

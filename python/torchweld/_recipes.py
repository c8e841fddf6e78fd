"""Saves for the backward what a fused output can be made from, instead of the output.

A fused unit saves its convolution's output, and its own output is one pass over that. Inside
:func:`recording`, whatever saves such an output, the next convolution or a max pooling, therefore
gets a recipe to save, and the backward makes the same bits again. A residual that has a recipe is
part of a recipe by its recipe, and so is what our max pooling made a smaller image of.

The goal is that of Rota Bulò et al., In-Place Activated BatchNorm
(https://arxiv.org/abs/1712.02616); as nothing is inverted here, any activation and weight will do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_ops = torch.ops.torchweld


class Saved:
    """A tensor saved as it is.

    With hooks in place, autograd leaves it to them to notice that a saved tensor was written to.
    """

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor):
        # A node that held its own output would never be freed.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def get(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: it was modified in place since.
        """
        tensor, version = self._tensor, self._version
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{tensor.type()} {[*tensor.shape]}] is at version "
                f"{tensor._version}; expected version {version} instead."
            )
        return tensor


class Recipe:
    """How to make a tensor again: ``make(*sources, *arguments)``.

    A tensor that was made stays until everybody who saved it has asked for it, so that one backward
    makes it once: from its end, a chain of residuals is made link by link.
    """

    __slots__ = (
        "__weakref__", "_arguments", "_left", "_made", "_make", "_sources", "_stride", "saved",
        "version",
    )  # fmt: skip

    def __init__(
        self,
        tensor: Tensor,
        make: Callable[..., Tensor],
        sources: Sequence[Tensor | None],
        arguments: Sequence[Any],
    ):
        self.version = tensor._version
        self.saved = 0  # how often it stands in for the tensor in the graph
        self._stride = tensor.stride()
        self._make, self._arguments = make, arguments
        self._sources = [None if s is None else recipe_of(s) or Saved(s) for s in sources]
        self._made: Tensor | None = None
        self._left = 0

    def get(self) -> Tensor:
        """Return the tensor to one of those who saved it."""
        tensor = self._made
        if tensor is None:
            tensor = self._make_all()[self]
        self._left -= 1
        if self._left <= 0:
            self._made = None
        return tensor

    # A loop, as a chain of residuals may be as long as the network is deep.
    def _make_all(self) -> dict[Recipe, Tensor]:
        values: dict[Recipe, Tensor] = {}
        pending = [self]
        while pending:
            recipe = pending[-1]
            value = recipe._made
            missing = [s for s in recipe._sources if isinstance(s, Recipe) and s not in values]
            if value is None and missing and recipe not in values:
                pending += missing
                continue
            pending.pop()
            if recipe not in values:
                values[recipe] = recipe._make_from(values) if value is None else value
        return values

    def _make_from(self, values: dict[Recipe, Tensor]) -> Tensor:
        tensors = [values[s] if isinstance(s, Recipe) else s and s.get() for s in self._sources]
        with torch.no_grad(), torch._C._DisableAutocast():
            tensor = self._make(*tensors, *self._arguments)
            if tensor.stride() != self._stride:
                tensor = torch.empty_strided(
                    tensor.shape, self._stride, dtype=tensor.dtype, device=tensor.device
                ).copy_(tensor)
        self._left = self.saved
        self._made = tensor if self._left > 0 else None
        return tensor


class _Recording(threading.local):
    recipes: WeakTensorKeyDictionary | None = None
    recompute = False


_recording = _Recording()


# --- the hooks: functions, not closures, so that compiled code finds the same ones in every call --
def _pack(tensor: Tensor) -> Saved | Recipe:
    recipe = recipe_of(tensor)
    if recipe is None:
        return Saved(tensor)
    recipe.saved += 1
    return recipe


def _unpack(packed: Saved | Recipe) -> Tensor:
    return packed.get()


def _innermost(hooks_while_tracing: bool) -> tuple[Any, Any] | None:
    """The pair of hooks in effect; compilers switch them off while they trace."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(
        hooks_while_tracing
    )
    return hooks


def can_record() -> bool:
    """Whether :func:`recording` has an effect here.

    Not where no graph is made. And not under the hooks of others, whom ours would hide every tensor
    from: activation checkpointing, offloading, an outer recording of our own.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or not torch.is_grad_enabled():
        return False
    allowed = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return allowed and _innermost(True) is None


@contextmanager
def recording(recompute: bool) -> Iterator[None]:
    """Save recipes instead of the outputs of fused units, where :func:`can_record`.

    Args:
        recompute: save a unit's input and convolve again, instead of saving the convolution's
            output.
    """
    before = _recording.recipes, _recording.recompute
    _recording.recipes, _recording.recompute = WeakTensorKeyDictionary(), recompute
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _recording.recipes, _recording.recompute = before


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor of this recording or of a view of one, unless it was written to."""
    recipes, base = _recording.recipes, tensor._base
    if recipes is None:
        return None
    recipe: Recipe | None = recipes.get(tensor)
    if recipe is None and base is not None and base.dtype == tensor.dtype and recipe_of(base):
        offset = tensor.storage_offset() - base.storage_offset()
        place = tensor.shape, tensor.stride(), offset
        recipe = recipes[tensor] = Recipe(tensor, _view, (base,), place)
    return recipe if recipe is not None and recipe.version == tensor._version else None


def _view(base: Tensor, shape: list[int], stride: list[int], offset: int) -> Tensor:
    return base.as_strided(shape, stride, base.storage_offset() + offset)


def is_recording() -> bool:
    """Whether what is saved now goes through a recording of this thread."""
    if _recording.recipes is None:
        return False
    hooks = _innermost(False)
    return hooks is not None and hooks[0] is _pack


def recomputes() -> bool:
    """Whether convolutions are to be computed again; see :func:`recording`."""
    return _recording.recompute


def remember(
    tensor: Tensor,
    make: Callable[..., Tensor],
    sources: Sequence[Tensor | None],
    arguments: Sequence[Any] = (),
) -> None:
    """Note that ``make(*sources, *arguments)`` gives the bits of a tensor, before it is saved."""
    if is_recording():
        assert _recording.recipes is not None
        _recording.recipes[tensor] = Recipe(tensor, make, sources, arguments)


def forget(tensor: Tensor) -> None:
    """From here on, save this tensor as it is."""
    if _recording.recipes is not None:
        for saved in (tensor, tensor._base):
            if saved is not None:
                _recording.recipes.pop(saved, None)

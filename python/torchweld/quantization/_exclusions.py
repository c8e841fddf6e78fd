"""Which layers a caller wants left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

# A name pattern, a module type, or a predicate on the name and the layer.
Exclusion = str | type[nn.Module] | Callable[[str, nn.Module], bool]


class Exclusions:
    """The ``exclude`` argument of a conversion, checked.

    Raises:
        TypeError: an element is no name pattern, module type or function.
        ValueError: a name pattern matches no module of the model.
    """

    def __init__(self, function: str, model: nn.Module, exclude: Exclusion | Iterable[Exclusion]):
        # A module is callable, and one that holds others iterable: neither is meant here.
        is_many = isinstance(exclude, Iterable) and not isinstance(exclude, (str, type, nn.Module))
        self._all: list[Exclusion] = list(exclude) if is_many else [exclude]  # type: ignore[arg-type, list-item]
        self._model = model
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        for exclusion in self._all:
            if isinstance(exclusion, str):
                if not any(fnmatchcase(name, exclusion) for name in names):
                    raise ValueError(
                        f"{function}: exclude: expected the name of a module, got {exclusion!r}, "
                        "which matches none"
                    )
            elif not callable(exclusion) or isinstance(exclusion, nn.Module):
                raise TypeError(
                    f"{function}: exclude: expected name patterns, module types or functions of "
                    f"name and module, got {exclusion!r}"
                )

    def reason(self, names: Iterable[str], module: nn.Module) -> str | None:
        """Which exclusion a layer of these names falls under, or None."""
        for exclusion in self._all:
            if any(self._hits(exclusion, name, module) for name in names):
                what = exclusion if isinstance(exclusion, str) else _name_of(exclusion)
                return f"excluded by {what!r}"
        return None

    def _hits(self, exclusion: Exclusion, name: str, module: nn.Module) -> bool:
        """Whether one holds for the layer of a name, or for a module that holds it."""
        if isinstance(exclusion, str):
            return any(fnmatchcase(part, exclusion) for part in _path(name))
        if isinstance(exclusion, type):
            parts = map(self._model.get_submodule, _path(name))
            return any(isinstance(part, exclusion) for part in parts)
        return exclusion(name, module)


def _path(name: str) -> list[str]:
    """``"a.b"`` to ``["", "a", "a.b"]``: the names of a module and of all that hold it."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _name_of(exclusion: object) -> str:
    return getattr(exclusion, "__name__", type(exclusion).__name__)

"""Python's in-place operators, as functions of our own.

``operator.iadd`` itself would do, but torch.fx prints it as ``a += b``, which for a number rebinds
a name that other nodes still read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any


def _own(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def function(a: Any, b: Any) -> Any:
        return operation(a, b)

    function.__name__ = function.__qualname__ = operation.__name__
    return function


iadd = _own(operator.iadd)
IN_PLACE = (
    iadd,
    *map(
        _own,
        (
            operator.isub, operator.imul, operator.imatmul, operator.itruediv, operator.ifloordiv,
            operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
            operator.ilshift, operator.irshift,
        ),
    ),
)  # fmt: skip

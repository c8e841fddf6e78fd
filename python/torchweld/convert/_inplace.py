"""Python's in-place operators as functions that keep the meaning they have for every type.

``operator.iadd`` would do, but torch.fx prints it as ``a += b``, which for a number rebinds a name
that other nodes still read.
"""

from typing import Any


def iadd(a: Any, b: Any) -> Any:  # noqa: D103
    a += b
    return a


def isub(a: Any, b: Any) -> Any:  # noqa: D103
    a -= b
    return a


def imul(a: Any, b: Any) -> Any:  # noqa: D103
    a *= b
    return a


def imatmul(a: Any, b: Any) -> Any:  # noqa: D103
    a @= b
    return a


def itruediv(a: Any, b: Any) -> Any:  # noqa: D103
    a /= b
    return a


def ifloordiv(a: Any, b: Any) -> Any:  # noqa: D103
    a //= b
    return a


def imod(a: Any, b: Any) -> Any:  # noqa: D103
    a %= b
    return a


def ipow(a: Any, b: Any) -> Any:  # noqa: D103
    a **= b
    return a


def iand(a: Any, b: Any) -> Any:  # noqa: D103
    a &= b
    return a


def ior(a: Any, b: Any) -> Any:  # noqa: D103
    a |= b
    return a


def ixor(a: Any, b: Any) -> Any:  # noqa: D103
    a ^= b
    return a


def ilshift(a: Any, b: Any) -> Any:  # noqa: D103
    a <<= b
    return a


def irshift(a: Any, b: Any) -> Any:  # noqa: D103
    a >>= b
    return a


IN_PLACE = (
    iadd, isub, imul, imatmul, itruediv, ifloordiv, imod, ipow, iand, ior, ixor, ilshift, irshift,
)  # fmt: skip

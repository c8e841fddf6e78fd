"""Fake kernels of operators whose tensors must be on one device."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As ``torch.library.register_fake``, refusing tensors of several devices.

    A call with one tensor on the meta device comes here even if the others hold data; its result
    would be one nobody wrote to.
    """

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(inspect.signature(fake).parameters)

        @functools.wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            tensors = {**dict(zip(names, args, strict=False)), **kwargs}
            device = tensors[names[0]].device
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor) and tensor.device != device:
                    raise RuntimeError(
                        f"{op}: {name}: expected a tensor on {device}, as {names[0]} "
                        f"is, got one on {tensor.device}"
                    )
            return fake(*args, **kwargs)

        torch.library.register_fake(op)(checked)
        return checked

    return register

"""Derivatives in Python that cost an inference call little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

library = torch.library.Library("torchweld", "IMPL")


def register_autograd(
    op: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Register a derivative as ``torch.library.register_autograd`` does, for half of its time.

    A call of that one costs 40 microseconds, as much as the convolution of a small layer.
    """
    overload = getattr(torch.ops.torchweld, op).default
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    redispatch = overload._handle.redispatch_boxed  # overload.redispatch, but for one Python call
    # The dispatcher leaves out what has its default value at the end.
    defaults = tuple(argument.default_value for argument in overload._schema.arguments)

    # Not Function, which looks for the levels of torch.func: the dispatcher has taken levels apart.
    class Derivative(torch.autograd.function._SingleLevelFunction):
        _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            # Off in a function, but levels of torch.func below may want a gradient too.
            with below(), torch.enable_grad():
                output = redispatch(keyset & after, *args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, *backward(ctx, *grads))

    def autograd(keyset: Any, *args: Any) -> Any:
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        # In forward mode the function refuses tangents, which would be lost without a word.
        if not wanted and forward_ad._current_level < 0:
            return redispatch(keyset & after, *args)
        args += defaults[len(args) :]
        if not torch._C._are_functorch_transforms_active():
            return apply(keyset, *args)
        # The dispatcher comes here once for every level that wants a gradient.
        with enable_single_level_autograd_function():
            return apply(keyset, *args)

    apply: Callable[..., Any] = Derivative.apply  # type: ignore[attr-defined]
    Derivative.__name__ = f"{op}_derivative"
    library.impl(op, autograd, "Autograd", with_keyset=True)

"""Derivatives in Python that cost an inference call little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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

    redispatch = overload.redispatch
    # The dispatcher leaves out what has its default value at the end.
    defaults = tuple(argument.default_value for argument in overload._schema.arguments)

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            with below():
                output = overload.redispatch(keyset & after, *args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, *backward(ctx, *grads))

    def autograd(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if torch._C._functorch.peek_interpreter_stack() is not None:
                raise RuntimeError(
                    f"torchweld::{op}: expected gradients by torch.autograd, got a call under "
                    "torch.func.grad, vjp or the like"
                )
            return apply(keyset, *args, *defaults[len(args) :])
        return redispatch(keyset & after, *args)

    # Without torch's wrapper, which looks for what is refused above.
    apply = super(torch.autograd.Function, Derivative).apply
    Derivative.__name__ = f"{op}_derivative"
    library.impl(op, autograd, "Autograd", with_keyset=True)

"""What the contenders of the AdamW step share: parameters, gradients, the reference, peers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torchweld as tw
from torch import Tensor

from benchmarks import cases
from benchmarks.device import CPU, Device
from benchmarks.harness import Contender
from benchmarks.machine import Cost
from benchmarks.records import OURS, PEER, STOCK
from tests.reference import adamw as reference

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
# The gradients of the second checked step are those of the first times this, so that moments that
# were not kept, or kept wrong, show.
SECOND = -0.5
# A parameter is checked up to this element: a billion of them need no reference in float64.
CHECKED = 1 << 20


@dataclass(frozen=True)
class Layout:
    """How parameters and states are stored.

    Attributes:
        name: shown.
        dtype: of parameters and gradients.
        states: bytes of states for each parameter.
        options: arguments of our optimizer.
        tolerance: of what two steps add to a parameter; what remains is the rounding of parameters
            and of the states that the second step reads.
        peers: those who store the same.
    """

    name: str
    dtype: torch.dtype
    states: float
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 0.1
    peers: tuple[str, ...] = ()

    def cost(self, size: int, reads_of_grads: int = 1) -> Cost:
        """Return what a step must move: parameters and states there and back, gradients once."""
        one = self.dtype.itemsize
        return Cost(math.ceil((2 * (one + self.states) + reads_of_grads * one) * size))


INT8 = 2 * (1 + 4 / 256)  # a scale for each block
FLOAT32 = Layout("float32", torch.float32, 8, tolerance=1e-4)
STOCHASTIC = Layout(
    "bfloat16 stochastic", torch.bfloat16, 4, {"stochastic_rounding": True}, peers=("torchao",)
)
INT8_STATES = Layout(
    "float32, int8 states", torch.float32, INT8, {"state_dtype": "int8"},
    peers=("bitsandbytes", "torchao"),
)  # fmt: skip
SMALLEST = Layout(
    "bfloat16 stochastic, int8 states", torch.bfloat16, INT8,
    {"stochastic_rounding": True, "state_dtype": "int8"},
)  # fmt: skip
LAYOUTS = [
    Layout("float32, bfloat16 states", torch.float32, 4, {"state_dtype": torch.bfloat16}, 1e-2),
    INT8_STATES,
    STOCHASTIC,
    Layout("bfloat16 Kahan", torch.bfloat16, 6, {"kahan": True}),
    Layout("bfloat16 split master", torch.bfloat16, 6, {"split_master": True}),
    SMALLEST,
]


class Training:
    """Parameters with gradients, which contenders share; each has states of its own.

    Args:
        case: shapes of the parameters.
        dtype: of parameters and gradients; their values are bfloat16's in any dtype.
        rewritten: whether there is a contender who writes gradients.
        device: where they are.
    """

    def __init__(
        self,
        case: cases.AdamWCase,
        dtype: torch.dtype = torch.float32,
        *,
        rewritten: bool = False,
        device: Device = CPU,
    ):
        generator = torch.Generator(device.type).manual_seed(0)

        def randn(shape: cases.Shape, scale: float) -> Tensor:
            drawn = torch.empty(shape, dtype=torch.bfloat16, device=device.type)
            return drawn.normal_(0, scale, generator=generator).to(dtype)

        self.size, self.scale = case.size, 1.0
        self.params = [torch.nn.Parameter(randn(shape, 0.02)) for shape in case.shapes]
        for param in self.params:
            param.grad = randn(param.shape, 0.01)
        self.kept = [grad.clone() for grad in self.grads] if rewritten else None
        self.start = [one.clone() for one in self.checked(self.params)]
        self.first = [one.clone() for one in self.checked(self.grads)]

    @property
    def grads(self) -> list[Tensor]:
        """The gradients."""
        return [param.grad for param in self.params if param.grad is not None]

    @staticmethod
    def checked(tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the checked part of each."""
        return [tensor.detach().flatten()[:CHECKED] for tensor in tensors]

    def set_grads(self, scale: float) -> None:
        """Set the gradients to those of the start times a power of two."""
        if self.kept is None:
            torch._foreach_mul_(self.grads, scale / self.scale)
        else:
            torch._foreach_copy_(self.grads, self.kept)
            torch._foreach_mul_(self.grads, scale)
        self.scale = scale

    @torch.no_grad()
    def two_steps(self, run: Callable[[], object]) -> Sequence[Tensor]:
        """Return what the first two steps of a contender add to the parameters."""
        torch._foreach_copy_(self.checked(self.params), self.start)
        for scale in (1.0, SECOND):
            self.set_grads(scale)
            run()
        self.set_grads(1.0)
        params = self.checked(self.params)
        return [p.float() - s.float() for p, s in zip(params, self.start, strict=True)]

    def expected(self, max_norm: float | None = None) -> list[Tensor]:
        """Return the same from the reference; rounded to float32, which halves the memory."""
        beta1, beta2 = HYPER["betas"]
        hyper = {k: v for k, v in HYPER.items() if k != "betas"}
        norm = 0.0 if max_norm is None else reference.norm(self.grads)
        moved = []
        for start, grad in zip(self.start, self.first, strict=True):
            p, m, v = start.double(), torch.zeros(()), torch.zeros(())
            for t, scale in ((1, 1.0), (2, SECOND)):
                clip = 1.0 if max_norm is None else min(1, max_norm / (norm * abs(scale) + 1e-6))
                p, m, v, _ = reference.step(
                    p, grad.double() * scale, m, v, None, t,
                    beta1=beta1, beta2=beta2, grad_scale=clip, **hyper,
                )  # fmt: skip
            moved.append((p - start.double()).float())
        return moved

    def contender(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        tolerance: float,
        kind: str = STOCK,
        run: Callable[[], object] | None = None,
    ) -> Contender:
        """Return a contender checked over two steps.

        Args:
            name: shown.
            optimizer: whose states are counted.
            tolerance: see :class:`Layout`.
            kind: see :class:`Contender`.
            run: its step and what belongs to it; None for the step alone.
        """
        run = run or optimizer.step
        return Contender(
            name, run, tolerance, kind, check=partial(self.two_steps, run),
            held_bytes=partial(self.held_bytes, optimizer),
        )  # fmt: skip

    def ours(self, layout: Layout, name: str = "torchweld", **options: Any) -> Contender:
        """Return our step in a layout."""
        optimizer = tw.optim.AdamW(self.params, **HYPER, **layout.options, **options)
        return self.contender(name, optimizer, layout.tolerance, OURS)

    def stock(self, layout: Layout, name: str = "fused", **how: Any) -> Contender:
        """Return stock's step, fused if nothing else is said, of the same parameters."""
        optimizer = torch.optim.AdamW(self.params, **HYPER, **(how or {"fused": True}))
        return self.contender(name, optimizer, max(layout.tolerance, 1e-4), STOCK)

    def peers(self, layout: Layout, compiled: bool) -> Iterator[Contender]:
        """Yield the installed peers of a layout; torchao's compile a kernel for every shape."""
        for name in layout.peers:
            if name not in PEERS or name in missing():
                continue
            if name != "torchao" or (compiled and len({p.shape for p in self.params}) == 1):
                yield self.contender(name, PEERS[name](self.params, layout), 0.2, PEER)

    def held_bytes(self, optimizer: torch.optim.Optimizer) -> float:
        """Return the bytes of parameters, gradients and states for each parameter."""
        states = [v for values in optimizer.state.values() for v in values.values()]
        held = {
            (t.data_ptr(), t.nbytes) for t in _parts([*self.params, *self.grads, *states])
        }  # peers share a table among states
        return sum(count for _, count in held) / self.size


def _parts(tensors: Sequence[object]) -> Iterator[Tensor]:
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _parts([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
        elif isinstance(tensor, Tensor) and tensor.numel():
            yield tensor


def _bitsandbytes(params: list[Tensor], layout: Layout) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, **HYPER)


def _torchao(params: list[Tensor], layout: Layout) -> torch.optim.Optimizer:
    from torchao import optim

    if layout.dtype == torch.bfloat16:
        return optim._AdamW(params, **HYPER, bf16_stochastic_round=True)
    return optim.AdamW8bit(params, **HYPER)


# Not optimi: its foreach step, which Kahan sums take, squares the gradients in place.
PEERS: dict[str, Callable[[list[Tensor], Layout], torch.optim.Optimizer]] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}


def missing() -> list[str]:
    """Return the peers that are not installed."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]

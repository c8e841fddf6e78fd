"""The AdamW step over the parameters of whole models, alone and with clipping by global norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torchweld as tw
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks import cases
from benchmarks.harness import Contender, Job, Setup
from benchmarks.machine import Cost
from benchmarks.records import OURS, STOCK
from tests.reference import adamw as reference

HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
MAX_NORM = 1.0
# Of what two steps add to a parameter; the rest is the rounding of parameters to float32.
TOLERANCE = 1e-4
# The gradients of the second checked step are those of the first times this, so that moments that
# were not kept, or kept wrong, show.
SECOND = -0.5


def jobs(quick: bool, compiled: bool) -> Iterator[Job]:
    for case in cases.ADAMW_QUICK if quick else cases.ADAMW:
        yield Job("adamw", case.name, partial(step, case))
    for case in cases.ADAMW_QUICK if quick else cases.ADAMW:
        yield Job("adamw with clipping", case.name, partial(clipped_step, case))


class Training:
    """Parameters with gradients, which all contenders share; each has states of its own."""

    def __init__(self, case: cases.AdamWCase):
        generator = torch.Generator().manual_seed(0)

        def randn(scale: float) -> list[Tensor]:
            return [torch.randn(s, generator=generator).mul_(scale) for s in case.shapes]

        self.start, self.grads = randn(0.02), randn(0.01)
        self.params = [torch.nn.Parameter(p.clone()) for p in self.start]
        for param in self.params:
            param.grad = torch.zeros_like(param)

    @torch.no_grad()
    def set_grads(self, scale: float) -> None:
        """Set the gradients to those of the start times a power of two."""
        grads = [p.grad for p in self.params]
        torch._foreach_copy_(grads, self.grads)
        torch._foreach_mul_(grads, scale)

    def two_steps(self, run: Callable[[], object]) -> Sequence[Tensor]:
        """Return what the first two steps of a contender add to the parameters."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.start)
        for scale in (1.0, SECOND):
            self.set_grads(scale)
            run()
        moved = [p.detach() - s for p, s in zip(self.params, self.start, strict=True)]
        self.set_grads(1.0)
        return moved

    def expected(self, max_norm: float | None = None) -> list[Tensor]:
        """Return the same from the reference; rounded to float32, which halves the memory."""
        beta1, beta2 = HYPER["betas"]
        hyper = {k: v for k, v in HYPER.items() if k != "betas"}
        norm = reference.norm(self.grads)
        moved = []
        for start, grad in zip(self.start, self.grads, strict=True):
            p, m, v = start.double(), torch.zeros_like(start), torch.zeros_like(start)
            for t, scale in ((1, 1.0), (2, SECOND)):
                clip = 1.0 if max_norm is None else min(1, max_norm / (norm * abs(scale) + 1e-6))
                p, m, v, _ = reference.step(
                    p, grad * scale, m, v, None, t,
                    beta1=beta1, beta2=beta2, grad_scale=clip, **hyper,
                )  # fmt: skip
            moved.append((p - start.double()).float())
        return moved

    def contender(self, name: str, run: Callable[[], object], kind: str = STOCK) -> Contender:
        """Return a contender checked over two steps."""
        return Contender(name, run, TOLERANCE, kind, check=partial(self.two_steps, run))


def step(case: cases.AdamWCase) -> Setup:
    training = Training(case)
    stock = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    contenders = []
    for name, how in stock.items():
        optimizer = torch.optim.AdamW(training.params, **HYPER, **how)
        contenders.append(training.contender(name, optimizer.step))
    ours = tw.optim.AdamW(training.params, **HYPER)
    contenders.append(training.contender("torchweld", ours.step, OURS))
    # Read p, g, m, v; write p, m, v.
    return Setup(contenders, training.expected(), [Cost(7 * 4 * case.size)])


def clipped_step(case: cases.AdamWCase) -> Setup:
    training = Training(case)

    def clip_and(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def run() -> None:
            clip_grad_norm_(training.params, MAX_NORM)
            optimizer.step()

        return run

    fused = torch.optim.AdamW(training.params, **HYPER, fused=True)
    ours = tw.optim.AdamW(training.params, **HYPER, max_grad_norm=MAX_NORM)
    contenders = [
        training.contender("clip_grad_norm_ + fused", clip_and(fused)),
        training.contender("torchweld max_grad_norm", ours.step, OURS),
    ]
    # As above, and the gradients once more for their norm.
    return Setup(contenders, training.expected(MAX_NORM), [Cost(8 * 4 * case.size)])

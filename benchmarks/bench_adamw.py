"""The AdamW step over parameters of whole models: alone, with clipping, in low bits, by size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch
import torchweld as tw
from torch.nn.utils import clip_grad_norm_

from benchmarks import cases
from benchmarks.device import CPU, Device
from benchmarks.harness import Job, Setup
from benchmarks.optimizers import (
    FLOAT32,
    HYPER,
    INT8_STATES,
    LAYOUTS,
    SMALLEST,
    STOCHASTIC,
    Layout,
    Training,
)  # fmt: skip
from benchmarks.records import OURS

MAX_NORM = 1.0
# For each parameter of the largest size: it, its gradient, the states of two contenders, and spare.
BYTES = 14
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
# More float32 parameters than this are not set up: in bfloat16 they need half of the memory.
MOST_FLOAT32 = 10**8


def jobs(quick: bool, compiled: bool) -> Iterator[Job]:
    models = cases.ADAMW_QUICK if quick else cases.ADAMW
    for op, setup in {
        "adamw": step,
        "adamw with clipping": clipped_step,
        "adamw with scaler and clipping": scaled_step,
    }.items():
        for case in models:
            yield Job(op, case.name, partial(setup, case))
    for case in models[:1] if quick else models[:2]:
        for layout in LAYOUTS:
            name = f"{case.name}, {layout.name}"
            yield Job("adamw layouts", name, partial(stored, case, layout, compiled))
    for exponent in range(4, 6 if quick else 10):
        if BYTES * 10**exponent > MEMORY:
            break
        # One digit and the exponent: the figure reads it as a number.
        yield Job("adamw by size", f"1e{exponent}", partial(sized, 10**exponent, compiled))


def step(case: cases.AdamWCase, device: Device = CPU) -> Setup:
    training = Training(case, device=device)
    contenders = [
        training.stock(FLOAT32, "for-loop", foreach=False),
        training.stock(FLOAT32, "foreach", foreach=True),
        training.stock(FLOAT32),
        training.ours(FLOAT32),
    ]
    return Setup(contenders, training.expected(), [FLOAT32.cost(case.size)], device)


def clipped_step(case: cases.AdamWCase) -> Setup:
    training = Training(case, rewritten=True)
    fused = torch.optim.AdamW(training.params, **HYPER, fused=True)

    def clip_and_step() -> None:
        clip_grad_norm_(training.params, MAX_NORM)
        fused.step()

    contenders = [
        training.contender("clip_grad_norm_ + fused", fused, FLOAT32.tolerance, run=clip_and_step),
        training.ours(FLOAT32, "torchweld max_grad_norm", max_grad_norm=MAX_NORM),
    ]
    cost = FLOAT32.cost(case.size, reads_of_grads=2)
    return Setup(contenders, training.expected(MAX_NORM), [cost])


def scaled_step(case: cases.AdamWCase, device: Device = CPU) -> Setup:
    """Step as a loop with mixed precision does.

    The scale is 1 and stays so, since stock would divide the same gradients by it in every call; it
    multiplies them all the same.
    """
    training = Training(case, rewritten=True, device=device)
    fused = torch.optim.AdamW(training.params, **HYPER, fused=True)
    folded, plain = (
        tw.optim.AdamW(training.params, **HYPER, max_grad_norm=MAX_NORM) for _ in range(2)
    )

    def started(scaler: torch.amp.GradScaler) -> torch.amp.GradScaler:
        scaler.scale(torch.zeros((), device=device.type))
        return scaler

    stock, ours, stock_of_ours = (
        started(kind(device.type, init_scale=1.0, growth_interval=2**30))
        for kind in (torch.amp.GradScaler, tw.amp.GradScaler, torch.amp.GradScaler)
    )

    def by_hand() -> None:
        stock.unscale_(fused)
        clip_grad_norm_(training.params, MAX_NORM)
        stock.step(fused)
        stock.update()

    def inside(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        scaler.step(optimizer)
        scaler.update()

    contenders = [
        training.contender("unscale_ + clip + fused", fused, FLOAT32.tolerance, run=by_hand),
        *(
            training.contender(name, one, FLOAT32.tolerance, OURS, partial(inside, scaler, one))
            for name, scaler, one in (
                ("torchweld", ours, folded),
                ("torchweld, stock GradScaler", stock_of_ours, plain),
            )
        ),
    ]
    cost = FLOAT32.cost(case.size, reads_of_grads=2)
    return Setup(contenders, training.expected(MAX_NORM), [cost], device)


def stored(case: cases.AdamWCase, layout: Layout, compiled: bool) -> Setup:
    """Step parameters and states in a layout, against stock's fused step of the same parameters."""
    training = Training(case, layout.dtype)
    contenders = [
        training.stock(layout),
        training.ours(layout),
        *training.peers(layout, compiled),
    ]
    return Setup(contenders, training.expected(), [layout.cost(case.size)])


def sized(size: int, compiled: bool) -> Setup:
    """Step one tensor of a size in both dtypes: all start from the same numbers."""
    case = cases.AdamWCase("", [(size,)])
    low = Training(case, torch.bfloat16)
    contenders = [low.ours(one, f"torchweld {one.name}") for one in (STOCHASTIC, SMALLEST)]
    if size <= MOST_FLOAT32:
        full = Training(case)
        contenders += [
            full.stock(FLOAT32, "fused float32"),
            full.ours(FLOAT32, "torchweld float32"),
            full.ours(INT8_STATES, f"torchweld {INT8_STATES.name}"),
            low.stock(STOCHASTIC, "fused bfloat16"),
        ]
        if size == 10**7:
            contenders += full.peers(INT8_STATES, compiled)
    return Setup(contenders, low.expected(), [SMALLEST.cost(size)])

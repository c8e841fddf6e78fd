"""The AdamW step on a GPU: alone, in a graph, with GradScaler and clipping, with 8-bit states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import bench_adamw, cases
from benchmarks.device import Device
from benchmarks.harness import Contender, Job, Setup
from benchmarks.optimizers import FLOAT32, INT8_STATES, SMALLEST, Training
from benchmarks.records import FLOOR

# Below, a step is bound by launches and by the host; above, by memory.
SMALL = 20 * 10**6
# Above, memory is all there is, and time is dear: only the fastest take part.
LARGE = 5 * 10**8


def jobs(quick: bool, compiled: bool, device: Device) -> Iterator[Job]:
    found = cases.ADAMW_QUICK if quick else cases.CUDA_ADAMW
    for op, setup in {
        "adamw on cuda": step,
        "adamw in a graph on cuda": in_a_graph,
        "adamw with scaler and clipping on cuda": scaled,
        "adamw with 8-bit states on cuda": partial(low_bits, compiled=compiled),
    }.items():
        for case in found:
            yield Job(op, case.name, partial(setup, case, device))


def ask(setup: Setup, asked: dict[str, float], name: str = "torchweld") -> Setup:
    """Ask the contender of that name for so much."""
    for contender in setup.contenders:
        if contender.name == name:
            contender.asked = asked
    return setup


def step(case: cases.AdamWCase, device: Device) -> Setup:
    if case.size < LARGE:
        setup = bench_adamw.step(case, device)
        return ask(setup, {"fused": 1.5 if case.size < SMALL else 1.0})
    training = Training(case, device=device)
    contenders = [training.stock(FLOAT32), training.ours(FLOAT32)]
    setup = Setup(contenders, training.expected(), [FLOAT32.cost(case.size)], device)
    return ask(setup, {"fused": 1.0, FLOOR: 90})


def in_a_graph(case: cases.AdamWCase, device: Device) -> Setup:
    """Step with no work for the host: what the device itself takes."""
    training = Training(case, device=device)
    contenders = [
        captured(training, training.stock(FLOAT32, "fused", fused=True, capturable=True), device),
        captured(training, training.ours(FLOAT32, capturable=True), device),
    ]
    setup = Setup(contenders, training.expected(), [FLOAT32.cost(case.size)], device, cold=True)
    return ask(setup, {"fused": 1.0})


def captured(training: Training, contender: Contender, device: Device) -> Contender:
    """Return the contender as a graph, captured after its check: that starts from the start."""
    step = contender.run

    def check() -> Sequence[Tensor]:
        results = training.two_steps(step)
        contender.run = device.captured(step)
        return results

    contender.check = check
    return contender


def scaled(case: cases.AdamWCase, device: Device) -> Setup:
    return ask(bench_adamw.scaled_step(case, device), {"unscale_ + clip + fused": 1.35})


def low_bits(case: cases.AdamWCase, device: Device, compiled: bool) -> Setup:
    """Step with 8-bit states against stock's float32, and those who store the same.

    A float32 parameter and its gradient alone take 12 of the 28 bytes that stock's step moves, so
    that twice its speed is asked where they are bfloat16.
    """
    full, low = (Training(case, dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    contenders = [
        full.stock(FLOAT32),
        full.ours(INT8_STATES, f"torchweld {INT8_STATES.name}"),
        low.ours(SMALLEST, f"torchweld {SMALLEST.name}"),
        *full.peers(INT8_STATES, compiled),
    ]
    setup = Setup(contenders, low.expected(), [SMALLEST.cost(case.size)], device)
    ask(setup, dict.fromkeys(INT8_STATES.peers, 3.0), f"torchweld {INT8_STATES.name}")
    return ask(setup, {"fused": 2.0}, f"torchweld {SMALLEST.name}")

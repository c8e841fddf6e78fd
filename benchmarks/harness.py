"""Checks contenders for the same job, then times them side by side.

A shared machine changes from second to second, so the contenders take turns, in a new order every
round, and are compared by the medians of their rounds. A contender whose first result is wrong is
not timed at all. Rivals are stock PyTorch and, where installed, its peers; what is reported is our
speed over that of the fastest rival.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from benchmarks.device import CPU, Device
from benchmarks.machine import Cost, Machine
from benchmarks.records import OURS, STOCK, Row, asked

# Short work is repeated until a sample is long beside the clock and the first, cold call.
SAMPLE_SECONDS = 2e-3
# A cold call is timed by itself, and has the emptying of a cache before it.
MOST_COLD_CALLS = 20
FEWEST_ROUNDS = 5


class WrongResultError(Exception):
    """A contender does not compute what the reference computes."""


@dataclass
class Contender:
    """One way to do a job.

    Attributes:
        name: shown and recorded.
        run: does the job once; this is timed.
        tolerance: largest relative error allowed, in the 2-norm of each result; one for all
            results, or one for each.
        kind: STOCK, PEER or OURS.
        check: does the job once from the state the reference started in and returns the results;
            None if ``run`` is that.
        saved_bytes: what a forward pass keeps for backward, if that is of interest.
        held_bytes: returns, after the check, what a parameter of an optimizer takes: itself, its
            gradient and its states; None if that is not of interest.
        asked: what it shall reach: how many times as fast as the contender of a name, or one of
            the limits in :mod:`benchmarks.records`.
        repeats: how many times a call does the job.
    """

    name: str
    run: Callable[[], Sequence[Tensor]]
    tolerance: float | Sequence[float]
    kind: str = STOCK
    check: Callable[[], Sequence[Tensor]] | None = None
    saved_bytes: int | None = None
    held_bytes: Callable[[], float] | None = None
    asked: Mapping[str, float] = field(default_factory=dict)
    repeats: int = 1


@dataclass
class Setup:
    """A job ready to run: who does it, the results in float64, and what its parts must cost.

    It runs on ``device``, with nothing in its cache if ``cold``.

    ``reading`` reads the bytes of the costs and no more. It takes turns with the contenders, and is
    the floor of cold costs then: what memory gives a shared machine may halve within a minute.
    """

    contenders: list[Contender]
    reference: Sequence[Tensor]
    costs: Sequence[Cost] = ()
    device: Device = CPU
    cold: bool = False
    reading: Contender | None = None

    @property
    def timed(self) -> list[Contender]:
        """All that take turns."""
        return [*self.contenders, *([self.reading] if self.reading else [])]


@dataclass(frozen=True)
class Job:
    """A case of an operator; ``setup`` allocates, so jobs are cheap to list."""

    op: str
    case: str
    setup: Callable[[], Setup]


def relative_errors(results: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """Return the relative error of each result, NaN and infinity if there is one.

    Raises:
        WrongResultError: number or shapes of the results are not those of the reference.
    """
    shapes, expected = ([tuple(t.shape) for t in ts] for ts in (results, reference))
    if shapes != expected:
        raise WrongResultError(f"expected results of shapes {expected}, got {shapes}")
    errors = []
    for actual, exact in zip(results, reference, strict=True):
        exact = exact.detach().double()
        scale = exact.norm().item() or 1.0
        errors.append((actual.detach().double() - exact).norm().item() / scale)
    return errors


def check(contender: Contender, reference: Sequence[Tensor]) -> float:
    """Run a contender once and return its largest error.

    Raises:
        WrongResultError: an error is above the contender's tolerance, or not a number.
    """
    try:
        errors = relative_errors((contender.check or contender.run)(), reference)
    except WrongResultError as wrong:
        raise WrongResultError(f"{contender.name}: {wrong}") from None
    tolerance = contender.tolerance
    tolerances = [tolerance] * len(errors) if isinstance(tolerance, float) else tolerance
    for error, most in zip(errors, tolerances, strict=True):
        if not error <= most:
            raise WrongResultError(
                f"{contender.name}: expected an error of at most {most:g} against the "
                f"reference, got {error:g}"
            )
    return max(errors, default=0.0)


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    calls: Mapping[str, int],
    tick: Callable[[int], None] = lambda _: None,
    device: Device = CPU,
    cold: bool = False,
) -> dict[str, list[float]]:
    """Return milliseconds by contender, one for each round.

    Args:
        contenders: each takes one turn in a round, the order differs from round to round, so that
            nobody always runs in the wake of the same other.
        rounds: how many.
        calls: how many calls make one sample, by contender.
        tick: called with the number of every finished round.
        device: what they run on.
        cold: see :meth:`Device.sample`.
    """
    samples: dict[str, list[float]] = {c.name: [] for c in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(1, rounds + 1):
            shuffle(order)
            for contender in order:
                device.settle()
                a_call = device.sample(contender.run, calls[contender.name], cold)
                samples[contender.name].append(a_call / contender.repeats)
            tick(number)
    finally:
        gc.enable()
    return samples


def measure(
    setup: Setup,
    *,
    rounds: int,
    seconds: float,
    tick: Callable[[int], None] = lambda _: None,
    failures: list[str] | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Check all contenders, then time them.

    Args:
        setup: the job.
        rounds: rounds to run.
        seconds: stop earlier when they would take longer than this, but not before FEWEST_ROUNDS.
        tick: see :func:`interleave`.
        failures: if given, a contender that is wrong or fails leaves the setup, and why is
            appended.

    Returns:
        Errors, and milliseconds of every round, by contender.

    Raises:
        WrongResultError: a contender is wrong, and no ``failures`` are collected.
    """
    errors = {}
    for contender in list(setup.contenders):
        try:
            errors[contender.name] = check(contender, setup.reference)
        except Exception as failure:
            if failures is None:
                raise
            failures.append(f"{contender.name}: {in_a_line(failure)}")
            setup.contenders.remove(contender)
    calls, a_round = {}, 0.0

    def estimated(run: Callable[[], object]) -> float:
        return setup.device.sample(run, 1, setup.cold) / 1e3

    for contender in setup.timed:
        estimate = estimated(contender.run)
        if estimate < 0.1:  # the first call after the check may still be a slow one
            estimate = min(estimate, *(estimated(contender.run) for _ in range(2)))
        most = MOST_COLD_CALLS if setup.cold else sys.maxsize
        calls[contender.name] = min(most, max(1, round(SAMPLE_SECONDS / estimate)))
        a_round += calls[contender.name] * estimate
    rounds = min(rounds, max(FEWEST_ROUNDS, int(seconds / max(a_round, 1e-9))))
    samples = interleave(setup.timed, rounds, calls, tick, setup.device, setup.cold)
    return errors, samples


def rows(
    job: Job,
    setup: Setup,
    errors: Mapping[str, float],
    samples: Mapping[str, Sequence[float]],
    machine: Machine,
) -> list[Row]:
    """Return the record of a job: medians, quartiles, ratios to the fastest rival."""
    medians = {name: statistics.median(times) for name, times in samples.items()}
    rival = min((medians[c.name] for c in setup.contenders if c.kind != OURS), default=math.nan)
    if setup.reading:
        read = sum(cost.bytes for cost in setup.costs) / medians[setup.reading.name] / 1e6
        machine = replace(machine, read_gb_s=read)
    floor = machine.floor_ms(setup.costs)
    result: list[Row] = []
    for contender in setup.contenders:
        times, median = samples[contender.name], medians[contender.name]
        p25, p75, saved = median, median, contender.saved_bytes
        held = contender.held_bytes
        if len(times) > 1:
            p25, _, p75 = statistics.quantiles(times, n=4, method="inclusive")
        result.append(
            {
                "op": job.op,
                "case": job.case,
                "contender": contender.name,
                "kind": contender.kind,
                "asked": asked(contender.asked),
                "median_ms": round(median, 5),
                "p25": round(p25, 5),
                "p75": round(p75, 5),
                "rounds": len(times),
                "ratio": round(rival / median, 4),
                "floor_pct": "" if floor is None else round(100 * floor / median, 2),
                "error": float(f"{errors[contender.name]:.3g}"),
                "saved_mb": "" if saved is None else round(saved / 1e6, 3),
                "bytes_per_param": "" if held is None else round(held(), 2),
                "torch": machine.torch,
                "torchweld": machine.torchweld,
                "cpu_model": machine.cpu_model,
                "device": machine.device,
                "capability": machine.capability,
                "threads": machine.threads,
                "malloc": machine.malloc,
                "load": round(machine.load, 2),
                "memory_gb_s": round(machine.memory_gb_s, 2),
                "read_gb_s": round(machine.read_gb_s, 2),
                "float32_gflops": round(machine.peak["float32"], 1),
                "bfloat16_gflops": round(machine.peak["bfloat16"], 1),
                "int8_gops": round(machine.peak["int8"], 1),
                "date": machine.date,
            }
        )
    return result


def record(
    job: Job,
    machine: Machine,
    *,
    rounds: int,
    seconds: float,
    tick: Callable[[int], None] = lambda _: None,
    failures: list[str] | None = None,
) -> list[Row]:
    """Set a job up, measure it as :func:`measure` says, and return its rows.

    Where ``failures`` are collected, a job that cannot be set up is one, and has no rows.
    """
    before = len(failures or [])
    gc.collect()  # what the last job held may be most of a device's memory
    try:
        setup = job.setup()
        found = measure(setup, rounds=rounds, seconds=seconds, tick=tick, failures=failures)
        result = rows(job, setup, *found, machine)
    except WrongResultError as wrong:
        raise WrongResultError(f"{job.op}, {job.case}: {wrong}") from None
    except Exception as failure:
        if failures is None:
            raise
        failures.append(in_a_line(failure))
        result = []
    if failures is not None:
        failures[before:] = [f"{job.op}, {job.case}: {text}" for text in failures[before:]]
    return result


def in_a_line(failure: Exception) -> str:
    """Return its kind and the first line of what it says."""
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"

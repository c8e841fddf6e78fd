"""Linear layers with few bits: warm and cold, how exact they are, and what is fused into them.

Where a case asks what something costs us, the rival is our own layer without it.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchweld as tw
from torch import Tensor, nn

from benchmarks import cases, linear_peers
from benchmarks.harness import Contender, Job, Setup, check
from benchmarks.machine import Cost, cache_bytes
from benchmarks.records import OURS, PEER, STOCK
from tests.reference import quantized_linear as reference

Run = Callable[[Tensor], Tensor]


def decibels(least: float) -> float:
    """Return the relative error of a signal-to-noise ratio."""
    return 10 ** (-least / 20)


@dataclass(frozen=True)
class Way:
    """A way to compute a linear layer.

    Attributes:
        name: shown.
        make: makes what runs of the float layer, with a weight in memory of its own.
        bytes: of an element of the weight.
        tolerance: against the float layer in float64.
        kind: see :class:`Contender`.
        dtype: of input and output.
    """

    name: str
    make: Callable[[nn.Linear], Run]
    bytes: float
    tolerance: float
    kind: str = STOCK
    dtype: torch.dtype = torch.float32

    def contender(self, layer: nn.Linear, x: Tensor, cold: bool = False) -> Contender:
        """Return it ready to run, over so many layers in turn that no cache holds them if cold."""
        copies = 1
        if cold:
            copies += int(2 * cache_bytes() / (self.bytes * layer.weight.numel()))
        turns = itertools.cycle([self.make(layer) for _ in range(copies)])
        given = x.to(self.dtype)

        @torch.no_grad()
        def run() -> Sequence[Tensor]:
            return (next(turns)(given),)

        return Contender(self.name, run, self.tolerance, self.kind)


def checked_int8(layer: nn.Linear) -> tw.nn.QuantizedLinear:
    """Quantize, and refuse a layer that strays from its own definition, however exact that be."""
    ours = tw.nn.QuantizedLinear.from_float(layer)
    state, x = ours.state_dict(), torch.randn(4, layer.in_features)
    expected = reference.quantized_linear(
        x, state["qweight"], state["weight_scale"], state["bias"], ours.activation
    )
    with torch.no_grad():
        check(Contender("torchweld, definition", lambda: [ours(x)], 1e-6), [expected])
    return ours


# torch.ao has one scale for the whole weight, and for the whole input one scale and 7 bits
# (reduce_range); ours promises 37.5 dB on Gaussian data.
FLOAT32 = Way("float32", copy.deepcopy, 4, 1e-5)
BFLOAT16 = Way(
    "bfloat16", lambda layer: copy.deepcopy(layer).bfloat16(), 2, 1e-2, dtype=torch.bfloat16
)
INT8 = Way("torchweld", checked_int8, 1, decibels(37.5), OURS)
STOCK_INT8 = [
    Way(
        f"quantize_dynamic {engine}", partial(linear_peers.quantize_dynamic, engine=engine), 1, 0.05
    )
    for engine in linear_peers.engines()
]


def jobs(quick: bool, compiled: bool) -> Iterator[Job]:
    if held := os.environ.get("TORCHWELD_CPU_CAPABILITY"):
        for case in cases.LINEAR_QUICK if quick else cases.LINEAR:
            ways = partial(against, case, [FLOAT32, INT8])
            yield Job(f"quantized_linear on {held}", case.name, ways)
        return
    for case in cases.LINEAR_QUICK if quick else cases.LINEAR:
        yield Job("quantized_linear", case.name, partial(int8, case, compiled))
    for case in cases.LINEAR_COLD[:1] if quick else cases.LINEAR_COLD:
        yield Job("quantized_linear cold", case.name, partial(int8, case, compiled, cold=True))


def int8(case: cases.LinearCase, compiled: bool, cold: bool = False) -> Setup:
    """Int8 weights and activations against all who do the same, and float layers."""
    peers = [Way(name, make, 1, 0.05, PEER) for name, make in linear_peers.peers(compiled).items()]
    return against(case, [FLOAT32, BFLOAT16, *STOCK_INT8, *peers, INT8], cold)


def against(case: cases.LinearCase, ways: Sequence[Way], cold: bool = False) -> Setup:
    """Return the ways side by side, over the floor of the weight with the fewest bytes."""
    layer, x = drawn(case)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    weight = int(min(way.bytes for way in ways) * layer.weight.numel())
    traffic = weight if cold else weight + 4 * case.m * (case.n + case.k)
    cost = Cost(traffic, 2 * case.m * case.n * case.k, "int8", cold)
    return Setup([way.contender(layer, x, cold) for way in ways], [exact], [cost])


def drawn(case: cases.LinearCase) -> tuple[nn.Linear, Tensor]:
    """Return a layer of unit Gaussian results, and an input."""
    torch.manual_seed(0)
    x = torch.randn(case.m, case.k)
    layer = nn.Linear(case.k, case.n)
    with torch.no_grad():
        layer.weight.normal_().div_(case.k**0.5)
        layer.bias.normal_()
    return layer, x

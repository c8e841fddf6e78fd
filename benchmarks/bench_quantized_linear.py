"""Linear layers with few bits: warm and cold, how exact they are, and what is fused into them.

Where a case asks what something costs us, the rival is our own layer without it.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
ACTIVATIONS: dict[str, Run] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


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
# (reduce_range). What ours promise, they promise on Gaussian data.
FLOAT32 = Way("float32", copy.deepcopy, 4, 1e-5)
BFLOAT16 = Way(
    "bfloat16", lambda layer: copy.deepcopy(layer).bfloat16(), 2, 1e-2, dtype=torch.bfloat16
)
STOCK_INT8 = [
    Way(f"quantize_dynamic {name}", partial(linear_peers.quantize_dynamic, engine=name), 1, 0.05)
    for name in linear_peers.engines()
]
INT8 = Way("torchweld", checked_int8, 1, decibels(37.5), OURS)
RIVAL_INT8 = replace(INT8, name="torchweld int8", kind=PEER)
WEIGHT_ONLY = Way("torchweld", tw.nn.WeightOnlyLinear.from_float, 1, decibels(40), OURS)
INT4 = [
    Way(
        f"torchweld int4 in groups of {group}",
        partial(tw.nn.Int4Linear.from_float, group_size=group),
        0.5 + 3 / group,  # a scale of two bytes and a zero of one
        decibels(least),
        OURS,
    )
    for group, least in ((128, 18.5), (32, 20.0))
]
# What the epilogue and the dtype of input and output cost: half the signal may be lost to ReLU.
FUSED = decibels(34)


def jobs(quick: bool, compiled: bool) -> Iterator[Job]:
    warm = cases.LINEAR_QUICK if quick else cases.LINEAR
    if held := os.environ.get("TORCHWELD_CPU_CAPABILITY"):
        for case in warm:
            ways = partial(against, case, [FLOAT32, INT8])
            yield Job(f"quantized_linear on {held}", case.name, ways)
        return
    cold = cases.LINEAR_COLD[:1] if quick else cases.LINEAR_COLD
    few = warm if quick else cases.LINEAR_FEW
    for case in warm:
        yield Job("quantized_linear", case.name, partial(int8, case, compiled))
    for case in cold:
        yield Job("quantized_linear cold", case.name, partial(int8, case, compiled, cold=True))
    for case in cold:
        yield Job("quantized_linear int4 cold", case.name, partial(int4, case, cold=True))
    for case in few:
        yield Job("quantized_linear int4", case.name, partial(int4, case))
    bfloat16 = replace(WEIGHT_ONLY, name="torchweld bfloat16", dtype=torch.bfloat16, tolerance=1e-2)
    for case in cold:
        ways = [FLOAT32, BFLOAT16, WEIGHT_ONLY, bfloat16]
        setup = partial(against, case, ways, cold=True, unit="float32")
        yield Job("weight_only_linear cold", case.name, setup)
    for case in few:
        ways = [FLOAT32, WEIGHT_ONLY]
        setup = partial(against, case, ways, unit="float32")
        yield Job("weight_only_linear", case.name, setup)
    for case in few[-1:] if quick else few[-2:]:
        for activation in ("identity", "relu", "gelu", "gelu_tanh", "silu"):
            name = f"{case.name} {activation}"
            yield Job("quantized_linear epilogue", name, partial(epilogue, case, activation))
        name = f"{case.name} identity + residual"
        yield Job("quantized_linear epilogue", name, partial(epilogue, case, "identity", True))
        for dtype in (torch.bfloat16, torch.float16):
            name = f"{case.name} {str(dtype).removeprefix('torch.')}"
            other = replace(INT8, dtype=dtype, tolerance=FUSED)
            ways = [replace(INT8, name="torchweld float32", kind=PEER), other]
            yield Job("quantized_linear dtype", name, partial(against, case, ways))


def int8(case: cases.LinearCase, compiled: bool, cold: bool = False) -> Setup:
    """Int8 weights and activations against all who do the same, and float layers."""
    return against(case, [FLOAT32, BFLOAT16, *STOCK_INT8, *int8_peers(compiled), INT8], cold)


def int8_peers(compiled: bool) -> list[Way]:
    """Return those that are installed."""
    return [Way(name, make, 1, 0.05, PEER) for name, make in linear_peers.peers(compiled).items()]


def int4(case: cases.LinearCase, cold: bool = False) -> Setup:
    """Int4 weights against int8 ones, ours among them: fewer bytes shall not be slower."""
    return against(case, [*STOCK_INT8, *int8_peers(compiled=False), RIVAL_INT8, *INT4], cold)


def epilogue(case: cases.LinearCase, activation: str, residual: bool = False) -> Setup:
    """Bias, activation and residual behind the product, against the product alone."""
    layer, x = drawn(case)
    added = torch.randn(case.m, case.n) if residual else None
    fused = tw.nn.QuantizedLinear.from_float(layer, activation)
    stripped = copy.deepcopy(layer)
    stripped.bias = None
    bare = tw.nn.QuantizedLinear.from_float(stripped)

    def finished(product: Tensor) -> Tensor:
        y = ACTIVATIONS[activation](product + layer.bias)
        return y if added is None else y + added

    @torch.no_grad()
    def ours() -> Sequence[Tensor]:
        return (fused(x, added),)

    @torch.no_grad()
    def product() -> Sequence[Tensor]:
        return (bare(x),)

    @torch.no_grad()
    def completed() -> Sequence[Tensor]:
        return (finished(bare(x)),)

    exact = finished(F.linear(x.double(), layer.weight.double()))
    contenders = [
        Contender("bare product", product, FUSED, PEER, check=completed),
        Contender("torchweld", ours, FUSED, OURS),
    ]
    return Setup(contenders, [exact], [cost(case, 1)])


def against(
    case: cases.LinearCase, ways: Sequence[Way], cold: bool = False, unit: str = "int8"
) -> Setup:
    """Return the ways side by side, over the floor of the weight with the fewest bytes."""
    layer, x = drawn(case)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    floor = cost(case, min(way.bytes for way in ways), cold, unit)
    contenders = []
    for way in ways:
        try:
            contenders.append(way.contender(layer, x, cold))
        except RuntimeError as refused:  # as torchao does a single input feature
            if way.kind != PEER:
                raise
            print(f"{way.name} is left out of {case.name}: {refused}", file=sys.stderr)
    return Setup(contenders, [exact], [floor], reading=reading(floor.bytes) if cold else None)


def reading(bytes: int) -> Contender:
    """Return what reads so many bytes from memory."""
    copies = 1 + int(2 * cache_bytes() / bytes)
    turns = itertools.cycle([torch.ones(bytes // 4) for _ in range(copies)])
    return Contender("reading", lambda: (next(turns).sum(),), 0.0)


def cost(case: cases.LinearCase, bytes: float, cold: bool = False, unit: str = "int8") -> Cost:
    """Return that of a weight with so many bytes an element, beside float32 input and output."""
    weight = int(bytes * case.n * case.k)
    traffic = weight if cold else weight + 4 * case.m * (case.n + case.k)
    return Cost(traffic, 2 * case.m * case.n * case.k, unit, cold)


def drawn(case: cases.LinearCase) -> tuple[nn.Linear, Tensor]:
    """Return a layer of unit Gaussian results, and an input."""
    torch.manual_seed(0)
    x = torch.randn(case.m, case.k)
    layer = nn.Linear(case.k, case.n)
    with torch.no_grad():
        layer.weight.normal_().div_(case.k**0.5)
        layer.bias.normal_()
    return layer, x

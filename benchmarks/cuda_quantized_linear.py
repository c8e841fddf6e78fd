"""Linear layers with few bits on a GPU, against bfloat16 and int8 of stock and of torchao.

Everybody runs as a CUDA graph, with nothing in the L2 cache, from and to bfloat16.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
import torchweld as tw
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.bench_quantized_linear import decibels
from benchmarks.device import Device
from benchmarks.harness import Contender, Job, Setup
from benchmarks.machine import Cost
from benchmarks.records import OURS, PEER, STOCK

CUBLAS, SEPARATE = "bfloat16", "torch._int_mm + scaling"
INT8, INT4 = "torchweld int8", "torchweld int4 in groups of 128"
WEIGHT_ONLY = "torchweld int8 weight-only"
COMPILED = "torchao, compiled"
# So many layers are one graph, as those of a model are: to launch one takes as long as the product
# of one token, and shall not be most of what is measured. Each has a weight of its own.
COPIES = 8
# Where generating token by token spends its time: the layers these are asked of.
FEW_TOKENS = ((4096, 4096), (11008, 4096))


@dataclass(frozen=True)
class Way:
    """A way to compute a linear layer; see :class:`benchmarks.bench_quantized_linear.Way`."""

    make: Callable[[nn.Linear], nn.Module]
    tolerance: float
    kind: str = STOCK
    # Whether it can: stock's int8 product takes more than 16 rows, and sizes of whole 8s.
    takes: Callable[[cases.LinearCase], bool] = lambda case: True


class IntMM(nn.Module):
    """Int8 rows times int8 columns, with what stock has: each step a kernel of its own."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach().float()
        self.scale = weight.abs().amax(1) / 127
        self.codes = (weight / self.scale[:, None]).round().to(torch.int8)
        self.bias = layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """``[M, K]`` to ``[M, N]``."""
        scale = x.abs().amax(1, keepdim=True).float() / 127
        codes = (x / scale).round().to(torch.int8)
        product = torch._int_mm(codes, self.codes.t())
        return (product * scale * self.scale + self.bias).to(x.dtype)


class Torchao(nn.Module):
    """As its documentation quantizes a model; one compiled function for all copies of a layer."""

    def __init__(self, layer: nn.Linear, config: str, compiled: bool = False):
        super().__init__()
        from torchao import quantization

        model = nn.Sequential(copy.deepcopy(layer).bfloat16())
        quantization.quantize_(model, getattr(quantization, config)())
        self.linear, self.compiled = model[0], compiled

    def forward(self, x: Tensor) -> Tensor:
        """``[M, K]`` to ``[M, N]``."""
        if not self.compiled:
            return self.linear(x)
        return compiled_linear()(x, self.linear.weight, self.linear.bias)


@cache
def compiled_linear() -> Callable[..., Tensor]:
    return torch.compile(nn.functional.linear, dynamic=False)


def takes_int_mm(case: cases.LinearCase) -> bool:
    return case.m > 16 and case.n % 8 == 0 and case.k % 8 == 0


WAYS: dict[str, Way] = {
    CUBLAS: Way(lambda layer: copy.deepcopy(layer).bfloat16(), 1e-2),
    SEPARATE: Way(IntMM, 0.05, STOCK, takes_int_mm),
    INT8: Way(tw.nn.QuantizedLinear.from_float, decibels(34), OURS),
    WEIGHT_ONLY: Way(tw.nn.WeightOnlyLinear.from_float, decibels(36), OURS),
    INT4: Way(partial(tw.nn.Int4Linear.from_float, group_size=128), decibels(18), OURS),
    "torchweld int4 in groups of 32": Way(
        partial(tw.nn.Int4Linear.from_float, group_size=32), decibels(19.5), OURS
    ),
}
DYNAMIC, ONLY = "Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"
TORCHAO: dict[str, Way] = {
    "torchao": Way(partial(Torchao, config=DYNAMIC), 0.05, PEER, takes_int_mm),
    COMPILED: Way(partial(Torchao, config=DYNAMIC, compiled=True), 0.05, PEER, takes_int_mm),
    "torchao weight-only, compiled": Way(
        partial(Torchao, config=ONLY, compiled=True), 0.05, PEER, lambda case: case.m <= 32
    ),
}


def jobs(quick: bool, compiled: bool, device: Device) -> Iterator[Job]:
    for case in cases.LINEAR_QUICK if quick else cases.CUDA_LINEAR:
        yield Job(
            "quantized_linear on cuda", case.name, partial(side_by_side, case, compiled, device)
        )


def side_by_side(case: cases.LinearCase, compiled: bool, device: Device) -> Setup:
    layer = drawn(case.n, case.k, device)
    x = torch.randn(case.m, case.k, device=device.type)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    given = x.bfloat16()
    ways = WAYS | (TORCHAO if compiled and importlib.util.find_spec("torchao") else {})
    contenders = [
        contender(name, way, case, given, device) for name, way in ways.items() if way.takes(case)
    ]
    bytes = case.n * case.k // 2 + 2 * case.m * (case.n + case.k)
    cost = Cost(bytes, 2 * case.m * case.n * case.k, "int8", cold=True)
    return Setup(contenders, COPIES * [exact.float()], [cost], device, cold=True)


def contender(name: str, way: Way, case: cases.LinearCase, x: Tensor, device: Device) -> Contender:
    """Return one made and captured when it is checked: who fails there is left out alone."""

    def check() -> Sequence[Tensor]:
        layers = made(name, case.n, case.k, device)
        found.run = device.captured(lambda: [layer(x) for layer in layers])
        return found.run()

    limits = asked(name, case) if way.kind == OURS else {}
    found = Contender(
        name, list, way.tolerance, way.kind, torch.no_grad()(check), asked=limits, repeats=COPIES
    )
    return found


@lru_cache(maxsize=len(WAYS) + len(TORCHAO))
def made(name: str, n: int, k: int, device: Device) -> Sequence[nn.Module]:
    """Return what runs of the layer, copies of it; the batches of a shape share them."""
    first = (WAYS | TORCHAO)[name].make(drawn(n, k, device))
    return [first, *(copy.deepcopy(first) for _ in range(COPIES - 1))]


@lru_cache(maxsize=1)
def drawn(n: int, k: int, device: Device) -> nn.Linear:
    """Return a layer of unit Gaussian results."""
    torch.manual_seed(0)
    layer = nn.Linear(k, n, device=device.type)
    with torch.no_grad():
        layer.weight.normal_().div_(k**0.5)
        layer.bias.normal_()
    return layer


def asked(name: str, case: cases.LinearCase) -> dict[str, float]:
    """Return what one of ours shall reach; nothing is to be slower than what it replaces."""
    least = 1.0
    if (case.n, case.k) in FEW_TOKENS:
        four = name.startswith(INT4.rpartition(" ")[0])
        if case.m == 1:
            least = 2.5 if four else 1.7
        elif case.m == 16 and four:
            least = 2.0
    if case.m >= 512 and name == INT8:
        return {CUBLAS: 1.4, SEPARATE: 1.5, COMPILED: 1.0}
    return {CUBLAS: least}

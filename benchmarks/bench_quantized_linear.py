"""Linear layers with int8 weights and activations quantized on the fly, and how exact they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
import torchweld as tw
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.harness import Contender, Job, Setup, check
from benchmarks.machine import Cost
from benchmarks.records import OURS
from tests.reference import quantized_linear as reference

# Against the float layer in float64. torch.ao has one scale for the whole weight, and for the whole
# input one scale and 7 bits (reduce_range); ours promises 37.5 dB on Gaussian data.
FLOAT32, BFLOAT16, STOCK_INT8, OUR_INT8 = 1e-5, 1e-2, 0.05, 10 ** (-37.5 / 20)


def jobs(quick: bool, compiled: bool) -> Iterator[Job]:
    for case in cases.LINEAR_QUICK if quick else cases.LINEAR:
        yield Job("quantized_linear", case.name, partial(linear, case))


def linear(case: cases.LinearCase) -> Setup:
    torch.manual_seed(0)
    x = torch.randn(case.m, case.k)
    layer = nn.Linear(case.k, case.n)
    with torch.no_grad():
        layer.weight.normal_().div_(case.k**0.5)
        layer.bias.normal_()
    ours = tw.nn.QuantizedLinear.from_float(layer)
    check_definition(ours, x[:4])

    def forward(module: Callable[[Tensor], Tensor], x: Tensor = x):
        @torch.no_grad()
        def run() -> Sequence[Tensor]:
            return (module(x),)

        return run

    half = copy.deepcopy(layer).bfloat16()
    contenders = [
        Contender("float32", forward(layer), FLOAT32),
        Contender("bfloat16", forward(half, x.bfloat16()), BFLOAT16),
    ]
    supported = torch.backends.quantized.supported_engines
    for engine in [e for e in ("x86", "onednn") if e in supported] or ["qnnpack"]:
        run = forward(quantize_dynamic(layer, engine))
        contenders.append(Contender(f"quantize_dynamic {engine}", run, STOCK_INT8))
    contenders.append(Contender("torchweld", forward(ours), OUR_INT8, OURS))
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    # The weight as bytes, input and output as floats.
    traffic = case.n * case.k + 4 * case.m * (case.n + case.k)
    return Setup(contenders, [exact], [Cost(traffic, 2 * case.m * case.n * case.k, "int8")])


def quantize_dynamic(layer: nn.Linear, engine: str) -> nn.Module:
    """Return torch.ao's layer; the engine in use while it packs the weight is the one that runs."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and the fastest stock has
            return torch.ao.quantization.quantize_dynamic(
                nn.Sequential(copy.deepcopy(layer)), {nn.Linear}, torch.qint8
            )
    finally:
        torch.backends.quantized.engine = before


def check_definition(layer: tw.nn.QuantizedLinear, x: Tensor) -> None:
    """Refuse a layer that strays from its own definition, however exact that may be."""
    state = layer.state_dict()
    expected = reference.quantized_linear(
        x, state["qweight"], state["weight_scale"], state["bias"], layer.activation
    )
    with torch.no_grad():
        check(Contender("torchweld, definition", lambda: [layer(x)], 1e-6), [expected])

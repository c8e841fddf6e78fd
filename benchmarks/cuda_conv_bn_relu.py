"""conv-bn-relu on a GPU: layers and ResNet-50 under autocast, channels last, and inference.

Where the rule of csrc/ops/cuda/rule.h takes another convolution than ATen's, ours also runs with
ATen's: ``benchmarks.cuda_rule`` says of the record where the rule loses.

``layers`` and ``models`` list the jobs. All contenders, stock ones too, get what stock is fastest
with: channels_last, and bfloat16 or float16 by autocast in training, as they are in inference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torchweld as tw
from torch import Tensor, nn

from benchmarks import bench_conv_bn_relu, bench_models, cases, inference
from benchmarks.device import Device
from benchmarks.harness import Contender, Job, Setup
from benchmarks.kept import kept_bytes
from benchmarks.machine import Cost
from benchmarks.records import OURS, SAVED, STOCK
from tests.reference import conv_bn_relu as reference

NHWC = torch.channels_last
# What a whole model in bfloat16 may err: logits, running statistics, gradients. Those of another
# model would be 1.4 off; rounding that moves values across the kinks of ReLU makes 0.4 of it.
TRAINING = (0.15, 0.05, 1.2)
INFERENCE = 0.25


@dataclass(frozen=True)
class Precision:
    """What is computed with.

    Attributes:
        dtype: of input, output and convolution.
        tolerance: of an output and gradients; float32 convolutions are TF32's on a GPU.
        kink: values this close to that of ReLU may come to lie on its other side.
    """

    dtype: torch.dtype
    tolerance: float
    kink: float

    @property
    def name(self) -> str:
        """As in torch."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def unit(self) -> str:
        """What does the arithmetic; float16 goes at bfloat16's speed."""
        return "float32" if self.dtype == torch.float32 else "bfloat16"

    def autocast(self, device: Device) -> torch.autocast:
        """Return the context, one that does nothing for float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(device.type, self.dtype if enabled else None, enabled=enabled)


AROUND_ATEN = "torchweld around ATen's convolution"

BFLOAT16 = Precision(torch.bfloat16, 0.03, 0.05)
FLOAT16 = Precision(torch.float16, 0.005, 0.01)
FLOAT32 = Precision(torch.float32, 0.005, 0.005)


def layers(quick: bool, compiled: bool, device: Device) -> Iterator[Job]:
    found = cases.CUDA_CONV_QUICK if quick else cases.CUDA_CONV
    for precision in (BFLOAT16, FLOAT16, FLOAT32):
        # One batch shows whether another dtype is any different.
        for case in found if precision is BFLOAT16 else found[len(found) // 2 :]:
            setup = partial(training, case, precision, compiled and precision is BFLOAT16, device)
            yield Job(f"conv_bn_relu training {precision.name} on cuda", case.name, setup)
        for case in found[len(found) // 2 :]:
            setup = partial(folded, case, precision, compiled and precision is BFLOAT16, device)
            yield Job(f"conv_bn_relu inference {precision.name} on cuda", case.name, setup)


def models(quick: bool, compiled: bool, device: Device) -> Iterator[Job]:
    for case in cases.TRAINING_QUICK[:1] if quick else cases.CUDA_TRAINING:
        setup = partial(model_training, case, compiled, device)
        yield Job("model training bfloat16 on cuda", case.name, setup)
    for case in cases.INFERENCE_QUICK if quick else cases.CUDA_INFERENCE:
        setup = partial(model_inference, case, compiled, device)
        yield Job("model inference bfloat16 on cuda", case.name, setup)


def training(case: cases.ConvCase, precision: Precision, compiled: bool, device: Device) -> Setup:
    with torch.device(device.type):
        p = bench_conv_bn_relu.problem(case, frozen=False)
    p.input, p.weight = (t.to(precision.dtype).float() for t in (p.input, p.weight))
    grad, expected = exactly(p, precision)
    laid, g = (t.to(precision.dtype, memory_format=NHWC) for t in (p.input, grad))
    stock = bench_conv_bn_relu.stock_layer(p).to(device.type, memory_format=NHWC)

    def contender(name: str, adapt: Callable[..., Callable], kind: str = STOCK) -> Contender:
        conv, bn, act = copy.deepcopy(stock)
        forward = adapt(nn.Sequential(conv, bn, act))
        x = laid.clone().requires_grad_()
        leaves = (x, conv.weight, bn.weight, bn.bias)

        def run() -> Sequence[Tensor]:
            with precision.autocast(device):
                y = forward(x)
            gradients = torch.autograd.grad(y, leaves, g)
            return y, *gradients, bn.running_mean, bn.running_var

        return Contender(name, run, precision.tolerance, kind)

    contenders = [contender("eager", lambda layer: layer)]
    if compiled:
        contenders.append(contender("torch.compile", torch.compile))

    def weld(layer: nn.Sequential) -> nn.Module:
        return tw.nn.ConvBNReLU2d.from_float(layer[0], layer[1])

    contenders.append(contender("torchweld", weld, OURS))
    contenders[-1].asked = {"eager": 1.25 if case.kernel == 1 or case.size == 56 else 1.0}
    if case.groups > 1:
        contenders.append(around_aten(contender("", weld, OURS)))
    sizes = bench_conv_bn_relu.sizes(case)
    cost = Cost.layer(*sizes, case.operations, training=True, unit=precision.unit)
    return Setup(contenders, expected, [cost], device)


def around_aten(ours: Contender) -> Contender:
    """Return the same with ATen's convolution."""

    def run() -> Sequence[Tensor]:
        before = tw.config.convolution
        tw.config.convolution = "aten"
        try:
            return ours.run()
        finally:
            tw.config.convolution = before

    return replace(ours, name=AROUND_ATEN, run=run, asked={})


def folded(case: cases.ConvCase, precision: Precision, compiled: bool, device: Device) -> Setup:
    with torch.device(device.type):
        p = bench_conv_bn_relu.problem(case, frozen=True)
    x = p.input.to(precision.dtype, memory_format=NHWC)
    stock = bench_conv_bn_relu.stock_layer(p).to(device.type)
    with torch.no_grad():
        expected = [copy.deepcopy(stock).double()(x.double()).float()]
    half = stock.to(precision.dtype, memory_format=NHWC)
    welded = tw.weld(half, inference=True)
    ways = {"eager": half}
    if compiled:
        ways["torch.compile"] = torch.compile(copy.deepcopy(half))
    contenders = [
        inference.contender(name, way, x, precision.tolerance) for name, way in ways.items()
    ]
    contenders.append(inference.contender("torchweld", welded, x, precision.tolerance, OURS))
    contenders[-1].asked = {"eager": 1.0}
    contenders.append(around_aten(contenders[-1]))
    cost = Cost.layer(*bench_conv_bn_relu.sizes(case), case.operations, unit=precision.unit)
    return Setup(contenders, expected, [cost], device)


def exactly(p: reference.Problem, precision: Precision) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the gradient of the output, and the results in float64.

    They are kept in float32: of a large layer that is a gigabyte less each.
    """
    exact = p.to(torch.float64).leaves()
    with torch.no_grad():
        before_relu = reference.stock(replace(exact.leaves(), activation="identity"))
    grad = torch.randn(before_relu.shape, device=before_relu.device).to(precision.dtype)
    grad *= before_relu.abs() > precision.kink
    del before_relu
    output = reference.stock(exact)
    output.backward(grad.double())
    results = [output, *exact.gradients().values(), exact.running_mean, exact.running_var]
    return grad, [result.detach().float() for result in results]


def model_training(case: cases.ModelCase, compiled: bool, device: Device) -> Setup:
    model, x = bench_models.problem(case)
    model, x = model.to(device.type, memory_format=NHWC), x.to(device.type, memory_format=NHWC)
    target = torch.randint(10, (case.batch,)).to(device.type)

    def contender(name: str, adapt: Callable, adamw: Callable, kind: str = STOCK) -> Contender:
        own = copy.deepcopy(model)
        forward = under_autocast(adapt(own), device)
        step = bench_models.Step(own, forward, adamw(own.parameters(), lr=bench_models.LR))
        run = partial(step, x, target)
        spare = under_autocast(adapt(copy.deepcopy(own)), device)
        saved = None if name == "torch.compile" else kept_bytes(partial(spare, x))
        return Contender(name, run, TRAINING, kind, partial(step.results, run), saved)

    fused = partial(torch.optim.AdamW, fused=True)
    contenders = [contender("eager", lambda m: m, fused)]
    if compiled:
        contenders.append(contender("torch.compile", torch.compile, fused))
    ours = contender("torchweld", tw.weld, tw.optim.AdamW, OURS)
    ours.asked = {"eager": 1.15, "torch.compile": 1.0}
    saving = partial(tw.weld, memory_saving=True)
    small = contender("torchweld, memory saving", saving, tw.optim.AdamW, OURS)
    small.asked = {f"{SAVED}eager": 0.58}
    exact = copy.deepcopy(model).double()
    step = bench_models.Step(
        exact, exact, torch.optim.AdamW(exact.parameters(), lr=bench_models.LR)
    )
    expected = [t.detach().float() for t in step.results(partial(step, x.double(), target))]
    costs = bench_models.costs(model, x, training=True, unit="bfloat16")
    return Setup([*contenders, ours, small], expected, costs, device)


def under_autocast(forward: Callable[[Tensor], Tensor], device: Device) -> Callable[..., Tensor]:
    def run(x: Tensor) -> Tensor:
        with BFLOAT16.autocast(device):
            return forward(x)

    return run


def model_inference(case: cases.ModelCase, compiled: bool, device: Device) -> Setup:
    model, x, expected = bench_models.evaluated(case, device)
    costs = bench_models.costs(model, x, unit="bfloat16")
    half = model.to(torch.bfloat16, memory_format=NHWC)
    laid = x.to(torch.bfloat16, memory_format=NHWC)

    def contender(
        name: str, forward: Callable[[Tensor], Tensor], kind: str = STOCK, graph: bool = False
    ) -> Contender:
        @torch.no_grad()
        def run() -> Sequence[Tensor]:
            return (forward(laid),)

        return Contender(name, device.captured(run) if graph else run, INFERENCE, kind)

    welded = tw.weld(half, inference=True)
    found = [contender("eager", half), contender("eager, graph", half, graph=True)]
    if compiled:
        found.append(contender("torch.compile", torch.compile(copy.deepcopy(half))))
    ours, replayed = (
        contender(name, welded, OURS, graph)
        for name, graph in (("torchweld", False), ("torchweld, graph", True))
    )
    ours.asked = {"eager": 1.2}
    replayed.asked = {"eager": 3.0} if case.batch == 1 else {"eager, graph": 1.0}
    return Setup([*found, ours, replayed], expected, costs, device)

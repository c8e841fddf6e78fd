"""conv-bn-relu: a training step (forward and all gradients) and inference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torchweld as tw
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks import cases, inference
from benchmarks.harness import Contender, Job, Setup
from benchmarks.inference import LAYOUTS
from benchmarks.machine import Cost
from benchmarks.records import OURS
from tests.reference import conv_bn_relu as reference

# Three sums of thousands of float32 products each; a wrong formula errs a thousand times more.
TOLERANCE = 2e-5


def jobs(quick: bool, compiled: bool) -> Iterator[Job]:
    for case in cases.CONV_QUICK if quick else cases.CONV:
        yield Job("conv_bn_relu training", case.name, partial(training, case, compiled))
    for case in cases.CONV_QUICK if quick else cases.CONV:
        yield Job("conv_bn_relu inference", case.name, partial(folded, case, compiled))


def problem(case: cases.ConvCase, frozen: bool) -> reference.Problem:
    torch.manual_seed(0)
    c = case.out_channels
    return reference.Problem(
        input=torch.randn(case.input_shape),
        weight=torch.randn(case.weight_shape) / math.prod(case.weight_shape[1:]) ** 0.5,
        bias=None,
        bn_weight=torch.rand(c) + 0.5,
        bn_bias=torch.randn(c),
        running_mean=torch.randn(c) / 10,
        running_var=torch.rand(c) + 0.5,
        residual=None,
        conv=(case.stride, case.padding, case.dilation, case.groups),
        frozen=frozen,
    )


def stock_layer(p: reference.Problem) -> nn.Sequential:
    """Return the problem's modules as torchvision writes them, with copies of its tensors."""
    out_channels, in_channels, *kernel = p.weight.shape
    stride, padding, dilation, groups = p.conv
    conv = nn.Conv2d(
        in_channels * groups, out_channels, kernel, stride, padding, dilation, groups, bias=False
    )
    bn = nn.BatchNorm2d(out_channels, p.eps, p.momentum)
    with torch.no_grad():
        conv.weight.copy_(p.weight)
        bn.weight.copy_(p.bn_weight)
        bn.bias.copy_(p.bn_bias)
        bn.running_mean.copy_(p.running_mean)
        bn.running_var.copy_(p.running_var)
    return nn.Sequential(conv, bn, nn.ReLU(inplace=True)).train(not p.frozen)


def training(case: cases.ConvCase, compiled: bool) -> Setup:
    p = problem(case, frozen=False)
    exact = p.to(torch.float64)
    with torch.no_grad():
        before_relu = reference.stock(replace(exact.leaves(), activation="identity"))
    # Where rounding could move a value across the kink of ReLU, no gradient flows.
    grad = torch.randn(case.output_shape) * (before_relu.abs() > 1e-4)
    exact = exact.leaves()
    output = reference.stock(exact)
    output.backward(grad.double())
    expected = [output, *exact.gradients().values(), exact.running_mean, exact.running_var]

    def step(forward: Callable, conv: nn.Conv2d, bn: nn.BatchNorm2d, layout: torch.memory_format):
        x = p.input.clone(memory_format=layout).requires_grad_()
        g = grad.contiguous(memory_format=layout)
        leaves = (x, conv.weight, bn.weight, bn.bias)

        def run() -> Sequence[Tensor]:
            y = forward(x)
            gradients = torch.autograd.grad(y, leaves, g)
            return y, *gradients, bn.running_mean, bn.running_var

        return run

    contenders = []
    for name, layout in LAYOUTS.items():
        stock = stock_layer(p).to(memory_format=layout)
        run = step(stock, stock[0], stock[1], layout)
        contenders.append(Contender(f"eager {name}", run, TOLERANCE))
        if compiled:
            copied = copy.deepcopy(stock)
            run = step(torch.compile(copied), copied[0], copied[1], layout)
            contenders.append(Contender(f"torch.compile {name}", run, TOLERANCE))
        conv, bn, _ = copy.deepcopy(stock)
        fused = tw.nn.ConvBNReLU2d.from_float(conv, bn)
        contenders.append(
            Contender(f"torchweld {name}", step(fused, conv, bn, layout), TOLERANCE, OURS)
        )
    return Setup(contenders, expected, [Cost.layer(*sizes(case), case.operations, training=True)])


def folded(case: cases.ConvCase, compiled: bool) -> Setup:
    p = problem(case, frozen=True)
    expected = [reference.stock(p.to(torch.float64))]

    def fold(layer: nn.Sequential) -> nn.Module:
        return nn.Sequential(fuse_conv_bn_eval(layer[0], layer[1]), nn.ReLU(inplace=True)).eval()

    def weld(layer: nn.Sequential) -> nn.Module:
        return tw.nn.ConvReLU2d.from_float(layer[0], layer[1])

    layer = stock_layer(p)
    contenders = inference.contenders(
        layer, p.input, TOLERANCE, fold=fold, weld=weld, compiled=compiled
    )
    return Setup(contenders, expected, [Cost.layer(*sizes(case), case.operations)])


def sizes(case: cases.ConvCase) -> tuple[int, int, int]:
    """Return the elements of input, weight and output."""
    shapes = case.input_shape, case.weight_shape, case.output_shape
    return tuple(math.prod(shape) for shape in shapes)

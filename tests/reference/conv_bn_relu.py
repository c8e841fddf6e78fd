"""conv-bn-relu from stock PyTorch operators, with what its backward gives."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import ROUNDOFF

ACTIVATIONS = {
    "identity": lambda z, slope: z,
    "relu": lambda z, slope: F.relu(z),
    "relu6": lambda z, slope: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "silu": lambda z, slope: F.silu(z),
    "hardswish": lambda z, slope: F.hardswish(z),
}


@dataclass
class Problem:
    """Everything a layer takes. `frozen` normalizes with the running statistics."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None
    conv: tuple  # stride, padding, dilation, groups
    activation: str = "relu"
    negative_slope: float = 0.01
    eps: float = 1e-5
    momentum: float = 0.1
    frozen: bool = False

    DIFFERENTIABLE = ("input", "weight", "bias", "bn_weight", "bn_bias", "residual")
    BATCH_NORM = ("bn_weight", "bn_bias", "running_mean", "running_var")

    def map(self, f) -> Problem:
        """Apply f(name, tensor) to every tensor there is."""
        names = (*self.DIFFERENTIABLE, "running_mean", "running_var")
        return replace(self, **{
            n: f(n, t) for n in names if (t := getattr(self, n)) is not None
        })  # fmt: skip

    def to(self, dtype: torch.dtype, bn_dtype: torch.dtype | None = None) -> Problem:
        return self.map(lambda n, t: t.to(bn_dtype or dtype if n in self.BATCH_NORM else dtype))

    def leaves(self) -> Problem:
        """Copies of all tensors, those with a derivative requiring gradients."""
        return self.map(lambda n, t: t.detach().clone().requires_grad_(n in self.DIFFERENTIABLE))

    def gradients(self) -> dict[str, Tensor]:
        tensors = {n: getattr(self, n) for n in self.DIFFERENTIABLE}
        return {n: t.grad for n, t in tensors.items() if t is not None}


def make_problem(seed: int, **fixed) -> Problem:
    """A random layer; `fixed` sets fields of the Problem, and `size`, the output's [N, C, H, W]."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    groups = rng.choice([1, 1, 1, 2, 4])
    c_in, c_out = groups * rng.choice([4, 5]), groups * rng.choice([1, 3, 8, 20])
    kernel, stride, dilation = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 2])
    if rng.random() < 0.2:
        c_in = c_out = groups = rng.choice([3, 16])  # depthwise
        kernel = 3  # of few weights batch norm leaves no gradient but noise
    padding = rng.choice([0, 1, 2])
    size = rng.choice([(2, 7, 5), (5, 9, 9), (3, 14, 6), (1, 30, 31), (17, 3, 3), (2, 5, 40)])
    x = torch.randn(size[0], c_in, size[1] + 2, size[2] + 2, dtype=torch.float64)
    weight = torch.randn(c_out, c_in // groups, kernel, kernel, dtype=torch.float64)
    conv = (stride, padding, dilation, groups)
    out = F.conv2d(x[:, :, :, :], weight, None, *conv).shape

    def maybe(tensor):
        return tensor if rng.random() < 0.6 else None

    c = c_out
    problem = Problem(
        x,
        weight / weight[0].numel() ** 0.5,
        maybe(torch.randn(c, dtype=torch.float64)),
        maybe(torch.rand(c, dtype=torch.float64) + 0.5),
        maybe(torch.randn(c, dtype=torch.float64)),
        torch.randn(c, dtype=torch.float64),
        torch.rand(c, dtype=torch.float64) + 0.5,
        maybe(torch.randn(out, dtype=torch.float64)),
        conv,
        activation=rng.choice(list(ACTIVATIONS)),
        negative_slope=rng.choice([0.01, 0.3]),
        frozen=rng.random() < 0.3,
    )
    for name, value in fixed.items():
        setattr(problem, name, value)
    return problem


def stock(p: Problem) -> Tensor:
    """Run stock operators, moving the running statistics of a problem that is not frozen."""
    a = F.conv2d(p.input, p.weight, p.bias, *p.conv)
    z = F.batch_norm(
        a, p.running_mean, p.running_var, p.bn_weight, p.bn_bias, not p.frozen, p.momentum, p.eps
    )
    if p.residual is not None:
        z = z + p.residual
    return ACTIVATIONS[p.activation](z, p.negative_slope)


def fused(p: Problem) -> Tensor:
    """Run torchweld's operators, with the same effects."""
    ops = torch.ops.torchweld
    stride, padding, dilation, groups = p.conv
    conv = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    tail = (*conv, p.eps, p.activation, p.negative_slope)
    if p.frozen:
        return ops.conv_bn_relu_frozen(
            p.input, p.weight, p.bias, p.bn_weight, p.bn_bias, p.running_mean, p.running_var,
            p.residual, *tail,
        )[0]  # fmt: skip
    output, _, mean, _, var = ops.conv_bn_relu(
        p.input, p.weight, p.bias, p.bn_weight, p.bn_bias, p.residual, *tail
    )
    count = output.numel() // output.size(1)
    ops.update_running_stats(p.running_mean, p.running_var, mean, var, count, p.momentum)
    return output


def error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    difference = (actual.detach().double() - expected).norm()
    return (difference / expected.norm().clamp_min(1e-30)).item()


def check_against_stock(problem: Problem) -> None:
    """Compare output, every gradient and the running statistics, on the device of the problem.

    The error may be twice that of stock in the same dtype; the reference is stock in float64.
    """
    exact, ours, theirs = problem.to(torch.float64).leaves(), problem.leaves(), problem.leaves()
    outputs = [run(p) for run, p in ((stock, exact), (fused, ours), (stock, theirs))]
    torch.manual_seed(1)
    with torch.no_grad():
        z = stock(replace(exact, activation="identity", momentum=0.0))
    # No gradient where rounding alone decides which piece of the activation a value falls on.
    border = torch.stack([(z - b).abs() for b in (-3, 0, 3, 6)]).amin(0) < 0.05
    grad = torch.randn(z.shape).masked_fill(border.cpu(), 0).to(problem.input)
    for output in outputs:
        output.backward(grad.to(output.dtype))

    def check(name, actual, expected, other):
        assert actual.dtype == other.dtype
        assert actual.shape == other.shape
        # Plus a few roundings: in float64 stock is the reference itself, elsewhere it may be lucky.
        roundings = 1000 if actual.dtype == torch.float64 else 4
        stocks = error(other, expected)
        if math.isnan(stocks):  # on the CPU, a dilated bfloat16 weight gradient may be
            stocks = 0.0
        bound = 2 * stocks + roundings * ROUNDOFF[actual.dtype]
        assert error(actual, expected) <= bound, name

    assert outputs[1].stride() == outputs[2].stride()
    check("output", outputs[1], outputs[0], outputs[2])
    expected, others = exact.gradients(), theirs.gradients()
    for name, actual in ours.gradients().items():
        if name == "bias" and not problem.frozen:
            assert torch.equal(actual, torch.zeros_like(actual))
        else:
            check(name, actual, expected[name], others[name])
    for name in ("running_mean", "running_var"):
        check(name, *(getattr(p, name) for p in (ours, exact, theirs)))

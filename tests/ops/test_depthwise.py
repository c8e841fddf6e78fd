"""Depthwise layers in every window and dtype: what kernels are held to on each device."""

import pytest
import torch
import torchweld as tw

from tests.reference.conv_bn_relu import ACTIVATIONS, check_against_stock, make_problem
from tests.tolerances import ROUNDOFF

# Channels, rows, columns, taps of both, (stride, padding, dilation).
LAYERS = {
    "3x3": (24, 9, 14, 3, 3, (1, 1, 1)),
    "3x3 strided": (32, 12, 15, 3, 3, (2, 1, 1)),
    "3x3 strided without padding": (16, 11, 11, 3, 3, (2, 0, 1)),
    "5x5": (40, 8, 13, 5, 5, (1, 2, 1)),
    "5x5 strided": (16, 13, 10, 5, 5, (2, 2, 1)),
    "7x7": (16, 9, 9, 7, 7, (1, 3, 1)),
    "dilated": (24, 11, 12, 3, 3, (1, 2, 2)),
    "odd channels": (37, 7, 8, 3, 3, (1, 1, 1)),
    "odd window": (8, 9, 14, 2, 4, (3, 1, 2)),
    "one channel": (1, 9, 9, 3, 3, (1, 1, 1)),
    "more padding than taps": (8, 5, 6, 3, 3, (1, 4, 1)),
    "31x31": (8, 20, 21, 31, 31, (1, 15, 1)),
}
NHWC = torch.channels_last


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture(params=["auto", "depthwise"])
def algorithm(request, monkeypatch):
    monkeypatch.setattr(tw.config, "convolution", request.param)


def problem_of(layer, **fixed):
    channels, height, width, rows, columns, conv = LAYERS[layer]
    torch.manual_seed(0)
    vectors = [torch.rand(channels, dtype=torch.float64) + 0.5 for _ in range(5)]
    names = ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")
    weight = torch.randn(channels, 1, rows, columns, dtype=torch.float64)
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    out = torch.conv2d(x, weight, None, *conv, groups=channels)
    return make_problem(
        0, input=x.contiguous(memory_format=NHWC), weight=weight / (rows * columns) ** 0.5,
        conv=(*conv, channels), residual=torch.randn_like(out).contiguous(memory_format=NHWC),
        **dict(zip(names, vectors, strict=True)) | fixed,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_training(layer, dtype, frozen, algorithm, device):
    problem = problem_of(layer, activation="leaky_relu", frozen=frozen)
    bn_dtype = torch.float32 if dtype.itemsize == 2 else dtype
    check_against_stock(problem.to(dtype, bn_dtype).map(lambda _, t: t.to(device)))


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_folded(layer, dtype, algorithm, device):
    for activation in ("relu", "hardswish"):
        p = problem_of(layer).to(dtype).map(lambda _, t: t.to(device))
        exact = p.to(torch.float64)
        z = torch.conv2d(exact.input, exact.weight, exact.bias, *p.conv) + exact.residual
        expected = ACTIVATIONS[activation](z, 0.0)
        actual = tw.ops.conv_relu(
            p.input, p.weight, p.bias, p.residual, stride=p.conv[0], padding=p.conv[1],
            dilation=p.conv[2], groups=p.conv[3], activation=activation,
        )  # fmt: skip
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=NHWC)
        bound = 8 * ROUNDOFF[dtype] * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("mask", [(True, False), (False, True)])
def test_one_gradient_alone(mask, algorithm, device):
    p = problem_of("3x3", frozen=True).to(torch.float32).map(lambda _, t: t.to(device))
    gradients = []
    for asked in (mask, (True, True)):
        x, w = (
            t.clone().requires_grad_(a) for t, a in zip((p.input, p.weight), asked, strict=True)
        )
        y, _ = tw.ops.conv_bn_relu_frozen(
            x, w, None, p.bn_weight, p.bn_bias, p.running_mean, p.running_var, stride=1, padding=1,
            groups=p.conv[3],
        )  # fmt: skip
        y.square().sum().backward()
        gradients.append([t.grad for t in (x, w)])
    for asked, alone, both in zip(mask, *gradients, strict=True):
        assert torch.equal(alone, both) if asked else alone is None

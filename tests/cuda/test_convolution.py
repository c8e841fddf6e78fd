"""The convolutions inside conv_bn_relu on a GPU: which one runs, and that it is right."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.ops.test_depthwise import (  # noqa: F401
    algorithm,
    problem_of,
    test_folded,
    test_one_gradient_alone,
    test_training,
)
from tests.reference.conv_bn_relu import fused
from tests.tolerances import ROUNDOFF

DEVICE = "cuda"
NHWC = torch.channels_last
NARROW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def device():
    """That of the tests of depthwise layers."""
    return DEVICE


def convolutions_of(function):
    """Return ATen's convolutions that a function calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function()
    names = {event.key for event in profiled.key_averages()}
    return {name for name in names if name.startswith("aten::") and "conv" in name}


# --- depthwise -----------------------------------------------------------------------------------
def train(layer="3x3", dtype=torch.bfloat16, **fixed):
    problem = problem_of(layer, **fixed).to(dtype).map(lambda _, t: t.to(DEVICE)).leaves()
    output = fused(problem)
    output.square().sum().backward()
    return [output, *problem.gradients().values()]


@pytest.mark.parametrize(("forced", "ours"), [("auto", True), ("aten", False)])
def test_depthwise_calls_no_convolution_of_torch(monkeypatch, forced, ours):
    monkeypatch.setattr(tw.config, "convolution", forced)
    assert (not convolutions_of(train)) == ours


@pytest.mark.parametrize("layer", ["3x3", "5x5 strided", "7x7", "odd channels"])
def test_depthwise_gives_the_same_bits_every_time(layer):
    expected = train(layer)
    for _ in range(3):
        for a, b in zip(train(layer), expected, strict=True):
            assert torch.equal(a, b)


def test_depthwise_in_a_graph_without_waiting(graph, no_sync, no_leak):
    expected = train()
    with no_sync():
        train()
    problem = problem_of("3x3").to(torch.bfloat16).map(lambda _, t: t.to(DEVICE)).leaves()

    def step():
        output = fused(problem)
        leaves = [problem.input, problem.weight]
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    for a, b in zip(graph(step)(), expected[:3], strict=True):
        assert torch.equal(a, b)
    no_leak(step)


def test_depthwise_of_misaligned_memory():
    problem = problem_of("3x3").to(torch.bfloat16).map(lambda _, t: t.to(DEVICE))

    def run(x):
        return tw.ops.conv_relu(x, problem.weight, problem.bias, padding=1, groups=x.shape[1])

    memory = torch.empty(problem.input.numel() + 1, dtype=torch.bfloat16, device=DEVICE)
    moved = memory[1:].as_strided(problem.input.shape, problem.input.stride())
    moved.copy_(problem.input)
    assert moved.data_ptr() % 16 != 0
    assert torch.equal(run(moved), run(problem.input))


def past_2_31_elements(copies):
    """Images of zeros, the last of ones; skips where the GPU has no room for so many of them."""
    shape = 2**31 // (8 * 64 * 64) + 2, 8, 64, 64
    if torch.cuda.mem_get_info()[0] < copies * 2 * math.prod(shape):
        pytest.skip("not enough memory on the GPU")
    x = torch.zeros(shape, dtype=torch.float16, device=DEVICE).to(memory_format=NHWC)
    x[-1] = 1
    return x


def test_depthwise_past_2_31_elements():
    x = past_2_31_elements(copies=3)
    weight = torch.ones(8, 1, 3, 3, dtype=torch.float16, device=DEVICE)
    y = tw.ops.conv_relu(x, weight, padding=1, groups=8)
    assert (y[-1, :, 1:-1, 1:-1] == 9).all()
    assert not y[-2].any()


def test_depthwise_network_in_training_and_inference():
    """An inverted residual block under autocast, against stock."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(16, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6()]
    parts += [nn.Conv2d(96, 96, 3, 2, 1, groups=96, bias=False), nn.BatchNorm2d(96), nn.ReLU6()]
    parts += [nn.Conv2d(96, 24, 1, bias=False), nn.BatchNorm2d(24)]
    stock = nn.Sequential(*parts).to(DEVICE, memory_format=NHWC)
    x = torch.randn(8, 16, 15, 15, device=DEVICE).to(memory_format=NHWC)
    welded = tw.weld(nn.Sequential(*parts).to(DEVICE))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = welded(x)
    y.float().square().mean().backward()
    assert parts[3].weight.grad.isfinite().all()
    stock.eval()
    snapshot = tw.weld(stock, inference=True)
    with torch.no_grad():
        torch.testing.assert_close(snapshot(x), stock(x), rtol=1e-3, atol=1e-4)


# --- cuDNN's fused convolution -------------------------------------------------------------------
def folded_layer(dtype, c_in=32, c_out=64, kernel=3):
    torch.manual_seed(0)
    x = torch.randn(4, c_in, 14, 13, device=DEVICE).to(dtype).to(memory_format=NHWC)
    weight = torch.randn(c_out, c_in, kernel, kernel, device=DEVICE) / (c_in * kernel**2) ** 0.5
    bias = torch.randn(c_out, device=DEVICE).to(dtype)
    residual = torch.randn(4, c_out, 14, 13, device=DEVICE).to(dtype).to(memory_format=NHWC)
    return x, weight.to(dtype), bias, residual


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("algorithm", ["auto", "aten"])
def test_fused_convolution(algorithm, dtype, kernel, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tw.config, "convolution", algorithm)
    x, weight, bias, residual = folded_layer(dtype, kernel=kernel)
    for with_bias, with_residual in itertools.product((False, True), repeat=2):
        b, r = bias if with_bias else None, residual if with_residual else None
        exact = [None if t is None else t.double() for t in (x, weight, b, r)]
        expected = torch.conv2d(*exact[:3], padding=kernel // 2)
        expected = F.relu(expected if r is None else expected + exact[3])
        actual = tw.ops.conv_relu(x, weight, b, r, padding=kernel // 2)
        assert actual.is_contiguous(memory_format=NHWC)
        bound = 16 * ROUNDOFF[dtype] * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


def test_fused_convolution_is_cudnns():
    x, weight, bias, residual = folded_layer(torch.bfloat16)
    run = lambda r: tw.ops.conv_relu(x, weight, bias, r, padding=1)  # noqa: E731
    assert convolutions_of(lambda: run(None)) == {"aten::cudnn_convolution_relu"}
    assert convolutions_of(lambda: run(residual)) == {"aten::cudnn_convolution_add_relu"}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_fused_convolution_does_not_read_its_output(dtype):
    """ATen passes the output where the residual would be, with a factor of 0: memory full of NaN
    must not shine through.
    """
    x, weight, bias, residual = folded_layer(dtype)
    for _ in range(3):
        full = [torch.full_like(residual, float("nan")) for _ in range(4)]
        del full  # the allocator hands it out again
        assert tw.ops.conv_relu(x, weight, bias, padding=1).isfinite().all()


def test_fused_convolution_is_not_asked_for_past_2_31_elements():
    x = past_2_31_elements(copies=4)
    weight = torch.ones(8, 8, 1, 1, dtype=torch.float16, device=DEVICE)
    results = []
    called = convolutions_of(lambda: results.append(tw.ops.conv_relu(x, weight)))
    assert "aten::cudnn_convolution_relu" not in called
    assert (results[0][-1] == 8).all()
    assert not results[0][-2].any()


def test_fused_convolution_heeds_the_switch_for_tf32(monkeypatch):
    x, weight, bias, _ = folded_layer(torch.float32, 256, 64)
    exact = F.relu(torch.conv2d(x.double(), weight.double(), bias.double(), padding=1))
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        error = tw.ops.conv_relu(x, weight, bias, padding=1) - exact
        errors[allowed] = (error.norm() / exact.norm()).item()
    assert errors[False] < 1e-6
    assert errors[True] < 1e-3


def test_fused_convolution_in_a_graph_with_the_same_bits(graph):
    x, weight, bias, residual = folded_layer(torch.float16)
    expected = tw.ops.conv_relu(x, weight, bias, residual, padding=1)
    replay = graph(lambda: tw.ops.conv_relu(x, weight, bias, residual, padding=1))
    for _ in range(3):
        assert torch.equal(replay(), expected)

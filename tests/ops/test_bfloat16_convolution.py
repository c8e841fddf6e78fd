"""Folded convolutions in bfloat16: each algorithm by its name, and what users call."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn
from torchweld import _C

from tests.ops.test_convolution import ALGORITHMS, CASES, LARGE, Case

ops = torch.ops.torchweld
INFINITY = math.inf
HAS_INSTRUCTIONS = _C.cpu_capability() == "avx512_bf16"


def able(name, case):
    return ALGORITHMS[name].can_forward(case) and (name != "dense" or HAS_INSTRUCTIONS)


def pairs(cases):
    return [
        pytest.param(name, case, id=f"{name}-{'x'.join(map(str, case.input + case.weight))}")
        for name in ALGORITHMS
        for case in cases
        if able(name, case)
    ]


def tensors(case, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(case.input, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    w = torch.randn(case.weight) / math.sqrt(math.prod(case.weight[1:]))
    return x, w.bfloat16()


def convolve(name, case, x, w, bias=None, residual=None, low=-INFINITY, high=INFINITY):
    return ops._conv_forward(x, w, bias, residual, *case.geometry, low, high, name, False)[0]


def rms(x):
    return x.double().square().mean().sqrt()


def check_close(ours, stock, exact, factor=1.05):
    assert ours.shape == exact.shape
    assert ours.dtype == torch.bfloat16
    if exact.numel():
        assert rms(ours - exact) <= factor * rms(stock - exact) + 2.0**-16 * rms(exact)
        # One rounding of a float32 result, and what float32 arithmetic errs by.
        assert ((ours - exact).abs() <= 2.0**-8 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize(("name", "case"), pairs(CASES))
def test_as_exact_as_torch(name, case):
    x, w = tensors(case)
    exact = torch.conv2d(x.double(), w.double(), None, *case.geometry)
    stock = torch.conv2d(x, w, None, *case.geometry)
    actual = convolve(name, case, x, w)
    check_close(actual, stock, exact)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "case"), pairs(CASES))
def test_bias_residual_and_bounds_are_rounded_once(name, case):
    x, w = tensors(case, seed=1)
    bias = torch.randn(case.weight[0], dtype=torch.bfloat16)
    exact = torch.conv2d(x.double(), w.double(), bias.double(), *case.geometry)
    residual = torch.randn(exact.shape, dtype=torch.bfloat16)
    stock = (torch.conv2d(x, w, bias, *case.geometry) + residual).clamp(-0.5, 0.75)
    actual = convolve(name, case, x, w, bias, residual, -0.5, 0.75)
    check_close(actual, stock, (exact + residual.double()).clamp(-0.5, 0.75))


@pytest.mark.parametrize(("name", "case"), pairs(LARGE))
def test_same_bits_for_any_number_of_threads(name, case):
    x, w = tensors(case)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(convolve(name, case, x, w))
        assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "case"),
    pairs(
        [
            Case((1, 5, 9, 9), (20, 5, 3, 3), padding=(1, 1)),  # odd runs end within a pair
            Case((2, 7, 6, 5), (33, 7, 1, 1)),
            Case((1, 3, 8, 8), (3, 1, 3, 3), padding=(1, 1), groups=3),
        ]
    ),
)
def test_what_is_no_number_goes_where_torch_has_it(name, case, value):
    x, w = tensors(case)
    x[0, 1, 4, 3] = value
    expected = torch.conv2d(x.double(), w.double(), None, *case.geometry)
    actual = convolve(name, case, x, w)
    if name == "winograd":  # all of a tile
        assert (~actual.isfinite())[~expected.isfinite()].all()
    else:
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert torch.equal(actual.isnan(), expected.isnan())


def test_statistics_are_for_float32():
    x, w = tensors(CASES[0])
    with pytest.raises(RuntimeError, match="input: expected float32, got bfloat16"):
        ops._conv_forward(x, w, None, None, *CASES[0].geometry, 0.0, 1.0, "dense", True)


# --- what users call ------------------------------------------------------------------------------
# What nn.Conv2d takes: channels, kernel, stride, padding, dilation, groups.
MODULES = [
    (24, 40, 1),
    (9, 17, 3, 1, 1),
    (16, 64, 3, 1, 1),
    (3, 32, 7, 2, 3),
    (20, 20, 5, 1, 2, 1, 20),
    (8, 8, 3, 1, 2, 2),
    (8, 12, 3, 1, 1, 1, 4),
]
ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def folded(arguments, activation="relu"):
    torch.manual_seed(0)
    conv = nn.Conv2d(*arguments).to(memory_format=torch.channels_last).bfloat16()
    bn = nn.BatchNorm2d(conv.out_channels).bfloat16()
    return conv, tw.nn.ConvReLU2d.from_float(conv, bn.eval(), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("arguments", MODULES, ids=str)
def test_module(arguments, activation):
    conv, module = folded(arguments, activation)
    x = torch.randn(2, conv.in_channels, 13, 12).to(
        torch.bfloat16, memory_format=torch.channels_last
    )
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    after = ACTIVATIONS[activation]
    for with_residual in (False, True):
        exact = F.conv2d(x.double(), module.weight.double(), module.bias.double(), *geometry)
        stock = F.conv2d(x, module.weight, module.bias, *geometry)
        residual = torch.randn(exact.shape, dtype=torch.bfloat16) if with_residual else None
        if residual is not None:
            exact, stock = exact + residual, stock + residual
        with torch.no_grad():
            actual = module(x, residual)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert rms(actual - after(exact)) <= 1.2 * rms(after(stock) - after(exact))


@pytest.mark.parametrize("arguments", MODULES, ids=str)
def test_a_packed_weight_only_saves_time(arguments):
    conv, module = folded(arguments)
    x = torch.randn(1, conv.in_channels, 9, 9).to(torch.bfloat16, memory_format=torch.channels_last)
    geometry = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
    outputs = [
        ops.conv_relu(x, module.weight, packed, module.bias, None, *geometry, "relu", 0.0)
        for packed in (module.packed_weight, None)
    ]
    torch.testing.assert_close(*outputs)  # maybe by another algorithm
    assert (module.packed_weight.numel() > 0) == (HAS_INSTRUCTIONS and conv.groups != 4)


@pytest.mark.parametrize("shape", [(0, 24, 5, 5), (1, 24, 1, 1)])
def test_least_batches(shape):
    _, module = folded(MODULES[0])
    x = torch.randn(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    expected = F.relu(F.conv2d(x, module.weight, module.bias))
    torch.testing.assert_close(module(x), expected)

"""Our own convolutions, each by its name: values, statistics, bits."""

import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torchweld import _C

ops = torch.ops.torchweld
INFINITY = math.inf


class Case(NamedTuple):
    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


CASES = [
    Case((2, 64, 7, 9), (32, 64, 1, 1)),
    Case((3, 24, 10, 10), (144, 24, 1, 1)),
    Case((1, 300, 5, 5), (70, 300, 1, 1)),
    Case((2, 20, 9, 8), (40, 20, 1, 1), stride=(2, 2)),
    Case((2, 5, 6, 6), (7, 5, 1, 1), padding=(1, 2)),
    Case((3, 1, 28, 28), (16, 1, 3, 3), padding=(1, 1)),
    Case((2, 16, 14, 14), (32, 16, 3, 3), padding=(1, 1)),
    Case((2, 3, 33, 35), (64, 3, 7, 7), stride=(2, 2), padding=(3, 3)),
    Case((1, 40, 9, 7), (24, 40, 3, 3), stride=(2, 1), padding=(1, 0)),
    Case((2, 9, 12, 11), (17, 9, 3, 2), padding=(0, 1)),
    Case((1, 6, 15, 15), (10, 6, 5, 5), padding=(2, 2)),
    Case((1, 8, 13, 17), (12, 8, 3, 3), padding=(2, 3), dilation=(2, 3)),
    Case((2, 7, 11, 13), (9, 7, 3, 3), padding=(2, 3), dilation=(2, 3)),
    Case((2, 3, 9, 300), (20, 3, 3, 5), stride=(1, 2), padding=(1, 2)),
    Case((3, 5, 12, 19), (33, 5, 4, 3), stride=(5, 4), padding=(2, 1)),
    Case((1, 8, 11, 11), (8, 8, 3, 3), stride=(3, 3), padding=(4, 4)),
    Case((1, 70, 20, 6), (7, 70, 3, 3), stride=(3, 2), padding=(0, 1)),
    Case((2, 600, 3, 3), (65, 600, 3, 3), padding=(1, 1)),
    Case((3, 37, 9, 50), (53, 37, 3, 3), padding=(2, 0)),
    Case((2, 280, 9, 5), (260, 280, 3, 3), padding=(1, 1)),
    Case((4, 4, 1, 1), (3, 4, 1, 1)),
    Case((0, 4, 5, 5), (3, 4, 3, 3)),
    Case((0, 6, 5, 4), (6, 1, 3, 3), groups=6),
    Case((2, 12, 9, 9), (12, 1, 3, 3), padding=(1, 1), groups=12),
    Case((2, 8, 9, 9), (16, 4, 3, 3), padding=(1, 1), groups=2),
    Case((3, 40, 17, 15), (40, 1, 3, 3), stride=(2, 2), padding=(1, 1), groups=40),
    Case((9, 24, 14, 14), (24, 1, 5, 5), padding=(2, 2), groups=24),
    Case((2, 17, 12, 30), (17, 1, 5, 5), stride=(2, 2), padding=(2, 2), groups=17),
    Case((66, 8, 7, 7), (8, 1, 3, 3), padding=(1, 1), groups=8),
    Case((2, 33, 19, 13), (33, 1, 7, 4), stride=(1, 3), padding=(5, 0), groups=33),
    Case((2, 6, 16, 16), (6, 1, 3, 3), (2, 3), (4, 3), dilation=(2, 2), groups=6),
    Case((1, 3, 1, 2), (3, 1, 3, 5), padding=(1, 2), groups=3),
    Case((2, 18, 9, 25), (18, 1, 7, 7), padding=(3, 3), groups=18),
]


def dense_can(case):
    return case.groups == 1


def dense_can_grad_input(case):
    return dense_can(case) and (max(case.stride) == 1 or max(case.dilation) == 1)


def is_depthwise(case):
    return case.groups == case.input[1] == case.weight[0]


class Algorithm(NamedTuple):
    can_forward: object
    can_grad_input: object
    can_grad_weight: object
    factor: float  # errors allowed, in those of torch


def winograd_can(case):
    ones = {*case.stride, *case.dilation, case.groups}
    return case.weight[2:] == (3, 3) and ones == {1} and max(case.padding) <= 2


ALGORITHMS = {
    # Loose for the sake of one channel's nine products; tests/ops/test_winograd.py has the bounds.
    "winograd": Algorithm(winograd_can, winograd_can, winograd_can, factor=10),
    "dense": Algorithm(dense_can, dense_can_grad_input, dense_can, factor=2),
    "depthwise": Algorithm(is_depthwise, is_depthwise, is_depthwise, factor=2),
}


def pairs(what):
    return [
        pytest.param(name, case, id=f"{name}-{'x'.join(map(str, case.input + case.weight))}")
        for name, algorithm in ALGORITHMS.items()
        for case in CASES
        if getattr(algorithm, what)(case)
    ]


def tensors(case, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(case.input).to(memory_format=torch.channels_last)
    w = torch.randn(case.weight) / math.sqrt(math.prod(case.weight[1:]))
    return x, w


def convolve(name, case, x, w, bias=None, residual=None, low=-INFINITY, high=INFINITY):
    return ops._conv_forward(x, w, bias, residual, *case.geometry, low, high, name, True)


def gradients(name, case, grad, x, w, input_grad=True, weight_grad=True):
    return ops._conv_backward(grad, x, w, *case.geometry, name, input_grad, weight_grad)


def check_close(ours, stock, exact, factor):
    assert ours.shape == exact.shape
    if exact.numel() == 0:
        return
    # Mean square: the largest of a few hundred errors is a matter of luck.
    error = (ours - exact).square().mean().sqrt()
    allowed = (stock - exact).square().mean().sqrt()
    rounding = 2.0**-24 * exact.square().mean().sqrt()
    assert error <= factor * allowed + rounding, f"{error}, torch: {allowed}"
    assert (ours - exact).abs().max() <= 10 * factor * (allowed + rounding)


@pytest.mark.parametrize(("name", "case"), pairs("can_forward"))
def test_forward_is_as_exact_as_torch(name, case):
    x, w = tensors(case)
    exact = torch.conv2d(x.double(), w.double(), None, *case.geometry)
    stock = torch.conv2d(x, w, None, *case.geometry)
    actual, _ = convolve(name, case, x, w)
    check_close(actual, stock, exact, ALGORITHMS[name].factor)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "case"), pairs("can_forward"))
def test_epilogue(name, case):
    x, w = tensors(case, seed=1)
    plain, _ = convolve(name, case, x, w)
    bias, residual = torch.randn(case.weight[0]), torch.randn(plain.shape)
    expected = (plain + bias[:, None, None] + residual).clamp(-0.5, 0.75)
    actual, _ = convolve(name, case, x, w, bias, residual, -0.5, 0.75)
    # The same bits: additions in this order, each rounded.
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(("name", "case"), pairs("can_forward"))
def test_moments_are_those_of_the_output(name, case, mean):
    x, w = tensors(case, seed=2)
    output, moments = convolve(name, case, x, w, torch.full((case.weight[0],), mean))
    values = output.double().transpose(0, 1).flatten(1)
    assert moments[0].eq(values.shape[1]).all()
    if values.numel() == 0:
        return
    deviations = values - values.mean(1, keepdim=True)
    torch.testing.assert_close(moments[1], values.mean(1), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(moments[2], deviations.square().sum(1), rtol=1e-5, atol=1e-6)


def grad_case(case):
    x, w = tensors(case, seed=3)
    grad = torch.randn(torch.conv2d(x, w, None, *case.geometry).shape)
    return grad.to(memory_format=torch.channels_last), x, w


def stock_gradients(case, grad, x, w, mask):
    stride, padding, dilation, groups = case.geometry
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
    )


@pytest.mark.parametrize("mask", [[True, False], [False, True], [True, True]], ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_are_as_exact_as_torch(name, mask):
    algorithm = ALGORITHMS[name]
    for case in CASES:
        if mask[0] and not algorithm.can_grad_input(case):
            continue
        if mask[1] and not algorithm.can_grad_weight(case):
            continue
        grad, x, w = grad_case(case)
        exact = stock_gradients(case, grad.double(), x.double(), w.double(), mask)
        stock = stock_gradients(case, grad, x, w, mask)
        actual = gradients(name, case, grad, x, w, *mask)
        for i in range(2):
            if mask[i]:
                check_close(actual[i], stock[i], exact[i], algorithm.factor)
            else:
                assert actual[i].numel() == 0


@pytest.mark.parametrize("name", ["winograd", "dense"])
@pytest.mark.parametrize("channels", [5, 200, 256])
def test_weight_gradient_of_an_empty_batch(name, channels, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    grad, x, w = grad_case(Case((0, channels, 5, 5), (256, channels, 3, 3)))
    torch.use_deterministic_algorithms(True)  # what nobody writes holds NaN
    try:
        _, actual = gradients(name, Case(x.shape, w.shape), grad, x, w)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(actual, torch.zeros_like(w))


LARGE = [
    Case((4, 48, 28, 28), (96, 48, 1, 1)),
    Case((6, 32, 20, 20), (64, 32, 3, 3), padding=(1, 1)),
    Case((3, 200, 10, 9), (190, 200, 3, 3), padding=(1, 1)),
    Case((1, 64, 30, 30), (256, 64, 1, 1), stride=(2, 2)),
    Case((4, 96, 30, 30), (96, 1, 3, 3), padding=(1, 1), groups=96),
    Case((9, 40, 21, 21), (40, 1, 3, 3), stride=(2, 2), padding=(1, 1), groups=40),
    Case((1, 72, 33, 33), (72, 1, 5, 5), padding=(2, 2), groups=72),
]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_same_bits_for_any_number_of_threads(name):
    algorithm = ALGORITHMS[name]
    threads = torch.get_num_threads()

    def run(case):
        grad, x, w = grad_case(case)
        results = [*convolve(name, case, x, w)] if algorithm.can_forward(case) else []
        if algorithm.can_grad_input(case):
            results.append(gradients(name, case, grad, x, w, True, False)[0])
        if algorithm.can_grad_weight(case):
            results.append(gradients(name, case, grad, x, w, False, True)[1])
        return results

    try:
        for case in LARGE:
            torch.set_num_threads(1)
            expected = run(case)
            for count in (2, 3, 7):
                torch.set_num_threads(count)
                assert all(map(torch.equal, run(case), expected)), (case, count)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unsupported_shape_is_a_loud_error(name):
    case = Case((1, 4, 5, 5), (4, 2, 3, 3), groups=2)
    with pytest.raises(RuntimeError, match="algorithm: expected one that can compute this shape"):
        convolve(name, case, *tensors(case))


SCRIPT = """
import torch, torchweld
torch.manual_seed(0)
x, w = torch.randn(2, 20, 9, 9), torch.randn(72, 20, 3, 3)
geometry = [1, 1], [1, 1], [1, 1], 1
y, _ = torch.ops.torchweld._conv_forward(x, w, None, None, *geometry, -9.0, 9.0, "dense", False)
bits = y.view(torch.int32).flatten().long()
checksum = (bits * torch.arange(bits.numel())).sum().item()
"""


@pytest.mark.skipif("avx2" not in _C.available_cpu_capabilities(), reason="needs AVX2")
def test_dense_has_the_same_bits_on_another_instruction_set():
    here: dict[str, int] = {}
    exec(SCRIPT, here)
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT + "print(torchweld.info()['cpu capability'], checksum)"],
        env={**os.environ, "TORCHWELD_CPU_CAPABILITY": "avx2"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert there == ["avx2", str(here["checksum"])]

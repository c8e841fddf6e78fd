"""The conv_bn_relu ops against stock PyTorch in float64."""

import hashlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torchweld import _C

from tests.reference.conv_bn_relu import (
    ACTIVATIONS,
    check_against_stock,
    error,
    fused,
    make_problem,
    stock,
)
from tests.tolerances import ROUNDOFF

ops = torch.ops.torchweld
DTYPES = list(ROUNDOFF)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(14))
def test_error_is_no_more_than_twice_that_of_stock(seed, dtype, layout):
    """Output, every gradient and the running statistics."""
    half = dtype in (torch.bfloat16, torch.float16)
    bn_dtype = torch.float32 if half and seed % 2 else dtype
    problem = make_problem(2 * seed + LAYOUTS.index(layout)).to(dtype, bn_dtype)
    problem.input = problem.input.contiguous(memory_format=layout)
    check_against_stock(problem)


def test_bfloat16_weight_gradient_of_a_dilated_convolution():
    """Stock torch 2.13 errs by more than 100 % here, in channels_last."""
    torch.manual_seed(0)
    x = torch.randn(2, 20, 9, 42).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(8, 5, 3, 3) / 7).bfloat16()
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        w = weight.detach().to(dtype).clone().requires_grad_()
        y = tw.ops.conv_bn_relu(x.to(dtype), w, dilation=2, groups=4, activation="silu")[0]
        y[..., :5].square().sum().backward()
        gradients.append(w.grad)
    assert error(*gradients) < 0.02


def test_weight_gradient_of_a_strided_input_is_laid_out_as_torch_does():
    """A fake kernel foretells it, and compiled code relies on that."""
    x = torch.randn(3, 4, 5, 8).bfloat16()[:, ::2]
    w = torch.randn(3, 2, 2, 2).bfloat16().requires_grad_()
    ours = torch.autograd.grad(tw.ops.conv_bn_relu(x, w, dilation=2)[0].sum(), w)[0]
    stock = torch.autograd.grad(F.conv2d(x, w, dilation=2).sum(), w)[0]
    assert ours.stride() == stock.stride()


# --- activations ---------------------------------------------------------------------------------
BORDERS = [
    -0.0,
    0.0,
    3.0,
    -3.0,
    6.0,
    2.999,
    -3.001,
    1e-30,
    -1e-30,
    88.0,
    -88.0,
    -104.0,
    1e30,
    -1e30,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_at_its_borders(activation, dtype):
    """Value and derivative where torch makes a choice, for infinities and for NaN."""
    values = [*BORDERS, float("inf"), float("-inf"), float("nan")]
    if activation == "hardswish" and dtype.itemsize == 2:
        values[-1] = 1.0  # torch gives NaN the derivative 1 in one loop and NaN in another
    # Whole registers: for the NaN in its scalar tail torch takes other choices.
    x = torch.tensor(values * 32).to(dtype).view(1, 1, 32, -1)
    one = torch.ones(1, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, _ = tw.ops.conv_bn_relu_frozen(
        ours, one.view(1, 1, 1, 1), None, None, None, one * 0, one, eps=0.0, activation=activation
    )
    expected = ACTIVATIONS[activation](theirs, 0.01)
    actual.sum().backward()
    expected.sum().backward()
    tolerance = {"rtol": 8 * ROUNDOFF[dtype] if activation in ("silu", "hardswish") else 0}
    tolerance["atol"] = 1e-35 if dtype == torch.float32 else 1e-7 if dtype == torch.float16 else 0
    torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True, **tolerance)


def test_silu_over_the_whole_range():
    x = torch.linspace(-110, 110, 20001).view(1, 1, 1, -1)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    actual = tw.ops.batch_norm_relu(x, zero, one, activation="silu").double()
    # 88.7 is where exp leaves float32; torch's own silu gives -0 below -88.7 as well.
    expected = torch.where(x < -88.7, -0.0, F.silu(x.double()))
    torch.testing.assert_close(actual, expected, rtol=6 * ROUNDOFF[torch.float32], atol=1e-36)


@pytest.mark.parametrize("frozen", [False, True])
def test_nan_spreads_as_in_stock(frozen):
    problem = make_problem(3, activation="relu", frozen=frozen, residual=None).to(torch.float32)
    problem.input[0, 0, 0, 0] = float("nan")
    ours, theirs = problem.leaves(), problem.leaves()
    for run, p in ((fused, ours), (stock, theirs)):
        run(p).sum().backward()
    for name, gradient in ours.gradients().items():
        if name == "bias" and not frozen:
            continue  # exactly zero here, whatever the rest
        assert torch.equal(gradient.isnan(), theirs.gradients()[name].isnan()), name


# --- shapes at the edge --------------------------------------------------------------------------
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_empty_batch(frozen, layout):
    x = torch.zeros(0, 3, 8, 8).contiguous(memory_format=layout)
    problem = make_problem(0, input=x, frozen=frozen, residual=torch.zeros(0, 4, 6, 6))
    problem.weight, problem.conv = torch.ones(4, 3, 3, 3), (1, 0, 1, 1)
    problem.bias = problem.bn_weight = problem.bn_bias = torch.ones(4)
    problem.running_mean, problem.running_var = torch.ones(4), torch.full((4,), 2.0)
    problem = problem.to(torch.float32).leaves()
    output = fused(problem)
    assert output.shape == (0, 4, 6, 6)
    output.sum().backward()
    for name, gradient in problem.gradients().items():
        assert torch.equal(gradient, torch.zeros_like(getattr(problem, name))), name
    assert problem.running_mean.tolist() == [1.0] * 4


def test_strided_tensors_are_taken():
    torch.manual_seed(0)
    x = torch.randn(6, 9, 8, 4).permute(3, 1, 0, 2)[:, ::3]
    weight, residual = torch.randn(3, 3, 8, 5).transpose(0, 1)[..., ::3, ::3], torch.randn(3, 4)
    gamma = torch.randn(6)[::2]
    expected = tw.ops.conv_bn_relu(x.contiguous(), weight.contiguous(), bn_weight=gamma.clone())[0]
    actual = tw.ops.conv_bn_relu(x, weight, bn_weight=gamma)[0]
    torch.testing.assert_close(actual, expected)
    residual = torch.randn(*expected.shape[::-1]).permute(3, 2, 1, 0)
    y = tw.ops.conv_bn_relu(x, weight, residual=residual, activation="identity")[0]
    plain = tw.ops.conv_bn_relu(x, weight, activation="identity")[0]
    torch.testing.assert_close(y, plain + residual)


# --- the same bits -------------------------------------------------------------------------------
def fingerprint() -> str:
    """A hash of everything our own passes compute, for every dtype, layout and activation."""
    digest = hashlib.sha256()
    torch.manual_seed(0)
    source = torch.randn(4, 3, 19, 23, 23, dtype=torch.float64)
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        x, r, g, _ = (t.to(dtype).contiguous(memory_format=layout) for t in source)
        count, mean, m2 = ops.batch_norm_stats(x)
        # Not `torch.rsqrt`, whose bits depend on torch's own instruction set.
        invstd = torch.tensor([v**-0.5 for v in (m2 / count).tolist()], dtype=torch.float64)
        for activation in ACTIVATIONS:
            common = (mean, invstd, mean.to(x), None, r)
            sums = ops.batch_norm_relu_backward_reduce(g, x, *common, activation, 0.1)
            results = [
                mean, m2, *sums, ops.batch_norm_relu(x, *common, activation, 0.1),
                *ops.batch_norm_relu_backward(g, x, *common, *sums, count, activation, 0.1),
            ]  # fmt: skip
            for t in results:
                digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        prints = set()
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            prints.add(fingerprint())
    finally:
        torch.set_num_threads(threads)
    assert len(prints) == 1


def test_same_bits_on_every_instruction_set():
    here = os.path.abspath(__file__)
    code = (
        f"import importlib.util as u, sys; sys.path[:0] = {sys.path!r}; "
        f"s = u.spec_from_file_location('fingerprints', {here!r}); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); print(m.fingerprint())"
    )
    processes = {
        capability: subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TORCHWELD_CPU_CAPABILITY": capability},
        )
        for capability in _C.available_cpu_capabilities().split(",")
    }  # fmt: skip
    prints = {capability: p.communicate()[0] for capability, p in processes.items()}
    assert all(prints.values()), prints
    assert len(set(prints.values())) == 1, prints

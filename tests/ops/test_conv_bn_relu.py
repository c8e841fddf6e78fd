"""The conv_bn_relu ops against stock PyTorch in float64."""

import hashlib
import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torchweld import _C

from tests.reference.conv_bn_relu import ACTIVATIONS, Problem, fused, stock
from tests.tolerances import ROUNDOFF

ops = torch.ops.torchweld
DTYPES = list(ROUNDOFF)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


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


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().double()
    difference = (actual.detach().double() - expected).norm()
    return (difference / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(14))
def test_error_is_no_more_than_twice_that_of_stock(seed, dtype, layout):
    """Output, every gradient and the running statistics."""
    half = dtype in (torch.bfloat16, torch.float16)
    bn_dtype = torch.float32 if half and seed % 2 else dtype
    problem = make_problem(2 * seed + LAYOUTS.index(layout)).to(dtype, bn_dtype)
    problem.input = problem.input.contiguous(memory_format=layout)
    exact, ours, theirs = problem.to(torch.float64).leaves(), problem.leaves(), problem.leaves()
    outputs = [run(p) for run, p in ((stock, exact), (fused, ours), (stock, theirs))]
    torch.manual_seed(1)
    with torch.no_grad():
        z = stock(replace(exact, activation="identity", momentum=0.0))
    # No gradient where rounding alone decides which piece of the activation a value falls on.
    border = torch.stack([(z - b).abs() for b in (-3, 0, 3, 6)]).amin(0) < 0.05
    grad = torch.randn(z.shape).masked_fill(border, 0).to(dtype)
    for output in outputs:
        output.backward(grad.to(output.dtype))

    def check(name, actual, expected, other):
        assert actual.dtype == other.dtype
        assert actual.shape == other.shape
        # Plus a few roundings: in float64 stock is the reference itself, elsewhere it may be lucky.
        roundings = 1000 if actual.dtype == torch.float64 else 4
        stocks = error(other, expected)
        if math.isnan(stocks):  # a dilated bfloat16 weight gradient may be; see the next test
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


# --- statistics ----------------------------------------------------------------------------------
SHAPES = [
    *((1, 1, 1, 1), (3, 1, 1, 1), (5, 3, 1, 1), (2, 1001, 1, 1), (4, 300, 3, 3)),
    *((1, 2, 131, 97), (40, 5, 7, 7), (300, 20, 2, 3), (2, 17, 50, 50)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_any_shape(shape, layout):
    """A mean 1000 times the deviation costs nothing: sums of squares would lose every digit."""
    torch.manual_seed(0)
    x = (torch.randn(shape) + 1000).contiguous(memory_format=layout)
    count, mean, m2 = tw.ops.batch_norm_stats(x)
    exact = x.double().transpose(0, 1).flatten(1)
    assert count.item() == exact.shape[1]
    torch.testing.assert_close(mean, exact.mean(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(m2, exact.var(1, correction=0) * exact.shape[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_constant_channel_gives_beta(layout):
    x = torch.full((2, 3, 20, 20), 1e6).contiguous(memory_format=layout)
    w, beta = torch.eye(3)[:, :, None, None] * 0.1, torch.tensor([0.5, -2.0, 3.0])
    output, _, _, _, var = tw.ops.conv_bn_relu(x, w, bn_bias=beta, activation="identity")
    assert torch.equal(var, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(output, beta[:, None, None].expand(2, 3, 20, 20))


def test_running_variance_far_below_eps_is_exact():
    x = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) * 1e-15
    _, _, mean, _, var = tw.ops.conv_bn_relu(x, torch.ones(1, 1, 1, 1), eps=1e-3)
    running_mean, running_var = torch.ones(1), torch.ones(1)
    tw.ops.update_running_stats(running_mean, running_var, mean, var, 2, 1.0)
    torch.testing.assert_close(running_var, torch.tensor([2e-30]), rtol=1e-6, atol=0)
    assert running_mean.item() == 0


def test_update_counts_as_a_write():
    running = [torch.zeros(2), torch.ones(2)]
    one = torch.ones(2, dtype=torch.float64)
    tw.ops.update_running_stats(*running, one, one, 4, 0.1)
    assert [r._version for r in running] == [1, 1]
    before = [r.clone() for r in running]
    tw.ops.update_running_stats(*running, one, one, 0, 0.1)  # an empty batch
    assert all(map(torch.equal, running, before))


def test_update_names_the_argument_that_does_not_fit():
    one = torch.ones(2, dtype=torch.float64)
    for name in ("running_mean", "running_var"):
        running = {"running_mean": torch.zeros(2), "running_var": torch.ones(2), name: one[:1]}
        with pytest.raises(RuntimeError, match=f"{name}: expected a contiguous .2. on the CPU"):
            tw.ops.update_running_stats(**running, mean=one, var=one, count=4, momentum=0.1)


@pytest.mark.parametrize("shape", [(2, 0, 1, 1), (2, 0, 3, 3), (0, 3, 1, 1), (2, 3, 0, 1)], ids=str)
def test_statistics_of_nothing(shape):
    x = torch.empty(shape)
    count, mean, m2 = tw.ops.batch_norm_stats(x)
    assert count.item() == shape[0] * shape[2] * shape[3]
    assert torch.equal(mean, torch.zeros(shape[1], dtype=torch.float64))
    assert torch.equal(m2, mean)
    assert tw.ops.batch_norm_relu(x, mean, m2).shape == shape


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_statistics_exchanged_between_parts_of_a_batch(layout, residual):
    """Two uneven parts and an empty one, normalized with common statistics, are one batch."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 7, 6, 5, 5, dtype=torch.float64)
    r = torch.randn(7, 6, 5, 5, dtype=torch.float64) if residual else None
    gamma, beta = torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    exact = [t.clone().requires_grad_() for t in (x, gamma, beta, *([r] if residual else []))]
    z = F.batch_norm(exact[0], None, None, exact[1], exact[2], True)
    F.silu(z + exact[3] if residual else z).backward(g)

    def parts(t):
        return [None] * 3 if t is None else t.contiguous(memory_format=layout).split([5, 0, 2])

    count, mean, m2 = zip(*map(tw.ops.batch_norm_stats, parts(x)), strict=True)
    total = sum(count)
    center = sum(n * m for n, m in zip(count, mean, strict=True)) / total
    m2 = sum(q + n * (m - center) ** 2 for n, m, q in zip(count, mean, m2, strict=True))
    invstd = (m2 / total + 1e-5).rsqrt()
    shared = (center, invstd, gamma, beta)
    y = [
        tw.ops.batch_norm_relu(a, *shared, b, "silu")
        for a, b in zip(parts(x), parts(r), strict=True)
    ]
    expected = F.batch_norm(x, None, None, gamma, beta, True)
    torch.testing.assert_close(torch.cat(y), F.silu(expected + r if residual else expected))

    triples = list(zip(parts(g), parts(x), parts(r), strict=True))
    sums = [
        tw.ops.batch_norm_relu_backward_reduce(a, b, *shared, c, "silu", 0.0) for a, b, c in triples
    ]
    sum_g, sum_g_xhat = (sum(s) for s in zip(*sums, strict=True))
    torch.testing.assert_close(sum_g, exact[2].grad)
    torch.testing.assert_close(sum_g_xhat, exact[1].grad)
    gradients = [
        tw.ops.batch_norm_relu_backward(a, b, *shared, c, sum_g, sum_g_xhat, total, "silu", 0.0)
        for a, b, c in triples
    ]
    torch.testing.assert_close(torch.cat([d for d, _ in gradients]), exact[0].grad)
    if residual:
        torch.testing.assert_close(torch.cat([d for _, d in gradients]), exact[3].grad)


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


# --- torch's machinery ---------------------------------------------------------------------------
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "silu"])
def test_gradcheck(activation, frozen):
    problem = make_problem(
        5, activation=activation, frozen=frozen, negative_slope=0.9, conv=(2, 1, 1, 1),
        input=torch.randn(2, 2, 5, 5, dtype=torch.float64),
        weight=torch.randn(3, 2, 3, 3, dtype=torch.float64),
        residual=torch.randn(2, 3, 3, 3, dtype=torch.float64) + 0.5,
        running_mean=torch.zeros(3, dtype=torch.float64),
        running_var=torch.ones(3, dtype=torch.float64),
    )  # fmt: skip
    for name in ("bias", "bn_weight", "bn_bias"):
        setattr(problem, name, torch.rand(3, dtype=torch.float64) + 0.5)
    leaves = problem.leaves()

    def run(*tensors):
        for name, tensor in zip(Problem.DIFFERENTIABLE, tensors, strict=True):
            setattr(leaves, name, tensor)
        return fused(leaves)

    tensors = [getattr(leaves, name) for name in Problem.DIFFERENTIABLE]
    assert torch.autograd.gradcheck(run, tensors, atol=1e-6)


def samples():
    """Arguments for every op: plain, channels_last, strided, empty, one value."""
    torch.manual_seed(0)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    c = [torch.rand(4, dtype=torch.float64) + 0.5 for _ in range(4)]
    f = [t.float().requires_grad_(i < 2) for i, t in enumerate(c)]
    inputs = {
        "plain": torch.randn(2, 3, 5, 4),
        "channels_last": torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last),
        "strided": torch.randn(5, 3, 4, 2).permute(3, 1, 0, 2),
        "empty": torch.randn(0, 3, 5, 4),
        "one": torch.randn(1, 3, 1, 1),
    }
    for name, x in inputs.items():
        a = F.conv2d(x, weight, padding=1).detach()
        r, x = torch.randn_like(a).requires_grad_(), x.requires_grad_()
        y = ("leaky_relu", 0.2)
        some, every = [True, False, True, False, True, False], [True] * 6
        yield f"{name}-conv_bn_relu", (x, weight, f[2], f[0], f[1], r, *conv, 1e-5, *y)
        yield f"{name}-conv_bn_relu", (x, weight, None, None, None, None, *conv, 1e-5, *y)
        yield f"{name}-conv_bn_relu_frozen", (x, weight, None, *f, r, *conv, 1e-5, *y)
        yield f"{name}-conv_relu", (x.detach(), weight.detach(), None, f[2], None, *conv, *y)
        if name == "empty":
            continue
        x, w, r, f0, f1 = (t.detach() for t in (x, weight, r, f[0], f[1]))
        for mask in (some, every):
            yield f"{name}-conv_bn_relu_backward", (a, x, w, f0, f1, r, a, *c[:2], *conv, *y, mask)
            yield (f"{name}-conv_bn_relu_frozen_backward",
                   (a, x, w, f0, f1, *f[2:], r, a, *conv, 1e-5, *y, mask))  # fmt: skip
        yield f"{name}-batch_norm_stats", (x,)
        common = (*c[:2], f0, None, r)
        yield f"{name}-batch_norm_relu", (a, *common, *y)
        yield f"{name}-batch_norm_relu_backward_reduce", (a, a, *common, *y)
        yield f"{name}-batch_norm_relu_backward", (a, a, *common, *c[2:], c[0][:1], *y)
    x = torch.randn(2, 3, 9, 40).bfloat16().contiguous(memory_format=torch.channels_last)
    arguments = (None, None, None, None, [1, 1], [0, 0], [2, 2], 1, 1e-5, "relu", 0.0)
    yield "dilated-conv_bn_relu", (x.requires_grad_(), weight.detach().bfloat16(), *arguments)
    w = weight.detach().bfloat16().requires_grad_()
    yield "dilated-conv_bn_relu", (x, w, *arguments)
    yield "plain-update_running_stats", (*f[2:], c[0], c[1], 10, 0.1)


SAMPLES = list(samples())


@pytest.mark.parametrize(("name", "arguments"), SAMPLES, ids=[name for name, _ in SAMPLES])
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(ops, name.split("-")[1]).default, arguments)


def test_second_derivative_is_refused():
    problem = make_problem(1, activation="silu", frozen=False).leaves()
    gradient, *_ = torch.autograd.grad(fused(problem).sum(), problem.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, got a second derivative"):
        gradient.sum().backward()


def test_what_has_no_gradient_says_so():
    x, w = torch.randn(2, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 1, 1)
    with pytest.raises(RuntimeError, match="conv_relu: inference only"):
        tw.ops.conv_relu(x, w).sum().backward()
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="needs an exchange between processes"):
        tw.ops.batch_norm_relu(x, one, one).sum().backward()
    _, *others = tw.ops.conv_bn_relu(x, w)
    assert not any(t.requires_grad for t in others)


def test_only_gradients_asked_for_are_computed():
    problem = make_problem(4, frozen=False).to(torch.float32)
    every = problem.leaves()
    fused(every).square().sum().backward()
    for name, expected in every.gradients().items():
        one = problem.leaves().map(lambda n, t, name=name: t.requires_grad_(n == name))
        (actual,) = torch.autograd.grad(fused(one).square().sum(), getattr(one, name))
        assert torch.equal(actual, expected), name


X, W = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": X[0]}, "input: expected 4 dimensions [N, C, H, W], got [4, 5, 5]"),
        ({"input": X.int()}, "input: expected float32, float64, bfloat16 or float16, got int32"),
        ({"weight": W[:, :3]}, "input: expected 3 channels"),
        ({"weight": W.double()}, "weight: expected float32, got float64"),
        ({"groups": 4}, "groups: expected a divisor of the 6 output channels, got 4"),
        ({"stride": 0}, "stride: expected 2 integers of at least 1, got [0, 0]"),
        ({"padding": (1, -1)}, "padding: expected 2 integers of at least 0, got [1, -1]"),
        ({"dilation": 3}, "input: expected a padded height of at least the kernel's 7, got 5"),
        ({"bias": X[0, 0, 0]}, "bias: expected shape [6], got [5]"),
        ({"bn_weight": torch.zeros(5)}, "bn_weight: expected shape [6], one value per channel"),
        ({"bn_bias": torch.zeros(6).half()}, "bn_bias: expected float32, got float16"),
        ({"residual": X}, "residual: expected shape [2, 6, 3, 3], got [2, 4, 5, 5]"),
        ({"activation": "gelu"}, 'got "gelu"'),
    ],
    ids=lambda a: next(iter(a)) if isinstance(a, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(RuntimeError) as caught:
        tw.ops.conv_bn_relu(**{"input": X, "weight": W, **arguments})
    assert f"torchweld::conv_bn_relu: {message}" in str(caught.value) or message in str(
        caught.value
    )


def test_saved_output_brought_back_in_another_memory_order():
    """As hooks that offload or compress what autograd saves may."""
    layer = tw.nn.ConvBNReLU2d(24, 40, 3, padding=1)
    x = torch.randn(4, 24, 14, 14).to(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        output = layer(x).square().sum()
    for gradient, other in zip(torch.autograd.grad(output, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-3, rtol=1e-3)

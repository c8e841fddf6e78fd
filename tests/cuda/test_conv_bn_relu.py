"""The conv_bn_relu operators on a GPU: as accurate as stock, equal to the CPU's, in any memory."""

import itertools

import pytest
import torch
import torchweld as tw

from tests.ops.test_batch_norm_stats import SHAPES
from tests.ops.test_conv_bn_relu import BORDERS
from tests.ops.test_conv_bn_relu_autograd import samples
from tests.reference.conv_bn_relu import (
    ACTIVATIONS,
    Problem,
    check_against_stock,
    fused,
    make_problem,
    stock,
)
from tests.tolerances import ROUNDOFF

ops = torch.ops.torchweld
DEVICE = "cuda"
DTYPES = list(ROUNDOFF)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
NAMES = ["nchw", "nhwc"]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """No TF32, and the same algorithm for the same convolution."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def moved(problem: Problem, device=DEVICE) -> Problem:
    return problem.map(lambda _, t: t.to(device))


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(14))
def test_error_is_no_more_than_twice_that_of_stock(seed, dtype, layout):
    bn_dtype = torch.float32 if dtype.itemsize == 2 else dtype
    problem = moved(make_problem(2 * seed + LAYOUTS.index(layout)).to(dtype, bn_dtype))
    problem.input = problem.input.contiguous(memory_format=layout)
    check_against_stock(problem)


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 4, 64], ids=lambda n: f"batch {n}")
def test_batches_of_one_launch_and_of_several(batch, dtype, layout):
    """Small tensors take one launch for all passes; the last batch is not small."""
    x = torch.randn(batch, 8, 15, 15, dtype=torch.float64).contiguous(memory_format=layout)
    problem = make_problem(
        1, input=x, weight=torch.randn(40, 8, 3, 3, dtype=torch.float64) / 8, conv=(1, 1, 1, 1),
        residual=torch.randn(batch, 40, 15, 15, dtype=torch.float64), activation="relu",
        frozen=False, bias=None, bn_weight=torch.rand(40, dtype=torch.float64) + 0.5,
        bn_bias=torch.randn(40, dtype=torch.float64), running_mean=torch.zeros(40).double(),
        running_var=torch.ones(40).double(),
    )  # fmt: skip
    check_against_stock(moved(problem.to(dtype)))


# --- the passes around the convolution -----------------------------------------------------------
def passes(x, r, g, activation):
    """Everything but the convolution: statistics, and what depends on given ones."""
    count, mean, m2 = ops.batch_norm_stats(x)
    center = torch.linspace(-0.3, 0.4, x.shape[1], dtype=torch.float64).to(x.device)
    invstd = torch.linspace(0.5, 1.5, x.shape[1], dtype=torch.float64).to(x.device)
    common = (center, invstd, center.to(x.dtype), invstd.to(x.dtype), r)
    sums = ops.batch_norm_relu_backward_reduce(g, x, *common, activation, 0.1)
    fixed = [torch.full_like(center, 0.25), torch.full_like(center, -0.5)]
    return {
        "statistics": [count, mean, m2],
        "sums": [*sums],
        "output": [ops.batch_norm_relu(x, *common, activation, 0.1)],
        "gradients": [*ops.batch_norm_relu_backward(g, x, *common, *fixed, count, activation, 0.1)],
    }


PASSES = [(4, 19, 23, 23), (2, 64, 14, 14), (3, 1, 7, 9), (40, 8, 1, 1), (1, 130, 5, 1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PASSES, ids=str)
def test_passes_equal_those_of_the_cpu(shape, dtype, layout):
    """The same formulas, rounded alike; 16-bit divisions and, but for float32, exponentials are the
    device's own.
    """
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3)]
    for activation in ACTIVATIONS:
        expected = passes(*tensors, activation)
        actual = passes(*(t.to(DEVICE) for t in tensors), activation)
        own = (activation == "silu" and dtype != torch.float32) or (
            activation == "hardswish" and dtype.itemsize == 2
        )
        for name, ours in actual.items():
            for a, b in zip(ours, expected[name], strict=True):
                assert a.stride() == b.stride()
                if name in ("output", "gradients") and not own:
                    assert torch.equal(a.cpu(), b), (name, activation)
                    continue
                rounding = 2**-24 if name in ("statistics", "sums") else ROUNDOFF[dtype]
                scale = 64 * rounding if own or dtype != torch.float64 else 64 * 2**-53
                bound = scale * max(1.0, b.abs().max().item())
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=bound)


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_any_shape(shape, layout):
    torch.manual_seed(0)
    x = (torch.randn(shape) + 1000).contiguous(memory_format=layout)
    count, mean, m2 = (t.cpu() for t in tw.ops.batch_norm_stats(x.to(DEVICE)))
    exact = x.double().transpose(0, 1).flatten(1)
    assert count.item() == exact.shape[1]
    torch.testing.assert_close(mean, exact.mean(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(m2, exact.var(1, correction=0) * exact.shape[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_at_its_borders(activation, dtype):
    values = [*BORDERS, float("inf"), float("-inf")]
    if activation not in ("relu6", "silu", "hardswish"):  # of NaN torch's loops disagree
        values.append(float("nan"))
    x = torch.tensor(values * 16, device=DEVICE).to(dtype).view(1, 1, 16, -1)
    one = torch.ones(1, dtype=dtype, device=DEVICE)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, _ = tw.ops.conv_bn_relu_frozen(
        ours, one.view(1, 1, 1, 1), None, None, None, one * 0, one, eps=0.0, activation=activation
    )
    expected = ACTIVATIONS[activation](theirs, 0.01)
    actual.sum().backward()
    expected.sum().backward()
    tolerance = {"rtol": 8 * ROUNDOFF[dtype] if activation in ("silu", "hardswish") else 0}
    # A 16-bit silu is 0 where the exponential is within a factor of 4 of float32's end.
    tolerance["atol"] = 1e-7 if dtype == torch.float16 else 1e-35
    torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True, **tolerance)


@pytest.mark.parametrize("frozen", [False, True])
def test_nan_spreads_as_in_stock(frozen):
    problem = make_problem(3, activation="relu", frozen=frozen, residual=None).to(torch.float32)
    problem.input[0, 0, 0, 0] = float("nan")
    problem = moved(problem)
    ours, theirs = problem.leaves(), problem.leaves()
    for run, p in ((fused, ours), (stock, theirs)):
        run(p).sum().backward()
    for name, gradient in ours.gradients().items():
        if name != "bias" or frozen:  # exactly zero here, whatever the rest
            assert torch.equal(gradient.isnan(), theirs.gradients()[name].isnan()), name


# --- memory --------------------------------------------------------------------------------------
def misaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("layout", [misaligned, with_gaps, lambda x: x.mT.contiguous().mT])
@pytest.mark.parametrize("which", range(3))
def test_memory_of_any_layout(layout, which):
    torch.manual_seed(0)
    tensors = [torch.randn(3, 16, 8, 8, device=DEVICE).bfloat16() for _ in range(3)]
    expected = passes(*tensors, "relu")
    tensors[which] = layout(tensors[which])
    for name, actual in passes(*tensors, "relu").items():
        for a, b in zip(actual, expected[name], strict=True):
            # Other groups of elements, so other partial sums.
            bound = {"rtol": 0, "atol": 0} if name in ("output", "gradients") else {}
            torch.testing.assert_close(a, b, **bound)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_empty_batch(frozen, layout):
    x = torch.zeros(0, 3, 8, 8).contiguous(memory_format=layout)
    problem = make_problem(0, input=x, frozen=frozen, residual=torch.zeros(0, 4, 6, 6))
    problem.weight, problem.conv = torch.ones(4, 3, 3, 3), (1, 0, 1, 1)
    problem.bias = problem.bn_weight = problem.bn_bias = torch.ones(4)
    problem.running_mean, problem.running_var = torch.ones(4), torch.full((4,), 2.0)
    problem = moved(problem.to(torch.float32)).leaves()
    output = fused(problem)
    assert output.shape == (0, 4, 6, 6)
    output.sum().backward()
    for name, gradient in problem.gradients().items():
        assert torch.equal(gradient, torch.zeros_like(getattr(problem, name))), name
    assert problem.running_mean.tolist() == [1.0] * 4


def test_more_than_2_31_elements():
    size = 2**31 + 2**20
    if torch.cuda.mem_get_info()[0] < 5 * size:
        pytest.skip("not enough memory on the GPU")
    x = torch.zeros(1, size // 64, 8, 8, dtype=torch.float16, device=DEVICE)
    x[:, -1] = 2.0
    count, mean, m2 = ops.batch_norm_stats(x)
    assert (count.item(), mean[-1].item(), mean[-2].item(), m2[-1].item()) == (64, 2, 0, 0)
    one = torch.ones_like(mean)
    y = ops.batch_norm_relu(x, one, 3 * one, None, None, None, "relu", 0.0)
    assert (y[0, -1] == 3).all()
    assert (y[0, -2] == 0).all()


# --- what torch asks of an operator --------------------------------------------------------------
def on_device(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    return value


CALLS = [(f"{i}-{name}", arguments) for i, (name, arguments) in enumerate(samples())]


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_opcheck(name, arguments):
    op = getattr(ops, name.split("-")[-1]).default
    torch.library.opcheck(op, tuple(map(on_device, arguments)))


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
    leaves = moved(problem).leaves()

    def run(*tensors):
        for name, tensor in zip(Problem.DIFFERENTIABLE, tensors, strict=True):
            setattr(leaves, name, tensor)
        return fused(leaves)

    tensors = [getattr(leaves, name) for name in Problem.DIFFERENTIABLE]
    assert torch.autograd.gradcheck(run, tensors, atol=1e-6)


def layer(frozen: bool = False) -> Problem:
    """A layer that has everything."""
    torch.manual_seed(0)
    vectors = [torch.rand(6) + 0.5 for _ in range(5)]
    problem = Problem(
        torch.randn(2, 4, 7, 7), torch.randn(6, 4, 3, 3) / 6, *vectors, torch.randn(2, 6, 7, 7),
        (1, 1, 1, 1), activation="hardswish", frozen=frozen,
    )  # fmt: skip
    return moved(problem).leaves()


@pytest.mark.parametrize("name", [*Problem.DIFFERENTIABLE, "running_mean", "running_var"])
@pytest.mark.parametrize("frozen", [False, True])
def test_tensors_elsewhere_are_refused(name, frozen):
    problem = layer(frozen)
    setattr(problem, name, getattr(problem, name).detach().cpu())
    with pytest.raises(RuntimeError, match=r"torchweld::.*expected a tensor on the device"):
        fused(problem)


# --- streams, graphs, waiting --------------------------------------------------------------------
def train(problem: Problem) -> list[torch.Tensor]:
    output = fused(problem)
    output.square().sum().backward()
    return [output, *problem.gradients().values(), problem.running_mean, problem.running_var]


def test_nothing_waits_for_the_device():
    train(layer())  # cuDNN's first call may wait
    problem = layer()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_stream_and_same_bits_every_time():
    expected = train(layer())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        problem = layer()
        image = problem.input.detach()
        late = image.clone()
        image.zero_()
        torch.cuda._sleep(20_000_000)
        image.copy_(late)  # before the layer, or its result is another
        actual = train(problem)
        assert not stream.query(), "the layer waits for nothing"
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_capture_in_a_graph():
    expected = train(layer())
    train(layer())  # cuDNN chooses
    problem = layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(problem)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folded_convolution(layout, dtype):
    torch.manual_seed(0)
    x, w, b, r = (
        torch.randn(s, dtype=torch.float64) for s in ((2, 8, 9, 9), (12, 8, 3, 3), (12,),
                                                      (2, 12, 9, 9))
    )  # fmt: skip
    tensors = [t.to(DEVICE, dtype) for t in (x, w / 8, b, r)]
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    exact = [t.double() for t in tensors]
    for bias, residual in itertools.product((0, 1), (0, 1)):
        expected = torch.conv2d(exact[0], exact[1], exact[2] * bias, padding=1)
        expected = (expected + exact[3] * residual).relu()
        actual = tw.ops.conv_relu(
            tensors[0], tensors[1], tensors[2] if bias else None, tensors[3] if residual else None,
            padding=1, packed_weight=tw.ops.conv_relu_pack(tensors[1], padding=1),
        )  # fmt: skip
        assert actual.is_contiguous(memory_format=layout)
        bound = 16 * ROUNDOFF[dtype] * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)

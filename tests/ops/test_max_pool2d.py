"""Max pooling against torch's: the same values, choices among equals, and gradients."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.library import opcheck

_ops = torch.ops.torchweld
SHAPES = [(2, 16, 9, 11), (1, 5, 7, 6), (3, 33, 4, 13), (1, 64, 1, 5), (2, 3, 2, 2)]
WINDOWS = list(itertools.product((1, 2, 3, (5, 2), (2, 7)), (1, 2, 3), (0, 1), (1, 2, 3)))


def image(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, special: bool = True
) -> Tensor:
    """Few values, so that windows have ties; NaN and -inf among them."""
    torch.manual_seed(0)
    x = torch.randint(-3, 4, shape).to(dtype)
    if special:
        x[torch.rand(shape) < 0.05] = float("nan")
        x[torch.rand(shape) < 0.2] = -float("inf")
    return x.contiguous(memory_format=torch.channels_last)


def indices(positions: Tensor, width: int, window: tuple) -> Tensor:
    """torch's index of each position: its place in the plane of the input."""
    kernel_size, stride, padding, dilation, _ = window
    columns = kernel_size if isinstance(kernel_size, int) else kernel_size[1]
    rows = torch.arange(positions.shape[2])[:, None] * stride - padding
    first = torch.arange(positions.shape[3]) * stride - padding
    tap = positions.long()
    return (rows + tap // columns * dilation) * width + first + tap % columns * dilation


def same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(
        ours.nan_to_num(0.0), theirs.nan_to_num(0.0)
    )


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_choices_are_torchs(dtype, shape, ceil_mode):
    x, compared = image(shape, dtype), 0
    for window in ((*w, ceil_mode) for w in WINDOWS):
        try:
            expected, chosen = F.max_pool2d(x, *window, return_indices=True)
        except RuntimeError:
            with pytest.raises(RuntimeError, match=r"max_pool2d: (padding|input): expected"):
                tw.ops.max_pool2d(x, *window)
            continue
        output, positions = tw.ops.max_pool2d_with_positions(x, *window)
        assert same(output, expected), window
        assert same(tw.ops.max_pool2d(x, *window), expected), window
        assert torch.equal(indices(positions, shape[3], window), chosen), window
        assert output.stride() == expected.stride() == positions.stride()
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_has_torchs_bits(shape, ceil_mode):
    compared = 0
    for window in ((*w, ceil_mode) for w in WINDOWS):
        x = image(shape)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        try:
            expected, chosen = F.max_pool2d(theirs, *window, return_indices=True)
        except RuntimeError:
            continue
        if chosen.max() >= shape[2] * shape[3]:
            continue  # windows of padding alone, where torch writes beyond its gradient
        output = tw.ops.max_pool2d(ours, *window)
        gradient = torch.randn(expected.shape).contiguous(memory_format=torch.channels_last)
        output.backward(gradient)
        expected.backward(gradient)
        assert torch.equal(ours.grad, theirs.grad), window
        compared += 1
    assert compared > 10


def test_bfloat16_gradient_is_rounded_once():
    x, gradient = image((2, 20, 13, 12), special=False), torch.randn(2, 20, 7, 6)
    exact, ours = x.double().requires_grad_(), x.bfloat16().requires_grad_()
    gradient = gradient.bfloat16()
    F.max_pool2d(exact, 3, 2, 1).backward(gradient.double())
    tw.ops.max_pool2d(ours, 3, 2, 1).backward(gradient)
    bound = torch.finfo(torch.bfloat16).eps / 2 * exact.grad.abs()
    assert ((ours.grad.double() - exact.grad).abs() <= bound + 1e-6).all()


def test_a_window_of_padding_alone():
    x = torch.zeros(1, 8, 1, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = tw.ops.max_pool2d(x, 2, 1, 1, 2)
    assert torch.equal(output, F.max_pool2d(x, 2, 1, 1, 2))
    assert output.isinf().all()
    (first,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    assert not first.any()


def test_second_derivative_of_a_window_of_padding_alone():
    x = torch.zeros(1, 8, 1, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = tw.ops.max_pool2d(x, 2, 1, 1, 2)
    gradient = torch.ones_like(output).requires_grad_()
    (first,) = torch.autograd.grad(output, x, gradient, create_graph=True)
    assert not torch.autograd.grad(first.sum(), gradient)[0].any()


@pytest.mark.parametrize("window", [([3], [2], [1], [1]), ([2], [1, 2]), ((3,), (), (1,), (2,))])
def test_a_list_of_one_number_is_a_pair(window):
    x, results = image((2, 16, 9, 10), special=False), []
    for pool in (tw.ops.max_pool2d, F.max_pool2d):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(pool(leaf, *window).pow(3).sum(), leaf, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), leaf)[0]
        results.append((pool(x, *window), first, second))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_with_any_number_of_threads(threads):
    x = torch.randn(7, 40, 37, 33).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(7, 40, 19, 17).contiguous(memory_format=torch.channels_last)
    expected = x.clone().requires_grad_()
    F.max_pool2d(expected, 3, 2, 1).backward(gradient)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        tw.ops.max_pool2d(x.requires_grad_(), 3, 2, 1).backward(gradient)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(x.grad, expected.grad)


def others() -> list[tuple[Tensor, int]]:
    x = image((2, 16, 20, 20), special=False)
    strided = torch.randn(2, 20, 20, 32).permute(0, 3, 1, 2)[:, ::2]
    return [
        *((x.to(t), 2) for t in (torch.float64, torch.float16, torch.int32)),
        *((t, 2) for t in (x.contiguous(), x[0], x[:0], x[:, :1], strided)),
        (x[..., 1:], 3),
        (x, 17),
        (x, 7),
    ]


@pytest.mark.parametrize("case", range(len(others())))
def test_what_has_no_kernel_is_torchs(case):
    x, kernel_size = others()[case]
    stride = 1 if kernel_size == 7 else None
    assert torch.equal(
        tw.ops.max_pool2d(x, kernel_size, stride), F.max_pool2d(x, kernel_size, stride)
    )
    if not x.is_floating_point():
        return
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    tw.ops.max_pool2d(ours, kernel_size, stride).sum().backward()
    F.max_pool2d(theirs, kernel_size, stride).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert ours.grad.stride() == theirs.grad.stride()


def test_keeps_a_byte_for_each_output():
    x, saved = image((2, 16, 8, 8)).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tw.ops.max_pool2d(x, 2)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.uint8, (2, 16, 4, 4))]


def test_input_may_change_before_the_backward():
    x = image((1, 16, 4, 4), special=False).requires_grad_()
    copy = x.clone()
    output = tw.ops.max_pool2d(copy, 2)
    with torch.no_grad():
        copy.zero_()
    output.sum().backward()
    expected = x.detach().clone().requires_grad_()
    F.max_pool2d(expected, 2).sum().backward()
    assert torch.equal(x.grad, expected.grad)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_opcheck(layout):
    x = image((2, 16, 9, 11), special=False).contiguous(memory_format=layout)
    args = [3, 3], [2, 2], [1, 1]
    opcheck(_ops.max_pool2d.default, (x, *args))
    opcheck(_ops.max_pool2d.default, (x.clone().requires_grad_(), *args, [1, 1], True))
    if layout == torch.channels_last:
        opcheck(_ops.max_pool2d_with_positions.default, (x.clone().requires_grad_(), *args))
        y, positions = _ops.max_pool2d_with_positions(x, *args)
        backward = (y.requires_grad_(), positions, 9, 11, *args, [1, 1])
        opcheck(_ops.max_pool2d_backward.default, backward)


def test_fake_outputs_lie_as_real_ones():
    for shape in [(1, 16, 8, 8), (2, 16, 2, 2), (2, 1, 8, 8), (1, 8, 1, 9)]:
        x = image(shape, special=False)
        # Strides of sizes of 1 say nothing.
        x = x.as_strided(
            shape, [1 if n == 1 else s for n, s in zip(shape, x.stride(), strict=True)]
        )
        for leaf in (x, x.clone(memory_format=torch.preserve_format)):
            real = tw.ops.max_pool2d(leaf, 2, 2, 1)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = tw.ops.max_pool2d(mode.from_tensor(leaf), 2, 2, 1)
            assert fake.shape == real.shape
            assert fake.is_contiguous() == real.is_contiguous()


def test_second_derivative():
    x = torch.randn(2, 16, 7, 8).contiguous(memory_format=torch.channels_last)
    results = []
    for pool in (tw.ops.max_pool2d, F.max_pool2d):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(pool(leaf, 3, 2, 1).pow(3).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert torch.equal(*results)


def test_functional_transforms_are_torchs():
    x = image((3, 2, 16, 6, 6)[1:], special=False)
    batch = torch.stack([x, 2 * x, -x])
    ours, theirs = (lambda t, f=f: f(t, 2) for f in (tw.nn.functional.max_pool2d, F.max_pool2d))
    for f in (tw.ops.max_pool2d, tw.nn.functional.max_pool2d):
        pool = lambda t, f=f: f(t, 2)  # noqa: E731
        total, expected = (lambda t, g=g: g(t).square().sum() for g in (pool, theirs))
        assert torch.equal(grad(total)(x), grad(expected)(x))
        assert all(map(torch.equal, jvp(pool, (x,), (x,)), jvp(theirs, (x,), (x,))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the operator itself has no batching rule
            assert torch.equal(vmap(pool)(batch), vmap(theirs)(batch))
    assert torch.equal(
        vmap(grad(lambda t: ours(t).sum()))(batch), vmap(grad(lambda t: theirs(t).sum()))(batch)
    )


def test_autocast_leaves_the_dtype():
    x = image((1, 16, 4, 4), special=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert tw.ops.max_pool2d(x, 2).dtype == torch.float32
        assert tw.ops.max_pool2d(x.bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0,), "kernel_size: expected integers of at least 1, got 0"),
        ((2, 0), "stride: expected integers of at least 1, got 0"),
        ((2, 1, -1), "padding: expected integers of at least 0, got -1"),
        ((3, 1, 2), "padding: expected at most 1, half of the window, got 2"),
        ((2, 1, 0, 0), "dilation: expected integers of at least 1, got 0"),
        ((9, 1), "input: expected a padded height of at least the window's 9, got 4"),
        (([2, 2, 2],), "kernel_size"),
    ],
)
def test_errors(args, message):
    with pytest.raises(RuntimeError, match=message):
        tw.ops.max_pool2d(image((1, 16, 4, 4)), *args)


def test_positions_only_from_kernels_of_ours():
    x = image((1, 16, 4, 4), special=False)
    for bad in (x.contiguous(), x.double(), x[0]):
        with pytest.raises(RuntimeError, match=r"with_positions: input: expected float32"):
            tw.ops.max_pool2d_with_positions(bad, 2)
    y, positions = tw.ops.max_pool2d_with_positions(x, 2)
    window = [2, 2], [2, 2], [0, 0], [1, 1]
    with pytest.raises(RuntimeError, match="positions: expected uint8"):
        _ops.max_pool2d_backward(y, positions.float(), 4, 4, *window)
    with pytest.raises(RuntimeError, match="grad_output: expected float32"):
        _ops.max_pool2d_backward(y.double(), positions, 4, 4, *window)

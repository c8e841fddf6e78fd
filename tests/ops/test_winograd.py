"""Errors of Winograd's convolution, which computes with sums and differences of pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchweld  # noqa: F401  (registers the operators)

ops = torch.ops.torchweld
GEOMETRY = [1, 1], [1, 1], [1, 1], 1
UNBOUNDED = -math.inf, math.inf


def checkerboard(x):
    rows, columns = torch.arange(x.shape[2])[:, None], torch.arange(x.shape[3])
    return x.abs() * (1 - 2 * ((rows + columns) % 2))


def one_huge(x):
    x = x.clone()
    x[0, 0, x.shape[2] // 2, x.shape[3] // 2] = 1e4
    return x


INPUTS = {
    "random": lambda x: x,
    "positive": torch.relu,
    "large mean": lambda x: x + 100,
    "huge mean": lambda x: x + 1e4,
    "checkerboard": checkerboard,
    "one huge": one_huge,
    "wide range": lambda x: x * torch.exp(3 * torch.randn_like(x)),
    "denormal": lambda x: x * 1e-39,
    "large": lambda x: x * 1e30,
}


def problem(shape, out_channels, kind="random"):
    torch.manual_seed(hash((shape, out_channels)) % 1000)
    x = INPUTS[kind](torch.randn(shape)).to(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, shape[1], 3, 3) * math.sqrt(2 / (9 * shape[1]))
    return x, weight


def winograd(x, weight):
    return ops._conv_forward(x, weight, None, None, *GEOMETRY, *UNBOUNDED, "winograd", True)


def gradients(grad, x, weight):
    return ops._conv_backward(grad, x, weight, *GEOMETRY, "winograd", True, True)


def stock_gradients(grad, x, weight):
    geometry = GEOMETRY[:3]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, False, [0, 0], 1, [True, True, False]
    )[:2]


@pytest.mark.parametrize("shape", [(2, 37, 9, 9), (2, 200, 7, 7)], ids=str)
def test_a_packed_weight_gives_the_same_bits(shape):
    x, weight = problem(shape, 180)
    arguments = x, weight, None, None, *GEOMETRY, *UNBOUNDED, "winograd"
    packed, _ = ops._conv_forward(*arguments, False)
    plain, _ = ops._conv_forward(*arguments, True)
    assert torch.equal(packed, plain)


def rms(x):
    return x.double().square().mean().sqrt()


# The layers of ResNet-18, with fewer images or pixels where that leaves the sums as long.
@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [((4, 64, 56, 56), 64), ((4, 128, 28, 28), 128), ((4, 256, 14, 14), 64), ((4, 512, 7, 7), 64)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["random", "positive", "large mean", "checkerboard"])
def test_layer_errs_at_most_half_as_much_again_as_torch(shape, out_channels, kind):
    x, weight = problem(shape, out_channels, kind)

    def normalize(y):
        return F.relu(F.batch_norm(y, None, None, training=True))

    exact = normalize(torch.conv2d(x.double(), weight.double(), padding=1))
    stock = normalize(torch.conv2d(x, weight, padding=1))
    output, (count, mean, m2) = winograd(x, weight)
    invstd = 1 / (m2 / count + 1e-5).sqrt()
    actual = ops.batch_norm_relu(output, mean, invstd, None, None, None, "relu", 0.0)
    assert rms(actual - exact) <= 1.5 * rms(stock - exact)
    assert (actual - exact).abs().max() <= 2 * (stock - exact).abs().max()


SHAPES = [
    ((1, 1, 1, 1), 1),
    ((3, 37, 5, 5), 53),
    ((2, 16, 2, 3), 70),
    ((1, 20, 4, 1), 16),
    ((2, 130, 9, 14), 33),
    ((2, 300, 6, 7), 100),
]


@pytest.mark.parametrize(("shape", "out_channels"), SHAPES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_any_input_errs_by_little_of_the_sum_of_magnitudes(kind, shape, out_channels):
    x, weight = problem(shape, out_channels, kind)
    exact = torch.conv2d(x.double(), weight.double(), padding=1)
    output, _ = winograd(x, weight)
    # What a direct convolution's rounding is bounded by, taken over the image: a tile mixes pixels.
    magnitude = torch.conv2d(x.double().abs(), weight.double().abs(), padding=1).amax((1, 2, 3))
    underflow = 9 * shape[1] * 2.0**-149
    bound = 48 * 2.0**-24 * magnitude + underflow
    assert ((output - exact).abs().amax((1, 2, 3)) <= bound).all()

    grad = torch.randn(exact.shape)
    expected = stock_gradients(grad.double(), x.double(), weight.double())
    actual = gradients(grad, x, weight)
    magnitudes = stock_gradients(grad.double().abs(), x.double().abs(), weight.double().abs())
    for a, e, m in zip(actual, expected, magnitudes, strict=True):
        assert (a - e).abs().max() <= 48 * 2.0**-24 * m.max() + underflow


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [(0, 0), (5, 6), (12, 13)])
def test_what_is_not_finite_stays_in_its_tiles(bad, at):
    """All outputs that read the pixel, and at most the tiles of 4x4 that these are in."""
    x, weight = problem((2, 37, 13, 14), 53)
    finite, _ = winograd(x, weight)
    x[0, 3, at[0], at[1]] = bad
    reads = torch.conv2d(x.isfinite().logical_not().float(), torch.ones_like(weight), padding=1) > 0
    tiles = F.max_pool2d(F.pad(reads.float(), (0, 2, 0, 3)), 4)
    allowed = F.interpolate(tiles, scale_factor=4)[..., :13, :14] > 0
    output, _ = winograd(x, weight)
    assert not output[reads].isfinite().any()
    assert torch.equal(output[~allowed], finite[~allowed])


# Of few channels, summed by tasks with sums of their own, in one group of images and in several;
# of many, by point.
MANY_PIXELS = [((16, 20, 30, 31), 37), ((4, 64, 56, 56), 64), ((8, 128, 14, 14), 96)]


@pytest.mark.parametrize(("shape", "out_channels"), MANY_PIXELS, ids=str)
def test_weight_gradient_of_many_pixels(shape, out_channels):
    x, weight = problem(shape, out_channels)
    grad = torch.randn(shape[0], out_channels, *shape[2:])
    exact = stock_gradients(grad.double(), x.double(), weight.double())
    stock = stock_gradients(grad, x, weight)
    actual = gradients(grad, x, weight)
    for a, s, e in zip(actual, stock, exact, strict=True):
        assert rms(a - e) <= 5 * rms(s - e)
        assert rms(a - e) <= 2e-6 * rms(e)


@pytest.mark.parametrize(("shape", "out_channels"), MANY_PIXELS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, out_channels):
    x, weight = problem(shape, out_channels)
    grad = torch.randn(shape[0], out_channels, *shape[2:])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append((*winograd(x, weight), *gradients(grad, x, weight)))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)

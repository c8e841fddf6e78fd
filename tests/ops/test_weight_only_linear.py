import functools
import hashlib

import pytest
import torch
import torchweld as tw
from torch.nn import functional as F

from tests.ops import int8_layer
from tests.ops.instruction_sets import each_capability, run_digest
from tests.ops.int8_layer import ACTIVATIONS, DTYPES, backward, randn
from tests.reference import quantized_linear as reference
from tests.tolerances import ROUNDOFF

op = torch.ops.torchweld.weight_only_linear

# Every tail of rows, panels and quads, and all sizes of 0 and 1.
SHAPES = [
    (0, 5, 7),
    (3, 0, 7),
    (3, 5, 0),
    (40, 5, 0),
    (1, 1, 1),
    (1, 10, 128),
    (2, 16, 4),
    (3, 33, 6),
    (5, 17, 3),
    (8, 49, 65),
    (33, 131, 257),
    (70, 65, 1030),
    (300, 97, 7),
]


class Weight(int8_layer.Weight):
    """The same layer, its activations left as they are."""

    def __call__(self, x, activation="identity", residual=None):
        return op(x, self.packed, self.scale, self.bias, residual, self.k, activation)

    def backward(self, grad):
        return backward(grad, self.packed, self.scale, self.k)

    def dequantize(self):
        return self.q.double() * self.scale.double()[:, None]


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_stock(dtype, shape):
    m, n, k = shape
    layer, x = Weight(n, k, bias=False), randn(m, k, dtype=dtype)
    actual, weight = layer(x), layer.dequantize()
    assert actual.dtype == dtype
    assert actual.shape == (m, n)
    if actual.numel() == 0:
        return
    expected = x.double() @ weight.T
    stock = F.linear(x.float(), weight.float()).double()
    # One chain of sums, where stock's are in blocks; and a rounding of the scale.
    most = 4 * (stock - expected).abs().max() + ROUNDOFF[torch.float32] * expected.abs()
    error = (actual.double() - expected).abs()
    assert (error <= most + ROUNDOFF[dtype] * expected.abs()).all()


@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [9, 40])
def test_output(m, dtype, activation, has_residual):
    layer, x = Weight(49, 65, bias=has_residual), randn(m, 65, dtype=dtype)
    residual = randn(m, 49, dtype=dtype, seed=7) if has_residual else None
    actual = layer(x, activation, residual)
    z = x.double() @ layer.dequantize().T
    if has_residual:
        z = z + layer.bias.double()
    expected = reference.ACTIVATIONS[activation](z)
    if has_residual:
        expected = expected + residual.double()
    tolerance = 2 * ROUNDOFF[dtype] * expected.abs() + 1e-6 * z.abs().max()
    assert ((actual.double() - expected).abs() <= tolerance).all()


def test_sqnr_on_gaussian_data():
    x, weight = randn(64, 2048), randn(256, 2048, seed=2)
    q, scale = tw.ops.quantize_weight(weight)
    packed, _ = tw.ops.pack_weight(q)
    actual = op(x, packed, scale, None, None, 2048)
    assert reference.sqnr(actual, x.double() @ weight.double().T) >= 41


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [5, 40])
def test_a_bad_value_spoils_its_row_only(bad, m):
    layer, x = Weight(20, 70), randn(m, 70)
    layer.q[:, 33] = 1
    layer.packed, _ = tw.ops.pack_weight(layer.q)
    expected = layer(x)
    x[2, 33] = bad
    actual = layer(x)
    assert (actual[2].isnan() if bad != bad else actual[2] == bad).all()
    keep = [i for i in range(m) if i != 2]
    assert torch.equal(actual[keep], expected[keep])


def test_nothing_beyond_a_row_is_read():
    # K = 5 leaves three bytes of the last quad to nobody; what lies there in memory is no number.
    layer, wide = Weight(20, 5), torch.full((40, 9), float("nan"))
    x = randn(40, 5)
    wide[:, :5] = x
    for m in (3, 40):
        assert torch.equal(layer(wide[:m, :5]), layer(x[:m]))


# --- the same bits -------------------------------------------------------------------------------


def test_does_not_depend_on_the_batch():
    layer, x = Weight(131, 1200), randn(70, 1200)
    whole = layer(x, "gelu")
    for rows in ([5], [3, 5], list(range(1, 12)), list(range(17)), list(range(69, -1, -1))):
        assert torch.equal(layer(x[rows], "gelu"), whole[rows])


def test_rows_beyond_what_is_interleaved_at_a_time():
    layer, x, residual = Weight(17, 40000), randn(300, 40000), randn(300, 17, seed=7)
    whole = layer(x, "gelu", residual)
    for rows in (slice(0, 100), slice(100, 200), slice(200, 300)):
        assert torch.equal(layer(x[rows], "gelu", residual[rows]), whole[rows])


def test_does_not_depend_on_the_number_of_threads():
    layer, x, g = Weight(300, 700), randn(600, 700), randn(600, 300, seed=3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((layer(x, "silu"), layer(x[:3]), layer.backward(g)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@functools.cache
def _digest() -> str:
    """A hash over the bits of outputs and gradients of many cases."""
    digest = hashlib.sha256()
    for m, n, k in SHAPES:
        layer = Weight(n, k)
        for dtype in DTYPES:
            x, residual = randn(m, k, dtype=dtype), randn(m, n, dtype=dtype, seed=7)
            for activation in ACTIVATIONS:
                digest.update(layer(x, activation, residual).float().numpy().tobytes())
            grad = layer.backward(randn(m, n, dtype=dtype, seed=3))
            digest.update(grad.float().numpy().tobytes())
    return digest.hexdigest()


@each_capability
def test_same_bits_on_every_instruction_set(capability):
    result = run_digest(__name__, capability)
    assert result.stdout.strip() == _digest(), result.stderr


# --- shapes, strides, errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[0, 0, 0],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[0, :, 0],
        lambda x: x[..., :1].expand(-1, -1, -1, 37),
        lambda x: x[:0],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape_and_strides(dtype, view):
    layer, x = Weight(21, 37), view(randn(2, 3, 4, 37, dtype=dtype))
    residual = randn(21, *x.shape[:-1]).movedim(0, -1)
    actual = layer(x, "relu", residual)
    assert actual.shape == (*x.shape[:-1], 21)
    assert actual.is_contiguous()
    expected = layer(x.contiguous().view(-1, 37), "relu", residual.reshape(-1, 21))
    assert torch.equal(actual.view(-1, 21), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 6)}, r"input: expected \[..., 5\], got \[2, 6\]"),
        ({"input": torch.zeros(2, 5).double()}, "input: expected float32.*got float64"),
        ({"packed_weight": torch.zeros(1, 2, 16, 4)}, "packed_weight: expected.*got float32"),
        ({"weight_scale": torch.zeros(3).double()}, "weight_scale: expected.*got float64"),
        ({"bias": torch.zeros(4)}, r"bias: expected floating point \[3\], got float32 \[4\]"),
        ({"residual": torch.zeros(3)}, r"residual: expected floating point \[2, 3\].*\[3\]"),
        ({"in_features": -1}, "in_features: expected 0"),
        ({"activation": "tanh"}, 'activation: expected identity, relu.*got "tanh"'),
    ],
)
def test_errors_name_the_argument(change, message):
    layer = Weight(3, 5)
    arguments = {
        "input": torch.zeros(2, 5),
        "packed_weight": layer.packed,
        "weight_scale": layer.scale,
        "bias": layer.bias,
        "residual": None,
        "in_features": 5,
        "activation": "identity",
        **change,
    }
    with pytest.raises(RuntimeError, match=f"(?s)torchweld::weight_only_linear: {message}"):
        tw.ops.weight_only_linear(**arguments)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (70, 600, 200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype, shape):
    m, n, k = shape
    layer, g = Weight(n, k), randn(m, n, dtype=dtype)
    actual, weight = layer.backward(g), layer.dequantize()
    assert actual.dtype == dtype
    assert actual.shape == (m, k)
    if actual.numel() == 0:
        return
    expected = g.double() @ weight
    stock_error = ((g.float() @ weight.float()).double() - expected).abs()
    most = 4 * stock_error.max() + 1e-7 * (g.double().abs() @ weight.abs()).max()
    error = (actual.double() - expected).abs()
    assert (error <= most + ROUNDOFF[dtype] * expected.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "no residual"])
def test_gradients_are_those_of_the_float_layer(activation, has_residual):
    layer = Weight(21, 37)
    residual = randn(6, 21, seed=5).requires_grad_() if has_residual else None
    x, layer.bias = randn(6, 37).requires_grad_(), layer.bias.requires_grad_()
    inputs = [t for t in (x, layer.bias, residual) if t is not None]
    g = randn(6, 21, seed=3)
    actual = torch.autograd.grad(layer(x, activation, residual), inputs, g)
    y = F.linear(x.double(), layer.dequantize(), layer.bias.double())
    y = reference.ACTIVATIONS[activation](y) + (residual if has_residual else 0)
    expected = torch.autograd.grad(y, inputs, g.double())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "silu"])
def test_second_gradients_are_those_of_the_float_layer(activation):
    layer = Weight(21, 37)
    x, g = randn(6, 37).requires_grad_(), randn(6, 21, seed=3).requires_grad_()

    def second(y):
        (first,) = torch.autograd.grad(y, x, g.to(y.dtype), create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, g), allow_unused=True)

    z = F.linear(x.double(), layer.dequantize(), layer.bias.double())
    expected = second(reference.ACTIVATIONS[activation](z))
    for a, b in zip(second(layer(x, activation)), expected, strict=True):
        if a is None or b is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_no_gradient_for_the_scales():
    layer = Weight(3, 5)
    layer.scale.requires_grad_()
    with pytest.raises(RuntimeError, match="weight_scale: has no gradient"):
        layer(randn(2, 5))


# --- torch's machinery ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_opcheck(activation):
    layer, x = Weight(10, 37), randn(3, 37).requires_grad_()
    residual = randn(3, 10).requires_grad_()
    weights = (layer.packed, layer.scale)
    torch.library.opcheck(op, (x, *weights, layer.bias, residual, 37, activation))
    torch.library.opcheck(op, (x.detach().bfloat16(), *weights, None, None, 37, activation))


def test_autocast():
    layer, x = Weight(10, 37), randn(3, 37).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x, "relu")
    assert torch.equal(actual, layer(x.bfloat16(), "relu"))
    (grad,) = torch.autograd.grad(actual.float().sum(), x)
    assert grad.dtype == torch.float32


def test_default_activation():
    layer, x = Weight(10, 37), randn(3, 37).requires_grad_()
    actual = op(x, layer.packed, layer.scale, layer.bias, None, 37)
    assert torch.equal(actual, layer(x))
    assert torch.equal(torch.autograd.grad(actual.sum(), x)[0], layer.backward(torch.ones(3, 10)))

import functools
import hashlib

import pytest
import torch
import torchweld as tw

from tests.ops.instruction_sets import each_capability, run_digest
from tests.ops.int4_layer import (
    ACTIVATIONS,
    DTYPES,
    SHAPES,
    Weight,
    accumulators,
    backward,
    op,
    randn,
)
from tests.reference import quantized_linear as int8_reference
from tests.reference import quantized_linear_int4 as reference
from tests.tolerances import ROUNDOFF

# --- the integers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_scales_are_exact(shape, dtype):
    m, n, k, group_size = shape
    layer, x = Weight(n, k, group_size), randn(m, k, dtype=dtype)
    sums, scale = layer.accumulators(x)
    values = reference.integers(layer.q, layer.zero, k, group_size)
    expected_sums, expected_scale = reference.accumulators(x, values, group_size)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), expected_sums)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_sums_are_exact_in_the_largest_group(value):
    k = 131072
    q = torch.full((3, k // 2), 0xFF, dtype=torch.uint8)
    q[2] = 0
    zero = torch.tensor([[0], [15], [15]], dtype=torch.uint8)
    packed = tw.ops.pack_weight_int4(q, torch.ones(3, 1).bfloat16(), zero, k, k)
    sums, _ = accumulators(torch.full((1, k), value), *packed, k, 3)
    most = int(value) * 15 * 127 * k
    assert sums.tolist() == [[[most, 0, -most]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bad_value_spoils_its_row_only(bad, activation):
    layer, x = Weight(20, 70, 32), randn(5, 70)
    expected = layer(x, activation)
    x[2, 33] = bad
    actual = layer(x, activation)
    assert actual[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(actual[keep], expected[keep])


def test_a_row_of_zeros_gives_the_bias():
    layer = Weight(20, 70, 32)
    assert torch.equal(layer(torch.zeros(2, 70)), layer.bias.expand(2, -1))


# --- the floats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 49, 65, 24), (3, 20, 300, 32)], ids=str)
def test_output(shape, dtype, activation, has_residual):
    m, n, k, group_size = shape
    layer, x = Weight(n, k, group_size, bias=has_residual), randn(m, k, dtype=dtype)
    residual = randn(m, n, dtype=dtype, seed=7) if has_residual else None
    actual = layer(x, activation, residual)
    expected = reference.quantized_linear_int4(
        x, layer.canonical, group_size, layer.bias, residual, activation
    )
    assert actual.dtype == dtype
    # One rounding to the dtype, and a float32 one for every group before it.
    tolerance = 2 * ROUNDOFF[dtype] * expected.abs() + 1e-6 * expected.abs().max()
    assert ((actual.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize(("group_size", "least"), [(128, 18.5), (64, 19.2), (32, 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sqnr_on_gaussian_data(dtype, group_size, least):
    x, weight = randn(64, 2048, dtype=dtype), randn(256, 2048, seed=2)
    quantized = tw.ops.quantize_weight_int4(weight, group_size)
    packed = tw.ops.pack_weight_int4(*quantized, 2048, group_size)
    actual = op(x, *packed, None, None, 2048, 256)
    assert int8_reference.sqnr(actual, x.double() @ weight.double().T) >= least


def test_does_not_depend_on_the_batch():
    layer, x = Weight(131, 257, 32), randn(70, 257)
    x[3] *= 1e4
    whole = layer(x, "gelu")
    for rows in ([5], [3, 5], list(range(1, 12)), list(range(69, -1, -1))):
        assert torch.equal(layer(x[rows], "gelu"), whole[rows])


def test_does_not_depend_on_the_number_of_threads():
    # Large enough for several tasks in both directions, and for more than one round of scratch.
    layer, x = Weight(300, 700, 64), randn(600, 700)
    wide, tall = Weight(3, 9000, 128), randn(1100, 9000)
    g = randn(600, 300, seed=3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (layer(x, "silu"), wide(tall), wide.accumulators(tall)[0], layer.backward(g))
            )
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@functools.cache
def _digest() -> str:
    """A hash over the bits of outputs, sums and gradients of many cases."""
    digest = hashlib.sha256()
    for m, n, k, group_size in SHAPES:
        layer = Weight(n, k, group_size)
        for dtype in DTYPES:
            x = randn(m, k, dtype=dtype)
            residual = randn(m, n, dtype=dtype, seed=7)
            digest.update(layer.accumulators(x)[0].numpy().tobytes())
            for activation in ACTIVATIONS:
                digest.update(layer(x, activation, residual).float().numpy().tobytes())
            grad = layer.backward(randn(m, n, dtype=dtype, seed=3))
            digest.update(grad.float().numpy().tobytes())
    return digest.hexdigest()


@each_capability
def test_same_bits_on_every_instruction_set(capability):
    result = run_digest(__name__, capability)
    assert result.stdout.strip() == _digest(), result.stderr


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
def test_any_shape_and_strides(view):
    layer, x = Weight(21, 37, 32), view(randn(2, 3, 4, 37))
    residual = randn(21, *x.shape[:-1]).movedim(0, -1)
    actual = layer(x, "relu", residual)
    assert actual.shape == (*x.shape[:-1], 21)
    assert actual.is_contiguous()
    expected = layer(x.contiguous().view(-1, 37), "relu", residual.reshape(-1, 21))
    assert torch.equal(actual.view(-1, 21), expected)
    sums, scale = layer.accumulators(x)
    assert sums.shape == (*x.shape[:-1], 2, 21)
    assert scale.shape == x.shape[:-1]


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (70, 600, 200, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype, shape):
    m, n, k, group_size = shape
    layer, g = Weight(n, k, group_size), randn(m, n, dtype=dtype)
    actual, weight = layer.backward(g), layer.dequantize()
    expected = g.double() @ weight
    stock = (g.float() @ weight.float()).double()
    scale = (g.double().abs() @ weight.abs()).max() if expected.numel() else 0
    assert actual.dtype == dtype
    assert actual.shape == (m, k)
    error, stock_error = (actual.double() - expected).abs(), (stock - expected).abs()
    most = stock_error.max() * 4 + 1e-7 * scale if expected.numel() else 0
    assert (error <= most + ROUNDOFF[dtype] * expected.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "no residual"])
def test_gradients_are_those_of_the_dequantized_layer(activation, has_residual):
    layer = Weight(21, 37, 16)
    x, layer.bias = randn(6, 37).requires_grad_(), layer.bias.requires_grad_()
    residual = randn(6, 21, seed=5).bfloat16().requires_grad_() if has_residual else None
    inputs = [t for t in (x, layer.bias, residual) if t is not None]
    g = randn(6, 21, seed=3)
    actual = torch.autograd.grad(layer(x, activation, residual), inputs, g)

    z = layer(x).detach().requires_grad_()
    (dz,) = torch.autograd.grad(int8_reference.ACTIVATIONS[activation](z), z, g)
    torch.testing.assert_close(actual[0], (dz.double() @ layer.dequantize()).float())
    torch.testing.assert_close(actual[1], dz.sum(0))
    if has_residual:
        assert torch.equal(actual[2], g.bfloat16())


def test_second_gradient():
    layer = Weight(21, 37, 16)
    x, g = randn(6, 37).requires_grad_(), randn(6, 21, seed=3).requires_grad_()
    weight = layer.dequantize().float()
    (first,) = torch.autograd.grad(layer(x), x, g, create_graph=True)
    (actual,) = torch.autograd.grad(first.square().sum(), g)
    (expected,) = torch.autograd.grad((g @ weight).square().sum(), g)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_no_gradient_for_the_scales():
    layer = Weight(3, 9, 8)
    layer.packed[1].requires_grad_()
    with pytest.raises(RuntimeError, match="weight_scale: has no gradient"):
        layer(randn(2, 9))


# --- torch's machinery ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_opcheck(activation):
    layer, x = Weight(10, 37, 16), randn(3, 37).requires_grad_()
    residual = randn(3, 10).requires_grad_()
    torch.library.opcheck(op, (x, *layer.packed, layer.bias, residual, 37, 10, activation))
    torch.library.opcheck(op, (x.detach().half(), *layer.packed, None, None, 37, 10, activation))


def test_opcheck_of_the_others():
    layer = Weight(10, 37, 16)
    torch.library.opcheck(accumulators, (randn(2, 3, 37), *layer.packed, 37, 10))
    torch.library.opcheck(backward, (randn(3, 10).requires_grad_(), *layer.packed, 37, 10))


def test_autocast():
    layer, x = Weight(10, 37, 16), randn(3, 37).requires_grad_()
    g = randn(3, 10)
    expected = layer.backward(g)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x, "relu")
        assert torch.equal(layer.backward(g), expected)
    assert torch.equal(actual, layer(x.bfloat16(), "relu"))
    (grad,) = torch.autograd.grad(actual.float().sum(), x)
    assert grad.dtype == torch.float32

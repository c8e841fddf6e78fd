"""The arithmetic of the quantized linear layer: exact integers, then a few roundings."""

import functools
import hashlib

import pytest
import torch
import torchweld as tw
from torch.nn import functional as F

from tests.ops.instruction_sets import each_capability, run_digest
from tests.ops.int8_layer import (
    ACTIVATIONS,
    DTYPES,
    SHAPES,
    Weight,
    accumulators,
    backward,
    op,
    randn,
)
from tests.reference import quantized_linear as reference
from tests.tolerances import ROUNDOFF

# --- the integers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_scales_are_exact(shape, dtype):
    m, n, k = shape
    layer, x = Weight(n, k), randn(m, k, dtype=dtype)
    sums, scale = layer.accumulators(x)
    expected_sums, expected_scale = reference.accumulators(x, layer.q)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), expected_sums)
    assert torch.equal(scale, expected_scale)


def test_rounds_half_to_even():
    # The largest value is 127, so the scale is 1.
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0]])
    eye = torch.eye(8, dtype=torch.int8)
    packed, weight_sum = tw.ops.pack_weight(eye)
    sums, scale = accumulators(x, packed, torch.ones(8), weight_sum, 8)
    assert scale.tolist() == [1.0]
    assert sums.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127]]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 1e-38, 1e-30, 1e30, 3.4e38])
def test_rows_of_every_magnitude(value):
    layer = Weight(20, 19)
    x = torch.full((2, 19), value)
    x[0, ::2] *= -1
    sums, scale = layer.accumulators(x)
    expected_sums, expected_scale = reference.accumulators(x, layer.q)
    assert torch.equal(sums.long(), expected_sums)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bad_value_spoils_its_row_only(bad, activation):
    layer, x = Weight(20, 70), randn(5, 70)
    expected = layer(x, activation)
    x[2, 33] = bad
    actual = layer(x, activation)
    assert actual[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(actual[keep], expected[keep])


def test_a_row_of_zeros_gives_the_bias():
    layer = Weight(20, 70)
    assert torch.equal(layer(torch.zeros(2, 70)), layer.bias.expand(2, -1))


# --- the floats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_stocks(dtype, activation, bias):
    layer, x = Weight(131, 257, bias), randn(33, 257, dtype=dtype)
    expected = reference.quantized_linear(x, layer.q, layer.scale, layer.bias, activation)
    q, scale = reference.quantize_rows(x)
    stock = reference.ACTIVATIONS[activation](
        F.linear(
            (q * scale[:, None]).to(dtype),
            reference.dequantize(layer.q, layer.scale, dtype),
            None if layer.bias is None else layer.bias.to(dtype),
        )
    )
    actual = layer(x, activation)
    assert actual.dtype == dtype
    error = (actual.double() - expected).abs()
    assert error.max() <= (stock.double() - expected).abs().max()
    # Element by element: one rounding to the dtype, and a few float32 ones before it.
    tolerance = 2 * ROUNDOFF[dtype] * expected.abs() + 4e-7 * expected.abs().max()
    assert (error <= tolerance).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_over_its_whole_range(activation):
    # With K = 0 the output is the activation of the bias.
    z = torch.cat(
        [torch.linspace(-30, 30, 20001), torch.tensor([-3e38, -1e4, -0.0, 1e-40, 1e4, 3e38])]
    )
    empty = torch.zeros(z.numel(), 0, dtype=torch.int8)
    packed, weight_sum = tw.ops.pack_weight(empty)
    scale = torch.ones(z.numel())
    actual = op(torch.zeros(1, 0), packed, scale, weight_sum, z, None, 0, activation)[0]
    expected = reference.ACTIVATIONS[activation](z.double())
    stock = (reference.ACTIVATIONS[activation](z).double() - expected).abs()
    error = (actual.double() - expected).abs()
    assert error.max() <= stock.max() * 1.5
    assert (error <= 4e-7 * (1 + expected.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sqnr_on_gaussian_data(dtype):
    x, weight = randn(64, 2048, dtype=dtype), randn(256, 2048, seed=2)
    q, scale = tw.ops.quantize_weight(weight)
    packed, weight_sum = tw.ops.pack_weight(q)
    actual = op(x, packed, scale, weight_sum, None, None, 2048)
    assert reference.sqnr(actual, x.double() @ weight.double().T) >= 37.5


def test_does_not_depend_on_the_batch():
    layer, x = Weight(131, 257), randn(70, 257)
    x[3] *= 1e4
    whole = layer(x, "gelu")
    for rows in ([5], [3, 5], list(range(1, 12)), list(range(69, -1, -1))):
        assert torch.equal(layer(x[rows], "gelu"), whole[rows])


def test_does_not_depend_on_the_number_of_threads():
    # Large enough for several tasks in both directions, and for more than one round of scratch.
    layer, x = Weight(300, 700), randn(600, 700)
    wide, tall = Weight(3, 9000), randn(1100, 9000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((layer(x, "silu"), wide(tall), wide.accumulators(tall)[0]))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert torch.equal(results[0][2].long(), reference.accumulators(tall, wide.q)[0])


@functools.cache
def _digest() -> str:
    """A hash over the bits of outputs, sums, scales and gradients of many cases."""
    digest = hashlib.sha256()
    for m, n, k in [*SHAPES, (1, 2, 133144), (2, 3, 140001)]:
        layer = Weight(n, k)
        for dtype in DTYPES:
            x = randn(m, k, dtype=dtype)
            if k <= 133144:
                sums, scale = layer.accumulators(x)
                digest.update(sums.numpy().tobytes() + scale.numpy().tobytes())
            for activation in ACTIVATIONS:
                digest.update(layer(x, activation).float().numpy().tobytes())
            digest.update(layer(x, group_size=8).float().numpy().tobytes())
            residual = randn(m, n, dtype=dtype, seed=2)
            digest.update(layer(x, "silu", residual).float().numpy().tobytes())
            if k < 1000:
                weight = backward(torch.eye(n, dtype=dtype), layer.packed, layer.scale, k)
                digest.update(weight.float().numpy().tobytes())
    return digest.hexdigest()


@each_capability
def test_same_bits_on_every_instruction_set(capability):
    result = run_digest(__name__, capability)
    assert result.stdout.strip() == _digest(), result.stderr

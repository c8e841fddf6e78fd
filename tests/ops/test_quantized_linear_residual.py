"""The residual of the quantized linear layer: y = activation(x W^T + bias) + residual."""

import pytest
import torch

from tests.ops.int8_layer import ACTIVATIONS, DTYPES, Weight, op, randn
from tests.reference import quantized_linear as reference
from tests.tolerances import ROUNDOFF


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_is_added_last(dtype, activation):
    layer, x, residual = Weight(37, 70), randn(9, 70, dtype=dtype), randn(9, 37, dtype=dtype)
    actual = layer(x, activation, residual)
    assert actual.dtype == dtype
    z = reference.quantized_linear(x, layer.q, layer.scale, layer.bias, activation)
    expected = z + residual.double()
    tolerance = 2 * ROUNDOFF[dtype] * expected.abs() + 4e-7 * z.abs().max()
    assert ((actual.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("residual_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_of_any_dtype_is_rounded_once(dtype, residual_dtype):
    layer, x = Weight(37, 70), randn(9, 70, dtype=dtype)
    residual = randn(9, 37, dtype=residual_dtype)
    z = op(x.float(), layer.packed, layer.scale, layer.sum, layer.bias, None, 70)
    assert torch.equal(layer(x, residual=residual), (z + residual.float()).to(dtype))


def test_residual_of_any_strides():
    layer, x, residual = Weight(37, 70), randn(2, 3, 70), randn(3, 2, 37)
    strided = residual.transpose(0, 1)
    expected = layer(x) + strided
    assert torch.equal(layer(x, residual=strided), expected)
    wide = randn(2, 3, 74)
    assert torch.equal(layer(x, residual=wide[..., ::2]), layer(x) + wide[..., ::2])
    one = randn(37)
    assert torch.equal(layer(x, residual=one.expand(2, 3, 37)), layer(x) + one)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
def test_gradient(activation, residual_dtype):
    layer = Weight(21, 37)
    layer.bias = layer.bias.requires_grad_()
    x = randn(6, 37).requires_grad_()
    residual, g = randn(6, 21, dtype=residual_dtype).requires_grad_(), randn(6, 21, seed=3)
    inputs = x, layer.bias
    actual = torch.autograd.grad(layer(x, activation, residual), (*inputs, residual), g)
    expected = torch.autograd.grad(layer(x, activation), inputs, g)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], g.to(residual_dtype))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_second_gradient(activation):
    layer = Weight(21, 37)
    x, g = randn(6, 37).requires_grad_(), randn(6, 21, seed=3).requires_grad_()
    residual = randn(6, 21, seed=4).requires_grad_()

    def second(y):
        (first,) = torch.autograd.grad(y, x, g, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, g), materialize_grads=True)

    for a, b in zip(
        second(layer(x, activation, residual)), second(layer(x, activation) + residual), strict=True
    ):
        assert torch.equal(a, b)


def test_autocast_leaves_the_residual_its_dtype():
    layer, x, residual = Weight(10, 37), randn(3, 37), randn(3, 10)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x, "relu", residual)
    assert torch.equal(actual, layer(x.bfloat16(), "relu", residual))

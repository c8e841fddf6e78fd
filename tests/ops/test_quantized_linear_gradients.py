"""Gradients of the quantized linear layer, and torch's machinery around it."""

import pytest
import torch

from tests.ops.int8_layer import ACTIVATIONS, DTYPES, Weight, accumulators, backward, op, randn
from tests.reference import quantized_linear as reference
from tests.tolerances import ROUNDOFF

# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_that_of_the_dequantized_layer(dtype, activation):
    layer = Weight(21, 37)
    x = randn(6, 37, dtype=dtype).requires_grad_()
    bias = layer.bias.clone().requires_grad_()
    layer.bias = bias
    g = randn(6, 21, dtype=dtype, seed=3)
    grad, grad_bias = torch.autograd.grad(layer(x, activation), (x, bias), g)

    z = layer(x).detach().requires_grad_()
    (dz,) = torch.autograd.grad(reference.ACTIVATIONS[activation](z), z, g)
    # Float32 sums, rounded once; stock's would round the weight too.
    expected = dz.double() @ reference.dequantize(layer.q, layer.scale, torch.float32).double()
    tolerance = ROUNDOFF[dtype] * expected.abs() + 1e-6 * expected.abs().max()
    assert ((grad.double() - expected).abs() <= tolerance).all()
    assert grad.dtype == dtype
    assert torch.equal(grad_bias, dz.sum(0).float())


def test_gradient_of_nd_input():
    layer = Weight(21, 37)
    x = randn(2, 3, 37).transpose(0, 1).requires_grad_()
    g = randn(3, 2, 21, seed=3)
    (grad,) = torch.autograd.grad(layer(x), x, g)
    expected = g @ reference.dequantize(layer.q, layer.scale, torch.float32)
    torch.testing.assert_close(grad, expected)
    vector, layer.bias = randn(37).requires_grad_(), layer.bias.requires_grad_()
    grad, grad_bias = torch.autograd.grad(layer(vector), (vector, layer.bias), g[0, 0])
    assert grad.shape == (37,)
    assert torch.equal(grad_bias, g[0, 0])
    torch.testing.assert_close(grad, expected[0, 0])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_gradient_of_empty_sizes(m, n, k):
    layer, x = Weight(n, k), randn(m, k).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x, "gelu").sum(), x)
    assert torch.equal(grad, torch.zeros(m, k))


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "silu"])
def test_second_gradient_is_that_of_the_dequantized_layer(activation):
    layer = Weight(21, 37)
    layer.bias = layer.bias.clone().requires_grad_()
    x, g = randn(6, 37).requires_grad_(), randn(6, 21, seed=3).requires_grad_()

    def second(y):
        inputs = (x, layer.bias, g)
        (first,) = torch.autograd.grad(y, x, g, create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs, allow_unused=True)

    actual = second(layer(x, activation))
    expected = second(
        reference.straight_through(x, layer.q, layer.scale, layer.bias, activation, layer(x))
    )
    for a, b in zip(actual, expected, strict=True):
        if b is None or a is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_gradient_with_default_and_keyword_arguments():
    layer, x = Weight(21, 37), randn(6, 37).requires_grad_()
    args = (x, layer.packed, layer.scale, layer.sum, layer.bias, None, 37)
    for actual, activation in [(op(*args), "identity"), (op(*args, activation="silu"), "silu")]:
        expected = torch.autograd.grad(layer(x, activation).sum(), x)
        assert torch.equal(torch.autograd.grad(actual.sum(), x)[0], expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(*args, activation="silu"), layer(x, "silu"))


def test_no_gradient_for_the_scales():
    layer, x = Weight(3, 5), randn(2, 5)
    layer.scale.requires_grad_()
    with pytest.raises(RuntimeError, match="weight_scale: has no gradient"):
        layer(x)


# --- torch's machinery ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_opcheck(activation):
    layer = Weight(10, 37)
    weights = (layer.packed, layer.scale)
    x = randn(3, 37).requires_grad_()
    torch.library.opcheck(op, (x, *weights, layer.sum, layer.bias, None, 37, activation))
    torch.library.opcheck(
        op, (x.detach().bfloat16(), *weights, layer.sum, None, None, 37, activation)
    )


def test_opcheck_of_the_others():
    layer = Weight(10, 37)
    weights = (layer.packed, layer.scale)
    torch.library.opcheck(accumulators, (randn(2, 3, 37), *weights, layer.sum, 37))
    torch.library.opcheck(backward, (randn(3, 10).requires_grad_(), *weights, 37))


def test_fake_tensor_refuses_a_wrong_size():
    layer = Weight(10, 37)
    with pytest.raises(RuntimeError, match=r"input: expected \[..., 37\]"):
        op(
            *(t.to("meta") for t in (randn(3, 36), layer.packed, layer.scale, layer.sum)),
            None,
            None,
            37,
        )


def test_autocast_casts_the_input_alone():
    layer, x = Weight(10, 37), randn(3, 37).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x, "relu")
    assert torch.equal(actual, layer(x.bfloat16(), "relu"))
    (grad,) = torch.autograd.grad(actual.float().sum(), x)
    assert grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32


def test_autocast_leaves_the_gradient_its_dtype():
    layer, g = Weight(10, 37), randn(3, 10)
    expected = backward(g, layer.packed, layer.scale, 37)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backward(g, layer.packed, layer.scale, 37), expected)

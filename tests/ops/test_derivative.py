"""What holds of every operator with a derivative of ours."""

import pytest
import torch
import torchweld as tw
from torch.autograd import forward_ad

from tests.ops.int8_layer import Weight, randn

LAYER = Weight(21, 37)
INT4 = tw.ops.pack_weight_int4(*tw.ops.quantize_weight_int4(randn(21, 37), 16), 37, 16)
KERNEL = randn(4, 3, 3, 3)


def conv_bn_relu(x):
    return tw.ops.conv_bn_relu(x, KERNEL)[0]


def weight_only(x):
    return tw.ops.weight_only_linear(x, LAYER.packed, LAYER.scale, LAYER.bias, None, 37, "gelu")


def int4(x):
    return tw.ops.quantized_linear_int4(x, *INT4, LAYER.bias, None, 37, 21, "gelu")


def int8(x):
    return LAYER(x, "gelu")


CASES = [(conv_bn_relu, (2, 3, 5, 5)), *((op, (5, 37)) for op in (int8, weight_only, int4))]
every_op = pytest.mark.parametrize(("op", "shape"), CASES, ids=[op.__name__ for op, _ in CASES])


@every_op
@pytest.mark.parametrize("with_gradient", [False, True])
def test_forward_mode_is_refused(op, shape, with_gradient):
    x = randn(*shape).requires_grad_(with_gradient)
    with pytest.raises(NotImplementedError, match="forward mode AD"), forward_ad.dual_level():
        op(forward_ad.make_dual(x, torch.ones(shape)))
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(op, (x,), (torch.ones(shape),))


@every_op
def test_forward_mode_of_something_else(op, shape):
    x = randn(*shape)
    with forward_ad.dual_level():
        factor = forward_ad.make_dual(torch.tensor(2.0), torch.tensor(3.0))
        product = forward_ad.unpack_dual(op(x) * factor)
    assert torch.equal(product.tangent, op(x) * 3)


@every_op
def test_gradient_of_a_function(op, shape):
    x = randn(*shape).requires_grad_()
    (expected,) = torch.autograd.grad(op(x).square().sum(), x)
    assert torch.equal(torch.func.grad(lambda x: op(x).square().sum())(x.detach()), expected)
    # Nothing of the input is wanted here, though it has a gradient outside.
    assert torch.func.grad(lambda a: (op(x) * a).sum())(torch.tensor(1.0)) == op(x).sum()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls it row by row
@pytest.mark.parametrize("op", [int8, weight_only, int4])
def test_gradient_of_a_gradient_of_a_function(op):
    def first(x):
        return torch.func.grad(lambda x: op(x).square().sum())(x)

    x = randn(5, 37).requires_grad_()
    (once,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), x)
    assert torch.equal(torch.func.grad(lambda x: first(x).square().sum())(x.detach()), twice)
    assert torch.equal(torch.autograd.grad(first(x).square().sum(), x)[0], twice)
    per_row = torch.func.vmap(first)(x.detach())
    torch.testing.assert_close(per_row, once.detach())


@pytest.mark.parametrize("op", [int8, weight_only, int4])
def test_no_gradient_within_a_function(op):
    def half(x):
        with torch.no_grad():
            y = op(x)
        return (y * x.sum()).sum()

    x = randn(5, 37)
    expected = op(x).sum().expand(5, 37)
    torch.testing.assert_close(torch.func.grad(half)(x), expected)

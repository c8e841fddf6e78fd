import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchweld as tw
from torch.nn import functional as F
from torchweld import _C

from tests.reference import quantized_linear as reference
from tests.tolerances import ROUNDOFF

op = torch.ops.torchweld.quantized_linear
accumulators = torch.ops.torchweld.quantized_linear_accumulators
backward = torch.ops.torchweld.quantized_linear_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = list(reference.ACTIVATIONS)
# Every tail of rows, panels and quads, and all sizes of 0 and 1.
SHAPES = [
    (0, 5, 7),
    (3, 0, 7),
    (3, 5, 0),
    (1, 1, 1),
    (1, 10, 128),
    (2, 16, 4),
    (5, 17, 3),
    (8, 48, 64),
    (9, 49, 65),
    (33, 131, 257),
    (300, 97, 7),
]


class Weight:
    """A random layer; int8 values reach both ends."""

    def __init__(self, n, k, bias=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.k = k
        self.q = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
        self.scale = torch.rand(n, generator=generator) * 0.01 + 1e-4
        self.bias = torch.randn(n, generator=generator) if bias else None
        self.packed, self.sum = tw.ops.pack_weight(self.q)

    def __call__(self, x, activation="identity", residual=None, group_size=0):
        weight = self.packed, self.scale, self.sum, self.bias
        return op(x, *weight, residual, self.k, activation, group_size)

    def accumulators(self, x):
        return accumulators(x, self.packed, self.scale, self.sum, self.k)


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    z = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([-1e4, -0.0, 1e-40, 1e4, 3e38])])
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
            if k < 1000:
                weight = backward(torch.eye(n, dtype=dtype), layer.packed, layer.scale, k)
                digest.update(weight.float().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("capability", _C.available_cpu_capabilities().split(","))
def test_same_bits_on_every_instruction_set(capability):
    code = "from tests.ops.test_quantized_linear import _digest; print(_digest())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TORCHWELD_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == _digest(), result.stderr


# --- shapes and strides --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[0, 0, 0],
        lambda x: x[0, 0],
        lambda x: x,
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(2, 0, 1, 3),
        lambda x: x[:, ::2],
        lambda x: x[0, :, 0],
        lambda x: x[..., :1].expand(-1, -1, -1, 37),
        lambda x: x[:1, :1, :1].expand(2, 3, 4, 37),
        lambda x: x[0, 0].t().contiguous().t(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:0],
    ],
)
def test_any_shape_and_strides(view):
    layer, x = Weight(21, 37), view(randn(2, 3, 4, 37))
    actual = layer(x)
    assert actual.shape == (*x.shape[:-1], 21)
    assert actual.is_contiguous()
    expected = layer(x.contiguous().view(-1, 37)) if x.numel() else actual.view(-1, 21)
    assert torch.equal(actual.view(-1, 21), expected)


def test_bias_of_any_dtype_and_stride():
    layer, x = Weight(21, 37), randn(3, 37)
    strided = torch.stack([layer.bias, layer.bias], 1)[:, 0]
    args = (x, layer.packed, layer.scale, layer.sum)
    assert torch.equal(op(*args, strided, None, 37), layer(x))
    half = layer.bias.half()
    assert torch.equal(op(*args, half, None, 37), op(*args, half.float(), None, 37))


def test_pack_and_unpack():
    for n, k in [(0, 3), (3, 0), (1, 1), (16, 4), (17, 5), (50, 33)]:
        layer = Weight(n, k)
        assert torch.equal(tw.ops.unpack_weight(layer.packed, n, k), layer.q)
        assert torch.equal(layer.sum[:n].long(), layer.q.long().sum(1))
        assert not layer.sum[n:].any()
        if n and k:
            assert (
                layer.packed[(n - 1) // 16, (k - 1) // 4, (n - 1) % 16, (k - 1) % 4]
                == (layer.q[n - 1, k - 1])
            )


def test_quantized_weight_is_the_nearest():
    weight = randn(20, 33)
    weight[3] = 0
    q, scale = tw.ops.quantize_weight(weight)
    assert q.abs().amax(1).tolist() == [0 if i == 3 else 127 for i in range(20)]
    error = (q.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] * 0.50001).all()


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 6)}, r"input: expected \[..., 5\], got \[2, 6\]"),
        ({"input": torch.zeros(())}, r"input: expected \[..., 5\], got \[\]"),
        ({"input": torch.zeros(2, 5).double()}, "input: expected float32.*got float64"),
        ({"input": torch.zeros(2, 5).int()}, "input: expected float32.*got int32"),
        ({"packed_weight": torch.zeros(1, 2, 16, 4)}, "packed_weight: expected.*got float32"),
        (
            {"packed_weight": torch.zeros(1, 3, 16, 4, dtype=torch.int8)},
            r"packed_weight: expected contiguous int8 \[1, 2, 16, 4\]",
        ),
        ({"weight_scale": torch.zeros(3).double()}, "weight_scale: expected.*got float64"),
        ({"weight_scale": torch.zeros(3, 1)}, r"weight_scale: expected.*\[3, 1\]"),
        ({"weight_sum": torch.zeros(3, dtype=torch.int32)}, r"weight_sum: expected.*got.*\[3\]"),
        ({"bias": torch.zeros(4)}, r"bias: expected floating point \[3\], got float32 \[4\]"),
        ({"bias": torch.zeros(3, dtype=torch.int8)}, "bias: expected floating point.*int8"),
        (
            {"residual": torch.zeros(1, 3)},
            r"residual: expected floating point \[2, 3\], got.*\[1, 3",
        ),
        ({"residual": torch.zeros(2, 3).int()}, "residual: expected floating point.*got int32"),
        ({"in_features": 2**24 + 1}, "in_features: expected 0 to 16777216"),
        ({"in_features": -1}, "in_features: expected 0 to 16777216.*got -1"),
        ({"input_group_size": 6}, "input_group_size: expected 0 or a multiple of 4.*got 6"),
        ({"input_group_size": -4}, "input_group_size: expected 0 or a multiple of 4.*got -4"),
        ({"input_group_size": 65540}, "input_group_size: expected 0 or a.*got 65540"),
        ({"activation": "tanh"}, 'activation: expected identity, relu.*got "tanh"'),
    ],
)
def test_errors_name_the_argument(change, message):
    layer = Weight(3, 5)
    arguments = {
        "input": torch.zeros(2, 5),
        "packed_weight": layer.packed,
        "weight_scale": layer.scale,
        "weight_sum": layer.sum,
        "bias": layer.bias,
        "residual": None,
        "in_features": 5,
        "activation": "identity",
    }
    with pytest.raises(RuntimeError, match=f"(?s)torchweld::quantized_linear: {message}"):
        tw.ops.quantized_linear(**{**arguments, **change})


def test_errors_of_the_weight_functions():
    with pytest.raises(ValueError, match=r"within \[-127, 127\], got -128"):
        tw.ops.pack_weight(torch.full((2, 2), -128, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"expected int8.*got torch.float32 \[2, 2\]"):
        tw.ops.pack_weight(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="expected finite values"):
        tw.ops.quantize_weight(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="expected floating point"):
        tw.ops.quantize_weight(torch.zeros(3))


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


# torch 2.15's opcheck itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_opcheck(activation):
    layer = Weight(10, 37)
    weights = (layer.packed, layer.scale)
    x = randn(3, 37).requires_grad_()
    torch.library.opcheck(op, (x, *weights, layer.sum, layer.bias, None, 37, activation))
    torch.library.opcheck(
        op, (x.detach().bfloat16(), *weights, layer.sum, None, None, 37, activation)
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute")
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

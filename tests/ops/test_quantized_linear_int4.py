import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchweld as tw
from torchweld import _C

from tests.reference import quantized_linear as int8_reference
from tests.reference import quantized_linear_int4 as reference
from tests.tolerances import ROUNDOFF

op = torch.ops.torchweld.quantized_linear_int4
accumulators = torch.ops.torchweld.quantized_linear_int4_accumulators
backward = torch.ops.torchweld.quantized_linear_int4_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = list(int8_reference.ACTIVATIONS)
# M, N, K, group size: every tail of rows, panels, octets and groups, and all sizes of 0 and 1.
SHAPES = [
    (0, 5, 7, 8),
    (3, 0, 7, 8),
    (3, 5, 0, 32),
    (1, 1, 1, 8),
    (1, 10, 128, 128),
    (2, 16, 8, 8),
    (3, 33, 130, 64),
    (5, 17, 3, 32),
    (8, 48, 64, 64),
    (13, 49, 65, 24),
    (33, 131, 257, 128),
    (300, 97, 40, 40),
]


class Weight:
    """A random layer; values and zeros reach both ends."""

    def __init__(self, n, k, group_size, bias=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        groups = -(-k // group_size)
        self.n, self.k, self.group_size = n, k, group_size
        self.q = torch.randint(0, 256, (n, -(-k // 2)), generator=generator).to(torch.uint8)
        if k % 2:
            self.q[:, -1] &= 15
        self.scale = (torch.rand(n, groups, generator=generator) * 0.01 + 1e-4).bfloat16()
        self.zero = torch.randint(0, 16, (n, groups), generator=generator).to(torch.uint8)
        self.bias = torch.randn(n, generator=generator) if bias else None
        self.packed = tw.ops.pack_weight_int4(*self.canonical, k, group_size)

    @property
    def canonical(self):
        return self.q, self.scale, self.zero

    def __call__(self, x, activation="identity", residual=None):
        return op(x, *self.packed, self.bias, residual, self.k, self.n, activation)

    def accumulators(self, x):
        return accumulators(x, *self.packed, self.k, self.n)

    def backward(self, grad):
        return backward(grad, *self.packed, self.k, self.n)

    def dequantize(self):
        return reference.dequantize(*self.canonical, self.k, self.group_size)


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


@pytest.mark.parametrize("capability", _C.available_cpu_capabilities().split(","))
def test_same_bits_on_every_instruction_set(capability):
    code = "from tests.ops.test_quantized_linear_int4 import _digest; print(_digest())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TORCHWELD_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
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


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_and_unpack(shape):
    _, n, k, group_size = shape
    layer = Weight(n, k, group_size)
    unpacked = tw.ops.unpack_weight_int4(*layer.packed, k, n)
    assert all(torch.equal(a, b) for a, b in zip(unpacked, layer.canonical, strict=True))
    if n and k:
        packed, scale, zero = layer.packed
        i, j = n - 1, k - 1
        byte = int(packed[i // 16, j // 8, i % 16, j % 4])
        assert (byte >> 4 if j % 8 >= 4 else byte & 15) == reference.unpack(layer.q, k)[i, j]
        assert scale[i // 16, j // group_size, i % 16] == layer.scale[i, j // group_size]
        assert zero[i // 16, j // group_size, i % 16] == layer.zero[i, j // group_size]
        assert not scale.transpose(1, 2).reshape(-1, scale.shape[1])[n:].any()


@pytest.mark.parametrize("group_size", [8, 24, 32, 128])
def test_quantized_weight_is_the_nearest(group_size):
    weight = randn(20, 99)
    weight[3] = 0
    weight[4] += 5  # a group of one sign still holds 0
    weight[5] *= 1e-42
    weight[6] *= 1e37
    q, scale, zero = tw.ops.quantize_weight_int4(weight, group_size)
    assert scale.dtype == torch.bfloat16
    expected = reference.dequantize(q, scale, zero, 99, group_size)
    actual = tw.ops.dequantize_weight_int4(q, scale, zero, 99, group_size)
    assert torch.equal(actual.double(), expected)
    assert not actual[3].any()
    of_k = scale.double()[:, torch.arange(99) // group_size]
    # Half a step; more where a scale that was rounded down cuts the end of the range off.
    error = (expected - weight.double()).abs()
    assert (error <= of_k * (0.5 + 15 / 2**8)).all()
    u = reference.unpack(q, 99)
    inside = (u > 0) & (u < 15)
    assert (error <= of_k * 0.50001)[inside].all()


def test_rounds_half_to_even():
    # Range 15, so the scale is 1, and the zero 8.
    weight = torch.tensor([[7.0, -8.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    q, scale, zero = tw.ops.quantize_weight_int4(weight, 8)
    assert (scale.tolist(), zero.tolist()) == ([[1.0]], [[8]])
    assert reference.unpack(q, 8).tolist() == [[15, 0, 8, 10, 10, 8, 6, 6]]


def test_size_of_a_packed_weight():
    weight = torch.randn(256, 1024)
    for group_size in (32, 128):
        canonical = tw.ops.quantize_weight_int4(weight, group_size)
        packed = tw.ops.pack_weight_int4(*canonical, 1024, group_size)
        for tensors in (canonical, packed):
            assert sum(t.nbytes for t in tensors) < 0.15 * weight.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(3, 4)}, r"qweight: expected uint8 \[out_features, 5\], got"),
        ({"qweight": torch.zeros(3, 9, dtype=torch.uint8)}, r"qweight: expected uint8.*\[3, 9\]"),
        (
            {"qweight": torch.full((3, 5), 255, dtype=torch.uint8)},
            "qweight: expected 0 in the half",
        ),
        ({"weight_scale": torch.ones(3, 2)}, "weight_scale: expected torch.bfloat16.*float32"),
        ({"weight_scale": torch.ones(3, 1).bfloat16()}, r"weight_scale: expected.*\[3, 2\], got"),
        (
            {"weight_scale": torch.full((3, 2), float("nan")).bfloat16()},
            "weight_scale: expected finite",
        ),
        ({"weight_scale": -torch.ones(3, 2).bfloat16()}, "weight_scale: expected finite"),
        ({"weight_zero": torch.zeros(3, 2)}, "weight_zero: expected torch.uint8.*float32"),
        (
            {"weight_zero": torch.full((3, 2), 16, dtype=torch.uint8)},
            "weight_zero: expected values within 0 to 15, got 16",
        ),
        ({"group_size": 0}, "group_size: expected a multiple of 8 from 8 to 128.*got 0"),
        ({"group_size": -8}, "group_size: expected a multiple of 8"),
        ({"group_size": 12}, "group_size: expected a multiple of 8"),
        ({"group_size": 136}, "group_size: expected.*from 8 to 128 for 9 input features, got 136"),
    ],
)
def test_corrupted_weights_are_named(change, message):
    arguments = {
        "qweight": torch.zeros(3, 5, dtype=torch.uint8),
        "weight_scale": torch.ones(3, 2).bfloat16(),
        "weight_zero": torch.zeros(3, 2, dtype=torch.uint8),
        "in_features": 9,
        "group_size": 8,
        **change,
    }
    for name in ("pack_weight_int4", "dequantize_weight_int4"):
        with pytest.raises(ValueError, match=f"(?s){name}: {message}"):
            getattr(tw.ops, name)(**arguments)


def test_errors_of_quantize_weight():
    quantize = tw.ops.quantize_weight_int4
    with pytest.raises(ValueError, match="weight: expected finite values"):
        quantize(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="weight: expected floating point"):
        quantize(torch.zeros(3))
    for group_size in (0, -8, 20, 520, 1 << 20):
        with pytest.raises(ValueError, match=f"group_size: expected a multiple.*got {group_size}"):
            quantize(torch.zeros(2, 512), group_size)
    with pytest.raises(ValueError, match="from 8 to 131072 for 200000 input features"):
        quantize(torch.zeros(1, 200000), 140000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 8)}, r"input: expected \[..., 9\], got \[2, 8\]"),
        ({"input": torch.zeros(())}, r"input: expected \[..., 9\], got \[\]"),
        ({"input": torch.zeros(2, 9).double()}, "input: expected float32.*got float64"),
        ({"packed_weight": torch.zeros(1, 2, 16, 4)}, "packed_weight: expected.*got float32"),
        (
            {"packed_weight": torch.zeros(1, 3, 16, 4, dtype=torch.uint8)},
            r"packed_weight: expected contiguous uint8 \[1, 2 \* group_size / 8, 16, 4\] for 3 x 9",
        ),
        ({"packed_weight": torch.zeros(1, 6, 16, 4, dtype=torch.uint8)}, "packed_weight: expected"),
        ({"in_features": 17}, "packed_weight: expected"),
        ({"in_features": 8}, "packed_weight: expected"),
        ({"in_features": -1}, "in_features: expected 0 or more, got -1"),
        ({"out_features": 17}, "weight_scale: expected.*17 output features"),
        ({"out_features": -1}, "out_features: expected 0 or more, got -1"),
        ({"weight_scale": torch.zeros(1, 2, 16)}, "weight_scale: expected.*got float32"),
        (
            {"weight_zero": torch.zeros(1, 1, 16, dtype=torch.uint8)},
            r"weight_zero: expected contiguous uint8 \[1, 2, 16\], got uint8 \[1, 1, 16\]",
        ),
        ({"bias": torch.zeros(4)}, r"bias: expected floating point \[3\], got float32 \[4\]"),
        ({"residual": torch.zeros(2, 4)}, r"residual: expected.*got float32 \[2, 4\]"),
        ({"activation": "tanh"}, 'activation: expected identity, relu.*got "tanh"'),
    ],
)
def test_errors_name_the_argument(change, message):
    layer = Weight(3, 9, 8)
    names = ("packed_weight", "weight_scale", "weight_zero")
    arguments = {
        "input": torch.zeros(2, 9),
        **dict(zip(names, layer.packed, strict=True)),
        "bias": layer.bias,
        "residual": None,
        "in_features": 9,
        "out_features": 3,
        "activation": "identity",
        **change,
    }
    with pytest.raises(RuntimeError, match=f"(?s)torchweld::quantized_linear_int4: {message}"):
        tw.ops.quantized_linear_int4(**arguments)


def test_groups_beyond_what_integers_hold_are_refused():
    octets = 131072 // 8 + 1
    packed = torch.zeros(1, octets, 16, 4, dtype=torch.uint8)
    scale, zero = torch.zeros(1, 1, 16).bfloat16(), torch.zeros(1, 1, 16, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="packed_weight: expected groups of at most 131072"):
        op(torch.zeros(1, octets * 8), packed, scale, zero, None, None, octets * 8, 3)


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


# torch 2.15's opcheck itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_opcheck(activation):
    layer, x = Weight(10, 37, 16), randn(3, 37).requires_grad_()
    residual = randn(3, 10).requires_grad_()
    torch.library.opcheck(op, (x, *layer.packed, layer.bias, residual, 37, 10, activation))
    torch.library.opcheck(op, (x.detach().half(), *layer.packed, None, None, 37, 10, activation))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
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

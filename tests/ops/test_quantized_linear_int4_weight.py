"""Weights of the int4 linear layer: how they are made and packed, and what the layer refuses."""

import pytest
import torch
import torchweld as tw

from tests.ops.int4_layer import SHAPES, Weight, op, randn
from tests.reference import quantized_linear_int4 as reference


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
            {"weight_zero": torch.full((1, 2, 16), 16, dtype=torch.uint8)},
            "weight_zero: expected values within 0 to 15, got greater ones",
        ),
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


def test_groups_of_nothing_are_refused():
    packed = torch.zeros(1, 0, 16, 4, dtype=torch.uint8)
    scale, zero = torch.zeros(1, 2, 16).bfloat16(), torch.zeros(1, 2, 16, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="packed_weight: expected"):
        op(torch.zeros(1, 0), packed, scale, zero, None, None, 0, 3)


@pytest.mark.parametrize("rows", [1, 40])
def test_every_zero_is_looked_at(rows):
    n, k = 140, 40
    layer, x = Weight(n, k, 8), torch.zeros(rows, k)
    layer.packed[2].view(-1)[-1] = 16
    with pytest.raises(RuntimeError, match="quantized_linear_int4: weight_zero: expected values"):
        layer(x)
    with pytest.raises(RuntimeError, match="quantized_linear_int4_accumulators: weight_zero: "):
        layer.accumulators(x)
    with pytest.raises(RuntimeError, match="quantized_linear_int4_backward: weight_zero: "):
        layer.backward(torch.zeros(rows, n))

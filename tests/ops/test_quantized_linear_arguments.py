"""What the quantized linear layer takes: shapes, strides, packed weights; and what it refuses."""

import pytest
import torch
import torchweld as tw

from tests.ops.int8_layer import Weight, op, randn

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

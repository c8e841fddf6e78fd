"""What the report measures."""

import math

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.reference.quantized_linear import sqnr


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(256, 384), nn.Dropout(0.5), nn.BatchNorm1d(384), nn.Linear(384, 10))
    )


@pytest.mark.parametrize(
    ("config", "low", "high", "share"),
    [(tw.Int8(), 42, 50, 0.27), (tw.Int8WeightOnly(), 42, 50, 0.27), (tw.Int4(), 19, 25, 0.15)],
    ids=str,
)
def test_weights_and_bytes(config, low, high, share):
    stock = model()
    report = tw.report(tw.quantize(stock, config))
    row, skipped = report
    quantized = tw.quantize(stock, config)[0]
    assert row.weight_sqnr == pytest.approx(sqnr(quantized.weight(), stock[0].weight), abs=1e-3)
    assert low < row.weight_sqnr < high
    assert row.output_sqnr is None
    assert row.bytes_before == 4 * (256 * 384 + 384)
    assert row.bytes_after == sum(t.nbytes for t in quantized.state_dict().values())
    assert row.bytes_after <= share * row.bytes_before
    assert row.gain == row.bytes_before / row.bytes_after
    assert skipped.weight_sqnr is skipped.bytes_before is skipped.gain is None


def test_outputs_on_examples():
    stock = model()
    state = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    x = torch.randn(32, 256)
    quantized = tw.quantize(stock, example_inputs=x, keep_small=False)
    first, second = tw.report(quantized)
    assert first.output_sqnr == pytest.approx(sqnr(quantized[0](x), stock[0](x)), abs=1e-3)
    assert 35 < second.output_sqnr < 50
    # The model ran in evaluation mode, and is as it was.
    assert stock.training
    assert quantized.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in stock.state_dict().items())
    assert not any(module._forward_hooks for module in stock.modules())
    with pytest.raises(RuntimeError):
        tw.quantize(stock, example_inputs=torch.randn(3, 255))
    assert stock.training
    assert not any(module._forward_hooks for module in stock.modules())
    with pytest.raises(
        TypeError, match=r"quantize: example_inputs: expected a tensor .*, got dict"
    ):
        tw.quantize(stock, example_inputs={"input": x})


def test_outputs_of_attention_and_of_what_never_runs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
            self.unused = nn.Linear(128, 128)

        def forward(self, x, *, mask=None):
            return self.attention(x, x, value=x, attn_mask=mask)[0]

    quantized = tw.quantize(Net(), example_inputs=(torch.randn(2, 5, 128),))
    attention, unused = tw.report(quantized)
    assert 30 < attention.output_sqnr < 60
    assert unused.output_sqnr is None


def test_of_what_is_no_module():
    with pytest.raises(TypeError, match=r"report: model: expected an nn\.Module, got list"):
        tw.report([])


def test_printed():
    text = str(tw.report(tw.quantize(model(), example_inputs=torch.randn(8, 256))))
    header, _, converted, skipped = text.splitlines()
    assert header.split() == [
        *("module", "conversion", "converted", "weight", "dB", "output", "dB"),
        *("bytes", "gain", "detail"),
    ]
    assert converted.endswith("3.89  QuantizedLinear")
    assert skipped.endswith("too small to gain (384 x 10)")
    assert header.index("detail") == converted.index("QuantizedLinear") == skipped.index("too")
    # Where nothing is measured, there are no such columns.
    assert "gain" not in str(tw.report(tw.quantize(model(), exclude=""))).splitlines()[0]


def test_a_weight_that_is_exact():
    linear = nn.Linear(128, 128)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-127, 128, (128, 128)).float())
        linear.weight[:, 0] = 127
    (row,) = tw.report(tw.quantize(linear))
    assert math.isinf(row.weight_sqnr)


def test_rows_of_before():
    """Api of before these fields: four positional arguments."""
    row = tw.report(tw.quantize(model())).rows[0]
    assert type(row)("a", "quantized_linear", True, "b").gain is None

"""Models that train as they run once quantized."""

import copy

import pytest
import torch
import torchweld as tw
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
        self.body = nn.Linear(128, 256)
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(torch.relu(self.body(self.attention(x, x, x)[0])))


def make():
    torch.manual_seed(0)
    return Net()


CONFIGS = [tw.Int8(), tw.Int8WeightOnly(), tw.Int4(), tw.Int4(group_size=32)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_prepared_trained_and_deployed(config):
    stock = make()
    state = copy.deepcopy(stock.state_dict())
    x = torch.randn(4, 6, 128)
    model = tw.prepare_qat(stock, config)
    assert torch.equal(model(x), tw.quantize(stock, config)(x))
    assert type(model.body) is type(model.attention.k_proj) is tw.nn.QATLinear
    assert type(model.head) is nn.Linear
    assert [(row.name, row.conversion, row.converted) for row in tw.report(model)] == [
        ("attention", "qat_linear", True),
        ("body", "qat_linear", True),
        ("head", "qat_linear", False),
    ]
    optimizer = tw.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in stock.state_dict().items())

    expected = model.eval()(x)
    deployed = tw.quantize(model)  # to what it was trained for
    assert torch.equal(deployed(x), expected)
    assert type(deployed.body) is type(tw.quantize(stock, config).body)
    assert {row.conversion for row in tw.report(deployed)} == {"quantized_linear"}
    details = [row.detail for row in tw.report(deployed).converted]
    assert len(details) == 5
    assert all(detail.endswith(", as trained") for detail in details)
    assert type(model.attention.to_float()) is nn.MultiheadAttention


def test_encoder_in_evaluation():
    """The fast path of the stock layer would take the float weights."""
    layer = nn.TransformerEncoderLayer(128, 4, 128, batch_first=True)
    model = tw.prepare_qat(layer.eval())
    x = torch.randn(2, 5, 128)
    with torch.no_grad():
        assert torch.equal(model(x), tw.quantize(model)(x))
        assert not torch.allclose(model(x), layer(x), rtol=0, atol=1e-5)


def test_prepared_twice_and_refused():
    model = tw.prepare_qat(make())
    again = tw.prepare_qat(model)
    assert type(again.body) is tw.nn.QATLinear
    assert {row.detail for row in tw.report(again).skipped} >= {"trains for quantization already"}
    assert type(tw.prepare_qat(make(), exclude="body").body) is nn.Linear
    with pytest.raises(TypeError, match=r"prepare_qat: model: expected an nn\.Module, got str"):
        tw.prepare_qat("model")
    with pytest.raises(TypeError, match=r"prepare_qat: config: expected torchweld\.Int8"):
        tw.prepare_qat(make(), "int8")
    with pytest.raises(ValueError, match="prepare_qat: exclude: expected the name of a module"):
        tw.prepare_qat(make(), exclude="tail")

"""Layers of others: transformers' Conv1D, and what torch.ao's quantize_dynamic made."""

import copy
import functools
import sys
import types

import pytest
import torch
import torchweld as tw
from torch import nn
from torch.ao import quantization as ao

from tests.reference import quantized_linear as reference

quantize = functools.partial(tw.quantize, keep_small=False)


# --- Conv1D --------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As transformers has it: the weight is [in_features, out_features]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(
            *x.shape[:-1], self.nf
        )


@pytest.fixture
def conv1d(monkeypatch):
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", types.ModuleType("x"))
    torch.manual_seed(0)
    return Conv1D(48, 32)


@pytest.mark.parametrize("config", [tw.Int8(), tw.Int8WeightOnly(), tw.Int4(32)], ids=str)
def test_conv1d(conv1d, config):
    x = torch.randn(2, 5, 32)
    quantized = quantize(nn.Sequential(conv1d), config)
    assert quantized[0].in_features == 32
    assert quantized[0].bias.requires_grad
    assert reference.sqnr(quantized(x), conv1d(x)) > 18
    (row,) = tw.report(quantized)
    assert row.converted
    assert row.bytes_before == (32 * 48 + 48) * 4
    prepared = tw.prepare_qat(conv1d, config, keep_small=False)
    assert torch.equal(prepared(x), quantized(x))


def test_conv1d_shared_and_another_of_that_name(conv1d, monkeypatch):
    model = nn.ModuleList([conv1d, copy.deepcopy(conv1d)])
    model[1].weight = conv1d.weight
    assert [row.detail for row in tw.report(quantize(model))] == [
        "weight is shared with 1.weight",
        "weight is shared with 0.weight",
    ]
    monkeypatch.setattr(Conv1D, "__module__", "other.pytorch_utils")
    assert len(tw.report(quantize(conv1d))) == 0


# --- torch.ao ------------------------------------------------------------------------------------


pytestmark = pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, and says so


def dynamic(model, per_channel=False, dtype=torch.qint8):
    qconfig = ao.per_channel_dynamic_qconfig if per_channel else ao.default_dynamic_qconfig
    if dtype != torch.qint8:
        return ao.quantize_dynamic(model, {nn.Linear}, dtype=dtype)
    return ao.quantize_dynamic(model, {nn.Linear: qconfig})


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24, bias=False)).eval()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("config", [tw.Int8(), tw.Int8WeightOnly()], ids=str)
def test_takes_integers_and_scales_over(config, per_channel):
    stock = model()
    theirs = dynamic(stock, per_channel)
    ours = tw.quantize(theirs, config)
    for i in (0, 2):
        weight = theirs[i].weight()
        q = weight.int_repr()
        state = ours[i].state_dict()
        assert torch.equal(state["qweight"], q.clamp_min(-127))
        scale = weight.q_per_channel_scales() if per_channel else weight.q_scale()
        torch.testing.assert_close(
            state["weight_scale"], torch.as_tensor(scale).float().expand(len(q)), rtol=0, atol=0
        )
        assert ("bias" in state) == (i == 0)
        lowest = int((q == -128).sum())
        row = tw.report(ours).rows[i // 2]
        assert row.converted
        assert row.detail.startswith(type(ours[i]).__name__)
        assert ("became -127" in row.detail) == (lowest > 0)
        assert (row.weight_sqnr == float("inf")) == (lowest == 0)
        assert row.bytes_before <= q.numel() + 8 * len(q)
    x = torch.randn(16, 64)
    assert reference.sqnr(ours(x), theirs(x)) > 30
    assert reference.sqnr(ours(x), stock(x)) > reference.sqnr(theirs(x), stock(x)) - 1


def test_the_lowest_integer():
    theirs = dynamic(model())
    weight = torch.randint(-127, 128, (48, 64)) * 0.01
    weight[3, 5] = weight[7, 9] = -1.28
    theirs[0].set_weight_bias(torch.quantize_per_tensor(weight, 0.01, 0, torch.qint8), None)
    ours = quantize(theirs)
    detail = "QuantizedLinear, integers of torch.ao (2 of -128 became -127)"
    assert tw.report(ours).rows[0].detail == detail
    expected = weight.clamp_min(-1.27)
    torch.testing.assert_close(ours[0].weight(), expected, rtol=1e-5, atol=1e-6)


def test_import_with_relu_and_an_lstm():
    from torch.ao.nn.intrinsic.quantized.dynamic import LinearReLU

    fused = LinearReLU(64, 48)
    fused.set_weight_bias(dynamic(model())[0].weight(), torch.ones(48))
    x = torch.randn(5, 64)
    ours = quantize(fused)
    assert ours.activation == "relu"
    assert reference.sqnr(ours(x), fused(x)) > 30

    lstm = ao.quantize_dynamic(nn.Sequential(nn.LSTM(8, 8)), {nn.LSTM}, dtype=torch.qint8)
    (row,) = tw.report(quantize(lstm))
    assert row.detail == "LSTM is not converted"


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (lambda: quantize(dynamic(model()), tw.Int4(32)), "is int8 already"),
        (lambda: tw.prepare_qat(dynamic(model())), "is int8 already"),
        (lambda: quantize(dynamic(model(), dtype=torch.float16)), "holds a torch.float16 weight"),
    ],
)
def test_what_is_not_imported(convert, reason):
    converted = convert()
    assert [row.detail for row in tw.report(converted)] == [reason] * 2
    converted(torch.randn(3, 64))


def test_a_zero_point():
    theirs = dynamic(model())
    weight = torch.quantize_per_tensor(torch.rand(48, 64), 0.01, 5, torch.qint8)
    theirs[0].set_weight_bias(weight, None)
    assert tw.report(quantize(theirs)).rows[0].detail == "its weight has a zero point"

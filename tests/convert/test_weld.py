"""A welded model computes, learns and is addressed as the stock one."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.convert.models import (
    BasicBlock,
    Bottleneck,
    Branches,
    Digits,
    InvertedResidual,
    Plain,
    ResNet,
)
from tests.tolerances import ROUNDOFF

CASES = {
    Plain: ((3, 3, 8, 8), 7),
    ResNet: ((3, 3, 16, 16), 12),
    Digits: ((3, 1, 8, 8), 2),
    Branches: ((3, 3, 8, 8), 4),
}


def assert_near(ours, theirs, factor=2000):
    """A few rounding errors apart, measured against the size of the values."""
    scale = max(theirs.abs().max().item(), 1e-3)
    assert (ours - theirs).abs().max().item() <= factor * ROUNDOFF[theirs.dtype] * scale


def pair(kind):
    torch.manual_seed(0)
    stock = kind()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return stock, tw.weld(copy.deepcopy(stock))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, torch.contiguous_format) for kind in CASES]
    + [(kind, torch.channels_last) for kind in (Plain, ResNet)],  # Digits says x.view
)
def test_trains_as_stock(kind, layout):
    """Outputs, gradients, running statistics and parameters over several steps."""
    shape, count = CASES[kind]
    stock, welded = (model.double() for model in pair(kind))
    assert len(tw.report(welded).converted) == count, str(tw.report(welded))
    assert not tw.report(welded).skipped
    models = stock, welded
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
        inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in models]
        outputs = []
        for model, optimizer, leaf in zip(models, optimizers, inputs, strict=True):
            torch.manual_seed(step)
            output = model(leaf)
            output = torch.cat(output) if isinstance(output, tuple) else output
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
            outputs.append(output)
        assert_near(outputs[1], outputs[0], 1e5)
        assert outputs[0].stride() == outputs[1].stride()
        assert_near(inputs[1].grad, inputs[0].grad, 1e5)
        for (name, ours), theirs in zip(
            welded.state_dict().items(), stock.state_dict().values(), strict=True
        ):
            assert_near(ours.double(), theirs.double(), 1e5), name
    stock.eval()
    welded.eval()
    x = torch.randn(shape, dtype=torch.float64)
    assert_near(welded(x), stock(x), 1e5)


@pytest.mark.parametrize("kind", CASES)
def test_state_is_the_models_own(kind):
    torch.manual_seed(0)
    stock = kind()
    welded = tw.weld(stock)
    assert [name for name, _ in welded.named_modules()] == [n for n, _ in stock.named_modules()]
    for (name, ours), (their_name, theirs) in zip(
        [*welded.named_parameters(), *welded.named_buffers()],
        [*stock.named_parameters(), *stock.named_buffers()],
        strict=True,
    ):
        assert name == their_name
        assert ours is theirs
    for ours, theirs in zip(welded.modules(), stock.modules(), strict=True):
        assert ours is not theirs
        assert isinstance(ours, type(theirs))
        assert type(ours).__qualname__ == type(theirs).__qualname__
    other = kind()
    welded.load_state_dict(other.state_dict())
    other.load_state_dict(welded.state_dict())
    assert list(welded.state_dict()) == list(other.state_dict())
    assert all(type(m).__module__ != "torchweld.convert" for m in stock.modules())


def test_modes_and_attributes_pass_through():
    welded = tw.weld(ResNet())
    assert welded.layer1[0].conv1.weight is dict(welded.named_parameters())["layer1.0.conv1.weight"]
    assert welded.layer1[0].expansion == 1
    welded.eval()
    assert not any(module.training for module in welded.modules())
    welded.train()
    assert all(module.training for module in welded.modules())
    welded.layer1[0].bn1.eval()  # frozen while the rest trains
    before = welded.layer1[0].bn1.running_mean.clone()
    welded(torch.randn(2, 3, 16, 16))
    assert torch.equal(welded.layer1[0].bn1.running_mean, before)
    assert welded.layer1[0].bn2.num_batches_tracked == 1


def test_fused_ops_run():
    """What is reported as converted really runs fused, residual and activation included."""
    welded = tw.weld(BasicBlock(4, 8, 2))
    with torch.profiler.profile() as profile:
        welded(torch.randn(2, 4, 8, 8))
    names = [event.name for event in profile.events()]
    assert names.count("torchweld::conv_bn_relu") == 3
    assert not any("batch_norm" in name or "relu_" in name for name in names if "aten" in name)
    assert names.count("aten::add_") == 3  # num_batches_tracked


def test_details():
    details = {row.name: row.detail for row in tw.report(tw.weld(ResNet())).converted}
    assert details["conv1 + bn1"] == "conv-bn-leaky_relu"
    assert details["layer1.0.conv2 + layer1.0.bn2 + layer1.0.relu"] == "conv-bn-add-relu"
    assert details["layer1.1.downsample.0 + layer1.1.downsample.1"] == "conv-bn"
    assert details["layer2.0.conv3 + layer2.0.bn3"] == "conv-bn-add-relu"
    assert details["layer2.1.conv.2 + layer2.1.conv.3"] == "conv-bn-add"
    branches = [row.detail for row in tw.report(tw.weld(Branches()))]
    assert branches == ["conv-bn-add-relu", "conv-bn", "conv-bn", "conv-bn-add-relu"]
    text = str(tw.report(tw.weld(Plain())))
    assert "0.0 + 0.1 + 0.2" in text
    assert "conv-bn-relu6" in text


@pytest.mark.parametrize("kind", [Bottleneck, InvertedResidual])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_autocast(kind, residual_dtype):
    """Under autocast a float32 residual is promoted as torch promotes it."""
    stock, welded = pair(lambda: kind(8, 4) if kind is Bottleneck else kind(8))
    x = torch.randn(2, 8, 6, 6).to(residual_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = stock(x), welded(x)
    assert ours.dtype == theirs.dtype
    assert_near(ours.float(), theirs.float(), 5e5)


def test_broadcast_residual():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, shift):
            return torch.relu(self.bn(self.conv(x)) + shift)

    stock, welded = pair(Gate)
    x = torch.randn(2, 3, 8, 8)
    for shift in (torch.randn(4, 1, 1), torch.randn(2, 4, 6, 6), torch.tensor(1.0)):
        assert_near(welded(x, shift), stock(x, shift))


def test_meta_tensors():
    with torch.device("meta"):
        model = ResNet()
    x = torch.empty(2, 3, 16, 16, device="meta")
    for inference in (False, True):
        assert tw.weld(model, inference=inference)(x).shape == (2, 5)


def test_threads():
    """A model runs in one thread while another is welded in a second one."""
    welded, x = tw.weld(ResNet()).eval(), torch.randn(1, 3, 16, 16)
    expected = welded(x)

    def weld_models():
        for _ in range(5):
            tw.weld(ResNet())

    with ThreadPoolExecutor() as pool:
        done = pool.submit(weld_models)
        while not done.done():
            assert torch.equal(welded(x), expected)
        done.result()


def test_weld_again_and_back():
    stock = ResNet()
    welded = tw.weld(stock)
    again = tw.weld(welded)
    assert [row.name for row in tw.report(again)] == [row.name for row in tw.report(welded)]
    back = tw.unweld(again)
    assert all(type(a) is type(b) for a, b in zip(back.modules(), stock.modules(), strict=True))
    assert all(a is b for a, b in zip(back.parameters(), stock.parameters(), strict=True))
    assert len(tw.report(back)) == 0
    assert not any("_torchweld" in module.__dict__ for module in back.modules())


def test_example_inputs():
    tw.weld(ResNet(), example_inputs=torch.randn(2, 3, 16, 16))
    tw.weld(Digits(), example_inputs=(torch.randn(2, 1, 8, 8),), inference=True)


def test_example_inputs_tell(monkeypatch):
    from torchweld.convert import _fused

    right = _fused._conv_bn_relu
    monkeypatch.setattr(_fused, "_conv_bn_relu", lambda *args: right(*args) + 0.01)
    model = ResNet()
    with pytest.raises(RuntimeError, match="differs from the model's"):
        tw.weld(model, example_inputs=torch.randn(2, 3, 16, 16))
    assert type(model) is ResNet


def test_refused_arguments():
    with pytest.raises(TypeError, match=r"expected model to be an nn\.Module, got function"):
        tw.weld(lambda x: x)
    with pytest.raises(TypeError, match="list or tuple of positional arguments, got dict"):
        tw.weld(ResNet(), example_inputs={"x": torch.randn(1, 3, 16, 16)})
    with pytest.raises(ValueError, match="False, True or \"recompute\", got 'all'"):
        tw.weld(ResNet(), memory_saving="all")
    with pytest.raises(ValueError, match="memory_saving is for training"):
        tw.weld(ResNet(), memory_saving=True, inference=True)

"""FrozenBatchNorm2d, as detection models write it: recognized by what it computes."""

import copy

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.convert.models import BasicBlock
from tests.convert.test_guards import fused_calls


class FrozenBatchNorm2d(nn.Module):
    """The way torchvision writes it."""

    def __init__(self, channels, eps=1e-3):
        super().__init__()
        self.eps = eps
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))

    def forward(self, x):
        shape = 1, -1, 1, 1
        scale = self.weight.view(shape) * (self.running_var.view(shape) + self.eps).rsqrt()
        return x * scale + (self.bias.view(shape) - self.running_mean.view(shape) * scale)


def _named(forward, init=None):
    members = {"forward": forward} | ({"__init__": init} if init else {})
    return type("FrozenBatchNorm2d", (FrozenBatchNorm2d,), members)


def _of_detr(self, x):
    eps = 1e-5
    scale = self.weight * (self.running_var + eps).rsqrt()
    bias = self.bias - self.running_mean * scale
    return x * scale[:, None, None] + bias[:, None, None]


def _without_eps(self, channels):
    FrozenBatchNorm2d.__init__(self, channels)
    del self.eps


def _of_detectron(self, x):
    if x.requires_grad:
        return FrozenBatchNorm2d.forward(self, x)
    state = self.running_mean, self.running_var, self.weight, self.bias
    return nn.functional.batch_norm(x, *state, training=False, eps=self.eps)


def freeze(model, kind=FrozenBatchNorm2d):
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, kind(child.num_features))
    return model


@pytest.mark.parametrize(
    "kind",
    [FrozenBatchNorm2d, _named(_of_detr, _without_eps), _named(_of_detectron)],
    ids=["torchvision", "detr", "detectron2"],
)
@pytest.mark.parametrize("training", [True, False])
def test_block(kind, training):
    torch.manual_seed(0)
    stock = freeze(BasicBlock(4, 6, 2), kind).double().train(training)
    welded = tw.weld(copy.deepcopy(stock))
    details = [row.detail for row in tw.report(welded)]
    assert sorted(details) == ["conv-frozen_bn", "conv-frozen_bn-add-relu", "conv-frozen_bn-relu"]
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(leaf) for model, leaf in zip((stock, welded), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for ours, theirs in zip(welded.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert list(welded.state_dict()) == list(stock.state_dict())
    assert fused_calls(lambda: welded(x)) == 3

    snapshot = tw.weld(stock, inference=True)
    assert len(tw.report(snapshot).converted) == 3
    torch.testing.assert_close(snapshot(x), outputs[0].detach())


def test_dtypes_that_promote():
    """A product with a float32 buffer is float32, whatever the convolution gave."""
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.ReLU())
    welded, x = tw.weld(stock), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = welded(x), stock(x)
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(
        welded.half()(x.half()), stock.half()(x.half()), rtol=0.02, atol=0.02
    )


def _momentum(self, x):
    y = FrozenBatchNorm2d.forward(self, x)
    return y * 2 if self.training else y


def _per_pixel(self, x):
    return x * self.weight[:, None, None]


def _refuses(self, x):
    raise AssertionError


def _ignores_eps(self, x):
    return _of_detr(self, x)


def _trains(self, channels):
    FrozenBatchNorm2d.__init__(self, channels)
    self.gain = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    "kind",
    [*map(_named, (_momentum, _per_pixel, _refuses, _ignores_eps)),
     _named(FrozenBatchNorm2d.forward, _trains)],
)  # fmt: skip
def test_of_another_meaning(kind):
    """The name is not enough."""
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4), nn.ReLU())
    (row,) = tw.report(tw.weld(stock))
    assert not row.converted
    assert row.detail == "FrozenBatchNorm2d is not BatchNorm2d"


def test_meta_and_hooks():
    with torch.device("meta"):
        stock = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.ReLU())
    welded = tw.weld(stock)
    assert len(tw.report(welded).converted) == 1
    assert welded(torch.empty(2, 3, 4, 4, device="meta")).shape == (2, 4, 4, 4)

    welded = tw.weld(nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4)))
    seen = []
    welded[1].register_forward_hook(lambda *args: seen.append(args))
    assert fused_calls(lambda: welded(torch.randn(2, 3, 4, 4))) == 0
    assert len(seen) == 1

"""What a plan depends on is seen before every call, however often it was the same."""

import copy
import gc
import weakref

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.convert.models import BasicBlock
from tests.convert.test_weld import assert_near


class Twice(nn.Module):
    """Reads a number, a list and a class's constant."""

    scale = 2.0

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(0.2)
        self.shift, self.factors = 1.0, [1.0, 3.0]

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)) + self.block(x))
        return y * self.scale * self.factors[1] + self.shift


class Optional(nn.Module):
    """Asks for what is not there yet."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        if hasattr(self, "extra"):
            y = y + self.extra
        return y if getattr(self, "last", None) is None else self.last(y)


APPEARING = {
    "attribute": lambda m: setattr(m, "extra", 2.0),
    "buffer": lambda m: m.register_buffer("extra", torch.ones(1)),
    "parameter": lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(1))),
    "module": lambda m: setattr(m, "last", nn.Sigmoid()),
}


@pytest.mark.parametrize("what", APPEARING)
@pytest.mark.parametrize("inference", [False, True])
def test_what_appears_between_calls(what, inference):
    torch.manual_seed(0)
    stock = Optional().eval()
    welded = tw.weld(stock, inference=inference).eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        for _ in range(2):
            before = welded(x)
        for model in (stock, welded):
            APPEARING[what](model)
        assert not torch.equal(stock(x), before)
        for _ in range(2):
            assert_near(welded(x), stock(x))


@pytest.mark.parametrize("inference", [False, True])
def test_a_replica_has_modules_of_its_own(inference):
    torch.manual_seed(0)
    welded = tw.weld(Twice().eval(), inference=inference).eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        for _ in range(2):
            expected = welded(x)
        # As nn.DataParallel makes them: the same __dict__ but for modules, parameters, buffers.
        replica = welded._replicate_for_data_parallel()
        conv = replica._modules["conv"] = copy.deepcopy(welded.conv)
        conv.weight.zero_()
        other = copy.deepcopy(welded)
        other.conv.weight.zero_()
        assert not torch.allclose(replica(x), expected)
        assert torch.equal(replica(x), other(x))
        assert torch.equal(welded(x), expected)


def hook(module):
    module.register_forward_hook(lambda module, args, y: y + 1)


CHANGES = {
    "number": lambda m: setattr(m, "shift", 5.0),
    "list": lambda m: m.factors.__setitem__(1, 7.0),
    "constant of the class": lambda m: setattr(m, "scale", 4.0),
    "slope": lambda m: setattr(m.act, "negative_slope", 0.7),
    "activation": lambda m: setattr(m, "act", nn.Sigmoid()),
    "class of the activation": lambda m: setattr(m.act, "__class__", nn.ReLU),
    "convolution": lambda m: setattr(m, "conv", nn.Conv2d(3, 3, 1, bias=False)),
    "kind of convolution": lambda m: m.block.__setitem__(0, nn.Conv2d(3, 3, 1, groups=3)),
    "one more": lambda m: m.block.append(nn.ReLU()),
    "hook": lambda m: hook(m.conv),
    "hook inside": lambda m: hook(m.block[1]),
    "hook on a child": lambda m: hook(m.block),
    "forward": lambda m: setattr(m.bn, "forward", lambda x: x + 3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_change_between_calls(change, inference):
    torch.manual_seed(0)
    stock = Twice().eval()
    welded = tw.weld(copy.deepcopy(stock), inference=inference)
    if inference:  # the same tensors for what the changes put in
        welded = welded.eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        for _ in range(3):
            assert_near(welded(x), stock(x))
        before = stock(x)
        for model in (stock, welded):
            torch.manual_seed(1)
            CHANGES[change](model)
        if inference and change in ("convolution", "kind of convolution", "forward"):
            return  # what they replace is folded there
        assert not torch.equal(stock(x), before)
        for _ in range(3):
            assert_near(welded(x), stock(x))


def test_other_modes_and_forms():
    torch.manual_seed(0)
    stock = BasicBlock(4, 4)
    welded = tw.weld(copy.deepcopy(stock))
    x = torch.randn(2, 4, 6, 6)
    for training in (True, False, True, True, False, False):
        for model in (stock, welded):
            model.train(training)
        assert_near(welded(x), stock(x))


def test_copies_see_their_own_modules():
    torch.manual_seed(0)
    welded = tw.weld(Twice().eval())
    x = torch.randn(2, 3, 4, 4)
    expected = welded(x)
    other = copy.deepcopy(welded)
    with torch.no_grad():
        other.conv.weight.zero_()
        other.act.negative_slope = 1.0
    assert not torch.allclose(other(x), expected)
    assert torch.equal(welded(x), expected)


def test_a_model_goes_at_once():
    welded = tw.weld(Twice().eval())
    welded(torch.randn(2, 3, 4, 4))
    gone = weakref.ref(welded)
    gc.collect()  # what tracing it left
    gc.disable()
    try:
        del welded
        assert gone() is None
    finally:
        gc.enable()

"""A child that ends in conv-bn is joined with the addition or activation after its call."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn

from tests.convert.models import conv_bn
from tests.convert.test_guards import fused_calls
from tests.convert.test_weld import assert_near


class ConvBN(nn.Module):
    """A child with a forward of its own, which depends on an attribute."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = conv_bn(channels, channels)
        self.gain = None

    def forward(self, x):
        x = x if self.gain is None else x * self.gain
        return self.bn(self.conv(x))


class Regular(nn.Module):
    """Nested as in RegNet: f ends in c, which ends in conv-bn."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential()
        self.f.add_module("a", nn.Sequential(*conv_bn(4, 4), nn.ReLU(inplace=True)))
        self.f.add_module("c", nn.Sequential(*conv_bn(4, 4, 1)))
        self.last = ConvBN(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(x + self.f(x))
        return F.silu(self.last(x))


JOINED = ["conv-bn-relu", "conv-bn-add-relu", "conv-bn-silu"]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    stock = Regular().double()
    return stock, tw.weld(copy.deepcopy(stock))


def assert_follows(pair, calls=3):
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for training in (True, False):
        outputs = []
        for model in pair:
            leaf = x.clone().requires_grad_()
            output = model.train(training)(leaf)
            model.zero_grad()
            output.square().sum().backward()
            outputs.append([output, leaf.grad, *[p.grad for p in model.parameters()]])
        for ours, theirs in zip(*outputs, strict=True):
            assert_near(ours, theirs, 1e6)
        for ours, theirs in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
            assert_near(ours.double(), theirs.double(), 1e5)
    assert fused_calls(lambda: pair[1](x)) == calls


def test_joined(pair):
    rows = tw.report(pair[1])
    assert sorted(row.detail for row in rows) == sorted(JOINED)
    assert "f.c.0 + f.c.1 + act" in {row.name for row in rows}
    assert_follows(pair)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for name in ("f", "last"):  # whoever calls a child finds it whole, and welded
        child = getattr(pair[1], name)
        torch.testing.assert_close(child(x), getattr(pair[0], name)(x))
        assert fused_calls(lambda child=child: child(x)) == {"f": 2, "last": 1}[name]


def test_inference(pair):
    stock, _ = pair
    snapshot = tw.weld(stock.eval(), inference=True)
    assert sorted(row.detail for row in tw.report(snapshot)) == sorted(JOINED)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(snapshot(x), stock(x).detach())
    torch.testing.assert_close(snapshot.f(x), stock.f(x).detach())
    assert torch.equal(tw.weld(snapshot, inference=True)(x), snapshot(x))


@pytest.mark.parametrize("name", ["f", "f.c", "f.c.0", "last", "last.bn"])
def test_hooks_later(pair, name):
    seen = []
    handle = pair[1].get_submodule(name).register_forward_hook(lambda *args: seen.append(args))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(pair[1](x), pair[0](x))
    assert len(seen) == 1
    handle.remove()
    assert_follows(pair)


def _grow(model):
    model.f.c.append(nn.Tanh())


def _scale(model):
    model.last.gain = 2.0


def _replace(model):
    model.f.c[1] = nn.Identity()


def _replace_forward(model):
    model.f.forward = lambda x: x * 2


@pytest.mark.parametrize(
    ("change", "calls"), [(_grow, 3), (_scale, 3), (_replace, 2), (_replace_forward, 1)]
)
def test_changes_later(pair, change, calls):
    stock, welded = (model.eval() for model in pair)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    welded(x)
    for model in pair:
        change(model)
    torch.testing.assert_close(welded(x), stock(x))
    assert fused_calls(lambda: welded(x)) == calls


def test_called_twice_stays_closed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*conv_bn(4, 4))

        def forward(self, x):
            return F.relu(self.body(F.relu(self.body(x))))

    stock = Twice()
    welded = tw.weld(copy.deepcopy(stock))
    assert [row.detail for row in tw.report(welded)] == ["conv-bn"]
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(welded(x), stock(x))
    assert torch.equal(welded.body[1].num_batches_tracked, torch.tensor(2))


def test_file_and_compile(pair):
    _, welded = pair
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    welded.eval()
    expected = welded(x)
    assert torch.equal(copy.deepcopy(welded)(x), expected)
    compiled = torch.compile(copy.deepcopy(welded), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)

"""Linear and BatchNorm1d are the 1x1 convolution they are, on 2-D inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchweld.convert import _fused

from tests.convert.test_guards import fused_calls
from tests.convert.test_weld import assert_near


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn1 = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        self.second, self.bn2 = nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=None)

    def forward(self, x):
        return F.relu(x + self.bn2(self.second(F.silu(self.bn1(self.first(x))))))


def plain():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())


@pytest.fixture(params=[plain, Residual])
def pair(request):
    torch.manual_seed(0)
    stock = request.param()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return stock, tw.weld(copy.deepcopy(stock))


def test_trains_as_stock(pair):
    stock, welded = (model.double() for model in pair)
    rows = tw.report(welded).rows
    assert all(row.converted and row.detail.startswith("linear-bn") for row in rows)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (stock, welded)]
    for _ in range(3):
        x = torch.randn(7, 6, dtype=torch.float64)
        outputs = []
        for model, optimizer in zip((stock, welded), optimizers, strict=True):
            leaf = x.clone().requires_grad_()
            output = model(leaf)
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()
            outputs.append((output, leaf.grad))
        for ours, theirs in zip(outputs[1], outputs[0], strict=True):
            assert_near(ours, theirs, 1e5)
            assert ours.stride() == theirs.stride()
        for ours, theirs in zip(
            welded.state_dict().values(), stock.state_dict().values(), strict=True
        ):
            assert_near(ours.double(), theirs.double(), 1e5)
    assert fused_calls(lambda: copy.deepcopy(welded)(x)) == len(rows)
    stock.eval(), welded.eval()
    for rows_in in (0, 1, 4):
        torch.testing.assert_close(welded(x[:rows_in]), stock(x[:rows_in]))
    snapshot = tw.weld(stock, inference=True)
    assert len(tw.report(snapshot).converted) == len(rows)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in snapshot.modules())
    for again in (snapshot, copy.deepcopy(snapshot), tw.weld(snapshot, inference=True)):
        for rows_in in (0, 1, 7):
            torch.testing.assert_close(again(x[:rows_in]), stock(x[:rows_in]).detach())
        assert folded_calls(lambda again=again: again(x)) == len(rows)


def folded_calls(function):
    with torch.profiler.profile() as profile:
        function()
    return sum(event.name == "torchweld::conv_relu" for event in profile.events())


def test_quantized_afterwards():
    stock = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()).eval()
    x = torch.randn(8, 64)
    snapshot = tw.weld(stock, inference=True)
    assert folded_calls(lambda: snapshot(x)) == 1
    quantized = tw.quantize(snapshot, keep_small=False)
    assert type(quantized[0]) is tw.nn.QuantizedLinear
    assert folded_calls(lambda: quantized(x)) == 0
    torch.testing.assert_close(quantized(x), stock(x).detach(), rtol=0.1, atol=0.1)


def test_a_linear_layer_of_the_users_own():
    """One that stands before an Identity is not a folded one: it trains."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.BatchNorm1d(5))
    welded = tw.weld(model)
    assert "Identity between the convolution" in tw.report(welded).skipped[0].detail
    welded(torch.randn(4, 6)).sum().backward()


def test_other_shapes_are_stocks():
    stock = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
    welded = tw.weld(copy.deepcopy(stock))
    x = torch.randn(3, 5, 6)  # BatchNorm1d takes the middle for channels
    assert torch.equal(welded(x), stock(x))
    assert torch.equal(welded[1].running_mean, stock[1].running_mean)
    for model in (stock, welded):
        with pytest.raises(ValueError, match=r"got input size torch.Size\(\[1, 5\]\)"):
            model(torch.randn(1, 6))
        with pytest.raises(ValueError, match="expected 2D or 3D input"):
            model(torch.randn(6))
    assert welded(torch.randn(0, 6)).shape == (0, 5)


def test_on_a_gpu_it_stays_a_linear_layer(monkeypatch):
    """By default cuDNN's convolutions round to TF32, where linear layers do not."""
    monkeypatch.setattr(_fused, "_DEVICES", ("cpu", "cuda"))
    with FakeTensorMode():
        rows = {device: torch.empty(4, 6, device=device) for device in ("cpu", "cuda")}
    linear, bn, _ = plain()
    assert _fused._takes(rows["cpu"], linear, bn)
    assert not _fused._takes(rows["cuda"], linear, bn)


def test_autocast(pair):
    stock, welded = pair
    x = torch.randn(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = stock(x), welded(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_compile_and_export(pair):
    _, welded = pair
    for module in welded.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.1  # None is a number that torch.compile, stock or not, breaks at
    x = torch.randn(8, 6)
    torch.testing.assert_close(
        torch.compile(copy.deepcopy(welded), fullgraph=True, backend="aot_eager")(x), welded(x)
    )
    welded.eval()
    exported = torch.export.export(welded, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(exported.module()(x[:5]), welded(x[:5]))
    traced = torch.jit.trace(welded, x)
    torch.testing.assert_close(traced(x[:5]), welded(x[:5]))

"""``weld(inference=True)``: a snapshot with folded tensors."""

import copy
import pickle
import weakref

import pytest
import torch
import torchweld as tw
from torch import nn
from torchweld.convert import _survey

from tests.convert.models import BasicBlock, Digits, Plain, ResNet
from tests.convert.test_weld import CASES, assert_near, pair


def trained(kind):
    stock, _ = pair(kind)
    stock.train()
    for _ in range(3):
        stock(torch.randn(CASES[kind][0]))
    return stock.eval()


@pytest.mark.parametrize("kind", CASES)
def test_snapshot(kind):
    stock = trained(kind)
    state = copy.deepcopy(stock.state_dict())
    snapshot = tw.weld(stock.train(), inference=True)
    assert all(module.training for module in stock.modules())
    stock.eval()
    x = torch.randn(CASES[kind][0])
    assert_near(snapshot(x), stock(x))
    assert not snapshot(x).requires_grad
    assert len(tw.report(snapshot).converted) == CASES[kind][1]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in snapshot.modules())
    for name, value in stock.state_dict().items():
        assert torch.equal(value, state[name]), name
    theirs = {tensor.data_ptr() for tensor in stock.state_dict().values()}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in snapshot.state_dict().values())


def test_fused_ops_run():
    snapshot = tw.weld(BasicBlock(4, 8, 2), inference=True)
    with torch.profiler.profile() as profile:
        snapshot(torch.randn(2, 4, 8, 8))
    names = [event.name for event in profile.events()]
    assert names.count("torchweld::conv_relu") == 3
    assert not any("aten::add" in name or "aten::relu" in name for name in names)


def test_stays_in_evaluation():
    snapshot = tw.weld(Digits(), inference=True)
    assert not any(module.training for module in snapshot.modules())
    assert snapshot.eval() is snapshot
    with pytest.raises(RuntimeError, match="cannot train; train the model it was made from"):
        snapshot.train()
    with pytest.raises(RuntimeError, match="cannot train"):
        nn.Sequential(snapshot).train()
    with pytest.raises(RuntimeError, match="cannot train"):
        tw.weld(nn.Sequential(nn.Linear(2, 2)), inference=True).train()
    with pytest.raises(ValueError, match="keep the model it was made from"):
        tw.unweld(snapshot)


def test_copies_and_again():
    snapshot = tw.weld(trained(ResNet), inference=True)
    x = torch.randn(2, 3, 16, 16)
    for other in (
        copy.deepcopy(snapshot),
        pickle.loads(pickle.dumps(snapshot)),
        tw.weld(snapshot),
        tw.weld(snapshot, inference=True),
    ):
        assert torch.equal(other(x), snapshot(x))
        with pytest.raises(RuntimeError, match="cannot train"):
            other.train()


def test_hook_on_the_activation_runs():
    stock = trained(Plain)
    snapshot = tw.weld(stock, inference=True)
    seen = []
    snapshot[0][2].register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 3, 8, 8)
    assert_near(snapshot(x), stock(x))
    assert_near(seen[0], stock[0](x))


def test_calls_no_trace_fits():
    """The stock forward, should it have to run, is right on folded modules too."""
    stock = trained(ResNet)
    snapshot = tw.weld(stock, inference=True)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 16, 16)
    try:
        assert_near(snapshot(x), stock(x))
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_trace_has_the_same_bits(dtype):
    """The form for C++, and the fastest one: packed weights become constants of it."""
    stock = trained(ResNet).to(dtype, memory_format=torch.channels_last)
    snapshot = tw.weld(stock, inference=True)
    x = torch.randn(2, 3, 16, 16).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        scripted = torch.jit.freeze(torch.jit.trace(snapshot, x))
        assert "torchweld::conv_relu" in str(scripted.inlined_graph)
        for batch in (x, torch.randn_like(x)):
            assert torch.equal(scripted(batch), snapshot(batch))
            assert scripted(batch).dtype == dtype


def test_no_running_statistics():
    bn = nn.BatchNorm2d(4, track_running_stats=False)
    snapshot = tw.weld(nn.Sequential(nn.Conv2d(3, 4, 1), bn), inference=True)
    assert "no running statistics" in tw.report(snapshot).skipped[0].detail


def test_weight_read_elsewhere():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x)) * self.conv.weight.sum()

    stock = Reads().eval()
    snapshot = tw.weld(stock, inference=True)
    assert "reads conv.weight" in tw.report(snapshot).skipped[0].detail
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(snapshot(x), stock(x))


def test_a_module_of_the_user_keeps_its_activation():
    folded = tw.nn.ConvReLU2d.from_float(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(folded, nn.Identity(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 3, 8, 8)
    for inference in (False, True):
        torch.testing.assert_close(tw.weld(model, inference=inference)(x), model(x))


def test_what_is_folded_away_keeps_its_id_until_all_is_surveyed(monkeypatch):
    fold, replaced = _survey._fold, []

    def watched(owner, unit):
        replaced.extend(weakref.ref(owner.get_submodule(path)) for path in unit.pair)
        fold(owner, unit)
        assert all(module() is not None for module in replaced)

    monkeypatch.setattr(_survey, "_fold", watched)
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(3)]
    tw.weld(nn.Sequential(*blocks).eval(), inference=True)
    assert len(replaced) == 6

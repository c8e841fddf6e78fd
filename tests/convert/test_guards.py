"""What a traced forward took for granted is looked at again before every call."""

import contextlib
import gc
import random
import time

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn

SLOPE = 0.1


class Block(nn.Module):
    """Fuses, and depends on a good deal besides its input."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.scales = [1.0, 2.0]
        self.tail = nn.ModuleList([nn.Identity()])
        self.final = F.relu

    @property
    def gain(self):
        return self.scales[0]

    def forward(self, x, shift=None, *, double=False):
        x = self.act(self.bn(self.conv(x)))
        if shift is not None:
            x = x + shift
        if double:
            x = x * 2
        for layer in self.tail:
            x = layer(x)
        return self.final(x * self.gain * SLOPE)


def fused_calls(function) -> int:
    with torch.profiler.profile() as profile:
        function()
    return sum("torchweld::conv_bn_relu" in event.name for event in profile.events())


@pytest.fixture
def pair():
    torch.manual_seed(0)
    stock = Block().eval()
    return stock, tw.weld(stock)


def assert_follows(pair, *args, fused=True, **kwargs):
    stock, welded = pair
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(welded(x, *args, **kwargs), stock(x, *args, **kwargs))
    assert fused_calls(lambda: welded(x, *args, **kwargs)) == fused


def test_arguments(pair):
    shift = torch.randn(4, 1, 1)
    assert_follows(pair)
    assert_follows(pair, shift)
    assert_follows(pair, shift=shift)
    assert_follows(pair, None, double=True)
    assert_follows(pair, shift, double=True)
    assert_follows(pair, 3.0)
    assert_follows(pair, 4.0)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(pair[1](x=x), pair[0](x=x))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        pair[1](x, other=1)


def test_attributes(pair):
    for model in pair:
        model.scales[0] = 3.0
    assert_follows(pair)
    for model in pair:
        model.scales = (0.5,)
    assert_follows(pair)
    for model in pair:
        model.final = F.silu
    assert_follows(pair)
    for model in pair:
        model.tail.append(nn.Tanh())
    assert_follows(pair)
    for model in pair:
        model.act = nn.SiLU()
    assert_follows(pair)
    for model in pair:
        model.act = nn.LeakyReLU(0.2)
    assert_follows(pair)
    for model in pair:
        model.act.negative_slope = 0.3
    assert_follows(pair)


def test_a_value_that_never_repeats_ends_in_the_stock_forward(pair):
    for i in range(12):
        for model in pair:
            model.scales[0] = float(i)
        assert_follows(pair, fused=i < 8)


def test_globals(pair, monkeypatch):
    monkeypatch.setattr("tests.convert.test_guards.SLOPE", 0.7)
    assert_follows(pair)


def test_children_replaced(pair):
    for model in pair:
        torch.manual_seed(3)
        model.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    assert_follows(pair)
    for model in pair:
        torch.manual_seed(4)
        model.conv = nn.Conv2d(3, 4, 3, bias=False)
    assert_follows(pair)
    for model in pair:
        model.bn = nn.GroupNorm(2, 4)
    assert_follows(pair, fused=False)


@pytest.mark.parametrize("name", ["conv", "bn"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_later(pair, name, register):
    _, welded = pair
    seen = []
    handle = getattr(getattr(welded, name), register)(lambda *args: seen.append(args))
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    assert fused_calls(lambda: welded(x).sum().backward()) == 0
    assert len(seen) == 1
    handle.remove()
    assert_follows(pair)


def test_hook_on_the_activation_keeps_conv_and_bn(pair):
    stock, welded = pair
    seen = []
    welded.act.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    x = torch.randn(2, 3, 6, 6)
    assert_follows(pair)
    assert fused_calls(lambda: welded(x)) == 1
    torch.testing.assert_close(seen[-1][0], stock.bn(stock.conv(x)))
    torch.testing.assert_close(seen[-1][1], stock.act(stock.bn(stock.conv(x))))


def test_hooks_on_every_module(pair):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(m))
    try:
        pair[1](torch.randn(2, 3, 6, 6))
    finally:
        handle.remove()
    assert {pair[1].conv, pair[1].bn, pair[1].act} <= set(seen)


def test_weight_norm_and_sync_batch_norm_later(pair):
    for model in pair:
        nn.utils.parametrizations.weight_norm(model.conv)
    assert_follows(pair, fused=False)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(pair[1])
    assert type(converted.bn) is nn.SyncBatchNorm


class Refused(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.count, self.seen, self.plain = 0, [], torch.ones(3, 1, 1)
        self.config = type("Config", (), {"on": True})()
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def _counts(self, x):
    self.count += 1
    return self.bn(self.conv(x))


def _keeps(self, x):
    self.features = self.bn(self.conv(x))
    return self.features


def _appends(self, x):
    self.seen.append(self.bn(self.conv(x)))
    return self.seen[-1]


def _draws(self, x):
    return self.bn(self.conv(x)) if random.random() < 0.5 else x


def _draws_torch(self, x):
    return self.bn(self.conv(x)) if torch.rand(()) < 0.5 else x


def _prints(self, x):
    print("forward")
    return self.bn(self.conv(x))


def _no_grad(self, x):
    with torch.no_grad():
        return self.bn(self.conv(x))


@torch.no_grad()
def _decorated(self, x):
    return self.bn(self.conv(x))


def _autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.bn(self.conv(x))


def _checkpoints(self, x):
    return torch.utils.checkpoint.checkpoint(lambda y: self.bn(self.conv(y)), x)


def _asks_grad(self, x):
    return self.bn(self.conv(x)) if torch.is_grad_enabled() else x


def _asks_device(self, x):
    return self.bn(self.conv(x)) if x.is_cuda else x


def _asks_shape(self, x):
    return self.bn(self.conv(x)) if x.shape[0] > 2 else x


def _asks_type(self, x):
    y = self.bn(self.conv(x))
    return y if isinstance(y, torch.Tensor) else x


def _catches(self, x):
    with contextlib.suppress(Exception):
        self.count += 1
    return self.bn(self.conv(x))


def _reads_config(self, x):
    return self.bn(self.conv(x)) if self.config.on else x


def _makes_tensor(self, x):
    return self.bn(self.conv(x)) * torch.tensor([1.0])


def _reads_values(self, x):
    return self.bn(self.conv(x)) if self.plain.sum() > 0 else x


def _takes_apart(self, x):
    return self.bn(self.conv(x)) if hasattr(x, "values_") else x


def _sets_on_value(self, x):
    x = self.bn(self.conv(x))
    x.note = 1
    return x


REFUSED = [
    _sets_on_value,
    _counts, _keeps, _appends, _draws, _draws_torch, _prints, _no_grad, _decorated, _autocast,
    _checkpoints, _asks_grad, _asks_device, _asks_shape, _asks_type, _catches, _reads_config,
    _makes_tensor, _reads_values, _takes_apart,
]  # fmt: skip


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_left_alone(forward):
    """A forward whose effects or course a graph would lose keeps its class, and is reported."""
    model = Refused(forward)
    welded = tw.weld(model)
    assert type(welded) is Refused
    (row,) = tw.report(welded)
    assert row.name == ""
    assert row.detail.startswith("cannot be traced: ")
    assert vars(welded).keys() - {"_torchweld_report"} == vars(model).keys()
    assert (welded.count, welded.seen) == (0, [])
    assert not hasattr(nn.Module, "__getattribute__") or (
        nn.Module.__getattribute__ is object.__getattribute__
    )


def test_right_answers_to_isinstance():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            parts = [x] if isinstance(x, torch.Tensor) else x
            return self.bn(self.conv(torch.cat(parts, 1)))

    stock = Takes().eval()
    welded = tw.weld(stock)
    x = torch.randn(2, 4, 3, 3)
    for argument in (x, [x[:, :2], x[:, 2:]], [x[:, :1], x[:, 1:3], x[:, 3:]]):
        torch.testing.assert_close(welded(argument), stock(argument))
        assert fused_calls(lambda argument=argument: welded(argument)) == 1


def test_changed_arguments():
    class Appends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x, seen=None):
            x = self.bn(self.conv(x))
            if seen is not None:
                seen.append(x)
            return x

    welded = tw.weld(Appends())
    seen = []
    y = welded(torch.randn(2, 3, 4, 4), seen)
    assert len(seen) == 1
    assert seen[0] is y


class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):
        time.time()


class LeavesGarbage(Block):
    def forward(self, x):
        for _ in range(10):
            Cycle()
        return super().forward(x)


def test_a_collection_while_tracing():
    """Finalizers that a garbage collection runs are not the forward's doing."""
    model, thresholds = LeavesGarbage(), gc.get_threshold()
    gc.set_threshold(1)
    try:
        welded = tw.weld(model)
    finally:
        gc.set_threshold(*thresholds)
    assert len(tw.report(welded).converted) == 1
    assert gc.isenabled()

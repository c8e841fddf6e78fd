"""Patterns that must not be fused, and the reason the report gives."""

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn

from tests.convert.models import DenseBlock, conv_bn


class Uses(nn.Module):
    """conv and bn, and a forward given as a function."""

    def __init__(self, forward, conv=None, bn=None):
        super().__init__()
        self.conv, self.bn = conv or nn.Conv2d(4, 4, 1), bn or nn.BatchNorm2d(4)
        self.pool, self.body = nn.MaxPool2d(2), forward

    def forward(self, x):
        return self.body(self, x)


def _simple(self, x):
    return F.relu(self.bn(self.conv(x)))


def _conv_used_elsewhere(self, x):
    x = self.conv(x)
    return self.bn(x) + x


def _conv_twice(self, x):
    return self.bn(self.conv(x)) + self.conv(x)


def _bn_twice(self, x):
    return self.bn(self.conv(x)) + self.bn(x)


def _functional(self, x):
    x = F.conv2d(x, self.conv.weight, self.conv.bias)
    return self.bn(x)


def _functional_bn(self, x):
    bn = self.bn
    return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)


def _relu_between(self, x):
    return self.bn(F.relu(self.conv(x)))


def _modules_between(self, x):
    x = self.pool(self.conv(x))
    return self.bn(torch.sigmoid(x))


def _bn_first(self, x):
    return self.conv(self.bn(x))


def _bn_after_cat(self, x):
    return self.bn(torch.cat([self.conv(x)[:, :2], x[:, :2]], 1))


def _never_calls(self, x):
    return self.conv(x)


class Subclass(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def old_weight_norm(module):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


def replaced(module):
    module.forward = lambda x: x
    return module


CASES = {
    "used elsewhere": Uses(_conv_used_elsewhere),
    "Conv2d is used more than once": Uses(_conv_twice),
    "BatchNorm2d is used more than once": Uses(_bn_twice),
    "called as a function": Uses(_functional),
    "is called as a function": Uses(_functional_bn),
    "ConvTranspose2d is not Conv2d": Uses(_simple, nn.ConvTranspose2d(4, 4, 1)),
    "Subclass is a subclass of Conv2d": Uses(_simple, Subclass(4, 4, 1)),
    "Conv1d is not Conv2d": nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)),
    "Conv3d is not Conv2d": nn.Sequential(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4)),
    "relu between the convolution and the batch normalization": Uses(_relu_between),
    "MaxPool2d, then sigmoid between the convolution": Uses(_modules_between),
    "normalizes what this forward was given": Uses(_bn_first),
    "normalizes the output of cat": Uses(_bn_after_cat),
    "no forward that could be traced calls it after a convolution": Uses(_never_calls),
    "BatchNorm1d is not BatchNorm2d": Uses(_simple, bn=nn.BatchNorm1d(4)),
    "BatchNorm2d is not BatchNorm1d": Uses(_simple, nn.Linear(4, 4)),
    "Linear is parametrized": Uses(
        _simple, nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4)
    ),
    "LazyConv2d is lazy": Uses(_simple, nn.LazyConv2d(4, 1)),
    "LazyBatchNorm2d is lazy": Uses(_simple, bn=nn.LazyBatchNorm2d()),
    "Conv2d has hooks": Uses(_simple, hooked(nn.Conv2d(4, 4, 1))),
    "BatchNorm2d has hooks": Uses(_simple, bn=hooked(nn.BatchNorm2d(4))),
    "Conv2d is parametrized": Uses(
        _simple, nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    ),
    "forward of this Conv2d was replaced": Uses(_simple, replaced(nn.Conv2d(4, 4, 1))),
    "4 channels meet a batch normalization of 5": nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(5)
    ),
    "its forward was replaced": replaced(Uses(_simple)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("reason", CASES)
def test_left_alone(reason, inference):
    model = CASES[reason]
    if inference and "lazy" in reason:
        with pytest.raises(ValueError, match="run the model once first"):
            tw.weld(model, inference=True)
        return
    welded = tw.weld(model, inference=inference)
    rows = tw.report(welded).rows
    assert [row.converted for row in rows] == [False] * len(rows)
    assert any(reason in row.detail for row in rows), rows
    assert type(next(iter(welded.children()))) is type(next(iter(model.children())))


@pytest.mark.filterwarnings("ignore")  # torch is about to remove them
def test_quantized():
    ao = pytest.importorskip("torch.ao")
    qconfig = ao.quantization.get_default_qat_qconfig()
    for conv, bn in (
        (ao.nn.quantized.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        (nn.Conv2d(4, 4, 1), ao.nn.quantized.BatchNorm2d(4)),
        (ao.nn.qat.Conv2d(4, 4, 1, qconfig=qconfig), nn.BatchNorm2d(4)),
        (ao.nn.qat.Linear(4, 4, qconfig=qconfig), nn.BatchNorm1d(4)),
        (ao.nn.intrinsic.qat.ConvReLU2d(4, 4, 1, qconfig=qconfig), nn.BatchNorm2d(4)),
    ):
        (row,) = tw.report(tw.weld(Uses(_simple, conv, bn)))
        assert not row.converted
        assert "is quantized" in row.detail


def test_weight_norm_of_old():
    welded = tw.weld(Uses(_simple, old_weight_norm(nn.Conv2d(4, 4, 1))))
    assert "has hooks" in tw.report(welded).skipped[0].detail


def test_shared_between_places():
    conv = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(
        nn.Sequential(conv, nn.BatchNorm2d(4)), nn.Sequential(conv, nn.BatchNorm2d(4))
    )
    assert [row.converted for row in tw.report(tw.weld(model))] == [False, False]


def test_a_block_called_twice_is_one_block():
    block = nn.Sequential(*conv_bn(4, 4), nn.ReLU())
    model = nn.Sequential(block, block)
    welded = tw.weld(model)
    assert len(tw.report(welded).converted) == 1
    assert welded[0] is welded[1]
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    model[0][1].reset_running_stats()
    torch.testing.assert_close(welded(x), expected)
    assert model[0][1].num_batches_tracked == 2


class Looks(nn.Module):
    """Reads what belongs to the modules of a child that fuses."""

    def __init__(self, forward):
        super().__init__()
        self.child, self.body = nn.Sequential(*conv_bn(4, 4), nn.ReLU()), forward

    def forward(self, x):
        return self.body(self, x)


@pytest.mark.parametrize(
    ("what", "forward"),
    [
        ("child.0.weight", lambda self, x: self.child(x) * self.child[0].weight.sum()),
        ("child.1.running_var", lambda self, x: self.child(x) + self.child[1].running_var.mean()),
        ("child.1.eps", lambda self, x: self.child(x) + self.child[1].eps),
    ],
)
def test_what_others_read_is_not_folded(what, forward):
    torch.manual_seed(0)
    model, x = Looks(forward), torch.randn(2, 4, 5, 5)
    model(x)
    snapshot = tw.weld(model.eval(), inference=True)
    assert [row.detail for row in tw.report(snapshot)] == [f"a forward reads {what} by itself"]
    torch.testing.assert_close(snapshot(x), model(x).detach())
    assert len(tw.report(tw.weld(model)).converted) == 1  # which shares them


class Adds(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn = conv_bn(4, 4)
        self.side = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
        self.body = forward

    def forward(self, x):
        return self.body(self, x * 1)


def _residual_changed_in_place(self, x):
    y = x * 2
    kept = y[:, :1]
    y += self.bn(self.conv(x))
    return y + kept


def _input_changed_before_the_residual(self, x):
    out = self.bn(self.conv(x))
    return out + self.side(x)


def _input_changed_by_a_function(self, x):
    out = self.bn(self.conv(x))
    y = F.relu_(x)
    return out + y


def _doubled(self, x):
    out = self.bn(self.conv(x))
    return out + out


def _scaled(self, x):
    return torch.add(self.bn(self.conv(x)), x, alpha=2)


def _plus_a_number(self, x):
    return F.relu(self.bn(self.conv(x)) + 1)


def _bn_output_used_twice(self, x):
    y = self.bn(self.conv(x))
    return F.relu(y) + y


def _clipped(self, x):
    return F.hardtanh(self.bn(self.conv(x)), -1, 6)


@pytest.mark.parametrize(
    "forward",
    [
        _residual_changed_in_place, _input_changed_before_the_residual,
        _input_changed_by_a_function, _doubled, _scaled, _plus_a_number, _bn_output_used_twice,
        _clipped,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_only_conv_and_bn(forward):
    """Where the rest cannot be fused, conv and bn still are, and the result is stock's."""
    torch.manual_seed(0)
    model = Adds(forward).eval()
    welded = tw.weld(model)
    (row,) = [row for row in tw.report(welded) if "conv" in row.name and row.converted]
    assert row.detail == "conv-bn"
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(welded(x), model(x))


@pytest.mark.parametrize(
    ("forward", "detail"),
    [
        (lambda self, x: F.hardtanh(self.bn(self.conv(x)), 0, 6), "conv-bn-relu6"),
        (lambda self, x: F.hardtanh(self.bn(self.conv(x)), 0.0, max_val=6.0), "conv-bn-relu6"),
        (lambda self, x: F.relu6(self.bn(self.conv(x)), inplace=True), "conv-bn-relu6"),
        (lambda self, x: F.leaky_relu(self.bn(self.conv(x)), 0.3), "conv-bn-leaky_relu"),
        (lambda self, x: F.hardswish(self.bn(self.conv(x))), "conv-bn-hardswish"),
        (lambda self, x: self.bn(self.conv(x)).add_(x).relu(), "conv-bn-add-relu"),
        (lambda self, x: F.silu(x.add(self.bn(self.conv(x)))), "conv-bn-add-silu"),
        (lambda self, x: torch.relu_(x + self.bn(self.conv(x))), "conv-bn-add-relu"),
    ],
)
def test_functional_forms(forward, detail):
    torch.manual_seed(0)
    model = Adds(forward).eval()
    welded = tw.weld(model)
    assert [row.detail for row in tw.report(welded)] == [detail]
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(welded(x), model(x))


def test_before_the_convolution():
    """As in DenseNet: batch normalizations that come first are left alone, and it is said why."""
    report = tw.report(tw.weld(DenseBlock()))
    assert [row.detail for row in report.converted] == ["conv-bn-relu"] * 3
    assert {row.name: row.detail for row in report.skipped} == {
        f"layer{i}.norm": "no convolution right before it: it normalizes the output of cat"
        for i in range(3)
    }


def test_traced_in_one_mode_only():
    class Draws(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            return x + torch.rand(()) if self.training else x

    model = Draws(*conv_bn(4, 4), nn.ReLU())
    welded = tw.weld(model)
    (row,) = tw.report(welded)
    assert row.converted
    assert row.detail.startswith("conv-bn-relu in evaluation; in training it cannot be traced: ")
    x = torch.randn(2, 4, 5, 5)
    for training in (True, False):
        outputs = []
        for each in (model, welded):
            torch.manual_seed(0)
            outputs.append(each.train(training)(x))
            model[1].reset_running_stats()  # they share it
        torch.testing.assert_close(*outputs)

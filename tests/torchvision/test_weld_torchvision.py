"""torchvision's models, welded. Runs apart from the other tests: it wants the newest torch."""

import collections
import copy

import pytest
import torch
from torch import nn

tv = pytest.importorskip("torchvision.models")
tw = pytest.importorskip("torchweld")
FrozenBatchNorm2d = pytest.importorskip("torchvision.ops.misc").FrozenBatchNorm2d


def backbone():
    make = tv.detection.backbone_utils.resnet_fpn_backbone
    return make(backbone_name="resnet50", weights=None, trainable_layers=5)


# Model: what becomes of its batch normalizations, and the side of an image it takes.
CASES = {
    "resnet18": ({"conv-bn-relu": 9, "conv-bn-add-relu": 8, "conv-bn": 3}, 64),
    "resnet50": ({"conv-bn-relu": 33, "conv-bn-add-relu": 16, "conv-bn": 4}, 64),
    "mobilenet_v2": ({"conv-bn-relu6": 35, "conv-bn-add": 10, "conv-bn": 7}, 64),
    "mobilenet_v3_small": (
        {"conv-bn-hardswish": 18, "conv-bn-relu": 5, "conv-bn-add": 6, "conv-bn": 5}, 64,
    ),
    "efficientnet_b0": ({"conv-bn-silu": 33, "conv-bn": 16}, 64),
    "densenet121": ({"conv-bn-relu": 59}, 64),
    "vgg11_bn": ({"conv-bn-relu": 8}, 32),
    "googlenet": ({"conv-bn-relu": 59}, 64),
    "inception_v3": ({"conv-bn-relu": 96}, 299),
    "regnet_y_400mf": ({"conv-bn-relu": 33, "conv-bn-add-relu": 16, "conv-bn": 4}, 64),
    "shufflenet_v2_x1_0": ({"conv-bn-relu": 37, "conv-bn": 19}, 64),
    "backbone": (
        {"conv-frozen_bn-relu": 33, "conv-frozen_bn-add-relu": 16, "conv-frozen_bn": 4}, 64,
    ),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    if name == "backbone":
        model = backbone()
    else:
        initialized = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = getattr(tv, name)(weights=None, num_classes=10, **initialized)
    if name == "vgg11_bn":
        model.classifier = nn.Linear(512 * 49, 10)  # its own has a gigabyte of weights
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return model.double()


def tensors(output):
    return torch.utils._pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)


def assert_near(ours, theirs, factor=1e-8):
    scale = max(theirs.abs().max().item(), 1e-6)
    assert (ours - theirs).abs().max().item() <= factor * scale


def step(model, x):
    """Outputs and gradients of a training step in which the same is drawn every time."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    outputs = tensors(model(leaf))
    sum(output.square().mean() for output in outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return outputs, {"input": leaf.grad} | gradients


def fused(report):
    """Return the rows of what became a conv-bn-relu."""
    return [row for row in report.converted if row.conversion == "conv_bn_relu"]


@pytest.mark.parametrize("name", CASES)
def test_model(name):
    details, size = CASES[name]
    stock = make(name)
    welded = tw.weld(copy.deepcopy(stock))
    report = tw.report(welded)
    assert collections.Counter(row.detail for row in fused(report)) == details, str(report)
    assert all("no convolution right before it" in row.detail for row in report.skipped)
    pools = sum(type(m) is nn.MaxPool2d for m in stock.modules())
    assert sum(row.conversion == "max_pool2d" for row in report.converted) == pools
    norms = sum(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)) for m in stock.modules())
    assert len(report) == norms + pools

    assert list(welded.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in welded.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert [n for n, _ in welded.named_modules()] == [n for n, _ in stock.named_modules()]
    assert isinstance(welded, type(stock))

    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    theirs, gradients = step(stock, x)
    ours, our_gradients = step(welded, x)
    for our, their in zip(ours, theirs, strict=True):
        assert_near(our, their)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for key, gradient in gradients.items():
        assert (our_gradients[key] - gradient).abs().max() <= 1e-8 * largest, key
    for our, their in zip(welded.buffers(), stock.buffers(), strict=True):
        assert_near(our.double(), their.double())

    x = x[..., :96, :96]
    stock.eval(), welded.eval()
    with torch.no_grad():
        expected = tensors(stock(x))
        for model in (welded, tw.weld(stock, inference=True)):
            for our, their in zip(tensors(model(x)), expected, strict=True):
                assert_near(our, their)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "regnet_y_400mf"])
def test_taken_elsewhere(name):
    """torch.jit.trace, torch.export, moving averages, a file."""
    stock = make(name).eval()
    welded = tw.weld(stock)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = stock(x)
        assert_near(torch.jit.trace(welded, x, check_trace=False)(x), expected)
        exported = torch.export.export(welded, (x,))
        assert_near(exported.module()(x), expected)
        average = torch.optim.swa_utils.AveragedModel(welded)
        average.update_parameters(welded)
        assert_near(average.eval()(x), expected)
        assert_near(copy.deepcopy(welded)(x), expected)
    operators = [str(node.target) for node in exported.graph.nodes]
    found = len(fused(tw.report(welded)))
    assert sum("torchweld.conv_bn_relu_frozen" in operator for operator in operators) == found


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_compile(name):
    stock = make(name)
    welded = tw.weld(copy.deepcopy(stock))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    compiled = torch.compile(welded, backend="aot_eager", fullgraph=True)
    (output,), gradients = step(stock, x)
    (ours,), _ = step(compiled, x)
    assert_near(ours, output)
    for key, parameter in welded.named_parameters():
        assert_near(parameter.grad, gradients[key], 1e-5)


def test_detector():
    """A whole detector: only its backbone's patterns change, and its losses and boxes do not."""
    torch.manual_seed(0)
    stock = tv.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=128
    )
    stock.backbone = backbone()
    welded = tw.weld(copy.deepcopy(stock))
    assert len(fused(tw.report(welded))) == 53
    images = [torch.rand(3, 96, 112), torch.rand(3, 80, 96)]
    targets = [
        {"boxes": torch.tensor([[10.0, 12.0, 50.0, 60.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[5.0, 8.0, 70.0, 64.0]]), "labels": torch.tensor([2])},
    ]
    losses = []
    for model in (stock, welded):
        torch.manual_seed(1)
        losses.append(torch.stack([*model(images, targets).values()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    stock.eval(), welded.eval()
    for ours, theirs in zip(welded(images), stock(images), strict=True):
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_our_models_are_torchvisions(name):
    models = pytest.importorskip("benchmarks.models")
    ours, theirs = getattr(models, name)(), getattr(tv, name)()
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

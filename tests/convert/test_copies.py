"""Copies, files, compilers and tracers take a welded model."""

import copy
import io
import pickle

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.convert.models import DenseBlock, Digits, ResNet
from tests.convert.test_guards import fused_calls

X = torch.randn(2, 1, 8, 8)


@pytest.fixture
def welded():
    torch.manual_seed(0)
    model = tw.weld(Digits())
    model(X)
    return model.eval()


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_file])
def test_copies(welded, copied):
    other = copied(welded)
    assert type(other) is type(welded)
    assert isinstance(other, Digits)
    assert torch.equal(other(X), welded(X))
    assert fused_calls(lambda: other(X)) == 2
    assert other.conv1.weight is not welded.conv1.weight
    assert str(tw.report(other)) == str(tw.report(welded))
    other.train()
    assert len(other(X)) == 2
    assert type(tw.unweld(other)) is Digits


def test_moving_average(welded):
    average = torch.optim.swa_utils.AveragedModel(
        welded, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    with torch.no_grad():
        average.update_parameters(welded)
        welded.fc.bias += 1.0
        average.update_parameters(welded)
    torch.testing.assert_close(average.module.fc.bias, welded.fc.bias - 0.5)
    assert fused_calls(lambda: average(X)) == 2


@pytest.mark.parametrize("training", [False, True])
def test_compile(training):
    torch.manual_seed(0)
    model = tw.weld(ResNet()).train(training)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 16, 16)
    results = []
    for m, run in ((model, model), (other, compiled)):
        y = run(x)
        y.square().mean().backward()
        results.append([y, *[p.grad for p in m.parameters()], *m.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_often():
    """Each class has its own forward: torch.compile compiles one but a few times."""
    x = torch.randn(2, 3, 6, 6)
    for i in range(torch._dynamo.config.recompile_limit + 2):
        kind = type(f"Net{i}", (nn.Sequential,), {})
        model = tw.weld(kind(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))


def test_compiled_graph_is_fused(welded):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(by_pickle(welded), fullgraph=True, backend=backend)(X)
    assert str(graphs[0].graph).count("torchweld.conv_bn_relu_frozen") == 2


def test_jit_trace(welded):
    for model in (welded, tw.weld(welded, inference=True)):
        traced = torch.jit.trace(model, X)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(X), model(X))
    assert "torchweld::conv_relu" in str(traced.inlined_graph)


def test_compiled_without_a_call_before():
    """Forwards that are called with lists are traced for the lists their parents give them."""
    welded = tw.weld(DenseBlock()).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(2, 4, 6, 6)
    ours = torch.compile(copy.deepcopy(welded), fullgraph=True, backend=backend)(x)
    assert str(graphs[0].graph).count("torchweld.conv_bn_relu_frozen") == 3
    torch.testing.assert_close(ours, tw.unweld(welded)(x))


def test_jit_script():
    with pytest.raises(RuntimeError, match=r"script torchweld\.unweld\(model\)"):
        torch.jit.script(nn.Sequential(tw.weld(ResNet())))
    model = tw.unweld(tw.weld(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))).eval()
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))


def test_jit_trace_with_a_residual():
    welded = tw.weld(ResNet()).eval()
    x = torch.randn(3, 3, 16, 16)
    traced = torch.jit.trace(welded, x[:2])
    torch.testing.assert_close(traced(x), welded(x))


def test_export(welded):
    exported = torch.export.export(welded, (X,))
    torch.testing.assert_close(exported.module()(X), welded(X))
    assert "torchweld.conv_bn_relu_frozen" in str(exported.graph)


def test_sliced_and_grown():
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Tanh()]
    stock = nn.Sequential(*blocks).eval()
    welded = tw.weld(stock)
    x = torch.randn(1, 3, 5, 5)
    for part in (slice(0, 3), slice(0, 1), slice(1, 3)):
        y = x if part.start == 0 else stock[0](x)
        torch.testing.assert_close(welded[part](y), stock[part](y))
    welded.append(stock[3])
    torch.testing.assert_close(welded(x), stock[3](stock(x)))
    welded[2] = nn.Identity()
    stock[2] = nn.Identity()
    torch.testing.assert_close(welded(x), stock[3](stock(x)))


def test_scripted_part_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    with pytest.raises(ValueError, match="TorchScript"):
        tw.weld(nn.Sequential(scripted))

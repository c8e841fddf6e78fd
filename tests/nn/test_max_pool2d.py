"""The module is nn.MaxPool2d, wherever a module goes."""

import copy
import io
import pickle

import pytest
import torch
import torchweld as tw
from torch import nn

ARGUMENTS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": (2,), "stride": [1], "padding": (1,)},
    {"kernel_size": 2, "return_indices": True},
]


def image() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 16, 9, 10).contiguous(memory_format=torch.channels_last)


def equal(ours, theirs) -> bool:
    if isinstance(theirs, tuple):
        return all(map(torch.equal, ours, theirs))
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_is_the_stock_module(arguments):
    ours, stock, x = tw.nn.MaxPool2d(**arguments), nn.MaxPool2d(**arguments), image()
    assert isinstance(ours, nn.MaxPool2d)
    assert repr(ours) == repr(stock)
    for input in (x, x.contiguous(), x[0], x.double(), x.bfloat16(), x[:0], x.to("meta")):
        if input.device.type == "meta" and not arguments.get("return_indices"):
            assert ours(input).shape == stock(input).shape
        elif input.device.type != "meta":
            assert equal(ours(input), stock(input))
    assert equal(pickle.loads(pickle.dumps(ours))(x), stock(x))
    assert equal(copy.deepcopy(ours)(x), stock(x))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_scripted_and_saved(arguments):
    ours, stock, x, file = (
        tw.nn.MaxPool2d(**arguments),
        nn.MaxPool2d(**arguments),
        image(),
        io.BytesIO(),
    )
    torch.jit.save(torch.jit.script(ours), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for input in (x, x.contiguous(), x[0], x.double()):
        assert equal(loaded(input), stock(input))
    if not arguments.get("return_indices"):
        assert "torchweld::max_pool2d" in str(torch.jit.script(ours).inlined_graph)


def test_a_trace_is_right_on_other_inputs():
    x, stock = image(), nn.MaxPool2d(3, 2, 1)
    traced = torch.jit.trace(tw.nn.MaxPool2d(3, 2, 1), x)
    assert "torchweld::max_pool2d" in str(traced.inlined_graph)
    for input in (x, x.contiguous(), x.double(), x[:1, :1], x[:, :, 1:]):
        assert torch.equal(traced(input), stock(input))


def test_compiled_and_exported():
    pool, x = tw.nn.MaxPool2d(3, 2, 1), image()
    expected = nn.MaxPool2d(3, 2, 1)(x)
    exported = torch.export.export(nn.Sequential(pool), (x,))
    assert torch.equal(exported.module()(x), expected)
    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
    leaf, stock = x.clone().requires_grad_(), x.clone().requires_grad_()
    output = compiled(leaf)
    output.square().sum().backward()
    nn.MaxPool2d(3, 2, 1)(stock).square().sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(leaf.grad, stock.grad)


def test_one_call_to_fx():
    stock, x = nn.MaxPool2d(3, 2, 1), image()
    traced = torch.fx.symbolic_trace(nn.Sequential(tw.nn.MaxPool2d(3, 2, 1)))
    for input in (x, x.contiguous(), x.double()):
        assert torch.equal(traced(input), stock(input))
    assert len(traced.graph.nodes) == 3


def test_functional():
    x = image()
    stock = torch.nn.functional.max_pool2d
    assert torch.equal(tw.nn.functional.max_pool2d(x, 3, padding=1), stock(x, 3, padding=1))
    assert equal(
        tw.nn.functional.max_pool2d(x, 2, return_indices=True), stock(x, 2, return_indices=True)
    )

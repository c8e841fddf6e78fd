"""Welded models on a GPU: training curves, mixed precision, memory, compilers, graphs."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchweld as tw
from torch import nn

from benchmarks.kept import kept_bytes
from tests.convert.models import Plain, ResNet
from tests.convert.test_guards import fused_calls

DEVICE = "cuda"
LAYOUTS = [torch.contiguous_format, torch.channels_last]
PRECISIONS = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def build(kind=ResNet, layout=torch.contiguous_format):
    torch.manual_seed(0)
    return kind().to(DEVICE, memory_format=layout)


def images(n=8, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 32, 32, generator=generator)
    return x.to(DEVICE, memory_format=layout)


def autocast(dtype):
    return nullcontext() if dtype is None else torch.autocast(DEVICE, dtype)


def curve(model, x, dtype, steps=12):
    """The losses of a few steps towards fixed targets."""
    with torch.no_grad():
        targets = torch.linspace(-1, 1, model.eval()(x).numel(), device=DEVICE)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with autocast(dtype):
            loss = F.mse_loss(model(x).flatten().float(), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_curve_is_that_of_stock(precision, layout):
    dtype = PRECISIONS[precision]
    model, x = build(layout=layout), images(layout=layout)
    exact = curve(copy.deepcopy(model).double(), x.double(), None)
    stock, welded = copy.deepcopy(model), tw.weld(copy.deepcopy(model))
    assert fused_calls(lambda: copy.deepcopy(welded)(x)) > 0
    expected, actual = curve(stock, x, dtype), curve(welded, x, dtype)
    assert actual[-1] < 0.7 * actual[0]
    roundoff = 2.0**-20 if dtype is None else torch.finfo(dtype).eps
    bound = 3 * (expected - exact).abs().max() + 8 * roundoff * exact[0]
    assert (actual - exact).abs().max() <= bound
    for ours, theirs in zip(welded.buffers(), stock.buffers(), strict=True):
        assert ours.dtype == theirs.dtype
        # Twelve steps apart by rounding.
        torch.testing.assert_close(ours, theirs, rtol=100 * roundoff, atol=100 * roundoff)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_and_formats_are_those_of_stock(precision, layout):
    dtype = PRECISIONS[precision]
    stock, x = build(Plain, layout), images(layout=layout)
    welded, exact = tw.weld(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    results = []
    for model in (exact, stock, welded):
        leaf = x.double() if model is exact else x.clone()
        with autocast(None if model is exact else dtype):
            y = model(leaf.requires_grad_())
        y.backward(torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape).to(y.dtype).sin())
        results.append([y, leaf.grad, *(p.grad for p in model.parameters())])
    for expected, theirs, ours in zip(*results, strict=True):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        stocks, error = ((t.double() - expected).norm() / expected.norm() for t in (theirs, ours))
        assert error <= 2 * stocks + 16 * torch.finfo(dtype or torch.float32).eps


def test_linear_layers_are_not_rounded_as_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU()).to(DEVICE)
    x = torch.randn(128, 256, device=DEVICE)
    exact = copy.deepcopy(stock).double()(x.double())
    theirs = (copy.deepcopy(stock)(x) - exact).norm()
    snapshot = tw.weld(copy.deepcopy(stock).eval(), inference=True)
    exact_in_eval = copy.deepcopy(stock).double().eval()(x.double())
    assert (tw.weld(copy.deepcopy(stock))(x) - exact).norm() <= 2 * theirs
    assert (snapshot(x) - exact_in_eval).norm() <= 2e-6 * exact_in_eval.norm()


# --- memory --------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", [True, "recompute"])
def test_memory_saving_keeps_little_and_gives_the_same_bits(level):
    model, x = build(layout=torch.channels_last), images(32, torch.channels_last)
    welded = tw.weld(copy.deepcopy(model))
    saving = tw.weld(copy.deepcopy(model), memory_saving=level)

    def loss(of):
        with autocast(torch.bfloat16):
            return of(x).float().square().mean()

    kept = [kept_bytes(lambda m=m: loss(copy.deepcopy(m))) for m in (saving, model)]
    assert kept[0] <= 0.65 * kept[1]
    for m in (welded, saving):
        loss(m).backward()
    for ours, theirs in zip(saving.parameters(), welded.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# --- machinery -----------------------------------------------------------------------------------
def test_compiled_training_step():
    torch._dynamo.reset()
    model, x = build(Plain), images()
    welded = tw.weld(model)
    compiled = torch.compile(tw.weld(copy.deepcopy(model)), fullgraph=True)
    gradients = []
    for m in (welded, compiled):
        y = m(x)
        gradients.append(torch.autograd.grad(y.square().mean(), [*m.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_captured_training_step():
    model, x = tw.weld(build(layout=torch.channels_last)), images(layout=torch.channels_last)
    twin = copy.deepcopy(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up on a copy, so that no buffer moves
        for _ in range(3):
            copy.deepcopy(model)(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(x).square().mean()
        loss.backward()
    for _ in range(2):
        graph.replay()
        twin.zero_grad()
        expected = twin(x).square().mean()
        expected.backward()
        assert torch.equal(loss, expected)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_training_waits_for_nothing():
    model, x = tw.weld(build()), images()
    model(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inference_snapshot(dtype, layout):
    model, x = build(layout=layout), images(layout=layout)
    with torch.no_grad():
        model.train()(x)
        exact = copy.deepcopy(model).eval().double()(x.double())
        half = copy.deepcopy(model).eval().to(dtype)
        expected, actual = half(x.to(dtype)), tw.weld(half, inference=True)(x.to(dtype))
    assert actual.dtype == dtype
    stocks = (expected.double() - exact).norm()
    assert (actual.double() - exact).norm() <= 2 * stocks + 4 * torch.finfo(
        dtype
    ).eps * exact.norm()


def test_inference_snapshot_in_a_graph():
    snapshot, x = tw.weld(build().eval(), inference=True), images(1)
    expected = snapshot(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        snapshot(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        actual = snapshot(x)
    actual.zero_()
    graph.replay()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
@pytest.mark.parametrize("mode", ["training", "evaluation", "untracked"])
def test_module(mode, momentum):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect")
    bn = nn.BatchNorm2d(5, momentum=momentum, track_running_stats=mode != "untracked")
    module = tw.nn.ConvBNReLU2d.from_float(conv, bn, "silu").to(DEVICE)
    module.train(mode != "evaluation")
    stock, x = copy.deepcopy(module).to_float(), images()
    for _ in range(2):
        torch.testing.assert_close(module(x), stock(x), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(module.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_one_value_per_channel_is_refused_as_in_stock():
    module = tw.nn.ConvBNReLU2d(3, 4, 1).to(DEVICE)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module(torch.zeros(1, 3, 1, 1, device=DEVICE))


def test_data_parallel_in_a_world_of_one(tmp_path):
    model, x = tw.weld(build()), images()
    twin = copy.deepcopy(model)
    expected = torch.autograd.grad(twin(x).sum(), [*twin.parameters()])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(model)
        ddp(x).sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)
    finally:
        dist.destroy_process_group()

"""ConvBNReLU2d and ConvReLU2d against the stock modules they stand in for."""

import copy
import io
import pickle

import pytest
import torch
import torchweld as tw
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYER = (4, 6, 3)


def make(**arguments) -> tw.nn.ConvBNReLU2d:
    torch.manual_seed(0)
    module = tw.nn.ConvBNReLU2d(*LAYER, **{"padding": 1, **arguments})
    if module.bn.affine:
        nn.init.uniform_(module.bn.weight, 0.5, 1.5)
        nn.init.normal_(module.bn.bias)
    return module


def make_input(n=3, dtype=torch.float32, size=7):
    torch.manual_seed(1)
    return torch.randn(n, 4, size, size, dtype=dtype)


def assert_same(ours: nn.Module, stock: nn.Module, x: torch.Tensor, **tolerance) -> None:
    """Outputs, gradients and all buffers, over two steps in the modules' own modes."""
    for _ in range(2):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual, expected = ours(a), stock(b)
        torch.testing.assert_close(actual, expected, **tolerance)
        assert actual.stride() == expected.stride()
        actual.square().sum().backward()
        expected.square().sum().backward()
        tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(a.grad, b.grad, **tolerance)
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **tolerance)
    for p, q in zip(ours.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(p, q)


VARIANTS = {
    "default": {},
    "bias": {"bias": True},
    "cumulative": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "untracked": {"track_running_stats": False},
    "not affine": {"affine": False},
    "grouped": {"groups": 2, "stride": 2, "dilation": 2, "padding": (2, 1)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "silu": {"activation": "silu"},
}


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_behaves_as_the_stock_modules(arguments, mode):
    ours = make(**arguments).double()
    ours.train(mode != "eval")
    if mode == "frozen":
        ours.bn.eval()
    stock = copy.deepcopy(ours).to_float()
    assert_same(ours, stock, make_input(dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode):
    conv, bn = nn.Conv2d(*LAYER, padding=(2, 1), padding_mode=mode), nn.BatchNorm2d(6)
    ours = tw.nn.ConvBNReLU2d.from_float(copy.deepcopy(conv), copy.deepcopy(bn))
    assert_same(ours, nn.Sequential(conv, bn, nn.ReLU()), make_input())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_uneven_same_padding_and_padding_changed_later():
    ours = tw.nn.ConvBNReLU2d(4, 6, (4, 2), padding="same")
    assert_same(ours, copy.deepcopy(ours).to_float(), make_input())
    ours = make()
    ours.conv.padding = ours.conv.dilation = (2, 2)
    assert_same(ours, copy.deepcopy(ours).to_float(), make_input())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_16_bit_models(dtype, mixed):
    ours = make()
    (ours.conv if mixed else ours).to(dtype)
    stock = copy.deepcopy(ours).to_float()
    x = make_input(dtype=dtype)
    y = ours(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, stock(x), rtol=0.02, atol=0.03)
    for p, q in zip(ours.buffers(), stock.buffers(), strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=0.01, atol=0.002)
    y.sum().backward()
    assert [p.grad.dtype for p in ours.parameters()] == [p.dtype for p in ours.parameters()]


def test_one_value_per_channel():
    """Torch's own words; the batch is counted and the running statistics stay, as in torch."""
    ours = tw.nn.ConvBNReLU2d(4, 6, 1)
    stock = copy.deepcopy(ours).to_float()
    messages = []
    for module in (ours, stock):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
            module(torch.randn(1, 4, 1, 1))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    for p, q in zip(ours.buffers(), stock.buffers(), strict=True):
        assert torch.equal(p, q)
    untracked = make(track_running_stats=False, padding=0).eval()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        untracked(torch.randn(1, 4, 3, 3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("eps", [0.0, -1e-5])
def test_eps_is_refused_where_torch_refuses_it(eps, training):
    ours = make(eps=eps).train(training)
    outcomes = []
    for module in (ours, copy.deepcopy(ours).to_float()):
        try:
            outcomes.append(tuple(module(make_input()).shape))
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_empty_batch_is_counted_and_changes_nothing_else():
    ours = make()
    stock = copy.deepcopy(ours).to_float()
    assert ours(make_input(0)).shape == stock(make_input(0)).shape
    for p, q in zip(ours.buffers(), stock.buffers(), strict=True):
        assert torch.equal(p, q)
    assert ours.bn.num_batches_tracked == 1


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        make()(torch.randn(4, 5, 5))
    with pytest.raises(ValueError, match="activation: expected one of identity"):
        make(activation="gelu")
    with pytest.raises(TypeError, match=r"bn: expected nn.BatchNorm2d.*SyncBatchNorm"):
        tw.nn.ConvBNReLU2d.from_float(nn.Conv2d(*LAYER), nn.SyncBatchNorm(6))
    with pytest.raises(ValueError, match="expected 6 features"):
        tw.nn.ConvBNReLU2d.from_float(nn.Conv2d(*LAYER), nn.BatchNorm2d(5))


def test_residual():
    ours = make(activation="relu6")
    residual = torch.randn(3, 6, 7, 7, requires_grad=True)
    expected = copy.deepcopy(ours).to_float()
    y = ours(make_input(), residual)
    z = nn.functional.relu6(expected[:2](make_input()) + residual)
    torch.testing.assert_close(y, z)
    y.sum().backward()
    assert torch.equal(residual.grad, ((z > 0) & (z < 6)).float())


def test_shared_batch_norm_and_two_forwards_before_a_backward():
    bn = nn.BatchNorm2d(6)
    blocks = [tw.nn.ConvBNReLU2d.from_float(nn.Conv2d(*LAYER), bn) for _ in range(2)]
    x = make_input()
    sum(block(x).sum() for block in blocks).backward()
    assert bn.num_batches_tracked == 2
    assert bn.weight.grad is not None


def test_frozen_backward_notices_statistics_that_moved():
    module = make().eval()
    y = module(make_input().requires_grad_())
    module.train()(make_input())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_from_float_shares_and_to_float_gives_back():
    conv, bn = nn.Conv2d(*LAYER).train(), nn.BatchNorm2d(6).eval()
    module = tw.nn.ConvBNReLU2d.from_float(conv, bn, "leaky_relu", 0.3)
    assert not module.training
    assert conv.training
    assert module.conv is conv
    stock = module.to_float()
    assert stock[1] is bn
    assert repr(stock[2]) == "LeakyReLU(negative_slope=0.3)"
    assert list(module.state_dict()) == [
        *(f"conv.{k}" for k in conv.state_dict()),
        *(f"bn.{k}" for k in bn.state_dict()),
    ]


# --- torch's machinery ---------------------------------------------------------------------------
def test_copies_are_equal_and_independent():
    module, x = make(), make_input()
    module(x)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), make()]
    twins[2].load_state_dict(module.state_dict())
    expected = module(x)
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin.bn.running_var, module.bn.running_var)
        assert twin.bn.running_var.data_ptr() != module.bn.running_var.data_ptr()


def test_no_grad_and_inference_mode():
    x = make_input()
    for context in (torch.no_grad, torch.inference_mode):
        module, expected = make(), make()
        with context():
            y = module(x)
        torch.testing.assert_close(y.clone(), expected(x).detach())
        assert not y.requires_grad
        assert torch.equal(module.bn.running_mean, expected.bn.running_mean)


def test_hooks_anomaly_mode_and_checkpoint():
    module, x = make(momentum=None), make_input()
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        module(x.clone().requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]

    plain, checkpointed = make().double(), make().double()
    a, b = x.double().requires_grad_(), x.double().requires_grad_()
    plain(a).square().sum().backward()
    checkpoint(checkpointed, b, use_reentrant=False).square().sum().backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("train", [True, False])
def test_compiles_without_graph_breaks(train):
    torch._dynamo.reset()
    module = make(activation="silu").train(train)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    assert_same(compiled, module, make_input(), rtol=1e-5, atol=1e-5)


def test_autocast_leaves_batch_norm_alone():
    module = make()
    dtypes = []
    module.bn.weight.register_hook(lambda g: dtypes.append(g.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(make_input(), torch.randn(3, 6, 7, 7))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert dtypes == [torch.float32]
    assert module.conv.weight.grad.dtype == torch.float32
    expected = make()(make_input())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded = tw.nn.ConvReLU2d.from_float(module.conv, module.bn)
        assert folded(make_input()).dtype == torch.bfloat16
        assert module.eval()(make_input()).dtype == torch.bfloat16
        torch.testing.assert_close(make()(make_input()).float(), expected, rtol=0.02, atol=0.03)
        assert make().double()(make_input().double()).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("train", [True, False])
def test_export(train):
    module, x = make().train(train), make_input()
    program = torch.export.export(copy.deepcopy(module), (x,)).run_decompositions()
    moved = set(program.graph_signature.buffers_to_mutate.values())
    names = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert moved == (names if train else set())
    assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize("arguments", [VARIANTS[k] for k in ("default", "cumulative", "same")])
@pytest.mark.parametrize("train", [True, False])
def test_torchscript(arguments, train):
    module, x, residual = make(**arguments).train(train), make_input(), torch.randn(3, 6, 7, 7)
    scripted = torch.jit.script(copy.deepcopy(module))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(loaded(x, residual), module(x, residual))
    for p, q in zip(loaded.buffers(), module.buffers(), strict=True):
        assert torch.equal(p, q)
    traced = torch.jit.trace(module.eval(), (x,))
    assert torch.equal(traced(x), module(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # stock raises it as well
def test_trace_in_training_takes_batches_of_any_size():
    module = make()
    traced = torch.jit.trace(copy.deepcopy(module), (make_input(),), check_trace=False)
    module(make_input())  # as tracing does
    x = make_input(n=5, size=11)
    assert torch.equal(traced(x), module(x))
    for p, q in zip(traced.buffers(), module.buffers(), strict=True):
        assert torch.equal(p, q)


# --- folded --------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_folded_module(arguments):
    module = make(**arguments)
    x = make_input()
    module(x)
    module.eval()
    if not module.bn.track_running_stats:
        with pytest.raises(ValueError, match="expected running statistics to fold, got None"):
            tw.nn.ConvReLU2d.from_float(module.conv, module.bn)
        return
    slope = {"activation": module.activation, "negative_slope": module.negative_slope}
    folded = tw.nn.ConvReLU2d.from_float(module.conv, module.bn, **slope)
    residual = torch.randn_like(module(x))
    torch.testing.assert_close(folded(x), module(x), rtol=1e-5, atol=1e-5)
    expected = module(x, residual)
    torch.testing.assert_close(folded(x, residual), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.jit.script(folded)(x), folded(x))
    assert not list(folded.parameters())


def test_folding_silent_channels_and_own_memory():
    conv, bn = nn.Conv2d(*LAYER, bias=True), nn.BatchNorm2d(6)
    nn.init.zeros_(bn.weight)
    bn.running_var.zero_()
    folded = tw.nn.ConvReLU2d.from_float(conv, bn, "identity")
    assert torch.equal(folded(make_input()), torch.zeros(3, 6, 5, 5))
    assert torch.equal(copy.deepcopy(folded).bias, torch.zeros(6))
    assert folded.weight.data_ptr() != conv.weight.data_ptr()


def test_folding_rounds_once():
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64)
    bn.running_mean.normal_(), bn.running_var.uniform_(0.01, 10)
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    folded = tw.nn.ConvReLU2d.from_float(conv, bn)
    with torch.no_grad():
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        shift = (conv.bias.double() - bn.running_mean.double()) * scale + bn.bias.double()
        exact = conv.weight.double() * scale[:, None, None, None], shift
    for ours, value in zip((folded.weight, folded.bias), exact, strict=True):
        half_a_unit = torch.exp2(value.abs().log2().floor() - 24)
        assert ((ours - value).abs() <= half_a_unit * (1 + 1e-6)).all()

import copy
import io
import pickle

import pytest
import torch
import torchweld as tw
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.reference import quantized_linear as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(n=21, k=37, bias=True, activation="identity", seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias)
    return linear, tw.nn.QuantizedLinear.from_float(linear, activation)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- from and to float ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_from_float(activation, bias):
    linear, module = make(bias=bias, activation=activation)
    x = randn(4, 5, 37)
    q, scale = tw.ops.quantize_weight(linear.weight)
    expected = reference.quantized_linear(x, q, scale, linear.bias, activation)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-6)
    stock = reference.ACTIVATIONS[activation](linear(x))
    assert reference.sqnr(module(x), stock) > 30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_float_keeps_dtype_and_mode(dtype):
    linear = nn.Linear(37, 21, dtype=dtype).eval()
    linear.bias.requires_grad_(False)
    module = tw.nn.QuantizedLinear.from_float(linear)
    assert module.bias.dtype == dtype
    assert not module.bias.requires_grad
    assert not module.training
    assert module.weight_scale.dtype == torch.float32
    assert module(randn(2, 37).to(dtype)).dtype == dtype


def test_from_float_shares_nothing():
    linear, module = make()
    x = randn(2, 37)
    before = module(x)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_sizes_of_zero_and_one(shape):
    n, k = shape
    linear = nn.Linear(1, 1)  # stock warns about the initialization of empty tensors
    linear.weight = nn.Parameter(torch.full((n, k), 0.5))
    linear.bias = nn.Parameter(torch.full((n,), 0.25))
    module = tw.nn.QuantizedLinear.from_float(linear)
    x = torch.ones(3, k)
    torch.testing.assert_close(module(x), linear(x))
    assert tw.nn.QuantizedLinear(k, n).load_state_dict(module.state_dict())


def test_from_float_refuses():
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="weight: expected finite"):
        tw.nn.QuantizedLinear.from_float(linear)
    with torch.no_grad():
        linear.weight[0, 0] = 0
        linear.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"linear\.bias: expected finite"):
        tw.nn.QuantizedLinear.from_float(linear)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        tw.nn.QuantizedLinear.from_float(nn.Linear(3, 2).double())
    with pytest.raises(ValueError, match="activation: expected one of identity"):
        tw.nn.QuantizedLinear.from_float(nn.Linear(3, 2), "tanh")


def test_constructor_refuses():
    with pytest.raises(ValueError, match=f"in_features: expected 0 to {2**24}, got"):
        tw.nn.QuantizedLinear(2**24 + 1, 1)
    with pytest.raises(ValueError, match="out_features: expected 0 or more, got -1"):
        tw.nn.QuantizedLinear(1, -1)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_to_float(activation):
    _, module = make(activation=activation)
    back = module.to_float()
    linear = back if activation == "identity" else back[0]
    expected = reference.dequantize(module.qweight(), module.weight_scale, torch.float32)
    assert torch.equal(linear.weight, expected)
    # Quantizing a quantized weight changes nothing.
    again = tw.nn.QuantizedLinear.from_float(linear)
    assert torch.equal(again.qweight(), module.qweight())
    x = randn(6, 37)
    assert reference.sqnr(module(x), back(x)) > 35


# --- state ---------------------------------------------------------------------------------------


def test_state_dict_is_canonical():
    _, module = make()
    state = module.state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {
        "qweight": (torch.int8, (21, 37)),
        "weight_scale": (torch.float32, (21,)),
        "bias": (torch.float32, (21,)),
    }


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    _, module = make()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    with torch.device("meta" if assign else "cpu"):
        other = tw.nn.QuantizedLinear(37, 21)
    result = other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(randn(3, 37)), module(randn(3, 37)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(21, 36, dtype=torch.int8)}, r"qweight: expected int8 \[21, 37\]"),
        ({"qweight": torch.zeros(21, 37)}, "qweight: expected int8.*got torch.float32"),
        ({"qweight": torch.full((21, 37), -128, dtype=torch.int8)}, r"qweight: .*got -128"),
        ({"weight_scale": torch.zeros(21)}, "weight_scale: expected positive.*zero"),
        ({"weight_scale": torch.full((21,), float("nan"))}, "weight_scale: .*non-finite"),
        ({"weight_scale": torch.ones(21).half()}, "weight_scale: .*got torch.float16"),
        ({"weight_scale": torch.ones(20)}, r"weight_scale: .*float32 \[21\], got .*\[20\]"),
        ({"weight": torch.ones(21, 37), "qweight": None}, "qweight: .*got one of a float layer"),
        ({"qweight": None}, r'Missing key.*"0\.qweight"'),
        ({"extra": torch.ones(1)}, r'Unexpected key.*"0\.extra"'),
    ],
)
def test_load_state_dict_refuses(change, message):
    _, module = make()
    model = nn.Sequential(module)
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(before)
    for key, value in change.items():
        if value is None:
            del state[f"0.{key}"]
        else:
            state[f"0.{key}"] = value
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        model.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_loading_reaches_every_holder_of_the_buffers():
    # In place, so that memory shared with another process sees it.
    _, module = make()
    packed = module.packed_weight
    _, other = make(seed=1)
    module.load_state_dict(other.state_dict())
    assert module.packed_weight is packed
    assert torch.equal(module(randn(3, 37)), other(randn(3, 37)))


@pytest.mark.parametrize(
    "copies", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(copies):
    _, module = make(activation="gelu")
    other = copies(module)
    assert torch.equal(other(randn(3, 37)), module(randn(3, 37)))
    other.packed_weight.zero_()
    assert module.qweight().any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_casting_the_module_keeps_scales_and_weight(dtype):
    _, module = make()
    scale = module.weight_scale.clone()
    qweight = module.qweight()
    assert module.to(dtype) is module
    assert module.bias.dtype == dtype
    assert torch.equal(module.weight_scale, scale)
    assert torch.equal(module.qweight(), qweight)
    assert module.weight_sum.dtype == torch.int32
    x = randn(3, 37)
    assert torch.equal(module(x), module(x.clone()))
    module.half().float()
    assert torch.equal(module.weight_scale, scale)
    assert module.type(dtype).bias.dtype == dtype  # casts every buffer, integers too
    assert torch.equal(module.qweight(), qweight)
    assert torch.equal(module(x), module(x.clone()))


def test_to_empty_and_meta():
    _, module = make()
    state = module.state_dict()
    module.to("meta").half()
    assert module(torch.empty(3, 37, device="meta")).shape == (3, 21)
    module.to_empty(device="cpu").float()
    module.load_state_dict(state)
    assert torch.equal(module(randn(3, 37)), make()[1](randn(3, 37)))


def test_loads_a_state_dict_without_data():
    _, module = make()
    state = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


# --- torch's machinery ---------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = make(24, 37, activation="gelu")[1]
        self.head = make(10, 24, bias=False)[1]

    def forward(self, x):
        return self.head(self.body(x))


def test_torch_compile_with_gradient():
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 5):
        x = randn(m, 37).requires_grad_()
        y = net(x)
        actual = compiled(x)
        assert torch.equal(actual, y)
        (expected,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(torch.autograd.grad(actual.sum(), x)[0], expected)


def test_torch_compile_inductor():
    net = Net()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(net, fullgraph=True)(randn(3, 37)), net(randn(3, 37))
        )


# torch 2.11 makes tensors over read-only bytes when it loads an archive.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_torch_export(tmp_path):
    net = Net()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (randn(3, 37),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(loaded(randn(7, 37)), net(randn(7, 37)))


@pytest.mark.parametrize("make_script", ["script", "trace"])
def test_torchscript(make_script, tmp_path):
    net = Net()
    x = randn(3, 37)
    scripted = torch.jit.script(net) if make_script == "script" else torch.jit.trace(net, x)
    torch.jit.save(scripted, tmp_path / "net.pt")
    loaded = torch.jit.load(tmp_path / "net.pt")
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(loaded(randn(2, 5, 37)), net(randn(2, 5, 37)))
    frozen = torch.jit.freeze(loaded.eval())
    assert torch.equal(frozen(x), net(x))
    with pytest.raises(RuntimeError, match=r"input: expected \[..., 37\], got \[3, 36\]"):
        loaded(randn(3, 36))


def test_autocast():
    net = Net()
    x = randn(3, 37)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert torch.equal(y, net(x.bfloat16()))
    assert net.body.weight_scale.dtype == torch.float32


def test_no_grad_and_inference_mode():
    net, x = Net(), randn(3, 37).requires_grad_()
    expected = net(x)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = net(x)
        assert not y.requires_grad
        assert torch.equal(y, expected)


def test_anomaly_mode_hooks_and_checkpoint():
    net, x = Net(), randn(3, 37).requires_grad_()
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    seen = []
    net.body.register_forward_hook(lambda *_: seen.append("forward"))
    net.body.register_full_backward_hook(lambda *_: seen.append("backward"))
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        (actual,) = torch.autograd.grad(net(x).sum(), x)
    assert torch.equal(actual, expected)
    assert seen == ["forward", "backward"]
    (actual,) = torch.autograd.grad(checkpoint(net, x, use_reentrant=False).sum(), x)
    assert torch.equal(actual, expected)


def test_the_bias_trains():
    linear, module = make()
    module(randn(5, 37)).sum().backward()
    torch.testing.assert_close(module.bias.grad, torch.full((21,), 5.0))
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert linear.bias.grad is None


def test_repr():
    assert repr(make(activation="relu")[1]) == (
        "QuantizedLinear(in_features=37, out_features=21, bias=True, activation='relu')"
    )

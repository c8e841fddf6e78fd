"""A packed linear layer is an nn.Linear, of whatever its weight has become."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn
from torchweld import _C

HAS_BFLOAT16 = _C.cpu_capability() == "avx512_bf16"


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(300, 70)


@pytest.fixture
def packed(linear):
    return tw.nn.PackedLinear.from_float(linear)


def check(module, shape=(5, 300)):
    x = torch.randn(*shape)
    expected = F.linear(x.double(), module.weight.double(), module.bias.double())
    with torch.no_grad():
        got = module(x)
    stock = F.linear(x, module.weight, module.bias)
    assert got.shape == stock.shape
    assert got.is_contiguous()
    error, stocks = ((y - expected).abs().max().item() for y in (got, stock))
    assert error <= 3 * stocks + 1e-6


@pytest.mark.parametrize("shape", [(300,), (1, 300), (5, 300), (2, 3, 7, 300), (0, 300), (64, 300)])
def test_shapes(packed, shape):
    if 0 not in shape:
        return check(packed, shape)
    with torch.no_grad():
        assert packed(torch.randn(*shape)).shape == (*shape[:-1], 70)


def test_the_packed_weight_is_in_use(packed):
    x = torch.randn(5, 300)
    with torch.no_grad():
        packed(x)
        assert packed.packed_weight.numel() > 0
        packed.packed_weight.zero_()
        assert packed(x).eq(packed.bias).all()


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_bfloat16(linear, rows):
    packed = tw.nn.PackedLinear.from_float(linear.bfloat16())
    x = torch.randn(rows, 300, dtype=torch.bfloat16)
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    with torch.no_grad():
        got, stock = packed(x), linear(x)
        assert got.dtype == torch.bfloat16
        error, stocks = ((y - expected).norm() for y in (got, stock))
        assert error <= 1.05 * stocks
        assert (packed.packed_weight.numel() > 0) == HAS_BFLOAT16
        if HAS_BFLOAT16:
            packed.packed_weight.zero_()
            assert packed(x).eq(packed.bias).all()
        wide = torch.randn(rows, 300)
        with pytest.raises(RuntimeError, match="dtype"):
            packed(wide)


def test_strided_input_and_no_bias():
    packed = tw.nn.PackedLinear.from_float(nn.Linear(64, 48, bias=False))
    x = torch.randn(64, 9).T
    with torch.no_grad():
        torch.testing.assert_close(packed(x), F.linear(x, packed.weight), atol=1e-5, rtol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours(packed):
    x = torch.randn(33, 300)
    with torch.no_grad():
        assert torch.equal(packed(x)[7], packed(x[7]))


def test_written_loaded_and_replaced(packed):
    check(packed)
    with torch.no_grad():
        packed.weight.mul_(-2)
    check(packed)
    packed.load_state_dict({k: 3 * v for k, v in packed.state_dict().items()})
    check(packed)
    packed.weight = nn.Parameter(torch.randn(70, 300))
    check(packed)
    assert set(packed.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_pack_their_own(packed, duplicate):
    check(packed)
    other = duplicate(packed)
    with torch.no_grad():
        other.weight.neg_()
    check(other)
    check(packed)


def test_gradients_autocast_and_other_dtypes_are_stock(packed, linear):
    x = torch.randn(4, 300, requires_grad=True)
    ours, theirs = (torch.autograd.grad(m(x).sum(), (x, m.weight)) for m in (packed, linear))
    assert all(map(torch.equal, ours, theirs))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), linear(x))
    double = copy.deepcopy(packed).double()
    assert torch.equal(double(x.double()), F.linear(x.double(), double.weight, double.bias))


def test_a_wrong_size_is_torchs_error(packed):
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        packed(torch.randn(4, 301))


def test_torchscript_and_export(packed):
    x = torch.randn(6, 300)
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(packed.eval(), x))  # its first call
        expected = packed(x)
        assert "conv_relu_pack" not in str(traced.graph)
        assert "torchweld::conv_relu" in str(traced.graph)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        other = torch.randn(2, 3, 300)
        for module in (traced, torch.jit.load(file)):
            assert torch.equal(module(x), expected)
            with pytest.raises(RuntimeError):
                module(torch.randn(6, 150))
        assert torch.equal(traced(other.view(6, 300)).view(2, 3, 70), packed(other))
        exported = torch.export.export(packed, (x,)).module()
        torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "renew",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: (m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}), m)[1],
    ],
    ids=["copy", "pickle", "load"],
)
def test_tracing_what_has_to_be_packed_again(packed, renew):
    module, x = renew(packed.eval()), torch.randn(4, 300)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "conv_relu_pack" not in str(traced.graph)
        assert torch.equal(traced(x), module(x))
    check(module)


def test_what_transforms_functions_gets_torchs_product(packed, linear):
    x, tangent = torch.randn(4, 300), torch.randn(4, 300)
    fresh = copy.deepcopy(packed).requires_grad_(False)
    linear.requires_grad_(False)
    for module in (fresh, packed.requires_grad_(False)):
        ours = torch.func.jvp(module, (x,), (tangent,))
        theirs = torch.func.jvp(linear, (x,), (tangent,))
        assert all(map(torch.equal, ours, theirs))
        check(module)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        assert torch.autograd.forward_ad.unpack_dual(packed(dual)).tangent is not None


def test_other_tensors_are_torchs_affair(packed, linear):
    x = torch.randn(4, 300)
    with torch.no_grad():
        assert torch.equal(packed(x.to_sparse()), linear(x.to_sparse()))
        assert torch.equal(torch.jit.script(packed)(x), linear(x))
    assert "linear" in str(torch.fx.symbolic_trace(packed).graph)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert packed(mode.from_tensor(x)).shape == (4, 70)


def test_loading_where_torch_swaps_tensors(packed):
    check(packed)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        packed.load_state_dict({k: 2 * v for k, v in packed.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    check(packed)


def test_from_float_takes_nn_linear_alone(packed):
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got PackedLinear"):
        tw.nn.PackedLinear.from_float(packed)
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got Conv2d"):
        tw.nn.PackedLinear.from_float(nn.Conv2d(1, 1, 1))


def make_model():
    torch.manual_seed(0)
    large, small = nn.Linear(512, 512), nn.Linear(512, 10)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 512),
        nn.ReLU(), large, nn.ReLU(), small,
    ).eval()  # fmt: skip


def test_snapshots_pack_their_large_layers():
    model = make_model()
    snapshot = tw.weld(model, inference=True)
    kinds = [type(m) for m in snapshot if isinstance(m, nn.Linear)]
    assert kinds == [nn.Linear, tw.nn.PackedLinear, nn.Linear]
    assert [type(m) for m in model if isinstance(m, nn.Linear)] == [nn.Linear] * 3
    x = torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(snapshot(x), model(x), atol=1e-5, rtol=1e-4)
        assert snapshot[6].packed_weight.numel() > 0
    assert snapshot.state_dict().keys() == tw.weld(model, inference=True).state_dict().keys()
    assert all(type(m) is not tw.nn.PackedLinear for m in tw.weld(model))


def test_hooks_and_subclasses_stay():
    calls = []
    model = make_model()
    model[6].register_forward_hook(lambda *_: calls.append(1))
    snapshot = tw.weld(model, inference=True)
    with torch.no_grad():
        snapshot(torch.randn(1, 3, 4, 4))
    assert calls == [1]

    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(512, 512))
    assert type(tw.weld(model, inference=True)[0]) is Mine


def test_a_snapshot_can_be_quantized():
    snapshot = tw.weld(make_model(), inference=True)
    quantized = tw.quantize(snapshot, tw.Int8())
    assert type(quantized[6]) is tw.nn.QuantizedLinear

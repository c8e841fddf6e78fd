"""Training a layer as it will run: the bits of the deployed layer, straight-through gradients."""

import copy
import pickle

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.nn.kinds import KINDS, converted, input_seen, randn, weight_of
from tests.reference import quantized_linear as reference

each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, n=21, k=37, bias=True, activation="identity"):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias)
    return linear, tw.nn.QATLinear.from_float(linear, activation, *KINDS[kind])


@each_kind
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_forward_has_the_bits_of_the_deployed_layer(kind, activation):
    linear, module = make(kind, activation=activation)
    x, residual = randn(5, 37), randn(5, 21)
    for expected in (converted(kind, linear, activation), module.deployed()):
        assert torch.equal(module(x, residual), expected(x, residual))
        assert torch.equal(module(x.bfloat16()), expected(x.bfloat16()))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), expected(x))


@each_kind
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_straight_through_gradients(kind, activation):
    _, module = make(kind, activation=activation)
    x, residual = randn(2, 5, 37).requires_grad_(), randn(2, 5, 21).requires_grad_()
    weights = randn(2, 5, 21)
    (module(x, residual) * weights).sum().backward()

    # Leaves with the rounded values: rounding is the identity to their gradients.
    state = module.deployed().state_dict()
    weight = weight_of(kind, state).requires_grad_()
    seen = input_seen(kind, x.detach()).requires_grad_()
    bias = state["bias"].double().requires_grad_()
    y = reference.ACTIVATIONS[activation](seen @ weight.T + bias)
    (y * weights).sum().backward()
    for ours, theirs in (
        (x.grad, seen.grad),
        (module.weight.grad, weight.grad),
        (module.bias.grad, bias.grad),
        (residual.grad, weights),
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_dtypes_of_their_tensors(dtype):
    module = tw.nn.QATLinear(37, 21, dtype=dtype)
    x = randn(37).requires_grad_()  # a row alone
    module(x.bfloat16()).sum().backward()
    assert x.grad.dtype == torch.float32
    assert module.weight.grad.dtype == module.bias.grad.dtype == dtype


def test_wins_back_what_rounding_costs():
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    target = torch.relu(x @ torch.randn(32, 48) / 6) @ torch.randn(48, 4) / 6

    def loss_of(model):
        return nn.functional.mse_loss(model(x), target)

    def train(model, lr):
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for _ in range(100):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    stock = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 4))
    train(stock, 1e-2)
    config = tw.Int4(group_size=32)
    rounded = tw.quantize(stock, config, keep_small=False)
    model = tw.prepare_qat(stock, config, keep_small=False)
    assert loss_of(model) == loss_of(rounded)
    train(model, 1e-3)
    deployed = tw.quantize(model)
    assert type(deployed[0]) is tw.nn.Int4Linear
    assert torch.equal(deployed(x), model(x))
    assert loss_of(deployed) < 0.8 * loss_of(rounded)


@each_kind
def test_state_copies_and_float(kind):
    linear, module = make(kind, activation="silu")
    x = randn(3, 37)
    assert isinstance(module, nn.Linear)
    assert set(module.state_dict()) == set(linear.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    back = module.to_float()
    assert torch.equal(back[0].weight, linear.weight)
    assert torch.equal(back[0].bias, linear.bias)
    back[0].weight.data.zero_()
    assert module.weight.any()


def test_to_float_of_what_diverged_and_is_frozen():
    _, module = make("int8")
    with torch.no_grad():
        module.weight.fill_(float("inf"))
    back = module.requires_grad_(False).to_float()
    assert back.weight.isinf().all()
    assert not any(p.requires_grad for p in back.parameters())


def test_trains_what_the_float_layer_trains():
    linear = nn.Linear(37, 21).eval()
    linear.weight.requires_grad_(False)
    module = tw.nn.QATLinear.from_float(linear)
    module(randn(2, 37)).sum().backward()
    assert module.weight.grad is None
    assert module.bias.grad is not None
    assert not module.training
    assert "kind=QuantizedLinear, input_group_size=4" in repr(
        tw.nn.QATLinear(8, 8, options={"input_group_size": 4})
    )


def test_compiled():
    _, module = make("int8")
    x = randn(3, 37)
    assert torch.equal(torch.compile(module, backend="eager")(x), module(x))


def test_refuses():
    with pytest.raises(TypeError, match=r"kind: expected one of QuantizedLinear, .*got .*Linear"):
        tw.nn.QATLinear(8, 8, kind=nn.Linear)
    with pytest.raises(ValueError, match=r"group_size: expected .*, got 12"):
        tw.nn.QATLinear(64, 8, kind=tw.nn.Int4Linear, options={"group_size": 12})
    module = tw.nn.QATLinear(8, 8)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite"):
        module(randn(2, 8))
    module = tw.nn.QATLinear(8, 8)
    x = randn(2, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated once, got a second derivative"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)

"""Layers with an integer weight: from and to float."""

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.nn.kinds import KINDS, SQNR, converted, empty, expected, make, randn, weight_of
from tests.reference import quantized_linear as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_from_float(kind, activation, bias):
    linear, module = make(kind, 24, 96, bias, activation)
    x, residual = randn(4, 5, 96), randn(4, 5, 24)
    state = module.state_dict()
    for r in (None, residual):
        y = expected(kind, state, x, activation, r)
        torch.testing.assert_close(module(x, r).double(), y, rtol=1e-5, atol=2e-6)
    stock = reference.ACTIVATIONS[activation](linear(x))
    assert reference.sqnr(module(x), stock) > SQNR[kind] - 3


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_float_keeps_dtype_and_mode(kind, dtype):
    linear = nn.Linear(37, 21, dtype=dtype).eval()
    linear.bias.requires_grad_(False)
    module = converted(kind, linear)
    assert module.bias.dtype == dtype
    assert not module.bias.requires_grad
    assert not module.training
    assert module(randn(2, 37).to(dtype)).dtype == dtype


@each_kind
def test_from_float_shares_nothing(kind):
    linear, module = make(kind)
    x = randn(2, 37)
    before = module(x)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(module(x), before)


@each_kind
def test_from_float_of_a_weight_made_in_inference_mode(kind):
    with torch.inference_mode():
        linear = nn.Linear(37, 21)
    module = converted(kind, linear)
    assert not any(buffer.requires_grad for buffer in module.buffers())
    assert reference.sqnr(module(randn(3, 37)), linear(randn(3, 37))) > SQNR[kind] - 3


@each_kind
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_sizes_of_zero_and_one(kind, shape):
    n, k = shape
    linear = nn.Linear(1, 1)  # stock warns about the initialization of empty tensors
    linear.weight = nn.Parameter(torch.full((n, k), 0.5))
    linear.bias = nn.Parameter(torch.full((n,), 0.25))
    module = converted(kind, linear)
    x = torch.ones(3, k)
    torch.testing.assert_close(module(x), linear(x), rtol=0.01, atol=0.01)
    assert empty(kind, n, k).load_state_dict(module.state_dict())


@each_kind
def test_from_float_refuses(kind):
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="weight: expected finite"):
        converted(kind, linear)
    with torch.no_grad():
        linear.weight[0, 0] = 0
        linear.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"linear\.bias: expected finite"):
        converted(kind, linear)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        converted(kind, nn.Linear(3, 2).double())
    with pytest.raises(ValueError, match="activation: expected one of identity"):
        converted(kind, nn.Linear(3, 2), "tanh")
    with pytest.raises(ValueError, match=r"weight: expected floating point \[out_features, in"):
        converted(kind, nn.Conv2d(3, 2, 1))


@each_kind
def test_constructor_refuses(kind):
    with pytest.raises(ValueError, match="out_features: expected 0 or more, got -1"):
        empty(kind, -1, 1)
    with pytest.raises(ValueError, match=r"in_features: expected 0 .*, got -1"):
        empty(kind, 1, -1)


@pytest.mark.parametrize("size", [-128, 3, 12, 1 << 20, 64.0, "64"])
def test_absurd_groups(size):
    with pytest.raises(ValueError, match=f"Int4Linear: group_size: expected .*, got {size!r}"):
        tw.nn.Int4Linear(256, 128, group_size=size)
    if size not in (12, 1 << 20):
        with pytest.raises(ValueError, match=f"input_group_size: expected 0, .*, got {size!r}"):
            tw.nn.QuantizedLinear(256, 128, input_group_size=size)


@each_kind
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_to_float(kind, activation):
    _, module = make(kind, 24, 96, activation=activation)
    back = module.to_float()
    linear = back if activation == "identity" else back[0]
    assert torch.equal(linear.weight, weight_of(kind, module.state_dict(), 96).float())
    assert torch.equal(linear.weight, module.weight())
    # Quantizing a quantized weight changes nothing.
    again = converted(kind, linear).state_dict()
    torch.testing.assert_close(
        weight_of(kind, again, 96), weight_of(kind, module.state_dict(), 96), rtol=1e-2, atol=0
    )
    x = randn(6, 96)
    assert reference.sqnr(module(x), back(x)) > 35


OPS = {"weight only": "weight_only_linear", "int4": "quantized_linear_int4"}


@each_kind
def test_bad_input(kind):
    _, module = make(kind)
    op = OPS.get(kind, "quantized_linear")
    for arguments, message in [
        ([randn(3, 36)], r"input: expected \[..., 37\], got \[3, 36\]"),
        ([torch.tensor(1.0)], r"input: expected \[..., 37\], got \[\]"),
        ([randn(3, 37).double()], "input: expected float32, bfloat16 or float16, got float64"),
        ([torch.ones(3, 37, dtype=torch.int64)], "input: expected float32, .*, got int64"),
        ([randn(3, 37), randn(3, 20)], r"residual: expected .*, got .*\[3, 20\]"),
        ([randn(3, 37), torch.ones(3, 21, dtype=torch.int32)], "residual: expected .*, got int32"),
    ]:
        with pytest.raises(RuntimeError, match=f"torchweld::{op}: {message}"):
            module(*arguments)


@each_kind
def test_tensors_of_another_layout_are_refused(kind):
    _, module = make(kind)
    module.packed_weight = module.packed_weight.flatten(2)
    with pytest.raises(RuntimeError, match=r"packed_weight: expected contiguous u?int8"):
        module(randn(3, 37))


def test_from_integers():
    _, module = make("int8", activation="gelu")
    arguments = (module.qweight(), module.weight_scale, module.bias, "gelu")
    x = randn(3, 37)
    assert torch.equal(tw.nn.QuantizedLinear.from_integers(*arguments)(x), module(x))
    only = tw.nn.WeightOnlyLinear.from_integers(*arguments)
    assert only.weight_scale.data_ptr() != module.weight_scale.data_ptr()
    assert only.bias.data_ptr() != module.bias.data_ptr()
    assert torch.equal(only(x), make("weight only", activation="gelu")[1](x))
    with pytest.raises(ValueError, match=r"from_integers: qweight: .*got -128"):
        tw.nn.QuantizedLinear.from_integers(
            torch.full((2, 3), -128, dtype=torch.int8), torch.ones(2)
        )
    with pytest.raises(ValueError, match=r"from_integers: weight_scale: .*got torch.float32 \[3\]"):
        tw.nn.QuantizedLinear.from_integers(torch.ones(2, 3, dtype=torch.int8), torch.ones(3))

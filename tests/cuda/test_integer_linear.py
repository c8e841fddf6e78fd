"""What all linear layers with an integer weight have in common, on a GPU."""

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.ops.int8_layer import randn

DEVICE = "cuda"
every_kind = pytest.mark.parametrize(
    ("kind", "options"),
    [
        (tw.nn.QuantizedLinear, {}),
        (tw.nn.WeightOnlyLinear, {}),
        (tw.nn.Int4Linear, {"group_size": 32}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)


@every_kind
def test_compiled_with_gradient(kind, options):
    layer = kind.from_float(nn.Linear(64, 48), "gelu", **options).to(DEVICE)
    x = randn(20, 64).to(DEVICE).requires_grad_()
    expected = layer(x)
    expected.sum().backward()
    grad, x.grad = x.grad, None
    got = torch.compile(layer, fullgraph=True)(x)
    got.sum().backward()
    assert torch.equal(got, expected)
    torch.testing.assert_close(x.grad, grad)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, options, dtype):
    layer = kind.from_float(nn.Linear(64, 48), **options).to(DEVICE)
    x = randn(20, 64).to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        got = layer(x)
    assert torch.equal(got, layer(x.to(dtype)))

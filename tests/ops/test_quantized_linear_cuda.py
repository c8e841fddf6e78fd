"""What the int8 linear layer on CUDA does that no GPU is needed for: shapes, dtypes, refusals."""

import pytest
import torch
import torchweld as tw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.int8_layer import accumulators, backward, op


def weight(n=19, k=40, device="cuda"):
    packed = torch.empty(-(-n // 16), -(-k // 4), 16, 4, dtype=torch.int8, device=device)
    scale = torch.empty(n, device=device)
    return packed, scale, torch.empty(-(-n // 16) * 16, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_on_the_device(dtype):
    with FakeTensorMode():
        x = torch.empty(2, 5, 40, dtype=dtype, device="cuda")
        y = op(x, *weight(), None, None, 40)
        sums, scale = accumulators(x, *weight(), 40)
        grad = backward(y, *weight()[:2], 40)
        for tensor, shape in (
            (y, (2, 5, 19)),
            (sums, (2, 5, 19)),
            (scale, (2, 5)),
            (grad, x.shape),
        ):
            assert tensor.device.type == "cuda"
            assert tensor.shape == shape
        assert (y.dtype, sums.dtype, grad.dtype) == (dtype, torch.int32, dtype)


def test_tensors_of_two_devices_are_refused():
    with FakeTensorMode():
        x = torch.empty(5, 40, device="cuda")
        with pytest.raises(RuntimeError, match="packed_weight: expected a tensor on cuda"):
            op(x, *weight(device="cpu"), None, None, 40)


def test_module_moves():
    layer = tw.nn.QuantizedLinear(40, 19, device="meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.to_empty(device="cuda")
        with torch.no_grad():  # autograd asks for a GPU even here
            assert layer(torch.empty(5, 40, device="cuda")).device.type == "cuda"
        assert {t.device.type for t in layer.buffers()} == {"cuda"}


def test_autocast():
    # The context manager does nothing without a GPU.
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            x = torch.empty(5, 40, device="cuda")
            y = op(x, *weight(), None, None, 40)
            assert y.dtype == torch.get_autocast_dtype("cuda") == torch.float16
            assert backward(y.float(), *weight()[:2], 40).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_a_layer_on_a_device_without_kernels_stays():
    model = nn.Linear(256, 128, device="meta")
    converted = tw.quantize(model)
    assert type(converted) is nn.Linear
    (row,) = tw.report(converted)
    assert "weight is on meta, where QuantizedLinear does not run" in str(row)


def test_scales_are_divided_by_a_tensor():
    # On CUDA, division by a number is multiplication by its inverse, and 1 / 127 is not exact.
    absmax = torch.rand(1000) * 10
    inverse = torch.tensor(1 / 127, dtype=torch.float32)
    scale = tw.ops.quantize_weight(absmax[:, None])[1]
    assert torch.equal(scale, absmax / 127)
    assert not torch.equal(scale, absmax * inverse)

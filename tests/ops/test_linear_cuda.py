"""What int4 and weight-only layers do on CUDA that needs no GPU: shapes, dtypes, refusals."""

import pytest
import torch
import torchweld as tw
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops import int4_layer
from tests.ops.test_weight_only_linear import op as weight_only

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def int4_weight(n=19, k=40, group_size=16, device="cuda"):
    panels, groups = -(-n // 16), -(-k // group_size)
    packed = torch.empty(panels, groups * group_size // 8, 16, 4, dtype=torch.uint8, device=device)
    scale = torch.empty(panels, groups, 16, dtype=torch.bfloat16, device=device)
    return packed, scale, torch.empty(panels, groups, 16, dtype=torch.uint8, device=device)


def int8_weight(n=19, k=40, device="cuda"):
    packed = torch.empty(-(-n // 16), -(-k // 4), 16, 4, dtype=torch.int8, device=device)
    return packed, torch.empty(n, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_on_the_device(dtype):
    with FakeTensorMode():
        x = torch.empty(2, 5, 40, dtype=dtype, device="cuda")
        y = int4_layer.op(x, *int4_weight(), None, None, 40, 19)
        sums, scale = int4_layer.accumulators(x, *int4_weight(), 40, 19)
        grad = int4_layer.backward(y, *int4_weight(), 40, 19)
        z = weight_only(x, *int8_weight(), None, None, 40)
        results = [(y, (2, 5, 19)), (sums, (2, 5, 3, 19)), (scale, (2, 5)), (grad, x.shape)]
        for tensor, shape in (*results, (z, (2, 5, 19))):
            assert tensor.device.type == "cuda"
            assert tensor.shape == shape
        dtypes = (y.dtype, sums.dtype, scale.dtype, grad.dtype, z.dtype)
        assert dtypes == (dtype, torch.int32, torch.float32, dtype, dtype)


def test_tensors_of_two_devices_are_refused():
    with FakeTensorMode():
        x = torch.empty(5, 40, device="cuda")
        with pytest.raises(RuntimeError, match="packed_weight: expected a tensor on cuda"):
            int4_layer.op(x, *int4_weight(device="cpu"), None, None, 40, 19)
        with pytest.raises(RuntimeError, match="packed_weight: expected a tensor on cuda"):
            weight_only(x, *int8_weight(device="cpu"), None, None, 40)


@pytest.mark.parametrize("kind", [tw.nn.Int4Linear, tw.nn.WeightOnlyLinear])
def test_module_moves(kind):
    layer = kind(40, 19, device="meta")
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
            dtype = torch.get_autocast_dtype("cuda")
            assert int4_layer.op(x, *int4_weight(), None, None, 40, 19).dtype == dtype
            assert weight_only(x, *int8_weight(), None, None, 40).dtype == dtype
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_scales_are_divided_by_a_tensor():
    # On CUDA, division by a number is multiplication by its inverse, and 1 / 15 is not exact.
    high = torch.rand(1000) * 10
    scale = tw.ops.quantize_weight_int4(high[:, None], 8)[1]
    assert torch.equal(scale[:, 0], (high / 15).bfloat16())

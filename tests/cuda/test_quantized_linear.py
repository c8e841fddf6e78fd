"""The int8 linear layer on a GPU: the bits of the CPU's, in any memory, stream or graph."""

import copy
import re

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.ops.int8_layer import ACTIVATIONS, DTYPES, SHAPES, Weight, backward, randn
from tests.reference import quantized_linear as reference
from tests.tolerances import ROUNDOFF

DEVICE = "cuda"

# Every kernel: rows quantized on the way, few rows, small tiles, large tiles.
ROWS = [1, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 200]
# What TORCHWELD_CUDA_LINEAR_PATH may say, see csrc/kernels/cuda/linear_path.h.
PATHS = ["few_rows", "small_tiles", "large_tiles", "warpgroups", "wide_warpgroups"]
HAS_WGMMA = (
    torch.cuda.is_available()
    and torch.cuda.get_device_capability() == (9, 0)
    and "90a" in tw.info()["cuda architectures"]
)
LARGE = [(4096, 4100, 260), (129, 11008, 4096), (1, 4096, 4096), (32, 4096, 11008)]


def assert_equal(on_device: torch.Tensor, on_cpu: torch.Tensor) -> None:
    """The same bits, but for those of a NaN."""
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=0, atol=0, equal_nan=True)


# --- the bits of the CPU --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES + [(m, 67, 200) for m in ROWS] + LARGE, ids=str)
def test_sums_and_scales(shape):
    m, n, k = shape
    layer, x = Weight(n, k), randn(m, k)
    for mine, expected in zip(
        layer.to(DEVICE).accumulators(x.to(DEVICE)), layer.accumulators(x), strict=True
    ):
        assert_equal(mine, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [0, 4, 32, 64, 100, 128])
def test_output(dtype, activation, group_size):
    layer = Weight(67, 200)
    on_device = layer.to(DEVICE)
    for m in ROWS:
        x, residual = 3 * randn(m, 200, dtype=dtype), randn(m, 67, dtype=dtype, seed=2)
        expected = layer(x, activation, residual, group_size)
        assert_equal(on_device(x.to(DEVICE), activation, residual.to(DEVICE), group_size), expected)


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_of_any_size(shape, dtype):
    m, n, k = shape
    layer, x = Weight(n, k), randn(m, k, dtype=dtype)
    assert_equal(layer.to(DEVICE)(x.to(DEVICE)), layer(x))


def force(monkeypatch, path):
    if "warpgroups" in path and not HAS_WGMMA:
        pytest.skip("needs compute capability 9.0, and a build with sm_90a")
    monkeypatch.setenv("TORCHWELD_CUDA_LINEAR_PATH", path)


# A product of one tile, of many with edges on all sides, and of so few that K is split.
FORCED = [(17, 33, 68), (32, 129, 1030), (300, 261, 1100), (1030, 1030, 515), (130, 64, 9000)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", FORCED, ids=str)
def test_output_and_sums_of_every_path(path, shape, monkeypatch):
    m, n, k = shape
    m = min(m, 32) if path == "few_rows" else m
    layer, x = Weight(n, k), randn(m, k, dtype=torch.bfloat16)
    residual = randn(m, n, dtype=torch.bfloat16, seed=2)
    expected, sums = layer(x, "gelu", residual), layer.accumulators(x)
    force(monkeypatch, path)
    on_device = layer.to(DEVICE)
    for _ in range(3):  # what is not ordered may go well once
        assert_equal(on_device(x.to(DEVICE), "gelu", residual.to(DEVICE)), expected)
        for mine, of_cpu in zip(on_device.accumulators(x.to(DEVICE)), sums, strict=True):
            assert_equal(mine, of_cpu)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_in_a_graph(path, monkeypatch, graph):
    force(monkeypatch, path)
    layer, x = Weight(96, 2048).to(DEVICE), randn(32, 2048).to(DEVICE)
    assert torch.equal(graph(lambda: layer(x))(), layer(x))


def test_a_path_that_does_not_fit_is_refused(monkeypatch):
    layer, x = Weight(96, 64).to(DEVICE), randn(33, 64).to(DEVICE)
    for name in ("few_rows", "fastest"):
        monkeypatch.setenv("TORCHWELD_CUDA_LINEAR_PATH", name)
        with pytest.raises(RuntimeError, match=re.escape(f'33 rows on this device, got "{name}"')):
            layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bias_and_residual_of_any_dtype(dtype):
    layer, x = Weight(19, 40), randn(5, 40, dtype=torch.bfloat16)
    residual = randn(5, 19, dtype=dtype, seed=2)
    layer.bias = layer.bias.to(dtype)
    expected = layer(x, residual=residual)
    assert_equal(layer.to(DEVICE)(x.to(DEVICE), residual=residual.to(DEVICE)), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [3, 20, 70])
def test_a_bad_value_spoils_its_row_only(bad, m):
    layer, x = Weight(19, 40), randn(m, 40)
    x[1, 39] = bad
    assert_equal(layer.to(DEVICE)(x.to(DEVICE), "gelu"), layer(x, "gelu"))


@pytest.mark.parametrize("m", [1, 2, 40])
def test_sums_that_int32_does_not_hold(m):
    layer, x = Weight(3, 140_000), torch.ones(m, 140_000)
    layer.q.fill_(127)
    layer.packed, layer.sum = tw.ops.pack_weight(layer.q)
    assert_equal(layer.to(DEVICE)(x.to(DEVICE)), layer(x))


def test_does_not_depend_on_the_batch():
    layer, x = Weight(67, 300).to(DEVICE), randn(200, 300).to(DEVICE)
    together = layer(x)
    for m in ROWS:
        assert torch.equal(layer(x[:m]), together[:m])


def misaligned(x):
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize(
    "layout",
    [misaligned, lambda x: x.mT.contiguous().mT, lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]],
)
@pytest.mark.parametrize("m", [2, 12, 70])
def test_memory_of_any_layout(layout, m):
    layer, x = Weight(37, 70), randn(m, 70, dtype=torch.bfloat16)
    residual = randn(m, 37, dtype=torch.bfloat16, seed=2)
    expected, on_device = layer(x, "silu", residual), layer.to(DEVICE)
    on_device.packed = misaligned(on_device.packed)
    on_device.scale, on_device.bias = misaligned(on_device.scale), misaligned(on_device.bias)
    got = on_device(layout(x.to(DEVICE)), "silu", layout(residual.to(DEVICE)))
    assert_equal(got, expected)


def test_leading_dimensions():
    layer, x = Weight(37, 70), randn(2, 3, 5, 70).transpose(0, 2)
    assert_equal(layer.to(DEVICE)(x.to(DEVICE)), layer(x))
    assert_equal(layer.to(DEVICE)(x[0, 0, 0].to(DEVICE)), layer(x[0, 0, 0]))


def test_past_2_to_31_elements():
    m, k = 2**20 + 3, 2**11 + 8
    if torch.cuda.mem_get_info()[0] < 8 * m * k:
        pytest.skip("needs 17 GB of GPU memory")
    layer = Weight(17, k).to(DEVICE)
    x = torch.zeros(m, k, dtype=torch.bfloat16, device=DEVICE)
    x[-3:] = randn(3, k).to(DEVICE)
    assert torch.equal(layer(x)[-3:], layer(x[-3:].clone()))


# --- gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (200, 300, 130), (1024, 4096, 1000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(shape, dtype):
    m, n, k = shape
    layer, grad = Weight(n, k), randn(m, n, dtype=dtype)
    on_device = layer.to(DEVICE)
    got = backward(grad.to(DEVICE), on_device.packed, on_device.scale, k)
    assert got.dtype == dtype
    assert got.shape == (m, k)
    if got.numel() == 0:
        return
    terms = layer.q.double() * layer.scale.double()[:, None]
    expected, magnitude = grad.double() @ terms, grad.double().abs() @ terms.abs()
    # Float32 sums of what 24 bits, or 16 of a 16-bit gradient, keep; then one rounding.
    kept = 2.0**-21 if dtype == torch.float32 else 2.0**-17
    tolerance = ROUNDOFF[dtype] * expected.abs() + kept * magnitude
    assert ((got.cpu().double() - expected).abs() <= tolerance).all()


def test_gradients_of_input_bias_and_residual():
    layer = Weight(37, 70)
    x, residual, g = randn(6, 70), randn(6, 37, seed=2), randn(6, 37, seed=3)

    def gradients(device):
        of = layer.to(device)
        of.bias.requires_grad_()
        inputs = [t.to(device).requires_grad_() for t in (x, residual)]
        output = of(inputs[0], "gelu", inputs[1])
        return torch.autograd.grad(output, (*inputs, of.bias), g.to(device))

    for mine, expected in zip(gradients(DEVICE), gradients("cpu"), strict=True):
        torch.testing.assert_close(mine.cpu(), expected)


# --- streams, graphs, torch's machinery -----------------------------------------------------------


@pytest.mark.parametrize("m", [1, 20, 200])
def test_on_a_side_stream(m):
    layer, x = Weight(67, 200), randn(m, 200)
    on_device, on_gpu = layer.to(DEVICE), x.to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_device(on_gpu.mul_(1))  # what loads kernels may wait
        torch.cuda._sleep(20_000_000)
        on_gpu.mul_(2)  # before the product, or its result is another
        output = on_device(on_gpu)
        assert not stream.query(), "the call waits for nothing"
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(output, layer(2 * x))


@pytest.mark.parametrize("m", [1, 20, 200])
@pytest.mark.parametrize("group_size", [0, 32])
def test_capture_in_a_graph(m, group_size):
    layer, x = Weight(67, 200), randn(m, 200)
    on_device, on_gpu = layer.to(DEVICE), torch.zeros(m, 200, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = on_device(on_gpu, "relu", group_size=group_size)
        grad = backward(output, on_device.packed, on_device.scale, 200)
    on_gpu.copy_(x)
    graph.replay()
    assert_equal(output, layer(x, "relu", group_size=group_size))
    assert torch.equal(grad, backward(output, on_device.packed, on_device.scale, 200))


def test_operator_checks():
    layer = Weight(19, 40).to(DEVICE)
    x = randn(5, 40).to(DEVICE).requires_grad_()
    weight = layer.packed, layer.scale, layer.sum
    ops = torch.ops.torchweld
    torch.library.opcheck(ops.quantized_linear.default, (x, *weight, layer.bias, None, 40, "silu"))
    torch.library.opcheck(ops.quantized_linear_accumulators.default, (x.detach(), *weight, 40))
    grad = randn(5, 19).to(DEVICE)
    torch.library.opcheck(ops.quantized_linear_backward.default, (grad, *weight[:2], 40))


@pytest.mark.parametrize("place", ["input", "packed_weight", "weight_scale", "bias", "residual"])
def test_tensors_elsewhere_are_refused(place):
    layer, tensors = Weight(19, 40), {"input": randn(5, 40), "residual": randn(5, 19)}
    tensors |= {"packed_weight": layer.packed, "weight_scale": layer.scale, "bias": layer.bias}
    tensors |= {"weight_sum": layer.sum}
    tensors = {name: x if name == place else x.to(DEVICE) for name, x in tensors.items()}
    with pytest.raises(RuntimeError, match=rf"quantized_linear: {place}: expected a tensor on"):
        torch.ops.torchweld.quantized_linear(**tensors, in_features=40)


# --- modules --------------------------------------------------------------------------------------


def test_module_moves_there_and_back():
    model = tw.quantize(
        nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)), tw.Int8()
    )
    x = randn(9, 256)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    model.to(DEVICE)
    assert_equal(model(x.to(DEVICE)), expected)
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, state[name])
    other = copy.deepcopy(model).cpu()
    assert torch.equal(other(x), expected)
    model.load_state_dict(other.state_dict())
    assert_equal(model(x.to(DEVICE)), expected)
    assert torch.equal(model.cpu()(x), expected)


@pytest.mark.parametrize("config", [tw.Int8(), tw.Int8(input_group_size=32)])
def test_quantize_a_model_on_the_device(config):
    model, x = nn.Linear(256, 128), randn(9, 256)
    expected = tw.quantize(model, config)
    on_device = tw.quantize(copy.deepcopy(model).to(DEVICE), config, example_inputs=x.to(DEVICE))
    assert type(on_device) is tw.nn.QuantizedLinear
    for name, tensor in on_device.state_dict().items():
        assert tensor.is_cuda
        assert_equal(tensor, expected.state_dict()[name])
    assert_equal(on_device(x.to(DEVICE)), expected(x))
    assert reference.sqnr(on_device(x.to(DEVICE)).cpu(), model(x)) > 30


def test_trains_for_it():
    layer = tw.prepare_qat(nn.Linear(256, 128).to(DEVICE), tw.Int8())
    x = randn(9, 256).to(DEVICE)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert torch.equal(tw.quantize(layer)(x), layer(x))

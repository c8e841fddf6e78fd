"""The int4 linear layer on a GPU: the bits of the CPU's, in any memory, stream or graph."""

import copy

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.ops.int4_layer import ACTIVATIONS, DTYPES, SHAPES, Weight, backward, op, randn
from tests.tolerances import ROUNDOFF

DEVICE = "cuda"

# Every kernel: rows quantized on the way, one and two tiles of few rows, small tiles, large tiles.
ROWS = [1, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 200]
# Groups within a step of the kernels, of one, of some, of no whole number of them; longer ones.
GROUP_SIZES = [8, 24, 32, 40, 64, 96, 128, 256]
LARGE = [
    (4096, 4100, 260, 128),
    (129, 11008, 4096, 128),
    (1, 4096, 4096, 128),
    (16, 4096, 11008, 32),
    (200, 300, 8192, 8192),
]


def assert_equal(on_device: torch.Tensor, on_cpu: torch.Tensor) -> None:
    """The same bits, but for those of a NaN."""
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=0, atol=0, equal_nan=True)


# --- the bits of the CPU --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", SHAPES + [(m, 67, 300, 64) for m in ROWS] + [(1, 4096, 4096, 128)], ids=str
)
def test_sums_and_scales(shape):
    m, n, k, group_size = shape
    layer, x = Weight(n, k, group_size), randn(m, k)
    for mine, expected in zip(
        layer.to(DEVICE).accumulators(x.to(DEVICE)), layer.accumulators(x), strict=True
    ):
        assert_equal(mine, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output(dtype, activation):
    layer = Weight(67, 200, 32)
    on_device = layer.to(DEVICE)
    for m in ROWS:
        x, residual = 3 * randn(m, 200, dtype=dtype), randn(m, 67, dtype=dtype, seed=2)
        expected = layer(x, activation, residual)
        assert_equal(on_device(x.to(DEVICE), activation, residual.to(DEVICE)), expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("m", ROWS)
def test_groups_of_any_size(m, group_size):
    layer, x = Weight(50, 500, group_size), randn(m, 500)
    assert_equal(layer.to(DEVICE)(x.to(DEVICE)), layer(x))


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_of_any_size(shape, dtype):
    m, n, k, group_size = shape
    layer, x = Weight(n, k, group_size), randn(m, k, dtype=dtype)
    assert_equal(layer.to(DEVICE)(x.to(DEVICE)), layer(x))


@pytest.mark.parametrize("m", [1, 20, 70])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_sums_of_the_largest_group(m, value):
    k = 131072
    q = torch.full((3, k // 2), 0xFF, dtype=torch.uint8)
    q[2] = 0
    zero = torch.tensor([[0], [15], [15]], dtype=torch.uint8)
    packed = tw.ops.pack_weight_int4(q, torch.ones(3, 1).bfloat16(), zero, k, k)
    x = torch.full((m, k), value)
    expected = op(x, *packed, None, None, k, 3)
    assert_equal(op(x.to(DEVICE), *(t.to(DEVICE) for t in packed), None, None, k, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bias_and_residual_of_any_dtype(dtype):
    layer, x = Weight(19, 40, 16), randn(5, 40, dtype=torch.bfloat16)
    residual = randn(5, 19, dtype=dtype, seed=2)
    layer.bias = layer.bias.to(dtype)
    expected = layer(x, residual=residual)
    assert_equal(layer.to(DEVICE)(x.to(DEVICE), residual=residual.to(DEVICE)), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [3, 20, 70])
def test_a_bad_value_spoils_its_row_only(bad, m):
    layer, x = Weight(19, 40, 32), randn(m, 40)
    x[1, 39] = bad
    assert_equal(layer.to(DEVICE)(x.to(DEVICE), "gelu"), layer(x, "gelu"))


def test_does_not_depend_on_the_batch():
    layer, x = Weight(67, 300, 32).to(DEVICE), randn(200, 300).to(DEVICE)
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
    layer, x = Weight(37, 70, 32), randn(m, 70, dtype=torch.bfloat16)
    residual = randn(m, 37, dtype=torch.bfloat16, seed=2)
    expected, on_device = layer(x, "silu", residual), layer.to(DEVICE)
    on_device.packed = tuple(misaligned(t) for t in on_device.packed)
    on_device.bias = misaligned(on_device.bias)
    got = on_device(layout(x.to(DEVICE)), "silu", layout(residual.to(DEVICE)))
    assert_equal(got, expected)


def test_leading_dimensions():
    layer, x = Weight(37, 70, 32), randn(2, 3, 5, 70).transpose(0, 2)
    assert_equal(layer.to(DEVICE)(x.to(DEVICE)), layer(x))
    assert_equal(layer.to(DEVICE)(x[0, 0, 0].to(DEVICE)), layer(x[0, 0, 0]))


def test_past_2_to_31_elements():
    m, k = 2**20 + 3, 2**11 + 8
    if torch.cuda.mem_get_info()[0] < 8 * m * k:
        pytest.skip("needs 17 GB of GPU memory")
    layer = Weight(17, k, 128).to(DEVICE)
    x = torch.zeros(m, k, dtype=torch.bfloat16, device=DEVICE)
    x[-3:] = randn(3, k).to(DEVICE)
    assert torch.equal(layer(x)[-3:], layer(x[-3:].clone()))


# --- gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (200, 300, 130, 64), (1024, 4096, 1000, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(shape, dtype):
    m, n, k, group_size = shape
    layer, grad = Weight(n, k, group_size), randn(m, n, dtype=dtype)
    got = layer.to(DEVICE).backward(grad.to(DEVICE))
    assert got.dtype == dtype
    assert got.shape == (m, k)
    if got.numel() == 0:
        return
    weight = layer.dequantize()
    expected, magnitude = grad.double() @ weight, grad.double().abs() @ weight.abs()
    # Exact products in float32 sums of the tensor cores, then one rounding.
    tolerance = ROUNDOFF[dtype] * expected.abs() + 2.0**-21 * magnitude
    assert ((got.cpu().double() - expected).abs() <= tolerance).all()


def test_gradients_of_input_bias_and_residual():
    layer = Weight(37, 70, 32)
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
    layer, x = Weight(67, 200, 32), randn(m, 200)
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
def test_capture_in_a_graph(m):
    layer, x = Weight(67, 200, 32), randn(m, 200)
    on_device, on_gpu = layer.to(DEVICE), torch.zeros(m, 200, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = on_device(on_gpu, "relu")
        grad = on_device.backward(output)
    on_gpu.copy_(x)
    graph.replay()
    assert_equal(output, layer(x, "relu"))
    assert torch.equal(grad, on_device.backward(output))


def test_operator_checks():
    layer = Weight(19, 40, 16).to(DEVICE)
    x = randn(5, 40).to(DEVICE).requires_grad_()
    ops = torch.ops.torchweld
    torch.library.opcheck(
        ops.quantized_linear_int4.default, (x, *layer.packed, layer.bias, None, 40, 19, "silu")
    )
    torch.library.opcheck(
        ops.quantized_linear_int4_accumulators.default, (x.detach(), *layer.packed, 40, 19)
    )
    torch.library.opcheck(backward.default, (randn(5, 19).to(DEVICE), *layer.packed, 40, 19))


@pytest.mark.parametrize(
    "place", ["input", "packed_weight", "weight_scale", "weight_zero", "bias", "residual"]
)
def test_tensors_elsewhere_are_refused(place):
    layer, tensors = Weight(19, 40, 16), {"input": randn(5, 40), "residual": randn(5, 19)}
    names = ("packed_weight", "weight_scale", "weight_zero")
    tensors |= dict(zip(names, layer.packed, strict=True)) | {"bias": layer.bias}
    tensors = {name: x if name == place else x.to(DEVICE) for name, x in tensors.items()}
    with pytest.raises(
        RuntimeError, match=rf"quantized_linear_int4: {place}: expected a tensor on"
    ):
        op(**tensors, in_features=40, out_features=19)


# --- modules --------------------------------------------------------------------------------------


def test_module_moves_there_and_back():
    model = tw.quantize(
        nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)), tw.Int4(group_size=64)
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


def test_quantize_a_model_on_the_device():
    model, x = nn.Linear(256, 128), randn(9, 256)
    expected = tw.quantize(model, tw.Int4())
    on_device = tw.quantize(copy.deepcopy(model).to(DEVICE), tw.Int4())
    assert type(on_device) is tw.nn.Int4Linear
    for name, tensor in on_device.state_dict().items():
        assert tensor.is_cuda
        assert_equal(tensor, expected.state_dict()[name])
    assert_equal(on_device(x.to(DEVICE)), expected(x))


@pytest.mark.parametrize("config", [tw.Int4(group_size=32), tw.Int8()])
def test_attention(config):
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    quantized = tw.quantize(attention, config, keep_small=False)
    assert type(quantized) is tw.nn.MultiheadAttention
    x = randn(2, 10, 64)
    expected, weights = quantized(x, x, x)
    quantized.to(DEVICE)
    got, got_weights = quantized(*[x.to(DEVICE)] * 3)
    torch.testing.assert_close(got.cpu(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(got_weights.cpu(), weights, rtol=0.02, atol=0.02)

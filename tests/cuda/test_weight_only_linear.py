"""The weight-only linear layer on a GPU: float64's values, in any memory, stream or graph."""

import copy

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.ops.int8_layer import ACTIVATIONS, DTYPES, randn
from tests.ops.test_weight_only_linear import SHAPES, Weight, op
from tests.reference import quantized_linear as reference
from tests.tolerances import ROUNDOFF

DEVICE = "cuda"

# Every kernel: one and two tiles of few rows, small tiles, large tiles.
ROWS = [1, 3, 8, 9, 16, 17, 32, 33, 64, 200]
LARGE = [(4096, 4100, 260), (129, 11008, 4096), (1, 4096, 4096), (16, 4096, 11008)]


def on(layer: Weight, device: str) -> Weight:
    """A copy of the layer elsewhere."""
    moved = copy.copy(layer)
    for name in ("q", "scale", "bias", "packed", "sum"):
        tensor = getattr(layer, name)
        setattr(moved, name, None if tensor is None else tensor.to(device))
    return moved


def assert_close(got, layer, x, activation="identity", residual=None) -> None:
    """Float32 sums of exact products, in any order, and one rounding."""
    weight = layer.dequantize()
    z = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.abs().T
    if layer.bias is not None:
        z, magnitude = z + layer.bias.double(), magnitude + layer.bias.double().abs()
    expected = reference.ACTIVATIONS[activation](z)
    if residual is not None:
        expected = expected + residual.double()
        magnitude = magnitude + residual.double().abs()
    assert got.dtype == x.dtype
    assert got.shape == expected.shape
    # No activation has a slope of more than 1.13.
    # Tensor cores cut sums off instead of rounding them, once for every 8 or 16 terms.
    tolerance = ROUNDOFF[x.dtype] * expected.abs() + 2.0**-19 * magnitude
    assert ((got.cpu().double() - expected).abs() <= tolerance).all()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_of_any_size(shape, dtype):
    m, n, k = shape
    layer, x = Weight(n, k), randn(m, k, dtype=dtype)
    assert_close(on(layer, DEVICE)(x.to(DEVICE)), layer, x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [200, 67])
def test_output(dtype, activation, k):
    layer = Weight(67, k)
    on_device = on(layer, DEVICE)
    for m in ROWS:
        x, residual = 3 * randn(m, k, dtype=dtype), randn(m, 67, dtype=dtype, seed=2)
        got = on_device(x.to(DEVICE), activation, residual.to(DEVICE))
        assert_close(got, layer, x, activation, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 40])
def test_every_weight_is_exact(dtype, m):
    layer = Weight(255, 4, bias=False)
    layer.q = torch.arange(-127, 128, dtype=torch.int8)[:, None].repeat(1, 4)
    layer.packed, _ = tw.ops.pack_weight(layer.q)
    layer.scale = torch.ones(255)
    x = torch.zeros(m, 4, dtype=dtype)
    # A float32 of three parts, the sums of whose products fit a float: no rounding is hidden.
    x[:, 1] = 1 + (2**-8 + 2**-16 if dtype == torch.float32 else torch.finfo(dtype).eps)
    expected = (x[:, 1:2].double() * layer.q[:, 1].double()).to(dtype)
    assert torch.equal(on(layer, DEVICE)(x.to(DEVICE)).cpu(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [3, 20, 70])
def test_what_is_not_finite_stays_so_in_its_row(bad, dtype, m):
    layer, x = Weight(19, 40), randn(m, 40, dtype=dtype)
    x[1, 39] = bad
    expected, got = layer(x), on(layer, DEVICE)(x.to(DEVICE)).cpu()
    assert torch.equal(got[1].isnan(), expected[1].isnan())
    assert torch.equal(got[1][got[1].isinf()], expected[1][expected[1].isinf()])
    assert got[[0, 2]].isfinite().all()


def test_the_same_for_every_row():
    layer, x = on(Weight(67, 300), DEVICE), randn(1, 300).to(DEVICE)
    for m in ROWS:
        output = layer(x.expand(m, -1).contiguous())
        assert (output == output[0]).all()


def misaligned(x):
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize(
    "layout",
    [misaligned, lambda x: x.mT.contiguous().mT, lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [2, 12, 70])
def test_memory_of_any_layout(layout, dtype, m):
    layer, x = Weight(37, 72), randn(m, 72, dtype=dtype)
    residual = randn(m, 37, dtype=dtype, seed=2)
    on_device = on(layer, DEVICE)
    on_device.packed = misaligned(on_device.packed)
    on_device.scale, on_device.bias = misaligned(on_device.scale), misaligned(on_device.bias)
    got = on_device(layout(x.to(DEVICE)), "silu", layout(residual.to(DEVICE)))
    assert_close(got, layer, x, "silu", residual)


def test_past_2_to_31_elements():
    m, k = 2**20 + 3, 2**11 + 8
    if torch.cuda.mem_get_info()[0] < 8 * m * k:
        pytest.skip("needs 17 GB of GPU memory")
    layer = on(Weight(17, k), DEVICE)
    x = torch.zeros(m, k, dtype=torch.bfloat16, device=DEVICE)
    x[-3:] = randn(3, k).to(DEVICE)
    torch.testing.assert_close(layer(x)[-3:], layer(x[-3:].clone()))


def test_gradients_of_input_bias_and_residual():
    layer = Weight(37, 70)
    x, residual, g = randn(6, 70), randn(6, 37, seed=2), randn(6, 37, seed=3)

    def gradients(device):
        of = on(layer, device)
        of.bias.requires_grad_()
        inputs = [t.to(device).requires_grad_() for t in (x, residual)]
        output = of(inputs[0], "gelu", inputs[1])
        return torch.autograd.grad(output, (*inputs, of.bias), g.to(device))

    for mine, expected in zip(gradients(DEVICE), gradients("cpu"), strict=True):
        torch.testing.assert_close(mine.cpu(), expected)


# --- streams, graphs, torch's machinery -----------------------------------------------------------


@pytest.mark.parametrize("m", [1, 20, 200])
@pytest.mark.parametrize("k", [200, 67])
def test_on_a_side_stream(m, k):
    layer, x = Weight(67, k), randn(m, k)
    on_device, on_gpu = on(layer, DEVICE), x.to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_device(on_gpu.mul_(1))  # what loads kernels may wait
        torch.cuda._sleep(20_000_000)
        on_gpu.mul_(2)  # before the product, or its result is another
        output = on_device(on_gpu)
        assert not stream.query(), "the call waits for nothing"
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(output, layer, 2 * x)


@pytest.mark.parametrize("m", [1, 20, 200])
@pytest.mark.parametrize("k", [200, 67])
def test_capture_in_a_graph(m, k):
    layer, x = on(Weight(67, k), DEVICE), randn(m, k).to(DEVICE)
    into = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(into, "relu")
    into.copy_(x)
    graph.replay()
    assert torch.equal(output, layer(x, "relu"))


def test_operator_checks():
    layer = on(Weight(19, 40), DEVICE)
    x = randn(5, 40).to(DEVICE).requires_grad_()
    torch.library.opcheck(op.default, (x, layer.packed, layer.scale, layer.bias, None, 40, "silu"))


@pytest.mark.parametrize("place", ["input", "packed_weight", "weight_scale", "bias", "residual"])
def test_tensors_elsewhere_are_refused(place):
    layer, tensors = Weight(19, 40), {"input": randn(5, 40), "residual": randn(5, 19)}
    tensors |= {"packed_weight": layer.packed, "weight_scale": layer.scale, "bias": layer.bias}
    tensors = {name: x if name == place else x.to(DEVICE) for name, x in tensors.items()}
    with pytest.raises(RuntimeError, match=rf"weight_only_linear: {place}: expected a tensor on"):
        op(**tensors, in_features=40)


def test_module_moves_there_and_back():
    model = tw.quantize(nn.Linear(256, 128), tw.Int8WeightOnly())
    x = randn(9, 256)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    model.to(DEVICE)
    torch.testing.assert_close(model(x.to(DEVICE)).cpu(), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name])
    assert torch.equal(model.cpu()(x), expected)

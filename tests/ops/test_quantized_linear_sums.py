"""Sums of the quantized linear layer that int32 does not hold, and those of groups of K."""

import pytest
import torch
import torchweld as tw

from tests.ops.int8_layer import ACTIVATIONS, DTYPES, Weight, accumulators, op, randn
from tests.reference import quantized_linear as reference
from tests.tolerances import ROUNDOFF

LONGEST = 133144  # whose sums fit int32


# --- long rows -----------------------------------------------------------------------------------


def extreme(k):
    """Columns and rows whose products all have one sign, and some that do not."""
    q = torch.randint(-127, 128, (3, k), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    q[0], q[1] = 127, -127
    x = randn(3, k)
    x[0], x[1] = 1, -1
    return q, x


def test_sums_are_exact_at_the_longest_int32():
    q, x = extreme(LONGEST)
    packed, weight_sum = tw.ops.pack_weight(q)
    sums, _ = accumulators(x, packed, torch.ones(3), weight_sum, LONGEST)
    assert torch.equal(sums.long(), reference.accumulators(x, q)[0])
    assert int(sums[0, 0]) == 127 * 127 * LONGEST


@pytest.mark.parametrize("k", [LONGEST + 1, 140_000, 2 * 65536, 200_003])
def test_longer_rows_are_summed_exactly(k):
    q, x = extreme(k)
    packed, weight_sum = tw.ops.pack_weight(q)
    expected, scale = reference.accumulators(x, q)
    actual = op(x, packed, torch.ones(3), weight_sum, None, None, k)
    assert torch.equal(actual, expected.float() * scale[:, None])


def test_sums_that_int32_does_not_hold_are_refused():
    k = LONGEST + 1
    packed, weight_sum = tw.ops.pack_weight(torch.zeros(1, k, dtype=torch.int8))
    with pytest.raises(RuntimeError, match=r"in_features: expected at most 133144.*got 133145"):
        accumulators(torch.ones(1, k), packed, torch.ones(1), weight_sum, k)


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 4), (3, 17, 37, 8), (9, 49, 130, 32), (5, 64, 256, 128), (17, 100, 260, 64)],
    ids=str,
)
def test_groups(shape, dtype, activation):
    m, n, k, group_size = shape
    layer, x = Weight(n, k), randn(m, k, dtype=dtype)
    x[:, 0] *= 50
    z = reference.quantized_linear(x, layer.q, layer.scale, layer.bias, group_size=group_size)
    expected = reference.ACTIVATIONS[activation](z)
    error = (layer(x, activation, group_size=group_size).double() - expected).abs()
    # A rounding for every group, which the sum of the groups' magnitudes bounds.
    assert (error <= 2 * ROUNDOFF[dtype] * expected.abs() + 1e-6 * z.abs().max()).all()


def test_one_group_is_no_group():
    layer, x = Weight(20, 70), randn(5, 70)
    assert torch.equal(layer(x, group_size=72), layer(x))
    assert torch.equal(layer(x, group_size=65536), layer(x))


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)], ids=str)
def test_groups_of_empty_sizes(shape):
    m, n, k = shape
    layer, x = Weight(n, k), randn(m, k)
    assert torch.equal(layer(x, group_size=4), layer(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_its_row_only(bad):
    layer, x = Weight(20, 70), randn(5, 70)
    expected = layer(x, group_size=16)
    x[2, 33] = bad
    actual = layer(x, group_size=16)
    assert actual[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(actual[keep], expected[keep])


def test_does_not_depend_on_batch_or_threads():
    layer, x = Weight(300, 260), randn(70, 260)
    whole, threads = layer(x, group_size=32), torch.get_num_threads()
    for rows in ([5], [3, 5], list(range(1, 12)), list(range(69, -1, -1))):
        assert torch.equal(layer(x[rows], group_size=32), whole[rows])
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x, group_size=32), whole)
    finally:
        torch.set_num_threads(threads)


def test_groups_hold_outlier_channels():
    k = 1024
    x, weight = randn(64, k), randn(64, k, seed=2)
    x[:, 7] *= 100
    q, scale = tw.ops.quantize_weight(weight)
    packed, weight_sum = tw.ops.pack_weight(q)
    expected = x.double() @ (q.double() * scale.double()[:, None]).T

    def sqnr(group_size):
        y = op(x, packed, scale, weight_sum, None, None, k, "identity", group_size)
        # What the outlier adds is exact enough either way; the rest is what it drowns.
        return reference.sqnr(y, expected)

    assert sqnr(128) >= sqnr(0) + 8


def test_gradient_does_not_see_the_groups():
    layer, x, g = Weight(21, 37), randn(6, 37).requires_grad_(), randn(6, 21, seed=3)
    (actual,) = torch.autograd.grad(layer(x, group_size=8), x, g)
    assert torch.equal(actual, torch.autograd.grad(layer(x), x, g)[0])
    (actual,) = torch.autograd.grad(layer(x, "gelu", group_size=8), x, g)
    z = layer(x, group_size=8)
    gelu = torch.ops.aten.gelu_backward(g, z.detach())
    assert torch.equal(actual, torch.autograd.grad(z, x, gelu)[0])

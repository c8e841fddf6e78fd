"""The statistics of conv-bn-relu: of any shape, far from zero, exchanged between processes."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [
    *((1, 1, 1, 1), (3, 1, 1, 1), (5, 3, 1, 1), (2, 1001, 1, 1), (4, 300, 3, 3)),
    *((1, 2, 131, 97), (40, 5, 7, 7), (300, 20, 2, 3), (2, 17, 50, 50)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_any_shape(shape, layout):
    """A mean 1000 times the deviation costs nothing: sums of squares would lose every digit."""
    torch.manual_seed(0)
    x = (torch.randn(shape) + 1000).contiguous(memory_format=layout)
    count, mean, m2 = tw.ops.batch_norm_stats(x)
    exact = x.double().transpose(0, 1).flatten(1)
    assert count.item() == exact.shape[1]
    torch.testing.assert_close(mean, exact.mean(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(m2, exact.var(1, correction=0) * exact.shape[1], rtol=1e-6, atol=0)


LAYERS = [((64, 64, 3, 3), 1), ((64, 64, 1, 1), 1), ((20, 3, 7, 7), 1), ((48, 1, 3, 3), 48)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("weight", "groups"), LAYERS, ids=str)
def test_a_layer_whose_mean_is_ten_thousand_deviations(weight, groups, layout):
    """By Winograd, dense and depthwise sums, and ATen's: the moments are those of the output."""
    torch.manual_seed(0)
    x = torch.randn(2, weight[1] * groups, 14, 14).contiguous(memory_format=layout)
    w = torch.randn(weight) / math.sqrt(math.prod(weight[1:]))
    bias = torch.full((weight[0],), 1e4)
    geometry = {"padding": weight[2] // 2, "groups": groups, "eps": 1e-12}
    _, output, mean, invstd, var = tw.ops.conv_bn_relu(x, w, bias, **geometry)
    exact = output.double().transpose(0, 1).flatten(1)
    assert (exact.mean(1) / exact.std(1)).median() > 8e3
    torch.testing.assert_close(
        invstd, (exact.var(1, correction=0) + 1e-12).rsqrt(), rtol=1e-5, atol=0
    )
    running_mean, running_var = torch.zeros(weight[0]), torch.ones(weight[0])
    tw.ops.update_running_stats(running_mean, running_var, mean, var, exact.shape[1], 1.0)
    torch.testing.assert_close(running_var, exact.var(1).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(running_mean, exact.mean(1).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_constant_channel_gives_beta(layout):
    x = torch.full((2, 3, 20, 20), 1e6).contiguous(memory_format=layout)
    w, beta = torch.eye(3)[:, :, None, None] * 0.1, torch.tensor([0.5, -2.0, 3.0])
    output, _, _, _, var = tw.ops.conv_bn_relu(x, w, bn_bias=beta, activation="identity")
    assert torch.equal(var, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(output, beta[:, None, None].expand(2, 3, 20, 20))


def test_running_variance_far_below_eps_is_exact():
    x = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) * 1e-15
    _, _, mean, _, var = tw.ops.conv_bn_relu(x, torch.ones(1, 1, 1, 1), eps=1e-3)
    running_mean, running_var = torch.ones(1), torch.ones(1)
    tw.ops.update_running_stats(running_mean, running_var, mean, var, 2, 1.0)
    torch.testing.assert_close(running_var, torch.tensor([2e-30]), rtol=1e-6, atol=0)
    assert running_mean.item() == 0


def test_update_counts_as_a_write():
    running = [torch.zeros(2), torch.ones(2)]
    one = torch.ones(2, dtype=torch.float64)
    tw.ops.update_running_stats(*running, one, one, 4, 0.1)
    assert [r._version for r in running] == [1, 1]
    before = [r.clone() for r in running]
    tw.ops.update_running_stats(*running, one, one, 0, 0.1)  # an empty batch
    assert all(map(torch.equal, running, before))


def test_update_names_the_argument_that_does_not_fit():
    one = torch.ones(2, dtype=torch.float64)
    for name in ("running_mean", "running_var"):
        running = {"running_mean": torch.zeros(2), "running_var": torch.ones(2), name: one[:1]}
        with pytest.raises(RuntimeError, match=f"{name}: expected a contiguous .2., got"):
            tw.ops.update_running_stats(**running, mean=one, var=one, count=4, momentum=0.1)


@pytest.mark.parametrize("shape", [(2, 0, 1, 1), (2, 0, 3, 3), (0, 3, 1, 1), (2, 3, 0, 1)], ids=str)
def test_statistics_of_nothing(shape):
    x = torch.empty(shape)
    count, mean, m2 = tw.ops.batch_norm_stats(x)
    assert count.item() == shape[0] * shape[2] * shape[3]
    assert torch.equal(mean, torch.zeros(shape[1], dtype=torch.float64))
    assert torch.equal(m2, mean)
    assert tw.ops.batch_norm_relu(x, mean, m2).shape == shape


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_statistics_exchanged_between_parts_of_a_batch(layout, residual):
    """Two uneven parts and an empty one, normalized with common statistics, are one batch."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 7, 6, 5, 5, dtype=torch.float64)
    r = torch.randn(7, 6, 5, 5, dtype=torch.float64) if residual else None
    gamma, beta = torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    exact = [t.clone().requires_grad_() for t in (x, gamma, beta, *([r] if residual else []))]
    z = F.batch_norm(exact[0], None, None, exact[1], exact[2], True)
    F.silu(z + exact[3] if residual else z).backward(g)

    def parts(t):
        return [None] * 3 if t is None else t.contiguous(memory_format=layout).split([5, 0, 2])

    count, mean, m2 = zip(*map(tw.ops.batch_norm_stats, parts(x)), strict=True)
    total = sum(count)
    center = sum(n * m for n, m in zip(count, mean, strict=True)) / total
    m2 = sum(q + n * (m - center) ** 2 for n, m, q in zip(count, mean, m2, strict=True))
    invstd = (m2 / total + 1e-5).rsqrt()
    shared = (center, invstd, gamma, beta)
    y = [
        tw.ops.batch_norm_relu(a, *shared, b, "silu")
        for a, b in zip(parts(x), parts(r), strict=True)
    ]
    expected = F.batch_norm(x, None, None, gamma, beta, True)
    torch.testing.assert_close(torch.cat(y), F.silu(expected + r if residual else expected))

    triples = list(zip(parts(g), parts(x), parts(r), strict=True))
    sums = [
        tw.ops.batch_norm_relu_backward_reduce(a, b, *shared, c, "silu", 0.0) for a, b, c in triples
    ]
    sum_g, sum_g_xhat = (sum(s) for s in zip(*sums, strict=True))
    torch.testing.assert_close(sum_g, exact[2].grad)
    torch.testing.assert_close(sum_g_xhat, exact[1].grad)
    gradients = [
        tw.ops.batch_norm_relu_backward(a, b, *shared, c, sum_g, sum_g_xhat, total, "silu", 0.0)
        for a, b, c in triples
    ]
    torch.testing.assert_close(torch.cat([d for d, _ in gradients]), exact[0].grad)
    if residual:
        torch.testing.assert_close(torch.cat([d for _, d in gradients]), exact[3].grad)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_tensors_in_another_layout_give_the_same_bits(layout):
    """Copies in the input's layout live as long as they are read."""
    torch.manual_seed(0)
    x, r, g = torch.randn(3, 2, 5, 7, 9)
    x = x.contiguous(memory_format=layout)
    _, center, _ = tw.ops.batch_norm_stats(x)
    given = (center, torch.ones_like(center), None, None)
    results = []
    for other in LAYOUTS:
        b, c = (t.contiguous(memory_format=other) for t in (r, g))
        sums = tw.ops.batch_norm_relu_backward_reduce(c, x, *given, b, "relu", 0.0)
        count = torch.full((1,), 126.0, dtype=torch.float64)
        found = tw.ops.batch_norm_relu_backward(c, x, *given, b, *sums, count, "relu", 0.0)
        results.append([*sums, *found, tw.ops.batch_norm_relu(x, *given, b, "relu")])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)

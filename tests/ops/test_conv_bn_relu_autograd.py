"""conv-bn-relu in the hands of torch: derivatives, fake tensors, refusals."""

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw

from tests.reference.conv_bn_relu import Problem, fused, make_problem

ops = torch.ops.torchweld


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "silu"])
def test_gradcheck(activation, frozen):
    problem = make_problem(
        5, activation=activation, frozen=frozen, negative_slope=0.9, conv=(2, 1, 1, 1),
        input=torch.randn(2, 2, 5, 5, dtype=torch.float64),
        weight=torch.randn(3, 2, 3, 3, dtype=torch.float64),
        residual=torch.randn(2, 3, 3, 3, dtype=torch.float64) + 0.5,
        running_mean=torch.zeros(3, dtype=torch.float64),
        running_var=torch.ones(3, dtype=torch.float64),
    )  # fmt: skip
    for name in ("bias", "bn_weight", "bn_bias"):
        setattr(problem, name, torch.rand(3, dtype=torch.float64) + 0.5)
    leaves = problem.leaves()

    def run(*tensors):
        for name, tensor in zip(Problem.DIFFERENTIABLE, tensors, strict=True):
            setattr(leaves, name, tensor)
        return fused(leaves)

    tensors = [getattr(leaves, name) for name in Problem.DIFFERENTIABLE]
    assert torch.autograd.gradcheck(run, tensors, atol=1e-6)


def samples():
    """Arguments for every op: plain, channels_last, strided, empty, one value."""
    torch.manual_seed(0)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    c = [torch.rand(4, dtype=torch.float64) + 0.5 for _ in range(4)]
    f = [t.float().requires_grad_(i < 2) for i, t in enumerate(c)]
    inputs = {
        "plain": torch.randn(2, 3, 5, 4),
        "channels_last": torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last),
        "strided": torch.randn(5, 3, 4, 2).permute(3, 1, 0, 2),
        "empty": torch.randn(0, 3, 5, 4),
        "one": torch.randn(1, 3, 1, 1),
    }
    for name, x in inputs.items():
        a = F.conv2d(x, weight, padding=1).detach()
        r, x = torch.randn_like(a).requires_grad_(), x.requires_grad_()
        y = ("leaky_relu", 0.2)
        some, every = [True, False, True, False, True, False], [True] * 6
        yield f"{name}-conv_bn_relu", (x, weight, f[2], f[0], f[1], r, *conv, 1e-5, *y)
        yield f"{name}-conv_bn_relu", (x, weight, None, None, None, None, *conv, 1e-5, *y)
        yield f"{name}-conv_bn_relu_frozen", (x, weight, None, *f, r, *conv, 1e-5, *y)
        yield f"{name}-conv_relu", (x.detach(), weight.detach(), None, f[2], None, *conv, *y)
        if name == "empty":
            continue
        x, w, r, f0, f1 = (t.detach() for t in (x, weight, r, f[0], f[1]))
        for mask in (some, every):
            yield f"{name}-conv_bn_relu_backward", (a, x, w, f0, f1, r, a, *c[:2], *conv, *y, mask)
            yield (f"{name}-conv_bn_relu_frozen_backward",
                   (a, x, w, f0, f1, *f[2:], r, a, *conv, 1e-5, *y, mask))  # fmt: skip
        yield f"{name}-batch_norm_stats", (x,)
        common = (*c[:2], f0, None, r)
        yield f"{name}-batch_norm_relu", (a, *common, *y)
        yield f"{name}-batch_norm_relu_backward_reduce", (a, a, *common, *y)
        yield f"{name}-batch_norm_relu_backward", (a, a, *common, *c[2:], c[0][:1], *y)
    x = torch.randn(2, 3, 9, 40).bfloat16().contiguous(memory_format=torch.channels_last)
    arguments = (None, None, None, None, [1, 1], [0, 0], [2, 2], 1, 1e-5, "relu", 0.0)
    yield "dilated-conv_bn_relu", (x.requires_grad_(), weight.detach().bfloat16(), *arguments)
    w = weight.detach().bfloat16().requires_grad_()
    yield "dilated-conv_bn_relu", (x, w, *arguments)
    yield "plain-update_running_stats", (*f[2:], c[0], c[1], 10, 0.1)


SAMPLES = list(samples())


@pytest.mark.parametrize(("name", "arguments"), SAMPLES, ids=[name for name, _ in SAMPLES])
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(ops, name.split("-")[1]).default, arguments)


def test_second_derivative_is_refused():
    problem = make_problem(1, activation="silu", frozen=False).leaves()
    gradient, *_ = torch.autograd.grad(fused(problem).sum(), problem.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, got a second derivative"):
        gradient.sum().backward()


def test_what_has_no_gradient_says_so():
    x, w = torch.randn(2, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 1, 1)
    with pytest.raises(RuntimeError, match="conv_relu: inference only"):
        tw.ops.conv_relu(x, w).sum().backward()
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="needs an exchange between processes"):
        tw.ops.batch_norm_relu(x, one, one).sum().backward()
    _, *others = tw.ops.conv_bn_relu(x, w)
    assert not any(t.requires_grad for t in others)


def test_only_gradients_asked_for_are_computed():
    problem = make_problem(4, frozen=False).to(torch.float32)
    every = problem.leaves()
    fused(every).square().sum().backward()
    for name, expected in every.gradients().items():
        one = problem.leaves().map(lambda n, t, name=name: t.requires_grad_(n == name))
        (actual,) = torch.autograd.grad(fused(one).square().sum(), getattr(one, name))
        assert torch.equal(actual, expected), name


def test_saved_output_brought_back_in_another_memory_order():
    """As hooks that offload or compress what autograd saves may."""
    layer = tw.nn.ConvBNReLU2d(24, 40, 3, padding=1)
    x = torch.randn(4, 24, 14, 14).to(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        output = layer(x).square().sum()
    for gradient, other in zip(torch.autograd.grad(output, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-3, rtol=1e-3)

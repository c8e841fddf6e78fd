"""Memory saving keeps less, and trains to the very bits of the normal mode."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchweld import _recipes
from torchweld.nn.functional import conv_bn_relu

from benchmarks import models
from benchmarks.kept import kept_bytes
from tests.convert.models import Branches, Plain, ResNet, conv_bn
from tests.convert.saving import (
    LEVELS,
    Concat,
    Halves,
    InPlace,
    assert_same_bits,
    build,
    images,
    kept,
    loss_of,
    pair,
    step,
)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("stock", "at_most"),
    [(Plain, 0.7), (ResNet, 0.75), (Branches, 0.8), (Concat, 0.9), (InPlace, 1.0), (Halves, 0.85)],
)
def test_same_bits_less_kept(stock, at_most, level):
    normal, saving = pair(stock, level)
    x = images(4, 3, 8, 8) if stock is Concat else images(4, 3, 16, 16)
    assert_same_bits(normal, saving, x)
    assert kept(saving, x) <= at_most * kept(normal, x)


@pytest.mark.parametrize(("level", "at_most"), [(True, 0.58), ("recompute", 0.46)])
def test_resnet50(level, at_most):
    """0.557 and 0.444 at 8x3x224x224, by ``python -m benchmarks.kept``."""
    normal, saving = pair(models.resnet50, level)
    x = images(8, 3, 64, 64)
    assert kept(saving, x) <= at_most * kept(build(models.resnet50), x)
    kept(normal, x)  # moves its running statistics as often
    assert_same_bits(normal, saving, x)


@pytest.mark.parametrize("level", LEVELS)
def test_running_statistics_move_once(level):
    (_, saving), stock, x = pair(ResNet, level), build(ResNet), images(4, 3, 16, 16)
    for model in (stock, saving):
        step(model, x)
    for ours, theirs in zip(saving.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(b.item() == 1 for b in saving.buffers() if b.dtype == torch.int64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_frozen_batch_norm(level, momentum):
    normal, saving = pair(ResNet, level)
    for model in (normal, saving):
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval().momentum = momentum
                part.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    x = images(4, 3, 16, 16)
    assert_same_bits(normal, saving, x)
    assert kept(saving, x) <= 0.75 * kept(normal, x)


@pytest.mark.parametrize("level", LEVELS)
def test_autocast(level):
    normal, saving = pair(ResNet, level)
    x = images(4, 3, 16, 16)

    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, x)

    assert_same_bits(normal, saving, x, partial(step, loss_of=run))
    assert kept(saving, x, run) <= 0.85 * kept(normal, x, run)


@pytest.mark.parametrize("level", LEVELS)
def test_convolves_in_the_dtype_of_the_forward(level):
    """A backward inside autocast, of a forward outside."""
    normal, saving = pair(ResNet, level)
    x = images(4, 3, 16, 16)

    def run(model, x):
        x.grad, loss = None, loss_of(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    assert_same_bits(normal, saving, x, run)


@pytest.mark.parametrize("level", LEVELS)
def test_several_backwards(level):
    normal, saving = pair(ResNet, level)
    x = images(2, 3, 16, 16)

    def run(model, x):
        loss, parameters = loss_of(model, x), [*model.parameters()]
        # One that stops early, two that go all the way.
        last = torch.autograd.grad(loss, parameters[-8:], retain_graph=True)
        return [*last, *torch.autograd.grad(loss, parameters, retain_graph=True),
                *torch.autograd.grad(loss, [x, *parameters])]  # fmt: skip

    assert_same_bits(normal, saving, x, run)


@pytest.mark.parametrize("level", LEVELS)
def test_optimizer_in_the_backward(level):
    @torch.no_grad()
    def descend(p):
        p -= 0.1 * p.grad

    def run(model, x):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(descend)
        step(model, x)
        return [*model.parameters()]

    assert_same_bits(*pair(ResNet, level), images(2, 3, 16, 16), run)


def chain(links, x):
    for conv, bn in links:
        x = conv_bn_relu(x, conv, bn, "relu", 0.0, x)
    return x.square().mean()


def test_a_chain_of_residuals_is_made_once(monkeypatch):
    torch.manual_seed(0)
    links, x, made = [conv_bn(2, 2) for _ in range(12)], images(1, 2, 3, 3), []
    make = _recipes.Recipe._make_from
    monkeypatch.setattr(_recipes.Recipe, "_make_from", lambda *a: made.append(a[0]) or make(*a))
    with _recipes.recording(recompute=False):
        loss = chain(links, x)
    for count in (12, 24):
        loss.backward(retain_graph=True)
        assert len(made) == count


def test_a_chain_as_long_as_networks_get():
    torch.manual_seed(0)
    links, x = [conv_bn(1, 1, 1)] * 1500, images(1, 1, 2, 1)
    with _recipes.recording(recompute=False):
        loss = chain(links, x)
    (ours,) = torch.autograd.grad(loss, x)
    assert torch.equal(ours, *torch.autograd.grad(chain(links, x), x))
    del loss


@pytest.mark.parametrize("level", LEVELS)
def test_a_backward_makes_what_it_needs(level):
    """The last unit's convolution at most; nothing before it."""
    _, saving = pair(Plain, level)
    loss = loss_of(saving, images(2, 3, 16, 16))
    last = saving[-1][0].weight
    alive = kept_bytes(lambda: torch.autograd.grad(loss, last, retain_graph=True)[0])
    assert alive <= 2 * 6 * 16 * 16 * 4


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stock", [ResNet, InPlace])
def test_nothing_stays(stock, level):
    _, saving = pair(stock, level)
    x = images(2, 3, 16, 16)
    assert kept_bytes(lambda: loss_of(saving, x).detach()) == 0
    loss = loss_of(saving, x)
    gradients = sum(p.nbytes for p in [x, *saving.parameters()])
    assert kept_bytes(lambda: loss.backward(retain_graph=True) or loss) <= gradients


def written_to(level, write):
    """A gradient that needs a recipe, after something was written to."""
    torch.manual_seed(0)
    first, second = conv_bn(3, 4), conv_bn(4, 4)
    x = images(2, 3, 8, 8)
    with _recipes.recording(recompute=level == "recompute"):
        y = conv_bn_relu(x, *first)
        loss = F.max_pool2d(y, 2).mean() if level == "recompute" else second[0](y).mean()
    with torch.no_grad():
        write(x, y, first[1].weight)
    return torch.autograd.grad(loss, first[1].bias if level == "recompute" else second[0].weight)[0]


@pytest.mark.parametrize("level", LEVELS)
def test_written_to_after_it_was_saved(level):
    expected = written_to(level, lambda x, y, weight: None)
    # Stock PyTorch raises: what was saved is gone. A recipe still has it.
    assert torch.equal(written_to(level, lambda x, y, weight: y.zero_()), expected)


def test_what_a_recipe_needs_was_written_to():
    expected = written_to(True, lambda x, y, weight: None)
    assert torch.equal(written_to(True, lambda x, y, weight: x.zero_()), expected)
    assert torch.equal(written_to(True, lambda x, y, weight: weight.zero_()), expected)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.* at version 1"):
        written_to("recompute", lambda x, y, weight: x.zero_())

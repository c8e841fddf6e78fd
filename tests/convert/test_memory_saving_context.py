"""Memory saving inside checkpoints, hooks, threads, copies, torch.compile and processes."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchweld import _recipes
from torchweld.nn.functional import conv_bn_relu

from tests.convert.models import ResNet, conv_bn
from tests.convert.saving import (
    LEVELS,
    Checkpointed,
    assert_same_bits,
    images,
    kept,
    loss_of,
    pair,
    step,
    unit,
)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_checkpoint(level, use_reentrant, whole):
    normal, saving = pair(ResNet if whole else partial(Checkpointed, use_reentrant), level)
    x = images(2, 3, 16, 16)

    def run(model, x):
        return checkpoint(loss_of, model, x, use_reentrant=use_reentrant)

    loss = run if whole else loss_of
    assert_same_bits(normal, saving, x, partial(step, loss_of=loss))
    assert kept(saving, x, loss) <= (1 if whole else 0.8) * kept(normal, x, loss)


def test_hooks_of_others_see_what_is_saved():
    normal, saving = pair(ResNet, True)
    x = images(2, 3, 16, 16)

    def run(model, x):
        shapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(t.shape) or t.clone(), lambda t: t
        ):
            return loss_of(model, x)

    shapes = []
    run(normal, x)
    expected = [*shapes]
    run(saving, x)
    assert shapes == expected


class Spy(nn.Identity):
    hooks = "not run"

    def forward(self, x):
        self.hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return x


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_hooks_only_where_it_trains():
    saving, x = tw.weld(nn.Sequential(unit(3, 4), Spy()), memory_saving=True), images(2, 3, 8, 8)
    for training, grad in ((True, True), (True, False), (False, True), (False, False)):
        saving.train(training)
        with torch.set_grad_enabled(grad):
            saving(x)
        assert (saving[1].hooks is not None) == (training and grad)
    saving.train()
    torch.jit.trace(saving, x.detach(), check_trace=False)
    assert saving[1].hooks is None
    with torch.autograd.graph.disable_saved_tensors_hooks("as torch.func does"):
        saving(x)
    assert saving[1].hooks is None
    with pytest.raises(ValueError, match="expected 4D"):
        saving(x[0])
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_recording_is_of_one_thread():
    with _recipes.recording(recompute=False):
        y = conv_bn_relu(images(2, 3, 8, 8), *conv_bn(3, 4))
        seen = [_recipes.recipe_of(y)]
        thread = threading.Thread(target=lambda: seen.append(_recipes.recipe_of(y)))
        thread.start()
        thread.join()
    assert isinstance(seen[0], _recipes.Recipe)
    assert seen[1] is None
    assert _recipes.recipe_of(y) is None


def test_layout_of_what_a_recipe_makes():
    x, weight = images(2, 3, 4, 4), torch.ones((), requires_grad=True)
    with _recipes.recording(recompute=False):
        y = x.detach().contiguous(memory_format=torch.channels_last)
        _recipes.remember(y, lambda x: x.clone(), (x,))
        z = y * weight
    assert z.grad_fn._saved_self is not y
    assert z.grad_fn._saved_self.stride() == y.stride()
    assert torch.equal(z.grad_fn._saved_self, y)


class Wrapped(nn.Module):
    """A root without a pattern of its own, which calls its parts one by one."""

    def __init__(self):
        super().__init__()
        self.features, self.fc = nn.Sequential(unit(3, 4), unit(4, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(F.max_pool2d(self.features(x), 16).flatten(1))


@pytest.mark.parametrize("level", LEVELS)
def test_copies(level):
    (normal, saving), x = pair(Wrapped, level), images(2, 3, 16, 16)
    saved, in_all = kept(saving, x), kept(normal, x)
    assert saved <= 0.6 * in_all
    for same in (copy.deepcopy(saving), pickle.loads(pickle.dumps(saving))):
        assert type(same) is type(saving)
        assert kept(same, x) == saved
    for plain in (tw.weld(saving), tw.weld(tw.unweld(saving))):
        assert kept(plain, x) == in_all


def test_the_model_stays_what_it_was():
    (_, saving), stock = pair(Wrapped, True), Wrapped()
    assert isinstance(saving, Wrapped)
    assert [*saving.state_dict()] == [*stock.state_dict()]
    again = tw.unweld(saving)
    assert [type(m) for m in again.modules()] == [type(m) for m in stock.modules()]
    assert all("_torchweld" not in vars(m) for m in again.modules())


def test_a_part_by_itself():
    """A forward that is not the root's saves within itself; the gradients are right."""
    normal, saving = pair(ResNet, True)
    x = images(2, 8, 8, 8)

    def loss(model, x):
        return model.layer1(x).square().mean()

    assert_same_bits(normal.layer1, saving.layer1, x)
    assert kept(saving.layer1[0], x) < kept(normal.layer1[0], x)


@pytest.mark.parametrize("level", LEVELS)
def test_compile(level):
    normal, saving = pair(ResNet, level)
    compiled = torch.compile(saving, fullgraph=True, backend="aot_eager")
    x = images(2, 3, 16, 16)
    for ours, theirs in zip(step(compiled, x), step(normal, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_part():
    normal, saving = pair(ResNet, True)
    saving.layer1.compile(backend="aot_eager")
    x = images(2, 3, 16, 16)
    for _ in range(2):
        for ours, theirs in zip(step(saving, x), step(normal, x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_functional_call():
    normal, saving = pair(ResNet, True)

    def run(model, x):
        values = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
        loss = loss_of(partial(torch.func.functional_call, model, values), x)
        return torch.autograd.grad(loss, [*values.values()])

    assert_same_bits(normal, saving, images(2, 3, 16, 16), run)


def test_module_hooks():
    normal, saving = pair(ResNet, True)
    x = images(2, 3, 16, 16)

    def hooked(model, x):
        seen = []
        handle = model.layer1.register_full_backward_hook(lambda m, i, o: seen.extend([*i, *o]))
        result = step(model, x)
        handle.remove()
        return [*result, *seen]

    assert_same_bits(normal, saving, x, hooked)


def test_distributed():
    normal, saving = pair(ResNet, True)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(saving)
        assert_same_bits(normal, parallel, images(2, 3, 16, 16))
    finally:
        torch.distributed.destroy_process_group()

"""Max poolings of welded models."""

import copy
import pickle

import pytest
import torch
import torchweld as tw
from torch import nn

from benchmarks.kept import kept_bytes


def cnn(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.MaxPool2d(3, 2, 1, **options),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )


def train(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters())]


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules() if isinstance(m, nn.MaxPool2d)]


@pytest.mark.parametrize("inference", [False, True])
def test_poolings_are_welded_and_unwelded(inference):
    model = cnn()
    welded = tw.weld(model, inference=inference)
    assert kinds(welded) == [tw.nn.MaxPool2d] * 2
    assert kinds(model) == [nn.MaxPool2d] * 2
    rows = [row for row in tw.report(welded) if row.conversion == "max_pool2d"]
    assert [(row.name, row.converted) for row in rows] == [("3", True), ("7", True)]
    assert kinds(tw.weld(welded, inference=inference)) == [tw.nn.MaxPool2d] * 2
    if not inference:
        assert list(welded.state_dict()) == list(model.state_dict())
        stock = tw.unweld(welded)
        assert kinds(stock) == [nn.MaxPool2d] * 2
        assert len(tw.report(stock)) == 0


@pytest.mark.parametrize("memory_saving", [False, True, "recompute"])
def test_training_is_stocks(memory_saving):
    model, x = cnn(), torch.randn(4, 3, 16, 16)
    twin = tw.weld(copy.deepcopy(model), memory_saving=memory_saving)
    exact = copy.deepcopy(model).double()
    for ours, stock, right in zip(
        train(twin, x), train(model, x), train(exact, x.double()), strict=True
    ):
        error = (stock - right).abs().max()
        assert (ours - right).abs().max() <= 4 * error + 1e-4 * right.abs().max()


def test_memory_saving_has_the_same_bits_and_keeps_a_byte():
    model, x = cnn(), torch.randn(4, 3, 16, 16)
    ways = [tw.weld(copy.deepcopy(model), memory_saving=how) for how in (False, True)]
    assert all(map(torch.equal, *(train(way, x) for way in ways)))

    def kept(pool: type[nn.MaxPool2d]) -> int:
        welded = tw.weld(copy.deepcopy(model), memory_saving=True)
        for module in welded.modules():
            if isinstance(module, nn.MaxPool2d):
                module.__class__ = pool
        return kept_bytes(lambda: welded(x).square().mean())

    # Instead of 8 bytes an output 1, and the first pooling's output is made again by the next conv.
    outputs = 4 * 16 * 8 * 8, 4 * 32 * 4 * 4
    assert kept(nn.MaxPool2d) - kept(tw.nn.MaxPool2d) >= 7 * sum(outputs) + 4 * outputs[0]


def test_what_is_left_alone():
    class Own(nn.MaxPool2d):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.own = cnn()[:3], Own(2)
            self.indices = nn.MaxPool2d(2, return_indices=True)
            self.patched = nn.MaxPool2d(2)
            self.patched.forward = lambda x: x

        def forward(self, x):
            return self.patched(self.indices(self.own(self.body(x)))[0])

    model, x = Model().eval(), torch.randn(2, 3, 16, 16)
    welded = tw.weld(model)
    assert torch.allclose(welded(x), model(x), atol=1e-5)
    rows = {row.name: row for row in tw.report(welded) if row.conversion == "max_pool2d"}
    assert not any(row.converted for row in rows.values())
    assert "subclass" in rows["own"].detail
    assert "indices" in rows["indices"].detail
    assert "replaced" in rows["patched"].detail


def test_a_model_without_patterns_keeps_its_poolings():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    welded = tw.weld(model)
    assert kinds(welded) == [nn.MaxPool2d]
    assert len(tw.report(welded)) == 0


def test_shared_and_hooked_poolings():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.pool = cnn()[:3], cnn()[4:7], nn.MaxPool2d(2)

        def forward(self, x):
            return self.pool(self.second(self.pool(self.first(x))))

    model, x, seen = Model(), torch.randn(2, 3, 16, 16), []
    model.pool.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    welded = tw.weld(model)
    assert kinds(welded) == [tw.nn.MaxPool2d]
    assert torch.allclose(welded(x), model(x), atol=1e-4)
    assert seen == [(2, 16, 8, 8), (2, 32, 4, 4)] * 2


def test_copies_and_pickles():
    welded, x = tw.weld(cnn()).eval(), torch.randn(2, 3, 16, 16)
    for copied in (copy.deepcopy(welded), pickle.loads(pickle.dumps(welded))):
        assert kinds(copied) == [tw.nn.MaxPool2d] * 2
        assert torch.equal(copied(x), welded(x))


def test_kernels_of_ours_pool_in_a_welded_model():
    welded, ours = tw.weld(cnn()), []
    for module in welded.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda m, args, y: ours.append(y.grad_fn.name()))
    welded(torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last))
    assert len(ours) == 2
    assert not any("MaxPool2DWithIndices" in name for name in ours)

"""Two gloo processes on parts of a batch compute what one process computes on the whole of it.

Stock ``nn.SyncBatchNorm`` refuses the CPU, so the oracle is ``nn.BatchNorm2d`` on the joined batch.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchweld as tw
from torch import nn

from tests.convert.models import BasicBlock, conv_bn
from tests.convert.test_guards import fused_calls

CONV, ROWS = (4, 6, 5), (6,)
# Name: model, shape of a sample, samples of each process.
CASES = {
    "even": (lambda: nn.Sequential(*conv_bn(4, 6), nn.ReLU(), *conv_bn(6, 3)), CONV, (3, 3)),
    "uneven": (lambda: nn.Sequential(*conv_bn(4, 6, stride=2), nn.SiLU()), CONV, (5, 1)),
    "empty rank": (lambda: nn.Sequential(*conv_bn(4, 6), nn.Hardswish()), CONV, (4, 0)),
    "all empty": (lambda: nn.Sequential(*conv_bn(4, 6), nn.ReLU()), CONV, (0, 0)),
    "one value each": (lambda: nn.Sequential(*conv_bn(4, 6, 1), nn.ReLU()), (4, 1, 1), (1, 1)),
    "residual": (lambda: BasicBlock(4, 4), CONV, (1, 2)),
    "bare": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, affine=False, momentum=None)),
        CONV,
        (2, 1),
    ),
    "untracked": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.LeakyReLU(0.2)
        ),
        CONV,
        (2, 3),
    ),
    "no convolution": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(2), nn.BatchNorm1d(4)), CONV, (2, 0),
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()), ROWS, (3, 1),
    ),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    kind, shape, counts = CASES[name]
    model = kind().double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    x = torch.randn(sum(counts), *shape, dtype=torch.float64) + 3.0
    return model, x, counts


def train(model, x):
    """A step's output and gradients, and the buffers after it."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * y.detach().cos()).sum().backward()
    return {
        "output": y.detach(),
        "input": x.grad,
        "parameters": {n: p.grad for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
    }


def synchronized(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))


def worker(rank, folder, device="cpu", backend="gloo"):
    """One of two processes; tests/cuda runs it on a GPU."""
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)

    def make_here(name):
        model, x, counts = make(name)
        return model.to(device), x.to(device), counts

    results = {}
    for name in CASES:
        model, x, counts = make_here(name)
        welded = tw.weld(synchronized(model))
        results[name] = train(welded, x.split(counts)[rank])
        results[name]["report"] = [row.detail for row in tw.report(welded).converted]

    model, x, _ = make_here("even")
    ddp = nn.parallel.DistributedDataParallel(tw.weld(synchronized(model)))
    for _ in range(2):
        ddp.zero_grad()
        results["ddp"] = train(ddp, x.chunk(2)[rank])
    if rank == 0:  # evaluation exchanges nothing: the other process does not take part
        results["eval"] = ddp.module.eval()(x).detach()

    model, x, _ = make_here("one value each")
    try:  # which on a GPU the host would have to wait to know
        tw.weld(synchronized(model))(x[: 1 - rank])
    except ValueError as error:
        results["one value"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    # No teardown: DDP's joins gloo's threads with the GIL in hand, which one of them may wait for.
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_two_processes(ranks, name):
    model, x, _ = make(name)
    expected = train(model, x)
    ours = [rank[name] for rank in ranks]
    for key in ("output", "input"):
        assert_close(torch.cat([rank[key] for rank in ours]), expected[key])
    for key, theirs in expected["parameters"].items():
        assert_close(ours[0]["parameters"][key] + ours[1]["parameters"][key], theirs)
    for key, theirs in expected["buffers"].items():
        assert_close(ours[0]["buffers"][key], theirs)
        assert torch.equal(ours[0]["buffers"][key], ours[1]["buffers"][key])
    norms = sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    assert len(ours[0]["report"]) == (0 if name == "no convolution" else norms)
    assert all("sync_bn" in detail for detail in ours[0]["report"])


def test_data_parallel(ranks):
    model, x, _ = make("even")
    for _ in range(2):
        model.zero_grad()
        expected = train(model, x)
    for rank in (0, 1):
        ours = ranks[rank]["ddp"]
        assert_close(ours["output"], expected["output"].chunk(2)[rank])
        for key, theirs in expected["parameters"].items():
            assert_close(ours["parameters"][f"module.{key}"] * 2, theirs)
        for key, theirs in expected["buffers"].items():
            assert_close(ours["buffers"][f"module.{key}"], theirs)
    assert_close(ranks[0]["eval"], model.eval()(x).detach())


def test_one_value_in_all(ranks):
    for rank in ranks:
        assert "Expected more than 1 value per channel when training" in rank["one value"]


def _alone(name):
    model, x, _ = make(name)
    expected, ours = train(model, x), train(tw.weld(synchronized(make(name)[0])), x)
    assert expected["buffers"].keys() == ours["buffers"].keys()
    for key in ("output", "input"):
        assert_close(ours[key], expected[key])
    for key in ("parameters", "buffers"):
        for ours_, theirs in zip(ours[key].values(), expected[key].values(), strict=True):
            assert_close(ours_, theirs)


@pytest.mark.parametrize("name", ["even", "bare", "residual", "linear"])
def test_without_process_group(name):
    """Plain batch normalization, as stock, and fused."""
    _alone(name)


def test_world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _alone("even")
    finally:
        dist.destroy_process_group()


def test_classes():
    stock = synchronized(make("even")[0])
    welded = tw.weld(stock)
    assert type(welded[1]) is tw.nn.SyncBatchNorm
    assert type(stock[1]) is type(tw.unweld(welded)[1]) is nn.SyncBatchNorm
    again = nn.SyncBatchNorm.convert_sync_batchnorm(tw.weld(make("even")[0]))
    assert type(again[1]) is nn.SyncBatchNorm
    assert fused_calls(lambda: again(make("even")[1])) == 2


def test_folds():
    model, x, _ = make("even")
    train(model, x)
    snapshot = tw.weld(synchronized(model), inference=True)
    assert len(tw.report(snapshot).converted) == 2
    assert_close(snapshot(x), model.eval()(x).detach())

"""Which part of a parameter a process holds, and that random bits are those of the whole."""

import copy

import pytest
import torch
import torchweld as tw
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchweld.optim import _distributed, _state

from tests.optim.models import parameter

BFLOAT16 = torch.bfloat16


@pytest.fixture(params=range(4), ids=lambda rank: f"rank {rank}")
def mesh(request):
    """A mesh of 2 x 2 processes of which only this one exists; nothing is communicated."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group(
        "fake", rank=request.param, world_size=4, store=fake.FakeStore()
    )
    # Names of its own: torch caches by mesh, and meshes of different ranks are equal otherwise.
    names = (f"a{request.param}", f"b{request.param}")
    yield torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    torch.distributed.destroy_process_group()


PLACEMENTS = {
    "first": (Replicate(), Shard(0)),
    "first twice": (Shard(0), Shard(0)),
    "columns": (Replicate(), Shard(1)),
    "blocks": (Shard(0), Shard(1)),
    "blocks of columns first": (Shard(1), Shard(0)),
    "last": (Shard(2), Replicate()),
    "first and last": (Shard(0), Shard(2)),
    "whole": (Replicate(), Replicate()),
}


@pytest.mark.parametrize("shape", [(8, 6, 4), (5, 3, 7), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_place_of_a_shard(mesh, name, shape):
    index = torch.arange(torch.Size(shape).numel()).reshape(shape)
    shard = distribute_tensor(index, mesh, PLACEMENTS[name], src_data_rank=None)
    held = shard.to_local().reshape(-1)
    offset, row, stride = _distributed.place(shard)
    i = torch.arange(held.numel())
    computed = offset + (i // row * stride + i % row if row else i)
    if held.numel():
        assert torch.equal(computed, held)


@pytest.mark.parametrize("name", ["first", "columns", "blocks", "last", "first and last"])
@pytest.mark.parametrize(
    "options", [{"stochastic_rounding": True}, {"kahan": True}, {"split_master": True}], ids=str
)
def test_a_shard_steps_as_the_whole(mesh, name, options):
    whole = parameter(10, 64, 33, dtype=BFLOAT16)

    def shard(tensor):
        return distribute_tensor(
            tensor.detach().clone(), mesh, PLACEMENTS[name], src_data_rank=None
        )

    part = nn.Parameter(shard(whole))
    part.grad = shard(whole.grad)
    optimizers = [tw.optim.AdamW([p], lr=1e-2, **options) for p in (whole, part)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(part.detach().to_local(), shard(whole).to_local())
    state = optimizers[1].state[part]
    for key, value in optimizers[0].state[whole].items():
        if key != "step":
            assert isinstance(state[key], DTensor)
            assert state[key].placements == part.placements
            assert torch.equal(state[key].to_local(), shard(value).to_local())


def test_int8_states_are_given_as_tensors_of_any_sharding(mesh):
    def made():
        values = parameter(64, 33)
        part = nn.Parameter(
            distribute_tensor(values.detach(), mesh, [Shard(0), Shard(1)], src_data_rank=None)
        )
        part.grad = distribute_tensor(values.grad, mesh, [Shard(0), Shard(1)], src_data_rank=None)
        return part, tw.optim.AdamW([part], state_dtype="int8")

    (part, first), (other, second) = made(), made()
    first.step()
    saved = first.state_dict()["state"][0]
    assert {k for k, v in saved.items() if isinstance(v, DTensor)} == {"exp_avg", "exp_avg_sq"}
    assert saved["exp_avg"].dtype == torch.float32
    second.load_state_dict(first.state_dict())
    again = second.state_dict()["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        a, b = (s[name].to_local() for s in (saved, again))
        assert a.norm() > 0
        assert (a - b).norm() < 0.05 * a.norm()
    assert set(second.state[other]) == {*first.state[part]}
    second.step()


def test_a_new_local_part_is_seen(mesh):
    part = nn.Parameter(
        distribute_tensor(torch.ones(8, 4), mesh, [Replicate(), Shard(0)], src_data_rank=None)
    )
    part.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Replicate(), Shard(0)], run_check=False)
    optimizer = tw.optim.AdamW([part])
    optimizer.step()
    part._local_tensor = torch.full((4, 4), 5.0)  # as FSDP2 does when it shards anew
    optimizer.step()
    assert (part.to_local() < 5).all()
    assert (part.to_local() > 4.9).all()


def test_int8_blocks_are_not_cut_into_rows():
    assert _state.BLOCK == 256  # kAdamWBlock in csrc/kernels/adamw.h


def test_zero_redundancy_optimizer_and_clipping(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        with pytest.raises(ValueError, match="max_grad_norm does not work inside a ZeroRedund"):
            ZeroRedundancyOptimizer([parameter(3)], tw.optim.AdamW, max_grad_norm=1.0)
        param = parameter(3)
        optimizer = ZeroRedundancyOptimizer([param], tw.optim.AdamW, lr=0.1, kahan=True)
        optimizer.step()
        assert optimizer.optim.state[param]["step"] == 1
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_parts_are_all_checked_before_any_is_stepped(mesh):
    shard = distribute_tensor(parameter(8, 6).detach(), mesh, [Shard(0)] * 2, src_data_rank=None)
    good, bad = nn.Parameter(shard), parameter(5)
    good.grad = distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)] * 2, src_data_rank=None)
    optimizer = tw.optim.AdamW([good, bad])
    optimizer.observe(statistics=True)
    optimizer.step()
    step, moment = (optimizer.state[good][name] for name in ("step", "exp_avg"))
    before = good.to_local().clone(), step.clone(), moment.to_local().clone()
    right = optimizer.state[bad]["exp_avg"]
    optimizer.state[bad]["exp_avg"] = torch.ones(7)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected"):
            optimizer.step()
    after = good.to_local(), step, moment.to_local()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    optimizer.state[bad]["exp_avg"] = right
    optimizer.step()
    assert step == 2
    assert optimizer.statistics.update_norm > 0


def test_who_raises_takes_part_in_the_sums(mesh, monkeypatch):
    shard = distribute_tensor(parameter(8, 6).detach(), mesh, [Shard(0)] * 2, src_data_rank=None)
    param = nn.Parameter(shard)
    param.grad = distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)] * 2, src_data_rank=None)
    other = parameter(5)
    optimizer = tw.optim.AdamW([param, other])
    optimizer.observe(statistics=True)
    reduced = []
    reduce = _distributed.reduce_sum
    monkeypatch.setattr(
        _distributed, "reduce_sum", lambda *args: reduced.append(1) or reduce(*args)
    )
    optimizer.step()
    calls = len(reduced)
    optimizer.state[other]["exp_avg"] = torch.ones(7)
    with pytest.raises(RuntimeError, match="expected"):
        optimizer.step()
    assert len(reduced) == 2 * calls


@pytest.mark.parametrize("norm", [3.0, torch.inf])
def test_a_process_without_gradients_skips_as_the_others_do(mesh, monkeypatch, norm):
    shard = distribute_tensor(parameter(8, 6).detach(), mesh, [Shard(0)] * 2, src_data_rank=None)
    param = nn.Parameter(shard)
    before = param.to_local().detach().clone()
    optimizer = tw.optim.AdamW([param])
    monkeypatch.setattr(
        _distributed, "reduce_sum", lambda value, _: value + value.new_tensor([norm**2, 0])
    )
    scaler = tw.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.grad_norm == norm / 8
    assert optimizer.skipped_steps == (norm == torch.inf)
    assert scaler.get_scale() == (4 if norm == torch.inf else 8)
    assert torch.equal(param.to_local(), before)


def test_a_parameter_that_only_other_processes_hold_is_left_to_them(mesh):
    others = {*range(4)} - {torch.distributed.get_rank()}
    elsewhere = DeviceMesh("cpu", sorted(others), _init_backend=True)
    theirs = nn.Parameter(
        distribute_tensor(torch.ones(8, 6), elsewhere, [Shard(0)], src_data_rank=None)
    )
    ours, expected = parameter(3), parameter(3)
    tw.optim.AdamW([theirs, ours], max_grad_norm=0.1).step()
    tw.optim.AdamW([expected], max_grad_norm=0.1).step()
    assert torch.equal(ours, expected)


def test_torch_may_rename_what_is_its_own(monkeypatch):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    monkeypatch.delattr(ZeroRedundancyOptimizer, "_init_local_optimizer")
    assert tw.optim.AdamW([parameter(3)])._zero is None


def test_a_copy_of_a_zero_redundancy_optimizers_part(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        params = [parameter(n, dtype=BFLOAT16, seed=n) for n in (300, 900)]
        zero = ZeroRedundancyOptimizer(params, tw.optim.AdamW, lr=0.1, stochastic_rounding=True)
        zero.step()
        first = zero.optim
        held = first.param_groups[0]["params"]
        zero._param_to_index_cache = {params[0]: 7, params[1]: 3}  # as where there are more
        first._plan = None
        second = copy.deepcopy(first)
        assert list(second._ids().values()) == [first._ids()[p] for p in held]
        for p, q in zip(held, second.param_groups[0]["params"], strict=True):
            q.grad = p.grad.clone()
        first.step()
        second.step()
        for p, q in zip(held, second.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)
    finally:
        torch.distributed.destroy_process_group()

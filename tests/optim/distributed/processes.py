"""What each of two gloo processes does: scenarios by name, each returns what a test looks at."""

import datetime
import os
import traceback
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchweld as tw
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.optim.distributed.model import (
    CLIPPED,
    HYPER,
    LAYOUTS,
    STEPS,
    Model,
    build,
    fed,
    observe,
    optimizer_for,
    snapshot,
    train,
    train_scaled,
)  # fmt: skip


def data_parallel(rank, layout):
    model, options = build(layout)
    optimizer = optimizer_for(model, options)
    norms = train(DistributedDataParallel(model), optimizer, rank)
    return {"state": snapshot(model, optimizer), "norms": norms}


def sharded(layout, mesh=None, **options):
    """A model in shards: each part by itself, which FSDP2 gathers and frees as it goes."""
    model, arguments = build(layout)
    for part in model.children():
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options), arguments


def fully_sharded(rank, layout, mesh=None, **options):
    model, arguments = sharded(layout, mesh, **options)
    optimizer = optimizer_for(model, arguments)
    norms = train(model, optimizer, rank)
    return {"state": snapshot(model, optimizer), "norms": norms}


def replicas_of_shards(rank, layout):
    """Both ranks hold everything: a norm that added their squares up would count it twice."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return fully_sharded(rank, layout, mesh)


def sharded_columns(rank, layout):
    def placement(param):
        return Shard(1) if param.ndim > 1 and param.shape[1] % 2 == 0 else None

    return fully_sharded(rank, layout, shard_placement_fn=placement)


def partly_sharded(rank, layout):
    """Parameters outside of the shards, whole on each rank, beside parameters in shards."""
    model, options = build(layout)
    fully_shard(model, ignored_params={*model.layer.parameters()})
    optimizer = optimizer_for(model, options)

    def average(param):
        dist.all_reduce(param.grad)
        param.grad /= 2

    for param in model.layer.parameters():
        param.register_post_accumulate_grad_hook(average)
    norms = train(model, optimizer, rank)
    return {"state": snapshot(model, optimizer), "norms": norms}


def failing(rank, layout):
    """In the first and the last of three steps, one process has a gradient without a norm."""
    model, options = build(layout)
    weight = model.layer.weight
    fully_shard(model, ignored_params={*model.layer.parameters()})
    optimizer = optimizer_for(model, options)
    messages = []
    for bad in (True, False, True):
        optimizer.zero_grad()
        model(fed(0, None, weight.dtype)).backward()
        if bad and rank == 1:
            weight.grad = weight.grad.to_sparse()
        try:
            optimizer.step()
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    return {"state": snapshot(model, optimizer), "messages": messages}


def lopsided(rank, layout):
    """Steps in which a process has no gradient at all, all of them, and those of one part only."""
    model, options = sharded(layout)
    optimizer = optimizer_for(model, options)
    optimizer.observe(statistics=True)
    params = [*model.parameters()]

    def norm(parts):
        squares = sum(part.double().square().sum() for part in parts)
        total = torch.zeros(1, dtype=torch.float64) + squares
        dist.all_reduce(total)
        return total.sqrt().squeeze()

    seen = []
    for step, (who, part) in enumerate([(1, model), (None, model), (0, model.embed)]):
        optimizer.zero_grad()
        model(fed(step, rank, params[0].dtype)).backward()
        for param in part.parameters() if rank == who else ():
            param.grad = None
        expected = norm(p.grad.to_local() for p in params if p.grad is not None)
        before = [p.detach().to_local().clone() for p in params]
        optimizer.step()
        update = norm(p.detach().to_local() - b for p, b in zip(params, before, strict=True))
        seen.append((optimizer.grad_norm, expected, optimizer.statistics.update_norm, update))
    return seen


def sharded_twice(rank, layout, shape):
    """FSDP2 over parameters that tensor parallelism has cut along the same dimension."""
    model, options = build(layout)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    for part in model.children():
        for name, param in [*part.named_parameters()]:
            cut = distribute_tensor(param.detach(), mesh["tensor"], [Shard(0)])
            part.register_parameter(name, torch.nn.Parameter(cut))
    fully_shard(model, mesh=mesh["data"])
    optimizer = optimizer_for(model, options)
    dtype = next(model.parameters()).dtype
    for step in range(STEPS):
        mean = fed(step, None, dtype)
        for part, module in model.named_children():
            for name, param in module.named_parameters():
                whole = distribute_tensor(mean[part][name], mesh, [Replicate()] * 2)
                param.grad = whole.redistribute(mesh, param.placements)
        optimizer.step()
    return {"state": snapshot(model, optimizer)}


def tensor_parallel(rank, layout):
    """Parameters distributed by hand, with gradients placed as backward leaves them."""
    model, options = build(layout)
    mesh = init_device_mesh("cpu", (2,))
    rows, columns, whole = (Shard(0), Shard(0)), (Shard(1), Shard(1)), (Replicate(), Replicate())
    placements = {  # of a parameter, of its gradient; where there is none, a plain tensor
        ("embed", "weight"): columns,
        ("layer", "weight"): (Replicate(), Partial()),  # of weights beside a sharded input
        ("layer", "bias"): whole,
        ("layer", "scale"): (Shard(0), Replicate()),
        ("head", "kernel"): rows,
    }
    for (part, name), (placement, _) in placements.items():
        module = model.get_submodule(part)
        param = distribute_tensor(getattr(module, name).detach(), mesh, [placement])
        module.register_parameter(name, torch.nn.Parameter(param))
    optimizer = optimizer_for(model, options)
    dtype, norms = next(model.parameters()).dtype, []
    for step in range(STEPS):
        mine, mean = fed(step, rank, dtype), fed(step, None, dtype)
        for part, module in model.named_children():
            for name, param in module.named_parameters():
                grad = mean[part][name]
                _, placement = placements.get((part, name), (None, None))
                if isinstance(placement, Partial):
                    grad = DTensor.from_local(mine[part][name] / 2, mesh, [placement])
                elif placement is not None:
                    grad = distribute_tensor(grad, mesh, [placement])
                param.grad = grad
        optimizer.step()
        norms.append(getattr(optimizer, "grad_norm", None))
    return {"state": snapshot(model, optimizer), "norms": norms}


SCALERS = {"tw": tw.amp.GradScaler, "torch": torch.amp.GradScaler}


def scaled(rank, wrap, scaler):
    if wrap == "DDP":
        model, options = build("clipped")
        wrapped = DistributedDataParallel(model)
    else:
        model, options = sharded("clipped")
        wrapped = model
    optimizer = optimizer_for(model, options)
    scales = train_scaled(wrapped, optimizer, rank, SCALERS[scaler]("cpu", init_scale=1024.0))
    return {"state": snapshot(model, optimizer), "scales": scales}


def moved(rank, layout):
    """Converting a model puts other tensors under the parameters that the optimizer knows."""
    model, options = sharded(layout)
    optimizer = optimizer_for(model, options)
    dtype = next(model.parameters()).dtype
    train(model, optimizer, rank, range(1))
    model.to(torch.float64).to(dtype)
    train(model, optimizer, rank, range(1, STEPS))
    return {"state": snapshot(model, optimizer)}


def zero(rank, layout):
    model, options = build(layout)
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=tw.optim.AdamW, **options
    )
    train(ddp, optimizer, rank)
    optimizer.consolidate_state_dict()
    states = optimizer.state_dict()["state"] if rank == 0 else None
    names = [name for name, _ in model.named_parameters()]
    params = {name: param.detach() for name, param in model.named_parameters()}
    return {
        "params": params,
        "states": states and {names[i]: values for i, values in states.items()},
        "held": len(optimizer.optim.state),
    }


def zero_resumed(rank, layout):
    """Gather the states after the first step, give them to all, and train on from them."""

    def make():
        model, options = build(layout)
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=tw.optim.AdamW, **options
        )
        return model, DistributedDataParallel(model), optimizer

    model, ddp, optimizer = make()
    train(ddp, optimizer, rank, range(1))
    optimizer.consolidate_state_dict()
    state = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(state)
    again, ddp, optimizer = make()
    again.load_state_dict(model.state_dict())
    optimizer.load_state_dict(state[0])
    train(ddp, optimizer, rank, range(1, STEPS))
    return {name: param.detach() for name, param in again.named_parameters()}


def zero_refuses(rank, **option):
    try:
        ZeroRedundancyOptimizer(
            Model().parameters(), optimizer_class=tw.optim.AdamW, **option, **HYPER
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def saved(rank, layout, folder):
    """Save after the first step, train on, and start again from what was saved."""
    model, options = sharded(layout)
    optimizer = optimizer_for(model, options)
    train(model, optimizer, rank, range(1))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    path = f"{folder}/{layout} of two"
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    train(model, optimizer, rank, range(1, STEPS))
    return {"state": snapshot(model, optimizer), "again": resumed(rank, layout, path)["state"]}


def resumed(rank, layout, path):
    """Start from a checkpoint made after the first step, and train on."""
    model, options = sharded(layout)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = optimizer_for(model, options)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    train(model, optimizer, rank, range(1, STEPS))
    return {"state": snapshot(model, optimizer)}


def whole_checkpoint(rank, layout):
    """Gather the states of the first step, and train on from what the first rank has of them."""
    model, options = sharded(layout)
    optimizer = optimizer_for(model, options)
    train(model, optimizer, rank, range(1))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_state_dict(model, optimizer, options=whole)

    model, options = sharded(layout)
    optimizer = optimizer_for(model, options)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model_state, optimizer_state = gathered if rank == 0 else ({}, {})
    set_model_state_dict(model, model_state, options=spread)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=spread)
    train(model, optimizer, rank, range(1, STEPS))
    return {"state": snapshot(model, optimizer), "gathered": [*gathered[1].get("state", {})]}


def observed(rank, layout):
    model, options = sharded(layout)
    optimizer = optimizer_for(model, options)
    return observe(model, optimizer, rank)


EVERY = [*LAYOUTS, *CLIPPED]
SOME = ["float32", "int8 states", "stochastic", "clipped"]
# What is done to a model, and the layouts in which it is.
WRAPPERS = {
    "DDP": (data_parallel, EVERY),
    "FSDP2": (fully_sharded, EVERY),
    "FSDP2 with replicas": (replicas_of_shards, SOME),
    "FSDP2 by columns": (sharded_columns, SOME),
    "FSDP2 in part": (partly_sharded, SOME),
    "FSDP2 over tensors": (partial(sharded_twice, shape=(1, 2)), SOME),
    "FSDP2 of tensors": (partial(sharded_twice, shape=(2, 1)), SOME),
    "tensor parallel": (tensor_parallel, EVERY),
    "FSDP2 moved": (moved, SOME),
}


def scenarios(folder):
    for wrapper, (run, layouts) in WRAPPERS.items():
        for layout in layouts:
            yield f"{wrapper}, {layout}", run, (layout,)
    for layout in EVERY:
        yield f"whole checkpoint, {layout}", whole_checkpoint, (layout,)
        yield f"observed, {layout}", observed, (layout,)
        yield f"checkpoint of two, {layout}", saved, (layout, folder)
        yield f"checkpoint of one, {layout}", resumed, (layout, f"{folder}/{layout} of one")
    for layout in LAYOUTS:
        yield f"ZeRO, {layout}", zero, (layout,)
        yield f"ZeRO resumed, {layout}", zero_resumed, (layout,)
    for wrap in "DDP", "FSDP2":
        for scaler in SCALERS:
            yield f"{wrap}, {scaler} GradScaler", scaled, (wrap, scaler)
    for option in {"max_grad_norm": 1.0}, {"skip_nonfinite": True}:
        yield f"ZeRO with {next(iter(option))}", partial(zero_refuses, **option), ()
    yield "failing", failing, ("clipped",)
    yield "lopsided", lopsided, ("clipped",)


def main(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    torch.set_num_threads(1)
    results = {}
    for name, run, arguments in scenarios(folder):
        try:
            results[name] = run(rank, *arguments)
        except (Exception, dcp.api.CheckpointException):  # the latter is none of the former
            results[name] = traceback.format_exc()
            if "gloo/" in results[name]:
                break  # one waits for the other, and would at every turn
    torch.save(results, f"{folder}/{rank}.pt")
    if len(results) == len([*scenarios(folder)]):
        dist.barrier()
    # No teardown: DDP's joins gloo's threads with the GIL in hand, which one of them may wait for.
    os._exit(0)

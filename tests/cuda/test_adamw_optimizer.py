"""tw.optim.AdamW on a GPU: the bits of the CPU, without a wait, in streams, graphs and shards."""

import copy
import math

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.optim.models import parameter
from tests.optim.on_device import *  # noqa: F403
from tests.optim.on_device import FORMATS, assert_same, bits, make, new_grads, train

BFLOAT16 = torch.bfloat16
OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "may skip": {"max_grad_norm": 0.5, "skip_nonfinite": True},
}


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_bits_of_the_cpu(name, options):
    results = []
    for device in ("cpu", "cuda"):
        params, optimizer = make(device, name, **options)
        optimizer.observe(average=0.9)
        train(params, optimizer, range(3))
        results.append(bits(params, optimizer))
        if options:
            results[-1].append(optimizer.grad_norm.cpu())
    assert_same(*results)


@pytest.mark.parametrize("name", FORMATS)
def test_statistics_of_the_cpu(name):
    seen = []
    for device in ("cpu", "cuda"):
        params, optimizer = make(device, name)
        optimizer.observe(statistics=True)
        train(params, optimizer, range(2))
        seen.append([value.cpu() for value in optimizer.statistics])
    (norm, update, lost, nonfinite), (on_gpu, update_on_gpu, *others) = seen
    assert norm == on_gpu
    assert [lost, nonfinite] == others
    torch.testing.assert_close(update, update_on_gpu, rtol=1e-13, atol=0)


@pytest.mark.parametrize("memory", ["gaps", "transposed"])
@pytest.mark.parametrize("name", ["float32", "kahan", "int8 states"])
def test_memory_of_any_layout(name, memory):
    dtype, form = FORMATS[name]
    results = []
    for device in ("cpu", "cuda"):
        values = parameter(64, 66, dtype=dtype).detach().to(device)
        param = nn.Parameter(values[:, ::2] if memory == "gaps" else values.t())
        optimizer = tw.optim.AdamW([param], lr=1e-2, **form)
        train([param], optimizer, range(3))
        results.append(bits([param], optimizer))
    assert_same(*results)


@pytest.mark.parametrize("name", FORMATS)
def test_the_host_never_waits(name, no_sync):
    params, optimizer = make(
        "cuda", name, max_grad_norm=0.5, skip_nonfinite=True, lr=torch.tensor(1e-2, device="cuda")
    )
    optimizer.observe(statistics=True, average=0.9)
    train(params, optimizer, range(1))
    new = [torch.randn_like(p) for p in params]
    with no_sync():
        for _ in range(3):
            for p, grad in zip(params, new, strict=True):
                p.grad = grad.clone()
            optimizer.step()
    assert optimizer.skipped_steps == 0


def test_the_host_does_not_wait_for_a_scaler(no_sync):
    param = nn.Parameter(torch.ones(5000, device="cuda"))
    optimizer = tw.optim.AdamW([param], max_grad_norm=1.0)
    scaler = tw.amp.GradScaler("cuda", init_scale=1024.0)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale((param * param).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    with no_sync():
        step(1.0)
        step(math.inf)
        step(1.0)
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 512
    assert optimizer.state[param]["step"] == 3


@pytest.mark.parametrize("name", ["float32", "stochastic", "split, int8", "bfloat16 states"])
@pytest.mark.parametrize("clipped", [False, True])
def test_capture_in_a_graph(name, clipped, graph):
    """Each replay is a step of its own: step counts and random bits go on."""
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True} if clipped else {}
    results = []
    for captured in (False, True):
        params, optimizer = make(
            "cuda", name, lr=torch.tensor(1e-2, device="cuda"), capturable=True, **options
        )
        new_grads(params, 0)
        step = graph(optimizer.step, warm_up=2) if captured else optimizer.step
        if not captured:
            for _ in range(2):
                optimizer.step()
        for k in range(3):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (k + 1))
            for p in params:
                p.grad.mul_(1.1)
            step()
        if clipped:  # a step that is skipped counts itself in a graph too
            params[0].grad[7] = math.nan
            step()
            assert optimizer.skipped_steps == 1
            params[0].grad[7] = 0.1
        optimizer.step()  # and without the graph again
        step()
        assert optimizer.state[params[0]]["step"] == 7
        results.append(bits(params, optimizer))
    assert_same(*results)


def test_a_whole_training_step_in_a_graph():
    """With gradients of the graph's own memory, and a scaler."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).cuda()
        optimizer = tw.optim.AdamW(model.parameters(), max_grad_norm=1.0, capturable=True)
        scaler = tw.amp.GradScaler("cuda", init_scale=256.0, growth_interval=3)
        x = torch.randn(8, 20, device="cuda")

        def step(model=model, optimizer=optimizer, scaler=scaler, x=x):
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            recorded = torch.cuda.CUDAGraph()
            optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(recorded, stream=stream):
                step()
            step = recorded.replay
        for _ in range(4):
            step()
        results.append([*map(torch.clone, model.parameters()), scaler._scale.clone()])
    assert_same(*results)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_states_are_not_made_in_a_graph():
    params, optimizer = make("cuda", "float32")
    new_grads(params, 0)
    recorded = torch.cuda.CUDAGraph()
    message = "do one step like it before the capture"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(recorded):
        optimizer.step()


@pytest.mark.parametrize("name", ["float32", "int8 states"])
def test_on_a_side_stream_and_back(name):
    params, optimizer = make("cuda", name, max_grad_norm=0.5)
    on_cpu, reference = make("cpu", name, max_grad_norm=0.5)
    stream = torch.cuda.Stream()
    for step in range(4):
        new_grads(params, step)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if step % 2 else torch.cuda.current_stream()):
            torch.cuda._sleep(20_000_000)
            for p in params:
                p.grad.mul_(2)  # before the step, or its result is another
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        new_grads(on_cpu, step, scale=2.0)
        reference.step()
    for p, q in zip(params, on_cpu, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=1e-6)


def test_steps_keep_no_memory(no_leak):
    params, optimizer = make("cuda", "float32", max_grad_norm=0.5)
    optimizer.observe(statistics=True)
    new_grads(params, 0)
    no_leak(optimizer.step)


@pytest.mark.parametrize("statistics", [False, True])
def test_parameters_on_several_devices(statistics):
    """One norm over all, and all are skipped or none."""
    others = ["cpu"] if torch.cuda.device_count() == 1 else ["cpu", "cuda:1"]
    devices = ["cuda:0", *others]

    def made(places):
        params = [
            nn.Parameter(parameter(n, seed=n).detach().to(place))
            for n, place in zip((5000, 300, 40), places, strict=False)
        ]
        optimizer = tw.optim.AdamW(params, lr=1e-2, max_grad_norm=0.5, skip_nonfinite=True)
        optimizer.observe(statistics=statistics)
        return params, optimizer

    params, optimizer = made(devices)
    on_cpu, reference = made(["cpu"] * len(devices))
    for step in range(4):
        for list_, o in ((params, optimizer), (on_cpu, reference)):
            new_grads(list_, step)
            if step == 2:
                list_[1].grad[3] = math.inf
            o.step()
        if statistics:
            for a, b in zip(optimizer.statistics, reference.statistics, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=0, equal_nan=True)
    assert optimizer.skipped_steps == 1
    for p, q in zip(params, on_cpu, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-6, atol=1e-7)


def test_a_model_that_moved_without_its_states():
    model = nn.Linear(3, 2)
    optimizer = tw.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    model.cuda()
    model(torch.ones(1, 3, device="cuda")).sum().backward()
    with pytest.raises(RuntimeError, match="device"):
        optimizer.step()
    optimizer.load_state_dict(kept)
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 3
    assert optimizer.state[model.weight]["exp_avg"].is_cuda


@pytest.fixture
def process_group(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["float32", "split", "stochastic, int8"])
@pytest.mark.usefixtures("process_group")
def test_fsdp_of_one_process(name):
    from torch.distributed.fsdp import fully_shard

    dtype, form = FORMATS[name]
    results = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).to("cuda", dtype)
        if sharded:
            fully_shard(model)
        optimizer = tw.optim.AdamW(model.parameters(), max_grad_norm=0.1, **form)
        optimizer.observe(statistics=True)
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(8, 20, device="cuda", dtype=dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        params = [p.to_local() if sharded else p for p in model.parameters()]
        results.append([*params, *optimizer.statistics])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("process_group")
def test_the_host_does_not_wait_for_shards(no_sync):
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(20, 30).cuda()
    fully_shard(model)
    optimizer = tw.optim.AdamW(model.parameters(), max_grad_norm=0.1)
    for _ in range(2):
        model(torch.ones(8, 20, device="cuda")).square().mean().backward()
        optimizer.step()
    with no_sync():
        optimizer.step()


@pytest.mark.parametrize("name", ["stochastic, int8", "bfloat16"])
def test_past_2_to_31_elements(name):
    size = 2**31 + 2**15 + 3
    if torch.cuda.mem_get_info()[0] < 14 * size:
        pytest.skip("needs 28 GiB of GPU memory")
    dtype, form = FORMATS[name]
    param = nn.Parameter(torch.zeros(size, dtype=dtype, device="cuda"))
    param.grad = torch.zeros_like(param)
    param.grad[-5:] = 1.0
    optimizer = tw.optim.AdamW([param], lr=1e-2, max_grad_norm=1e3, **form)
    optimizer.step()
    assert optimizer.grad_norm.item() == 5**0.5
    assert (param[-5:].float() + 1e-2).abs().max() < 1e-4
    assert not param[: 2**31].any()

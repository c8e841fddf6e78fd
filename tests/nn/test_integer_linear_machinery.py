"""Layers with an integer weight in torch's machinery: gradients, compilers, files, processes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torchweld import _C

from tests.nn.kinds import KINDS, input_seen, make, randn, weight_of
from tests.reference import quantized_linear as reference

ROOT = Path(__file__).parent.parent.parent

each_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body = make(kind, 24, 37, activation="gelu")[1]
        self.second = make(kind, 24, 24)[1]
        self.head = make(kind, 10, 24, bias=False)[1]

    def forward(self, x):
        x = self.body(x)
        return self.head(self.second(x, x))


# --- gradients -----------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_gradients_are_those_of_the_rounded_layer(kind, activation):
    _, module = make(kind, activation=activation)
    x, residual = randn(5, 37).requires_grad_(), randn(5, 21).requires_grad_()
    weights = randn(5, 21)
    got = torch.autograd.grad((module(x, residual) * weights).sum(), (x, residual, module.bias))

    weight = weight_of(kind, module.state_dict())
    seen = input_seen(kind, x.detach()).requires_grad_()
    r, bias = residual.detach().double().requires_grad_(), module.bias.detach().double()
    bias.requires_grad_()
    y = reference.ACTIVATIONS[activation](seen @ weight.T + bias) + r
    expected = torch.autograd.grad((y * weights).sum(), (seen, r, bias))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@each_kind
def test_only_the_bias_is_a_parameter(kind):
    _, module = make(kind)
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    with torch.no_grad():
        assert not module(randn(2, 37)).requires_grad


@each_kind
def test_low_rank_adapters_train_over_a_frozen_base(kind):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.down = nn.Linear(37, 4, bias=False)
            self.up = nn.Linear(4, 21, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base(x, self.up(self.down(x)))

    _, base = make(kind)
    model = nn.Sequential(nn.Linear(37, 37), Adapted(base.requires_grad_(False)), nn.Linear(21, 3))
    state = copy.deepcopy(base.state_dict())
    x = randn(64, 37)
    target = x @ randn(37, 3) / 6
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert model[0].weight.grad.any()  # below the base
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())


@each_kind
def test_anomaly_mode_hooks_and_checkpoint(kind):
    net, x = Net(kind), randn(3, 37).requires_grad_()
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    seen = []
    net.body.register_forward_hook(lambda *_: seen.append("forward"))
    net.body.register_full_backward_hook(lambda *_: seen.append("backward"))
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        (actual,) = torch.autograd.grad(net(x).sum(), x)
    assert torch.equal(actual, expected)
    assert seen == ["forward", "backward"]
    (actual,) = torch.autograd.grad(checkpoint(net, x, use_reentrant=False).sum(), x)
    assert torch.equal(actual, expected)


@each_kind
def test_gradients_by_torch_func(kind):
    _, module = make(kind)
    x = randn(3, 37)
    (expected,) = torch.autograd.grad(module(x.requires_grad_()).square().sum(), x)
    assert torch.equal(torch.func.grad(lambda x: module(x).square().sum())(x.detach()), expected)


@each_kind
def test_no_grad_and_inference_mode(kind):
    net, x = Net(kind), randn(3, 37).requires_grad_()
    expected = net(x)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = net(x)
        assert not y.requires_grad
        assert torch.equal(y, expected)


@each_kind
def test_buffers_that_are_parametrized(kind):
    _, module = make(kind)
    x = randn(3, 37)
    expected = module(x)
    for name in [name for name, _ in module.named_buffers()]:
        parametrize.register_parametrization(module, name, nn.Identity())
    assert not [*module._buffers]
    with torch.no_grad():
        assert torch.equal(module(x), expected)


@each_kind
def test_autocast(kind):
    net = Net(kind)
    x = randn(3, 37)
    state = copy.deepcopy(net.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert torch.equal(y, net(x.bfloat16()))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


# --- compilers and files -------------------------------------------------------------------------


@each_kind
def test_torch_compile_with_gradient(kind):
    net = Net(kind)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 5):
        x = randn(m, 37).requires_grad_()
        y = net(x)
        actual = compiled(x)
        assert torch.equal(actual, y)
        (expected,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(torch.autograd.grad(actual.sum(), x)[0], expected)


def test_torch_compile_inductor():
    model = nn.ModuleList(map(Net, KINDS))

    def run(x):
        return [net(x) for net in model]

    x = randn(3, 37)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x))


# torch 2.11 makes tensors over read-only bytes when it loads an archive.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@each_kind
def test_torch_export(kind, tmp_path):
    net = Net(kind)
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (randn(3, 37),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(loaded(randn(7, 37)), net(randn(7, 37)))


@pytest.mark.filterwarnings("ignore")  # Inductor's own, of its compilers and options
def test_aot_inductor(tmp_path):
    nets = nn.ModuleList(map(Net, KINDS))

    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nets

        def forward(self, x):
            return [net(x) for net in self.nets]

    model = All().eval()
    x = randn(5, 37)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        path = str(tmp_path / "net.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        loaded = torch._inductor.aoti_load_package(path)
        for rows in (5, 2):
            torch.testing.assert_close(list(loaded(x[:rows])), model(x[:rows]))


@each_kind
@pytest.mark.parametrize("make_script", ["script", "trace"])
def test_torchscript(kind, make_script, tmp_path):
    net = Net(kind)
    x = randn(3, 37)
    scripted = torch.jit.script(net) if make_script == "script" else torch.jit.trace(net, x)
    torch.jit.save(scripted, tmp_path / "net.pt")
    loaded = torch.jit.load(tmp_path / "net.pt")
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(loaded(randn(2, 5, 37)), net(randn(2, 5, 37)))
    frozen = torch.jit.freeze(loaded.eval())
    assert torch.equal(frozen(x), net(x))
    with pytest.raises(RuntimeError, match=r"input: expected \[..., 37\], got \[3, 36\]"):
        loaded(randn(3, 36))


def test_safetensors():
    safetensors = pytest.importorskip("safetensors.torch")
    for kind in KINDS:
        net, other = Net(kind), Net(kind)
        for buffer in other.buffers():
            buffer.zero_()
        other.load_state_dict(safetensors.load(safetensors.save(net.state_dict())))
        assert torch.equal(other(randn(3, 37)), net(randn(3, 37)))


_LOAD = """
import sys, torch
from tests.nn.kinds import KINDS, empty, randn
folder = sys.argv[1]
for kind in KINDS:
    module = empty(kind, activation="gelu")
    module.load_state_dict(torch.load(f"{folder}/{kind}.state"))
    scripted = torch.jit.load(f"{folder}/{kind}.pt")
    torch.save([module(randn(7, 37)), scripted(randn(7, 37))], f"{folder}/{kind}.out")
"""


def test_files_move_between_instruction_sets(tmp_path):
    if "avx2" not in _C.available_cpu_capabilities().split(","):
        pytest.skip("needs AVX2 beside what is the default here")
    for kind in KINDS:
        _, module = make(kind, activation="gelu")
        torch.save(module.state_dict(), tmp_path / f"{kind}.state")
        torch.jit.save(torch.jit.script(module), tmp_path / f"{kind}.pt")
    environment = os.environ | {"TORCHWELD_CPU_CAPABILITY": "avx2", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _LOAD, str(tmp_path)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    for kind in KINDS:
        expected = make(kind, activation="gelu")[1](randn(7, 37))
        for got in torch.load(tmp_path / f"{kind}.out"):
            if kind == "weight only":  # float products: in another order, not other numbers
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(got, expected)


# --- processes -----------------------------------------------------------------------------------


# A process that starts imports torch, which takes long where others want the cores as well.
PATIENCE = 600


def _answer(net, x, queue, written):
    first = net(x)
    queue.put(first.tolist())
    assert written.wait(PATIENCE)
    queue.put(net(x).tolist())


def test_memory_shared_between_processes():
    x = randn(3, 37)
    nets = nn.ModuleList(map(Net, KINDS)).share_memory()
    model = nn.Sequential(nets[0])
    context = multiprocessing.get_context("spawn")
    queue, written = context.Queue(), context.Event()
    with torch.no_grad():
        for net in nets:
            net.requires_grad_(False)
        process = context.Process(target=_answer, args=(model, x, queue, written))
        process.start()
        assert queue.get(timeout=PATIENCE) == model(x).tolist()
        # What one process loads, the other runs: the buffers are written in place.
        state = model.state_dict()
        state["0.head.weight_scale"] = state["0.head.weight_scale"] * 2
        before = model(x)
        model.load_state_dict(state)
        written.set()
        assert queue.get(timeout=PATIENCE) == model(x).tolist() == (2 * before).tolist()
        process.join(PATIENCE)
    assert process.exitcode == 0
    for net in nets:
        assert all(tensor.is_shared() for tensor in [*net.buffers(), *net.parameters()])

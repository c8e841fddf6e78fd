"""Whole models: a training step with its optimizer, and inference in float32 and bfloat16."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
import torchweld as tw
from torch import Tensor, nn

from benchmarks import cases, inference
from benchmarks.device import CPU, Device
from benchmarks.harness import Contender, Job, Setup
from benchmarks.inference import LAYOUTS
from benchmarks.kept import kept_bytes
from benchmarks.machine import Cost
from benchmarks.records import OURS, STOCK

# Logits, running statistics, and all gradients as one vector: in a deep network rounding moves
# values across the kinks of ReLU, and whole paths of the gradient with them (stock: up to 0.05).
TRAINING = (1e-4, 1e-4, 0.15)
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.25}
LR = 1e-4


def jobs(quick: bool, compiled: bool) -> Iterator[Job]:
    for case in cases.TRAINING_QUICK if quick else cases.TRAINING:
        yield Job("model training", case.name, partial(training, case, compiled))
    for case in cases.INFERENCE_QUICK if quick else cases.INFERENCE:
        setup = partial(evaluation, case, compiled, dtype=torch.float32)
        yield Job("model inference", case.name, setup)
    for case in cases.INFERENCE_QUICK if quick else cases.INFERENCE:
        setup = partial(evaluation, case, compiled, dtype=torch.bfloat16)
        yield Job("model inference bfloat16", case.name, setup)


def problem(case: cases.ModelCase) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return case.build(), torch.randn(case.input_shape)


def training(case: cases.ModelCase, compiled: bool) -> Setup:
    model, x = problem(case)
    target = torch.randint(10, (case.batch,))

    def contender(name: str, layout: str, adapt: Callable, adamw: Callable, kind: str = STOCK):
        memory_format = LAYOUTS[layout]
        own = copy.deepcopy(model).to(memory_format=memory_format)
        step = Step(own, adapt(own), adamw(own.parameters(), lr=LR))
        laid = x.contiguous(memory_format=memory_format)
        run = partial(step, laid, target)
        check = partial(step.results, run)
        # On a copy, since a forward moves the running statistics.
        saved = (
            None
            if name == "torch.compile"
            else kept_bytes(partial(adapt(copy.deepcopy(own)), laid))
        )
        return Contender(f"{name} {layout}", run, TRAINING, kind, check, saved)

    fused = partial(torch.optim.AdamW, fused=True)
    contenders = []
    for layout in LAYOUTS:
        contenders.append(contender("eager", layout, lambda m: m, fused))
        if compiled:
            contenders.append(contender("torch.compile", layout, torch.compile, fused))
        contenders.append(contender("torchweld", layout, tw.weld, tw.optim.AdamW, OURS))
    for name, how in (("memory saving", True), ("recompute", "recompute")):
        weld = partial(tw.weld, memory_saving=how)
        contenders.append(contender(f"torchweld, {name}", "NHWC", weld, tw.optim.AdamW, OURS))
    exact = copy.deepcopy(model).double()
    step = Step(exact, exact, torch.optim.AdamW(exact.parameters(), lr=LR))
    expected = step.results(partial(step, x.double(), target))
    return Setup(contenders, expected, costs(model, x, training=True))


class Step:
    """A training step of a model with an optimizer."""

    def __init__(self, model: nn.Module, forward: Callable, optimizer: torch.optim.Optimizer):
        self.model, self.forward, self.optimizer = model, forward, optimizer

    def __call__(self, x: Tensor, target: Tensor) -> Sequence[Tensor]:
        """Return the logits."""
        self.optimizer.zero_grad()
        output = self.forward(x)
        F.cross_entropy(output, target).backward()
        self.optimizer.step()
        return (output,)

    def results(self, run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Return logits, running statistics as one vector and all gradients as another."""
        (output,) = run()
        gradients = [p.grad.flatten() for p in self.model.parameters()]
        running = [b.flatten() for b in self.model.buffers() if b.is_floating_point()]
        return output, torch.cat(running), torch.cat(gradients)


def evaluation(case: cases.ModelCase, compiled: bool, *, dtype: torch.dtype) -> Setup:
    model, x, expected = evaluated(case)
    weld = partial(tw.weld, inference=True)
    contenders = inference.contenders(
        model, x, TOLERANCES[dtype], fold=fold, weld=weld, compiled=compiled, dtype=dtype
    )
    return Setup(contenders, expected, costs(model, x, unit=str(dtype).removeprefix("torch.")))


def evaluated(
    case: cases.ModelCase, device: Device = CPU
) -> tuple[nn.Module, Tensor, Sequence[Tensor]]:
    """Return a model in evaluation mode that has seen its input, and the exact output."""
    model, x = (one.to(device.type) for one in problem(case))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the running statistics are the batch's
    with torch.no_grad():
        # One batch more, so that no channel of the last layers has a variance of a single value.
        model(torch.randn(max(4, case.batch), *case.input_shape[1:], device=device.type))
        model.eval()
        return model, x, [copy.deepcopy(model).double()(x.double())]


def fold(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.fx.experimental.optimization import fuse

        return fuse(model)


def costs(
    model: nn.Module, x: Tensor, *, training: bool = False, unit: str = "float32"
) -> list[Cost]:
    """Return what the convolutions, with what follows each, and linear layers must cost in turn."""
    found: list[Cost] = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weight, y = layer.weight.numel(), output.numel()
        # A position of the output meets every weight of its channel once.
        operations = 2 * y * weight // layer.weight.size(0)
        sizes = inputs[0].numel(), weight, y
        found.append(Cost.layer(*sizes, operations, training=training, unit=unit))

    model = copy.deepcopy(model).eval().to("meta")
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model(torch.empty(x.shape, device="meta"))
    return found

"""The C++ program weld and the models its tests give it."""

import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class Weld:
    """Runs the program and checks how it ends."""

    def __init__(self, program: Path):
        self.program = program

    def __call__(self, *arguments, code: int = 0, **options) -> subprocess.CompletedProcess:
        result = subprocess.run(
            [str(self.program), *map(str, arguments)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=120,
            check=False,
            **options,
        )
        assert result.returncode == code, result
        return result

    def fails(self, *arguments, code: int = 2) -> str:
        """The one message of a run that fails."""
        result = self(*arguments, code=code)
        message = [line for line in result.stderr.splitlines() if not line.startswith("weld: note")]
        assert message[0].startswith("weld: error: "), result.stderr
        assert len(message) == 1 or message[0].endswith(":"), result.stderr
        return "\n".join(message).removeprefix("weld: error: ")

    def predict(self, model: Path, *inputs: Tensor, options=()) -> Tensor:
        """The single output for these inputs."""
        arguments = []
        for i, tensor in enumerate(inputs):
            np.save(model.with_name(f"in{i}.npy"), tensor.numpy())
            arguments += ["--input", model.with_name(f"in{i}.npy")]
        output = model.with_name("out.npy")
        self("predict", model, *arguments, "--output", output, *options)
        return torch.from_numpy(np.load(output))


class Twice(nn.Module):
    def forward(self, x):
        return torch.ops.extra.twice(x)


class Pair(nn.Module):
    def forward(self, left, right):
        return left - right, left.sum(1)


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)),
    ).eval()


def save_plain(model: nn.Module, path: Path) -> None:
    """As a user without torchweld.export does it: no manifest."""
    torch.jit.save(torch.jit.script(model), path)

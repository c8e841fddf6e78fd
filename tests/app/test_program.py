"""weld as a program: options, environment, signals."""

import os
import signal
import subprocess

import numpy as np
import pytest
import torch
import torchweld as tw
from torch import Tensor, nn

from tests.app.program import save_plain


def test_help_and_version(weld):
    assert "weld inspect MODEL" in weld("--help").stdout
    assert "--top-k" in weld("predict", "--help").stdout
    assert "cuda:N" in weld("predict", "--help").stdout
    assert "--ops" in weld("inspect", "--help").stdout
    version = torch.__version__.split("+")[0]
    assert weld("--version").stdout == (
        f"weld {tw.__version__} (torch {version}, torchweld {tw.__version__})\n"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no command was given"),
        (["serve"], "unknown command serve; weld knows inspect and predict"),
        (["inspect"], "takes one model, got 0"),
        (["inspect", "a", "b"], "takes one model, got 2"),
        (["inspect", "a", "--output", "b"], "--output is not an option of weld inspect"),
        (["predict", "a"], "needs --input"),
        (["predict", "a", "--input"], "--input needs a value"),
        (
            ["predict", "a", "--top-k", "x"],
            '9223372036854775807, got "x"',
        ),
        (["predict", "a", "--top-k", "-1"], "from 0 to"),
        (["predict", "a", "--batch-size", "0"], "from 1 to"),
        (["predict", "a", "--threads", "2.5"], "from 1 to 4096"),
        (["predict", "a", "--threads", "4097"], "from 1 to 4096"),
        (["predict", "a", "--threads", "99999999999999999999"], "from 1 to 4096"),
        (["predict", "a", "--device", "tpu"], 'takes cpu, cuda or cuda:N, got "tpu"'),
        (["predict", "a", "--device", "cuda:x"], 'from 0 to 127, got "x"'),
        (["predict", "a", "-zk", "3"], "-z is not an option"),
        (["predict", "a", "--input", ""], "--input has an empty value"),
        (["predict", "a", "-k", ""], "-k has an empty value"),
        (["predict", "", "--input", "b"], "the name of the model is empty"),
    ],
)
def test_command_line(weld, arguments, reason):
    assert reason in weld.fails(*arguments)


def test_forced_capability(weld, cnn, images):
    environment = {**os.environ, "TORCHWELD_CPU_CAPABILITY": "scalar"}
    assert "(scalar)" in weld("inspect", cnn[1], env=environment).stdout
    environment["TORCHWELD_CPU_CAPABILITY"] = "sse9"
    result = weld("inspect", cnn[1], env=environment, code=2)
    assert 'got "sse9"' in result.stderr


def test_no_python_in_the_process(weld):
    environment = {**os.environ, "LD_TRACE_LOADED_OBJECTS": "1"}
    libraries = [line.split()[0] for line in weld(env=environment).stdout.splitlines()]
    assert "libtorchweld_ops.so" in libraries
    assert not [name for name in libraries if "python" in name]


def test_closed_standard_output(weld, identity):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [weld.program, "inspect", identity], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 1
    assert b"standard output cannot be written" in result.stderr


def test_two_processes_at_once(weld, cnn, tmp_path):
    model, path = cnn
    x = torch.randn(50, 1, 8, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    command = ["predict", path, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy"]
    processes = [
        subprocess.Popen([weld.program, *command], stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    with torch.no_grad():
        assert np.array_equal(np.load(tmp_path / "y.npy"), model(x).numpy())
    assert not list(tmp_path.glob(".*"))


def test_interrupt(weld, tmp_path, images):
    class Forever(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while bool(x.sum() > -1):
                x = x + 1
            return x

    save_plain(Forever(), tmp_path / "m.pt")
    command = ["predict", tmp_path / "m.pt", "--input", images, "--output", tmp_path / "y.npy"]
    with subprocess.Popen([weld.program, *command], stderr=subprocess.PIPE) as process:
        assert b"has no manifest" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=60) == -signal.SIGINT
        finally:
            process.kill()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.pt", "x.npy"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_device_without_cuda(weld, cnn, images):
    reason = weld.fails("predict", cnn[1], "--input", images, "--device", "cuda")
    assert reason.startswith("--device cuda: this torch is built without CUDA; there is no ")
    assert reason.endswith("libtorch_cuda.so")

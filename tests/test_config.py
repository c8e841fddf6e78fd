"""Switches: defaults, environment variables, refusals, and the memory pool they bound."""

import os
import re
import resource
import subprocess
import sys

import pytest
import torch
import torchweld as tw

MIB = 1 << 20


@pytest.fixture
def config():
    before = tw.config.winograd, tw.config.convolution, tw.config.memory_pool
    yield tw.config
    tw.config.winograd, tw.config.convolution, tw.config.memory_pool = before


def test_switches_keep_what_they_are_given(config):
    config.winograd, config.convolution, config.memory_pool = False, "aten", 5 * MIB
    assert repr(config) == f"Config(winograd=False, convolution='aten', memory_pool={5 * MIB})"


def test_unknown_values_are_refused(config):
    with pytest.raises(RuntimeError, match=r'expected auto, aten, .* got "fft"'):
        config.convolution = "fft"
    with pytest.raises(RuntimeError, match='memory_pool: expected a count of bytes, got "-1"'):
        config.memory_pool = -1
    with pytest.raises(AttributeError):
        config.pool = 1


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def test_environment_sets_the_switches():
    result = run(
        "import torchweld as tw; print(tw.config)",
        TORCHWELD_WINOGRAD="0", TORCHWELD_CONVOLUTION="dense", TORCHWELD_MEMORY_POOL="7",
    )  # fmt: skip
    assert result.stdout == "Config(winograd=False, convolution='dense', memory_pool=7)\n"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TORCHWELD_WINOGRAD", "yes", 'TORCHWELD_WINOGRAD: expected 0 or 1, got "yes"'),
        ("TORCHWELD_CONVOLUTION", "fft", 'TORCHWELD_CONVOLUTION: expected auto.*got "fft"'),
        ("TORCHWELD_MEMORY_POOL", "9" * 20, 'TORCHWELD_MEMORY_POOL: expected a count.*got "999'),
        ("TORCHWELD_MEMORY_POOL", "4G", 'TORCHWELD_MEMORY_POOL: expected a count.*got "4G"'),
    ],
)
def test_a_bad_environment_is_refused_by_name(variable, value, message):
    result = run("import torchweld as tw; tw.config.winograd", **{variable: value})
    assert result.returncode == 1
    assert re.search(message, result.stderr), result.stderr


def output_of(pixels: int) -> torch.Tensor:
    x = torch.ones(1, 1, pixels, 1024)
    one = torch.ones(1, dtype=torch.float64)
    return tw.ops.batch_norm_relu(x, 0 * one, one)


def test_freed_outputs_are_used_again(config):
    config.memory_pool = 64 * MIB
    first = output_of(1024)  # 4 MiB
    address = first.data_ptr()
    del first
    assert output_of(1024).data_ptr() == address
    assert output_of(1000).data_ptr() == address  # a little smaller fits too
    config.memory_pool = 0
    assert torch.equal(output_of(1024), torch.ones(1, 1, 1024, 1024))


def test_live_outputs_do_not_share_memory(config):
    config.memory_pool = 64 * MIB
    outputs = [output_of(1024) for _ in range(3)]
    outputs[0].zero_()
    assert len({y.data_ptr() for y in outputs}) == 3
    assert outputs[1].eq(1).all()


def test_the_pool_gives_back_what_is_too_much(config):
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    config.memory_pool = 256 * MIB
    outputs = [output_of(8 * 1024) for _ in range(4)]  # 128 MiB
    full = resident()
    del outputs
    assert resident() > full - 32 * MIB
    config.memory_pool = 32 * MIB
    assert resident() < full - 64 * MIB


def test_an_output_outlives_the_pool(config):
    config.memory_pool = 64 * MIB
    y = output_of(1024)
    config.memory_pool = 0
    assert y.eq(1).all()
    detached = y.numpy()
    del y
    assert (detached == 1).all()

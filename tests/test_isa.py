"""Every instruction set gives right answers, and forcing one really runs it."""

import os
import subprocess
import sys

import pytest
from torchweld import _C

AVAILABLE = _C.available_cpu_capabilities().split(",")


def run(code: str, capability: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TORCHWELD_CPU_CAPABILITY"}
    if capability is not None:
        environment["TORCHWELD_CPU_CAPABILITY"] = capability
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_best_is_the_default():
    assert _C.cpu_capability() == os.environ.get("TORCHWELD_CPU_CAPABILITY", AVAILABLE[0])


@pytest.mark.parametrize("name", ["AVX2", "avx1024", "native"])
def test_unknown_name_is_a_loud_error(name):
    result = run("import torchweld", name)
    assert result.returncode != 0
    assert "TORCHWELD_CPU_CAPABILITY: expected one this machine can run" in result.stderr
    assert f'got "{name}"' in result.stderr


@pytest.mark.parametrize("capability", AVAILABLE)
def test_forced_one_runs(capability):
    result = run("import torchweld; print(torchweld.info()['cpu capability'])", capability)
    assert result.stdout.strip() == capability, result.stderr

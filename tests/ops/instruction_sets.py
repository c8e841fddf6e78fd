"""A test module's digest of bits, computed again on every instruction set of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torchweld import _C

each_capability = pytest.mark.parametrize("capability", _C.available_cpu_capabilities().split(","))


def run_digest(module: str, capability: str) -> subprocess.CompletedProcess[str]:
    """Print ``module._digest()`` in a process held to a capability."""
    return subprocess.run(
        [sys.executable, "-c", f"from {module} import _digest; print(_digest())"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TORCHWELD_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )

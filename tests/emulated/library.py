"""Builds operators of the CUDA half as a library that registers them for the CPU's tensors.

Their sources are compiled as C++ against the emulator of tests/cpp, kernels and all.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__path__[0])


def build(folder: Path, registers: str, kernels: Sequence[str], operators: Sequence[str]) -> Path:
    """Return the library of csrc/kernels/cuda/ and csrc/ops/, ``registers`` among the latter."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    source = (ROOT / f"csrc/ops/{registers}.cpp").read_text()
    assert source.count("(torchweld, CUDA, m)") == 1
    registering = folder / "registers.cpp"
    source = source.replace("(torchweld, CUDA, m)", "(torchweld, CPU, m)")
    registering.write_text(source.replace(".is_cuda()", ".is_cpu()"))
    command = [
        *("g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-x", "c++"),
        *("-ffp-contract=off", "-fno-strict-aliasing", "-DTORCHWELD_LANE"),
        *(f"-I{ROOT / path}" for path in ("tests/cpp/cuda_emulator", "tests/cpp", "csrc")),
        *("-isystem", str(TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"),
        *(str(ROOT / f"csrc/kernels/cuda/{name}.cu") for name in kernels),
        *(str(ROOT / f"csrc/ops/{name}.cpp") for name in operators),
        *(str(registering), "-o", str(folder / "libemulated.so")),
        *(f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-Wl,--unresolved-symbols=ignore-in-shared-libs"),
    ]
    subprocess.run(command, check=True)
    return folder / "libemulated.so"


def run_tests(library: Path, replaced: str, *tests: str) -> None:
    """Run tests in a process in which the library's operators are those of CPU tensors.

    Args:
        library: what ``build`` returned.
        replaced: an operator that it must have replaced.
        tests: arguments of pytest.
    """
    environment = {"TORCHWELD_EMULATED_LIBRARY": str(library), "TORCHWELD_EMULATED_OP": replaced}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulated.plugin", *tests],
        cwd=ROOT,
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    assert " passed" in result.stdout

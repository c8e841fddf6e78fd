"""The CUDA half of AdamW around its kernels, without a GPU: plans, tables, chunks, reports.

Its sources are compiled as C++ against the emulator of tests/cpp, and its operators registered for
the CPU, where the optimizer's tests compare them with torch's fused step, bit for bit.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__path__[0])
KERNELS = ["adamw", "adamw_bfloat16", "adamw_int8", "adamw_prepare"]
OPERATORS = ["adamw", "adamw_plan", "adamw_work", "cuda/adamw_run"]
TESTS = ["tests/optim/test_on_cpu.py", "tests/optim/test_plan.py", "tests/ops/test_adamw_plan.py"]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("emulated")
    source = (ROOT / "csrc/ops/cuda/adamw.cpp").read_text()
    assert source.count("(torchweld, CUDA, m)") == 1
    registers = folder / "adamw.cpp"
    registers.write_text(source.replace("(torchweld, CUDA, m)", "(torchweld, CPU, m)"))
    command = [
        *("g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-x", "c++"),
        *("-ffp-contract=off", "-fno-strict-aliasing", "-DTORCHWELD_LANE"),
        *(f"-I{ROOT / path}" for path in ("tests/cpp/cuda_emulator", "tests/cpp", "csrc")),
        *("-isystem", str(TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"),
        *(str(ROOT / f"csrc/kernels/cuda/{name}.cu") for name in KERNELS),
        *(str(ROOT / f"csrc/ops/{name}.cpp") for name in OPERATORS),
        *(str(registers), "-o", str(folder / "libemulated.so")),
        *(f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-Wl,--unresolved-symbols=ignore-in-shared-libs"),
    ]
    subprocess.run(command, check=True)
    return folder / "libemulated.so"


def test_optimizer_on_an_emulated_device(library):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulated.plugin", *TESTS],
        cwd=ROOT,
        env=os.environ | {"TORCHWELD_EMULATED_LIBRARY": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    assert " passed" in result.stdout

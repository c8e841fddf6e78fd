"""The C++ program weld: built as a user builds it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchweld as tw
from torch import nn

from tests.app.program import Weld, save_plain, small_cnn

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="session")
def weld(tmp_path_factory) -> Weld:
    build = tmp_path_factory.mktemp("weld")
    configure = [
        *("cmake", "-S", str(ROOT / "libtorch_app"), "-B", str(build), "-G", "Ninja"),
        f"-DCMAKE_PREFIX_PATH={tw.cmake_prefix_path};{torch.utils.cmake_prefix_path}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DWELD_WERROR=ON",
    ]
    for command in configure, ["cmake", "--build", str(build)]:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return Weld(build / "weld")


@pytest.fixture(scope="session")
def extra_ops(tmp_path_factory) -> Path:
    """A library that registers extra::twice, loaded into this process too."""
    library = tmp_path_factory.mktemp("extra") / "libextra.so"
    command = [
        *("g++", "-std=c++20", "-shared", "-fPIC", str(ROOT / "tests/cpp/extra_op.cpp")),
        *("-o", str(library), "-isystem", str(TORCH / "include"), f"-L{TORCH / 'lib'}"),
        *("-ltorch_cpu", "-Wl,--unresolved-symbols=ignore-in-shared-libs"),
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
    return library


@pytest.fixture
def cnn(tmp_path) -> tuple[nn.Module, Path]:
    model, path = small_cnn(), tmp_path / "m.pt"
    tw.export(model, torch.randn(2, 1, 8, 8), path)
    return model, path


@pytest.fixture
def images(tmp_path) -> Path:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((3, 1, 8, 8), np.float32))
    return path


@pytest.fixture
def identity(tmp_path) -> Path:
    """A model without manifest that returns its input."""
    path = tmp_path / "identity.pt"
    save_plain(nn.Identity(), path)
    return path

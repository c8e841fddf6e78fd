"""What the installed package holds, and that a C++ project can use it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchweld as tw
from torchweld import _C, _library

ROOT = Path(__file__).parent.parent


def dynamic_section(library: Path) -> str:
    return subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic_section(library)))


def run_path(library: Path) -> str:
    (path,) = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.+)\]", dynamic_section(library))
    return path


LIBRARIES = [
    "ops",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not _C.cuda_architectures, reason="built without CUDA"),
    ),
]


def library(name: str) -> Path:
    return _library.ops_library.with_name(f"libtorchweld_{name}.so")


@pytest.mark.parametrize("name", LIBRARIES)
def test_operator_libraries_need_no_python_and_no_cuda_toolkit(name):
    libraries = needed(library(name))
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if re.search("python|torch_cuda|cudart", name)]


@pytest.mark.parametrize("name", LIBRARIES)
def test_run_paths_of_operator_libraries_are_relative(name):
    assert run_path(library(name)) == "$ORIGIN:$ORIGIN/../../torch/lib"


def test_run_path_of_the_module_is_relative():
    assert run_path(Path(_C.__file__)) == "$ORIGIN/lib:$ORIGIN/../torch/lib"


@pytest.mark.parametrize("name", LIBRARIES)
def test_operator_libraries_use_the_stable_abi_alone(name):
    # A C++ symbol of torch would tie the binary to one release; the stable ABI is C functions.
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", str(library(name))],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    unstable = re.findall(r" U (?:.*\b(?:at|c10|torch)::.*)", symbols)
    assert not unstable


def test_only_instruction_set_objects_carry_machine_flags():
    flags = re.compile(r"-m(avx|fma|f16c|arch|tune|sse)")
    lists = [*ROOT.glob("CMakeLists.txt"), *(ROOT / "csrc").rglob("CMakeLists.txt")]
    with_flags = [
        path.relative_to(ROOT).as_posix() for path in lists if flags.search(path.read_text())
    ]
    assert with_flags == ["csrc/kernels/CMakeLists.txt"]


def includes(folder: str) -> dict[str, set[str]]:
    files = [p for p in (ROOT / "csrc" / folder).rglob("*") if p.suffix in {".h", ".cpp", ".cu"}]
    assert files
    return {
        path.relative_to(ROOT).as_posix(): set(
            re.findall(r"^\s*#\s*include\s*[<\"](.+?)[>\"]", path.read_text(), re.M)
        )
        for path in files
    }


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels", r"^(torch/|torchweld/|ATen|c10|ops/|Python\.h|pybind11)"),
        ("ops", r"^(ATen|c10|Python\.h|pybind11|immintrin)"),
        ("include", r"^(torch/|ATen|c10|Python\.h|pybind11)"),
    ],
)
def test_rooms_keep_their_include_rules(folder, forbidden):
    bad = {
        (path, header)
        for path, headers in includes(folder).items()
        for header in headers
        if re.match(forbidden, header)
    }
    assert not bad


def test_ops_reach_torch_through_one_door():
    doors = {
        path
        for path, headers in includes("ops").items()
        if any(header.startswith("torch/") for header in headers)
    }
    assert doors == {"csrc/ops/torch_compat.h"}


def test_kernel_sources_use_no_standard_library():
    # An inline function compiled with -mavx512f could be kept by the linker for callers elsewhere.
    for path, headers in includes("kernels/cpu").items():
        if "capability" in path or "dispatch" in path or "table" in path:
            continue
        c_headers = {h for h in headers if h.endswith(".h")}
        assert headers == c_headers, path
        assert "std::" not in re.sub(r"//.*", "", (ROOT / path).read_text()), path


def test_cuda_library_is_where_the_build_says():
    assert _library.cuda_library.exists() == bool(_C.cuda_architectures)
    loaded = torch._C._dispatch_has_kernel_for_dispatch_key("torchweld::grad_norm", "CUDA")
    assert loaded == (_library.cuda_status == "loaded")
    assert loaded == (bool(_C.cuda_architectures) and torch.version.cuda is not None)


def test_versions_agree():
    assert tw.__version__ == _C.__version__
    assert f'version = "{tw.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert _C.torch_abi_target == re.search(
        r'dependencies = \["torch>=(.+?)"\]', (ROOT / "pyproject.toml").read_text()
    ).group(1)


def test_consumer_project(tmp_path):
    configure = [
        "cmake",
        *("-S", str(ROOT / "tests/cpp/consumer"), "-B", str(tmp_path), "-G", "Ninja"),
        f"-DCMAKE_PREFIX_PATH={tw.cmake_prefix_path};{torch.utils.cmake_prefix_path}",
    ]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True)
    result = subprocess.run(
        [str(tmp_path / "consumer")], check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == [tw.__version__, _C.cpu_capability(), "6.9282"]


def test_info_command():
    result = subprocess.run(
        [sys.executable, "-m", "torchweld", "info"], check=True, capture_output=True, text=True
    )
    for name, value in tw.info().items():
        assert re.search(rf"^{name}\s+{re.escape(value)}$", result.stdout, re.M), name

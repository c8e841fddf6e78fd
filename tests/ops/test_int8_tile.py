"""The integer tiles keep their sums in registers: on the stack they would run at half the speed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def disassembly(capability):
    objects = f"*/csrc/kernels/CMakeFiles/torchweld_kernels_{capability}.dir/cpu"
    built = [
        path
        for path in (ROOT / "build").glob(f"{objects}/quantized_linear.cpp.o")
        if path.parts[-7].startswith("cp")  # an editable install, neither sanitized nor debug
    ]
    if not built or shutil.which("objdump") is None:
        pytest.skip("needs objdump and the objects of an editable install")
    newest = max(built, key=lambda path: path.stat().st_mtime)
    return subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(newest)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("capability", ["avx2", "avx512", "avx512_vnni"])
def test_no_sum_is_on_the_stack(capability):
    functions = re.findall(
        r"^[0-9a-f]+ <(.*\btile<.*)>:\n((?:.+\n)+)", disassembly(capability), re.M
    )
    assert functions
    for name, code in functions:
        spills = re.findall(r".*[xyz]mm\d+.*\(%r[sb]p.*|.*\(%r[sb]p.*[xyz]mm\d+.*", code)
        assert not spills, f"{name}: {spills[0]}"

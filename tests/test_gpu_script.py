"""The script for a machine with a GPU, as far as it needs none: what it runs, that it goes on."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.cuda import every_op

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "gpu"


@pytest.fixture
def run(tmp_path):
    def run(*arguments, python="exit 3"):
        stub = tmp_path / "python"
        stub.write_text(f"#!/bin/sh\n{python}\n")
        stub.chmod(0o755)
        return subprocess.run(
            [SCRIPT, "--output", tmp_path / "out", *arguments],
            env={**os.environ, "PYTHON": str(stub)}, capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_dry_run_shows_every_stage(run, tmp_path):
    done = run("--dry-run")
    assert done.returncode == 0
    stages = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("===")]
    assert stages == ["build,", "test,", "sanitize,", "bench,", "summary"]
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert f"--tool {tool}" in done.stdout
    for test in (ROOT / "tests/cuda").glob("test_*.py"):
        assert f"-m pytest tests/cuda/{test.name}" in done.stdout
    assert done.stdout.count("-m benchmarks ") == 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.txt"]


def test_limits_of_all_stages_are_under_ten_minutes(run):
    lines = run("--dry-run").stdout.splitlines()
    limits = [int(line.split()[-1][:-1]) for line in lines if ", at most " in line]
    assert len(limits) == 4
    assert sum(limits) < 600


def test_a_stage_runs_after_one_that_failed(run, tmp_path):
    done = run("build", "test=8")
    assert done.returncode == 1
    log = (tmp_path / "out/build.log").read_text()
    assert "cannot build:\n" in log
    assert "pybind11: expected it in" in log
    summary = (tmp_path / "out/summary.txt").read_text()
    assert [line.split()[:2] for line in summary.splitlines() if " FAILED " in line] == [
        ["build", "FAILED"], ["test", "FAILED"],
    ]  # fmt: skip
    assert "  pybind11: expected it in" in summary


def test_a_stage_that_takes_too_long_is_ended(run):
    files = len(list((ROOT / "tests/cuda").glob("test_*.py")))
    done = run(f"test={files}", python='case "$*" in *every_op*) exec sleep 60 ;; esac')
    assert done.returncode == 1
    assert "test      out of time" in done.stdout


def test_unknown_stages_are_refused(run):
    done = run("benhc")
    assert done.returncode == 2
    assert "Stages: build test sanitize bench" in done.stderr


def test_every_operator_runs_beside_itself(capsys):
    assert every_op.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("as on the CPU")


def test_an_operator_that_differs_is_named(monkeypatch, capsys):
    draws = iter(range(10))
    named = [
        ("moves", torch.float32, lambda device: [torch.tensor([float(next(draws))])]),
        ("stays", torch.float32, lambda device: [torch.ones(1)]),
        ("lacks", torch.float32, lambda device: torch.ops.torchweld.no_such()),
    ]
    monkeypatch.setattr(every_op, "ops", lambda: iter(named))
    assert every_op.main(["--device", "cpu"]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("moves, float32: differs: result 0 by 1")
    assert second.startswith("lacks, float32: fails on cpu: AttributeError")
    assert last == "1 of 3 as on the CPU"

"""The benchmarks' harness: what is wrong is refused, and what is recorded is what was measured."""

import csv
import dataclasses
import io
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import (
    bench_adamw,
    bench_conv_bn_relu,
    bench_models,
    cases,
    harness,
    inference,
    malloc,
    optimizers,
    plots,
    records,
    report,
)
from benchmarks.harness import Contender, Job, Setup, WrongResultError
from benchmarks.machine import Cost, Machine
from benchmarks.records import OURS, PEER, STOCK

MACHINE = Machine(
    cpu_model="a CPU", capability="scalar", threads=2, torch="2.0", torchweld="1.0",
    malloc="default", load=0.5, date="2026-01-01", cache_bytes=1000, memory_gb_s=10.0,
    read_gb_s=20.0,
    peak={"float32": 100.0, "bfloat16": 200.0, "int8": 400.0},
)  # fmt: skip
EXACT = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros((), dtype=torch.float64)]


def contender(name, run=lambda: [torch.tensor([3.0, 4.0]), torch.zeros(())], kind=STOCK):
    return Contender(name, run, tolerance=1e-6, kind=kind)


@pytest.fixture
def rows():
    """One case: medians of 4 ms for stock, 2 ms for a peer, 1 ms for ours, over 5e6 bytes."""
    setup = Setup(
        [contender("slow"), contender("fast", kind=PEER), contender("ours", kind=OURS)],
        EXACT,
        [Cost(bytes=4_000_000), Cost(bytes=1_000_000)],
    )
    setup.contenders[2].saved_bytes = 1_500_000
    samples = {"slow": [3.0, 4.0, 9.0], "fast": [2.0, 2.0, 2.0], "ours": [1.0, 0.5, 2.0]}
    errors = dict.fromkeys(samples, 1e-3)
    return harness.rows(Job("op", "case", lambda: setup), setup, errors, samples, MACHINE)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([torch.tensor([3.0, 4.1]), torch.zeros(())], "at most 1e-06 against the reference, got"),
        ([torch.tensor([3.0, 4.0]), torch.ones(())], "got 1"),
        ([torch.tensor([3.0, math.nan]), torch.zeros(())], "got nan"),
        ([torch.tensor([3.0, math.inf]), torch.zeros(())], "got inf"),
        ([torch.tensor([3.0, 4.0])], "shapes"),
        ([torch.tensor([[3.0, 4.0]]), torch.zeros(())], "shapes"),
    ],
)
def test_wrong_result_is_refused_and_not_timed(result, message):
    calls = []

    def run():
        calls.append(1)
        return result

    job = Job("op", "case", lambda: Setup([contender("wrong", run)], EXACT))
    with pytest.raises(WrongResultError, match=message) as caught:
        harness.record(job, MACHINE, rounds=3, seconds=1)
    assert str(caught.value).startswith("op, case: wrong: expected")
    assert len(calls) == 1


def test_each_result_may_have_a_tolerance_of_its_own():
    two = [torch.tensor([3.0, 4.0]) * (1 + 1e-3), EXACT[1]]
    right, wrong = ((1e-2, 1e-6), (1e-6, 1e-2))
    assert harness.check(Contender("right", lambda: two, right), EXACT) == pytest.approx(1e-3, 1e-3)
    with pytest.raises(WrongResultError, match=r"at most 1e-06 against the reference, got 0\.001"):
        harness.check(Contender("wrong", lambda: two, wrong), EXACT)


def test_right_result_is_timed_and_its_error_recorded():
    off = [torch.tensor([3.0, 4.0], dtype=torch.float64) * (1 + 5e-7), EXACT[1]]
    setup = Setup([contender("right"), contender("close", lambda: off)], EXACT)
    record = harness.record(Job("op", "case", lambda: setup), MACHINE, rounds=4, seconds=60)
    assert [row["error"] for row in record] == [0.0, 5e-7]
    assert all(row["rounds"] == 4 and row["median_ms"] > 0 for row in record)


def test_contenders_take_turns():
    turns = []
    named = [contender(name, lambda name=name: turns.append(name)) for name in "abc"]
    calls = {"a": 1, "b": 3, "c": 2}
    samples = harness.interleave(named, rounds=20, calls=calls)
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 20)
    rounds = [turns[i : i + 6] for i in range(0, len(turns), 6)]
    assert len(rounds) == 20
    for one in rounds:
        blocks = [(name, len(list(group))) for name, group in itertools.groupby(one)]
        assert sorted(blocks) == sorted(calls.items())
    assert len(set(map(tuple, rounds))) > 1  # the order varies


def test_rounds_end_early_but_not_before_the_fewest():
    setup = Setup([contender("a")], EXACT)
    _, samples = harness.measure(setup, rounds=1000, seconds=0.0)
    assert len(samples["a"]) == harness.FEWEST_ROUNDS
    _, samples = harness.measure(setup, rounds=2, seconds=60.0)
    assert len(samples["a"]) == 2


def test_median_quartiles_ratio_and_floor(rows):
    slow, fast, ours = rows
    assert (slow["median_ms"], slow["p25"], slow["p75"]) == (4.0, 3.5, 6.5)
    assert [row["ratio"] for row in rows] == [0.5, 1.0, 2.0]
    # 5e6 bytes at 10 GB/s are 0.5 ms.
    assert [row["floor_pct"] for row in (slow, fast, ours)] == [12.5, 25.0, 50.0]


def test_floor_of_a_cold_job_is_what_reading_takes_beside_it():
    cost = Cost(bytes=4_000_000, cold=True)
    setup = Setup([contender("a")], EXACT, [cost], reading=contender("reading"))
    job = Job("op", "case", lambda: setup)
    errors, samples = harness.measure(setup, rounds=5, seconds=60.0)
    assert len(samples["reading"]) == len(samples["a"]) == 5
    samples = {"a": [2.0] * 5, "reading": [1.0] * 5}
    (row,) = harness.rows(job, setup, errors, samples, MACHINE)
    assert (row["contender"], row["floor_pct"], row["read_gb_s"]) == ("a", 50.0, 4.0)


@pytest.mark.parametrize(
    ("cost", "milliseconds"),
    [
        (Cost(bytes=2_000_000), 0.2),
        (Cost(bytes=2_000_000, operations=100_000_000), 1.0),
        (Cost(bytes=2_000_000, operations=100_000_000, unit="int8"), 0.25),
        (Cost(bytes=2000, operations=100_000_000), 1.0),
        (Cost(bytes=2000), None),
        (Cost(bytes=2000, cold=True), 1e-4),
    ],
)
def test_floor_is_the_higher_of_two_and_of_memory_only_beyond_the_cache(cost, milliseconds):
    assert MACHINE.floor_ms([cost]) == pytest.approx(milliseconds)


def test_floors_of_parts_add_up():
    costs = [Cost(bytes=2_000_000), Cost(bytes=0, operations=100_000_000)]
    assert MACHINE.floor_ms(costs) == pytest.approx(1.2)
    assert MACHINE.floor_ms([]) is None


def test_csv_holds_every_column_and_reads_back(rows, tmp_path):
    file = io.StringIO()
    records.Writer(file).write(rows)
    text = file.getvalue()
    wanted = (
        "op case contender kind asked median_ms p25 p75 rounds ratio floor_pct error saved_mb "
        "bytes_per_param "
        "torch torchweld cpu_model device capability threads malloc load memory_gb_s read_gb_s "
        "float32_gflops bfloat16_gflops int8_gops date"
    )
    assert next(csv.reader(io.StringIO(text))) == wanted.split()
    path = tmp_path / "rows.csv"
    path.write_text(text)
    again = records.read(path)
    assert len(again) == len(rows)
    for row, original in zip(again, rows, strict=True):
        assert row == {k: v if k in records.NUMBERS else str(v) for k, v in original.items()}
    assert [row["saved_mb"] for row in again] == ["", "", 1.5]


def test_report_sets_our_best_against_the_fastest_rival(rows):
    other = [row | {"case": "other", "ratio": row["ratio"] / 4} for row in rows]
    text = report.summary([*rows, *other])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "case fast 2 1 2.00 50 %" in [line.replace(".000", "") for line in lines]
    assert "geometric mean 1.00" in lines
    shown = report.case(rows).splitlines()
    assert [line.split()[0] for line in shown[2:]] == ["ours", "fast", "slow"]
    assert all("60.0" in line for line in shown[2:])  # dB of an error of 1e-3
    assert shown[2].endswith("1.5")


def test_states_of_malloc_are_cases_of_their_own(rows):
    fresh = [row | {"malloc": "fresh", "median_ms": row["median_ms"] * 2} for row in rows]
    pairs = [records.fastest(record) for record in records.by_case([*rows, *fresh])]
    assert [(rival["median_ms"], ours["median_ms"]) for rival, ours in pairs] == [(2, 1), (4, 2)]


def test_figures_are_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row | {"saved_mb": ""} for row in rows]
    fresh = [row | {"malloc": "fresh", "floor_pct": ""} for row in rows]
    other = [row | {"op": "another op"} for row in rows]
    paths = plots.draw([*rows, *other, *fresh], tmp_path / "figures")
    assert [path.name for path in paths] == ["another_op.png", "op.png"]
    assert not (tmp_path / "figures/memory.png").exists()
    counted = [row | {"saved_mb": 2.0} for row in rows]
    paths += plots.draw(counted, tmp_path / "figures")
    assert [path.name for path in paths[2:]] == ["op.png", "memory.png"]
    sizes = [
        row | {"op": "op by size", "case": case, "bytes_per_param": 16.0}
        for case in ("1e5", "1e4") for row in rows
    ]  # fmt: skip
    paths += plots.draw(sizes, tmp_path / "figures")
    assert [path.name for path in paths[4:]] == ["op_by_size.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("shapes", "tensors", "parameters"),
    [
        (cases.resnet50_shapes(), 161, 25_557_032),
        (cases.gpt2_shapes(), 148, 124_439_808),
        (cases.mnist_cnn_shapes(), 16, 98_666),
    ],
)
def test_parameter_lists_are_those_of_the_models(shapes, tensors, parameters):
    case = cases.AdamWCase("model", shapes)
    assert len(shapes) == tensors
    assert case.size == parameters


@pytest.mark.parametrize("case", cases.CONV + cases.CONV_QUICK, ids=lambda case: case.name)
def test_convolutions_have_the_shapes_they_claim(case):
    small = dataclasses.replace(case, batch=1)
    with torch.device("meta"):
        output = torch.conv2d(
            torch.empty(small.input_shape), torch.empty(small.weight_shape), None,
            small.stride, small.padding, small.dilation, small.groups,
        )  # fmt: skip
    assert output.shape == small.output_shape


FAULTS = """
import resource
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * (8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(touch())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_memory_is_kept_or_fresh():
    faults = {}
    for state in ("kept", "fresh"):
        env = malloc.environment(state, {**os.environ, "MALLOC_MMAP_MAX_": "7"})
        run = subprocess.run(
            [sys.executable, "-c", FAULTS], env=env, check=True, capture_output=True, text=True
        )
        faults[state] = int(run.stdout)
    assert faults["kept"] < 100
    assert faults["fresh"] > 1000 or os.sysconf("SC_PAGESIZE") > 4096


def test_state_of_malloc_is_named(monkeypatch):
    for name in [n for n in os.environ if n.startswith("MALLOC_")] + ["LD_PRELOAD"]:
        monkeypatch.delenv(name, raising=False)
    assert malloc.describe() == "default"
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", malloc.environment("kept", os.environ))
        assert malloc.describe() == "kept"
    monkeypatch.setenv("LD_PRELOAD", "/somewhere/libtcmalloc.so.4")
    assert malloc.describe() == "tcmalloc"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert malloc.describe() == "MALLOC_ARENA_MAX=1 LD_PRELOAD=libtcmalloc.so.4"


def test_process_starts_again_only_in_another_state(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(os, "environ", malloc.environment("fresh", os.environ))
    malloc.enter("fresh")
    assert not calls
    malloc.enter("kept")
    assert calls == [(sys.executable, sys.orig_argv, malloc.environment("kept", os.environ))]


def test_missing_library_is_an_error(monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(FileNotFoundError, match="expected libtcmalloc_minimal"):
        malloc.environment("tcmalloc", {})


@pytest.fixture
def no_peers(monkeypatch):
    monkeypatch.setattr(inference, "PEERS", {"OpenVINO": ("no_module_of_this_name",)})


@pytest.mark.usefixtures("no_peers")
def test_peers_that_are_not_installed_are_left_out():
    assert inference.missing() == ["OpenVINO"]
    assert inference.peers(torch.nn.Identity(), torch.zeros(1)) == {}


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize("case", cases.CONV_QUICK, ids=lambda case: case.name)
def test_contenders_of_a_layer_agree(case):
    for setup in (
        bench_conv_bn_relu.training(case, compiled=False),
        bench_conv_bn_relu.folded(case, compiled=False),
    ):
        kinds = [contender.kind for contender in setup.contenders]
        assert {STOCK, OURS} == set(kinds)
        for one in setup.contenders:
            harness.check(one, setup.reference)


@pytest.mark.usefixtures("no_peers")
def test_contenders_of_a_model_agree():
    case = dataclasses.replace(cases.MNIST, batch=4)
    for setup in (
        bench_models.training(case, compiled=False),
        bench_models.evaluation(case, compiled=False, dtype=torch.float32),
        bench_models.evaluation(case, compiled=False, dtype=torch.bfloat16),
    ):
        for one in setup.contenders:
            harness.check(one, setup.reference)
        assert {STOCK, OURS} == {one.kind for one in setup.contenders}


@pytest.fixture
def adamw_jobs(monkeypatch):
    monkeypatch.setattr(optimizers, "PEERS", {})
    return list(bench_adamw.jobs(quick=True, compiled=False))


def test_contenders_of_the_adamw_step_agree(adamw_jobs):
    for job in adamw_jobs:
        setup = job.setup()
        assert {STOCK, OURS} == {one.kind for one in setup.contenders}
        for one in setup.contenders:
            harness.check(one, setup.reference)


def test_bytes_for_each_parameter_are_counted():
    case = cases.AdamWCase("", [(256, 8), (256,)])
    training = optimizers.Training(case)
    stock = training.stock(optimizers.FLOAT32)
    stock.run()
    # A step counter for each tensor, beside parameter, gradient and two states.
    assert stock.held_bytes() == pytest.approx(16 + 2 * 4 / case.size)


def test_bytes_kept_for_backward_are_counted():
    setup = bench_models.training(dataclasses.replace(cases.MNIST, batch=4), compiled=False)
    stock, ours, *_ = setup.contenders
    # Outputs of convolution, activation and pooling, and the pooling's indices, by themselves.
    values = 4 * (16 * 28**2 + 32 * 14**2 + 64 * 7**2)
    assert stock.saved_bytes > 2 * 4 * values
    # Pooling keeps a byte for each of its outputs where stock keeps eight and its input.
    assert ours.saved_bytes == pytest.approx(
        stock.saved_bytes - 4 * values - 7 * values / 4, rel=0.02
    )


def test_costs_of_a_model_are_those_of_its_layers():
    case = cases.ModelCase("ResNet-50", cases.BUILDERS["ResNet-50"], 1)
    with torch.device("meta"):
        model, x = case.build(), torch.empty(case.input_shape)
    costs = bench_models.costs(model, x)
    assert len(costs) == 54
    assert sum(cost.operations for cost in costs) == pytest.approx(2 * 4.09e9, rel=1e-3)
    stem = Cost.layer(3 * 224**2, 64 * 3 * 49, 64 * 112**2, 2 * 64 * 112**2 * 3 * 49)
    assert costs[0] == stem

"""The benchmarks' harness: what is wrong is refused, and what is recorded is what was measured."""

import csv
import dataclasses
import io
import itertools
import math

import pytest
import torch

from benchmarks import cases, harness, report
from benchmarks.harness import OURS, STOCK, Contender, Job, Setup, WrongResultError
from benchmarks.machine import Cost, Machine

MACHINE = Machine(
    cpu_model="a CPU", capability="scalar", threads=2, torch="2.0", torchweld="1.0",
    malloc="default", load=0.5, date="2026-01-01", cache_bytes=1000, memory_gb_s=10.0,
    peak={"float32": 100.0, "int8": 400.0},
)  # fmt: skip
EXACT = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros((), dtype=torch.float64)]


def contender(name, run=lambda: [torch.tensor([3.0, 4.0]), torch.zeros(())], kind=STOCK):
    return Contender(name, run, tolerance=1e-6, kind=kind)


@pytest.fixture
def rows():
    """One case: medians of 2 and 4 ms for stock, 1 ms for ours, over 5e6 bytes."""
    setup = Setup(
        [contender("slow"), contender("fast"), contender("ours", kind=OURS)],
        EXACT,
        Cost(bytes=5_000_000),
    )
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


def test_median_quartiles_ratio_and_floor(rows):
    slow, fast, ours = rows
    assert (slow["median_ms"], slow["p25"], slow["p75"]) == (4.0, 3.5, 6.5)
    assert [row["ratio"] for row in rows] == [0.5, 1.0, 2.0]
    # 5e6 bytes at 10 GB/s are 0.5 ms.
    assert [row["floor_pct"] for row in (slow, fast, ours)] == [12.5, 25.0, 50.0]


@pytest.mark.parametrize(
    ("cost", "milliseconds"),
    [
        (Cost(bytes=2_000_000), 0.2),
        (Cost(bytes=2_000_000, operations=100_000_000), 1.0),
        (Cost(bytes=2_000_000, operations=100_000_000, unit="int8"), 0.25),
        (Cost(bytes=2000, operations=100_000_000), 1.0),
        (Cost(bytes=2000), None),
    ],
)
def test_floor_is_the_higher_of_two_and_of_memory_only_beyond_the_cache(cost, milliseconds):
    assert MACHINE.floor_ms(cost) == pytest.approx(milliseconds)


def test_csv_holds_every_column_and_reads_back(rows, tmp_path):
    file = io.StringIO()
    harness.Writer(file).write(rows)
    text = file.getvalue()
    wanted = (
        "op case contender kind median_ms p25 p75 rounds ratio floor_pct error torch torchweld "
        "cpu_model capability threads malloc load memory_gb_s float32_gflops int8_gops date"
    )
    assert next(csv.reader(io.StringIO(text))) == wanted.split()
    path = tmp_path / "rows.csv"
    path.write_text(text)
    again = harness.read(path)
    assert len(again) == len(rows)
    for row, original in zip(again, rows, strict=True):
        assert row == {k: v if k in harness.NUMBERS else str(v) for k, v in original.items()}


def test_report_sets_our_best_against_the_best_of_stock(rows):
    other = [row | {"case": "other", "ratio": row["ratio"] / 4} for row in rows]
    text = report.summary([*rows, *other])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "case fast 2 1 2.00 50 %" in [line.replace(".000", "") for line in lines]
    assert "geometric mean 1.00" in lines
    shown = report.case(rows).splitlines()
    assert [line.split()[0] for line in shown[2:]] == ["ours", "fast", "slow"]
    assert all(line.endswith("60.0") for line in shown[2:])  # dB of an error of 1e-3


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
            small.stride, small.padding, 1, small.groups,
        )  # fmt: skip
    assert output.shape == small.output_shape

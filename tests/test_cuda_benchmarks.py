"""Benchmarks of a GPU, as far as they need none: the clock, the bars, and that contenders agree."""

import contextlib
import csv
import dataclasses
import io
import types

import pytest
import torch
import torchweld as tw

from benchmarks import (
    __main__ as main,
)
from benchmarks import (
    cases,
    cuda_adamw,
    cuda_conv_bn_relu,
    cuda_quantized_linear,
    cuda_rule,
    harness,
    optimizers,
    plots,
    records,
    report,
)
from benchmarks.device import CPU, Cuda
from benchmarks.harness import Contender, Job, Setup
from benchmarks.machine import Machine
from benchmarks.records import FLOOR, OURS, PEER, SAVED, STOCK

MACHINE = Machine(
    cpu_model="a CPU", capability="sm_90", threads=2, torch="2.0", torchweld="1.0",
    malloc="default", load=0.5, date="2026-01-01", cache_bytes=1000, memory_gb_s=10.0,
    read_gb_s=20.0, peak={"float32": 1.0, "bfloat16": 1.0, "int8": 1.0}, device="a GPU",
)  # fmt: skip


class FakeApi:
    """Stands in for torch.cuda: a clock that moves when work is done, and a record of what was."""

    def __init__(self):
        self.now, self.done = 0.0, []
        api = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = api.now

            def elapsed_time(self, end):
                return end.time - self.time

        class CUDAGraph:
            def replay(self):
                api.done.append("replay")

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def work(self, name, milliseconds):
        self.done.append(name)
        self.now += milliseconds

    def current_device(self):
        return 0

    def get_device_properties(self, index):
        return types.SimpleNamespace(name="a GPU", major=9, minor=0, L2_cache_size=1 << 20)

    def synchronize(self):
        self.done.append("synchronize")

    def current_stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    Stream = current_stream

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.done.append("capture")
        yield


@pytest.fixture
def gpu(monkeypatch):
    device = Cuda(FakeApi())
    monkeypatch.setattr(device, "overwrite_cache", lambda: device.api.work("overwrite", 100.0))
    return device


def test_a_cold_call_is_timed_without_what_empties_the_cache(gpu):
    assert gpu.sample(lambda: gpu.api.work("run", 2.0), 3, cold=True) == pytest.approx(2.0)
    assert gpu.api.done == [*["overwrite", "run"] * 3, "synchronize"]


def test_warm_calls_are_timed_in_a_row(gpu):
    assert gpu.sample(lambda: gpu.api.work("run", 2.0), 3) == pytest.approx(2.0)
    assert gpu.api.done == [*["run"] * 3, "synchronize"]


def test_more_than_the_cache_is_overwritten(monkeypatch):
    monkeypatch.setattr(Cuda, "type", "cpu")
    device = Cuda(FakeApi())
    assert (device.name, device.capability) == ("a GPU", "sm_90")
    device.overwrite_cache()
    assert device._spare.nbytes > device.cache_bytes


def test_a_captured_run_is_warmed_up_first_and_then_replayed(gpu):
    results = [torch.ones(1)]
    replay = gpu.captured(lambda: gpu.api.done.append("run") or results)
    assert gpu.api.done == ["run", "run", "run", "capture", "run"]
    del gpu.api.done[:]
    assert replay() is results
    assert gpu.api.done == ["replay"]


def test_the_harness_times_by_the_clock_of_the_device(gpu):
    def contender(name, milliseconds, kind):
        def run():
            gpu.api.work(name, milliseconds)
            return [torch.ones(1)]

        return Contender(name, run, 0.0, kind)

    contenders = [contender("stock", 3.0, STOCK), contender("ours", 1.5, OURS)]
    setup = Setup(contenders, [torch.ones(1)], device=gpu, cold=True)
    found = harness.record(Job("op", "case", lambda: setup), MACHINE, rounds=5, seconds=1)
    assert [(row["median_ms"], row["ratio"]) for row in found] == [(3.0, 1.0), (1.5, 2.0)]
    assert {row["device"] for row in found} == {"a GPU"}


@pytest.fixture
def rows():
    """Medians of 3 ms for stock, 1 ms for ours, which keeps half the bytes, over 10 MB."""
    asked = {"stock": 2.5, "peer": 3.5, "absent": 1.0, FLOOR: 90, f"{SAVED}stock": 0.4}
    contenders = [
        Contender("stock", list, 0.0, saved_bytes=2_000_000),
        Contender("peer", list, 0.0, PEER),
        Contender("ours", list, 0.0, OURS, saved_bytes=1_000_000, asked=asked),
    ]
    setup = Setup(contenders, [], [records_cost()])
    times = {"stock": [3.0], "peer": [3.0], "ours": [1.0]}
    job = Job("op on cuda", "case", lambda: setup)
    return harness.rows(job, setup, dict.fromkeys(times, 1e-3), times, MACHINE)


def records_cost():
    return harness.Cost(bytes=9_500_000)


VERDICTS = ["reached", "missed", "not measured", "reached", "missed"]


def test_what_is_asked_is_set_against_what_came(rows):
    found = records.bars(rows)
    assert [bar.verdict for bar in found] == VERDICTS
    assert [bar.got for bar in found] == pytest.approx([3, 3, float("nan"), 95, 0.5], nan_ok=True)


def test_what_is_asked_survives_the_record(rows, tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        records.Writer(file).write(rows)
    assert [bar.verdict for bar in records.bars(records.read(path))] == VERDICTS
    assert next(csv.DictReader(io.StringIO(path.read_text())))["device"] == "a GPU"


def test_tables_show_what_was_asked(rows):
    lines = report.case(rows).splitlines()
    assert "  ours: stock 2.5 asked, 3: reached" in lines
    assert "  ours: peer 3.5 asked, 3: missed" in lines
    table = [" ".join(line.split()) for line in report.reached(rows).splitlines()]
    assert "op on cuda: case ours floor % 90 95 reached" in table
    assert report.reached([row | {"asked": ""} for row in rows]) == ""


def test_figures_name_the_gpu(rows, monkeypatch):
    titles = []
    figure = types.SimpleNamespace(suptitle=lambda text, fontsize: titles.append(text))
    for device in ("a GPU", "CPU", ""):
        plots._title(figure, "op", rows[0] | {"device": device})
    assert [text.splitlines()[1].split(",")[0] for text in titles] == ["a GPU", "a CPU", "a CPU"]


def test_who_fails_is_left_out_and_named():
    right, wrong = [torch.ones(1)], [torch.zeros(1)]

    def fails():
        raise NotImplementedError("no kernel\nand more")

    contenders = [
        Contender("right", lambda: right, 1e-6),
        Contender("wrong", lambda: wrong, 1e-6, OURS),
        Contender("fails", fails, 1e-6, OURS),
    ]
    jobs = [
        Job("op", "good", lambda: Setup(list(contenders), right)),
        Job("op", "bad", lambda: fails()),
    ]
    failures = []
    found = [
        harness.record(job, MACHINE, rounds=1, seconds=1, failures=failures) for job in jobs
    ]  # fmt: skip
    assert [[row["contender"] for row in record] for record in found] == [["right"], []]
    assert [failure.split(",")[0] for failure in failures] == ["op"] * 3
    assert "expected an error of at most" in failures[0]
    assert failures[1:] == [
        "op, good: fails: NotImplementedError: no kernel",
        "op, bad: NotImplementedError: no kernel",
    ]
    with pytest.raises(NotImplementedError):
        harness.record(jobs[1], MACHINE, rounds=1, seconds=1)


FAMILIES = [
    cuda_adamw.jobs, cuda_conv_bn_relu.layers, cuda_quantized_linear.jobs,
]  # fmt: skip


def quick(jobs):
    return list(jobs(quick=True, compiled=False, device=CPU))


@pytest.mark.parametrize("jobs", FAMILIES, ids=lambda jobs: f"{jobs.__module__}.{jobs.__name__}")
def test_contenders_agree(jobs, monkeypatch):
    monkeypatch.setattr(optimizers, "PEERS", {})
    found = quick(jobs)
    for job in found:
        assert job.op.endswith(" on cuda")
        setup = job.setup()
        names = [one.name for one in setup.contenders]
        assert len(set(names)) == len(names)
        assert {STOCK, OURS} == {one.kind for one in setup.contenders}
        assert any(one.asked for one in setup.contenders if one.kind == OURS)
        for one in setup.contenders:
            harness.check(one, setup.reference)
    assert found


def test_contenders_of_a_model_agree(monkeypatch):
    monkeypatch.setattr(cases, "TRAINING_QUICK", [cases.MNIST])
    monkeypatch.setattr(cases, "INFERENCE_QUICK", [cases.MNIST])
    for job in quick(cuda_conv_bn_relu.models):
        setup = job.setup()
        for one in setup.contenders:
            harness.check(one, setup.reference)
        saved = {one.name: one.saved_bytes for one in setup.contenders}
        if "training" in job.op:
            assert saved["torchweld, memory saving"] < saved["eager"]


def test_every_bar_names_a_contender_or_a_limit(monkeypatch):
    """A name that nobody has would read as one who did not come."""
    monkeypatch.setattr(optimizers, "PEERS", {})
    known = {*optimizers.INT8_STATES.peers, *cuda_quantized_linear.TORCHAO, "torch.compile", FLOOR}
    for jobs in FAMILIES:
        for job in quick(jobs):
            setup = job.setup()
            names = {one.name for one in setup.contenders} | known
            for one in setup.contenders:
                assert {key.removeprefix(SAVED) for key in one.asked} <= names, job


def test_layers_of_a_graph_share_no_weight():
    """Or all but the first would find it in the cache."""
    for name in cuda_quantized_linear.WAYS:
        layers = cuda_quantized_linear.made(name, 16, 24, CPU)
        assert len(layers) == cuda_quantized_linear.COPIES
        stored = [
            {
                value.data_ptr()
                for part in layer.modules()
                for value in (*vars(part).values(), *part.parameters(), *part.buffers())
                if isinstance(value, torch.Tensor)
            }
            for layer in layers
        ]
        assert all(stored), name
        assert len(set().union(*stored)) == sum(map(len, stored)), name


def test_a_call_that_does_the_job_many_times_counts_as_many(gpu):
    def run():
        gpu.api.work("run", 8.0)
        return [torch.ones(1)]

    setup = Setup([Contender("x", run, 0.0, repeats=4)], [torch.ones(1)], device=gpu, cold=True)
    (row,) = harness.record(Job("op", "", lambda: setup), MACHINE, rounds=5, seconds=1)
    assert row["median_ms"] == 2.0


def test_a_cold_case_is_not_called_for_ever(gpu):
    setup = Setup(
        [Contender("x", lambda: gpu.api.work("run", 1e-3) or [torch.ones(1)], 0.0)],
        [torch.ones(1)], device=gpu, cold=True,
    )  # fmt: skip
    harness.record(Job("op", "", lambda: setup), MACHINE, rounds=5, seconds=1)
    assert gpu.api.done.count("run") == 1 + 3 + 5 * harness.MOST_COLD_CALLS


def test_linear_bars_are_those_of_few_tokens_and_of_many():
    asked = cuda_quantized_linear.asked
    few, many = cases.LinearCase(1, 4096, 4096), cases.LinearCase(512, 4096, 11008)
    assert asked(cuda_quantized_linear.INT4, few) == {"bfloat16": 2.5}
    assert asked(cuda_quantized_linear.INT8, few) == {"bfloat16": 1.7}
    assert asked(cuda_quantized_linear.INT4, cases.LinearCase(16, 11008, 4096))["bfloat16"] == 2.0
    assert asked(cuda_quantized_linear.INT8, many) == {
        "bfloat16": 1.4, "torch._int_mm + scaling": 1.5, "torchao, compiled": 1.0,
    }  # fmt: skip
    assert asked(cuda_quantized_linear.INT4, many) == {"bfloat16": 1.0}


def test_largest_model_has_a_billion_parameters():
    sizes = {case.name: case.size for case in cases.CUDA_ADAMW}
    assert 0.9e9 < sizes["GPT of 1 B"] < 1.1e9
    assert sizes["1 M in 100 tensors"] == 10**6
    assert sum(size < cuda_adamw.SMALL for size in sizes.values()) >= 3


def test_a_run_ends_with_what_was_asked(monkeypatch, tmp_path, capsys):
    def refuses(layer):
        raise NotImplementedError("not yet")

    way = dataclasses.replace(cuda_quantized_linear.WAYS["torchweld int8"], make=refuses)
    monkeypatch.setitem(cuda_quantized_linear.WAYS, "torchweld int8", way)
    monkeypatch.setattr(cases, "CUDA_ADAMW", [])
    monkeypatch.setattr(main.device, "find", lambda name: CPU)
    monkeypatch.setattr(main.Machine, "probe", lambda device: MACHINE)
    monkeypatch.setattr(main.malloc, "enter", lambda state: None)
    arguments = ["quantized_linear", "--device=cuda", "--quick", "--keep-going", "--case=5x257"]
    monkeypatch.setattr("sys.argv", ["", *arguments, f"--output={tmp_path}"])
    assert main.main() == 1
    text = capsys.readouterr().out
    assert "FAILED: quantized_linear on cuda, 5x257x129: torchweld int8: " in text
    assert "onnxruntime" not in text
    (path,) = tmp_path.glob("*.csv")
    assert path.name == "2026-01-01-a-gpu-default-quick.csv"
    names = [bar.row["contender"] for bar in records.bars(records.read(path))]
    ours = [name for name, way in cuda_quantized_linear.WAYS.items() if way.kind == OURS]
    assert names == [name for name in ours if name != "torchweld int8"]
    words = " ".join(text.split())
    assert all(f"5x257x129 {name} bfloat16 1" in words for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(main.malloc, "enter", lambda state: None)
    monkeypatch.setattr("sys.argv", ["", "--device", "cuda", "--quick"])
    assert main.main() == 2
    assert "--device: expected a GPU" in capsys.readouterr().err


def test_rule_is_judged_by_the_record(tmp_path, capsys):
    path = tmp_path / "bench.csv"
    times = {"good": (1.0, 1.5), "bad": (1.0, 0.9)}

    def write(*cases):
        lines = ["op,case,contender,malloc,median_ms"]
        for case in cases:
            ours, around = times[case]
            lines += [
                f"conv,{case},eager,,2", f"conv,{case},torchweld,,{ours}",
                f"conv,{case},{cuda_conv_bn_relu.AROUND_ATEN},,{around}",
            ]  # fmt: skip
        path.write_text("\n".join([*lines, "conv,alone,torchweld,,1"]))

    write("good")
    assert cuda_rule.main([str(path)]) == 0
    write("good", "bad")
    assert cuda_rule.main([str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0] == "  0.90x  conv: bad  LOST"
    assert lines[1] == "  1.50x  conv: good"
    write()
    assert cuda_rule.main([str(path)]) == 1


def test_contender_around_aten_leaves_the_switch_as_it_was():
    job = quick(cuda_conv_bn_relu.layers)[1]
    before = tw.config.convolution
    for one in job.setup().contenders:
        one.run()
        assert tw.config.convolution == before

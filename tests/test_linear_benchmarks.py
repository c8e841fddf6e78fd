"""Benchmarks of the quantized linear: contenders agree, cold is cold, the rule is as fitted."""

import collections
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torchweld.quantization import _rule

from benchmarks import bench_quantized_linear as bench
from benchmarks import cases, harness, linear_peers, linear_rule
from benchmarks.linear_rule import Layer
from benchmarks.records import OURS, PEER

SMALL = cases.LinearCase(3, 48, 20)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(linear_peers, "PEERS", {})
    monkeypatch.setattr(cases, "LINEAR_COLD", [SMALL])
    monkeypatch.setattr(bench, "cache_bytes", lambda: 4096)
    monkeypatch.delenv("TORCHWELD_CPU_CAPABILITY", raising=False)


@pytest.mark.usefixtures("small")
def test_contenders_of_every_question_agree():
    counted = collections.Counter()
    for job in bench.jobs(quick=True, compiled=False):
        setup = job.setup()
        for one in setup.contenders:
            harness.check(one, setup.reference)
        kinds = {one.kind for one in setup.contenders}
        assert OURS in kinds, job
        assert len(kinds) > 1, job
        assert ("cold" in job.op) == setup.costs[0].cold == (setup.reading is not None)
        counted[job.op] += 1
    assert set(counted) == {
        "quantized_linear", "quantized_linear cold", "quantized_linear int4 cold",
        "quantized_linear int4", "weight_only_linear cold", "weight_only_linear",
        "quantized_linear epilogue", "quantized_linear dtype",
    }  # fmt: skip


@pytest.mark.usefixtures("small")
def test_held_to_an_instruction_set_only_stock_float_is_a_rival(monkeypatch):
    """It can be held, too; the int8 engines cannot."""
    monkeypatch.setenv("TORCHWELD_CPU_CAPABILITY", "avx2")
    jobs = list(bench.jobs(quick=True, compiled=False))
    assert {job.op for job in jobs} == {"quantized_linear on avx2"}
    assert [one.name for one in jobs[0].setup().contenders] == ["float32", "torchweld"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("cold", [False, True])
def test_a_cold_contender_runs_through_more_weights_than_caches_hold(cold):
    used = []

    def make(layer):
        number = len(made)
        made.append(layer)
        return lambda x: used.append(number) or layer(x)

    made = []
    layer, x = bench.drawn(SMALL)
    one = bench.Way("", make, 1, 1e-5).contender(layer, x, cold)
    for _ in range(3 * len(made)):
        one.run()
    if cold:
        assert len(made) * layer.weight.numel() > 2 * 4096
    else:
        assert len(made) == 1
    assert used == 3 * list(range(len(made)))


def test_only_a_peer_may_refuse_a_layer(capsys):
    def refuse(layer):
        raise RuntimeError("one feature")

    peer = bench.Way("peer", refuse, 1, 0.05, PEER)
    setup = bench.against(SMALL, [bench.FLOAT32, peer, bench.INT8])
    assert [one.name for one in setup.contenders] == ["float32", "torchweld"]
    assert "peer is left out of 3x48x20: one feature" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="one feature"):
        bench.against(SMALL, [dataclasses.replace(peer, kind=OURS)])


def test_a_layer_that_strays_is_refused(monkeypatch):
    layer, _ = bench.drawn(SMALL)
    wrong = bench.tw.nn.QuantizedLinear.from_float(layer)
    wrong.forward = lambda x: layer(x)  # more exact, and not what it is defined to be
    monkeypatch.setattr(bench.tw.nn.QuantizedLinear, "from_float", lambda layer: wrong)
    with pytest.raises(harness.WrongResultError, match="definition"):
        bench.checked_int8(layer)


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(linear_peers, "PEERS", {"torchao": ("no_module_of_this_name",)})
    assert linear_peers.missing() == ["torchao"]
    assert linear_peers.peers(compiled=True) == {}


@pytest.mark.parametrize("name", sorted(linear_peers.PEERS))
def test_peers_compute_the_layer(name):
    if name == "torchao" or name in linear_peers.missing():
        pytest.skip("not installed, or compiles for long")
    layer, x = bench.drawn(cases.LinearCase(4, 96, 256))
    with torch.no_grad():
        error = (linear_peers.peers(compiled=False)[name](layer)(x) - layer(x)).norm()
    assert 0 < error < 0.05 * layer(x).norm()


def test_smallest_sizes_are_found():
    """A layer gains from 32 input and 64 output features on, and loses as much below."""
    layers = [
        Layer(k, n, math.log(2) if k >= 32 and n >= 64 else -math.log(2))
        for k in linear_rule.SIZES for n in linear_rule.SIZES
    ]  # fmt: skip
    assert linear_rule.fit(layers) == (32, 64)
    # Few and slight losses among many gains are borne, great ones are not.
    borne = [*layers, Layer(64, 64, math.log(0.98))]
    assert linear_rule.fit(borne) == (32, 64)
    assert linear_rule.fit([*layers, *[Layer(32, 64, math.log(0.1))] * 9]) != (32, 64)


def test_sweep_writes_what_the_fit_reads(tmp_path, monkeypatch):
    path = tmp_path / "linear.csv"
    monkeypatch.setattr(linear_rule, "SIZES", (16, 24))
    monkeypatch.setattr(linear_rule, "ROWS", (1, 2))
    monkeypatch.setattr(linear_rule, "SAMPLE_MS", 0.01)
    monkeypatch.setattr(linear_rule.malloc, "enter", lambda state: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr("sys.argv", ["", str(path), "--sweep", "--rounds=1"])
    linear_rule.main()
    found = linear_rule.read(path)
    assert set(found) == {"Int8", "Int8WeightOnly", "Int4"}
    sizes = [(16, 16), (16, 24), (24, 16), (24, 24)]
    for layers in found.values():
        assert [(one.in_features, one.out_features) for one in layers] == sizes
        assert all(math.isfinite(one.gain) for one in layers)


RULE = Path(__file__).parent.parent / "benchmarks" / "results" / "rule"


def test_the_rule_in_use_is_the_one_the_sweep_gives():
    learned = linear_rule.read(RULE / "linear.csv")
    smallest = {kind.__name__: sizes for kind, sizes in _rule.SMALLEST.items()}
    assert smallest == {name: linear_rule.fit(layers) for name, layers in learned.items()}


def test_timed_modules_are_quantized(monkeypatch):
    """However small: the sweep asks what the rule shall say."""
    seen = []
    monkeypatch.setattr(linear_rule, "SIZES", (8,))
    monkeypatch.setattr(linear_rule, "ROWS", (1,))
    monkeypatch.setattr(
        linear_rule, "measure", lambda modules, x, rounds: seen.append(modules) or {}
    )
    list(linear_rule.sweep(1))
    (modules,) = seen
    assert [isinstance(module, nn.Linear) for module in modules.values()] == [True] + 3 * [False]

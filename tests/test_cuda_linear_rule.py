"""The rule of linear layers on CUDA: the kernels' tiles, fits that find what made the times."""

import csv
import math
import os
import re
from pathlib import Path

import pytest

from benchmarks import cuda_linear_rule as rule
from benchmarks.device import CPU

HEADER = Path(__file__).parents[1] / "csrc/kernels/cuda/linear_path.h"
RATES = {
    "small_tiles": 700.0,
    "large_tiles": 900.0,
    "warpgroups": 2000.0,
    "wide_warpgroups": 2900.0,
}


def test_paths_and_tiles_are_those_of_the_kernels():
    names = re.search(r"kLinearPathNames\[\] = \{([^}]+)\}", HEADER.read_text())
    assert re.findall(r"\w+", names[1]) == [*rule.PATHS[1:]]
    found = re.findall(r"\{LinearPath::(\w+), (\d+), (\d+), \d+\}", HEADER.read_text())
    assert {path: (int(rows), int(columns)) for path, rows, columns in found} == rule.TILES


def product(rows: int, columns: int, k: int) -> rule.Product:
    """One whose times are what the rates make them."""
    of = rule.Product(rows, columns, k, 132, {})
    times = {
        path: of.turns(path) * math.prod(rule.TILES[path]) * k / rate / rule.CLOCK_GHZ / 1e3
        for path, rate in RATES.items()
    }
    return rule.Product(rows, columns, k, 132, times)


def test_a_fit_finds_the_rates_and_the_best_tiles():
    products = [product(m, n, k) for n, k in rule.LAYERS for m in rule.ROWS]
    rates = rule.fit(products)
    assert rates == pytest.approx(RATES)
    assert rule.losses(products, rates) == pytest.approx([1.0] * len(products))
    assert max(rule.losses(products, RATES | {"small_tiles": 5000.0})) > 1.5
    assert rule.fit([product(1, 64, 64)]) == {}, "K may be split"


def test_a_path_is_forced_and_released(monkeypatch):
    monkeypatch.setenv(rule.VARIABLE, "few_rows")
    with rule.forced("warpgroups"):
        assert os.environ[rule.VARIABLE] == "warpgroups"
    assert os.environ[rule.VARIABLE] == "few_rows"


def test_record_of_a_sweep_is_read_back(monkeypatch, tmp_path):
    """On the CPU, which takes every path for the same."""
    for name, value in (("LAYERS", ((48, 256),)), ("ROWS", (2, 3)), ("CALLS", 1)):
        monkeypatch.setattr(rule, name, value)
    path = tmp_path / "record.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rule.COLUMNS)
        writer.writeheader()
        writer.writerows(rule.sweep(CPU, 4))
    read = rule.read(path)
    assert set(read) == set(rule.KINDS)
    for products in read.values():
        assert [(p.rows, p.out_features, p.in_features) for p in products] == [
            (2, 48, 256),
            (3, 48, 256),
        ]
        assert all(set(p.times) == set(rule.PATHS) for p in products)
        assert len(list(rule.table(products))) == 3


def test_a_path_that_does_not_take_a_product_is_left_out():
    def refuse(_):
        raise RuntimeError(f"torchweld: {rule.VARIABLE}: expected another")

    assert rule.measure(CPU, lambda x: x, 0, "few_rows") > 0
    device = type("Refusing", (), {"captured": lambda self, run: refuse(run)})()
    assert rule.measure(device, None, None, "few_rows") is None

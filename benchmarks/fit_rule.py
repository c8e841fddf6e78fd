"""Fits the rule that gives a convolution to one of our algorithms or to ATen's.

    python -m benchmarks.fit_rule build/fit-*.csv --networks build/networks.csv \
      --check build/check-*.csv --write csrc/ops/cpu/rule.h

For each pass and algorithm, a small decision tree of thresholds says where the algorithm wins:
Winograd over the better of ATen and dense, the others over ATen. A loss weighs more than a gain, as
the promise is never to be slower. ``--check`` judges the rule on layers it has not seen.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import geometric_mean
from benchmarks.sweep import ALGORITHMS, PASSES, SHAPE

# What a tree may ask, as C++ would.
FEATURES = {
    "s.channels": lambda s: s["in_channels"],
    "s.out_channels": lambda s: s["out_channels"],
    "s.kernel_width": lambda s: s["kernel"],
    "s.stride_width": lambda s: s["stride"],
    "s.dilation_width": lambda s: s["dilation"],
    "s.out_width": lambda s: _out(s),
    "s.pixels()": lambda s: s["batch"] * _out(s) ** 2,
    "threads": lambda s: s["threads"],
    "lanes": lambda s: s["lanes"],
}
THRESHOLDS = sorted(step << power for step in (2, 3) for power in range(24))
DEPTH, SMALLEST = 3, 8  # questions to an answer, layers behind an answer
BEAM = 4  # first questions followed up, as the best alone may be worth little by itself
MARGIN, PENALTY = math.log(1.03), 5.0  # what is no loss, and the weight of what is
NETWORKS = 3  # drawn layers that one of a network counts for


@dataclass(frozen=True)
class Sample:
    """One pass of one layer: what can be asked, and milliseconds by algorithm."""

    features: dict[str, int]
    times: dict[str, float]

    def gain(self, algorithm: str, *others: str) -> float:
        """Return the logarithm of an algorithm's speed over the fastest of the others."""
        return math.log(min(self.times[o] for o in others if o in self.times)) - math.log(
            self.times[algorithm]
        )


@dataclass(frozen=True)
class Tree:
    """An answer, or a question ``feature < threshold`` with a tree for yes and one for no."""

    answer: bool = False
    feature: str = ""
    threshold: int = 0
    yes: Tree | None = None
    no: Tree | None = None

    def __call__(self, features: dict[str, int]) -> bool:
        """Answer for a layer."""
        if self.yes is None or self.no is None:
            return self.answer
        return (self.yes if features[self.feature] < self.threshold else self.no)(features)

    def __str__(self) -> str:
        """As a C++ expression."""
        if self.yes is None or self.no is None:
            return "true" if self.answer else "false"
        below, above = (f"{self.feature} {sign} {self.threshold}" for sign in ("<", ">="))
        yes, no = str(self.yes), str(self.no)
        if "true" in (yes, no):
            asked, other = (below, no) if yes == "true" else (above, yes)
            return {"true": "true", "false": asked}.get(other, f"({asked} || {other})")
        sides = [f"({q} && {then})" for q, then in ((below, yes), (above, no)) if then != "false"]
        return f"({sides[0]} || {sides[1]})" if len(sides) == 2 else "".join(sides) or "false"


def _out(shape: dict[str, int]) -> int:
    return (shape["size"] - 1) // shape["stride"] + 1  # padded to keep its size


def _lanes(capability: str) -> int:
    """Return the floats of a register."""
    return 16 if capability.startswith("avx512") else 8 if capability == "avx2" else 1


def read(paths: Iterable[Path]) -> dict[str, list[Sample]]:
    """Return the samples of each pass."""
    samples: dict[str, list[Sample]] = {name: [] for name in PASSES}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                shape = {name: int(row[name]) for name in (*SHAPE, "threads")}
                shape["lanes"] = _lanes(row["capability"])
                features = {name: of(shape) for name, of in FEATURES.items()}
                times = {a: float(row[a]) for a in ALGORITHMS if row[a]}
                samples[row["pass"]].append(Sample(features, times))
    return samples


def score(gain: float, penalty: float = PENALTY) -> float:
    """Return what a decision for an algorithm is worth."""
    return gain if gain > -MARGIN else penalty * gain


def grow(data: Sequence[tuple[dict[str, int], float]], depth: int) -> tuple[Tree, float]:
    """Return the best tree of greedy splits over features and gains, and its score."""
    total = sum(score(gain) for _, gain in data)
    best, best_score = Tree(total > 0), max(0.0, total)
    if depth == 0:
        return best, best_score
    candidates = []
    for feature in FEATURES:
        values = sorted({features[feature] for features, _ in data})
        for threshold in THRESHOLDS:
            if not values or not values[0] < threshold <= values[-1]:
                continue
            parts = [[], []]
            for features, gain in data:
                parts[features[feature] < threshold].append((features, gain))
            if min(map(len, parts)) >= SMALLEST:
                candidates.append((_worth(parts), feature, threshold, parts))
    candidates.sort(key=lambda candidate: candidate[0], reverse=True)
    for _, feature, threshold, (no, yes) in candidates[:BEAM]:
        (yes_tree, yes_score), (no_tree, no_score) = grow(yes, depth - 1), grow(no, depth - 1)
        # Another question has to earn its place.
        if yes_score + no_score > best_score * 1.02 + 0.05:
            best_score = yes_score + no_score
            best = Tree(False, feature, threshold, yes_tree, no_tree)
    return best, best_score


def _worth(parts: Sequence[Sequence[tuple[dict[str, int], float]]]) -> tuple[float, float]:
    """Return the score if each part had one answer; among equals, that with losses not punished."""
    gains = [[gain for _, gain in part] for part in parts]
    return sum(max(0.0, sum(map(score, g))) for g in gains), sum(max(0.0, sum(g)) for g in gains)


def fit(samples: Sequence[Sample]) -> dict[str, Tree]:
    """Return a tree for each algorithm of ours that any sample has."""
    trees = {}
    for algorithm in ALGORITHMS[1:]:
        rivals = ("aten", "dense") if algorithm == "winograd" else ("aten",)
        data = [(s.features, s.gain(algorithm, *rivals)) for s in samples if algorithm in s.times]
        if data:
            trees[algorithm] = max(
                (grow(data, depth) for depth in range(DEPTH + 1)), key=lambda grown: grown[1]
            )[0]
    return trees


def choose(trees: dict[str, Tree], sample: Sample) -> str:
    """Return the algorithm the rule takes: as the C++ does, Winograd is asked first."""
    for algorithm in ("winograd", "depthwise", "dense"):
        if algorithm in sample.times and algorithm in trees and trees[algorithm](sample.features):
            return algorithm
    return "aten"


def verdict(trees: dict[str, Tree], samples: Sequence[Sample]) -> str:
    """Return how the rule does against ATen's algorithm and against the best choices."""
    chosen = [(sample, choose(trees, sample)) for sample in samples]
    ratios = [math.exp(sample.gain(algorithm, "aten")) for sample, algorithm in chosen]
    ideal = [math.exp(-sample.gain("aten", *sample.times)) for sample in samples]
    ours = sum(algorithm != "aten" for _, algorithm in chosen)
    return (
        f"{len(samples)} layers, {ours} to ours: {geometric_mean(ratios):.2f} x ATen's speed "
        f"(perfect choices: {geometric_mean(ideal):.2f}), at least 0.97 in "
        f"{sum(r >= 0.97 for r in ratios) / len(ratios):.1%}, worst {min(ratios):.2f}"
    )


def header(rule: dict[str, dict[str, Tree]]) -> str:
    """Return the rule as C++."""
    lines = [
        "// Where an algorithm of ours is expected to beat ATen's, and Winograd to beat dense too.",
        "// `lanes` are the floats of a register. Written by benchmarks/fit_rule.py.",
        "#pragma once",
        "",
        '#include "ops/cpu/convolution.h"',
        "",
        "namespace torchweld::ops::rule {",
        "",
        "// clang-format off",
    ]
    for name, trees in rule.items():
        for algorithm, tree in trees.items():
            lines += [
                f"inline bool {algorithm}_{name}([[maybe_unused]] const ConvolutionShape& s,",
                "    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {",
                f"  return {tree};",
                "}",
            ]
    return "\n".join([*lines, "// clang-format on", "", "}  // namespace torchweld::ops::rule", ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_rule", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="from benchmarks.sweep")
    parser.add_argument(
        "--networks", nargs="+", type=Path, default=[], metavar="FILE",
        help=f"of layers people run, which count {NETWORKS} times",
    )  # fmt: skip
    parser.add_argument("--check", nargs="+", type=Path, default=[], metavar="FILE", help="others")
    parser.add_argument("--write", type=Path, metavar="HEADER", help="where the C++ goes")
    options = parser.parse_args()
    learned = read([*options.files, *options.networks * NETWORKS])
    held_out = read(options.check)
    rule = {name: fit(samples) for name, samples in learned.items()}
    for name, trees in rule.items():
        for algorithm, tree in trees.items():
            print(f"{name}, {algorithm}: {tree}")
        print(f"  fitted on {verdict(trees, learned[name])}")
        if held_out[name]:
            print(f"  checked on {verdict(trees, held_out[name])}")
    if options.write:
        options.write.write_text(header(rule))


if __name__ == "__main__":
    main()

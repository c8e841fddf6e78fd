"""Figures of what the benchmarks recorded: speed, memory where it was counted, time by size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.device import CPU
from benchmarks.records import OURS, STOCK, Row, by_case, fastest, geometric_mean

# Okabe and Ito's colours, told apart by every kind of eye: https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
RIVAL = "#555555"

Pair = tuple[Row, Row]  # the fastest rival, our fastest
BY_SIZE = " by size"  # ends an operator whose cases are numbers of elements


def draw(records: Iterable[Row], directory: Path) -> list[Path]:
    """Draw speed over the fastest rival, both as shares of the floor, and bytes kept for backward.

    What was measured by size becomes lines: time per element for each contender.

    Args:
        records: of one machine; runs in several states of malloc stand side by side.
        directory: where the PNG files go.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    records = list(records)
    by_size = [row for row in records if str(row["op"]).endswith(BY_SIZE)]
    cases = by_case(row for row in records if row not in by_size)
    ranked = map(fastest, cases)
    pairs = sorted(
        ((rival, ours) for rival, ours in ranked if rival and ours), key=lambda pair: pair[1]["op"]
    )
    paths = []
    for op, group in groupby(pairs, key=lambda pair: pair[1]["op"]):
        paths.append(directory / f"{str(op).replace(' ', '_')}.png")
        _figure(str(op), list(group)).savefig(paths[-1], dpi=150)
    for op in dict.fromkeys(str(row["op"]) for row in by_size):
        paths.append(directory / f"{op.replace(' ', '_')}.png")
        _lines(op, [row for row in by_size if row["op"] == op]).savefig(paths[-1], dpi=150)
    counted = {row["case"]: record for record in cases for row in record if row["saved_mb"] != ""}
    if counted:
        paths.append(directory / "memory.png")
        _memory(list(counted.values())).savefig(paths[-1], dpi=150)
    return paths


def _figure(op: str, pairs: Sequence[Pair]) -> Any:
    cases = list(dict.fromkeys(str(ours["case"]) for _, ours in pairs))
    states = list(dict.fromkeys(str(ours["malloc"]) for _, ours in pairs))
    height = 1.6 + (0.14 + 0.2 * len(states)) * len(cases)
    figure = _empty(height)
    speed, floor = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for number, state in enumerate(states):
        here = [pair for pair in pairs if pair[1]["malloc"] == state]
        places = [
            cases.index(str(ours["case"])) + 0.8 * ((number + 0.5) / len(states) - 0.5)
            for _, ours in here
        ]
        colour = COLOURS[number % len(COLOURS)]
        _speed(speed, places, here, 0.8 / len(states), colour, state)
        _floor(floor, places, here, colour)
    speed.set_yticks(range(len(cases)), cases)
    speed.set_ylim(len(cases) - 0.5, -0.5)
    speed.axvline(1, color="black", linewidth=1)
    speed.margins(x=0.3)
    speed.set_xlabel("speed, fastest rival = 1")
    floor.set_xlim(left=0)
    floor.axvline(100, color="black", linewidth=1)
    floor.grid(axis="both", alpha=0.3)
    floor.set_xlabel("share of the floor, %")
    floor.plot([], [], "o", color="black", label="torchweld")
    floor.plot([], [], "|", color=RIVAL, markersize=7, markeredgewidth=2, label="fastest rival")
    figure.legend(loc="outside lower center", ncols=len(states) + 2, fontsize=8)
    _title(figure, op, pairs[0][1])
    return figure


def _memory(cases: Sequence[Sequence[Row]]) -> Any:
    """Draw what a forward keeps for its backward, for each contender that differs."""
    lines = []
    for record in cases:
        counted = [row for row in record if row["saved_mb"] != ""]
        stock = min(row["saved_mb"] for row in counted if row["kind"] == STOCK)
        seen = set()
        for row in counted:
            if row["kind"] == OURS and row["saved_mb"] not in seen:
                seen.add(row["saved_mb"])
                lines.append((f"{row['case']}: {row['contender']}", row["saved_mb"] / stock))
    figure = _empty(1.6 + 0.3 * len(lines))
    axes = figure.subplots()
    bars = axes.barh([name for name, _ in lines], [share for _, share in lines], color=COLOURS[0])
    axes.bar_label(bars, [f"{share:.3f}" for _, share in lines], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("bytes kept between forward and backward, stock = 1")
    _title(figure, "memory", cases[0][0])
    return figure


def _lines(op: str, rows: Sequence[Row]) -> Any:
    """Draw time per element against their number; stock and peers dashed."""
    figure = _empty(6)
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(str(row["contender"]) for row in rows)):
        mine = sorted(
            (row for row in rows if row["contender"] == name), key=lambda row: float(row["case"])
        )
        sizes = [float(row["case"]) for row in mine]
        label = f"{name}, {mine[0]['bytes_per_param']:.3g} B/param"
        axes.plot(
            sizes, [row["median_ms"] * 1e6 / size for row, size in zip(mine, sizes, strict=True)],
            "o-" if mine[0]["kind"] == OURS else "o--", label=label,
            color=COLOURS[number % len(COLOURS)], linewidth=1.5, markersize=4,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="ns for each parameter")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)
    _title(figure, op, rows[0])
    return figure


def _empty(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Any, text: str, row: Row) -> None:
    # Records of before there were any GPUs name no device.
    place = row["cpu_model"] if row["device"] in ("", CPU.name) else row["device"]
    machine = f"{place}, {row['capability']}, threads: {row['threads']}"
    figure.suptitle(f"{text}\n{machine}, torch {row['torch']}", fontsize=10)


def _speed(
    axes: Any, places: Sequence[float], pairs: Sequence[Pair], width: float, colour: str, state: str
) -> None:
    ratios = [ours["ratio"] for _, ours in pairs]
    label = f"malloc {state}: geometric mean {geometric_mean(ratios):.2f}"
    bars = axes.barh(places, ratios, width, color=colour, label=label)
    texts = [
        f"{ours['ratio']:.2f}  {rival['contender']}{_bytes(rival, ours)}" for rival, ours in pairs
    ]
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    axes.bar_label(bars, texts, padding=3, fontsize=7, bbox=white)


def _bytes(rival: Row, ours: Row) -> str:
    held = rival["bytes_per_param"], ours["bytes_per_param"]
    return "" if "" in held else f"  ({held[1]:.4g} / {held[0]:.4g} B/param)"


def _floor(axes: Any, places: Sequence[float], pairs: Sequence[Pair], colour: str) -> None:
    for place, (rival, ours) in zip(places, pairs, strict=True):
        if ours["floor_pct"] == "":
            continue
        shares = rival["floor_pct"], ours["floor_pct"]
        axes.plot(shares, (place, place), color=colour, alpha=0.5, linewidth=1.5)
        axes.plot(shares[0], place, marker="|", color=RIVAL, markersize=7, markeredgewidth=2)
        axes.plot(shares[1], place, marker="o", color=colour, markersize=5)

"""Figures of what the benchmarks recorded: one for each operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.records import Row, by_case, fastest, geometric_mean

# Okabe and Ito's colours, told apart by every kind of eye: https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
RIVAL = "#555555"

Pair = tuple[Row, Row]  # the fastest rival, our fastest


def draw(records: Iterable[Row], directory: Path) -> list[Path]:
    """Draw speed over the fastest rival, and both as shares of the floor.

    Args:
        records: of one machine; runs in several states of malloc stand side by side.
        directory: where the PNG files go.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ranked = map(fastest, by_case(records))
    pairs = sorted(
        ((rival, ours) for rival, ours in ranked if rival and ours), key=lambda pair: pair[1]["op"]
    )
    paths = []
    for op, group in groupby(pairs, key=lambda pair: pair[1]["op"]):
        paths.append(directory / f"{str(op).replace(' ', '_')}.png")
        _figure(str(op), list(group)).savefig(paths[-1], dpi=150)
    return paths


def _figure(op: str, pairs: Sequence[Pair]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(str(ours["case"]) for _, ours in pairs))
    states = list(dict.fromkeys(str(ours["malloc"]) for _, ours in pairs))
    height = 1.6 + (0.14 + 0.2 * len(states)) * len(cases)
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
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
    _, first = pairs[0]
    figure.suptitle(
        f"{op}\n{first['cpu_model']}, {first['capability']}, threads: {first['threads']}, "
        f"torch {first['torch']}",
        fontsize=10,
    )
    return figure


def _speed(
    axes: Any, places: Sequence[float], pairs: Sequence[Pair], width: float, colour: str, state: str
) -> None:
    ratios = [ours["ratio"] for _, ours in pairs]
    label = f"malloc {state}: geometric mean {geometric_mean(ratios):.2f}"
    bars = axes.barh(places, ratios, width, color=colour, label=label)
    texts = [f"{ours['ratio']:.2f}  {rival['contender']}" for rival, ours in pairs]
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    axes.bar_label(bars, texts, padding=3, fontsize=7, bbox=white)


def _floor(axes: Any, places: Sequence[float], pairs: Sequence[Pair], colour: str) -> None:
    for place, (rival, ours) in zip(places, pairs, strict=True):
        if ours["floor_pct"] == "":
            continue
        shares = rival["floor_pct"], ours["floor_pct"]
        axes.plot(shares, (place, place), color=colour, alpha=0.5, linewidth=1.5)
        axes.plot(shares[0], place, marker="|", color=RIVAL, markersize=7, markeredgewidth=2)
        axes.plot(shares[1], place, marker="o", color=colour, markersize=5)

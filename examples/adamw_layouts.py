"""Train with AdamW in every layout of parameters and states, and compare the losses.

A convolutional network on handwritten digits and a small transformer on characters of Python's own
manual, each from three seeds: initial weights and order of the data are those of the seed, the same
for every layout. Writes the curves as CSV and, where matplotlib is installed, as a figure, and ends
with a table: how far a layout's final loss is from float32's, beside how far seeds are apart.

    python examples/adamw_layouts.py                     # about six minutes on two cores
    python examples/adamw_layouts.py --tasks digits --seeds 1
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
import torchweld as tw
from digits import BATCH_SIZE, DigitsCNN, bundled_digits
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """How parameters and states are stored."""

    dtype: torch.dtype
    make: Callable[..., torch.optim.Optimizer]
    bytes: float  # per parameter: parameter, gradient and states


def ours(dtype: torch.dtype, size: float, **options: Any) -> Layout:
    return Layout(dtype, functools.partial(tw.optim.AdamW, **options), size)


stock = functools.partial(torch.optim.AdamW, fused=True)
LAYOUTS = {
    "float32": ours(torch.float32, 16),
    "float32, bfloat16 states": ours(torch.float32, 12, state_dtype=torch.bfloat16),
    "float32, int8 states": ours(torch.float32, 10.03, state_dtype="int8"),
    "bfloat16, stochastic": ours(torch.bfloat16, 8, stochastic_rounding=True),
    "bfloat16, Kahan": ours(torch.bfloat16, 10, kahan=True),
    "bfloat16, split master": ours(torch.bfloat16, 10, split_master=True),
    "bfloat16, stochastic, int8 states": ours(
        torch.bfloat16, 6.03, stochastic_rounding=True, state_dtype="int8"
    ),
    "stock float32": Layout(torch.float32, stock, 16),
    "stock bfloat16": Layout(torch.bfloat16, stock, 8),
}


class Digits:
    """The demo's network on its digits."""

    lr, epoch = 5e-3, 22

    def __init__(self) -> None:
        self.data = bundled_digits()

    def model(self) -> nn.Module:
        """Make it anew."""
        return DigitsCNN()

    def batches(self) -> Iterator[Batch]:
        """Yield batches without end."""
        while True:
            order = torch.randperm(len(self.data.train_images)).split(BATCH_SIZE)
            for rows in order[: self.epoch]:
                yield self.data.train_images[rows], self.data.train_labels[rows]

    def held_out(self) -> Batch:
        """Return what is not trained on."""
        return self.data.test_images, self.data.test_labels


class Transformer(nn.Module):
    """Predicts the next character from those before it."""

    def __init__(self, characters: int, context: int, width: int = 64, layers: int = 2):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, x: Tensor) -> Tensor:
        """Map characters [N, T] to logits [N, characters, T]."""
        x = self.embed(x) + self.place
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x)).transpose(1, 2)


class Text:
    """A transformer on the topics of Python's ``help()``, some 700,000 characters of English."""

    lr, context, batch = 3e-3, 48, 16

    def __init__(self) -> None:
        text = "".join(topics[name] for name in sorted(topics))
        known = sorted(set(text))
        places = {character: i for i, character in enumerate(known)}
        self.characters = len(known)
        self.data = torch.tensor([places[character] for character in text])
        self.border = len(self.data) * 9 // 10

    def model(self) -> nn.Module:
        """Make it anew."""
        return Transformer(self.characters, self.context)

    def at(self, starts: Tensor) -> Batch:
        """Return the characters from each start on, and those that follow them."""
        rows = self.data[starts[:, None] + torch.arange(self.context + 1)]
        return rows[:, :-1], rows[:, 1:]

    def batches(self) -> Iterator[Batch]:
        """Yield batches without end."""
        while True:
            yield self.at(torch.randint(self.border - self.context, (self.batch,)))

    def held_out(self) -> Batch:
        """Return what is not trained on."""
        return self.at(torch.arange(self.border, len(self.data) - self.context - 1, 200))


TASKS: dict[str, Callable[[], Digits | Text]] = {"digits": Digits, "text": Text}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Compute in float32 from parameters as they are stored, so that only storage differs."""
    params = {name: param.float() for name, param in model.named_parameters()}
    return F.cross_entropy(functional_call(model, params, (batch[0],)), batch[1])


def train(task: Digits | Text, layout: Layout, seed: int, steps: int) -> tuple[list[float], float]:
    """Return the losses of all steps and the loss on held-out data."""
    torch.manual_seed(seed)
    model = task.model()
    for param in model.parameters():
        param.data = param.data.to(layout.dtype)
    optimizer = layout.make(model.parameters(), lr=task.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=steps)
    losses = []
    model.train()
    for _, batch in zip(range(steps), task.batches(), strict=False):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return losses, loss_of(model, task.held_out()).item()


def smooth(losses: Sequence[float], keep: float = 0.9) -> list[float]:
    """Return the running mean, each loss weighing ``keep`` times the one after it."""
    smoothed, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


Run = tuple[str, str, int, list[float], float]  # task, layout, seed, losses, held-out loss


def table(runs: Sequence[Run]) -> str:
    """Held-out losses: mean over seeds, spread over seeds, and distance from float32."""
    lines = []
    for task in dict.fromkeys(run[0] for run in runs):
        final = {
            name: [run[4] for run in runs if run[:2] == (task, name)]
            for name in dict.fromkeys(run[1] for run in runs if run[0] == task)
        }
        base = final.get("float32", next(iter(final.values())))
        lines.append(f"{task:<36}{'bytes':>7}{'loss':>9}{'of seeds':>10}{'- float32':>11}")
        for name, losses in final.items():
            spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
            away = statistics.mean(a - b for a, b in zip(losses, base, strict=True))
            lines.append(
                f"  {name:<34}{LAYOUTS[name].bytes:>7g}{statistics.mean(losses):>9.4f}"
                f"{f'+-{spread:.4f}':>10}{away:>+11.4f}"
            )
    return "\n".join(lines)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw curves of the training loss: mean over seeds, and where the seeds lie."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(run[0] for run in runs))
    figure = Figure(figsize=(6 * len(tasks), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for number, name in enumerate(LAYOUTS):
            curves = [smooth(run[3]) for run in runs if run[:2] == (task, name)]
            if curves:
                at_steps = [*zip(*curves, strict=True)]
                steps, mean = range(len(at_steps)), [*map(statistics.mean, at_steps)]
                style = "--" if name.startswith("stock") else "-"
                axes.plot(steps, mean, style, color=f"C{number}", label=name, linewidth=1.2)
                axes.fill_between(
                    steps, [*map(min, at_steps)], [*map(max, at_steps)],
                    color=f"C{number}", alpha=0.1,
                )  # fmt: skip
        axes.set(title=task, xlabel="step", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="default: all")
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS], metavar="LAYOUT",
        help=f"of {', '.join(map(repr, LAYOUTS))} (default: all)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--steps", type=int, default=400, help="of each run (400)")
    parser.add_argument(
        "--output", type=Path, default=Path("build/adamw_layouts"),
        help="folder to write losses.csv and losses.png to (build/adamw_layouts)",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    work = [
        (task, layout, seed)
        for task in arguments.tasks
        for layout in arguments.layouts
        for seed in range(arguments.seeds)
    ]
    tasks = {name: TASKS[name]() for name in arguments.tasks}
    runs: list[Run] = []
    bar = tqdm(work, unit="run")
    for task, layout, seed in bar:
        bar.set_description(f"{task}, {layout}")
        losses, held_out = train(tasks[task], LAYOUTS[layout], seed, arguments.steps)
        runs.append((task, layout, seed, losses, held_out))

    with (arguments.output / "losses.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("task", "layout", "seed", "step", "loss"))
        for task, layout, seed, losses, held_out in runs:
            rows = [*enumerate(losses), ("held out", held_out)]
            writer.writerows((task, layout, seed, step, f"{loss:.5g}") for step, loss in rows)
    print(table(runs))
    try:
        draw(runs, arguments.output / "losses.png")
    except ModuleNotFoundError as missing:
        print(f"no figure: {missing}")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()

"""Train a small transformer on real text, quantize it every way, and compare what is left of it.

The text is Python's own manual, as `help()` prints it; the task is to name the next character. Ends
with a table: share of held-out characters named right, cross-entropy, bytes of the state_dict, and
milliseconds for one line of text and for a batch of them.

    python examples/quantized_transformer.py            # about two minutes on two cores
    python examples/quantized_transformer.py --steps 100
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchweld as tw
from adamw_layouts import Text, Transformer
from torch import Tensor, nn
from tqdm import tqdm

WIDTH, LAYERS = 256, 2
ROUNDS = 15
# Of top-1 accuracy, for int8; what int4 loses is printed.
MOST_LOST = 0.005

CONFIGS = {
    "Int8()": tw.Int8(),
    "Int8WeightOnly()": tw.Int8WeightOnly(),
    "Int4(group_size=32)": tw.Int4(group_size=32),
    "Int4(group_size=128)": tw.Int4(group_size=128),
}


@dataclass
class Result:
    """What a model does and takes; milliseconds of one line and of a batch."""

    top1: float
    loss: float
    bytes: int
    line_ms: float = 0.0
    batch_ms: float = 0.0


def train(text: Text, steps: int, width: int = WIDTH) -> nn.Module:
    """Train from seed 0 with a one-cycle schedule."""
    torch.manual_seed(0)
    model = Transformer(text.characters, text.context, width, LAYERS)
    optimizer = tw.optim.AdamW(model.parameters(), max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=text.lr, total_steps=steps)
    batches = text.batches()
    for _ in tqdm(range(steps), desc="training", unit="step", leave=False):
        x, following = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x), following).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model: nn.Module, held_out: tuple[Tensor, Tensor]) -> Result:
    """Compare with the characters that follow in the text."""
    x, following = held_out
    logits = torch.cat([model(rows) for rows in x.split(64)])
    right = (logits.argmax(1) == following).double().mean().item()
    return Result(right, F.cross_entropy(logits, following).item(), saved_bytes(model))


def saved_bytes(model: nn.Module) -> int:
    """Size of the state_dict as ``torch.save`` writes it."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


@torch.no_grad()
def time_in_turns(models: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Median milliseconds of a call; all take turns, as other processes slow whoever runs."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            model(x)
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def compare(model: nn.Module, text: Text) -> dict[str, Result]:
    """Quantize a model every way, judge and time all."""
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    models |= {name: tw.quantize(model, config) for name, config in CONFIGS.items()}
    held_out = text.held_out()
    results = {name: judge(each, held_out) for name, each in models.items()}
    for field, rows in (("line_ms", 1), ("batch_ms", 32)):
        for name, ms in time_in_turns(models, held_out[0][:rows]).items():
            setattr(results[name], field, ms)
    return results


def table(results: dict[str, Result]) -> str:
    """Return a line for each model, beside the float32 one."""
    base = results["float32"]
    lines = [
        f"{'':<22}{'top-1':>8}{'points':>8}{'loss':>8}{'bytes':>12}{'':>6}"
        f"{'line ms':>9}{'x':>6}{'batch ms':>10}{'x':>6}"
    ]
    for name, result in results.items():
        lines.append(
            f"{name:<22}{result.top1:>8.2%}{100 * (result.top1 - base.top1):>+8.2f}"
            f"{result.loss:>8.4f}{result.bytes:>12,}{result.bytes / base.bytes:>6.0%}"
            f"{result.line_ms:>9.2f}{base.line_ms / result.line_ms:>6.2f}"
            f"{result.batch_ms:>10.2f}{base.batch_ms / result.batch_ms:>6.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="of training (600)")
    steps = parser.parse_args().steps
    text = Text()
    model = train(text, steps)
    print(tw.report(tw.quantize(model, tw.Int8())), end="\n\n")
    results = compare(model, text)
    print(table(results))
    lost = max(results["float32"].top1 - results[name].top1 for name in list(CONFIGS)[:2])
    if lost > MOST_LOST:
        sys.exit(f"quantized_transformer: expected int8 to lose at most 0.5 points, got {lost:.2%}")


if __name__ == "__main__":
    main()

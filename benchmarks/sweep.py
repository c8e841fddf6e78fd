"""Times each convolution algorithm on random layers: what ``benchmarks.fit_rule`` learns from.

python -m benchmarks.sweep --count 300 --seed 0 --output build/sweep-0.csv
"""

from __future__ import annotations

import argparse
import copy
import csv
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torchweld as tw
from torch import nn
from tqdm import tqdm

from benchmarks import malloc
from benchmarks.cases import CONV, ConvCase
from benchmarks.harness import Contender, interleave

ALGORITHMS = ("aten", "dense", "winograd", "depthwise")
# conv_bn_relu forward in training, its backward, and the folded layer, whose weight is packed: in
# float32 and in bfloat16.
PASSES = ("forward", "backward", "folded", "folded_bf16")
SHAPE = ("batch", "in_channels", "out_channels", "kernel", "size", "stride", "groups", "dilation")
COLUMNS = ("capability", "threads", "pass", *SHAPE, *ALGORITHMS)

MOST_OPERATIONS, MOST_ELEMENTS = 4e9, 2e7


def layers(seed: int) -> Iterator[ConvCase]:
    """Draw layers as networks have them, and odd ones beside."""
    draw = random.Random(seed)

    def scale(low: int, high: int) -> int:
        return round(low * (high / low) ** draw.random())

    def channels() -> int:
        many = scale(1, 1024)
        return many if many < 16 or draw.random() < 0.25 else -(-many // 8) * 8

    while True:
        kernel = draw.choice((1, 1, 3, 3, 3, 5, 7))
        wide = channels()
        depthwise = kernel > 1 and draw.random() < 0.25
        case = ConvCase(
            "",
            batch=scale(1, 64),
            in_channels=wide,
            out_channels=wide if depthwise else channels(),
            kernel=kernel,
            size=scale(4, 128),
            stride=draw.choice((1, 1, 1, 2)),
            groups=wide if depthwise else 1,
            dilation=draw.choice((1, 1, 1, 2)) if kernel > 1 else 1,
        )
        n, c, h, w = case.input_shape
        elements = max(n * c * h * w, torch.Size(case.output_shape).numel())
        if 1e5 < case.operations < MOST_OPERATIONS and elements < MOST_ELEMENTS:
            yield case


def network_layers() -> Iterator[ConvCase]:
    """Yield the layers of the benchmarks at several batch sizes and their own."""
    for case in CONV:
        for batch in sorted({1, 4, 8, 16, case.batch}):
            yield replace(case, batch=batch)


def able(case: ConvCase, passed: str) -> list[str]:
    """Return the algorithms that can compute a pass of a layer, ATen's first."""
    ops = torch.ops.torchweld
    dtype = torch.bfloat16 if passed.endswith("bf16") else torch.float32
    shapes = (1, *case.input_shape[1:]), case.weight_shape, (1, *case.output_shape[1:])
    x, weight, y = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    conv = ([case.stride] * 2, [case.padding] * 2, [case.dilation] * 2, case.groups)
    found = ["aten"]
    for name in ALGORITHMS[1:]:
        try:
            if passed == "backward":
                ops._conv_backward(y, x, weight, *conv, name, True, True)
            else:
                ops._conv_forward(x, weight, None, None, *conv, 0.0, 1.0, name, False)
        except RuntimeError as error:
            if "algorithm: expected" not in str(error):
                raise
        else:
            found.append(name)
    return found


def runs(case: ConvCase, passes: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Return what does each of the passes with the algorithm set in ``tw.config``."""
    conv = nn.Conv2d(
        case.in_channels, case.out_channels, case.kernel, case.stride, case.padding,
        case.dilation, case.groups, bias=False,
    )  # fmt: skip
    conv = conv.to(memory_format=torch.channels_last)
    bn = nn.BatchNorm2d(case.out_channels)
    x = torch.randn(case.input_shape).to(memory_format=torch.channels_last).requires_grad_()
    layer = tw.nn.ConvBNReLU2d.from_float(conv, bn)
    leaves = (x, *layer.parameters())
    found: dict[str, Callable[[], object]] = {}
    if "forward" in passes:
        found["forward"] = torch.no_grad()(lambda: layer(x))
    if "backward" in passes:
        y = layer.train()(x)
        grad = torch.randn_like(y)
        found["backward"] = lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for name, dtype in (("folded", torch.float32), ("folded_bf16", torch.bfloat16)):
        if name in passes:
            stock = copy.deepcopy(nn.Sequential(conv, bn).eval()).to(dtype)
            folded, given = tw.nn.ConvReLU2d.from_float(*stock), x.detach().to(dtype)
            found[name] = torch.no_grad()(partial(folded, given))
    return found


def measure(case: ConvCase, rounds: int, passes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return milliseconds by pass and algorithm."""
    torch.manual_seed(0)
    contenders: dict[str, list[Contender]] = {name: [] for name in passes}
    names = {name: able(case, name) for name in passes}
    for algorithm in ALGORITHMS:
        tw.config.convolution = algorithm
        for name, run in runs(case, passes).items():
            if algorithm not in names[name]:
                continue

            def forced(run=run, algorithm=algorithm) -> object:
                tw.config.convolution = algorithm
                return run()

            forced()
            contenders[name].append(Contender(algorithm, forced, 0.0))
    once = dict.fromkeys(ALGORITHMS, 1)
    return {
        name: {a: min(t) for a, t in interleave(group, rounds, once).items()}  # noise only adds
        for name, group in contenders.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="layers (default: %(default)s)")
    parser.add_argument(
        "--networks", action="store_true", help="the benchmarks' own layers at several batch sizes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="a layer (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, metavar="PASS")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="CSV")
    options = parser.parse_args()
    malloc.enter("kept")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    machine = {
        "capability": tw.info()["cpu capability"],
        "threads": torch.get_num_threads(),
    }
    before = tw.config.convolution
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        if options.networks:
            drawn = list(network_layers())
        else:
            drawn = list(islice(layers(options.seed), options.count))
        for case in tqdm(drawn, unit="layer"):
            shape = {name: getattr(case, name) for name in SHAPE}
            for name, times in measure(case, options.rounds, options.passes).items():
                rounded = {algorithm: round(ms, 5) for algorithm, ms in times.items()}
                writer.writerow({**machine, "pass": name, **shape, **rounded})
            file.flush()
    tw.config.convolution = before


if __name__ == "__main__":
    main()

"""``python -m benchmarks``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import (
    bench_adamw,
    bench_conv_bn_relu,
    bench_models,
    bench_quantized_linear,
    cuda_adamw,
    cuda_conv_bn_relu,
    cuda_quantized_linear,
    device,
    harness,
    inference,
    linear_peers,
    malloc,
    optimizers,
    plots,
    report,
)
from benchmarks.machine import Machine
from benchmarks.records import Row, Writer

FAMILIES: dict[str, dict[str, Callable[..., Iterator[harness.Job]]]] = {
    "cpu": {
        "conv_bn_relu": bench_conv_bn_relu.jobs,
        "models": bench_models.jobs,
        "adamw": bench_adamw.jobs,
        "quantized_linear": bench_quantized_linear.jobs,
    },
    "cuda": {
        "adamw": cuda_adamw.jobs,
        "conv_bn_relu": cuda_conv_bn_relu.layers,
        "models": cuda_conv_bn_relu.models,
        "quantized_linear": cuda_quantized_linear.jobs,
    },
}

# What holds each library to an instruction set: all of them, or a ratio would compare two.
CAPABILITIES = {
    "avx2": {
        "TORCHWELD_CPU_CAPABILITY": "avx2", "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "TORCHWELD_CPU_CAPABILITY": "avx512", "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}  # fmt: skip


def hold(capability: str) -> None:
    """Start this process again, held to an instruction set, unless it is."""
    wanted = CAPABILITIES[capability]
    if wanted.items() - os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare torchweld with stock PyTorch, and for inference with onnxruntime and "
        "OpenVINO (pip install --group peers), on this machine. Every contender is "
        "checked against a float64 reference before it is timed; then all take turns, round after "
        "round, and medians are compared.",
        epilog="columns: ms, p25, p75: median and quartiles of the rounds; x rival: speed over the "
        "fastest rival (above 1 is faster); floor: share of the speed that measured "
        "bandwidth and arithmetic allow, empty where neither bounds it; dB: signal to "
        "noise of the checked result; saved MB: what forward keeps for backward; B/param: bytes of "
        "a parameter, its gradient and its states. "
        "Read ratios, not milliseconds, on a machine that is shared.",
    )
    parser.add_argument(
        "families",
        nargs="*",
        metavar="family",
        help=f"of {', '.join(FAMILIES['cpu'])} (default: all)",
    )
    parser.add_argument(
        "--device", choices=FAMILIES, default="cpu", help="what to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes, 3 rounds: shows in under a minute that everything runs, not how fast",
    )
    parser.add_argument(
        "--case", default="", metavar="TEXT", help="only cases whose operator or name contains TEXT"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile joins convolutions and models (many minutes of compiling)",
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="leave out who is wrong or fails, say so, and exit with 1 at the end",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds of each case (default: 15; --quick: 3)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=6.0,
        metavar="S",
        help=f"end a case after this long, but not before {harness.FEWEST_ROUNDS} rounds "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)"
    )
    parser.add_argument(
        "--malloc",
        choices=malloc.STATES,
        help="state of the C library's memory: kept, so that large tensors reuse pages; fresh, so "
        "that each touches new ones; another library; or glibc's own ways "
        "(default: kept; for a GPU default)",
    )
    parser.add_argument(
        "--capability",
        choices=CAPABILITIES,
        help="hold torchweld, ATen, oneDNN and MKL to an older instruction set; neither has VNNI "
        "(FBGEMM and the peers cannot be held)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/benchmarks"),
        metavar="DIR",
        help="where <date>-<cpu>-<malloc>.csv and figures go (default: %(default)s)",
    )
    options = parser.parse_args()
    families = FAMILIES[options.device]
    unknown = [name for name in options.families if name not in families]
    if unknown:
        parser.error(f"family: expected {', '.join(families)}, got {', '.join(unknown)}")
    options.malloc = options.malloc or ("kept" if options.device == "cpu" else "default")
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if options.capability:
        hold(options.capability)
    try:
        malloc.enter(options.malloc)
    except FileNotFoundError as missing:
        parser.error(f"--malloc {options.malloc}: {missing}")
    return options


def create(machine: Machine, options: argparse.Namespace) -> Path:
    """Make a new file; what was measured before stays."""
    options.output.mkdir(parents=True, exist_ok=True)
    model = machine.cpu_model if machine.device == device.CPU.name else machine.device
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    stem = f"{machine.date[:10]}-{name}-{options.malloc}{'-quick' if options.quick else ''}"
    number = 1
    while True:
        path = options.output / f"{stem}{f'-{number}' if number > 1 else ''}.csv"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1


def main() -> int:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        chosen = device.find(options.device)
    except RuntimeError as missing:
        print(f"--device: {missing}", file=sys.stderr)
        return 2
    families = FAMILIES[options.device]
    how = (options.quick, options.compile, *([chosen] if options.device == "cuda" else []))
    jobs = [
        job
        for name in dict.fromkeys(options.families or families)
        for job in families[name](*how)
        if options.case in f"{job.op} {job.case}"
    ]
    if not jobs:
        print(f"--case: expected part of a case's name, got {options.case!r}", file=sys.stderr)
        return 2
    machine = Machine.probe(chosen)
    if machine.load > 0.5 * (os.cpu_count() or 1):
        print(f"note: this machine is busy (load {machine.load:.1f}), trust no number")
    print(machine)
    # Of the peers of inference and of linear layers only torchao runs on a GPU.
    others = () if options.device == "cuda" else (*inference.missing(), *linear_peers.missing())
    for peer in dict.fromkeys((*optimizers.missing(), *others)):
        print(f"{peer} is not installed and left out (pip install --group peers)")
    print()
    path = create(machine, options)
    rounds = options.rounds or (3 if options.quick else 15)
    everything: list[Row] = []
    failures: list[str] | None = [] if options.keep_going else None
    with path.open("w", newline="") as file, tqdm(total=len(jobs), unit="case") as bar:
        writer = Writer(file)
        for job in jobs:
            bar.set_description(f"{job.op}, {job.case}")
            if options.compile:
                torch.compiler.reset()  # else the tenth nn.Sequential would run uncompiled
            rows = harness.record(
                job,
                machine,
                rounds=rounds,
                seconds=options.seconds,
                tick=lambda number: bar.set_postfix_str(f"round {number}"),
                failures=failures,
            )
            writer.write(rows)
            everything += rows
            if rows:
                bar.write(report.case(rows) + "\n")
            bar.update()
    texts = report.summary(everything), report.reached(everything)
    print(*filter(None, texts), sep="\n\n", end="\n\n")
    for failure in failures or []:
        print(f"FAILED: {failure}")
    print(f"written to {path}")
    try:
        print(*plots.draw(everything, path.with_suffix("")), sep="\n")
    except ModuleNotFoundError as missing:
        print(f"no figures: {missing}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

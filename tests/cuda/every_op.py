"""Runs every operator at odd sizes on a GPU and on the CPU, and says which differ.

    python tests/cuda/every_op.py

Small and without pytest, so that compute-sanitizer can watch all of it in seconds; the tests beside
it ask for more.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torchweld as tw
from torch import Tensor, nn

# Of the norm: other orders of summation, and kernels that round to 16 bits in other places.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
Results = list[Tensor]


def adamw(device: str, dtype: torch.dtype, **options: object) -> Results:
    params = [
        nn.Parameter(torch.randn(shape).to(device, dtype))
        for shape in ((1,), (7,), (0,), (64, 33), (3, 5, 7, 9), (5001,))
    ]
    grads = [torch.randn(p.shape).to(device, dtype) for p in params]
    optimizer = tw.optim.AdamW(params, lr=0.1, **options)
    scaler = tw.amp.GradScaler(device, init_scale=2.0)
    scaler.scale(torch.zeros((), device=device))
    for _ in range(2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = 2 * grad
        scaler.step(optimizer)
        scaler.update()
    return [p.detach() for p in params]


def conv(device: str, dtype: torch.dtype, layout: torch.memory_format, how: str) -> Results:
    block = tw.nn.ConvBNReLU2d(5, 11, 3, padding=1, activation="silu")
    x, residual = torch.randn(3, 5, 9, 7), torch.randn(3, 11, 9, 7)
    model: nn.Module = block.train(how != "frozen")
    if how == "memory saving":
        model = tw.weld(nn.Sequential(block.conv, block.bn, nn.ReLU()), memory_saving=True)
    block.to(device, memory_format=layout)
    x, residual = (t.to(device, dtype, memory_format=layout) for t in (x, residual))
    inputs = (x.requires_grad_(), residual.requires_grad_())
    enabled = dtype != torch.float32
    with torch.autocast(device, dtype if enabled else None, enabled=enabled):
        y = model(x) if how == "memory saving" else model(*inputs)
    y.backward(torch.ones_like(y))
    found = [y, *(t.grad for t in (*inputs, *block.parameters())), *block.buffers()]
    return [t.detach() for t in found if t is not None and t.is_floating_point()]


def folded(device: str, dtype: torch.dtype, layout: torch.memory_format) -> Results:
    torch.manual_seed(1)
    stock = nn.Conv2d(5, 11, 3), nn.BatchNorm2d(11).eval()
    block = tw.nn.ConvReLU2d.from_float(*stock).to(device, dtype, memory_format=layout)
    x = torch.randn(2, 5, 9, 7).to(device, dtype, memory_format=layout)
    with torch.no_grad():
        return [block(x)]


def depthwise(
    device: str, dtype: torch.dtype, channels: int, taps: int, stride: int, training: bool
) -> Results:
    block = tw.nn.ConvBNReLU2d(channels, channels, taps, stride, taps // 2, groups=channels)
    block.to(device, memory_format=torch.channels_last)
    x = torch.randn(2, channels, 9, 11).to(device, dtype, memory_format=torch.channels_last)
    if not training:
        snapshot = tw.nn.ConvReLU2d.from_float(block.conv, block.bn.eval()).to(device, dtype)
        with torch.no_grad():
            return [snapshot(x)]
    enabled = dtype != torch.float32
    with torch.autocast(device, dtype if enabled else None, enabled=enabled):
        y = block(x.requires_grad_())
    y.backward(torch.ones_like(y))
    return [t.detach() for t in (y, x.grad, block.conv.weight.grad)]


def pooling(device: str, dtype: torch.dtype, layout: torch.memory_format) -> Results:
    x = torch.randn(2, 24, 9, 11).to(device, dtype, memory_format=layout).requires_grad_()
    y = tw.nn.MaxPool2d(3, 2, 1)(x)
    y.backward(torch.ones_like(y))
    # An exported model calls the operator itself.
    return [y.detach(), x.grad, torch.ops.torchweld.max_pool2d(x.detach(), 2)]


def linear(
    device: str,
    dtype: torch.dtype,
    make: Callable[[nn.Linear], nn.Module],
    sizes: tuple[int, int],
    rows: tuple[int, ...] = (1, 3, 17, 130),
) -> Results:
    n, k = sizes
    # The weight is quantized on the CPU, so that both compute with the same integers.
    layer = make(nn.Linear(k, n)).to(device)
    found = []
    for m in rows:
        x = torch.randn(m, k).to(device, dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.ones_like(y))
        found += [y.detach(), x.grad]
    return found


def int8_by_path(device: str, path: str) -> Results:
    """Sums of several blocks and of several stages, by a kernel that is asked for."""
    os.environ["TORCHWELD_CUDA_LINEAR_PATH"] = path
    try:
        rows = (32,) if path == "few_rows" else (130,)
        return linear(device, torch.bfloat16, tw.nn.QuantizedLinear.from_float, (140, 1100), rows)
    finally:
        del os.environ["TORCHWELD_CUDA_LINEAR_PATH"]


def paths() -> list[str]:
    """Return the paths of an int8 product that this device has."""
    has_wgmma = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    has_wgmma &= "90a" in tw.info()["cuda architectures"]
    everywhere = ["few_rows", "small_tiles", "large_tiles"]
    return [*everywhere, "warpgroups", "wide_warpgroups"] if has_wgmma else everywhere


def ops() -> Iterator[tuple[str, torch.dtype, Callable[[str], Results]]]:
    """Yield what there is to run: a name, a dtype, and what runs it on a device."""
    for dtype, options in (
        (torch.float32, {"max_grad_norm": 1.0}),
        (torch.float32, {"amsgrad": True, "maximize": True}),
        (torch.float32, {"state_dtype": torch.bfloat16}),
        (torch.float32, {"state_dtype": "int8"}),
        (torch.bfloat16, {"stochastic_rounding": True, "state_dtype": "int8"}),
        (torch.bfloat16, {"kahan": True}),
        (torch.bfloat16, {"split_master": True}),
    ):
        yield f"adamw {options}", dtype, lambda d, o=options, t=dtype: adamw(d, t, **o)
    for layout in (torch.channels_last, torch.contiguous_format):
        for dtype in TOLERANCE:
            for how in ("training", "frozen", "memory saving"):
                run = lambda d, t=dtype, f=layout, h=how: conv(d, t, f, h)  # noqa: E731
                yield f"conv_bn_relu {how}, {layout}", dtype, run
            yield f"conv_relu, {layout}", dtype, lambda d, t=dtype, f=layout: folded(d, t, f)
        for dtype in TOLERANCE:
            run = lambda d, t=dtype, f=layout: pooling(d, t, f)  # noqa: E731
            yield f"max_pool2d, {layout}", dtype, run
    for channels, taps, stride in (
        (24, 3, 1),
        (16, 3, 2),
        (40, 5, 1),
        (8, 5, 2),
        (7, 3, 1),
        (8, 7, 1),
    ):
        for dtype in TOLERANCE:
            for training in (True, False):
                run = lambda d, t=dtype, o=(channels, taps, stride, training): depthwise(d, t, *o)  # noqa: E731
                name = f"depthwise {channels} {taps}x{taps}/{stride} {'training' * training}"
                yield name.strip(), dtype, run
    for kind in (tw.nn.QuantizedLinear, tw.nn.WeightOnlyLinear, tw.nn.Int4Linear):
        for sizes in ((45, 77), (64, 256), (1, 33)):
            for dtype in TOLERANCE:
                run = lambda d, t=dtype, c=kind, s=sizes: linear(d, t, c.from_float, s)  # noqa: E731
                yield f"{kind.__name__} {sizes}", dtype, run
    for path in paths():
        yield f"QuantizedLinear by {path}", torch.bfloat16, lambda d, p=path: int8_by_path(d, p)


def wrong(run: Callable[[str], Results], device: str, tolerance: float) -> str | None:
    """Return what is wrong on a device, beside the CPU; None if nothing is."""
    found = []
    for where in (device, "cpu"):
        torch.manual_seed(0)
        try:
            found.append([t.cpu().double() for t in run(where)])
        except Exception as failure:
            return f"fails on {where}: {type(failure).__name__}: {failure}".splitlines()[0]
    for number, (mine, exact) in enumerate(zip(*found, strict=True)):
        error = (mine - exact).norm().item() / max(exact.norm().item(), 1e-3)
        if not error <= tolerance:
            return f"differs: result {number} by {error:.3g}"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU, or a torch without CUDA")
        return 1
    # Beside the CPU's float32, and not to one part in a thousand.
    torch.backends.cudnn.allow_tf32 = False
    verdicts = {}
    for name, dtype, run in ops():
        title = f"{name}, {str(dtype).removeprefix('torch.')}"
        verdicts[title] = wrong(run, device, TOLERANCE[dtype])
    for name, verdict in verdicts.items():
        if verdict:
            print(f"{name}: {verdict}")
    bad = sum(verdict is not None for verdict in verdicts.values())
    print(f"{len(verdicts) - bad} of {len(verdicts)} as on the CPU")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

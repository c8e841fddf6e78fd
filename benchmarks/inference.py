"""Contenders for inference: the ways of stock PyTorch, engines beside it, and ours.

onnxruntime and OpenVINO join where ``pip install --group peers`` has been run. They run what
``torch.onnx.export`` makes of the stock module, and fold and lay out by themselves.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import Contender
from benchmarks.records import OURS, PEER, STOCK

Run = Callable[[Tensor], Tensor]

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# What each needs; both read ONNX, which torch writes with onnxscript.
PEERS = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "OpenVINO": ("openvino", "onnx", "onnxscript"),
}


def contenders(
    module: nn.Module,
    x: Tensor,
    tolerance: float,
    *,
    fold: Callable[[nn.Module], nn.Module],
    weld: Callable[[nn.Module], nn.Module],
    compiled: bool,
    dtype: torch.dtype = torch.float32,
) -> list[Contender]:
    """Return everybody who can run the float32 module in evaluation mode.

    Args:
        module: the module, contiguous.
        x: its input, contiguous.
        tolerance: see :class:`Contender`.
        fold: makes stock's folded module.
        weld: makes ours.
        compiled: whether torch.compile takes part.
        dtype: what they run it in, float32 or bfloat16. The peers get a float32 input either way.
    """
    found = []
    for name, layout in LAYOUTS.items():
        stock = copy.deepcopy(module).to(dtype, memory_format=layout)
        laid = x.to(dtype, memory_format=layout)
        ways: dict[str, Run] = {
            "eager": stock,
            "folded": fold(stock).to(memory_format=layout),
            "TorchScript optimized": _scripted(stock, laid),
        }
        if compiled:
            ways["compile+freezing"] = torch.compile(stock, options={"freezing": True})
        for way, run in ways.items():
            found.append(contender(f"{way} {name}", run, laid, tolerance))
        ours = weld(stock)
        for way, run in {"torchweld": ours, "torchweld TorchScript": _frozen(ours, laid)}.items():
            found.append(contender(f"{way} {name}", run, laid, tolerance, OURS))
    for name, run in peers(module, x, bfloat16=dtype == torch.bfloat16).items():
        found.append(contender(name, run, x, tolerance, PEER))
    return found


def contender(name: str, run: Run, x: Tensor, tolerance: float, kind: str = STOCK) -> Contender:
    """Return one that runs on x without gradients."""

    @torch.no_grad()
    def forward() -> Sequence[Tensor]:
        return (run(x),)

    return Contender(name, forward, tolerance, kind)


def missing() -> list[str]:
    """Return the peers that are not installed."""
    return [p for p, needs in PEERS.items() if None in map(importlib.util.find_spec, needs)]


def peers(module: nn.Module, x: Tensor, *, bfloat16: bool = False) -> dict[str, Run]:
    """Return the peers by name, set to as many threads as torch.

    Args:
        module: a float32 module in evaluation mode.
        x: an input.
        bfloat16: compute in bfloat16, from and to float32, those that can. If not, OpenVINO is told
            to stay in float32, which it may leave by itself.
    """
    there = PEERS.keys() - missing()
    onnx = _export(module, x) if there else b""
    found = {}
    if "onnxruntime" in there and not bfloat16:
        found["onnxruntime"] = _onnxruntime(onnx)
    if "OpenVINO" in there:
        found["OpenVINO"] = _openvino(onnx, "bf16" if bfloat16 else "f32")
    return found


def _scripted(module: nn.Module, x: Tensor) -> Run:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still a rival
        return torch.jit.optimize_for_inference(torch.jit.trace(module, x))


def _frozen(module: nn.Module, x: Tensor) -> Run:
    """As tw.export writes it for C++."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(torch.jit.trace(module, x))


def _export(module: nn.Module, x: Tensor) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    return program.model_proto.SerializeToString()


def _onnxruntime(onnx: bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin for the whole of a call, and not into the next contender's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(onnx: bytes, precision: str) -> Run:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(onnx), "CPU", settings).create_infer_request()

    def run(x: Tensor) -> Tensor:
        results = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return run

"""Int8 linear layers of stock PyTorch and of engines beside it.

torchao, onnxruntime and OpenVINO join where ``pip install --group peers`` has been run. Each gets
the float layer and quantizes it the way its own documentation does; all are called with and return
torch tensors.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[..., Tensor]

# What each needs. torchao's layers are slow unless compiled.
PEERS = {
    "torchao": ("torchao",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "OpenVINO": ("openvino", "onnx"),
}


def missing() -> list[str]:
    """Return the peers that are not installed."""
    return [p for p, needs in PEERS.items() if None in map(importlib.util.find_spec, needs)]


def peers(compiled: bool) -> dict[str, Callable[[nn.Linear], Run]]:
    """Return what makes an int8 layer of a float one, by the name of the installed peer."""
    ways: dict[str, Callable[[nn.Linear], Run]] = {
        "onnxruntime": onnxruntime,
        "OpenVINO": openvino,
    }
    if compiled:
        ways["torchao"] = torchao
    return {name: way for name, way in ways.items() if name in PEERS.keys() - missing()}


def engines() -> list[str]:
    """Return the engines of quantize_dynamic worth a turn."""
    supported = torch.backends.quantized.supported_engines
    return [engine for engine in ("x86", "onednn") if engine in supported] or ["qnnpack"]


def quantize_dynamic(layer: nn.Linear, engine: str) -> nn.Module:
    """Return torch.ao's layer; the engine in use while it packs the weight is the one that runs."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and the fastest stock has
            return torch.ao.quantization.quantize_dynamic(
                nn.Sequential(copy.deepcopy(layer)), {nn.Linear}, torch.qint8
            )
    finally:
        torch.backends.quantized.engine = before


def torchao(layer: nn.Linear) -> Run:
    """One compiled function for all layers of a shape; the weight is an argument of it."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it misses GPUs
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = nn.Sequential(copy.deepcopy(layer))
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    weight, bias = quantized[0].weight, quantized[0].bias
    return lambda x: _compiled()(x, weight, bias)


@functools.cache
def _compiled() -> Run:
    return torch.compile(nn.functional.linear)


def onnxruntime(layer: nn.Linear) -> Run:
    """As its ``quantize_dynamic`` writes it: a scale per column, one for all of the input."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = _onnx(
        [("MatMul", ("x", "weight"), "product", {}), ("Add", ("product", "bias"), "y", {})],
        {"weight": layer.weight.detach().t().contiguous(), "bias": layer.bias.detach()},
        layer,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin for the whole of a call, and not into the next contender's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = f"{folder}/linear.onnx"
        quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino(layer: nn.Linear) -> Run:
    """An int8 weight; OpenVINO itself then quantizes the input, by groups of its own choice."""
    import openvino

    weight = layer.weight.detach()
    scale = weight.abs().amax(1) / 127
    model = _onnx(
        [
            ("DequantizeLinear", ("qweight", "scale"), "weight", {"axis": 0}),
            ("Gemm", ("x", "weight", "bias"), "y", {"transB": 1}),
        ],
        {
            "qweight": (weight / scale[:, None]).round().to(torch.int8),
            "scale": scale,
            "bias": layer.bias.detach(),
        },
        layer,
    )
    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    read = core.read_model(model.SerializeToString())
    request = core.compile_model(read, "CPU", settings).create_infer_request()

    def run(x: Tensor) -> Tensor:
        results = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return run


def _onnx(
    nodes: Sequence[tuple[str, Sequence[str], str, dict[str, int]]],
    tensors: dict[str, Tensor],
    layer: nn.Linear,
) -> Any:
    """Return a model of ``x`` and ``y`` with any number of rows."""
    from onnx import TensorProto, helper, numpy_helper

    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", features])
        for name, features in (("x", layer.in_features), ("y", layer.out_features))
    )
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], **how) for op, inputs, output, how in nodes],
        "linear",
        [x],
        [y],
        [numpy_helper.from_array(value.numpy(), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice, given through the root logger, to preprocess the model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

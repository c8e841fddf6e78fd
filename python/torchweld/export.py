"""Writes a model and its manifest to files that a C++ program loads without Python."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import io
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchweld._C import __version__

FORMAT_VERSION = 1
_PLANNED = ("aoti", "onnx")
_DTYPES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}

_Tensors = tuple[Tensor, ...]


def export(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    format: str = "torchscript",
) -> None:
    """Write a model as TorchScript, and a manifest beside it.

    The model is traced in eval mode and without gradients; a ``ScriptModule`` is written as it is.
    The file is loaded back and must reproduce the model on the example inputs. The first dimension
    of the inputs is recorded as dynamic where the file also reproduces the model on batches of 1
    and of one row more than the example, and as fixed otherwise.

    The manifest of ``m.pt`` is ``m.json``: names, dtypes and shapes of inputs and outputs (-1 for a
    dynamic dimension), the schema of every operator that is not PyTorch's own, versions, the
    SHA-256 of the file, and a golden sample: inputs (a single row where the batch is dynamic) and
    the outputs the file gives for them.

    Args:
        model: module on the CPU. Its parameters, buffers and training mode stay as they are.
        example_inputs: a tensor or a sequence of tensors on the CPU: the positional arguments of
            ``model.forward``.
        path: file to write, usually ``*.pt``. It and the manifest are written under temporary names
            and renamed, so that a failed export leaves existing files as they were.
        format: ``"torchscript"``. ``"aoti"`` and ``"onnx"`` are planned.

    Raises:
        NotImplementedError: ``format`` is ``"aoti"`` or ``"onnx"``.
        ValueError: ``format`` is unknown; ``path`` ends in ``.json`` or is a directory; a tensor is
            not on the CPU; or the file does not reproduce the model, because the model is random,
            changes its buffers in eval mode, or reads values of its inputs in Python.
        TypeError: ``model`` is no module; an input or output is no tensor, or has a dtype other
            than bool, uint8, int8, int16, int32, int64, float16, bfloat16, float32 and float64.
        OSError: the folder does not exist, or a file cannot be written.

    Note:
        Tracing records the operations of one run: branches and loops on tensor values are frozen as
        the example takes them (``torch.jit.TracerWarning`` tells). Pass ``torch.jit.script(model)``
        where they matter. Parameters are saved as they are, nothing is folded, so that the bits of
        the outputs stay those of the model.

    Example:
        >>> import tempfile, torch, torchweld as tw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tw.export(model, torch.randn(2, 4), f"{folder}/m.pt")
        ...     sorted(os.listdir(folder))
        ['m.json', 'm.pt']
    """
    if format in _PLANNED:
        raise NotImplementedError(
            f'export: format "{format}" is planned; "torchscript" works today'
        )
    if format != "torchscript":
        raise ValueError(f'export: format: expected "torchscript", got {format!r}')
    path, manifest_path = _paths(path)
    if not isinstance(model, nn.Module):
        raise TypeError(f"export: model: expected a torch.nn.Module, got {type(model).__name__}")
    inputs = _as_tensors(example_inputs, "example_inputs")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            raise ValueError(f"export: {name}: expected a CPU tensor, got one on {tensor.device}")

    with torch.no_grad(), _eval_mode(model), _no_autocast_cache(), _no_deprecation_warnings():
        inputs = tuple(x.detach().contiguous() for x in inputs)
        expected = _as_tensors(model(*inputs), "the model's output")
        scripted = model
        if not isinstance(model, torch.jit.ScriptModule):
            # check_trace would run the model twice more to compare less than is compared below.
            scripted = torch.jit.trace(model, inputs, check_trace=False)
        file = io.BytesIO()  # not `path`, whose name torch.jit.save would store in the archive
        torch.jit.save(scripted, file)
        data = file.getvalue()
        loaded = torch.jit.load(io.BytesIO(data))
        difference = _difference(loaded, inputs, expected)
        if difference:
            raise ValueError(
                "export: the exported model does not reproduce the model on the example inputs: it "
                "is random or changes its buffers in eval mode, or reads tensor values in "
                f"Python.\n{difference}"
            )
        input_shapes, output_shapes = _dynamic_shapes(model, loaded, inputs, expected)
        golden_inputs = inputs
        if input_shapes != [list(x.shape) for x in inputs]:
            golden_inputs = _with_batch(inputs, 1)
        golden_outputs = _as_tensors(loaded(*golden_inputs), "the model's output")

    names = [argument.name for argument in loaded.forward.schema.arguments[1:]]
    output_names = (
        ["output"] if len(expected) == 1 else [f"output{i}" for i in range(len(expected))]
    )
    manifest = {
        "format_version": FORMAT_VERSION,
        "format": format,
        "sha256": hashlib.sha256(data).hexdigest(),
        "torch_version": str(torch.__version__),
        "torchweld_version": __version__,
        "inputs": _signature(names, inputs, input_shapes),
        "outputs": _signature(output_names, expected, output_shapes),
        "ops": _op_schemas(loaded),
        "golden": {
            "inputs": [_encode(tensor) for tensor in golden_inputs],
            "outputs": [_encode(tensor) for tensor in golden_outputs],
        },
    }
    _write({path: data, manifest_path: json.dumps(manifest, indent=1).encode() + b"\n"})


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    path = Path(path)
    if path.is_dir():  # first, because a folder such as "." has no name to take a suffix
        raise ValueError(f"export: path: {path} is a directory")
    manifest_path = path.with_suffix(".json")
    if path == manifest_path:
        raise ValueError(f"export: path: {path} is the name of the manifest; write to a .pt file")
    if manifest_path.is_dir():
        raise ValueError(f"export: path: {manifest_path} is a directory")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: path: the folder {path.parent} does not exist")
    return path, manifest_path


def _as_tensors(value: object, what: str) -> _Tensors:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not values:
        raise TypeError(f"export: {what}: expected at least one tensor, got none")
    for item in values:
        if not isinstance(item, Tensor):
            raise TypeError(
                f"export: {what}: expected a tensor or a flat tuple of tensors, got "
                + (
                    f"{type(item).__name__} in a {type(value).__name__}"
                    if item is not value
                    else type(value).__name__
                )
            )
        if item.dtype not in _DTYPES or item.layout != torch.strided:
            raise TypeError(
                f"export: {what}: expected a dense tensor of dtype {', '.join(_DTYPES.values())}, "
                f"got {item.layout} of {item.dtype}"
            )
        if item.device.type != "cpu":
            raise ValueError(f"export: {what}: expected CPU tensors, got one on {item.device}")
    return values


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A trace cannot hold what autocast casts once and keeps; it records a cast per use instead."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _no_deprecation_warnings() -> Iterator[None]:
    """TorchScript is deprecated upstream and supported here on purpose: silence only that."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=category)
        yield


def _difference(module: nn.Module, inputs: _Tensors, expected: _Tensors) -> str:
    """How the module's outputs differ from those expected; empty if they do not."""
    try:
        got = _as_tensors(module(*inputs), "the model's output")
        torch.testing.assert_close(got, expected, equal_nan=True, check_stride=False)
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return ""


def _with_batch(inputs: _Tensors, size: int) -> _Tensors:
    """The inputs with their first dimension cut, or filled by repeating rows, to `size`."""
    return tuple(x[torch.arange(size) % len(x)] if x.dim() else x for x in inputs)


def _dynamic_shapes(
    model: nn.Module, loaded: nn.Module, inputs: _Tensors, expected: _Tensors
) -> tuple[list[list[int]], list[list[int]]]:
    """Shapes of inputs and outputs, -1 where a dimension was shown to follow the batch size."""
    fixed = [list(x.shape) for x in inputs], [list(x.shape) for x in expected]
    batches = {len(x) for x in inputs if x.dim()}
    if len(batches) != 1 or 0 in batches:
        return fixed
    (batch,) = batches
    output_shapes = [list(x.shape) for x in expected]
    for size in {1, batch + 1} - {batch}:
        other_inputs = _with_batch(inputs, size)
        try:
            other = _as_tensors(model(*other_inputs), "the model's output")
        except Exception:  # whatever a forward raises: the model takes no other batch size
            return fixed
        if _difference(loaded, other_inputs, other) or len(other) != len(expected):
            return fixed
        for shape, tensor in zip(output_shapes, other, strict=True):
            if len(shape) != tensor.dim():
                return fixed
            shape[:] = [
                old if old == new else -1 for old, new in zip(shape, tensor.shape, strict=True)
            ]
    return [[-1, *x.shape[1:]] if x.dim() else [] for x in inputs], output_shapes


def _op_schemas(module: nn.Module) -> list[str]:
    """Schemas of all operators the module calls that are not PyTorch's own, sorted."""
    schemas = set()

    def walk(block: Any) -> None:  # a torch._C.Graph or torch._C.Block
        for node in block.nodes():
            if node.kind().split("::")[0] not in ("aten", "prim"):
                schemas.add(node.schema())
            for inner in node.blocks():
                walk(inner)
            for name in node.attributeNames():
                if node.kindOf(name) == "g":
                    walk(node.g(name))

    for part in module.modules():
        code: Any = part._c
        for method in code._method_names():
            walk(code._get_method(method).inlined_graph)
    return sorted(schemas)


def _signature(
    names: Sequence[str], tensors: _Tensors, shapes: list[list[int]]
) -> list[dict[str, object]]:
    return [
        {"name": name, "dtype": _DTYPES[tensor.dtype], "shape": shape}
        for name, tensor, shape in zip(names, tensors, shapes, strict=True)
    ]


def _encode(tensor: Tensor) -> dict[str, object]:
    """A tensor in JSON, exact: base64 of its little-endian bytes in C order."""
    tensor = tensor.contiguous()
    data = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""
    return {
        "dtype": _DTYPES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }


def _write(files: dict[Path, bytes]) -> None:
    """Write all files or none: each under a temporary name, renamed once all are on the disk."""
    suffix = f".{secrets.token_hex(4)}.tmp"
    temporaries = {path: path.with_name(f".{path.name}{suffix}") for path in files}
    try:
        for path, data in files.items():
            with open(temporaries[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)

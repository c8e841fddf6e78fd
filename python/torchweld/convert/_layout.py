"""Whether the code of a model can tell in which memory order its activations lie.

The kernels are fastest on channels_last memory. A model called with contiguous tensors may compute
in channels_last all the same if nobody sees it: no code reads strides (``x.view`` does), no random
numbers are drawn in memory order (dropout does), and no such tensor leaves the model. The graphs of
all forwards are followed from the input on; anything not known to be blind counts as seeing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchweld.convert import _welded
from torchweld.convert._inplace import IN_PLACE
from torchweld.convert._rules import is_hooked
from torchweld.convert._trace import trace, usual_call
from torchweld.convert._values import TENSOR, stock_class
from torchweld.convert._watch import UntraceableError
from torchweld.nn import MaxPool2d


class SeenError(Exception):
    """The model can see the memory order; the message says where."""


IMAGE = "image"  # 4-D, perhaps channels_last where the stock model has it contiguous
INPUT = "input"  # the same, and perhaps the very tensor that the caller gave
VIEW = "view"  # as in the stock model, where it may be the memory of an activation; here a copy
PLAIN = "plain"  # as in the stock model

# Image in, image out; anything else in, the same out.
_LIKE_INPUT_MODULES = (
    nn.Identity, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.ELU,
    nn.MaxPool2d, MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d,
    nn.Upsample,
)  # fmt: skip
_LIKE_INPUT_FUNCTIONS = {
    torch.relu, torch.relu_, torch.sigmoid, torch.add, torch.mul, torch.sub, torch.cat,
    torch.concat, F.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish, F.hardsigmoid,
    F.sigmoid, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    F.interpolate, F.pad, F.dropout2d, operator.add, operator.mul, operator.sub, operator.truediv,
    *IN_PLACE,
}  # fmt: skip
_LIKE_INPUT_METHODS = {
    "relu", "relu_", "sigmoid", "add", "add_", "mul", "mul_", "sub", "sub_", "float", "clone",
    "detach", "div", "div_", "clamp", "clamp_",
}  # fmt: skip
# They return another tensor than they are given.
_FRESH_MODULES = (
    nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.MaxPool2d, MaxPool2d,
    nn.AvgPool2d, nn.Linear,
)  # fmt: skip
# Their result lies as in the stock model whatever went in. Without an image any operation does.
_PLAIN_FUNCTIONS = {torch.mean, getattr, len}
_PLAIN_METHODS = {"mean", "contiguous", "size", "dim"}


def seen_by(model: nn.Module) -> str:
    """Return where a model sees the memory order of its activations, or nothing."""
    try:
        for training in (True, False):
            with _welded.mode(model, training):
                forward = stock_class(model).forward
                inputs = usual_call(forward)
                count = len(inputs[1]) - 1 if isinstance(inputs, tuple) else 0
                if _holds_image(_follow(model, "", [INPUT] * count)):
                    raise SeenError("the model returns an activation")
    except SeenError as seen:
        return str(seen)
    return ""


def _follow(module: nn.Module, path: str, inputs: list[Any]) -> Any:
    """Return what kind of value a module gives for inputs of these kinds."""
    if _holds(VIEW, inputs) and _may_write(module):
        raise SeenError(f"{path} may change an activation through a view")
    kind = stock_class(module)
    if not _holds_image(inputs):
        # Whatever it does, it does on tensors that lie as they always did.
        return PLAIN if kind in _FRESH_MODULES else _copied(inputs)
    if is_hooked(module):
        raise SeenError(f"{path or 'the model'} has hooks")
    if getattr(module, "inplace", False) and _holds(INPUT, inputs):
        raise SeenError(f"{path} changes its input")
    if kind in _LIKE_INPUT_MODULES:
        return IMAGE if kind in _FRESH_MODULES else _image_of(inputs)
    if isinstance(module, nn.Flatten) and kind is nn.Flatten:
        return _of_flatten(module.start_dim, module.end_dim, path)
    if kind is nn.Dropout:
        raise SeenError(f"{path} draws random numbers in memory order")
    if kind.forward is nn.Sequential.forward:
        value = inputs[0]
        for i, (name, child) in enumerate(module.named_children()):
            given, value = value, _follow(child, f"{path}.{name}".lstrip("."), [value])
            if i > 0 and value == VIEW and given != VIEW:
                value = PLAIN  # nobody else reads what it was made of
        return value
    if kind.__module__.startswith("torch.nn."):
        raise SeenError(f"{path or 'the model'} is a {kind.__name__}")
    return _follow_graph(module, path, inputs)


def _follow_graph(module: nn.Module, path: str, inputs: list[Any]) -> Any:
    forward = stock_class(module).forward
    try:
        graph = trace(module, forward, usual_call(forward)).graph
    except UntraceableError as error:
        raise SeenError(f"{path or 'the model'} cannot be traced: {error}") from error
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)

    def kind_of(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: values[node])

    for node in graph.nodes:
        where = f"{path}.{node.target}".lstrip(".")
        if node.op == "placeholder":
            values[node] = next(given, PLAIN)
        elif node.op == "get_attr":
            values[node] = PLAIN
        elif node.op == "output":
            return kind_of(node.args[0])
        elif node.op == "call_module":
            child = module.get_submodule(str(node.target))
            arguments = [kind_of(a) for a in (*node.args, *node.kwargs.values())]
            if _holds_image(arguments) and not _is_usual_call(child, node):
                raise SeenError(f"{where} is called in a form of its own")
            values[node] = _follow(child, where, arguments)
        else:
            values[node] = _of_call(node, kind_of((node.args, node.kwargs)), path)
        if values[node] == VIEW and all(_is_read_once(n, values) for n in node.all_input_nodes):
            values[node] = PLAIN
    return PLAIN


def _is_read_once(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether nobody would see a value change after its one reader."""
    return node.op != "placeholder" and len(node.users) == 1 and values[node] != VIEW


def _may_write(module: nn.Module) -> bool:
    return any(
        getattr(part, "inplace", False) or not stock_class(part).__module__.startswith("torch.nn.")
        for part in module.modules()
    )


def _is_usual_call(module: nn.Module, node: fx.Node) -> bool:
    if stock_class(module).__module__.startswith("torch.nn."):
        return True
    spec = (tuple, *[TENSOR if isinstance(a, fx.Node) else None for a in node.args])
    return not node.kwargs and usual_call(stock_class(module).forward) == (tuple, spec, (dict,))


def _of_flatten(start: int, end: int, path: str) -> Any:
    if start not in (0, 1) or end not in (-1, 3):
        raise SeenError(f"{path or 'the model'} flattens an activation in part")
    return VIEW


def _of_call(node: fx.Node, arguments: Any, path: str) -> Any:
    """Return the kind of value a function or method gives."""
    if node.target is operator.getitem and isinstance(arguments[0][0], (tuple, list, dict)):
        key: Any = node.args[1]
        return arguments[0][0][key]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    in_place = name.endswith("_") or node.target in IN_PLACE or node.kwargs.get("inplace")
    if in_place and _holds(VIEW, arguments):
        raise SeenError(f"{path or 'the model'} may change an activation through a view")
    if not _holds_image(arguments):
        return _copied(arguments)
    if node.target in (torch.flatten, "flatten"):
        start, end = _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)
        return _of_flatten(start, end, path)
    if _holds(INPUT, arguments) and (in_place or name == "contiguous"):  # which may return it
        raise SeenError(f"{path or 'the model'} changes its input")
    like, plain = (
        (_LIKE_INPUT_METHODS, _PLAIN_METHODS)
        if node.op == "call_method"
        else (_LIKE_INPUT_FUNCTIONS, _PLAIN_FUNCTIONS)
    )
    if node.target is F.dropout and not _argument(node, 2, "training", True):
        return _image_of(arguments)
    if node.target in like:
        return _image_of(arguments)
    # A name read of a value: only those that say nothing of strides.
    if node.target in plain and (node.target is not getattr or node.args[1] in ("shape", "dtype")):
        return VIEW if name == "contiguous" else PLAIN
    raise SeenError(f"{path or 'the model'} calls {name} on an activation")


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _holds_image(value: Any) -> bool:
    return _holds(IMAGE, value) or _holds(INPUT, value)


def _image_of(arguments: Any) -> str:
    """The kind of an image made of others, or which is one of them."""
    return INPUT if _holds(INPUT, arguments) else IMAGE


def _copied(arguments: Any) -> str:
    """The kind of what is made without an image."""
    return VIEW if _holds(VIEW, arguments) else PLAIN


def _holds(kind: str, value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds(kind, part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds(kind, part) for part in value)
    return isinstance(value, str) and value == kind

"""``weld`` and ``unweld``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchweld.convert import _welded
from torchweld.convert._layout import seen_by
from torchweld.convert._linear import pack_linears
from torchweld.convert._pools import CONVERSION as POOLS
from torchweld.convert._pools import rows, unweld_pools, weld_pools
from torchweld.convert._survey import CONVERSION, weld_patterns
from torchweld.nn import MaxPool2d, SyncBatchNorm
from torchweld.report import Report, record


def weld(
    model: nn.Module,
    *,
    example_inputs: Tensor | Sequence[Any] | None = None,
    inference: bool = False,
    memory_saving: _welded.MemorySaving = False,
) -> nn.Module:
    """Fuse every convolution, batch normalization, addition and activation that belong together.

    Only the smallest module that owns such a pattern gets a new forward. Its class keeps its name
    and stays a subclass of the stock one; conv, bn and activation stay registered where they are,
    so state_dict keys, parameter order, attributes and everything above are as before.
    In a model where something is fused, each plain ``nn.MaxPool2d`` becomes a
    :class:`torchweld.nn.MaxPool2d`.
    A forward that torch.fx cannot trace, or a pattern that fusing would change (see
    :func:`torchweld.report`), is left alone.

    Args:
        model: the model; it is not changed.
        example_inputs: a batch, or the positional arguments of a call. If given, the welded model
            must give the outputs of the stock one on them, in evaluation mode.
        inference: fold the batch normalizations into the convolutions, and make large
            ``nn.Linear`` layers of float32 or bfloat16 :class:`torchweld.nn.PackedLinear`. The
            result is a snapshot in evaluation mode with tensors of its own, none of which requires
            a gradient; ``train()`` raises.
        memory_saving: in training, keep for the backward what a fused output can be made from
            again, instead of the output: the convolution's output (True), or the convolution's
            input, and convolve again (``"recompute"``). Gradients have the same bits as without.

    Returns:
        A copy of the model which shares its parameters and buffers: train either, or load a
        state_dict into either, and both change. ``train()`` and ``eval()`` act on each alone.
        With ``inference=True`` nothing is shared.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``example_inputs`` neither tensor, list
            nor tuple.
        ValueError: a copy of the model would not share its parameters (TorchScript modules), or
            ``inference=True`` and a module is lazy, or with ``memory_saving``; or that is none of
            False, True, ``"recompute"``.
        RuntimeError: the outputs on ``example_inputs`` differ.

    Note:
        A forward is traced with torch.fx, in training and in evaluation. What it reads from its
        module, such as ``self.training`` or a list of layers, is compared again before every
        call, and a call that no trace fits is traced anew or runs the stock forward. A hook
        registered on a fused module later gets its module to run by itself again.
        ``torch.jit.trace``, ``torch.compile`` and ``torch.export`` take a welded model;
        ``torch.jit.script`` does not.

        ``memory_saving`` works through :class:`torch.autograd.graph.saved_tensors_hooks`, within
        one call of the model, or of a welded part called by itself. It stands back inside the hooks
        of others (activation checkpointing, offloading) and where torch.compile decides what to
        keep. Writes that autograd does not count (``tensor.data``, NumPy views) must not touch the
        output of a fused pattern before its next reader has run.

    Example:
        >>> import torch, torchweld as tw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> welded = tw.weld(model)
        >>> [row.detail for row in tw.report(welded)]
        ['conv-bn-relu']
        >>> welded[0].weight is model[0].weight
        True
    """
    _check_module("weld", model)
    if not (example_inputs is None or isinstance(example_inputs, (Tensor, list, tuple))):
        raise TypeError(
            "torchweld.weld: expected example_inputs to be a tensor or a list or tuple of "
            f"positional arguments, got {type(example_inputs).__name__}"
        )
    if memory_saving not in (False, True, "recompute"):
        raise ValueError(
            'torchweld.weld: expected memory_saving to be False, True or "recompute", got '
            f"{memory_saving!r}"
        )
    if memory_saving and inference:
        raise ValueError(
            "torchweld.weld: memory_saving is for training, and inference=True gives a model that "
            "cannot train"
        )
    if inference and any(map(nn.parameter.is_lazy, [*model.parameters(), *model.buffers()])):
        raise ValueError(
            "torchweld.weld: inference=True needs values to fold, and a lazy module has none yet; "
            "run the model once first"
        )
    welded = copy.deepcopy(model, _kept(model)) if inference else _copy(model)
    for module in welded.modules():
        if _welded.is_welded(module) and not _welded.is_snapshot(module):
            _welded.uninstall(module)
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = SyncBatchNorm  # type: ignore[assignment]
    if inference:
        welded.eval().requires_grad_(False)
    pools = weld_pools(welded)  # before the forwards are looked at, which remember classes
    found = Report(weld_patterns(welded, inference))
    record(welded, found, replacing=CONVERSION)
    if found.converted:
        record(welded, Report(rows(welded)), replacing=POOLS)
        if not seen_by(model):
            _welded.hide_channels_last(welded, snapshot=inference)
    else:
        unweld_pools(pools)
        record(welded, Report(), replacing=POOLS)
    if inference:
        pack_linears(welded)
    if inference and not _welded.is_snapshot(welded):
        _welded.install(welded, _welded.Weld(frozenset()), snapshot=True)
    if memory_saving:
        _welded.save_memory(welded, memory_saving)
    if example_inputs is not None:
        _check_outputs(model, welded, example_inputs)
    return welded


def unweld(model: nn.Module) -> nn.Module:
    """Return a model with the stock forwards again.

    Args:
        model: a model from :func:`weld`; it is not changed.

    Returns:
        A copy of stock classes only, which shares the model's parameters and buffers.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: the model is an inference snapshot, whose batch normalizations are gone.

    Example:
        >>> import torchweld as tw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> type(tw.unweld(tw.weld(model))) is nn.Sequential
        True
    """
    _check_module("unweld", model)
    if any(map(_welded.is_snapshot, model.modules())):
        raise ValueError(
            "torchweld.unweld: the model was welded with inference=True, which folds the batch "
            "normalizations away; keep the model it was made from"
        )
    stock = _copy(model)
    for module in stock.modules():
        if _welded.is_welded(module):
            _welded.uninstall(module)
        if type(module) is SyncBatchNorm:
            module.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
    unweld_pools([module for module in stock.modules() if type(module) is MaxPool2d])
    for conversion in (CONVERSION, POOLS):
        record(stock, Report(), replacing=conversion)
    return stock


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"torchweld.{function}: expected model to be an nn.Module, got {type(model).__name__}"
        )


def _copy(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, _kept(model) | {id(tensor): tensor for tensor in tensors})
    if any(
        ours is not theirs
        for ours, theirs in zip([*copied.parameters(), *copied.buffers()], tensors, strict=True)
    ):
        raise ValueError(
            "torchweld: a copy of the model does not share its parameters; is a part of it "
            "TorchScript? Convert before torch.jit"
        )
    return copied


def _kept(model: nn.Module) -> dict[int, Any]:
    """What deepcopy refuses to copy: results left on modules, as weight_norm's hook leaves one."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return {id(v): v for v in values if isinstance(v, Tensor) and not v.is_leaf}


def _check_outputs(model: nn.Module, welded: nn.Module, example_inputs: Any) -> None:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    with torch.no_grad(), _welded.mode(model, False), _welded.mode(welded, False):
        expected, got = tree_leaves(model(*inputs)), tree_leaves(welded(*inputs))
    for ours, theirs in zip(got, expected, strict=True):
        if not isinstance(theirs, Tensor) or not theirs.is_floating_point():
            continue
        # Two orders of the same sums; anything wrong is larger by far.
        scale = theirs.abs().nan_to_num(0, 0, 0).amax().item() if theirs.numel() else 0.0
        bound = torch.finfo(theirs.dtype).eps ** 0.5 * max(scale, 1.0)
        if not torch.allclose(ours, theirs, rtol=0.0, atol=bound, equal_nan=True):
            error = (ours - theirs).abs().max().item()
            raise RuntimeError(
                "torchweld.weld: the welded model's output on example_inputs differs from the "
                f"model's: expected at most {bound:.3g} apart, got {error:.3g}"
            )

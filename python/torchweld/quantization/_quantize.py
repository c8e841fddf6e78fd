"""``quantize`` and ``prepare_qat``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from torchweld.nn.multihead_attention import MultiheadAttention
from torchweld.quantization import _measure
from torchweld.quantization._adapters import Target, adapter_of, is_candidate
from torchweld.quantization._configs import Config, Int4, Int8, Int8WeightOnly
from torchweld.quantization._exclusions import Exclusion, Exclusions
from torchweld.quantization._reasons import (
    is_read,
    obstacle,
    unknown,
    users_of_parameters,
)
from torchweld.report import Report, Row, record

_INT8 = Int8()


def quantize(
    model: nn.Module,
    config: Config = _INT8,
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
    keep_small: bool = True,
    example_inputs: Tensor | Sequence[Any] | None = None,
) -> nn.Module:
    """Return a copy of a model with its linear layers quantized.

    Taken are ``nn.Linear``, :class:`torchweld.nn.PackedLinear`, the ``Conv1D`` of Hugging Face's
    transformers, and ``nn.MultiheadAttention``, which becomes a
    :class:`torchweld.nn.MultiheadAttention`. A :class:`torchweld.nn.QATLinear` becomes the layer it
    was trained for, whatever ``config`` is. The linear layers that
    ``torch.ao.quantization.quantize_dynamic`` made become int8 layers of the same integers and
    scales.

    The copy shares no tensor with the model, which is left as it is, also when an error is raised.
    A layer reachable by several names is converted once and still reachable by all of them.
    :func:`torchweld.report` says what became of each layer. Left alone, with the reason reported:

    - layers too small to gain, by :func:`torchweld.quantization.worth_quantizing`;
    - subclasses of what is taken, parametrized or weight-normed layers among them: they may compute
      something else; and ``nn.LSTM``, ``nn.GRU`` and their like;
    - layers with hooks or a replaced ``forward``;
    - layers whose weight or bias is also another module's: what was tied would come apart;
    - the layers of an ``nn.TransformerEncoderLayer`` whose attention is left alone: its forward
      reads their float weight;
    - weights that are not finite, not float32, bfloat16 or float16, not on the CPU, or that have
      more than 16777216 input features.

    A module whose ``forward`` reads the weight of a layer instead of calling the layer needs that
    layer excluded: the copy has no float weight there.

    Args:
        model: any module, or a single layer.
        config: ``Int8()``, ``Int8WeightOnly()`` or ``Int4(group_size=...)``.
        exclude: layers to leave alone. A string is matched against the qualified names of a layer
            and of the modules that hold it (``"encoder"``, ``"*.head"``, as in ``fnmatch``), a type
            against those modules; a function is called with name and layer. For another config in
            some layers, quantize twice.
        keep_small: leave layers alone that are too small to gain. False converts them as well.
        example_inputs: a batch, or the positional arguments of a call. If given, the model is run
            on them in evaluation mode, and the report has the signal to noise of each layer's
            output beside that of its weight.

    Returns:
        The converted copy, in the same train/eval mode.

    Raises:
        TypeError: ``model``, ``config``, ``example_inputs`` or an element of ``exclude`` has
            another type.
        ValueError: a string in ``exclude`` matches no module of the model.

    Example:
        >>> import torch, torchweld as tw
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 10))
        >>> tw.quantize(model)
        Sequential(
          (0): QuantizedLinear(in_features=256, out_features=256, bias=True, activation='identity')
          (1): Linear(in_features=256, out_features=10, bias=True)
        )
    """
    target = Target(_check("quantize", model, config))
    if not (example_inputs is None or isinstance(example_inputs, (Tensor, list, tuple))):
        raise TypeError(
            "quantize: example_inputs: expected a tensor or a list or tuple of positional "
            f"arguments, got {type(example_inputs).__name__}"
        )
    exclusions = Exclusions("quantize", model, exclude)
    return _convert(model, target, exclusions, keep_small, example_inputs)


def prepare_qat(
    model: nn.Module,
    config: Config = _INT8,
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
    keep_small: bool = True,
) -> nn.Module:
    """Return a copy of a model that trains as it will run once it is quantized.

    Its linear layers become :class:`torchweld.nn.QATLinear`, of which
    :func:`torchweld.quantize` makes layers that give the same bits. Which layers are taken, and
    what is left alone, is as there.

    Args:
        model: any module, or a single layer.
        config: what it will be quantized to.
        exclude: layers to leave alone, as in :func:`torchweld.quantize`.
        keep_small: leave layers alone that are too small to gain.

    Returns:
        The copy, in the same train/eval mode. It shares no tensor with the model.

    Raises:
        TypeError: ``model``, ``config`` or an element of ``exclude`` has another type.
        ValueError: a string in ``exclude`` matches no module of the model.

    Example:
        >>> import torch, torchweld as tw
        >>> model = tw.prepare_qat(torch.nn.Linear(256, 256), tw.Int4())
        >>> x = torch.randn(8, 256)
        >>> model(x).sum().backward()  # and so on: train
        >>> torch.equal(tw.quantize(model)(x), model(x))
        True
    """
    target = Target(_check("prepare_qat", model, config), trains=True)
    return _convert(model, target, Exclusions("prepare_qat", model, exclude), keep_small, None)


def _check(function: str, model: object, config: object) -> Config:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(config, (Int8, Int8WeightOnly, Int4)):
        raise TypeError(
            f"{function}: config: expected torchweld.Int8(), Int8WeightOnly() or Int4(), got "
            f"{config!r}"
        )
    return config


def _convert(
    model: nn.Module,
    target: Target,
    exclusions: Exclusions,
    keep_small: bool,
    example_inputs: Tensor | Sequence[Any] | None,
) -> nn.Module:
    names: dict[int, list[str]] = {}
    sites: dict[int, nn.Module] = {}
    inside = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_candidate(module) and id(module) not in inside:
            names.setdefault(id(module), []).append(name)
            sites[id(module)] = module

    users = users_of_parameters(model)
    reasons: dict[int, str] = {}
    replacements: dict[int, nn.Module] = {}
    # Attention first: whether the layers beside it may go depends on it.
    for key, module in sorted(
        sites.items(), key=lambda site: not isinstance(site[1], nn.MultiheadAttention)
    ):
        with_parts = [*names[key], *_names_of_parts(module, names[key])]
        reason = (
            unknown(module)
            or exclusions.reason(with_parts, module)
            or obstacle(module, names[key][0], target, keep_small, users)
        )
        if reason is None and is_read(model, module, names[key], replacements):
            reason = "nn.TransformerEncoderLayer reads its weight, as its attention stays float"
        if reason is None:
            adapter = adapter_of(module)
            assert adapter is not None
            replacements[key] = adapter.convert(module, target)
        else:
            reasons[key] = reason

    # deepcopy takes what stands in its memo for already copied: one pass replaces a layer
    # everywhere it is referred to, copies no weight in vain, and never touches the original.
    memo: dict[int, Any] = dict(replacements)
    converted: nn.Module = copy.deepcopy(model, memo)
    for key, replacement in replacements.items():
        for name in names[key]:
            if converted.get_submodule(name) is not replacement:
                raise RuntimeError(
                    f"quantize: {name or 'model'}: its owner's __deepcopy__ did not take the "
                    "converted layer; exclude it"
                )
    _turn_off_nested_tensors(converted)
    outputs = _measure.output_sqnr(model, names, replacements, example_inputs)
    rows = []
    for key, module in sites.items():
        also = f" (also {', '.join(names[key][1:])})" if len(names[key]) > 1 else ""
        if key in reasons:
            rows.append(Row(names[key][0], target.name, False, reasons[key] + also))
        else:
            measured = _measure.measure(module, replacements[key])
            detail = measured.pop("detail") + also
            row = Row(
                names[key][0], target.name, True, detail, **measured, output_sqnr=outputs.get(key)
            )
            rows.append(row)
    record(converted, Report(rows), replacing=None if target.trains else Target.TRAINING)
    return converted


def _names_of_parts(module: nn.Module, names: list[str]) -> list[str]:
    """Names of what is converted with a module and has no site of its own."""
    if not isinstance(module, nn.MultiheadAttention):
        return []
    return [f"{name}.out_proj".lstrip(".") for name in names]


def _turn_off_nested_tensors(model: nn.Module) -> None:
    """``nn.TransformerEncoder`` reads the float weights of its first layer before it uses them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            first = module.layers[0] if len(module.layers) else None
            if isinstance(getattr(first, "self_attn", None), MultiheadAttention):
                module.use_nested_tensor = False

"""``quantize`` and ``prepare_qat``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchweld.nn.multihead_attention import MultiheadAttention
from torchweld.quantization import _measure
from torchweld.quantization._adapters import Target, adapter_of, is_candidate
from torchweld.quantization._configs import Config, Int4, Int8, Int8WeightOnly
from torchweld.quantization._exclusions import Exclusion, Exclusions
from torchweld.quantization._reads import reader
from torchweld.quantization._reasons import (
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
    - layers whose weight the forward of a module that holds them reads, instead of calling the
      layer, as far as its source tells: among them those of an ``nn.TransformerEncoderLayer`` whose
      attention is left alone;
    - weights that are not finite, not float32, bfloat16 or float16, of another tensor class, on a
      device the layer does not run on, or that have more than 16777216 input features.

    Code that reads the weight of a layer where this cannot be seen needs the layer excluded: the
    copy has no float weight there.

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
    exclusions = Exclusions("prepare_qat", model, exclude)
    return _convert(model, target, exclusions, keep_small, None)


def _check(function: str, model: object, config: object) -> Config:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(config, (Int8, Int8WeightOnly, Int4)):
        raise TypeError(
            f"{function}: config: expected torchweld.Int8(), Int8WeightOnly() or Int4(), got "
            f"{config!r}"
        )
    return config


@dataclass
class _Site:
    """A module that the report has a row for, and what became of it."""

    module: nn.Module
    names: list[str]
    reason: str | None = None
    replacement: nn.Module | None = None

    @property
    def parts(self) -> list[str]:
        """Names of what is converted with the module and has no site of its own."""
        if not isinstance(self.module, nn.MultiheadAttention):
            return []
        return [f"{name}.out_proj".lstrip(".") for name in self.names]


def _convert(
    model: nn.Module,
    target: Target,
    exclusions: Exclusions,
    keep_small: bool,
    example_inputs: Tensor | Sequence[Any] | None,
) -> nn.Module:
    sites = _sites(model)
    users = users_of_parameters(model)
    # Attention first: whether the layers beside it may go depends on it.
    for site in sorted(sites, key=lambda site: not isinstance(site.module, nn.MultiheadAttention)):
        gone = {id(site.module) for site in sites if site.replacement is not None}
        site.reason = (
            unknown(site.module)
            or exclusions.reason([*site.names, *site.parts], site.module)
            or obstacle(site.module, site.names[0], target, keep_small, users)
            or reader(model, site.module, site.names, gone)
        )
        if site.reason is None:
            site.replacement = adapter_of(site.module).convert(site.module, target)

    converted = _copy(target.function, model, sites)
    _turn_off_nested_tensors(converted)
    replacements = {site.names[0]: site.replacement for site in sites if site.replacement}
    outputs = _measure.output_sqnr(model, replacements, example_inputs)
    report = Report(_row(site, target, outputs.get(site.names[0])) for site in sites)
    record(converted, report, replacing=None if target.trains else Target.TRAINING)
    return converted


def _sites(model: nn.Module) -> list[_Site]:
    inside = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    sites: dict[int, _Site] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_candidate(module) and id(module) not in inside:
            sites.setdefault(id(module), _Site(module, [])).names.append(name)
    return list(sites.values())


def _copy(function: str, model: nn.Module, sites: list[_Site]) -> nn.Module:
    """Copy a model with its replacements."""
    # deepcopy takes what stands in its memo for already copied: one pass replaces a layer
    # everywhere it is referred to, copies no weight in vain, and never touches the original.
    memo = {id(site.module): site.replacement for site in sites if site.replacement}
    converted: nn.Module = copy.deepcopy(model, dict(memo))
    for site in sites:
        for name in site.names if site.replacement else ():
            if converted.get_submodule(name) is not site.replacement:
                raise RuntimeError(
                    f"{function}: {name or 'model'}: its owner's __deepcopy__ did not take the "
                    "converted layer; exclude it"
                )
    return converted


def _row(site: _Site, target: Target, output_sqnr: float | None) -> Row:
    name, *others = site.names
    also = f" (also {', '.join(others)})" if others else ""
    if site.replacement is None:
        return Row(name, target.name, False, f"{site.reason}{also}")
    measured = _measure.measure(site.module, site.replacement)
    detail = f"{_measure.describe(site.module, site.replacement)}{also}"
    return Row(name, target.name, True, detail, **measured, output_sqnr=output_sqnr)


def _turn_off_nested_tensors(model: nn.Module) -> None:
    """``nn.TransformerEncoder`` reads the float weights of its first layer before it uses them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            first = module.layers[0] if len(module.layers) else None
            if isinstance(getattr(first, "self_attn", None), MultiheadAttention):
                module.use_nested_tensor = False

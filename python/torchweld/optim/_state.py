"""How the state of a parameter is stored: made, taken over from another format, given away."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchweld.optim import _distributed

StateDtype = torch.dtype | Literal["int8"] | None
State = dict[str, Any]

# The kernels' numbers (AdamWState and AdamWRounding in csrc/kernels/adamw.h).
LIKE_PARAM, BFLOAT16, INT8 = range(3)
NEAREST, STOCHASTIC, KAHAN, SPLIT = range(4)

BLOCK = 256  # elements that share a scale, kAdamWBlock there

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_CODED = {"exp_avg": True, "exp_avg_sq": False}  # which of the two has a sign
_COMPENSATION = {KAHAN: ("compensation", torch.bfloat16), SPLIT: ("remainder", torch.int16)}
# What only we keep; torch would take it along without effect.
_OURS = ("compensation", "remainder", "average")


class Format(NamedTuple):
    """How an optimizer stores states and rounds 16-bit parameters."""

    state: int = LIKE_PARAM
    rounding: int = NEAREST

    @property
    def is_random(self) -> bool:
        """Tell whether steps draw random bits."""
        return self != Format()

    def of(self, param: Tensor) -> Format:
        """Return the format of one parameter: the roundings are for bfloat16 alone."""
        if self.state != LIKE_PARAM and param.dtype not in _LOW_BIT_PARAMS:
            raise ValueError(
                "torchweld.optim.AdamW: state_dtype is for float32, bfloat16 and float16 "
                f"parameters, got one of {param.dtype}"
            )
        return self if param.dtype is torch.bfloat16 else self._replace(rounding=NEAREST)

    def moment_dtype(self, param: Tensor) -> torch.dtype:
        """Return the dtype of the moments of a parameter, where they are not coded."""
        return param.dtype if self == (LIKE_PARAM, NEAREST) else torch.bfloat16


_LOW_BIT_PARAMS = (torch.float32, torch.bfloat16, torch.float16)


def average_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of the weight average of a parameter."""
    return torch.float32 if param.dtype in _LOW_BIT_PARAMS else param.dtype


def create(param: Tensor, form: Format, amsgrad: bool) -> State:
    """Return the state of a parameter before its first step."""
    state: State = {"step": torch.zeros((), dtype=torch.float32, device=_distributed.device(param))}
    complete(state, param, form, amsgrad)
    return state


def complete(state: State, param: Tensor, form: Format, amsgrad: bool) -> None:
    """Add what a format needs and a state has not, and drop low bits that it has no use for."""
    for rounding, (name, _) in _COMPENSATION.items():
        if rounding != form.rounding:
            state.pop(name, None)  # of a parameter that was bfloat16
    if form.state == INT8:
        part = _distributed.local(param)
        for name in _CODED:
            if f"{name}_code" not in state:
                state[f"{name}_code"], state[f"{name}_scale"] = _empty_code(part)
    else:
        for name in MOMENTS if amsgrad else MOMENTS[:2]:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=form.moment_dtype(param))
    if form.rounding in _COMPENSATION:
        name, dtype = _COMPENSATION[form.rounding]
        if name not in state:
            state[name] = torch.zeros_like(param, dtype=dtype)


def adapt(state: State, param: Tensor, form: Format) -> State:
    """Return a state of any format in this one, on the device and in the layout of `param`.

    A float state that does not fit the parameter is left as it is, for the step to report.
    """
    state = decode(state, param) if form.state != INT8 else dict(state)
    for name in MOMENTS:
        value = state.get(name)
        if not isinstance(value, Tensor):
            continue
        if form.state != INT8:
            state[name] = _fit(value, param, form.moment_dtype(param))
        elif name in _CODED:
            if value.shape != param.shape:
                raise ValueError(
                    f"loaded state dict has {name} of shape {tuple(value.shape)} "
                    f"for a parameter of shape {tuple(param.shape)}"
                )
            state[f"{name}_code"], state[f"{name}_scale"] = _encode(
                _distributed.local(value), _distributed.local(param), _CODED[name]
            )
            del state[name]
        else:
            del state[name]
    if form.state == INT8:
        _recode(state, _distributed.local(param))
    for rounding, (name, dtype) in _COMPENSATION.items():
        if isinstance(state.get(name), Tensor):
            if rounding == form.rounding:
                state[name] = _fit(state[name], param, dtype)
            else:
                del state[name]
    if isinstance(state.get("average"), Tensor):
        state["average"] = _fit(state["average"], param, average_dtype(param))
    return state


def decode(state: State, param: Tensor, dtype: torch.dtype = torch.float32) -> State:
    """Return a state without 8-bit codes: the moments as tensors like the parameter."""
    state = dict(state)
    for name in _CODED:
        code, scale = state.pop(f"{name}_code", None), state.pop(f"{name}_scale", None)
        if code is not None:
            part = _decode(code, scale, _CODED[name]).to(dtype)
            state[name] = _distributed.like(param, part)
    return state


def portable(state: State, param: Tensor) -> State:
    """Return the state of a DTensor in tensors that can be gathered and sharded in other ways."""
    state = decode(state, param)
    if "remainder" in state:  # no process group sends int16
        state["remainder"] = state["remainder"].to(torch.int32)
    return state


def to_stock(state: State, param: Tensor) -> State:
    """Return a state as torch.optim.AdamW keeps it."""
    state = decode(state, param, param.dtype)
    for name in MOMENTS:
        if isinstance(state.get(name), Tensor):
            state[name] = state[name].to(param.dtype)
    return {name: value for name, value in state.items() if name not in _OURS}


def _fit(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.to(device=param.device, dtype=dtype)
    if value.shape != param.shape or _distributed.is_dtensor(param):
        return value
    # The memory format of the model that saved the state may have been another one.
    like = torch.empty_like(param, dtype=dtype)
    return value if value.stride() == like.stride() else like.copy_(value)


def _empty_code(part: Tensor) -> tuple[Tensor, Tensor]:
    blocks = -(-part.numel() // BLOCK)
    return (
        torch.zeros_like(part, dtype=torch.uint8),
        torch.zeros(blocks, dtype=torch.float32, device=part.device),
    )


def _encode(value: Tensor, part: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    code, scale = _empty_code(part)
    laid_out = torch.empty_like(code, dtype=torch.float32).copy_(value)
    torch.ops.torchweld._adamw_encode(laid_out, signed, code, scale)
    return code, scale


def _decode(code: Tensor, scale: Tensor, signed: bool) -> Tensor:
    value = torch.empty_like(code, dtype=torch.float32)
    torch.ops.torchweld._adamw_decode(code, scale, signed, value)
    return value


def _recode(state: State, part: Tensor) -> None:
    """Bring codes to the device and the layout of a parameter."""
    for name, signed in _CODED.items():
        code, scale = state.get(f"{name}_code"), state.get(f"{name}_scale")
        if not isinstance(code, Tensor) or not isinstance(scale, Tensor):
            continue
        if code.shape != part.shape:
            continue
        code, scale = code.to(part.device), scale.to(part.device)
        if code.stride() != torch.empty_like(part).stride():
            # Blocks run through memory: in another order they are other blocks.
            code, scale = _encode(_decode(code, scale, signed), part, signed)
        state[f"{name}_code"], state[f"{name}_scale"] = code, scale


class Kept:
    """Carries a tensor past torch's load_state_dict, which casts to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def keep_tensors(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    def keep(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            k: Kept(v) if isinstance(v, Tensor) and k != "step" else v for k, v in values.items()
        }

    state = {key: keep(values) for key, values in state_dict["state"].items()}
    return {**state_dict, "state": state}

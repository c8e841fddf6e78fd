"""Layers with an integer weight: their state_dict, copies, casts and sizes."""

import copy
import io
import pickle

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.nn.kinds import INT8, KINDS, empty, make, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_state_dict_is_canonical(kind):
    _, module = make(kind)
    state = module.state_dict()
    weight = {"qweight": (torch.int8, (21, 37)), "weight_scale": (torch.float32, (21,))}
    if kind == "int4":
        weight = {
            "qweight": (torch.uint8, (21, 19)),
            "weight_scale": (torch.bfloat16, (21, 2)),
            "weight_zero": (torch.uint8, (21, 2)),
        }
    weight["bias"] = (torch.float32, (21,))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == weight


@each_kind
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(kind, assign):
    _, module = make(kind)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = empty(kind, device="meta" if assign else "cpu")
    result = other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(randn(3, 37)), module(randn(3, 37)))


def test_both_int8_layers_read_the_same_state():
    _, module = make("int8")
    other = empty("weight only")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight(), module.weight())


NAN = float("nan")
REFUSED = {
    "int8": [
        ({"qweight": torch.zeros(21, 36, dtype=torch.int8)}, r"qweight: expected int8 \[21, 37\]"),
        ({"qweight": torch.full((21, 37), -128, dtype=torch.int8)}, r"qweight: .*got -128"),
        ({"weight_scale": torch.zeros(21)}, "weight_scale: expected positive.*zero"),
        ({"weight_scale": torch.full((21,), NAN)}, "weight_scale: .*non-finite"),
        ({"weight_scale": torch.ones(21).half()}, "weight_scale: .*got torch.float16"),
        ({"weight_scale": torch.ones(20)}, r"weight_scale: .*float32 \[21\], got .*\[20\]"),
    ],
    "int4": [
        ({"qweight": torch.zeros(21, 18, dtype=torch.uint8)}, r"qweight: expected uint8 \[.*19\]"),
        (
            {"qweight": torch.zeros(22, 19, dtype=torch.uint8)},
            r"weight_scale: expected .*\[22, 2\]",
        ),
        (
            {
                "qweight": torch.zeros(22, 19, dtype=torch.uint8),
                "weight_scale": torch.ones(22, 2).bfloat16(),
                "weight_zero": torch.zeros(22, 2, dtype=torch.uint8),
            },
            "qweight: expected 21 rows, got 22",
        ),
        ({"weight_scale": torch.full((21, 2), NAN).bfloat16()}, "weight_scale: .*finite"),
        ({"weight_scale": torch.ones(21, 2)}, "weight_scale: .*got torch.float32"),
        ({"weight_zero": torch.full((21, 2), 16, dtype=torch.uint8)}, "weight_zero: .*15"),
        ({"qweight": torch.full((21, 19), 255, dtype=torch.uint8)}, "qweight: .*got"),
    ],
    "all": [
        ({"qweight": torch.zeros(21, 37)}, "qweight: expected u?int8.*got torch.float32"),
        ({"qweight": torch.zeros(3)}, "qweight: expected u?int8.*got torch.float32"),
        ({"weight": torch.ones(21, 37), "qweight": None}, "qweight: .*got one of a float layer"),
        ({"qweight": None}, r'Missing key.*"0\.qweight"'),
        ({"extra": torch.ones(1)}, r'Unexpected key.*"0\.extra"'),
        ({"bias": torch.ones(20)}, "size mismatch for 0.bias"),
        ({"qweight": 3}, r"0\.qweight: expected a dense tensor with data, got int"),
        ({"weight_scale": [1.0]}, r"0\.weight_scale: expected a dense tensor.*, got list"),
        ({"weight_scale": torch.ones(21, device="meta")}, "weight_scale: .*got a meta tensor"),
        ({"weight_scale": torch.ones(21).to_sparse()}, "weight_scale: .*got a torch.sparse_coo"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (kind, *case)
        for kind in KINDS
        for case in REFUSED["all"] + REFUSED["int8" if kind in INT8 else kind]
    ],
)
def test_load_state_dict_refuses(kind, change, message):
    _, module = make(kind)
    model = nn.Sequential(module)
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(before)
    for key, value in change.items():
        if value is None:
            del state[f"0.{key}"]
        else:
            state[f"0.{key}"] = value
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        model.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@each_kind
def test_loading_what_there_is(kind):
    _, module = make(kind)
    _, other = make(kind, seed=1)
    part = {"weight_scale": other.state_dict()["weight_scale"]}
    result = module.load_state_dict(part, strict=False)
    assert set(result.missing_keys) >= {"bias"}
    assert torch.equal(module.state_dict()["weight_scale"], part["weight_scale"])
    assert torch.equal(module.state_dict()["qweight"], make(kind)[1].state_dict()["qweight"])


@each_kind
def test_loading_reaches_every_holder_of_the_buffers(kind):
    # In place, so that memory shared with another process sees it.
    _, module = make(kind)
    buffers = dict(module.named_buffers())
    _, other = make(kind, seed=1)
    module.load_state_dict(other.state_dict())
    assert all(buffer is buffers[name] for name, buffer in module.named_buffers())
    assert torch.equal(module(randn(3, 37)), other(randn(3, 37)))


@each_kind
@pytest.mark.parametrize(
    "copies", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(kind, copies):
    _, module = make(kind, activation="gelu")
    other = copies(module)
    assert torch.equal(other(randn(3, 37)), module(randn(3, 37)))
    other.packed_weight.zero_()
    assert module.weight().any()


@each_kind
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_casting_the_module_keeps_scales_and_weight(kind, dtype):
    _, module = make(kind)
    before = module.state_dict()
    del before["bias"]

    def same():
        state = module.state_dict()
        return all(
            torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in before.items()
        )

    assert module.to(dtype) is module
    assert module.bias.dtype == dtype
    assert same()
    x = randn(3, 37)
    assert torch.equal(module(x), module(x.clone()))
    module.half().float()
    assert same()
    assert module.type(dtype).bias.dtype == dtype  # casts every buffer, integers too
    assert same()
    assert torch.equal(module(x), module(x.clone()))


@each_kind
def test_to_empty_and_meta(kind):
    _, module = make(kind)
    state = module.state_dict()
    module.to("meta").half()
    assert module(torch.empty(3, 37, device="meta")).shape == (3, 21)
    module.to_empty(device="cpu").float()
    module.load_state_dict(state)
    assert torch.equal(module(randn(3, 37)), make(kind)[1](randn(3, 37)))


@each_kind
def test_loads_a_state_dict_without_data(kind):
    _, module = make(kind)
    state = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


@each_kind
def test_a_state_dict_partly_without_data(kind):
    _, module = make(kind)
    state = module.state_dict()
    state["weight_scale"] = state["weight_scale"].to("meta")
    module.load_state_dict(state, assign=True)
    with pytest.raises(
        RuntimeError, match="weight_scale: expected a tensor on cpu, as input is, got"
    ):
        module(torch.randn(3, 37))


@each_kind
def test_assigning_strided_tensors(kind):
    _, module = make(kind)
    state = {name: torch.stack((x, x), -1)[..., 0] for name, x in module.state_dict().items()}
    other = empty(kind)
    other.load_state_dict(state, assign=True)
    x = torch.randn(3, 37)
    assert torch.equal(other(x), module(x))


@each_kind
def test_size(kind):
    """In files and in memory: the weight once, in one form."""
    linear, module = make(kind, 512, 768)
    cls, _ = KINDS[kind]
    if cls is tw.nn.Int4Linear:
        module = cls.from_float(linear, group_size=128)
    most = {tw.nn.Int4Linear: 0.15}.get(cls, 0.27)

    def saved(state):
        file = io.BytesIO()
        torch.save(state, file)
        return file.tell()

    assert saved(module.state_dict()) <= most * saved(linear.state_dict())
    files = []
    for layer in (linear, module):
        files.append(io.BytesIO())
        torch.jit.save(torch.jit.trace(layer, torch.randn(2, 768)), files[-1])
    assert files[1].tell() <= most * files[0].tell()
    tensors = [*module.parameters(), *module.buffers()]
    assert sum(x.untyped_storage().nbytes() for x in tensors) <= most * linear.weight.nbytes


@each_kind
def test_repr(kind):
    ending = {
        "int8": "QuantizedLinear(in_features=37, out_features=21, bias=True, activation='relu')",
        "int8 in groups": "activation='relu', input_group_size=32)",
        "weight only": "WeightOnlyLinear(in_features=37, out_features=21, bias=True, "
        "activation='relu')",
        "int4": "activation='relu', group_size=32)",
    }
    assert repr(make(kind, activation="relu")[1]).endswith(ending[kind])

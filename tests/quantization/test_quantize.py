import copy
import functools
import pickle

import pytest
import torch
import torchweld as tw
from torch import nn
from torch.nn.utils import parametrizations

from tests.reference.quantized_linear import sqnr

# Small models do for everything but the rule about small layers.
quantize = functools.partial(tw.quantize, keep_small=False)


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(576, 128)
        self.drop = nn.Dropout(0.3)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = x.view(x.size(0), -1)
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


def detail(model, name):
    (row,) = [row for row in tw.report(model) if row.name == name]
    return row.converted, row.detail


def images():
    return torch.randn(6, 1, 14, 14, generator=torch.Generator().manual_seed(0))


def test_converts_every_linear_and_leaves_the_original():
    torch.manual_seed(0)
    model = Digits().eval()
    expected = model(images())
    state = copy.deepcopy(model.state_dict())
    quantized = quantize(model)
    assert type(quantized) is Digits
    assert not quantized.training
    assert type(quantized.fc1) is type(quantized.fc2) is tw.nn.QuantizedLinear
    assert sqnr(quantized(images()), expected) > 30
    assert [(row.name, row.converted) for row in tw.report(quantized)] == [
        ("fc1", True),
        ("fc2", True),
    ]

    assert type(model.fc1) is nn.Linear
    assert len(tw.report(model)) == 0
    assert torch.equal(model(images()), expected)
    # Nothing is shared: training the copy leaves the original alone.
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in quantized.state_dict().values() if t.numel()}
    quantized.train()(images())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_single_linear():
    linear = nn.Linear(64, 32)
    quantized = quantize(linear)
    assert type(quantized) is tw.nn.QuantizedLinear
    assert len(tw.report(quantized).converted) == 1
    assert not hasattr(linear, "_torchweld_report")


def test_quantized_model_copies_pickles_and_loads():
    quantized = quantize(Digits().eval())
    expected = quantized(images())
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(other(images()), expected)
        assert len(tw.report(other)) == 2
    other = quantize(Digits().eval())
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(images()), expected)


CONFIGS = [
    (tw.Int8(), "QuantizedLinear", 30),
    (tw.Int8(input_group_size=32), "QuantizedLinear in groups of 32", 30),
    (tw.Int8WeightOnly(), "WeightOnlyLinear", 35),
    (tw.Int4(), "Int4Linear in groups of 128", 13),
    (tw.Int4(group_size=32), "Int4Linear in groups of 32", 15),
]


@pytest.mark.parametrize(("config", "what", "least"), CONFIGS, ids=str)
def test_configs(config, what, least):
    torch.manual_seed(0)
    model = Digits().eval()
    quantized = quantize(model, config)
    assert sqnr(quantized(images()), model(images())) > least
    assert [row.detail for row in tw.report(quantized)] == [what, what]


def test_two_configs_in_one_model():
    quantized = quantize(quantize(Digits(), tw.Int4(), exclude="fc2"), tw.Int8WeightOnly())
    assert type(quantized.fc1) is tw.nn.Int4Linear
    assert type(quantized.fc2) is tw.nn.WeightOnlyLinear
    assert [(row.name, row.converted) for row in tw.report(quantized)] == [
        ("fc1", True),
        ("fc2", True),
    ]


def test_a_group_that_does_not_fit():
    quantized = quantize(Digits(), tw.Int4(group_size=256))
    assert detail(quantized, "fc1")[0]
    assert "group_size: expected a multiple of 8" in detail(quantized, "fc2")[1]


def test_small_layers():
    quantized = tw.quantize(Digits())
    assert detail(quantized, "fc1")[0]
    assert detail(quantized, "fc2") == (False, "too small to gain (128 x 10)")
    assert type(quantized.fc2) is nn.Linear
    for config in (tw.Int8(), tw.Int8WeightOnly(), tw.Int4()):
        assert tw.quantization.worth_quantizing(config, 4096, 4096)
        assert not tw.quantization.worth_quantizing(config, 16, 4096)
        assert not tw.quantization.worth_quantizing(config, 4096, 16)
    with pytest.raises(TypeError, match=r"worth_quantizing: config: expected .*Int8'>"):
        tw.quantization.worth_quantizing(tw.Int8, 4096, 4096)  # type: ignore[arg-type]


@pytest.mark.parametrize("inference", [True, False])
def test_before_and_after_weld(inference):
    torch.manual_seed(0)
    model = Digits().eval()
    expected = quantize(model)(images())
    before, after = quantize(tw.weld(model, inference=inference)), None
    after = tw.weld(quantize(model), inference=inference)
    for both in (before, after):
        assert type(both.fc1) is tw.nn.QuantizedLinear
        assert {row.conversion for row in tw.report(both).converted} == {
            "conv_bn_relu",
            "quantized_linear",
        }
        torch.testing.assert_close(both(images()), expected, rtol=0.05, atol=0.02)


def test_packed_linears_are_taken():
    model = tw.weld(nn.Sequential(nn.Linear(512, 512)), inference=True)
    assert type(model[0]) is tw.nn.PackedLinear
    quantized = tw.quantize(model)
    assert type(quantized[0]) is tw.nn.QuantizedLinear
    assert set(quantized.state_dict()) == {"0.qweight", "0.weight_scale", "0.bias"}


def test_quantizing_again_changes_nothing():
    quantized = quantize(Digits().eval())
    again = quantize(quantized)
    assert torch.equal(again(images()), quantized(images()))
    assert len(tw.report(again)) == 2


@pytest.mark.parametrize(
    ("exclude", "converted"),
    [
        ("fc1", ["fc2"]),
        (["fc*"], []),
        ("", []),
        (nn.Linear, []),
        (nn.Conv2d, ["fc1", "fc2"]),
        (lambda name, module: module.out_features < 16, ["fc1"]),
        ((lambda name, _: name == "fc1", "fc2"), []),
        (functools.partial(lambda what, name, _: name == what, "fc1"), ["fc2"]),
    ],
)
def test_exclude(exclude, converted):
    report = tw.report(quantize(Digits(), exclude=exclude))
    assert [row.name for row in report.converted] == converted
    assert all("excluded by" in row.detail for row in report.skipped)


def test_excluding_a_module_excludes_what_it_holds():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert [row.name for row in tw.report(quantize(model, exclude="0")).converted] == ["1"]


def test_a_layer_used_twice_is_converted_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["c"] = model["a"]
    model.plain_list = [model["a"]]
    quantized = quantize(model)
    assert quantized["a"] is quantized["c"] is quantized.plain_list[0]
    assert type(quantized["a"]) is tw.nn.QuantizedLinear
    assert detail(quantized, "a") == (True, "QuantizedLinear (also c)")
    assert len(tw.report(quantized)) == 2


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    quantized = quantize(model)
    assert quantized["head"].weight is quantized["embed"].weight
    assert detail(quantized, "head") == (False, "weight is shared with embed.weight")

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    quantized = quantize(model)
    assert quantized[1].bias is quantized[0].bias
    assert detail(quantized, "0") == (False, "bias is shared with 1.bias")


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OwnAttention(nn.MultiheadAttention):
    pass


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: output * 2)
    return linear


def patched(linear):
    linear.forward = lambda x: x
    return linear


def with_nan(linear):
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    return linear


class OwnTensor(torch.Tensor):
    def __deepcopy__(self, memo):
        return self.detach().clone().as_subclass(OwnTensor)


def with_weight(weight):
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Own(8, 8), "Own is not nn.Linear itself"),
        (lambda: nn.LazyLinear(8), "LazyLinear is not nn.Linear itself"),
        (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "ParametrizedLinear is not"),
        (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "ParametrizedLinear is not"),
        (lambda: hooked(nn.Linear(8, 8)), "has hooks"),
        (lambda: patched(nn.Linear(8, 8)), "its forward is replaced"),
        (lambda: nn.Linear(8, 8).double(), "weight is torch.float64"),
        (lambda: with_nan(nn.Linear(8, 8)), "weight holds a NaN"),
        (lambda: with_weight(torch.ones(8, 8).as_subclass(OwnTensor)), "weight is a OwnTensor"),
        (lambda: nn.Linear(8, 8, device="meta"), "weight is on meta"),
        (lambda: nn.Linear(2**24 + 1, 1), "more than 16777216 input features"),
        (lambda: nn.LSTM(8, 8), "LSTM is not converted"),
        (lambda: nn.GRUCell(8, 8), "GRUCell is not converted"),
        (lambda: OwnAttention(8, 2), "OwnAttention is not nn.MultiheadAttention itself"),
    ],
)
def test_left_alone_and_reported(layer, reason):
    model = nn.Sequential(layer(), nn.Linear(8, 8))
    quantized = quantize(model)
    assert type(quantized[0]) is type(model[0])
    converted, text = detail(quantized, "0")
    assert not converted
    assert reason in text
    assert type(quantized[1]) is tw.nn.QuantizedLinear


class Reads(nn.Module):
    """In its forward, below it, guarded, and where it does not matter."""

    def __init__(self):
        super().__init__()
        self.read, self.below, self.called = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.guarded, self.holder = nn.Linear(8, 8), nn.Sequential()
        self.holder.deep = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        nn.init.ones_(self.called.weight)

    def forward(self, x):
        x = nn.functional.linear(x, self.read.weight, self.called.bias)
        if isinstance(self.guarded.weight, torch.Tensor) and self.guarded.weight.dtype != x.dtype:
            x = x.to(self.guarded.weight.dtype)
        x = x.to(self.holder.deep.weight.dtype)
        return self.helper(self.called(self.guarded(x))) + self.attention.in_proj_weight[0]

    def helper(self, x):
        return x @ self.weight_below

    @property
    def weight_below(self):
        return self.below.weight


class ReadsThroughSuper(Reads):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Reads, ReadsThroughSuper])
def test_weights_that_a_forward_reads(kind):
    model = kind()
    quantized = quantize(nn.Sequential(model))
    assert quantized(torch.randn(3, 8)).shape == (3, 8)
    rows = {row.name.removeprefix("0."): row for row in tw.report(quantized)}
    assert [name for name, row in rows.items() if row.converted] == ["called", "guarded"]
    for name in ("read", "below", "holder.deep", "attention"):
        assert rows[name].detail == f"the forward of {kind.__name__} reads its weight"


def test_a_failed_conversion_leaves_the_model(monkeypatch):
    model = Digits()
    before = copy.deepcopy(model.state_dict())
    from_float = tw.nn.QuantizedLinear.from_float

    def fails_late(linear, *arguments, **options):
        if linear is model.fc2:
            raise MemoryError
        return from_float(linear, *arguments, **options)

    monkeypatch.setattr(tw.nn.QuantizedLinear, "from_float", fails_late)
    with pytest.raises(MemoryError):
        quantize(model)
    assert type(model.fc1) is type(model.fc2) is nn.Linear
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def __deepcopy__(self, memo):
        return Stubborn()


def test_a_copy_that_drops_the_layer_is_an_error():
    with pytest.raises(RuntimeError, match="quantize: fc: its owner's __deepcopy__"):
        quantize(Stubborn())


def test_traced_by_fx():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    quantized = quantize(model)
    assert type(quantized.get_submodule("0")) is tw.nn.QuantizedLinear
    x = torch.randn(3, 8)
    assert sqnr(quantized(x), model(x)) > 25


def test_errors():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        quantize("model")
    with pytest.raises(TypeError, match=r"config: expected torchweld\.Int8"):
        quantize(model, "int8")
    for size in (0, 12, -8, 1 << 20, 32.0, "32", None):
        with pytest.raises(ValueError, match=f"Int4: group_size: expected .*, got {size!r}"):
            tw.Int4(group_size=size)
    for size in (6, -4, 1 << 20, 32.0, "", "32"):
        with pytest.raises(ValueError, match=f"Int8: input_group_size: expected .*, got {size!r}"):
            tw.Int8(input_group_size=size)
    with pytest.raises(ValueError, match=r"exclude: .*got 'head', which matches none"):
        quantize(model, exclude=["head"])
    for exclude in ([3], 3, model, [model[0]]):
        with pytest.raises(TypeError, match="exclude: expected name patterns"):
            quantize(model, exclude=exclude)

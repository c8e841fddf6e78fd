import base64
import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
import torchweld as tw
from torch import Tensor, nn


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Pair(nn.Module):
    def forward(self, left, right):
        return left + right, (left * right).sum(1)


class UsesOps(nn.Module):
    """Calls an operator of torchweld in a submodule."""

    def __init__(self):
        super().__init__()
        self.inner = Apply(lambda x: x * torch.ops.torchweld.grad_norm([x]).to(x.dtype))

    def forward(self, x):
        return self.inner(x) + 1


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def manifest_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def decode(entry: dict) -> Tensor:
    data = bytearray(base64.b64decode(entry["data"]))
    dtype = getattr(torch, entry["dtype"])
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(entry["shape"])


def shapes(model: nn.Module, inputs, path: Path):
    tw.export(model, inputs, path)
    manifest = manifest_of(path)
    return [t["shape"] for t in manifest["inputs"]], [t["shape"] for t in manifest["outputs"]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.pt"


def test_file_and_manifest(path):
    model, x = small_cnn(), torch.randn(3, 1, 6, 6)
    tw.export(model, x, path)
    model.eval()

    assert torch.equal(torch.jit.load(path)(x), model(x))
    manifest = manifest_of(path)
    golden = manifest.pop("golden")
    assert manifest == {
        "format_version": 1,
        "format": "torchscript",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "torch_version": torch.__version__,
        "torchweld_version": tw.__version__,
        "inputs": [{"name": "input", "dtype": "float32", "shape": [-1, 1, 6, 6]}],
        "outputs": [{"name": "output", "dtype": "float32", "shape": [-1, 10]}],
        "ops": [],
    }
    (golden_input,), (golden_output,) = golden["inputs"], golden["outputs"]
    assert torch.equal(decode(golden_input), x[:1])
    assert torch.equal(decode(golden_output), model(x[:1]))


def test_several_inputs_and_outputs(path):
    tw.export(Pair(), (torch.randn(2, 3), torch.arange(6).reshape(2, 3)), path)
    manifest = manifest_of(path)
    assert manifest["inputs"] == [
        {"name": "left", "dtype": "float32", "shape": [-1, 3]},
        {"name": "right", "dtype": "int64", "shape": [-1, 3]},
    ]
    assert manifest["outputs"] == [
        {"name": "output0", "dtype": "float32", "shape": [-1, 3]},
        {"name": "output1", "dtype": "float32", "shape": [-1]},
    ]


def test_schemas_of_operators(path):
    tw.export(UsesOps(), torch.randn(2, 3), path)
    assert manifest_of(path)["ops"] == ["torchweld::grad_norm(Tensor[] grads) -> Tensor"]


def test_schemas_inside_control_flow(path):
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bool(x.sum() > 0):
                return x
            return torch.ops.torchweld.grad_norm([x]).to(x.dtype) * x

    tw.export(torch.jit.script(Branch()), torch.ones(2, 3), path)
    assert manifest_of(path)["ops"] == ["torchweld::grad_norm(Tensor[] grads) -> Tensor"]
    assert torch.equal(torch.jit.load(path)(-torch.ones(2, 2)), torch.full((2, 2), -2.0))


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        (lambda x: x.flatten(1), torch.randn(1, 2, 3), ([[-1, 2, 3]], [[-1, 6]])),
        (lambda x: x.flatten(), torch.randn(4, 3), ([[-1, 3]], [[-1]])),
        (lambda x: x.sum(0), torch.randn(4, 3), ([[-1, 3]], [[3]])),
        # Takes no other batch.
        (lambda x: x.reshape(4, 8), torch.randn(4, 8), ([[4, 8]], [[4, 8]])),
        # Takes any batch, but the trace keeps the size of the example.
        (lambda x: x * x.shape[0].__index__(), torch.ones(4, 2), ([[4, 2]], [[4, 2]])),
        (lambda x: x + 1, torch.tensor(2.0), ([[]], [[]])),
        (lambda x: x + 1, torch.empty(0, 3), ([[0, 3]], [[0, 3]])),
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_dynamic_batch(path, function, inputs, expected):
    assert shapes(Apply(function), inputs, path) == expected


def test_inputs_of_different_batch_are_fixed(path):
    class MatMul(nn.Module):
        def forward(self, a, b):
            return a @ b

    inputs = torch.randn(2, 3), torch.randn(3, 4)
    assert shapes(MatMul(), inputs, path) == ([[2, 3], [3, 4]], [[2, 4]])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.bool]
)
def test_golden_sample_is_exact(path, dtype):
    x = torch.randn(3, 2).to(dtype)
    tw.export(Apply(lambda x: x.flip(1)), x, path)
    golden = manifest_of(path)["golden"]
    assert torch.equal(decode(golden["inputs"][0]), x[:1])
    assert torch.equal(decode(golden["outputs"][0]), x[:1].flip(1))


def test_model_stays_as_it_was(path):
    model = small_cnn()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 1, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    tw.export(model, (x,), path)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_training_mode_is_restored_after_failure(path):
    model = nn.Sequential(nn.Dropout(), Apply(lambda x: [x, "text"]))
    with pytest.raises(TypeError, match="the model's output: expected a tensor or a flat tuple"):
        tw.export(model, torch.ones(2), path)
    assert all(module.training for module in model.modules())


def test_script_module(path):
    model = torch.jit.script(small_cnn())
    x = torch.randn(2, 1, 6, 6)
    tw.export(model, x, path)
    assert model.training
    loaded = torch.jit.load(path)
    assert not loaded.training
    assert torch.equal(loaded(x), model.eval()(x))


def test_same_bytes_under_another_name(tmp_path):
    model, x = torch.jit.script(small_cnn()), torch.randn(2, 1, 6, 6)
    tw.export(model, x, tmp_path / "a.pt")
    tw.export(model, x, tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_only_deprecation_of_torchscript_is_silenced(path):
    def forward(x):
        warnings.warn("`something` else is deprecated", FutureWarning, stacklevel=2)
        return x * 2 if x.sum() > 0 else x

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        tw.export(Apply(forward), torch.ones(2), path)
    categories = {warning.category for warning in record}
    assert categories == {FutureWarning, torch.jit.TracerWarning}
    assert not [w for w in record if str(w.message).startswith("`torch.jit.")]


@pytest.mark.parametrize("format", ["aoti", "onnx"])
def test_planned_formats(path, format):
    with pytest.raises(NotImplementedError, match=f'format "{format}" is planned'):
        tw.export(nn.ReLU(), torch.ones(1), path, format=format)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (lambda x: x, torch.ones(1), TypeError, "model: expected a torch.nn.Module, got function"),
        (nn.ReLU(), 1.0, TypeError, "example_inputs: expected a tensor .* got float"),
        (nn.ReLU(), {"x": torch.ones(1)}, TypeError, "example_inputs: expected .* got dict"),
        (nn.ReLU(), (torch.ones(1), 3), TypeError, "example_inputs: .* got int in a tuple"),
        (nn.ReLU(), (), TypeError, "example_inputs: expected at least one tensor, got none"),
        (nn.Identity(), torch.ones(1, dtype=torch.cfloat), TypeError, "got .*complex64"),
        (nn.Identity(), torch.eye(2).to_sparse(), TypeError, "got torch.sparse_coo"),
        (
            nn.Identity(),
            torch.ones(1, device="meta"),
            ValueError,
            "expected CPU tensors, got .* meta",
        ),
        (
            nn.Linear(1, 1, device="meta"),
            torch.ones(1),
            ValueError,
            "weight: expected a CPU tensor",
        ),
        (Apply(lambda x: {"y": x}), torch.ones(1), TypeError, "the model's output: .* got dict"),
        (Apply(lambda x: (x, (x,))), torch.ones(1), TypeError, "output: .* got tuple in a tuple"),
        (
            Apply(lambda x: x + torch.rand(3)),
            torch.ones(3),
            ValueError,
            "not reproduce the model .* random or",
        ),
    ],
)
def test_refused(path, model, inputs, error, message):
    with pytest.raises(error, match=f"(?s)^export: .*{message}"):
        tw.export(model, inputs, path)
    assert not list(path.parent.iterdir())


def test_unknown_format_and_path(tmp_path):
    with pytest.raises(ValueError, match="format: expected \"torchscript\", got 'pickle'"):
        tw.export(nn.ReLU(), torch.ones(1), tmp_path / "m.pt", format="pickle")
    with pytest.raises(ValueError, match="is the name of the manifest"):
        tw.export(nn.ReLU(), torch.ones(1), tmp_path / "m.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"folder\.json is a directory"):
        tw.export(nn.ReLU(), torch.ones(1), tmp_path / "folder.pt")
    with pytest.raises(ValueError, match=r"\. is a directory"):
        tw.export(nn.ReLU(), torch.ones(1), ".")
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        tw.export(nn.ReLU(), torch.ones(1), tmp_path / "missing" / "m.pt")


class Autocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu"):
            return super().forward(x)


def test_autocast(path):
    """Around an export or inside a forward, autocast becomes part of the file."""
    linear, x = nn.Linear(4, 3), torch.randn(2, 4)
    for model in Autocast(linear), linear:
        with torch.autocast("cpu", enabled=model is linear):
            tw.export(model, x, path)
            expected = model(x)
        assert torch.is_autocast_cache_enabled()
        assert expected.dtype == torch.bfloat16
        assert torch.equal(torch.jit.load(path)(x), expected)


def test_failed_export_leaves_existing_files(path, monkeypatch):
    tw.export(nn.ReLU(), torch.ones(1), path)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    with pytest.raises(ValueError, match="not reproduce the model"):
        tw.export(Apply(torch.rand_like), torch.ones(3), path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tw.export(nn.Tanh(), torch.ones(1), path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before

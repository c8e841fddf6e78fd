"""What weld predicts, inspects, and which operators it takes."""

import json

import numpy as np
import pytest
import torch
import torchweld as tw
from torch import nn

from tests.app.program import Pair, Twice, save_plain, small_cnn


def models():
    """Name, model in eval mode and shape of one row of its input."""
    yield "stock", small_cnn(), (1, 8, 8)
    torch.manual_seed(0)
    linear = tw.nn.QuantizedLinear.from_float(nn.Linear(70, 33), activation="gelu")
    yield "quantized", nn.Sequential(linear, nn.Linear(33, 4)).eval(), (70,)
    model = nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 4)).eval()
    yield "weight only", tw.quantize(model, tw.Int8WeightOnly(), keep_small=False), (70,)
    yield "int4", tw.quantize(model, tw.Int4(group_size=32), keep_small=False), (70,)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    yield "attention", tw.quantize(layer, keep_small=False), (5, 16)
    trained = tw.nn.ConvBNReLU2d(3, 20, 3, activation="silu")
    trained(torch.randn(8, 3, 6, 6))  # running statistics other than 0 and 1
    yield "frozen statistics", nn.Sequential(trained, nn.Flatten()).eval(), (3, 6, 6)
    folded = tw.nn.ConvReLU2d.from_float(trained.conv, trained.bn, "silu")
    yield "folded", nn.Sequential(folded, nn.Flatten(), nn.Linear(320, 5)).eval(), (3, 6, 6)
    yield "welded", tw.weld(small_cnn(), inference=True).eval(), (1, 8, 8)


@pytest.mark.parametrize("name", [name for name, *_ in models()])
@pytest.mark.parametrize("batch", [1, 50])
def test_same_bits_as_python(weld, tmp_path, name, batch):
    ((model, shape),) = [(model, shape) for n, model, shape in models() if n == name]
    tw.export(model, torch.randn(2, *shape), tmp_path / "m.pt")
    x = torch.randn(batch, *shape)
    with torch.no_grad():
        expected = model(x)
    threads = ["--threads", torch.get_num_threads()]
    assert torch.equal(weld.predict(tmp_path / "m.pt", x, options=threads), expected)


def test_same_bits_on_one_thread(weld, cnn):
    model, path = cnn
    x = torch.randn(40, 1, 8, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            expected = model(x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(weld.predict(path, x, options=["--threads", 1]), expected)


def test_batches(weld, cnn):
    model, path = cnn
    x = torch.randn(10, 1, 8, 8)
    with torch.no_grad():
        expected = torch.cat([model(rows) for rows in x.split(4)])
    assert torch.equal(weld.predict(path, x, options=["--batch-size", 4]), expected)
    assert weld.predict(path, x[:0], options=["--batch-size", 4]).shape == (0, 10)


def test_plain_file_in_training_mode_runs_in_eval_mode(weld, tmp_path):
    model = small_cnn().train()
    save_plain(model, tmp_path / "m.pt")
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        expected = model.eval()(x)
    assert torch.equal(weld.predict(tmp_path / "m.pt", x), expected)


def test_several_inputs_and_outputs(weld, tmp_path):
    path, a, b = tmp_path / "m.pt", tmp_path / "a.npy", tmp_path / "b.npy"
    tw.export(Pair(), (torch.randn(2, 3), torch.randn(2, 3)), path)
    left, right = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    np.save(a, left)
    np.save(b, right)
    for inputs in (
        ["--input", a, "--input", b],
        ["--input", f"right={b}", "--input", a],
        ["--input", f"right={b}", "--input", f"left={a}"],
    ):
        weld("predict", path, *inputs, "--output", tmp_path / "y.npy")
        np.testing.assert_array_equal(np.load(tmp_path / "y.0.npy"), left - right)
        assert np.load(tmp_path / "y.1.npy").shape == (4,)
        (tmp_path / "y.0.npy").unlink()

    assert weld.fails("predict", path, "--input", a) == (
        "the model takes 2 inputs (left, right), got 1"
    )
    message = weld.fails("predict", path, "--input", f"left={a}", "--input", f"left={b}")
    assert message == "input left is given twice"
    np.save(b, right[:3])
    message = weld.fails("predict", path, "--input", a, "--input", b)
    assert message == "input right: expected 4 rows as in input left, got 3"


def test_top_k(weld, tmp_path):
    path, x = tmp_path / "m.pt", tmp_path / "x.npy"
    tw.export(nn.Identity(), torch.zeros(2, 3), path)
    np.save(x, np.log([[0.2, 0.5, 0.3], [1.0, 1.0, 2.0]]).astype(np.float32))
    result = weld("predict", path, "--input", x, "--top-k", 2)
    assert result.stdout.splitlines() == [
        "output row 0: 1 50.00 %   2 30.00 %",
        "output row 1: 2 50.00 %   0 25.00 %",
    ]
    assert weld("predict", path, "--input", x, "--top-k", 0).stdout == ""
    assert "2 30.00 %   0 20.00 %" in weld("predict", path, "--input", x, "--top-k", 99).stdout

    np.save(x, np.array([[1, np.nan, 2]], np.float32))
    assert "1 nan %" in weld("predict", path, "--input", x).stdout
    np.save(x, np.array([[1, np.inf, 2]], np.float32))
    assert "1 nan %" in weld("predict", path, "--input", x).stdout  # and not "-nan"
    np.save(x, np.zeros((1000, 3), np.float32))
    lines = weld("predict", path, "--input", x).stdout.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 980 more rows"


def test_other_outputs_are_summarized(weld, tmp_path):
    tw.export(nn.Identity(), torch.zeros(2, 2, 2, dtype=torch.bfloat16), tmp_path / "m.pt")
    assert weld("inspect", tmp_path / "m.pt")
    path = tmp_path / "n.pt"
    tw.export(nn.Identity(), torch.zeros(2, 2, 2, dtype=torch.float16), path)
    np.save(tmp_path / "x.npy", np.arange(-3, 5, dtype=np.float16).reshape(2, 2, 2))
    result = weld("predict", path, "--input", tmp_path / "x.npy")
    assert result.stdout == "output: float16 [2, 2, 2] from -3 to 4\n"


# --- inspect -------------------------------------------------------------------------------------


def test_inspect(weld, tmp_path):
    path = tmp_path / "m.pt"
    model = tw.nn.QuantizedLinear.from_float(nn.Linear(70, 4)).eval()
    tw.export(model, torch.randn(2, 70), path)
    lines = weld("inspect", path).stdout.splitlines()
    text = {line[:14].strip(): line[14:].strip() for line in lines if line[:14].strip()}
    assert text["model"] == str(path)
    assert f"({path.stat().st_size} bytes)" in text["size"]
    assert text["exported by"] == f"torch {torch.__version__}, torchweld {tw.__version__}"
    assert tw.info()["cpu capability"] in text["running on"]
    assert text["inputs"] == "input: float32 [-1, 70]"
    assert text["outputs"] == "output: float32 [-1, 4]"
    assert text["operators"].startswith("torchweld::quantized_linear(")
    assert "registered here" in [line.strip() for line in lines]
    assert text["golden sample"] == "reproduced bit for bit"
    count = sum(
        p.numel() for p in [*torch.jit.load(path).parameters(), *torch.jit.load(path).buffers()]
    )
    assert text["parameters"].startswith(f"{count} in ")


def test_inspect_without_manifest(weld, identity):
    result = weld("inspect", identity)
    assert "none: dtypes and shapes are unknown" in result.stdout
    assert "inputs        input" in result.stdout
    assert "torch's own only" in result.stdout


def test_inspect_shows_a_golden_sample_that_differs(weld, cnn):
    _, path = cnn
    manifest = json.loads(path.with_suffix(".json").read_text())
    sample = manifest["golden"]["inputs"][0]
    sample["data"] = "A" * 16 + sample["data"][16:]  # three zeros
    path.with_suffix(".json").write_text(json.dumps(manifest))
    assert "golden sample reproduced up to a difference of 0." in weld("inspect", path).stdout


# --- operators -----------------------------------------------------------------------------------


def test_operator_library(weld, tmp_path, extra_ops):
    path, x = tmp_path / "m.pt", torch.randn(2, 3)
    tw.export(Twice(), x, path)
    message = weld.fails("predict", path, "--input", tmp_path / "none.npy")
    assert "expected    extra::twice(Tensor input) -> Tensor\n" in message
    assert "registered  nothing of that name" in message
    result = weld("inspect", path, code=2)
    assert "NOT REGISTERED HERE" in result.stdout
    assert torch.equal(weld.predict(path, x, options=["--ops", extra_ops]), 2 * x)

    path.with_suffix(".json").unlink()
    message = weld.fails("predict", path, "--input", tmp_path / "in0.npy")
    assert "Unknown builtin op: extra::twice; --ops LIB loads a library" in message
    assert torch.equal(weld.predict(path, x, options=["--ops", extra_ops]), 2 * x)
    assert "extra::twice" in weld("inspect", path, "--ops", extra_ops).stdout


def test_operator_library_errors(weld, identity, extra_ops, tmp_path):
    missing = tmp_path / "libmissing.so"
    assert weld.fails("inspect", identity, "--ops", missing).endswith("does not exist")
    assert "cannot be loaded: " in weld.fails("inspect", identity, "--ops", identity)
    copy = tmp_path / "libcopy.so"
    copy.write_bytes(extra_ops.read_bytes())
    message = weld.fails("inspect", identity, "--ops", extra_ops, "--ops", copy)
    assert "libcopy.so crashes when loaded; are its operators registered already?" in message
    result = weld("inspect", identity, "--ops", tw._library.ops_library)
    assert "is not loaded, this program is linked to torchweld's operators" in result.stderr


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ("torchweld::grad_norm(Tensor[] grads) -> Tensor", None),
        # A newer torchweld may add arguments that have defaults.
        (
            "torchweld::quantized_linear(Tensor input, Tensor packed_weight, Tensor weight_scale, "
            "Tensor weight_sum, Tensor? bias, Tensor? residual, int in_features) -> Tensor",
            None,
        ),
        (
            "torchweld::grad_norm(Tensor[] grads, int p) -> Tensor",
            "registered  torchweld::grad_norm(Tensor[] grads) -> Tensor",
        ),
        ("torchweld::gone(Tensor x) -> Tensor", "registered  nothing of that name"),
        ("rubbish", '"rubbish" is not an operator schema'),
    ],
)
def test_schemas_are_checked_before_loading(weld, cnn, images, schema, expected):
    _, path = cnn
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest["ops"] = [schema]
    path.with_suffix(".json").write_text(json.dumps(manifest))
    if expected is None:
        weld("predict", path, "--input", images)
    else:
        assert expected in weld.fails("predict", path, "--input", images)

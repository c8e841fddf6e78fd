"""The C++ program weld: built as a user builds it, run as a user runs it."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchweld as tw
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent


class Weld:
    """Runs the program and checks how it ends."""

    def __init__(self, program: Path):
        self.program = program

    def __call__(self, *arguments, code: int = 0, **options) -> subprocess.CompletedProcess:
        result = subprocess.run(
            [str(self.program), *map(str, arguments)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=120,
            check=False,
            **options,
        )
        assert result.returncode == code, result
        return result

    def fails(self, *arguments, code: int = 2) -> str:
        """The one message of a run that fails."""
        result = self(*arguments, code=code)
        message = [line for line in result.stderr.splitlines() if not line.startswith("weld: note")]
        assert message[0].startswith("weld: error: "), result.stderr
        assert len(message) == 1 or message[0].endswith(":"), result.stderr
        return "\n".join(message).removeprefix("weld: error: ")

    def predict(self, model: Path, *inputs: Tensor, options=()) -> Tensor:
        """The single output for these inputs."""
        arguments = []
        for i, tensor in enumerate(inputs):
            np.save(model.with_name(f"in{i}.npy"), tensor.numpy())
            arguments += ["--input", model.with_name(f"in{i}.npy")]
        output = model.with_name("out.npy")
        self("predict", model, *arguments, "--output", output, *options)
        return torch.from_numpy(np.load(output))


@pytest.fixture(scope="session")
def weld(tmp_path_factory) -> Weld:
    build = tmp_path_factory.mktemp("weld")
    configure = [
        *("cmake", "-S", str(ROOT / "libtorch_app"), "-B", str(build), "-G", "Ninja"),
        f"-DCMAKE_PREFIX_PATH={tw.cmake_prefix_path};{torch.utils.cmake_prefix_path}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DWELD_WERROR=ON",
    ]
    for command in configure, ["cmake", "--build", str(build)]:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return Weld(build / "weld")


@pytest.fixture(scope="session")
def extra_ops(tmp_path_factory) -> Path:
    """A library that registers extra::twice, loaded into this process too."""
    library = tmp_path_factory.mktemp("extra") / "libextra.so"
    command = [
        *("g++", "-std=c++20", "-shared", "-fPIC", str(ROOT / "tests/cpp/extra_op.cpp")),
        *("-o", str(library), "-isystem", str(TORCH / "include"), f"-L{TORCH / 'lib'}"),
        *("-ltorch_cpu", "-Wl,--unresolved-symbols=ignore-in-shared-libs"),
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
    return library


class Twice(nn.Module):
    def forward(self, x):
        return torch.ops.extra.twice(x)


class Pair(nn.Module):
    def forward(self, left, right):
        return left - right, left.sum(1)


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)),
    ).eval()


def save_plain(model: nn.Module, path: Path) -> None:
    """As a user without torchweld.export does it: no manifest."""
    torch.jit.save(torch.jit.script(model), path)


@pytest.fixture
def cnn(tmp_path) -> tuple[nn.Module, Path]:
    model, path = small_cnn(), tmp_path / "m.pt"
    tw.export(model, torch.randn(2, 1, 8, 8), path)
    return model, path


@pytest.fixture
def images(tmp_path) -> Path:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((3, 1, 8, 8), np.float32))
    return path


@pytest.fixture
def identity(tmp_path) -> Path:
    """A model without manifest that returns its input."""
    path = tmp_path / "identity.pt"
    save_plain(nn.Identity(), path)
    return path


# --- outputs -------------------------------------------------------------------------------------


def models():
    """Name, model in eval mode and shape of one row of its input."""
    yield "stock", small_cnn(), (1, 8, 8)
    torch.manual_seed(0)
    linear = tw.nn.QuantizedLinear.from_float(nn.Linear(70, 33), activation="gelu")
    yield "quantized", nn.Sequential(linear, nn.Linear(33, 4)).eval(), (70,)
    trained = tw.nn.ConvBNReLU2d(3, 20, 3, activation="silu")
    trained(torch.randn(8, 3, 6, 6))  # running statistics other than 0 and 1
    yield "frozen statistics", nn.Sequential(trained, nn.Flatten()).eval(), (3, 6, 6)
    folded = tw.nn.ConvReLU2d.from_float(trained.conv, trained.bn, "silu")
    yield "folded", nn.Sequential(folded, nn.Flatten(), nn.Linear(320, 5)).eval(), (3, 6, 6)
    yield "welded", tw.weld(small_cnn(), inference=True).eval(), (1, 8, 8)


@pytest.mark.parametrize("name", ["stock", "quantized", "frozen statistics", "folded", "welded"])
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
            "Tensor weight_sum, Tensor? bias, int in_features) -> Tensor",
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


# --- files that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "predict"])
def test_missing_model(weld, tmp_path, images, command):
    arguments = [] if command == "inspect" else ["--input", images]
    assert weld.fails(command, tmp_path / "no.pt", *arguments).endswith("no.pt does not exist")
    assert weld.fails(command, tmp_path, *arguments).endswith("is not a regular file")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_model(weld, cnn, images, keep):
    _, path = cnn
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    message = weld.fails("predict", path, "--input", images)
    assert "m.pt is truncated or was changed: its SHA-256 is " in message
    path.with_suffix(".json").unlink()
    message = weld.fails("predict", path, "--input", images)
    assert message.endswith("m.pt is not a TorchScript file, or is truncated")


def test_foreign_model(weld, tmp_path, images):
    path = tmp_path / "foreign.pt"
    path.write_text("not a model\n" * 100)
    assert "is not a TorchScript file" in weld.fails("predict", path, "--input", images)
    torch.save(small_cnn().state_dict(), path)
    assert "holds the weights of torch.save and no program" in weld.fails("inspect", path)
    np.savez(path.with_suffix(".npz"), x=np.zeros(3))
    assert "is not a TorchScript file" in weld.fails("inspect", path.with_suffix(".npz"))


@pytest.mark.parametrize("size", [0, 55, 56, 64, 119, (1 << 20) + 7])
def test_sha256(weld, cnn, size):
    _, path = cnn
    data = np.random.default_rng(size).bytes(size)
    path.write_bytes(data)
    assert f"its SHA-256 is {hashlib.sha256(data).hexdigest()}," in weld.fails("inspect", path)


def corrupt(key, value):
    def change(manifest):
        *parents, last = key
        for parent in parents:
            manifest = manifest[parent]
        if value is None:
            del manifest[last]
        else:
            manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (corrupt(["format_version"], 2), "it has format_version 2, this program reads 1"),
        (corrupt(["format_version"], 1.5), "expected an integer, got 1.5"),
        (corrupt(["format"], "aoti"), "format aoti, this program runs torchscript"),
        (corrupt(["sha256"], None), "key 'sha256' not found"),
        (corrupt(["sha256"], 3), "must be string"),
        (corrupt(["inputs", 0, "dtype"], "float31"), "unknown dtype float31"),
        (corrupt(["inputs", 0, "shape"], "[1]"), "expected a shape"),
        (corrupt(["inputs", 0, "shape"], [-2, 1]), "negative size"),
        (corrupt(["inputs", 0, "shape"], [True]), "expected an integer, got true"),
        (corrupt(["inputs"], [5]), "cannot use at() with number"),
        (corrupt(["inputs"], []), "it declares 0 inputs, the model takes 1"),
        (corrupt(["ops"], {"a": 1}), "must be"),
        (corrupt(["golden", "inputs", 0, "data"], "AAA"), "base64 data is truncated"),
        (corrupt(["golden", "inputs", 0, "data"], "A!=="), "base64 data is corrupted"),
        (corrupt(["golden", "inputs", 0, "data"], "AAAA"), "holds 3 bytes"),
        (corrupt(["golden", "inputs", 0, "shape"], [1 << 62, 1 << 62]), "holds 256 bytes"),
    ],
)
def test_corrupted_manifest(weld, cnn, images, change, reason):
    _, path = cnn
    manifest = json.loads(path.with_suffix(".json").read_text())
    change(manifest)
    path.with_suffix(".json").write_text(json.dumps(manifest))
    message = weld.fails("predict", path, "--input", images)
    assert message.startswith(f"manifest {path.with_suffix('.json')} cannot be used: ")
    assert reason in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a": "\x80"}'])
def test_manifest_that_is_no_manifest(weld, cnn, images, text):
    _, path = cnn
    path.with_suffix(".json").write_text(text, encoding="latin-1")
    assert "m.json cannot be used: " in weld.fails("predict", path, "--input", images)


# --- inputs that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((3, 1, 8, 8)), "float64 [3, 1, 8, 8]"),
        (np.zeros((3, 1, 8, 9), np.float32), "float32 [3, 1, 8, 9]"),
        (np.zeros((8, 8), np.float32), "float32 [8, 8]"),
        (np.zeros((), np.float32), "float32 []"),
    ],
)
def test_wrong_dtype_or_shape(weld, cnn, tmp_path, array, got):
    np.save(tmp_path / "x.npy", array)
    message = weld.fails("predict", cnn[1], "--input", tmp_path / "x.npy")
    assert message == f"input input: expected float32 [-1, 1, 8, 8], got {got}"


def test_fixed_batch(weld, tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(4, 3)

    tw.export(Fixed(), torch.zeros(4, 3), tmp_path / "m.pt")
    np.save(tmp_path / "x.npy", np.zeros((8, 3), np.float32))
    message = weld.fails("predict", tmp_path / "m.pt", "--input", tmp_path / "x.npy")
    assert message == "input x: expected float32 [4, 3], got float32 [8, 3]"


def test_model_that_fails(weld, tmp_path):
    save_plain(nn.Linear(3, 2), tmp_path / "m.pt")
    np.save(tmp_path / "x.npy", np.zeros((2, 5), np.float32))
    message = weld.fails("predict", tmp_path / "m.pt", "--input", tmp_path / "x.npy", code=1)
    assert message == "mat1 and mat2 shapes cannot be multiplied (2x5 and 3x2)"


def test_output_that_cannot_be_written(weld, cnn, images, tmp_path):
    def fails(output):
        return weld.fails("predict", cnn[1], "--input", images, "--output", output)

    assert "takes a file that ends in .npy" in fails(cnn[1])
    assert "is no folder that can be written to" in fails(tmp_path / "no" / "y.npy")
    (tmp_path / "folder.npy").mkdir()
    assert "is a directory" in fails(tmp_path / "folder.npy")
    path = tmp_path / "bf16.pt"
    save_plain(ToBFloat16(), path)
    message = weld.fails("predict", path, "--input", images, "--output", tmp_path / "y.npy")
    assert message == "the output is bfloat16, which .npy files cannot hold"
    assert not list(tmp_path.glob("*y.npy*"))


class ToBFloat16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


# --- .npy ----------------------------------------------------------------------------------------

DTYPES = ["bool", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


class Many(nn.Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor):
        return a, b, c, d, e


@pytest.mark.parametrize("dtype", DTYPES)
def test_npy_round_trip(weld, tmp_path, dtype):
    save_plain(Many(), tmp_path / "m.pt")
    rng = np.random.default_rng(0)
    arrays, inputs = [], []
    for i, shape in enumerate([(), (0,), (3,), (2, 3, 4), (5, 0, 2)]):
        arrays.append(np.asarray(rng.integers(0, 2, shape)).astype(dtype))
        inputs += ["--input", tmp_path / f"x{i}.npy"]
        with open(inputs[-1], "wb") as file:
            np.lib.format.write_array(file, arrays[-1], version=(1 + i % 3, 0))
    weld("predict", tmp_path / "m.pt", *inputs, "--output", tmp_path / "y.npy")
    for i, array in enumerate(arrays):
        with open(tmp_path / f"y.{i}.npy", "rb") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            np.lib.format.read_array_header_1_0(file)
            assert file.tell() % 64 == 0
            file.seek(0)
            result = np.load(file)
        assert (result.dtype, result.shape) == (array.dtype, array.shape)
        assert np.array_equal(result, array)


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_header(text: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode() + data


GOOD = npy(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not a .npy file"),
        (b"1,2,3\n" * 10, "is not a .npy file"),
        (GOOD[:9], "is truncated: it ends in its header"),
        (GOOD[:60], "is truncated: it ends in its header"),
        (GOOD[:-1], "is truncated: shape [2, 3] of float32 takes 24 bytes, the file holds 23"),
        (GOOD + b"\0", "is too long: shape [2, 3] of float32 takes 24 bytes, the file holds 25"),
        (b"\x93NUMPY\x04\x00" + GOOD[8:], "has .npy version 4.0; expected 1.0, 2.0 or 3.0"),
        (npy(np.asfortranarray(np.zeros((2, 3)))), "is in Fortran order"),
        (npy(np.zeros(3, ">f4")), "holds big-endian numbers (>f4)"),
        (npy(np.zeros(3, "c8")), "has dtype <c8; expected bool, uint8"),
        (npy(np.array(["text"])), "has dtype <U4"),
        (npy(np.zeros(3, [("a", "f4")])), "its header cannot be parsed"),
        (with_header("{'descr': '<f4'}"), "its header cannot be parsed"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3)}"), "cannot be parsed"),
        (with_header("{'descr': '<f4', 'fortran_order': 0, 'shape': (3,)}"), "cannot be parsed"),
        (
            with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}"),
            "cannot be parsed",
        ),
        (
            with_header(
                "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}"
            ),
            "cannot be parsed",
        ),
        (
            with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({1 << 62}, 4)}}"),
            "takes more than 2^63 bytes",
        ),
        (
            with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({1 << 40},)}}"),
            "is truncated",
        ),
        (
            with_header("{'descr': '|b1', 'fortran_order': False, 'shape': (2,), }", b"\x01\x02"),
            "holds booleans that are neither 0 nor 1",
        ),
    ],
)
def test_npy_that_cannot_be_used(weld, identity, tmp_path, data, reason):
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    message = weld.fails("predict", identity, "--input", path)
    assert message.startswith(str(path))
    assert reason in message


def test_missing_input(weld, identity, tmp_path):
    path = tmp_path / "no.npy"
    assert weld.fails("predict", identity, "--input", path) == f"{path} does not exist"
    assert weld.fails("predict", identity, "--input", tmp_path).endswith("is not a regular file")


# --- the program ---------------------------------------------------------------------------------


def test_help_and_version(weld):
    assert "weld inspect MODEL" in weld("--help").stdout
    assert "--top-k" in weld("predict", "--help").stdout
    assert "--ops" in weld("inspect", "--help").stdout
    version = torch.__version__.split("+")[0]
    assert weld("--version").stdout == (
        f"weld {tw.__version__} (torch {version}, torchweld {tw.__version__})\n"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no command was given"),
        (["serve"], "unknown command serve; weld knows inspect and predict"),
        (["inspect"], "takes one model, got 0"),
        (["inspect", "a", "b"], "takes one model, got 2"),
        (["inspect", "a", "--output", "b"], "--output is not an option of weld inspect"),
        (["predict", "a"], "needs --input"),
        (["predict", "a", "--input"], "--input needs a value"),
        (
            ["predict", "a", "--top-k", "x"],
            '9223372036854775807, got "x"',
        ),
        (["predict", "a", "--top-k", "-1"], "from 0 to"),
        (["predict", "a", "--batch-size", "0"], "from 1 to"),
        (["predict", "a", "--threads", "2.5"], "from 1 to 4096"),
        (["predict", "a", "--threads", "4097"], "from 1 to 4096"),
        (["predict", "a", "--threads", "99999999999999999999"], "from 1 to 4096"),
        (["predict", "a", "-zk", "3"], "-z is not an option"),
        (["predict", "a", "--input", ""], "--input has an empty value"),
        (["predict", "a", "-k", ""], "-k has an empty value"),
        (["predict", "", "--input", "b"], "the name of the model is empty"),
    ],
)
def test_command_line(weld, arguments, reason):
    assert reason in weld.fails(*arguments)


def test_forced_capability(weld, cnn, images):
    environment = {**os.environ, "TORCHWELD_CPU_CAPABILITY": "scalar"}
    assert "(scalar)" in weld("inspect", cnn[1], env=environment).stdout
    environment["TORCHWELD_CPU_CAPABILITY"] = "sse9"
    result = weld("inspect", cnn[1], env=environment, code=2)
    assert 'got "sse9"' in result.stderr


def test_no_python_in_the_process(weld):
    environment = {**os.environ, "LD_TRACE_LOADED_OBJECTS": "1"}
    libraries = [line.split()[0] for line in weld(env=environment).stdout.splitlines()]
    assert "libtorchweld_ops.so" in libraries
    assert not [name for name in libraries if "python" in name]


def test_closed_standard_output(weld, identity):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [weld.program, "inspect", identity], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 1
    assert b"standard output cannot be written" in result.stderr


def test_two_processes_at_once(weld, cnn, tmp_path):
    model, path = cnn
    x = torch.randn(50, 1, 8, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    command = ["predict", path, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy"]
    processes = [
        subprocess.Popen([weld.program, *command], stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    with torch.no_grad():
        assert np.array_equal(np.load(tmp_path / "y.npy"), model(x).numpy())
    assert not list(tmp_path.glob(".*"))


def test_interrupt(weld, tmp_path, images):
    class Forever(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while bool(x.sum() > -1):
                x = x + 1
            return x

    save_plain(Forever(), tmp_path / "m.pt")
    command = ["predict", tmp_path / "m.pt", "--input", images, "--output", tmp_path / "y.npy"]
    with subprocess.Popen([weld.program, *command], stderr=subprocess.PIPE) as process:
        assert b"has no manifest" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == -signal.SIGINT
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.pt", "x.npy"]

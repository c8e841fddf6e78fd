"""Files and inputs weld cannot use: one clear sentence, exit code 2."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torchweld as tw
from torch import Tensor, nn

from tests.app.program import save_plain, small_cnn


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
        (corrupt(["golden", "inputs"], []), "it declares 0 inputs, the model takes 1"),
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
    for command in ["inspect", path], ["predict", path, "--input", images]:
        message = weld.fails(*command)
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

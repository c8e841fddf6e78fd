"""The .npy files weld reads and writes."""

import io

import numpy as np
import pytest
from torch import Tensor, nn

from tests.app.program import save_plain

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

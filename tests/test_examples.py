"""What the examples do beside what `make demo` shows."""

import gzip
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("digits")


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_files(digits, tmp_path, packed):
    """IDX as MNIST's page defines it: big-endian magic number and sizes, then bytes."""
    generator = np.random.default_rng(0)
    written = {}
    for part, count in ("train", 5), ("t10k", 3):
        for what, shape in ("images-idx3", (count, 28, 28)), ("labels-idx1", (count,)):
            values = generator.integers(0, 10 if len(shape) == 1 else 256, shape, dtype=np.uint8)
            header = np.array([0x800 + len(shape), *shape], ">i4").tobytes()
            name, data = f"{part}-{what}-ubyte", header + values.tobytes()
            if packed:
                name, data = f"{name}.gz", gzip.compress(data)
            (tmp_path / name).write_bytes(data)
            written[part, what] = torch.from_numpy(values)

    read = digits.mnist(tmp_path)
    for part, images, labels in (
        ("train", read.train_images, read.train_labels),
        ("t10k", read.test_images, read.test_labels),
    ):
        assert torch.equal((images * 255).round().byte()[:, 0], written[part, "images-idx3"])
        assert torch.equal(labels, written[part, "labels-idx1"].long())


def test_mnist_folder_without_files(digits, tmp_path):
    with pytest.raises(SystemExit, match=r"--mnist: expected .*train-images-idx3-ubyte"):
        digits.mnist(tmp_path)


def test_foreign_file_in_the_mnist_folder(digits, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"<html>not found</html>")
    with pytest.raises(SystemExit, match="expected an idx file of MNIST, got another"):
        digits.mnist(tmp_path)

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


@pytest.fixture
def layouts(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("adamw_layouts")


def final_losses(layouts, task, names, steps):
    return {name: layouts.train(task, layouts.LAYOUTS[name], 0, steps)[1] for name in names}


def test_a_transformer_reaches_the_same_loss_in_every_layout(layouts, monkeypatch):
    """Far closer than stock does with parameters in bfloat16."""
    monkeypatch.setattr(layouts.Text, "context", 24)
    monkeypatch.setattr(layouts.Text, "batch", 8)
    final = final_losses(layouts, layouts.Text(), layouts.LAYOUTS, steps=40)
    base = final["float32"]
    assert final.pop("stock float32") == base
    assert final.pop("stock bfloat16") > base + 0.01
    for name, loss in final.items():
        assert loss == pytest.approx(base, abs=0.005), name


def test_the_demo_reaches_the_same_loss_in_few_bits(layouts):
    names = ("float32", "float32, int8 states", "bfloat16, stochastic, int8 states")
    base, *others = final_losses(layouts, layouts.Digits(), names, steps=40).values()
    assert base < 0.5  # from 2.3
    assert others == pytest.approx([base, base], abs=0.05)  # seeds differ by as much

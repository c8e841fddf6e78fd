"""What the examples do beside what `make demo` shows."""

import gzip
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchweld as tw

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


@pytest.fixture
def quantized(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("quantized_transformer")


def test_a_transformer_on_text_keeps_its_accuracy(quantized, monkeypatch):
    monkeypatch.setattr(quantized.Text, "context", 24)
    monkeypatch.setattr(quantized, "ROUNDS", 1)
    text = quantized.Text()
    held_out = tuple(part[::4] for part in text.held_out())
    monkeypatch.setattr(text, "held_out", lambda: held_out)
    results = quantized.compare(quantized.train(text, steps=60, width=128), text)
    base = results["float32"]
    assert base.top1 > 0.2  # of 103 characters
    for name in quantized.CONFIGS:
        result = results[name]
        lost, more = (0.005, 0.001) if "Int8" in name else (0.02, 0.01)
        assert result.top1 > base.top1 - lost, name
        assert result.loss == pytest.approx(base.loss, abs=more), name
        assert result.bytes < base.bytes * (0.4 if "Int8" in name else 0.3), name
    assert "Int4(group_size=128)" in quantized.table(results)


@pytest.mark.parametrize(
    "config", [tw.Int8(), tw.Int8WeightOnly(), tw.Int4(group_size=32)], ids=str
)
def test_the_demo_keeps_its_accuracy(digits, config):
    torch.manual_seed(0)
    data = digits.bundled_digits()
    model = digits.DigitsCNN()
    digits.train("", model, torch.optim.AdamW(model.parameters()), data, epochs=3)
    ready = tw.weld(model.eval(), inference=True)
    quantized = tw.quantize(ready, config)
    assert [row.name for row in tw.report(quantized).converted if "linear" in row.conversion] == [
        "fc1"
    ]
    images, labels = data.test_images, data.test_labels
    right = [
        (digits.predict(each, images).argmax(1) == labels).double().mean().item()
        for each in (ready, quantized)
    ]
    assert right[0] > 0.9
    assert right[1] >= right[0] - (0.02 if isinstance(config, tw.Int4) else 0.005)

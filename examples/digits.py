"""Train, weld, quantize, export, and classify in a C++ process: handwritten digits from end to end.

Trains the same small CNN twice on real handwritten digits, once with stock PyTorch and once with
torchweld's fused operators and optimizer; quantizes the linear layers of the second; exports it;
and has the C++ program `weld` classify the held-out images. Ends with one table.

    make demo                                  # scikit-learn's bundled digits, resized to 28x28
    python examples/digits.py --weld build/app/weld --mnist ~/data/MNIST/raw
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchweld as tw
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

BATCH_SIZE = 64
LOWEST_ACCURACY = 0.98
MOST_LOST = 0.005  # of accuracy, by quantizing


class DigitsCNN(nn.Module):
    """Three conv-bn-relu blocks and two linear layers, for images of shape [1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.3)
        self.fc1 = nn.Linear(576, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 1, 28, 28] to logits [N, 10]."""
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        x = self.pool(F.relu(self.bn3(self.conv3(x))))
        x = self.dropout(x.view(x.size(0), -1))
        x = self.dropout(F.relu(self.fc1(x)))
        return self.fc2(x)


@dataclass
class Digits:
    """Images float32 [N, 1, 28, 28] in [0, 1] and their labels int64 [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def bundled_digits() -> Digits:
    """scikit-learn's 1797 handwritten digits (UCI, 8x8), resized to 28x28; a fifth is held out."""
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    parts = train_test_split(
        large.numpy(), labels.astype(np.int64), test_size=0.2, random_state=0, stratify=labels
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return Digits(train_images, train_labels, test_images, test_labels)


def mnist(folder: Path) -> Digits:
    """MNIST's own four files, as downloaded (``train-images-idx3-ubyte``, with or without .gz)."""

    def read(name: str, header: int, magic: int) -> np.ndarray:
        plain, packed = folder / name, folder / f"{name}.gz"
        if packed.exists():
            raw = gzip.decompress(packed.read_bytes())
        elif plain.exists():
            raw = plain.read_bytes()
        else:
            sys.exit(f"digits: --mnist: expected {plain} or {packed.name} beside it, found neither")
        if int.from_bytes(raw[:4], "big") != magic:
            sys.exit(f"digits: --mnist: {name}: expected an idx file of MNIST, got another")
        return np.frombuffer(raw, np.uint8, offset=header)

    def images(name: str) -> Tensor:
        pixels = read(name, header=16, magic=0x803).reshape(-1, 1, 28, 28)
        return torch.from_numpy(pixels.astype(np.float32) / 255)

    def labels(name: str) -> Tensor:
        return torch.from_numpy(read(name, header=8, magic=0x801).astype(np.int64))

    return Digits(
        images("train-images-idx3-ubyte"),
        labels("train-labels-idx1-ubyte"),
        images("t10k-images-idx3-ubyte"),
        labels("t10k-labels-idx1-ubyte"),
    )


def train(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, digits: Digits, epochs: int
) -> float:
    """Train in place with a one-cycle schedule; return the seconds it took."""
    torch.manual_seed(0)
    count = len(digits.train_images)
    steps = epochs * -(-count // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    model.train()
    begin = time.perf_counter()
    for epoch in range(epochs):
        batches = torch.randperm(count).split(BATCH_SIZE)
        bar = tqdm(batches, desc=f"{name} epoch {epoch + 1}/{epochs}", unit="batch", leave=False)
        for rows in bar:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(digits.train_images[rows]), digits.train_labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return time.perf_counter() - begin


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(500)])


def classify_in_cpp(weld: Path, model: Path, images: Tensor, folder: Path) -> Tensor:
    """Logits of all images from the C++ program, through .npy files."""
    images_file, logits_file = folder / "images.npy", folder / "logits.npy"
    np.save(images_file, images.numpy())
    command = [weld, "predict", model, "--input", images_file, "--output", logits_file]
    subprocess.run([*command, "--batch-size", "500"], check=True, stdout=subprocess.DEVNULL)
    return torch.from_numpy(np.load(logits_file))


def saved_bytes(model: nn.Module) -> int:
    """Size of the state_dict as ``torch.save`` writes it."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weld", type=Path, required=True, help="the C++ program (`make app`)")
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's four idx files")
    parser.add_argument("--epochs", type=int, help="default: 20 for the digits, 3 for MNIST")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder to write to (build/demo)"
    )
    arguments = parser.parse_args()
    if not arguments.weld.exists():
        parser.error(f"--weld: {arguments.weld} does not exist; `make app` builds it")
    if arguments.epochs is None:
        arguments.epochs = 3 if arguments.mnist else 20
    return arguments


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    digits = mnist(arguments.mnist) if arguments.mnist else bundled_digits()
    print(f"{len(digits.train_images)} images to train on, {len(digits.test_images)} held out")

    torch.manual_seed(0)
    stock = DigitsCNN()
    welded = tw.weld(copy.deepcopy(stock))
    print(tw.report(welded), end="\n\n")
    stock_seconds = train(
        "stock", stock, torch.optim.AdamW(stock.parameters()), digits, arguments.epochs
    )
    welded_seconds = train(
        "welded", welded, tw.optim.AdamW(welded.parameters()), digits, arguments.epochs
    )

    quantized = tw.quantize(tw.weld(welded.eval(), inference=True))
    print(tw.report(quantized), end="\n\n")
    exported = arguments.output / "digits.pt"
    tw.export(quantized, (digits.test_images[:2],), exported)

    logits = {
        "stock": predict(stock, digits.test_images),
        "welded": predict(welded, digits.test_images),
        "quantized": predict(quantized, digits.test_images),
        "C++": classify_in_cpp(arguments.weld, exported, digits.test_images, arguments.output),
    }
    accuracy = {
        name: (values.argmax(1) == digits.test_labels).double().mean().item()
        for name, values in logits.items()
    }
    same = (logits["C++"].argmax(1) == logits["quantized"].argmax(1)).all().item()

    seconds = {"stock": stock_seconds, "welded": welded_seconds}
    size = {
        "stock": saved_bytes(stock),
        "welded": saved_bytes(welded),
        "quantized": saved_bytes(quantized),
        "C++": exported.stat().st_size,
    }
    print(f"{'model':<12}{'accuracy':>10}{'training s':>13}{'model bytes':>14}")
    for name, value in accuracy.items():
        spent = f"{seconds[name]:.1f}" if name in seconds else ""
        print(f"{name:<12}{value:>10.2%}{spent:>13}{size[name]:>14,}")
    print(
        f"\nC++ equals Python for {'every' if same else 'NOT every'} one of "
        f"{len(digits.test_images)} images; {exported} and its manifest are ready to serve"
    )
    if not same or min(accuracy.values()) < LOWEST_ACCURACY:
        sys.exit(f"digits: expected at least {LOWEST_ACCURACY:.0%} everywhere and C++ as Python")
    lost = accuracy["welded"] - accuracy["quantized"]
    if lost > MOST_LOST:
        sys.exit(f"digits: expected quantizing to cost at most {MOST_LOST:.1%}, got {lost:.1%}")


if __name__ == "__main__":
    main()

"""A short run of every operator family against stock PyTorch, for a wheel under another torch.

Needs torch, numpy and an installed torchweld, nothing else: ``python tests/smoke.py``.
"""

import copy
import tempfile
import warnings
from pathlib import Path

import torch
import torchweld as tw
from torch import nn


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    torch.manual_seed(1)
    for _ in range(5):
        x, y = torch.randn(8, 3, 12, 12), torch.randint(10, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main() -> None:
    stock = small_cnn()
    welded = tw.weld(copy.deepcopy(stock))
    assert len(tw.report(welded).converted) == 2
    expected = train(stock, torch.optim.AdamW(stock.parameters(), fused=True))
    actual = train(welded, tw.optim.AdamW(welded.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)

    x = torch.randn(4, 3, 12, 12)
    quantized = tw.quantize(tw.weld(welded.eval(), inference=True))
    with torch.no_grad():
        logits, floats = quantized(x), stock.eval()(x)
    noise = (logits - floats).norm() / floats.norm()
    assert noise < 0.05, noise

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # torch.jit's own deprecation notices.
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.pt"
        tw.export(quantized, (x,), path)
        assert torch.equal(torch.jit.load(path)(x), logits)

    compiled = torch.compile(welded, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), welded(x))
    capability = tw.info()["cpu capability"]
    print(f"torch {torch.__version__}: torchweld {tw.__version__} works ({capability})")


if __name__ == "__main__":
    main()

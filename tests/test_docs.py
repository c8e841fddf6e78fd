"""Examples in docstrings run and print what they say; links between the papers lead somewhere."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
import torchweld as tw
from torch import nn

ROOT = Path(__file__).parent.parent
PAPERS = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
MODULES = [
    info.name
    for info in pkgutil.walk_packages(tw.__path__, "torchweld.")
    if not info.name.endswith(("._C", "__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert failed == 0


def snippets(paper):
    return re.findall(r"```python\n(.*?)```", paper.read_text(), re.DOTALL)


def test_adamw_paper_runs():
    torch.manual_seed(0)
    names = {}
    for code in snippets(ROOT / "docs/adamw.md"):
        exec(code, names)
    assert names["low"].weight.isfinite().all()
    assert names["stock"].state[names["model"][0].weight]["step"] == 2


class Small(nn.Module):
    """What the papers on quantization call ``model``."""

    def __init__(self):
        super().__init__()
        self.embed, self.encoder = nn.Linear(48, 256), nn.Linear(256, 256)
        self.decoder, self.head = nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.decoder(self.encoder(self.embed(x)).relu()).relu())


def run_on_small(paper):
    torch.manual_seed(0)
    names = {"model": Small(), "make_model": Small, "nn": nn, "x": torch.randn(5, 48)}
    for code in snippets(ROOT / "docs" / paper):
        exec(code, names)
    return names


def test_quantized_linear_paper_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_on_small("quantized-linear.md")
    kinds = {name: type(module) for name, module in names["mixed"].named_children()}
    assert kinds["encoder"] is tw.nn.QuantizedLinear
    assert kinds["decoder"] is tw.nn.Int4Linear
    assert kinds["head"] is nn.Linear
    assert names["worst"].name in ("encoder", "decoder")
    assert torch.equal(names["other"].encoder.weight(), names["fast"].encoder.weight())
    assert names["base"].encoder.up.weight.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_migration_paper_runs(capsys):
    names = run_on_small("migrate-quantization.md")
    assert "integers of torch.ao" in str(tw.report(names["taken"]))
    converted = {row.name for row in tw.report(names["new"]).converted}
    assert converted == {"encoder"}
    assert float(capsys.readouterr().out.rstrip().splitlines()[-1][len("tensor(") : -1]) > 30


def test_cuda_paper_runs(capsys):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(2)]
    names = {"stock": nn.Sequential(*layers), "batches": batches}
    for code in snippets(ROOT / "docs/cuda.md"):
        exec(code, names)
    assert names["loss"].isfinite()
    assert tw.info()["cuda library"] in capsys.readouterr().out


def test_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 256)),
    )
    names = {"model": model}
    for code in snippets(ROOT / "README.md"):
        exec(code, names)
    assert names["y"].shape == (8, 16, 32, 32)
    assert {row.conversion for row in tw.report(names["fast"]).converted} == {
        "conv_bn_relu",
        "quantized_linear",
    }
    assert (tmp_path / "model.json").exists()


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(paper):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", paper.read_text()):
        if "://" not in target:
            assert (paper.parent / target).exists(), target

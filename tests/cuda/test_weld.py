"""The C++ program on a GPU."""

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.app.conftest import weld  # noqa: F401


@pytest.fixture
def exported(tmp_path):
    """A quantized model with an operator of ours and one of torch's, and its file."""
    torch.manual_seed(0)
    model = tw.quantize(nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).eval())
    tw.export(model, torch.randn(2, 256), tmp_path / "m.pt")
    return model, tmp_path / "m.pt"


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("batch", [1, 50])
def test_predicts(weld, exported, device, batch):  # noqa: F811
    model, path = exported
    x = torch.randn(batch, 256)
    with torch.no_grad():
        expected = model.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(weld.predict(path, x, options=["--device", device]), expected)


def test_no_such_gpu(weld, exported, tmp_path):  # noqa: F811
    reason = weld.fails("predict", exported[1], "--input", "x.npy", "--device", "cuda:99")
    assert reason.startswith("--device cuda:99: there are ")

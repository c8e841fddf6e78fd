"""torchvision's models, welded. Runs apart from the other tests: it wants the newest torch."""

import copy

import pytest
import torch

tv = pytest.importorskip("torchvision.models")
tw = pytest.importorskip("torchweld")

# Patterns of conv, bn and activation each model holds.
CASES = {"resnet18": 20, "mobilenet_v2": 52}


def losses(model: torch.nn.Module) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values = []
    for _ in range(2):
        loss = model(torch.randn(2, 3, 64, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize(("name", "patterns"), CASES.items())
def test_model(name, patterns):
    torch.manual_seed(0)
    stock = getattr(tv, name)(num_classes=10)
    for module in stock.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    welded = tw.weld(copy.deepcopy(stock))
    assert len(tw.report(welded).converted) == patterns, str(tw.report(welded))
    assert list(welded.state_dict()) == list(stock.state_dict())
    assert isinstance(welded, type(stock))
    assert losses(welded) == pytest.approx(losses(stock), rel=1e-3)

    x = torch.randn(2, 3, 64, 64)
    expected = stock.eval()(x)
    torch.testing.assert_close(welded.eval()(x), expected, rtol=1e-3, atol=1e-3)
    folded = tw.weld(stock, inference=True)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-3)

"""What holds on every device, on the CPU."""

import pytest

from tests.optim.on_device import *  # noqa: F403


@pytest.fixture
def device() -> str:
    return "cpu"

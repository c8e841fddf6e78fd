import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict

from tests.optim.distributed import processes
from tests.optim.distributed.model import CLIPPED, LAYOUTS, build, optimizer_for, train


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Checkpoints that one process saved after its first step."""
    folder = tmp_path_factory.mktemp("ranks")
    for layout in {**LAYOUTS, **CLIPPED}:
        model, options = build(layout)
        optimizer = optimizer_for(model, options)
        train(model, optimizer, None, range(1))
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=folder / f"{layout} of one", no_dist=True)
    return folder


@pytest.fixture(scope="session")
def ranks(folder):
    """What each process returned for a scenario, or what it raised."""
    mp.spawn(processes.main, (str(folder),), nprocs=2)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    def of(scenario, raises=False):
        both = [result.get(scenario, "Traceback: not reached") for result in results]
        for rank, result in enumerate(both):
            if not raises and isinstance(result, str) and result.startswith("Traceback"):
                pytest.fail(f"{scenario}, rank {rank}: {result}")
        return both

    return of

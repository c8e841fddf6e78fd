"""Two gloo processes compute what one process computes on the whole of the data, bit for bit."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.optim.distributed.model import (
    CLIPPED,
    INT8,
    LAYOUTS,
    STEPS,
    alone,
    alone_scaled,
    assert_near,
    assert_same,
    assert_same_in_shards,
    build,
    decoded,
    observe,
    optimizer_for,
    snapshot,
    train,
)  # fmt: skip
from tests.optim.distributed.processes import EVERY, SCALERS, WRAPPERS, resumed

# What torch says of a checkpoint that one process saves or loads.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize(
    ("wrapper", "layout"),
    [(wrapper, layout) for wrapper, (_, layouts) in WRAPPERS.items() for layout in layouts],
)
def test_two_processes(ranks, wrapper, layout):
    expected, norms = alone(layout)
    for ours in ranks(f"{wrapper}, {layout}"):
        if wrapper == "DDP":
            assert_same(ours["state"], expected)
        elif wrapper == "FSDP2 with replicas":  # whole on each, and given decoded
            assert_same(decoded(ours["state"]), decoded(expected))
        else:
            assert_same_in_shards(ours["state"], expected, layout)
        if layout in CLIPPED and "norms" in ours:
            assert all(norm > 0.5 for norm in norms)  # clipped indeed
            torch.testing.assert_close(ours["norms"], norms, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_scaler(ranks, wrapper, scaler):
    """An infinity in the shard of one process makes both skip the step."""
    expected, scales = alone_scaled(SCALERS[scaler]("cpu", init_scale=1024.0))
    assert scales == [1024, 512, 512]
    for ours in ranks(f"{wrapper}, {scaler} GradScaler"):
        assert ours["scales"] == scales
        assert_same_in_shards(ours["state"], expected, "clipped")
        assert all(values["step"] == STEPS - 1 for values in ours["state"].values())


def test_a_gradient_that_one_process_refuses(ranks):
    """All raise, none waits for the norm, and nothing has been written."""
    for rank, ours in enumerate(ranks("failing")):
        first, good, last = ours["messages"]
        assert good == ""
        assert first == last
        assert ("sparse gradients" if rank == 1 else "another process") in first
        assert all(values["step"] == 1 for values in ours["state"].values())


def test_a_process_without_gradients_takes_part_in_the_sums(ranks):
    first, second = ranks("lopsided")
    for ours, others in zip(first, second, strict=True):
        assert torch.equal(torch.stack(ours), torch.stack(others))
        norm, expected, update, expected_update = ours
        assert norm > 0.5  # clipped indeed
        torch.testing.assert_close(norm, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(update, expected_update, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_redundancy(ranks, layout):
    expected, _ = alone(layout, groups=False)
    first, second = ranks(f"ZeRO, {layout}")
    resumed = ranks(f"ZeRO resumed, {layout}")
    for params in first["params"], second["params"], *resumed:
        for name, param in params.items():
            assert torch.equal(param, expected[name]["param"]), name
    assert_same(
        first["states"],
        {n: {k: v for k, v in values.items() if k != "param"} for n, values in expected.items()},
    )
    assert 0 < first["held"] < len(expected)
    assert first["held"] + second["held"] == len(expected)


@pytest.mark.parametrize("option", ["max_grad_norm", "skip_nonfinite"])
def test_zero_redundancy_refuses(ranks, option):
    """Each rank's optimizer would see the norm of its own share."""
    for message in ranks(f"ZeRO with {option}"):
        assert message.startswith("ValueError: ")
        assert option in message
        assert "ZeroRedundancyOptimizer" in message


@pytest.mark.parametrize("layout", EVERY)
def test_statistics_and_averages(ranks, layout):
    """The statistics are those of all shards."""
    model, options = build(layout)
    expected = observe(model, optimizer_for(model, options), None)
    near = {"rtol": 0.1 if layout in INT8 else 1e-5, "atol": 0}
    for ours in ranks(f"observed, {layout}"):
        for seen, theirs in zip(ours["seen"], expected["seen"], strict=True):
            torch.testing.assert_close(seen, theirs, **near)
        if layout not in INT8:
            torch.testing.assert_close(ours["averages"], expected["averages"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layout", EVERY)
def test_gathered_checkpoint(ranks, layout):
    expected, _ = alone(layout)
    first, second = ranks(f"whole checkpoint, {layout}")
    for ours in first, second:
        assert_same_in_shards(ours["state"], expected, layout)
    assert len(first["gathered"]) == len(expected)


@pytest.mark.parametrize("layout", EVERY)
def test_checkpoint_of_the_same_number(ranks, layout):
    for ours in ranks(f"checkpoint of two, {layout}"):
        if layout in INT8:  # saved decoded, and encoded again
            assert_near(ours["again"], ours["state"], layout)
        else:
            assert_same(ours["again"], ours["state"])


@pytest.mark.parametrize("layout", [one for one in EVERY if one not in INT8])
def test_checkpoint_of_one_in_two(ranks, layout):
    expected, _ = alone(layout)
    for ours in ranks(f"checkpoint of one, {layout}"):
        assert_same_in_shards(ours["state"], expected, layout)


@pytest.mark.parametrize("layout", INT8)
def test_int8_checkpoint_of_unsharded_parameters_is_refused(ranks, layout):
    """It has codes in blocks of whole parameters, and not what shards are made from."""
    for message in ranks(f"checkpoint of one, {layout}", raises=True):
        assert "Missing key in checkpoint state_dict: optimizer.state." in message


@pytest.mark.parametrize("layout", [one for one in EVERY if one not in INT8])
def test_checkpoint_of_two_in_one(ranks, folder, layout):
    ranks(f"checkpoint of two, {layout}")
    model, options = build(layout)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = optimizer_for(model, options)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / f"{layout} of two", no_dist=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    train(model, optimizer, None, range(1, STEPS))
    assert_same_in_shards(snapshot(model, optimizer), alone(layout)[0], layout)


@pytest.mark.parametrize("layout", INT8)
def test_checkpoint_of_int8_in_another_number(ranks, folder, tmp_path, layout):
    ranks(f"checkpoint of two, {layout}")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours = resumed(None, layout, folder / f"{layout} of two")["state"]
    finally:
        dist.destroy_process_group()
    assert_near(ours, decoded(alone(layout)[0]), layout)

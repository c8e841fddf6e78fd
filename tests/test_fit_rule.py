"""The fit of the rule: thresholds are found, losses weigh more, C++ and Python say the same."""

import math
import random
import types
from pathlib import Path

import pytest
import torch

from benchmarks import fit_rule, sweep
from benchmarks.fit_rule import Sample, Tree


def sample(channels, pixels, **times):
    features = dict.fromkeys(fit_rule.FEATURES, 1) | {"s.channels": channels, "s.pixels()": pixels}
    return Sample(features, times)


def samples(seed, count=200):
    """Dense wins by half from 16 channels and 4096 pixels on, and loses as much elsewhere."""
    draw = random.Random(seed)
    for _ in range(count):
        channels, pixels = 2 ** draw.randint(0, 9), 2 ** draw.randint(4, 20)
        wins = channels >= 16 and pixels >= 4096
        yield sample(channels, pixels, aten=1.0, dense=0.5 if wins else 2.0)


def evaluate(tree, features):
    """The tree's C++ expression, for its features."""
    expression = str(tree).replace("&&", " and ").replace("||", " or ")
    expression = expression.replace("s.pixels()", "s.pixels")
    fields = {name.removeprefix("s.").removesuffix("()"): v for name, v in features.items()}
    names = fields | {"s": types.SimpleNamespace(**fields), "true": True, "false": False}
    return eval(expression, names)


def test_tree_finds_thresholds_and_says_the_same_in_cpp():
    trees = fit_rule.fit(list(samples(0)))
    assert list(trees) == ["dense"]
    held_out = list(samples(1))
    for one in held_out:
        wins = one.times["dense"] < one.times["aten"]
        assert fit_rule.choose(trees, one) == ("dense" if wins else "aten")
        assert evaluate(trees["dense"], one.features) == wins
    assert "at least 0.97 in 100.0%, worst 1.00" in fit_rule.verdict(trees, held_out)


@pytest.mark.parametrize("seed", range(20))
def test_every_tree_says_the_same_in_cpp(seed):
    draw = random.Random(seed)

    def tree(depth):
        if depth == 0 or draw.random() < 0.2:
            return Tree(draw.random() < 0.5)
        feature = draw.choice(list(fit_rule.FEATURES))
        return Tree(False, feature, draw.randint(1, 9), tree(depth - 1), tree(depth - 1))

    one = tree(4)
    for _ in range(50):
        features = {name: draw.randint(0, 10) for name in fit_rule.FEATURES}
        assert evaluate(one, features) == one(features)


def test_a_loss_weighs_more_than_a_gain():
    same = dict.fromkeys(fit_rule.FEATURES, 1)

    def decide(*speeds):
        return fit_rule.grow([(same, math.log(speed)) for speed in speeds], depth=3)[0](same)

    assert decide(*[1.2] * 10)
    assert not decide(*[1.2] * 10, *[0.8] * 5)
    assert decide(*[1.2] * 10, *[0.98] * 5)  # no loss, but the clock's


def test_winograd_has_to_beat_dense():
    slower = [sample(64, 4096, aten=2.0, dense=1.0, winograd=1.5) for _ in range(20)]
    assert fit_rule.choose(fit_rule.fit(slower), slower[0]) == "dense"
    faster = [sample(64, 4096, aten=2.0, dense=1.0, winograd=0.5) for _ in range(20)]
    assert fit_rule.choose(fit_rule.fit(faster), faster[0]) == "winograd"


def test_header_has_a_function_for_each_pass_and_algorithm():
    trees = fit_rule.fit(list(samples(0)))
    text = fit_rule.header({"forward": trees, "backward": trees})
    assert "inline bool dense_forward(" in text
    assert "inline bool dense_backward(" in text
    assert f"return {trees['dense']};" in text


def test_layers_are_drawn_again_from_their_seed():
    draws = [[next(layers) for _ in range(50)] for layers in map(sweep.layers, (0, 0, 1))]
    assert draws[0] == draws[1] != draws[2]
    assert {case.kernel for case in draws[0]} == {1, 3, 5, 7}
    assert {case.groups == 1 for case in draws[0]} == {True, False}


def test_sweep_writes_what_the_fit_reads(tmp_path, monkeypatch):
    path = tmp_path / "sweep.csv"
    case = sweep.ConvCase("", 1, 8, 24, 3, 10, stride=2)
    monkeypatch.setattr(sweep, "layers", lambda seed: iter([case]))
    monkeypatch.setattr(sweep.malloc, "enter", lambda state: None)
    monkeypatch.setattr("sys.argv", ["", "--count=1", "--rounds=1", f"--output={path}"])
    before = sweep.tw.config.convolution
    sweep.main()
    assert sweep.tw.config.convolution == before
    read = fit_rule.read([path])
    assert set(read) == {"forward", "backward", "folded", "folded_bf16"}
    for (one,) in read.values():
        assert one.features == {
            "s.channels": 8, "s.out_channels": 24, "s.kernel_width": 3, "s.stride_width": 2,
            "s.dilation_width": 1, "s.out_width": 5, "s.pixels()": 25,
            "threads": torch.get_num_threads(),
            "lanes": {"scal": 1, "avx2": 8, "avx5": 16}[sweep.tw.info()["cpu capability"][:4]],
        }  # fmt: skip
        assert one.times["aten"] > 0


RULE = Path(__file__).parent.parent / "benchmarks" / "results" / "rule"


def test_the_rule_in_use_is_the_one_the_sweeps_give():
    networks = [RULE / "networks.csv"] * fit_rule.NETWORKS
    learned = fit_rule.read([*sorted(RULE.glob("fit-*.csv")), *networks])
    rule = {name: fit_rule.fit(samples) for name, samples in learned.items()}
    header = Path(__file__).parent.parent / "csrc" / "ops" / "cpu" / "rule.h"
    assert header.read_text() == fit_rule.header(rule)
    # Off the layers it was fitted on.
    for name, samples in fit_rule.read(sorted(RULE.glob("check-*.csv"))).items():
        ratios = [s.times["aten"] / s.times[fit_rule.choose(rule[name], s)] for s in samples]
        assert sum(ratio >= 0.97 for ratio in ratios) >= 0.95 * len(ratios)
        assert fit_rule.geometric_mean(ratios) > 1.3

"""Hugging Face models, small and built from config, quantized every way as their users would.

`pip install --group integrations` brings transformers; `.ci/wheel` does.
"""

import copy
import io

import pytest
import torch
from torch import nn

tw = pytest.importorskip("torchweld")
transformers = pytest.importorskip("transformers")

# What they warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

# Least signal to noise in dB of the models' outputs. Noise of the layers adds up over the depth.
CONFIGS = {
    "int8": (tw.Int8(), 30),
    "int8 groups": (tw.Int8(input_group_size=32), 30),
    "weight only": (tw.Int8WeightOnly(), 33),
    "int4 g32": (tw.Int4(group_size=32), 12),
    "int4 g128": (tw.Int4(group_size=128), 10),
}
configs = pytest.mark.parametrize("config", CONFIGS)
# Layers of all sizes are taken: these models are small so that the tests are quick.
WIDTH, DEPTH = 64, 2


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def sizes(**others):
    return {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": 4, **others,
    }  # fmt: skip


def bert():
    config = transformers.BertConfig(vocab_size=99, max_position_embeddings=32, **sizes())
    ids = torch.randint(99, (2, 12))
    return transformers.BertModel(config), {"input_ids": ids}, "last_hidden_state"


def vit():
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=50, **sizes())
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, "logits"


def gpt2(depth=DEPTH):
    config = transformers.GPT2Config(
        vocab_size=99, n_positions=64, n_embd=WIDTH, n_layer=depth, n_head=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ids = torch.randint(3, 99, (2, 12))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids}, "logits"


MODELS = {"BERT": bert, "GPT-2": gpt2, "ViT": vit}
models = pytest.mark.parametrize("model", MODELS)


def make(name, config=None):
    """Give a model with the scale of trained weights, its input, the name of its output."""
    model, given, output = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    model.eval()
    if config is None:
        return model, given, output
    return model, tw.quantize(model, CONFIGS[config][0], keep_small=False), given, output


@torch.no_grad()
def run(model, given, output):
    return getattr(model(**given), output)


def decibels(got, expected):
    noise = (got.double() - expected.double()).norm()
    return 20 * torch.log10(expected.double().norm() / noise).item()


@models
@configs
def test_outputs_are_close(model, config):
    stock, quantized, given, output = make(model, config)
    expected, got = run(stock, given, output), run(quantized, given, output)
    assert got.dtype == expected.dtype
    assert decibels(got, expected) > CONFIGS[config][1]
    report = tw.report(quantized)
    # Six in a block of BERT and ViT, four in one of GPT-2, beside a pooler or a classifier.
    assert len(report.converted) == {"BERT": 6, "GPT-2": 4, "ViT": 6}[model] * DEPTH + (
        model != "GPT-2"
    )
    assert all(row.weight_sqnr > (19 if "int4" in config else 40) for row in report.converted)


def test_the_48_projections_of_gpt2_are_converted_and_its_tied_head_left_alone():
    with torch.device("meta"):
        names = [name for name, _ in gpt2(depth=12)[0].named_modules() if "h." in name]
    model = gpt2(depth=12)[0].eval()
    quantized = tw.quantize(model, keep_small=False)
    converted = [row.name for row in tw.report(quantized).converted]
    assert len(converted) == 48
    assert set(converted) < set(names)
    assert {name.rpartition(".")[2] for name in converted} == {"c_attn", "c_proj", "c_fc"}
    (left,) = tw.report(quantized).skipped
    assert left.name == "lm_head"
    assert "shared with" in left.detail
    assert quantized.lm_head.weight is quantized.transformer.wte.weight
    assert not any("Conv1D" in type(module).__name__ for module in quantized.modules())


@configs
def test_gpt2_generates(config):
    stock, quantized, given, _ = make("GPT-2", config)
    how = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(given["input_ids"])
    expected, got = (m.generate(**given, attention_mask=mask, **how) for m in (stock, quantized))
    assert got.shape == expected.shape
    # The cache of keys and values serves quantized layers: what is generated is what a forward over
    # all of it says.
    logits = run(quantized, {"input_ids": got[:, :-1]}, "logits")
    start = given["input_ids"].shape[1] - 1
    assert torch.equal(logits.argmax(-1)[:, start:], got[:, start + 1 :])
    if "int8" in config or config == "weight only":
        first = slice(None), slice(None, start + 3)
        assert torch.equal(got[first], expected[first])


@models
@configs
def test_state_dict_is_smaller_and_loads(model, config):
    _, quantized, given, output = make(model, config)
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    other = tw.quantize(MODELS[model]()[0].eval(), CONFIGS[config][0], keep_small=False)
    assert not torch.equal(run(other, given, output), run(quantized, given, output))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(other, given, output), run(quantized, given, output))
    rows = tw.report(quantized).converted
    share = sum(row.bytes_after for row in rows) / sum(row.bytes_before for row in rows)
    assert share < (0.16 if "int4" in config else 0.28)  # of small layers, whose biases weigh


@configs
def test_safetensors(config):
    """Canonical tensors are plain ones: another tool's format holds them as it does any."""
    safetensors = pytest.importorskip("safetensors.torch")
    _, quantized, given, output = make("BERT", config)
    other = tw.quantize(bert()[0].eval(), CONFIGS[config][0], keep_small=False)
    other.load_state_dict(safetensors.load(safetensors.save(quantized.state_dict())))
    assert torch.equal(run(other, given, output), run(quantized, given, output))


@models
def test_in_bfloat16(model):
    stock, given, output = make(model)
    half = copy.deepcopy(stock).bfloat16()
    quantized = tw.quantize(half, keep_small=False)
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    got = run(quantized, given, output)
    assert got.dtype == torch.bfloat16
    assert decibels(got, run(half, given, output)) > 25


@models
def test_after_weld_and_before(model):
    stock, given, output = make(model)
    welded = tw.weld(stock, inference=True)
    quantized = tw.quantize(welded, keep_small=False)
    assert decibels(run(quantized, given, output), run(stock, given, output)) > 28
    again = tw.weld(tw.quantize(stock, keep_small=False), inference=True)
    assert torch.equal(run(again, given, output), run(quantized, given, output))


def test_lora_over_a_frozen_int8_base():
    """Gradients reach adapters behind and before the quantized layers, and the loss falls."""
    stock, given, _ = make("GPT-2")
    model = tw.quantize(stock, keep_small=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.down = nn.Parameter(0.02 * torch.randn(4, base.in_features))
            self.up = nn.Parameter(torch.zeros(base.out_features, 4))

        def forward(self, x):
            return self.base(x) + x @ self.down.T @ self.up.T

    for block in model.transformer.h:
        block.attn.c_attn = Adapted(block.attn.c_attn)
        block.mlp.c_fc = Adapted(block.mlp.c_fc)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4 * DEPTH
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
    assert losses[-1] < losses[0] - 0.1


def test_bert_exports():
    _, quantized, given, output = make("BERT", "int8")
    expected = run(quantized, given, output)
    program = torch.export.export(quantized, (), given)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("torchweld.quantized_linear" in call for call in calls) == 6 * DEPTH + 1
    with torch.no_grad():
        got = program.module()(**given)
    assert torch.equal(got[output] if isinstance(got, dict) else getattr(got, output), expected)

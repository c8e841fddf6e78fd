"""Attention and the stock transformer layers, whose fast paths read float weights."""

import functools

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.reference.quantized_linear import sqnr

quantize = functools.partial(tw.quantize, keep_small=False)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*nested tensors is in prototype", "ignore:enable_nested_tensor is True"
)
E, B, L = 32, 3, 6
PADDING = torch.arange(L)[None] >= torch.tensor([L, 4, 2])[:, None]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def details(model):
    return {row.name: row.detail for row in tw.report(model)}


def test_attention():
    attention = nn.MultiheadAttention(E, 4, batch_first=True).eval()
    quantized = quantize(attention)
    x = randn(B, L, E)
    for ours, theirs in zip(quantized(x, x, x), attention(x, x, x), strict=True):
        assert sqnr(ours, theirs) > 30
    assert type(quantized) is tw.nn.MultiheadAttention
    assert type(quantized.out_proj) is tw.nn.QuantizedLinear
    assert details(quantized) == {"": "QuantizedLinear in tw.nn.MultiheadAttention"}
    assert details(tw.quantize(attention)) == {"": "too small to gain (32 x 32)"}


def test_excluding_a_projection_excludes_the_attention():
    for exclude in ("*.out_proj", nn.MultiheadAttention, "0", nn.Linear):
        model = nn.Sequential(nn.MultiheadAttention(E, 4))
        assert type(quantize(model, exclude=exclude)[0]) is nn.MultiheadAttention


def test_attention_used_twice_and_shared_weights():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, 4), "b": nn.MultiheadAttention(E, 4)})
    model["c"] = model["a"]
    quantized = quantize(model)
    assert quantized["a"] is quantized["c"]
    assert details(quantized)["a"].endswith("(also c)")
    model["b"].in_proj_weight = model["a"].in_proj_weight
    quantized = quantize(model)
    assert quantized["a"].in_proj_weight is quantized["b"].in_proj_weight
    assert details(quantized)["a"] == "in_proj_weight is shared with b.in_proj_weight (also c)"


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder(batch_first, norm_first, training, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        E, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    quantized = quantize(encoder)
    assert type(quantized.layers[1]) is nn.TransformerEncoderLayer
    assert len(tw.report(quantized).converted) == 6
    x = randn(B, L, E) if batch_first else randn(L, B, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    with torch.set_grad_enabled(grad):
        assert sqnr(quantized(x), encoder(x)) > 25
        assert sqnr(quantized(x, mask), encoder(x, mask)) > 25
        ours, theirs = (m(x, src_key_padding_mask=PADDING) for m in (quantized, encoder))
        kept = ~PADDING if batch_first else ~PADDING.T  # stock's fast path writes zeros elsewhere
        assert sqnr(ours[kept], theirs[kept]) > 25


def test_encoder_layers_whose_attention_stays():
    layer = nn.TransformerEncoderLayer(E, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    x = randn(B, L, E)
    quantized = quantize(encoder, exclude=nn.MultiheadAttention)
    with torch.no_grad():
        assert torch.equal(
            quantized(x, src_key_padding_mask=PADDING), encoder(x, src_key_padding_mask=PADDING)
        )
    reason = "TransformerEncoderLayer reads its weight, as its attention stays float"
    assert details(quantized)["layers.0.linear1"] == reason
    # The other way round: nothing reads what is float.
    quantized = quantize(encoder, exclude="*.linear?")
    assert [row.name for row in tw.report(quantized).converted] == ["layers.0.self_attn"]
    assert sqnr(quantized(x), encoder(x)) > 25


@pytest.mark.parametrize("training", [True, False])
def test_decoder_and_the_whole(training):
    torch.manual_seed(0)
    x, memory = randn(B, L, E), randn(B, 2 * L, E)
    decoder = nn.TransformerDecoderLayer(E, 4, 64, dropout=0.0, batch_first=True).train(training)
    quantized = quantize(decoder)
    assert len(tw.report(quantized).converted) == 4
    assert sqnr(quantized(x, memory), decoder(x, memory)) > 25

    whole = nn.Transformer(E, 4, 1, 1, 64, dropout=0.0, batch_first=True).train(training)
    quantized = quantize(whole)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    arguments = {"tgt_mask": mask, "tgt_is_causal": True, "memory_key_padding_mask": PADDING}
    with torch.no_grad():
        got, expected = (
            m(x, x, src_key_padding_mask=PADDING, **arguments) for m in (quantized, whole)
        )
    assert sqnr(got, expected) > 25


def test_compiled_with_a_mask_whose_shape_is_looked_for():
    stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval()
    model = tw.quantize(stock, keep_small=False)
    x, mask = torch.randn(2, 5, 32), nn.Transformer.generate_square_subsequent_mask(5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for padding in (None, torch.zeros(2, 5)):
            expected = model(x, mask, padding)
            torch.testing.assert_close(compiled(x, mask, padding), expected, rtol=1e-5, atol=1e-5)


def test_compiled_and_exported():
    layer = nn.TransformerEncoderLayer(E, 4, 64, batch_first=True)
    quantized = quantize(nn.TransformerEncoder(layer, 2).eval())
    x = randn(B, L, E)
    with torch.no_grad():
        expected = quantized(x)
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(quantized, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.jit.trace(quantized, x)(x), expected)


def test_state_dict_keys():
    layer = nn.TransformerEncoderLayer(E, 4, 64, bias=False)
    keys = set(quantize(layer).state_dict())
    linears = ["linear1", "linear2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out"))]
    assert keys == {f"{x}.{y}" for x in linears for y in ("qweight", "weight_scale")} | {
        "norm1.weight",
        "norm2.weight",
    }

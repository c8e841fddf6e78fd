"""Attention with projections that are modules: the stock module's answers, in every mode."""

import copy
import io
import itertools

import pytest
import torch
import torchweld as tw
from torch import nn

E, H, L, S, B = 32, 4, 5, 7, 3


def make(**arguments):
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(E, H, **arguments).eval()
    for parameter in stock.parameters():  # biases start as zeros
        nn.init.normal_(parameter, std=0.3)
    return stock, tw.nn.MultiheadAttention.from_float(stock)


def inputs(batch_first, kdim=E, vdim=E):
    def of(length, width):
        x = torch.randn(B, length, width, generator=torch.Generator().manual_seed(length + width))
        return x if batch_first else x.transpose(0, 1)

    return of(L, E), of(S, kdim), of(S, vdim)


def same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


PADDING = torch.arange(S)[None] >= torch.tensor([S, 4, 2])[:, None]
CAUSAL = torch.ones(L, S, dtype=torch.bool).triu(1)
PER_HEAD = torch.randn(B * H, L, S, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bias": False},
        {"kdim": 20, "vdim": 24},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    ],
    ids=str,
)
def test_cross_attention(arguments, batch_first):
    stock, ours = make(batch_first=batch_first, **arguments)
    qkv = inputs(batch_first, stock.kdim, stock.vdim)
    additive = torch.zeros(L, S).masked_fill(CAUSAL, -10.0)
    for padding, mask, need in itertools.product(
        (None, PADDING), (None, CAUSAL, additive, PER_HEAD), (True, False)
    ):
        if padding is not None and mask is not None and mask.dtype != torch.bool:
            padding = torch.zeros(B, S).masked_fill(padding, float("-inf"))
        how = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need}
        same(ours(*qkv, **how), stock(*qkv, **how))
    how = {"average_attn_weights": False}
    same(ours(*qkv, **how), stock(*qkv, **how))


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_and_causal_hint(batch_first):
    stock, ours = make(batch_first=batch_first)
    x = inputs(batch_first)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    padding = PADDING[:, :L]
    for need in (True, False):
        for key_padding_mask in (None, padding.float().masked_fill(padding, float("-inf"))):
            how = {"attn_mask": mask, "is_causal": True, "need_weights": need}
            how["key_padding_mask"] = key_padding_mask
            same(ours(x, x, x, **how), stock(x, x, x, **how))


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first):
    stock, ours = make(batch_first=batch_first)
    qkv = [x.select(0 if batch_first else 1, 1) for x in inputs(batch_first)]
    padding = PADDING[1]
    same(ours(*qkv, key_padding_mask=padding), stock(*qkv, key_padding_mask=padding))
    same(
        ours(*qkv, attn_mask=CAUSAL, need_weights=False),
        stock(*qkv, attn_mask=CAUSAL, need_weights=False),
    )


def test_training_and_gradients():
    stock, ours = make(dropout=0.5)
    x = inputs(False)[0]
    same(ours(x, x, x), stock(x, x, x))
    ours(x, x, x)[0].sum().backward()
    stock(x, x, x)[0].sum().backward()
    gradient = torch.cat([getattr(ours, f"{p}_proj").weight.grad for p in "qkv"])
    torch.testing.assert_close(gradient, stock.in_proj_weight.grad, rtol=1e-4, atol=1e-4)
    ours.train()
    for need in (True, False):
        assert not torch.equal(ours(x, x, x, need_weights=need)[0], ours.eval()(x, x, x)[0])
        ours.train()


def test_shares_nothing_and_keeps_what_trains():
    stock, _ = make(add_bias_kv=True)
    stock.requires_grad_(False)
    ours = tw.nn.MultiheadAttention.from_float(stock)
    mine = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert len(mine) == 10
    assert not mine & {p.untyped_storage().data_ptr() for p in stock.parameters()}
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.training
    stock.in_proj_weight.requires_grad_()
    ours = tw.nn.MultiheadAttention.from_float(stock)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
    }


@pytest.mark.parametrize("arguments", [{}, {"kdim": 20, "vdim": 24, "add_bias_kv": True}], ids=str)
def test_to_float(arguments):
    stock, ours = make(**arguments)
    back = ours.to_float()
    assert type(back) is nn.MultiheadAttention
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in stock.state_dict().items())
    ours.q_proj = nn.Identity()
    with pytest.raises(TypeError, match="to_float: q_proj: expected a linear layer, got Identity"):
        ours.to_float()


def test_compilers_and_files():
    stock, ours = make(batch_first=True)
    ours = tw.quantize(stock, keep_small=False)
    qkv = inputs(True)
    expected = ours(*qkv)
    same(torch.compile(ours, fullgraph=True, backend="aot_eager")(*qkv), expected)
    same(torch.export.export(ours, qkv).module()(*qkv), expected)
    for module in (torch.jit.script(ours), torch.jit.trace(ours, qkv)):
        file = io.BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        same(torch.jit.load(file)(*qkv), expected)
    same(copy.deepcopy(ours)(*qkv), expected)
    other = tw.quantize(make(batch_first=True)[0], keep_small=False)
    other.load_state_dict(ours.state_dict())
    same(other(*qkv), expected)
    assert {key.split(".")[0] for key in ours.state_dict()} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }


def test_refuses():
    _, ours = make(batch_first=True)
    x = inputs(True)[0]
    with pytest.raises(ValueError, match=r"attn_mask: expected the causal mask .*, got None"):
        ours(x, x, x, is_causal=True)
    for mask in (torch.ones(L, L).long(), torch.ones(L, L, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="attn_mask: expected bool or floating point, got"):
            ours(x, x, x, attn_mask=mask)
    for shape in ((1, L), (L, L + 1), (B, L, L), (B, H, L, L)):
        with pytest.raises(ValueError, match=r"attn_mask: expected \[.*5, 5\], got \["):
            ours(x, x, x, attn_mask=torch.zeros(shape))
    with pytest.raises(ValueError, match="key_padding_mask: expected bool or floating point"):
        ours(x, x, x, key_padding_mask=torch.ones(B, L).long())
    for shape in ((L,), (L, B), (B, L + 1)):
        with pytest.raises(ValueError, match=r"key_padding_mask: expected \[3, 5\], got \["):
            ours(x, x, x, key_padding_mask=torch.zeros(shape))
    with pytest.raises(ValueError, match=r"query: expected 2 or 3 dimensions, got \[1, 3, 5, 32\]"):
        ours(x[None], x, x)
    with pytest.raises(ValueError, match=r"key: expected 3 dimensions as of query, got \[5, 32\]"):
        ours(x, x[0], x)
    with pytest.raises(ValueError, match=r"value: expected as many rows as key has, \[3, 5\], got"):
        ours(x, x, x[:, 1:])
    nested = torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged)
    with pytest.raises(ValueError, match="query: expected a dense tensor, got a nested one"):
        ours(nested, nested, nested)

    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match=r"expected an nn\.MultiheadAttention, got Own"):
        tw.nn.MultiheadAttention.from_float(Own(E, H))

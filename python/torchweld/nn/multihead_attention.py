"""``nn.MultiheadAttention`` with projections that are modules."""

# No postponed annotations here: TorchScript evaluates those of forward.
from collections.abc import Callable
from typing import List, Optional  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class MultiheadAttention(nn.Module):
    """An ``nn.MultiheadAttention`` whose projections are modules of their own.

    The stock module reads four weights, which only float tensors can be. This one calls ``q_proj``,
    ``k_proj``, ``v_proj`` and ``out_proj``, of which :func:`torchweld.quantize` makes quantized
    layers. The forward is called as the stock one and computes the same; keys of the state_dict are
    those of the projections (``q_proj.qweight``, ...), ``bias_k`` and ``bias_v``. Built by
    :meth:`from_float`.

    Note:
        ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` see in ``in_proj_bias``, which
        is None, that their fast path, which reads float weights, is not for them. What that path
        does beside being fast goes with it: nested tensors as input, and zeros where a padding mask
        masks the output. ``torch.jit.script`` compiles that path unseen and fails on it: trace a
        model that holds those layers.

    Example:
        >>> import torch, torchweld as tw
        >>> stock = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> attention = tw.nn.MultiheadAttention.from_float(stock)
        >>> x = torch.randn(2, 10, 64)
        >>> torch.allclose(attention(x, x, x)[0], stock(x, x, x)[0], atol=1e-5)
        True
    """

    bias_k: Optional[Tensor]  # noqa: UP045
    bias_v: Optional[Tensor]  # noqa: UP045

    def __init__(self, stock: nn.MultiheadAttention, projections: dict[str, nn.Module]):
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = stock.embed_dim, stock.kdim, stock.vdim
        self.num_heads, self.head_dim = stock.num_heads, stock.head_dim
        self.dropout, self.batch_first = stock.dropout, stock.batch_first
        self.add_zero_attn = stock.add_zero_attn
        # What the stock transformer layers ask before they take their fast path.
        self._qkv_same_embed_dim = False
        self.in_proj_weight = self.in_proj_bias = None
        self.q_proj, self.k_proj = projections["q_proj"], projections["k_proj"]
        self.v_proj, self.out_proj = projections["v_proj"], projections["out_proj"]
        for name in ("bias_k", "bias_v"):
            bias = getattr(stock, name)
            self.register_parameter(name, None if bias is None else _copy_of(bias))
        self.train(stock.training)

    @classmethod
    def from_float(
        cls,
        attention: nn.MultiheadAttention,
        convert: Callable[[nn.Linear], nn.Module] = lambda linear: linear,
    ) -> "MultiheadAttention":
        """Build one from the stock module. It shares no memory with it.

        Args:
            attention: the stock module; it is not changed.
            convert: makes the projection of an ``nn.Linear``.

        Returns:
            The module, in the same train/eval mode.

        Raises:
            TypeError: ``attention`` is not an ``nn.MultiheadAttention`` itself.
        """
        if type(attention) is not nn.MultiheadAttention:
            raise TypeError(
                "MultiheadAttention.from_float: expected an nn.MultiheadAttention, got "
                f"{type(attention).__name__}"
            )
        floats = projections_of(attention)
        for linear in floats.values():
            for name, parameter in list(linear.named_parameters()):
                setattr(linear, name, _copy_of(parameter))
        return cls(attention, {name: convert(linear) for name, linear in floats.items()})

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor] = None,  # noqa: UP045
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Optional[Tensor]]:  # noqa: UP045
        """Attend, as ``nn.MultiheadAttention`` does, which describes the arguments."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "MultiheadAttention: query: expected a dense tensor, got a nested one; pad it and "
                "give a key_padding_mask"
            )
        if attn_mask is None and is_causal:
            raise ValueError(
                "MultiheadAttention: attn_mask: expected the causal mask that is_causal hints at, "
                "got None"
            )
        _check_dims(query, key, value)
        is_batched = query.dim() == 3
        q = self._heads(self.q_proj(query), is_batched)
        k = self._heads(self.k_proj(key), is_batched)
        v = self._heads(self.v_proj(value), is_batched)
        mask = self._mask(attn_mask, key_padding_mask, q, k, is_batched)
        bias_k, bias_v = self.bias_k, self.bias_v
        if bias_k is not None and bias_v is not None:
            rows, one = [k.shape[0], -1, -1, -1], [1, self.num_heads, 1, self.head_dim]
            k = torch.cat([k, bias_k.to(k.dtype).view(one).expand(rows)], 2)
            v = torch.cat([v, bias_v.to(v.dtype).view(one).expand(rows)], 2)
        if self.add_zero_attn:
            k, v = F.pad(k, [0, 0, 0, 1]), F.pad(v, [0, 0, 0, 1])
        if mask is not None and mask.shape[3] < k.shape[2]:
            mask = F.pad(mask, [0, k.shape[2] - mask.shape[3]])

        weights: Optional[Tensor] = None  # noqa: UP045
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(2, 3)
            if mask is not None:
                scores = scores + mask
            weights = F.dropout(scores.softmax(3), dropout)
            output = weights @ v
            if average_attn_weights:
                weights = weights.mean(1)
            if not is_batched:
                weights = weights.squeeze(0)
        else:
            # nn.TransformerEncoder looks into the mask for the hint: no branch a graph can hold.
            may_hint = not torch.compiler.is_compiling() and key_padding_mask is None
            causal = may_hint and is_causal and k.shape[2] == q.shape[2]
            output = F.scaled_dot_product_attention(
                q, k, v, None if causal else mask, dropout, causal
            )
        output = output.transpose(1, 2) if self.batch_first else output.permute(2, 0, 1, 3)
        output = output.flatten(2)
        if not is_batched:
            output = output.squeeze(0 if self.batch_first else 1)
        return self.out_proj(output), weights

    def _heads(self, x: Tensor, is_batched: bool) -> Tensor:
        """Rows of features to ``[batch, heads, length, head_dim]``."""
        if not is_batched:
            x = x.unsqueeze(0 if self.batch_first else 1)
        x = x.unflatten(2, [self.num_heads, self.head_dim])
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _mask(
        self,
        attn_mask: Optional[Tensor],  # noqa: UP045
        key_padding_mask: Optional[Tensor],  # noqa: UP045
        q: Tensor,
        k: Tensor,
        is_batched: bool,
    ) -> Optional[Tensor]:  # noqa: UP045
        """Both masks as one that is added to the scores."""
        mask: Optional[Tensor] = None  # noqa: UP045
        batch, to, of = q.shape[0], q.shape[2], k.shape[2]
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3
            shape = [batch * self.num_heads, to, of] if per_head else [to, of]
            mask = _added("attn_mask", attn_mask, shape, q)
            if per_head:
                mask = mask.view(batch, self.num_heads, to, of)
            else:
                mask = mask.expand(1, 1, to, of)
        if key_padding_mask is not None:
            shape = [batch, of] if is_batched else [of]
            added = _added("key_padding_mask", key_padding_mask, shape, q).view(batch, 1, 1, of)
            mask = added if mask is None else mask + added
        return mask

    @torch.jit.unused
    def to_float(self) -> nn.MultiheadAttention:
        """Return the stock module with the projections' float weights.

        Raises:
            TypeError: a projection is neither an ``nn.Linear`` nor has ``to_float``.
        """
        floats: dict[str, nn.Linear] = {}
        for name in _PROJECTIONS:
            projection = getattr(self, name)
            convert = getattr(projection, "to_float", None)
            float_ = convert() if callable(convert) else projection
            if not isinstance(float_, nn.Linear):
                raise TypeError(
                    f"MultiheadAttention.to_float: {name}: expected a linear layer, got "
                    f"{type(projection).__name__}"
                )
            floats[name] = float_
        out = floats["out_proj"].weight
        stock = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, floats["q_proj"].bias is not None,
            self.bias_k is not None, self.add_zero_attn, self.kdim, self.vdim, self.batch_first,
            out.device, out.dtype,
        )  # fmt: skip
        with torch.no_grad():
            for name, linear in projections_of(stock).items():
                linear.weight.copy_(floats[name].weight)
                if linear.bias is not None:
                    linear.bias.copy_(floats[name].bias)
            for name in ("bias_k", "bias_v"):
                if getattr(self, name) is not None:
                    getattr(stock, name).copy_(getattr(self, name))
        return stock.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, as ``print(module)`` shows them."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}"
        )


def projections_of(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """The four projections of a stock module as linear layers, which share its memory."""
    out = attention.out_proj
    if attention._qkv_same_embed_dim:
        weights = _chunks(attention.in_proj_weight, 3)
    else:
        weights = [_chunks(getattr(attention, f"{x}_proj_weight"), 1)[0] for x in "qkv"]
    weights += _chunks(out.weight, 1)
    biases = [*_chunks(attention.in_proj_bias, 3), *_chunks(out.bias, 1)]
    linears = {}
    for name, weight, bias in zip(_PROJECTIONS, weights, biases, strict=True):
        assert weight is not None
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = weight
        linear.register_parameter("bias", bias)
        linears[name] = linear.train(attention.training)
    return linears


def _chunks(parameter: Tensor | None, count: int) -> list[nn.Parameter | None]:
    """Parts of a parameter, which share its memory and train as it does."""
    if parameter is None:
        return [None] * count
    parts = parameter.detach().chunk(count)
    return [nn.Parameter(part, requires_grad=parameter.requires_grad) for part in parts]


def _copy_of(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


# Sizes are not compared in a trace, which would freeze them.


def _check_dims(query: Tensor, key: Tensor, value: Tensor) -> None:
    dims = query.dim()
    if dims != 2 and dims != 3:
        raise ValueError(
            f"MultiheadAttention: query: expected 2 or 3 dimensions, got {list(query.shape)}"
        )
    if key.dim() != dims:
        raise ValueError(
            f"MultiheadAttention: key: expected {dims} dimensions as of query, got "
            f"{list(key.shape)}"
        )
    if not torch.jit.is_tracing() and key.shape[:-1] != value.shape[:-1]:  # type: ignore[attr-defined]
        raise ValueError(
            f"MultiheadAttention: value: expected as many rows as key has, {list(key.shape[:-1])}, "
            f"got {list(value.shape[:-1])}"
        )


def _added(name: str, mask: Tensor, shape: List[int], q: Tensor) -> Tensor:  # noqa: UP006
    """A mask as a tensor to add: a boolean one is minus infinity where it is true."""
    if not torch.jit.is_tracing() and list(mask.shape) != shape:  # type: ignore[attr-defined]
        raise ValueError(f"MultiheadAttention: {name}: expected {shape}, got {list(mask.shape)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"MultiheadAttention: {name}: expected bool or floating point, got {mask.dtype}"
        )
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
    return mask.to(q.dtype)

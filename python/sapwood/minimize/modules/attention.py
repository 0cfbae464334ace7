"""Attention whose heads have lost different dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood import _check

__all__ = ["HeadBlock", "RaggedAttention"]


@dataclass(frozen=True)
class HeadBlock:
    """Rows or columns that one head keeps: ``weight`` ((d, in) rows) and ``bias`` ((d,) or None).

    Example:
        >>> import torch
        >>> from sapwood.minimize import HeadBlock
        >>> HeadBlock(torch.ones(2, 8), torch.zeros(2)).weight.shape
        torch.Size([2, 8])
    """

    weight: Tensor
    bias: Tensor | None = None


class RaggedAttention(nn.Module):
    """Multi-head attention with separate widths for QK, V, input and output, and a frozen scale.

    Heads of different widths are padded with zeros to common ones, which changes nothing: a zero
    dimension adds 0 to every score, a zero value adds 0 to every output. The scale stays that of
    the original width.

    Example:
        >>> import torch
        >>> from sapwood.minimize import RaggedAttention
        >>> attention = RaggedAttention(16, 16, heads=3, qk_width=2, v_width=4, scale=8**-0.5)
        >>> output, weights = attention(*3 * [torch.randn(2, 5, 16)])
        >>> output.shape, weights
        (torch.Size([2, 5, 16]), None)

    It is called as ``nn.MultiheadAttention`` is and returns a pair, of which the second is always
    None: the average of attention weights over removed heads cannot be known.

    Args:
        query_width: channels of the query.
        out_width: channels of the output.
        heads: query heads, at least 1.
        qk_width: dimensions of the scores, per head, at least 1.
        v_width: dimensions of the values, per head, at least 1.
        scale: factor of the scores; one over the root of the *original* width as a rule.
        key_width: channels of the key; None takes ``query_width``.
        value_width: channels of the value; None takes ``key_width``.
        kv_of_head: for every query head the key-value head that it reads; None gives each its own.
        bias: whether the projections of query, key and value have biases.
        out_bias: whether the output projection has one.
        batch_first: inputs are (batch, tokens, channels), else (tokens, batch, channels). Without
            a batch (tokens, channels) is accepted too.
        dropout: of attention weights while training.
        device: as ``nn.Linear``.
        dtype: as ``nn.Linear``.

    Raises:
        ValueError: if a width is below 1 or ``kv_of_head`` is not a map of heads onto 0 .. m - 1.
    """

    def __init__(
        self,
        query_width: int,
        out_width: int,
        *,
        heads: int,
        qk_width: int,
        v_width: int,
        scale: float,
        key_width: int | None = None,
        value_width: int | None = None,
        kv_of_head: Sequence[int] | None = None,
        bias: bool = True,
        out_bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        widths = {"query_width": query_width, "out_width": out_width, "heads": heads}
        for name, size in {**widths, "qk_width": qk_width, "v_width": v_width}.items():
            if size < 1:
                _check.fail(ValueError, "RaggedAttention", name, "be at least 1", size)
        key_width = query_width if key_width is None else key_width
        value_width = key_width if value_width is None else value_width
        self.kv_of_head = _check_kv(heads, kv_of_head)
        kv_heads = max(self.kv_of_head) + 1
        self.heads, self.kv_heads = heads, kv_heads
        self.qk_width, self.v_width, self.scale = qk_width, v_width, scale
        self.batch_first, self.dropout = batch_first, dropout
        kwargs = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(query_width, heads * qk_width, bias, **kwargs)
        self.k_proj = nn.Linear(key_width, kv_heads * qk_width, bias, **kwargs)
        self.v_proj = nn.Linear(value_width, kv_heads * v_width, bias, **kwargs)
        self.out_proj = nn.Linear(heads * v_width, out_width, out_bias, **kwargs)

    @classmethod
    def from_heads(
        cls,
        q: Sequence[HeadBlock],
        k: Sequence[HeadBlock],
        v: Sequence[HeadBlock],
        out: Sequence[Tensor],
        out_bias: Tensor | None,
        *,
        scale: float,
        kv_of_head: Sequence[int] | None = None,
        round_to: int = 1,
        batch_first: bool = True,
        dropout: float = 0.0,
    ) -> RaggedAttention:
        """Pads heads of different widths with zeros to common ones.

        Args:
            q: one block of rows per query head; a head without rows gives uniform attention.
            k: one block per key-value head, as wide as the blocks of its query heads.
            v: one block per key-value head.
            out: per query head the columns (out_width, d_v) of the output projection that read it.
            out_bias: (out_width,) or None.
            scale: factor of the scores.
            kv_of_head: as in the constructor.
            round_to: the common widths are rounded up to a multiple.
            batch_first: as in the constructor.
            dropout: as in the constructor.

        Returns:
            The module, in training mode.

        Raises:
            ValueError: if the numbers of blocks or their widths do not agree.
        """
        where = "RaggedAttention.from_heads"
        mapping = _check_kv(len(q), kv_of_head)
        _check_blocks(where, q, k, v, out, mapping)
        qk_width = _common((block.weight for block in (*q, *k)), round_to)
        v_width = _common((block.weight for block in v), round_to)
        biases = any(block.bias is not None for block in (*q, *k, *v))
        module = cls(
            q[0].weight.shape[1],
            out[0].shape[0],
            heads=len(q),
            qk_width=qk_width,
            v_width=v_width,
            scale=scale,
            key_width=k[0].weight.shape[1],
            value_width=v[0].weight.shape[1],
            kv_of_head=mapping,
            bias=biases,
            out_bias=out_bias is not None,
            batch_first=batch_first,
            dropout=dropout,
            device=q[0].weight.device,
            dtype=q[0].weight.dtype,
        )
        with torch.no_grad():
            for layer, blocks, width in (
                (module.q_proj, q, qk_width),
                (module.k_proj, k, qk_width),
                (module.v_proj, v, v_width),
            ):
                _fill(layer, blocks, width)
            module.out_proj.weight.copy_(torch.cat([_padded(o.T, v_width) for o in out]).T)
            if out_bias is not None:
                module.out_proj.bias.copy_(out_bias)
        return module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attends; arguments and shapes are those of ``nn.MultiheadAttention``.

        Masks are boolean (True hides) or added to the scores. ``is_causal`` is a hint about
        ``attn_mask``, as there; alone it hides later keys.
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self._split(self.q_proj(query), self.heads)
        k = self._shared(self._split(self.k_proj(key), self.kv_heads))
        v = self._shared(self._split(self.v_proj(value), self.kv_heads))
        hidden = _merge_masks(attn_mask, key_padding_mask, q)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=hidden,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal and hidden is None,
            scale=self.scale,
        )
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None
        return (output if self.batch_first else output.transpose(0, 1)), None

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads * d) -> (B, heads, T, d)."""
        split: Tensor = x.unflatten(2, (heads, -1))
        return split.transpose(1, 2)

    def _shared(self, x: Tensor) -> Tensor:
        """(B, kv_heads, T, d) -> (B, heads, T, d)."""
        if self.kv_heads == self.heads:
            return x
        return torch.stack([x[:, kv] for kv in self.kv_of_head], 1)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, qk_width={self.qk_width}, "
            f"v_width={self.v_width}, scale={self.scale:.6g}"
        )


def _check_kv(heads: int, kv_of_head: Sequence[int] | None) -> tuple[int, ...]:
    mapping = tuple(range(heads)) if kv_of_head is None else tuple(kv_of_head)
    if len(mapping) != heads or sorted(set(mapping)) != list(range(len(set(mapping)))):
        expected = f"map {heads} heads onto 0 .. m - 1"
        _check.fail(ValueError, "RaggedAttention", "kv_of_head", expected, list(mapping))
    return mapping


def _check_blocks(
    where: str,
    q: Sequence[HeadBlock],
    k: Sequence[HeadBlock],
    v: Sequence[HeadBlock],
    out: Sequence[Tensor],
    mapping: tuple[int, ...],
) -> None:
    kv_heads = max(mapping, default=-1) + 1
    for name, blocks, count in (("k", k, kv_heads), ("v", v, kv_heads), ("out", out, len(q))):
        if len(blocks) != count:
            _check.fail(ValueError, where, name, f"have {count} blocks", len(blocks))
    for head, kv in enumerate(mapping):
        if q[head].weight.shape[0] != k[kv].weight.shape[0]:
            expected = f"have {k[kv].weight.shape[0]} rows in head {head}, as its keys"
            _check.fail(ValueError, where, "q", expected, q[head].weight.shape[0])
        if out[head].shape[1] != v[kv].weight.shape[0]:
            expected = f"have {v[kv].weight.shape[0]} columns in head {head}, as its values"
            _check.fail(ValueError, where, "out", expected, out[head].shape[1])


def _common(weights: Iterable[Tensor], round_to: int) -> int:
    widest = max([1, *(len(weight) for weight in weights)])
    return -(-widest // round_to) * round_to


def _padded(rows: Tensor, width: int) -> Tensor:
    """(d, n) -> (width, n), new rows zero."""
    return F.pad(rows, (0, 0, 0, width - rows.shape[0]))


def _fill(layer: nn.Linear, blocks: Sequence[HeadBlock], width: int) -> None:
    layer.weight.copy_(torch.cat([_padded(block.weight, width) for block in blocks]))
    if layer.bias is not None:
        biases = [
            block.weight.new_zeros(len(block.weight)) if block.bias is None else block.bias
            for block in blocks
        ]
        layer.bias.copy_(torch.cat([F.pad(b, (0, width - len(b))) for b in biases]))


def _merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor
) -> Tensor | None:
    """One additive mask, broadcastable to (B, heads, T, S), or None."""
    merged: Tensor | None = None
    if attn_mask is not None:
        merged = _additive(attn_mask, q)
        if merged.dim() == 3:
            if merged.shape[0] != q.shape[0]:
                # Per head of the original module, whose heads are no longer all there.
                expected = "be the same for all heads: (T, S) or (batch, T, S)"
                actual = f"shape {tuple(attn_mask.shape)}"
                _check.fail(ValueError, "RaggedAttention", "attn_mask", expected, actual)
            merged = merged[:, None]
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q)[:, None, None, :]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(q.dtype)

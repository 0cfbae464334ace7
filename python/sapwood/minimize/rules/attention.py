"""Attention in its common form: dimensions of the scores, dimensions of the values, heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sapwood.minimize._facts import CONSTANT, LIVE, Facts, compress
from sapwood.minimize._leaves import Site
from sapwood.minimize.attention_layer import AttentionLayer, Projection
from sapwood.minimize.modules import RaggedAttention
from sapwood.minimize.rules._registry import Step, opaque
from sapwood.minimize.rules.linear import channel_view, row_kinds

__all__ = ["attention"]


def attention(
    step: Step, site: Site, module: RaggedAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Registers the three projections and the output; see :class:`AttentionLayer`."""
    if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
        return opaque(step, f"{site.path} is not finite")
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    masked = any(given.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
    for name in ("key_padding_mask", "attn_mask"):
        if isinstance(given.get(name), Facts):
            step.pin(given[name], f"{site.path} takes it as a mask")
    analysis = step.analysis
    q = _projection(step, given["query"], module.q_proj, module.heads)
    k = _projection(step, given["key"], module.k_proj, module.kv_heads)
    v = _projection(step, given["value"], module.v_proj, module.kv_heads)
    out = module.out_proj
    reads = (out.weight.detach() != 0).reshape(-1, module.heads, module.v_width)
    width = len(reads)
    layer = AttentionLayer(
        site.path,
        q,
        k,
        v,
        analysis.atoms.new(width, site.path) if width > 1 else None,
        reads,
        module.kv_of_head,
        not masked,
        analysis.options.round_to,
        out.bias is not None,
    )
    analysis.layers.append(layer)
    analysis.balances.append(layer.balance)
    live = ~layer.foldable_values()[list(module.kv_of_head)]
    kinds = torch.where((reads & live).flatten(1).any(1), LIVE, CONSTANT).to(torch.uint8)
    shape = [1] * (step.value.dim() - 1) + [-1]
    fields = () if layer.writes is None else (layer.writes.reshape(shape),)
    return Facts(step.value, compress(kinds.reshape(shape)), fields)


def _projection(step: Step, x: Facts, layer: nn.Linear, heads: int) -> Projection:
    view = channel_view(step, x, -1)
    for field in view.rest:
        step.analysis.atoms.pin(field, f"{step.place} attends over channels")
    weight = layer.weight.detach()
    connected = weight != 0
    kinds = row_kinds(connected, view.kinds)
    # A channel that is the same number everywhere only by its position cannot be folded.
    uneven = (connected & (~view.uniform & (view.kinds == CONSTANT))).any(1)
    kinds = torch.where(uneven & (kinds == CONSTANT), LIVE, kinds).to(torch.uint8)
    values = weight @ view.constants
    if layer.bias is not None:
        values = values + layer.bias.detach()
    return Projection(
        view.atoms,
        connected.reshape(heads, -1, weight.shape[1]),
        view.uniform,
        view.constants,
        kinds.reshape(heads, -1),
        values.reshape(heads, -1),
        layer.bias is not None,
    )

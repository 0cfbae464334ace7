"""Attention in its common form, and with fewer dimensions and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sapwood.minimize.adapters import AttentionCall
from sapwood.minimize.layers import Edit
from sapwood.minimize.modules import HeadBlock, RaggedAttention
from sapwood.minimize.surgery._tensors import fetch, replace_module

__all__ = ["canonical", "guard_fast_paths", "narrow_attention"]


def canonical(model: nn.Module, edit: Edit) -> None:
    """Replaces an attention module by its common form, in place."""
    path = edit["module"]
    old = model.get_submodule(path)
    weights = [fetch(old, name) for name in edit["weights"]]
    biases = [None if name is None else fetch(old, name) for name in edit["biases"]]
    q, k, v = (
        [_block(w, b, rows) for rows in heads]
        for w, b, heads in zip(weights[:3], biases[:3], edit["rows"], strict=True)
    )
    out = [weights[3][:, columns] for columns in edit["columns"]]
    attention = RaggedAttention.from_heads(
        q,
        k,
        v,
        out,
        biases[3],
        scale=edit["scale"],
        kv_of_head=edit["kv_of_head"],
        batch_first=edit["batch_first"],
        dropout=edit["dropout"],
    )
    attention.train(old.training)
    _copy_gradients(old, attention)
    call = edit["call"]
    if call is None:
        replace_module(model, path, attention)
        return
    adapter = AttentionCall(
        attention,
        sources=tuple(call["sources"]),
        causal=call["causal"],
        outputs=call["outputs"],
    )
    replace_module(model, path, adapter.train(old.training))


def _copy_gradients(old: nn.Module, new: nn.Module) -> None:
    new.requires_grad_(any(p.requires_grad for p in old.parameters()))


def _block(weight: Tensor, bias: Tensor | None, rows: list[int]) -> HeadBlock:
    return HeadBlock(weight[rows], None if bias is None else bias[rows])


def narrow_attention(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    """Builds the attention again from the dimensions, heads and channels that stay."""
    old: Any = source.get_submodule(edit["module"])
    wide = _Wide(old, edit)
    q, k, v, out = [], [], [], []
    for group in edit["groups"]:
        k.append(wide.key(group))
        v.append(wide.block(old.v_proj, "v", group["kv"], old.v_width, group["v"]))
    kv_of_head = []
    for head in edit["heads"]:
        place = next(i for i, g in enumerate(edit["groups"]) if g["kv"] == head["kv"])
        kv_of_head.append(place)
        group = edit["groups"][place]
        q.append(wide.query(head["head"], group))
        columns = [head["head"] * old.v_width + d for d in group["v"]]
        out.append(old.out_proj.weight.detach().double()[edit["rows"]][:, columns])
    new = RaggedAttention.from_heads(
        q,
        k,
        v,
        out,
        wide.out_bias(),
        scale=old.scale,
        kv_of_head=kv_of_head,
        round_to=edit["round_to"],
        batch_first=old.batch_first,
        dropout=old.dropout,
    )
    like = old.q_proj.weight
    new.to(device=like.device, dtype=like.dtype).train(old.training)
    _copy_gradients(old, new)
    replace_module(target, edit["module"], new)


class _Wide:
    """The old attention in float64 with constants folded into biases."""

    def __init__(self, old: Any, edit: Edit) -> None:
        self._old, self._edit = old, edit
        self._bias = old.q_proj.bias is not None or edit["needs_bias"]

    def block(
        self, layer: nn.Linear, role: str, index: int, width: int, dims: list[int]
    ) -> HeadBlock:
        """Rows of one head, over the kept channels."""
        rows = [index * width + d for d in dims]
        weight, bias = self._folded(layer, role)
        kept = weight[:, self._edit["kept"][role]]
        return HeadBlock(kept[rows], bias[rows] if self._bias else None)

    def _folded(self, layer: nn.Linear, role: str) -> tuple[Tensor, Tensor]:
        weight = layer.weight.detach().double()
        constants = weight.new_zeros(weight.shape[1])
        for column, value in self._edit["constants"][role].items():
            constants[int(column)] = value
        bias = weight @ constants
        return weight, bias if layer.bias is None else bias + layer.bias.detach().double()

    def key(self, group: dict[str, Any]) -> HeadBlock:
        """The keys' dimensions, and one for all that meet a constant query dimension."""
        old = self._old
        plain = self.block(old.k_proj, "k", group["kv"], old.qk_width, group["qk"])
        if not group["merged"]:
            return plain
        dims = [d for d, _ in group["merged"]]
        values = torch.tensor([c for _, c in group["merged"]], dtype=torch.float64)
        many = self.block(old.k_proj, "k", group["kv"], old.qk_width, dims)
        values = values.to(many.weight.device)
        weight = torch.cat((plain.weight, (values @ many.weight)[None]))
        if plain.bias is None or many.bias is None:
            return HeadBlock(weight)
        return HeadBlock(weight, torch.cat((plain.bias, (values @ many.bias)[None])))

    def query(self, head: int, group: dict[str, Any]) -> HeadBlock:
        """The queries' dimensions; that of the merged ones is the constant 1."""
        old = self._old
        plain = self.block(old.q_proj, "q", head, old.qk_width, group["qk"])
        if not group["merged"]:
            return plain
        weight = torch.cat(
            (
                plain.weight,
                torch.zeros_like(plain.weight[:1])
                if len(plain.weight)
                else plain.weight.new_zeros(1, plain.weight.shape[1]),
            )
        )
        assert plain.bias is not None
        return HeadBlock(weight, torch.cat((plain.bias, plain.bias.new_ones(1))))

    def out_bias(self) -> Tensor | None:
        """With the share of value dimensions that were constant."""
        layer = self._old.out_proj
        columns = list(self._edit["folded"])
        bias = None if layer.bias is None else layer.bias.detach().double()
        if columns:
            weight = layer.weight.detach().double()
            values = torch.tensor([value for _, value in columns], dtype=torch.float64)
            index = [column for column, _ in columns]
            shift = weight[:, index] @ values.to(weight.device)
            bias = shift if bias is None else bias + shift
        return None if bias is None else bias[self._edit["rows"]]


def guard_fast_paths(model: nn.Module) -> None:
    """Keeps torch's fused encoder, which reads parameters behind modules' backs, from new modules.

    Only layers that no longer consist of the modules it knows are affected.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not all(map(_ordinary, module.layers)):
            module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer) and not _ordinary(module):
            module.activation_relu_or_gelu = 0
            if isinstance(module.self_attn, RaggedAttention):
                # The first thing that the fused path asks for; without it the plain one is taken.
                module.self_attn.in_proj_bias = None


def _ordinary(layer: nn.Module) -> bool:
    known = {
        "self_attn": nn.MultiheadAttention,
        "linear1": nn.Linear,
        "linear2": nn.Linear,
        "norm1": nn.LayerNorm,
        "norm2": nn.LayerNorm,
    }
    return all(type(getattr(layer, name, None)) is kind for name, kind in known.items())

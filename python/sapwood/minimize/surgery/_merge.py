"""Changing the weights of a network so that it needs fewer units, before anything is cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.minimize.layers import Edit
from sapwood.minimize.surgery._tensors import assign, refresh, replace_module

__all__ = ["add_columns", "merge", "multiply", "narrowed", "thin", "widened"]


def widened(model: nn.Module, edits: Iterable[Edit]) -> dict[str, torch.dtype]:
    """Holds the layers whose weights merging changes in float64, in place; returns their types."""
    types: dict[str, torch.dtype] = {}
    for edit in edits:
        if edit["op"] == "merge":
            paths = [reader["module"] for reader in edit["readers"]]
        else:
            paths = [edit["module"]] if edit["op"] == "multiply" else []
        for path in paths:
            module: Any = model.get_submodule(path)
            types.setdefault(path, module.weight.dtype)
            module.double()
    return types


def narrowed(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Rounds the layers, or what took their places, to the types that they had."""
    for path, dtype in types.items():
        model.get_submodule(path).to(dtype)


def merge(model: nn.Module, edit: Edit) -> None:
    """Lets the readers of merged units read the kept ones alone, in place."""
    for reader in edit["readers"]:
        module: Any = model.get_submodule(reader["module"])
        weight = module.weight.detach()
        into, source = (torch.tensor(reader[k], device=weight.device) for k in ("into", "from"))
        factors = torch.tensor(reader["factors"], dtype=torch.float64, device=weight.device)
        assign(model, f"{reader['module']}.weight", add_columns(weight, into, source, factors))


def add_columns(weight: Tensor, into: Tensor, source: Tensor, factors: Tensor) -> Tensor:
    """(out, in, *kernel) float64 with multiples of columns added to others, and zero themselves."""
    weight = weight.clone()
    scaled = weight[:, source] * factors.reshape(1, -1, *[1] * (weight.dim() - 2))
    weight.index_add_(1, into, scaled)
    weight[:, source] = 0.0
    return weight


def multiply(model: nn.Module, edit: Edit) -> None:
    """Gives a layer the product with the one in front of it, which becomes an identity."""
    first: Any = model.get_submodule(edit["first"])
    second: Any = model.get_submodule(edit["module"])
    left, right = (layer.weight.detach().double().flatten(1) for layer in (second, first))
    product = (left @ right).reshape(len(left), -1, *second.weight.shape[2:])
    if first.bias is not None:
        bias = left @ first.bias.detach().double()
        if second.bias is not None:
            bias = bias + second.bias.detach()
        assign(model, f"{edit['module']}.bias", bias)
    assign(model, f"{edit['module']}.weight", product)
    refresh(second)
    replace_module(model, edit["first"], nn.Identity().train(first.training))


def thin(model: nn.Module, edit: Edit) -> None:
    """Takes units that nobody reads all weights but those in ``columns``, in place."""
    name = f"{edit['module']}.weight"
    module: Any = model.get_submodule(edit["module"])
    weight = module.weight.detach().clone()
    for row, columns in zip(edit["rows"], edit["columns"], strict=True):
        kept = weight[row, columns].clone()
        weight[row] = 0.0
        weight[row, columns] = kept
    assign(model, name, weight)

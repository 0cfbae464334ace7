"""The operations of surgery; each reads the whole model and changes the copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.minimize._masks import duplicate, separate
from sapwood.minimize.layers import Edit
from sapwood.minimize.modules import (
    AppendOnes,
    BorderBias2d,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    InputSelect,
    OutputScatter,
)
from sapwood.minimize.surgery._attention import (
    canonical,
    guard_fast_paths,
    narrow_attention,
)
from sapwood.minimize.surgery._merge import merge, multiply, narrowed, thin, widened
from sapwood.minimize.surgery._tensors import assign, fetch, refresh, replace_module

__all__ = ["operate"]

_Operation = Callable[[nn.Module, nn.Module, Edit], None]

#: What changes the network that is then cut, in the order of the plan.
_PREPARING: dict[str, Callable[[nn.Module, Edit], None]] = {
    "canonical": canonical,
    "merge": merge,
    "multiply": multiply,
    "thin": thin,
}

#: Folding reads whole tensors, so it comes before cutting; replacing takes what cutting left.
_ORDER = (
    "fold",
    "slice",
    "groups",
    "reindex",
    "rescatter",
    "norm",
    "tail",
    "attention",
    "table",
    "ones",
    "select",
    "scatter",
)


def operate(source: nn.Module, edits: Iterable[Edit], *, consume: bool = False) -> nn.Module:
    """A copy of a plain model with all edits made; sums run in float64 and are rounded once.

    Args:
        source: the model; unless consumed it is not changed, and shares no numbers with the result.
        edits: the steps of a plan.
        consume: the result takes over what no step changes, and ``source`` loses each parameter
            once no step reads it any more, so that both need hardly more memory than one.
    """
    edits = list(edits)
    preparing = [edit for edit in edits if edit["op"] in _PREPARING]
    others = [edit for edit in edits if edit["op"] not in _PREPARING]
    others.sort(key=lambda edit: _ORDER.index(edit["op"]))
    whole, target = source, duplicate(source, source.parameters())
    types = widened(target, preparing)
    for edit in preparing:
        _PREPARING[edit["op"]](target, edit)
    if preparing and others:
        whole, target = target, duplicate(target, target.parameters())
    if consume and whole is not source:
        _forget(source, [])
    while others:
        if consume:
            _forget(whole, others)
        operation = others[0]["op"]
        while others and others[0]["op"] == operation:
            _OPERATIONS[operation](whole, target, others.pop(0))
    narrowed(target, types)
    guard_fast_paths(target)
    if consume:
        _forget(whole, [])
    else:
        separate(target, source)
    return target


def _forget(model: nn.Module, edits: list[Edit]) -> None:
    """Empties all parameters but those of the modules that the edits read.

    Emptied rather than removed, since a trace that waits for the garbage collector holds them too.
    """
    read = {edit[key] for edit in edits for key in ("module", "norm") if key in edit}
    kept = {parameter for path in read for parameter in model.get_submodule(path).parameters()}
    for parameter in set(model.parameters()) - kept:
        parameter.data = parameter.new_empty(0)


def _fold(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    """Adds the constant columns' share to the bias."""
    module: Any = source.get_submodule(edit["module"])
    shifts = _weighted(module, edit)
    taps = shifts.reshape(len(shifts), -1).sum(1)
    bias = getattr(module, "bias", None)
    total = taps if bias is None else bias.detach().double() + taps
    assign(target, f"{edit['module']}.bias".lstrip("."), total)


def _weighted(module: Any, edit: Edit) -> Tensor:
    """(out, *kernel): the sum over the removed columns of value times weight."""
    weight = module.weight.detach().double()
    values = torch.tensor(edit["values"], dtype=torch.float64, device=weight.device)
    groups = getattr(module, "groups", 1)
    constants = weight.new_zeros(weight.shape[1] * groups)
    constants[torch.tensor(edit["columns"], device=weight.device)] = values
    by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    taps = torch.einsum("goik,gi->gok", by_group, constants.reshape(groups, -1))
    return taps.reshape(weight.shape[0], *weight.shape[2:])


def _slice(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    name = edit["tensor"]
    value = fetch(target, name)
    index = torch.tensor(edit["keep"], dtype=torch.int64, device=value.device)
    assign(target, name, value.index_select(edit["axis"], index).contiguous())
    refresh(target.get_submodule(name.rpartition(".")[0]))


def _groups(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    """Cuts every group of a convolution by its own rows and columns."""
    name = edit["weight"]
    weight = fetch(target, name)
    module: Any = target.get_submodule(name.rpartition(".")[0])
    before = module.groups
    blocks = weight.reshape(before, -1, *weight.shape[1:])
    kept = [block for block in edit["groups"] if block["rows"]]
    parts = [blocks[block["group"]][block["rows"]][:, block["columns"]] for block in kept]
    assign(target, name, torch.cat(parts).contiguous())
    module.groups = len(kept)
    module.out_channels = sum(len(block["rows"]) for block in kept)
    module.in_channels = len(kept[0]["columns"]) * len(kept)


def _reindex(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    old: Any = target.get_submodule(edit["module"])
    device = old.index.device
    new = InputSelect(torch.tensor(edit["index"], dtype=torch.int64, device=device), old.dim)
    replace_module(target, edit["module"], new.train(old.training))


def _norm(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    norm: Any = source.get_submodule(edit["module"])
    like = next(iter(norm.parameters()), None)
    device = like.device if like is not None else None
    dtype = like.dtype if like is not None else None
    keep = torch.tensor(edit["keep"], dtype=torch.int64)
    constants = torch.tensor(edit["constants"], dtype=torch.float64)
    kinds: list[tuple[tuple[type[nn.Module], ...], Any]] = [
        ((nn.LayerNorm, CompensatedLayerNorm), CompensatedLayerNorm),
        ((nn.RMSNorm, CompensatedRMSNorm), CompensatedRMSNorm),
        ((nn.GroupNorm, CompensatedGroupNorm), CompensatedGroupNorm),
    ]
    compensated = next(made for types, made in kinds if isinstance(norm, types))
    options: dict[str, Any] = {}
    if edit["tail"]:
        options = {"tail": "both" if compensated is CompensatedLayerNorm else True}
    small = compensated.from_norm(norm, keep, constants, **options)
    replace_module(target, edit["module"], small.to(device=device, dtype=dtype))


def _tail(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    """Gives a reader of a norm columns for the features that carry removed channels.

    A removed channel r is ``r' gamma_r (c_r - m) + t gamma_r + beta_r`` in the features r' and t of
    a LayerNorm, and ``r' gamma_r c_r`` in that of an RMSNorm. Features of an earlier pass are
    about the mean m of that pass.
    """
    old: Any = source.get_submodule(edit["norm"])
    new: Any = target.get_submodule(edit["norm"])
    reader: Any = target.get_submodule(edit["module"])
    whole: Any = source.get_submodule(edit["module"])
    weight = whole.weight.detach().double()
    index = torch.tensor(edit["columns"], dtype=torch.int64, device=weight.device)
    rows = torch.tensor(edit["rows"], dtype=torch.int64, device=weight.device)
    values = torch.tensor(edit["values"], dtype=torch.float64, device=weight.device)
    gone = weight[rows][:, index]  # (rows, removed, *kernel)
    layer_norm = isinstance(new, CompensatedLayerNorm)
    gain, shift = (
        None if getattr(old, key, None) is None else getattr(old, key).detach().double()[index]
        for key in ("weight", "bias")
    )
    scaled = gone if gain is None else _scaled(gone, gain)
    mean = new.removed_mean.double() if layer_norm else 0.0
    features = [_scaled(scaled, values - mean).sum(1)]
    if layer_norm:
        features.append(scaled.sum(1))
    if edit["existing"]:
        earlier = weight[rows][:, -len(features) :]
        features = [f + earlier[:, i] for i, f in enumerate(features)]
        if layer_norm:
            features[0] = features[0] + (old.removed_mean.double() - mean) * earlier[:, 1]
    keep = torch.tensor(edit["keep"], dtype=torch.int64, device=weight.device)
    columns = [reader.weight.detach().double()[:, keep], torch.stack(features, 1)]
    assign(target, f"{edit['module']}.weight".lstrip("."), torch.cat(columns, 1))
    if shift is not None:
        moved = _scaled(gone, shift).reshape(len(rows), -1).sum(1)
        bias = moved if reader.bias is None else reader.bias.detach().double() + moved
        assign(target, f"{edit['module']}.bias".lstrip("."), bias)
    refresh(reader)


def _scaled(columns: Tensor, factors: Tensor) -> Tensor:
    """(rows, n, *kernel) times one factor per column."""
    return columns * factors.reshape(1, -1, *[1] * (columns.dim() - 2))


def _table(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    taps = _weighted(source.get_submodule(edit["module"]), edit)
    conv: Any = target.get_submodule(edit["module"])
    rows = torch.tensor(edit["rows"], dtype=torch.int64, device=taps.device)
    replace_module(target, edit["module"], BorderBias2d.from_conv(conv, taps[rows]))


def _ones(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    """Appends one input channel of ones with the removed channels' weights."""
    taps = _weighted(source.get_submodule(edit["module"]), edit)
    conv: Any = target.get_submodule(edit["module"])
    rows = torch.tensor(edit["rows"], dtype=torch.int64, device=taps.device)
    extra = taps[rows][:, None].to(conv.weight.dtype)
    assign(target, f"{edit['module']}.weight", torch.cat((conv.weight.detach(), extra), 1))
    refresh(conv)
    wrapped = nn.Sequential(AppendOnes(), conv).train(conv.training)
    replace_module(target, edit["module"], wrapped)


def _select(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    layer: Any = target.get_submodule(edit["module"])
    index = torch.tensor(edit["index"], dtype=torch.int64, device=layer.weight.device)
    select = InputSelect(index, edit.get("dim", -1))
    wrapped = nn.Sequential(select, layer).train(layer.training)
    replace_module(target, edit["module"], wrapped)


def _scatter(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    """Puts the rows that were kept among the others, which are the bias alone."""
    found: Any = target.get_submodule(edit["module"])
    members = list(found) if isinstance(found, nn.Sequential) else [found]
    layer: Any = members[-1]
    members.append(_scattering(edit, edit["width"], edit["dim"], layer.weight.device, layer.bias))
    layer.bias = None
    wrapped = nn.Sequential(*members).train(layer.training)
    replace_module(target, edit["module"], wrapped)


def _rescatter(source: nn.Module, target: nn.Module, edit: Edit) -> None:
    old: Any = target.get_submodule(edit["module"])
    device, bias = old.index.device, None
    if old.bias is not None:
        keep = torch.tensor(edit["keep"], dtype=torch.int64, device=device)
        kept = old.bias.detach().index_select(0, keep)
        bias = nn.Parameter(kept, requires_grad=old.bias.requires_grad)
    new = _scattering(edit, len(edit["keep"]), old.dim, device, bias)
    replace_module(target, edit["module"], new.train(old.training))


def _scattering(
    edit: Edit, width: int, dim: int, device: torch.device, bias: nn.Parameter | None
) -> OutputScatter:
    index = torch.tensor(edit["index"], dtype=torch.int64, device=device)
    scatter = OutputScatter(index, width, dim, bias=False)
    scatter.bias = bias
    return scatter


_OPERATIONS: dict[str, _Operation] = {
    "fold": _fold,
    "slice": _slice,
    "groups": _groups,
    "reindex": _reindex,
    "rescatter": _rescatter,
    "norm": _norm,
    "tail": _tail,
    "attention": narrow_attention,
    "table": _table,
    "ones": _ones,
    "select": _select,
    "scatter": _scatter,
}

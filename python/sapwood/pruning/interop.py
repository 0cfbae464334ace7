"""Masks from and to the formats of other tools; state dicts in, state dicts out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from sapwood.pruning._names import MaskMatchError, closest, normalize_keys, shape_of
from sapwood.pruning.masks import MaskSet

__all__ = ["from_torch_prune", "from_torchao", "to_torch_prune"]

_AO_ORIGINAL = re.compile(r"^(?P<prefix>.*?)parametrizations\.(?P<name>[^.]+)\.original$")
_AO_MASK = re.compile(r"^(?P<prefix>.*?)parametrizations\.(?P<name>[^.]+)\.\d+\.mask$")


def from_torch_prune(
    state_dict: Mapping[str, Tensor], *, keep_orig: bool = False
) -> tuple[MaskSet, dict[str, Tensor]]:
    """Reads a state dict made under ``torch.nn.utils.prune``.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune as torch_prune
        >>> from sapwood.pruning import from_torch_prune
        >>> layer = torch_prune.l1_unstructured(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> masks, plain = from_torch_prune(layer.state_dict())
        >>> masks.sparsity(), sorted(plain)
        (0.5, ['bias', 'weight'])

    Args:
        state_dict: pairs ``X_orig`` and ``X_mask`` beside ordinary entries.
        keep_orig: leave the masked values in the weights instead of setting them to zero.

    Returns:
        The masks, and a state dict for the plain model, in which ``X`` replaces the pairs.

    Raises:
        ValueError: if one of a pair is missing, shapes differ, or a mask is not all 0 and 1.
    """
    where = "sapwood.pruning.from_torch_prune"
    clean = {new: state_dict[old] for old, new in normalize_keys(state_dict).items()}
    originals = {k.removesuffix("_orig"): v for k, v in clean.items() if k.endswith("_orig")}
    masks = {k.removesuffix("_mask"): v for k, v in clean.items() if k.endswith("_mask")}
    plain = {k: v for k, v in clean.items() if not k.endswith(("_orig", "_mask"))}
    return _combine(originals, masks, plain, keep_orig, where)


def from_torchao(
    state_dict: Mapping[str, Tensor], *, keep_orig: bool = False
) -> tuple[MaskSet, dict[str, Tensor]]:
    """Reads a state dict made under the former sparsifiers of torchao.

    Example:
        >>> import torch
        >>> from sapwood.pruning import from_torchao
        >>> masks, plain = from_torchao({
        ...     "0.parametrizations.weight.original": torch.ones(1, 2),
        ...     "0.parametrizations.weight.0.mask": torch.tensor([[1.0, 0.0]]),
        ... })
        >>> plain["0.weight"]
        tensor([[1., 0.]])

    Args:
        state_dict: pairs ``parametrizations.X.original`` and ``parametrizations.X.<k>.mask`` beside
            ordinary entries; several masks of one tensor are combined.
        keep_orig: leave the masked values in the weights instead of setting them to zero.

    Returns:
        The masks, and a state dict for the plain model.

    Raises:
        ValueError: if one of a pair is missing, shapes differ, or a mask is not all 0 and 1.
    """
    where = "sapwood.pruning.from_torchao"
    originals: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for old, key in normalize_keys(state_dict).items():
        value = state_dict[old]
        if match := _AO_ORIGINAL.match(key):
            originals[match["prefix"] + match["name"]] = value
        elif match := _AO_MASK.match(key):
            name = match["prefix"] + match["name"]
            masks[name] = masks[name] * value if name in masks else value
        else:
            plain[key] = value
    return _combine(originals, masks, plain, keep_orig, where)


def to_torch_prune(state_dict: Mapping[str, Tensor], masks: MaskSet) -> dict[str, Tensor]:
    """The inverse of ``from_torch_prune``: a state dict with ``X_orig`` and ``X_mask``.

    Example:
        >>> import torch
        >>> from sapwood.pruning import prune, to_torch_prune
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> sorted(to_torch_prune(layer.state_dict(), prune(layer, 0.5)))
        ['weight_mask', 'weight_orig']

    Args:
        state_dict: of the plain model.
        masks: its masks.

    Returns:
        The state dict of the same model under ``torch.nn.utils.prune``; masks have the dtype of
        their weight.

    Raises:
        MaskMatchError: if a mask has no entry in the state dict.
        ValueError: if a shape differs.
    """
    where = "sapwood.pruning.to_torch_prune"
    missing = [name for name in masks if name not in state_dict]
    if missing:
        raise MaskMatchError(
            f"{where}: every mask must have an entry in state_dict, got none for {missing[0]!r}; "
            f"closest names: {closest(missing, list(state_dict))}"
        )
    paired: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name not in masks:
            paired[name] = value
            continue
        _require_shape(name, value, masks[name], where)
        paired[f"{name}_orig"] = value
        paired[f"{name}_mask"] = masks[name].to(value)
    return paired


def _combine(
    originals: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    keep_orig: bool,
    where: str,
) -> tuple[MaskSet, dict[str, Tensor]]:
    unpaired = sorted(set(originals) ^ set(masks))
    if unpaired:
        kind = "mask" if unpaired[0] in originals else "original"
        raise ValueError(
            f"{where}: every tensor must have an original and a mask, got no {kind} for "
            f"{unpaired[0]!r}"
        )
    keep: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, original in originals.items():
        mask = masks[name]
        _require_shape(name, original, mask, where)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{where}: the mask of {name} must hold 0 and 1, got other values")
        keep[name] = mask.bool()
        weight = original.detach().clone()
        weights[name] = weight if keep_orig else weight.masked_fill_(~keep[name], 0.0)
    return MaskSet(keep), {**plain, **weights}


def _require_shape(name: str, weight: Tensor, mask: Tensor, where: str) -> None:
    if weight.shape != mask.shape:
        raise ValueError(
            f"{where}: the mask of {name} must have shape {shape_of(weight)}, got {shape_of(mask)}"
        )

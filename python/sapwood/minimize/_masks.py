"""A plain copy of a masked model, whatever way it carries its masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sapwood.nn import MaskedConv2d, MaskedLinear
from sapwood.pruning.masks import MaskSet

__all__ = ["materialised"]


def materialised(model: nn.Module, masks: Mapping[str, Tensor] | None) -> nn.Module:
    """A copy with plain layers in which every masked weight is exactly zero.

    Args:
        model: a model with masked layers of ``sapwood.nn``, under ``torch.nn.utils.prune``, or with
            zeros in its weights; it is not changed.
        masks: further masks, parameter name -> bool tensor.

    Returns:
        The copy, in the mode of the model.

    Raises:
        MaskMatchError: if a mask has no parameter.
        ValueError: if a mask has another shape than its parameter.
        TypeError: if a mask is no bool tensor.
    """
    plain = duplicate(model)
    for module in list(plain.modules()):
        for name in _pruned(module):
            torch_prune.remove(module, name)
    for path, module in list(plain.named_modules()):
        layer = _unmasked(module)
        if layer is None:
            continue
        if path == "":
            plain = layer
        else:
            plain.set_submodule(path, layer)
    if masks is not None:
        MaskSet(masks).apply_(plain)
    return plain


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that hold computed weights, as ``torch.nn.utils.prune`` does."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _pruned(module: nn.Module) -> list[str]:
    names = [name.removesuffix("_orig") for name, _ in module.named_parameters(recurse=False)]
    return [name for name in names if hasattr(module, f"{name}_mask") and _hooked(module, name)]


def _hooked(module: nn.Module, name: str) -> bool:
    return any(
        isinstance(hook, torch_prune.BasePruningMethod) and hook._tensor_name == name
        for hook in module._forward_pre_hooks.values()
    )


def _unmasked(module: nn.Module) -> nn.Module | None:
    if type(module) is MaskedLinear:
        return _with_gradients(module, module.to_linear())
    if type(module) is not MaskedConv2d:
        return None
    masked: Any = module
    plain = nn.Conv2d(
        masked.in_channels,
        masked.out_channels,
        masked.kernel_size,
        stride=masked.stride,
        padding=masked.padding,
        dilation=masked.dilation,
        groups=masked.groups,
        bias=False,
        padding_mode=masked.padding_mode,
        device="meta",
    )
    plain.weight = nn.Parameter(torch.where(module.mask, module.weight.detach(), 0.0))
    plain.bias = module.bias
    return _with_gradients(module, plain.train(module.training))


def _with_gradients(masked: nn.Module, plain: nn.Module) -> nn.Module:
    for name, parameter in plain.named_parameters(recurse=False):
        parameter.requires_grad_(masked.get_parameter(name).requires_grad)
    return plain

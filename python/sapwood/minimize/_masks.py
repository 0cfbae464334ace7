"""A plain copy of a masked model, whatever way it carries its masks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sapwood.nn import MaskedConv2d, MaskedLinear
from sapwood.pruning.masks import MaskSet

__all__ = ["duplicate", "materialised", "ordinary", "separate", "stored"]


def materialised(model: nn.Module, masks: Mapping[str, Tensor] | None) -> nn.Module:
    """A copy with plain layers in which every masked weight is exactly zero.

    What no mask changes is not copied: the tensors of the copy are objects of their own on the
    numbers of the model, which neither may write to. ``separate`` ends that.

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
    plain = duplicate(model, (*model.parameters(), *model.buffers()))
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
        separate(plain, model)
        MaskSet(masks).apply_(plain)
    return plain


def duplicate(model: nn.Module, share: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy, also of modules that hold computed weights, as ``torch.nn.utils.prune`` does.

    Args:
        model: what is copied; it is not changed.
        share: parameters and buffers of the model whose numbers the copy is to use, through
            tensors of its own, instead of copying them; unusual tensors are copied all the same.
    """
    memo: dict[int, Any] = {}
    for tensor in filter(ordinary, share):
        own = tensor.data  # unlike detach, with a count of changes of its own
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if parameter else own
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def separate(model: nn.Module, other: nn.Module) -> None:
    """Copies the numbers that ``model`` uses of ``other``, so that neither sees the other's."""
    theirs = {_address(tensor) for tensor in stored(other)} - {0}
    memo: dict[int, Any] = {}
    for tensor in stored(model):
        if _address(tensor) in theirs:
            # As a deep copy of the module would: buffers that are views of one storage stay so.
            own = tensor.data
            parameter = isinstance(tensor, nn.Parameter)
            tensor.data = own.clone() if parameter else copy.deepcopy(own, memo)


def stored(model: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def ordinary(tensor: Tensor) -> bool:
    """Whether the tensor is nothing but a view of a storage that may be written to."""
    known = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return known and not tensor.is_inference()


def _address(tensor: Tensor) -> int:
    """Of the storage; 0 for what ``duplicate`` never shares and for empty tensors."""
    return tensor.untyped_storage().data_ptr() if ordinary(tensor) else 0


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

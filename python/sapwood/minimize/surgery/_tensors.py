"""Access to parameters and buffers by name, and the attributes that repeat their sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["assign", "fetch", "refresh", "replace_module"]


def fetch(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer."""
    path, _, key = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), key)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer, wherever the model refers to it."""
    path, _, key = name.rpartition(".")
    module: Any = model.get_submodule(path)
    old = getattr(module, key)
    if key in module._buffers:
        setattr(module, key, value.to(old))
        return
    grad = old.requires_grad if old is not None else _trains(module)
    like = old if old is not None else module.weight
    new = nn.Parameter(value.to(device=like.device, dtype=like.dtype), requires_grad=grad)
    for holder in model.modules():
        for other, parameter in holder._parameters.items():
            if (parameter is old and old is not None) or (holder is module and other == key):
                holder._parameters[other] = new


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    model.set_submodule(path, module)


def refresh(module: nn.Module) -> None:
    """Sets the sizes that a module remembers to those of its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels = module.weight.shape[0]
        module.out_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        _refresh_convolution(module)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for tensor in (module.weight, module.bias, module.running_mean):
            if tensor is not None:
                module.num_features = len(tensor)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Embedding) and isinstance(weight, torch.Tensor):
        module.num_embeddings, module.embedding_dim = weight.shape


def _refresh_convolution(module: nn.modules.conv._ConvNd) -> None:
    out, per_group = module.weight.shape[:2]
    if module.groups == module.in_channels and module.groups > 1:
        multiplier = module.out_channels // module.groups
        module.groups = out // multiplier
    module.out_channels, module.in_channels = out, per_group * module.groups

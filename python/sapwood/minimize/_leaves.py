"""Modules that tracing must not look into: stand-ins that call one opaque operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree

from sapwood.minimize.modules import (
    AppendOnes,
    BorderBias2d,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    InputSelect,
    OutputScatter,
    RaggedAttention,
)

__all__ = ["LEAF_OPERATION", "LEAVES", "Call", "Site", "behind", "leaf_sites", "site_of"]

#: The modules with rules of their own.
LEAVES: tuple[type[nn.Module], ...] = (
    AppendOnes,
    BorderBias2d,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    InputSelect,
    OutputScatter,
    RaggedAttention,
)

LEAF_OPERATION = "sapwood_minimize.leaf.default"


class Call:
    """One call of a leaf: where its tensors stood among the arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flat, self._spec = _pytree.tree_flatten((args, kwargs))
        self._fixed = [None if isinstance(item, Tensor) else item for item in flat]
        self._places = [i for i, item in enumerate(flat) if isinstance(item, Tensor)]
        self.tensors = [item for item in flat if isinstance(item, Tensor)]

    def rebuild(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors, or facts about them, in their places."""
        flat = list(self._fixed)
        for place, value in zip(self._places, tensors, strict=True):
            flat[place] = value
        args, kwargs = _pytree.tree_unflatten(flat, self._spec)
        return args, kwargs


class Site:
    """A leaf module in the traced model, with its path and the calls it received."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.calls: list[Call] = []
        self.uses = 0  # in the graph; the exporter may run the model several times

    def run(self, call: int, tensors: list[Tensor]) -> Tensor:
        """Runs the module; on fake tensors it uses fake parameters."""
        args, kwargs = self.calls[call].rebuild(tensors)
        names = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        state = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in names.items()}
        faked = torch.compiler.is_exporting() or type(tensors[0]) is not Tensor
        output = functional_call(self.module, state if faked else names, args, kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result.clone()


_SITES: dict[int, Site] = {}


@torch.library.custom_op("sapwood_minimize::leaf", mutates_args=())
def _leaf(tensors: list[Tensor], site: int, call: int) -> Tensor:
    return _SITES[site].run(call, tensors)


@_leaf.register_fake
def _(tensors: list[Tensor], site: int, call: int) -> Tensor:
    return _SITES[site].run(call, tensors)


class _StandIn(nn.Module):
    """Takes the place of a leaf while the model is traced."""

    def __init__(self, site: int) -> None:
        super().__init__()
        self.site = site

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(_SITES[self.__dict__["site"]].module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        site = _SITES[self.site]
        site.calls.append(Call(args, kwargs))
        call = site.calls[-1]
        output = torch.ops.sapwood_minimize.leaf(call.tensors, self.site, len(site.calls) - 1)
        call.tensors = []
        return (output, None) if isinstance(site.module, RaggedAttention) else output


def behind(module: nn.Module) -> nn.Module:
    """The leaf that a stand-in replaces; any other module itself."""
    return _SITES[module.site].module if isinstance(module, _StandIn) else module


def site_of(number: int) -> Site:
    """The site that a traced call refers to."""
    return _SITES[number]


@contextmanager
def leaf_sites(model: nn.Module) -> Iterator[nn.Module]:
    """Replaces every leaf of ``model``, a copy, by its stand-in; the sites live in the block."""
    numbers: list[int] = []
    try:
        for path, module in list(model.named_modules()):
            if type(module) in LEAVES:
                number = max(_SITES, default=-1) + 1
                _SITES[number] = Site(path, module)
                numbers.append(number)
                if path == "":
                    model = _StandIn(number)
                else:
                    model.set_submodule(path, _StandIn(number))
        yield model
    finally:
        for number in numbers:
            site = _SITES.pop(number)
            if site.path:
                model.set_submodule(site.path, site.module)

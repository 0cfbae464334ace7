"""The modules of minimized networks, met again in a further pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sapwood.minimize._facts import CONSTANT, LIVE, Facts, compress
from sapwood.minimize._leaves import LEAF_OPERATION, Site, site_of
from sapwood.minimize._tails import FEATURE
from sapwood.minimize.layers import Scattering, Selection
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
from sapwood.minimize.rules._registry import Step, opaque, rule
from sapwood.minimize.rules.attention import attention
from sapwood.minimize.rules.convolution import border_convolution
from sapwood.minimize.rules.linear import channel_view
from sapwood.minimize.rules.normalization import compensated, compensated_groups


@rule(LEAF_OPERATION)
def leaf(step: Step) -> Any:
    """Dispatches on the type of the module."""
    tensors, number, call = step.args
    site = site_of(number)
    if site.uses > 1:
        return opaque(step, f"{site.path} is called {site.uses} times")
    module = site.module
    tensors = [step.analysis.labelled(facts) for facts in tensors]
    if isinstance(module, BorderBias2d):
        return border_convolution(step, site, tensors[0])
    if isinstance(module, (CompensatedLayerNorm, CompensatedRMSNorm)):
        return compensated(step, site, tensors[0])
    if isinstance(module, CompensatedGroupNorm):
        return compensated_groups(step, site, tensors[0])
    if isinstance(module, InputSelect):
        return _select(step, site, tensors[0])
    if isinstance(module, OutputScatter):
        return _scatter(step, site, tensors[0])
    if isinstance(module, RaggedAttention):
        args, kwargs = site.calls[call].rebuild(tensors)
        return attention(step, site, module, args, kwargs)
    if isinstance(module, AppendOnes):
        return _append(step, tensors[0])
    return opaque(step, f"no rule for {site.path}")


def _append(step: Step, x: Facts) -> Any:
    """The channel of ones stays: it carries what was removed before."""
    view = channel_view(step, x, 1)
    kinds = torch.cat((view.kinds, torch.tensor([LIVE], dtype=torch.uint8)))
    shape = [1, -1, *[1] * (x.ndim - 2)]
    fields = view.rest
    if view.atoms is not None:
        ones = step.analysis.atoms.new(1, step.path)
        step.analysis.atoms.pin(ones, FEATURE)
        fields = (*fields, torch.cat((view.atoms, ones)).reshape(shape))
    return Facts(step.value, compress(kinds.reshape(shape)), fields)


def _select(step: Step, site: Site, x: Facts) -> Any:
    module = site.module
    assert isinstance(module, InputSelect)
    axis, index = module.dim % x.ndim, module.index.long()
    if len(index) == 1:
        return opaque(step, f"{site.path} selects one channel")
    view = channel_view(step, x, axis)
    writes = step.analysis.atoms.new(len(index), site.path)
    step.analysis.layers.append(Selection(site.path, index, view.atoms, writes))
    spread = [size if a == axis else x.kind.shape[a] for a, size in enumerate(x.shape)]
    kind = x.kind.expand(spread).index_select(axis, index)
    shape = [1] * x.ndim
    shape[axis] = len(index)
    moved = replace(x, value=step.value, kind=compress(kind), source=None)
    return moved.with_fields(*view.rest, writes.reshape(shape))


def _scatter(step: Step, site: Site, x: Facts) -> Any:
    """Channels that are not written are constants."""
    module = site.module
    assert isinstance(module, OutputScatter)
    axis, index = module.dim % x.ndim, module.index.long()
    view = channel_view(step, x, axis)
    writes = step.analysis.atoms.new(module.width, site.path)
    zero = view.uniform & (view.constants == 0)
    step.analysis.layers.append(Scattering(site.path, index, view.atoms, zero, writes))
    spread = [size if a == axis else x.kind.shape[a] for a, size in enumerate(x.shape)]
    shape = list(spread)
    shape[axis] = module.width
    kind = torch.full(shape, CONSTANT, dtype=torch.uint8)
    kind = kind.index_copy(axis, index, x.kind.expand(spread))
    shape = [1] * x.ndim
    shape[axis] = module.width
    return Facts(step.value, compress(kind), (*view.rest, writes.reshape(shape)))

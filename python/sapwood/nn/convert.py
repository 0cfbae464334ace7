"""Whole models: replace the linear layers for which packing pays, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood.nn.masked_matmul import MaskedLinear, SparseLinear, output_batch
from sapwood.ops import _dispatch
from sapwood.ops.masked_matmul import FORMATS
from sapwood.ops.masked_matmul._layouts import supported

_BATCHES = (1, 8, 64, 256)


@dataclass(frozen=True)
class LayerReport:
    """What :func:`to_sparse` did with one linear layer, and why."""

    name: str
    shape: tuple[int, int]  # (out, in)
    sparsity: float
    packed: bool
    reason: str
    speedups: dict[int, float]  # batch size -> predicted time of dense / predicted time
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        shape = f"{self.shape[0]} x {self.shape[1]}"
        state = "packed" if self.packed else "left  "
        return f"{self.name:<20} {shape:>13} {self.sparsity:7.2%}  {state}  {self.reason}"


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Linear layers by name; exact types, since a subclass may compute something else."""
    found = [(name, m) for name, m in model.named_modules() if type(m) in (nn.Linear, MaskedLinear)]
    if any(name == "" for name, _ in found):
        raise ValueError(
            "sapwood.to_sparse: model must contain linear layers, got a linear layer itself; "
            "use sapwood.nn.SparseLinear.from_linear"
        )
    return [(name, m) for name, m in found if isinstance(m, nn.Linear)]


def _observed_batches(model: nn.Module, example: Any) -> dict[str, int]:
    """The batch each linear layer sees when the model runs on ``example``."""
    seen: dict[str, int] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, output_batch(args[0].shape))
        )
        for name, layer in _linears(model)
    ]
    try:
        with torch.no_grad():
            model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _speedups(layer: nn.Linear, nnz: int, batches: Iterable[int]) -> dict[int, float]:
    weight = layer.weight
    n, k = weight.shape
    device = weight.device.type
    table = _dispatch.table_for(device, weight.dtype)
    formats = [f for f in FORMATS if supported(f, weight.dtype, device)]
    speedups = {}
    for batch in batches:
        best, times = _dispatch.choose(table, n, k, nnz, batch, formats)
        speedups[batch] = times["dense"] / times[best]
    return speedups


def _shared(model: nn.Module) -> set[int]:
    """Parameters that belong to more than one module; packing one would untie them."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def to_sparse(
    model: nn.Module,
    min_sparsity: float = 0.3,
    example_batch: Tensor | tuple[Any, ...] | None = None,
    *,
    keep: str = "speed",
) -> list[LayerReport]:
    """Replaces linear layers by :class:`SparseLinear` where the dispatch table says it pays.

    Example::

        for row in sapwood.nn.to_sparse(model, example_batch=x):
            print(row)

    Works in place on ``nn.Linear`` (its zeros are dropped) and :class:`MaskedLinear`.

    Args:
        model: a module that contains linear layers.
        min_sparsity: layers below this share of zeros are left alone; 0 <= min_sparsity <= 1.
        example_batch: an input of the model; the batch each layer sees then decides. None: batches
            of 1, 8, 64 and 256 count.
        keep: "speed" or "memory", see :func:`sapwood.ops.pack_sparse`.

    Returns:
        One :class:`LayerReport` per linear layer, also for those left alone.

    Raises:
        ValueError: for a ``min_sparsity`` outside [0, 1], or a model that is itself a linear layer.
    """
    if not 0.0 <= min_sparsity <= 1.0:
        _check.fail(ValueError, "to_sparse", "min_sparsity", "lie in [0, 1]", min_sparsity)
    layers = _linears(model)
    observed = {} if example_batch is None else _observed_batches(model, example_batch)
    shared = _shared(model)
    rows = []
    for name, layer in layers:
        keep_mask = layer.mask if isinstance(layer, MaskedLinear) else layer.weight.detach() != 0
        nnz, total = int(keep_mask.count_nonzero()), layer.weight.numel()
        sparsity = 1.0 - nnz / max(1, total)
        batches = (observed[name],) if name in observed else _BATCHES
        speedups = _speedups(layer, nnz, batches)
        reason = _why_left(layer, sparsity, min_sparsity, speedups, shared)
        before = after = layer.weight.nbytes
        if reason is None:
            hint = batches if name in observed else None
            sparse = SparseLinear.from_linear(layer, keep_mask, keep=keep, batch_hint=hint)
            _replace(model, name, sparse)
            after = sparse.packed().nbytes()
        gain = ", ".join(f"{s:.1f}x at batch {b}" for b, s in speedups.items())
        shape = (layer.out_features, layer.in_features)
        text = reason or f"predicted {gain}"
        rows.append(
            LayerReport(name, shape, sparsity, reason is None, text, speedups, before, after)
        )
    return rows


def _why_left(
    layer: nn.Linear,
    sparsity: float,
    min_sparsity: float,
    speedups: dict[int, float],
    shared: set[int],
) -> str | None:
    if id(layer.weight) in shared:
        return "its weight is shared with another module"
    if sparsity < min_sparsity:
        return f"sparsity {sparsity:.1%} is below {min_sparsity:.1%}"
    if all(s <= 1.0 for s in speedups.values()):
        return "dense torch is predicted to be as fast"
    return None


def to_dense(model: nn.Module) -> nn.Module:
    """Replaces every :class:`SparseLinear` and :class:`MaskedLinear` by ``nn.Linear``, in place.

    Example::

        sapwood.nn.to_dense(model)

    Returns:
        ``model``.
    """
    for name, module in list(model.named_modules()):
        if name and isinstance(module, (SparseLinear, MaskedLinear)):
            _replace(model, name, module.to_linear())
    return model

"""The elements that a selection chooses from, and the choice of the smallest ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapwood.pruning import _radix, _shards


@dataclass(frozen=True)
class Pool:
    """Some tensors, or this rank's parts of them; the numbers count the whole tensors."""

    layers: list[_radix.Layer]
    parts: list[_shards.Part]
    inactive: list[int]  # elements that are off already and count
    protected: list[int]  # elements that must not go
    order: _radix.Order
    ranks: _shards.Ranks

    @classmethod
    def of(
        cls,
        scores: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        monotone: bool,
        absolute: bool,
        ranks: _shards.Ranks,
        where: str,
    ) -> Pool:
        """The elements of ``scores``, in the order of ``masks``.

        Raises:
            ValueError: if a score is NaN, on any rank.
        """
        layers = [_layer(name, scores[name], masks[name], monotone, ranks) for name in masks]
        surveys = [_radix.survey(layer.scores) if layer.counted else (0, False) for layer in layers]
        census = ranks.sums(
            [
                *(nans for nans, _ in surveys),
                *(_inactive(layer) if layer.counted else 0 for layer in layers),
                sum(signed for _, signed in surveys),
            ]
        )
        for layer, nans in zip(layers, census, strict=False):
            if nans:
                raise ValueError(
                    f"{where}: score {layer.name} must hold numbers, got {nans} NaN values"
                )
        inactive = census[len(layers) : -1]
        order = _radix.Order(absolute, signed=census[-1] > 0)
        parts = ranks.parts({name: masks[name] for name in masks})
        return cls(layers, parts, inactive, [0] * len(layers), order, ranks)

    @property
    def sizes(self) -> list[int]:
        return [part.shape.numel() for part in self.parts]

    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of the whole tensor."""
        return {layer.name: part.shape for layer, part in zip(self.layers, self.parts, strict=True)}

    def bounds(self, min_keep: int) -> list[int]:
        """How many elements of each tensor may be off when it keeps ``min_keep`` active ones."""
        return [
            size - max(min(min_keep, size - gone), kept)
            for size, gone, kept in zip(self.sizes, self.inactive, self.protected, strict=True)
        ]

    def protecting(self, protected: Sequence[Tensor | None]) -> Pool:
        """The pool whose layers keep further elements (numel,), whatever their scores."""
        layers = [
            replace(layer, protected=flags)
            for layer, flags in zip(self.layers, protected, strict=True)
        ]
        counts = [
            0 if layer.protected is None or not layer.counted else _count(layer.protected)
            for layer in layers
        ]
        return replace(self, layers=layers, protected=self.ranks.sums(counts))

    def present(self, i: int) -> Tensor:
        """The keep mask (numel,) that a layer has already."""
        layer = self.layers[i]
        if layer.active is not None:
            return layer.active.clone(memory_format=torch.contiguous_format)
        return torch.ones(layer.scores.numel(), dtype=torch.bool, device=layer.scores.device)

    def smallest(self, which: Sequence[int], k: int) -> list[Tensor]:
        """Keep masks (numel,) of some layers with the first ``k`` of all their elements off.

        ``k`` covers the inactive elements and leaves the protected ones.
        """
        layers = [self.layers[i] for i in which]
        if k == sum(self.inactive[i] for i in which):
            return [self.present(i) for i in which]
        keys = _radix.Keys(layers, self.order)
        cut = _radix.find_cut(keys, k, self.ranks.total)
        quotas = None
        if not self.ranks.alone and cut.ties_off < cut.ties:
            quotas = _shards.tie_quotas(keys, cut, [self.parts[i] for i in which], self.ranks)
        return _radix.switch_off(keys, cut, quotas)

    def off(self, which: Sequence[int], keeps: Sequence[Tensor]) -> list[int]:
        """How many elements are off in the whole tensors of these masks."""
        return self.ranks.sums(
            [
                keep.numel() - _count(keep) if self.layers[i].counted else 0
                for i, keep in zip(which, keeps, strict=True)
            ]
        )


def _layer(
    name: str, scores: Tensor, mask: Tensor, monotone: bool, ranks: _shards.Ranks
) -> _radix.Layer:
    values, present = _shards.local(scores), _shards.local(mask)
    active = None
    if monotone and _count(present) < present.numel():
        active = present.to(values.device).contiguous().view(-1)
    return _radix.Layer(name, values, active, counted=ranks.counts(name))


def _inactive(layer: _radix.Layer) -> int:
    return 0 if layer.active is None else layer.active.numel() - _count(layer.active)


def _count(flags: Tensor) -> int:
    return int(flags.count_nonzero())

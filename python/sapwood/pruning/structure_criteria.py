"""Criteria that look at the activations and at the units a weight connects.

A mask of single weights shrinks a network only where whole units have died. Ranked by magnitude
they die late: a row of n inputs is empty with probability s^n at sparsity s. ``GroupScore`` ranks
weights of weak units lower, so that units empty one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.pruning._gradients import Subject, pairs, scoring
from sapwood.pruning._units import Layer, Observation, observe
from sapwood.pruning.criteria import register_criterion, widened
from sapwood.pruning.masks import MaskSet

__all__ = ["ActivationMagnitude", "GroupScore"]


class ActivationMagnitude:
    """|w_ij| rms(x_j): a weight counts by what it adds to its unit on real inputs.

    Example:
        >>> import torch
        >>> from sapwood.pruning import ActivationMagnitude, MaskSet
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> batch = torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.zeros(2)
        >>> ActivationMagnitude().scores(layer, MaskSet.dense(layer), batch)
        {'weight': tensor([[2., 3.]])}

    Args:
        inputs: (rows, ...) what the model is called with for every score; then no batch is needed
            and a ``Pruner`` may be attached to an optimizer. None: ``scores`` takes a batch.

    The model is observed as the other criteria with data score it: without dropout, BatchNorm with
    the statistics of the batch.
    """

    def __init__(self, inputs: Tensor | None = None) -> None:
        self.inputs = inputs

    @property
    def needs_data(self) -> bool:
        """Whether ``scores`` must get a batch."""
        return self.inputs is None

    def scores(
        self,
        model: nn.Module,
        masks: MaskSet,
        batch: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Scores of every masked parameter.

        Args:
            model: the model, bare or wrapped; it is left as it was.
            masks: they name the parameters: weights of linear and convolutional layers, also the
                packed and the output projection of ``nn.MultiheadAttention``, and factors per
                channel such as those of a layer scale.
            batch: a pair (X, y) or an iterable of pairs, whose X are joined; y is not used. None
                takes ``inputs``.
            loss_fn: not used.

        Returns:
            Name -> float32 (float64 for a float64 parameter) tensor of the parameter's shape.

        Raises:
            MaskMatchError: if a mask has no parameter in the model.
            ValueError: if there is no batch, or a masked parameter was not seen as a weight.
        """
        where = f"sapwood.pruning.{type(self).__name__}.scores"
        subject = Subject.of(model, masks, where)
        weights = {name: leaves[0] for name, leaves in subject.leaves.items()}
        found = self._observe(subject, weights, batch, where)
        unseen = sorted(set(weights) - {layer.name for layer in found.layers})
        if unseen:
            raise ValueError(
                f"{where}: masks must name weights of layers that run, got {unseen[0]}, which was "
                "not seen as one; exclude it"
            )
        return self._score(found, weights)

    def _observe(
        self, subject: Subject, weights: Mapping[str, nn.Parameter], batch: Any, where: str
    ) -> Observation:
        if batch is None and self.inputs is not None:
            x = self.inputs
        else:
            x = torch.cat([inputs for inputs, _ in pairs(batch, where)])
        device = next(subject.model.parameters()).device
        with scoring(subject):
            return observe(subject.model, x.to(device), weights)

    def _score(self, found: Observation, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return _assembled(found, weights, contributions)


class GroupScore(ActivationMagnitude):
    """The contribution of a weight, weighed by the strength of the two units that it connects.

    With a_ij = |w_ij| rms(x_j), R_i and C_j the norms of its rows and columns, a unit is as strong
    as it is written and read: u = R C, relative to the strongest of its kind in a layer, those
    that the same layers write and read. The score is
    ``a_ij / rms(a) * sqrt(u_i u_j)``; one threshold holds for the whole network. Weights of weak
    units go first, which makes them weaker: units empty, and ``sapwood.minimize`` removes them.

    Example:
        >>> import torch
        >>> from sapwood.pruning import GroupScore, prune
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)
        ... )
        >>> masks = prune(model, 0.9, GroupScore(torch.randn(64, 16)))
        >>> alive = masks["0.weight"].any(1) & masks["2.weight"].any(0)
        >>> int(alive.sum()) < 16                        # at magnitude nearly all 32 would live
        True

    A query is read by its key, and the key by its query; the dimensions of a head also count by the
    mean of the head, so that heads empty as a whole.
    A channel that several layers write or read (a residual stream) has the geometric mean of their
    norms. Who writes and reads is observed while the model runs on the batch: layers, elementwise
    operations, norms, pooling, reshaping, concatenation and attention are followed; through other
    operations a unit counts as it was seen up to there. Inputs count as written with strength 1,
    outputs always with strength 1.

    Args:
        inputs: as for :class:`ActivationMagnitude`.

    References:
        Ours, for Squeeze-Release, arXiv:2606.14346, whose own score was not readable.
    """

    def _score(self, found: Observation, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        strength, kinds = unit_strengths(found, weights), _kinds(found)

        def score(layer: Layer, weight: Tensor) -> Tensor:
            a = contributions(layer, weight)
            out, inputs = (_relative(strength, kinds, ids) for ids in (layer.writes, layer.reads))
            connected = (out * inputs if layer.diagonal else _grouped(out, inputs, layer)).sqrt()
            shape = connected.shape + (1,) * (a.dim() - connected.dim())
            scale = a.square().mean().sqrt().clamp_min(torch.finfo(a.dtype).tiny)
            return a / scale * connected.reshape(a.shape if layer.diagonal else shape).to(a)

        return _assembled(found, weights, score)


def contributions(layer: Layer, weight: Tensor) -> Tensor:
    """|w_ij| rms(x_j), of the shape of the rows that the layer uses."""
    rms = layer.square.to(weight).sqrt()
    if layer.diagonal:
        return weight.abs() * rms.reshape(weight.shape)
    return weight.abs() * _columns(rms, layer, weight.shape[0]).reshape(
        weight.shape[0], -1, *[1] * (weight.dim() - 2)
    )


def unit_strengths(found: Observation, weights: Mapping[str, nn.Parameter]) -> Tensor:
    """(units,) float64: geometric means over writers and readers, multiplied.

    The dimensions of a head count by its mean, too, so that heads empty one after the other.
    Whole norms are squared sums over all that one layer writes to, or reads from, a unit; a side
    on which nothing was seen counts as 1, and units of the output as infinitely strong.
    """
    written, read = _Norms(found.units), _Norms(found.units)
    for layer in found.layers:
        a = contributions(layer, widened(weights[layer.name])[layer.rows]).double().square().cpu()
        if layer.diagonal:
            written.add(layer.writes, a.reshape(-1))
            read.add(layer.reads, a.reshape(-1))
            continue
        written.add(layer.writes, a.flatten(1).sum(1))
        per_input = a.flatten(2).sum(2) if a.dim() > 2 else a  # (out, in per group)
        read.add(layer.reads, per_input.view(layer.groups, -1, a.shape[1]).sum(1).reshape(-1))
    norms = written.means()
    for q, k in found.scores:
        met = (q >= 0) & (k >= 0)
        read.add(q[met], norms[k[met]].square())
        read.add(k[met], norms[q[met]].square())
    strength = norms * read.means()
    for heads in (*(part for pair in found.scores for part in pair), *found.values):
        ids = heads[(heads >= 0).all(1)]
        strength[ids] *= strength[ids].mean(1, keepdim=True)
    known = found.outputs[found.outputs >= 0]
    strength[known] = torch.inf
    return strength


class _Norms:
    """The norms that layers contribute to the units, by their logarithms."""

    def __init__(self, units: int) -> None:
        self._logs = torch.zeros(units, dtype=torch.float64)
        self._counts = torch.zeros(units, dtype=torch.float64)

    def add(self, ids: Tensor, squares: Tensor) -> None:
        """One layer: squared norms of its rows or columns and the units they belong to."""
        known = ids >= 0
        sums = torch.zeros_like(self._logs).index_add(0, ids[known], squares[known])
        there = torch.zeros_like(self._logs, dtype=torch.bool)
        there[ids[known]] = True
        self._logs[there] += 0.5 * sums[there].log()
        self._counts[there] += 1

    def means(self) -> Tensor:
        """Geometric means; 1 where nothing was added."""
        return (self._logs / self._counts.clamp_min(1)).exp()


def _kinds(found: Observation) -> Tensor:
    """(units,) equal numbers for units that the same layers write and read.

    Only these are compared: the values of an attention layer have readers, its queries and keys
    meet each other, and their strengths have nothing to do with each other.
    """
    kinds = torch.zeros(found.units, dtype=torch.int64)
    for number, layer in enumerate(found.layers):
        for side, ids in enumerate((layer.writes, layer.reads)):
            here = torch.zeros(found.units, dtype=torch.bool)
            here[ids[ids >= 0]] = True
            _, kinds = torch.stack((kinds, here.long() * (2 * number + side + 1))).unique(
                dim=1, return_inverse=True
            )
    return kinds


def _relative(strength: Tensor, kinds: Tensor, ids: Tensor) -> Tensor:
    """Strengths of the units of one layer, by the largest of their kind; 1 where unknown."""
    values = torch.where(ids >= 0, strength[ids.clamp_min(0)], torch.inf)
    finite = values.isfinite()
    kind = kinds[ids.clamp_min(0)]
    largest = torch.zeros(len(kinds), dtype=values.dtype)
    largest = largest.scatter_reduce(0, kind[finite], values[finite], "amax")[kind]
    largest = torch.where(largest > 0, largest, 1.0)
    return torch.where(finite, values / largest, 1.0)


def _columns(per_input: Tensor, layer: Layer, rows: int) -> Tensor:
    """(rows, in per group): what belongs to the input of every weight."""
    grouped = per_input.view(layer.groups, 1, -1)
    return grouped.expand(-1, rows // layer.groups, -1).reshape(rows, -1)


def _grouped(out: Tensor, inputs: Tensor, layer: Layer) -> Tensor:
    """(out, in per group): products of the two units of every weight."""
    return out[:, None] * _columns(inputs, layer, len(out))


def _assembled(
    found: Observation,
    weights: Mapping[str, nn.Parameter],
    score: Callable[[Layer, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Scores by name; a weight that is used several times has the largest of its scores."""
    scores: dict[str, Tensor] = {}
    for layer in found.layers:
        weight = widened(weights[layer.name])
        total = scores.setdefault(layer.name, torch.zeros_like(weight))
        total[layer.rows] = torch.maximum(total[layer.rows], score(layer, weight[layer.rows]))
    return {name: scores[name] for name in weights}


register_criterion("activation", ActivationMagnitude)
register_criterion("group", GroupScore)

"""Criteria that need data: SNIP, GraSP, gradient magnitude, first-order Taylor.

They score a model in one state, whatever state it is in: every module in evaluation mode, so
without dropout, but BatchNorm with the statistics of the batch. The weights are used as they are,
masked ones included. Afterwards the mode of every module, buffers, ``.grad``, ``requires_grad`` and
the random state are as before, also after an exception.

``batch`` is a pair (X, y) of tensors with as many rows, or an iterable of such pairs, for example a
DataLoader; the model is called as ``model(X)``. ``loss_fn(output, y)`` returns a scalar, which is
taken for a mean over the rows: several batches are averaged by their rows, so that they give the
gradient of one large batch, except that BatchNorm sees each batch by itself. The default is
``torch.nn.functional.cross_entropy``. Nothing is communicated: in distributed training each
process scores the batch it was given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sapwood.pruning._gradients import (
    Loss,
    Pair,
    Subject,
    gradients,
    loss_of,
    mean_gradients,
    objects_of,
    pairs,
    scoring,
    zeros,
)
from sapwood.pruning._names import NamedParameters
from sapwood.pruning.class_balance import balanced, require_count
from sapwood.pruning.criteria import named_generator, register_criterion, score_dtype, widened
from sapwood.pruning.masks import MaskSet

__all__ = ["SNIP", "GraSP", "GradientMagnitude", "Taylor"]


class _FirstOrder:
    """What a weight and the mean gradient of the loss tell about it."""

    @property
    def needs_data(self) -> bool:
        """True: the gradient needs a batch."""
        return True

    def scores(
        self,
        model: nn.Module,
        masks: MaskSet,
        batch: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Scores of every masked parameter; 0 where the loss does not depend on it.

        Args:
            model: the model, bare or wrapped; it is left as it was.
            masks: they name the parameters.
            batch: a pair (X, y) or an iterable of pairs, moved to the model's device.
            loss_fn: (output, y) -> scalar mean over the rows; default: cross entropy.

        Returns:
            Name -> float32 (float64 for a float64 parameter) tensor of the parameter's shape.

        Raises:
            MaskMatchError: if a mask has no parameter in the model.
            ValueError: if there is no batch or it is empty, X and y differ in rows, a mask has
                another shape, a parameter is not initialised yet, or the loss is not finite, not
                a scalar or without a gradient.
            TypeError: if the batch holds anything but pairs of tensors, or the loss is no tensor.
            NotImplementedError: if a parameter is sharded.
        """
        subject = Subject.of(model, masks, f"sapwood.pruning.{type(self).__name__}.scores")
        found = mean_gradients(subject, batch, loss_fn or F.cross_entropy)
        return {
            name: self._combine(widened(leaves[0]), found[name])
            for name, leaves in subject.leaves.items()
        }

    @staticmethod
    def _combine(weight: Tensor, gradient: Tensor) -> Tensor:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SNIP(_FirstOrder):
    """Connection sensitivity |w * dL/dw|: how much the loss feels a weight being scaled.

    Example:
        >>> import torch
        >>> from sapwood.pruning import SNIP, MaskSet
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> batch = torch.tensor([[1.0, 3.0]]), torch.zeros(1)
        >>> SNIP().scores(layer, MaskSet.dense(layer), batch, lambda output, y: output.mean())
        {'weight': tensor([[2., 3.]])}

    The paper's: dL(c * w)/dc at c = 1, absolute, on one batch of a network at initialisation,
    ranked over all layers. It divides by the sum of all sensitivities, which changes no order and
    is left out. Ours: the state in which the model is scored, and batches that are averaged.

    References:
        Our implementation of Lee et al., SNIP: Single-shot Network Pruning based on Connection
        Sensitivity, arXiv:1810.02340.
    """

    @staticmethod
    def _combine(weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).abs()


@dataclasses.dataclass(frozen=True)
class GradientMagnitude(_FirstOrder):
    """|dL/dw|: where a weight that is off would move first, if it were on.

    Example:
        >>> import torch
        >>> from sapwood.pruning import GradientMagnitude, MaskSet
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, -3.0]]), torch.zeros(1)
        >>> masks = MaskSet.dense(layer)
        >>> GradientMagnitude().scores(layer, masks, batch, lambda output, y: output.mean())
        {'weight': tensor([[1., 3.]])}

    The paper's: RigL grows the inactive connections with the largest gradient magnitude. Ours: the
    same as a criterion by itself, which scores active weights too.

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, arXiv:1911.11134, for the
        growth criterion.
    """

    @staticmethod
    def _combine(weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.abs()


@dataclasses.dataclass(frozen=True)
class Taylor(_FirstOrder):
    """First-order saliency (w * dL/dw)^2: the squared change of the loss if a weight goes.

    Example:
        >>> import torch
        >>> from sapwood.pruning import MaskSet, Taylor
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> batch = torch.tensor([[1.0, 3.0]]), torch.zeros(1)
        >>> Taylor().scores(layer, MaskSet.dense(layer), batch, lambda output, y: output.mean())
        {'weight': tensor([[4., 9.]])}

    The authors': the squared product of weight and gradient, in their public code summed over a
    filter, which is what they remove, and averaged over the mini-batches between two cuts. Ours:
    single weights, and batches whose gradients are averaged before squaring. This ranks as SNIP
    does; the square matters where scores are summed over rows.

    References:
        Our implementation of the first-order criterion of Molchanov et al., Importance Estimation
        for Neural Network Pruning, arXiv:1906.10771, for single weights.
    """

    @staticmethod
    def _combine(weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).square()


@dataclasses.dataclass(frozen=True)
class GraSP:
    """Gradient flow: keeps the weights whose removal would shrink the gradient norm the most.

    With g the gradient of the loss by the scored weights and H its Hessian, removing w changes
    |g|^2 by about -2 w (Hg), so the score is w * (Hg); it has a sign. Every batch is processed in
    two halves: g is the sum over the halves of their gradients, Hg the sum of their Hessians times
    g. Halves of different size are weighted by their rows, equal ones by 1.

    Example:
        >>> import torch
        >>> from sapwood.pruning import GraSP, MaskSet
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> batch = torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.zeros(2)
        >>> rule = GraSP(temperature=1.0, samples_per_class=None)
        >>> half_square = lambda output, y: output.square().mean() / 2
        >>> rule.scores(layer, MaskSet.dense(layer), batch, half_square)
        {'weight': tensor([[-80., 120.]])}

    Args:
        temperature: the outputs are divided by it before the loss; scores shrink at least with
            its square, so that float16 parameters may give zeros.
        samples_per_class: what is drawn from ``batch`` with ``class_balanced_batch``; for many
            classes the authors take 25. None takes the batches as they are, for targets that are
            no class labels.
        reinit: score with Xavier-normal weights in place of those of every ``Linear``; the model
            gets its own back. Masked weights stay zero.
        seed: of the drawn samples and of ``reinit``.

    Raises:
        ValueError: if the temperature is not finite and positive, or samples_per_class below 1.

    The authors' (paper and public code): the formula, the temperature, the class-balanced batch
    in two halves, and Xavier-normal ``Linear`` weights, which their code draws by default. It
    removes the highest -w * (Hg); ours is the negative of that, so that high means keep, without
    its division by the sum of the scores, which changes no order. Ours too: halves that hold every
    class (theirs are sorted by class), ``reinit`` off, and the state in which the model is scored.

    References:
        Our implementation of Wang et al., Picking Winning Tickets Before Training by Preserving
        Gradient Flow, arXiv:2002.07376.
    """

    temperature: float = 200.0
    samples_per_class: int | None = 10
    reinit: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        where = "sapwood.pruning.GraSP"
        if not math.isfinite(self.temperature) or self.temperature <= 0:
            raise ValueError(
                f"{where}: temperature must be finite and positive, got {self.temperature}"
            )
        if self.samples_per_class is not None:
            require_count(self.samples_per_class, "samples_per_class", where)

    @property
    def needs_data(self) -> bool:
        """True: the gradients need a batch."""
        return True

    def scores(
        self,
        model: nn.Module,
        masks: MaskSet,
        batch: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """w * (Hg) of every masked parameter; 0 where the loss does not depend on it.

        Args:
            model: the model, bare or wrapped; it is left as it was.
            masks: they name the parameters.
            batch: a pair (X, y) or an iterable of pairs, from which a class-balanced batch is
                drawn unless ``samples_per_class`` is None.
            loss_fn: (output / temperature, y) -> scalar mean over the rows; default: cross entropy.

        Returns:
            Name -> float32 (float64 for a float64 parameter) tensor of the parameter's shape.

        Raises:
            ValueError: as ``SNIP.scores``, or if a class has too few samples.
            MaskMatchError, TypeError, NotImplementedError: as ``SNIP.scores``.
        """
        where = "sapwood.pruning.GraSP.scores"
        subject = Subject.of(model, masks, where)
        weights = {name: widened(leaves[0]) for name, leaves in subject.leaves.items()}
        # Fused attention has no second derivative.
        with scoring(subject), sdpa_kernel(SDPBackend.MATH), self._reinit(subject, masks) as drawn:
            halves = self._halves(batch, where)
            product = _hessian_times_gradient(
                subject, halves, self._tempered(loss_fn or F.cross_entropy, where)
            )
        return {name: drawn.get(name, weights[name]) * product[name] for name in weights}

    def _halves(self, batch: Any, where: str) -> list[Pair]:
        if self.samples_per_class is None:
            whole = list(pairs(batch, where))
        else:
            whole = [balanced(batch, "batch", self.samples_per_class, self.seed, None, where)]
        halves: list[Pair] = []
        for x, y in whole:
            cut = len(x) // 2
            halves += [(x[:cut], y[:cut])] if cut else []
            halves.append((x[cut:], y[cut:]))
        return halves

    def _tempered(self, loss_fn: Loss, where: str) -> Loss:
        def loss(output: Any, y: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"{where}: the model must return a tensor, got {type(output).__name__}"
                )
            return loss_fn(output / self.temperature, y)

        return loss

    @contextmanager
    def _reinit(self, subject: Subject, masks: MaskSet) -> Iterator[Mapping[str, Tensor]]:
        """Other weights for the ``Linear`` modules; yields them by name, as scores need them."""
        drawn: dict[str, Tensor] = {}
        replaced: list[tuple[nn.Parameter, Tensor]] = []
        named = subject.named
        off = {named.aliases.get(name, name): ~masks[name] for name in subject.leaves}
        try:
            for name in _linear_weights(named) if self.reinit else []:
                objects = objects_of(named, name)
                data = _xavier_normal(objects[0], named_generator(self.seed, name))
                if name in off:
                    data.masked_fill_(off[name].to(data.device), 0.0)
                drawn[name] = widened(data)
                for parameter in objects:
                    replaced.append((parameter, parameter.data))
                    parameter.data = data
            canonical = {name: named.aliases.get(name, name) for name in subject.leaves}
            yield {name: drawn[c] for name, c in canonical.items() if c in drawn}
        finally:
            for parameter, data in replaced:
                parameter.data = data


register_criterion("snip", SNIP)
register_criterion("grasp", GraSP)
register_criterion("gradient", GradientMagnitude)
register_criterion("taylor", Taylor)


def _linear_weights(named: NamedParameters) -> list[str]:
    """The weights of the ``Linear`` modules that hold any element."""
    return [
        name
        for name, owners in named.owners.items()
        if any(isinstance(owner, nn.Linear) and key == "weight" for owner, key in owners)
        and named.parameters[name].numel()
    ]


def _xavier_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """The same numbers on every device; drawn in the precision of scores, then rounded."""
    drawn = torch.empty(like.shape, dtype=score_dtype(like))
    nn.init.xavier_normal_(drawn, generator=generator)
    return drawn.to(like.device, like.dtype)


def _hessian_times_gradient(
    subject: Subject, halves: list[Pair], loss_fn: Loss
) -> dict[str, Tensor]:
    """Name -> Hg, the Hessian taken over the named parameters; 0 where there is none."""
    rows = sum(len(x) for x, _ in halves)
    shares = [2.0 * len(x) / rows for x, _ in halves]
    g = zeros(subject)
    for half, share in zip(halves, shares, strict=True):
        for name, derivative in gradients(loss_of(subject, half, loss_fn), subject.leaves).items():
            g[name].add_(derivative, alpha=share)
    product = zeros(subject)
    for half, share in zip(halves, shares, strict=True):
        for name, derivative in _product_of_half(subject, half, g, loss_fn).items():
            product[name].add_(derivative, alpha=share)
    return product


def _product_of_half(
    subject: Subject, half: Pair, g: Mapping[str, Tensor], loss_fn: Loss
) -> dict[str, Tensor]:
    """Name -> derivative of <g, gradient of the half>; a function, so that each graph is freed."""
    loss = loss_of(subject, half, loss_fn)
    flow = torch.zeros((), device=loss.device)
    for name, derivative in gradients(loss, subject.leaves, create_graph=True).items():
        flow = flow + (g[name] * derivative).sum().to(loss.device)
    return gradients(flow, subject.leaves)

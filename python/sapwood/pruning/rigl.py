"""RigL: sparse from start to end, with masks that move to where the gradients are.

Evci et al., arXiv:1911.11134. The cosine of section 3 is ``DropGrow.fraction``, the drop by
magnitude and the growth by gradient are ``RigL._rewired``, the densities ``erk_densities``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sapwood.pruning import _optim, _state
from sapwood.pruning._distributed import local, place
from sapwood.pruning._names import Rule
from sapwood.pruning._replicas import Replicas
from sapwood.pruning.allocation import LayerPlan, require_sparsity
from sapwood.pruning.criteria import Criterion, Random, named_generator, score_dtype
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.schedules import Position, Schedule, register_schedule
from sapwood.pruning.select import select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

__all__ = ["RigL"]

_WHERE = "sapwood.pruning.RigL"
_SCOPES = {"erk": "erk", "uniform": "layer"}


class DropGrow(Schedule):
    """When weights move, and which share of the active ones; the sparsity is constant."""

    kind = "rigl"
    monotone = False

    def __init__(
        self,
        S: float,
        *,
        every: int,
        alpha: float,
        t_end: Position,
        total_steps: int,
        grow: str,
    ) -> None:
        self.S = require_sparsity(S, _WHERE)
        self.every = _require_steps(every, "every")
        self.total_steps = _require_steps(total_steps, "total_steps")
        self.alpha = _require_share(alpha, "alpha")
        self.end = float(t_end) if isinstance(t_end, int) else t_end * self.total_steps
        if isinstance(t_end, bool) or not 0 < self.end <= self.total_steps:
            raise ValueError(
                f"{_WHERE}: t_end must be a fraction in (0, 1] or a step up to "
                f"{self.total_steps}, got {t_end}"
            )
        if grow not in ("gradient", "random"):
            raise ValueError(f"{_WHERE}: grow must be 'gradient' or 'random', got {grow!r}")
        self.grow = grow
        self._config = {
            "S": self.S,
            "every": every,
            "alpha": self.alpha,
            "t_end": t_end,
            "total_steps": total_steps,
            "grow": grow,
        }

    def sparsity(self, step: int) -> float:
        """S."""
        return self.S

    def is_update(self, step: int) -> bool:
        """Every ``every`` steps before ``t_end``."""
        return 0 < step < self.end and step % self.every == 0

    @property
    def last_update(self) -> int:
        """The last multiple of ``every`` before ``t_end``."""
        return (math.ceil(self.end) - 1) // self.every * self.every

    def fraction(self, step: int) -> float:
        """alpha / 2 * (1 + cos(pi * t / t_end)): the share of the active weights that move."""
        return self.alpha / 2 * (1 + math.cos(math.pi * step / self.end))


register_schedule(DropGrow)


class RigL(Pruner):
    """Trains a network that is sparse from the first step to the last.

    Masks start random. Every so many steps each tensor gives up its smallest active weights and
    takes as many where the gradient of the loss is largest among the masked ones; what it has just
    given up is no candidate. Grown weights start at +0.0 with zero optimizer state. How many
    weights a tensor has never changes.

    The gradients are read before they are masked, at the update steps only; the step of the
    optimizer takes place as usual, and the weights move after it. Under data parallelism and
    ``fully_shard`` the gradients of ``.grad`` are averaged over the ranks by then, so every rank
    moves the same weights. Call ``mask_gradients`` before clipping, as for every pruner: it keeps
    a copy of what it masks.

    Example:
        >>> import torch
        >>> from sapwood.pruning import RigL
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = RigL(model, 0.75, every=2, total_steps=8).attach(optimizer)
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> pruner.masks.sparsity(), pruner.masks.check(model)
        (0.75, [])

    Args:
        model: the model; bare, or wrapped for data parallelism, compilation or averaging.
        sparsity: share of the prunable elements that are off, in [0, 1).
        init: how they are spread at first: ``"erk"`` by the densities of ``erk_densities``,
            ``"uniform"`` the same share in every tensor, a ``LayerPlan`` by its proportions; or
            the masks themselves.
        every: steps between updates.
        alpha: share of the active weights that move at the start, in (0, 1]; it falls to zero
            along a cosine. Rounded down per tensor.
        t_end: there are no more updates from here on: a fraction of ``total_steps`` in (0, 1], or
            a step.
        total_steps: length of the training.
        grow: ``"gradient"``, or ``"random"`` among the masked weights, as in SET.
        include: which parameters; see ``MaskSet.dense``.
        exclude: which not.
        min_keep_per_layer: elements that every tensor keeps at the start.
        enforce: see ``Pruner``.
        process_group: see ``Pruner``.
        seed: of the first masks and of random growth; no global random state is used.

    Raises:
        MaskMatchError: if a rule, a mask or a key of a ``LayerPlan`` matches nothing.
        ValueError: if an argument is outside its range, or given masks have another sparsity.
        TypeError: if an argument has another type.

    References:
        Our implementation of RigL: Evci et al., Rigging the Lottery: Making All Tickets Winners,
        arXiv:1911.11134, section 3. Random growth: Mocanu et al., arXiv:1707.04780. A tensor
        without gradient at an update stays as it is; that is our addition.
    """

    schedule: DropGrow
    _own_schedule: ClassVar[type[Schedule] | None] = DropGrow

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        init: str | LayerPlan | MaskSet = "erk",
        every: int = 100,
        alpha: float = 0.3,
        t_end: Position = 0.75,
        total_steps: int,
        grow: Literal["gradient", "random"] = "gradient",
        include: Sequence[Rule] | None = None,
        exclude: Sequence[Rule] | None = None,
        min_keep_per_layer: int = 1,
        enforce: Literal["always", "on_update"] = "always",
        process_group: ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        schedule = DropGrow(
            sparsity, every=every, alpha=alpha, t_end=t_end, total_steps=total_steps, grow=grow
        )
        given = init if isinstance(init, MaskSet) else None
        super().__init__(
            model,
            schedule,
            "magnitude",
            scope="layer" if isinstance(init, MaskSet) else _scope(init),
            masks=given,
            include=include,
            exclude=exclude,
            min_keep_per_layer=min_keep_per_layer,
            enforce=enforce,
            process_group=process_group,
            seed=seed,
        )
        if given is None:
            self._enforcer.adopt(self._random_masks(), _WHERE)
        else:
            _require_sparsity_of(given, schedule.S)
        self._gradients: dict[str, Tensor] = {}

    def mask_gradients(self) -> None:
        """Zeroes the gradients of masked weights; call it before ``clip_grad_norm_``.

        Before an update it first keeps a copy of the whole gradients.
        """
        if self.schedule.is_update(self.step_count + 1):
            self._keep_gradients()
        super().mask_gradients()

    def step(self, batch: Any = None) -> bool:
        """Advances by one step by hand; only for a pruner that is not attached.

        At an update it reads the gradients that ``mask_gradients`` kept before the optimizer's
        step, or else those that are still in ``.grad``.

        Args:
            batch: not used.

        Returns:
            Whether the masks changed.

        Raises:
            RuntimeError: if the pruner is attached to an optimizer, or no tensor has a gradient at
                an update.
            ValueError: if a weight or gradient is NaN.
        """
        if not self._optimizers and self.schedule.is_update(self.step_count + 1):
            self._keep_gradients()
        return super().step(batch)

    def _masks_gradients_now(self) -> bool:
        return True

    def _keep_gradients(self) -> None:
        """Copies the gradients, unless they are those of the last copy, masked since then."""
        if self.schedule.grow != "gradient":
            return
        for name, parameter in self._enforcer.parameters().items():
            gradient = parameter.grad
            if gradient is None:
                continue
            off = ~local(self.masks[name])
            if name not in self._gradients or bool((local(gradient) != 0)[off].any()):
                self._gradients[name] = gradient.detach().clone()

    def _choose(self, batch: Any, replicas: Replicas) -> MaskSet:
        if self.schedule.grow == "gradient" and not self._gradients:
            raise RuntimeError(
                f"{_WHERE}: gradients must be there at an update, got none; "
                "call mask_gradients() after the backward pass"
            )
        self._enforcer.zero_weights()  # whatever the optimizer did to them, grown ones start there
        parameters = self._enforcer.parameters()
        masters = dict(_optim.masters(self._optimizers, parameters.values()))
        counts = self.masks.counts()
        fraction = self.schedule.fraction(self.step_count)
        chosen = {}
        for name, parameter in parameters.items():
            active, total = counts[name]
            moving = min(math.floor(fraction * active), total - active)
            weight = masters.get(parameter, parameter).detach()
            chosen[name] = self._rewired(name, weight, active, moving)
        self._gradients.clear()
        return MaskSet(chosen, aliases=self.masks.aliases, metadata=self.masks.metadata)

    def _rewired(self, name: str, weight: Tensor, active: int, moving: int) -> Tensor:
        """The mask of one tensor after ``moving`` active weights are dropped and as many grown."""
        mask = self.masks[name]
        growth = self._growth(name, weight) if moving else None
        if growth is None:
            return mask
        return _largest(name, weight, mask, active - moving) | _largest(name, growth, ~mask, moving)

    def _growth(self, name: str, weight: Tensor) -> Tensor | None:
        """What decides which masked weights grow; None: the tensor has no gradient."""
        if self.schedule.grow == "gradient":
            return self._gradients.get(name)
        generator = named_generator(self.settings.seed, f"{self.step_count}/{name}")
        uniform = torch.rand(weight.shape, generator=generator, dtype=score_dtype(weight))
        return place(uniform, weight)

    def _keep_state(self, chosen: MaskSet) -> MaskSet:
        return chosen & self.masks  # grown weights start without state too

    def _random_masks(self) -> MaskSet:
        dense = self.masks
        return select(
            Random(self.settings.seed).scores(self._model, dense),
            dense,
            self.schedule.S,
            scope=self.settings.scope,
            min_keep_per_layer=self.settings.min_keep_per_layer,
        )

    @classmethod
    def _rebuilt(
        cls, model: nn.Module, loaded: _state.Loaded, criterion: Criterion, group: Any
    ) -> Self:
        config = loaded.schedule.state_dict()
        del config["kind"]
        pruner = cls(
            model,
            config.pop("S"),
            init=loaded.masks,
            min_keep_per_layer=loaded.settings.min_keep_per_layer,
            enforce=loaded.settings.arguments()["enforce"],
            process_group=group,
            seed=loaded.settings.seed,
            **config,
        )
        pruner.settings = loaded.settings
        return pruner


def _largest(name: str, scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest absolute scores are, among the elements that a mask marks."""
    if count == 0:
        return torch.zeros_like(among)
    off = (scores.numel() - count) / scores.numel()
    candidates = MaskSet({name: among})
    return select({name: scores}, candidates, off, absolute=True, min_keep_per_layer=0)[name]


def _scope(init: str | LayerPlan) -> str | LayerPlan:
    if isinstance(init, LayerPlan):
        return init
    if not isinstance(init, str) or init not in _SCOPES:
        raise ValueError(
            f"{_WHERE}: init must be one of {tuple(_SCOPES)}, a LayerPlan or a MaskSet, "
            f"got {init!r}"
        )
    return _SCOPES[init]


def _require_sparsity_of(masks: MaskSet, sparsity: float) -> None:
    counts = masks.counts().values()
    total = sum(n for _, n in counts)
    off = total - sum(kept for kept, _ in counts)
    if off != round(sparsity * total):
        raise ValueError(
            f"{_WHERE}: init must switch off {round(sparsity * total)} of {total} elements at "
            f"sparsity {sparsity}, got masks that switch off {off}"
        )


def _require_steps(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_WHERE}: {name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{_WHERE}: {name} must be at least 1, got {value}")
    return value


def _require_share(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{_WHERE}: {name} must be a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{_WHERE}: {name} must be in (0, 1], got {value}")
    return float(value)

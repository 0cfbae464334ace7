"""The pruner: advances a schedule with the optimizer's steps and keeps masked weights at zero."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sapwood.pruning import _optim, _state
from sapwood.pruning._compare import asks_for_more
from sapwood.pruning._enforce import Enforcer, starting_masks
from sapwood.pruning._names import Rule
from sapwood.pruning._persistence import Persistent
from sapwood.pruning._replicas import Replicas
from sapwood.pruning.allocation import LayerPlan
from sapwood.pruning.criteria import (
    Criterion,
    master_copies,
    ranks_absolute_weights,
    resolve_criterion,
)
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.report import SparsityReport
from sapwood.pruning.schedules import Schedule
from sapwood.pruning.select import select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

__all__ = ["Pruner"]

_WHERE = "sapwood.pruning.Pruner"
_CHECK_EVERY = 1000


class Pruner(Persistent):
    """Prunes a model while it trains.

    Attached to an optimizer, it masks gradients before every step, and after every step advances
    the schedule, changes the masks where the schedule says so, clears the optimizer's state under
    them and sets masked weights to +0.0. Nothing is attached to the model itself. The schedule
    counts applied steps: one that a gradient scaler skips does not count. With several optimizers
    the first attached one is the clock.

    Under data parallelism and ``fully_shard`` every rank makes the same calls. Ranks that hold
    copies of a weight compare digests of its mask on ``attach`` and after each update; if they
    differ, every rank raises. Masks of sharded parameters are sharded like them and equal those
    of one process; their counts, ``report`` and ``save`` are collective.

    Example:
        >>> import torch
        >>> from sapwood.pruning import Linear, Pruner
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = Pruner(model, Linear(0.5, t1=4, every=2)).attach(optimizer)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> pruner.finished, pruner.masks.sparsity(), pruner.masks.check(model)
        (True, 0.5, [])

    Args:
        model: the model; bare, or wrapped for data parallelism, compilation or averaging.
        schedule: target sparsity by step; copied.
        criterion: name or object; high scores are kept.
        scope: ``"global"``, ``"layer"``, ``"erk"`` or a ``LayerPlan``; see ``select``.
        masks: where to start instead of with everything kept: pruning at initialisation, a ticket,
            fine-tuning of a sparse model. They are applied on ``attach``; with ``Constant`` at
            their own sparsity they never change. ``include`` and ``exclude`` must then be None.
        include: which parameters; see ``MaskSet.dense``.
        exclude: which not.
        monotone: masked weights never return. Default: what the schedule says. Otherwise all
            weights compete at each update, with gradients unmasked until the last one; a masked
            weight is zero after each step, so what competes is the size of one update.
        granularity: what goes as one: ``"element"``, ``"n:m"`` or ``"row"``; see ``select``.
        n_m: (n, m) for granularity ``"n:m"``; the schedule must then be a ``OneShot`` at 1 - n / m.
        on_misfit: see ``select``.
        min_keep_per_layer: elements that every tensor keeps.
        min_keep_per_unit: elements that every output row keeps.
        mask_gradients: mask the gradients before the optimizer sees them.
        enforce: ``"always"`` zeroes masked weights after every step; ``"on_update"`` only when the
            masks change, for SGD, Adam and AdamW, which keep zeros by themselves once gradients are
            masked; that is verified every 1000 steps.
        total_steps: for schedules with fractions.
        process_group: whose ranks must hold the same masks. Default: that of the
            DistributedDataParallel in ``model``, or of the mesh of sharded parameters. Without
            either nothing is ever exchanged.
        seed: seed of a random criterion given by name.

    Raises:
        MaskMatchError: if a rule, a mask or a key of a ``LayerPlan`` matches nothing.
        ValueError: if an argument is outside its range, or a mask has another shape.
        TypeError: if an argument has another type.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        criterion: str | Criterion = "magnitude",
        *,
        scope: str | LayerPlan = "global",
        masks: MaskSet | None = None,
        include: Sequence[Rule] | None = None,
        exclude: Sequence[Rule] | None = None,
        monotone: bool | None = None,
        granularity: str = "element",
        n_m: tuple[int, int] | None = None,
        on_misfit: str = "raise",
        min_keep_per_layer: int = 1,
        min_keep_per_unit: int = 0,
        mask_gradients: bool = True,
        enforce: Literal["always", "on_update"] = "always",
        total_steps: int | None = None,
        process_group: ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"{_WHERE}: schedule must be a Schedule, got {schedule!r}")
        self.schedule = copy.deepcopy(schedule)
        self.schedule.bind(total_steps)
        parameters = {"seed": seed} if criterion == "random" else {}
        self.criterion = resolve_criterion(criterion, _WHERE, **parameters)
        self.settings = _state.Settings(
            scope=scope,
            monotone=self.schedule.monotone if monotone is None else monotone,
            granularity=granularity,
            n_m=n_m,
            on_misfit=on_misfit,
            min_keep_per_layer=min_keep_per_layer,
            min_keep_per_unit=min_keep_per_unit,
            mask_gradients=mask_gradients,
            enforce=enforce,
            seed=seed,
        )
        self._model = model
        self._group = process_group
        masks = starting_masks(model, masks, include, exclude, _WHERE)
        self._enforcer = Enforcer(model, masks, _WHERE)
        if isinstance(scope, LayerPlan):
            scope.resolve(list(self.masks))
        self.step_count = 0
        self._averaged: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._stepping: set[Optimizer] = set()

    @property
    def finished(self) -> bool:
        """Whether the last update has happened and the masks are frozen."""
        return self.step_count >= self.schedule.last_update

    def attach(self, optimizer: Optimizer) -> Pruner:
        """Follows the steps of an optimizer; may be called for several.

        An update that the schedule puts at step 0 happens here, and the masks are applied.

        Args:
            optimizer: any torch optimizer; it may hold other parameters too.

        Returns:
            The pruner itself.

        Raises:
            TypeError: if it is no torch optimizer.
            ValueError: if it is attached already, ``enforce="on_update"`` is not safe with it, or
                a weight is NaN; it is then not attached.
            RuntimeError: if the criterion needs data; advance such a pruner with ``step(batch)``.
                Also on every rank, if replicas hold different masks.
        """
        where = f"{_WHERE}.attach"
        _optim.require_attachable(optimizer, self._optimizers, self.settings.enforce, where)
        if self.criterion.needs_data:
            raise RuntimeError(
                f"{where}: criterion must not need data, got {type(self.criterion).__name__}; "
                "call step(batch) by hand"
            )
        self._optimizers.append(optimizer)
        try:
            if self.step_count == 0 and self.schedule.is_update(0):
                self._update(None)
            else:
                Replicas(self._model, self.masks, self._group, where).settle(self.masks)
        except Exception:
            self._optimizers.pop()
            raise
        self._enforcer.zero_weights()
        if self._masks_gradients_now():  # otherwise the state may hold what unmasked ones left
            self._enforcer.clear_state(optimizer, self.masks)
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        return self

    def detach(self) -> None:
        """Stops following the optimizers; masks and position stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers.clear()

    def track(self, averaged_model: nn.Module) -> None:
        """Masks an averaged copy of the model (EMA, SWA) whenever the masks change.

        Args:
            averaged_model: a model with the same parameters, such as
                ``torch.optim.swa_utils.AveragedModel``. It is masked, not ranked.

        Raises:
            MaskMatchError: if a masked parameter is missing in it.
            ValueError: if a shape differs.
        """
        self.masks.apply_(averaged_model)
        self._averaged.append(averaged_model)

    def step(self, batch: Any = None) -> bool:
        """Advances by one step by hand; only for a pruner that is not attached.

        The optimizer's state is out of reach here and is not cleared.

        Args:
            batch: passed to the criterion.

        Returns:
            Whether the masks changed.

        Raises:
            RuntimeError: if the pruner is attached to an optimizer, or replicas would get
                different masks.
            ValueError: if a score is NaN.
        """
        if self._optimizers:
            raise RuntimeError(
                f"{_WHERE}.step: the pruner must not be attached, "
                f"got {len(self._optimizers)} optimizers that advance it"
            )
        changed = False
        if self.step_count == 0 and self.schedule.is_update(0):
            changed = self._update(batch)
        changed = self._advance(batch) or changed
        self._enforcer.zero_weights()
        return changed

    def mask_gradients(self) -> None:
        """Zeroes the gradients of masked weights; call it before ``clip_grad_norm_``.

        Does nothing while masked weights may still return, and none is needed without clipping:
        an attached pruner masks gradients before every step.
        """
        if self._masks_gradients_now():
            self._enforcer.zero_gradients()

    def report(self) -> SparsityReport:
        """Counts by mask and by weight, per tensor and in total."""
        return SparsityReport.of(
            self._model,
            self.masks,
            optimizers=self._optimizers,
            min_keep_per_layer=self.settings.min_keep_per_layer,
        )

    def _masks_gradients_now(self) -> bool:
        return self.settings.mask_gradients and (self.settings.monotone or self.finished)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._stepping.add(optimizer)
        self.mask_gradients()
        return _optim.with_masked_closure(args, kwargs, self.mask_gradients)

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # the hooks of an optimizer that calls its base class's step fire for both of them
        first = optimizer in self._stepping
        self._stepping.discard(optimizer)
        if _optim.was_skipped(optimizer):
            return
        if first and optimizer is self._optimizers[0] and self._advance(None):
            return
        if self.settings.enforce == "always" or not self._masks_gradients_now():
            self._enforcer.zero_weights()
        elif self.step_count % _CHECK_EVERY == 0:
            revived = self.masks.check(self._model)
            if revived:
                raise RuntimeError(
                    f"{_WHERE}: masked weights must stay zero with enforce='on_update', "
                    f"got others in {', '.join(revived)}; use enforce='always'"
                )

    def _advance(self, batch: Any) -> bool:
        self.step_count += 1
        due = self.step_count <= self.schedule.last_update
        return due and self.schedule.is_update(self.step_count) and self._update(batch)

    def _update(self, batch: Any) -> bool:
        """New masks from the present weights; nothing changes when choosing them fails."""
        replicas = Replicas(self._model, self.masks, self._group, _WHERE)
        try:
            chosen = self._choose(batch, replicas)
        except Exception:
            replicas.settle(None)
            raise
        replicas.settle(chosen)
        if chosen is self.masks:
            return False
        changed = chosen != self.masks
        keep = self._keep_state(chosen)
        self._enforcer.adopt(chosen, _WHERE)
        for optimizer in self._optimizers:
            self._enforcer.clear_state(optimizer, keep)
        self._enforcer.zero_weights()
        for averaged in self._averaged:
            self.masks.apply_(averaged)
        return changed

    def _choose(self, batch: Any, replicas: Replicas) -> MaskSet:
        """The masks of an update; the present ones themselves where nothing more is to go."""
        sparsity = self.schedule.sparsity(self.step_count)
        if self.settings.monotone and not asks_for_more(sparsity, self.masks.counts()):
            return self.masks

        def score() -> dict[str, Tensor]:
            return self.criterion.scores(self._model, self.masks, batch)

        parameters = self._enforcer.parameters()
        pairs = _optim.masters(self._optimizers, parameters.values())
        absolute = ranks_absolute_weights(self.criterion)
        if absolute:  # the weights themselves, without a copy
            masters = dict(pairs)
            scores = {name: masters.get(p, p).detach() for name, p in parameters.items()}
        else:
            with master_copies(pairs):
                scores = replicas.averaged(score) if self.criterion.needs_data else score()
        return select(
            scores,
            self.masks,
            sparsity,
            absolute=absolute,
            **self.settings.selection(),
        )

    def _keep_state(self, chosen: MaskSet) -> MaskSet:
        """The weights whose optimizer state survives an update."""
        return chosen

    @classmethod
    def _rebuilt(
        cls, model: nn.Module, loaded: _state.Loaded, criterion: Criterion, group: Any
    ) -> Self:
        return cls(
            model,
            loaded.schedule,
            criterion,
            masks=loaded.masks,
            process_group=group,
            **loaded.settings.arguments(),
        )

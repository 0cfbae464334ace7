"""The pruner: advances a schedule with the optimizer's steps and keeps masked weights at zero."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sapwood._files import atomic_write_bytes
from sapwood.pruning import _optim, _state
from sapwood.pruning._bits import clear_, keep_bits
from sapwood.pruning._names import NamedParameters, Rule, require_prunable
from sapwood.pruning.allocation import LayerPlan
from sapwood.pruning.criteria import Criterion, master_copies, resolve_criterion
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.report import SparsityReport
from sapwood.pruning.schedules import Schedule, schedule_from_state
from sapwood.pruning.select import select

__all__ = ["Pruner"]

_WHERE = "sapwood.pruning.Pruner"
_CHECK_EVERY = 1000


class Pruner:
    """Prunes a model while it trains.

    Attached to an optimizer, it masks gradients before every step, and after every step advances
    the schedule, changes the masks where the schedule says so, clears the optimizer's state under
    them and sets masked weights to +0.0. Nothing is attached to the model itself. The schedule
    counts applied steps: one that a gradient scaler skips does not count. With several optimizers
    the first attached one is the clock.

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
        min_keep_per_layer: elements that every tensor keeps.
        mask_gradients: mask the gradients before the optimizer sees them.
        enforce: ``"always"`` zeroes masked weights after every step; ``"on_update"`` only when the
            masks change, for SGD, Adam and AdamW, which keep zeros by themselves once gradients are
            masked; that is verified every 1000 steps.
        total_steps: for schedules with fractions.
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
        min_keep_per_layer: int = 1,
        mask_gradients: bool = True,
        enforce: Literal["always", "on_update"] = "always",
        total_steps: int | None = None,
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
            min_keep_per_layer=min_keep_per_layer,
            mask_gradients=mask_gradients,
            enforce=enforce,
            seed=seed,
        )
        self._model = model
        self._masks = _starting_masks(model, masks, include, exclude)
        if isinstance(scope, LayerPlan):
            scope.resolve(list(self._masks))
        self.step_count = 0
        self._averaged: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._bits: dict[str, Tensor] = {}
        self._raw_names: dict[str, str] = {}
        self._cleaner = _optim.StateCleaner()

    @property
    def masks(self) -> MaskSet:
        """The present masks."""
        return self._masks

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
        """
        where = f"{_WHERE}.attach"
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{where}: optimizer must be a torch Optimizer, got {optimizer!r}")
        if optimizer in self._optimizers:
            raise ValueError(f"{where}: optimizer must not be attached yet, got it twice")
        if self.settings.enforce == "on_update" and type(optimizer) not in _optim.KEEPS_ZEROS:
            raise ValueError(
                f"{where}: optimizer must be SGD, Adam or AdamW with enforce='on_update', "
                f"got {type(optimizer).__name__}"
            )
        if self.criterion.needs_data:
            raise RuntimeError(
                f"{where}: criterion must not need data, got {type(self.criterion).__name__}; "
                "call step(batch) by hand"
            )
        self._optimizers.append(optimizer)
        try:
            if self.step_count == 0 and self.schedule.is_update(0):
                self._update(None)
        except Exception:
            self._optimizers.pop()
            raise
        self._zero_weights()
        if self._masks_gradients_now():  # otherwise the state may hold what unmasked ones left
            self._clear_state(optimizer)
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
        self._masks.apply_(averaged_model)
        self._averaged.append(averaged_model)

    def step(self, batch: Any = None) -> bool:
        """Advances by one step by hand; only for a pruner that is not attached.

        The optimizer's state is out of reach here and is not cleared.

        Args:
            batch: passed to the criterion.

        Returns:
            Whether the masks changed.

        Raises:
            RuntimeError: if the pruner is attached to an optimizer.
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
        self._zero_weights()
        return changed

    def mask_gradients(self) -> None:
        """Zeroes the gradients of masked weights; call it before ``clip_grad_norm_``.

        Does nothing while masked weights may still return, and none is needed without clipping:
        an attached pruner masks gradients before every step.
        """
        if not self._masks_gradients_now():
            return
        for name, parameter in self._parameters().items():
            if parameter.grad is not None:
                clear_(parameter.grad, self._keep_bits(name, parameter))

    def report(self) -> SparsityReport:
        """Counts by mask and by weight, per tensor and in total."""
        return SparsityReport.of(
            self._model,
            self._masks,
            optimizers=self._optimizers,
            min_keep_per_layer=self.settings.min_keep_per_layer,
        )

    def state_dict(self) -> dict[str, Tensor | str | int | float]:
        """Masks, position, schedule, criterion and settings; strings hold JSON."""
        return _state.collect(
            self._masks, self.step_count, self.schedule, self.criterion, self.settings
        )

    def load_state_dict(
        self, state: dict[str, Tensor | str | int | float], strict: bool = True
    ) -> None:
        """Takes over masks and position; weights and optimizer are restored by their own means.

        Args:
            state: from ``state_dict``.
            strict: schedule, criterion and settings must be this pruner's; otherwise those of this
                pruner go on.

        Raises:
            ValueError: if the state is damaged or, when ``strict``, of another set-up; the pruner
                is then unchanged.
            MaskMatchError: if a mask has no parameter in the model.
        """
        where = f"{_WHERE}.load_state_dict"
        try:
            loaded = _state.restore(state)
            if strict:
                _state.require_same_setup(self.state_dict(), state)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: state must fit this pruner: {error}") from None
        self._adopt(loaded, where)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to one safetensors file, atomically."""
        atomic_write_bytes(path, _state.encode(self.state_dict()))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        schedule: Schedule | None = None,
        criterion: Criterion | None = None,
    ) -> Pruner:
        """A pruner that goes on where the saved one stopped; attach it to the optimizer.

        Args:
            path: a file from ``save``.
            model: the model, with its weights restored.
            schedule: needed only for a schedule of another class than this package's.
            criterion: needed only for a criterion that is no registered dataclass.

        Returns:
            The pruner, not attached.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or does not fit the model.
            MaskMatchError: if a mask has no parameter in the model.
        """
        where = f"{_WHERE}.load"
        content = Path(path).read_bytes()
        try:
            loaded = _state.restore(_state.decode(content))
            schedule = schedule or schedule_from_state(loaded.schedule)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {path} must be an intact pruner file: {error}") from None
        criterion = criterion or loaded.criterion
        if criterion is None:
            raise ValueError(f"{where}: criterion must be given for this file, got None")
        arguments = loaded.settings.arguments()
        pruner = cls(model, schedule, criterion, masks=loaded.masks, **arguments)
        pruner.step_count = loaded.step_count
        return pruner

    def _adopt(self, loaded: _state.Loaded, where: str) -> None:
        self._masks = _placed(self._model, loaded.masks, where)
        self._raw_names.clear()
        self._bits.clear()
        self.step_count = loaded.step_count

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Looked up at use: a wrapper may have replaced the parameters since the last time."""
        try:
            if self._raw_names:
                return {n: self._model.get_parameter(raw) for n, raw in self._raw_names.items()}
        except AttributeError:
            pass  # the model was wrapped or rebuilt under other names
        named = NamedParameters.of(self._model)
        found = self._masks.parameters_of(named, True, _WHERE)
        self._raw_names = {name: named.raw[named.aliases.get(name, name)] for name in found}
        return found

    def _keep_bits(self, name: str, parameter: nn.Parameter) -> Tensor:
        """For ``clear_``, on the parameter's device; kept until the masks change."""
        bits = self._bits.get(name)
        if bits is None or bits.device != parameter.device:
            bits = self._bits[name] = keep_bits(self._masks[name], parameter)
        return bits

    def _masks_gradients_now(self) -> bool:
        return self.settings.mask_gradients and (self.settings.monotone or self.finished)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.mask_gradients()
        return _optim.with_masked_closure(args, kwargs, self.mask_gradients)

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if _optim.was_skipped(optimizer):
            return
        if optimizer is self._optimizers[0] and self._advance(None):
            return
        if self.settings.enforce == "always" or not self._masks_gradients_now():
            self._zero_weights()
        elif self.step_count % _CHECK_EVERY == 0:
            revived = self._masks.check(self._model)
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
        """New masks from the present weights; nothing changes when scoring or selection fails."""
        sparsity = self.schedule.sparsity(self.step_count)
        if self.settings.monotone and not _asks_for_more(sparsity, self._masks):
            return False
        pairs = _optim.masters(self._optimizers, self._parameters().values())
        with master_copies(pairs):
            scores = self.criterion.scores(self._model, self._masks, batch)
        chosen = select(
            scores,
            self._masks,
            sparsity,
            scope=self.settings.scope,
            monotone=self.settings.monotone,
            min_keep_per_layer=self.settings.min_keep_per_layer,
        )
        changed = chosen != self._masks
        self._masks = chosen
        self._bits.clear()
        for optimizer in self._optimizers:
            self._clear_state(optimizer)
        self._zero_weights()
        for averaged in self._averaged:
            self._masks.apply_(averaged)
        return changed

    def _zero_weights(self) -> None:
        for name, parameter in self._parameters().items():
            clear_(parameter, self._keep_bits(name, parameter))

    def _clear_state(self, optimizer: Optimizer) -> None:
        off = {p: ~self._masks[name] for name, p in self._parameters().items()}
        self._cleaner.clear(optimizer, off)


def _starting_masks(
    model: nn.Module,
    masks: MaskSet | None,
    include: Sequence[Rule] | None,
    exclude: Sequence[Rule] | None,
) -> MaskSet:
    if masks is None:
        return MaskSet.dense(model, include, exclude)
    if not isinstance(masks, MaskSet):
        raise TypeError(f"{_WHERE}: masks must be a MaskSet, got {type(masks).__name__}")
    for name, rules in (("include", include), ("exclude", exclude)):
        if rules is not None:
            raise ValueError(f"{_WHERE}: {name} must be None when masks are given, got {rules!r}")
    if not masks:
        raise ValueError(f"{_WHERE}: masks must hold at least one mask, got none")
    return _placed(model, masks, _WHERE)


def _asks_for_more(sparsity: float, masks: MaskSet) -> bool:
    """Whether a sparsity switches off more than is off already."""
    counts = masks.counts().values()
    total = sum(n for _, n in counts)
    return round(sparsity * total) > total - sum(kept for kept, _ in counts)


def _placed(model: nn.Module, masks: MaskSet, where: str) -> MaskSet:
    """The masks on the devices of their parameters."""
    found = masks.parameters_of(NamedParameters.of(model), True, where)
    require_prunable(found, where)
    placed = {name: masks[name].to(p.device) for name, p in found.items()}
    return MaskSet(placed, aliases=masks.aliases, metadata=masks.metadata)

"""How a pruner is written down and read again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from sapwood._files import atomic_write_bytes
from sapwood.pruning import _distributed, _state
from sapwood.pruning._enforce import Enforcer
from sapwood.pruning.criteria import Criterion
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.schedules import Schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


class Persistent:
    """State and files of pruners.

    A class that follows schedules of its own, other than by its constructor's ``schedule``, names
    them in ``_own_schedule`` and overrides ``_rebuilt``.
    """

    schedule: Schedule
    criterion: Criterion
    settings: _state.Settings
    step_count: int
    _enforcer: Enforcer
    _own_schedule: ClassVar[type[Schedule] | None] = None

    @property
    def masks(self) -> MaskSet:
        """The present masks."""
        return self._enforcer.masks

    def state_dict(self) -> dict[str, Tensor | str | int | float]:
        """Masks, position, schedule, criterion and settings; strings hold JSON.

        The masks of sharded parameters are sharded here too; in files they are whole.
        """
        return _state.collect(
            self.masks, self.step_count, self.schedule, self.criterion, self.settings
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
        where = "sapwood.pruning.Pruner.load_state_dict"
        try:
            loaded = _state.restore(state, self.schedule)
            if strict:
                _state.require_same_setup(self.state_dict(), state)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: state must fit this pruner: {error}") from None
        self._enforcer.adopt(loaded.masks, where)
        self.step_count = loaded.step_count

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to one safetensors file, atomically.

        The masks of a sharded model are written whole, by the first rank of its mesh; all ranks
        call, and find the file when the call returns.
        """
        content = _state.encode(self.state_dict())
        _distributed.write_once(self.masks.values(), lambda: atomic_write_bytes(path, content))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        schedule: Schedule | None = None,
        criterion: Criterion | None = None,
        process_group: ProcessGroup | None = None,
    ) -> Self:
        """A pruner that goes on where the saved one stopped; attach it to the optimizer.

        Args:
            path: a file from ``save``. That of a subclass gives an object of the subclass.
            model: the model, with its weights restored.
            schedule: needed only for a schedule of another class than this package's.
            criterion: needed only for a criterion that is no registered dataclass.
            process_group: as in the constructor.

        Returns:
            The pruner, not attached.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, does not fit the model, or was not written by this
                class or a subclass.
            MaskMatchError: if a mask has no parameter in the model.
        """
        where = f"sapwood.pruning.{cls.__name__}.load"
        loaded = _state.read(path, where, schedule)
        if cls._own_schedule is not None and type(loaded.schedule) is not cls._own_schedule:
            raise ValueError(
                f"{where}: {path} must be a file of this class, "
                f"got one with schedule {loaded.schedule!r}"
            )
        criterion = criterion or loaded.criterion
        if criterion is None:
            raise ValueError(f"{where}: criterion must be given for this file, got None")
        writer = next((c for c in cls.__subclasses__() if c._follows(loaded.schedule)), cls)
        pruner = writer._rebuilt(model, loaded, criterion, process_group)
        pruner.step_count = loaded.step_count
        return pruner

    @classmethod
    def _follows(cls, schedule: Schedule) -> bool:
        return cls._own_schedule is type(schedule)

    @classmethod
    def _rebuilt(
        cls, model: nn.Module, loaded: _state.Loaded, criterion: Criterion, group: Any
    ) -> Self:
        raise NotImplementedError

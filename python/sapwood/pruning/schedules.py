"""Schedules: how much is switched off after how many optimizer steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.pruning.allocation import require_sparsity

__all__ = ["Constant", "Cubic", "Iterative", "Linear", "OneShot", "Schedule"]

#: A step (int), or a fraction of all steps (float in (0, 1]).
Position = int | float


class Schedule(ABC):
    """Target sparsity as a function of the number of applied optimizer steps.

    Subclasses define ``kind``, ``monotone``, ``last_update``, ``sparsity`` and ``is_update``, and
    keep their constructor's arguments in ``self._config``.
    """

    kind: ClassVar[str] = ""
    monotone: bool = True
    _config: dict[str, Any]

    @abstractmethod
    def sparsity(self, step: int) -> float:
        """Target after ``step`` steps."""

    @abstractmethod
    def is_update(self, step: int) -> bool:
        """Whether the masks change after ``step`` steps."""

    @property
    @abstractmethod
    def last_update(self) -> int:
        """The step of the last update; the masks are frozen afterwards."""

    def bind(self, total_steps: int | None) -> None:  # noqa: B027 - nothing to do by default
        """Turns fractions into steps.

        Raises:
            ValueError: if there are fractions but no total, or the steps do not fit.
        """

    def state_dict(self) -> dict[str, Any]:
        """Kind and parameters, as JSON values."""
        return {"kind": self.kind, **self._config}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the parameters of a schedule of the same kind.

        Raises:
            ValueError: if the state is of another kind or its parameters are not valid.
        """
        if state.get("kind") != self.kind:
            raise ValueError(
                f"{self._where}.load_state_dict: state must be of kind {self.kind!r}, "
                f"got {state.get('kind')!r}"
            )
        self.__dict__.update(schedule_from_state(state).__dict__)

    @property
    def _where(self) -> str:
        return f"sapwood.pruning.{type(self).__name__}"

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self._config.items())
        return f"{type(self).__name__}({arguments})"


class OneShot(Schedule):
    """Everything at once.

    Example:
        >>> from sapwood.pruning import OneShot
        >>> schedule = OneShot(0.9, at=100)
        >>> schedule.sparsity(99), schedule.sparsity(100)
        (0.0, 0.9)

    Args:
        S: target sparsity in [0, 1).
        at: the step of the cut.

    Raises:
        ValueError: if S is not finite or outside [0, 1), or at is negative.
    """

    kind = "one_shot"

    def __init__(self, S: float, at: int = 0) -> None:
        self.S = require_sparsity(S, self._where, "S")
        self.at = _require_count(at, 0, "at", self._where)
        self._config = {"S": self.S, "at": self.at}

    def sparsity(self, step: int) -> float:
        """S from ``at`` on, 0 before."""
        return self.S if step >= self.at else 0.0

    def is_update(self, step: int) -> bool:
        """True at ``at`` only."""
        return step == self.at

    @property
    def last_update(self) -> int:
        """``at``."""
        return self.at


class Constant(OneShot):
    """The same sparsity from the start, for methods that move the masks at fixed counts.

    Example:
        >>> from sapwood.pruning import Constant
        >>> Constant(0.8).sparsity(0)
        0.8

    Args:
        S: sparsity in [0, 1).

    Raises:
        ValueError: if S is not finite or outside [0, 1).
    """

    kind = "constant"

    def __init__(self, S: float) -> None:
        super().__init__(S)
        self._config = {"S": self.S}


class _Ramp(Schedule):
    """From s0 to S between t0 and t1, with an update every ``every`` steps and one at t1."""

    def __init__(
        self, S: float, *, t1: Position, every: int, t0: Position = 0, s0: float = 0.0
    ) -> None:
        self.S = require_sparsity(S, self._where, "S")
        self.s0 = require_sparsity(s0, self._where, "s0")
        if self.s0 > self.S:
            raise ValueError(f"{self._where}: s0 must be at most S = {self.S}, got {self.s0}")
        self.t0 = _require_position(t0, "t0", self._where)
        self.t1 = _require_position(t1, "t1", self._where)
        self.every = _require_count(every, 1, "every", self._where)
        if isinstance(self.t0, int) == isinstance(self.t1, int):
            self._require_order()
        self._remember()

    def _remember(self) -> None:
        keys = ("S", "t0", "t1", "every", "s0")
        self._config = {key: getattr(self, key) for key in keys}

    def _require_order(self) -> None:
        if not self.t0 < self.t1:
            raise ValueError(
                f"{self._where}: t0 must be less than t1, got t0 = {self.t0} and t1 = {self.t1}"
            )

    def bind(self, total_steps: int | None) -> None:
        """Turns fractional t0 and t1 into steps of ``total_steps``."""
        if isinstance(self.t0, int) and isinstance(self.t1, int):
            return
        if total_steps is None:
            raise ValueError(
                f"{self._where}: total_steps must be given when t0 or t1 is a fraction, "
                f"got t0 = {self.t0} and t1 = {self.t1}"
            )
        total = _require_count(total_steps, 1, "total_steps", self._where)
        self.t0 = self.t0 if isinstance(self.t0, int) else round(self.t0 * total)
        self.t1 = self.t1 if isinstance(self.t1, int) else round(self.t1 * total)
        self._require_order()
        self._remember()

    def _progress(self, step: int) -> float:
        self.bind(None)
        return min(max((step - self.t0) / (self.t1 - self.t0), 0.0), 1.0)

    def is_update(self, step: int) -> bool:
        """Every ``every`` steps from t0 on, and at t1."""
        self.bind(None)
        inside = self.t0 <= step <= self.t1
        return inside and ((step - self.t0) % self.every == 0 or step == self.t1)

    @property
    def last_update(self) -> int:
        """t1."""
        self.bind(None)
        return int(self.t1)


class Linear(_Ramp):
    """s(t) = s0 + (S - s0) * clip((t - t0) / (t1 - t0), 0, 1).

    Example:
        >>> from sapwood.pruning import Linear
        >>> Linear(0.9, t1=100, every=10).sparsity(50)
        0.45

    Args:
        S: final sparsity in [0, 1).
        t1: step of the last update; a float in (0, 1] is a fraction of ``total_steps``.
        every: steps between updates.
        t0: step of the first update, or a fraction.
        s0: sparsity at t0.

    Raises:
        ValueError: unless 0 <= s0 <= S < 1, 0 <= t0 < t1 and every >= 1.

    References:
        Our implementation of the linear schedule of progressive magnitude pruning,
        arXiv:2606.12278, of which the abstract was read.
    """

    kind = "linear"

    def sparsity(self, step: int) -> float:
        """The straight line."""
        progress = self._progress(step)
        return self.S if progress >= 1.0 else self.s0 + (self.S - self.s0) * progress


class Cubic(_Ramp):
    """s(t) = S + (s0 - S) * (1 - clip((t - t0) / (t1 - t0), 0, 1))^3.

    Fast at first, slow at the end, when the network has little left to spare. Masked weights may
    return until t1; pass ``monotone=True`` to the ``Pruner`` for the variant without return.

    Example:
        >>> from sapwood.pruning import Cubic
        >>> Cubic(0.75, t1=100, every=10).sparsity(50)
        0.65625

    Args:
        S: final sparsity in [0, 1).
        t1: step of the last update; a float in (0, 1] is a fraction of ``total_steps``.
        every: steps between updates.
        t0: step of the first update, or a fraction.
        s0: sparsity at t0.

    Raises:
        ValueError: unless 0 <= s0 <= S < 1, 0 <= t0 < t1 and every >= 1.

    References:
        Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878, equation 1.
    """

    kind = "cubic"
    monotone = False

    def sparsity(self, step: int) -> float:
        """The cubic curve."""
        return self.S + (self.s0 - self.S) * (1.0 - self._progress(step)) ** 3


class Iterative(Schedule):
    """A fixed fraction of the survivors per round; the step counts rounds.

    Example:
        >>> from sapwood.pruning import Iterative
        >>> [round(Iterative(rounds=3).sparsity(r), 3) for r in range(4)]
        [0.0, 0.2, 0.36, 0.488]

    Args:
        S: final sparsity in [0, 1). Alone, it is reached in the fewest rounds that ``rate``
            allows, the last one taking less; with ``rounds`` the rate follows from the two.
        rate: fraction of the survivors to cut per round, in (0, 1).
        rounds: number of rounds.

    Raises:
        ValueError: if a value is outside its range, or neither S nor rounds is given.

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, arXiv:1803.03635, section 2.
    """

    kind = "iterative"

    def __init__(
        self, S: float | None = None, rate: float = 0.2, rounds: int | None = None
    ) -> None:
        if not 0.0 < rate < 1.0:
            raise ValueError(f"{self._where}: rate must be in (0, 1), got {rate}")
        if S is None and rounds is None:
            raise ValueError(f"{self._where}: S or rounds must be given, got neither")
        self._config = {"S": S, "rate": rate, "rounds": rounds}
        if rounds is not None:
            rounds = _require_count(rounds, 1, "rounds", self._where)
        if S is not None:
            S = require_sparsity(S, self._where, "S")
            if rounds is None:
                # the tolerance keeps 1 - (1 - rate)^r, typed in by hand, at r rounds
                rounds = max(1, math.ceil(math.log1p(-S) / math.log1p(-rate) - 1e-9))
            else:
                rate = -math.expm1(math.log1p(-S) / rounds)
        self.rate = float(rate)
        self.rounds = rounds or 1
        self.S = -math.expm1(self.rounds * math.log1p(-self.rate)) if S is None else S

    def sparsity(self, step: int) -> float:
        """1 - (1 - rate)^step, and S from the last round on."""
        if step >= self.rounds:
            return self.S
        return min(1.0 - (1.0 - self.rate) ** max(step, 0), self.S)

    def is_update(self, step: int) -> bool:
        """True for rounds 1 to ``rounds``."""
        return 1 <= step <= self.rounds

    @property
    def last_update(self) -> int:
        """The number of rounds."""
        return self.rounds


_KINDS: dict[str, type[Schedule]] = {
    cls.kind: cls for cls in (OneShot, Constant, Linear, Cubic, Iterative)
}


def register_schedule(cls: type[Schedule]) -> None:
    """Lets ``schedule_from_state`` rebuild a schedule of another module of this package."""
    _KINDS[cls.kind] = cls


def schedule_from_state(state: Mapping[str, Any]) -> Schedule:
    """Rebuilds a schedule of this module from its ``state_dict``.

    Raises:
        ValueError: if the kind is unknown or the parameters are not valid.
    """
    parameters = {key: value for key, value in state.items() if key != "kind"}
    cls = _KINDS.get(str(state.get("kind")))
    if cls is None:
        raise ValueError(
            f"sapwood.pruning.Schedule: kind must be one of {sorted(_KINDS)}, "
            f"got {state.get('kind')!r}"
        )
    try:
        return cls(**parameters)
    except TypeError as error:
        raise ValueError(
            f"sapwood.pruning.{cls.__name__}: state must fit the constructor: {error}"
        ) from None


def _require_count(value: int, minimum: int, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{where}: {name} must be at least {minimum}, got {value}")
    return value


def _require_position(value: Position, name: str, where: str) -> Position:
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return value
    if isinstance(value, float):
        raise ValueError(f"{where}: {name} must be a step or a fraction in (0, 1], got {value}")
    return _require_count(value, 0, name, where)

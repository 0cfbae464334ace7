"""Criteria: which weights matter. High scores are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sapwood.pruning._distributed import place
from sapwood.pruning._names import NamedParameters, require_matching
from sapwood.pruning.masks import MaskSet

__all__ = ["Criterion", "Magnitude", "Random", "register_criterion"]

_REGISTRY: dict[str, Callable[..., Criterion]] = {}

#: What ``master_copies`` shows copies of at the moment, with the data that belongs there.
_HIDDEN: dict[nn.Parameter, Tensor] = {}


@runtime_checkable
class Criterion(Protocol):
    """What a criterion provides; ``needs_data`` says whether ``scores`` must get a batch."""

    @property
    def needs_data(self) -> bool:
        """Whether the scores depend on data."""
        ...

    def scores(
        self,
        model: nn.Module,
        masks: MaskSet,
        batch: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Name -> float32 or float64 tensor of the parameter's shape, for every mask."""
        ...


def register_criterion(name: str, cls: Callable[..., Criterion]) -> None:
    """Makes a criterion available by name wherever a criterion is asked for.

    Example:
        >>> from sapwood.pruning import Magnitude, register_criterion
        >>> register_criterion("l1", Magnitude)

    Args:
        name: the name; not taken by another class yet.
        cls: called with the criterion's parameters as keywords.

    Raises:
        ValueError: if the name belongs to another criterion.
    """
    if _REGISTRY.get(name, cls) is not cls:
        raise ValueError(
            f"sapwood.pruning.register_criterion: name must be free, got {name!r} of another class"
        )
    _REGISTRY[name] = cls


def resolve_criterion(criterion: str | Criterion, where: str, **parameters: Any) -> Criterion:
    """A criterion from its name, or the criterion itself."""
    if isinstance(criterion, str):
        if criterion not in _REGISTRY:
            raise ValueError(
                f"{where}: criterion must be one of {sorted(_REGISTRY)}, got {criterion!r}"
            )
        return _REGISTRY[criterion](**parameters)
    if not isinstance(criterion, Criterion):
        raise TypeError(
            f"{where}: criterion must be a name or have needs_data and scores, "
            f"got {type(criterion).__name__}"
        )
    return criterion


def describe_criterion(criterion: Criterion) -> dict[str, Any] | None:
    """Name and parameters that rebuild a criterion, or None where that cannot be written down."""
    names = [name for name, cls in _REGISTRY.items() if cls is type(criterion)]
    if not names or not dataclasses.is_dataclass(criterion):
        return None
    return {"name": names[0], "parameters": dataclasses.asdict(criterion)}


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """|w|^p: what is small matters least.

    Example:
        >>> import torch
        >>> from sapwood.pruning import Magnitude, MaskSet
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[-2.0, 1.0]]))
        >>> Magnitude().scores(layer, MaskSet.dense(layer))["weight"]
        tensor([[2., 1.]])

    Args:
        p: the power; it changes sums of scores, not their order within one tensor.

    Raises:
        ValueError: if p is not finite and positive.
    """

    p: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.p) or self.p <= 0:
            raise ValueError(
                f"sapwood.pruning.Magnitude: p must be finite and positive, got {self.p}"
            )

    @property
    def needs_data(self) -> bool:
        """False: the weights are enough."""
        return False

    def scores(
        self,
        model: nn.Module,
        masks: MaskSet,
        batch: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """|w|^p of every masked parameter; ``batch`` and ``loss_fn`` are not used."""
        weights = require_matching(masks, NamedParameters.of(model), True, f"{_where(self)}.scores")
        magnitudes = {name: widened(weight).abs() for name, weight in weights.items()}
        if self.p == 1.0:
            return magnitudes
        return {name: magnitude.pow(self.p) for name, magnitude in magnitudes.items()}


@dataclasses.dataclass(frozen=True)
class Random:
    """Uniform scores, fixed by the seed and the parameter's name: the control of an experiment.

    Example:
        >>> import torch
        >>> from sapwood.pruning import Random, prune
        >>> prune(torch.nn.Linear(8, 8), 0.5, Random(seed=3)).sparsity()
        0.5

    Args:
        seed: the seed. The scores do not change from update to update, so schedules give nested
            masks; they are the same on every device, and however the parameters are sharded.
    """

    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """False: the names and shapes are enough."""
        return False

    def scores(
        self,
        model: nn.Module,
        masks: MaskSet,
        batch: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Uniform scores in [0, 1); ``batch`` and ``loss_fn`` are not used."""
        weights = require_matching(masks, NamedParameters.of(model), True, f"{_where(self)}.scores")
        return {name: self._uniform(name, weight) for name, weight in weights.items()}

    def _uniform(self, name: str, weight: Tensor) -> Tensor:
        uniform = torch.rand(
            weight.shape, generator=named_generator(self.seed, name), dtype=score_dtype(weight)
        )
        return place(uniform, weight)


register_criterion("magnitude", Magnitude)
register_criterion("random", Random)


def _where(criterion: Criterion) -> str:
    return f"sapwood.pruning.{type(criterion).__name__}"


def ranks_absolute_weights(criterion: Criterion) -> bool:
    """Whether the order is that of |w|: ``select(weights, absolute=True)`` then needs no scores."""
    own = type(criterion).scores is Magnitude.scores  # a subclass may have put others in place
    return own and isinstance(criterion, Magnitude) and criterion.p == 1.0


def score_dtype(weight: Tensor) -> torch.dtype:
    """The precision of scores: float32, or float64 for a float64 parameter."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def widened(weight: Tensor) -> Tensor:
    """Detached, in the precision of scores."""
    return weight.detach().to(score_dtype(weight))


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and a parameter's name alone."""
    named = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(named[:8], "little") >> 1)


@contextmanager
def master_copies(pairs: list[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Shows the float32 master copies of narrow parameters to code that reads the parameters.

    Ranking rounded weights would tie what the optimizer still tells apart.
    """
    narrow = {parameter: parameter.data for parameter, _ in pairs}
    try:
        for parameter, master in pairs:
            parameter.data = master
        _HIDDEN.update(narrow)
        yield
    finally:
        for parameter, data in narrow.items():
            _HIDDEN.pop(parameter, None)
            parameter.data = data


@contextmanager
def own_data() -> Iterator[None]:
    """Undoes ``master_copies`` for code that runs the model, whose forward wants one dtype."""
    hidden = dict(_HIDDEN)
    masters = {parameter: parameter.data for parameter in hidden}
    try:
        for parameter, data in hidden.items():
            parameter.data = data
        yield
    finally:
        for parameter, master in masters.items():
            parameter.data = master

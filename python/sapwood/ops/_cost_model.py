"""Which storage format of a packed weight is fastest: a cost model and a pure choice.

A table holds measured costs on a small grid of shapes, batches and densities. A prediction
interpolates them:

    seconds = overhead + cost(n k, batch, density) * n k * batch_units(format, batch) * skew

piecewise linearly in log(n k), log(batch) and density. The cost per weight and batch column moves
slowly with the shape (it follows the cache level the weights lie in) and with the batch (it
follows register reuse), which is why three shapes and six batches are enough. The shapes
measured are square; skewed ones cost a packed format more, by (longer side / shorter)**SKEW.
"""

from __future__ import annotations

import json
import math
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from sapwood import _check

FORMATS = ("dense", "bitmap", "csr", "sell")

#: A sparse format is chosen when it is predicted to take at most this share of the dense time. Near
#: the crossover predictions were off by up to a tenth: better a small gain missed than a loss.
MARGIN = 0.88

#: Exponent of the skew. Against dense, csr took 1.04 to 1.17 times as long at 4 : 1 as at 1 : 1,
#: and 1.14 to 1.72 times at 16 : 1 (2**22 weights, float32, AVX-512, batches 64 and 256).
SKEW = 0.1

#: First batch of each bucket; the format is chosen at that batch for the whole bucket. Within a
#: bucket the first batch wastes the largest share of a panel, so what wins there wins everywhere.
#: A power of two from 16 on fills its panels, and stands alone.
BUCKETS = (1, 2, 3, 5, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513)

#: Largest batch each format has a kernel for.
LARGEST_BATCH = {
    "cpu": {"dense": sys.maxsize, "csr": sys.maxsize, "bitmap": 8, "sell": 8},
    "cuda": {"dense": sys.maxsize, "csr": sys.maxsize, "bitmap": 64},
}

#: Changes when the meaning of the file changes; older files are measured anew.
LAYOUT = 1


@dataclass(frozen=True)
class Key:
    """What a table was measured for."""

    device: str  # "cpu" or "cuda"
    isa: str  # "avx512", "avx2", "default"; compute capability such as "sm_90" on a GPU
    dtype: str  # of values and activations, as in "float32"
    threads: int


@dataclass(frozen=True)
class Surface:
    """Measured costs of one format, in seconds per weight and batch unit."""

    overhead: float  # seconds of a call that has almost nothing to compute
    batches: tuple[int, ...]  # ascending
    densities: tuple[float, ...]  # ascending
    costs: tuple[tuple[tuple[float, ...], ...], ...]  # (shape, batch, density)

    def cost(self, shape: int, batch: float, density: float) -> float:
        """Cost at one shape knot, interpolated in log(batch) and density."""
        low, high, share = _clamped([math.log(b) for b in self.batches], math.log(batch))
        first = _interpolate(self.densities, self.costs[shape][low], density)
        last = _interpolate(self.densities, self.costs[shape][high], density)
        return max(0.0, first + share * (last - first))


@dataclass(frozen=True)
class DispatchTable:
    """The measured costs from which ``choose`` decides.

    >>> from sapwood.ops._dispatch import builtin_table
    >>> table = builtin_table(Key("cpu", "avx512", "float32", threads=1))
    >>> DispatchTable.from_json(table.to_json()).key == table.key
    True
    """

    key: Key
    sides: tuple[int, ...]  # ascending; the weights measured were side x side
    surfaces: Mapping[str, Surface]  # by format; a format without a surface is never chosen
    version: str  # of sapwood, when it was measured
    source: str  # "builtin", "calibrated" or the path it was read from
    only: str | None = None  # the format to use wherever it has a kernel, whatever the costs say

    def to_json(self) -> str:
        """The table as JSON text."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The table as plain dictionaries and tuples, ready for JSON."""
        return {
            "layout": LAYOUT,
            "version": self.version,
            "key": vars(self.key),
            "sides": self.sides,
            "surfaces": {name: vars(surface) for name, surface in self.surfaces.items()},
        }

    @classmethod
    def from_json(cls, text: str, source: str = "calibrated") -> DispatchTable:
        """The table that ``to_json`` wrote, with every field checked.

        Raises:
            ValueError: when the text is not JSON or not such a table.
        """
        try:
            return cls.from_dict(json.loads(text), source)
        except (json.JSONDecodeError, RecursionError) as error:  # too deep to be read or shown
            _invalid("text", "be JSON", str(error))

    @classmethod
    def from_dict(cls, content: object, source: str) -> DispatchTable:
        """The table from parsed JSON. Raises ValueError as ``from_json``."""
        if not isinstance(content, dict):
            _invalid("text", "be a JSON object", type(content).__name__)
        if content.get("layout") != LAYOUT:
            _invalid("layout", f"be {LAYOUT}", repr(content.get("layout")))
        sides = _ascending("sides", content.get("sides"), int)
        surfaces = content.get("surfaces")
        if not isinstance(surfaces, dict) or not set(surfaces) <= set(FORMATS):
            _invalid("surfaces", f"be an object with keys among {FORMATS}", repr(surfaces)[:80])
        if "dense" not in surfaces:
            _invalid("surfaces", "hold the format dense", f"{sorted(surfaces)}")
        return cls(
            key=_key_from(content.get("key")),
            sides=sides,
            surfaces={name: _surface_from(s, name, len(sides)) for name, s in surfaces.items()},
            version=str(content.get("version")),
            source=source,
        )


def batch_bucket(batch: int) -> int:
    """Index of the bucket that holds ``batch``; ``BUCKETS`` has the first batch of each.

    >>> [batch_bucket(b) for b in (0, 1, 15, 16, 17, 31, 10_000)]
    [0, 0, 4, 5, 6, 6, 16]
    """
    bucket = len(BUCKETS) - 1
    while bucket > 0 and batch < BUCKETS[bucket]:  # bisect, but torch.compile can trace it
        bucket -= 1
    return bucket


def batch_units(format: str, batch: int) -> int:
    """Columns a kernel works on for ``batch`` columns: the csr kernel works on whole panels.

    A panel is 64 columns wide, the last one 16 or 32 when that is enough.

    >>> [batch_units("csr", b) for b in (1, 17, 33, 65)], batch_units("dense", 65)
    ([16, 32, 64, 80], 65)
    """
    if format != "csr":
        return batch
    whole, left = divmod(batch, 64)
    tail = 64 if left > 32 else -(-left // 16) * 16
    return 64 * whole + tail


def predict(table: DispatchTable, format: str, n: int, k: int, nnz: int, batch: int) -> float:
    """Predicted seconds of one call of an (n, k) weight with nnz kept entries on ``batch`` rows.

    >>> from sapwood.ops._dispatch import builtin_table
    >>> table = builtin_table(Key("cpu", "avx512", "float32", threads=1))
    >>> predict(table, "dense", 512, 512, 512 * 512, 64) > 0
    True

    Args:
        table: the costs.
        format: "dense", "bitmap", "csr" or "sell".
        n: output features.
        k: input features.
        nnz: kept weights.
        batch: rows of the input.

    Returns:
        Seconds; infinity when the format has no kernel there.
    """
    surface = table.surfaces.get(format)
    if surface is None or batch > LARGEST_BATCH[table.key.device].get(format, 0):
        return math.inf
    if n * k * batch == 0:
        return surface.overhead
    density = nnz / (n * k)
    knots = [2 * math.log(side) for side in table.sides]
    low, high, share = _clamped(knots, math.log(n * k))
    first, last = (surface.cost(shape, batch, density) for shape in (low, high))
    skew = 1.0 if format == "dense" else (max(n, k) / min(n, k)) ** SKEW
    work = n * k * batch_units(format, batch) * skew
    return surface.overhead + (first + share * (last - first)) * work


def choose(
    table: DispatchTable,
    n: int,
    k: int,
    nnz: int,
    batch: int,
    formats: Iterable[str] = FORMATS,
) -> tuple[str, dict[str, float]]:
    """The fastest format by prediction; a pure function of its arguments.

    >>> from sapwood.ops._dispatch import builtin_table
    >>> table = builtin_table(Key("cpu", "avx512", "float32", threads=1))
    >>> choose(table, 2048, 2048, 2048 * 2048, 64)[0]
    'dense'

    Args:
        table: the costs.
        n: output features.
        k: input features.
        nnz: kept weights.
        batch: rows of the input.
        formats: those to choose from. When "dense" is among them, another must be predicted to
            take at most ``MARGIN`` of its time. ``table.only`` overrides the costs.

    Returns:
        The format, and the predicted seconds of each that has a kernel for the batch.

    Raises:
        ValueError: when no format of ``formats`` has a kernel for the batch.
    """
    times = {name: predict(table, name, n, k, nnz, batch) for name in formats}
    predictions = {name: time for name, time in times.items() if math.isfinite(time)}
    if not predictions:
        names = ", ".join(times) or "none"
        _check.fail(ValueError, "choose", "formats", f"have a kernel for batch {batch}", names)
    if table.only in predictions:
        return table.only, predictions
    best = min(predictions, key=predictions.__getitem__)
    if "dense" in predictions and predictions[best] > MARGIN * predictions["dense"]:
        best = "dense"
    return best, predictions


def useful_formats(
    table: DispatchTable,
    n: int,
    k: int,
    nnz: int,
    formats: Sequence[str] = FORMATS,
    batches: Iterable[int] = BUCKETS,
) -> tuple[str, ...]:
    """The formats that win in some bucket: what a packed weight has to hold to be always fast.

    Args:
        table: the costs.
        n: output features.
        k: input features.
        nnz: kept weights.
        formats: those to choose from.
        batches: the batches that count; by default one in every bucket.

    Returns:
        A subset of ``formats``, in their order.
    """
    first = {BUCKETS[batch_bucket(batch)] for batch in batches}
    winners = {choose(table, n, k, nnz, batch, formats)[0] for batch in first}
    return tuple(name for name in formats if name in winners)


def _interpolate(knots: Sequence[float], values: Sequence[float], at: float) -> float:
    """Piecewise linear, continued beyond the ends."""
    low, high, share = _bracket(knots, at)
    return values[low] + share * (values[high] - values[low])


def _bracket(knots: Sequence[float], at: float) -> tuple[int, int, float]:
    """The two knots around ``at`` and its place between them, as a share that may leave [0, 1]."""
    if len(knots) == 1:
        return 0, 0, 0.0
    low = min(max(bisect_right(knots, at) - 1, 0), len(knots) - 2)
    return low, low + 1, (at - knots[low]) / (knots[low + 1] - knots[low])


def _clamped(knots: Sequence[float], at: float) -> tuple[int, int, float]:
    low, high, share = _bracket(knots, at)
    return low, high, min(1.0, max(0.0, share))


def _invalid(field: str, expectation: str, actual: str) -> NoReturn:
    _check.fail(ValueError, "DispatchTable", field, expectation, actual)


def _ascending(field: str, value: object, kind: type) -> tuple[Any, ...]:
    """A non-empty ascending list of positive numbers of ``kind``, as a tuple."""
    kinds = (int, float) if kind is float else (int,)
    fine = (
        isinstance(value, list)
        and bool(value)
        and all(type(v) in kinds and 0 < v < 2**31 for v in value)
        and all(a < b for a, b in pairwise(value))
    )
    if not fine or not isinstance(value, list):
        _invalid(field, f"be an ascending list of positive {kind.__name__}s", repr(value)[:80])
    return tuple(kind(v) for v in value)


def _cost(field: str, value: object) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < 2**31:
        _invalid(field, "be a finite number of seconds", repr(value)[:80])
    return float(value)


def _key_from(value: object) -> Key:
    kinds = {"device": str, "isa": str, "dtype": str, "threads": int}
    if not isinstance(value, dict) or {k: type(v) for k, v in value.items()} != kinds:
        _invalid("key", f"be an object with the fields {tuple(kinds)}", repr(value)[:80])
    if value["device"] not in LARGEST_BATCH:
        _invalid("device", f"be one of {tuple(LARGEST_BATCH)}", repr(value["device"]))
    return Key(**value)


def _surface_from(value: object, name: str, sides: int) -> Surface:
    if not isinstance(value, dict) or set(value) != {"overhead", "batches", "densities", "costs"}:
        _invalid(f"surface {name}", "hold overhead, batches, densities and costs", repr(value)[:80])
    batches = _ascending(f"batches of {name}", value["batches"], int)
    densities = _ascending(f"densities of {name}", value["densities"], float)
    costs = value["costs"]
    wanted = (sides, len(batches), len(densities))
    if _shape(costs) != wanted:
        _invalid(f"costs of {name}", f"have shape {wanted}", f"{_shape(costs)}")
    return Surface(
        overhead=_cost(f"overhead of {name}", value["overhead"]),
        batches=batches,
        densities=densities,
        costs=tuple(
            tuple(tuple(_cost(f"costs of {name}", c) for c in row) for row in plane)
            for plane in costs
        ),
    )


def _shape(value: object) -> tuple[int, ...]:
    """Shape of nested lists; () where they are ragged."""
    if not isinstance(value, list):
        return ()
    inner = {_shape(v) for v in value}
    return (len(value), *inner.pop()) if len(inner) == 1 else (len(value),)

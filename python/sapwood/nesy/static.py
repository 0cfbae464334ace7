"""Programs that promise to do the same on every call: their structure without running them.

The inputs of draws and the data are remembered as slices of the arguments, and read again from the
arguments of later calls.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.nesy.circuits import Piece, pieces_of, widened
from sapwood.nesy.draws import Leaf, Source
from sapwood.nesy.execute import Execution
from sapwood.nesy.expressions import Observed
from sapwood.nesy.plan import PLANS, Plan, Query
from sapwood.nesy.symbols import Categorical
from sapwood.nesy.trace import Keys, trace

if TYPE_CHECKING:
    from sapwood.nesy.program import Program

_logger = logging.getLogger("sapwood.nesy")
_MOST = 256


@dataclass(frozen=True)
class _View:
    """A slice of an argument."""

    argument: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    whole: bool

    def read(self, tensors: list[Tensor]) -> Tensor:
        tensor = tensors[self.argument]
        if self.whole:
            return tensor
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass
class _Static:
    plan: Plan
    sources: list[tuple[Source, tuple[_View, ...]]]
    columns: list[_View]
    together: bool  # there is one view, of all columns
    batch: int | None

    @functools.cached_property
    def direct(self) -> _Direct | None:
        return _Direct.of(self)


@dataclass(frozen=True)
class _Direct:
    """A sentence that is one circuit over one network: its log truth with nothing to decide.

    Small problems cost what is called, not what is computed: after a network has run, Python's code
    and data come from memory again.
    """

    piece: Piece
    source: Categorical
    inputs: tuple[tuple[_View, ...], ...]  # per input of the network, one of each leaf
    columns: list[_View]
    together: bool
    rows: int  # of the logits

    @classmethod
    def of(cls, known: _Static) -> _Direct | None:
        """The same sentence, if it is of this kind."""
        plan = known.plan
        if len(plan.slots) != 1 or len(plan.results) != 1 or not known.batch:
            return None
        sources = [known.sources[leaf] for leaf in plan.slots[0]]
        source = sources[0][0] if sources else None
        if type(source) is not Categorical or not sources[0][1]:
            return None
        pieces = pieces_of(plan, frozenset([0])).steps
        if (
            len(pieces) != 1
            or not isinstance(pieces[0], Piece)
            or pieces[0].circuit.num_results != 1
        ):
            return None
        inputs = tuple(zip(*(views for _, views in sources), strict=True))
        rows = known.batch * len(sources)
        return cls(pieces[0], source, inputs, known.columns, known.together, rows)

    def run(self, tensors: list[Tensor], dtype: torch.dtype | None) -> Tensor | None:
        """(B, 1); None for a network that gives one row for all, or a wrong number of them."""
        inputs = [_cat([view.read(tensors) for view in views]) for views in self.inputs]
        logits = widened(self.source.logits(*inputs, dtype=dtype))
        if logits.shape[0] != self.rows:
            return None
        columns: list[Tensor] | Tensor = [view.read(tensors) for view in self.columns]
        if self.together:
            columns = columns[0]
        return self.piece.truth(logits, self.piece.evidence(columns))


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


_known: OrderedDict[Hashable, _Static | None] = OrderedDict()
_told: set[Hashable] = set()


def log_truth(program: Program) -> Tensor | None:
    """The log truth by a remembered structure; None where the program has to be traced."""
    key, tensors = _read(program)
    found = _find(program, key)
    if found is None:
        return None
    if found.direct is not None:
        truth = found.direct.run(tensors, program.dtype)
        if truth is not None:
            return truth.view(-1)
    leaves = [
        Leaf(source, tuple(v.read(tensors) for v in views)) for source, views in found.sources
    ]
    columns: list[Tensor] | Tensor = [view.read(tensors) for view in found.columns]
    if found.together:
        columns = columns[0]
    return Execution(found.plan, leaves, columns, found.batch, program.dtype).run()


def mean_loss(program: Program) -> Tensor | None:
    """The mean negative log truth of a sentence that is one circuit; None for any other.

    It is the loss of a classifier that has one class, the truth: one node of autograd, not three.
    """
    key, tensors = _read(program)
    found = _find(program, key)
    if found is None or found.direct is None:
        return None
    truth = found.direct.run(tensors, program.dtype)
    return None if truth is None else F.nll_loss(truth, _only_class(truth.shape[0], truth.device))


@functools.lru_cache(maxsize=64)
def _only_class(rows: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64, device=device)


def _find(program: Program, key: Hashable) -> _Static | None:
    if key is None:
        _tell(program, "an argument or a closure has no hash")
        return None
    if key not in _known:
        _known[key] = _learn(program)
        if len(_known) > _MOST:
            _known.popitem(last=False)
    found = _known[key]
    if found is None:
        _tell(program, "it reads something else than slices of its arguments")
        return None
    return found


def _tell(program: Program, reason: str) -> None:
    code = getattr(program.function, "__code__", None)
    if code not in _told:
        _told.add(code)
        name = getattr(program.function, "__qualname__", "a program")
        _logger.warning("sapwood.nesy: %s is traced on every call: %s", name, reason)


def _read(program: Program) -> tuple[Hashable, list[Tensor]]:
    """What decides the structure, None where it has no hash, and the tensors that are given."""
    function = program.function
    given, tensors = list[Any](), list[Tensor]()
    for value in (*program.arguments, *program.options.values()):
        tensor = value.values if isinstance(value, Observed) else value
        if isinstance(tensor, Tensor):
            known = value.given if isinstance(value, Observed) else None
            given += (type(value), known, tensor.shape, tensor.stride(), tensor.dtype)
            given.append(tensor.device)
            tensors.append(tensor)
        else:
            given += (type(value), value)
    closure = [
        (type(cell.cell_contents), cell.cell_contents)
        for cell in getattr(function, "__closure__", None) or ()
    ]
    key = (
        getattr(function, "__code__", function), *closure,
        getattr(function, "__defaults__", None), *program.options, *given, program.dtype,
        program.max_paths,
    )  # fmt: skip
    try:
        hash(key)
    except TypeError:
        return None, tensors
    return key, tensors


def _tensors(program: Program) -> list[Tensor]:
    return _read(program)[1]


def _alone(value: Any) -> Any:
    """An argument of the same shape and strides in memory of its own, so that slices show whose."""
    if isinstance(value, Observed):
        return Observed(_alone(value.values), value.given)
    if not isinstance(value, Tensor):
        return value
    steps = zip(value.shape, value.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps) if value.numel() else 0
    memory = torch.zeros(last + 1, dtype=value.dtype, device=value.device)
    return memory.as_strided(value.shape, value.stride())


def _learn(program: Program) -> _Static | None:
    program = replace(
        program,
        arguments=tuple(map(_alone, program.arguments)),
        options={name: _alone(v) for name, v in program.options.items()},
    )
    traced = trace(program, program.max_paths)
    program._check_sentence(traced)
    if traced.weighted:
        return None
    keys = Keys()
    plan = PLANS.get(traced, keys, Query.TRUTH)
    if any(name.startswith("data[") for path in plan.paths for name in path.graph.names):
        return None
    tensors = _tensors(program)
    views = [[_view(x, tensors) for x in leaf.inputs] for leaf in keys.leaves]
    columns = [_view(column.values, tensors) for column in keys.columns]
    complete = [[v for v in own if v is not None] for own in views]
    if complete != views or None in columns:
        return None
    sources = [(leaf.source, tuple(own)) for leaf, own in zip(keys.leaves, complete, strict=True)]
    known = [c for c in columns if c is not None]
    joined = _joined(known, tensors)
    if joined is not None:
        return _Static(plan, sources, [joined], True, traced.batch)
    return _Static(plan, sources, known, False, traced.batch)


def _joined(columns: list[_View], tensors: list[Tensor]) -> _View | None:
    """Columns that lie evenly in one argument as one view (B, C)."""
    if len(columns) < 2:
        return None
    first, step = columns[0], columns[1].offset - columns[0].offset
    like = (first.argument, first.size, first.stride)
    even = all(
        (c.argument, c.size, c.stride) == like and c.offset == first.offset + i * step
        for i, c in enumerate(columns)
    )
    if not even or step < 1 or len(first.size) != 1:
        return None
    size, stride = (*first.size, len(columns)), (*first.stride, step)
    argument = tensors[first.argument]
    whole = first.offset == 0 and (size, stride) == (tuple(argument.shape), argument.stride())
    return _View(first.argument, first.offset, size, stride, whole)


def _view(tensor: Tensor, arguments: list[Tensor]) -> _View | None:
    """How a tensor is a slice of an argument, if it is one."""
    for number, argument in enumerate(arguments):
        same = tensor.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()
        if same and tensor.dtype == argument.dtype and tensor.device == argument.device:
            offset = tensor.storage_offset() - argument.storage_offset()
            whole = (
                offset == 0
                and tensor.shape == argument.shape
                and tensor.stride() == argument.stride()
            )
            return _View(number, int(offset), tuple(tensor.shape), tensor.stride(), whole)
    return None

"""Sum-product circuits: fixed sums of products in the log semiring, for every row of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops.logsemiring import _circuit_specs
from sapwood.ops.logsemiring._matmul import floats
from sapwood.reference import logsemiring as reference

_OP = "log_circuit"
_BACKENDS = (
    _backend.native(_OP, _circuit_specs.log_circuit),
    _backend.Backend("reference", lambda *_: None, reference.log_circuit),
)

Ints: TypeAlias = npt.NDArray[np.int64]
#: Terms of a sum: (terms, factors) columns, or one sequence of columns per term.
Terms: TypeAlias = "Ints | Sequence[Sequence[int]]"


class Selector(NamedTuple):
    """How a value of the evidence moves a sum to another of its lists.

    Example:
        >>> from sapwood.ops import Selector
        >>> Selector(column=0, first=1, size=6)  # the face of a die: list 0 for 1, ..., 5 for 6
        Selector(column=0, first=1, size=6, stride=1)

    Args:
        column: of the evidence.
        first: the smallest value that is known.
        size: how many values are known, one after the other; others leave the sum without mass.
        stride: by how many lists the next value is further on.
    """

    column: int
    first: int
    size: int
    stride: int = 1


@dataclass(frozen=True)
class CircuitSum:
    """A sum of products; with selectors, one sum for each value of the evidence.

    Example:
        >>> import torch
        >>> from sapwood.ops import CircuitSum, LogCircuit, Selector, log_circuit
        >>> ones = CircuitSum([[(1, 3)], [(0, 3), (1, 2)], [(0, 2)]], [Selector(0, 0, 3)])
        >>> circuit = LogCircuit(4, [ones], results=[4])  # of two coins, so many show 0
        >>> coins = torch.tensor([[0.5, 0.5, 0.75, 0.25]]).log().expand(3, 4)
        >>> log_circuit(coins, circuit, torch.tensor([[0], [1], [2]])).exp()
        tensor([[0.1250],
                [0.5000],
                [0.3750]])

    Args:
        lists: at least one list of terms; a term is the product of its columns, () is one. Or one
            array (lists, terms, factors), in which a term that begins with -1 is left out.
        selectors: the list taken is number sum (value - first) * stride, over all of them; without
            any, the first.
    """

    lists: Sequence[Terms] | Ints
    selectors: Sequence[Selector] = ()


class LogCircuit:
    """A sum-product circuit, checked and packed once, used often.

    A row of the circuit has columns: its inputs, then one per sum, in order. A sum reads columns
    further left.

    Example:
        >>> import torch
        >>> from sapwood.ops import CircuitSum, LogCircuit, log_circuit
        >>> same = CircuitSum([[(0, 2), (1, 3)]])  # both coins heads, or both tails
        >>> circuit = LogCircuit(4, [same], results=[4])
        >>> coins = torch.tensor([[0.5, 0.5, 0.9, 0.1]]).log()
        >>> log_circuit(coins, circuit).exp()
        tensor([[0.5000]])

    Args:
        inputs: n, columns that are given.
        sums: J sums; sum j is column n + j.
        results: R columns, any of them.
        heads: (begin, end) of inputs that are normalised first, as by log-softmax.

    Raises:
        ValueError: for a negative number of inputs, a column that does not exist or is not further
            left, a sum without lists or an array of another shape, selectors that are negative or
            reach beyond the lists, heads that overlap, or 2^31 of anything.
    """

    def __init__(
        self,
        inputs: int,
        sums: Sequence[CircuitSum],
        results: Sequence[int],
        heads: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.inputs, self.num_sums, self.num_results = inputs, len(sums), len(results)
        if inputs < 0:
            _check.fail(ValueError, "LogCircuit", "inputs", "be at least 0", inputs)
        columns = inputs + len(sums)
        for result in results:
            _inside("results", result, columns)
        _check_heads(heads, inputs)
        packed = _pack(inputs, sums)
        #: Columns of evidence that the selectors read.
        self.evidence_columns = 1 + max((s.column for t in sums for s in t.selectors), default=-1)
        selectors = [s for total in sums for s in total.selectors]
        levels = _levels(inputs, packed)
        depth = int(levels.max(initial=0))
        parts = [
            np.asarray(results), np.asarray(heads), _pointers([len(t.selectors) for t in sums]),
            np.asarray(selectors), packed.list_ptr, packed.term_ptr, packed.factor_ptr,
            packed.factors, _pointers(np.bincount(levels, minlength=depth + 1)[1:]),
            levels.argsort(kind="stable"), *_readers(columns, packed),
        ]  # fmt: skip
        #: Sizes of the packed tables, as the op takes them.
        self.counts = [
            inputs, len(results), len(heads), len(selectors), len(sums), len(packed.term_ptr) - 1,
            len(packed.factor_ptr) - 1, len(packed.factors), depth,
        ]  # fmt: skip
        flat = np.concatenate([p.reshape(-1).astype(np.int64) for p in parts])
        if len(flat) and max(abs(int(flat.min())), int(flat.max())) >= 2**31:
            got = int(abs(flat).max())
            _check.fail(ValueError, "LogCircuit", "all numbers", "be smaller than 2^31", got)
        self._tables = {torch.device("cpu"): torch.from_numpy(flat.astype(np.int32))}

    def tables(self, device: torch.device) -> Tensor:
        """The packed tables on a device, int32."""
        found = self._tables.get(device)
        if found is None:
            found = self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return found

    def __repr__(self) -> str:
        return (
            f"LogCircuit({self.inputs} inputs, {self.num_sums} sums of {self.counts[6]} terms, "
            f"{self.num_results} results)"
        )


class _Packed(NamedTuple):
    list_ptr: Ints  # by sum
    term_ptr: Ints  # by list
    factor_ptr: Ints  # by term
    factors: Ints


def _inside(argument: str, column: int, end: int) -> None:
    if not 0 <= column < end:
        _check.fail(ValueError, "LogCircuit", argument, f"name columns in [0, {end})", column)


def _check_heads(heads: Sequence[tuple[int, int]], inputs: int) -> None:
    before = 0
    for begin, end in sorted(heads):
        if not before <= begin <= end <= inputs:
            want = f"be ranges of [0, {inputs}) that do not overlap"
            _check.fail(ValueError, "LogCircuit", "heads", want, (begin, end))
        before = end


def _pointers(sizes: Sequence[int] | Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _check_sum(number: int, total: CircuitSum) -> None:
    """Its lists are there and its selectors stay among them; the columns are checked apart."""
    lists, of_sum = total.lists, f"of sum {number}"
    if isinstance(lists, np.ndarray) and (lists.ndim != 3 or lists.shape[2] == 0):
        want = "be an array (lists, terms, at least one factor)"
        _check.fail(ValueError, "LogCircuit", f"lists {of_sum}", want, f"shape {lists.shape}")
    if len(lists) == 0:
        _check.fail(ValueError, "LogCircuit", f"lists {of_sum}", "hold at least one list", "none")
    for s in total.selectors:
        if s.column < 0 or s.size < 1 or s.stride < 0:
            want = "have column >= 0, size >= 1 and stride >= 0"
            _check.fail(ValueError, "LogCircuit", f"selectors {of_sum}", want, s)
    last = sum((s.size - 1) * s.stride for s in total.selectors)
    if last >= len(lists):
        want = f"reach at most list {len(lists) - 1}"
        _check.fail(ValueError, "LogCircuit", f"selectors {of_sum}", want, last)


def _pack(inputs: int, sums: Sequence[CircuitSum]) -> _Packed:
    """The tables of all sums one after the other, checked."""
    none = np.empty(0, dtype=np.int64)
    terms_of, factors_of, factors = [none], [none], [none]  # by list, by term, all
    for number, total in enumerate(sums):
        _check_sum(number, total)
        sizes, counts, columns = _flat(total.lists)
        terms_of.append(sizes)
        factors_of.append(counts)
        factors.append(columns)
        for column in (columns.min(), columns.max()) if len(columns) else ():
            _inside(f"factors of sum {number}", int(column), inputs + number)
    return _Packed(
        _pointers([len(total.lists) for total in sums]),
        _pointers(np.concatenate(terms_of)),
        _pointers(np.concatenate(factors_of)),
        np.concatenate(factors),
    )


def _flat(lists: Sequence[Terms] | Ints) -> tuple[Ints, Ints, Ints]:
    """Terms of each list, factors of each term, and all factors."""
    if isinstance(lists, np.ndarray):
        present = lists[:, :, 0] >= 0
        terms = lists[present]
        return present.sum(1), np.full(len(terms), lists.shape[2]), terms.reshape(-1)
    sizes = [len(term) for terms in lists for term in terms]
    columns = [column for terms in lists for term in terms for column in term]
    return (
        np.array([len(terms) for terms in lists], dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.array(columns, dtype=np.int64),
    )


def _levels(inputs: int, packed: _Packed) -> Ints:
    """By sum: one more than the highest level that it reads; inputs are level 0."""
    ends = packed.factor_ptr[packed.term_ptr[packed.list_ptr]]
    levels = np.zeros(inputs + len(ends) - 1, dtype=np.int64)
    for number, (begin, end) in enumerate(itertools.pairwise(ends)):
        levels[inputs + number] = 1 + levels[packed.factors[begin:end]].max(initial=0)
    return levels[inputs:]


def _readers(columns: int, packed: _Packed) -> tuple[Ints, Ints]:
    """By column where its readers begin, and (F, 2) the sum and the term of each."""
    terms = np.repeat(np.arange(len(packed.factor_ptr) - 1), np.diff(packed.factor_ptr))
    lists = np.searchsorted(packed.term_ptr, terms, side="right") - 1
    sums = np.searchsorted(packed.list_ptr, lists, side="right") - 1
    order = packed.factors.argsort(kind="stable")
    pointers = _pointers(np.bincount(packed.factors, minlength=columns))
    return pointers, np.stack([sums, terms], 1)[order]


def _explain(x: Tensor, *_: Any, **__: Any) -> _backend.Explanation:
    return _backend.Explanation(_OP, _backend.candidates(_BACKENDS, x))


@_backend.explainable(_explain)
def log_circuit(x: Tensor, circuit: LogCircuit, evidence: Tensor | None = None) -> Tensor:
    """Evaluates a sum-product circuit on every row: log of sums of products, exact at any scale.

    Example:
        >>> import torch
        >>> from sapwood.ops import CircuitSum, LogCircuit, log_circuit
        >>> same = CircuitSum([[(0, 2), (1, 3)]])
        >>> circuit = LogCircuit(4, [same], results=[4], heads=[(0, 2), (2, 4)])
        >>> logits = torch.tensor([[0.0, 0.0, 1e4, 0.0]])  # the first coin is fair
        >>> log_circuit(logits, circuit).exp()
        tensor([[0.5000]])

    One pass over the circuit serves a row, and one pass back its gradient; nothing but ``x`` is
    kept in between.

    Args:
        x: (B, n) logarithms of the inputs, or (m, B, k) with n = m k: m blocks side by side, as a
            network gives them for m inputs.
        circuit: a :class:`LogCircuit` of n inputs.
        evidence: (B, E) int64, what the selectors of the circuit read.

    Returns:
        (B, R). A sum without terms, of -inf only, or for evidence that is not known, is -inf with
        gradient 0; NaN is not hidden.

    Raises:
        ValueError: for another number of inputs, rows or columns of evidence.
        TypeError: for non-tensors and wrong dtypes.
        RuntimeError: for tensors on different devices.
    """
    (x,) = floats(_OP, x=x)
    if x.dim() == 2:
        x = x.unsqueeze(0)
    _check.dims(_OP, "x", x, 3)
    if x.shape[0] * x.shape[2] != circuit.inputs:
        want = f"have {circuit.inputs} inputs for each row, as the circuit"
        _check.fail(ValueError, _OP, "x", want, f"shape {tuple(x.shape)}")
    needed = circuit.evidence_columns
    if evidence is None:
        if needed:
            _check.fail(ValueError, _OP, "evidence", "be given for this circuit", "none")
    else:
        _check.tensor(_OP, "evidence", evidence)
        _check.dtype(_OP, "evidence", evidence, (torch.int64,))
        if evidence.dim() != 2 or evidence.shape[0] != x.shape[1] or evidence.shape[1] < needed:
            want = f"be ({x.shape[1]}, at least {needed})"
            _check.fail(ValueError, _OP, "evidence", want, f"shape {tuple(evidence.shape)}")
        _check.same_device(_OP, x=x, evidence=evidence)
    chosen = _backend.choose(_OP, _BACKENDS, x)
    result: Tensor = chosen.run(x, evidence, circuit.tables(x.device), circuit.counts)
    return result

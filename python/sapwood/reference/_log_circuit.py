"""Sum-product circuits in plain torch; the infinities follow ``reference/logsemiring.py``.

A row has columns: its inputs, then one per sum. Two more stand for a factor of one and for no mass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sapwood.reference._log_sums import logsumexp, softmax


class _Sum(NamedTuple):
    """One sum: which list each value of the evidence selects, and the columns of all lists."""

    selectors: list[list[int]]  # column of evidence, first value, number of values, stride
    lists: list[list[list[int]]]  # terms of factors


class _Tables(NamedTuple):
    inputs: int
    results: list[int]
    heads: list[list[int]]
    sums: list[_Sum]


def _unpack(circuit: Tensor, counts: list[int]) -> _Tables:
    """What ``csrc/logsemiring/circuit.h`` reads, without the tables for the GPU."""
    inputs, results, heads, selectors, sums, lists, terms, factors, _ = counts
    sizes = [results, 2 * heads, sums + 1, 4 * selectors, sums + 1, lists + 1, terms + 1, factors]
    result, head, selector_ptr, selector, list_ptr, term_ptr, factor_ptr, factor = (
        part.tolist() for part in circuit[: sum(sizes)].split(sizes)
    )
    products = [factor[factor_ptr[t] : factor_ptr[t + 1]] for t in range(terms)]
    choices = [products[term_ptr[i] : term_ptr[i + 1]] for i in range(lists)]
    rules = [selector[4 * s : 4 * s + 4] for s in range(selectors)]
    found = [
        _Sum(rules[selector_ptr[j] : selector_ptr[j + 1]], choices[list_ptr[j] : list_ptr[j + 1]])
        for j in range(sums)
    ]
    return _Tables(inputs, result, [head[2 * h : 2 * h + 2] for h in range(heads)], found)


def _places(total: _Sum, evidence: Tensor | None, rows: int, columns: int) -> Tensor:
    """(B, T, F) the columns that each row reads; ``columns`` is a one, the next has no mass."""
    one, nothing = columns, columns + 1
    most_terms = max((len(terms) for terms in total.lists), default=0)
    most_factors = max((len(t) for terms in total.lists for t in terms), default=0) or 1
    table = [
        [[*t, *[one] * (most_factors - len(t))] for t in terms]
        + [[nothing] * most_factors] * (most_terms - len(terms))
        for terms in [*total.lists, []]  # the last is of rows whose evidence selects none
    ]
    device = None if evidence is None else evidence.device
    which = torch.zeros(rows, dtype=torch.long, device=device)
    known = torch.ones(rows, dtype=torch.bool, device=device)
    for column, first, count, stride in total.selectors:
        assert evidence is not None
        seen = evidence[:, column]
        known = known & (seen >= first) & (seen < first + count)
        which = which + torch.where(known, seen - first, 0) * stride
    which = torch.where(known & (which < len(total.lists)), which, len(total.lists))
    shape = (len(table), most_terms, most_factors)
    return torch.tensor(table, dtype=torch.long, device=device).view(shape)[which]


def _terms(work: Tensor, places: Tensor) -> Tensor:  # (B, C), (B, T, F) -> (B, T)
    """The products of a sum."""
    constants = work.new_tensor([0.0, -math.inf]).expand(work.shape[0], 2)
    known = torch.cat([work, constants], 1)
    return known.gather(1, places.flatten(1)).view(places.shape).sum(2)


def _inputs(x: Tensor, tables: _Tables) -> Tensor:  # (m, B, k) -> (B, m k)
    """The inputs side by side, heads normalised."""
    work = x.transpose(0, 1).flatten(1)
    for begin, end in tables.heads:
        head = torch.log_softmax(work[:, begin:end], 1)
        work = torch.cat([work[:, :begin], head, work[:, end:]], 1)
    return work


def _walk(x: Tensor, evidence: Tensor | None, tables: _Tables) -> tuple[Tensor, list[Tensor]]:
    """(B, C) the values of all columns, and which columns each sum read."""
    work, read = _inputs(x, tables), []
    for total in tables.sums:
        read.append(_places(total, evidence, work.shape[0], work.shape[1]).to(x.device))
        work = torch.cat([work, logsumexp(_terms(work, read[-1]), 1).unsqueeze(1)], 1)
    return work, read


def log_circuit(x: Tensor, evidence: Tensor | None, circuit: Tensor, counts: list[int]) -> Tensor:
    """(B, R) from x (m, B, k): sums in order, each the logsumexp of the products of a list."""
    tables = _unpack(circuit, counts)
    return _walk(x, evidence, tables)[0][:, tables.results]


def log_circuit_backward(
    grad: Tensor, x: Tensor, evidence: Tensor | None, circuit: Tensor, counts: list[int]
) -> Tensor:  # (m, B, k)
    """Sums in reverse order: a term passes on the slope of its sum, times its share of it."""
    tables = _unpack(circuit, counts)
    work, read = _walk(x, evidence, tables)
    results = torch.tensor(tables.results, dtype=torch.long, device=x.device)
    slopes = torch.zeros_like(work).index_add(1, results, grad)
    for number in range(len(tables.sums) - 1, -1, -1):
        column, places = tables.inputs + number, read[number]
        slope = slopes[:, column : column + 1]
        share = softmax(_terms(work[:, :column], places), 1)
        share = torch.where((slope == 0) & ~share.isfinite(), 0.0, share)  # does not matter
        known = torch.nn.functional.pad(slopes[:, :column], (0, 2))
        given = (slope * share).unsqueeze(2).expand(places.shape)
        slopes = known.scatter_add(1, places.flatten(1), given.flatten(1))[:, :column]
    for begin, end in tables.heads:
        part = slopes[:, begin:end]
        part = part - work[:, begin:end].exp() * part.sum(1, keepdim=True)
        slopes = torch.cat([slopes[:, :begin], part, slopes[:, end:]], 1)
    return slopes.view(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1).contiguous()

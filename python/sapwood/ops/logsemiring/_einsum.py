"""Einstein sums in the log and max-plus semirings, one pair of operands after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from sapwood import _check
from sapwood.ops.logsemiring._elementwise import logsumexp
from sapwood.ops.logsemiring._matmul import floats, log_matmul, max_matmul

_OP = "log_einsum"
_EXHAUSTIVE = 8  # operands up to which every order is looked at
_SPARE = [chr(c) for c in range(ord("\u00c0"), ord("\u00c0") + 64)]  # names for ellipsis dimensions
_Labels = str
_Sizes = dict[str, int]


def _refuse(expectation: str, actual: object) -> NoReturn:
    _check.fail(ValueError, _OP, "equation", expectation, actual)


def log_einsum(
    equation: str,
    *operands: Tensor,
    semiring: str = "log",
    path: str | Sequence[Sequence[int]] = "auto",
) -> Tensor:
    """``torch.einsum`` with log-sum-exp for the sum and + for the product.

    Example::

        prior, table = torch.randn(3), torch.randn(3, 4, 5)
        joint = sapwood.ops.log_einsum("a,abc->bc", prior, table)   # (4, 5)

    Pairs are contracted one after the other, each by a :func:`log_matmul`, after subscripts that no
    other operand has are summed out. The joint table of all subscripts is never built.

    Args:
        equation: as for ``torch.einsum``: letters, repeated subscripts, an ellipsis, and an
            optional output.
        *operands: floating point tensors.
        semiring: "log", or "max" for the maximum instead of the sum.
        path: "auto" (the smallest largest intermediate, then the fewest terms), or pairs of
            positions as ``opt_einsum`` writes them.

    Returns:
        The tensor of the output subscripts.

    Raises:
        ValueError: for an invalid equation, sizes that do not agree or an unknown ``semiring``.
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices.

    References:
        Obermeyer et al., Tensor variable elimination for plated factor graphs, ICML 2019.
    """
    _check.one_of(_OP, "semiring", semiring, ("log", "max"))
    if not operands:
        _check.fail(ValueError, _OP, "operands", "be at least one", 0)
    tensors = floats(_OP, **{f"operand_{i}": t for i, t in enumerate(operands)})
    inputs, output = _parse(equation, tensors)
    terms = [
        _diagonal(t, labels) for t, labels in zip(tensors, inputs, strict=True)
    ]  # (tensor, labels without repetition)
    sizes = _sizes(terms)
    terms = [_squeeze(t, labels, sizes, output) for t, labels in terms]
    pairs = _order([labels for _, labels in terms], output, sizes, path)
    for i, j in pairs:
        low, high = sorted((i, j))
        right, left = terms.pop(high), terms.pop(low)
        rest = {c for _, labels in terms for c in labels} | set(output)
        terms.append(_contract(left, right, rest, sizes, semiring))
    result, labels = _reduce(*terms[0], set(output), semiring)
    for label in (c for c in output if c not in labels):  # only ever of size 1
        result, labels = result.unsqueeze(-1), labels + label
    return result.permute([labels.index(c) for c in output])


def _parse(equation: str, tensors: list[Tensor]) -> tuple[list[_Labels], _Labels]:
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(tensors):
        _refuse(f"have {len(tensors)} operands", len(inputs))
    hidden = [t.dim() - len(p.replace("...", "")) for t, p in zip(tensors, inputs, strict=True)]
    wide = max((h for h, p in zip(hidden, inputs, strict=True) if "..." in p), default=0)
    for p, h in zip(inputs, hidden, strict=True):
        if h < 0 or (h > 0 and "..." not in p):
            _refuse("name every dimension of an operand", repr(p))
    spare = "".join(_SPARE[:wide])
    inputs = [p.replace("...", spare[wide - h :], 1) for p, h in zip(inputs, hidden, strict=True)]
    if not arrow:
        counts = "".join(inputs)
        once = sorted(c for c in set(counts) if counts.count(c) == 1 and c not in spare)
        right = "..." + "".join(once)
    output = right.replace("...", spare, 1)
    known = set("".join(inputs))
    for c in "".join(inputs) + output:
        if not c.isalpha():
            _refuse("consist of letters, commas, ... and ->", repr(c))
    if len(set(output)) != len(output) or not set(output) <= known | set(spare):
        _refuse("have each output subscript once, and in an input", repr(right))
    return inputs, output


def _diagonal(t: Tensor, labels: _Labels) -> tuple[Tensor, _Labels]:
    for c in dict.fromkeys(labels):
        while labels.count(c) > 1:
            i = labels.index(c)
            j = labels.index(c, i + 1)
            if t.shape[i] != t.shape[j]:
                _refuse(f"give subscript {c!r} one size", f"{t.shape[i]} and {t.shape[j]}")
            t = t.diagonal(0, i, j)
            labels = labels[:i] + labels[i + 1 : j] + labels[j + 1 :] + c
    return t, labels


def _sizes(terms: list[tuple[Tensor, _Labels]]) -> _Sizes:
    sizes: _Sizes = {}
    for t, labels in terms:
        for c, size in zip(labels, t.shape, strict=True):
            known = sizes.get(c, 1)
            if known != 1 and size not in (1, known):
                _refuse(f"give subscript {c!r} one size", f"{known} and {size}")
            sizes[c] = size if known == 1 else known
    return sizes


def _squeeze(t: Tensor, labels: _Labels, sizes: _Sizes, output: _Labels) -> tuple[Tensor, _Labels]:
    """Drops dimensions of size 1 that stand for a larger subscript."""
    for c in labels:
        if t.shape[labels.index(c)] == 1 and sizes[c] != 1:
            t = t.squeeze(labels.index(c))
            labels = labels.replace(c, "")
    return t, labels


def _volume(labels: frozenset[str], sizes: _Sizes) -> int:
    return math.prod(sizes[c] for c in labels)


def _order(
    inputs: list[_Labels], output: _Labels, sizes: _Sizes, path: str | Sequence[Sequence[int]]
) -> list[tuple[int, int]]:
    if not isinstance(path, str):
        pairs = [(int(i), int(j)) for i, j in path]
        if len(pairs) != len(inputs) - 1:
            want = f"have {len(inputs) - 1} pairs"
            _check.fail(ValueError, _OP, "path", want, len(pairs))
        return pairs
    _check.one_of(_OP, "path", path, ("auto",))
    sets = [frozenset(labels) for labels in inputs]
    if len(inputs) <= _EXHAUSTIVE:
        return _best_order(sets, frozenset(output), sizes)
    return _greedy_order(sets, frozenset(output), sizes)


def _best_order(
    inputs: list[frozenset[str]], output: frozenset[str], sizes: _Sizes
) -> list[tuple[int, int]]:
    """Dynamic programming over subsets: smallest largest intermediate, then fewest terms."""
    count = len(inputs)
    everything = (1 << count) - 1

    def kept(subset: int) -> frozenset[str]:
        inside = frozenset().union(*(inputs[i] for i in range(count) if subset >> i & 1))
        outside = output.union(*(inputs[i] for i in range(count) if not subset >> i & 1))
        return inside & outside

    labels = {s: kept(s) for s in range(1, everything + 1)}
    best: dict[int, tuple[int, int, tuple[int, int]]] = {}
    for subset in sorted(labels, key=int.bit_count):
        if subset.bit_count() == 1:
            best[subset] = (0, 0, (0, 0))
            continue
        part = (subset - 1) & subset
        while part:
            other = subset ^ part
            if part > other:
                peak = max(best[part][0], best[other][0], _volume(labels[subset], sizes))
                terms = _volume(labels[part] | labels[other], sizes)
                cost = (peak, best[part][1] + best[other][1] + terms, (part, other))
                best[subset] = min(best.get(subset, cost), cost)
            part = (part - 1) & subset
    pairs: list[tuple[int, int]] = []
    places = [1 << i for i in range(count)]

    def visit(subset: int) -> None:
        if subset.bit_count() == 1:
            return
        part, other = best[subset][2]
        visit(part)
        visit(other)
        i, j = sorted((places.index(part), places.index(other)))
        pairs.append((i, j))
        places.pop(j)
        places.pop(i)
        places.append(subset)

    visit(everything)
    return pairs


def _greedy_order(
    inputs: list[frozenset[str]], output: frozenset[str], sizes: _Sizes
) -> list[tuple[int, int]]:
    """The pair with the smallest result next, then the one with the fewest terms."""
    pairs, left = [], list(inputs)
    while len(left) > 1:

        def cost(pair: tuple[int, int], left: list[frozenset[str]] = left) -> tuple[int, int]:
            i, j = pair
            others = output.union(*(s for n, s in enumerate(left) if n not in pair))
            both = left[i] | left[j]
            return _volume(both & others, sizes), _volume(both, sizes)

        i, j = min(itertools.combinations(range(len(left)), 2), key=cost)
        pairs.append((i, j))
        right, first = left.pop(j), left.pop(i)
        left.append((first | right) & output.union(*left))
    return pairs


def _reduce(t: Tensor, labels: _Labels, kept: set[str], semiring: str) -> tuple[Tensor, _Labels]:
    """Sums out the subscripts that nothing else needs."""
    gone = tuple(i for i, c in enumerate(labels) if c not in kept)
    if not gone:
        return t, labels
    if semiring == "log":
        t = logsumexp(t, gone)
    else:
        stay = [i for i in range(t.dim()) if i not in gone]
        flat = t.permute(*stay, *gone).flatten(len(stay))
        column = flat.new_zeros(flat.shape[-1], 1)
        t = max_matmul(flat.unsqueeze(-2), column).values[..., 0, 0]
    return t, "".join(c for c in labels if c in kept)


def _contract(
    first: tuple[Tensor, _Labels],
    second: tuple[Tensor, _Labels],
    rest: set[str],
    sizes: _Sizes,
    semiring: str,
) -> tuple[Tensor, _Labels]:
    """One pair as a batched product; ``rest`` are the subscripts needed later."""
    a, in_a = _reduce(*first, rest | set(second[1]), semiring)
    b, in_b = _reduce(*second, rest | set(in_a), semiring)
    batch = [c for c in in_a if c in in_b and c in rest]
    summed = [c for c in in_a if c in in_b and c not in rest]
    left, right = [c for c in in_a if c not in in_b], [c for c in in_b if c not in in_a]
    shape = [sizes[c] for c in (*batch, *left, *right)]
    volumes = [math.prod(sizes[c] for c in part) for part in (batch, left, summed, right)]
    size_batch, size_left, size_summed, size_right = volumes
    a = a.permute([in_a.index(c) for c in (*batch, *left, *summed)])
    b = b.permute([in_b.index(c) for c in (*batch, *summed, *right)])
    a = a.reshape(size_batch, size_left, size_summed)
    b = b.reshape(size_batch, size_summed, size_right)
    if not summed:
        product = a + b
    elif semiring == "log":
        product = log_matmul(a, b)
    else:
        product = max_matmul(a, b).values
    return product.reshape(shape), "".join((*batch, *left, *right))

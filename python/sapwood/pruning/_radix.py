"""Which elements are the k smallest of several tensors, exactly and in little memory.

Floats become integers of the same order, and the k-th smallest is found digit by digit: a pass
counts the top 16 bits of all elements, the next one the following 16 bits of the elements in the
chosen bin, and so on. One last pass compares with the threshold and resolves ties by position.
Nothing is sorted, concatenated or copied; the tensors are walked in chunks.

On the CPU the passes are compiled loops (csrc/select/kernel.h); the same in torch serves other
devices and builds without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sapwood import _load

#: Elements per chunk on the CPU: a few temporaries of 1 or 2 MiB, which its caches still like.
CHUNK = 1 << 19
#: Elements per chunk elsewhere, where a kernel launch costs more than memory.
DEVICE_CHUNK = 1 << 22

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
_WIDE = torch.float64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: The compiled loops, or None where they were not built.
COMPILED: ModuleType | None = _load.native if hasattr(_load.native, "count_digits") else None

#: Adds up integers over the ranks that hold the tensors together; the identity in one process.
Total = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """One tensor to choose from, or this rank's part of it."""

    name: str
    scores: Tensor  # any shape and layout, floating point, without NaN
    active: Tensor | None = None  # (numel,) bool; None: no element is off already
    protected: Tensor | None = None  # (numel,) bool: stays on whatever its score; None: no element
    counted: bool = True  # False on all but one of the ranks that hold copies


@dataclass(frozen=True)
class Order:
    """How scores are ranked; the same for all layers and on all ranks.

    The order is (inactive first, score or its absolute value, position among the layers, flat
    index); -0.0 equals 0.0, protected elements come last.
    """

    absolute: bool = False
    signed: bool = True  # False spares the work that only negative scores need


@dataclass(frozen=True)
class Cut:
    """The last key that goes, how many of the elements that have it go, and how many have it."""

    key: int
    ties_off: int
    ties: int


class Keys:
    """The scores of some layers as integers of the same order, in chunks that share buffers."""

    def __init__(self, layers: Sequence[Layer], order: Order) -> None:
        self.layers = layers
        self._order = order
        wide = any(layer.scores.dtype == _WIDE for layer in layers)
        self._floating = _WIDE if wide else torch.float32
        self._integer = torch.int64 if wide else torch.int32
        self.bits = 64 if wide else 32
        self._buffers: dict[torch.device, Tensor] = {}  # (2, elements of the longest chunk)

    def chunks(self, layer: Layer) -> Iterator[tuple[slice, Tensor]]:
        """(part of the flat tensor, its keys); the keys are read-only and valid for one step."""
        for part, scores in self._parts(layer, chunk_size(layer.scores.device)):
            yield part, self.convert(scores, *_flags(layer, part))

    def arguments(self, layer: Layer) -> Iterator[tuple[slice, tuple[object, ...]]]:
        """(part of the flat tensor, what the compiled loops need to know of its keys)."""
        as_is = layer.scores.is_contiguous() and layer.scores.dtype == self._floating
        for part, scores in self._parts(layer, layer.scores.numel() if as_is else CHUNK):
            bits = scores.to(self._floating).view(self._integer).numpy()
            flags = [None if f is None else f.numpy() for f in _flags(layer, part)]
            yield part, (bits, *flags, self._order.absolute, self._order.signed)

    def compiled(self, layer: Layer) -> bool:
        """Whether the compiled loops serve a layer."""
        return COMPILED is not None and layer.scores.device.type == "cpu"

    def _parts(self, layer: Layer, limit: int) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for scores in pieces(layer.scores, limit):
            yield slice(start, start + scores.numel()), scores
            start += scores.numel()

    def buffers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two integer buffers of a chunk's length: the first may hold the present keys."""
        numel = like.numel()
        held = self._buffers.get(like.device)
        if held is None or held.shape[1] < numel:
            held = torch.empty(2, numel, dtype=self._integer, device=like.device)
            self._buffers[like.device] = held
        return held[0, :numel], held[1, :numel]

    def convert(self, scores: Tensor, active: Tensor | None, protected: Tensor | None) -> Tensor:
        """Keys (numel,) of contiguous scores (numel,): inactive lowest, protected highest."""
        largest = torch.iinfo(self._integer).max
        keys = scores.to(self._floating).view(self._integer)
        buffer, spare = self.buffers(scores)
        if self._order.absolute:
            keys = torch.bitwise_and(keys, largest, out=buffer)
        if active is not None:  # all bits set: -1, below the key of 0.0; see also the sign below
            keys = torch.bitwise_or(keys, active.view(torch.int8) - 1, out=buffer)
        if self._order.signed and not self._order.absolute:
            # the bits without the sign, negated where that was set: -0.0 joins 0.0, and an
            # inactive element gets the negative of the largest integer, below the key of -inf
            negative = torch.bitwise_right_shift(keys, self.bits - 1, out=spare)
            keys = torch.bitwise_and(keys, largest, out=buffer)
            keys.bitwise_xor_(negative).sub_(negative)
        if protected is not None:
            keys = buffer.copy_(keys).masked_fill_(protected, largest)
        return keys


def chunk_size(device: torch.device) -> int:
    """Elements per chunk on a device."""
    return CHUNK if device.type == "cpu" else DEVICE_CHUNK


def _flags(layer: Layer, part: slice) -> tuple[Tensor | None, Tensor | None]:
    """Which elements of a part are active, and which are protected."""
    active = None if layer.active is None else layer.active[part]
    return active, None if layer.protected is None else layer.protected[part]


def pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Contiguous flat parts of a tensor in the order of its flat index, up to ``limit`` long.

    A contiguous tensor is not copied, another one only part by part.
    """
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(max(1, limit))
    elif tensor.numel() <= limit:
        yield tensor.contiguous().view(-1)  # reshape alone may give a view with gaps
    else:
        rows = limit // tensor[0].numel()
        for part in tensor.split(rows) if rows else tensor.unbind():
            yield from (part.contiguous().view(-1),) if rows else pieces(part, limit)


def find_cut(keys: Keys, k: int, total: Total) -> Cut:
    """Where the order of all elements is cut so that the first ``k`` go."""
    half = 1 << (keys.bits - 1)

    def counts(shift: int, prefix: int) -> Tensor:
        return total(_digit_counts(keys, shift, prefix))

    value, ties_off, ties = descend(counts, keys.bits, k)
    return Cut(value - half, ties_off, ties)


def descend(counts: Callable[[int, int], Tensor], bits: int, k: int) -> tuple[int, int, int]:
    """The k-th smallest of integers in [0, 2**bits), known by the histograms of their digits.

    Args:
        counts: (shift, prefix) -> (65536,) histogram of the digit at ``shift`` over the integers
            whose higher digits are ``prefix``.
        bits: a multiple of 16.
        k: from 1 to the number of integers.

    Returns:
        The k-th smallest, how many of its equals are among the k, and their number.
    """
    prefix, rest, ties = 0, k, 0
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        below = counts(shift, prefix).cpu().cumsum(0)
        digit = int(torch.searchsorted(below, rest))
        before = int(below[digit - 1]) if digit else 0
        ties = int(below[digit]) - before
        rest -= before
        prefix = prefix << DIGIT_BITS | digit
    return prefix, rest, ties


def add_counts(digits: Tensor, counts: Tensor) -> None:
    """Adds the histogram of the digits to ``counts`` (65536,)."""
    found = torch.bincount(digits)
    counts[: found.numel()] += found.to(counts.device)


def new_counts(device: torch.device) -> Tensor:
    """An empty histogram of one digit."""
    return torch.zeros(BINS, dtype=torch.int64, device=device)


def switch_off(keys: Keys, cut: Cut, quotas: Sequence[int] | None = None) -> list[Tensor]:
    """Keep masks (numel,): below the cut all are off, of its ties the first.

    Args:
        keys: the layers.
        cut: where their order is cut.
        quotas: how many ties go in each layer; default: the first ones of all layers.
    """
    masks = []
    left = cut.ties_off
    for index, layer in enumerate(keys.layers):
        mask = torch.empty(layer.scores.numel(), dtype=torch.bool, device=layer.scores.device)
        left = left if quotas is None else quotas[index]
        left -= (_switch_off_compiled if keys.compiled(layer) else _switch_off)(
            keys, layer, cut.key, left, mask
        )
        masks.append(mask)
    return masks


def _switch_off(keys: Keys, layer: Layer, last: int, quota: int, mask: Tensor) -> int:
    """Writes the keep mask of one layer; returns how many ties went."""
    left = quota
    for part, chunk in keys.chunks(layer):
        torch.ge(chunk, last, out=mask[part])
        if left:
            tied = chunk == last
            ties = int(tied.count_nonzero())
            if ties <= left:
                mask[part].bitwise_xor_(tied)
            else:
                mask[part].index_fill_(0, positions(tied)[:left], False)
            left -= min(left, ties)
    return quota - left


def _switch_off_compiled(keys: Keys, layer: Layer, last: int, quota: int, mask: Tensor) -> int:
    left = quota
    for part, arguments in keys.arguments(layer):
        assert COMPILED is not None
        left -= COMPILED.switch_off(*arguments, last, left, mask[part].numpy())
    return quota - left


def positions(flags: Tensor) -> Tensor:
    """Where ``flags`` (numel,) is True, as ``nonzero``; faster when that is rare."""
    whole = flags.numel() // 8 * 8
    blocks = flags[:whole].view(torch.int64).nonzero().view(-1)
    if 16 * blocks.numel() > whole:
        return flags.nonzero().view(-1)
    inner = flags[:whole].view(-1, 8).index_select(0, blocks).nonzero()
    found = blocks.index_select(0, inner[:, 0]).mul_(8).add_(inner[:, 1])
    return torch.cat((found, flags[whole:].nonzero().view(-1).add_(whole)))


def survey(scores: Tensor) -> tuple[int, bool]:
    """The number of NaN values, and whether a sign bit is set among the others."""
    nans, signed = 0, False
    for piece in pieces(scores, chunk_size(scores.device)):
        if not piece.numel():
            continue
        low, high = piece.aminmax()  # NaN when any element is, and much cheaper than isnan
        if bool(high.isnan()):
            nans += int(piece.isnan().count_nonzero())
        elif not signed and float(low) <= 0.0:
            signed = int(piece.view(_INTEGERS[piece.element_size()]).amin()) < 0
    return nans, signed


def _digit_counts(keys: Keys, shift: int, prefix: int) -> Tensor:
    """Histogram of the digit at ``shift`` over the keys whose higher digits equal ``prefix``.

    Keys are signed: half of their range is added to make them the integers of ``descend``.
    """
    counts = new_counts(keys.layers[0].scores.device)
    above = prefix - ((1 << (keys.bits - 1 - shift)) >> DIGIT_BITS)
    for layer in keys.layers:
        if layer.counted:
            count = _count_compiled if keys.compiled(layer) else _count
            count(keys, layer, shift, above, counts)
    return counts


def _count(keys: Keys, layer: Layer, shift: int, above: int, counts: Tensor) -> None:
    """Adds the histogram of one layer; ``above`` are the higher digits of the keys that count."""
    for _, chunk in keys.chunks(layer):
        _, spare = keys.buffers(chunk)
        if shift == keys.bits - DIGIT_BITS:
            digits = torch.bitwise_right_shift(chunk, shift, out=spare).add_(BINS // 2)
        else:
            higher = torch.bitwise_right_shift(chunk, shift + DIGIT_BITS, out=spare)
            inside = positions(higher == above)
            digits = (chunk.index_select(0, inside) >> shift).bitwise_and_(BINS - 1)
        add_counts(digits, counts)


def _count_compiled(keys: Keys, layer: Layer, shift: int, above: int, counts: Tensor) -> None:
    found = new_counts(layer.scores.device)
    for _, arguments in keys.arguments(layer):
        assert COMPILED is not None
        COMPILED.count_digits(*arguments, shift, above, found.numpy())
    counts += found.to(counts.device)

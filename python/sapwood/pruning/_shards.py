"""Selection over the shards of several ranks, as ``fully_shard`` makes them.

Every rank ranks its own part; only counts travel. What decides the control flow is a sum over all
ranks, so that all of them take the same way or raise the same error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sapwood.pruning import _distributed, _radix
from sapwood.pruning._distributed import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor."""

    shape: torch.Size  # of the whole tensor
    dim: int | None = None  # the dimension that is divided among the ranks; None: nothing is
    start: int = 0  # index of the part's first slice along ``dim``
    length: int = 0  # number of slices along ``dim``

    def whole_index(self, index: Tensor) -> Tensor:
        """Flat indices in the whole tensor from those in this part; the order stays the same."""
        if self.dim is None:
            return index
        inner = self.shape[self.dim + 1 :].numel()
        block = max(1, self.length * inner)
        outer = index.div(block, rounding_mode="floor")
        return index + outer * ((self.shape[self.dim] - self.length) * inner) + self.start * inner


class Ranks:
    """The ranks that hold the tensors together, or this process alone.

    Args:
        group: the group of the ranks; None: this process alone.
        dims: the divided dimension of each tensor.
        device: where the sums are formed.
    """

    def __init__(
        self, group: ProcessGroup | None, dims: Mapping[str, int | None], device: torch.device
    ) -> None:
        self._group = group
        self._device = device
        self.dims = dims
        self.alone = group is None
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], process_group: ProcessGroup | None, where: str
    ) -> Ranks:
        """The ranks of the device mesh over which the tensors are sharded.

        Raises:
            NotImplementedError: if the sharding is none that ``fully_shard`` makes.
            ValueError: if ``process_group`` has other ranks than the mesh.
        """
        layouts = {name: _layout(name, tensor, where) for name, tensor in tensors.items()}
        axes = [(mesh, axis) for mesh, axis, _ in layouts.values() if axis is not None]
        dims = {name: dim for name, (_, _, dim) in layouts.items()}
        if not axes:
            return cls(None, dims, torch.device("cpu"))
        if any(other != axes[0] for other in axes):
            raise NotImplementedError(
                f"{where}: all tensors must be sharded over the same dimension of one device mesh, "
                f"as by one fully_shard, got {axes[0]} and others"
            )
        mesh, axis = axes[0]
        group = mesh.get_group(axis)
        if process_group is not None:
            _require_same_ranks(process_group, group, where)
            group = process_group
        sharded = next(name for name, dim in dims.items() if dim is not None)
        return cls(group, dims, local(tensors[sharded]).device)

    def total(self, counts: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self._group is not None:
            torch.distributed.all_reduce(counts, group=self._group)
        return counts

    def sums(self, counts: Sequence[int]) -> list[int]:
        """The sums over all ranks of some integers."""
        if self.alone:
            return list(counts)
        return list(
            map(int, self.total(torch.tensor(counts, dtype=torch.int64, device=self._device)))
        )

    def counts(self, name: str) -> bool:
        """Whether this rank's elements of a tensor enter the sums: of copies only one does."""
        return self.rank == 0 or self.dims[name] is not None

    def parts(self, tensors: Mapping[str, Tensor]) -> list[Part]:
        """What this rank holds of each tensor."""
        mine = [
            0 if (dim := self.dims[name]) is None else local(tensor).shape[dim]
            for name, tensor in tensors.items()
        ]
        lengths = [[0] * len(mine) for _ in range(self.size)]
        lengths[self.rank] = mine
        flat = self.sums([length for row in lengths for length in row])
        before = [sum(flat[i : self.rank * len(mine) : len(mine)]) for i in range(len(mine))]
        return [
            Part(tensor.shape, self.dims[name], start, length)
            for (name, tensor), start, length in zip(tensors.items(), before, mine, strict=True)
        ]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, outside autograd."""
    return _distributed.local(tensor).detach()


def placed_like(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of the shape and the placement of ``like`` from this rank's part of it."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
    )


def placement(tensor: Tensor) -> str:
    """How a tensor lies on the ranks, in words."""
    return str(tensor.placements) if is_sharded(tensor) else "a plain tensor"


def same_placement(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie on the ranks in the same way."""
    if is_sharded(a) and is_sharded(b):
        return a.device_mesh == b.device_mesh and a.placements == b.placements
    return not is_sharded(a) and not is_sharded(b)


def tie_quotas(
    keys: _radix.Keys, cut: _radix.Cut, parts: Sequence[Part], ranks: Ranks
) -> list[int]:
    """How many ties go in this rank's part of each layer: the first of the whole order."""
    mine = [
        sum(int((chunk == cut.key).count_nonzero()) for _, chunk in keys.chunks(layer))
        for layer in keys.layers
    ]
    everywhere = ranks.sums(
        [count if layer.counted else 0 for count, layer in zip(mine, keys.layers, strict=True)]
    )
    quotas, left = [], cut.ties_off
    for layer, part, here, ties in zip(keys.layers, parts, mine, everywhere, strict=True):
        going = min(left, ties)
        left -= going
        if going in (0, ties):
            quotas.append(here if going else 0)
        elif part.dim is None:
            quotas.append(going)
        else:
            quotas.append(_first_ties(keys, layer, cut.key, part, ranks, going))
    return quotas


def _first_ties(
    keys: _radix.Keys, layer: _radix.Layer, key: int, part: Part, ranks: Ranks, going: int
) -> int:
    """How many of the ``going`` ties with the smallest index in the whole tensor lie here."""

    def indices() -> Iterator[Tensor]:
        for piece, chunk in keys.chunks(layer):
            yield part.whole_index(_radix.positions(chunk == key) + piece.start)

    def counts(shift: int, prefix: int) -> Tensor:
        found = _radix.new_counts(layer.scores.device)
        for index in indices():
            inside = index[index >> (shift + _radix.DIGIT_BITS) == prefix]
            _radix.add_counts((inside >> shift) & (_radix.BINS - 1), found)
        return ranks.total(found)

    bits = _radix.DIGIT_BITS * math.ceil(part.shape.numel().bit_length() / _radix.DIGIT_BITS)
    last, _, _ = _radix.descend(counts, bits, going)
    return sum(int((index <= last).count_nonzero()) for index in indices())


def _layout(name: str, tensor: Tensor, where: str) -> tuple[Any, int | None, int | None]:
    """(device mesh, its dimension that shards, the dimension of the tensor that is sharded)."""
    if not is_sharded(tensor):
        return None, None, None
    from torch.distributed.tensor import Replicate, Shard

    # exactly Shard: its subclass for strided shards lays elements out in another order
    known = all(type(p) is Shard or isinstance(p, Replicate) for p in tensor.placements)
    sharded = [(axis, p.dim) for axis, p in enumerate(tensor.placements) if isinstance(p, Shard)]
    if not known or len(sharded) > 1:
        raise NotImplementedError(
            f"{where}: placements must be (Shard,) or (Replicate, Shard), the default of "
            f"fully_shard, got {tensor.placements} for {name}"
        )
    axis, dim = sharded[0] if sharded else (None, None)
    return tensor.device_mesh, axis, dim


def _require_same_ranks(given: ProcessGroup, mesh: ProcessGroup, where: str) -> None:
    actual, expected = map(torch.distributed.get_process_group_ranks, (given, mesh))
    if actual != expected:
        raise ValueError(
            f"{where}: process_group must hold the ranks {expected} of the device mesh, "
            f"got {actual}"
        )

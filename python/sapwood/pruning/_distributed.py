"""Sharded tensors and replicas: what masks and pruners need from torch.distributed.

A parameter that ``fully_shard`` splits is a DTensor, and its mask is one too, with the same
placements. Everything here works on the parts that each rank holds and says itself what travels
between ranks: counts, digests, and masks as packed bits. Without DTensors and process groups no
function here communicates, and ``torch.distributed.tensor`` is not even imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sapwood.pruning import _container

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether the tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # no DTensor exists before its import
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of the tensor, in the same memory; all of one that is not sharded."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # otherwise a node of autograd would stand between the two
        return tensor.to_local()


def show_shards(model: nn.Module) -> None:
    """Makes the modules under ``fully_shard`` show their sharded parameters.

    After a forward pass without backward they may still show gathered copies; what is written
    there is lost.

    Raises:
        NotImplementedError: for the older wrapper, which hides shapes and names.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise NotImplementedError(
                "sapwood.pruning: model must be sharded with torch.distributed.fsdp.fully_shard, "
                "got FullyShardedDataParallel, which flattens parameters; use fully_shard"
            )
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def place(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A mask, or a whole tensor of scores, on the parameter's device and split up as it is.

    Every rank holds the whole tensor or, of a sharded mask, its part. Collective only if the
    placements differ.
    """
    if not is_sharded(parameter):
        return full(tensor).to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    if is_sharded(tensor):
        if (tensor.device_mesh, tensor.placements) == (mesh, placements):
            return tensor
        tensor = full(tensor)
    from torch.distributed.tensor import DTensor, distribute_tensor

    spread = local(distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=None))
    part = spread.to(local(parameter).device).clone()  # a view would hold the whole in memory
    return DTensor.from_local(
        part,
        mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def full(mask: Tensor) -> Tensor:
    """The whole mask on every rank of its mesh, on the CPU if it was sharded; collective."""
    if not is_sharded(mask):
        return mask
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = mask.device_mesh, mask.placements
    if not all(type(placement) in (Shard, Replicate) for placement in placements):
        return mask.full_tensor().cpu()  # interleaved, as under tensor parallelism: unpacked
    shape = list(mask.shape)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # only ranks of the mesh hold a part
    splits: list[tuple[int, int, list[list[int]]]] = []  # (mesh dim, tensor dim, shapes of parts)
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = _chunk_shapes(shape, placement.dim, mesh.size(mesh_dim))
            splits.append((mesh_dim, placement.dim, parts))
            shape = parts[coordinate[mesh_dim]]
    whole = local(mask)
    for mesh_dim, dim, shapes in reversed(splits):
        whole = torch.cat(_gather_bits(whole, shapes, mesh.get_group(mesh_dim)), dim)
    return whole.cpu()


def _chunk_shapes(shape: Sequence[int], dim: int, chunks: int) -> list[list[int]]:
    """What ``torch.chunk`` makes of a shape, with empty parts at the end where it makes fewer."""
    size = shape[dim]
    step = -(-size // chunks)
    sizes = [min(step, max(size - i * step, 0)) for i in range(chunks)]
    return [[*shape[:dim], size, *shape[dim + 1 :]] for size in sizes]


def _gather_bits(part: Tensor, shapes: list[list[int]], group: ProcessGroup) -> list[Tensor]:
    """The bool parts of all ranks of the group, whose shapes are known."""
    lengths = [(int(np.prod(shape)) + 7) // 8 for shape in shapes]
    mine = np.zeros(max(lengths), dtype=np.uint8)
    packed = _container.pack(part)
    mine[: packed.size] = packed
    gathered = all_gather(group, torch.from_numpy(mine), part.device)
    return [
        _container.unpack(row[:length].numpy(), tuple(shape), "part")
        for row, length, shape in zip(gathered, lengths, shapes, strict=True)
    ]


def totals(counts: Sequence[Sequence[int]], tensors: Sequence[Tensor]) -> list[list[int]]:
    """Counts over this rank's parts -> counts over the whole tensors, one row for each.

    Collective where tensors are sharded: one reduction for all that share a mesh.
    """
    rows = [list(row) for row in counts]
    shared: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
            split = [d for d, p in enumerate(tensor.placements) if not p.is_replicate()]
            shared.setdefault((tensor.device_mesh, tuple(split)), []).append(i)
    for (mesh, dims), members in shared.items():
        groups = [mesh.get_group(d) for d in dims]
        near = local(tensors[members[0]]).device
        summed = sum_over(groups, [rows[i] for i in members], near)
        for i, row in zip(members, summed, strict=True):
            rows[i] = row
    return rows


def write_once(tensors: Iterable[Tensor], write: Callable[[], None]) -> None:
    """Lets the first rank of the tensors' mesh write; returns on every rank when that is done.

    Tensors that are not sharded are written by whoever calls.

    Raises:
        RuntimeError: on the other ranks, when the first one failed.
    """
    sharded = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if sharded is None:
        return write()
    mesh = sharded.device_mesh
    error: Exception | None = None
    if not any(mesh.get_coordinate() or ()):
        try:
            write()
        except Exception as caught:
            error = caught
    failed = sum_over(groups_of(mesh), [[int(error is not None)]], local(sharded).device)[0][0]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("sapwood.pruning: the first rank must write the file, got an error")
    return None


def groups_of(mesh: DeviceMesh) -> list[ProcessGroup]:
    """One group per dimension of the mesh; together they reach every rank of it."""
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


class Whole(Mapping[str, Tensor]):
    """Masks read as whole tensors, one at a time; collective where they are sharded."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = masks

    def __getitem__(self, name: str) -> Tensor:
        return full(self._masks[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)


def sum_over(
    groups: Sequence[ProcessGroup], rows: list[list[int]], near: torch.device
) -> list[list[int]]:
    """Element-wise sums over the ranks of the groups, one group after the other."""
    if not groups:
        return rows
    counts = torch.tensor(rows, dtype=torch.int64, device=wire(groups[0], near))
    for group in groups:
        torch.distributed.all_reduce(counts, group=group)
    return [[int(value) for value in row] for row in counts.tolist()]


def all_gather(group: ProcessGroup, row: Tensor, near: torch.device) -> list[Tensor]:
    """The rows of all ranks, on the CPU, in the order of the ranks; all of one length."""
    mine = row.to(wire(group, near))
    gathered = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, mine, group=group)
    return [other.cpu() for other in gathered]


def wire(group: ProcessGroup, near: torch.device) -> torch.device:
    """The device on which the group's collectives take tensors: the CPU, if it has the choice."""
    config = torch.distributed.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    kinds = [entry.partition(":")[0] for entry in config.split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return near if near.type in kinds else torch.device(kinds[0])

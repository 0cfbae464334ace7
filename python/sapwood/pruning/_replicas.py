"""Replicas: the ranks that hold the same weights must hold the same masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sapwood.pruning import _distributed, _maskfile
from sapwood.pruning._distributed import is_sharded, local
from sapwood.pruning.masks import MaskSet

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DIGEST_BYTES = 32
_NO_MASKS = bytes(_DIGEST_BYTES)


class Replicas:
    """The process groups within which masks, or parts of masks, must be equal.

    Args:
        model: bare or wrapped; the wrapper of data parallelism brings its group.
        masks: present masks; sharded ones bring the meshes along which they are repeated.
        group: instead of the wrapper's.
        where: for error messages.
    """

    def __init__(
        self, model: nn.Module, masks: MaskSet, group: ProcessGroup | None, where: str
    ) -> None:
        self._where = where
        self._near = next((local(mask).device for mask in masks.values()), torch.device("cpu"))
        meshes = dict.fromkeys(m.device_mesh for m in masks.values() if is_sharded(m))
        self._mesh_groups = [group for mesh in meshes for group in _distributed.groups_of(mesh)]
        self._plain = self._groups_of_plain(model, group)
        self._names: dict[ProcessGroup, list[str]] = {}
        for name, mask in masks.items():
            for each in self._groups_of(mask):
                self._names.setdefault(each, []).append(name)

    def _groups_of_plain(self, model: nn.Module, group: ProcessGroup | None) -> list[ProcessGroup]:
        if group is not None:
            return [group]
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                return [module.process_group]
        # beside sharded parameters, plain ones are the same on the whole mesh
        return self._mesh_groups

    def _groups_of(self, mask: Tensor) -> list[ProcessGroup]:
        if not is_sharded(mask):
            return self._plain
        mesh = mask.device_mesh
        return [mesh.get_group(d) for d, p in enumerate(mask.placements) if p.is_replicate()]

    def settle(self, masks: MaskSet | None) -> None:
        """Compares the masks; None says that this rank could not choose any, and does not raise.

        Raises:
            RuntimeError: on every rank, if the masks of two ranks differ or a rank has none.
        """
        error: str | None = None
        for group, names in self._names.items():
            parts = {name: local(masks[name]) for name in names} if masks is not None else None
            error = error or self._difference(group, parts)
        groups = list(dict.fromkeys([*self._plain, *self._mesh_groups]))
        if (
            self._names and len(groups) > 1
        ):  # a rank outside the group that differs must learn of it
            failed = _distributed.sum_over(groups, [[int(error is not None)]], self._near)[0][0]
            error = error or ("got others on other ranks" if failed else None)
        if error is not None and masks is not None:
            raise RuntimeError(f"{self._where}: masks must be the same on all ranks, {error}")

    def _difference(self, group: ProcessGroup, parts: Mapping[str, Tensor] | None) -> str | None:
        """What differs within the group; two exchanges if something does, otherwise one."""
        digest = bytes.fromhex(_maskfile.digest(parts)) if parts is not None else _NO_MASKS
        digests = self._exchange(group, digest)
        absent = [rank for rank, other in enumerate(digests) if other == _NO_MASKS]
        if absent:
            return (
                f"got none on rank {', '.join(str(rank) for rank in absent)}, where choosing failed"
            )
        if len(set(digests)) == 1 or parts is None:
            return None
        each = [bytes.fromhex(_maskfile.digest({name: part})) for name, part in parts.items()]
        counts = self._exchange(group, len(each).to_bytes(8, "little"))
        longest = max(int.from_bytes(count, "little") for count in counts)
        rows = self._exchange(group, b"".join(each).ljust(longest * _DIGEST_BYTES, b"\0"))
        for i, name in enumerate(parts):
            span = slice(i * _DIGEST_BYTES, (i + 1) * _DIGEST_BYTES)
            if len({row[span] for row in rows}) > 1:
                return f"got another {name} on this rank than on others of {len(rows)}"
        return "got further masks on other ranks"

    def averaged(self, score: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Scores averaged over the replicas, which may each have computed them from other data.

        Sharded ones stay as they are: the gradients behind them were averaged when they were
        scattered.

        Raises:
            RuntimeError: on the ranks that have scores, if another one has none.
        """
        try:
            scores = dict(score())
        except Exception:
            self._without(False)
            raise
        missing = self._without(True)
        if missing:
            raise RuntimeError(
                f"{self._where}: every rank must have scores, got none on rank {', '.join(missing)}"
            )
        for name, own in scores.items():
            for group in self._plain if not is_sharded(own) else ():
                sent = own.detach().to(_distributed.wire(group, self._near), copy=True)
                sent = sent.contiguous()
                torch.distributed.all_reduce(sent, group=group)
                sent /= torch.distributed.get_world_size(group)
                scores[name] = own = sent.to(own.device)
        return scores

    def _without(self, ready: bool) -> list[str]:
        """The ranks that cannot take part in a reduction, so that nobody waits for them."""
        answers = [
            a for group in self._plain for a in enumerate(self._exchange(group, bytes([ready])))
        ]
        return [str(rank) for rank, answer in answers if answer == b"\0"]

    def _exchange(self, group: ProcessGroup, message: bytes) -> list[bytes]:
        """The messages of all ranks of the group, which are of one length."""
        row = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        gathered = _distributed.all_gather(group, row, self._near)
        return [other.numpy().tobytes() for other in gathered]

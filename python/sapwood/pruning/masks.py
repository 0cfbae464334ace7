"""Masks as objects: which weights of a model are kept, under the names of its parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sapwood._files import atomic_write_bytes
from sapwood.pruning import _maskfile
from sapwood.pruning._compare import overlap, require_same_shapes
from sapwood.pruning._distributed import Whole, full, is_sharded, local, place, totals, write_once
from sapwood.pruning._names import NamedParameters, Rule, prunable, require_matching, shape_of

__all__ = ["PRUNABLE", "MaskSet"]

#: The modules whose ``weight`` is pruned by default.
PRUNABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_WHERE = "sapwood.pruning.MaskSet"


class MaskSet(Mapping[str, Tensor]):
    """Ordered mapping of parameter names to bool masks, True where a weight is kept.

    Names are those of the bare model: what DistributedDataParallel, torch.compile and FSDP put in
    front of them is stripped. Nothing is attached to the model. The mapping itself is immutable;
    treat the mask tensors as read-only too.

    Masks of parameters that ``fully_shard`` splits are DTensors with the same placements. Counts,
    digests and comparisons are then those of the whole masks, and collective: every rank calls.

    Example:
        >>> import torch
        >>> from sapwood.pruning import MaskSet
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> masks = MaskSet.dense(model)
        >>> masks.counts()
        {'0.weight': (12, 12)}

    Args:
        masks: name -> bool tensor of the parameter's shape.
        aliases: further name of a tied parameter -> its name in ``masks``.
        metadata: strings to store in the file beside the masks.

    Raises:
        TypeError: if a mask is no bool tensor.
        ValueError: if an alias names no mask, or a metadata key is reserved.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        *,
        aliases: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                actual = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"{_WHERE}: {name} must be a bool tensor, got {actual}")
        self._masks = {name: mask.detach() for name, mask in masks.items()}
        self.aliases = dict(aliases or {})
        self.metadata = _user_metadata(metadata)
        for alias, name in self.aliases.items():
            if name not in self._masks or alias in self._masks:
                raise ValueError(f"{_WHERE}: aliases must map new names to masks, got {alias!r}")

    @classmethod
    def dense(
        cls,
        model: nn.Module,
        include: Sequence[Rule] | None = None,
        exclude: Sequence[Rule] | None = None,
        types: tuple[type[nn.Module], ...] = PRUNABLE,
        strict: bool = True,
    ) -> MaskSet:
        """All-True masks for the prunable parameters of a model.

        Without rules these are the ``weight`` tensors of the modules in ``types``; a weight that is
        tied to a module of another kind, such as an embedding, is left out. A tied parameter
        appears once, under its first name.

        Example:
            >>> import torch
            >>> from sapwood.pruning import MaskSet
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
            >>> list(MaskSet.dense(model, exclude=["1.*"]))
            ['0.weight']

        Args:
            model: the model, bare or wrapped.
            include: exact names (of any parameter), globs, or callables ``(name, parameter) ->
                bool``; globs and callables choose among the default set. Default: all of it.
            exclude: the same, removed afterwards.
            types: modules whose ``weight`` is prunable.
            strict: every rule must match and something must be left.

        Returns:
            Masks on the device of their parameters.

        Raises:
            MaskMatchError: if ``strict`` and a rule matches nothing or nothing is left.
            TypeError: if a chosen parameter is not floating point, or a rule has another type.
            ValueError: if a chosen parameter is not initialised yet.
        """
        chosen, aliases = prunable(model, include, exclude, types, strict, f"{_WHERE}.dense")
        ones = {name: torch.ones_like(p, dtype=torch.bool) for name, p in chosen.items()}
        return cls(ones, aliases=aliases)

    @classmethod
    def from_zeros(
        cls,
        model: nn.Module,
        include: Sequence[Rule] | None = None,
        exclude: Sequence[Rule] | None = None,
        types: tuple[type[nn.Module], ...] = PRUNABLE,
        strict: bool = True,
    ) -> MaskSet:
        """Adopts a sparse checkpoint of any origin: keeps what is not zero in the weights.

        Example:
            >>> import torch
            >>> from sapwood.pruning import MaskSet
            >>> layer = torch.nn.Linear(2, 1)
            >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 3.0]]))
            >>> MaskSet.from_zeros(layer)["weight"]
            tensor([[False,  True]])

        Args:
            model: the model with the sparse weights.
            include, exclude, types, strict: as in ``dense``.

        Returns:
            Masks on the device of their parameters.

        Raises:
            MaskMatchError: as in ``dense``.
            ValueError: if a weight holds NaN.
        """
        where = f"{_WHERE}.from_zeros"
        chosen, aliases = prunable(model, include, exclude, types, strict, where)
        for name, p in chosen.items():
            ((count,),) = totals([[int(local(p).isnan().sum())]], [p])
            if count:
                raise ValueError(f"{where}: {name} must hold numbers, got {count} NaN values")
        return cls({name: p.detach() != 0 for name, p in chosen.items()}, aliases=aliases)

    @classmethod
    def from_torch_prune(
        cls, state_dict: Mapping[str, Tensor], *, keep_orig: bool = False
    ) -> tuple[MaskSet, dict[str, Tensor]]:
        """The masks and the plain state dict of a model under ``torch.nn.utils.prune``.

        See ``sapwood.pruning.from_torch_prune``, which this calls.
        """
        from sapwood.pruning.interop import from_torch_prune  # it stands on this module

        return from_torch_prune(state_dict, keep_orig=keep_orig)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Reads a mask file and verifies it completely.

        Example:
            >>> masks = MaskSet.load("model.masks.safetensors")  # doctest: +SKIP

        Args:
            path: a file written by ``save``.

        Returns:
            Masks on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no mask file, truncated, or altered in any byte.
        """
        content = Path(path).read_bytes()
        try:
            masks, aliases, metadata = _maskfile.decode(content)
            return cls(masks, aliases=aliases, metadata=metadata)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{_WHERE}.load: {path} must be an intact mask file: {error}"
            ) from None

    def save(
        self, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes the masks, one bit per weight, atomically.

        Sharded masks are written whole, by the first rank of their mesh; all ranks call, and find
        the file when the call returns.

        Example:
            >>> masks.save("model.masks.safetensors", metadata={"run": "7"})  # doctest: +SKIP

        Args:
            path: the target; by custom it ends in ``.masks.safetensors``.
            metadata: strings to store too; added to ``self.metadata``.

        Raises:
            ValueError: if a metadata key is reserved.
            TypeError: if metadata holds anything but strings.
        """
        user = _user_metadata({**self.metadata, **(metadata or {})})
        content = _maskfile.encode(Whole(self), self.aliases, user)
        write_once(self.values(), lambda: atomic_write_bytes(path, content))

    def apply_(self, model: nn.Module, *, strict: bool = True) -> None:
        """Sets the masked weights of the model to +0.0, in place and outside autograd.

        Example:
            >>> masks.apply_(model)  # doctest: +SKIP

        Args:
            model: a model with the parameters the masks name.
            strict: every mask must find its parameter.

        Raises:
            MaskMatchError: if ``strict`` and a mask has no parameter.
            ValueError: if a shape differs; the model is then unchanged.
        """
        found = self.parameters_of(NamedParameters.of(model), strict, f"{_WHERE}.apply_")
        with torch.no_grad():
            for name, parameter in found.items():
                local(parameter).masked_fill_(self._off(name, parameter), 0.0)

    def check(self, model: nn.Module, *, strict: bool = True) -> list[str]:
        """Names whose weights are not zero (NaN included) where they should be.

        Example:
            >>> masks.check(model)  # doctest: +SKIP
            []

        Args:
            model: a model with the parameters the masks name.
            strict: every mask must find its parameter.

        Returns:
            The offending names; empty when the model obeys the masks.

        Raises:
            MaskMatchError: if ``strict`` and a mask has no parameter.
            ValueError: if a shape differs.
        """
        found = self.parameters_of(NamedParameters.of(model), strict, f"{_WHERE}.check")
        revived = [[int((local(p) != 0)[self._off(n, p)].any())] for n, p in found.items()]
        counts = totals(revived, list(found.values()))
        return [name for name, (count,) in zip(found, counts, strict=True) if count]

    def _off(self, name: str, parameter: Tensor) -> Tensor:
        """Where this rank's part of a parameter is masked."""
        return ~local(place(self._masks[name], parameter))

    def parameters_of(
        self, named: NamedParameters, strict: bool, where: str
    ) -> dict[str, nn.Parameter]:
        """The parameters that the masks name, checked for existence and shape."""
        found = require_matching(self, named, strict, where)
        for name, parameter in found.items():
            if parameter.shape != self._masks[name].shape:
                raise ValueError(
                    f"{where}: {name} must have the parameter's shape {shape_of(parameter)}, "
                    f"got a mask of {shape_of(self._masks[name])}"
                )
        return found

    def counts(self) -> dict[str, tuple[int, int]]:
        """Name -> (kept, total)."""
        masks = list(self._masks.values())
        kept = totals([[int(local(mask).count_nonzero())] for mask in masks], masks)
        return {n: (k, m.numel()) for (n, m), (k,) in zip(self._masks.items(), kept, strict=True)}

    def sparsity(self) -> float:
        """Share of the elements in the set that are switched off; 0.0 for an empty set."""
        counts = self.counts().values()
        total = sum(n for _, n in counts)
        return 1.0 - sum(kept for kept, _ in counts) / total if total else 0.0

    def overlap(
        self,
        other: MaskSet,
        kind: Literal["jaccard", "keep_share", "chance_corrected"] = "jaccard",
    ) -> float:
        """How much two mask sets agree on what to keep.

        ``jaccard`` is |A and B| / |A or B|; ``keep_share`` is |A and B| / |A|, the part of this
        set's weights that the other keeps too; ``chance_corrected`` is (|A and B| - E) / (M - E)
        with E the expectation for random masks of the same per-tensor counts and M the largest
        possible value, so 0 means chance and 1 the best that the counts allow.

        Example:
            >>> import torch
            >>> from sapwood.pruning import MaskSet
            >>> a = MaskSet({"w": torch.tensor([True, True, False, False])})
            >>> a.overlap(MaskSet({"w": torch.tensor([True, False, True, False])}))
            0.3333333333333333

        Args:
            other: masks with the same names and shapes.
            kind: the measure.

        Returns:
            The measure; 1.0 where it would be 0 / 0.

        Raises:
            ValueError: if names or shapes differ, or ``kind`` is unknown.
        """
        where = f"{_WHERE}.overlap"
        self._require_same(other, where)
        both = (self & other).counts()
        return overlap(self.counts(), other.counts(), both, kind, where)

    def digest(self) -> str:
        """sha256 over names, shapes and packed bits: equal for equal sets, in the same order."""
        return _maskfile.digest(Whole(self))

    def full(self) -> MaskSet:
        """Plain masks out of sharded ones, on every rank and on the CPU; collective."""
        return self._like({name: full(mask) for name, mask in self._masks.items()})

    def to(self, device: torch.device | str) -> MaskSet:
        """The same masks on another device.

        Raises:
            NotImplementedError: if a sharded mask would leave the devices of its mesh.
        """
        for name, mask in self._masks.items():
            if is_sharded(mask) and mask.device.type != torch.device(device).type:
                raise NotImplementedError(
                    f"{_WHERE}.to: device must be that of the sharded mask {name}, "
                    f"{mask.device.type}, got {device}; use full()"
                )
        return self._like({n: m if is_sharded(m) else m.to(device) for n, m in self._masks.items()})

    def _like(self, masks: Mapping[str, Tensor]) -> MaskSet:
        return MaskSet(masks, aliases=self.aliases, metadata=self.metadata)

    def _require_same(self, other: MaskSet, where: str) -> None:
        if not isinstance(other, MaskSet):
            raise TypeError(f"{where}: other must be a MaskSet, got {type(other).__name__}")
        require_same_shapes(self, other, where)

    def _combine(self, other: MaskSet, operation: str) -> MaskSet:
        self._require_same(other, f"{_WHERE}.{operation}")
        return self._like(
            {n: getattr(mask, operation)(place(other[n], mask)) for n, mask in self.items()}
        )

    def __and__(self, other: MaskSet) -> MaskSet:
        return self._combine(other, "__and__")

    def __or__(self, other: MaskSet) -> MaskSet:
        return self._combine(other, "__or__")

    def __xor__(self, other: MaskSet) -> MaskSet:
        return self._combine(other, "__xor__")

    def __invert__(self) -> MaskSet:
        return self._like({name: ~mask for name, mask in self.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        if list(self) != list(other):
            return False
        same = [torch.equal(local(m), local(place(other[n], m))) for n, m in self.items()]
        return not any(n for (n,) in totals([[int(not s)] for s in same], list(self.values())))

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[self.aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        total = sum(mask.numel() for mask in self._masks.values())
        sharded = any(is_sharded(mask) for mask in self._masks.values())
        share = "sharded" if sharded else f"sparsity {self.sparsity():.4f}"  # never collective
        return f"MaskSet({len(self)} tensors, {total} elements, {share})"


def _user_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"{_WHERE}: metadata must hold strings, got {key!r}: {value!r}")
        if key in _maskfile.RESERVED:
            raise ValueError(f"{_WHERE}: metadata must not use a reserved key, got {key!r}")
    return dict(metadata or {})

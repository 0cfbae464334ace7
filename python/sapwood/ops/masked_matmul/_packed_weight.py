"""A weight in packed form: only the kept entries, in one or several layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapwood import _check
from sapwood.ops import _dispatch
from sapwood.ops.masked_matmul import _packed_specs as specs
from sapwood.ops.masked_matmul._layouts import (
    FIELDS,
    FORMATS,
    SMALL_BATCH,
    TRANSPOSED,
    Layout,
    supported,
)
from sapwood.reference import masked_matmul as reference


@dataclass(frozen=True)
class PackedWeight:
    """A (N, K) weight that stores its kept entries only; made by :func:`pack_sparse`.

    ``layouts`` maps a format ("dense", "bitmap", "csr", "sell") to its tensors; the formats hold
    the same entries, so that each batch size can take the fastest. Not a tensor subclass.
    """

    shape: tuple[int, int]
    layouts: Mapping[str, Layout]
    #: What was computed from the layouts. Not cached_property: torch.compile cannot trace its lock.
    _derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def _once(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(self.layouts)

    @property
    def values(self) -> Tensor:
        """(nnz,) kept entries in row-major order."""
        for name in ("csr", "bitmap"):
            if name in self.layouts:
                return self.layouts[name]["values"]
        return self.csr["values"]

    @property
    def _any(self) -> Tensor:
        return next(iter(next(iter(self.layouts.values())).values()))

    @property
    def dtype(self) -> torch.dtype:
        return self._any.dtype

    @property
    def device(self) -> torch.device:
        return self._any.device

    @property
    def nnz(self) -> int:
        for name in ("csr", "bitmap"):
            if name in self.layouts:
                return self.layouts[name]["values"].numel()
        return int(self._once("nnz", lambda: int(self.mask().count_nonzero())))

    @property
    def sparsity(self) -> float:
        """Share of the N K entries that are absent."""
        total = self.shape[0] * self.shape[1]
        return 1.0 - self.nnz / total if total else 0.0

    def nbytes(self) -> int:
        """Bytes of all tensors held; what two formats share counts once."""
        held = {t.data_ptr(): t.nbytes for layout in self.layouts.values() for t in layout.values()}
        return sum(held.values())

    @property
    def csr(self) -> Layout:
        """The csr layout, derived when it is not held; gradients need it."""
        if "csr" in self.layouts:
            return self.layouts["csr"]
        made: Layout = self._once("csr", lambda: _layout("csr", unpack(self), self.mask()))
        return made

    @property
    def transposed(self) -> Layout:
        """Structure of the transposed weight: fields cols_t, row_ptr_t, row_order_t, perm."""

        def compute() -> Layout:
            tensors = specs.transpose_csr(self.csr["cols"], self.csr["row_ptr"], self.shape[1])
            return dict(zip(TRANSPOSED, tensors, strict=True))

        made: Layout = self._once("transposed", compute)
        return made

    def plan(self) -> tuple[str, ...]:
        """The format that runs in each bucket of batch sizes, for the current number of threads."""
        if len(self.layouts) == 1:
            return self.formats * len(_dispatch.BUCKETS)
        if torch.compiler.is_compiling():  # the choice was made when the weight was packed
            return self._derived.get("plan") or self.formats[:1] * len(_dispatch.BUCKETS)
        plan: tuple[str, ...] = self._once(f"plan {torch.get_num_threads()}", self._plan)
        self._derived.setdefault("plan", plan)
        return plan

    def _plan(self) -> tuple[str, ...]:
        table = _dispatch.table_for(self.device.type, self.dtype, may_calibrate=False)
        any_batch = set(self.formats) & {"dense", "csr"}
        chosen = []
        for batch in _dispatch.BUCKETS:
            if any_batch or batch <= SMALL_BATCH:
                best = _dispatch.choose(table, *self.shape, self.nnz, batch, self.formats)[0]
            else:
                best = self.formats[0]  # packed for small batches only: right, but not fast
            chosen.append(best)
        return tuple(chosen)

    def mask(self) -> Tensor:
        """(N, K) bool, True where an entry is kept."""
        if "csr" in self.layouts:
            csr = self.layouts["csr"]
            rows = reference.row_indices(csr["row_ptr"], self.nnz)
            mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
            mask[rows, reference.column_indices(csr["cols"])] = True
            return mask
        if "bitmap" in self.layouts:
            return reference.mask_from_bitmap(self.layouts["bitmap"]["words"], self.shape[1])
        if "sell" in self.layouts:
            sell = self.layouts["sell"]
            mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
            mask[reference.sell_positions(sell["index"], sell["window"], sell["slice_ptr"])] = True
            return mask
        return self.layouts["dense"]["weight"] != 0

    def to(self, target: torch.device | torch.dtype | str) -> PackedWeight:
        """A copy on another device, or with values of another floating dtype."""
        if isinstance(target, torch.dtype) and not target.is_floating_point:
            _check.fail(TypeError, "PackedWeight.to", "target", "be a floating dtype", target)

        def moved(name: str, t: Tensor) -> Tensor:
            if isinstance(target, torch.dtype):
                return t.to(target) if name in ("values", "weight") else t
            return t.to(target)

        seen: dict[int, Tensor] = {}
        layouts = {
            fmt: {k: seen.setdefault(id(t), moved(k, t)) for k, t in layout.items()}
            for fmt, layout in self.layouts.items()
        }
        return PackedWeight(self.shape, layouts)

    def with_values(self, values: Tensor) -> PackedWeight:
        """The same structure with other entries.

        Args:
            values: (nnz,) in row-major order. Gradients flow to it.

        Raises:
            ValueError: for another number of values.
        """
        _check.shape("PackedWeight.with_values", "values", values, (self.nnz,))
        packed = PackedWeight(self.shape, {"csr": {**self.csr, "values": values}})
        packed._derived["transposed"] = self.transposed
        return packed

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors by name, ready for safetensors; :meth:`from_tensors` is the inverse."""
        named = {
            f"{fmt}.{name}": t for fmt, layout in self.layouts.items() for name, t in layout.items()
        }
        if "bitmap.values" in named and "csr.values" in named:
            del named["bitmap.values"]  # one storage may have only one name in a safetensors file
        named["shape"] = torch.tensor(self.shape)
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """Rebuilds a packed weight from :meth:`tensors`, checking every index.

        Raises:
            ValueError: for missing or unknown tensors and for inconsistent structure.
        """
        from sapwood.ops.masked_matmul._validate import validated

        return cls(*validated(tensors))


def _layout(fmt: str, weight: Tensor, mask: Tensor) -> Layout:
    pack = {"csr": specs.pack_csr, "bitmap": specs.pack_bitmap, "sell": specs.pack_sell}
    if fmt == "dense":
        return {"weight": torch.where(mask, weight, 0.0)}
    return dict(zip(FIELDS[fmt], pack[fmt](weight, mask), strict=True))


def _flushed(weight: Tensor) -> Tensor:
    """Denormal entries become zero: they slow a CPU down a hundredfold and carry nothing.

    float16 is exempt: its denormals are ordinary numbers once widened to float32.
    """
    if weight.dtype == torch.float16:
        return weight
    tiny = torch.finfo(weight.dtype).tiny
    return torch.where(weight.abs() < tiny, 0.0, weight)


def _wanted(
    keep: str, batch_hint: int | Iterable[int] | None, shape: tuple[int, int], nnz: int, w: Tensor
) -> list[str]:
    usable = [f for f in FORMATS if supported(f, w.dtype, w.device.type)]
    if keep == "memory":
        size = w.element_size()
        bytes_of = {
            "dense": shape[0] * shape[1] * size,
            "bitmap": shape[0] * shape[1] / 8 + nnz * size,
            "csr": nnz * (size + (2 if shape[1] <= 65536 else 4)),
        }
        return [min(bytes_of, key=lambda f: bytes_of[f])]
    table = _dispatch.table_for(w.device.type, w.dtype)
    if batch_hint is None:
        return list(_dispatch.useful_formats(table, *shape, nnz, usable))
    batches = (batch_hint,) if isinstance(batch_hint, int) else batch_hint
    return list(_dispatch.useful_formats(table, *shape, nnz, usable, batches))


def pack_sparse(
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    format: str = "auto",
    keep: str = "speed",
    batch_hint: int | Iterable[int] | None = None,
) -> PackedWeight:
    """Packs a sparse weight for :func:`packed_linear`.

    Example::

        w = torch.randn(1024, 1024)
        packed = sapwood.ops.pack_sparse(w, w.abs() > 1.64)   # keeps about 10 %
        y = sapwood.ops.packed_linear(torch.randn(64, 1024), packed)

    Args:
        weight: (N, K) floating point. Entries smaller than the smallest normal number become 0.
        mask: (N, K) bool or uint8, non-zero keeps; None keeps the non-zero entries.
        format: "auto" (what the dispatch table predicts to win), "dense", "bitmap", "csr" or
            "sell" (batches up to 8, float32 on CPU).
        keep: with "auto": "speed" holds every format that wins for some batch size, "memory" the
            smallest one only.
        batch_hint: the batch sizes that matter; None for all.

    Returns:
        A :class:`PackedWeight`.

    Raises:
        ValueError: for wrong shapes or unknown options.
        TypeError: for wrong dtypes.
        RuntimeError: for tensors on different devices.
    """
    op = "pack_sparse"
    _check.tensor(op, "weight", weight)
    _check.dims(op, "weight", weight, 2)
    _check.floating(op, "weight", weight)
    _check.one_of(op, "format", format, ("auto", *FORMATS))
    _check.one_of(op, "keep", keep, ("speed", "memory"))
    weight = weight.detach()
    if mask is None:
        mask = weight != 0
    _check.tensor(op, "mask", mask)
    _check.shape(op, "mask", mask, weight.shape, "weight")
    _check.dtype(op, "mask", mask, (torch.bool, torch.uint8))
    _check.same_device(op, weight=weight, mask=mask)
    mask = mask != 0 if mask.dtype == torch.uint8 else mask
    weight = _flushed(weight)
    shape = (weight.shape[0], weight.shape[1])
    formats = [format]
    if format == "auto":
        formats = _wanted(keep, batch_hint, shape, int(mask.count_nonzero()), weight)
    layouts = {f: _layout(f, weight, mask) for f in formats}
    if "csr" in layouts and "bitmap" in layouts:
        layouts["bitmap"]["values"] = layouts["csr"]["values"]
    packed = PackedWeight(shape, layouts)
    packed.plan()
    return packed


def unpack(packed: PackedWeight) -> Tensor:
    """The dense (N, K) weight, exactly: absent entries are +0.

    Example::

        assert torch.equal(sapwood.ops.unpack(sapwood.ops.pack_sparse(w, m)), w.where(m, 0))
    """
    layouts, k = packed.layouts, packed.shape[1]
    if "dense" in layouts:
        return layouts["dense"]["weight"].clone()
    if "csr" in layouts:
        csr = layouts["csr"]
        return reference.dense_from_csr(csr["values"], csr["cols"], csr["row_ptr"], k)
    if "bitmap" in layouts:
        return reference.dense_from_bitmap(
            layouts["bitmap"]["values"], layouts["bitmap"]["words"], k
        )
    return reference.dense_from_sell(**layouts["sell"], shape=packed.shape)

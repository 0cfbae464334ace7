"""Masked layers for training, packed ones once the masks are fixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapwood import _check
from sapwood.ops import masked_matmul as masked_matmul_op
from sapwood.ops import pack_sparse, packed_linear, unpack
from sapwood.ops.masked_matmul import PackedWeight
from sapwood.ops.masked_matmul._layouts import TRANSPOSED

_STRUCTURE = ("cols", "row_ptr", "row_order")


def _bool_mask(owner: str, mask: Tensor, weight: Tensor) -> Tensor:
    _check.tensor(owner, "mask", mask)
    _check.shape(owner, "mask", mask, weight.shape, "weight")
    _check.dtype(owner, "mask", mask, (torch.bool, torch.uint8))
    return mask.to(weight.device) != 0


class MaskedLinear(nn.Linear):
    """``nn.Linear`` with a mask: entries that are masked out neither act nor learn.

    Example::

        layer = sapwood.nn.MaskedLinear.from_linear(nn.Linear(64, 32), torch.rand(32, 64) > 0.9)

    The buffer ``mask`` ((out, in) bool, True keeps) is saved with the module. In evaluation and
    without gradients, the masked weight is computed once and kept until weight or mask changes.

    Args:
        in_features: K.
        out_features: N.
        bias: whether to add a bias.
        device: as ``nn.Linear``.
        dtype: as ``nn.Linear``.
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))
        self._product: tuple[tuple[int, ...], Tensor] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> MaskedLinear:
        """Shares weight and bias of ``linear``; without a mask the non-zero entries are kept."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        keep = linear.weight.detach() != 0 if mask is None else mask
        layer.mask = _bool_mask(cls.__name__, keep, linear.weight)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A plain layer whose masked entries are zero."""
        return _plain_linear(torch.where(self.mask, self.weight, 0.0), self.bias, self.training)

    @property
    def sparsity(self) -> float:
        """Share of entries that are masked out."""
        return 1.0 - int(self.mask.count_nonzero()) / max(1, self.mask.numel())

    def forward(self, input: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return masked_matmul_op(input, self.weight, self.mask, self.bias)
        return F.linear(input, self._masked_weight(), self.bias)

    def _masked_weight(self) -> Tensor:
        w, m = self.weight, self.mask
        key = (w._version, m._version, w.data_ptr(), m.data_ptr())
        if self._product is None or self._product[0] != key:
            self._product = key, torch.where(m, w, 0.0)
        return self._product[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity:.4f}"


class MaskedConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a mask over its weight; the buffer ``mask`` is saved with the module.

    Example::

        layer = sapwood.nn.MaskedConv2d.from_conv(nn.Conv2d(3, 8, 3), torch.rand(8, 3, 3, 3) > 0.5)
    """

    mask: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, mask: Tensor | None = None) -> MaskedConv2d:
        """Shares weight and bias of ``conv``; without a mask the non-zero entries are kept."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=False,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        keep = conv.weight.detach() != 0 if mask is None else mask
        layer.mask = _bool_mask(cls.__name__, keep, conv.weight)
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        weight = torch.where(self.mask, self.weight, 0.0)  # NaN in a masked entry must not leak
        y: Tensor = self._conv_forward(input, weight, self.bias)
        return y


class SparseLinear(nn.Module):
    """A linear layer that stores and trains only its kept entries.

    Example::

        layer = sapwood.nn.SparseLinear.from_linear(pruned)      # zeros of the weight are dropped
        y = layer(torch.randn(64, layer.in_features))

    ``values`` ((nnz,) in row-major order) is the parameter, so that the optimizer's state has nnz
    entries too. The structure is stored in buffers. Without gradients each batch size takes the
    fastest format, dense torch included; with gradients the csr format is used both ways.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    cols: Tensor
    row_ptr: Tensor
    row_order: Tensor
    perm: Tensor | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        keep: str = "speed",
        batch_hint: int | Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        _check.one_of("SparseLinear", "keep", keep, ("speed", "memory"))
        self.out_features, self.in_features = packed.shape
        self.keep, self.batch_hint = keep, batch_hint
        csr = packed.csr
        self.values = nn.Parameter(csr["values"].detach().clone())
        for name in _STRUCTURE:
            self.register_buffer(name, csr[name])
        for name in TRANSPOSED:  # built when training begins, never saved
            self.register_buffer(name, None, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._inference: tuple[tuple[int, int], PackedWeight] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask: Tensor | None = None,
        *,
        keep: str = "speed",
        batch_hint: int | Iterable[int] | None = None,
    ) -> SparseLinear:
        """Packs a linear layer; without a mask the non-zero entries (or its own mask) are kept."""
        if mask is None and isinstance(linear, MaskedLinear):
            mask = linear.mask
        packed = pack_sparse(linear.weight, mask, format="csr")
        layer = cls(packed, linear.bias, keep=keep, batch_hint=batch_hint)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A plain layer with zeros where entries are absent."""
        return _plain_linear(unpack(self._csr()), self.bias, self.training)

    @property
    def sparsity(self) -> float:
        """Share of the weight's entries that are absent."""
        return 1.0 - self.values.numel() / max(1, self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return packed_linear(input, self._csr(), self.bias)
        return packed_linear(input, self.packed(), self.bias)

    def packed(self) -> PackedWeight:
        """The packed weight used for inference, renewed when the values have changed."""
        key = (self.values._version, self.values.data_ptr())
        if self._inference is None or self._inference[0] != key:
            csr = self._csr()
            weight = pack_sparse(
                unpack(csr), csr.mask(), keep=self.keep, batch_hint=self.batch_hint
            )
            self._inference = key, weight
        return self._inference[1]

    def train(self, mode: bool = True) -> SparseLinear:
        """Also builds the transposed structure, which the gradient of the input needs."""
        if mode and self.perm is None:
            for name, tensor in self._csr().transposed.items():
                setattr(self, name, tensor)
        return super().train(mode)

    def _csr(self) -> PackedWeight:
        structure = {name: getattr(self, name) for name in _STRUCTURE}
        shape = (self.out_features, self.in_features)
        packed = PackedWeight(shape, {"csr": {"values": self.values, **structure}})
        if self.perm is not None:
            packed._derived["transposed"] = {name: getattr(self, name) for name in TRANSPOSED}
        return packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        self._inference = None  # it lies on the old device or has the old dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._inference = None
        for name in TRANSPOSED:
            setattr(self, name, None)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nnz={self.values.numel()}, "
            f"sparsity={self.sparsity:.4f}"
        )


def _plain_linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear.train(training)


def output_batch(shape: torch.Size) -> int:
    """Rows a linear layer sees for an input of this shape."""
    return math.prod(shape[:-1])

"""Convolutions whose regions and filters are chosen at each call, for every sample its own."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood.ops import copruned_conv2d, copruned_conv_lstm_step


class _Packed:
    """A weight with its filters together in memory, as the kernels read it, kept until it changes.

    The packed weight has the same shape and values, so nothing but the speed depends on it.
    """

    def __init__(self) -> None:
        self._owner: weakref.ref[Tensor] | None = None  # an address may be used again
        self._key: tuple[int, int] | None = None
        self._weight: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_meta:
            return weight
        key = (weight._version, weight.data_ptr())
        known = self._owner is not None and self._owner() is weight and self._key == key
        if self._weight is None or not known:
            packed = weight.detach().permute(2, 3, 1, 0).contiguous()
            self._owner, self._key = weakref.ref(weight), key
            self._weight = packed.permute(3, 2, 0, 1)
        return self._weight

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return _Packed()

    def __getstate__(self) -> dict[str, Any]:
        return {"_owner": None, "_key": None, "_weight": None}


class CoPrunedConv2d(nn.Conv2d):
    """``nn.Conv2d`` that computes, for each sample, only the tiles and filters its masks keep.

    Example::

        layer = sapwood.nn.CoPrunedConv2d(32, 64, 3, padding=1)
        y = layer(torch.randn(2, 32, 20, 20), torch.rand(2, 3, 3) < 0.3, torch.rand(2, 4) < 0.5)

    Without gradients the weight is packed once and kept until it changes. State dicts are those of
    ``nn.Conv2d``; only zero padding is possible.

    Args:
        *args: as ``nn.Conv2d``.
        tile: side of a tile in output pixels: 2, 4, 8 or 16.
        filter_group: filters of a group: 8, 16, 32 or 64.
        **kwargs: as ``nn.Conv2d``.
    """

    def __init__(self, *args: Any, tile: int = 8, filter_group: int = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            _check.fail(
                NotImplementedError,
                "CoPrunedConv2d",
                "padding_mode",
                "be 'zeros'",
                repr(self.padding_mode),
            )
        self.tile, self.filter_group = tile, filter_group
        self._packed = _Packed()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, tile: int = 8, filter_group: int = 16) -> CoPrunedConv2d:
        """Shares weight and bias of ``conv``."""
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
            tile=tile,
            filter_group=filter_group,
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def forward(
        self,
        input: Tensor,
        region_mask: Tensor | None = None,
        filter_mask: Tensor | None = None,
        *,
        input_filter_mask: Tensor | None = None,
        activation: str = "none",
        residual: Tensor | None = None,
        expected_keep: float | None = None,
    ) -> Tensor:
        """As :func:`sapwood.ops.copruned_conv2d` with this layer's weight, bias and sizes."""
        return copruned_conv2d(
            input,
            self._packed(self.weight),
            self.bias,
            region_mask,
            filter_mask,
            stride=self.stride,
            padding=self._zeros(),
            dilation=self.dilation,
            groups=self.groups,
            tile=self.tile,
            filter_group=self.filter_group,
            input_filter_mask=input_filter_mask,
            activation=activation,
            residual=residual,
            expected_keep=expected_keep,
        )

    def _zeros(self) -> tuple[int, ...]:
        """Padding as numbers: "same" and "valid" are allowed as in ``nn.Conv2d``."""
        if isinstance(self.padding, str):
            if self.padding == "valid":
                return (0, 0)
            pairs = zip(self.dilation, self.kernel_size, strict=True)
            return tuple(d * (k - 1) // 2 for d, k in pairs)
        return self.padding

    def extra_repr(self) -> str:
        sizes: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{sizes}, tile={self.tile}, filter_group={self.filter_group}"


class CoPrunedConvLSTMCell(nn.Module):
    """A ConvLSTM cell whose skipped tiles and hidden units keep their state.

    Example::

        cell = sapwood.nn.CoPrunedConvLSTMCell(16, 32, 3)
        x, state = torch.randn(2, 16, 20, 20), None
        h, c = cell(x, state, torch.rand(2, 3, 3) < 0.3)

    Weights and biases begin uniform in +-1 / sqrt(D k^2), as torch's own recurrent cells scale by
    1 / sqrt(D); the bias of the forget gate begins with ``forget_bias`` added.

    Args:
        input_channels: C.
        hidden_channels: D.
        kernel_size: odd side k of both kernels.
        bias: whether to add a bias.
        forget_bias: added to the forget gate's initial bias.
        tile: side of a tile in pixels.
        filter_group: hidden units of a group.
        device: as other modules.
        dtype: as other modules.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        bias: bool = True,
        forget_bias: float = 1.0,
        tile: int = 8,
        filter_group: int = 16,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            op = "CoPrunedConvLSTMCell"
            _check.fail(ValueError, op, "kernel_size", "be odd", kernel_size)
        self.input_channels, self.hidden_channels = input_channels, hidden_channels
        self.kernel_size, self.forget_bias = kernel_size, forget_bias
        self.tile, self.filter_group = tile, filter_group
        gates, kernel = 4 * hidden_channels, (kernel_size, kernel_size)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_x = parameter(gates, input_channels, *kernel)
        self.weight_h = parameter(gates, hidden_channels, *kernel)
        self.bias = parameter(gates) if bias else None
        self._packed_x, self._packed_h = _Packed(), _Packed()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases anew."""
        bound = 1 / math.sqrt(self.hidden_channels * self.kernel_size**2)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if self.bias is not None:
            with torch.no_grad():
                self.bias[self.hidden_channels : 2 * self.hidden_channels] += self.forget_bias

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        region_mask: Tensor | None = None,
        filter_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of :func:`sapwood.ops.copruned_conv_lstm_step`; without a state, from zeros."""
        if state is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_channels, *x.shape[2:])
            state = zeros, zeros
        h, c = state
        return copruned_conv_lstm_step(
            x,
            h,
            c,
            self._packed_x(self.weight_x),
            self._packed_h(self.weight_h),
            self.bias,
            region_mask,
            filter_mask,
            tile=self.tile,
            filter_group=self.filter_group,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CoPrunedConvLSTMCell:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._packed_x, self._packed_h = _Packed(), _Packed()
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.input_channels}, {self.hidden_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}, tile={self.tile}, filter_group={self.filter_group}"
        )

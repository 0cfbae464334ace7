"""Every documented error of the copruned_conv family: its type and its full text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sapwood import ops

X, W = torch.randn(2, 16, 9, 9), torch.randn(32, 16, 3, 3)
TILES = torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])
GROUPS = torch.tensor([[True, False], [False, True]])
B = torch.randn(32)
OTHERS = "sapwood.reference.copruned_conv.copruned_conv2d takes others"
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": X[0]}, ValueError, "input must have 4 dimensions, got shape (16, 9, 9)"),
    ({"input": "x"}, TypeError, "input must be a tensor, got str"),
    ({"input": X.int()}, TypeError, "input must be floating point, got torch.int32"),
    (
        {"weight": W.double()},
        TypeError,
        "weight must have input's dtype torch.float32, got torch.float64",
    ),
    ({"weight": W[:, :8]}, ValueError, "weight must have shape (32, 16, 3, 3), got (32, 8, 3, 3)"),
    ({"bias": B[:5]}, ValueError, "bias must have shape (32,), got (5,)"),
    ({"tile": 5}, ValueError, "tile must be one of 2, 4, 8, 16, got 5"),
    ({"filter_group": 4}, ValueError, "filter_group must be one of 8, 16, 32, 64, got 4"),
    (
        {"filter_group": 64, "filter_mask": GROUPS},
        ValueError,
        "filter_group must divide the 32 filters, got 64",
    ),
    (
        {"filter_group": 32, "input_filter_mask": GROUPS},
        ValueError,
        "filter_group must divide the 16 input channels, got 32",
    ),
    (
        {"region_mask": TILES[:, :1]},
        ValueError,
        "region_mask must have shape (2, 2, 2) (batch and the grid of 8 x 8 tiles over (9, 9) "
        "outputs), got (2, 1, 2)",
    ),
    (
        {"filter_mask": GROUPS[:1]},
        ValueError,
        "filter_mask must have shape (2, 2) (batch and groups of 16), got (1, 2)",
    ),
    (
        {"region_mask": TILES.int()},
        TypeError,
        "region_mask must be bool or floating point, got torch.int32",
    ),
    (
        {"residual": torch.zeros(2, 32, 9, 8)},
        ValueError,
        "residual must have shape (2, 32, 9, 9), got (2, 32, 9, 8)",
    ),
    (
        {"activation": "tanh"},
        ValueError,
        "activation must be one of none, relu, gelu, silu, leaky_relu, got 'tanh'",
    ),
    ({"stride": (1, 2, 1)}, ValueError, "stride must be an int or two ints, got (1, 2, 1)"),
    ({"stride": 3}, NotImplementedError, f"stride must be of 1, 2 ({OTHERS}), got (3, 3)"),
    ({"dilation": 4}, NotImplementedError, f"dilation must be of 1, 2, 3 ({OTHERS}), got (4, 4)"),
    (
        {"padding": 3},
        NotImplementedError,
        f"padding must be of 0 to dilation * (kernel - 1) = 2 ({OTHERS}), got (3, 3)",
    ),
    (
        {"weight": W[..., :2]},
        NotImplementedError,
        f"weight's kernel must be of 1, 3, 5, 7 ({OTHERS}), got (3, 2)",
    ),
    (
        {"groups": 2},
        NotImplementedError,
        f"groups must be 1 or the number of channels and filters ({OTHERS}), got 2",
    ),
    (
        {"input": X[..., :2, :2], "padding": 0},
        ValueError,
        "input must be at least as large as the kernel (3, 3) after padding, got (2, 2)",
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": X, "weight": W, "padding": 1, **changed}
    with pytest.raises(kind) as raised:
        ops.copruned_conv2d(**arguments)
    assert str(raised.value) == f"sapwood.copruned_conv2d: {message}"


def test_devices_must_agree() -> None:
    with pytest.raises(RuntimeError) as raised:
        ops.copruned_conv2d(X, W, None, TILES.to("meta"), padding=1)
    assert str(raised.value) == (
        "sapwood.copruned_conv2d: input is on cpu but region_mask is on meta"
    )


H = torch.zeros(2, 8, 9, 9)
W_H = torch.randn(32, 8, 3, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: ops.copruned_conv_lstm_step(X, H[:1], H, W, W_H),
            ValueError,
            "copruned_conv_lstm_step: h must have shape (2, 8, 9, 9), got (1, 8, 9, 9)",
        ),
        (
            lambda: ops.copruned_conv_lstm_step(X, H, H, W[:30], W_H),
            ValueError,
            "copruned_conv_lstm_step: weight_x must have 4 gates' filters, got 30",
        ),
        (
            lambda: ops.copruned_conv_lstm_step(X, H, H, W, W_H[:, :4]),
            ValueError,
            "copruned_conv_lstm_step: weight_h must have shape (32, 8, 3, 3), got (32, 4, 3, 3)",
        ),
        (
            lambda: ops.tile_mask(TILES),
            TypeError,
            "tile_mask: score must be floating point, got torch.bool",
        ),
        (
            lambda: ops.tile_mask(torch.rand(3)),
            ValueError,
            "tile_mask: score must have at least 2 dimensions, got shape (3,)",
        ),
        (
            lambda: ops.tile_mask(torch.rand(3, 3), keep=1.5),
            ValueError,
            "tile_mask: keep must lie in 0 to 1, got 1.5",
        ),
        (
            lambda: ops.dilate_tile_mask(torch.rand(3, 3), halo=1, tile=8),
            TypeError,
            "dilate_tile_mask: mask must be torch.bool, got torch.float32",
        ),
        (
            lambda: ops.dilate_tile_mask(TILES, halo=-1, tile=8),
            ValueError,
            "dilate_tile_mask: halo must be at least 0, got -1",
        ),
        (
            lambda: ops.dilate_tile_mask(TILES, halo=1, tile=0),
            ValueError,
            "dilate_tile_mask: tile must be at least 1, got 0",
        ),
        (
            lambda: ops.dilate_tile_mask(TILES[0, 0], halo=1, tile=8),
            ValueError,
            "dilate_tile_mask: mask must have at least 2 dimensions, got shape (2,)",
        ),
        (
            lambda: ops.copruned_flops((32, 16, 3, 3), (2, 32, 9, 9), TILES.float()),
            TypeError,
            "copruned_flops: region_mask must be torch.bool, got torch.float32",
        ),
        (
            lambda: ops.tile_list(X),
            TypeError,
            "tile_list: mask must be torch.bool, got torch.float32",
        ),
    ],
)
def test_errors_of_the_other_functions(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value) == f"sapwood.{message}"

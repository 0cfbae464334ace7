"""Triton launchers of logsemiring: products, draws, segments and chains in the log semiring.

Same meaning as the ops of these names in ``csrc/schema.cpp``, for tensors of one CUDA device and
up to float32. A product is one of exponentials; a tile whose sums underflow may have spoilt is
computed term by term by the same program, so nothing synchronises. Every output is summed in an
order fixed by the shapes. Configurations come from small tables by shape, not yet from measurements
on hardware.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import AotCase, Config, Wrap, cdiv, launch
from ._logsemiring_kernels import (
    draw_kernel,
    log_gradient_kernel,
    log_product_kernel,
    max_product_kernel,
)
from ._logsemiring_sequence_kernels import (
    chain_gradient_kernel,
    chain_kernel,
    segment_sums_kernel,
)

__all__ = [
    "AOT_CASES",
    "LARGEST_CHAIN",
    "log_matmul",
    "log_matmul_backward",
    "log_scan",
    "log_scan_backward",
    "max_matmul",
    "sample_matmul",
    "segment_sums",
]


def _config(tile: dict[str, int], num_warps: int = 4, num_stages: int = 2) -> Config:
    return Config(tile, num_warps, num_stages)


def _product_config(side: int, depth: int) -> Config:
    return _config({"BLOCK_M": side, "BLOCK_N": side, "BLOCK_K": depth})


#: Longest side of the result -> configuration; the last entry takes every longer one. Tiles are
#: square, because the gradient of b is that of a with rows and columns exchanged.
_PRODUCT: dict[int, Config] = {
    16: _product_config(16, 16),
    128: _product_config(32, 32),
    256: _product_config(64, 32),
}
_TROPICAL: dict[int, Config] = {
    16: _config({"BLOCK_M": 16, "BLOCK_N": 16}),
    64: _config({"BLOCK_M": 32, "BLOCK_N": 32}),
}
_DRAW: dict[int, Config] = {16: _config({"BLOCK_M": 16, "BLOCK_N": 16})}
#: Columns that lie side by side -> configuration.
_SEGMENT: dict[int, Config] = {
    1: _config({"BLOCK_N": 256, "BLOCK_I": 1}),
    64: _config({"BLOCK_N": 16, "BLOCK_I": 64}),
}
#: States of a chain -> configuration.
_CHAIN: dict[int, Config] = {
    2: _config({"BLOCK_K": 2}, 1, 1),
    8: _config({"BLOCK_K": 8}, 1, 1),
    16: _config({"BLOCK_K": 16}, 1, 1),
    32: _config({"BLOCK_K": 32}, 4, 1),
    64: _config({"BLOCK_K": 64}, 8, 1),
}
LARGEST_CHAIN = max(_CHAIN)  # states; a step has to fit the registers of a block
_EXACT_TERMS = 2048  # up to which a product is computed term by term


def _choose(table: dict[int, Config], size: int) -> Config:
    *smaller, largest = table.items()
    for limit, config in smaller:
        if size <= limit:
            return config
    return largest[1]


def _tiles(config: Config, m: int, n: int) -> tuple[int, int]:
    return cdiv(m, config.tile["BLOCK_M"]), cdiv(n, config.tile["BLOCK_N"])


def _least(k: int) -> float:
    """Sums of K products below this may have lost more than a rounding to underflow."""
    return max(k, 1) * 2.0**-102


def _is_exact(m: int, n: int, k: int, exact: bool) -> bool:
    return exact or m * n * k <= _EXACT_TERMS


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.float() for t in tensors]


def _maxima(a: Tensor, b: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """The maxima of the rows of a (B, M) and of the columns of b (B, N); NaN where an entry is."""
    if exact:
        return a, b  # the kernel wants pointers
    return a.amax(2), b.amax(1)


def log_matmul(a: Tensor, b: Tensor, exact: bool, *, wrap: Wrap | None = None) -> Tensor:
    """log sum_k exp(a_ik + b_kj).

    Args:
        a: (B, M, K) float32, float16 or bfloat16, any strides.
        b: (B, K, N) likewise.
        exact: term by term, without a product of exponentials.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        (B, M, N), contiguous, in a's dtype.
    """
    x, y = _wide(a, b)
    out = x.new_empty((a.shape[0], a.shape[1], b.shape[2]))
    if out.numel() > 0:
        _products(x, y, None, exact, (out, out, out), wrap)
    return out.to(a.dtype)


def _products(
    x: Tensor,
    y: Tensor,
    grad: Tensor | None,
    exact: bool,
    outputs: tuple[Tensor, Tensor, Tensor],  # values or weights, shift, open tiles
    wrap: Wrap | None,
) -> tuple[Tensor, Tensor]:
    """Launches the product; returns the maxima it used."""
    (batch, m, k), n = x.shape, y.shape[2]
    config = _choose(_PRODUCT, max(m, n))
    tiles_m, tiles_n = _tiles(config, m, n)
    term_by_term = _is_exact(m, n, k, exact)
    alpha, beta = _maxima(x, y, term_by_term)
    given = x if grad is None else grad
    strides = (*x.stride(), *y.stride(), *given.stride())
    args = (x, y, alpha, beta, given, *outputs, m, n, k, *strides, _least(k))
    flags = {"EXACT": term_by_term, "WEIGHTS": grad is not None}
    launch(log_product_kernel, (batch * tiles_m * tiles_n,), config, wrap, args, **flags)
    return alpha, beta


def log_matmul_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    exact: bool,
    need_a: bool,
    need_b: bool,
    *,
    wrap: Wrap | None = None,
) -> tuple[Tensor, Tensor]:
    """da_ik = sum_j g_ij p_ikj and db_kj = sum_i g_ij p_ikj, with p the softmax over k.

    Args:
        grad: (B, M, N) float32, float16 or bfloat16, any strides.
        a: (B, M, K) likewise.
        b: (B, K, N) likewise.
        exact: term by term.
        need_a: whether da is wanted.
        need_b: whether db is wanted.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        da (B, M, K) and db (B, K, N) in a's dtype; (0,) where not wanted.
    """
    (batch, m, k), n = a.shape, b.shape[2]
    g, x, y = _wide(grad, a, b)
    da = x.new_zeros(x.shape if need_a else (0,))
    db = x.new_zeros(y.shape if need_b else (0,))
    if batch * m * n * k > 0:
        config = _choose(_PRODUCT, max(m, n))
        tiles = _tiles(config, m, n)
        weight, shift = x.new_empty((2, batch, m, n))
        open_tiles = x.new_empty((batch, *tiles), dtype=torch.int32)
        alpha, beta = _products(x, y, g, exact, (weight, shift, open_tiles), wrap)
        flags = {"EXACT": _is_exact(m, n, k, exact)}
        side, depth = config.tile["BLOCK_M"], config.tile["BLOCK_K"]
        common = (weight, shift, open_tiles)
        if need_a:
            strides = (*x.stride(), *y.stride(), n, 1, k, 1, tiles[1], 1)
            args = (x, y, alpha, beta, *common, da, m, n, k, *strides)
            grid = (batch * cdiv(m, side) * cdiv(k, depth),)
            launch(log_gradient_kernel, grid, config, wrap, args, **flags)
        if need_b:
            strides = (*y.mT.stride(), *x.mT.stride(), 1, n, 1, n, 1, tiles[1])
            args = (y, x, beta, alpha, *common, db, n, m, k, *strides)
            grid = (batch * cdiv(n, side) * cdiv(k, depth),)
            launch(log_gradient_kernel, grid, config, wrap, args, **flags)
    return da.to(a.dtype), db.to(a.dtype)


def max_matmul(a: Tensor, b: Tensor, *, wrap: Wrap | None = None) -> tuple[Tensor, Tensor]:
    """max_k (a_ik + b_kj) and the lowest k that attains it, -1 where that is -inf.

    Args:
        a: (B, M, K) float32, float16 or bfloat16, any strides.
        b: (B, K, N) likewise.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        values (B, M, N) in a's dtype and indices (B, M, N) int64.
    """
    (batch, m, k), n = a.shape, b.shape[2]
    x, y = _wide(a, b)
    values = x.new_empty((batch, m, n))
    indices = x.new_empty((batch, m, n), dtype=torch.int64)
    if values.numel() > 0:
        config = _choose(_TROPICAL, max(m, n))
        tiles_m, tiles_n = _tiles(config, m, n)
        args = (x, y, values, indices, m, n, k, *x.stride(), *y.stride())
        launch(max_product_kernel, (batch * tiles_m * tiles_n,), config, wrap, args)
    return values.to(a.dtype), indices


def sample_matmul(
    a: Tensor, b: Tensor, num_samples: int, seed: int, *, wrap: Wrap | None = None
) -> Tensor:
    """Draws k with probability proportional to exp(a_ik + b_kj), by the numbers of the CPU kernel.

    Args:
        a: (B, M, K) float32, float16 or bfloat16, any strides.
        b: (B, K, N) likewise.
        num_samples: S.
        seed: the key of the random numbers.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        (S, B, M, N) int64; -1 where no term has mass.
    """
    (batch, m, k), n = a.shape, b.shape[2]
    out = a.new_empty((num_samples, batch, m, n), dtype=torch.int64)
    if out.numel() > 0:
        x, y = _wide(a, b)
        config = _choose(_DRAW, max(m, n))
        tiles_m, tiles_n = _tiles(config, m, n)
        args = (x, y, out, batch, m, n, k, seed, *x.stride(), *y.stride())
        launch(draw_kernel, (num_samples * batch * tiles_m * tiles_n,), config, wrap, args)
    return out


def segment_sums(
    x: Tensor,
    ptr: Tensor,
    order: Tensor | None,
    *,
    weights: bool,
    scale: Tensor | None = None,
    wrap: Wrap | None = None,
) -> Tensor:
    """logsumexp over the segments of dimension 1, or the softmax within them.

    Args:
        x: (O, n, I) float32, float16 or bfloat16.
        ptr: (S + 1,) int64, where the segments begin in the order.
        order: (n,) int64, entries sorted by segment, or None for entries in order.
        weights: probabilities instead of values.
        scale: (O, S, I), what the probabilities of a segment are multiplied by.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        (O, S, I), or with ``weights`` (O, n, I), in x's dtype.
    """
    outer, n, inner = x.shape
    count = len(ptr) - 1
    wide = x.float().contiguous()
    out = wide.new_empty((outer, n if weights else count, inner))
    if outer * count * inner > 0:
        config = _choose(_SEGMENT, inner)
        grid = (outer * count * cdiv(inner, config.tile["BLOCK_I"]),)
        places = ptr if order is None else order.contiguous()  # the kernel wants a pointer
        factors = wide if scale is None else scale.float().contiguous()
        args = (wide, ptr.contiguous(), places, factors, out, n, count, inner)
        flags = {"HAS_ORDER": order is not None, "HAS_SCALE": scale is not None}
        launch(segment_sums_kernel, grid, config, wrap, args, WEIGHTS=weights, **flags)
    return out.to(x.dtype)


def log_scan(t: Tensor, init: Tensor, *, wrap: Wrap | None = None) -> Tensor:
    """u_0 = init, u_{l+1,j} = log sum_i exp(u_li + t_lij), all steps in one kernel.

    Args:
        t: (B, L, k, k) float32, float16 or bfloat16, any strides; k up to ``LARGEST_CHAIN``.
        init: (B, R, k) likewise.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        (B, L + 1, R, k) float64.
    """
    batch, length, k, _ = t.shape
    rows = init.shape[1]
    states = init.new_empty((batch, length + 1, rows, k), dtype=torch.float64)
    if states.numel() > 0:
        start = init.double().contiguous()
        args = (t, start, states, length, rows, k, *t.stride())
        launch(chain_kernel, (batch * rows,), _choose(_CHAIN, k), wrap, args)
    return states


def log_scan_backward(
    grad: Tensor, t: Tensor, states: Tensor, *, wrap: Wrap | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of t and init given those of all states.

    Args:
        grad: (B, L + 1, R, k).
        t: (B, L, k, k) float32, float16 or bfloat16, any strides; k up to ``LARGEST_CHAIN``.
        states: (B, L + 1, R, k), what :func:`log_scan` returned.
        wrap: ``torch.library.wrap_triton`` inside a ``triton_op``; default plain launches.

    Returns:
        dt (B, L, k, k) and dinit (B, R, k) in t's dtype.
    """
    batch, length, k, _ = t.shape
    rows = states.shape[2]
    dt = t.new_zeros((batch, length, k, k), dtype=torch.float64)
    dinit = t.new_zeros((batch, rows, k), dtype=torch.float64)
    if dinit.numel() > 0:
        given, known = grad.double().contiguous(), states.double().contiguous()
        args = (given, t, known, dt, dinit, length, rows, k, *t.stride())
        launch(chain_gradient_kernel, (batch,), _choose(_CHAIN, k), wrap, args)
    return dt.to(t.dtype), dinit.to(t.dtype)


def _aot(kernel: Any, config: Config, pointers: dict[str, str], **constants: Any) -> AotCase:
    tile = {name: size for name, size in config.tile.items() if name in kernel.arg_names}
    constexprs = {**constants, **tile}
    signature = {
        name: "constexpr" if name in constexprs else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return kernel, signature, constexprs, {**options, "enable_fp_fusion": False}


_FLOATS = dict.fromkeys(
    ("a", "b", "alpha", "beta", "grad", "out", "shift", "weight", "values", "x", "scale"), "*fp32"
)
_PRODUCT_TYPES = {**_FLOATS, "open_tiles": "*i32", "least": "fp32"}
_CHAIN_TYPES = {"t": "*fp32", **dict.fromkeys(("init", "states", "grad", "dt", "dinit"), "*fp64")}
_DRAW_TYPES = {"a": "*fp32", "b": "*fp32", "out": "*i64", "seed": "i64"}


def _aot_segment(config: Config, **flags: bool) -> AotCase:
    pointers = {**_FLOATS, "ptr": "*i64", "order": "*i64"}
    return _aot(segment_sums_kernel, config, pointers, **flags)


#: What to compile ahead of time: (kernel, signature, constexprs, options). Every entry of the
#: tables occurs.
AOT_CASES: list[AotCase] = [
    *(
        _aot(log_product_kernel, c, _PRODUCT_TYPES, EXACT=exact, WEIGHTS=weights)
        for c in _PRODUCT.values()
        for exact, weights in ((False, False), (False, True))
    ),
    _aot(log_product_kernel, _PRODUCT[16], _PRODUCT_TYPES, EXACT=True, WEIGHTS=True),
    *(_aot(log_gradient_kernel, c, _PRODUCT_TYPES, EXACT=False) for c in _PRODUCT.values()),
    _aot(log_gradient_kernel, _PRODUCT[16], _PRODUCT_TYPES, EXACT=True),
    *(_aot(max_product_kernel, c, {**_FLOATS, "indices": "*i64"}) for c in _TROPICAL.values()),
    *(_aot(draw_kernel, c, _DRAW_TYPES) for c in _DRAW.values()),
    *(
        _aot_segment(c, HAS_ORDER=True, WEIGHTS=weights, HAS_SCALE=weights)
        for c in _SEGMENT.values()
        for weights in (False, True)
    ),
    *(
        _aot(kernel, c, _CHAIN_TYPES)
        for kernel in (chain_kernel, chain_gradient_kernel)
        for c in _CHAIN.values()
    ),
]

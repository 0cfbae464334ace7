"""The kernels behind ``splat2d``; shapes stand beside the arguments."""

# Kernel arguments belong to Triton's language and have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def splat2d_kernel(
    shape,  # (B * N, 5): mx, my, scaled 1 / l1 and 1 / l3, l2 / l3
    box,  # (B * N, 4) int32: columns [x0, x1) and rows [y0, y1) that can be reached
    feat,  # (B * N, channels)
    queue,  # (B * tiles, BLOCK_N) int32, scratch
    image,  # (B, channels, height, width)
    n,
    channels,
    channel,  # the first of those that are drawn
    height,
    width,
    tiles_x,
    tiles,  # per item
    limit,  # of the scaled u^2 + v^2
    CHANNELS: tl.constexpr,  # how many are drawn: 1 to 4
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,  # side of a tile
):
    program = tl.program_id(0).to(tl.int64)
    item = program // tiles
    left = (program % tiles % tiles_x) * BLOCK_T
    top = (program % tiles // tiles_x) * BLOCK_T
    pixels = tl.arange(0, BLOCK_T * BLOCK_T)
    column = left + pixels % BLOCK_T
    row = top + pixels // BLOCK_T
    x = column.to(tl.float32)
    y = row.to(tl.float32)
    sum0 = tl.zeros((BLOCK_T * BLOCK_T,), tl.float32)
    sum1 = tl.zeros((BLOCK_T * BLOCK_T,), tl.float32)
    sum2 = tl.zeros((BLOCK_T * BLOCK_T,), tl.float32)
    sum3 = tl.zeros((BLOCK_T * BLOCK_T,), tl.float32)
    listed = queue + program * BLOCK_N
    for start in range(0, n, BLOCK_N):
        ids = start + tl.arange(0, BLOCK_N)
        at = box + (item * n + ids) * 4
        here = ids < n
        hits = here & (tl.load(at, mask=here, other=0) < left + BLOCK_T)
        hits = hits & (tl.load(at + 1, mask=here, other=0) > left)
        hits = hits & (tl.load(at + 2, mask=here, other=0) < top + BLOCK_T)
        hits = hits & (tl.load(at + 3, mask=here, other=0) > top)
        flat = hits.to(tl.int32)
        count = tl.sum(flat)
        if count > 0:
            tl.debug_barrier()  # the round before has read the queue
            tl.store(listed + tl.cumsum(flat, 0) - flat, ids, mask=hits)
            tl.debug_barrier()
            for first in range(0, count, BLOCK_G):
                slot = first + tl.arange(0, BLOCK_G)
                drawn = slot < count
                g = item * n + tl.load(listed + slot, mask=drawn, other=0)
                mx = tl.load(shape + g * 5, mask=drawn, other=0.0)
                my = tl.load(shape + g * 5 + 1, mask=drawn, other=0.0)
                per_x = tl.load(shape + g * 5 + 2, mask=drawn, other=0.0)
                per_y = tl.load(shape + g * 5 + 3, mask=drawn, other=0.0)
                skew = tl.load(shape + g * 5 + 4, mask=drawn, other=0.0)
                u = (x[None, :] - mx[:, None]) * per_x[:, None]
                v = (y[None, :] - my[:, None]) * per_y[:, None] - skew[:, None] * u
                q = u * u + v * v
                inside = (q <= limit) & drawn[:, None]
                w = tl.exp2(-q)
                f = feat + g * channels + channel
                f0 = tl.load(f, mask=drawn, other=0.0)
                sum0 += tl.sum(tl.where(inside, w * f0[:, None], 0.0), 0)
                if CHANNELS > 1:
                    f1 = tl.load(f + 1, mask=drawn, other=0.0)
                    sum1 += tl.sum(tl.where(inside, w * f1[:, None], 0.0), 0)
                if CHANNELS > 2:
                    f2 = tl.load(f + 2, mask=drawn, other=0.0)
                    sum2 += tl.sum(tl.where(inside, w * f2[:, None], 0.0), 0)
                if CHANNELS > 3:
                    f3 = tl.load(f + 3, mask=drawn, other=0.0)
                    sum3 += tl.sum(tl.where(inside, w * f3[:, None], 0.0), 0)
    plane = height.to(tl.int64) * width
    to = image + (item * channels + channel) * plane + row * width + column
    exists = (row < height) & (column < width)
    tl.store(to, sum0, mask=exists)
    if CHANNELS > 1:
        tl.store(to + plane, sum1, mask=exists)
    if CHANNELS > 2:
        tl.store(to + 2 * plane, sum2, mask=exists)
    if CHANNELS > 3:
        tl.store(to + 3 * plane, sum3, mask=exists)


@triton.jit
def splat2d_backward_kernel(
    shape,  # (B * N, 5) as above
    box,  # (B * N, 4) int32
    feat,  # (B * N, channels)
    grad,  # (B, channels, height, width) contiguous
    moments,  # (B * N, 7): of u, v, u^2, u v, v^2, and the two sums of magnitudes
    d_feat,  # (B * N, channels)
    n,
    channels,
    channel,  # the first of those whose sum of w grad is wanted
    height,
    width,
    limit,
    CHANNELS: tl.constexpr,  # how many are wanted: 1 to 4
    MOMENTS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    mx = tl.load(shape + g * 5)
    my = tl.load(shape + g * 5 + 1)
    per_x = tl.load(shape + g * 5 + 2)
    per_y = tl.load(shape + g * 5 + 3)
    skew = tl.load(shape + g * 5 + 4)
    x0 = tl.load(box + g * 4)
    x1 = tl.load(box + g * 4 + 1)
    y0 = tl.load(box + g * 4 + 2)
    y1 = tl.load(box + g * 4 + 3)
    plane = height.to(tl.int64) * width
    item = grad + g // n * channels * plane
    zeros = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    w0, w1, w2, w3 = zeros, zeros, zeros, zeros
    m_u, m_v, m_uu, m_uv, m_vv, a_x, a_y = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for top in range(y0, y1, BLOCK_Y):
        rows = (top + tl.arange(0, BLOCK_Y))[:, None]
        e = (rows.to(tl.float32) - my) * per_y
        for left in range(x0, x1, BLOCK_X):
            columns = (left + tl.arange(0, BLOCK_X))[None, :]
            u = (columns.to(tl.float32) - mx) * per_x
            v = e - skew * u
            q = u * u + v * v
            inside = (q <= limit) & (rows < y1) & (columns < x1)
            w = tl.where(inside, tl.exp2(-q), 0.0)
            at = item + rows.to(tl.int64) * width + columns
            own = at + channel * plane
            w0 += w * tl.load(own, mask=inside, other=0.0)
            if CHANNELS > 1:
                w1 += w * tl.load(own + plane, mask=inside, other=0.0)
            if CHANNELS > 2:
                w2 += w * tl.load(own + 2 * plane, mask=inside, other=0.0)
            if CHANNELS > 3:
                w3 += w * tl.load(own + 3 * plane, mask=inside, other=0.0)
            if MOMENTS:
                dot = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
                for c in range(channels):
                    f = tl.load(feat + g * channels + c)
                    dot += f * tl.load(at + c * plane, mask=inside, other=0.0)
                s = tl.where(inside, w * dot, 0.0)
                u = tl.where(inside, u, 0.0)
                v = tl.where(inside, v, 0.0)
                m_u += s * u
                m_v += s * v
                m_uu += s * u * u
                m_uv += s * u * v
                m_vv += s * v * v
                a_x += tl.abs(s * (u - skew * v))
                a_y += tl.abs(s * v)
    to = d_feat + g * channels + channel
    tl.store(to, tl.sum(w0))
    if CHANNELS > 1:
        tl.store(to + 1, tl.sum(w1))
    if CHANNELS > 2:
        tl.store(to + 2, tl.sum(w2))
    if CHANNELS > 3:
        tl.store(to + 3, tl.sum(w3))
    if MOMENTS:
        tl.store(moments + g * 7, tl.sum(m_u))
        tl.store(moments + g * 7 + 1, tl.sum(m_v))
        tl.store(moments + g * 7 + 2, tl.sum(m_uu))
        tl.store(moments + g * 7 + 3, tl.sum(m_uv))
        tl.store(moments + g * 7 + 4, tl.sum(m_vv))
        tl.store(moments + g * 7 + 5, tl.sum(a_x))
        tl.store(moments + g * 7 + 6, tl.sum(a_y))

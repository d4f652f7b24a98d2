"""Queries, keys and values with a LoRA on any of them: y = x W^T + bias + s (x a^T) b^T.

Three methods, the same function up to rounding:
  loop   one LoRA: x a^T is accumulated in the loop over D that accumulates x W^T, then multiplied
         with b in registers; so is dy b beside dy W backward.
  pass   any LoRA for any image: x a^T (T, R) in a pass of its own, read in the product's epilogue.
         A tile of rows may span images: it adds one small product for each run of images of one
         LoRA, found from the index on the device.
  merge  one LoRA, or equal shares of consecutive images for several: W + s b a in one pass over W,
         then the library's product, for each share.
The gradient: dx = dy W + s (dy b) a; da = s (dy b)^T x and db = s dy^T (x a^T), both from sums over
tokens in a fixed number of parts that are then added in order. There is none for W, bias and s.
With "merge" one kernel computes these parts from one read of x and dy (`_sweep`).

B images, N tokens, T = B N rows, D width, R rank (padded to RANK), G LoRAs, each with a share of
T / G rows where there is no index; position 0, 1, 2 is q, k, v; slot counts the positions that have
a LoRA, TARGETS is their bit mask and COUNT their number; S is the sum of all slots' ranks, padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from fastrecycle_kernels.reference import LowRank
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Method = Literal["loop", "pass", "merge"]
POSITIONS = ("q", "k", "v")
LARGEST_RANK = 64


# ------------------------------------------------------------------ kernels: parts


@triton.jit
def _slot(position, TARGETS: tl.constexpr):
    """Slot of the LoRA at a position; -1: it has none."""
    before = tl.where(position > 0, TARGETS & 1, 0) + tl.where(position > 1, (TARGETS >> 1) & 1, 0)
    return tl.where(((TARGETS >> position) & 1) == 1, before, -1)


@triton.jit
def _position(slot, TARGETS: tl.constexpr):
    """Position of the LoRA in a slot."""
    first: tl.constexpr = 0 if TARGETS & 1 else (1 if TARGETS & 2 else 2)
    second: tl.constexpr = 1 if (TARGETS & 3) == 3 else 2
    return tl.where(slot == 0, first, tl.where(slot == 1, second, 2))


@triton.jit
def _choose(options, slot, COUNT: tl.constexpr):
    """options[slot], for a slot that is known only when running."""
    chosen = options[0]
    for j in tl.static_range(1, COUNT):
        chosen = tl.where(slot == j, options[j], chosen)
    return chosen


@triton.jit
def _ranks_before(ranks, slot, COUNT: tl.constexpr):
    """Sum of the ranks of the slots before one."""
    total = 0
    for j in tl.static_range(COUNT):
        total += tl.where(slot > j, ranks[j], 0)
    return total


@triton.jit
def _up_tile(
    b, scale, rank, g, b_stride, scale_stride, column, WIDTH: tl.constexpr, RANK: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Columns of one LoRA's s b^T: (RANK, columns)."""
    r = tl.arange(0, RANK)
    mask = (r < rank)[:, None] & (column < WIDTH)[None, :]
    tile = tl.load(b + g * b_stride + column[None, :] * rank + r[:, None], mask=mask, other=0.0)
    s = tl.load(scale + g * scale_stride)
    return (tile.to(tl.float32) * s.to(tl.float32)).to(dtype)


@triton.jit
def _down_tile(
    a, rank, g, a_stride, column, WIDTH: tl.constexpr, RANK: tl.constexpr, dtype: tl.constexpr
):
    """Columns of one LoRA's a: (RANK, columns)."""
    r = tl.arange(0, RANK)
    mask = (r < rank)[:, None] & (column < WIDTH)[None, :]
    tile = tl.load(a + g * a_stride + r[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    return tile.to(dtype)


@triton.jit
def _low_tile(low, slot, row, mask, rows, RANK: tl.constexpr):
    """Some rows of x a^T or s dy b: (rows, RANK)."""
    r = tl.arange(0, RANK)
    place = (slot * rows + row).to(tl.int64)[:, None] * RANK + r[None, :]
    return tl.load(low + place, mask=mask[:, None], other=0.0)


@triton.jit
def _store(y, total, row, column, N: tl.constexpr, HALVES: tl.constexpr, dtype: tl.constexpr):
    """Write a tile, by halves if asked: that takes half the shared memory."""
    if HALVES:
        M: tl.constexpr = total.shape[0]
        left, right = total.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        y.store([row, column], left.to(dtype))
        y.store([row, column + N // 2], right.to(dtype))
    else:
        y.store([row, column], total.to(dtype))


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles in groups of rows, so that those at work together share their operands in L2."""
    in_group = GROUP * tiles_n
    first = (tile // in_group) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % in_group) % size, (tile % in_group) // size


# ------------------------------------------------------------------ kernels: products


@triton.jit
def _forward(
    x, w, y, a_packed, bias, b, scales, ranks, b_strides, scale_strides, index, low, rows, tokens,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr,
    BIAS: tl.constexpr, LOOP: tl.constexpr, MANY: tl.constexpr, FLATTEN: tl.constexpr,
    HALVES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Descriptors: x (T, D), w (3 D, D), y (T, 3 D), a_packed (3 RANK, D)."""
    dtype: tl.constexpr = x.dtype
    tiles_m, tiles_n = tl.cdiv(rows, M), 3 * WIDTH // N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        position = n * N // WIDTH
        slot = _slot(position, TARGETS)
        chosen = tl.maximum(slot, 0)
        row = m * M + tl.arange(0, M)
        column = n * N - position * WIDTH + tl.arange(0, N)
        inside = row < rows
        up, rank = _choose(b, chosen, COUNT), _choose(ranks, chosen, COUNT)
        scale = _choose(scales, chosen, COUNT)
        b_stride = _choose(b_strides, chosen, COUNT)
        scale_stride = _choose(scale_strides, chosen, COUNT)
        total = tl.zeros((M, N), tl.float32)
        if LOOP:
            b_tile = _up_tile(up, scale, rank, 0, 0, 0, column, WIDTH, RANK, dtype)
            if slot >= 0:
                small = tl.zeros((M, RANK), tl.float32)
                for k in tl.range(0, WIDTH, K):
                    x_tile = x.load([m * M, k])
                    total = tl.dot(x_tile, w.load([n * N, k]).T, total, input_precision="ieee")
                    a_tile = a_packed.load([position * RANK, k])
                    small = tl.dot(x_tile, a_tile.T, small, input_precision="ieee")
                small_tile = small.to(dtype)
                total = tl.dot(small_tile, b_tile, total, input_precision="ieee")
                if n * N == position * WIDTH:
                    place = (slot * rows + row).to(tl.int64)[:, None] * RANK
                    place += tl.arange(0, RANK)[None, :]
                    tl.store(low + place, small_tile, mask=inside[:, None])
            else:
                for k in tl.range(0, WIDTH, K):
                    x_tile = x.load([m * M, k])
                    total = tl.dot(x_tile, w.load([n * N, k]).T, total, input_precision="ieee")
        elif not MANY:
            # read ahead of the loop, whose loads hide the wait
            b_tile = _up_tile(up, scale, rank, 0, 0, 0, column, WIDTH, RANK, dtype)
            low_tile = _low_tile(low, chosen, row, inside & (slot >= 0), rows, RANK)
            for k in tl.range(0, WIDTH, K):
                total = tl.dot(
                    x.load([m * M, k]), w.load([n * N, k]).T, total, input_precision="ieee"
                )
            total = tl.dot(low_tile, b_tile, total, input_precision="ieee")
        else:
            for k in tl.range(0, WIDTH, K):
                total = tl.dot(
                    x.load([m * M, k]), w.load([n * N, k]).T, total, input_precision="ieee"
                )
            if slot >= 0:
                last = (tl.minimum(m * M + M, rows) - 1) // tokens
                begin = m * M
                for image in range(m * M // tokens, last + 1):
                    g = tl.load(index + image)
                    following = tl.load(index + image + 1, mask=image < last, other=-1)
                    if g != following:  # the last image of a run
                        end = (image + 1) * tokens
                        run = inside & (row >= begin) & (row < end)
                        low_tile = _low_tile(low, slot, row, run, rows, RANK)
                        b_tile = _up_tile(
                            up, scale, rank, g, b_stride, scale_stride, column, WIDTH, RANK, dtype
                        )
                        total = tl.dot(low_tile, b_tile, total, input_precision="ieee")
                        begin = end
        if BIAS:
            total += tl.load(bias + n * N + tl.arange(0, N)).to(tl.float32)[None, :]
        _store(y, total, m * M, n * N, N, HALVES, dtype)


@triton.jit
def _input_grad(
    dy, w, dx, b_packed, a, ranks, a_strides, index, low, rows, tokens,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr,
    LOOP: tl.constexpr, MANY: tl.constexpr, FLATTEN: tl.constexpr, HALVES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Descriptors: dy (T, 3 D), w (3 D, D), dx (T, D), b_packed (RANK, 3 D), which holds s b."""
    dtype: tl.constexpr = dy.dtype
    tiles_m, tiles_n = tl.cdiv(rows, M), WIDTH // N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        row = m * M + tl.arange(0, M)
        column = n * N + tl.arange(0, N)
        inside = row < rows
        total = tl.zeros((M, N), tl.float32)
        if LOOP:
            for position in tl.static_range(3):
                if (TARGETS >> position) & 1:
                    small = tl.zeros((M, RANK), tl.float32)
                    for k in tl.range(position * WIDTH, (position + 1) * WIDTH, K):
                        dy_tile = dy.load([m * M, k])
                        total = tl.dot(dy_tile, w.load([k, n * N]), total, input_precision="ieee")
                        b_tile = b_packed.load([0, k])
                        small = tl.dot(dy_tile, b_tile.T, small, input_precision="ieee")
                    small_tile = small.to(dtype)
                    slot = _slot(position, TARGETS)
                    a_tile = _down_tile(
                        _choose(a, slot, COUNT), _choose(ranks, slot, COUNT), 0, 0, column, WIDTH,
                        RANK, dtype,
                    )  # fmt: skip
                    total = tl.dot(small_tile, a_tile, total, input_precision="ieee")
                    if n == 0:
                        place = (slot * rows + row).to(tl.int64)[:, None] * RANK
                        place += tl.arange(0, RANK)[None, :]
                        tl.store(low + place, small_tile, mask=inside[:, None])
                else:
                    for k in tl.range(position * WIDTH, (position + 1) * WIDTH, K):
                        total = tl.dot(
                            dy.load([m * M, k]), w.load([k, n * N]), total, input_precision="ieee"
                        )
        else:
            for k in tl.range(0, 3 * WIDTH, K):
                total = tl.dot(
                    dy.load([m * M, k]), w.load([k, n * N]), total, input_precision="ieee"
                )
            last = (tl.minimum(m * M + M, rows) - 1) // tokens
            for slot in tl.static_range(COUNT):
                if MANY:
                    begin = m * M
                    for image in range(m * M // tokens, last + 1):
                        g = tl.load(index + image)
                        following = tl.load(index + image + 1, mask=image < last, other=-1)
                        if g != following:
                            end = (image + 1) * tokens
                            run = inside & (row >= begin) & (row < end)
                            low_tile = _low_tile(low, slot, row, run, rows, RANK)
                            a_tile = _down_tile(
                                a[slot], ranks[slot], g, a_strides[slot], column, WIDTH, RANK, dtype
                            )
                            total = tl.dot(low_tile, a_tile, total, input_precision="ieee")
                            begin = end
                else:
                    low_tile = _low_tile(low, slot, row, inside, rows, RANK)
                    a_tile = _down_tile(a[slot], ranks[slot], 0, 0, column, WIDTH, RANK, dtype)
                    total = tl.dot(low_tile, a_tile, total, input_precision="ieee")
        _store(dx, total, m * M, n * N, N, HALVES, dtype)


@triton.jit
def _project(
    x, factors, scales, ranks, strides, scale_strides, index, low, rows, tokens, chunks, x_stride,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr,
    UP: tl.constexpr, MANY: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Some rows, of one image, of x a^T, or with UP of s dy b: (COUNT, T, RANK)."""
    image, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    slot = tl.program_id(1)
    within = chunk * M + tl.arange(0, M)
    row = (image * tokens + within).to(tl.int64)
    inside = (within < tokens) & (row < rows)
    factor, rank = _choose(factors, slot, COUNT), _choose(ranks, slot, COUNT)
    g = tl.load(index + image) if MANY else 0
    dtype: tl.constexpr = x.dtype.element_ty
    if UP:
        x += _position(slot, TARGETS) * WIDTH
    total = tl.zeros((M, RANK), tl.float32)
    for k in range(0, WIDTH, K):
        column = k + tl.arange(0, K)
        mask = inside[:, None] & (column < WIDTH)[None, :]
        x_tile = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        if UP:
            tile = _up_tile(
                factor, _choose(scales, slot, COUNT), rank, g, _choose(strides, slot, COUNT),
                _choose(scale_strides, slot, COUNT), column, WIDTH, RANK, dtype,
            )  # fmt: skip
        else:
            tile = _down_tile(
                factor, rank, g, _choose(strides, slot, COUNT), column, WIDTH, RANK, dtype
            )
        total = tl.dot(x_tile, tile.T, total, input_precision="ieee")
    place = (slot * rows + row)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    tl.store(low + place, total.to(dtype), mask=inside[:, None])


@triton.jit
def _pack(
    factors, scales, ranks, packed,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr,
    UP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One LoRA for the loop: a as (3 RANK, D), or s b as (RANK, 3 D), zero where there is none."""
    position = tl.program_id(0)
    slot = _slot(position, TARGETS)
    chosen = tl.maximum(slot, 0)
    column = tl.program_id(1) * K + tl.arange(0, K)
    r = tl.arange(0, RANK)
    rank = tl.where(slot >= 0, _choose(ranks, chosen, COUNT), 0)
    factor = _choose(factors, chosen, COUNT)
    dtype: tl.constexpr = packed.dtype.element_ty
    if UP:
        # the rank gives the distance of rows too, and must not be 0 there; nothing is read then
        scale = _choose(scales, chosen, COUNT)
        tile = _up_tile(factor, scale, rank, 0, 0, 0, column, WIDTH, RANK, dtype)
        place = r[:, None] * (3 * WIDTH) + position * WIDTH + column[None, :]
    else:
        tile = _down_tile(factor, rank, 0, 0, column, WIDTH, RANK, dtype)
        place = (position * RANK + r)[:, None] * WIDTH + column[None, :]
    tl.store(packed + place, tile, mask=(column < WIDTH)[None, :])


@triton.jit
def _merge(
    w, a, b, scales, ranks, a_strides, b_strides, scale_strides, merged,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """W + s b a of each LoRA (G, 3 D, D), in float32 before it is rounded."""
    tiles: tl.constexpr = (WIDTH + M - 1) // M
    position, g = tl.program_id(1) // tiles, tl.program_id(2).to(tl.int64)
    slot = _slot(position, TARGETS)
    row = tl.program_id(1) % tiles * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    place = (position * WIDTH + row)[:, None] * WIDTH + column[None, :]
    mask = (row < WIDTH)[:, None] & (column < WIDTH)[None, :]
    tile = tl.load(w + place, mask=mask, other=0.0).to(tl.float32)
    if slot >= 0:
        # sums of R products; a product of tiles would pad R to 16, on no tensor core in float32
        rank = _choose(ranks, slot, COUNT)
        up = _choose(b, slot, COUNT) + g * _choose(b_strides, slot, COUNT)
        down = _choose(a, slot, COUNT) + g * _choose(a_strides, slot, COUNT)
        scale = tl.load(_choose(scales, slot, COUNT) + g * _choose(scale_strides, slot, COUNT))
        for r in tl.range(0, rank, loop_unroll_factor=4):
            left = tl.load(up + row * rank + r, mask=row < WIDTH, other=0.0).to(tl.float32)
            right = tl.load(down + r * WIDTH + column, mask=column < WIDTH, other=0.0)
            tile += (left * scale.to(tl.float32))[:, None] * right.to(tl.float32)[None, :]
    merged += g * (3 * WIDTH * WIDTH)
    tl.store(merged + place, tile.to(merged.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------ kernels: da, db in one pass


@triton.jit
def _pack_all(
    a, b, scales, ranks, a_strides, b_strides, scale_strides, packed,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Factors side by side (G, 1 + COUNT, S, D): a of all slots; s b^T of each, at its own rows."""
    g, which = tl.program_id(2).to(tl.int64), tl.program_id(1)
    column = tl.program_id(0) * K + tl.arange(0, K)
    row = tl.arange(0, S)
    tile = tl.zeros((S, K), tl.float32)
    begin = 0
    for slot in tl.static_range(COUNT):
        rank = ranks[slot]
        r = row - begin
        mask = ((r >= 0) & (r < rank))[:, None] & (column < WIDTH)[None, :]
        if which == 0:
            place = r[:, None] * WIDTH + column[None, :]
            tile += tl.load(a[slot] + g * a_strides[slot] + place, mask=mask, other=0.0)
        elif which == slot + 1:
            place = column[None, :] * rank + r[:, None]
            scale = tl.load(scales[slot] + g * scale_strides[slot]).to(tl.float32)
            tile += scale * tl.load(b[slot] + g * b_strides[slot] + place, mask=mask, other=0.0)
        begin += rank
    packed += (g * (COUNT + 1) + which) * (S * WIDTH)
    place = row[:, None] * WIDTH + column[None, :]
    tl.store(packed + place, tile.to(packed.dtype.element_ty), mask=(column < WIDTH)[None, :])


@triton.jit
def _sweep(
    x, dy, packed, parts, ranks, share, part_size,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """What some rows of a share add to da and db: (G, BLOCKS, 2, sum of ranks, D).

    x is read for x a^T and for da: with KEEP once, all of the rows held in shared memory, else once
    more. dy is read once, each tile for s dy b and for db. The columns of both low products are
    those of all slots: s b^T is zero at another slot's, and of db only a slot's own are written.
    """
    block, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    within = block * M + tl.arange(0, M)
    row = (g * share + within)[:, None]
    inside = (within < share)[:, None]
    chunk, s = tl.arange(0, C), tl.arange(0, S)
    dtype: tl.constexpr = x.dtype.element_ty
    packed += g * ((COUNT + 1) * S * WIDTH)
    factor = packed + s[:, None] * WIDTH + chunk[None, :]
    parts += (g * tl.num_programs(0) + block) * part_size

    wide_x = tl.zeros((M, S), tl.float32)
    x_place = x + row * WIDTH + chunk[None, :]
    if KEEP:
        x_tiles = ()
        for i in tl.static_range(WIDTH // C):
            x_tiles += (tl.load(x_place + i * C, mask=inside, other=0.0),)
        for i in tl.static_range(WIDTH // C):
            a_tile = tl.load(factor + i * C)
            wide_x = tl.dot(x_tiles[i], a_tile.T, wide_x, input_precision="ieee")
    else:
        for k in tl.range(0, WIDTH, C):
            x_tile = tl.load(x_place + k, mask=inside, other=0.0)
            wide_x = tl.dot(x_tile, tl.load(factor + k).T, wide_x, input_precision="ieee")
    low_x = wide_x.to(dtype)

    # one loop over all slots: between two loops the loads that run ahead would start anew
    total = _ranks_before(ranks, COUNT, COUNT)
    wide_dy = tl.zeros((M, S), tl.float32)
    dy_place = dy + row * (3 * WIDTH) + chunk[None, :]
    factor += S * WIDTH
    for step in tl.range(0, COUNT * WIDTH, C):
        slot = step // WIDTH
        k = step - slot * WIDTH
        dy_column = _position(slot, TARGETS) * WIDTH + k
        dy_tile = tl.load(dy_place + dy_column, mask=inside, other=0.0)
        up_tile = tl.load(factor + (slot * (S * WIDTH) + k))
        wide_dy = tl.dot(dy_tile, up_tile.T, wide_dy, input_precision="ieee")
        part = tl.dot(dy_tile.T, low_x, input_precision="ieee")
        begin, rank = _ranks_before(ranks, slot, COUNT), _choose(ranks, slot, COUNT)
        r = s - begin
        db = parts + (total + begin) * WIDTH + (k + chunk)[:, None] * rank + r[None, :]
        tl.store(db, part, mask=((r >= 0) & (r < rank))[None, :])
    low_dy = wide_dy.to(dtype)

    da = parts + s[None, :] * WIDTH + chunk[:, None]
    if KEEP:
        for i in tl.static_range(WIDTH // C):
            part = tl.dot(x_tiles[i].T, low_dy, input_precision="ieee")
            tl.store(da + i * C, part, mask=(s < total)[None, :])
    else:
        for k in tl.range(0, WIDTH, C):
            x_tile = tl.load(x_place + k, mask=inside, other=0.0)
            part = tl.dot(x_tile.T, low_dy, input_precision="ieee")
            tl.store(da + k, part, mask=(s < total)[None, :])


@triton.jit
def _sweep_sum(
    parts, da, db, scales, ranks, scale_strides, blocks, part_size,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Add a share's parts, always in the same order: da (G, R, D) and db (G, D, R) of each slot."""
    side, slot = tl.program_id(1) // COUNT, tl.program_id(1) % COUNT
    g = tl.program_id(2).to(tl.int64)
    total, begin = _ranks_before(ranks, COUNT, COUNT), _ranks_before(ranks, slot, COUNT)
    size = _choose(ranks, slot, COUNT) * WIDTH
    element = tl.program_id(0) * E + tl.arange(0, E)
    parts += g * blocks * part_size + (side * total + begin) * WIDTH + element[None, :]
    sums = tl.zeros((P, E), tl.float32)
    for p in range(0, blocks, P):
        block = p + tl.arange(0, P)
        mask = (block < blocks)[:, None] & (element < size)[None, :]
        sums += tl.load(parts + block.to(tl.int64)[:, None] * part_size, mask=mask, other=0.0)
    value = tl.sum(sums, 0)
    if side == 0:
        out = _choose(da, slot, COUNT)
        tl.store(out + g * size + element, value.to(out.dtype.element_ty), mask=element < size)
    else:
        out = _choose(db, slot, COUNT)
        scale = tl.load(_choose(scales, slot, COUNT) + g * _choose(scale_strides, slot, COUNT))
        value *= scale.to(tl.float32)
        tl.store(out + g * size + element, value.to(out.dtype.element_ty), mask=element < size)


# ------------------------------------------------------------------ kernels: gradients of a, b


@triton.jit
def _factor_parts(
    dy, x, low_x, low_dy, index, parts, rows, tokens, images,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr,
    MANY: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Sums dy^T (x a^T), x^T (s dy b) of every SPLITS-th image: (SPLITS, 2, COUNT, G, D, RANK)."""
    blocks: tl.constexpr = (WIDTH + C - 1) // C
    which, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    side, slot = which // COUNT, which % COUNT
    g, split = tl.program_id(1), tl.program_id(2)
    groups, splits = tl.num_programs(1), tl.num_programs(2)
    column = block * C + tl.arange(0, C)
    r = tl.arange(0, RANK)
    if side == 0:
        source, other = dy + _position(slot, TARGETS) * WIDTH, low_x
        stride = 3 * WIDTH
    else:
        source, other = x, low_dy
        stride = WIDTH
    other += slot.to(tl.int64) * rows * RANK
    total = tl.zeros((C, RANK), tl.float32)
    for image in range(split, images, splits):
        length = tokens
        if MANY:
            length = tl.where(tl.load(index + image) == g, tokens, 0)
        for begin in range(0, length, T):
            within = begin + tl.arange(0, T)
            row = (image * tokens + within).to(tl.int64)
            inside = (within < tokens) & (row < rows)
            tile = tl.load(
                source + row[:, None] * stride + column[None, :],
                mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0,
            )  # fmt: skip
            low = tl.load(other + row[:, None] * RANK + r[None, :], mask=inside[:, None], other=0.0)
            total = tl.dot(tile.T, low, total, input_precision="ieee")
    part = ((split * 2 + side) * COUNT + slot) * groups + g
    place = (part.to(tl.int64) * WIDTH + column)[:, None] * RANK + r[None, :]
    tl.store(parts + place, total, mask=(column < WIDTH)[:, None])


@triton.jit
def _factor_sum(
    parts, da, db, scales, ranks, scale_strides, splits,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Add the parts in order: da (G, R, D) and db (G, D, R) of each slot."""
    side, slot = tl.program_id(1) // COUNT, tl.program_id(1) % COUNT
    g, groups = tl.program_id(2), tl.num_programs(2)
    column = tl.program_id(0) * C + tl.arange(0, C)
    r = tl.arange(0, RANK)
    rank = _choose(ranks, slot, COUNT)
    mask = (column < WIDTH)[:, None] & (r < rank)[None, :]
    part = (side * COUNT + slot) * groups + g
    place = (part.to(tl.int64) * WIDTH + column)[:, None] * RANK + r[None, :]
    distance = 2 * COUNT * groups.to(tl.int64) * WIDTH * RANK
    total = tl.zeros((C, RANK), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * distance + place, mask=mask, other=0.0)
    if side == 0:
        out_b = _choose(db, slot, COUNT)
        scale = _choose(scales, slot, COUNT)
        total *= tl.load(scale + g * _choose(scale_strides, slot, COUNT)).to(tl.float32)
        to_b = (g * WIDTH + column)[:, None] * rank + r[None, :]
        tl.store(out_b + to_b, total.to(out_b.dtype.element_ty), mask=mask)
    else:
        out_a = _choose(da, slot, COUNT)
        to_a = (g * rank + r)[None, :] * WIDTH + column[:, None]
        tl.store(out_a + to_a, total.to(out_a.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------ launchers


class Tile(NamedTuple):
    """How a product is cut: rows, columns and depth of a tile, and how a program runs."""

    m: int = 128
    n: int = 256
    k: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8  # tiles of rows that follow each other
    persistent: bool = True  # as many programs as processors, each taking tile after tile
    flatten: bool = False  # one loop over tiles and depth; not with "loop"
    halves: bool = True  # written in two halves, which leaves shared memory to the loop


FORWARD = Tile()
INPUT_GRAD = Tile()
OTHER_CHIPS = Tile(128, 64, 64, 8, 3)  # than Hopper; compiled for them, not measured
FLOAT32 = Tile(64, 64, 16, 8, 2, halves=False)  # for checks: IEEE products run on no tensor core
PROJECT_ROWS, PROJECT_DEPTH, PROJECT_WARPS = 32, 128, 4
PART_COLUMNS, PART_ROWS, PART_PROGRAMS = 128, 64, 256
SINGLE_ROWS = 256  # rows that stand for an image in sums over the tokens of one LoRA
MERGE_ROWS, MERGE_COLUMNS, MERGE_WARPS = 16, 256, 4
SUM_PARTS, SUM_ELEMENTS = 32, 32
FUSED_RANKS = 32  # of all slots together: what _sweep takes; parts grow with them, rows do not


class Sweep(NamedTuple):
    """How _sweep is cut: rows of a program, columns of a tile, and how a program runs."""

    m: int
    c: int
    warps: int
    stages: int
    keep: bool = False  # x in shared memory


# On an H200 37 us at 100 x 197 rows, a copy of its bytes 38; 18 us at 25 x 197, 16 at best.
SWEEP = Sweep(64, 64, 4, 4)
SWEEP_FLOAT32 = Sweep(32, 32, 4, 2)


def _dense(x: Tensor, width: int) -> Tensor:
    """Rows of this width as the tensor copy engine reads them: contiguous, from 16 bytes on."""
    rows = x.reshape(-1, width).contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@dataclass(frozen=True)
class _Factors:
    """LoRAs as the kernels take them: tuples over slots."""

    a: tuple[Tensor, ...]  # (G, R, D), contiguous within a LoRA
    b: tuple[Tensor, ...]  # (G, D, R), likewise
    scale: tuple[Tensor, ...]  # (G,)
    targets: int
    padded: int  # RANK

    @property
    def count(self) -> int:
        return len(self.a)

    @property
    def groups(self) -> int:
        return self.a[0].shape[0]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(a.shape[1] for a in self.a)

    def strides(self, of: Literal["a", "b", "scale"]) -> tuple[int, ...]:
        return tuple(x.stride(0) for x in getattr(self, of))

    def constants(self, width: int) -> dict[str, int]:
        return dict(WIDTH=width, TARGETS=self.targets, COUNT=self.count, RANK=self.padded)


def _padded_rank(a: list[Tensor]) -> int:
    return max(16, triton.next_power_of_2(max(x.shape[1] for x in a)))


def _factors(
    a: list[Tensor], b: list[Tensor], scale: list[Tensor], positions: list[int]
) -> _Factors:
    def dense(x: Tensor) -> Tensor:
        return x if x[0].is_contiguous() else x.contiguous()

    targets = sum(1 << p for p in positions)
    return _Factors(
        tuple(dense(x) for x in a), tuple(dense(x) for x in b), tuple(scale), targets,
        _padded_rank(a),
    )  # fmt: skip


class Chip(NamedTuple):
    """What of a device decides how a product is cut."""

    major: int = 9  # of the compute capability
    processors: int = 132
    shared_bytes: int = 232448  # that a program may have


@cache
def _chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(processors=4)  # the interpreter takes what an H100 does
    properties = torch.cuda.get_device_properties(device)
    return Chip(
        properties.major,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def _fit(tile: Tile, width: int, rank: int, dtype: torch.dtype, chip: Chip) -> Tile:
    """The tile with columns and depth that divide the width, and stages that fit on the chip."""
    if dtype == torch.float32:
        tile = FLOAT32
    elif chip.major != 9:
        tile = OTHER_CHIPS
    divisor = width & -width
    n = min(tile.n, divisor)
    tile = tile._replace(n=n, k=min(tile.k, divisor), halves=tile.halves and n >= 64)

    def needed(tile: Tile) -> int:
        stage = (tile.m + tile.n + rank) * tile.k
        behind = tile.m * tile.n // (1 + tile.halves) + (tile.m + tile.n) * rank
        return (tile.stages * stage + behind) * dtype.itemsize + 1024

    while needed(tile) > chip.shared_bytes and tile.stages > 2:
        tile = tile._replace(stages=tile.stages - 1)
    while needed(tile) > chip.shared_bytes and tile.n > 64:
        tile = tile._replace(n=tile.n // 2)
    return tile


def _grid(tile: Tile, rows: int, columns: int, device: torch.device) -> tuple[int]:
    tiles = triton.cdiv(rows, tile.m) * (columns // tile.n)
    return (min(tiles, _chip(device).processors) if tile.persistent else tiles,)


def _products(tile: Tile, loop: bool) -> dict[str, int | bool]:
    return dict(
        FLATTEN=tile.flatten and not loop, HALVES=tile.halves,
        M=tile.m, N=tile.n, K=tile.k, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_pack(factors: _Factors, width: int, dtype: torch.dtype, up: bool) -> Tensor:
    """One LoRA's a (3 RANK, D), or with `up` its s b (RANK, 3 D), padded with zeros."""
    shape = (factors.padded, 3 * width) if up else (3 * factors.padded, width)
    packed = torch.empty(shape, dtype=dtype, device=factors.a[0].device)
    k = min(128, triton.next_power_of_2(width))
    _pack[(3, triton.cdiv(width, k))](
        factors.b if up else factors.a, factors.scale, factors.ranks, packed,
        UP=up, K=k, **factors.constants(width),
    )  # fmt: skip
    return packed


def launch_project(
    x: Tensor, factors: _Factors, index: Tensor | None, tokens: int, up: bool
) -> Tensor:
    """From x (T, D) x a^T, or with `up` from dy (T, 3 D) s dy b: (COUNT, T, RANK)."""
    rows, width = x.shape[0], factors.a[0].shape[2]
    low = torch.empty((factors.count, rows, factors.padded), dtype=x.dtype, device=x.device)
    tokens = rows if index is None else tokens
    chunks = triton.cdiv(tokens, PROJECT_ROWS)
    which: Literal["a", "b"] = "b" if up else "a"
    _project[(rows // tokens * chunks, factors.count)](
        x, getattr(factors, which), factors.scale, factors.ranks, factors.strides(which),
        factors.strides("scale"), index, low, rows, tokens, chunks, x.stride(0),
        UP=up, MANY=index is not None, M=PROJECT_ROWS,
        K=min(PROJECT_DEPTH if x.dtype != torch.float32 else 32, triton.next_power_of_2(width)),
        num_warps=PROJECT_WARPS, num_stages=3, **factors.constants(width),
    )  # fmt: skip
    return low


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: _Factors,
    index: Tensor | None,
    tokens: int,
    loop: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """From x (T, D) y (T, 3 D) and x a^T (COUNT, T, RANK)."""
    rows, width = x.shape
    tile = _fit(tile or FORWARD, width, factors.padded, x.dtype, _chip(x.device))
    y = torch.empty((rows, 3 * width), dtype=x.dtype, device=x.device)
    if loop:
        low = torch.empty((factors.count, rows, factors.padded), dtype=x.dtype, device=x.device)
        packed = launch_pack(factors, width, x.dtype, up=False)
        packed_tile = TensorDescriptor.from_tensor(packed, [factors.padded, tile.k])
    else:
        low = launch_project(x, factors, index, tokens, up=False)
        packed_tile = None
    _forward[_grid(tile, rows, 3 * width, x.device)](
        TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        TensorDescriptor.from_tensor(y, [tile.m, tile.n // (1 + tile.halves)]),
        packed_tile, bias, factors.b, factors.scale, factors.ranks, factors.strides("b"),
        factors.strides("scale"), index, low, rows, tokens,
        BIAS=bias is not None, LOOP=loop, MANY=index is not None,
        **_products(tile, loop), **factors.constants(width),
    )  # fmt: skip
    return y, low


def launch_input_grad(
    dy: Tensor,
    weight: Tensor,
    factors: _Factors,
    index: Tensor | None,
    tokens: int,
    loop: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """From dy (T, 3 D) dx (T, D) and s dy b (COUNT, T, RANK)."""
    rows, width = dy.shape[0], weight.shape[1]
    tile = _fit(tile or INPUT_GRAD, width, factors.padded, dy.dtype, _chip(dy.device))
    dx = torch.empty((rows, width), dtype=dy.dtype, device=dy.device)
    if loop:
        low = torch.empty((factors.count, rows, factors.padded), dtype=dy.dtype, device=dy.device)
        packed = launch_pack(factors, width, dy.dtype, up=True)
        packed_tile = TensorDescriptor.from_tensor(packed, [factors.padded, tile.k])
    else:
        low = launch_project(dy, factors, index, tokens, up=True)
        packed_tile = None
    _input_grad[_grid(tile, rows, width, dy.device)](
        TensorDescriptor.from_tensor(dy, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight, [tile.k, tile.n]),
        TensorDescriptor.from_tensor(dx, [tile.m, tile.n // (1 + tile.halves)]),
        packed_tile, factors.a, factors.ranks, factors.strides("a"), index, low, rows, tokens,
        LOOP=loop, MANY=index is not None,
        **_products(tile, loop), **factors.constants(width),
    )  # fmt: skip
    return dx, low


def launch_factor_grad(
    dy: Tensor,
    x: Tensor,
    low_x: Tensor,
    low_dy: Tensor,
    factors: _Factors,
    index: Tensor | None,
    tokens: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Both gradients of each slot, from dy (T, 3 D), x (T, D), x a^T and s dy b."""
    rows, width = x.shape
    groups, count = factors.groups, factors.count
    tokens = SINGLE_ROWS if index is None else tokens
    images = triton.cdiv(rows, tokens)
    columns = min(PART_COLUMNS, triton.next_power_of_2(width))
    products = 2 * count * triton.cdiv(width, columns)
    splits = max(1, min(images, triton.cdiv(PART_PROGRAMS, products * groups)))
    parts = torch.empty(
        (splits, 2, count, groups, width, factors.padded), dtype=torch.float32, device=x.device
    )
    _factor_parts[(products, groups, splits)](
        dy, x, low_x, low_dy, index, parts, rows, tokens, images,
        MANY=index is not None, C=columns, T=PART_ROWS if x.dtype != torch.float32 else 32,
        num_warps=4, num_stages=4, **factors.constants(width),
    )  # fmt: skip
    da = [torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in factors.a]
    db = [torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in factors.b]
    block = min(64, columns)
    _factor_sum[(triton.cdiv(width, block), 2 * count, groups)](
        parts, tuple(da), tuple(db), factors.scale, factors.ranks, factors.strides("scale"), splits,
        WIDTH=width, COUNT=count, RANK=factors.padded, C=block, num_warps=4,
    )  # fmt: skip
    return da, db


def launch_pack_all(factors: _Factors, width: int, dtype: torch.dtype) -> Tensor:
    """Factors of all slots side by side: (G, 1 + COUNT, S, D), S the padded sum of ranks."""
    padded = max(16, triton.next_power_of_2(sum(factors.ranks)))
    count, groups = factors.count, factors.groups
    packed = torch.empty(
        (groups, 1 + count, padded, width), dtype=dtype, device=factors.a[0].device
    )
    k = min(128, triton.next_power_of_2(width))
    _pack_all[(triton.cdiv(width, k), 1 + count, groups)](
        factors.a, factors.b, factors.scale, factors.ranks, factors.strides("a"),
        factors.strides("b"), factors.strides("scale"), packed,
        WIDTH=width, COUNT=count, S=padded, K=k, num_warps=4,
    )  # fmt: skip
    return packed


def launch_sweep(dy: Tensor, x: Tensor, packed: Tensor, factors: _Factors, sweep: Sweep) -> Tensor:
    """Parts of both gradients (G, blocks, 2 sum of ranks D), from dy (T, 3 D) and x (T, D)."""
    rows, width = x.shape
    share, size = rows // factors.groups, 2 * sum(factors.ranks) * width
    sweep = sweep._replace(c=min(sweep.c, width & -width))  # columns that divide the width
    blocks = triton.cdiv(share, sweep.m)
    parts = torch.empty((factors.groups, blocks, size), dtype=torch.float32, device=x.device)
    _sweep[(blocks, factors.groups)](
        x, dy, packed, parts, factors.ranks, share, size,
        WIDTH=width, TARGETS=factors.targets, COUNT=factors.count, S=packed.shape[2],
        M=sweep.m, C=sweep.c, KEEP=sweep.keep, num_warps=sweep.warps, num_stages=sweep.stages,
    )  # fmt: skip
    return parts


def launch_sweep_sum(parts: Tensor, factors: _Factors) -> tuple[list[Tensor], list[Tensor]]:
    """Both gradients of each slot, from parts (G, blocks, 2 sum of ranks D)."""
    groups, blocks, size = parts.shape
    width, count = factors.a[0].shape[2], factors.count
    da = [torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in factors.a]
    db = [torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in factors.b]
    _sweep_sum[(triton.cdiv(max(factors.ranks) * width, SUM_ELEMENTS), 2 * count, groups)](
        parts, tuple(da), tuple(db), factors.scale, factors.ranks, factors.strides("scale"),
        blocks, size,
        WIDTH=width, COUNT=count, P=SUM_PARTS, E=SUM_ELEMENTS, num_warps=4,
    )  # fmt: skip
    return da, db


def launch_fused_factor_grad(
    dy: Tensor, x: Tensor, factors: _Factors
) -> tuple[list[Tensor], list[Tensor]]:
    """Both gradients of each slot, from dy (T, 3 D) and x (T, D); each LoRA has an equal share."""
    sweep = SWEEP_FLOAT32 if x.dtype == torch.float32 else SWEEP
    packed = launch_pack_all(factors, x.shape[1], x.dtype)
    return launch_sweep_sum(launch_sweep(dy, x, packed, factors, sweep), factors)


def launch_merge(weight: Tensor, factors: _Factors) -> Tensor:
    """W + s b a of each LoRA: (G, 3 D, D)."""
    width, groups = weight.shape[1], factors.groups
    merged = torch.empty((groups, *weight.shape), dtype=weight.dtype, device=weight.device)
    m, n = MERGE_ROWS, min(MERGE_COLUMNS, triton.next_power_of_2(width))
    _merge[(triton.cdiv(width, n), 3 * triton.cdiv(width, m), groups)](
        weight, factors.a, factors.b, factors.scale, factors.ranks, factors.strides("a"),
        factors.strides("b"), factors.strides("scale"), merged,
        M=m, N=n, num_warps=MERGE_WARPS, **factors.constants(width),
    )  # fmt: skip
    return merged


def _shares_forward(x: Tensor, merged: Tensor, bias: Tensor | None) -> Tensor:
    """Each share of x (B, N, D) by its merged weight, one product of the library after the other.

    A batched product could not add the bias where it writes: it would first spread the bias over
    the output and read it back, some 2 x 6 D bytes a row, which costs more than what the shares'
    last waves of tiles leave idle.
    """
    groups, out, width = merged.shape
    share = x.shape[0] * x.shape[1] // groups
    y = x.new_empty((*x.shape[:2], out))
    x_shares, y_shares = x.reshape(groups, share, width), y.view(groups, share, out)
    for x_rows, w, y_rows in zip(x_shares, merged, y_shares, strict=True):
        if bias is None:
            torch.mm(x_rows, w.T, out=y_rows)
        else:
            torch.addmm(bias, x_rows, w.T, out=y_rows)
    return y


def _shares_input_grad(dy: Tensor, merged: Tensor) -> Tensor:
    """The gradient of x (B, N, D), of all shares in one batched product."""
    groups, out, width = merged.shape
    rows = dy.reshape(groups, dy.shape[0] * dy.shape[1] // groups, out)
    return torch.bmm(rows, merged).view(*dy.shape[:2], width)


def _index_of_shares(images: int, groups: int, device: torch.device) -> Tensor:
    return torch.arange(images, device=device) // max(1, images // groups)


# ------------------------------------------------------------------ operators and their gradients


def _empty(like: Tensor) -> Tensor:
    return like.new_empty((0,))


@torch.library.custom_op("fastrecycle::lora_qkv", mutates_args=())
def _lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scale: list[Tensor],
    index: Tensor | None,
    positions: list[int],
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (B, N, 3 D); x a^T (COUNT, T, RANK), or W + s b a (G, 3 D, D); the other: empty."""
    images, tokens, width = x.shape
    factors = _factors(a, b, scale, positions)
    if method == "merge":
        with torch.cuda.device_of(x):
            merged = launch_merge(weight.contiguous(), factors)
        if factors.groups == 1:
            y = torch.nn.functional.linear(x, merged[0], bias)
        else:
            y = _shares_forward(x, merged, bias)
        return y, _empty(x), merged
    flat = _dense(x, width)
    if len(flat) == 0:
        low = x.new_empty((factors.count, 0, factors.padded))
        return x.new_empty((images, tokens, 3 * width)), low, _empty(weight)
    with torch.cuda.device_of(x):
        y, low = launch_forward(
            flat,
            _dense(weight, width),
            _whole(bias),
            factors,
            _whole(index),
            tokens,
            method == "loop",
        )
    return y.view(images, tokens, 3 * width), low, _empty(weight)


@_lora_qkv.register_fake
def _(x, weight, bias, a, b, scale, index, positions, method):
    y = x.new_empty((*x.shape[:2], weight.shape[0]))
    if method == "merge":
        return y, _empty(x), weight.new_empty((a[0].shape[0], *weight.shape))
    low = x.new_empty((len(a), x.shape[0] * x.shape[1], _padded_rank(a)))
    return y, low, _empty(weight)


@torch.library.custom_op("fastrecycle::lora_qkv_input_grad", mutates_args=())
def _lora_qkv_input_grad(
    dy: Tensor,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scale: list[Tensor],
    index: Tensor | None,
    positions: list[int],
    loop: bool,
) -> tuple[Tensor, Tensor]:
    """Returns dx (B, N, D) and s dy b (COUNT, T, RANK)."""
    images, tokens, _ = dy.shape
    width = weight.shape[1]
    factors = _factors(a, b, scale, positions)
    flat = _dense(dy, 3 * width)
    if len(flat) == 0:
        low = dy.new_empty((factors.count, 0, factors.padded))
        return dy.new_empty((images, tokens, width)), low
    with torch.cuda.device_of(dy):
        dx, low = launch_input_grad(
            flat, _dense(weight, width), factors, _whole(index), tokens, loop
        )
    return dx.view(images, tokens, width), low


@_lora_qkv_input_grad.register_fake
def _(dy, weight, a, b, scale, index, positions, loop):
    low = dy.new_empty((len(a), dy.shape[0] * dy.shape[1], _padded_rank(a)))
    return dy.new_empty((*dy.shape[:2], weight.shape[1])), low


@torch.library.custom_op("fastrecycle::lora_qkv_project", mutates_args=())
def _lora_qkv_project(
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scale: list[Tensor],
    index: Tensor | None,
    positions: list[int],
    up: bool,
) -> Tensor:
    """From x (B, N, D) x a^T, or from dy (B, N, 3 D) s dy b: (COUNT, T, RANK)."""
    factors = _factors(a, b, scale, positions)
    flat = _dense(x, x.shape[2])
    if len(flat) == 0:
        return x.new_empty((factors.count, 0, factors.padded))
    with torch.cuda.device_of(x):
        return launch_project(flat, factors, _whole(index), x.shape[1], up)


@_lora_qkv_project.register_fake
def _(x, a, b, scale, index, positions, up):
    return x.new_empty((len(a), x.shape[0] * x.shape[1], _padded_rank(a)))


@torch.library.custom_op("fastrecycle::lora_qkv_factor_grad", mutates_args=())
def _lora_qkv_factor_grad(
    dy: Tensor,
    x: Tensor,
    low_x: Tensor,
    low_dy: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scale: list[Tensor],
    index: Tensor | None,
    positions: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Both gradients of each slot."""
    factors = _factors(a, b, scale, positions)
    dy_rows, x_rows = _dense(dy, dy.shape[2]), _dense(x, x.shape[2])
    with torch.cuda.device_of(x):
        return launch_factor_grad(
            dy_rows, x_rows, low_x, low_dy, factors, _whole(index), x.shape[1]
        )


@_lora_qkv_factor_grad.register_fake
def _(dy, x, low_x, low_dy, a, b, scale, index, positions):
    return (
        [v.new_empty(v.shape) for v in a],
        [v.new_empty(v.shape) for v in b],
    )


@torch.library.custom_op("fastrecycle::lora_qkv_fused_factor_grad", mutates_args=())
def _lora_qkv_fused_factor_grad(
    dy: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scale: list[Tensor],
    positions: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Both gradients of each slot, where each LoRA has an equal share of the images."""
    factors = _factors(a, b, scale, positions)
    dy_rows, x_rows = _dense(dy, dy.shape[2]), _dense(x, x.shape[2])
    if len(x_rows) == 0:
        return [v.new_zeros(v.shape) for v in a], [v.new_zeros(v.shape) for v in b]
    with torch.cuda.device_of(x):
        if sum(factors.ranks) <= FUSED_RANKS:
            return launch_fused_factor_grad(dy_rows, x_rows, factors)
        images, tokens = x.shape[:2]
        index = None
        if factors.groups > 1:
            index = _index_of_shares(images, factors.groups, x.device)
        low_x = launch_project(x_rows, factors, index, tokens, up=False)
        low_dy = launch_project(dy_rows, factors, index, tokens, up=True)
        return launch_factor_grad(dy_rows, x_rows, low_x, low_dy, factors, index, tokens)


@_lora_qkv_fused_factor_grad.register_fake
def _(dy, x, a, b, scale, positions):
    return (
        [v.new_empty(v.shape) for v in a],
        [v.new_empty(v.shape) for v in b],
    )


def _save(ctx, inputs, output):
    x, weight, _, a, b, scale, index, ctx.positions, ctx.method = inputs
    _, low, merged = output
    ctx.count = len(a)
    ctx.train = any(v.requires_grad for v in (*a, *b))
    weight = merged if ctx.method == "merge" else weight
    ctx.save_for_backward(x if ctx.train else None, weight, low, index, *a, *b, *scale)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _low, _merged):
    x, weight, low, index, *factors = ctx.saved_tensors
    n, positions = ctx.count, ctx.positions
    a, b, scale = factors[:n], factors[n : 2 * n], factors[2 * n :]
    dx, da, db = None, [None] * n, [None] * n
    if dy is None:
        pass
    elif ctx.method == "merge":
        if ctx.needs_input_grad[0]:
            dx = dy @ weight[0] if len(weight) == 1 else _shares_input_grad(dy, weight)
        if ctx.train:
            da, db = _lora_qkv_fused_factor_grad(dy, x, a, b, scale, positions)
    else:
        low_dy = None
        if ctx.needs_input_grad[0]:
            dx, low_dy = _lora_qkv_input_grad(
                dy, weight, a, b, scale, index, positions, ctx.method == "loop"
            )
        if ctx.train:
            if low_dy is None:
                low_dy = _lora_qkv_project(dy, a, b, scale, index, positions, True)
            da, db = _lora_qkv_factor_grad(dy, x, low, low_dy, a, b, scale, index, positions)
    return dx, None, None, da, db, [None] * n, None, None, None


_lora_qkv.register_autograd(_backward, setup_context=_save)


# ------------------------------------------------------------------ the functions


def merged_weight(weight: Tensor, lora: dict[str, LowRank]) -> Tensor:
    """W + s b a, for one LoRA that stays as it is: merged once, each step is a plain product.

    Args:
        weight: (3 D, D).
        lora: as of `lora_qkv`, G = 1; no gradient reaches it.

    Returns:
        (3 D, D) in the weight's dtype, rounded once.

    """
    positions = [p for p, target in enumerate(POSITIONS) if target in lora]
    if not positions:
        return weight
    a, b, scale = ([lora[POSITIONS[p]][i].detach() for p in positions] for i in range(3))
    if len(a[0]) != 1:
        raise ValueError(f"merged_weight: one LoRA is merged, got {len(a[0])}")
    with torch.no_grad(), torch.cuda.device_of(weight):
        return launch_merge(weight.contiguous(), _factors(a, b, scale, positions))[0]


def check(x: Tensor, weight: Tensor, bias: Tensor | None, lora: dict[str, LowRank]) -> None:
    """Raise a ValueError for what the kernels cannot do."""
    scales = [("scale", factors[2]) for factors in lora.values()]
    for name, tensor in (("weight", weight), ("bias", bias), *scales):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"lora_qkv: {name} is frozen here, but its gradient is asked for")
    if x.shape[-1] % 16:
        raise ValueError(f"lora_qkv: the width must be a multiple of 16, got {x.shape[-1]}")
    rank = max((factors[0].shape[1] for factors in lora.values()), default=0)
    if rank > LARGEST_RANK:
        raise ValueError(f"lora_qkv: ranks up to {LARGEST_RANK} are supported, got {rank}")


def check_shares(images: int, groups: int) -> None:
    """Raise a ValueError unless each LoRA has as many images."""
    if images % groups:
        raise ValueError(
            f"lora_qkv: {images} images are no equal shares for {groups} LoRAs; give an index"
        )


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: dict[str, LowRank],
    index: Tensor | None,
    *,
    method: Method | None = None,
) -> Tensor:
    """The fused QKV projection with a LoRA on any of q, k, v. (B, N, D) -> (B, N, 3, D).

    Under autocast x, W and bias are cast; a, b and the scale stay as they are, and so do their
    gradients.

    Args:
        x: (B, N, D).
        weight: (3 D, D), frozen; bias (3 D,), frozen, or None.
        lora: {"q" | "k" | "v": (a (G, R, D), b (G, D, R), scale (G,))}, R at most 64.
        index: (B,) int64, the LoRA of each image, not checked to be in [0, G); None: each LoRA
            has B / G consecutive images, the first LoRA the first.
        method: see above; None: "pass" where there is an index, "merge" where there is none.

    Raises:
        ValueError: a gradient of the weight, the bias or a scale is asked for; D is no multiple of
            16; a rank above 64; B is no multiple of G, without an index; "merge" with an index;
            "loop" with several LoRAs.

    """
    check(x, weight, bias, lora)
    positions = [p for p, target in enumerate(POSITIONS) if target in lora]
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not positions:
        return torch.nn.functional.linear(x, weight, bias).unflatten(-1, (3, -1))
    a, b, scale = ([lora[POSITIONS[p]][i] for p in positions] for i in range(3))
    groups, images = a[0].shape[0], x.shape[0]
    if groups == 1:
        index = None
    elif index is None:
        check_shares(images, groups)
    if method is None:
        method = "merge" if index is None else "pass"
    if method == "merge" and index is not None:
        raise ValueError('lora_qkv: "merge" takes no index; use "pass"')
    if method == "loop" and groups > 1:
        raise ValueError(f'lora_qkv: "loop" takes one LoRA, got {groups}; use "pass"')
    if method == "pass" and groups > 1 and index is None:
        index = _index_of_shares(images, groups, x.device)
    scale = [s.detach() for s in scale]
    y, _, _ = _lora_qkv(x, weight, bias, a, b, scale, index, positions, method)
    return y.unflatten(-1, (3, -1))

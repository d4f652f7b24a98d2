"""Images of a pool as the backbone sees them: mapped, clamped, mirrored and normalised in one pass.

    Y = clamp(R X C^T / 255, 0, 1)      X a channel's bytes, R and C maps of its rows and columns
    y = (mirror(Y) - mean) / std        mirrored where the image's flag says so

A program computes BLOCK_M rows of one channel: R X of these rows for all columns stays in
registers and is the left operand of the second product, whose right one is C with its rows in
mirrored order where the image is. Without maps, Y = X / 255. No gradient.

Bytes are exact in float16. For a float32 result operands are float32; for another one maps and
R X are rounded to float16, three roundings of 2^-11 at most: an error of Y of at most
255 (3 / 2048) rho_R rho_C = 0.37 rho_R rho_C grey levels, rho the largest sum of a map's row in
absolute values (1 for a mean, at most 1.4 for PyTorch's bicubic enlargement). On images of noise,
224 pixels wide, the root mean square was 0.04 levels and the largest error 0.17; bfloat16 alone
rounds by up to 0.2 to 0.4.

B images, P pool, S side, M maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF = (64, 32, 64, 4, 2)  # rows, terms of a step, columns; warps, stages: float16 operands
FULL = (32, 16, 32, 8, 2)  # float32 operands
LINES, LINE_WARPS = 16, 4  # without maps: lines of a program


@triton.jit
def _of_channel(channel, v0, v1, v2):
    return tl.where(channel == 0, v0, tl.where(channel == 1, v1, v2))


@triton.jit
def _mapped(
    images, rows, row_maps, column_maps, which, flip, y,
    mean_0, mean_1, mean_2, std_0, std_1, std_2,
    SIDE: tl.constexpr, WHICH: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (SIDE + BLOCK_M - 1) // BLOCK_M
    plane = (tl.program_id(0) // blocks).to(tl.int64)  # of the result
    image, channel = plane // 3, plane % 3
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.arange(0, BLOCK_S)
    own = image
    if WHICH:
        own = tl.load(which + image)
    row_maps += own * (SIDE * SIDE)
    column_maps += own * (SIDE * SIDE)
    images += (tl.load(rows + image) * 3 + channel) * (SIDE * SIDE)

    left = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    for begin in range(0, SIDE, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        there = (m < SIDE)[:, None] & (k < SIDE)[None, :]
        r = tl.load(row_maps + m[:, None] * SIDE + k[None, :], mask=there, other=0.0)
        there = (k < SIDE)[:, None] & (s < SIDE)[None, :]
        x = tl.load(images + k[:, None] * SIDE + s[None, :], mask=there, other=0)
        left = tl.dot(r.to(OPERAND), x.to(OPERAND), left, input_precision="ieee")
    left = left.to(OPERAND)

    mirrored = tl.load(flip + image) != 0
    mean = _of_channel(channel, mean_0, mean_1, mean_2)
    scale = 1 / _of_channel(channel, std_0, std_1, std_2)
    y += plane * (SIDE * SIDE)
    for begin in range(0, SIDE, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        source = tl.where(mirrored, SIDE - 1 - n, n)
        there = (s < SIDE)[:, None] & (n < SIDE)[None, :]
        c = tl.load(column_maps + source[None, :] * SIDE + s[:, None], mask=there, other=0.0)
        out = tl.dot(left, c.to(OPERAND), input_precision="ieee") * (1 / 255)
        out = (tl.minimum(tl.maximum(out, 0.0), 1.0) - mean) * scale
        there = (m < SIDE)[:, None] & (n < SIDE)[None, :]
        tl.store(y + m[:, None] * SIDE + n[None, :], out.to(y.dtype.element_ty), mask=there)


@triton.jit
def _plain(
    images, rows, flip, y, lines, mean_0, mean_1, mean_2, std_0, std_1, std_2,
    SIDE: tl.constexpr, LINES: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    n = tl.arange(0, BLOCK_S)
    inside = line < lines
    image, channel = line // (3 * SIDE), line // SIDE % 3
    start = tl.load(rows + image, mask=inside, other=0) * (3 * SIDE * SIDE)
    start += line % (3 * SIDE) * SIDE
    mirrored = tl.load(flip + image, mask=inside, other=0) != 0
    source = tl.where(mirrored[:, None], SIDE - 1 - n[None, :], n[None, :])
    inside = inside[:, None] & (n < SIDE)[None, :]
    pixels = tl.load(images + start[:, None] + source, mask=inside, other=0).to(tl.float32)
    mean = _of_channel(channel, mean_0, mean_1, mean_2)[:, None]
    std = _of_channel(channel, std_0, std_1, std_2)[:, None]
    out = tl.div_rn(tl.div_rn(pixels, tl.full(pixels.shape, 255.0, tl.float32)) - mean, std)
    tl.store(y + line[:, None] * SIDE + n[None, :], out.to(y.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------ launcher


def _launch(
    images: Tensor,
    rows: Tensor,
    row_maps: Tensor | None,
    column_maps: Tensor | None,
    which: Tensor | None,
    flip: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    side = images.shape[-1]
    y = torch.empty((len(rows), 3, side, side), dtype=dtype, device=images.device)
    if y.numel() == 0:
        return y
    images, rows, flip = images.contiguous(), rows.contiguous(), flip.contiguous()
    if row_maps is None or column_maps is None:
        lines = len(rows) * 3 * side
        _plain[(triton.cdiv(lines, LINES),)](
            images, rows, flip, y, lines, *mean, *std,
            SIDE=side, LINES=LINES, BLOCK_S=triton.next_power_of_2(side), num_warps=LINE_WARPS,
        )  # fmt: skip
        return y
    block_s = max(16, triton.next_power_of_2(side))
    full = dtype == torch.float32
    block_m, block_k, block_n, warps, stages = FULL if full else HALF
    wider = max(1, block_s // 256)  # as many times the columns in registers and shared memory
    block_n = max(16, block_n // wider)
    if full:
        block_m //= wider
    else:  # no fewer rows than the tensor cores of four warps take
        warps *= wider
    block_m, block_k, block_n = (min(b, block_s) for b in (block_m, block_k, block_n))
    _mapped[(len(rows) * 3 * triton.cdiv(side, block_m),)](
        images, rows, row_maps.contiguous(), column_maps.contiguous(),
        rows if which is None else which.contiguous(), flip, y, *mean, *std,
        SIDE=side, WHICH=which is not None, OPERAND=tl.float32 if full else tl.float16,
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_N=block_n, BLOCK_S=block_s,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


# ------------------------------------------------------------------ operator


@torch.library.custom_op("fastrecycle::augment", mutates_args=())
def _augment(
    images: Tensor, rows: Tensor, row_maps: Tensor | None, column_maps: Tensor | None,
    which: Tensor | None, flip: Tensor, mean: list[float], std: list[float],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    with torch.cuda.device_of(images):
        return _launch(images, rows, row_maps, column_maps, which, flip, mean, std, dtype)


@_augment.register_fake
def _(images, rows, row_maps, column_maps, which, flip, mean, std, dtype):
    return images.new_empty((len(rows), *images.shape[1:]), dtype=dtype)


# ------------------------------------------------------------------ function


def _check(
    images: Tensor, rows: Tensor, maps: tuple[Tensor | None, ...], which: Tensor | None,
    flip: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> None:  # fmt: skip
    side = images.shape[-1]
    if images.dtype != torch.uint8 or images.shape[1:] != (3, side, side):
        raise ValueError(
            f"augment: images must be uint8 of shape (P, 3, S, S), got {images.dtype} of"
            f" {tuple(images.shape)}"
        )
    if side > WIDEST:
        raise ValueError(f"augment: a side of at most {WIDEST} pixels, got {side}")
    if dtype not in DTYPES:
        raise ValueError(f"augment: bfloat16, float16 or float32, got {dtype}")
    if flip.shape != rows.shape or rows.ndim != 1:
        raise ValueError(
            f"augment: rows and flip must have one shape (B,), got {tuple(rows.shape)} and"
            f" {tuple(flip.shape)}"
        )
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"augment: mean and std of 3 channels, got {len(mean)} and {len(std)}")
    if (maps[0] is None) != (maps[1] is None):
        raise ValueError("augment: maps of rows and of columns, or neither")
    for each in maps:
        if each is None:
            continue
        if each.shape[1:] != (side, side):
            raise ValueError(
                f"augment: maps must have shape (M, {side}, {side}), got {tuple(each.shape)}"
            )
        if which is None and len(each) != len(rows):
            raise ValueError(
                f"augment: {len(each)} maps of {len(rows)} images need `which`, one of each image's"
            )
    if which is not None and which.shape != rows.shape:
        raise ValueError(
            f"augment: which must have shape {tuple(rows.shape)}, got {tuple(which.shape)}"
        )


def augment(
    images: Tensor,
    rows: Tensor,
    row_maps: Tensor | None,
    column_maps: Tensor | None,
    which: Tensor | None,
    flip: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Images of a pool, mapped, clamped to [0, 1], mirrored and normalised; no gradient.

    Args:
        images: (P, 3, S, S) uint8, the pool.
        rows: (B,) int64, the images to take.
        row_maps, column_maps: (M, S, S) each, or None for neither, when nothing is clamped.
            Those in float16 are half the bytes, and nothing else where the result is no float32.
        which: (B,) int64, the maps of each image; None: M = B, in order.
        flip: (B,) bool, which images to mirror.
        mean, std: of each channel, in [0, 1].
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        (B, 3, S, S).

    Raises:
        ValueError: shapes disagree, or S is above 512.

    """
    _check(images, rows, (row_maps, column_maps), which, flip, mean, std, dtype)
    return _augment(images, rows, row_maps, column_maps, which, flip, list(mean), list(std), dtype)

"""Rows at an index, and their scatter backward.

token_gather:   y[b, j] = x[b, index[b, j]], or y[t] = x.flatten(0, 1)[index[t]] for a flat index;
gather_patches: the same with x the unfolded patches of an image, read from the pixels themselves.
The gradient of row n is the sum of dy over the positions j that hold n: one row for kept tokens,
which are distinct, and 0 for dropped ones. Repeated indices are summed too, in ascending j, so that
every result is deterministic; they only cost a further pass over the index.

B images, N tokens, D width, k kept tokens, C channels, P patch side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 8, 4  # tokens of a program and its warps
COLUMNS = 256  # numbers of each of them, at most
# The same where tokens go back: the index is searched once for all numbers of a token.
BACK_ROWS, BACK_WARPS, BACK_COLUMNS = 4, 2, 1024


@triton.jit
def _row_offset(image, token, stride_0, stride_1, stride_2, stride_3, PATCH: tl.constexpr, grid):
    """Where token (patch) number `token` of an image begins."""
    if PATCH == 0:
        return image * stride_0 + token * stride_1
    else:
        return image * stride_0 + PATCH * ((token // grid) * stride_2 + (token % grid) * stride_3)


@triton.jit
def _column_offset(column, stride_1, stride_2, stride_3, PATCH: tl.constexpr):
    """Where number `column` of a token lies behind its beginning; a patch is (C, P, P)."""
    if PATCH == 0:
        return column
    else:
        channel, pixel = column // (PATCH * PATCH), column % (PATCH * PATCH)
        return channel * stride_1 + (pixel // PATCH) * stride_2 + (pixel % PATCH) * stride_3


@triton.jit
def _gather(
    x, index, y, rows, kept, tokens, width, grid,
    stride_0, stride_1, stride_2, stride_3,
    PATCH: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    source = tl.load(index + row, mask=inside, other=0).to(tl.int64)
    if FLAT:
        image, token = source // tokens, source % tokens
    else:
        image, token = row // kept, source
    tl.device_assert((source >= 0) & ((token < tokens) | ~inside), "token_gather: index")
    begin = _row_offset(image, token, stride_0, stride_1, stride_2, stride_3, PATCH, grid)
    behind = _column_offset(column, stride_1, stride_2, stride_3, PATCH)
    mask = inside[:, None] & (column < width)[None, :]
    values = tl.load(x + begin[:, None] + behind[None, :], mask=mask)
    place = row[:, None] * width + column[None, :]
    tl.store(y + place, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _next_use(index, kept, token, after, ROWS: tl.constexpr, SCAN: tl.constexpr):
    """First position behind `after` that holds each token (`kept`: none), and how many do."""
    first = tl.zeros((ROWS,), tl.int32) + kept
    uses = tl.zeros((ROWS,), tl.int32)
    for begin in range(0, kept, SCAN):
        j = begin + tl.arange(0, SCAN)
        held = tl.load(index + j, mask=j < kept, other=-1)
        match = (held[None, :] == token[:, None]) & (j[None, :] > after[:, None])
        first = tl.minimum(first, tl.min(tl.where(match, j[None, :], kept), 1))
        uses += tl.sum(match.to(tl.int32), 1)
    return first, uses


@triton.jit
def _scatter(
    dy, index, dx, blocks, kept, tokens, width, grid,
    stride_0, stride_1, stride_2, stride_3,
    PATCH: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """The inverse of the index is found on the way, by comparing ROWS tokens with all k indices.

    So each row of dx is written once, without zero-fill or atomics.
    """
    image = tl.program_id(0).to(tl.int64) // blocks
    token = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    index += image * kept
    dy += image * kept * width
    wanted = (token < tokens)[:, None] & (column < width)[None, :]
    j, uses = _next_use(index, kept, token, tl.full((ROWS,), -1, tl.int32), ROWS, SCAN)
    place = j.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.load(dy + place, mask=wanted & (j < kept)[:, None], other=0.0).to(SUM)
    for _ in range(1, tl.max(tl.where(token < tokens, uses, 0), 0)):
        j, uses = _next_use(index, kept, token, j, ROWS, SCAN)
        place = j.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(dy + place, mask=wanted & (j < kept)[:, None], other=0.0).to(SUM)
    begin = _row_offset(
        image, token.to(tl.int64), stride_0, stride_1, stride_2, stride_3, PATCH, grid
    )
    behind = _column_offset(column, stride_1, stride_2, stride_3, PATCH)
    tl.store(dx + begin[:, None] + behind[None, :], total.to(dx.dtype.element_ty), mask=wanted)


@triton.jit
def _lower_bound(ordered, length, value, ROWS: tl.constexpr):
    """Number of entries of the ascending array below `value`."""
    low = tl.zeros((ROWS,), tl.int32)
    size = tl.zeros((ROWS,), tl.int32) + length
    steps = length
    while steps > 0:  # the interval halves; every row takes as many steps
        half = size // 2
        middle = low + half
        below = (size > 0) & (
            tl.load(ordered + middle, mask=(size > 0) & (middle < length), other=0) < value
        )
        low = tl.where(below, middle + 1, low)
        size = tl.where(below, size - half - 1, half)
        steps = steps // 2
    return low


@triton.jit
def _scatter_ordered(
    dy, ordered, order, dx, length, rows, tokens, width, grid,
    stride_0, stride_1, stride_2, stride_3,
    PATCH: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `_scatter`, for a flat index: sorted, so that a token's positions stand together."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = (row < rows)[:, None] & (column < width)[None, :]
    low = _lower_bound(ordered, length, row, ROWS)
    uses = _lower_bound(ordered, length, row + 1, ROWS) - low
    total = tl.zeros((ROWS, COLUMNS), SUM)
    for use in range(tl.max(tl.where(row < rows, uses, 0), 0)):
        used = use < uses
        j = tl.load(order + low + use, mask=used, other=0).to(tl.int64)
        place = j[:, None] * width + column[None, :]
        total += tl.load(dy + place, mask=wanted & used[:, None], other=0.0).to(SUM)
    begin = _row_offset(
        row // tokens, row % tokens, stride_0, stride_1, stride_2, stride_3, PATCH, grid
    )
    behind = _column_offset(column, stride_1, stride_2, stride_3, PATCH)
    tl.store(dx + begin[:, None] + behind[None, :], total.to(dx.dtype.element_ty), mask=wanted)


# ------------------------------------------------------------------ launchers


def _columns(width: int) -> int:
    """Numbers of a token in one program: a power of two that divides them where one does."""
    columns = min(COLUMNS, triton.next_power_of_2(width))
    while columns > 64 and width % columns:
        columns //= 2
    return columns


def _layout(x: Tensor, patch: int) -> tuple[int, int, int, tuple[int, int, int, int]]:
    """Tokens, width, patches along a side, strides; of (B, N, D), or of pixels (B, C, S, S)."""
    if patch == 0:
        return x.shape[1], x.shape[2], 1, (x.stride(0), x.stride(1), 0, 0)
    grid = x.shape[3] // patch
    return grid * grid, x.shape[1] * patch * patch, grid, x.stride()


def _launch_gather(x: Tensor, index: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    if patch == 0 and x.stride(2) != 1:
        x = x.contiguous()
    index = index.contiguous()
    tokens, width, grid, strides = _layout(x, patch)
    y = torch.empty((*index.shape, width), dtype=dtype, device=x.device)
    columns, rows = _columns(width), index.numel()
    if rows:
        _gather[(triton.cdiv(rows, ROWS), triton.cdiv(width, columns))](
            x, index, y, rows, index.shape[-1], tokens, width, grid, *strides,
            PATCH=patch, FLAT=index.ndim == 1, ROWS=ROWS, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
    return y


def _launch_scatter(dy: Tensor, index: Tensor, dx: Tensor, patch: int) -> Tensor:
    dy, index = dy.contiguous(), index.contiguous()
    tokens, width, grid, strides = _layout(dx, patch)
    rows, per_program, columns, warps = dx.shape[0] * tokens, ROWS, _columns(width), WARPS
    if patch == 0 and index.ndim == 2:
        per_program, warps = BACK_ROWS, BACK_WARPS
        columns = min(BACK_COLUMNS, triton.next_power_of_2(width))
    common = dict(
        PATCH=patch, SUM=tl.float64 if dx.dtype == torch.float64 else tl.float32,
        ROWS=per_program, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    if rows == 0:
        return dx
    if index.ndim == 1:
        ordered, order = torch.sort(index, stable=True)
        _scatter_ordered[(triton.cdiv(rows, per_program), triton.cdiv(width, columns))](
            dy, ordered, order, dx, len(index), rows, tokens, width, grid, *strides, **common
        )
    else:
        kept, blocks = index.shape[1], triton.cdiv(tokens, per_program)
        scan = min(256, triton.next_power_of_2(max(kept, 16)))
        _scatter[(dx.shape[0] * blocks, triton.cdiv(width, columns))](
            dy, index, dx, blocks, kept, tokens, width, grid, *strides, SCAN=scan, **common
        )
    return dx


# ------------------------------------------------------------------ operators and their gradients


@torch.library.custom_op("fastrecycle::token_gather", mutates_args=())
def _token_gather(x: Tensor, index: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return _launch_gather(x, index, 0, x.dtype)


@_token_gather.register_fake
def _(x, index):
    return x.new_empty((*index.shape, x.shape[2]))


@torch.library.custom_op("fastrecycle::token_scatter", mutates_args=())
def _token_scatter(dy: Tensor, index: Tensor, images: int, tokens: int) -> Tensor:
    dx = dy.new_empty((images, tokens, dy.shape[-1]))
    with torch.cuda.device_of(dy):
        return _launch_scatter(dy, index, dx, 0)


@_token_scatter.register_fake
def _(dy, index, images, tokens):
    return dy.new_empty((images, tokens, dy.shape[-1]))


def _save_index(ctx, inputs, output):
    x, index = inputs[:2]
    ctx.save_for_backward(index)
    ctx.shape = x.shape


def _gather_backward(ctx, dy):
    (index,) = ctx.saved_tensors
    return _token_scatter(dy, index, ctx.shape[0], ctx.shape[1]), None


def _scatter_backward(ctx, ddx):
    (index,) = ctx.saved_tensors
    return _token_gather(ddx, index), None, None, None


_token_gather.register_autograd(_gather_backward, setup_context=_save_index)
_token_scatter.register_autograd(_scatter_backward, setup_context=_save_index)


@torch.library.custom_op("fastrecycle::gather_patches", mutates_args=())
def _gather_patches(images: Tensor, index: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    with torch.cuda.device_of(images):
        return _launch_gather(images, index, patch, dtype)


@_gather_patches.register_fake
def _(images, index, patch, dtype):
    return images.new_empty((*index.shape, images.shape[1] * patch * patch), dtype=dtype)


@torch.library.custom_op("fastrecycle::scatter_patches", mutates_args=())
def _scatter_patches(
    dy: Tensor, index: Tensor, patch: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    with torch.cuda.device_of(dy):
        return _launch_scatter(dy, index, dy.new_empty(shape, dtype=dtype), patch)


@_scatter_patches.register_fake
def _(dy, index, patch, shape, dtype):
    return dy.new_empty(shape, dtype=dtype)


def _save_patches(ctx, inputs, output):
    images, index, ctx.patch, _ = inputs
    ctx.save_for_backward(index)
    ctx.shape, ctx.dtype = images.shape, images.dtype


def _patches_backward(ctx, dy):
    (index,) = ctx.saved_tensors
    return _scatter_patches(dy, index, ctx.patch, list(ctx.shape), ctx.dtype), None, None, None


_gather_patches.register_autograd(_patches_backward, setup_context=_save_patches)


# ------------------------------------------------------------------ functions


def token_gather(x: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index`: (B, N, D) and (B, k) -> (B, k, D); or flat (T',) -> packed (T', D).

    Indices lie in [0, N), or [0, B N) if flat; this is not checked (TRITON_DEBUG=1 does). The
    gradient of repeated ones is summed.
    """
    return _token_gather(x, index)


def gather_patches(
    images: Tensor, index: Tensor, patch_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The kept patches of images, flattened as (C, P, P), without unfolding the others.

    Args:
        images: (B, C, S, S), any strides.
        index: (B, k) int64 patch numbers, row-major; or (T',), counted through all images.
        patch_size: P, a divisor of S.
        dtype: of the result; None for that of the images.

    Returns:
        (B, k, C P P), or (T', C P P).

    """
    return _gather_patches(images, index, patch_size, dtype or images.dtype)


def gather_patches_embed(
    images: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Embeddings of the kept patches only: `gather_patches`, then one product.

    Args:
        images: (B, C, S, S).
        index: see `gather_patches`.
        weight: (D, C, P, P), of the patch convolution; bias (D,) or None.

    Returns:
        (B, k, D), or (T', D), in the weight's dtype or autocast's.

    """
    kind = images.device.type
    cast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if cast else weight.dtype
    patches = gather_patches(images, index, weight.shape[-1], dtype)
    return torch.nn.functional.linear(patches, weight.flatten(1), bias)

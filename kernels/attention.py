"""Self-attention on what the QKV product leaves, its gradient in one buffer of the same layout.

y = P v, P = softmax(S), S = q k^T / sqrt d; L = log sum exp S of each row is kept for the gradient:
  dv = P^T dy,  dS = P o (dy v^T - D),  D = rowsum(dy o y),  dq = dS k / sqrt d,
  dk = dS^T q / sqrt d.
P is computed anew from L. Two kernels give the gradient, four ways (`method`):
  rows     a program has all queries of a head in its tile and goes through the keys in chunks: dq
           stays in registers, the dk and dv of a chunk are complete at once.
  columns  a program has a tile of keys and goes through the queries in chunks: dk and dv stay in
           registers, the dq of a chunk is complete at once. Where a tile has not all of the keys,
           further ones follow, and add to the dq that the ones before them wrote.
  both     tiles of queries for dq (and D), then tiles of keys for dk and dv: seven products instead
           of five, but tiles of any size, so images of any length.
  tiles    as both, in one kernel: a program has a tile of queries, then the same tokens' keys, so
           that a head is read from memory once; D is computed again for each tile of keys.
All write each number once, in a fixed order of additions. Longer images' forward pass is cuDNN's on
the chips where that is faster.

B images, N tokens, Q queries (the first Q tokens), H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from fastrecycle_kernels.cls_scores import cls_scores
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Method = Literal["rows", "columns", "both", "tiles"]
WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2_E = 1.4426950408889634


# ------------------------------------------------------------------ kernels


@triton.jit
def _load(
    x, image, row, column, rows, stride, R: tl.constexpr, D: tl.constexpr, BULK: tl.constexpr
):
    """Rows [row, row + R) of one head, zeros past the last; of x (B, rows, stride)."""
    if BULK:
        return x.load([image, row, column]).reshape(R, D)
    else:
        at = row + tl.arange(0, R)
        place = x + image.to(tl.int64) * rows * stride + column
        place += at[:, None] * stride + tl.arange(0, D)[None, :]
        return tl.load(place, mask=(at < rows)[:, None], other=0.0)


@triton.jit
def _store(
    x, tile, image, row, column, rows, stride, R: tl.constexpr, D: tl.constexpr, BULK: tl.constexpr
):
    """Write what `_load` reads."""
    if BULK:
        x.store([image, row, column], tile.reshape(1, R, D))
    else:
        at = row + tl.arange(0, R)
        place = x + image.to(tl.int64) * rows * stride + column
        place += at[:, None] * stride + tl.arange(0, D)[None, :]
        tl.store(place, tile, mask=(at < rows)[:, None])


@triton.jit
def _dot(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _forward(
    q_rows, kv_chunks, y, lse, tokens, queries, heads,
    SCALE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """A tile of queries; SCALE turns products into logarithms to the base 2."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first = tl.program_id(1) * ROWS
    inner, column = heads * D, head * D
    row = first + tl.arange(0, ROWS)
    q = _load(q_rows, image, first, column, tokens, 3 * inner, ROWS, D, BULK)
    dtype: tl.constexpr = q.dtype
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, tokens, CHUNK):
        k = _load(kv_chunks, image, start, column + inner, tokens, 3 * inner, CHUNK, D, BULK)
        v = _load(kv_chunks, image, start, column + 2 * inner, tokens, 3 * inner, CHUNK, D, BULK)
        s = _dot(q, k.T, tl.zeros((ROWS, CHUNK), tl.float32))
        inside = start + tl.arange(0, CHUNK) < tokens
        s = tl.where(inside[None, :], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s * SCALE - (higher * SCALE)[:, None])
        fade = tl.exp2((highest - higher) * SCALE)
        weight = weight * fade + tl.sum(p, 1)
        total = _dot(p.to(dtype), v, total * fade[:, None])
        highest = higher
    total /= weight[:, None]
    _store(y, total.to(dtype), image, first, column, queries, inner, ROWS, D, BULK)
    lse += tl.program_id(0).to(tl.int64) * queries
    log2_e: tl.constexpr = 1.4426950408889634
    tl.store(lse + row, (highest * SCALE + tl.log2(weight)) / log2_e, mask=row < queries)


@triton.jit
def _backward_rows(
    q_rows, kv_chunks, y, dy, lse, delta, dq_rows, dkv_chunks, tokens, queries, heads,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, DELTA: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Find dq of a tile of queries, and D if DELTA; if WHOLE, the tile has all queries, and the dk
    and dv of all keys follow.
    """
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first = tl.program_id(1) * ROWS
    inner, column = heads * D, head * D
    row = first + tl.arange(0, ROWS)
    g = _load(dy, image, first, column, queries, inner, ROWS, D, BULK)
    out = _load(y, image, first, column, queries, inner, ROWS, D, BULK)
    q = _load(q_rows, image, first, column, tokens, 3 * inner, ROWS, D, BULK)
    dtype: tl.constexpr = q.dtype
    sums = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    place = tl.program_id(0).to(tl.int64) * queries
    log2_e: tl.constexpr = 1.4426950408889634
    logs = tl.load(lse + place + row, mask=row < queries, other=float("inf")) * log2_e
    if DELTA:
        tl.store(delta + place + row, sums, mask=row < queries)
    dq = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, tl.where(first < queries, tokens, 0), CHUNK):
        k = _load(kv_chunks, image, start, column + inner, tokens, 3 * inner, CHUNK, D, BULK)
        v = _load(kv_chunks, image, start, column + 2 * inner, tokens, 3 * inner, CHUNK, D, BULK)
        inside = start + tl.arange(0, CHUNK) < tokens
        s = _dot(q, k.T, tl.zeros((ROWS, CHUNK), tl.float32))
        p = tl.exp2(tl.where(inside[None, :], s * SCALE - logs[:, None], float("-inf")))
        if WHOLE:
            dv = _dot(g.T, p.to(dtype), tl.zeros((D, CHUNK), tl.float32)).T
            _store(
                dkv_chunks, dv.to(dtype), image, start, column + 2 * inner, tokens, 3 * inner,
                CHUNK, D, BULK,
            )  # fmt: skip
        dp = _dot(g, v.T, tl.zeros((ROWS, CHUNK), tl.float32))
        ds = (p * (dp - sums[:, None])).to(dtype)
        dq = _dot(ds, k, dq)
        if WHOLE:
            dk = _dot(q.T, ds, tl.zeros((D, CHUNK), tl.float32)).T * FACTOR
            _store(
                dkv_chunks, dk.to(dtype), image, start, column + inner, tokens, 3 * inner,
                CHUNK, D, BULK,
            )  # fmt: skip
    dq = (dq * FACTOR).to(dtype)
    _store(dq_rows, dq, image, first, column, tokens, 3 * inner, ROWS, D, BULK)
    if WHOLE:  # the other tokens asked nothing
        zeros = tl.zeros((ROWS, D), dtype)
        for start in range(ROWS, tokens, ROWS):
            _store(dq_rows, zeros, image, start, column, tokens, 3 * inner, ROWS, D, BULK)


@triton.jit
def _backward_columns(
    q_chunks, kv_rows, y, dy, lse, delta, dq_chunks, dkv_rows, tokens, queries, heads,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, DELTA: tl.constexpr, BULK: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Find dk and dv of a tile of ROWS keys; if WHOLE, of TILES of them, which are all keys, and dq
    follows. D is read if DELTA, else computed.
    """
    for tile in tl.static_range(TILES):
        if tile > 0:  # what other threads wrote of dq is read
            tl.debug_barrier()
        _backward_tile(
            q_chunks, kv_rows, y, dy, lse, delta, dq_chunks, dkv_rows, tokens, queries, heads,
            (tile if WHOLE else tl.program_id(1)) * ROWS,
            FACTOR, SCALE, D, ROWS, CHUNK, WHOLE, tile > 0, DELTA, BULK, BULK and TILES == 1,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    q_chunks, kv_rows, y, dy, lse, delta, dq_chunks, dkv_rows, tokens, queries, heads, first,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, MORE: tl.constexpr, DELTA: tl.constexpr,
    BULK: tl.constexpr, BULK_DQ: tl.constexpr,
):  # fmt: skip
    """One tile of `_backward_columns`; adds to dq if MORE. S, P, dS stand transposed: (keys,
    queries).
    """
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    inner, column = heads * D, head * D
    inside = first + tl.arange(0, ROWS) < tokens
    k = _load(kv_rows, image, first, column + inner, tokens, 3 * inner, ROWS, D, BULK)
    v = _load(kv_rows, image, first, column + 2 * inner, tokens, 3 * inner, ROWS, D, BULK)
    dtype: tl.constexpr = k.dtype
    place = tl.program_id(0).to(tl.int64) * queries
    log2_e: tl.constexpr = 1.4426950408889634
    dk = tl.zeros((ROWS, D), tl.float32)
    dv = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, queries, CHUNK):
        row = start + tl.arange(0, CHUNK)
        q = _load(q_chunks, image, start, column, tokens, 3 * inner, CHUNK, D, BULK)
        g = _load(dy, image, start, column, queries, inner, CHUNK, D, BULK)
        logs = tl.load(lse + place + row, mask=row < queries, other=float("inf")) * log2_e
        if DELTA:
            sums = tl.load(delta + place + row, mask=row < queries, other=0.0)
        else:
            out = _load(y, image, start, column, queries, inner, CHUNK, D, BULK)
            sums = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
        s = _dot(k, q.T, tl.zeros((ROWS, CHUNK), tl.float32))
        p = tl.exp2(tl.where(inside[:, None], s * SCALE - logs[None, :], float("-inf")))
        dv = _dot(p.to(dtype), g, dv)
        dp = _dot(v, g.T, tl.zeros((ROWS, CHUNK), tl.float32))
        ds = (p * (dp - sums[None, :])).to(dtype)
        dk = _dot(ds, q, dk)
        if WHOLE:
            dq = _dot(k.T, ds, tl.zeros((D, CHUNK), tl.float32)).T * FACTOR
            if MORE:
                before = _load(
                    dq_chunks, image, start, column, tokens, 3 * inner, CHUNK, D, BULK_DQ
                )
                dq += before.to(tl.float32)
            _store(
                dq_chunks, dq.to(dtype), image, start, column, tokens, 3 * inner, CHUNK, D, BULK_DQ
            )  # fmt: skip
    dk = (dk * FACTOR).to(dtype)
    _store(dkv_rows, dk, image, first, column + inner, tokens, 3 * inner, ROWS, D, BULK)
    dv = dv.to(dtype)
    _store(dkv_rows, dv, image, first, column + 2 * inner, tokens, 3 * inner, ROWS, D, BULK)
    if WHOLE and not MORE:  # the other tokens asked nothing
        zeros = tl.zeros((CHUNK, D), dtype)
        for start in range(tl.cdiv(queries, CHUNK) * CHUNK, tokens, CHUNK):
            _store(dq_chunks, zeros, image, start, column, tokens, 3 * inner, CHUNK, D, BULK_DQ)


@triton.jit
def _backward_tiles(
    qkv_rows, qkv_chunks, y_rows, y_chunks, dy_rows, dy_chunks, lse, dqkv_rows, tokens, queries,
    heads,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, keys and values of a tile of tokens."""
    _backward_rows(
        qkv_rows, qkv_chunks, y_rows, dy_rows, lse, lse, dqkv_rows, dqkv_rows, tokens, queries,
        heads, FACTOR, SCALE, D, ROWS, CHUNK, False, False, BULK,
    )  # fmt: skip
    _backward_columns(
        qkv_chunks, qkv_rows, y_chunks, dy_chunks, lse, lse, dqkv_rows, dqkv_rows, tokens, queries,
        heads, FACTOR, SCALE, D, ROWS, CHUNK, False, False, BULK, 1,
    )  # fmt: skip


# ------------------------------------------------------------------ launchers


class Cut(NamedTuple):
    """How a kernel is cut into programs."""

    rows: int  # queries (or keys, by columns) of a program's tile
    chunk: int  # keys (or queries) of one step of its loop
    warps: int = 4
    stages: int = 1  # chunks read ahead, where above 1
    bulk: int = 0  # 1: tiles go through the tensor copy engine
    registers: int = 0  # of a thread, at most; 0: no bound


def _tile(count: int, most: int = 1 << 16) -> int:
    return min(most, max(16, triton.next_power_of_2(count)))


def forward_cut(tokens: int, queries: int, dtype: torch.dtype) -> Cut:
    """The launch table of the forward kernel."""
    if dtype == torch.float32:  # products without tensor cores
        return Cut(_tile(queries, 32), _tile(tokens, 32))
    rows = _tile(queries, 64)
    if rows < 64:
        return Cut(rows, min(32, _tile(tokens)), warps=2, stages=2)
    if tokens <= 64:
        return Cut(rows, _tile(tokens), bulk=1)
    return Cut(rows, 32, stages=3, bulk=1)


def backward_cut(tokens: int, queries: int, width: int, dtype: torch.dtype) -> tuple[Method, Cut]:
    """The launch table of the gradient; figures are of 100 images, 12 heads of 64, on an H200.

    Up to 128 queries the tensor copy engine does not pay: 28.0 against 32.5 us at 50 tokens, 70.7
    against 96.8 at 99. At 197 it does, and three chunks on their way: 229 against 247.
    """
    if dtype == torch.float32:
        return "both", Cut(32, 16)
    rows = _tile(queries)
    if rows < 64 and rows * width <= 64 * 64:
        return "rows", Cut(rows, min(32, _tile(tokens)), stages=2, bulk=1)
    if rows * width <= 64 * 64:
        return "rows", Cut(rows, min(64, _tile(tokens)))
    if rows * width <= 128 * 64:
        return "rows", Cut(rows, 32, warps=8)
    keys = _tile(tokens)
    if keys * width <= 256 * 64:
        return "columns", Cut(keys, 32, warps=8, stages=3, bulk=1)
    return "tiles", Cut(64, 32, stages=2, bulk=1)


def library_is_faster(qkv: Tensor) -> bool:
    """Whether the forward pass is better left to cuDNN, on a Hopper.

    It pads keys to 128: on an H200, with 100 images of 12 heads of 64, it takes 27.5, 72.7 and 72.4
    us at 99, 148 and 197 tokens, the best cut here 30.7, 54.4 and 84.9. With 25 images the chip is
    not full, and the cut is faster: 21.3 against 23.3 us at 197.
    """
    images, tokens, _, heads, _ = qkv.shape
    if not qkv.is_cuda or qkv.dtype == torch.float32 or tokens <= 64 or images * heads < 600:
        return False
    return not 128 < tokens <= 160 and torch.cuda.get_device_capability(qkv.device)[0] == 9


def _operand(x: Tensor, rows: int, width: int, bulk: bool) -> Tensor | TensorDescriptor:
    """Of x (B, N, ...): itself, or a descriptor of tiles of one head."""
    if not bulk:
        return x
    flat = x.flatten(2)
    return TensorDescriptor.from_tensor(flat, [1, rows, width])


def _bulk(cut: Cut, *tensors: Tensor) -> bool:
    """Whether to use the tensor copy engine: it is there from Hopper on, wants aligned memory, and
    moves at most 256 rows.
    """
    device = tensors[0].device
    there = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    fits = max(cut.rows, cut.chunk) <= 256 and all(x.data_ptr() % 16 == 0 for x in tensors)
    return bool(cut.bulk) and there and fits


def _options(cut: Cut, width: int, scale: float, bulk: bool) -> dict:
    bound = {"maxnreg": cut.registers} if cut.registers else {}
    return dict(
        SCALE=scale * LOG2_E, D=width, ROWS=cut.rows, CHUNK=cut.chunk, BULK=bulk,
        num_warps=cut.warps, num_stages=cut.stages, **bound,
    )  # fmt: skip


def _launch_forward(qkv: Tensor, queries: int, scale: float, cut: Cut) -> tuple[Tensor, Tensor]:
    images, tokens, _, heads, width = qkv.shape
    y = qkv.new_empty((images, queries, heads * width))
    lse = qkv.new_empty((images, heads, queries), dtype=torch.float32)
    if images:
        bulk = _bulk(cut, qkv, y)
        _forward[(images * heads, triton.cdiv(queries, cut.rows))](
            _operand(qkv, cut.rows, width, bulk), _operand(qkv, cut.chunk, width, bulk),
            _operand(y, cut.rows, width, bulk), lse, tokens, queries, heads,
            **_options(cut, width, scale, bulk),
        )  # fmt: skip
    return y, lse


def _launch_backward(
    qkv: Tensor, y: Tensor, dy: Tensor, lse: Tensor, scale: float, method: Method, cut: Cut
) -> Tensor:
    images, tokens, _, heads, width = qkv.shape
    queries = y.shape[1]
    dqkv = torch.empty_like(qkv)
    if method == "rows" and cut.rows < queries:
        raise ValueError(f"attention: rows needs a tile of {queries} queries, got {cut.rows}")
    if qkv.is_cuda and method in ("rows", "columns") and cut.rows == 64 > cut.chunk:
        raise ValueError(
            f"attention: {method} with a tile of 64 rows needs chunks of 64, got {cut.chunk};"
            " Triton 3.6 was seen to compile smaller ones to wrong sums"
        )
    if not images:
        return dqkv
    bulk = _bulk(cut, qkv, y, dy, dqkv)
    options = dict(FACTOR=scale, **_options(cut, width, scale, bulk))
    whole = method in ("rows", "columns")
    grid = (images * heads, 1 if whole else triton.cdiv(tokens, cut.rows))
    sizes = (tokens, queries, heads)
    (qkv_r, qkv_c), (dqkv_r, dqkv_c), (y_r, y_c), (dy_r, dy_c) = (
        [_operand(x, n, width, bulk) for n in (cut.rows, cut.chunk)] for x in (qkv, dqkv, y, dy)
    )
    if method == "tiles":
        _backward_tiles[grid](
            qkv_r, qkv_c, y_r, y_c, dy_r, dy_c, lse, dqkv_r, *sizes, **options
        )  # fmt: skip
        return dqkv
    delta = None if whole else torch.empty_like(lse)
    options |= dict(WHOLE=whole, DELTA=not whole)
    if method != "columns":
        _backward_rows[grid](
            qkv_r, qkv_c, y_r, dy_r, lse, delta, dqkv_r, dqkv_c, *sizes, **options
        )  # fmt: skip
    if method != "rows":
        tiles = triton.cdiv(tokens, cut.rows) if whole else 1
        # a copy by the engine is not seen by a read that follows it: dq goes by the threads then
        _backward_columns[grid](
            qkv_c, qkv_r, y_c, dy_c, lse, delta, dqkv_c if tiles == 1 else dqkv, dqkv_r, *sizes,
            TILES=tiles, **options,
        )  # fmt: skip
    return dqkv


# ------------------------------------------------------------------ operators and their gradients


@torch.library.custom_op("fastrecycle::packed_attention", mutates_args=())
def _attention(
    qkv: Tensor, queries: int, scale: float, forward: list[int], method: str, backward: list[int]
) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    if not forward and queries == qkv.shape[1] and library_is_faster(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, scale=scale
        )
        return y.transpose(1, 2).flatten(2), lse.view(lse.shape[:3])
    cut = Cut(*forward) if forward else forward_cut(qkv.shape[1], queries, qkv.dtype)
    with torch.cuda.device_of(qkv):
        return _launch_forward(qkv, queries, scale, cut)


@_attention.register_fake
def _(qkv, queries, scale, forward, method, backward):
    images, _, _, heads, width = qkv.shape
    y = qkv.new_empty((images, queries, heads * width))
    return y, qkv.new_empty((images, heads, queries), dtype=torch.float32)


@torch.library.custom_op("fastrecycle::packed_attention_backward", mutates_args=())
def _attention_backward(
    qkv: Tensor, y: Tensor, dy: Tensor, lse: Tensor, scale: float, method: str, backward: list[int]
) -> Tensor:
    if not method:
        method, cut = backward_cut(qkv.shape[1], y.shape[1], qkv.shape[4], qkv.dtype)
    else:
        cut = Cut(*backward)
    with torch.cuda.device_of(qkv):
        return _launch_backward(
            qkv.contiguous(), y.contiguous(), dy.contiguous(), lse.contiguous(), scale, method, cut
        )


@_attention_backward.register_fake
def _(qkv, y, dy, lse, scale, method, backward):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, _, ctx.scale, _, ctx.method, ctx.backward_cut = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)  # nobody asks for the gradient of L


def _backward(ctx, dy, _):
    dqkv = None
    if dy is not None:
        qkv, y, lse = ctx.saved_tensors
        dqkv = _attention_backward(qkv, y, dy, lse, ctx.scale, ctx.method, ctx.backward_cut)
    return dqkv, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_save)


# ------------------------------------------------------------------ functions


def _check(qkv: Tensor, queries: int | None) -> int:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"packed_attention: expected qkv (B, N, 3, H, d), got {tuple(qkv.shape)}")
    if qkv.dtype not in DTYPES:
        raise ValueError(f"packed_attention: expected one of {DTYPES}, got {qkv.dtype}")
    if qkv.shape[-1] > WIDTHS[-1]:
        raise ValueError(f"packed_attention: d must be at most {WIDTHS[-1]}, got {qkv.shape[-1]}")
    tokens = qkv.shape[1]
    queries = tokens if queries is None else queries
    if not 1 <= queries <= tokens:
        raise ValueError(f"packed_attention: queries must be in [1, {tokens}], got {queries}")
    return queries


def packed_attention(
    qkv: Tensor,
    *,
    queries: int | None = None,
    with_scores: bool = False,
    forward: Sequence[int] = (),
    backward: tuple[Method, Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention of packed queries, keys and values.

    Args:
        qkv: (B, N, 3, H, d) in half or single precision; copied unless contiguous, and where d is
            none of 16, 32, 64, 128.
        queries: the first so many tokens ask, Q; None for all.
        with_scores: also the head mean of the first token's row of P (LoRA Recycle, Eq. 5), which
            has no gradient.
        forward: a `Cut`; (): the launch table's.
        backward: a method and its `Cut`, which for "rows" has at least Q rows, for "columns" N;
            None: the launch table's.

    Returns:
        y (B, Q, H d); scores (B, N) float32, or None.

    Raises:
        ValueError: not such a tensor, or `queries` not in [1, N].

    """
    queries = _check(qkv, queries)
    width = qkv.shape[-1]
    padded = next(w for w in WIDTHS if w >= width)
    scores = None
    if with_scores:
        scores = cls_scores(qkv[:, 0, 0], qkv[:, :, 1].transpose(1, 2))
    x = qkv if padded == width else torch.nn.functional.pad(qkv, (0, padded - width))
    method, cut = backward or ("", ())
    y, _ = _attention(x, queries, width**-0.5, list(forward), method, list(cut))
    if padded != width:
        y = y.unflatten(2, (-1, padded))[..., :width].flatten(2)
    return y, scores


def attention_backward(
    qkv: Tensor,
    y: Tensor,
    dy: Tensor,
    lse: Tensor,
    *,
    method: Method | None = None,
    cut: Sequence[int] = (),
) -> Tensor:
    """The gradient alone, for a forward pass made elsewhere.

    Args:
        qkv: (B, N, 3, H, d), d one of 16, 32, 64, 128.
        y, dy: (B, Q, H d), the output and its gradient, in qkv's dtype.
        lse: (B, H, Q) float32, the natural logarithm of each query's sum of exp S.
        method, cut: as above.

    Returns:
        dqkv (B, N, 3, H, d), zeros for the queries of tokens that asked nothing.

    """
    if qkv.shape[-1] not in WIDTHS:
        raise ValueError(f"attention_backward: d must be one of {WIDTHS}, got {qkv.shape[-1]}")
    return _attention_backward(qkv, y, dy, lse, qkv.shape[-1] ** -0.5, method or "", list(cut))

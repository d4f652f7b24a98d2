"""Importance of tokens and the patches that stay.

cls_scores:  s[b, n] = mean over h of softmax_n(q[b, h] . k[b, h, n] / sqrt d), LoRA Recycle, Eq. 5,
             without the attention matrix;
top_patches: the `count` highest of each row in ascending order. Patch i has rank
             #{j: s_j > s_i or (s_j = s_i and j < i)}, stays if that is below `count`, and goes to
             the place given by a cumulative sum: no sort, ties fall to the earlier patch.
Neither has a gradient: pruning carries none.

Two ways. In half precision on a GPU one program an image multiplies its keys with a block diagonal
of its queries, (N, H d) @ (H d, H): tensor cores add up what the keys' stream brings, and the
softmaxes of all heads are in one place. Else a program takes a group of heads, one after the other,
and a second kernel adds the groups.

B images, N tokens, H heads, d head width, S groups of heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 4096  # tokens of an image: its logits of one head are held by one program
TILE = 16384  # keys held by a program: tokens times a slice of the head width
RANK_TILE = 8192  # comparisons of one step: tokens times those that they are compared with
WARPS = 4
ALONE = 256  # images from which one program each fills the chip; below, heads are split
ALL = 0  # in place of a group: all heads at once, by tensor cores
FEWEST_ALL = 64  # images from which that wins
LONGEST_ALL = 1024  # tokens of an image up to which they do


@triton.jit
def _key(score):
    """An integer that orders as the score does; NaN above all, as torch.sort has it."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 0x7FFFFFFF, key)


@triton.jit
def _keep_top(
    scores, kept, score, tokens, prefix, count, stride,
    TOKENS: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """Write the places of the best patches of one image; `score` is what `scores` holds."""
    n = tl.arange(0, TOKENS)
    patch = (n >= prefix) & (n < tokens)
    lowest: tl.constexpr = -0x80000000
    key = tl.where(patch, _key(score), lowest)
    rank = tl.zeros((TOKENS,), tl.int32)
    for begin in range(0, tokens, RANKED):
        j = begin + tl.arange(0, RANKED)
        other_patch = (j >= prefix) & (j < tokens)
        other = _key(tl.load(scores + j * stride, mask=other_patch, other=0.0).to(tl.float32))
        other = tl.where(other_patch, other, lowest)
        ahead = other[None, :] > key[:, None]
        ahead |= (other[None, :] == key[:, None]) & (j[None, :] < n[:, None])
        rank += tl.sum((ahead & other_patch[None, :]).to(tl.int32), 1)
    stays = patch & (rank < count)
    place = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(kept + place, (n - prefix).to(tl.int64), mask=stays)


@triton.jit
def _scores(
    q, k, starts, scores, kept, tokens, heads, prefix, count,
    q_image, q_head, k_image, k_head, k_token,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, TOP: tl.constexpr,
    SUM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, SLICE: tl.constexpr,
    RANKED: tl.constexpr,
):  # fmt: skip
    """Sum of the heads of one group over all heads' number, for one image."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PACKED:
        start = tl.load(starts + image).to(tl.int64)
        length = (tl.load(starts + image + 1) - start).to(tl.int32)
        k += start * k_token
        scores += start + group * tokens  # (S, T)
    else:
        length = tokens
        k += image * k_image
        scores += (image * tl.num_programs(1) + group) * tokens  # (B, S, N)
    n = tl.arange(0, TOKENS)
    inside = n < length
    total = tl.zeros((TOKENS,), SUM)
    for head in range(group * GROUP, tl.minimum(group * GROUP + GROUP, heads)):
        logits = tl.zeros((TOKENS,), SUM)
        for begin in tl.static_range(0, WIDTH, SLICE):
            i = begin + tl.arange(0, SLICE)
            query = tl.load(q + image * q_image + head * q_head + i, mask=i < WIDTH, other=0.0)
            place = k + head * k_head + n.to(tl.int64)[:, None] * k_token + i[None, :]
            keys = tl.load(place, mask=inside[:, None] & (i < WIDTH)[None, :], other=0.0)
            logits += tl.sum(keys.to(SUM) * query.to(SUM)[None, :], 1)
        logits = tl.where(inside, logits * SCALE, float("-inf"))
        weight = tl.exp(logits - tl.max(logits, 0))
        total += weight / tl.sum(weight, 0)
    total /= heads
    tl.store(scores + n, total, mask=inside)
    if TOP:
        tl.debug_barrier()  # other threads' scores are read back
        kept += image * count
        _keep_top(scores, kept, total.to(tl.float32), tokens, prefix, count, 1, TOKENS, RANKED)


@triton.jit
def _scores_all(
    q, k, starts, scores, kept, tokens, heads, prefix, count,
    q_image, q_head, k_image, k_head, k_token,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, TOP: tl.constexpr,
    FLAT: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    SLICE: tl.constexpr, RANKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All heads of one image. FLAT: they follow one another; COLUMNS: heads times width."""
    image = tl.program_id(0).to(tl.int64)
    if PACKED:
        start = tl.load(starts + image).to(tl.int64)
        length = (tl.load(starts + image + 1) - start).to(tl.int32)
        k += start * k_token
        scores += start
    else:
        length = tokens
        k += image * k_image
        scores += image * tokens
    q += image * q_image
    n, h = tl.arange(0, TOKENS), tl.arange(0, HEADS)
    inside = n < length
    rows = k + n.to(tl.int64)[:, None] * k_token
    logits = tl.zeros((TOKENS, HEADS), tl.float32)
    for begin in tl.range(0, COLUMNS, SLICE, num_stages=STAGES):
        column = begin + tl.arange(0, SLICE)
        head = column // WIDTH
        if FLAT:
            at_key, at_query = column, column
        else:
            at_key = head * k_head + column % WIDTH
            at_query = head * q_head + column % WIDTH
        if COLUMNS % SLICE == 0:
            keys = tl.load(rows + at_key[None, :], mask=inside[:, None], other=0.0)
            query = tl.load(q + at_query)
        else:
            there = column < COLUMNS
            keys = tl.load(rows + at_key[None, :], mask=inside[:, None] & there[None, :], other=0.0)
            query = tl.load(q + at_query, mask=there, other=0.0)
        spread = tl.where(head[:, None] == h[None, :], query[:, None], 0.0).to(keys.dtype)
        logits = tl.dot(keys, spread, logits, input_precision="ieee")
    logits = tl.where(inside[:, None], logits * SCALE, float("-inf"))
    weight = tl.exp(logits - tl.max(logits, 0)[None, :])
    share = tl.where(h < heads, 1 / tl.sum(weight, 0), 0.0)
    total = tl.sum(weight * share[None, :], 1) / heads
    tl.store(scores + n, total, mask=inside)
    if TOP:
        tl.debug_barrier()  # other threads' scores are read back
        kept += image * count
        _keep_top(scores, kept, total, tokens, prefix, count, 1, TOKENS, RANKED)


@triton.jit
def _add_groups(
    parts, scores, kept, groups, tokens, prefix, count, image_stride, group_stride, token_stride,
    TOP: tl.constexpr, WRITE: tl.constexpr, SUM: tl.constexpr, TOKENS: tl.constexpr,
    RANKED: tl.constexpr,
):  # fmt: skip
    """Scores of one image from those of its head groups, and its best patches."""
    image = tl.program_id(0).to(tl.int64)
    parts += image * image_stride
    scores += image * tokens
    n = tl.arange(0, TOKENS)
    inside = n < tokens
    total = tl.zeros((TOKENS,), SUM)
    for group in range(groups):
        total += tl.load(parts + group * group_stride + n * token_stride, mask=inside, other=0.0)
    if WRITE:
        tl.store(scores + n, total, mask=inside)
        tl.debug_barrier()  # other threads' scores are read back
    if TOP:
        kept += image * count
        if WRITE:
            _keep_top(scores, kept, total.to(tl.float32), tokens, prefix, count, 1, TOKENS, RANKED)
        else:
            _keep_top(
                parts, kept, total.to(tl.float32), tokens, prefix, count, token_stride, TOKENS,
                RANKED,
            )  # fmt: skip


# ------------------------------------------------------------------ launchers


def _sum(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    wide = dtype == torch.float64
    return (torch.float64, tl.float64) if wide else (torch.float32, tl.float32)


def _block(tokens: int) -> int:
    return max(16, triton.next_power_of_2(tokens))


def _launch_scores(
    q: Tensor,
    k: Tensor,
    starts: Tensor | None,
    longest: int,
    group: int,
    top: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores (S, T) or (B, S, N) of groups of heads; with `top`, (count, prefix), the kept too.

    S is 1 for the group `ALL`.
    """
    images, heads, width = q.shape
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(-1) == 1 else k.contiguous()
    groups = 1 if group == ALL else triton.cdiv(heads, group)
    top = top if groups == 1 else None
    dtype, accumulate = _sum(q.dtype)
    shape = (groups, k.shape[0]) if starts is not None else (images, groups, longest)
    scores = torch.empty(shape, dtype=dtype, device=k.device)
    count, prefix = top or (0, 0)
    kept = torch.empty((images, count), dtype=torch.int64, device=k.device)
    tokens = k.shape[0] if starts is not None else longest
    if starts is not None:
        k_image, (k_token, k_head) = 0, k.stride()[:2]
    else:
        k_image, k_head, k_token = k.stride()[:3]
    block = _block(longest)
    arguments = (
        q, k, starts, scores, kept, tokens, heads, prefix, count,
        q.stride(0), q.stride(1), k_image, k_head, k_token,
    )  # fmt: skip
    constants = {
        "SCALE": width**-0.5, "WIDTH": width, "PACKED": starts is not None, "TOP": top is not None,
        "TOKENS": block, "RANKED": max(1, RANK_TILE // block),
    }  # fmt: skip
    if not (images and longest):
        pass
    elif group == ALL:
        _scores_all[(images,)](
            *arguments, **constants, FLAT=q.stride(1) == k_head == width, COLUMNS=heads * width,
            HEADS=max(16, triton.next_power_of_2(heads)), SLICE=max(16, min(64, TILE // block)),
            STAGES=2 if images >= ALONE else 3, num_warps=WARPS if block <= 256 else 2 * WARPS,
        )  # fmt: skip
    else:
        _scores[(images, groups)](
            *arguments, **constants, SUM=accumulate, GROUP=group,
            SLICE=max(8, min(triton.next_power_of_2(width), TILE // block)),
            num_warps=WARPS if block <= 256 else 2 * WARPS,
        )  # fmt: skip
    return scores, kept


def _launch_add(
    parts: Tensor, write: bool, top: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """(B, S, N) -> (B, N) unless not `write`, and the places of the best."""
    images, groups, tokens = parts.shape
    scores = parts.new_empty((images, tokens) if write else (0, 0))
    block, (count, prefix) = _block(tokens), top or (0, 0)
    kept = torch.empty((images, count), dtype=torch.int64, device=parts.device)
    if images and tokens:
        image_stride, group_stride, token_stride = parts.stride()
        _add_groups[(images,)](
            parts, scores, kept, groups, tokens, prefix, count,
            image_stride, group_stride, token_stride,
            TOP=top is not None, WRITE=write, SUM=_sum(parts.dtype)[1], TOKENS=block,
            RANKED=max(1, RANK_TILE // block), num_warps=WARPS if tokens <= 256 else 2 * WARPS,
        )  # fmt: skip
    return scores, kept


def _group(q: Tensor, longest: int) -> int:
    """Heads of a program: all of an image at once, or where images alone fill the chip."""
    images, heads = q.shape[:2]
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if half and images >= FEWEST_ALL and longest <= LONGEST_ALL:
        return ALL
    return heads if images >= ALONE else 1


def _checked(group: int | None, q: Tensor, longest: int) -> int:
    """Heads of a program as asked for, or the launch table's."""
    return _group(q, longest) if group is None else min(group, q.shape[1])


# ------------------------------------------------------------------ operators


@torch.library.custom_op("fastrecycle::cls_scores", mutates_args=())
def _cls_scores(q_cls: Tensor, k: Tensor, group: int) -> Tensor:
    with torch.cuda.device_of(k):
        scores, _ = _launch_scores(q_cls, k, None, k.shape[2], group)
        return scores[:, 0] if scores.shape[1] == 1 else _launch_add(scores, True)[0]


@_cls_scores.register_fake
def _(q_cls, k, group):
    return k.new_empty((k.shape[0], k.shape[2]), dtype=_sum(q_cls.dtype)[0])


@torch.library.custom_op("fastrecycle::cls_scores_packed", mutates_args=())
def _cls_scores_packed(
    q_cls: Tensor, k: Tensor, cu_seqlens: Tensor, longest: int, group: int
) -> Tensor:
    with torch.cuda.device_of(k):
        scores, _ = _launch_scores(q_cls, k, cu_seqlens, longest, group)
    return scores[0] if len(scores) == 1 else scores.sum(0)


@_cls_scores_packed.register_fake
def _(q_cls, k, cu_seqlens, longest, group):
    return k.new_empty((k.shape[0],), dtype=_sum(q_cls.dtype)[0])


@torch.library.custom_op("fastrecycle::cls_top_patches", mutates_args=())
def _cls_top_patches(
    q_cls: Tensor, k: Tensor, count: int, prefix: int, group: int
) -> tuple[Tensor, Tensor]:
    top = (count, prefix)
    with torch.cuda.device_of(k):
        scores, kept = _launch_scores(q_cls, k, None, k.shape[2], group, top)
        if scores.shape[1] == 1:
            return scores.squeeze(1), kept
        return _launch_add(scores, True, top)


@_cls_top_patches.register_fake
def _(q_cls, k, count, prefix, group):
    scores = k.new_empty((k.shape[0], k.shape[2]), dtype=_sum(q_cls.dtype)[0])
    return scores, k.new_empty((k.shape[0], count), dtype=torch.int64)


@torch.library.custom_op("fastrecycle::top_patches", mutates_args=())
def _top_patches(scores: Tensor, count: int) -> Tensor:
    with torch.cuda.device_of(scores):
        return _launch_add(scores[:, None], False, (count, 0))[1]


@_top_patches.register_fake
def _(scores, count):
    return scores.new_empty((len(scores), count), dtype=torch.int64)


# ------------------------------------------------------------------ functions


def _check_length(tokens: int) -> None:
    if tokens > LONGEST:
        raise ValueError(f"cls_scores: at most {LONGEST} tokens an image, got {tokens}")


def cls_scores(q_cls: Tensor, k: Tensor, *, group: int | None = None) -> Tensor:
    """Head-averaged attention of the CLS token; no gradient.

    Args:
        q_cls: (B, H, d); k: (B, H, N, d): views with any strides, read in place.
        group: heads of one program, 0 for all at once by tensor cores (float32 or narrower, at most
            1024 tokens); None for the launch table's.

    Returns:
        (B, N) float32 (float64 for float64 input), rows sum to 1.

    Raises:
        ValueError: N is above 4096.

    """
    _check_length(k.shape[2])
    return _cls_scores(q_cls.detach(), k.detach(), _checked(group, q_cls, k.shape[2]))


def cls_scores_packed(
    q_cls: Tensor, k: Tensor, cu_seqlens: Tensor, longest: int, *, group: int | None = None
) -> Tensor:
    """The same for images of different lengths.

    Args:
        q_cls: (B, H, d), as above.
        k: (T, H, d), image after image.
        cu_seqlens: (B + 1,) int32, starts of the images, ending with T.
        longest: tokens of the longest image, or more.
        group: as above.

    Returns:
        (T,) float32; each image's sum to 1.

    Raises:
        ValueError: `longest` is above 4096.

    """
    _check_length(longest)
    group = _checked(group, q_cls, longest)
    return _cls_scores_packed(q_cls.detach(), k.detach(), cu_seqlens, longest, group)


def cls_top_patches(
    q_cls: Tensor, k: Tensor, count: int, prefix: int = 1, *, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """`cls_scores`, and the `count` best patches (counted behind the prefix tokens), ascending.

    Returns:
        (B, N) scores of all tokens, (B, count) int64.

    Raises:
        ValueError: N is above 4096, or `count` not in [1, N - prefix].

    """
    _check_length(k.shape[2])
    patches = k.shape[2] - prefix
    if not 1 <= count <= patches:
        raise ValueError(f"top_patches: count must be in [1, {patches}], got {count}")
    group = _checked(group, q_cls, k.shape[2])
    return _cls_top_patches(q_cls.detach(), k.detach(), count, prefix, group)


def top_patches(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores of each row, ascending; ties to the earlier one.

    Args:
        scores: (B, n) float32 or narrower, any strides.
        count: in [1, n].

    Returns:
        (B, count) int64.

    Raises:
        ValueError: n is above 4096, or `count` out of range.

    """
    _check_length(scores.shape[1])
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(f"top_patches: count must be in [1, {scores.shape[1]}], got {count}")
    return _top_patches(scores.detach(), count)

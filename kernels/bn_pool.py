"""A ResNet's stem behind its convolution: BatchNorm, ReLU and 3x3 max pooling of stride 2 at once.

B images, C channels, G tasks of B / G consecutive images; x (B, C, H, W) in channels-last memory:

    y     = max over the window of relu(x scale + shift),    y (B, C, ceil(H / 2), ceil(W / 2))
    dx    = (sum of dy of the windows that chose x) scale + dmu / M + 2 dsigma2 (x - mu) / M

with scale, shift, mu, sigma2 and M as in `bn_prior`. The unit of both kernels is a window together
with the 2x2 pixels at its centre, right and below: each pixel belongs to one unit, which counts it
for the moments and later writes its gradient. A 3x3 window reaches one pixel beyond its unit, and a
unit's pixels lie in at most 4 windows; what neighbours share comes from the cache.

`code`: of each window the place of its maximum, 0 to 8 in row-major order, the first of equals as
in PyTorch; 9 where the ReLU lets nothing pass. A NaN in x may not show in y, but the moments tell.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastrecycle_kernels.bn_prior import PROGRAMS, Chunks, _affine, _check, _twin_of
from torch import Tensor

# ------------------------------------------------------------------ kernels


@triton.jit
def _forward(
    x, mean, var, weight, bias, y, twin, code, chunk_mean, chunk_var,
    images, height, width, channels, strips, chunks, chunk_units, chunk_rows, eps,
    BLOCK_U: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One chunk of units, BLOCK_C channels: y, the places of maxima, and the chunk's moments."""
    task = tl.program_id(1)
    chunk = tl.program_id(0) // strips
    c = (tl.program_id(0) % strips) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < channels
    scale, shift = _affine(mean, var, weight, bias, c, inside_c, eps)
    tl.store(twin, 0.0, mask=tl.program_id(0) + task == 0)
    # x is compared itself, where scale < 0 with its sign changed: equal numbers stay equal
    sign = tl.where(scale < 0, -1.0, 1.0)

    wide = tl.cdiv(width, 2)
    area = tl.cdiv(height, 2) * wide  # units of an image
    first = chunk * chunk_units
    left = min(images * area - first, chunk_units)
    image = first // area
    skipped = first - image * area  # units of that image in earlier chunks
    x += (task.to(tl.int64) * images + image) * height * width * channels
    out = (task.to(tl.int64) * images * area + first) * channels
    corner = (skipped // wide * 2 * width + skipped % wide * 2) * channels
    about = tl.load(x + corner + c, mask=inside_c, other=0.0).to(tl.float32)

    total = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
    for start in range(0, chunk_units, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        there = unit < left
        place = (skipped + unit) % area
        h = place // wide * 2
        w = place % wide * 2
        at = ((skipped + unit) // area * height + h) * width + w
        best = tl.full((BLOCK_U, BLOCK_C), float("-inf"), tl.float32)
        which = tl.full((BLOCK_U, BLOCK_C), 4, tl.int32)
        for k in tl.static_range(9):
            row = h + (k // 3 - 1)
            column = w + (k % 3 - 1)
            inside = there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            inside = inside[:, None] & inside_c[None, :]
            shifted = (at + (k // 3 - 1) * width + (k % 3 - 1)) * channels
            value = tl.load(x + shifted[:, None] + c[None, :], mask=inside, other=0.0)
            value = value.to(tl.float32)
            if (k // 3 > 0) & (k % 3 > 0):  # the unit's own
                apart = tl.where(inside, value - about[None, :], 0.0)
                total += apart
                square += apart * apart
            value = tl.where(inside, value * sign[None, :], float("-inf"))
            better = value > best
            best = tl.where(better, value, best)
            which = tl.where(better, k, which)
        inside = there[:, None] & inside_c[None, :]
        best = tl.where(inside, best, 0.0)
        value = best * sign[None, :] * scale[None, :] + shift[None, :]
        which = tl.where(value > 0, which, 9)
        to = out + unit[:, None] * channels + c[None, :]
        tl.store(y + to, tl.maximum(value, 0.0).to(y.dtype.element_ty), mask=inside)
        tl.store(code + to, which.to(tl.uint8), mask=inside)

    count = min(images * height * width - chunk * chunk_rows, chunk_rows).to(tl.float32)
    apart = tl.sum(total, axis=0) / count
    spread = tl.sum(square, axis=0) / count - apart * apart
    spread = tl.where(spread < 0, 0.0, spread)  # keeps NaN
    to = (task * chunks + chunk).to(tl.int64) * channels + c
    tl.store(chunk_mean + to, about + apart, mask=inside_c)
    tl.store(chunk_var + to, spread, mask=inside_c)


@triton.jit
def _flow(
    dy, dtwin, code, at, inside,
    DTWIN: tl.constexpr,
):  # fmt: skip
    """A window's gradient, and the place to which it goes."""
    flow = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if DTWIN:
        flow += tl.load(dtwin + at, mask=inside, other=0.0).to(tl.float32)
    return flow, tl.load(code + at, mask=inside, other=9).to(tl.int32)


@triton.jit
def _backward(
    dy, dtwin, dmoments, x, code, mu, mean, var, weight, bias, dx,
    images, height, width, channels, strips, chunks, chunk_units, chunk_rows, eps,
    DY: tl.constexpr, DTWIN: tl.constexpr, DMOMENTS: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One chunk of units, BLOCK_C channels: dx = flow scale + level + slope (x - mu)."""
    task = tl.program_id(1)
    chunk = tl.program_id(0) // strips
    c = (tl.program_id(0) % strips) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < channels
    wide = tl.cdiv(width, 2)
    high = tl.cdiv(height, 2)
    area = high * wide
    first = chunk * chunk_units
    left = min(images * area - first, chunk_units)
    image = first // area
    skipped = first - image * area
    pixels = (task.to(tl.int64) * images + image) * height * width * channels
    windows = (task.to(tl.int64) * images * area + first) * channels
    if DY:
        scale, _ = _affine(mean, var, weight, bias, c, inside_c, eps)
    if DMOMENTS:
        count = min(images * height * width - chunk * chunk_rows, chunk_rows).to(tl.float32)
        mine = (task * chunks + chunk).to(tl.int64) * channels + c
        second = tl.num_programs(1).to(tl.int64) * chunks * channels  # where variances begin
        level = tl.load(dmoments + mine, mask=inside_c, other=0.0) / count
        slope = tl.load(dmoments + second + mine, mask=inside_c, other=0.0) * (2 / count)
        centre = tl.load(mu + mine, mask=inside_c, other=0.0)

    for start in range(0, chunk_units, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        there = unit < left
        place = (skipped + unit) % area
        i = place // wide
        j = place % wide
        pixel = ((skipped + unit) // area * height + 2 * i) * width + 2 * j
        if DY:
            right, below = there & (j + 1 < wide), there & (i + 1 < high)
            to = windows + unit[:, None] * channels + c[None, :]
            flow00, code00 = _flow(dy, dtwin, code, to, there[:, None] & inside_c[None, :], DTWIN)
            flow01, code01 = _flow(
                dy, dtwin, code, to + channels, right[:, None] & inside_c[None, :], DTWIN
            )
            flow10, code10 = _flow(
                dy, dtwin, code, to + wide * channels, below[:, None] & inside_c[None, :], DTWIN
            )
            flow11, code11 = _flow(
                dy, dtwin, code, to + (wide + 1) * channels,
                (right & below)[:, None] & inside_c[None, :], DTWIN,
            )  # fmt: skip
        for k in tl.static_range(4):  # pixel (k // 2, k % 2) of the unit
            inside = there & (2 * i + k // 2 < height) & (2 * j + k % 2 < width)
            inside = inside[:, None] & inside_c[None, :]
            at = pixels + ((pixel + k // 2 * width + k % 2) * channels)[:, None] + c[None, :]
            out = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
            if DY:
                # the place of this pixel in each of its windows
                out += tl.where(code00 == 4 + 3 * (k // 2) + k % 2, flow00, 0.0)
                if k % 2 == 1:
                    out += tl.where(code01 == 3 + 3 * (k // 2), flow01, 0.0)
                if k // 2 == 1:
                    out += tl.where(code10 == 1 + k % 2, flow10, 0.0)
                if k == 3:
                    out += tl.where(code11 == 0, flow11, 0.0)
                out *= scale[None, :]
            if DMOMENTS:
                value = tl.load(x + at, mask=inside, other=0.0, eviction_policy="evict_first")
                out += level[None, :] + slope[None, :] * (value.to(tl.float32) - centre[None, :])
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Launch:
    """How one shape is cut: `chunks` of `chunk_units` units a task, in tiles of block_u."""

    block_u: int
    block_c: int
    warps: int
    chunk_units: int
    chunks: int
    chunk_rows: int  # pixels of every chunk but a task's last


def launch(
    images: int, height: int, width: int, channels: int, segments: int, itemsize: int = 2
) -> Launch:
    """The cut of `segments` tasks of so many images. All chunks but the last are of one size."""
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    warps = 4
    block_u = max(1, 32 * warps * (16 // itemsize) // block_c)  # 16 bytes a thread
    area = triton.cdiv(height, 2) * triton.cdiv(width, 2)
    if height % 2 or width % 2:  # units at an edge have fewer pixels, images are alike
        return Launch(block_u, block_c, warps, area, max(1, images), height * width)
    strips = segments * triton.cdiv(channels, block_c)
    tiles = triton.cdiv(max(1, images * area), block_u)
    units = block_u * triton.cdiv(tiles, max(1, PROGRAMS // strips))
    chunks = max(1, triton.cdiv(images * area, units))
    return Launch(block_u, block_c, warps, units, chunks, 4 * units)


def _plan(x: Tensor, segments: int) -> Launch:
    # int: as in bn_prior
    b, c, h, w = (int(n) for n in x.shape)
    return launch(b // segments, h, w, c, segments, x.element_size())


def _pooled(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    b, c, h, w = x.shape
    return torch.empty(
        (b, c, (h + 1) // 2, (w + 1) // 2), dtype=dtype or x.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip


def _chunks_like(x: Tensor, segments: int) -> Tensor:
    shape = (2, segments, _plan(x, segments).chunks, x.shape[1])
    return x.new_empty(shape, dtype=torch.float32)


def _sizes(x: Tensor, segments: int, plan: Launch) -> tuple[int, ...]:
    b, c, h, w = x.shape
    strips = triton.cdiv(c, plan.block_c)
    return b // segments, h, w, c, strips, plan.chunks, plan.chunk_units, plan.chunk_rows


# ------------------------------------------------------------------ operations


@torch.library.custom_op("fastrecycle::bn_pool", mutates_args=())
def _bn_pool(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = _plan(x, segments)
    x = x.contiguous(memory_format=torch.channels_last)
    y, code, chunks = _pooled(x), _pooled(x, torch.uint8), _chunks_like(x, segments)
    twin = _twin_of(y)
    if x.numel() == 0:
        return y, twin, chunks.fill_(float("nan")), code
    sizes = _sizes(x, segments, plan)
    with torch.cuda.device_of(x):
        _forward[(plan.chunks * sizes[4], segments)](
            x, mean, var, weight, bias, y, twin, code, *chunks, *sizes, eps,
            BLOCK_U=plan.block_u, BLOCK_C=plan.block_c, num_warps=plan.warps,
        )  # fmt: skip
    return y, twin, chunks, code


@_bn_pool.register_fake
def _(x, mean, var, weight, bias, eps, segments):
    y = _pooled(x)
    return y, _twin_of(y), _chunks_like(x, segments), _pooled(x, torch.uint8)


@torch.library.custom_op("fastrecycle::bn_pool_backward", mutates_args=())
def _bn_pool_backward(
    dy: Tensor | None, dtwin: Tensor | None, dchunks: Tensor | None, x: Tensor, code: Tensor,
    chunks: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    segments = chunks.shape[1]
    plan = _plan(x, segments)
    x = x.contiguous(memory_format=torch.channels_last)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel() == 0:
        return dx
    if dy is None:  # one gradient of y alone is simply that
        dy, dtwin = dtwin, None
    dy, dtwin = (
        None if t is None else t.contiguous(memory_format=torch.channels_last) for t in (dy, dtwin)
    )
    dmoments = x if dchunks is None else dchunks.contiguous()
    sizes = _sizes(x, segments, plan)
    with torch.cuda.device_of(x):
        _backward[(plan.chunks * sizes[4], segments)](
            x if dy is None else dy, x if dtwin is None else dtwin, dmoments, x, code, chunks,
            mean, var, weight, bias, dx, *sizes, eps,
            DY=dy is not None, DTWIN=dtwin is not None, DMOMENTS=dchunks is not None,
            BLOCK_U=plan.block_u, BLOCK_C=plan.block_c, num_warps=plan.warps,
        )  # fmt: skip
    return dx


@_bn_pool_backward.register_fake
def _(dy, dtwin, dchunks, x, code, chunks, mean, var, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.channels_last)


def _setup(ctx, inputs, output):
    x, mean, var, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, output[3], output[2], mean, var, weight, bias)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, dtwin, dchunks, _):
    dx = None
    if any(t is not None for t in (dy, dtwin, dchunks)):
        dx = _bn_pool_backward(dy, dtwin, dchunks, *ctx.saved_tensors, ctx.eps)
    return dx, None, None, None, None, None, None


_bn_pool.register_autograd(_gradient, setup_context=_setup)


# ------------------------------------------------------------------ public functions


def bn_pool_chunks(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, segments: int
) -> tuple[Tensor, Tensor, Chunks]:
    """`bn_prior_chunks` with ReLU, and 3x3 max pooling with stride 2 and padding 1 of its y.

    Sides that are not even are right but slow: an image of them is one chunk.

    Args:
        x ... segments: as in `bn_prior`.

    Returns:
        y, pooled; its twin (see `bn_prior_chunks`); the moments of each chunk.

    Raises:
        ValueError: as `bn_prior`.

    """
    _check(x, mean, var, weight, bias)
    y, twin, moments, _ = _bn_pool(x, mean, var, weight, bias, eps, segments)
    rows = x.shape[0] // segments * x.shape[2] * x.shape[3]
    return y, twin, Chunks(moments, rows, _plan(x, segments).chunk_rows)

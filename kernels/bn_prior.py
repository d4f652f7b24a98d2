"""BatchNorm of the prior network with the moments of its input, one pass forward, one backward.

B images, C channels, G tasks of M = B H W / G consecutive rows: x in channels-last memory is a
(B H W, C) matrix. Statistics are stored, so y does not wait for the moments:

    y     = relu(x scale + shift + residual)     scale = weight / sqrt(var + eps), or 0 where var
                                                  is 0; shift = bias - mean scale
    mu    = mean of x,  sigma2 = mean of (x - mu)^2      of each task and channel

    dx    = keep dy scale + dmu / M + 2 dsigma2 (x - mu) / M,     dresidual = keep dy

Each program sums over a chunk of one task's rows, about the chunk's first row, so that numbers far
from 0 lose no digits; the chunks' moments are merged in a fixed order. `keep`, where the ReLU
passes: from x again, which the backward reads anyhow; with a residual from a bit each, 1/16 of the
bytes of the bf16 y that tells the same.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# ------------------------------------------------------------------ kernels


@triton.jit
def _affine(mean, var, weight, bias, c, inside, eps):
    """The BatchNorm of channels c as x scale + shift."""
    m = tl.load(mean + c, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(var + c, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    scale = tl.where(v > 0, w * tl.rsqrt(v + eps), 0.0)
    return scale, b - m * scale


@triton.jit
def _forward(
    x, residual, mean, var, weight, bias, y, twin, bits, chunk_mean, chunk_var,
    rows, channels, blocks, chunks, tiles, eps,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, WRITE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """One chunk of rows, BLOCK_C channels: y, the ReLU's bits, and the chunk's moments."""
    task = tl.program_id(1)
    chunk = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < channels
    if WRITE:
        scale, shift = _affine(mean, var, weight, bias, c, inside_c, eps)
        tl.store(twin, 0.0, mask=tl.program_id(0) + task == 0)

    first = chunk * tiles * BLOCK_R  # row within the task
    left = min(rows - first, tiles * BLOCK_R)
    row = task.to(tl.int64) * rows + first
    width = tl.cdiv(channels, 8)  # bytes of bits in a row
    about = tl.load(x + row * channels + c, mask=inside_c, other=0.0).to(tl.float32)

    r = tl.arange(0, BLOCK_R)
    at = r[:, None] * channels + c[None, :]
    total = tl.zeros((BLOCK_R // FOLD, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_R // FOLD, BLOCK_C), tl.float32)
    for tile in range(tiles):
        inside = ((tile * BLOCK_R + r) < left)[:, None] & inside_c[None, :]
        start = (row + tile * BLOCK_R) * channels
        raw = tl.load(x + start + at, mask=inside, other=0.0, eviction_policy="evict_first")
        value = raw.to(tl.float32)
        if WRITE:
            out = value * scale[None, :] + shift[None, :]
            if RESIDUAL:
                skip = tl.load(
                    residual + start + at, mask=inside, other=0.0, eviction_policy="evict_first"
                )
                out += skip.to(tl.float32)
            if RELU:
                if BITS:
                    # a NaN passes, as in PyTorch's gradient
                    keep = tl.where(out <= 0, 0, 1)
                    keep = tl.reshape(keep, (BLOCK_R, BLOCK_C // 8, 8))
                    octets = tl.sum(keep << tl.arange(0, 8)[None, None, :], axis=2)
                    o = (tl.program_id(0) % blocks) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
                    there = ((tile * BLOCK_R + r) < left)[:, None] & (o < width)[None, :]
                    place = (row + tile * BLOCK_R) * width + r[:, None] * width + o[None, :]
                    tl.store(bits + place, octets.to(tl.uint8), mask=there)
                out = tl.maximum(out, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(y + start + at, out.to(y.dtype.element_ty), mask=inside)
        apart = tl.where(inside, value - about[None, :], 0.0)
        # rows of one thread first: fewer registers for the sums
        apart = tl.reshape(apart, (FOLD, BLOCK_R // FOLD, BLOCK_C))
        total += tl.sum(apart, axis=0)
        square += tl.sum(apart * apart, axis=0)

    count = left.to(tl.float32)
    apart = tl.sum(total, axis=0) / count
    spread = tl.sum(square, axis=0) / count - apart * apart
    spread = tl.where(spread < 0, 0.0, spread)  # keeps NaN
    at = (task * chunks + chunk).to(tl.int64) * channels + c
    tl.store(chunk_mean + at, about + apart, mask=inside_c)
    tl.store(chunk_var + at, spread, mask=inside_c)


@triton.jit
def _merge(
    chunk_mean, chunk_var, mu, sigma2, rows, channels, chunks, chunk_rows,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Moments of a task from those of its chunks."""
    task = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < channels
    base = task.to(tl.int64) * chunks * channels
    about = tl.load(chunk_mean + base + c, mask=inside_c, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, chunks, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < chunks)[:, None] & inside_c[None, :]
        at = base + p[:, None] * channels + c[None, :]
        count = tl.minimum(rows - p * chunk_rows, chunk_rows).to(tl.float32)[:, None]
        apart = tl.load(chunk_mean + at, mask=inside, other=0.0) - about[None, :]
        spread = tl.load(chunk_var + at, mask=inside, other=0.0)
        total += tl.where(inside, count * apart, 0.0)
        square += tl.where(inside, count * (spread + apart * apart), 0.0)
    apart = tl.sum(total, axis=0) / rows
    spread = tl.sum(square, axis=0) / rows - apart * apart
    tl.store(mu + task * channels + c, about + apart, mask=inside_c)
    tl.store(sigma2 + task * channels + c, tl.where(spread < 0, 0.0, spread), mask=inside_c)


@triton.jit
def _backward(
    dy, dtwin, dmu, dsigma2, x, bits, mu, mean, var, weight, bias, dx, dresidual,
    dmu_task, dmu_chunk, dsigma2_task, dsigma2_chunk, mu_task, mu_chunk,
    rows, channels, blocks, tiles, eps,
    DY: tl.constexpr, DTWIN: tl.constexpr, DMU: tl.constexpr, DSIGMA2: tl.constexpr,
    RELU: tl.constexpr, BITS: tl.constexpr, DRESIDUAL: tl.constexpr, BY_CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One chunk of rows, BLOCK_C channels: dx = keep dy scale + level + slope (x - mu)."""
    task = tl.program_id(1)
    chunk = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < channels
    first = chunk * tiles * BLOCK_R
    left = min(rows - first, tiles * BLOCK_R)
    row = task.to(tl.int64) * rows + first
    width = tl.cdiv(channels, 8)
    count = (left if BY_CHUNK else rows).to(tl.float32)  # of the rows that share these moments
    if DY:
        scale, shift = _affine(mean, var, weight, bias, c, inside_c, eps)
    if DMU:
        at = task.to(tl.int64) * dmu_task + chunk.to(tl.int64) * dmu_chunk + c
        level = tl.load(dmu + at, mask=inside_c, other=0.0).to(tl.float32) / count
    if DSIGMA2:
        at = task.to(tl.int64) * dsigma2_task + chunk.to(tl.int64) * dsigma2_chunk + c
        slope = tl.load(dsigma2 + at, mask=inside_c, other=0.0).to(tl.float32) * (2 / count)
        at = task.to(tl.int64) * mu_task + chunk.to(tl.int64) * mu_chunk + c
        centre = tl.load(mu + at, mask=inside_c, other=0.0)

    r = tl.arange(0, BLOCK_R)
    at = r[:, None] * channels + c[None, :]
    for tile in range(tiles):
        inside = ((tile * BLOCK_R + r) < left)[:, None] & inside_c[None, :]
        start = (row + tile * BLOCK_R) * channels
        if DSIGMA2 or (DY and RELU and not BITS):
            value = tl.load(x + start + at, mask=inside, other=0.0, eviction_policy="evict_first")
            value = value.to(tl.float32)
        out = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if DY:
            flow = tl.load(dy + start + at, mask=inside, other=0.0, eviction_policy="evict_first")
            flow = flow.to(tl.float32)
            if DTWIN:
                twin = tl.load(
                    dtwin + start + at, mask=inside, other=0.0, eviction_policy="evict_first"
                )
                flow += twin.to(tl.float32)
            if RELU:
                if BITS:
                    o = (tl.program_id(0) % blocks) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
                    there = ((tile * BLOCK_R + r) < left)[:, None] & (o < width)[None, :]
                    place = (row + tile * BLOCK_R) * width + r[:, None] * width + o[None, :]
                    octets = tl.load(bits + place, mask=there, other=0).to(tl.int32)
                    keep = (octets[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
                    flow = tl.where(tl.reshape(keep, (BLOCK_R, BLOCK_C)) != 0, flow, 0.0)
                else:
                    flow = tl.where(value * scale[None, :] + shift[None, :] <= 0, 0.0, flow)
            if DRESIDUAL:
                tl.store(dresidual + start + at, flow.to(dresidual.dtype.element_ty), mask=inside)
            out += flow * scale[None, :]
        if DMU:
            out += level[None, :]
        if DSIGMA2:
            out += slope[None, :] * (value - centre[None, :])
        tl.store(dx + start + at, out.to(dx.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------ launches

PROGRAMS = 1056  # eight for each of Hopper's 132 multiprocessors; a constant: shapes hang on it


@dataclass(frozen=True)
class Launch:
    """How one shape is cut: `chunks` of `tiles` tiles of (block_r, block_c) numbers a task."""

    block_r: int
    block_c: int
    warps: int
    tiles: int
    chunks: int

    @property
    def chunk_rows(self) -> int:
        """Rows of every chunk but a task's last."""
        return self.tiles * self.block_r

    @property
    def fold(self) -> int:
        """Rows of a tile that one thread holds, in 16-byte pieces of bf16."""
        return max(1, self.block_r * self.block_c // (self.warps * 32 * 8))


def launch(rows: int, channels: int, segments: int, itemsize: int = 2) -> Launch:
    """The cut of `segments` tasks of `rows` rows: whole memory lines, and programs for the chip."""
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    strips = segments * triton.cdiv(channels, block_c)
    # four 16-byte loads in flight in each thread, two where the chip would not be full
    block_r = (128 if rows * strips >= 64 * PROGRAMS else 64) // itemsize
    tiles = max(1, triton.cdiv(rows, block_r))
    tiles = triton.cdiv(tiles, max(1, PROGRAMS // strips))
    return Launch(block_r, block_c, 4, tiles, max(1, triton.cdiv(rows, tiles * block_r)))


def _rows(x: Tensor, segments: int) -> int:
    return x.shape[0] // segments * x.shape[2] * x.shape[3]


def _plan(x: Tensor, segments: int) -> Launch:
    # int: a tracer with symbolic shapes settles on these, and spends no minutes on algebra
    return launch(int(_rows(x, segments)), int(x.shape[1]), segments, x.element_size())


def _channels_last(x: Tensor) -> Tensor:
    """X as it is where its memory is channels-last already; a copy otherwise."""
    return x.contiguous(memory_format=torch.channels_last)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _bits_like(x: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    """A bit for each number of x, (B, H, W, C / 8) bytes; none where x itself will tell."""
    b, c, h, w = x.shape
    needed = relu and residual is not None
    return x.new_empty((b, h, w, triton.cdiv(c, 8)) if needed else (0,), dtype=torch.uint8)


def _chunks_like(x: Tensor, segments: int) -> Tensor:
    shape = (2, segments, _plan(x, segments).chunks, x.shape[1])
    return x.new_empty(shape, dtype=torch.float32)


def _twin_of(y: Tensor) -> Tensor:
    """Y's shape over one number's memory, or nothing where y is empty."""
    return y.new_empty(1).expand(y.shape)


def _run_forward(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float,
    segments: int, relu: bool, residual: Tensor | None, output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Y, its twin, the bits, and the moments of chunks."""
    rows, channels = _rows(x, segments), x.shape[1]
    plan = _plan(x, segments)
    x = _channels_last(x)
    residual = None if residual is None else _channels_last(residual)
    y = _empty_like(x) if output else x.new_empty(0)
    twin = _twin_of(y)
    bits = _bits_like(x, relu and output, residual)
    chunks = _chunks_like(x, segments)
    if x.numel() == 0:
        return y, twin, bits, chunks.fill_(float("nan"))
    blocks = triton.cdiv(channels, plan.block_c)
    with torch.cuda.device_of(x):
        _forward[(plan.chunks * blocks, segments)](
            x, x if residual is None else residual, mean, var, weight, bias, y, twin, bits,
            *chunks, rows, channels, blocks, plan.chunks, plan.tiles, eps,
            RELU=relu, RESIDUAL=residual is not None, BITS=bits.numel() > 0, WRITE=output,
            BLOCK_R=plan.block_r, BLOCK_C=plan.block_c, FOLD=plan.fold, num_warps=plan.warps,
        )  # fmt: skip
    return y, twin, bits, chunks


def _run_merge(chunks: Tensor, rows: int, chunk_rows: int) -> tuple[Tensor, Tensor]:
    """Chunks (2, G, P, C) -> mean and variance of each task, (G, C)."""
    _, segments, count, channels = chunks.shape
    mu, sigma2 = (chunks.new_empty(segments, channels) for _ in range(2))
    block_c = 16
    block_p = min(128, triton.next_power_of_2(count))
    with torch.cuda.device_of(chunks):
        _merge[(triton.cdiv(channels, block_c), segments)](
            chunks[0], chunks[1], mu, sigma2, rows, channels, count, chunk_rows,
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return mu, sigma2


def _run_backward(
    dy: Tensor | None, dtwin: Tensor | None, dmu: Tensor | None, dsigma2: Tensor | None,
    x: Tensor, bits: Tensor, mu: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
    eps: float, relu: bool, skip: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dx, and with `skip` dresidual. Mu and its gradients: (G, C), or chunks' (G, P, C)."""
    channels, segments = x.shape[1], mu.shape[0]
    rows = _rows(x, segments)
    plan = _plan(x, segments)
    x = _channels_last(x)
    dx = _empty_like(x)
    dresidual = _empty_like(x) if skip else x.new_empty(0)
    if x.numel() == 0:
        return dx, dresidual
    if dy is None:  # one gradient of y alone is simply that
        dy, dtwin = dtwin, None
    flows = [None if t is None else _channels_last(t) for t in (dy, dtwin)]
    moments = [None if t is None else _by_chunk(t, plan) for t in (dmu, dsigma2, mu)]
    strides = [s for t in moments for s in ((0, 0) if t is None else t.stride()[:2])]
    blocks = triton.cdiv(channels, plan.block_c)
    with torch.cuda.device_of(x):
        _backward[(plan.chunks * blocks, segments)](
            *(x if t is None else t for t in (*flows, *moments[:2])), x, bits, moments[2],
            mean, var, weight, bias, dx, dresidual, *strides,
            rows, channels, blocks, plan.tiles, eps,
            DY=dy is not None, DTWIN=dtwin is not None, DMU=dmu is not None,
            DSIGMA2=dsigma2 is not None, RELU=relu, BITS=bits.numel() > 0, DRESIDUAL=skip,
            BY_CHUNK=mu.ndim == 3, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c,
            num_warps=plan.warps,
        )  # fmt: skip
    return dx, dresidual


def _by_chunk(t: Tensor, plan: Launch) -> Tensor:
    """(G, P, C) with channels in a row; a task's numbers serve each of its chunks."""
    t = t if t.stride(-1) == 1 else t.contiguous()
    return t if t.ndim == 3 else t[:, None].expand(-1, plan.chunks, -1)


# ------------------------------------------------------------------ operations


@torch.library.custom_op("fastrecycle::bn_prior", mutates_args=())
def _bn_prior(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float,
    segments: int, relu: bool, residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, _, bits, chunks = _run_forward(
        x, mean, var, weight, bias, eps, segments, relu, residual, output=True
    )
    mu, sigma2 = _run_merge(chunks, _rows(x, segments), _plan(x, segments).chunk_rows)
    return y, mu, sigma2, bits


@_bn_prior.register_fake
def _(x, mean, var, weight, bias, eps, segments, relu, residual):
    mu, sigma2 = (x.new_empty((segments, x.shape[1]), dtype=torch.float32) for _ in range(2))
    return _empty_like(x), mu, sigma2, _bits_like(x, relu, residual)


@torch.library.custom_op("fastrecycle::bn_prior_chunks", mutates_args=())
def _bn_prior_chunks(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float,
    segments: int, relu: bool, residual: Tensor | None, twin: Tensor | None, output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, twin_of_y, bits, chunks = _run_forward(
        x, mean, var, weight, bias, eps, segments, relu, residual, output
    )
    return y, twin_of_y, chunks, bits


@_bn_prior_chunks.register_fake
def _(x, mean, var, weight, bias, eps, segments, relu, residual, twin, output):
    y = _empty_like(x) if output else x.new_empty(0)
    bits = _bits_like(x, relu and output, residual)
    return y, _twin_of(y), _chunks_like(x, segments), bits


@torch.library.custom_op("fastrecycle::bn_prior_backward", mutates_args=())
def _bn_prior_backward(
    dy: Tensor | None, dtwin: Tensor | None, dmu: Tensor | None, dsigma2: Tensor | None,
    x: Tensor, bits: Tensor, mu: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
    eps: float, relu: bool, skip: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _run_backward(
        dy, dtwin, dmu, dsigma2, x, bits, mu, mean, var, weight, bias, eps, relu, skip
    )


@_bn_prior_backward.register_fake
def _(dy, dtwin, dmu, dsigma2, x, bits, mu, mean, var, weight, bias, eps, relu, skip):
    return _empty_like(x), _empty_like(x) if skip else x.new_empty(0)


def _gradients(ctx, dy, dtwin, dmu, dsigma2, mu, skip):
    """(dx, dresidual) as far as they are wanted; a gradient that is None costs no traffic."""
    x, bits, mean, var, weight, bias = ctx.saved_tensors[:6]
    flows = dy is not None or dtwin is not None
    if not flows and dmu is None and dsigma2 is None:
        return None, None
    dx, dresidual = _bn_prior_backward(
        dy, dtwin, dmu, dsigma2, x, bits, mu, mean, var, weight, bias, ctx.eps, ctx.relu,
        skip and flows and ctx.relu,
    )  # fmt: skip
    if not (skip and flows):
        return dx, None
    if ctx.relu:
        return dx, dresidual
    return dx, dtwin if dy is None else dy if dtwin is None else dy + dtwin


def _setup_bn_prior(ctx, inputs, output):
    x, mean, var, weight, bias, ctx.eps, _, ctx.relu, _ = inputs
    ctx.save_for_backward(x, output[3], mean, var, weight, bias, output[1])
    ctx.set_materialize_grads(False)


def _backward_bn_prior(ctx, dy, dmu, dsigma2, _):
    mu = ctx.saved_tensors[6]
    dx, dresidual = _gradients(ctx, dy, None, dmu, dsigma2, mu, ctx.needs_input_grad[8])
    return dx, None, None, None, None, None, None, None, dresidual


_bn_prior.register_autograd(_backward_bn_prior, setup_context=_setup_bn_prior)


def _setup_bn_prior_chunks(ctx, inputs, output):
    x, mean, var, weight, bias, ctx.eps, _, ctx.relu, _, _, ctx.output = inputs
    ctx.save_for_backward(x, output[3], mean, var, weight, bias, output[2])
    ctx.set_materialize_grads(False)


def _backward_bn_prior_chunks(ctx, dy, dtwin, dchunks, _):
    dmu, dsigma2 = (None, None) if dchunks is None else dchunks.unbind()
    if not ctx.output:  # y is empty, and so is a gradient for it
        dy = dtwin = None
    mu = ctx.saved_tensors[6][0]
    wanted = ctx.needs_input_grad[8:10]
    dx, dresidual = _gradients(ctx, dy, dtwin, dmu, dsigma2, mu, any(wanted))
    skips = (dresidual if needed else None for needed in wanted)
    return dx, None, None, None, None, None, None, None, *skips, None


_bn_prior_chunks.register_autograd(_backward_bn_prior_chunks, setup_context=_setup_bn_prior_chunks)


# ------------------------------------------------------------------ public functions


def bn_prior(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    segments: int,
    relu: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.bn_prior` as one kernel and the merging of its chunks.

    x and residual in another memory than channels-last are copied into it first; y is
    channels-last. The stored statistics are constants.

    Raises:
        ValueError: a stored statistic asks for a gradient, or x is float64 or an integer.

    """
    _check(x, mean, var, weight, bias)
    return _bn_prior(x, mean, var, weight, bias, eps, segments, relu, residual)[:3]


class Chunks(NamedTuple):
    """Moments of one BatchNorm's input, of each chunk of its rows."""

    moments: Tensor  # (2, G, P, C) float32: mean, biased variance
    rows: int  # of each task
    chunk_rows: int  # of each chunk but a task's last


def bn_prior_chunks(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    segments: int,
    relu: bool,
    residual: Tensor | None,
    twin: Tensor | None = None,
    output: bool = True,
) -> tuple[Tensor, Tensor, Chunks]:
    """`bn_prior` for a whole network: moments stay in chunks until all layers are merged at once.

    A y that is used twice, by the next convolution and as a later residual, costs autograd a sum
    of two gradients the size of y. Its twin takes over the second use: it has y's shape but no
    memory, and only carries the gradient, which the backward adds as it reads:

        y, twin, chunks = bn_prior_chunks(...)
        ... = bn_prior_chunks(..., residual=y, twin=twin)

    Args:
        x ... residual: as in `bn_prior`.
        twin: of the residual, to take its gradient; None to give it to the residual itself.
        output: False where nobody reads y: only the moments are computed, y and twin are empty.

    Returns:
        y; its twin; the moments of each chunk, for `moment_distance`.

    Raises:
        ValueError: as `bn_prior`.

    """
    _check(x, mean, var, weight, bias)
    if twin is not None and residual is not None:
        residual = residual.detach()
    y, stand_in, moments, _ = _bn_prior_chunks(
        x, mean, var, weight, bias, eps, segments, relu, residual, twin, output
    )
    chunks = Chunks(moments, _rows(x, segments), _plan(x, segments).chunk_rows)
    return y, stand_in, chunks


def _check(x: Tensor, *stored: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"bn_prior: expected x in float32, bfloat16 or float16, got {x.dtype}; the reference"
            " backend takes any"
        )
    if any(s.requires_grad for s in stored):
        raise ValueError(
            "bn_prior: stored statistics are constants, got one that requires a gradient; detach"
            " it or use the reference backend"
        )


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, twin: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def carry(y: Tensor, twin: Tensor) -> Tensor:
    """Y, whose gradient goes to its twin: for a second convolution of y beside the first."""
    return _Carry.apply(y.detach(), twin)

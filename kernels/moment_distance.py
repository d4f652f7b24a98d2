"""R_BN (LoRA Recycle, Eq. 2) of all BatchNorms of a network at once.

G tasks, L layers, layer l with C channels and, of each task, M rows in P chunks:

    mu     = sum_p n_p mu_p / M
    sigma2 = sum_p n_p (sigma2_p + (mu_p - mu)^2) / M       n_p rows in chunk p
    R      = sum_l factor_l (||mu - mean||_2 + ||sigma2 - var||_2),  factor_0 = first_bn, others 1

    dmu_p     = n_p / M (u + 2 v (mu_p - mu))               u = dR factor_l (mu - mean) / ||.||
    dsigma2_p = n_p / M v                                   v = dR factor_l (sigma2 - var) / ||.||

One launch for some 50 layers of a few hundred numbers each, where a launch a layer would cost more
than the sums. Where a layer's numbers lie is known at compile time: no table to copy to the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastrecycle_kernels.bn_prior import Chunks
from torch import Tensor

BLOCK_C = 16  # channels of a program
BLOCK_P = 128  # chunks it reads at a time

# ------------------------------------------------------------------ kernels


@triton.jit
def _layer_of(program, LAYERS: tl.constexpr):
    """The numbers of the layer to which this program belongs, and its place in that layer."""
    index = 0
    first = 0
    place = 0
    start = 0
    channels = 0
    chunks = 0
    chunk_rows = 0
    rows = 0
    for i in tl.static_range(len(LAYERS)):
        here = program >= LAYERS[i][0]
        index = tl.where(here, i, index)
        first = tl.where(here, LAYERS[i][0], first)
        place = tl.where(here, LAYERS[i][1], place)
        start = tl.where(here, LAYERS[i][2], start)
        channels = tl.where(here, LAYERS[i][3], channels)
        chunks = tl.where(here, LAYERS[i][4], chunks)
        chunk_rows = tl.where(here, LAYERS[i][5], chunk_rows)
        rows = tl.where(here, LAYERS[i][6], rows)
    return index, program - first, place, start, channels, chunks, chunk_rows, rows


@triton.jit
def _merge(
    moments, mean, var, mu, sigma2, squares, width,
    LAYERS: tl.constexpr, MOST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one layer: their moments, and this block's share of both norms."""
    task, tasks = tl.program_id(1), tl.num_programs(1)
    index, block, place, start, channels, chunks, chunk_rows, rows = _layer_of(
        tl.program_id(0), LAYERS
    )
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < channels
    mean_p = moments + place + task * chunks * channels
    var_p = mean_p + tasks * chunks * channels
    about = tl.load(mean_p + c, mask=inside_c, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for begin in range(0, chunks, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        inside = (p < chunks)[:, None] & inside_c[None, :]
        at = p[:, None] * channels + c[None, :]
        count = tl.minimum(rows - p * chunk_rows, chunk_rows).to(tl.float32)[:, None]
        apart = tl.load(mean_p + at, mask=inside, other=0.0) - about[None, :]
        spread = tl.load(var_p + at, mask=inside, other=0.0)
        total += tl.where(inside, count * apart, 0.0)
        square += tl.where(inside, count * (spread + apart * apart), 0.0)
    apart = tl.sum(total, axis=0) / rows
    spread = tl.sum(square, axis=0) / rows - apart * apart
    spread = tl.where(spread < 0, 0.0, spread)  # keeps NaN
    average = about + apart
    tl.store(mu + task * width + start + c, average, mask=inside_c)
    tl.store(sigma2 + task * width + start + c, spread, mask=inside_c)
    off = tl.where(inside_c, average - tl.load(mean + start + c, mask=inside_c, other=0.0), 0.0)
    at = ((task * 2) * len(LAYERS) + index) * MOST + block
    tl.store(squares + at, tl.sum(off * off, axis=0))
    off = tl.where(inside_c, spread - tl.load(var + start + c, mask=inside_c, other=0.0), 0.0)
    tl.store(squares + at + len(LAYERS) * MOST, tl.sum(off * off, axis=0))


@triton.jit
def _norms(
    squares, norms, distance, first_bn,
    LAYERS: tl.constexpr, MOST: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One task: both norms of each layer, and their sum."""
    task = tl.program_id(0)
    layer = tl.arange(0, BLOCK_L)
    block = tl.arange(0, BLOCK_B)
    channels = tl.zeros((BLOCK_L,), tl.int32)
    for i in tl.static_range(len(LAYERS)):
        channels = tl.where(layer == i, LAYERS[i][3], channels)
    inside = block[None, :] * BLOCK_C < channels[:, None]
    factor = tl.where(layer == 0, first_bn, 1.0)
    total = tl.zeros((BLOCK_L,), tl.float32)
    for which in tl.static_range(2):
        base = (task * 2 + which) * len(LAYERS)
        at = (base + layer[:, None]) * MOST + block[None, :]
        norm = tl.sqrt_rn(tl.sum(tl.load(squares + at, mask=inside, other=0.0), axis=1))
        tl.store(norms + base + layer, norm, mask=layer < len(LAYERS))
        total += factor * norm
    tl.store(distance + task, tl.sum(total, axis=0))


@triton.jit
def _spread(
    ddistance, ddistance_task, moments, mean, var, mu, sigma2, norms, dmoments, first_bn, width,
    LAYERS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one layer: the gradients of their chunks' moments."""
    task, tasks = tl.program_id(1), tl.num_programs(1)
    index, block, place, start, channels, chunks, chunk_rows, rows = _layer_of(
        tl.program_id(0), LAYERS
    )
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < channels
    flow = tl.load(ddistance + task * ddistance_task) * tl.where(index == 0, first_bn, 1.0) / rows
    average = tl.load(mu + task * width + start + c, mask=inside_c, other=0.0)
    u = average - tl.load(mean + start + c, mask=inside_c, other=0.0)
    v = tl.load(sigma2 + task * width + start + c, mask=inside_c, other=0.0)
    v -= tl.load(var + start + c, mask=inside_c, other=0.0)
    norm = tl.load(norms + task * 2 * len(LAYERS) + index)
    u *= flow / tl.where(norm == 0, 1.0, norm)  # a norm of 0: u is 0, and so its gradient
    norm = tl.load(norms + (task * 2 + 1) * len(LAYERS) + index)
    v *= flow / tl.where(norm == 0, 1.0, norm)
    place += task * chunks * channels
    other = place + tasks * chunks * channels
    for begin in range(0, chunks, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        inside = (p < chunks)[:, None] & inside_c[None, :]
        at = p[:, None] * channels + c[None, :]
        count = tl.minimum(rows - p * chunk_rows, chunk_rows).to(tl.float32)[:, None]
        apart = tl.load(moments + place + at, mask=inside, other=0.0) - average[None, :]
        tl.store(dmoments + place + at, count * (u[None, :] + 2 * v[None, :] * apart), mask=inside)
        tl.store(dmoments + other + at, count * v[None, :], mask=inside)


# ------------------------------------------------------------------ launches


class _Layer(NamedTuple):
    """Where a layer's numbers lie; the kernels read it by position."""

    program: int  # its first
    place: int  # in the row of all moments
    start: int  # its first channel among all layers'
    channels: int
    chunks: int
    chunk_rows: int
    rows: int


def _layers(shapes: list[int], segments: int) -> tuple[tuple[_Layer, ...], int, int]:
    """Layers, programs and numbers in all, from (C, P, chunk_rows, M) of each layer in a row."""
    layers, program, place, start = [], 0, 0, 0
    for i in range(0, len(shapes), 4):
        channels, chunks, chunk_rows, rows = shapes[i : i + 4]
        layers.append(_Layer(program, place, start, channels, chunks, chunk_rows, rows))
        program += triton.cdiv(channels, BLOCK_C)
        place += 2 * segments * chunks * channels
        start += channels
    return tuple(layers), program, place


def _blocks(layers: Sequence[_Layer]) -> int:
    return max(triton.cdiv(layer.channels, BLOCK_C) for layer in layers)


# ------------------------------------------------------------------ operations


@torch.library.custom_op("fastrecycle::moment_distance", mutates_args=())
def _moment_distance(
    chunks: list[Tensor], shapes: list[int], mean: Tensor, var: Tensor, first_bn: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    segments = chunks[0].shape[1]
    layers, programs, _ = _layers(shapes, segments)
    most = _blocks(layers)
    moments = torch.cat([c.reshape(-1) for c in chunks])
    mu, sigma2 = (mean.new_empty(segments, len(mean)) for _ in range(2))
    squares = mean.new_empty(segments, 2, len(layers), most)
    norms = mean.new_empty(segments, 2, len(layers))
    distance = mean.new_empty(segments)
    with torch.cuda.device_of(mean):
        _merge[(programs, segments)](
            moments, mean, var, mu, sigma2, squares, len(mean),
            LAYERS=layers, MOST=most, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
        _norms[(segments,)](
            squares, norms, distance, first_bn,
            LAYERS=layers, MOST=most, BLOCK_L=triton.next_power_of_2(len(layers)),
            BLOCK_B=triton.next_power_of_2(most), BLOCK_C=BLOCK_C, num_warps=8,
        )  # fmt: skip
    return distance, moments, mu, sigma2, norms


@_moment_distance.register_fake
def _(chunks, shapes, mean, var, first_bn):
    segments, layers = chunks[0].shape[1], len(chunks)
    moments = mean.new_empty(sum(c.numel() for c in chunks))
    mu, sigma2 = (mean.new_empty(segments, len(mean)) for _ in range(2))
    return mean.new_empty(segments), moments, mu, sigma2, mean.new_empty(segments, 2, layers)


@torch.library.custom_op("fastrecycle::moment_distance_backward", mutates_args=())
def _moment_distance_backward(
    ddistance: Tensor, moments: Tensor, shapes: list[int], mean: Tensor, var: Tensor, mu: Tensor,
    sigma2: Tensor, norms: Tensor, first_bn: float,
) -> Tensor:  # fmt: skip
    segments = len(ddistance)
    layers, programs, _ = _layers(shapes, segments)
    dmoments = torch.empty_like(moments)
    with torch.cuda.device_of(mean):
        _spread[(programs, segments)](
            ddistance, ddistance.stride(0), moments, mean, var, mu, sigma2, norms, dmoments,
            first_bn, len(mean), LAYERS=layers, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return dmoments


@_moment_distance_backward.register_fake
def _(ddistance, moments, shapes, mean, var, mu, sigma2, norms, first_bn):
    return torch.empty_like(moments)


def _setup_context(ctx, inputs, output):
    chunks, ctx.shapes, mean, var, ctx.first_bn = inputs
    ctx.chunks = [c.shape for c in chunks]
    ctx.save_for_backward(mean, var, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, ddistance, *_):
    if ddistance is None:
        return [None] * len(ctx.chunks), None, None, None, None
    mean, var, moments, mu, sigma2, norms = ctx.saved_tensors
    dmoments = _moment_distance_backward(
        ddistance, moments, ctx.shapes, mean, var, mu, sigma2, norms, ctx.first_bn
    )
    parts = dmoments.split([shape.numel() for shape in ctx.chunks])
    gradients = [part.view(shape) for part, shape in zip(parts, ctx.chunks, strict=True)]
    return gradients, None, None, None, None


_moment_distance.register_autograd(_backward, setup_context=_setup_context)


def moment_distance(
    layers: Sequence[Chunks], mean: Tensor, var: Tensor, first_bn: float = 1.0
) -> Tensor:
    """`reference.moment_distance` of moments still in chunks.

    Args:
        layers: of each BatchNorm, from `bn_prior_chunks`.
        mean, var: (channels of all layers,) float32, the stored statistics one after the other.
        first_bn: factor of the first layer.

    Returns:
        (G,) float32.

    Raises:
        ValueError: stored statistics of another length.

    """
    channels = sum(layer.moments.shape[3] for layer in layers)
    if mean.shape != (channels,) or var.shape != (channels,):
        raise ValueError(
            f"moment_distance: mean and var must have shape ({channels},),"
            f" got {tuple(mean.shape)} and {tuple(var.shape)}"
        )
    shapes = []
    for moments, rows, chunk_rows in layers:
        shapes += [moments.shape[3], moments.shape[2], chunk_rows, rows]
    chunks = [layer.moments for layer in layers]
    return _moment_distance(chunks, shapes, mean, var, first_bn)[0]

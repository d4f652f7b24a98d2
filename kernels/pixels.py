"""Pixels of an inversion's iteration: to the networks by a roll and a flip, and back by Adam.

G tasks, m images of each, S side; task g is rolled by shift[g], then mirrored if flip[g]:

    jitter_pixels   seen[r, c]     = x[(r - shift_0) mod S, (c' - shift_1) mod S],
                                     c' = S - 1 - c where mirrored, c elsewhere
                    natural        = (seen std + mean - prior_mean) / prior_std
                                   = seen factor + offset,   factor = std / prior_std
    pixel_step      g[i, j]        = d_seen[r, c] + factor d_natural[r, c],
                                     r = (i + shift_0) mod S, c' = (j + shift_1) mod S
                    m              = beta_1 m + (1 - beta_1) g
                    v              = beta_2 v + (1 - beta_2) g^2
                    x              = clamp(x - lr m^ / (sqrt(v^) + eps)),
                                     m^ = m / (1 - beta_1^t), v^ = v / (1 - beta_2^t)

A program takes BLOCK pixels of one channel of one image. It writes in order and reads what is
rolled: neighbours still are, but for the edge of the roll. The step's powers of beta, in float64,
and its counter are the business of a program that runs before all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK, WARPS = 1024, 4  # of jitter_pixels
STEP_BLOCK, STEP_WARPS = 1024, 4  # of pixel_step

# ------------------------------------------------------------------ kernels


@triton.jit
def _of_channel(channel, v0, v1, v2):
    return tl.where(channel == 0, v0, tl.where(channel == 1, v1, v2))


@triton.jit
def _turn(shift, SIDE: tl.constexpr):
    """A shift of any sign and size in [0, SIDE), whatever sign a remainder has."""
    return ((tl.load(shift) % SIDE + SIDE) % SIDE).to(tl.int32)


@triton.jit
def _jitter(
    images, shift, flip, seen, natural, per_task,
    factor_0, factor_1, factor_2, offset_0, offset_1, offset_2,
    NATURAL: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (SIDE * SIDE + BLOCK - 1) // BLOCK
    plane = (tl.program_id(0) // blocks).to(tl.int64)  # image and channel
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIDE * SIDE
    task = plane // 3 // per_task
    row = pixel // SIDE - _turn(shift + 2 * task, SIDE)
    column = pixel % SIDE
    column = tl.where(tl.load(flip + task) != 0, SIDE - 1 - column, column)
    column -= _turn(shift + 2 * task + 1, SIDE)
    source = tl.where(row < 0, row + SIDE, row) * SIDE + tl.where(column < 0, column + SIDE, column)
    begin = plane * (SIDE * SIDE)
    x = tl.load(images + begin + source, mask=inside)
    tl.store(seen + begin + pixel, x.to(seen.dtype.element_ty), mask=inside)
    if NATURAL:
        channel = plane % 3
        factor = _of_channel(channel, factor_0, factor_1, factor_2)
        out = x * factor + _of_channel(channel, offset_0, offset_1, offset_2)
        tl.store(natural + begin + pixel, out.to(natural.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    d_seen, d_natural, shift, flip, plane, pixel, inside, per_task, factor,
    SEEN: tl.constexpr, NATURAL: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Of these pixels, float32. SEEN, NATURAL: strides of channels and pixels; (0, 0) for none."""
    image, channel = plane // 3, plane % 3
    task = image // per_task
    row = pixel // SIDE + _turn(shift + 2 * task, SIDE)
    column = pixel % SIDE + _turn(shift + 2 * task + 1, SIDE)
    row = tl.where(row >= SIDE, row - SIDE, row)
    column = tl.where(column >= SIDE, column - SIDE, column)
    column = tl.where(tl.load(flip + task) != 0, SIDE - 1 - column, column)
    there = row * SIDE + column
    begin = image * (3 * SIDE * SIDE)
    total = tl.zeros(pixel.shape, tl.float32)
    if SEEN[1] > 0:
        at = d_seen + begin + channel * SEEN[0] + there * SEEN[1]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if NATURAL[1] > 0:
        at = d_natural + begin + channel * NATURAL[0] + there * NATURAL[1]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32) * factor
    return total


@triton.jit
def _jitter_backward(
    d_seen, d_natural, shift, flip, d_images, per_task, factor_0, factor_1, factor_2,
    SEEN: tl.constexpr, NATURAL: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (SIDE * SIDE + BLOCK - 1) // BLOCK
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIDE * SIDE
    factor = _of_channel(plane % 3, factor_0, factor_1, factor_2)
    g = _gradient(
        d_seen, d_natural, shift, flip, plane, pixel, inside, per_task, factor, SEEN, NATURAL, SIDE
    )
    tl.store(d_images + plane * (SIDE * SIDE) + pixel, g, mask=inside)


@triton.jit
def _advance(step, lr, rates, BETA_1: tl.constexpr, BETA_2: tl.constexpr):
    """One more step; lr / (1 - beta_1^t) and 1 / sqrt(1 - beta_2^t)."""
    t = tl.load(step) + 1
    tl.store(step, t)
    left = t.to(tl.int32)
    square_1 = tl.full((), BETA_1, tl.float64)
    square_2 = tl.full((), BETA_2, tl.float64)
    power_1 = tl.full((), 1.0, tl.float64)
    power_2 = tl.full((), 1.0, tl.float64)
    while left > 0:
        odd = left % 2 == 1
        power_1 = tl.where(odd, power_1 * square_1, power_1)
        power_2 = tl.where(odd, power_2 * square_2, power_2)
        square_1 *= square_1
        square_2 *= square_2
        left = left // 2
    tl.store(rates, (tl.load(lr).to(tl.float64) / (1 - power_1)).to(tl.float32))
    tl.store(rates + 1, (1 / tl.sqrt(1 - power_2)).to(tl.float32))


@triton.jit
def _step(
    images, exp_avg, exp_avg_sq, rates, d_seen, d_natural, shift, flip, per_task,
    beta_1, rest_1, beta_2, rest_2, eps, factor_0, factor_1, factor_2,
    low_0, low_1, low_2, high_0, high_1, high_2,
    SEEN: tl.constexpr, NATURAL: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (SIDE * SIDE + BLOCK - 1) // BLOCK
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIDE * SIDE
    channel = plane % 3
    at = plane * (SIDE * SIDE) + pixel
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    x = tl.load(images + at, mask=inside, other=0.0)
    factor = _of_channel(channel, factor_0, factor_1, factor_2)
    g = _gradient(
        d_seen, d_natural, shift, flip, plane, pixel, inside, per_task, factor, SEEN, NATURAL, SIDE
    )
    m = beta_1 * m + rest_1 * g
    v = beta_2 * v + rest_2 * g * g
    x -= tl.load(rates) * tl.div_rn(m, tl.sqrt_rn(v) * tl.load(rates + 1) + eps)
    low = _of_channel(channel, low_0, low_1, low_2)
    high = _of_channel(channel, high_0, high_1, high_2)
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(images + at, x, mask=inside)


# ------------------------------------------------------------------ launchers


def _planes(images: Tensor) -> int:
    return images.shape[0] * images.shape[1] * 3


def _grid(images: Tensor, block: int) -> tuple[int]:
    return (_planes(images) * triton.cdiv(images.shape[-1] ** 2, block),)


def _factors(std: Sequence[float], prior_std: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(std, prior_std, strict=True)]


def _read(gradient: Tensor | None, side: int) -> tuple[Tensor | None, tuple[int, int]]:
    """A gradient as the kernels read it, with the strides of its channels and of its pixels."""
    if gradient is None:
        return None, (0, 0)
    images = gradient.reshape(-1, 3, side, side)
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        return images, (1, 3)
    return images.contiguous(), (side * side, 1)


def _run_jitter(
    images: Tensor, shift: Tensor, flip: Tensor, factor: list[float], offset: list[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tasks, per_task, _, side, _ = images.shape
    seen = torch.empty(images.shape, dtype=dtype, device=images.device)
    natural = seen.new_empty((tasks * per_task if factor else 0, 3, side, side))
    if images.numel():
        block = min(BLOCK, triton.next_power_of_2(side * side))
        _jitter[_grid(images, block)](
            images.contiguous(), shift.contiguous(), flip.contiguous(), seen, natural, per_task,
            *(factor or [1.0] * 3), *(offset or [0.0] * 3),
            NATURAL=bool(factor), SIDE=side, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return seen, natural


def _run_backward(
    d_seen: Tensor | None, d_natural: Tensor | None, shift: Tensor, flip: Tensor,
    factor: list[float], d_images: Tensor,
) -> Tensor:  # fmt: skip
    side = d_images.shape[-1]
    d_seen, seen = _read(d_seen, side)
    d_natural, natural = _read(d_natural, side)
    if d_images.numel():
        block = min(BLOCK, triton.next_power_of_2(side * side))
        _jitter_backward[_grid(d_images, block)](
            d_images if d_seen is None else d_seen, d_images if d_natural is None else d_natural,
            shift.contiguous(), flip.contiguous(), d_images, d_images.shape[1],
            *(factor or [1.0] * 3),
            SEEN=seen, NATURAL=natural, SIDE=side, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return d_images


def _run_step(
    images: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, d_seen: Tensor,
    d_natural: Tensor | None, shift: Tensor, flip: Tensor, lr: Tensor, betas: Sequence[float],
    eps: float, low: Sequence[float], high: Sequence[float], factor: Sequence[float],
) -> None:  # fmt: skip
    side = images.shape[-1]
    seen_read, seen = _read(d_seen, side)
    natural_read, natural = _read(d_natural, side)
    rates = images.new_empty(2)
    _advance[(1,)](step, lr, rates, BETA_1=betas[0], BETA_2=betas[1], num_warps=1)
    if images.numel() == 0:
        return
    block = min(STEP_BLOCK, triton.next_power_of_2(side * side))
    _step[_grid(images, block)](
        images, exp_avg, exp_avg_sq, rates, seen_read,
        seen_read if natural_read is None else natural_read, shift.contiguous(), flip.contiguous(),
        images.shape[1], betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps, *factor, *low, *high,
        SEEN=seen, NATURAL=natural, SIDE=side, BLOCK=block, num_warps=STEP_WARPS,
    )  # fmt: skip


# ------------------------------------------------------------------ operators


@torch.library.custom_op("fastrecycle::jitter_pixels", mutates_args=())
def _jitter_pixels(
    images: Tensor, shift: Tensor, flip: Tensor, factor: list[float], offset: list[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Without factors there is no second result: its batch is empty."""
    with torch.cuda.device_of(images):
        return _run_jitter(images, shift, flip, factor, offset, dtype)


@_jitter_pixels.register_fake
def _(images, shift, flip, factor, offset, dtype):
    count = images.shape[0] * images.shape[1] if factor else 0
    seen = torch.empty(images.shape, dtype=dtype, device=images.device)
    return seen, seen.new_empty((count, *images.shape[2:]))


@torch.library.custom_op("fastrecycle::jitter_pixels_backward", mutates_args=())
def _jitter_pixels_backward(
    d_seen: Tensor | None, d_natural: Tensor | None, shift: Tensor, flip: Tensor,
    factor: list[float], shape: list[int],
) -> Tensor:  # fmt: skip
    d_images = torch.empty(shape, dtype=torch.float32, device=shift.device)
    with torch.cuda.device_of(shift):
        return _run_backward(d_seen, d_natural, shift, flip, factor, d_images)


@_jitter_pixels_backward.register_fake
def _(d_seen, d_natural, shift, flip, factor, shape):
    return torch.empty(shape, dtype=torch.float32, device=shift.device)


def _setup(ctx, inputs, output):
    images, shift, flip, ctx.factor, _, _ = inputs
    ctx.save_for_backward(shift, flip)
    ctx.shape = list(images.shape)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_seen, d_natural):
    shift, flip = ctx.saved_tensors
    d_natural = d_natural if ctx.factor else None
    d_images = None
    if d_seen is not None or d_natural is not None:
        d_images = _jitter_pixels_backward(d_seen, d_natural, shift, flip, ctx.factor, ctx.shape)
    return d_images, None, None, None, None, None


_jitter_pixels.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    "fastrecycle::pixel_step", mutates_args=("images", "exp_avg", "exp_avg_sq", "step")
)
def _pixel_step(
    images: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, d_seen: Tensor,
    d_natural: Tensor | None, shift: Tensor, flip: Tensor, lr: Tensor, betas: list[float],
    eps: float, low: list[float], high: list[float], factor: list[float],
) -> None:  # fmt: skip
    with torch.cuda.device_of(images):
        _run_step(
            images, exp_avg, exp_avg_sq, step, d_seen, d_natural, shift, flip, lr, betas, eps, low,
            high, factor,
        )  # fmt: skip


# ------------------------------------------------------------------ functions


def _check(who: str, images: Tensor, shift: Tensor, flip: Tensor) -> None:
    if (
        images.dtype != torch.float32
        or images.ndim != 5
        or images.shape[2] != 3
        or (images.shape[3] != images.shape[4])
    ):
        raise ValueError(
            f"{who}: images must be float32 of shape (G, m, 3, S, S), got {images.dtype} of"
            f" {tuple(images.shape)}"
        )
    tasks = len(images)
    if shift.shape != (tasks, 2) or shift.dtype != torch.int64:
        raise ValueError(
            f"{who}: shift must be ({tasks}, 2) int64, got {tuple(shift.shape)} {shift.dtype}"
        )
    if flip.shape != (tasks,) or flip.dtype != torch.bool:
        raise ValueError(
            f"{who}: flip must be ({tasks},) bool, got {tuple(flip.shape)} {flip.dtype}"
        )


def jitter_pixels(
    images: Tensor,
    shift: Tensor,
    flip: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    prior_mean: Sequence[float] | None,
    prior_std: Sequence[float] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Images of each task, rolled and flipped, for the backbone and for the prior.

    Args:
        images: (G, m, 3, S, S) float32, in the backbone's input space.
        shift: (G, 2) int64, how far rows and columns are rolled.
        flip: (G,) bool, which tasks are mirrored then.
        mean, std: of the backbone's normalisation, of each channel.
        prior_mean, prior_std: of the prior's; None without a prior.
        dtype: of the results: float32, bfloat16 or float16.

    Returns:
        seen (G, m, 3, S, S); the same in the prior's normalisation, (G m, 3, S, S), or None.

    Raises:
        ValueError: shapes or dtypes disagree.

    """
    _check("jitter_pixels", images, shift, flip)
    if dtype not in DTYPES:
        raise ValueError(f"jitter_pixels: float32, bfloat16 or float16, got {dtype}")
    factor: list[float] = []
    offset: list[float] = []
    if prior_mean is not None and prior_std is not None:
        factor = _factors(std, prior_std)
        offset = [(a - b) / s for a, b, s in zip(mean, prior_mean, prior_std, strict=True)]
    seen, natural = _jitter_pixels(images, shift, flip, factor, offset, dtype)
    return seen, natural if factor else None


def pixel_step(
    images: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    d_seen: Tensor,
    d_natural: Tensor | None,
    shift: Tensor,
    flip: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    low: Sequence[float],
    high: Sequence[float],
    std: Sequence[float],
    prior_std: Sequence[float] | None,
) -> None:
    """Adam's step on the pixels, from the gradients of `jitter_pixels`' results, and a clamp.

    In place, no gradient. The update is `torch.optim.Adam`'s without weight decay.

    Args:
        images, exp_avg, exp_avg_sq: (G, m, 3, S, S) float32, contiguous; changed.
        step: steps taken before, one float on the device; one more afterwards.
        d_seen: (G, m, 3, S, S); d_natural (G m, 3, S, S), or None without a prior. In any memory
            format; those that are neither contiguous nor channels-last are copied.
        shift, flip: as `jitter_pixels` had them.
        lr: one float on the device.
        betas, eps: Adam's.
        low, high: bounds of each channel.
        std, prior_std: as in `jitter_pixels`.

    Raises:
        ValueError: shapes or dtypes disagree, or a tensor to be changed is not contiguous.

    """
    _check("pixel_step", images, shift, flip)
    for name, state in (("images", images), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if state.shape != images.shape or state.dtype != torch.float32 or not state.is_contiguous():
            raise ValueError(
                f"pixel_step: {name} must be contiguous float32 of shape {tuple(images.shape)}, got"
                f" {state.dtype} of {tuple(state.shape)}"
            )
    side = images.shape[-1]
    if d_seen.shape != images.shape:
        raise ValueError(
            f"pixel_step: d_seen must have shape {tuple(images.shape)}, got {tuple(d_seen.shape)}"
        )
    flat = (images.shape[0] * images.shape[1], 3, side, side)
    if d_natural is not None and d_natural.shape != flat:
        raise ValueError(
            f"pixel_step: d_natural must have shape {flat}, got {tuple(d_natural.shape)}"
        )
    if step.numel() != 1 or lr.numel() != 1:
        raise ValueError("pixel_step: step and lr must be tensors of one number")
    factor = [1.0] * 3 if prior_std is None else _factors(std, prior_std)
    _pixel_step(
        images, exp_avg, exp_avg_sq, step, d_seen, d_natural, shift, flip, lr, list(betas), eps,
        list(low), list(high), factor,
    )  # fmt: skip

"""The first convolution of a prior network, from pixels: few channels in, and a gradient to them.

B images, C <= 4 channels, K filters of R x R taps, stride s, padding q; pixels p (B, C, H, W):

    x      = (p - mean) / std                                    C padded to 4, with a border of 0
    y      = sum of x[c, s i + r - q, s j + t - q] w[c, r, t]    over c and taps r, t
    dp     = 1 / std  sum of dy[k, i, j] w[k, c, r, t]           over k and s i + r - q = h, ...

Three channels are too few for the matrix units, which want 16 numbers a row on each side:

  forward   a row of taps is R pixels of 4 channels that lie together in x: 32 numbers for R = 7
  backward  pixels go in blocks of 4x4, the columns of a product: 48 for C = 3. All need the same
            few positions of dy (5x5 for R = 7 and s = 2, K numbers each), the rows of `weights`,
            where taps that do not meet a pixel are 0. So each position is read 6 times, from
            the cache, where single pixels would read it 12 times.

Products with a weight of 0 that is none of the filter's carry a NaN a position further than
PyTorch's would.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# ------------------------------------------------------------------ kernels


@triton.jit
def _plane(pixels, at, inside, plane, mean, std, CHANNELS: tl.constexpr, CHANNEL: tl.constexpr):
    """One channel of pixels, normalised; 0 outside, and where there is no such channel."""
    if CHANNEL < CHANNELS:
        value = tl.load(pixels + at + CHANNEL * plane, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, (value - mean) / std, 0.0)
    else:
        value = tl.zeros(at.shape, tl.float32)
    return value


@triton.jit
def _normalise(
    pixels, x, mean0, mean1, mean2, mean3, std0, std1, std2, std3,
    height, width, tall, wide, padding,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of one image of x, (tall, wide, 4)."""
    image = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = at // wide - padding
    w = at % wide - padding
    inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
    plane = height * width
    source = pixels + image * CHANNELS * plane
    of = h * width + w
    a = _plane(source, of, inside, plane, mean0, std0, CHANNELS, 0)
    b = _plane(source, of, inside, plane, mean1, std1, CHANNELS, 1)
    c = _plane(source, of, inside, plane, mean2, std2, CHANNELS, 2)
    d = _plane(source, of, inside, plane, mean3, std3, CHANNELS, 3)
    four = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK, 4))
    to = image * tall * wide * 4 + at[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(x + to, four.to(x.dtype.element_ty), mask=(at < tall * wide)[:, None])


@triton.jit
def _arrange_forward(
    weight, arranged, filter_step, channel_step, row_step, tap_step, filters, columns,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weight (K, C, R, R) -> (R, taps, 4; K), all but the last in rows, 0 where there is none."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r = row // SPAN
    t = row % SPAN // 4
    c = row % 4
    inside = (n < filters) & (t < KERNEL) & (c < CHANNELS)
    at = n * filter_step + c * channel_step + r * row_step + t * tap_step
    value = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(arranged + row * columns + n, value)


@triton.jit
def _convolve(
    x, arranged, y, rows, filters, columns, image_size, row_size, out_height, out_width,
    STRIDE: tl.constexpr, KERNEL: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M positions and BLOCK_N filters of y."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = m < rows
    i = m // out_width % out_height
    j = m % out_width
    image = (m // (out_height * out_width)).to(tl.int64)
    at = image * image_size + i * (STRIDE * row_size) + j * (4 * STRIDE)
    k = tl.arange(0, SPAN)
    taps = x + at[:, None] + k[None, :]
    weights = arranged + k[:, None] * columns + n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(KERNEL):
        a = tl.load(taps + r * row_size, mask=there[:, None], other=0.0)
        b = tl.load(weights + r * SPAN * columns)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    to = m.to(tl.int64)[:, None] * filters + n[None, :]
    inside = there[:, None] & (n < filters)[None, :]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _arrange_backward(
    weight, arranged, filter_step, channel_step, row_step, tap_step, filters, depth, padding, low,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, REACH_W: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weight (K, C, R, R) -> (position, K; C, BLOCK_H, BLOCK_W), 0 where no tap joins the two."""
    position = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    c = n // (BLOCK_H * BLOCK_W)
    r = n // BLOCK_W % BLOCK_H + padding - STRIDE * (low + position // REACH_W)
    t = n % BLOCK_W + padding - STRIDE * (low + position % REACH_W)
    inside = (c < CHANNELS) & (r >= 0) & (r < KERNEL) & (t >= 0) & (t < KERNEL)
    inside = inside[None, :] & (k < filters)[:, None]
    of = k[:, None] * filter_step + (c * channel_step + r * row_step + t * tap_step)[None, :]
    value = tl.load(weight + of, mask=inside, other=0.0)
    tl.store(arranged + (position * depth + k)[:, None] * BLOCK_N + n[None, :], value)


@triton.jit
def _gradient(
    dy, arranged, dpixels, std0, std1, std2, std3,
    blocks, blocks_h, blocks_w, height, width, out_height, out_width, filters, depth, low,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, REACH_H: tl.constexpr, REACH_W: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M blocks of BLOCK_H x BLOCK_W pixels, all channels of them."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = m < blocks
    image = m // (blocks_h * blocks_w)
    i = m // blocks_w % blocks_h
    j = m % blocks_w
    first_h = i * (BLOCK_H // STRIDE) + low  # of the positions of dy that a block needs
    first_w = j * (BLOCK_W // STRIDE) + low
    at = ((image.to(tl.int64) * out_height + first_h) * out_width + first_w) * filters
    flows = dy + at[:, None] + k[None, :]
    weights = arranged + k[:, None] * BLOCK_N + n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pieces = depth // BLOCK_K
    for step in range(REACH_H * REACH_W * pieces):
        position = step // pieces
        begin = step % pieces * BLOCK_K
        down = position // REACH_W
        along = position % REACH_W
        inside = (first_h + down >= 0) & (first_h + down < out_height)
        inside &= (first_w + along >= 0) & (first_w + along < out_width) & there
        inside = inside[:, None] & (begin + k < filters)[None, :]
        a = tl.load(flows + (down * out_width + along) * filters + begin, mask=inside, other=0.0)
        b = tl.load(weights + (position * depth + begin) * BLOCK_N)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    c = n // (BLOCK_H * BLOCK_W)
    h = i[:, None] * BLOCK_H + (n // BLOCK_W % BLOCK_H)[None, :]
    w = j[:, None] * BLOCK_W + (n % BLOCK_W)[None, :]
    std = tl.where(c == 0, std0, tl.where(c == 1, std1, tl.where(c == 2, std2, std3)))
    total *= (1 / std)[None, :]
    # from the program's first image on, in 32 bits: so many addresses of 64 fill the registers
    start = tl.program_id(0) * BLOCK_M // (blocks_h * blocks_w)
    dpixels += start.to(tl.int64) * CHANNELS * height * width
    to = (((image - start)[:, None] * CHANNELS + c[None, :]) * height + h) * width + w
    inside = there[:, None] & (c < CHANNELS)[None, :] & (h < height) & (w < width)
    tl.store(dpixels + to, total.to(dpixels.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Launch:
    """Tiles of both products: rows, warps, stages; and the pixels of a block, each way."""

    block_m: int
    warps: int
    stages: int
    side_h: int = 4  # multiples of the stride
    side_w: int = 4


FORWARD = Launch(128, 4, 3)
BACKWARD = Launch(128, 4, 3)


def _launch(dtype: torch.dtype, plan: Launch) -> Launch:
    """Float32 takes twice the shared memory, and its products are no faster for large tiles."""
    if dtype != torch.float32:
        return plan
    return Launch(min(plan.block_m, 64), 4, min(plan.stages, 2), plan.side_h, plan.side_w)


def _up(a: int, b: int) -> int:
    return triton.cdiv(a, b) * b


def _four(values: list[float]) -> list[float]:
    return [*values, *[1.0] * (4 - len(values))]


def _precision(x: Tensor) -> str:
    """Of float32 products: what PyTorch's own convolutions would do."""
    return "tf32" if x.is_cuda and torch.backends.cudnn.allow_tf32 else "ieee"


def _out_sides(pixels_shape: torch.Size, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    h, w = ((int(n) + 2 * padding - kernel) // stride + 1 for n in pixels_shape[2:])
    return h, w


def _normalised(
    pixels: Tensor, dtype: torch.dtype, mean: list[float], std: list[float], padding: int,
    tall: int, wide: int,
) -> Tensor:  # fmt: skip
    """X (B, tall, wide, 4), in the middle of which the pixels are."""
    b, c, h, w = pixels.shape
    x = torch.empty((b, tall, wide, 4), dtype=dtype, device=pixels.device)
    block = 512
    with torch.cuda.device_of(pixels):
        _normalise[(triton.cdiv(tall * wide, block), b)](
            pixels.contiguous(), x, *_four(mean), *_four(std), h, w, tall, wide, padding,
            CHANNELS=c, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return x


def _run_forward(
    pixels: Tensor, weight: Tensor, stride: int, padding: int, mean: list[float], std: list[float]
) -> Tensor:
    b, c = pixels.shape[:2]
    filters, kernel = weight.shape[0], weight.shape[2]
    high, long = _out_sides(pixels.shape, kernel, stride, padding)
    y = torch.empty(
        (b, filters, high, long), dtype=weight.dtype, device=pixels.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    if y.numel() == 0:
        return y
    plan = _launch(weight.dtype, FORWARD)
    taps = triton.next_power_of_2(kernel)
    # rows of whole 16-byte pieces, and room for the taps beyond the kernel's
    tall, wide = stride * (high - 1) + kernel, _up(stride * (long - 1) + taps, 4)
    x = _normalised(pixels, weight.dtype, mean, std, padding, tall, wide)
    block_n = min(64, max(16, triton.next_power_of_2(filters)))
    columns = _up(filters, block_n)
    arranged = weight.new_empty((kernel * taps * 4, columns))
    rows = b * high * long
    with torch.cuda.device_of(pixels):
        _arrange_forward[(len(arranged), columns // block_n)](
            weight, arranged, *weight.stride(), filters, columns,
            CHANNELS=c, KERNEL=kernel, SPAN=4 * taps, BLOCK=block_n, num_warps=1,
        )  # fmt: skip
        _convolve[(triton.cdiv(rows, plan.block_m), columns // block_n)](
            x, arranged, y, rows, filters, columns, tall * wide * 4, wide * 4, high, long,
            STRIDE=stride, KERNEL=kernel, SPAN=4 * taps, BLOCK_M=plan.block_m, BLOCK_N=block_n,
            PRECISION=_precision(x), num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return y


def _cudnn_forward(
    pixels: Tensor, weight: Tensor, stride: int, padding: int, mean: list[float], std: list[float]
) -> Tensor:
    """The same by PyTorch, on 4 channels without the border."""
    b, c, h, w = pixels.shape
    if b == 0:
        return _run_forward(pixels, weight, stride, padding, mean, std)
    x = _normalised(pixels, weight.dtype, mean, std, 0, h, w)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 4 - c))
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding)
    return y.contiguous(memory_format=torch.channels_last)


def _run_backward(
    dy: Tensor, weight: Tensor, size: list[int], stride: int, padding: int, std: list[float],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    b, c, h, w = size
    filters, kernel = weight.shape[0], weight.shape[2]
    dpixels = torch.empty(size, dtype=dtype, device=dy.device)
    if dpixels.numel() == 0 or dy.numel() == 0:
        return dpixels.zero_()
    plan = _launch(weight.dtype, BACKWARD)
    # positions of dy that reach a block of pixels, from `low` on, counted from its own
    low = -((kernel - 1 - padding) // stride)
    reach_h, reach_w = (
        (side - 1 + padding) // stride - low + 1 for side in (plan.side_h, plan.side_w)
    )
    block_n = max(16, triton.next_power_of_2(c * plan.side_h * plan.side_w))
    most = 32 if weight.dtype == torch.float32 else 64
    block_k = min(most, max(16, triton.next_power_of_2(filters)))
    depth = _up(filters, block_k)
    arranged = weight.new_empty((reach_h * reach_w * depth, block_n))
    blocks_h, blocks_w = triton.cdiv(h, plan.side_h), triton.cdiv(w, plan.side_w)
    blocks = b * blocks_h * blocks_w
    sides = {"BLOCK_H": plan.side_h, "BLOCK_W": plan.side_w, "BLOCK_N": block_n}
    with torch.cuda.device_of(dy):
        _arrange_backward[(reach_h * reach_w, depth // block_k)](
            weight, arranged, *weight.stride(), filters, depth, padding, low,
            CHANNELS=c, KERNEL=kernel, STRIDE=stride, REACH_W=reach_w, BLOCK_K=block_k, **sides,
            num_warps=4,
        )  # fmt: skip
        _gradient[(triton.cdiv(blocks, plan.block_m),)](
            dy.contiguous(memory_format=torch.channels_last), arranged, dpixels, *_four(std),
            blocks, blocks_h, blocks_w, h, w, *dy.shape[2:], filters, depth, low,
            CHANNELS=c, STRIDE=stride, REACH_H=reach_h, REACH_W=reach_w, BLOCK_M=plan.block_m,
            BLOCK_K=block_k, PRECISION=_precision(dy), **sides,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return dpixels


# ------------------------------------------------------------------ operations


@torch.library.custom_op("fastrecycle::stem_conv", mutates_args=())
def _stem_conv(
    pixels: Tensor, weight: Tensor, stride: int, padding: int, mean: list[float],
    std: list[float], cudnn: bool,
) -> Tensor:  # fmt: skip
    run = _cudnn_forward if cudnn else _run_forward
    return run(pixels, weight, stride, padding, mean, std)


@_stem_conv.register_fake
def _(pixels, weight, stride, padding, mean, std, cudnn):
    sides = _out_sides(pixels.shape, int(weight.shape[2]), stride, padding)
    return torch.empty(
        (pixels.shape[0], weight.shape[0], *sides), dtype=weight.dtype, device=pixels.device,
        memory_format=torch.channels_last,
    )  # fmt: skip


@torch.library.custom_op("fastrecycle::stem_conv_backward", mutates_args=())
def _stem_conv_backward(
    dy: Tensor, weight: Tensor, like: Tensor, size: list[int], stride: int, padding: int,
    std: list[float],
) -> Tensor:  # fmt: skip
    return _run_backward(dy, weight, size, stride, padding, std, like.dtype)


@_stem_conv_backward.register_fake
def _(dy, weight, like, size, stride, padding, std):
    return dy.new_empty(size, dtype=like.dtype)


def _setup(ctx, inputs, output):
    pixels, weight, ctx.stride, ctx.padding, _, ctx.std, _ = inputs
    # a number of the pixels' dtype stands for it: the pixels themselves are not needed any more
    ctx.size = list(pixels.shape)
    ctx.save_for_backward(weight, pixels.new_empty(0))


def _backward(ctx, dy):
    weight, like = ctx.saved_tensors
    dpixels = None
    if ctx.needs_input_grad[0]:
        dpixels = _stem_conv_backward(dy, weight, like, ctx.size, ctx.stride, ctx.padding, ctx.std)
    return dpixels, None, None, None, None, None, None


_stem_conv.register_autograd(_backward, setup_context=_setup)


# ------------------------------------------------------------------ public functions


def fits(weight: Tensor, stride: int, padding: int) -> bool:
    """Whether `stem_conv` takes a convolution of this shape."""
    c, h, w = weight.shape[1:]
    return c <= 4 and h == w and h in (3, 5, 7) and stride in (1, 2) and padding < h


def stem_conv(
    pixels: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    cudnn: bool = False,
) -> Tensor:
    """Conv2d((pixels - mean) / std, weight), and its gradient to the pixels.

    Args:
        pixels: (B, C, H, W) float32, or half precision; C at most 4.
        weight: (K, C, R, R), a constant, R 3, 5 or 7; its dtype is the products' and y's.
        stride: 1 or 2.
        padding: below R, of normalised pixels.
        mean, std: of each channel.
        cudnn: the forward by PyTorch, on channels padded to 4.

    Returns:
        (B, K, H', W'), channels-last.

    Raises:
        ValueError: another convolution, a weight that requires a gradient, float64.

    """
    if weight.ndim != 4 or not fits(weight, stride, padding):
        raise ValueError(
            "stem_conv: expected weight (K, C <= 4, R, R), R 3, 5 or 7, stride 1 or 2 and padding"
            f" below R, got weight {tuple(weight.shape)}, stride {stride}, padding {padding}"
        )
    if pixels.ndim != 4 or pixels.shape[1] != weight.shape[1] or len(mean) != weight.shape[1]:
        raise ValueError(
            f"stem_conv: expected pixels (B, {weight.shape[1]}, H, W) and as many means, got"
            f" {tuple(pixels.shape)} and {len(mean)}"
        )
    halves = (torch.float32, torch.bfloat16, torch.float16)
    if pixels.dtype not in halves or weight.dtype not in halves:
        raise ValueError(
            "stem_conv: expected float32, bfloat16 or float16, got pixels in"
            f" {pixels.dtype} and weight in {weight.dtype}"
        )
    if weight.requires_grad:
        raise ValueError("stem_conv: the weight is a constant, got one that requires a gradient")
    return _stem_conv(pixels, weight, stride, padding, list(mean), list(std), cudnn)

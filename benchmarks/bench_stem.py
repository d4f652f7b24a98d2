"""The prior's stem in parts: first convolution, BatchNorm with ReLU and pooling; both ways.

`python benchmarks/bench_stem.py` prints each part beside what PyTorch and cuDNN take for the same,
and a cold copy of the same bytes; --launch tries ways to cut each kernel. `pytest
benchmarks/bench_stem.py --benchmark-only` times the same parts. Bytes counted: convolution pixels
(float32) and y, or dy and the pixels' gradient; pooling x and y, or dy, places of maxima, x and dx.
On the CPU the kernels run in Triton's interpreter on tiny shapes: what that takes means nothing.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from timing import Timing, copies, copy_bandwidth, device, measure, on_gpu, record, sets_for, table
from torch import Tensor, nn

pytest.importorskip("triton")
# the launch is the kernels' own business, which fastrecycle.ops does not show
bn_prior = importlib.import_module("fastrecycle_kernels.bn_prior")
bn_pool = importlib.import_module("fastrecycle_kernels.bn_pool")
stem_conv = importlib.import_module("fastrecycle_kernels.stem_conv")
reference = importlib.import_module("fastrecycle_kernels.reference")

EPS, MEAN, STD = 1e-5, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH, SIDE, FILTERS = (25, 224, 64) if on_gpu() else (2, 24, 16)
HALF = torch.bfloat16 if on_gpu() else torch.float16


class Inputs:
    """Random tensors of a stem, fresh for each set."""

    def __init__(self, batch: int = BATCH):
        def randn(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
            x = torch.randn(shape, device=device(), dtype=dtype)
            return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x

        out = SIDE // 2
        self.pixels = torch.rand(batch, 3, SIDE, SIDE, device=device())
        self.weight = randn(FILTERS, 3, 7, 7)
        self.x, self.dx = (randn(batch, FILTERS, out, out) for _ in range(2))
        self.dy = randn(batch, FILTERS, out // 2, out // 2)
        mean, var, weight, bias = (randn(FILTERS, dtype=torch.float32) for _ in range(4))
        self.stored = mean, var.square() + 0.1, weight, bias
        self.pixel_mean, self.pixel_std = (
            torch.tensor(v, device=device())[:, None, None] for v in (MEAN, STD)
        )
        saved = bn_pool._bn_pool(self.x, *self.stored, EPS, 1)
        self.chunks, self.code = saved[2], saved[3]
        self.dchunks = 100 * torch.randn_like(self.chunks)
        saved = bn_prior._bn_prior_chunks(self.x, *self.stored, EPS, 1, True, None, None, True)
        self.wide, self.wide_chunks, self.bits = saved[0], saved[2], saved[3]
        self.wide_dchunks = 100 * torch.randn_like(self.wide_chunks)
        self.places = nn.functional.max_pool2d(self.wide, 3, 2, 1, return_indices=True)[1]

    # BatchNorm, ReLU and pooling

    def pool_forward(self) -> object:
        return bn_pool._bn_pool(self.x, *self.stored, EPS, 1)

    def pool_forward_apart(self) -> object:
        y = bn_prior._bn_prior_chunks(self.x, *self.stored, EPS, 1, True, None, None, True)[0]
        return nn.functional.max_pool2d(y, 3, 2, 1, return_indices=True)

    def pool_backward(self) -> Tensor:
        return bn_pool._bn_pool_backward(
            self.dy, None, self.dchunks, self.x, self.code, self.chunks, *self.stored, EPS
        )

    def pool_backward_apart(self) -> Tensor:
        dwide = torch.ops.aten.max_pool2d_with_indices_backward(
            self.dy, self.wide, [3, 3], [2, 2], [1, 1], [1, 1], False, self.places
        )
        return bn_prior._bn_prior_backward(
            dwide, None, *self.wide_dchunks, self.x, self.bits, self.wide_chunks[0], *self.stored,
            EPS, True, False,
        )[0]  # fmt: skip

    # convolution

    def conv_forward(self) -> Tensor:
        return stem_conv._stem_conv(self.pixels, self.weight, 2, 3, MEAN, STD, False)

    def conv_forward_padded(self) -> Tensor:
        """By cuDNN, pixels normalised by our kernel into 4 channels."""
        return stem_conv._stem_conv(self.pixels, self.weight, 2, 3, MEAN, STD, True)

    def conv_forward_cudnn(self) -> Tensor:
        x = (self.pixels - self.pixel_mean) / self.pixel_std
        x = x.to(HALF, memory_format=torch.channels_last)
        return nn.functional.conv2d(x, self.weight, None, 2, 3)

    def conv_backward(self) -> Tensor:
        return stem_conv._stem_conv_backward(
            self.dx, self.weight, self.pixels, list(self.pixels.shape), 2, 3, STD
        )

    def conv_backward_cudnn(self) -> Tensor:
        return self.conv_backward_cudnn_alone().to(torch.float32) / self.pixel_std

    def conv_backward_cudnn_alone(self) -> Tensor:
        x = torch.empty_like(self.pixels, dtype=HALF, memory_format=torch.channels_last)
        return torch.ops.aten.convolution_backward(
            self.dx, x, self.weight, None, [2, 2], [3, 3], [1, 1], False, [0, 0], 1,
            [True, False, False],
        )[0]  # fmt: skip


def moved_bytes(part: str) -> int:
    pixels, pooled = BATCH * SIDE**2, BATCH * FILTERS * (SIDE // 4) ** 2
    return {
        "pool forward": (4 + 1) * pooled * 2 + pooled,
        "pool backward": (4 + 4 + 1) * pooled * 2 + pooled,
        "conv forward": pixels * 3 * 4 + 4 * pooled * 2,
        "conv backward": pixels * 3 * 4 + 4 * pooled * 2,
    }[part]


PARTS = {
    "pool forward": {"ours": "pool_forward", "bn_prior + max_pool2d": "pool_forward_apart"},
    "pool backward": {"ours": "pool_backward", "bn_prior + max_pool2d": "pool_backward_apart"},
    "conv forward": {
        "ours": "conv_forward", "cuDNN": "conv_forward_cudnn",
        "cuDNN, 4 channels": "conv_forward_padded",
    },
    "conv backward": {
        "ours": "conv_backward", "cuDNN": "conv_backward_cudnn",
        "cuDNN alone": "conv_backward_cudnn_alone",
    },
}  # fmt: skip


def check(part: str) -> None:
    """Fresh inputs: no further from the exact result than twice what it is measured against.

    Raises:
        AssertionError: further.

    """
    inputs = Inputs(min(BATCH, 4))
    x = inputs.x.double().requires_grad_()  # float32 could round y to ties that x has not
    y = reference.bn_prior(x, *inputs.stored, EPS, 1, True, None)[0]
    y = nn.functional.max_pool2d(y, 3, 2, 1)
    pixels = inputs.pixels.clone().requires_grad_()
    conv = (pixels - inputs.pixel_mean) / inputs.pixel_std
    conv = nn.functional.conv2d(conv, inputs.weight.float(), None, 2, 3)
    if part == "pool backward":
        inputs.dchunks.zero_()
        inputs.wide_dchunks.zero_()
    exact, ours, own = {
        "pool forward": lambda: (y, inputs.pool_forward()[0], inputs.pool_forward_apart()[0]),
        "pool backward": lambda: (
            torch.autograd.grad(y, x, inputs.dy.double())[0], inputs.pool_backward(),
            inputs.pool_backward_apart(),
        ),
        "conv forward": lambda: (conv, inputs.conv_forward(), inputs.conv_forward_cudnn()),
        "conv backward": lambda: (
            torch.autograd.grad(conv, pixels, inputs.dx.float())[0], inputs.conv_backward(),
            inputs.conv_backward_cudnn(),
        ),
    }[part]()  # fmt: skip
    error, allowed = ((t.double() - exact.double()).abs().max().item() for t in (ours, own))
    scale = exact.abs().max().item()
    assert error <= 2 * allowed + 1e-5 * scale, (part, error, allowed)


def time_part(part: str, repeats: int) -> dict[str, Timing]:
    check(part)
    moved = moved_bytes(part)
    count = sets_for(moved, most=6)
    sets = [Inputs() for _ in range(count)]
    variants: dict[str, list[Callable]] = {
        name: [getattr(s, method) for s in sets] for name, method in PARTS[part].items()
    }
    return measure(variants | {"copy": copies(moved, count)}, repeats)


def row_of(part: str, times: dict[str, Timing]) -> dict[str, object]:
    ours, copy = times["ours"], times["copy"]
    others = {k: 1000 * t.median_ms for k, t in times.items() if k not in ("ours", "copy")}
    return {
        "part": part, "ours_us": 1000 * ours.median_ms, "p20_us": 1000 * ours.p20_ms,
        "p80_us": 1000 * ours.p80_ms, "copy_us": 1000 * copy.median_ms,
        "share": copy.median_ms / ours.median_ms,
        "others_us": ", ".join(f"{name} {took:.1f}" for name, took in others.items()),
    }  # fmt: skip


def print_parts(repeats: int) -> None:
    if on_gpu():
        print(f"copy of 2 GiB: {copy_bandwidth() / 1e12:.2f} TB/s read and written")
    rows = [row_of(part, time_part(part, repeats)) for part in PARTS]
    print(table(rows))
    if on_gpu():
        record("stem", rows)
    else:
        print("CPU: Triton's interpreter on tiny shapes, which says nothing of speed")


# ------------------------------------------------------------------ ways to cut the kernels

# rows, warps, stages; sides of a block of pixels
BACKWARD = [
    (128, 4, 3, 4, 4), (128, 4, 4, 4, 4), (128, 4, 2, 4, 4), (128, 4, 1, 4, 4), (128, 8, 3, 4, 4),
    (256, 8, 3, 4, 4), (256, 8, 2, 4, 4), (64, 4, 3, 4, 4), (64, 4, 4, 4, 4), (64, 4, 1, 4, 4),
    (128, 4, 3, 2, 4), (128, 4, 4, 2, 4), (128, 4, 3, 4, 8), (128, 8, 3, 4, 8), (128, 4, 3, 2, 8),
    (128, 4, 1, 2, 4), (128, 4, 3, 2, 2), (128, 4, 1, 2, 2),
]  # fmt: skip
FORWARD = [
    (128, 4, 3), (128, 4, 4), (128, 4, 2), (128, 4, 1), (256, 8, 3), (256, 8, 1), (256, 4, 3),
    (64, 4, 3), (64, 4, 1),
]  # fmt: skip
POOL = [  # units in 16-byte pieces of a thread, warps, programs
    (1, 4, 1056), (1, 4, 2112), (1, 4, 528), (1, 8, 1056), (1, 8, 528), (2, 4, 1056), (1, 2, 2112),
    (1, 2, 1056), (1, 4, 4224),
]  # fmt: skip


def print_launches(repeats: int) -> None:
    """Every way beside the others, the best first."""
    sets = [Inputs() for _ in range(sets_for(moved_bytes("conv forward"), most=4))]

    def best(title: str, method: str, ways: list, use: Callable) -> None:
        found = []
        for way in ways:
            use(way)
            try:
                times = measure({title: [getattr(s, method) for s in sets]}, repeats, warmup=1)
            except Exception as error:  # one way does not fit this chip: the others may
                print(f"{title} {way}: {type(error).__name__} {str(error)[:80]}")
                continue
            found.append((1000 * times[title].median_ms, way))
        use(ways[0])
        shown = ", ".join(f"{way} {took:.1f}" for took, way in sorted(found))
        print(f"{title}, us: {shown}")

    before = stem_conv.FORWARD, stem_conv.BACKWARD
    best("conv forward", "conv_forward", FORWARD,
         lambda way: setattr(stem_conv, "FORWARD", stem_conv.Launch(*way)))  # fmt: skip
    best("conv backward", "conv_backward", BACKWARD,
         lambda way: setattr(stem_conv, "BACKWARD", stem_conv.Launch(*way)))  # fmt: skip
    stem_conv.FORWARD, stem_conv.BACKWARD = before
    plain, programs = bn_pool.launch, bn_pool.PROGRAMS

    def cut(way: tuple[int, int, int]) -> None:
        pieces, warps, bn_pool.PROGRAMS = way

        def launch(images, height, width, channels, segments, itemsize=2):
            plan = plain(images, height, width, channels, segments, itemsize)
            block = max(1, plan.block_u * pieces * warps // 4)
            units = images * height * width // 4
            tiles = -(-units // block)
            each = block * -(-tiles // max(1, bn_pool.PROGRAMS // segments))
            return replace(
                plan, block_u=block, warps=warps, chunk_units=each, chunk_rows=4 * each,
                chunks=-(-units // each),
            )  # fmt: skip

        bn_pool.launch = launch

    best("pool forward", "pool_forward", POOL, cut)
    # the moments of chunks are those of the cut in force
    for way in POOL if on_gpu() else POOL[:1]:
        cut(way)
        few = [Inputs() for _ in sets]
        times = measure({"pool backward": [s.pool_backward for s in few]}, repeats, warmup=1)
        print(f"pool backward, us: {way} {1000 * times['pool backward'].median_ms:.1f}")
    bn_pool.launch, bn_pool.PROGRAMS = plain, programs


# ------------------------------------------------------------------ pytest-benchmark


@pytest.mark.parametrize("part", PARTS)
def test_stem(benchmark, part):
    times = time_part(part, repeats=10 if on_gpu() else 1)
    benchmark.extra_info |= row_of(part, times)
    benchmark.extra_info["note"] = (
        "cold, in CUDA graphs" if on_gpu() else "CPU: Triton's interpreter, no measure of speed"
    )
    call = getattr(Inputs(), PARTS[part]["ours"])

    def run():
        call()
        if on_gpu():
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launch", action="store_true", help="try ways to cut each kernel instead")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu() else 1)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if arguments.launch:
        print_launches(arguments.repeats)
    else:
        print_parts(arguments.repeats)


if __name__ == "__main__":
    main()

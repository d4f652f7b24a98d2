"""The whole prior: a ResNet-50 at 224, R_BN and its gradient to the pixels, in one CUDA graph.

`python benchmarks/bench_prior.py` prints milliseconds of eager bf16, of the kernels, and of the
convolutions alone; --compile adds `torch.compile` of the reference (the peer to beat) and of the
fast network; --convs each convolution both ways, in cuDNN and, where it is 1x1, as a matrix
product. --cudnn-benchmark lets cuDNN choose by trial; it needs a process of its own.
On the CPU a narrow network on tiny images, its kernels in Triton's interpreter: says nothing of
speed.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from timing import Timing, device, measure, on_gpu, record, table
from torch import Tensor, nn

from fastrecycle.prior import ResNetPrior, moment_distance

pytest.importorskip("triton")
kernels = importlib.import_module("fastrecycle_kernels.bn_prior")
bn_pool = importlib.import_module("fastrecycle_kernels.bn_pool")
stem_conv = importlib.import_module("fastrecycle_kernels.stem_conv")
distances = importlib.import_module("fastrecycle_kernels.moment_distance")
reference = importlib.import_module("fastrecycle_kernels.reference")

BATCH, SIDE, WIDTH, LAYERS = (25, 224, 64, (3, 4, 6, 3)) if on_gpu() else (2, 32, 8, (1, 1))


def resnet_state(width: int = WIDTH, layers: tuple[int, ...] = LAYERS) -> dict[str, Tensor]:
    """Random weights of a bottleneck ResNet in torchvision's names, activations near 1."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def layer(conv: str, bn: str, out: int, into: int, kernel: int, gain: float = 1.0) -> None:
        spread = math.sqrt(2 / (into * kernel**2))
        shape = (out, into, kernel, kernel)
        state[f"{conv}.weight"] = spread * torch.randn(shape, generator=generator)
        for name, centre in (("running_mean", 0.0), ("running_var", 1.0), ("weight", gain),
                             ("bias", 0.0)):  # fmt: skip
            state[f"{bn}.{name}"] = centre + 0.1 * torch.rand(out, generator=generator)

    layer("conv1", "bn1", width, 3, 7)
    into = width
    for number, count in enumerate(layers, 1):
        middle = width * 2 ** (number - 1)
        for block in range(count):
            name = f"layer{number}.{block}"
            if block == 0:
                layer(f"{name}.downsample.0", f"{name}.downsample.1", 4 * middle, into, 1)
            layer(f"{name}.conv1", f"{name}.bn1", middle, into, 1)
            layer(f"{name}.conv2", f"{name}.bn2", middle, middle, 3)
            layer(f"{name}.conv3", f"{name}.bn3", 4 * middle, middle, 1, 0.3)
            into = 4 * middle
    return state


# ------------------------------------------------------------------ networks


class Carry(torch.autograd.Function):
    """Y, its gradient given to its twin: a second convolution of y costs no sum of gradients."""

    @staticmethod
    def forward(ctx, y: Tensor, twin: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, gradient


class Network(ResNetPrior):
    """ResNetPrior that a CUDA graph can capture, with all that is to be compared.

    bn: "reference" and "kernel", layer by layer; "chunks": moments wait in chunks, and residuals
        have twins.
    dtype: of convolution weights that lie ready, channels-last; None for float32 and an autocast.
    matmul: 1x1 convolutions as matrix products of the channels-last rows.
    stem: what of it our kernels compute, with "chunks": "pool" its BatchNorm, ReLU and pooling,
        "conv" its convolution from the pixels on, "conv by cuDNN" but the forward.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        bn: str = "reference",
        dtype: torch.dtype | None = None,
        matmul: bool = False,
        stem: tuple[str, ...] = (),
    ):
        super().__init__(state)
        self.bn, self.dtype, self.matmul, self.stem = bn, dtype, matmul, stem
        for name, weight in list(self.named_buffers()):
            if weight.ndim == 4 and dtype is not None:
                weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
                setattr(self, name, weight)
        names = ["bn1"]
        for name in self.block_names:
            names += [f"{name}.downsample.1"] * self._has(f"{name}.downsample.0.weight")
            names += [f"{name}.bn{i}" for i in (1, 2, 3)]
        for part in ("mean", "var"):
            stored = torch.cat([self._get(f"{name}.running_{part}") for name in names])
            self.register_buffer(f"all_{part}", stored)
        # buffers: a graph cannot capture the copy of a Python list to the device
        self.register_buffer("pixel_mean", torch.tensor(self.spec.mean)[:, None, None])
        self.register_buffer("pixel_std", torch.tensor(self.spec.std)[:, None, None])

    def _conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self._get(name + ".weight")
        if self.matmul and stride == 1 and weight.shape[-1] == 1:
            b, c, h, w = x.shape
            rows = x.permute(0, 2, 3, 1).reshape(-1, c)
            y = nn.functional.linear(rows, weight.reshape(-1, c))
            return y.view(b, h, w, -1).permute(0, 3, 1, 2)
        return nn.functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2)

    def forward(self, pixels: Tensor, segments: int = 1, first_bn: float = 1.0) -> Tensor:
        moments, terms = [], []

        def bn(
            name: str,
            x: Tensor,
            relu: bool = True,
            residual: Tensor | None = None,
            twin: Tensor | None = None,
            output: bool = True,
        ) -> tuple[Tensor, Tensor | None]:
            mean, var, weight, bias = (
                self._get(f"{name}.{part}")
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            rest = (x, mean, var, weight, bias, self.spec.eps, segments, relu, residual)
            if self.bn == "chunks":
                y, own_twin, chunks = kernels.bn_prior_chunks(*rest, twin, output)
                moments.append(chunks)
                return y, own_twin
            y, mu, sigma2 = (kernels if self.bn == "kernel" else reference).bn_prior(*rest)
            term = moment_distance(mu, sigma2, mean, var)
            terms.append(term if terms else first_bn * term)
            return y, None

        if "conv" in self.stem or "conv by cuDNN" in self.stem:
            x = stem_conv.stem_conv(
                pixels, self._get("conv1.weight"), self.spec.stem_stride, 3, self.spec.mean,
                self.spec.std, cudnn="conv by cuDNN" in self.stem,
            )  # fmt: skip
        else:
            x = (pixels - self.pixel_mean) / self.pixel_std
            x = x.to(self.dtype or x.dtype, memory_format=torch.channels_last)
            x = self._conv("conv1", x, self.spec.stem_stride)
        if "pool" in self.stem:
            x, twin, chunks = bn_pool.bn_pool_chunks(
                x, *self._stored("bn1"), self.spec.eps, segments
            )
            moments.append(chunks)
        else:
            x, twin = nn.functional.max_pool2d(bn("bn1", x)[0], 3, 2, 1), None
        for name in self.block_names:
            layer, index = (int(n) for n in re.findall(r"\d+", name))
            stride = 2 if index == 0 and layer > 1 else 1
            shortcut = x
            if self._has(f"{name}.downsample.0.weight"):
                beside = x if twin is None else Carry.apply(x.detach(), twin)
                shortcut = self._conv(f"{name}.downsample.0", beside, stride)
                shortcut, _ = bn(f"{name}.downsample.1", shortcut, relu=False)
                twin = None
            y, _ = bn(f"{name}.bn1", self._conv(f"{name}.conv1", x))
            y, _ = bn(f"{name}.bn2", self._conv(f"{name}.conv2", y, stride))
            last = name == self.block_names[-1]
            y = self._conv(f"{name}.conv3", y)
            x, twin = bn(f"{name}.bn3", y, True, shortcut, twin, output=not last)
        if self.bn == "chunks":
            return distances.moment_distance(moments, self.all_mean, self.all_var, first_bn)
        return sum(terms)


# ------------------------------------------------------------------ whole steps

Step = Callable[[], tuple[Tensor, Tensor]]


def step(prior: Callable[..., Tensor], pixels: Tensor, segments: int, half: bool) -> Step:
    """R_BN of each task and its gradient, the latter in float32 as the pixels are."""

    def run() -> tuple[Tensor, Tensor]:
        with torch.autocast(device().type, torch.bfloat16, enabled=half):
            total = prior(pixels, segments=segments)
        return total.detach(), torch.autograd.grad(total.sum(), pixels)[0]

    return run


def steps(batch: int, segments: int, compiled: bool) -> dict[str, Step]:
    """Each way of the same step, checked against float32.

    Raises:
        AssertionError: R_BN or its gradient errs more than twice as much as eager bf16.

    """
    state = resnet_state()
    half = torch.bfloat16 if on_gpu() else torch.float32
    pixels = torch.rand(batch, 3, SIDE, SIDE, device=device()).requires_grad_()

    def of(*arguments, compile_: bool = False) -> Step:
        network = Network(state, *arguments).to(device())
        autocast = on_gpu() and network.dtype is None
        if compile_:
            network = torch.compile(network, dynamic=False, fullgraph=True)
        return step(network, pixels, segments, autocast)

    found = {
        "eager bf16": of(),
        "eager bf16, weights ready": of("reference", half),
        "kernel": of("kernel", half),
        "chunks": of("chunks", half),
        "chunks, 1x1 as products": of("chunks", half, True),
        "chunks, stem: pool": of("chunks", half, False, ("pool",)),
        "chunks, stem: conv": of("chunks", half, False, ("conv",)),
        "chunks, stem: conv by cuDNN, pool": of("chunks", half, False, ("conv by cuDNN", "pool")),
        "chunks, stem fused": of("chunks", half, False, ("conv", "pool")),
    }
    if compiled:
        found |= {
            "compile": of(compile_=True),
            "compile, weights ready": of("reference", half, compile_=True),
            "compile, weights ready, 1x1 as products": of("reference", half, True, compile_=True),
            "chunks, compiled": of("chunks", half, compile_=True),
            "chunks, 1x1 as products, compiled": of("chunks", half, True, compile_=True),
        }
    plain = ResNetPrior(state).to(device())
    exact = step(plain, pixels, segments, half=False)()
    errors = {name: errors_of(run(), exact) for name, run in found.items()}
    allowed = errors["eager bf16"]
    for name, error in errors.items():
        for got, own in zip(error, allowed, strict=True):
            assert got <= 2 * own + 2**-8, (name, error, allowed)
    return found


def errors_of(got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """Relative errors of R_BN and of the whole gradient."""
    return tuple(
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, exact)
    )


@dataclass(frozen=True)
class Conv:
    into: int
    out: int
    kernel: int
    stride: int
    side: int  # of the input

    def __str__(self) -> str:
        return f"{self.into}->{self.out} {self.kernel}x{self.kernel}/{self.stride} at {self.side}"


def convolutions(width: int = WIDTH, layers: tuple[int, ...] = LAYERS) -> dict[Conv, int]:
    """Each convolution of the network, and how often it is there."""
    found = [Conv(3, width, 7, 2, SIDE)]
    side, into = SIDE // 4, width
    for number, count in enumerate(layers, 1):
        middle, stride = width * 2 ** (number - 1), 1 if number == 1 else 2
        for block in range(count):
            if block == 0:
                found.append(Conv(into, 4 * middle, 1, stride, side))
            found.append(Conv(into, middle, 1, 1, side))
            found.append(Conv(middle, middle, 3, stride if block == 0 else 1, side))
            side = side // stride if block == 0 else side
            found.append(Conv(middle, 4 * middle, 1, 1, side))
            into = 4 * middle
    return {conv: found.count(conv) for conv in found}


class ConvInputs:
    def __init__(self, conv: Conv, batch: int):
        self.conv = conv
        half = torch.bfloat16 if on_gpu() else torch.float32

        def randn(*shape: int) -> Tensor:
            x = torch.randn(shape, device=device(), dtype=half)
            return x.to(memory_format=torch.channels_last)

        self.x = randn(batch, conv.into, conv.side, conv.side)
        self.weight = randn(conv.out, conv.into, conv.kernel, conv.kernel)
        self.dy = torch.empty_like(self.forward())
        self.dy.normal_()

    def forward(self) -> Tensor:
        return nn.functional.conv2d(
            self.x, self.weight, None, self.conv.stride, self.conv.kernel // 2
        )

    def backward(self) -> Tensor:
        padding = [self.conv.kernel // 2] * 2
        return torch.ops.aten.convolution_backward(
            self.dy, self.x, self.weight, None, [self.conv.stride] * 2, padding, [1, 1], False,
            [0, 0], 1, [True, False, False],
        )[0]  # fmt: skip

    def _rows(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])

    def forward_product(self) -> Tensor:
        return self._rows(self.x) @ self.weight.flatten(1).T

    def backward_product(self) -> Tensor:
        return self._rows(self.dy) @ self.weight.flatten(1)


def convolutions_alone(batch: int) -> Step:
    """Every convolution both ways on inputs of its own: what no BatchNorm kernel can save."""
    inputs = [
        ConvInputs(conv, batch) for conv, count in convolutions().items() for _ in range(count)
    ]

    def run() -> list[Tensor]:  # outputs are dropped at once, as a network's would be
        for each in inputs:
            each.forward()
        for each in reversed(inputs):
            last = each.backward()
        return [last]

    return run


def print_prior(batch: int, segments: int, repeats: int, compiled: bool) -> None:
    found = steps(batch, segments, compiled) | {"convolutions alone": convolutions_alone(batch)}
    times: dict[str, Timing] = measure(found, repeats)
    base = times["convolutions alone"].median_ms
    rows = []
    for name, t in times.items():
        rows.append({
            "variant": name, "ms": t.median_ms, "p20_ms": t.p20_ms, "p80_ms": t.p80_ms,
            "beyond convolutions_ms": t.median_ms - base,
        })  # fmt: skip
    what = f"ResNet{sum(LAYERS) * 3 + 2}" if on_gpu() else "a tiny ResNet on the CPU"
    print(f"{what}, {segments} x {batch // segments} images of {SIDE}^2, R_BN and its gradient")
    print(f"cudnn.benchmark {torch.backends.cudnn.benchmark}")
    print(table(rows))
    if on_gpu():
        extra = {"batch": batch, "segments": segments}
        extra["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        record("prior", [extra | row for row in rows])


def print_kernels(name: str, batch: int, segments: int) -> None:
    """Where one step's time goes, by kernel."""
    run = steps(batch, segments, compiled="compile" in name)[name]
    for _ in range(3):
        run()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=30,
                                       max_name_column_width=70))  # fmt: skip


def print_convolutions(batch: int, repeats: int) -> None:
    rows, totals = [], dict.fromkeys(("cudnn_us", "best_us"), 0.0)
    padded = [Conv(into, WIDTH, 7, 2, SIDE) for into in (4, 8)]  # the stem, its channels padded
    for conv, count in [*convolutions().items(), *((conv, 0) for conv in padded)]:
        # some 100 MB of inputs, so that none is in the cache when its turn comes
        sets = [ConvInputs(conv, batch) for _ in range(4 if on_gpu() else 1)]
        ways = ["forward", "backward"]
        if conv.kernel == 1 and conv.stride == 1:
            ways += ["forward_product", "backward_product"]
        times = measure({way: [getattr(s, way) for s in sets] for way in ways}, repeats)
        took = {way: 1000 * t.median_ms for way, t in times.items()}
        cudnn = took["forward"] + took["backward"]
        best = sum(min(took[w], took.get(f"{w}_product", took[w])) for w in ways[:2])
        out = math.ceil(conv.side / conv.stride)
        products = 2 * batch * out**2 * conv.into * conv.out * conv.kernel**2
        moved = 2 * batch * (conv.into * conv.side**2 + conv.out * out**2)
        rows.append({
            "convolution": str(conv), "count": count, **{f"{w}_us": t for w, t in took.items()},
            "forward_TFLOPs": products / took["forward"] / 1e6,
            "forward_TBs": moved / took["forward"] / 1e6,
        })  # fmt: skip
        totals["cudnn_us"] += count * cudnn
        totals["best_us"] += count * best
    print(f"batch {batch}, cudnn.benchmark {torch.backends.cudnn.benchmark}; cold caches")
    print(table(rows))
    print(", ".join(f"all {name[:-3]}: {total / 1000:.3f} ms" for name, total in totals.items()))
    if on_gpu():
        record("prior_convolutions", rows)


# ------------------------------------------------------------------ pytest-benchmark


@pytest.mark.parametrize("segments", [1, 2])
def test_prior(benchmark, segments):
    batch = segments * BATCH
    found = steps(batch, segments, compiled=False)
    times = measure(found, repeats=5 if on_gpu() else 1)
    benchmark.extra_info |= {f"{name}_ms": t.median_ms for name, t in times.items()}
    if not on_gpu():
        benchmark.extra_info["note"] = "CPU: Triton's interpreter, no measure of speed"

    def run():
        found["chunks"]()
        if on_gpu():
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="torch.compile too (slow to build)")
    parser.add_argument("--convs", action="store_true", help="each convolution instead")
    parser.add_argument("--profile", metavar="VARIANT", help="kernels of one variant instead")
    parser.add_argument("--cudnn-benchmark", action="store_true")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of all tasks")
    parser.add_argument("--segments", type=int, default=1, help="tasks")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu() else 1)
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if arguments.convs:
        print_convolutions(arguments.batch, arguments.repeats)
    elif arguments.profile:
        print_kernels(arguments.profile, arguments.batch, arguments.segments)
    else:
        print_prior(arguments.batch, arguments.segments, arguments.repeats, arguments.compile)


if __name__ == "__main__":
    main()

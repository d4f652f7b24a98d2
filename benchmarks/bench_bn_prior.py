"""bn_prior alone: each BatchNorm of a ResNet-50 at 224 against a cold copy of the same bytes.

`python benchmarks/bench_bn_prior.py` prints a table: the kernels each way, the copy, eager PyTorch
and, with --compile, `torch.compile` of the reference; --launch tries ways to cut each shape.
`pytest benchmarks/bench_bn_prior.py --benchmark-only` times the same cases. Bytes counted: forward
x, y, the residual and its bits; backward dy, x, dx, dresidual and the bits; nothing smaller.
On the CPU the kernels run in Triton's interpreter on tiny shapes: what that takes means nothing.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace

import pytest
import torch
from timing import Timing, copies, copy_bandwidth, device, measure, on_gpu, record, sets_for, table

pytest.importorskip("triton")
# the launch is the kernels' own business, which fastrecycle.ops does not show
kernels = importlib.import_module("fastrecycle_kernels.bn_prior")
reference = importlib.import_module("fastrecycle_kernels.reference")

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    channels: int
    side: int
    relu: bool = True
    residual: bool = False
    count: int = 1  # of such layers in a ResNet-50
    batch: int = 25
    segments: int = 1

    def __str__(self) -> str:
        kind = "+residual" if self.residual else "" if self.relu else " no relu"
        tasks = f"{self.segments} x " if self.segments > 1 else ""
        images = self.batch // self.segments
        return f"{tasks}{images} x {self.channels} x {self.side}^2{kind}"

    @property
    def numbers(self) -> int:
        return self.batch * self.channels * self.side**2

    def moved_bytes(self, direction: str) -> int:
        """Forward x, y (residual, bits); backward dy, x, dx (dresidual, bits); bf16."""
        tensors = (2 if direction == "forward" else 3) + self.residual
        bits = self.numbers // 8 if self.residual and self.relu else 0
        return 2 * tensors * self.numbers + bits


RESNET50 = [
    Case(64, 112),
    Case(64, 56, count=6), Case(256, 56, relu=False), Case(256, 56, residual=True, count=3),
    Case(128, 56), Case(128, 28, count=7), Case(512, 28, relu=False),
    Case(512, 28, residual=True, count=4),
    Case(256, 28), Case(256, 14, count=11), Case(1024, 14, relu=False),
    Case(1024, 14, residual=True, count=6),
    Case(512, 14), Case(512, 7, count=5), Case(2048, 7, relu=False),
    Case(2048, 7, residual=True, count=3),
]  # fmt: skip
LARGE = [
    Case(64, 112, batch=200, segments=8),
    Case(256, 56, residual=True, batch=400, segments=8),
    Case(2048, 7, residual=True, batch=200, segments=8),
    Case(256, 56, batch=669),  # x of 1 GiB
    Case(256, 56, residual=True, batch=669),
]
SMALL = [Case(16, 5, batch=4), Case(20, 5, residual=True, batch=4, segments=2)]  # for the CPU
CASES = [*RESNET50, *LARGE] if on_gpu() else SMALL
# what decides most of the time, each of a kind of its own
TUNED = [c for c in RESNET50 if c.count > 2 or c.side == 112] + LARGE[:2] if on_gpu() else SMALL[:1]


class Inputs:
    """Random tensors of a case, fresh for each set."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.bfloat16):
        shape = (case.batch, case.channels, case.side, case.side)

        def images() -> torch.Tensor:
            x = torch.randn(shape, device=device(), dtype=dtype)
            return x.to(memory_format=torch.channels_last)

        def row() -> torch.Tensor:
            return torch.randn(case.channels, device=device())

        self.case = case
        self.x, self.flow = images(), images()
        self.residual = images() if case.residual else None
        self.stored = row(), row().square() + 0.1, row(), row()
        moments = torch.randn(2, case.segments, case.channels, device=device())
        self.dmu, self.dsigma2 = 100 * moments  # so that they show beside dy
        self.bits = torch.randint(0, 256, (case.numbers // 8,), device=device(), dtype=torch.uint8)

    @property
    def rest(self) -> tuple:
        case = self.case
        return EPS, case.segments, case.relu, self.residual

    def forward(self) -> object:
        """The pass over x: y and the moments of chunks."""
        ops = torch.ops.fastrecycle
        return ops.bn_prior_chunks(self.x, *self.stored, *self.rest, None, True)

    def merged(self) -> object:
        """The same, and the moments of tasks."""
        return torch.ops.fastrecycle.bn_prior(self.x, *self.stored, *self.rest)

    def backward(self) -> object:
        packed = self.case.relu and self.case.residual
        bits = self.bits if packed else self.bits[:0]
        return torch.ops.fastrecycle.bn_prior_backward(
            self.flow, None, self.dmu, self.dsigma2, self.x, bits, self.dmu, *self.stored, EPS,
            self.case.relu, packed,
        )  # fmt: skip

    def both(self, bn: Callable) -> list[torch.Tensor]:
        """Forward and backward through autograd: y, mu, sigma2, dx, dresidual."""
        leaves = [t.detach().requires_grad_() for t in (self.x, self.residual) if t is not None]
        residual = leaves[1] if self.case.residual else None
        outputs = bn(leaves[0], *self.stored, *self.rest[:3], residual)
        y, mu, sigma2 = outputs
        gradients = torch.autograd.grad(
            outputs,
            leaves,
            [self.flow.to(y.dtype), self.dmu.to(mu.dtype), self.dsigma2.to(mu.dtype)],
        )
        return [y.detach(), mu.detach(), sigma2.detach(), *gradients]


def eager(x, mean, var, weight, bias, eps, segments, relu, residual):
    """PyTorch's own BatchNorm in x's dtype, and moments in float32."""
    y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=eps)
    y = y if residual is None else y + residual
    parts = x.float().unflatten(0, (segments, -1))
    moments = parts.mean((1, 3, 4)), parts.var((1, 3, 4), correction=0)
    return (y.relu() if relu else y, *moments)


def check(case: Case) -> None:
    """Fresh inputs: no further from float32 than twice PyTorch's own bf16.

    Raises:
        AssertionError: further.

    """
    case = replace(case, batch=min(case.batch, 2 * case.segments))
    inputs = Inputs(case, torch.bfloat16 if on_gpu() else torch.float16)
    full = copy(inputs)
    full.x, full.flow = inputs.x.float(), inputs.flow.float()
    full.residual = None if inputs.residual is None else inputs.residual.float()
    exact, own = full.both(reference.bn_prior), inputs.both(eager)
    names = ("y", "mu", "sigma2", "dx", "dresidual")
    for name, a, b, c in zip(names, inputs.both(kernels.bn_prior), own, exact):
        error, allowed = ((t.double() - c.double()).abs().max().item() for t in (a, b))
        scale = c.abs().max().item()
        assert error <= 2 * allowed + 1e-5 * scale, (str(case), name, error, allowed)


def time_case(case: Case, repeats: int, compiled: bool) -> dict[str, Timing]:
    check(case)
    moved = {d: case.moved_bytes(d) for d in ("forward", "backward")}
    count = sets_for(min(moved.values()), most=24)
    sets = [Inputs(case, torch.bfloat16 if on_gpu() else torch.float16) for _ in range(count)]
    variants: dict[str, list[Callable]] = {}
    for direction in moved:
        variants[direction] = [getattr(s, direction) for s in sets]
        variants[f"{direction} copy"] = copies(moved[direction], count)
    variants["forward merged"] = [s.merged for s in sets]
    few = sets[: max(2, count // 4)]
    variants["both"] = [lambda s=s: s.both(kernels.bn_prior) for s in few]
    variants["both eager"] = [lambda s=s: s.both(eager) for s in few]
    if compiled:
        fused = torch.compile(reference.bn_prior, dynamic=False)
        variants["both compiled"] = [lambda s=s: s.both(fused) for s in few]
    return measure(variants, repeats)


def row_of(case: Case, times: dict[str, Timing]) -> dict[str, object]:
    row: dict[str, object] = {"case": str(case), "layers": case.count}
    for direction in ("forward", "backward"):
        took, floor = times[direction].median_ms, times[f"{direction} copy"].median_ms
        row[f"{direction}_us"] = 1000 * took
        row[f"{direction}_p20_us"] = 1000 * times[direction].p20_ms
        row[f"{direction}_p80_us"] = 1000 * times[direction].p80_ms
        row[f"{direction}_copy_us"] = 1000 * floor
        row[f"{direction}_share"] = floor / took
    for name in ("forward merged", "both", "both eager", "both compiled"):
        if name in times:
            row[f"{name.replace(' ', '_')}_us"] = 1000 * times[name].median_ms
    return row


def print_ops(repeats: int, compiled: bool) -> None:
    if on_gpu():
        print(f"copy of 2 GiB: {copy_bandwidth() / 1e12:.2f} TB/s read and written")
    rows = []
    for case in CASES:
        torch.compiler.reset()
        rows.append(row_of(case, time_case(case, repeats, compiled)))
        if on_gpu():
            torch.cuda.empty_cache()
    shown = [{k: v for k, v in row.items() if "_p" not in k} for row in rows]
    print(table(shown))
    if not on_gpu():
        print("CPU: Triton's interpreter on tiny shapes, which says nothing of speed")
        return
    net = [row for row, case in zip(rows, CASES, strict=True) if case in RESNET50]
    for column in net[0]:
        if column.endswith("_us") and "_p" not in column and all(column in row for row in net):
            total = sum(row["layers"] * row[column] for row in net) / 1000
            print(f"ResNet-50, 53 layers: {column[:-3]} {total:.3f} ms")
    record("bn_prior", rows)


# ------------------------------------------------------------------ ways to cut a shape


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@contextmanager
def cut(block_r: int, block_c: int, warps: int, programs: int) -> Iterator[None]:
    """Launches of this kind instead of the table's."""
    before = kernels.launch

    def launch(rows: int, channels: int, segments: int, itemsize: int = 2):
        c = min(block_c, max(16, 1 << (channels - 1).bit_length()))
        r = block_r * (block_c // c)
        share = max(1, programs // (segments * ceil_div(channels, c)))
        tiles = ceil_div(ceil_div(rows, r), share)
        return kernels.Launch(r, c, warps, tiles, ceil_div(rows, tiles * r))

    kernels.launch = launch
    try:
        yield
    finally:
        kernels.launch = before


TILES = [(32, 64, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8), (32, 128, 4), (16, 256, 4)]
PROGRAMS = [528, 1056, 2112, 4224]


def print_launches(repeats: int) -> None:
    """The best cuts of each shape, forward and backward together and apart."""
    rows = []
    for case in TUNED:
        count = sets_for(case.moved_bytes("forward"), most=12)
        sets = [Inputs(case, torch.bfloat16 if on_gpu() else torch.float16) for _ in range(count)]
        found: dict[tuple, dict[str, float]] = {}
        for tile, programs in itertools.product(TILES, PROGRAMS):
            with cut(*tile, programs):
                times = measure({d: [getattr(s, d) for s in sets] for d in ("forward", "backward")},
                                repeats, warmup=1)  # fmt: skip
            found[(*tile, programs)] = {d: 1000 * t.median_ms for d, t in times.items()}
        times = measure(
            {d: [getattr(s, d) for s in sets] for d in ("forward", "backward")}, repeats
        )
        now = {d: 1000 * t.median_ms for d, t in times.items()}
        rows_of_task = case.batch // case.segments * case.side**2
        plan = kernels.launch(rows_of_task, case.channels, case.segments)
        row: dict[str, object] = {
            "case": str(case), "now": f"{plan.block_r}x{plan.block_c} w{plan.warps}",
            "now_us": f"{now['forward']:.2f}+{now['backward']:.2f}",
        }  # fmt: skip

        def text(key: tuple, found: dict = found) -> str:
            r, c, warps, programs = key
            took = found[key]
            return f"{r}x{c} w{warps} p{programs}: {took['forward']:.2f}+{took['backward']:.2f}"

        ranked = sorted(found, key=lambda key: sum(found[key].values()))
        row |= {"best": text(ranked[0]), "second": text(ranked[1]), "third": text(ranked[2])}
        for d in ("forward", "backward"):
            row[f"best {d}"] = text(min(found, key=lambda key, d=d: found[key][d]))
        rows.append(row)
        del sets
    print("us: forward + backward; block_r x block_c, warps, programs")
    print(table(rows))


# ------------------------------------------------------------------ pytest-benchmark


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bn_prior(benchmark, case):
    times = time_case(case, repeats=10, compiled=False)
    benchmark.extra_info |= row_of(case, times)
    benchmark.extra_info["note"] = (
        "cold, in CUDA graphs" if on_gpu() else "CPU: Triton's interpreter, no measure of speed"
    )
    inputs = Inputs(case, torch.bfloat16 if on_gpu() else torch.float16)

    def run():
        inputs.both(kernels.bn_prior)
        if on_gpu():
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launch", action="store_true", help="try ways to cut each shape instead")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (slow to build)")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu() else 2)
    arguments = parser.parse_args()
    if arguments.launch:
        print_launches(arguments.repeats)
    else:
        print_ops(arguments.repeats, arguments.compile)


if __name__ == "__main__":
    main()

"""jitter_pixels and pixel_step against what they replace in PyTorch, and a copy of their bytes.

`python benchmarks/bench_pixels.py` prints one table, each cut of the kernels a row; `pytest
benchmarks/bench_pixels.py --benchmark-only` does the same case by case. "eager" is an inversion's
iteration without the two: gathers by an index, conversions, the fused Adam, a clamp. Bytes: of the
jitter, images read and two results written; of the step, two gradients read, images and Adam's two
moments read and written.
"""

from __future__ import annotations

import argparse
import importlib
from contextlib import contextmanager
from functools import partial

import compare
import pytest
import torch
from compare import Case
from timing import copies, device, on_gpu, record, sets_for

from fastrecycle.jitter import Jitter, gather_pixels, inverse

pytest.importorskip("triton")
# variants of a launch are the kernels' own business, which fastrecycle.ops does not show
kernels = importlib.import_module("fastrecycle_kernels.pixels")
reference = importlib.import_module("fastrecycle_kernels.reference")

HALF = torch.bfloat16 if on_gpu() else torch.float16
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PRIOR_MEAN, PRIOR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOW = [-m / s for m, s in zip(MEAN, STD, strict=True)]
HIGH = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]
BETAS, EPS, RATE = (0.5, 0.99), 1e-8, 0.25
CUTS = [  # pixels of a program, warps
    (1024, 4), (512, 4), (512, 2), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (256, 2),
]  # fmt: skip
CUTS = CUTS if on_gpu() else CUTS[:1]


@contextmanager
def cut(**constants):
    """Other launch constants than the file's."""
    before = {name: getattr(kernels, name) for name in constants}
    vars(kernels).update(constants)
    try:
        yield
    finally:
        vars(kernels).update(before)


class Inputs:
    """Images, gradients and Adam's state of some tasks, and their jitter."""

    def __init__(self, tasks: int, per_task: int, side: int, dtype: torch.dtype):
        where, shape = device(), (tasks, per_task, 3, side, side)
        reach = side // 8
        self.images = 0.5 * torch.randn(shape, device=where)
        self.shift = torch.randint(-reach, reach + 1, (tasks, 2), device=where)
        self.flip = torch.rand(tasks, device=where) < 0.5
        self.d_seen = torch.randn(shape, device=where).to(dtype)
        self.d_natural = torch.randn((tasks * per_task, *shape[2:]), device=where).to(dtype)
        self.exp_avg = 0.1 * torch.randn(shape, device=where)
        self.exp_avg_sq = 0.1 * torch.rand(shape, device=where)
        self.step = torch.full((), 3.0, device=where)
        self.lr = torch.tensor(RATE, device=where)
        self.dtype, self.side = dtype, side
        self.mean, self.std, self.prior_mean, self.prior_std, self.low, self.high = (
            torch.tensor(v, device=where)[:, None, None]
            for v in (MEAN, STD, PRIOR_MEAN, PRIOR_STD, LOW, HIGH)
        )
        zero = torch.zeros(1, tasks, dtype=torch.int64, device=where)
        self.jitter = Jitter(self.shift[None], self.flip[None], zero)
        self.clock = zero[:, 0]
        fast = on_gpu()
        self.adam = torch.optim.Adam(
            [self.images], self.lr if fast else RATE, BETAS, EPS, capturable=fast, fused=fast
        )
        self.adam.state[self.images] |= {
            "step": self.step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq
        }  # fmt: skip

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        return self.images, self.exp_avg, self.exp_avg_sq, self.step

    def to_networks(self, code):
        return code(
            self.images, self.shift, self.flip, MEAN, STD, PRIOR_MEAN, PRIOR_STD, self.dtype
        )

    def eager_to_networks(self):
        seen = gather_pixels(self.images, *self.jitter.index(self.clock, self.side))
        natural = (seen * self.std + self.mean - self.prior_mean) / self.prior_std
        return seen.to(self.dtype), natural.flatten(0, 1).to(self.dtype)

    def and_back(self, code):
        code(
            *self.state, self.d_seen, self.d_natural, self.shift, self.flip, self.lr, BETAS, EPS,
            LOW, HIGH, STD, PRIOR_STD,
        )  # fmt: skip

    def eager_and_back(self):
        rows, columns = self.jitter.index(self.clock, self.side)
        factor = self.std / self.prior_std
        gradient = self.d_seen.float() + factor * self.d_natural.view_as(self.d_seen).float()
        self.images.grad = gather_pixels(gradient, inverse(rows), inverse(columns))
        self.adam.step()
        self.images.clamp_(self.low, self.high)


def case(way: str, tasks: int, per_task: int, side: int, dtype: torch.dtype = HALF) -> Case:
    """`way`: "jitter" or "step"."""
    numbers = tasks * per_task * 3 * side * side
    jitter = way == "jitter"
    moved = numbers * (4 + 2 * dtype.itemsize if jitter else 24 + 2 * dtype.itemsize)
    sets = [Inputs(tasks, per_task, side, dtype) for _ in range(sets_for(moved, most=16))]
    names = ("BLOCK", "WARPS") if jitter else ("STEP_BLOCK", "STEP_WARPS")
    ours = kernels.jitter_pixels if jitter else kernels.pixel_step
    peer = reference.jitter_pixels if jitter else reference.pixel_step
    method = Inputs.to_networks if jitter else Inputs.and_back

    def calling(code, **constants):
        def run(inputs):
            with cut(**constants):
                return method(inputs, code)

        return run

    ways = {f"ours {c}": calling(ours, **dict(zip(names, c, strict=True))) for c in CUTS}
    ways["eager"] = Inputs.eager_to_networks if jitter else Inputs.eager_and_back
    if on_gpu():
        ways["compiled"] = calling(torch.compile(peer, fullgraph=True, dynamic=False))

    def results(run):
        torch.manual_seed(1)
        inputs = Inputs(tasks, per_task, side, dtype)
        made = run(inputs)
        return made if jitter else inputs.state

    def check():
        want = results(calling(peer))
        for name, run in ways.items():
            for a, b in zip(results(run), want, strict=True):
                # one rounding to the dtype, which is float32 in the step
                limit = torch.finfo(a.dtype).eps * (1 + b.float().abs()) + 1e-5
                assert ((a.float() - b.float()).abs() <= limit).all(), name

    variants = {name: lambda i, run=run: partial(run, sets[i]) for name, run in ways.items()}
    name = f"{way} {tasks}x{per_task}x3x{side}x{side} {str(dtype)[6:]}"
    return Case(name, moved, "copy", variants, check, {"copy": copies(moved)})


CASES = {
    "jitter_25": lambda: case("jitter", 1, 25, 224),
    "step_25": lambda: case("step", 1, 25, 224),
    "jitter_100": lambda: case("jitter", 4, 25, 224),
    "step_100": lambda: case("step", 4, 25, 224),
    "jitter_fp32": lambda: case("jitter", 1, 25, 224, torch.float32),
    "step_fp32": lambda: case("step", 1, 25, 224, torch.float32),
}
SMALL = {"jitter": lambda: case("jitter", 2, 2, 24), "step": lambda: case("step", 2, 2, 24)}


@pytest.mark.parametrize("name", CASES if on_gpu() else SMALL)
def test_pixels(benchmark, name):
    made = (CASES if on_gpu() else SMALL)[name]()
    compare.bench_with_pytest(benchmark, lambda: made, next(iter(made.variants)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    cases = {k: v for k, v in (CASES if on_gpu() else SMALL).items() if k.startswith(options.only)}
    rows = compare.report("pixels", list(cases.values()))
    if options.record:
        record("pixels", rows)


if __name__ == "__main__":
    main()

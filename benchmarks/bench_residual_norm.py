"""residual_norm against PyTorch, eager and compiled, and against a cold copy of the bytes.

`python benchmarks/bench_residual_norm.py` prints one table, each cut of the kernels a row;
`pytest benchmarks/bench_residual_norm.py --benchmark-only` does the same case by case. Bytes:
forward x and branch read, the stream and y written; backward dy, ds and the stream read, dx
written, and dbranch where it is not dx; a norm alone reads x and writes y.
"""

from __future__ import annotations

import argparse
import importlib
from contextlib import contextmanager

import compare
import pytest
import torch
from compare import Case
from timing import copies, device, on_gpu, record, sets_for

pytest.importorskip("triton")
# variants of a launch are the kernels' own business, which fastrecycle.ops does not show
kernels = importlib.import_module("fastrecycle_kernels.residual_norm")
reference = importlib.import_module("fastrecycle_kernels.reference")

EPS = 1e-5
BF16 = torch.bfloat16 if on_gpu() else torch.float32  # the interpreter's bf16 is not to be trusted
CUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)] if on_gpu() else [(4, 4)]
FEW = [(1, 1), (2, 2), (2, 4), (4, 4)] if on_gpu() else CUTS
NARROW = [(2, 1), (4, 1), (4, 2), (4, 4), (8, 4), (16, 4)]


@contextmanager
def cut(name: str, rows: int, warps: int):
    """Other launch constants than the file's."""
    before = getattr(kernels, name)
    setattr(kernels, name, (rows, warps))
    try:
        yield
    finally:
        setattr(kernels, name, before)


def within(name: str, cuts: tuple[int, int], call):
    def run():
        with cut(name, *cuts):
            return call()

    return run


def rows_of(rows: int, width: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(rows, width, device=device()).to(dtype) for _ in range(n)]


def eager(x, branch, weight, bias, scale):
    """As a ViT has it: the sum, then the norm in float32."""
    stream = x if branch is None else x + scale * branch
    y = torch.nn.functional.layer_norm(stream.float(), weight.shape, weight, bias, EPS)
    return stream, y.to(x.dtype if branch is None else branch.dtype)


def eager_gradient(dy, ds, stream, weight, mean, rstd, scale, dtype):
    """PyTorch's own backward of the norm, then the sum and the branch's share."""
    dx = torch.ops.aten.native_layer_norm_backward(
        dy.float(), stream.float(), weight.shape, mean[:, None], rstd[:, None], weight, None,
        [True, False, False],
    )[0]  # fmt: skip
    dx = (dx + ds.float()).to(stream.dtype)
    return dx, (dx if scale == 1 and dtype == dx.dtype else (scale * dx).to(dtype))


def assert_near(got, want, peer, name) -> None:
    """No further from float32 than twice PyTorch's own arithmetic in the same dtypes."""
    for g, w, p in zip(got, want, peer, strict=True):
        error, allowed = (torch.linalg.vector_norm(t.float() - w) for t in (g, p))
        bound = 2 * allowed + 1e-6 * torch.linalg.vector_norm(w)
        assert error <= bound, (name, float(error), float(bound))


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def forward(
    rows: int, width: int, stream: torch.dtype = BF16, branch: bool = True, compile: bool = True,
    cuts: list | None = None,
) -> Case:  # fmt: skip
    numbers = rows * width
    moved = numbers * (2 * stream.itemsize + 2 * BF16.itemsize if branch else 2 * stream.itemsize)
    n = sets_for(moved, most=16)
    x = rows_of(rows, width, n, stream)
    more = rows_of(rows, width, n, BF16) if branch else [None] * n
    weight, bias = (torch.randn(width, device=device()) for _ in range(2))

    def ours(cuts):
        def make(i):
            def call():
                return kernels._launch_forward(
                    x[i], more[i], weight, bias, EPS, 1.0, BF16 if branch else stream
                )

            return within("FORWARD", cuts, call)

        return make

    variants = {f"ours {c}": ours(c) for c in cuts or CUTS}
    variants["eager"] = lambda i: lambda: eager(x[i], more[i], weight, bias, 1.0)
    if on_gpu() and compile:
        traced = compiled(eager)
        variants["compiled"] = lambda i: lambda: traced(x[i], more[i], weight, bias, 1.0)

    def check():
        few = slice(None, 4096)
        for i in range(min(n, 2)):
            extra = None if more[i] is None else more[i][few].float()
            want = reference.residual_norm(x[i][few].float(), extra, weight, bias, EPS)
            extra = None if more[i] is None else more[i][few]
            peer = eager(x[i][few], extra, weight, bias, 1.0)
            for name, make in variants.items():
                got = [t[few] for t in make(i)()[:2]]
                first = 0 if branch else 1
                assert_near(got[first:], want[first:], peer[first:], name)

    kind = f"{str(stream)[6:]} stream" + ("" if branch else ", no branch")
    return Case(
        f"forward {rows}x{width}, {kind}", moved, "copy", variants, check, {"copy": copies(moved)}
    )


def backward(
    rows: int, width: int, stream: torch.dtype = BF16, compile: bool = True,
    cuts: list | None = None,
) -> Case:  # fmt: skip
    numbers = rows * width
    second = BF16 if stream != BF16 else None  # dbranch's dtype, where it is written apart
    moved = numbers * (BF16.itemsize + 3 * stream.itemsize + (BF16.itemsize if second else 0))
    n = sets_for(moved, most=16)
    dy = rows_of(rows, width, n, BF16)
    ds, s = rows_of(rows, width, n, stream), rows_of(rows, width, n, stream)
    weight = torch.randn(width, device=device())
    mean = [t.float().mean(1) for t in s]
    rstd = [(t.float().var(1, correction=0) + EPS).rsqrt() for t in s]

    def ours(cuts):
        def make(i):
            def call():
                dx, dbranch = kernels._launch_backward(
                    dy[i], ds[i], s[i], weight, mean[i], rstd[i], 1.0, stream, second
                )
                return dx, dbranch if second else dx

            return within("BACKWARD", cuts, call)

        return make

    def arguments(i):
        return dy[i], ds[i], s[i], weight, mean[i], rstd[i], 1.0, BF16

    variants = {f"ours {c}": ours(c) for c in cuts or CUTS}
    variants["eager"] = lambda i: lambda: eager_gradient(*arguments(i))
    if on_gpu() and compile:
        traced = compiled(eager_gradient)
        variants["compiled"] = lambda i: lambda: traced(*arguments(i))

    def check():
        few = slice(None, 4096)
        for i in range(min(n, 2)):
            x = s[i][few].float().requires_grad_()
            outputs = reference.residual_norm(x, torch.zeros_like(x), weight, 0 * weight, EPS)
            (dx,) = torch.autograd.grad(outputs, x, (ds[i][few].float(), dy[i][few].float()))
            peer = [t[few] for t in eager_gradient(*arguments(i))]
            for name, make in variants.items():
                assert_near([t[few] for t in make(i)()], [dx, dx], peer, name)

    name = f"backward {rows}x{width}, {str(stream)[6:]} stream"
    return Case(name, moved, "copy", variants, check, {"copy": copies(moved)})


FP32 = torch.float32
LARGE = 2**30 // (768 * 2)  # rows of a stream of 1 GiB
CASES = {
    "forward_25": lambda: forward(4925, 768),
    "forward_100": lambda: forward(19700, 768, compile=False),
    "forward_sparse": lambda: forward(5000, 768, compile=False, cuts=FEW),
    "forward_fp32": lambda: forward(19700, 768, FP32, cuts=FEW),
    "forward_norm": lambda: forward(19700, 768, branch=False, compile=False, cuts=FEW),
    "forward_192": lambda: forward(19700, 192, compile=False, cuts=NARROW),
    "forward_512": lambda: forward(19700, 512, compile=False, cuts=FEW),
    "forward_1gib": lambda: forward(LARGE, 768, compile=False, cuts=FEW),
    "backward_25": lambda: backward(4925, 768),
    "backward_100": lambda: backward(19700, 768, compile=False),
    "backward_sparse": lambda: backward(5000, 768, compile=False, cuts=FEW),
    "backward_fp32": lambda: backward(19700, 768, FP32, cuts=FEW),
    "backward_192": lambda: backward(19700, 192, compile=False, cuts=NARROW),
    "backward_512": lambda: backward(19700, 512, compile=False, cuts=FEW),
    "backward_1gib": lambda: backward(LARGE, 768, compile=False, cuts=FEW),
}
SMALL = {
    "forward": lambda: forward(5, 64),
    "norm": lambda: forward(5, 64, branch=False),
    "backward": lambda: backward(5, 64),
}


@pytest.mark.parametrize("name", CASES if on_gpu() else SMALL)
def test_residual_norm(benchmark, name):
    case = (CASES if on_gpu() else SMALL)[name]
    compare.bench_with_pytest(benchmark, case, f"ours {(4, 4)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    cases = {k: v for k, v in (CASES if on_gpu() else SMALL).items() if k.startswith(options.only)}
    rows = compare.report("residual_norm", list(cases.values()))
    if options.record:
        record("residual_norm", rows)


if __name__ == "__main__":
    main()

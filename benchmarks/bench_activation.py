"""activation against PyTorch, eager and compiled, and against a cold copy of the bytes.

`python benchmarks/bench_activation.py` prints one table, each cut of the kernels a row;
`pytest benchmarks/bench_activation.py --benchmark-only` does the same case by case. Bytes: forward
u read and g written; backward dg and u read, du written.
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
kernels = importlib.import_module("fastrecycle_kernels.activation")
reference = importlib.import_module("fastrecycle_kernels.reference")

BF16 = torch.bfloat16 if on_gpu() else torch.float32  # the interpreter's bf16 is not to be trusted
CUTS = [(1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8)] if on_gpu() else [(2048, 4)]
FEW = [(1024, 4), (2048, 4), (4096, 8)] if on_gpu() else CUTS


@contextmanager
def cut(block: int, warps: int):
    """Other launch constants than the file's."""
    before = kernels.BLOCK, kernels.WARPS
    kernels.BLOCK, kernels.WARPS = block, warps
    try:
        yield
    finally:
        kernels.BLOCK, kernels.WARPS = before


def within(cuts: tuple[int, int], call):
    def run():
        with cut(*cuts):
            return call()

    return run


def eager(u, kind):
    return torch.nn.functional.gelu(u) if kind == "gelu" else u * torch.sigmoid(1.702 * u)


def eager_gradient(dg, u, kind):
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(dg, u)
    share = torch.sigmoid(1.702 * u)
    return dg * (share * (1 + 1.702 * u * (1 - share)))


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def assert_near(got, want, peer, name) -> None:
    """No further from float32 than twice PyTorch's own arithmetic in the same dtype."""
    error, allowed = (torch.linalg.vector_norm(t.float() - want) for t in (got, peer))
    bound = 2 * allowed + 1e-6 * torch.linalg.vector_norm(want)
    assert error <= bound, (name, float(error), float(bound))


def case(
    direction: str, kind: str, rows: int, width: int, compile: bool = True,
    cuts: list | None = None,
) -> Case:  # fmt: skip
    forward = direction == "forward"
    moved = rows * width * BF16.itemsize * (2 if forward else 3)
    n = sets_for(moved, most=16)
    u, dg = ([torch.randn(rows, width, device=device()).to(BF16) for _ in range(n)] for _ in "ug")

    def call(function, i):
        return function(u[i], kind) if forward else function(dg[i], u[i], kind)

    def ours(cuts):
        launch = kernels._launch_forward if forward else kernels._launch_backward
        return lambda i: within(cuts, lambda: call(launch, i))

    plain = eager if forward else eager_gradient
    variants = {f"ours {c}": ours(c) for c in cuts or CUTS}
    variants["eager"] = lambda i: lambda: call(plain, i)
    if on_gpu() and compile:
        traced = compiled(plain)
        variants["compiled"] = lambda i: lambda: call(traced, i)

    def check():
        few = slice(None, 4096)
        for i in range(min(n, 2)):
            x = u[i][few].float().requires_grad_()
            want = reference.activation(x, kind)
            if not forward:
                (want,) = torch.autograd.grad(want, x, dg[i][few].float())
            peer = call(plain, i)[few]
            for name, make in variants.items():
                assert_near(make(i)()[few], want.detach(), peer, name)

    name = f"{kind} {direction} {rows}x{width}"
    return Case(name, moved, "copy", variants, check, {"copy": copies(moved)})


LARGE = 2**30 // (3072 * 2)  # rows of 1 GiB
CASES = {
    "gelu_forward": lambda: case("forward", "gelu", 19700, 3072),
    "gelu_backward": lambda: case("backward", "gelu", 19700, 3072),
    "quick_gelu_forward": lambda: case("forward", "quick_gelu", 19700, 3072, cuts=FEW),
    "quick_gelu_backward": lambda: case("backward", "quick_gelu", 19700, 3072, cuts=FEW),
    "gelu_forward_25": lambda: case("forward", "gelu", 4925, 3072, compile=False, cuts=FEW),
    "gelu_backward_25": lambda: case("backward", "gelu", 4925, 3072, compile=False, cuts=FEW),
    "gelu_forward_1gib": lambda: case("forward", "gelu", LARGE, 3072, compile=False, cuts=FEW),
    "gelu_backward_1gib": lambda: case("backward", "gelu", LARGE, 3072, compile=False, cuts=FEW),
}
SMALL = {
    "gelu_forward": lambda: case("forward", "gelu", 5, 64),
    "quick_gelu_backward": lambda: case("backward", "quick_gelu", 5, 64),
}


@pytest.mark.parametrize("name", CASES if on_gpu() else SMALL)
def test_activation(benchmark, name):
    compare.bench_with_pytest(benchmark, (CASES if on_gpu() else SMALL)[name], f"ours {(2048, 4)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    cases = {k: v for k, v in (CASES if on_gpu() else SMALL).items() if k.startswith(options.only)}
    rows = compare.report("activation", list(cases.values()))
    if options.record:
        record("activation", rows)


if __name__ == "__main__":
    main()

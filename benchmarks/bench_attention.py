"""packed_attention, forward and gradient, against cuDNN's and flash attention and a cold copy.

`python benchmarks/bench_attention.py` prints one table and, last, the fastest cut of each shape;
`pytest benchmarks/bench_attention.py --benchmark-only` does the same case by case. Bytes: qkv and y
forward; qkv, y, dy and dqkv backward. The library's operators are those that PyTorch's scaled dot
product attention calls; their three gradients are copied into the one buffer that the QKV product's
gradient reads.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import compare
import pytest
import torch
from compare import Case
from timing import copies, device, on_gpu, record, sets_for
from torch import Tensor

pytest.importorskip("triton")
# variants of a launch are the kernels' own business, which fastrecycle.ops does not show
kernels = importlib.import_module("fastrecycle_kernels.attention")
reference = importlib.import_module("fastrecycle_kernels.reference")
Cut = kernels.Cut

DTYPE = torch.bfloat16 if on_gpu() else torch.float32
aten = torch.ops.aten


class Shape(NamedTuple):
    images: int
    tokens: int
    queries: int
    heads: int = 12
    width: int = 64


# ------------------------------------------------------------------ the library's ways


class Cudnn:
    @staticmethod
    def forward(q, k, v):
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)

    @staticmethod
    def backward(dy, q, k, v, saved):
        y, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
        return aten._scaled_dot_product_cudnn_attention_backward(
            dy, q, k, v, y, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False
        )


class Flash:
    @staticmethod
    def forward(q, k, v):
        return aten._scaled_dot_product_flash_attention(q, k, v)

    @staticmethod
    def backward(dy, q, k, v, saved):
        y, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
        return aten._scaled_dot_product_flash_attention_backward(
            dy, q, k, v, y, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
        )


def by_head(y: Tensor, heads: int) -> Tensor:
    return y.unflatten(2, (heads, -1)).transpose(1, 2)


def pack(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(B, H, N, d) each -> (B, N, 3, H, d)."""
    q, k, v = gradients
    if q.shape[2] < k.shape[2]:
        q = torch.nn.functional.pad(q, (0, 0, 0, k.shape[2] - q.shape[2]))
    return torch.stack([g.transpose(1, 2) for g in (q, k, v)], 2)


# ------------------------------------------------------------------ cuts to try


def forward_cuts(tokens: int, queries: int) -> list[Cut]:
    if queries <= 16:
        return [
            Cut(16, 64, 4, 2, 1), Cut(16, 64, 4, 2, 0), Cut(16, 32, 2, 2, 0),
            Cut(16, 128, 4, 1, 0),
        ]  # fmt: skip
    if tokens <= 64:
        return [
            Cut(64, 64, 4, 1, 1), Cut(64, 64, 4, 1, 0), Cut(64, 32, 4, 2, 1),
            Cut(32, 64, 4, 1, 0),
        ]  # fmt: skip
    cuts = [
        Cut(64, 64, 4, 2, 1), Cut(64, 64, 4, 2, 0), Cut(128, 64, 8, 2, 1), Cut(64, 128, 4, 1, 1),
        Cut(128, 128, 8, 1, 1), Cut(128, 64, 4, 2, 1), Cut(64, 32, 4, 3, 1),
    ]  # fmt: skip
    return [*cuts, Cut(64, 256, 4, 1, 1), Cut(128, 256, 8, 1, 1)] if tokens > 128 else cuts


def backward_cuts(tokens: int, queries: int) -> list[tuple[str, Cut]]:
    if queries <= 16:
        return [
            ("rows", Cut(16, 64, 4, 1, 1)), ("rows", Cut(16, 64, 4, 1, 0)),
            ("rows", Cut(16, 64, 4, 2, 1)), ("rows", Cut(16, 32, 4, 2, 1)),
            ("rows", Cut(16, 64, 2, 1, 0)), ("rows", Cut(16, 128, 4, 1, 1)),
        ]  # fmt: skip
    if tokens <= 64:
        return [
            ("rows", Cut(64, 64, 4, 1, 1)),
            ("rows", Cut(64, 64, 4, 1, 0)),
            ("columns", Cut(64, 64, 4, 1, 1)),
            ("columns", Cut(64, 64, 4, 1, 0)),
            ("columns", Cut(64, 64, 8, 1, 1)),
            ("rows", Cut(64, 64, 8, 1, 1)),
        ]  # fmt: skip  (64 x 32 at 4 warps: wrong sums from Triton 3.6)
    if tokens <= 128:
        return [
            ("both", Cut(64, 64, 4, 2, 1)), ("rows", Cut(128, 32, 4, 1, 0)),
            ("rows", Cut(128, 32, 8, 1, 0)), ("rows", Cut(128, 32, 8, 1, 1)),
            ("rows", Cut(128, 32, 8, 2, 0)), ("rows", Cut(128, 32, 4, 2, 0)),
            ("columns", Cut(128, 32, 8, 3, 1)), ("columns", Cut(128, 64, 8, 1, 1)),
        ]  # fmt: skip
    return [
        ("both", Cut(64, 64, 4, 2, 1)), ("tiles", Cut(128, 32, 8, 2, 1, 128)),
        ("rows", Cut(256, 32, 8, 2, 1)), ("rows", Cut(256, 32, 8, 3, 1)),
        ("columns", Cut(256, 32, 8, 2, 1)), ("columns", Cut(256, 32, 8, 3, 1)),
        ("columns", Cut(128, 32, 4, 2, 1)), ("columns", Cut(128, 32, 4, 3, 1)),
        ("columns", Cut(128, 32, 8, 3, 1)), ("columns", Cut(128, 32, 8, 3, 1, 128)),
        ("columns", Cut(128, 32, 8, 2, 1, 128)), ("columns", Cut(128, 64, 8, 2, 1)),
        ("columns", Cut(128, 16, 4, 3, 1)), ("columns", Cut(64, 64, 4, 2, 1)),
    ]  # fmt: skip


def named(cut: Cut, method: str = "") -> str:
    name = f"ours, {method} {cut.rows}x{cut.chunk} w{cut.warps} s{cut.stages}"
    name = name.replace("  ", " ") + (" bulk" if cut.bulk else "")
    return name + (f" r{cut.registers}" if cut.registers else "")


# ------------------------------------------------------------------ cases


class Problem:
    """Inputs of one shape, and every way to y and dqkv."""

    def __init__(self, shape: Shape):
        self.shape = shape
        images, tokens, queries, heads, width = shape
        self.scale = width**-0.5
        size, rows = images * heads * width * DTYPE.itemsize, images * heads * queries
        self.bytes = {"forward": size * (3 * tokens + queries) + 4 * rows}
        self.bytes["backward"] = size * (6 * tokens + 2 * queries) + 4 * rows
        self.bytes["both"] = sum(self.bytes.values())
        sets = range(sets_for(self.bytes["forward"], most=16))

        def randn(*size):
            return [torch.randn(*size, device=device()).to(DTYPE) for _ in sets]

        self.qkv = randn(images, tokens, 3, heads, width)
        self.dy = randn(images, queries, heads * width)
        self.y, self.lse = zip(*(self.ours(i) for i in sets))
        self.libraries = {}
        for name, library in {"cuDNN": Cudnn, "flash": Flash}.items() if on_gpu() else ():
            try:
                y = library.forward(*self.parts(0))
                library.backward(by_head(self.dy[0], heads), *self.parts(0), y)
            except (RuntimeError, TypeError) as error:
                print(f"{name} is left out: {str(error).splitlines()[0]}")
            else:
                self.libraries[name] = library
        self.saved = {
            name: [library.forward(*self.parts(i)) for i in sets]
            for name, library in self.libraries.items()
        }
        x = self.qkv[0].double().requires_grad_()
        y = reference.packed_attention(x, queries=queries)[0]
        self.want = y.detach(), torch.autograd.grad(y, x, self.dy[0].double())[0]
        self.most = self.errors(*self.eager())

    def parts(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv[i].permute(2, 0, 3, 1, 4)
        return q[:, :, : self.shape.queries], k, v

    def eager(self) -> tuple[Tensor, Tensor]:
        """PyTorch's own choice, through autograd."""
        x = self.qkv[0].detach().requires_grad_()
        q, k, v = x.permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q[:, :, : self.shape.queries], k, v)
        y = y.transpose(1, 2).flatten(2)
        return y.detach(), torch.autograd.grad(y, x, self.dy[0])[0]

    def ours(self, i: int, cut: tuple = ()) -> tuple[Tensor, Tensor]:
        return kernels._attention(self.qkv[i], self.shape.queries, self.scale, list(cut), "", [])

    def our_gradient(self, i: int, y: Tensor, lse: Tensor, method: str = "", cut=()) -> Tensor:
        return kernels._attention_backward(
            self.qkv[i], y, self.dy[i], lse, self.scale, method, list(cut)
        )

    def gradient(self, name: str, i: int, saved=None) -> Tensor:
        dy = by_head(self.dy[i], self.shape.heads)
        saved = self.saved[name][i] if saved is None else saved
        return pack(self.libraries[name].backward(dy, *self.parts(i), saved))

    def errors(self, *found: Tensor) -> list[float]:
        """Of y and dqkv: |found - want| / |want|."""
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, self.want)]

    # ---- variants; a forward gives y, a gradient dqkv, both together y and dqkv

    def forward(self) -> dict[str, Callable]:
        tokens, queries = self.shape[1:3]
        variants = {
            named(cut): lambda i, cut=cut: lambda: self.ours(i, cut)[0]
            for cut in forward_cuts(tokens, queries)
        }
        for name, library in self.libraries.items():
            variants[name] = lambda i, library=library: (
                lambda: library.forward(*self.parts(i))[0].transpose(1, 2).flatten(2)
            )
        return variants

    def backward(self) -> dict[str, Callable]:
        tokens, queries = self.shape[1:3]
        variants = {
            named(cut, method): lambda i, method=method, cut=cut: (
                lambda: self.our_gradient(i, self.y[i], self.lse[i], method, cut)
            )
            for method, cut in backward_cuts(tokens, queries)
        }
        for name in self.libraries:
            variants[name] = lambda i, name=name: lambda: self.gradient(name, i)
        return variants

    def both(self) -> dict[str, Callable]:
        def ours(i):
            y, lse = self.ours(i)
            return y, self.our_gradient(i, y, lse)

        def library(name, i):
            saved = self.libraries[name].forward(*self.parts(i))
            return saved[0].transpose(1, 2).flatten(2), self.gradient(name, i, saved)

        def mixed(name, i):
            y, lse = self.libraries[name].forward(*self.parts(i))[:2]
            y = y.transpose(1, 2).flatten(2)
            return y, self.our_gradient(i, y, lse.view(self.lse[i].shape))

        variants: dict[str, Callable] = {"ours, launch table": lambda i: lambda: ours(i)}
        for name in self.libraries:
            variants[name] = lambda i, name=name: lambda: library(name, i)
            variants[f"{name} forward, our gradient"] = lambda i, name=name: lambda: mixed(name, i)
        return variants

    def case(self, direction: str) -> Case:
        variants = getattr(self, direction)()
        bounds = {"forward": self.most[:1], "backward": self.most[1:], "both": self.most}[direction]
        if direction == "forward":
            want = self.want[:1]
        else:
            want = self.want[1:] if direction == "backward" else self.want

        def check():
            for name, make in variants.items():
                found = make(0)()
                found = found if isinstance(found, tuple) else (found,)
                for got, exact, bound in zip(found, want, bounds):
                    off = ((got.double() - exact).norm() / exact.norm()).item()
                    assert off <= 2 * bound + 1e-6, f"{name}: {off:.2e}, eager {bound:.2e}"

        images, tokens, queries = self.shape[:3]
        name = f"{images}x{tokens}{'' if queries == tokens else f', {queries} asks'}, {direction}"
        moved = self.bytes[direction]
        return Case(name, moved, "copy", variants, check, {"copy": copies(moved)})


problem = lru_cache(maxsize=1)(Problem)  # the three directions of a shape share its inputs

SHAPES = {
    "25x197": Shape(25, 197, 197),
    "100x197": Shape(100, 197, 197),
    "100x50": Shape(100, 50, 50),
    "100x148": Shape(100, 148, 148),
    "100x99": Shape(100, 99, 99),
    "last": Shape(100, 197, 1),
}
SMALL = {"small": Shape(2, 10, 10, 2, 16)}
DIRECTIONS = ("forward", "backward", "both")
CASES = {
    f"{name}-{direction}": lambda shape=shape, direction=direction: problem(shape).case(direction)
    for name, shape in (SHAPES if on_gpu() else SMALL).items()
    for direction in DIRECTIONS
}


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("both")])
def test_attention(benchmark, name):
    compare.bench_with_pytest(benchmark, CASES[name], "ours, launch table")


def fastest(rows: list[dict]) -> None:
    """Our fastest cut of each case beside the library's best, for the launch table."""
    print("\nfastest, us")
    for case in dict.fromkeys(row["case"] for row in rows):
        best = {}
        for row in rows:
            if row["case"] == case and row["variant"] != "copy":
                whose = "ours" if row["variant"].startswith("ours") else "library"
                if whose not in best or row["median_us"] < best[whose]["median_us"]:
                    best[whose] = row
        found = [f"{row['variant']} {row['median_us']:.1f}" for row in best.values()]
        print(f"  {case:26}" + " | ".join(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    cases = [build for name, build in CASES.items() if name.startswith(options.only)]
    rows = compare.report("packed_attention", cases)
    fastest(rows)
    if options.record:
        record("attention", rows)


if __name__ == "__main__":
    main()

"""token_gather against PyTorch's gather and its backward, and against a cold copy of the bytes.

`python benchmarks/bench_token_gather.py` prints one table; `pytest benchmarks/bench_token_gather.py
--benchmark-only` does the same case by case. Bytes: kept rows read and written; backward, kept rows
read and all rows written; of patches, kept pixels read and cast rows written.
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
kernels = importlib.import_module("fastrecycle_kernels.token_gather")
reference = importlib.import_module("fastrecycle_kernels.reference")

BF16 = torch.bfloat16 if on_gpu() else torch.float32  # the interpreter's bf16 is not to be trusted


@contextmanager
def cut(rows: int, columns: int, warps: int):
    """Other launch constants than the file's."""
    names = [f"{back}{name}" for back in ("", "BACK_") for name in ("ROWS", "COLUMNS", "WARPS")]
    before = [getattr(kernels, name) for name in names]
    for name, value in zip(names, 2 * (rows, columns, warps)):
        setattr(kernels, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before):
            setattr(kernels, name, value)


CUTS = [(8, 256, 4), (16, 256, 4), (32, 256, 4), (8, 256, 2), (4, 1024, 4), (4, 1024, 2)]
SMALL_CUTS = [(16, 256, 4)]


def cuts() -> list[tuple[int, int, int]]:
    return CUTS if on_gpu() else SMALL_CUTS


def kept_tokens(images: int, tokens: int, kept: int) -> torch.Tensor:
    order = torch.rand(images, tokens, device=device()).argsort(1)
    return order[:, :kept].sort(1).values


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def gather(images: int, tokens: int, kept: int, width: int, compile: bool = True) -> Case:
    moved = images * kept * (2 * width * BF16.itemsize + 8)
    n = sets_for(moved, most=16)
    x = [torch.randn(images, tokens, width, device=device(), dtype=BF16) for _ in range(n)]
    index = [kept_tokens(images, tokens, kept) for _ in range(n)]

    def ours(rows, columns, warps):
        def make(i):
            def call():
                with cut(rows, columns, warps):
                    return kernels._launch_gather(x[i], index[i], 0, BF16)

            return call

        return make

    variants = {
        f"ours {c}": ours(*c) for c in cuts()
    } | {"eager": lambda i: lambda: reference.token_gather(x[i], index[i])}  # fmt: skip
    if on_gpu() and compile:
        traced = compiled(reference.token_gather)
        variants["compiled"] = lambda i: lambda: traced(x[i], index[i])

    def check():
        for i in range(n):
            want = reference.token_gather(x[i], index[i])
            for name, make in variants.items():
                assert torch.equal(make(i)(), want), name

    name = f"gather {images}x{tokens} -> {kept}, {width}"
    return Case(name, moved, "copy", variants, check, {"copy": copies(moved)})


def scatter(images: int, tokens: int, kept: int, width: int, compile: bool = True) -> Case:
    moved = images * (kept * (width * BF16.itemsize + 8) + tokens * width * BF16.itemsize)
    n = sets_for(moved, most=16)
    dy = [torch.randn(images, kept, width, device=device(), dtype=BF16) for _ in range(n)]
    index = [kept_tokens(images, tokens, kept) for _ in range(n)]

    def ours(rows, columns, warps):
        def make(i):
            def call():
                with cut(rows, columns, warps):
                    return kernels._launch_scatter(
                        dy[i], index[i], dy[i].new_empty(images, tokens, width), 0
                    )

            return call

        return make

    def zero_and_scatter(dy, index):
        """What PyTorch's own gather has as its backward."""
        where = index[..., None].expand(-1, -1, width)
        return dy.new_zeros(images, tokens, width).scatter_add(1, where, dy)

    variants = {
        f"ours {c}": ours(*c) for c in cuts()
    } | {"eager": lambda i: lambda: zero_and_scatter(dy[i], index[i])}  # fmt: skip
    if on_gpu() and compile:
        traced = compiled(zero_and_scatter)
        variants["compiled"] = lambda i: lambda: traced(dy[i], index[i])

    def check():
        for i in range(n):
            want = zero_and_scatter(dy[i], index[i])
            for name, make in variants.items():
                assert torch.equal(make(i)(), want), name

    name = f"scatter {images}x{kept} -> {tokens}, {width}"
    return Case(name, moved, "copy", variants, check, {"copy": copies(moved)})


def patches(images: int, side: int, patch: int, kept: int, compile: bool = True) -> Case:
    grid, width = side // patch, 3 * patch * patch
    moved = images * kept * width * (4 + BF16.itemsize)
    n = sets_for(moved, most=16)
    pixels = [torch.randn(images, 3, side, side, device=device()) for _ in range(n)]
    index = [kept_tokens(images, grid * grid, kept) for _ in range(n)]

    def unfold_and_gather(pixels, index):
        every = pixels.unflatten(3, (grid, patch)).unflatten(2, (grid, patch))
        every = every.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return reference.token_gather(every, index).to(BF16)

    def ours(rows, columns, warps):
        def make(i):
            def call():
                with cut(rows, columns, warps):
                    return kernels._launch_gather(pixels[i], index[i], patch, BF16)

            return call

        return make

    variants = {
        f"ours {c}": ours(*c) for c in cuts()
    } | {"eager": lambda i: lambda: unfold_and_gather(pixels[i], index[i])}  # fmt: skip
    if on_gpu() and compile:
        traced = compiled(unfold_and_gather)
        variants["compiled"] = lambda i: lambda: traced(pixels[i], index[i])

    def check():
        for i in range(n):
            want = unfold_and_gather(pixels[i], index[i])
            for name, make in variants.items():
                assert torch.equal(make(i)(), want), name

    name = f"patches of {images} images, {kept} of {grid * grid}"
    return Case(name, moved, "copy", variants, check, {"copy": copies(moved)})


CASES = {
    "gather_25": lambda: gather(25, 197, 50, 768),
    "gather_100": lambda: gather(100, 197, 99, 768, compile=False),
    "gather_1gib": lambda: gather(6900, 197, 50, 768, compile=False),
    "scatter_25": lambda: scatter(25, 197, 50, 768),
    "scatter_100": lambda: scatter(100, 197, 99, 768, compile=False),
    "scatter_1gib": lambda: scatter(2800, 197, 50, 768, compile=False),
    "patches_100": lambda: patches(100, 224, 16, 49),
    "patches_1gib": lambda: patches(4750, 224, 16, 49, compile=False),
}
SMALL = {
    "gather": lambda: gather(2, 20, 5, 64),
    "scatter": lambda: scatter(2, 20, 5, 64),
    "patches": lambda: patches(2, 16, 4, 5),
}


@pytest.mark.parametrize("name", CASES if on_gpu() else SMALL)
def test_token_gather(benchmark, name):
    case = (CASES if on_gpu() else SMALL)[name]
    compare.bench_with_pytest(benchmark, case, f"ours {(16, 256, 4)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    cases = {k: v for k, v in (CASES if on_gpu() else SMALL).items() if k.startswith(options.only)}
    rows = compare.report("token_gather", list(cases.values()))
    if options.record:
        record("token_gather", rows)


if __name__ == "__main__":
    main()

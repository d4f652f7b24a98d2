"""cls_scores and the choice of patches, against eager and compiled PyTorch and a cold copy.

`python benchmarks/bench_cls_scores.py` prints one table; `pytest benchmarks/bench_cls_scores.py
--benchmark-only` does the same case by case. Bytes: keys read, scores written. Keys are views of
the (B, N, 3, H, d) buffer that the QKV product leaves.
"""

from __future__ import annotations

import argparse
import importlib

import compare
import pytest
import torch
from compare import Case
from timing import copies, device, on_gpu, record, sets_for

from fastrecycle.pruning import top_patches

pytest.importorskip("triton")
# variants of a launch are the kernels' own business, which fastrecycle.ops does not show
kernels = importlib.import_module("fastrecycle_kernels.cls_scores")
reference = importlib.import_module("fastrecycle_kernels.reference")

BF16 = torch.bfloat16 if on_gpu() else torch.float32


def both(q, k, count):
    """What eager PyTorch does: scores, then a stable sort."""
    scores = reference.cls_scores(q, k)
    return scores, top_patches(scores[:, 1:], count)


def case(images: int, tokens: int, count: int, heads: int = 12, compile: bool = True) -> Case:
    moved = images * tokens * (heads * 64 * BF16.itemsize + 4)
    n = sets_for(3 * moved, most=8)  # the keys' buffer is three times as large
    qkv = [torch.randn(images, tokens, 3, heads, 64, device=device(), dtype=BF16) for _ in range(n)]
    q = [x[:, 0, 0] for x in qkv]
    k = [x[:, :, 1].transpose(1, 2) for x in qkv]
    variants = {}
    for group in (0, 1, 3, heads):
        heads_of = f"{group} heads" if group else "all at once"
        variants[f"ours, {heads_of}"] = lambda i, group=group: (
            lambda: kernels.cls_scores(q[i % n], k[i % n], group=group)
        )
        variants[f"ours, {heads_of}, and top"] = lambda i, group=group: (
            lambda: kernels.cls_top_patches(q[i % n], k[i % n], count, group=group)
        )
    variants["eager"] = lambda i: lambda: reference.cls_scores(q[i % n], k[i % n])
    variants["eager, and top"] = lambda i: lambda: both(q[i % n], k[i % n], count)
    if on_gpu() and compile:
        traced = torch.compile(both, fullgraph=True, dynamic=False)
        variants["compiled, and top"] = lambda i: lambda: traced(q[i % n], k[i % n], count)

    def check():
        want = reference.cls_scores(q[0], k[0])
        for name, make in variants.items():
            found = make(0)()
            scores, kept = found if isinstance(found, tuple) else (found, None)
            torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-7)
            if kept is not None:
                assert torch.equal(kept, top_patches(scores[:, 1:], count)), name

    name = f"{images}x{tokens}, {count} stay"
    return Case(name, moved, "copy", variants, check, {"copy": copies(moved)})


def choice(images: int, n: int, count: int) -> Case:
    """The choice alone."""
    moved = images * (4 * n + 8 * count)
    scores = [torch.randn(images, n, device=device()).softmax(1) for _ in range(sets_for(moved, 8))]
    variants = {
        "ours": lambda i: lambda: kernels.top_patches(scores[i], count),
        "eager, two sorts": lambda i: lambda: top_patches(scores[i], count),
        "torch.topk and sort": lambda i: lambda: scores[i].topk(count, 1).indices.sort(1),
    }

    def check():
        assert torch.equal(variants["ours"](0)(), variants["eager, two sorts"](0)())

    sets = {name: [make(i) for i in range(len(scores))] for name, make in variants.items()}
    return Case(
        f"top {count} of {n}, {images} rows", moved, "copy", {}, check,
        {"copy": copies(moved, len(scores)), **sets},
    )  # fmt: skip


CASES = {
    "25": lambda: case(25, 197, 49),
    "100": lambda: case(100, 197, 49, compile=False),
    "1gib": lambda: case(3500, 197, 49, compile=False),
    "top_25": lambda: choice(25, 196, 49),
    "top_100": lambda: choice(100, 196, 49),
}
SMALL = {"small": lambda: case(2, 10, 3, heads=2), "top": lambda: choice(2, 9, 3)}


@pytest.mark.parametrize("name", [k for k in (CASES if on_gpu() else SMALL) if "top" not in k])
def test_cls_scores(benchmark, name):
    build = (CASES if on_gpu() else SMALL)[name]
    compare.bench_with_pytest(benchmark, build, "ours, 1 heads")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    cases = {k: v for k, v in (CASES if on_gpu() else SMALL).items() if k.startswith(options.only)}
    rows = compare.report("cls_scores", list(cases.values()))
    if options.record:
        record("cls_scores", rows)


if __name__ == "__main__":
    main()

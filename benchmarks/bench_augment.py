"""augment against PyTorch, eager and compiled, and against a cold copy of the bytes.

`python benchmarks/bench_augment.py` prints one table, each cut of the kernel a row, with maps in
float32 and in float16; `pytest benchmarks/bench_augment.py --benchmark-only` does the same case by
case. Bytes: pixels read, results written, and the maps that differ from each other read once.
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
kernels = importlib.import_module("fastrecycle_kernels.augment")
reference = importlib.import_module("fastrecycle_kernels.reference")
maps_of = importlib.import_module("fastrecycle.augment")

OUT = torch.bfloat16 if on_gpu() else torch.float16  # the interpreter's bf16 is not to be trusted
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
CUTS = [
    (64, 32, 64, 4, 2), (64, 32, 64, 4, 3), (64, 32, 32, 4, 2), (64, 32, 32, 4, 3),
    (64, 64, 64, 4, 2), (128, 32, 64, 8, 2), (128, 32, 64, 8, 3), (128, 32, 128, 8, 2),
]  # fmt: skip
CUTS = CUTS if on_gpu() else [(64, 32, 64, 4, 2)]
FEW = CUTS[:1]
FULL_CUTS = [(32, 16, 32, 8, 2), (32, 16, 16, 8, 2), (16, 16, 32, 4, 2), (64, 16, 16, 8, 2)]
PLAIN_CUTS = [(4, 4), (8, 4), (16, 4), (16, 8)] if on_gpu() else [(16, 4)]


@contextmanager
def cut(**constants):
    """Other launch constants than the file's."""
    before = {name: getattr(kernels, name) for name in constants}
    vars(kernels).update(constants)
    try:
        yield
    finally:
        vars(kernels).update(before)


def within(constants: dict, call):
    def run():
        with cut(**constants):
            return call()

    return run


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def case(
    kind: str, batch: int, side: int, cuts: list | None = None, dtype: torch.dtype = OUT,
    compile: bool = True, peers: bool = True,
) -> Case:  # fmt: skip
    """Maps of a table by task ("shrink"), of each image ("crop"), or none ("plain")."""
    tasks = min(4, batch)
    pixels = batch * 3 * side * side
    distinct = {"shrink": tasks, "crop": 2 * batch, "plain": 0}[kind]
    moved = pixels * (1 + dtype.itemsize) + distinct * side * side * 2
    n = sets_for(moved, most=16)
    where = device()
    pools = [
        torch.randint(256, (batch, 3, side, side), device=where, dtype=torch.uint8)
        for _ in range(n)
    ]
    rows = [torch.randperm(batch, device=where) for _ in range(n)]
    flip = [torch.rand(batch, device=where) < 0.5 for _ in range(n)]
    if kind == "shrink":
        table = maps_of.shrink_table(side, max(2, side // 9), max(3, side // 9 + 8)).to(where)
        which = [
            torch.randint(len(table), (tasks,), device=where).repeat_interleave(batch // tasks)
            for _ in range(n)
        ]
        maps = [(table, table, w) for w in which]
    elif kind == "crop":
        scale = 0.4 + 0.6 * torch.rand(batch, device=where)
        maps = [
            (*(maps_of.crop_maps(scale, o * (1 - scale), side) for o in offset), None)
            for offset in torch.rand(n, 2, batch, device=where)
        ]
    else:
        maps = [(None, None, None)] * n
    halves = {id(m): m.half() for each in maps for m in each[:2] if m is not None}

    def arguments(i, half=False):
        r, c, which = maps[i]
        if half:
            r, c = halves[id(r)], halves[id(c)]
        return pools[i], rows[i], r, c, which, flip[i], MEAN, STD, dtype

    def ours(half=False, **constants):
        return lambda i: within(constants, lambda: kernels._launch(*arguments(i, half)))

    if kind == "plain":
        variants = {
            f"ours {c}": ours(LINES=c[0], LINE_WARPS=c[1]) for c in cuts or PLAIN_CUTS
        }  # fmt: skip
    elif dtype == torch.float32:
        variants = {f"ours {c}": ours(FULL=c) for c in cuts or FULL_CUTS}
    else:
        variants = {}
        for c in cuts or CUTS:
            variants[f"ours {c} f16 maps"] = ours(True, HALF=c)
            variants[f"ours {c}"] = ours(HALF=c)
    if peers:
        variants["eager"] = lambda i: lambda: reference.augment(*arguments(i))
    if on_gpu() and compile:
        traced = compiled(reference.augment)
        variants["compiled"] = lambda i: lambda: traced(*arguments(i))

    def check():
        few = slice(None, 32)
        for i in range(min(n, 2)):
            images, chosen, r, c, which, mirrored, *_ = arguments(i)
            if kind == "crop":
                r, c = r[few], c[few]
            want = reference.augment(
                images, chosen[few], r, c, None if which is None else which[few], mirrored[few],
                MEAN, STD, torch.float32,
            )  # fmt: skip
            rounding = {torch.float32: 0.0, torch.float16: 2.0**-11}.get(dtype, 2.0**-8)
            allowed = rounding * want.abs() + 2e-5
            if dtype != torch.float32 and r is not None:  # as the kernel's file states
                rho = [m.abs().sum(2).max() for m in (r, c)]
                allowed += 0.37 / 255 * rho[0] * rho[1] / min(STD)
            for name, make in variants.items():
                off = (make(i)()[few].float() - want).abs()
                assert (off <= allowed).all(), (name, float(off.max()))

    name = f"{kind} {batch}x3x{side}x{side} -> {str(dtype)[6:]}"
    return Case(name, moved, "copy", variants, check, {"copy": copies(moved)})


FP32 = torch.float32
LARGE = 2**30 // (3 * 224 * 224) // 4 * 4  # images of 1 GiB
CASES = {
    "shrink_100": lambda: case("shrink", 100, 224),
    "crop_100": lambda: case("crop", 100, 224, FEW),
    "plain_100": lambda: case("plain", 100, 224),
    "shrink_64": lambda: case("shrink", 100, 64, FEW, compile=False),
    "shrink_fp32": lambda: case("shrink", 100, 224, dtype=FP32, compile=False),
    "plain_1gib": lambda: case("plain", LARGE, 224, compile=False, peers=False),
    "shrink_1gib": lambda: case("shrink", LARGE, 224, FEW, compile=False, peers=False),
}
SMALL = {
    "shrink": lambda: case("shrink", 2, 24),
    "crop": lambda: case("crop", 2, 24),
    "plain": lambda: case("plain", 2, 24),
}


@pytest.mark.parametrize("name", CASES if on_gpu() else SMALL)
def test_augment(benchmark, name):
    made = (CASES if on_gpu() else SMALL)[name]()
    compare.bench_with_pytest(benchmark, lambda: made, next(iter(made.variants)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    cases = {k: v for k, v in (CASES if on_gpu() else SMALL).items() if k.startswith(options.only)}
    rows = compare.report("augment", list(cases.values()))
    if options.record:
        record("augment", rows)


if __name__ == "__main__":
    main()

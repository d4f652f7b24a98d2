"""Cost curves: time and peak memory of a step against batch, tokens, LoRAs in a batch, and rank.

`python benchmarks/bench_curves.py` prints one row a point; --record keeps them under results/,
from where `fastrecycle report benchmarks` draws them. ViT-B/16 and ResNet-50 with random weights;
on the CPU two small points a curve, which say nothing of speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from bench_steps import IMAGES, META, WAYS, WAYS_OF, Make, build, inversion, pool
from timing import device, measure, on_gpu, record, table

from fastrecycle.metatrain import MetaTrainer
from fastrecycle.vit import ViT


def meta_step(way, preset: str, queries: int, **changes) -> MetaTrainer:
    vit = ViT.preset(preset).to(device())
    config = replace(META, queries=queries, **changes)
    return MetaTrainer(vit, pool(vit, queries), config, precision=way.precision,
                       backend=way.backend)  # fmt: skip


def curves(preset: str) -> dict[str, dict[float, Make]]:
    """Points of each curve: makers of a step by what varies."""
    meta = partial(meta_step, preset=preset)
    if not on_gpu():
        return {
            "meta-training: images": {WAYS * (1 + q): partial(meta, queries=q) for q in (1, 2)},
            "inversion: LoRAs in a batch": {
                g: partial(inversion, prune={}, prior=False, tasks=g) for g in (1, 2)
            },
        }
    return {
        "meta-training: images": {
            WAYS * (1 + q): partial(meta, queries=q) for q in (1, 4, 9, 19, 39, 79)
        },
        "meta-training: share of tokens": {
            1 - s: partial(meta, queries=19, sparsity=s) for s in (0.0, 0.25, 0.5, 0.75, 0.9)
        },
        "meta-training: rank": {r: partial(meta, queries=19, rank=r) for r in (1, 4, 16, 64)},
        "inversion: LoRAs in a batch": {
            g: partial(inversion, prune={}, prior=True, tasks=g) for g in (1, 2, 4, 8)
        },
        "inversion without the prior: LoRAs in a batch": {
            g: partial(inversion, prune={}, prior=False, tasks=g) for g in (1, 2, 4, 8, 16, 32)
        },
    }


def rows(preset: str, ways: dict[str, object], repeats: int, only: str) -> list[dict]:
    """One row a point and variant."""
    found = []
    for curve, points in curves(preset).items():
        if not curve.startswith(only):
            continue
        for x, make in points.items():
            for name, way in ways.items():
                step, peak, *_ = build(make, way)
                time = measure({name: step}, repeats, graph=False)[name]
                found.append({"curve": curve, "x": x, "variant": name, "ms": time.median_ms,
                              "p20_ms": time.p20_ms, "p80_ms": time.p80_ms,
                              "GiB": peak})  # fmt: skip
                print(table(found[-1:]).splitlines()[-1], flush=True)
                del step
    return found


@pytest.mark.parametrize("loras", [1, 2])
def test_inversion_of_several(benchmark, loras):
    make: Callable = partial(inversion, prune={}, prior=False, tasks=loras)
    step, *_ = build(make, WAYS_OF["ours" if on_gpu() else "reference"])
    benchmark.pedantic(step, rounds=5 if on_gpu() else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="*", default=["ours"] if on_gpu() else ["reference"])
    parser.add_argument("--only", default="", help="curves whose name begins so")
    parser.add_argument("--repeats", type=int, default=10 if on_gpu() else 1)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    ways = {name: WAYS_OF[name] for name in options.ways}
    print(f"batches of inversion: {WAYS} x {IMAGES} images a LoRA")
    found = rows("vit_b_16" if on_gpu() else "demo", ways, options.repeats, options.only)
    if options.record:
        record("curves", found)


if __name__ == "__main__":
    main()

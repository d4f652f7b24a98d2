"""Host work: the C++ extension against NumPy and against the library's PyTorch, on the CPU.

`python benchmarks/bench_host.py` prints one table, which --record keeps under results;
`pytest benchmarks/bench_host.py --benchmark-only` times the same cases one by one. Every case is
first checked for equality.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from timing import record

from fastrecycle.metatrain import keep_ladder
from fastrecycle.ops import host
from fastrecycle.pruning import top_patches
from fastrecycle.vit import RaggedKeep

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Variants = dict[str, Callable[[], object]]


@contextmanager
def pure():
    """NumPy in place of the extension."""
    before, host.HAVE_EXTENSION = host.HAVE_EXTENSION, False
    try:
        yield
    finally:
        host.HAVE_EXTENSION = before


def in_numpy(call):
    def run():
        with pure():
            return call(threads=1)

    return run


def variants(call, torchs=None) -> Variants:
    """One call in NumPy, PyTorch where the library has it, and C++ on one thread and on all."""
    found: Variants = {"numpy": in_numpy(call)}
    if torchs is not None:
        found["torch"] = torchs
    found["c++, 1 thread"] = lambda: call(threads=1)
    found[f"c++, {CORES} threads"] = lambda: call(threads=CORES)
    return found


def columns(result) -> list[np.ndarray]:
    """All arrays of a result, for the comparison."""
    if isinstance(result, host.Packing):
        return [result.cu_seqlens, result.patches, result.image]
    if isinstance(result, RaggedKeep):
        return [np.asarray(x) for x in (result.cu_seqlens, result.patches, result.image)]
    return [np.asarray(x) for x in (result if isinstance(result, tuple) else (result,))]


def check(found: Variants) -> None:
    expected, *others = (columns(call()) for call in found.values())
    for other in others:
        for x, y in zip(expected, other, strict=True):
            np.testing.assert_array_equal(x, y)


def episodes(classes: int, images: int, shots: int) -> Variants:
    names = np.arange(classes)
    members = [np.arange(images) + images * i for i in names]
    return variants(lambda threads: host.draw_episodes(
        names, members, 5, shots, 15, 600, 0, threads=threads))  # fmt: skip


def steps(count: int) -> Variants:
    """A pool of 100 LoRAs of 5 classes, 20 images each."""
    lora = np.arange(100).repeat(100)
    label = np.tile(np.arange(5).repeat(20), 100)
    shown = np.random.default_rng(0).integers(64, size=500).repeat(20)
    tables = host.TaskTables.of_pool(lora, label, shown, 5)
    return variants(lambda threads: host.draw_steps(
        tables, 5, 16, 1, 0.5, 0, 0, count, threads=threads))  # fmt: skip


def plan_orders(images: int) -> Variants:
    order = torch.rand(images, 196).argsort(1)
    counts = torch.tensor(keep_ladder(min(images, 100), 196, 0.75)).repeat(images)[:images]
    return variants(
        lambda threads: host.plan_packed_orders(order, counts, 196, prefix=0, threads=threads),
        lambda: RaggedKeep.of_orders(order, counts),
    )


def plan_mask(images: int) -> Variants:
    mask = np.random.default_rng(0).random((images, 196)) < 0.25
    return variants(lambda threads: host.plan_packed(mask, threads=threads))


def top_k(images: int, patches: int, k: int) -> Variants:
    scores = torch.randn(images, patches).mul(2).softmax(1)
    return variants(
        lambda threads: host.top_k(scores, k, threads=threads), lambda: top_patches(scores, k)
    )


def gather(images: int) -> Variants:
    """No C++ here: a gather of whole rows by index_select is as fast as copying its bytes."""
    x = torch.randn(images, 197, 768)
    index = torch.rand(images, 197).argsort(1)[:, :50].sort(1).values
    wide = index[..., None].expand(-1, -1, 768)
    first = 197 * torch.arange(images)[:, None]
    copied = torch.randn(images * 50, 768)
    found: Variants = {
        "torch.gather": lambda: x.gather(1, wide),
        "index_select": lambda: (
            x.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, (images, 50))
        ),
    }
    check(found)
    return found | {"copy": copied.clone}


CASES: dict[str, Callable[[], Variants]] = {
    "600 tasks, 5w1s, 20 classes of 600": lambda: episodes(20, 600, 1),
    "600 tasks, 5w5s, 20 classes of 600": lambda: episodes(20, 600, 5),
    "600 tasks, 5w1s, 10 classes of 180": lambda: episodes(10, 180, 1),
    "1 meta-training step": lambda: steps(1),
    "1000 meta-training steps": lambda: steps(1000),
    "plan 100 orders": lambda: plan_orders(100),
    "plan 3200 orders": lambda: plan_orders(3200),
    "plan 100 masks": lambda: plan_mask(100),
    "plan 3200 masks": lambda: plan_mask(3200),
    "top 49 of 196, 25 rows": lambda: top_k(25, 196, 49),
    "top 49 of 196, 100 rows": lambda: top_k(100, 196, 49),
    "top 49 of 196, 3200 rows": lambda: top_k(3200, 196, 49),
    "gather 50 of 197 tokens, 25 images": lambda: gather(25),
}


def measure_us(found: Variants, seconds: float = 1.0) -> dict[str, list[float]]:
    """Times of each variant, taken in turn for some `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in found}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in found.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", range(4))
def test_host(benchmark, name, variant):
    found = CASES[name]()
    if variant >= len(found):
        pytest.skip(f"{name} has {len(found)} variants")
    if not name.startswith("gather"):
        check(found)
    label, call = list(found.items())[variant]
    benchmark.group, benchmark.extra_info["variant"] = name, label
    benchmark(call)


def main() -> None:
    if not host.HAVE_EXTENSION:
        sys.exit("bench_host: the extension is not built; see setup.py")
    torch.set_num_threads(1)  # more only slow down what is this small
    print(f"{CORES} cores, NumPy {np.__version__}, torch {torch.__version__} on one thread")
    print("us: median [20 %, 80 %]; how many times faster than the first\n")
    rows = []
    for name, build in CASES.items():
        found = build()
        if not name.startswith("gather"):
            check(found)
        print(name)
        base = None
        for variant, taken in measure_us(found).items():
            middle, low, high = np.percentile(taken, (50, 20, 80)).tolist()
            base = base or middle
            times = f"{middle:10.0f} [{low:.0f}, {high:.0f}]"
            print(f"  {variant:16}{times:30}{base / middle:7.1f}x")
            rows.append({
                "case": name, "variant": variant, "median_us": middle, "p20_us": low,
                "p80_us": high, "speed_up": base / middle,
            })  # fmt: skip
    if "--record" in sys.argv:
        record("host", rows)


if __name__ == "__main__":
    main()

"""One operation, several ways: checked against each other, timed in turn, compared with a floor.

Without a GPU the kernels run in Triton's interpreter, on small inputs: that shows that a benchmark
works, and nothing about speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from timing import Call, measure, on_gpu, sets_for, table

Make = Callable[[int], Call]
"""From the number of a set of inputs to a call on it."""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: variants of an operation at a size."""

    name: str
    bytes_moved: int  # by one call at least: read once, written once
    floor: str  # the variant that is the floor, or the library's own product
    variants: Mapping[str, Make]
    check: Callable[[], None]  # raises unless the variants compute the same
    extra: Mapping[str, Sequence[Call]] = field(default_factory=dict)  # such as copies


def run(case: Case, repeats: int = 20) -> list[dict]:
    """Check, then time; one row a variant, the fastest marked."""
    case.check()
    sets = sets_for(case.bytes_moved, most=16)
    calls = {name: [make(i) for i in range(sets)] for name, make in case.variants.items()}
    timings = measure({**case.extra, **calls}, repeats if on_gpu() else 2)
    floor = timings[case.floor].median_ms
    rows = [
        {
            "case": case.name,
            "variant": name,
            "median_us": 1000 * t.median_ms,
            "p20_us": 1000 * t.p20_ms,
            "p80_us": 1000 * t.p80_ms,
            "times_floor": t.median_ms / floor,
            "gb_per_s": case.bytes_moved / t.median_ms / 1e6,
        }
        for name, t in timings.items()
    ]
    return rows


def report(title: str, cases: Sequence[Callable[[], Case]], repeats: int = 20) -> list[dict]:
    """Run cases built one after the other, so that only one's inputs are in memory; print."""
    where = torch.cuda.get_device_name() if on_gpu() else "CPU, interpreted: shows no speed"
    print(f"{title} on {where}")
    rows: list[dict] = []
    for build in cases:
        start = time.perf_counter()
        case = build()
        found = run(case, repeats)
        rows += found
        took = time.perf_counter() - start
        size = case.bytes_moved / 2**20
        print(f"\n{case.name}  ({size:.1f} MiB, floor: {case.floor}, {took:.0f} s)")
        for row in found:
            print(
                f"  {row['variant']:34}{row['median_us']:10.2f} us"
                f" [{row['p20_us']:.2f}, {row['p80_us']:.2f}]".ljust(68)
                + f"{row['times_floor']:7.2f}x floor {row['gb_per_s']:8.0f} GB/s"
            )
        del case
        if on_gpu():
            torch.cuda.empty_cache()
    return rows


def bench_with_pytest(benchmark, build: Callable[[], Case], ours: str) -> None:
    """The rows of a case in a test; pytest-benchmark itself times one call of `ours`, launched."""
    case = build()
    rows = run(case)
    benchmark.group = case.name
    benchmark.extra_info["rows"] = rows
    print("\n" + table(rows))
    call = case.variants[ours](0)

    def launched():
        call()
        if on_gpu():
            torch.cuda.synchronize()

    benchmark.pedantic(launched, rounds=3, warmup_rounds=1)

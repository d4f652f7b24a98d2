"""How the benchmarks time: variants in turn, caches cold, medians with their spread; and records.

    measure({"ours": calls, "peer": calls, "copy": copies(moved_bytes)}, repeats=20)

A variant is one call, or the same call on several sets of inputs. One call: the L2 cache is flushed
before each timing. Several sets, together some times the cache (`sets_for`): they run one after the
other, in one CUDA graph unless `graph=False`, and the time is that of one; for short operations, as
it leaves the gaps between launches out. Outputs of a graph stay alive while it is captured, so that
no two calls write to the same memory.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
Variant = Call | Sequence[Call]
FLUSH_BYTES = 256 * 2**20  # some five times the L2 cache of an H100
RESULTS = Path(__file__).parent / "results"

if not torch.cuda.is_available():  # import this module before any kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass(frozen=True)
class Timing:
    """Of one call: the median, and where the middle 60 % of the timings lie."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    def __str__(self) -> str:
        return f"{self.median_ms:.4f} [{self.p20_ms:.4f}, {self.p80_ms:.4f}]"

    @staticmethod
    def of(samples_ms: Sequence[float]) -> Timing:
        if len(samples_ms) < 2:
            return Timing(*samples_ms * 3)
        fifths = statistics.quantiles(samples_ms, n=5, method="inclusive")
        return Timing(statistics.median(samples_ms), fifths[0], fifths[-1])


def on_gpu() -> bool:
    """Whether there is a GPU to time; on the CPU benchmarks run small and say so."""
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def sets_for(moved_bytes: int, most: int = 64) -> int:
    """Sets of inputs that are out of the cache when their turn comes again."""
    return min(most, max(2, -(-FLUSH_BYTES // max(1, moved_bytes)))) if on_gpu() else 1


def measure(
    variants: Mapping[str, Variant], repeats: int = 20, *, graph: bool = True, warmup: int = 2
) -> dict[str, Timing]:
    """Time of one call of each variant.

    Args:
        variants: by name; each one call or several (see above).
        repeats: timings of each variant; the variants take turns.
        graph: capture each variant in a CUDA graph and time its replay.
        warmup: calls before the first timing, or before the capture.

    """
    calls = {name: [v] if callable(v) else list(v) for name, v in variants.items()}
    timer = (_Replay if graph else _Launches) if on_gpu() else _OnCPU
    timers = {name: timer(each, warmup) for name, each in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, time_once in timers.items():
            samples[name].append(time_once() / len(calls[name]))
    return {name: Timing.of(each) for name, each in samples.items()}


class _OnCPU:
    def __init__(self, calls: list[Call], warmup: int):
        self.calls = calls
        for _ in range(min(warmup, 1)):
            self.run()

    def run(self) -> None:
        for call in self.calls:
            call()

    def __call__(self) -> float:
        start = time.perf_counter()
        self.run()
        return 1000 * (time.perf_counter() - start)


@cache
def _flush() -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


class _Launches:
    """Calls as they are; the flush also keeps the GPU busy while Python launches them."""

    def __init__(self, calls: list[Call], warmup: int):
        self.calls = calls
        _flush()
        for _ in range(warmup):
            self.run()
        torch.cuda.synchronize()

    def run(self) -> None:
        for call in self.calls:
            call()

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush().sum()  # read, not written: what it leaves in the cache costs nothing to evict
        start.record()
        self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class _Replay(_Launches):
    def __init__(self, calls: list[Call], warmup: int):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            super().__init__(calls[:1], warmup)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            alive = [call() for call in calls]
        del alive
        self.run()
        torch.cuda.synchronize()

    def run(self) -> None:
        if hasattr(self, "graph"):
            self.graph.replay()
        else:
            super().run()


# ------------------------------------------------------------------ floors


def copies(moved_bytes: int, sets: int | None = None) -> list[Call]:
    """Cold copies that read and write `moved_bytes` between them: what bandwidth allows.

    On an H200 `clone` moves 2.7 or 4.0 TB/s, depending on the size, so that an elementwise kernel
    is tried beside it, and the faster one taken.
    """
    count = max(1, moved_bytes // 4)  # numbers of two bytes, each read and written
    sources = [
        torch.randn(count, device=device()).to(torch.bfloat16)
        for _ in range(sets or sets_for(moved_bytes))
    ]
    whole = [source[: count - count % 4].view(torch.int64) for source in sources]
    ways = {
        "clone": [source.clone for source in sources],
        "kernel": [partial(torch.bitwise_not, source) for source in whole],
    }
    if not on_gpu() or count < 4:
        return ways["clone"]
    timings = measure(ways, 5)
    return ways[min(ways, key=lambda name: timings[name].median_ms)]


def copy_bandwidth(moved_bytes: int = 2**31, repeats: int = 10) -> float:
    """Bytes a second, read and written, of a copy that moves so many."""
    timing = measure({"copy": copies(moved_bytes)}, repeats)["copy"]
    return moved_bytes / (timing.median_ms * 1e-3)


# ------------------------------------------------------------------ records


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def machine() -> dict[str, str]:
    """Where the figures come from."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    commit = _output("git", "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", "unknown")
    if _output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " and changes"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if on_gpu() else f"CPU ({platform.machine()})",
        "driver": driver.splitlines()[0] if driver else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none") if on_gpu() else "none",
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit,
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def record(name: str, rows: Sequence[Mapping[str, Any]], folder: str | Path = RESULTS) -> None:
    """Append one run's rows to NAME.json and NAME.csv; write NAME.md anew, the latest run first.

    Rows are flat: strings and numbers, with a unit in each column's name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    runs.append({"machine": machine(), "rows": [dict(row) for row in rows]})
    path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")

    flat = [{**row, **run["machine"]} for run in runs for row in run["rows"]]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)

    parts = [f"# {name}\n"]
    for run in reversed(runs):
        about = run["machine"]
        parts.append(", ".join(f"{k} {v}" if k != "device" else v for k, v in about.items()) + "\n")
        parts.append(table(run["rows"]) + "\n")
    (folder / f"{name}.md").write_text("\n".join(parts), encoding="utf-8")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, numbers with four digits that count."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns)]
    lines += [[text(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

"""Whole steps of both loops, the paper's Tables 4 and 5: iterations a second and peak memory.

`python benchmarks/bench_steps.py inversion` and `... meta` print a table each; --record keeps it
under results/. Variants take turns in one process: the eager fp32 reference in PyTorch's default
precision (TF32 convolutions, IEEE products), the same with TF32 products and with bf16 autocast,
the strongest plain PyTorch version (bf16, `torch.compile`, one CUDA graph), and ours. ViT-B/16 and
ResNet-50 at their true shapes with random weights; on the CPU toy shapes, which say nothing of
speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from bench_prior import resnet_state
from timing import Timing, device, measure, on_gpu, record, table
from torch import Tensor

from fastrecycle import LoRA, flops
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.inversion import InversionGroup
from fastrecycle.lora import Head
from fastrecycle.metatrain import MetaTrainer
from fastrecycle.pool import SyntheticPool, TaskImages
from fastrecycle.prior import ResNetPrior
from fastrecycle.vit import ViT

PRESET = "vit_b_16" if on_gpu() else "demo"
WAYS, IMAGES = (5, 5) if on_gpu() else (2, 1)  # of an inverted task: the paper's batch of 25
QUERIES = 19 if on_gpu() else 2  # 5 ways of 1 + 19 images: the paper's batch of 100
TABLE_4 = ({}, {11: 0.75}, {8: 0.75}, {6: 0.75}, {3: 0.3, 6: 0.3, 8: 0.3, 11: 0.3})
TABLE_5 = (0.0, 0.25, 0.5, 0.75)
# The paper's iterations a second, on a GPU that it does not name.
PAPER = {
    "inversion": dict(zip(map(str, TABLE_4), (5.56, 5.81, 6.22, 7.15, 6.13), strict=True)),
    "meta": dict(zip(map(str, TABLE_5), (1.76, 2.34, 3.63, 6.83), strict=True)),
}


@dataclass(frozen=True)
class Way:
    """One version of a step."""

    backend: str
    precision: str
    tf32: bool = False  # of fp32 matrix products


Make = Callable[[Way], InversionGroup | MetaTrainer]

WAYS_OF = {
    "reference": Way("reference", "fp32"),
    "reference, TF32": Way("reference", "fp32", True),
    "reference, bf16": Way("reference", "bf16"),
    "compile": Way("compile", "bf16"),
    "ours": Way("triton", "bf16"),
}


@contextmanager
def products(tf32: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def lora(vit: ViT, seed: int) -> LoRA:
    """A LoRA that changes the features, with a head."""
    made = LoRA.init(vit.config, 4, seed=seed)
    for b in made.b.values():
        b.normal_(0, 0.02)
    return LoRA(
        made.a, made.b, made.scale, made.ranks,
        head=Head(torch.randn(WAYS, vit.config.features) * 0.1, None),
        class_names=tuple(f"{seed}.{i}" for i in range(WAYS)),
    )  # fmt: skip


def inversion(way: Way, prune: dict[int, float], prior: bool, tasks: int = 1) -> InversionGroup:
    """A group whose pruning is in force from the first iteration."""
    vit = ViT.preset(PRESET).to(device())
    network = ResNetPrior(resnet_state()).to(device()) if prior else None
    config = InversionConfig(
        images_per_class=IMAGES, iterations=2000 if on_gpu() else 4, prune=prune, prune_from=0.0
    )
    return InversionGroup(
        vit, [lora(vit, i) for i in range(tasks)], range(tasks), network, config,
        precision=way.precision, backend=way.backend,
    )  # fmt: skip


def pool(vit: ViT) -> SyntheticPool:
    """Noise from four LoRAs: speed does not depend on what images show."""
    per_class, side, patches = QUERIES + 1, vit.config.image_size, vit.config.patches
    count = WAYS * per_class
    parts = [
        TaskImages(
            task, torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8),
            torch.arange(WAYS).repeat_interleave(per_class),
            torch.rand(count, patches).argsort(1), patches, torch.randn(count, WAYS),
            tuple(f"{task}.{i}" for i in range(WAYS)),
        )
        for task in range(4)
    ]  # fmt: skip
    return SyntheticPool(parts)


def meta(way: Way, sparsity: float) -> MetaTrainer:
    vit = ViT.preset(PRESET).to(device())
    config = MetaConfig(
        steps=100_000,
        ways=WAYS,
        queries=QUERIES,
        sparsity=sparsity,
        start="zero",
        resolution=(24, 96),
    )
    return MetaTrainer(vit, pool(vit), config, precision=way.precision, backend=way.backend)


def build(make: Callable[[], InversionGroup | MetaTrainer], tf32: bool) -> tuple[Callable, float]:
    """A step, warm, and the peak memory of two of them in GiB."""
    torch.manual_seed(0)
    if on_gpu():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    stage = make()

    def step() -> Tensor:
        with products(tf32):
            return stage.step()["loss"]

    step(), step()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu() else 0.0
    return step, peak


def check(make: Make, ways: dict[str, Way]) -> None:
    """The losses of the first steps, each no further from fp32 than twice eager bf16.

    Raises:
        AssertionError: one is.

    """

    def curve(way: Way) -> Tensor:
        torch.manual_seed(0)
        stage = make(way)
        with products(way.tf32):
            losses = [stage.step()["loss"].float().mean().item() for _ in range(3)]
        return torch.tensor(losses)

    exact = curve(WAYS_OF["reference"])
    allowed = 2 * (curve(Way("reference", "bf16")) - exact).abs() + 2e-3 * exact.abs()
    for name, way in ways.items():
        error = (curve(way) - exact).abs()
        assert (error <= allowed).all(), (name, error, allowed)


def cases(loop: str, without_prior: bool) -> dict[str, tuple[float, Make]]:
    """GFLOPs of an image and maker of each setting."""
    if loop == "meta":
        return {str(s): (flops(PRESET, sparsity=s), partial(meta, sparsity=s)) for s in TABLE_5}
    found = {
        str(p): (flops(PRESET, prune=p), partial(inversion, prune=p, prior=True)) for p in TABLE_4
    }
    for prune in ({}, {6: 0.75}) if without_prior else ():
        make = partial(inversion, prune=prune, prior=False)
        found[f"{prune}, no prior"] = (flops(PRESET, prune=prune), make)
    return found


def rows(loop: str, ways: dict[str, Way], repeats: int, without_prior: bool) -> list[dict]:
    """One row a setting and variant; ratios are against the reference and against compile."""
    found = []
    for setting, (cost, make) in cases(loop, without_prior).items():
        check(make, ways)
        built = {name: build(partial(make, way), way.tf32) for name, way in ways.items()}
        times = measure({n: step for n, (step, _) in built.items()}, repeats, graph=False)
        for name, time in times.items():
            found.append(row(loop, setting, cost, name, time, times, built[name][1]))
        print(table(found[-len(times) :]), flush=True)
    return found


def row(
    loop: str, setting: str, cost: float, name: str, time: Timing, times: dict[str, Timing],
    peak: float,
) -> dict:  # fmt: skip
    over = {
        f"x {other}": times[other].median_ms / time.median_ms
        for other in ("reference", "compile")
        if other in times
    }
    return {
        "setting": setting, "variant": name, "ms": time.median_ms, "p20_ms": time.p20_ms,
        "p80_ms": time.p80_ms, "it/s": 1000 / time.median_ms, "GiB": peak, "GFLOPs": cost, **over,
        "paper it/s": PAPER[loop].get(setting, ""),
    }  # fmt: skip


@pytest.mark.parametrize("loop", ["inversion", "meta"])
def test_steps(benchmark, loop):
    """On the CPU the reference alone, at toy shapes."""
    way = WAYS_OF["ours" if on_gpu() else "reference"]
    options = {"prune": {6: 0.75}, "prior": True} if loop == "inversion" else {"sparsity": 0.75}
    make = partial(inversion if loop == "inversion" else meta, way, **options)
    step, _ = build(make, False)

    def timed() -> None:
        step()
        if on_gpu():
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=20 if on_gpu() else 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loop", choices=["inversion", "meta"])
    parser.add_argument("--ways", nargs="*", default=list(WAYS_OF) if on_gpu() else ["reference"])
    parser.add_argument("--repeats", type=int, default=20 if on_gpu() else 1)
    parser.add_argument("--no-prior", action="store_true", help="also rows without R_BN")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    ways = {name: WAYS_OF[name] for name in options.ways}
    found = rows(options.loop, ways, options.repeats, options.no_prior)
    print(table(found))
    if options.record:
        record(f"steps_{options.loop}", found)


if __name__ == "__main__":
    main()

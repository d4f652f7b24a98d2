"""Whole steps of both loops, the paper's Tables 4 and 5: iterations a second and peak memory.

`python benchmarks/bench_steps.py inversion` and `... meta` print a table each; --record keeps it
under results/. Variants take turns in one process: the eager fp32 reference in PyTorch's default
precision (TF32 convolutions, IEEE products), the same with TF32 products and with bf16 autocast,
the strongest plain PyTorch version (bf16, `torch.compile`, one CUDA graph), and ours. ViT-B/16 and
ResNet-50 at their true shapes with random weights; on the CPU toy shapes, which say nothing of
speed. The floor of a row is what its products take at the rates measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from bench_prior import resnet_state
from timing import copy_bandwidth, device, measure, on_gpu, record, sets_for, table
from torch import Tensor

from fastrecycle import LoRA, flops
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.inversion import InversionGroup
from fastrecycle.lora import Head
from fastrecycle.metatrain import MetaTrainer
from fastrecycle.pool import SyntheticPool, TaskImages
from fastrecycle.prior import ResNetPrior
from fastrecycle.pruning import kept_count, patches_after_blocks
from fastrecycle.vit import ViT
from fastrecycle.vit_config import PRESETS

PRESET = "vit_b_16" if on_gpu() else "demo"
WAYS, IMAGES = (5, 5) if on_gpu() else (2, 1)  # of an inverted task: the paper's batch of 25
QUERIES = 19 if on_gpu() else 2  # 5 ways of 1 + 19 images: the paper's batch of 100
TABLE_4 = ({}, {11: 0.75}, {8: 0.75}, {6: 0.75}, {3: 0.3, 6: 0.3, 8: 0.3, 11: 0.3})
TABLE_5 = (0.0, 0.25, 0.5, 0.75)
RESNET50_MULTIPLY_ADDS = 4.09e9  # of one image of 224 pixels
RESNET50_BN_NUMBERS = 11.1e6  # inputs of all BatchNorms
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
    "ours, fp8": Way("triton", "fp8"),
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


def pool(vit: ViT, queries: int = QUERIES) -> SyntheticPool:
    """Noise from four LoRAs: speed does not depend on what images show."""
    per_class, side, patches = queries + 1, vit.config.image_size, vit.config.patches
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


META = MetaConfig(steps=100_000, ways=WAYS, queries=QUERIES, start="zero", resolution=(24, 96))


def meta(way: Way, sparsity: float) -> MetaTrainer:
    vit = ViT.preset(PRESET).to(device())
    config = replace(META, sparsity=sparsity)
    return MetaTrainer(vit, pool(vit), config, precision=way.precision, backend=way.backend)


FIRST = 10 if on_gpu() else 4  # steps whose losses are compared


def build(make: Make, way: Way) -> tuple[Callable, float, Tensor, float]:
    """A step, warm; the peak memory of the first ones in GiB; their losses; seconds until then."""
    torch.manual_seed(0)
    before = 0
    if on_gpu():
        gc.collect()  # an earlier step's memory would be freed meanwhile, and hide this one's
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    stage = make(way)

    def step() -> Tensor:
        with products(way.tf32):
            return stage.step()["loss"]

    losses = torch.tensor([step().float().mean().item() for _ in range(FIRST)])
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu() else 0.0
    return step, peak, losses, time.perf_counter() - start


def check(curves: dict[str, Tensor]) -> None:
    """The losses of the first steps together, no further from fp32 than twice eager bf16.

    Float8 has 4 bits for bf16's 8: 16 times as far. Of one loss alone eager bf16's error may be
    small by chance.

    Raises:
        AssertionError: one curve is further.

    """
    exact = curves["reference"]
    allowed = 2 * (curves["reference, bf16"] - exact).norm() + 2e-3 * exact.norm()
    for name, curve in curves.items():
        error = (curve - exact).norm() / (16 if name.endswith("fp8") else 1)
        assert error <= allowed, (name, error, allowed)


# ------------------------------------------------------------------ floors


@cache
def product_ms(rows: int, into: int, out: int, backward: bool = True) -> float:
    """Milliseconds of x W^T in bf16 and, with `backward`, of dy W."""
    dtype = torch.bfloat16
    sets = sets_for(rows * (into + out) * 2, most=4)
    xs = [torch.randn(rows, into, device=device(), dtype=dtype) for _ in range(sets)]
    dys = [torch.randn(rows, out, device=device(), dtype=dtype) for _ in range(sets)]
    weight = torch.randn(out, into, device=device(), dtype=dtype)
    calls = {"forward": [partial(torch.nn.functional.linear, x, weight) for x in xs]}
    if backward:
        calls["backward"] = [partial(torch.matmul, dy, weight) for dy in dys]
    return sum(t.median_ms for t in measure(calls, 7).values())


@cache
def bandwidth() -> float:
    """Bytes a second of a copy."""
    return copy_bandwidth(2**31 if on_gpu() else 2**20)


def products_ms(images: int, prune: dict[int, float], sparsity: float, pixels: bool) -> float:
    """All products of the backbone, forward and back to its input; of what a step has to compute.

    Args:
        images: B.
        prune, sparsity: see `flops`.
        pixels: whether the gradient goes back to the pixels, or only to the first block's LoRA.

    """
    config = PRESETS[PRESET]
    d, prefix = config.width, config.prefix_tokens
    n = kept_count(config.patches, sparsity)
    total = product_ms(images * n, 3 * config.patch_size**2, d, pixels)
    for i, after in enumerate(patches_after_blocks(n, config.depth, prune)):
        total += product_ms(images * (n + prefix), d, 3 * d, pixels or i > 0)
        # of the last block's other products only the CLS token's matter
        before, left = (n, after) if i < config.depth - 1 else (1 - prefix, 1 - prefix)
        total += product_ms(images * (before + prefix), d, d)
        total += product_ms(images * (left + prefix), d, config.mlp_dim)
        total += product_ms(images * (left + prefix), config.mlp_dim, d)
        n = after
    return total


def prior_ms(images: int) -> tuple[float, float]:
    """The prior by arithmetic and by bytes.

    Multiply-adds of ResNet-50's convolutions, forward and back to their inputs, at the rate of the
    backbone's largest product. Each BatchNorm's input written and read, its output written and read
    by the next convolution; back the same, and the input once more: nine times its size.
    """
    config = PRESETS[PRESET]
    rows = images * (config.patches + config.prefix_tokens)
    rate = 4 * rows * config.width * config.mlp_dim / product_ms(rows, config.width, config.mlp_dim)
    arithmetic = 4 * images * RESNET50_MULTIPLY_ADDS / rate
    moved = 9 * 2 * images * RESNET50_BN_NUMBERS
    return arithmetic, 1000 * moved / bandwidth()


def floor_ms(loop: str, prune: dict[int, float], sparsity: float, prior: bool) -> float:
    """What a step cannot undercut: its products, or the prior's bytes where those take longer."""
    if loop == "meta":
        return products_ms(WAYS * (1 + QUERIES), {}, sparsity, pixels=False)
    images = WAYS * IMAGES
    total = products_ms(images, prune, 0.0, pixels=True)
    if not prior:
        return total
    arithmetic, by_bytes = prior_ms(images)
    return max(total + arithmetic, by_bytes)  # as if the two overlapped perfectly


# ------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Setting:
    """A row of Table 4 or 5."""

    name: str
    make: Make
    gflops: float  # of an image, by the paper's definition
    floor: Callable[[], float]


def settings(loop: str, without_prior: bool) -> list[Setting]:
    """All rows of a loop's table."""
    if loop == "meta":
        return [
            Setting(
                str(s), partial(meta, sparsity=s), flops(PRESET, sparsity=s),
                partial(floor_ms, loop, {}, s, False),
            )
            for s in TABLE_5
        ]  # fmt: skip
    rows = [(prune, True) for prune in TABLE_4]
    rows += [({}, False), ({6: 0.75}, False)] if without_prior else []
    return [
        Setting(
            str(prune) + ("" if prior else ", no prior"),
            partial(inversion, prune=prune, prior=prior), flops(PRESET, prune=prune),
            partial(floor_ms, loop, prune, 0.0, prior),
        )
        for prune, prior in rows
    ]  # fmt: skip


def rows(
    loop: str, ways: dict[str, Way], repeats: int, chosen: list[Setting]
) -> Iterator[list[dict]]:
    """One row a variant, of each setting in turn; ratios are against the reference and compile."""
    ways = {"reference": WAYS_OF["reference"], "reference, bf16": WAYS_OF["reference, bf16"]} | ways
    for setting in chosen:
        built = {name: build(setting.make, way) for name, way in ways.items()}
        check({name: losses for name, (_, _, losses, _) in built.items()})
        times = measure({n: step for n, (step, *_) in built.items()}, repeats, graph=False)
        floor = setting.floor()
        found = []
        for name, timing in times.items():
            over = {
                f"x {other}": times[other].median_ms / timing.median_ms
                for other in ("reference", "compile")
                if other in times
            }
            found.append({
                "setting": setting.name, "variant": name, "ms": timing.median_ms,
                "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms, "it/s": 1000 / timing.median_ms,
                "GiB": built[name][1], "first steps_s": built[name][3], "GFLOPs": setting.gflops,
                **over,
                "floor_ms": floor, "of floor": floor / timing.median_ms,
                "paper it/s": PAPER[loop].get(setting.name, ""),
            })  # fmt: skip
        yield found
        del built


@pytest.mark.parametrize("loop", ["inversion", "meta"])
def test_steps(benchmark, loop):
    """On the CPU the reference alone, at toy shapes."""
    way = WAYS_OF["ours" if on_gpu() else "reference"]
    options = {"prune": {6: 0.75}, "prior": True} if loop == "inversion" else {"sparsity": 0.75}
    make = partial(inversion if loop == "inversion" else meta, **options)
    step, *_ = build(make, way)

    def timed() -> None:
        step()
        if on_gpu():
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=20 if on_gpu() else 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loop", choices=["inversion", "meta"])
    usual = [name for name in WAYS_OF if not name.endswith("fp8")]
    parser.add_argument("--ways", nargs="*", default=usual)
    parser.add_argument("--settings", nargs="*", default=[], help="rows, by number; all by default")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu() else 1)
    parser.add_argument("--no-prior", action="store_true", help="also rows without R_BN")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    chosen = settings(options.loop, options.no_prior)
    if options.settings:
        chosen = [chosen[int(i)] for i in options.settings]
    ways = {name: WAYS_OF[name] for name in options.ways if on_gpu() or "ours" not in name}
    for found in rows(options.loop, ways, options.repeats, chosen):
        print(table(found), flush=True)
        if options.record:  # one by one: a run that is cut short leaves what it has
            record(f"steps_{options.loop}", found)


if __name__ == "__main__":
    main()

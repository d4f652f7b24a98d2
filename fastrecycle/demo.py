"""`fastrecycle demo`: the whole method on a part of the packaged bank, and what it is worth.

Everything comes with the package; CIFAR-FS is evaluated too where the data root has it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastrecycle import run as runs
from fastrecycle.config import InversionConfig, MetaConfig, Precision
from fastrecycle.data import ImageDataset, load_dataset
from fastrecycle.data.registry import find_root
from fastrecycle.eval import Pixels, Result, evaluate_shots
from fastrecycle.files import write_json
from fastrecycle.inputs import dataset_input, loras_input, network_input
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.prior import load_prior
from fastrecycle.recycler import MetaLoRARecycler, resolve_device
from fastrecycle.report import plot_pool, text_table
from fastrecycle.vit import ViT

SHOTS = (1, 5)
TASKS = 600

NN, AVERAGE, PRODUCTS, HERE, PACKAGED = (
    "NN",
    "LoRAs-Avg + NN",
    "LoRAs-Avg of products + NN",
    "LoRA Recycle, run here",
    "LoRA Recycle, packaged",
)


@dataclass(frozen=True)
class Plan:
    """How much of the method a demo runs."""

    loras: int  # the first of the packaged bank
    inversion: InversionConfig
    meta: MetaConfig
    images: int | None  # evaluated images a class, the first of each; None: all
    cifar_images: int | None  # the same on CIFAR-FS


# Two CPU cores, minutes.
QUICK = Plan(
    loras=6,
    inversion=InversionConfig(
        images_per_class=6, iterations=40, group=3, checkpoint_every=20, schedule="cosine"
    ),
    meta=MetaConfig(
        steps=150, queries=5, lr=1e-4, start="average", schedule="cosine", checkpoint_every=25
    ),
    images=60,
    cifar_images=25,
)
# A GPU, minutes: what made the packaged meta-LoRA.
FULL = Plan(
    loras=40,
    inversion=InversionConfig(images_per_class=10, iterations=500, group=20),
    meta=MetaConfig(steps=1000, queries=9, tasks=4, lr=1e-4, start="average"),
    images=None,
    cifar_images=None,
)


def choose_plan(schedule: Literal["auto", "quick", "full"], device: torch.device) -> Plan:
    """`QUICK` or `FULL`; "auto" is full on CUDA."""
    full = schedule == "full" or (schedule == "auto" and device.type == "cuda")
    return FULL if full else QUICK


def run_demo(
    out: str | Path,
    *,
    schedule: Literal["auto", "quick", "full"] = "auto",
    data_root: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "auto",
    quiet: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Recycle, evaluate, draw; writes results.json and synthetic.png into `out`.

    Called again after an interruption it goes on where it stopped.

    Args:
        out: folder of the results.
        schedule: "quick" (`QUICK`), "full" (`FULL`), or "auto": full on CUDA.
        data_root: where CIFAR-FS may be.
        seed: of everything drawn.
        device, precision: see `MetaLoRARecycler`.
        quiet: no progress bars.
        say: takes the lines of the output.

    Returns:
        What results.json holds.

    """
    out, start = Path(out), time.perf_counter()
    where = resolve_device(device)
    plan = choose_plan(schedule, where)
    vit, bank, packaged = ViT.from_pretrained("demo"), LoRABank.load("demo"), LoRA.load("demo")
    prior = load_prior("demo")
    assert prior is not None
    loras = bank[: plan.loras]
    datasets = _datasets(data_root, plan)  # a wrong data root shows now, not after the training
    inputs: dict[str, Any] = {
        "backbone": network_input("demo", vit),
        "bank": loras_input("demo", loras),
        "prior": network_input("demo", prior),
    }
    recycler = MetaLoRARecycler(
        vit, loras, prior, plan.inversion, plan.meta, device=where, precision=precision,
        seed=seed, inputs=inputs, quiet=quiet,
    )  # fmt: skip
    say(
        f"recycling {len(loras)} of the {len(bank)} packaged LoRAs on {where}"
        f" ({plan.inversion.iterations} iterations, {plan.meta.steps} steps)"
    )
    recycled = recycler.run(out)
    assert recycler.pool is not None
    plot_pool(recycler.pool, out / "synthetic.png")

    rows: dict[str, LoRA | None] = {
        NN: None,
        AVERAGE: LoRA.average(loras, of="factors"),
        PRODUCTS: LoRA.average(loras),
        HERE: recycled,
        PACKAGED: packaged,
    }
    legend = {
        NN: "nearest class mean of the plain backbone",
        AVERAGE: f"the same under the {len(loras)} LoRAs recycled here, their factors A and B"
        " averaged, as the paper's baseline has it",
        PRODUCTS: "the same, their products B A averaged: where the meta-LoRA starts",
        HERE: f"{len(loras)} of the {len(bank)} packaged LoRAs, {plan.inversion.iterations}"
        f" iterations, {plan.meta.steps} steps",
        PACKAGED: f"the packaged meta-LoRA of the full schedule, all {len(bank)} LoRAs",
    }
    tables, listed = [], []
    for name, (dataset, per_class) in datasets.items():
        results, pixels = _evaluate_rows(vit, dataset, per_class, rows, recycler.precision, quiet)
        inputs[name] = dataset_input(name, dataset, data_root)
        tables.append(_table(name, pixels, results))
        listed += _listed(name, results)
    seconds = time.perf_counter() - start
    content = {
        "results": listed,
        "rows": legend,
        "settings": {
            "schedule": "full" if plan is FULL else "quick",
            "plan": runs.settings(plan),
            "seed": seed,
            "tasks": TASKS,
            "device": str(where),
            "precision": recycler.precision,
        },
        "seconds": seconds,
        "versions": runs.versions(),
        "inputs": inputs,
    }
    write_json(out / "results.json", content)
    for table in tables:
        say("\n" + table)
    if "cifar_fs" not in datasets:
        say(
            "\nCIFAR-FS was not evaluated: --data-root or FASTRECYCLE_DATA names no folder with"
            " cifar_fs_test.zip (or cifar_fs/test/CLASS/FILE)."
        )
    say("\n" + "\n".join(f"{row}: {what}" for row, what in legend.items()))
    say(
        "Differences are paired on the same tasks. No row is fine-tuned on the tasks.\n"
        f"\n{out / 'synthetic.png'}: synthetic images, beside each the patches that count most"
        f"\n{out / 'results.json'}: every task's accuracy, settings, versions, input hashes"
        f"\n{seconds:.0f} s"
    )
    return content


def _datasets(
    data_root: str | Path | None, plan: Plan
) -> dict[str, tuple[ImageDataset, int | None]]:
    find_root(data_root)  # raises where it is no folder; an absent CIFAR-FS is none of the demo's
    found = {"digits": (load_dataset("digits"), plan.images)}
    with contextlib.suppress(FileNotFoundError):
        found["cifar_fs"] = (load_dataset("cifar_fs", "test", data_root), plan.cifar_images)
    return found


def first_of_each_class(
    vit: ViT, dataset: ImageDataset, per_class: int | None
) -> Pixels:  # fewer images make a quick demo; the tasks are drawn from what is left
    """The first images of each class (None: all), decoded and resized for a backbone."""
    order = np.argsort(dataset.labels, kind="stable")
    counts = np.bincount(dataset.labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.arange(len(order)) - starts
    chosen = np.sort(order if per_class is None else order[rank < per_class])
    pixels = torch.cat(list(dataset.images(chosen, vit.resize)))
    return Pixels(pixels, dataset.labels[chosen], dataset.class_names, dataset.name)


def _evaluate_rows(
    vit: ViT,
    dataset: ImageDataset,
    per_class: int | None,
    rows: dict[str, LoRA | None],
    precision: str,
    quiet: bool,
) -> tuple[dict[str, dict[int, Result]], Pixels]:
    pixels = first_of_each_class(vit, dataset, per_class)
    results = {}
    total = len(rows) * len(pixels.labels)
    with runs.progress(f"evaluation on {dataset.name}", total, unit="img", quiet=quiet) as update:
        for i, (name, lora) in enumerate(rows.items()):

            def on_images(done: int, count: int, before: int = i * len(pixels.labels)) -> None:
                update(before + done, {})

            results[name] = evaluate_shots(
                vit, lora, pixels, shots=SHOTS, tasks=TASKS, batch_size=64, precision=precision,
                progress=on_images,
            )  # fmt: skip
        update(total, {})
    return results, pixels


def _table(name: str, pixels: Pixels, results: dict[str, dict[int, Result]]) -> str:
    lines = []
    for row, by_shots in results.items():
        cells = [row]
        for shots, result in by_shots.items():
            cells.append(f"{result.accuracy:.1f} ± {result.ci95:.1f}")
            cells.append("" if row == NN else _signed(result.minus(results[NN][shots])))
        lines.append(cells)
    head = [""]
    for shots in results[NN]:
        head += [f"{shots}-shot", "minus NN"]
    gains = [
        f"{row} minus {other}: "
        + ", ".join(
            f"{shots}-shot {_signed(results[row][shots].minus(average))}"
            for shots, average in results[other].items()
        )
        for row in (HERE, PACKAGED)
        for other in (AVERAGE, PRODUCTS)
    ]
    title = (
        f"{name}: {len(pixels.labels)} images of {len(pixels.class_names)} classes, {TASKS} 5-way"
        " tasks; accuracy in %, 95 % interval"
    )
    return "\n".join([title, text_table(head, lines), *gains])


def _signed(difference: Result) -> str:
    return f"{difference.accuracy:+.1f} ± {difference.ci95:.1f}"


def _listed(name: str, results: dict[str, dict[int, Result]]) -> list[dict[str, Any]]:
    listed = []
    for row, by_shots in results.items():
        for shots, result in by_shots.items():
            entry: dict[str, Any] = {
                "dataset": name,
                "row": row,
                "shots": shots,
                "accuracy": result.accuracy,
                "ci95": result.ci95,
            }
            for other, key in (
                (NN, "minus_nn"),
                (AVERAGE, "minus_average"),
                (PRODUCTS, "minus_average_of_products"),
            ):
                difference = result.minus(results[other][shots])
                entry |= {key: difference.accuracy, f"{key}_ci95": difference.ci95}
            listed.append(entry | {"per_task": result.per_task.tolist()})
    return listed

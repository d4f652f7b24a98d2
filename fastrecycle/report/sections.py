"""Sections of a run's page without pictures: figures of the run, curves, tables."""

from __future__ import annotations

import shlex

from fastrecycle.report import figures
from fastrecycle.report.contents import RunContents
from fastrecycle.report.network import Networks
from fastrecycle.report.parts import Plot, Section, Table
from fastrecycle.report.tables import EVALUATION_HEAD, evaluation_rows, flat, last_values
from fastrecycle.vit_config import flops


def facts(run: RunContents) -> list[tuple[str, str]]:
    """The run in a few figures: (name, value)."""
    found: list[tuple[str, str]] = []
    if run.pool is not None:
        pool = run.pool
        found += [
            ("LoRAs inverted", str(len(pool.parts))),
            ("synthetic images", f"{len(pool):,}"),
            ("classes", str(len(pool.class_names))),
            ("image side", f"{pool.images.shape[-1]} px"),
        ]
    for name, stage, key in (
        ("inversion iterations", "inversion", "iterations"),
        ("meta-training steps", "meta", "steps"),
        ("sparsity in meta-training", "meta", "sparsity"),
    ):
        value = run.setting(stage, key)
        if value is not None:
            found.append((name, f"{value:.0%}" if key == "sparsity" else f"{value:,}"))
    return found


def curves(run: RunContents) -> Section | None:
    """Loss, accuracy and the rest over the steps."""
    if not run.metrics:
        return None
    plots = []
    for stage, values in run.metrics.items():
        for name, points in values.items():
            (first, start), (last, end) = points[0], points[-1]
            lowest, highest = min(v for _, v in points), max(v for _, v in points)
            alt = (
                f"{name} of {stage}: {start:.4g} at step {first:g}, {end:.4g} at step {last:g},"
                f" between {lowest:.4g} and {highest:.4g}"
            )
            plots.append(Plot(figures.curve_svg(f"{stage}: {name}", points), alt))
    head = ["stage", "value", "step", "last value"]
    return Section(
        "curves", "Curves", ["Each value as the run wrote it to metrics.jsonl."], plots=plots,
        tables=[Table("Last values", head, last_values(run.metrics), folded=True)],
    )  # fmt: skip


def accuracy(run: RunContents) -> Section:
    """Tables with 95 % intervals."""
    title = "Accuracy on few-shot tasks"
    if not run.evaluations:
        source = run.input("backbone").get("source", "BACKBONE")
        words = ["fastrecycle", "eval", "--dataset", "NAME", "--backbone", str(source), "--lora"]
        folder = run.folder
        again = [
            shlex.join([*words, lora, "--shots", "1", "5", "--json", str(folder / file)])
            for lora, file in ((str(folder / "meta_lora"), "eval.json"), ("none", "nn.json"))
        ]
        text = "Nothing was evaluated into this folder. A JSON file that lies in it is shown here:"
        return Section("accuracy", title, [text], commands=again)
    text = (
        "Mean accuracy in percent with its 95 % interval over the tasks. Differences are paired: on"
        " the same tasks, against nearest class mean without a LoRA."
    )
    tables = []
    for dataset in dict.fromkeys(e.dataset for e in run.evaluations):
        rows = evaluation_rows([e for e in run.evaluations if e.dataset == dataset])
        order = [2, 3, 4, 5, 6, 0]
        tables.append(
            Table(
                dataset,
                [EVALUATION_HEAD[i] for i in order],
                [[row[i] for i in order] for row in rows],
            )
        )
    return Section("accuracy", title, [text], tables=tables)


def cost(run: RunContents, networks: Networks | None) -> Section:
    """Time, rates and the paper's FLOPs."""
    rows = []
    for stage, seconds in run.seconds.items():
        points = next(iter(run.metrics[stage].values()), []) if stage in run.metrics else []
        steps = points[-1][0] - points[0][0] if points else 0
        rate = f"{steps / seconds:.3g}" if seconds > 0 and steps else ""
        rows.append([stage, f"{points[-1][0]:,.0f}" if points else "", f"{seconds:,.1f}", rate])
    tables = [Table("Time", ["stage", "steps", "seconds", "steps a second"], rows)] if rows else []
    text = [
        "Seconds are counted from a stage's first line of metrics to its last; pauses of a resumed"
        " run are in them, set-up is not. A step of inversion is one iteration of one LoRA."
    ]
    if networks is not None:
        prune = {int(k): v for k, v in (run.setting("inversion", "prune") or {}).items()}
        sparsity = run.setting("meta", "sparsity", 0.0)
        config = networks.vit.config
        dense = flops(config)
        work = [("dense", dense), ("inversion", flops(config, prune=prune))]
        if run.setting("meta", "steps") is not None:
            work.append((f"meta-training, {sparsity:.0%} masked", flops(config, sparsity=sparsity)))
        listed = [[name, f"{g:.2f}", f"{g / dense:.0%}"] for name, g in work]
        head = ["work", "GFLOPs", "of dense"]
        tables.append(Table("FLOPs of a step and image, the paper's definition", head, listed))
    return Section("cost", "Cost", text, tables=tables)


def environment(run: RunContents) -> Section:
    """Versions, inputs and settings, as the manifests have them."""
    manifest = run.manifest
    head = ["key", "value"]
    tables = [
        Table("Versions", head, flat(manifest.get("versions", {}))),
        Table("Inputs", head, flat(manifest.get("inputs", {})), folded=True),
    ]
    for where, content in run.manifests.items():
        rest = {k: v for k, v in content.items() if k not in ("versions", "inputs")}
        tables.append(Table(f"Settings in {where}", head, flat(rest), folded=True))
    text = "What decided the result, as the run wrote it down before it began."
    return Section("environment", "Environment and settings", [text], tables=tables)

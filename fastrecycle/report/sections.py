"""The parts of a run's page: what each shows and says, as plain data for the template."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastrecycle.prior import ResNetPrior
from fastrecycle.pruning import masked_images
from fastrecycle.report import figures
from fastrecycle.report.contents import RunContents
from fastrecycle.report.figures import SERIES, SPARSITIES, data_uri
from fastrecycle.report.network import Networks, kept_maps, pool_features, project
from fastrecycle.report.small_cnn import cnn_images
from fastrecycle.report.tables import EVALUATION_HEAD, evaluation_rows, flat, last_values
from fastrecycle.vit_config import flops

if TYPE_CHECKING:
    from fastrecycle.report.page import PageOptions

LORAS, CLASSES = 6, 5  # shown of a pool


@dataclass(frozen=True)
class Picture:
    """An <img>: its data, what it shows, and a word below it."""

    source: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """An inline <svg>, its description, and the names of its colours (series, name, count)."""

    svg: str
    alt: str
    legend: tuple[tuple[int, str, int], ...] = ()
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, what it says, and what it shows."""

    id: str
    title: str
    text: Sequence[str]
    strips: Sequence[tuple[str, Sequence[Picture]]] = ()  # pictures side by side, with a caption
    plots: Sequence[Plot] = ()
    tiles: Sequence[Picture] = ()  # small pictures in a grid
    tables: Sequence[Table] = ()
    commands: Sequence[str] = field(default=())


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


def _shown(run: RunContents, loras: int = LORAS) -> list[tuple[int, int, int]]:
    assert run.pool is not None
    return figures.pick_images(run.pool, loras=loras, classes=CLASSES)


def _named(run: RunContents, task: int, label: int) -> tuple[str, str]:
    """A class, and the LoRA that it is of."""
    assert run.pool is not None
    part = run.pool.parts[task]
    return figures.class_name(run.pool, task, label), f"LoRA {part.name or part.task}"


# ---------------------------------------------------------------------- images


def synthetic(run: RunContents) -> Section | None:
    """Synthetic images beside their masked versions (Figs. 4 to 6)."""
    pool = run.pool
    if pool is None:
        return None
    strips = []
    for task, label, index in _shown(run):
        name, lora = _named(run, task, label)
        versions = figures.masked_versions(pool, index, SPARSITIES)
        pictures = [Picture(data_uri(versions[0]), f"Synthetic image of {name}", "whole")]
        for sparsity, version in zip(SPARSITIES, versions[1:], strict=True):
            alt = f"The same image of {name} with {sparsity:.0%} of its patches greyed out"
            pictures.append(Picture(data_uri(version), alt, f"{sparsity:.0%} masked"))
        strips.append((f"{name}, {lora}", pictures))
    shown = min(LORAS, len(pool.parts))
    left = f"Inversion pruned each image down to {pool.survivors} of {pool.patches} patches. "
    text = (
        f"One image a class of {shown} of the {len(pool.parts)} LoRAs, made from the LoRAs alone."
        " Beside each, the same with its least important patches greyed out: those that the CLS"
        " token of the last block attends to least (Figs. 4 to 6 of the paper). "
        + (left if pool.survivors < pool.patches else "")
        + "A masked patch is never embedded in meta-training, so that a quarter of the patches is"
        " about a quarter of the work."
    )
    return Section("synthetic", "Synthetic images and their masks", [text], strips=strips)


def beside_runs(run: RunContents, others: Sequence[RunContents]) -> Section | None:
    """The same classes of the same LoRAs in other runs: with and without the prior (Fig. 9)."""
    if run.pool is None:
        return None
    title = "With and without the prior"
    if not others:
        return Section(
            "prior", title,
            [
                "No run without the naturalness prior R_BN lies beside this one. To see what the"
                " prior is worth (Fig. 9 of the paper), invert the same LoRAs without it and show"
                " both:"
            ],
            commands=_without_prior(run),
        )  # fmt: skip
    strips = []
    for task, label, index in _shown(run):
        name, lora = _named(run, task, label)
        pictures = [_of_run(run, index, name)]
        for other in others:
            found = _counterpart(run, other, task, label)
            if found is not None:
                pictures.append(_of_run(other, found, name))
        if len(pictures) > 1:
            strips.append((f"{name}, {lora}", pictures))
    listed = "; ".join(f"{other.name}: {_prior(other)}" for other in (run, *others))
    text = f"The same classes of the same LoRAs, a run each (Fig. 9 of the paper). {listed}."
    if not strips:
        text += " The runs have no LoRA and class in common, so there is nothing to show."
    return Section("prior", title, [text], strips=strips)


def _prior(run: RunContents) -> str:
    if run.without_prior:
        return "without the prior"
    source = run.input("prior").get("source", "a network")
    return f"prior {source}, weight {run.setting('inversion', 'alpha')}"


def _of_run(run: RunContents, index: int, name: str) -> Picture:
    assert run.pool is not None
    pixels = run.pool.images[index].float() / 255
    short = "no prior" if run.without_prior else "with prior"
    return Picture(data_uri(pixels), f"{name} in the run {run.name}, {_prior(run)}", short)


def _counterpart(run: RunContents, other: RunContents, task: int, label: int) -> int | None:
    """The image of the same LoRA and class in another run's pool; None: there is none."""
    assert run.pool is not None
    assert other.pool is not None
    part = run.pool.parts[task]
    for i, candidate in enumerate(other.pool.parts):
        same = (candidate.task, candidate.class_names) == (part.task, part.class_names)
        if same and candidate.name == part.name:
            return figures.first_image(other.pool, i, label)
    return None


def _without_prior(run: RunContents) -> list[str]:
    out = f"{run.folder}-no-prior"
    words = ["fastrecycle", "invert", "--alpha", "0", "--prior", "none", "--out", out]
    for name in ("backbone", "bank"):
        words += [f"--{name}", str(run.input(name).get("source", name.upper()))]
    for name in ("iterations", "images_per_class"):
        value = run.setting("inversion", name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    again = ["fastrecycle", "report", str(run.folder), "--compare", out]
    return [shlex.join(words), shlex.join(again)]


def beside_cnn(
    run: RunContents,
    cnn: ResNetPrior | None,
    others: Sequence[RunContents],
    options: PageOptions,
    say: Callable[[str], None],
) -> Section | None:
    """Images inverted from a small CNN beside the run's (Fig. 7)."""
    if run.pool is None:
        return None
    title = "Beside the inversion of a small CNN"
    if cnn is None:
        text = (
            "Earlier data-free methods such as CMI invert a small convolutional network instead of"
            " a vision transformer under a LoRA (Fig. 7 of the paper). To see such images here:"
        )
        command = shlex.join(["fastrecycle", "report", str(run.folder), "--small-cnn", "demo"])
        return Section("cnn", title, [text], commands=[command])
    say("inverting the small CNN")
    strips = []
    found = cnn_images(cnn, run.pool, iterations=options.cnn_iterations, seed=options.seed)
    for images in found:
        for row, label in enumerate(images.labels):
            name, lora = _named(run, images.task, label)
            index = figures.first_image(run.pool, images.task, label)
            assert index is not None
            pictures = [_of_run(run, index, name)]
            for other in others:
                same = _counterpart(run, other, images.task, label)
                if same is not None:
                    pictures.append(_of_run(other, same, name))
            for pixels, caption in (
                (images.plain[row], "CNN, no prior"),
                (images.with_statistics[row], "CNN, own statistics"),
            ):
                alt = f"{name} inverted from the small CNN: {caption.partition(', ')[2]}"
                pictures.append(Picture(data_uri(pixels), alt, caption))
            strips.append((f"{name}, {lora}", pictures))
    right = np.mean([images.agreement for images in found], axis=0) if found else (0.0, 0.0)
    text = (
        "Left, this run's images from a LoRA. Right, pixels optimised for a small CNN, in"
        f" {options.cnn_iterations} iterations: for its cross-entropy alone, and with its own"
        " BatchNorm statistics as CMI and DeepInversion have it (Fig. 7 of the paper). The CNN has"
        " no classifier, so its classes are the directions of its features' class means over this"
        " run's images. CMI also trains a generator and contrasts images with a memory; neither is"
        " done here. The CNN assigns"
        f" {right[0]:.0%} and {right[1]:.0%} of its images to their class."
    )
    return Section("cnn", title, [text], strips=strips)


# ---------------------------------------------------------------------- networks


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread."""
    return sorted({i * count // most for i in range(most)}) if count > most else list(range(count))


def projected(
    run: RunContents,
    networks: Networks | None,
    absent: str,
    options: PageOptions,
    say: Callable[[str], None],
) -> Section | None:
    """The pool's features in the plane (Fig. 8)."""
    if run.pool is None:
        return None
    method = {"tsne": "t-SNE", "umap": "UMAP"}[options.projection]
    title = f"The pool's features ({method})"
    if networks is None:
        return Section("features", title, [f"Not drawn, for want of the networks: {absent}"])
    indices = _spread(len(run.pool), options.embedded)
    if len(indices) < 4:
        return Section("features", title, ["Not drawn: fewer than four images."])
    say(f"{method} of {len(indices)} images")
    classes = run.pool.classes[torch.tensor(indices)].tolist()
    common = Counter(classes).most_common(SERIES)
    rank = {label: i for i, (label, _) in enumerate(common)}
    series = np.array([rank.get(label, -1) for label in classes])
    legend = [(i, run.pool.class_names[label], count) for i, (label, count) in enumerate(common)]
    rest = int((series < 0).sum())
    if rest:
        others = len(set(classes)) - len(common)
        legend.append((-1, f"{others} other classes", rest))
    plots = []
    for name, lora in (("plain backbone", None), ("meta-LoRA", networks.meta_lora)):
        if name == "meta-LoRA" and lora is None:
            continue
        features = pool_features(networks.vit, lora, run.pool, indices, options.precision)
        points = project(features, options.projection, options.seed)
        alt = (
            f"{method} of {len(indices)} synthetic images' features under the {name}, coloured by"
            f" class: {', '.join(text for _, text, _ in legend)}"
        )
        plots.append(Plot(figures.scatter_svg(name, points, series), alt, tuple(legend), name))
    text = (
        f"Features of {len(indices)} synthetic images in the plane (Fig. 8 of the paper), colours"
        f" and shapes for the {len(common)} classes with the most images. Distances between far"
        " groups mean nothing; what counts is whether a class keeps together."
    )
    return Section("features", title, [text], plots=plots)


def kept_over_layers(
    run: RunContents, networks: Networks | None, absent: str, say: Callable[[str], None]
) -> Section | None:
    """Where each block's CLS attention lies: which quarter of the patches it would keep."""
    pool = run.pool
    if pool is None:
        return None
    title = "Kept patches over the layers"
    if networks is None:
        return Section("layers", title, [f"Not drawn, for want of the networks: {absent}"])
    indices = [pool_index for _, _, pool_index in _shown(run)][:30]
    say(f"kept patches of {len(indices)} images")
    maps = kept_maps(networks, pool, indices)
    grid = networks.vit.config.grid
    pruned = {int(block) for block in (run.setting("inversion", "prune") or {})}
    tiles = []
    for block, kept in enumerate(maps):
        share = kept.float().mean(0).view(grid, grid).numpy()
        inner = share[grid // 4 : grid - grid // 4, grid // 4 : grid - grid // 4].mean()
        alt = (
            f"Block {block}: share of images that keep each patch, {inner:.0%} on average in the"
            f" centre and {share.mean():.0%} overall"
        )
        note = " (prunes)" if block in pruned else ""
        tiles.append(Picture(figures.heat_uri(share), alt, f"block {block}{note}"))
    strips = []
    blocks = _spread(len(maps), 4)
    for row in _spread(len(indices), 3):
        image = pool.images[indices[row]].float()[None] / 255
        name = pool.class_names[int(pool.classes[indices[row]])]
        pictures = [Picture(data_uri(image[0]), f"Synthetic image of {name}", "whole")]
        for block in blocks:
            kept = maps[block, row].nonzero()[:, 0][None]
            masked = masked_images(image, kept, image.shape[-1] // grid, fill=0.5)[0]
            alt = f"The quarter of the patches of {name} that block {block} would keep"
            pictures.append(Picture(data_uri(masked), alt, f"block {block}"))
        strips.append((name, pictures))
    own = "their own LoRAs" if networks.bank is not None else "no LoRA: the run names no bank"
    text = (
        "If a block alone pruned (Eq. 5), these patches would be the quarter that it keeps: the"
        f" share of {len(indices)} images that keep each patch, dark for none and yellow for all,"
        f" under {own}. A block that prunes in this run is marked."
    )
    return Section("layers", title, [text], tiles=tiles, strips=strips)


# ---------------------------------------------------------------------- figures


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

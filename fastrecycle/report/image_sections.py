"""Sections of a run's page that show its synthetic images, alone and beside others."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastrecycle.prior import ResNetPrior
from fastrecycle.report import figures
from fastrecycle.report.contents import RunContents
from fastrecycle.report.figures import SPARSITIES, data_uri
from fastrecycle.report.parts import Picture, Section
from fastrecycle.report.small_cnn import cnn_images

if TYPE_CHECKING:
    from fastrecycle.report.page import PageOptions

LORAS, CLASSES = 6, 5  # shown of a pool


def _shown(run: RunContents, loras: int = LORAS) -> list[tuple[int, int, int]]:
    assert run.pool is not None
    return figures.pick_images(run.pool, loras=loras, classes=CLASSES)


def _named(run: RunContents, task: int, label: int) -> tuple[str, str]:
    """A class, and the LoRA that it is of."""
    assert run.pool is not None
    part = run.pool.parts[task]
    return figures.class_name(run.pool, task, label), f"LoRA {part.name or part.task}"


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
        " Beside each, the same with its least important patches greyed out: those that the"
        " last block's attention scores least (Figs. 4 to 6 of the paper). "
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

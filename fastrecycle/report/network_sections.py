"""Sections of a run's page that its networks are computed for: features, kept patches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastrecycle.pruning import masked_images
from fastrecycle.report import figures
from fastrecycle.report.contents import RunContents
from fastrecycle.report.figures import SERIES, data_uri
from fastrecycle.report.image_sections import CLASSES, LORAS
from fastrecycle.report.network import Networks, kept_maps, pool_features, project
from fastrecycle.report.parts import Picture, Plot, Section

if TYPE_CHECKING:
    from fastrecycle.report.page import PageOptions


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
    indices = [i for _, _, i in figures.pick_images(pool, loras=LORAS, classes=CLASSES)]
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

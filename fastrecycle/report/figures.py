"""Pictures of a run: PNG files for report.md, inline SVG and data URIs for the page."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastrecycle.files import atomic_write
from fastrecycle.pool import SyntheticPool
from fastrecycle.pruning import kept_count, masked_images
from fastrecycle.report.tables import Metrics

SPARSITIES = (0.25, 0.5, 0.75)  # Fig. 6
SERIES = 8  # colours that the page knows apart from grey

# matplotlib writes colours as hex; these stand for the page's own, which change with its theme
_INK, _LINE, _GREY = "#000001", "#000002", "#000003"
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)", _GREY: "var(--muted)"} | {
    f"#0001{i:02x}": f"var(--series-{i})" for i in range(SERIES)
}


# ---------------------------------------------------------------------- files


def plot_metrics(metrics: Metrics, path: str | Path) -> None:
    """One row of small plots a stage, written as PNG."""
    from matplotlib.figure import Figure

    columns = max(len(values) for values in metrics.values())
    figure = Figure(figsize=(3.2 * columns, 2.6 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), columns, squeeze=False)
    for row, (stage, values) in zip(grid, metrics.items(), strict=True):
        for axes in row[len(values) :]:
            axes.set_axis_off()
        for axes, (name, points) in zip(row, values.items()):
            axes.plot(*zip(*points), marker="." if len(points) < 3 else None)
            axes.set_title(f"{stage}: {name}", fontsize=9)
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=7)
    write_figure(figure, path)


def plot_pool(pool: SyntheticPool, path: str | Path, *, loras: int = 6, classes: int = 5) -> float:
    """Synthetic images beside the same with their masked patches grey, a row a LoRA, as PNG.

    Returns:
        The share of patches shown: what pruning left, or a quarter where nothing was pruned.

    """
    from matplotlib.figure import Figure

    share = pool.survivors / pool.patches if pool.survivors < pool.patches else 0.25
    rows = min(loras, len(pool.parts))
    columns = min(classes, max(int(p.labels.max()) + 1 for p in pool.parts))
    figure = Figure(figsize=(2.3 * columns, 1.45 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for task, line in enumerate(axes):
        for label, cell in enumerate(line):
            cell.set_axis_off()
            found = first_image(pool, task, label)
            if found is None:
                continue
            image, masked = masked_versions(pool, found, (1 - share,))
            cell.imshow(_beside((image, masked)), interpolation="nearest")
            cell.set_title(plain_text(class_name(pool, task, label)), fontsize=7, pad=2)
    write_figure(figure, path)
    return share


def plot_gallery(pool: SyntheticPool, path: str | Path, *, images: int = 12) -> None:
    """Synthetic images whole and with 25, 50 and 75 % of their patches masked (Fig. 6), as PNG."""
    from matplotlib.figure import Figure

    shown = pick_images(pool, loras=images, classes=images)
    shown = [shown[i * len(shown) // images] for i in range(min(images, len(shown)))]
    columns = min(2, len(shown))
    figure = Figure(figsize=(4.4 * columns, 1.3 * -(-len(shown) // columns)), layout="constrained")
    cells = list(figure.subplots(-(-len(shown) // columns), columns, squeeze=False).flat)
    for cell in cells:
        cell.set_axis_off()
    for cell, (task, label, index) in zip(cells, shown):
        cell.imshow(_beside(masked_versions(pool, index, (0.0, *SPARSITIES))[1:]))
        cell.set_title(plain_text(class_name(pool, task, label)), fontsize=8, pad=2)
    write_figure(figure, path)


def _beside(images: Sequence[Tensor]) -> Any:
    """(3, S, S) images with white gaps as one (S, k S + gaps, 3) array."""
    gap = images[0].new_ones(3, images[0].shape[1], max(1, images[0].shape[1] // 16))
    row = [x for image in images for x in (gap, image)][1:]
    return torch.cat(row, dim=2).permute(1, 2, 0).numpy()


def write_figure(figure: Any, path: str | Path) -> None:
    """A matplotlib figure as PNG, atomically."""
    atomic_write(path, lambda stream: figure.savefig(stream, format="png", dpi=130))


def plain_text(name: str) -> str:
    """Text that matplotlib shall not read as mathematics."""
    return name.replace("$", r"\$")


# ---------------------------------------------------------------------- choosing images


def class_name(pool: SyntheticPool, task: int, label: int) -> str:
    """Of a row of a LoRA's head."""
    names = pool.parts[task].class_names
    return names[label] if names else f"class {label}"


def first_image(pool: SyntheticPool, task: int, label: int) -> int | None:
    """Index in the pool of the first image of a class; None: it has none."""
    found = ((pool.tasks == task) & (pool.labels == label)).nonzero()[:1, 0]
    return int(found[0]) if len(found) else None


def pick_images(
    pool: SyntheticPool, *, loras: int = 6, classes: int = 5
) -> list[tuple[int, int, int]]:
    """(position of the LoRA, class, index) of one image a class."""
    found = []
    for task in range(min(loras, len(pool.parts))):
        for label in pool.parts[task].labels.unique().tolist()[:classes]:
            index = first_image(pool, task, label)
            assert index is not None
            found.append((task, label, index))
    return found


def masked_versions(pool: SyntheticPool, index: int, sparsities: Sequence[float]) -> list[Tensor]:
    """Image `index` as (3, S, S) floats in [0, 1], whole and then at each sparsity.

    Where inversion pruned further than a sparsity, what comes back first are the patches that the
    whole network ranks highest.
    """
    image = pool.images[index : index + 1].float() / 255
    patch = image.shape[-1] // math.isqrt(pool.patches)
    versions = [image]
    for sparsity in sparsities:
        kept = pool.order[index : index + 1, : kept_count(pool.patches, sparsity)]
        versions.append(masked_images(image, kept, patch, fill=0.5))
    return [version[0] for version in versions]


# ---------------------------------------------------------------------- inline, for the page


def data_uri(image: Tensor | np.ndarray) -> str:
    """A (3, S, S) tensor or (H, W, 3) array of floats in [0, 1] as the text of a WebP file.

    Small ones are lossless; a photograph-sized one takes a sixth of its PNG.
    """
    pixels = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image
    stream = io.BytesIO()
    picture = Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))
    small = max(picture.size) <= 96
    picture.save(stream, format="WEBP", lossless=small, quality=100 if small else 90)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def curve_svg(name: str, points: Sequence[tuple[float, float]]) -> str:
    """One value over the steps."""
    figure, axes = _plain_axes((3.4, 2.2))
    axes.plot(*zip(*points), marker="." if len(points) < 3 else None, color="#000100", lw=1.4)
    axes.set_xlabel("step", color=_INK, fontsize=8)
    axes.set_title(plain_text(name), color=_INK, fontsize=9, loc="left")
    axes.grid(color=_LINE, lw=0.6)
    return inline_svg(figure, f"curve-{name}")


def scatter_svg(name: str, points: np.ndarray, series: np.ndarray) -> str:
    """Points (n, 2) in the plane; series (n,) is a colour of the page, -1 its grey."""
    figure, axes = _plain_axes((4.6, 4.2))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.scatter(*points[series < 0].T, s=7, color=_GREY, alpha=0.35, linewidths=0)
    for i in range(SERIES):
        chosen = points[series == i]
        if len(chosen):  # shapes differ too, for whom colours do not
            axes.scatter(*chosen.T, s=26, color=f"#0001{i:02x}", marker="osD^vPX*"[i], linewidths=0)
    return inline_svg(figure, f"scatter-{name}")


def _plain_axes(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=7, colors=_INK)
    for spine in axes.spines.values():
        spine.set_color(_LINE)
    return figure, axes


def inline_svg(figure: Any, name: str) -> str:
    """A matplotlib figure as an <svg> element in the page's colours and font.

    Hidden from readers of the screen: the page gives it its label.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            stream, format="svg", transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )  # fmt: skip
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for sentinel, variable in _VARIABLES.items():
        text = text.replace(sentinel, variable)
    prefix = re.sub(r"\W+", "-", name)  # ids of several figures meet in one page
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text
    )
    return text.replace("xlink:href", "href")


def heat_uri(values: np.ndarray) -> str:
    """A square map of values in [0, 1] as an image, a patch enlarged to eight pixels."""
    from matplotlib import colormaps

    return data_uri(np.kron(colormaps["viridis"](values)[..., :3], np.ones((8, 8, 1))))

"""From the rows of a split to an ImageDataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from fastrecycle.data.groups import Groups
from fastrecycle.data.images import FileImages, ImageDataset
from fastrecycle.data.layouts import Row
from fastrecycle.data.stores import Store

GroupLabels = Callable[[list[str]], Groups | None]


def dataset_of_rows(
    name: str,
    split: str,
    store: Store,
    rows: Sequence[Row],
    readable: dict[str, str],
    group: GroupLabels | None = None,
) -> ImageDataset:
    """The images of one split, whose files a store holds; classes are sorted by their folders.

    Args:
        name: of the set.
        split: train, val or test.
        store: has the files.
        rows: of this split alone, sorted by file.
        readable: class folder -> readable name.
        group: from the sorted class folders to the set's groups of classes.

    """
    labels = sorted({row.label for row in rows})
    code = {label: index for index, label in enumerate(labels)}
    files = [row.file for row in rows]
    store.hold(files)
    return ImageDataset(
        name=name,
        split=split,
        class_names=readable_names(labels, readable),
        labels=np.array([code[row.label] for row in rows], dtype=np.int64),
        files=files,
        pixels=FileImages(store, files),
        groups=None if group is None else group(labels),
    )


def readable_names(labels: list[str], readable: dict[str, str]) -> tuple[str, ...]:
    """Readable class names; where two folders share one (ImageNet's crane), with the folder."""
    names = [readable.get(label, label) for label in labels]
    count = Counter(names)
    return tuple(
        name if count[name] == 1 else f"{name} ({label})"
        for name, label in zip(names, labels, strict=True)
    )

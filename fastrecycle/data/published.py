"""Layouts of registered sets as their authors publish them, told by the tables they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastrecycle.data.layouts import Row
from fastrecycle.data.stores import Store, safe_name


class Layout(NamedTuple):
    """How a published set is recognised and read.

    Attributes:
        tables: base names of the files that must lie side by side.
        rows: (store, their folder with a final slash, or "") -> rows and label -> readable name.

    """

    tables: tuple[str, ...]
    rows: Callable[[Store, str], tuple[list[Row], dict[str, str]]]


def read_published(store: Store) -> tuple[list[Row], dict[str, str]] | None:
    """Rows, sorted by file, and readable class names; None for a store in no published layout.

    Raises:
        FileNotFoundError: a table lists an image that is absent.
        ValueError: a table that cannot be read.

    """
    for layout in LAYOUTS:
        folder = _folder_of(store, layout.tables)
        if folder is not None:
            rows, names = layout.rows(store, folder)
            if not rows:
                raise ValueError(
                    f"load_dataset: {store.path}: {folder}{layout.tables[0]} lists no image of "
                    "the set; copy or download it again"
                )
            return sorted(rows, key=lambda row: row.file), names
    return None


def _folder_of(store: Store, tables: tuple[str, ...]) -> str | None:
    """The outermost folder that holds all the tables, with a final slash; "" at the root."""
    folders = {
        name[: -len(tables[0])]
        for name in store.names
        if name == tables[0] or name.endswith(f"/{tables[0]}")
    }
    whole = [folder for folder in folders if all(store.has(folder + table) for table in tables)]
    return min(whole, key=lambda folder: (folder.count("/"), folder), default=None)


def _cub(store: Store, folder: str) -> tuple[list[Row], dict[str, str]]:
    """CUB-200-2011 by images.txt, image_class_labels.txt and classes.txt.

    Split of Chen et al., "A Closer Look at Few-shot Classification", 2019: of the classes in
    order, from 0, the even ones are for training, i % 4 == 1 for validation, i % 4 == 3 for
    testing.
    """
    classes = _numbered(store, f"{folder}classes.txt")
    labels = _numbered(store, f"{folder}image_class_labels.txt")
    split_of = {
        name: ("train", "val", "train", "test")[index % 4]
        for index, name in enumerate(sorted(classes.values()))
    }
    rows = []
    for number, name in _numbered(store, f"{folder}images.txt").items():
        where = f"{store.path}: {folder}images.txt, image {number}"
        label = classes.get(labels.get(number, ""))
        if label is None:
            raise ValueError(
                f"load_dataset: {where} must have a class in image_class_labels.txt and "
                f"classes.txt, got {labels.get(number, 'none')}; copy or download them again"
            )
        file = f"{folder}images/{safe_name(name, where)}"
        if not store.has(file):
            raise FileNotFoundError(
                f"load_dataset: {where}: no file {file}; unpack the archive again"
            )
        rows.append(Row(split_of[label], label, file))
    # 001.Black_footed_Albatross
    return rows, {name: name.split(".", 1)[-1].replace("_", " ") for name in split_of}


def _numbered(store: Store, name: str) -> dict[str, str]:
    """CUB's tables, `NUMBER VALUE` a line: number -> value."""
    values: dict[str, str] = {}
    text = store.read(name).decode("utf-8", errors="replace")
    for position, line in enumerate(text.splitlines(), 1):
        number, _, value = line.strip().partition(" ")
        if not number:
            continue
        if not value or number in values:
            raise ValueError(
                f"load_dataset: {store.path}: {name} line {position} must be a new number and a "
                f"value, got {line!r}; copy or download it again"
            )
        values[number] = value.strip()
    return values


LAYOUTS = (Layout(("images.txt", "image_class_labels.txt", "classes.txt"), _cub),)

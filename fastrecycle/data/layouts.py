"""From file names to (split, class, file): class folders, or a `filename,label[,split]` table."""

from __future__ import annotations

import csv
import io
import json
import logging
from typing import NamedTuple

from fastrecycle.data.stores import PICKLE_SUFFIXES, Store, pickle_refused, safe_name

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_EXPECTED = "SPLIT/CLASS/FILE, CLASS/FILE, or a filename,label[,split] CSV beside the images"


class Row(NamedTuple):
    """One image: its split (None where the set has none), class folder or label, and file."""

    split: str | None
    label: str
    file: str


def split_name(name: str) -> str | None:
    """train, val or test for any of their spellings; None for another word."""
    return _SPLIT_NAMES.get(name.strip().lower())


def split_spellings(split: str) -> list[str]:
    """All words that mean `split`, its own first."""
    return [word for word, meaning in _SPLIT_NAMES.items() if meaning == split]


def read_rows(store: Store, table: str | None = None) -> list[Row]:
    """All images of a store, sorted by file name.

    Args:
        store: folder or archive.
        table: a CSV in it to read; None: its tables with the columns filename and label where it
            has any, else its class folders.

    Raises:
        ValueError: no image, or a layout that can be read in two ways.

    """
    tables = find_tables(store) if table is None else [table]
    rows = _table_rows(store, tables) if tables else _folder_rows(store)
    return sorted(rows, key=lambda row: row.file)


def find_tables(store: Store) -> list[str]:
    """The CSVs with the columns filename and label at the root or one folder down."""
    return [
        name
        for name in store.names
        if name.lower().endswith(".csv") and name.count("/") <= 1 and _is_table(store, name)
    ]


def read_class_names(store: Store) -> dict[str, str]:
    """Folder name -> readable name from class_names.json at the root or one folder down.

    Without one, from ImageNet's words.txt (`n00001740<tab>entity, ...`), of which the first word.

    Raises:
        ValueError: not a JSON object of strings.

    """
    for name in store.names:
        if name.rsplit("/", 1)[-1] == "class_names.json" and name.count("/") <= 1:
            try:
                names = json.loads(store.read(name))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"load_dataset: {store.path}: {name} is not JSON: {error}"
                ) from error
            if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
                raise ValueError(
                    f"load_dataset: {store.path}: {name} must map folder names to class names"
                )
            return names
    words = [n for n in store.names if n.rsplit("/", 1)[-1] == "words.txt" and n.count("/") <= 1]
    if not words:
        return {}
    text = store.read(words[0]).decode("utf-8", errors="replace")
    pairs = (line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    return {label: name.split(",")[0].strip() for label, name in pairs}


def _folder_rows(store: Store) -> list[Row]:
    """Rows of SPLIT/CLASS/FILE or CLASS/FILE, under any number of enclosing folders."""
    images = [name for name in store.names if name.lower().endswith(IMAGE_SUFFIXES)]
    pickles = [name for name in store.names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles and not images:
        raise pickle_refused(f"{store.path}: {pickles[0]}")
    if len(images) < len(store.names):
        log.debug("%s: %d files are no images", store.path, len(store.names) - len(images))
    paths = [name.split("/") for name in images]
    depth = 0  # of the enclosing folders, which all images share
    filed = [index for index, parts in enumerate(paths) if len(parts) > 1]
    while True:
        tops = {paths[index][depth] for index in filed}
        deep = [index for index in filed if len(paths[index]) - depth > 2]
        # A folder of images named "train" is a class (CIFAR-100 has one), not a split.
        splits = {paths[index][depth] for index in deep if split_name(paths[index][depth])}
        if splits or len(tops) != 1 or not deep:
            break
        depth, filed = depth + 1, deep

    if splits and splits != tops:
        raise ValueError(
            f"load_dataset: {store.path} has {', '.join(sorted(tops - splits)[:3])} beside the "
            f"splits {', '.join(sorted(splits))}; keep the split folders alone"
        )
    if tops and not splits and all(split_name(top) for top in tops):
        raise ValueError(
            f"load_dataset: {store.path}: {', '.join(sorted(tops))} must hold class folders, got "
            f"images ({images[filed[0]]}); expected {_EXPECTED}"
        )
    if splits:
        filed = deep
    if len(filed) < len(images):
        log.info("%s: %d images lie in no class folder", store.path, len(images) - len(filed))
    if not filed:
        raise ValueError(
            f"load_dataset: {store.path} has no images in class folders ({len(images)} outside "
            f"of them); expected {_EXPECTED}"
        )
    if splits:
        return [Row(split_name(paths[i][depth]), paths[i][depth + 1], images[i]) for i in filed]
    return [Row(None, paths[i][depth], images[i]) for i in filed]


def _table_rows(store: Store, tables: list[str]) -> list[Row]:
    """Rows of one table, or of several named by their splits (train.csv, val.csv, test.csv)."""
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for table in tables:
        columns, lines = read_table(store, table)
        for column in ("filename", "label"):
            if column not in columns:
                raise ValueError(
                    f"load_dataset: {store.path}: {table} must have the columns filename and "
                    f"label, got {', '.join(columns) or 'none'}"
                )
        own_split = split_name(table.rsplit("/", 1)[-1][: -len(".csv")])
        if len(tables) > 1 and own_split is None and "split" not in columns:
            raise ValueError(
                f"load_dataset: {store.path} has several tables ({', '.join(tables)}); name them "
                "train.csv, val.csv, test.csv or give the path of one"
            )
        folder = table.rsplit("/", 1)[0] + "/" if "/" in table else ""
        for number, line in lines:
            where = f"{store.path}: {table} line {number}"
            if len(line) < len(columns):
                raise ValueError(
                    f"load_dataset: {where} must have {len(columns)} values, got {len(line)}"
                )
            values = dict(zip(columns, line, strict=False))
            split = own_split
            if "split" in columns:
                split = split_name(values["split"])
                if split is None:
                    raise ValueError(
                        f"load_dataset: {where}: split must be train, val or test, got "
                        f"{values['split']!r}"
                    )
            if not values["label"].strip():
                raise ValueError(f"load_dataset: {where}: label is empty")
            file = _find_image(store, folder, values["filename"].strip(), where)
            if file in seen:
                # Twice in the list, it could be support and query of one task.
                raise ValueError(f"load_dataset: {where}: {file} is listed before, at {seen[file]}")
            seen[file] = f"{table} line {number}"
            rows.append(Row(split, values["label"].strip(), file))
    if not rows:
        raise ValueError(f"load_dataset: {store.path}: {', '.join(tables)} has no rows")
    return rows


def _is_table(store: Store, name: str) -> bool:
    """Whether a CSV has the columns filename and label; others lie beside images too."""
    try:
        head = store.read(name)[:4096].decode("utf-8-sig", errors="replace")
    except ValueError:  # too large
        return False
    first = next(csv.reader(head.splitlines()), [])
    return {"filename", "label"} <= {column.strip().lower() for column in first}


def read_table(store: Store, name: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Lower-case column names, and (line number, values) of the lines that are not empty."""
    try:
        text = store.read(name).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, line) for line in reader if any(line)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"load_dataset: {store.path}: {name} is not a CSV in UTF-8: {error}"
        ) from error
    if not lines:
        return [], []
    return [column.strip().lower() for column in lines[0][1]], lines[1:]


def _find_image(store: Store, folder: str, name: str, where: str) -> str:
    """The file of a table's row, beside the table or in images/ (mini-ImageNet's layout)."""
    safe = safe_name(name, where)
    if not safe.lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(
            f"load_dataset: {where}: filename must end in {', '.join(IMAGE_SUFFIXES)}, got {name!r}"
        )
    for candidate in (f"{folder}{safe}", f"{folder}images/{safe}"):
        if store.has(candidate):
            return candidate
    raise FileNotFoundError(
        f"load_dataset: {where}: no file {folder}{safe} or {folder}images/{safe}"
    )

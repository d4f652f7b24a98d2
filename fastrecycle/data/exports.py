"""Meta-Dataset's sources from class folders, or from HDF5 files with a dataset_spec.json."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path

import numpy as np

from fastrecycle.data.assemble import dataset_of_rows, readable_names
from fastrecycle.data.h5 import H5Images, H5Names
from fastrecycle.data.images import ImageDataset
from fastrecycle.data.layouts import Row, find_tables, read_class_names, read_rows
from fastrecycle.data.meta_dataset import (
    SOURCES,
    SPEC,
    Spec,
    class_splits,
    groups_of,
    read_spec,
)
from fastrecycle.data.published import read_characters, read_class_folders, read_published
from fastrecycle.data.stores import Folder, Store

log = logging.getLogger(__name__)


def read_source(
    name: str, store: Store, split: str, within: tuple[str, ...], of_split: bool
) -> ImageDataset:
    """One split of a source of Meta-Dataset.

    Args:
        name: registered, meta_dataset/SOURCE.
        store: an export: N.h5 files with a dataset_spec.json; SPLIT/CLASS/FILE; CLASS/FILE, split
            as published; or the source as its authors publish it, where that is class folders.
        split: train, val or test.
        within: folders of which one holds the class folders, where the source has others too.
        of_split: the store holds this split alone.

    Raises:
        FileNotFoundError: an export without its dataset_spec.json, or with a class absent.
        ValueError: damaged, or a source without such a split.

    """
    source = name.rsplit("/", 1)[-1]
    found = [n for n in store.names if n == SPEC or (n.endswith(f"/{SPEC}") and n.count("/") == 1)]
    spec = read_spec(store, found[0]) if found else None
    if any(re.search(r"(^|/)\d+\.h5$", n) for n in store.names):
        return _from_h5(name, source, store, spec, found, split)
    rows, readable = _folder_rows(source, store, within)
    if not any(row.split for row in rows) and not of_split:
        folders = sorted({row.label for row in rows})
        split_of = _split_of(source, folders, spec, store)
        rows = [row._replace(split=split_of[row.label]) for row in rows]
    splits = sorted({row.split for row in rows if row.split is not None})
    if splits and split not in splits:
        raise _no_split(store, split, splits)
    rows = [row for row in rows if row.split in (split, None)]
    if source == "ilsvrc_2012" and spec is None:
        log.warning(
            "%s: without Meta-Dataset's %s, tasks are drawn without WordNet", store.path, SPEC
        )
    readable = readable | (spec.readable if spec else {}) | read_class_names(store)
    group = functools.partial(groups_of, source, split, spec=spec)
    return dataset_of_rows(name, split, store, rows, readable, group)


def _no_split(store: Store, split: str, splits: list[str]) -> ValueError:
    return ValueError(
        f"load_dataset: {store.path} has no split {split!r}, it has {', '.join(splits)}"
    )


def _split_of(source: str, folders: list[str], spec: Spec | None, store: Store) -> dict[str, str]:
    """Class folder -> split, by the specification, else as published."""
    if spec is None:
        return class_splits(source, folders, store.path)

    def plain(name: str) -> str:  # a folder cannot be called F-16A/B
        return re.sub(r"[^0-9A-Za-z.]+", "_", name)

    of = {plain(name): split for name, split in zip(spec.names, spec.splits, strict=True)}
    unknown = [folder for folder in folders if plain(folder) not in of]
    if unknown:
        raise ValueError(
            f"load_dataset: {store.path}: its {SPEC} has no class {unknown[0]!r}; it belongs to "
            "another source"
        )
    return {folder: of[plain(folder)] for folder in folders}


def _folder_rows(
    source: str, store: Store, within: tuple[str, ...]
) -> tuple[list[Row], dict[str, str]]:
    """Rows, with splits only where folders or a table say them; readable names of folders."""
    rows: list[Row] | None = None
    readable: dict[str, str] = {}
    if not find_tables(store):
        if source == "vgg_flower" and (published := read_published(store)) is not None:
            return published  # the same split
        if source == "omniglot":
            rows = [row._replace(split=None) for row in read_characters(store) or []]
        elif within:
            rows = read_class_folders(store, within)
    rows = rows or read_rows(store)
    if SOURCES[source].order in ("from 0", "from 1"):  # 001.Black_footed_Albatross
        labels = {row.label for row in rows}
        readable = {label: re.sub(r"^\d+\.", "", label).replace("_", " ") for label in labels}
    return rows, readable


def _from_h5(
    name: str, source: str, store: Store, spec: Spec | None, found: list[str], split: str
) -> ImageDataset:
    """The PMF export: N.h5 for class N of the specification."""
    if not isinstance(store, Folder):
        raise ValueError(
            f"load_dataset: {store.path} holds HDF5 files, which are not read from archives; "
            "unpack it"
        )
    if spec is None:
        raise FileNotFoundError(
            f"load_dataset: {store.path} has HDF5 files but no {SPEC}, which names their classes; "
            "put Meta-Dataset's of this source beside them"
        )
    numbers = [number for number, of in enumerate(spec.splits) if of == split]
    if not numbers:
        raise _no_split(store, split, sorted(set(spec.splits)))
    numbers.sort(key=lambda number: spec.names[number])
    folder = store.path / Path(found[0]).parent
    pixels = H5Images(
        [folder / f"{number}.h5" for number in numbers], [spec.images[n] for n in numbers]
    )
    labels = [spec.names[number] for number in numbers]
    readable = spec.readable
    if SOURCES[source].order in ("from 0", "from 1"):
        readable = {label: re.sub(r"^\d+\.", "", label).replace("_", " ") for label in labels}
    sizes = np.diff(pixels.starts)
    return ImageDataset(
        name=name,
        split=split,
        class_names=readable_names(labels, readable),
        labels=np.repeat(np.arange(len(labels)), sizes),
        files=H5Names(pixels),
        pixels=pixels,
        groups=groups_of(source, split, labels, spec),
    )

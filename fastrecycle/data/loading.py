"""`load_dataset`: a registered name, a path or arrays -> ImageDataset."""

from __future__ import annotations

import difflib
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from fastrecycle.data import downloads
from fastrecycle.data.arrays import from_arrays
from fastrecycle.data.assemble import dataset_of_rows
from fastrecycle.data.class_splits import read_class_split, split_by_class
from fastrecycle.data.exports import read_source
from fastrecycle.data.groups import alphabet, alphabets
from fastrecycle.data.images import ImageDataset
from fastrecycle.data.layouts import (
    SPLITS,
    Row,
    find_tables,
    read_class_names,
    read_rows,
    split_name,
)
from fastrecycle.data.published import read_characters, read_class_folders, read_published
from fastrecycle.data.registry import DATASETS, DatasetInfo, absent, find_files, find_root
from fastrecycle.data.stores import Folder, Store, open_store

log = logging.getLogger(__name__)


def load_dataset(
    source: Any,
    split: str = "test",
    data_root: str | Path | None = None,
    *,
    download: bool = False,
) -> ImageDataset:
    """Open one split of a data set; images are decoded when asked for.

    Args:
        source: a name in DATASETS (write ./cub for a folder of such a name); a folder, .zip, .tar,
            .tar.gz or .csv; `(images, labels)` in memory (see `from_arrays`); or an ImageDataset,
            returned as it is.
        split: train, val (valid, validation) or test. A source without splits gives all its images
            for each of them, and says so once in the log.
        data_root: where registered sets lie; None: the folder that FASTRECYCLE_DATA names.
        download: fetch a registered set that is absent, where an official direct link exists.

    Raises:
        FileNotFoundError: absent; the text says what to put where.
        TypeError: a source of another kind.
        ValueError: an unknown split, or a broken, unsafe or ambiguous source.

    """
    if isinstance(source, ImageDataset):
        return source
    asked = split_name(split) if isinstance(split, str) else None
    if asked is None:
        raise ValueError(f"load_dataset: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if isinstance(source, str) and source in DATASETS:
        return _registered(source, asked, data_root, download)
    if download:
        names = [name for name, info in DATASETS.items() if info.download]
        raise ValueError(
            f"load_dataset: download=True takes one of {', '.join(names)}, got {source!r}"
        )
    if isinstance(source, (str, Path)):
        return _from_path(source, asked)
    if isinstance(source, (tuple, list)) and len(source) == 2:
        return from_arrays(source[0], source[1], asked)
    raise TypeError(
        "load_dataset: source must be a registered name, a path or (images, labels), got "
        f"{type(source).__name__}"
    )


def _registered(
    name: str, split: str, data_root: str | Path | None, download: bool
) -> ImageDataset:
    info = DATASETS[name]
    if info.packaged:
        return _digits(split)
    root = find_root(data_root)
    found = None if root is None else find_files(name, split, root)
    if found is not None:
        path, of_split = found
        store = open_store(path)
        if name.startswith("meta_dataset/"):
            dataset = read_source(name, store, split, info.within, of_split)
        else:
            dataset = _from_store(store, split, name=name, info=info, of_split=of_split)
    elif root is not None and info.download and (download or downloads.present(name, root)):
        dataset = downloads.load(name, root, split, fetch=download)
    elif download and info.download is None:
        raise ValueError(
            f"load_dataset: {name} has no official direct link to download; get it from {info.url}"
        )
    else:
        raise absent(name, split, root)
    expected = info.classes.get(split)
    if expected is not None and len(dataset.class_names) != expected:
        log.warning(
            "%s, split %s: %d classes, the published split has %d; accuracies do not compare",
            name,
            split,
            len(dataset.class_names),
            expected,
        )
    return dataset


def _from_path(source: str | Path, split: str) -> ImageDataset:
    path = Path(source).expanduser()
    if not path.exists():
        close = difflib.get_close_matches(str(source), DATASETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise FileNotFoundError(
            f"load_dataset: {source} is neither a file or folder nor one of "
            f"{', '.join(DATASETS)}{hint}"
        )
    if path.suffix.lower() == ".csv":
        return _from_store(Folder(path.parent), split, name=path.stem, table=path.name)
    return _from_store(open_store(path), split, name=path.name.split(".")[0] or str(path))


def _from_store(
    store: Store,
    split: str,
    *,
    name: str,
    table: str | None = None,
    info: DatasetInfo | None = None,
    of_split: bool = False,
) -> ImageDataset:
    """Rows of the split; `of_split`: the file's name says that it holds this split alone."""
    where = store.path if table is None else store.path / table
    rows: list[Row] | None = None
    readable: dict[str, str] = {}
    own_table = table is not None or bool(find_tables(store))
    if not own_table:  # the user's own table goes first
        published = read_published(store)
        if published is not None:
            rows, readable = published
        elif info is not None and info.characters:
            rows = read_characters(store)
        elif info is not None and info.within:
            rows = read_class_folders(store, info.within)
    if rows is None:
        rows = read_rows(store, table)
    if info is not None and info.class_split is not None and not own_table:
        key = alphabet if info.characters else str
        rows = split_by_class(rows, read_class_split(info.class_split), where, key)
    splits = sorted({row.split for row in rows if row.split is not None})
    if splits and split not in splits:
        raise ValueError(
            f"load_dataset: {where} has no split {split!r}, it has {', '.join(splits)}"
        )
    if splits:
        rows = [row for row in rows if row.split == split]
    elif not of_split:
        _say_once(f"{where} has no splits: train, val and test are all of it")
    if table is None:
        readable = readable | read_class_names(store)
    group = alphabets if info is not None and info.characters else None
    return dataset_of_rows(name, split, store, rows, readable, group)


def _digits(split: str) -> ImageDataset:
    """scikit-learn's digits: 1,797 images of 8x8, 0 to 16 gray levels; no splits."""
    from sklearn.datasets import load_digits  # a second to import

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return from_arrays(pixels, digits.target, split, name="digits")


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)

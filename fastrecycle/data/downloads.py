"""Sets that torchvision downloads from their official links, with progress and checksum.

torchvision is imported only here, when such a set is asked for. Its files are kept as it lays them
out, in the data root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastrecycle.data.assemble import dataset_of_rows
from fastrecycle.data.images import ArrayImages, ImageDataset
from fastrecycle.data.layouts import read_rows
from fastrecycle.data.published import read_published
from fastrecycle.data.stores import Folder

_FOLDERS = {
    "cifar_fs": "cifar-100-python",
    "vgg_flower": "flowers-102",
    "eurosat": "eurosat",
}

# Bertinetto et al., "Meta-learning with differentiable closed-form solvers", 2019; all other
# classes of CIFAR-100 are for training.
# fmt: off
_CIFAR_FS = {
    "val": [
        "beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish",
        "lamp", "maple_tree", "motorcycle", "otter", "sea", "shark", "television", "tractor",
    ],
    "test": [
        "baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck",
        "plain", "poppy", "rocket", "rose", "snail", "sweet_pepper", "table", "telephone",
        "wardrobe", "whale", "woman", "worm",
    ],
}
# fmt: on


def present(name: str, root: Path) -> bool:
    """Whether torchvision's files of a registered set lie under `root`."""
    return (root / _FOLDERS[name]).is_dir()


def load(name: str, root: Path, split: str, *, fetch: bool) -> ImageDataset:
    """One split of a set that torchvision knows; `fetch` downloads what is absent.

    Raises:
        RuntimeError: torchvision is missing.
        OSError: the download failed, or a file differs from its checksum.

    """
    loader = {"cifar_fs": _cifar_fs, "vgg_flower": _vgg_flower, "eurosat": _eurosat}[name]
    return loader(root, split, fetch)


def _torchvision(name: str, dataset: str, root: Path, **options: Any) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise RuntimeError(
            f"load_dataset: {name} needs torchvision here: pip install torchvision"
        ) from error
    try:
        return getattr(datasets, dataset)(root, **options)
    except (OSError, RuntimeError) as error:  # RuntimeError: a checksum does not match
        raise OSError(
            f"load_dataset: {name} could not be had from torchvision ({error}); "
            f"delete {root / _FOLDERS[name]} and call with download=True"
        ) from error


def _cifar_fs(root: Path, split: str, fetch: bool) -> ImageDataset:
    """CIFAR-100's training and test images together, 600 a class."""
    parts = [
        _torchvision("cifar_fs", "CIFAR100", root, train=train, download=fetch)
        for train in (True, False)
    ]
    all_names: list[str] = parts[0].classes
    split_of = {name: of for of, names in _CIFAR_FS.items() for name in names}
    names = sorted(name for name in all_names if split_of.get(name, "train") == split)
    code = np.full(len(all_names), -1)
    code[[all_names.index(name) for name in names]] = np.arange(len(names))
    pixels, labels, files = [], [], []
    for part, title in zip(parts, ("train", "test"), strict=True):
        codes = code[np.asarray(part.targets)]
        chosen = np.flatnonzero(codes >= 0)
        pixels.append(part.data[chosen])
        labels.append(codes[chosen])
        files += [f"cifar-100-python/{title} image {index}" for index in chosen]
    return ImageDataset(
        name="cifar_fs",
        split=split,
        class_names=tuple(names),
        labels=np.concatenate(labels).astype(np.int64),
        files=files,
        pixels=ArrayImages(np.concatenate(pixels)),
    )


def _vgg_flower(root: Path, split: str, fetch: bool) -> ImageDataset:
    """Flowers-102 as published, with imagelabels.mat beside jpg/."""
    if fetch:
        _torchvision("vgg_flower", "Flowers102", root, download=True)
    store = Folder(root / _FOLDERS["vgg_flower"])
    published = read_published(store)
    if published is None:
        raise FileNotFoundError(
            f"load_dataset: {store.path} has no imagelabels.mat; delete it and call with "
            "download=True"
        )
    rows, readable = published
    return dataset_of_rows(
        "vgg_flower", split, store, [r for r in rows if r.split == split], readable
    )


def _eurosat(root: Path, split: str, fetch: bool) -> ImageDataset:
    """EuroSAT has no splits: ten class folders, for testing."""
    if fetch:
        _torchvision("eurosat", "EuroSAT", root, download=True)
    store = Folder(root / _FOLDERS["eurosat"])
    return dataset_of_rows("eurosat", split, store, read_rows(store), {})

"""The registered data sets, and where their files are looked for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from fastrecycle.data.layouts import SPLITS, split_spellings
from fastrecycle.data.meta_dataset import SOURCES
from fastrecycle.data.stores import ARCHIVE_SUFFIXES

ROOT_VARIABLE = "FASTRECYCLE_DATA"


@dataclass(frozen=True)
class DatasetInfo:
    """A published data set.

    Attributes:
        title: its full name.
        url: where to get it.
        classes: number of classes in each published split; another number is warned about.
        download: torchvision's name of it, where an official direct link exists.
        folders: its folders or archives as published, found under these names too.
        within: where it has one of these folders, only the class folders in it are read.
        packaged: a dependency ships it, so no file is looked for.
        class_split: the recorded split of its classes (`splits/NAME.txt`), whatever its folders.
        characters: its classes are Omniglot's characters, which belong to alphabets.

    """

    title: str
    url: str
    classes: dict[str, int] = field(default_factory=dict)
    download: str | None = None
    folders: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    packaged: bool = False
    class_split: str | None = None
    characters: bool = False


_OMNIGLOT_URL = "https://github.com/brendenlake/omniglot"

DATASETS: dict[str, DatasetInfo] = {
    "cifar_fs": DatasetInfo(
        title="CIFAR-FS: CIFAR-100 in Bertinetto's class split",
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
        classes={"train": 64, "val": 16, "test": 20},
        download="CIFAR100",
        folders=("cifar100",),
    ),
    "mini_imagenet": DatasetInfo(
        title="mini-ImageNet in Ravi and Larochelle's class split",
        url="https://github.com/twitter-research/meta-learning-lstm",
        classes={"train": 64, "val": 16, "test": 20},
        folders=("mini-imagenet", "miniImagenet", "miniImageNet"),
    ),
    "vgg_flower": DatasetInfo(
        title="VGG-Flower: Oxford Flowers-102",
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        classes={"train": 71, "val": 15, "test": 16},
        download="Flowers102",
    ),
    "cub": DatasetInfo(
        title="CUB-200-2011",
        url="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        classes={"train": 100, "val": 50, "test": 50},
        folders=("CUB_200_2011",),
    ),
    "chestx": DatasetInfo(
        title="ChestX-ray14, the seven classes of the cross-domain benchmark",
        url="https://nihcc.app.box.com/v/ChestXray-NIHCC",
        classes={"test": 7},
    ),
    "isic": DatasetInfo(
        title="ISIC 2018, task 3",
        url="https://challenge.isic-archive.com/data/#2018",
        classes={"test": 7},
    ),
    "eurosat": DatasetInfo(
        title="EuroSAT, RGB",
        url="https://github.com/phelber/EuroSAT",
        classes={"test": 10},
        download="EuroSAT",
        folders=("EuroSAT", "EuroSAT_RGB", "2750"),
        within=("2750", "EuroSAT_RGB"),  # EuroSAT_MS has all bands of the same images
    ),
    "crop_diseases": DatasetInfo(
        title="CropDiseases: PlantVillage",
        url="https://github.com/spMohanty/PlantVillage-Dataset",
        classes={"test": 38},
        folders=("CropDiseases", "PlantVillage-Dataset", "PlantVillage-Dataset-master"),
        # The cross-domain benchmark (Guo et al., 2020) reads dataset/train; raw/ has all images as
        # color, grayscale and segmented.
        within=("dataset/train", "raw/color"),
    ),
    "omniglot": DatasetInfo(
        title="Omniglot: background characters for training, evaluation characters for testing",
        url=_OMNIGLOT_URL,
        characters=True,
    ),
    "omniglot_alphabets": DatasetInfo(
        title="Omniglot's evaluation characters, split by alphabets",
        url=_OMNIGLOT_URL,
        folders=("omniglot", "omniglot_test"),
        class_split="omniglot_alphabets",
        characters=True,
    ),
    "tiny_imagenet": DatasetInfo(
        title="Tiny ImageNet, 178 of its classes, split by class",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        classes={"train": 114, "val": 32, "test": 32},
        folders=("tiny-imagenet-200",),
        class_split="tiny_imagenet",
    ),
    "digits": DatasetInfo(
        title="Optical recognition of handwritten digits, 8x8 gray",
        url="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
        classes={"test": 10},
        packaged=True,
    ),
}


def _source(
    name: str, title: str, url: str, folders: tuple[str, ...] = (), within: tuple[str, ...] = ()
) -> tuple[str, DatasetInfo]:
    """A source of Meta-Dataset: class folders, or the HDF5 files of Hu et al., 2022 (P>M>F)."""
    sizes = zip(SPLITS, SOURCES[name].classes, strict=True)
    return f"meta_dataset/{name}", DatasetInfo(
        title=f"Meta-Dataset's {title}",
        url=url,
        classes={split: size for split, size in sizes if size},
        folders=(f"meta_dataset_h5/{name}", *folders),
        within=within,
    )


# fmt: off
DATASETS.update([
    _source("ilsvrc_2012", "ImageNet ILSVRC-2012", "https://image-net.org/challenges/LSVRC/2012/",
            ("ILSVRC2012_img_train",), ("ILSVRC2012_img_train",)),
    _source("omniglot", "Omniglot", _OMNIGLOT_URL),
    _source("aircraft", "FGVC-Aircraft, cropped to its boxes",
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"),
    _source("cu_birds", "CUB-200-2011", "https://www.vision.caltech.edu/datasets/cub_200_2011/",
            ("CUB_200_2011",), ("images",)),
    _source("dtd", "Describable Textures", "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
            ("dtd",), ("images",)),
    _source("quickdraw", "Quick, Draw!", "https://quickdraw.withgoogle.com/data"),
    _source("fungi", "FGVCx Fungi 2018", "https://github.com/visipedia/fgvcx_fungi_comp"),
    _source("vgg_flower", "Oxford Flowers-102",
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", ("vgg_flower",)),
    _source("traffic_sign", "GTSRB, training images", "https://benchmark.ini.rub.de/",
            ("GTSRB",), ("Final_Training/Images",)),
    _source("mscoco", "COCO 2017, cropped to its boxes", "https://cocodataset.org/"),
])
# fmt: on


def find_root(data_root: str | Path | None) -> Path | None:
    """`data_root`, else the folder that FASTRECYCLE_DATA names, else None.

    Raises:
        FileNotFoundError: it is not a folder.

    """
    value = data_root if data_root is not None else os.environ.get(ROOT_VARIABLE) or None
    if value is None:
        return None
    root = Path(value).expanduser()
    if not root.is_dir():
        origin = "data_root" if data_root is not None else ROOT_VARIABLE
        raise FileNotFoundError(f"load_dataset: {origin} must be a folder, got {root}")
    return root


def find_files(name: str, split: str, root: Path) -> tuple[Path, bool] | None:
    """Path of a registered set under `root`, and whether it is of this split alone.

    A file of one split (cifar_fs_test.zip) goes before one of all (cifar_fs/, cifar_fs.zip), and
    that before one under its published name (CUB_200_2011.tgz).
    """
    for spelling in split_spellings(split):
        for suffix in ("", *ARCHIVE_SUFFIXES):
            path = root / f"{name}_{spelling}{suffix}"
            if path.is_file() if suffix else path.is_dir():
                return path, True
    for word in (name, *DATASETS[name].folders):
        for suffix in ("", *ARCHIVE_SUFFIXES):
            path = root / f"{word}{suffix}"
            if path.is_file() if suffix else path.is_dir():
                return path, False
    return None


def absent(name: str, split: str, root: Path | None) -> FileNotFoundError:
    """The error that says what to put where."""
    info = DATASETS[name]
    if root is None:
        searched = f"no folder to look in: give data_root or set {ROOT_VARIABLE}"
    else:
        others = sorted(path.name for path in root.glob(f"{name}*"))
        searched = f"looked in {root}" + (f", which has only {', '.join(others)}" if others else "")
    suffixes = ", ".join(ARCHIVE_SUFFIXES)
    remedy = (
        f"put {name}/, {name}{ARCHIVE_SUFFIXES[0]} or {name}_{split}{ARCHIVE_SUFFIXES[0]} there "
        f"(or {suffixes}), holding SPLIT/CLASS/FILE or CLASS/FILE, or a filename,label,split CSV "
        f"beside the images; get it from {info.url}"
    )
    if info.folders:
        remedy += f", where {' or '.join(info.folders)} is read as it lies"
    if info.download is not None:
        remedy += f", or call load_dataset({name!r}, download=True)"
    return FileNotFoundError(
        f"load_dataset: {name} ({info.title}), split {split}, is absent: {searched}; {remedy}"
    )

"""Layouts of registered sets as their authors publish them, told by the tables they hold."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fastrecycle.data.layouts import IMAGE_SUFFIXES, SPLITS, Row, read_table
from fastrecycle.data.matlab import read_matrix
from fastrecycle.data.stores import Store, safe_name

# Class numbers of Flowers-102; all others are for training. Triantafillou et al., "Meta-Dataset",
# 2020: 71 / 15 / 16 classes, which LoRA Recycle's authors and learn2learn take over. Works that
# count 71 / 16 / 15 exchange the last two: no list of that split is known.
_FLOWERS = {
    "val": {10, 16, 17, 23, 26, 47, 53, 56, 57, 62, 82, 83, 86, 97, 102},
    "test": {5, 9, 15, 19, 35, 40, 41, 42, 45, 46, 65, 85, 89, 94, 96, 98},
}
# Their names as torchvision lists them, from class 1 on.
_FLOWER_NAMES = """
    pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold,
    tiger lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot,
    king protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian lily,
    balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger,
    grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke,
    sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly,
    ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy,
    daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup,
    oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium,
    bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata,
    japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum,
    spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose,
    thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis,
    hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily,
    hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow, mexican petunia,
    bromelia, blanket flower, trumpet creeper, blackberry lily
"""
_ISIC = {
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "BCC": "basal cell carcinoma",
    "AKIEC": "actinic keratosis",
    "BKL": "benign keratosis",
    "DF": "dermatofibroma",
    "VASC": "vascular lesion",
}
# Guo et al., "A Broader Study of Cross-Domain Few-Shot Learning", 2020: seven of fourteen findings,
# without Pneumonia.
_CHESTX = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumothorax",
)  # fmt: skip
_CIFAR_FS_TABLES = tuple(f"splits/bertinetto/{split}.txt" for split in SPLITS)
_ISIC_IMAGES = r"(^|/)ISIC2018_Task3_Training_Input/ISIC_\d{7}\.jpg$"
_ISIC_TABLE = "ISIC2018_Task3_Training_GroundTruth.csv"

_CHESTX_IMAGES = r"(^|/)(images|images_\d{3}/images)/\d{8}_\d{3}\.png$"


class Layout(NamedTuple):
    """How a published set is recognised and read.

    Attributes:
        tables: base names of the files that must lie side by side.
        rows: (store, their folder with a final slash, or "") -> rows and label -> readable name.
        images: pattern of its images, whose folders are no classes; None: they are.

    """

    tables: tuple[str, ...]
    rows: Callable[[Store, str], tuple[list[Row], dict[str, str]]]
    images: str | None = None


def read_published(store: Store) -> tuple[list[Row], dict[str, str]] | None:
    """Rows, sorted by file, and readable class names; None for a store in no published layout.

    Raises:
        FileNotFoundError: the table is absent, or an image that it lists.
        ValueError: a table that cannot be read.

    """
    for layout in LAYOUTS:
        folder = _folder_of(store, layout.tables)
        if folder is not None:
            store.hold([folder + table for table in layout.tables])
            rows, names = layout.rows(store, folder)
            if not rows:
                raise ValueError(
                    f"load_dataset: {store.path}: {folder}{layout.tables[0]} lists no image of "
                    "the set; copy or download it again"
                )
            return sorted(rows, key=lambda row: row.file), names
    for layout in LAYOUTS:
        _reject_images_alone(store, layout)
    return None


def _reject_images_alone(store: Store, layout: Layout) -> None:
    """Images of a set without its table would be read as the classes that their folders are not."""
    if layout.images is None:
        return
    pattern = re.compile(layout.images)
    found = next((name for name in store.names if pattern.search(name)), None)
    if found is not None:
        raise FileNotFoundError(
            f"load_dataset: {store.path} has images ({found}) but no {layout.tables[0]}, which "
            "holds their classes; put it beside the folder of images"
        )


def read_class_folders(store: Store, within: tuple[str, ...]) -> list[Row] | None:
    """Rows of WITHIN/CLASS/FILE, sorted by file; None where none of these folders has classes.

    Other folders beside them hold the same images again, as other files or for other uses.
    """
    words = "|".join(re.escape(folder) for folder in within)
    match = re.compile(f"(?:.*/)?(?:{words})/([^/]+)/[^/]+").fullmatch
    rows = [
        Row(None, found[1], name)
        for name in store.names
        if name.lower().endswith(IMAGE_SUFFIXES) and (found := match(name))
    ]
    return sorted(rows, key=lambda row: row.file) or None


def read_characters(store: Store) -> list[Row] | None:
    """Omniglot as published, sorted by file; None where it lies otherwise.

    images_background/ALPHABET/characterNN/FILE is for training, images_evaluation/ for testing; a
    character's class is ALPHABET_characterNN.
    """
    match = re.compile(
        r"(?:.*/)?images_(background|evaluation)/([^/]+)/(character\d+)/[^/]+\.png", re.IGNORECASE
    ).fullmatch
    split_of = {"background": "train", "evaluation": "test"}
    rows = [
        Row(split_of[found[1]], f"{found[2]}_{found[3]}", name)
        for name in store.names
        if (found := match(name))
    ]
    return sorted(rows, key=lambda row: row.file) or None


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
    rows: list[Row] = []
    seen: set[str] = set()
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
        if file in seen:  # twice, it could be support and query of one task
            raise ValueError(
                f"load_dataset: {where}: {file} is listed before; copy or download the table again"
            )
        seen.add(file)
        rows.append(Row(split_of[label], label, file))
    # 001.Black_footed_Albatross
    return rows, {name: name.split(".", 1)[-1].replace("_", " ") for name in split_of}


def _cifar_fs(store: Store, folder: str) -> tuple[list[Row], dict[str, str]]:
    """CIFAR-FS: data/CLASS/FILE, and the classes of each split in splits/bertinetto/SPLIT.txt."""
    split_of: dict[str, str] = {}
    for table, split in zip(_CIFAR_FS_TABLES, SPLITS, strict=True):
        text = store.read(folder + table).decode("utf-8", errors="replace")
        for label in filter(None, map(str.strip, text.splitlines())):
            if label in split_of:
                raise ValueError(
                    f"load_dataset: {store.path}: {folder}{table} has the class {label}, which "
                    f"{split_of[label]}.txt has too; copy or download them again"
                )
            split_of[label] = split
    rows = []
    start = f"{folder}data/"
    for name in store.names:
        if name.startswith(start) and name.lower().endswith(IMAGE_SUFFIXES):
            label = name[len(start) :].split("/", 1)[0]
            if label in split_of:
                rows.append(Row(split_of[label], label, name))
    absent = sorted(split_of.keys() - {row.label for row in rows})
    if absent:
        raise FileNotFoundError(
            f"load_dataset: {store.path} has no image of the listed class {absent[0]} in "
            f"{start}{absent[0]}/; unpack the archive again"
        )
    return rows, {}


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


def _flowers(store: Store, folder: str) -> tuple[list[Row], dict[str, str]]:
    """Flowers-102: jpg/image_00001.jpg, ... and their class numbers in imagelabels.mat."""
    table = f"{folder}imagelabels.mat"
    try:
        numbers = read_matrix(store.read(table), "labels")
        if not np.isin(numbers, np.arange(1, 103)).all():
            raise ValueError("its labels must be in [1, 102]")
    except ValueError as error:
        raise ValueError(
            f"load_dataset: {store.path}: {table} is not Flowers-102's table of labels ({error}); "
            "download it again"
        ) from error
    split_of = {number: split for split, held_out in _FLOWERS.items() for number in held_out}
    rows = []
    for index, number in enumerate(numbers.astype(np.int64).tolist(), 1):
        file = f"{folder}jpg/image_{index:05d}.jpg"
        if not store.has(file):
            raise FileNotFoundError(
                f"load_dataset: {store.path}: {table} lists {len(numbers)} images, but there is "
                f"no file {file}; unpack 102flowers.tgz beside it"
            )
        rows.append(Row(split_of.get(number, "train"), f"flower_{number:03d}", file))
    names = [name.strip() for name in _FLOWER_NAMES.split(",")]
    return rows, {f"flower_{number:03d}": name for number, name in enumerate(names, 1)}


def _isic(store: Store, folder: str) -> tuple[list[Row], dict[str, str]]:
    """ISIC 2018 task 3: one column a class, one of them 1, for the images of the training input."""
    table = f"{folder}{_ISIC_TABLE}"
    files = _images_by_name(store, _ISIC_IMAGES)
    rows = []
    for where, (image, *marks) in _columns(store, table, ["image", *_ISIC]):
        labels = [label for label, mark in zip(_ISIC, marks, strict=True) if mark in ("1", "1.0")]
        if len(labels) != 1 or any(mark not in ("0", "0.0", "1", "1.0") for mark in marks):
            raise ValueError(
                f"load_dataset: {where} must have 1 in one of {', '.join(_ISIC)} and 0 in the "
                f"others, got {', '.join(marks)}; copy or download it again"
            )
        file = files.pop(f"{image}.jpg", None)
        if file is None:
            raise FileNotFoundError(
                f"load_dataset: {where}: no image ISIC2018_Task3_Training_Input/{image}.jpg, or it "
                "is listed before; unpack ISIC2018_Task3_Training_Input.zip beside the table"
            )
        rows.append(Row(None, labels[0], file))
    return rows, _ISIC


def _chestx(store: Store, folder: str, table: str) -> tuple[list[Row], dict[str, str]]:
    """ChestX-ray14: the images whose only finding is one of the benchmark's seven."""
    files = _images_by_name(store, _CHESTX_IMAGES)
    rows = []
    for where, (image, finding) in _columns(
        store, f"{folder}{table}", ["Image Index", "Finding Labels"]
    ):
        if finding not in _CHESTX:  # several are joined by |
            continue
        file = files.pop(image, None)
        if file is None:
            raise FileNotFoundError(
                f"load_dataset: {where}: no image images/{image} or images_*/images/{image}, or it "
                "is listed before; unpack all of images_001.tar.gz to images_012.tar.gz"
            )
        rows.append(Row(None, finding, file))
    return rows, {}


def _columns(store: Store, table: str, wanted: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(where, values of the wanted columns) of each line of a CSV."""
    columns, lines = read_table(store, table)
    absent = [column for column in wanted if column.lower() not in columns]
    if absent:
        raise ValueError(
            f"load_dataset: {store.path}: {table} must have the columns {', '.join(wanted)}, got "
            f"{', '.join(columns) or 'none'}; copy or download it again"
        )
    places = [columns.index(column.lower()) for column in wanted]
    for number, line in lines:
        where = f"{store.path}: {table} line {number}"
        if len(line) <= max(places):
            raise ValueError(
                f"load_dataset: {where} must have {max(places) + 1} values or more, got {len(line)}"
            )
        yield where, [line[place].strip() for place in places]


def _images_by_name(store: Store, pattern: str) -> dict[str, str]:
    """Base name -> file of the images whose files match the pattern.

    Raises:
        ValueError: two of one name.

    """
    files: dict[str, str] = {}
    matches = re.compile(pattern).search
    for file in filter(matches, store.names):
        name = file.rsplit("/", 1)[-1]
        if name in files:
            raise ValueError(
                f"load_dataset: {store.path} has {name} twice, as {files[name]} and {file}; keep "
                "one of them"
            )
        files[name] = file
    return files


LAYOUTS = (
    Layout(("images.txt", "image_class_labels.txt", "classes.txt"), _cub),
    Layout(_CIFAR_FS_TABLES, _cifar_fs),
    Layout(("imagelabels.mat",), _flowers, r"(^|/)jpg/image_\d{5}\.jpg$"),
    Layout((_ISIC_TABLE,), _isic, _ISIC_IMAGES),
    *(
        Layout((table,), functools.partial(_chestx, table=table), _CHESTX_IMAGES)
        for table in ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
    ),
)

"""Meta-Dataset's ten sources: their class splits, and the dataset_spec.json of an export.

Triantafillou et al., "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples",
2020. Its splits were drawn once, with NumPy's legacy generator seeded with 22, over each source's
classes in a fixed order; so they are drawn here again instead of being listed. ImageNet's follows
WordNet and Omniglot's the alphabets.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastrecycle.data.groups import Groups, alphabet, alphabets
from fastrecycle.data.stores import Store

SPEC = "dataset_spec.json"
_SEED = 22
_SPLITS = {"TRAIN": "train", "VALID": "val", "TEST": "test"}
# An inner node of WordNet makes tasks only if it spans no more leaves than this: the least number
# that leaves no class out.
_MAX_LEAVES, _MIN_LEAVES = 392, 5

# 20 of Omniglot's alphabets are its evaluation set, and five of the others for validation.
_OMNIGLOT = {
    "val": (
        "Blackfoot_(Canadian_Aboriginal_Syllabics)", "Ojibwe_(Canadian_Aboriginal_Syllabics)",
        "Inuktitut_(Canadian_Aboriginal_Syllabics)", "Tagalog", "Alphabet_of_the_Magi",
    ),
    "test": (
        "Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta", "Ge_ez",
        "Glagolitic", "Gurmukhi", "Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian",
        "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti", "Syriac_(Serto)", "Tengwar",
        "Tibetan", "ULOG",
    ),
}  # fmt: skip
# In the order of COCO's own numbers.
_COCO = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush
"""


@dataclass(frozen=True)
class Source:
    """One of the ten.

    Attributes:
        classes: in train, val and test.
        order: how a class folder's name gives its place in the published order: "sorted" among
            all names, "from 1" (or 0) by the number at its head (001.Black_footed_Albatross), or
            a rule of the source's own.

    """

    classes: tuple[int, int, int]
    order: Literal["sorted", "from 0", "from 1", "coco", "alphabet", "test", "wordnet"]


SOURCES: dict[str, Source] = {
    "ilsvrc_2012": Source((712, 158, 130), "wordnet"),
    "omniglot": Source((883, 81, 659), "alphabet"),
    "aircraft": Source((70, 15, 15), "sorted"),
    "cu_birds": Source((140, 30, 30), "from 1"),
    "dtd": Source((33, 7, 7), "sorted"),
    "quickdraw": Source((241, 52, 52), "sorted"),
    "fungi": Source((994, 200, 200), "from 0"),
    "vgg_flower": Source((71, 15, 16), "from 1"),
    "traffic_sign": Source((0, 0, 43), "test"),
    "mscoco": Source((0, 40, 40), "coco"),
}


def drawn_split(train: int, val: int, test: int) -> list[str]:
    """The split of each class by its place in the published order.

    Two draws without replacement: training and validation classes of all, then training of these.
    NumPy keeps the stream of RandomState as it is.
    """
    rng = np.random.RandomState(_SEED)
    held = rng.choice(train + val + test, train + val, replace=False)
    trained = set(rng.choice(held, train, replace=False).tolist())
    validated = set(held.tolist()) - trained
    return [
        "train" if i in trained else "val" if i in validated else "test"
        for i in range(train + val + test)
    ]


def class_splits(name: str, folders: list[str], where: object) -> dict[str, str]:
    """Class folder -> split, for class folders without split folders.

    Args:
        name: a source.
        folders: its class folders, sorted.
        where: the file or folder that has them, for the error.

    Raises:
        ValueError: names that are not the source's, or a split that needs a table.

    """
    source = SOURCES[name]
    total = sum(source.classes)
    if source.order == "test":
        return dict.fromkeys(folders, "test")
    if source.order == "wordnet":
        raise ValueError(
            f"load_dataset: {where}: {name}'s class split follows WordNet; put Meta-Dataset's "
            f"{SPEC} of it beside the class folders, or sort them into train/, val/ and test/"
        )
    if source.order == "alphabet":
        split_of = {of: split for split, names in _OMNIGLOT.items() for of in names}
        return {folder: split_of.get(_alphabet(folder, where), "train") for folder in folders}
    if source.order == "sorted":
        if len(folders) != total:
            raise ValueError(
                f"load_dataset: {where}: {name}'s class split is drawn over all {total} classes, "
                f"got {len(folders)} class folders; complete them, put Meta-Dataset's {SPEC} of "
                "it beside them, or sort them into train/, val/ and test/"
            )
        return dict(zip(folders, drawn_split(*source.classes), strict=True))
    drawn = drawn_split(*source.classes)
    places = {folder: _place(folder, source.order, total, where) for folder in folders}
    return {folder: drawn[place] for folder, place in places.items()}


def _alphabet(folder: str, where: object) -> str:
    found = alphabet(folder)
    if found is None:
        raise ValueError(
            f"load_dataset: {where}: class folders must be ALPHABET_characterNN, got {folder!r}"
        )
    return found


def _place(folder: str, order: str, total: int, where: object) -> int:
    """Place of a class in the published order, by its name alone."""
    if order == "coco":
        names = [name.strip() for name in _COCO.split(",")]
        word = folder.replace("_", " ")
        if word in names:
            return names.index(word)
        raise ValueError(f"load_dataset: {where}: {folder!r} is none of COCO's 80 classes")
    found = re.match(r"\d+", folder)
    place = int(found[0]) - int(order[-1]) if found else -1
    if not 0 <= place < total:
        raise ValueError(
            f"load_dataset: {where}: class folders must begin with their number, {order[-1]} to "
            f"{total - 1 + int(order[-1])}, as in 001.Black_footed_Albatross; got {folder!r}"
        )
    return place


@dataclass(frozen=True)
class Spec:
    """What an export's dataset_spec.json says.

    Attributes:
        names: the classes in the order of their numbers, which name the export's files.
        splits: of each class.
        images: of each class, where the file says.
        readable: class -> readable name, where there is one.
        leaves: the classes under each inner node of WordNet, by split; none for other sources.

    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    images: tuple[int | None, ...]
    readable: dict[str, str]
    leaves: dict[str, tuple[frozenset[str], ...]]


def read_spec(store: Store, name: str) -> Spec:
    """Read a dataset_spec.json: flat, by alphabets, or by WordNet.

    Raises:
        ValueError: damaged, or its numbers of classes do not agree.

    """
    where = f"{store.path}: {name}"
    try:
        content = json.loads(store.read(name))
        names_of = {int(number): str(text) for number, text in content["class_names"].items()}
        if sorted(names_of) != list(range(len(names_of))):
            raise ValueError("class numbers must be 0, 1, ...")
        names = tuple(names_of[number] for number in range(len(names_of)))
        sizes = _split_sizes(content)
        total = sum(sizes.values())
        if min(sizes.values()) < 0 or total != len(names) or len(set(names)) != len(names):
            raise ValueError(f"{len(names)} class names, {total} classes in its splits")
        splits = tuple(_SPLITS[split] for split in _SPLITS for _ in range(sizes[split]))
        counts = content["images_per_class"]
        if "split_subgraphs" in content:
            counts = {leaf: n for of in counts.values() for leaf, n in of.items()}
            images = tuple(int(counts[leaf]) for leaf in names)
        else:
            images = tuple(int(counts[str(number)]) for number in range(len(names)))
        readable, leaves = _wordnet(content.get("split_subgraphs", {}))
        return Spec(names, splits, images, readable, leaves)
    except (
        ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"load_dataset: {where} is not Meta-Dataset's specification of a source "
            f"({type(error).__name__}: {error}); copy it again"
        ) from error


def _split_sizes(content: dict[str, Any]) -> dict[str, int]:
    """Number of classes in TRAIN, VALID and TEST, whose numbers follow one another."""
    if "classes_per_split" in content:
        return {split: int(content["classes_per_split"][split]) for split in _SPLITS}
    if "split_subgraphs" in content:
        graphs = content["split_subgraphs"]
        return {s: sum(not node["children_ids"] for node in graphs[s]) for s in _SPLITS}
    sizes, start = {}, 0
    for split in _SPLITS:
        stop = start + int(content["superclasses_per_split"][split])
        of = content["classes_per_superclass"]
        sizes[split] = sum(int(of[str(number)]) for number in range(start, stop))
        start = stop
    return sizes


def _wordnet(
    graphs: dict[str, list[dict[str, Any]]],
) -> tuple[dict[str, str], dict[str, tuple[frozenset[str], ...]]]:
    """Readable names of the leaves, and the leaves under each inner node, nodes sorted."""
    readable: dict[str, str] = {}
    spans: dict[str, tuple[frozenset[str], ...]] = {}
    for split, nodes in graphs.items():
        children = {node["wn_id"]: node["children_ids"] for node in nodes}
        under: dict[str, frozenset[str]] = {}

        def leaves(
            node: str, above: tuple[str, ...] = (), children: Any = children, under: Any = under
        ) -> frozenset[str]:
            if node in above:
                raise ValueError(f"{node} is below itself")
            if node not in under:
                below = [leaves(child, (*above, node)) for child in children[node]]
                under[node] = frozenset().union(*below) if below else frozenset([node])
            return under[node]

        inner = [node for node in sorted(children) if children[node]]
        spans[_SPLITS[split]] = tuple(leaves(node) for node in inner)
        readable |= {
            node["wn_id"]: str(node["words"]).split(",")[0].strip()
            for node in nodes
            if not node["children_ids"]
        }
    return readable, spans


def groups_of(name: str, split: str, labels: list[str], spec: Spec | None) -> Groups | None:
    """From which classes a task of Meta-Dataset's own protocol is drawn; None: from all.

    Args:
        name: a source.
        split: train, val or test.
        labels: class folders or names as in the specification, in the order of the labels.
        spec: the export's, where it has one.

    """
    if name == "omniglot":
        return alphabets(labels)
    if spec is None or split not in spec.leaves:
        return None
    place = {label: i for i, label in enumerate(labels)}
    members = (
        tuple(sorted(place[leaf] for leaf in leaves if leaf in place))
        for leaves in spec.leaves[split]
    )
    eligible = tuple(m for m in members if _MIN_LEAVES <= len(m) <= _MAX_LEAVES)
    return Groups(eligible, "all") if eligible else None

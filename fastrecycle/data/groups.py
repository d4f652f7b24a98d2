"""Classes that belong together (an alphabet, a branch of WordNet), from which a task is drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Angelic_character01, Angelic-character01, Angelic/character01
_CHARACTER = re.compile(r"(.+)[-_/]character\d+")


@dataclass(frozen=True)
class Groups:
    """Groups of labels; Meta-Dataset draws all classes of a task from one group.

    Attributes:
        members: the labels of each group, rising; groups may overlap.
        ways: "uniform" draws the number of classes as elsewhere, up to the group's size (Omniglot);
            "all" takes the whole group, cut to the largest number of ways (ImageNet).

    """

    members: tuple[tuple[int, ...], ...]
    ways: Literal["uniform", "all"]


def alphabet(class_name: str) -> str | None:
    """The alphabet of one of Omniglot's characters, None for another name."""
    found = _CHARACTER.fullmatch(class_name)
    return None if found is None else found[1]


def alphabets(class_names: Sequence[str]) -> Groups | None:
    """Omniglot's characters by their alphabets; None where a name is of another form."""
    members: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        of = alphabet(name)
        if of is None:
            return None
        members.setdefault(of, []).append(label)
    return Groups(tuple(tuple(labels) for _, labels in sorted(members.items())), "uniform")

"""Class splits that this package makes, recorded as text files: `SPLIT CLASS` a line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import resources

from fastrecycle.data.layouts import SPLITS, Row

log = logging.getLogger(__name__)


def read_class_split(name: str) -> dict[str, str]:
    """Class (or alphabet) -> train, val or test, of `splits/NAME.txt`."""
    text = resources.files("fastrecycle.data").joinpath("splits", f"{name}.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [line.split(" ", 1) for line in lines]
    split_of = {label: split for split, label in pairs}
    assert len(split_of) == len(lines)
    assert set(split_of.values()) <= set(SPLITS)
    return split_of


def split_by_class(
    rows: Sequence[Row],
    split_of: dict[str, str],
    where: object,
    key: Callable[[str], str | None] = lambda label: label,
) -> list[Row]:
    """The rows of listed classes, each in its class's split, wherever its folder was.

    Args:
        rows: of all splits.
        split_of: see `read_class_split`.
        where: the file or folder, for messages.
        key: from a class to what the list names.

    Raises:
        ValueError: none of the classes is listed.

    """
    kept = []
    others: set[str] = set()
    for row in rows:
        split = split_of.get(key(row.label) or "")
        if split is None:
            others.add(row.label)
        else:
            kept.append(row._replace(split=split))
    if not kept:
        raise ValueError(
            f"load_dataset: {where} has none of the classes of the recorded split "
            f"({', '.join(sorted(split_of)[:3])}, ...), got {', '.join(sorted(others)[:3])}; "
            "give its path to read it as it lies"
        )
    if others:
        log.info("%s: %d folders are in no split: left out", where, len(others))
    return kept

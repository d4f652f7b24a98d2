"""What a section of the page is made of: plain data for the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Picture:
    """An <img>: its data, what it shows, and a word below it."""

    source: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """An inline <svg>, its description, and the names of its colours (series, name, count)."""

    svg: str
    alt: str
    legend: tuple[tuple[int, str, int], ...] = ()
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, what it says, and what it shows."""

    id: str
    title: str
    text: Sequence[str]
    strips: Sequence[tuple[str, Sequence[Picture]]] = ()  # pictures side by side, with a caption
    plots: Sequence[Plot] = ()
    tiles: Sequence[Picture] = ()  # small pictures in a grid
    tables: Sequence[Table] = ()
    commands: Sequence[str] = field(default=())

"""The parts of a table's description: domains, rows, claims, and how a row becomes a recipe."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from fastrecycle.baselines import BASELINES
from fastrecycle.tables.recipes import RECYCLE, Bank, Caml, Meta, Method, Pool
from fastrecycle.tables.scales import Scale
from fastrecycle.vit_config import ViTConfig

BEST = "best"  # kind of a row that is one of several others, chosen on validation tasks
MEAN = "mean"  # data set of a column that averages the others, task by task
MAIN = "main"  # label of the backbone that --backbone names

# What takes the place of a set of the paper that is absent, as a source of LoRAs.
STAND_INS = {"mini_imagenet": "tiny_imagenet"}


@dataclass(frozen=True)
class Domain:
    """A data set whose tasks are scored, and where the bank's LoRAs come from."""

    dataset: str
    sources: tuple[str, ...]
    whichever: bool = False  # the bank is drawn from those of the sources that are there

    @property
    def within(self) -> bool:
        """In-domain: the bank's tasks are of the same data set (of other classes)."""
        return self.sources == (self.dataset,)


@dataclass(frozen=True)
class Row:
    """A method with what it changes in the scale's settings."""

    label: str  # also the paper's row, where the paper has it
    kind: str = RECYCLE  # a key of BASELINES, RECYCLE or BEST
    pretune: Mapping[str, Any] = field(default_factory=dict)
    inversion: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)  # of a baseline: given, not chosen
    of: tuple[str, ...] = ()  # BEST: labels of the rows to choose from
    backbone: str = MAIN


@dataclass(frozen=True)
class Claim:
    """A sentence about a table that its figures make true or false.

    Differences are left minus right, paired on the same tasks, with 95 % intervals. "ahead": of
    every one of `right`, all intervals above 0. "ahead of the best": of that of `right` with the
    highest accuracy. "not behind": the interval does not lie below 0. "within": the difference is
    at least -margin points. "cheaper": right minus left costs less, by its whole interval, than in
    the paper.
    """

    text: str
    left: str
    right: tuple[str, ...]
    test: Literal["ahead", "ahead of the best", "not behind", "within", "cheaper"]
    shots: tuple[int, ...] = (1, 5)
    margin: float = 0.0


@dataclass(frozen=True)
class Context:
    """What rows may depend on."""

    scale: Scale
    vit: ViTConfig
    backbones: tuple[str, ...] = ()  # labels of further ones

    @property
    def last(self) -> int:
        """The last block."""
        return self.vit.depth - 1

    def block(self, of_twelve: int) -> int:
        """The block at the same share of the depth as one of the paper's twelve."""
        return of_twelve * self.vit.depth // 12


@dataclass(frozen=True)
class Table:
    """One table of the paper."""

    name: str
    domains: tuple[Domain, ...]
    rows: Callable[[Context], tuple[Row, ...]]
    reference: str | None = None  # label of the row that paired differences are taken from
    claims: tuple[Claim, ...] = ()
    note: str = ""
    shots: tuple[int, ...] = (1, 5)
    ways: int = 5
    mean: bool = False  # a column of the mean over all domains
    costs: str | None = None  # record of the benchmarks that belongs to it
    mine: str | None = None  # title, where it is no table of the paper
    figures: tuple[str, ...] = ()  # the paper's tables that its figures are in; empty: its own


@dataclass(frozen=True)
class Published:
    """The paper's figures of a table."""

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]
    costs: dict[str, tuple[float, ...]]

    def figure(self, row: str, dataset: str, shots: int) -> float | None:
        """Accuracy in percent; None where the paper has none."""
        column = f"{dataset}/{shots}"
        if row not in self.rows or column not in self.columns:
            return None
        return self.rows[row][self.columns.index(column)]


@cache
def published() -> dict[str, Published]:
    """The paper's figures of all its tables, from `paper.toml`."""
    text = (files("fastrecycle.tables") / "paper.toml").read_text(encoding="utf-8")
    return {
        name: Published(
            table["title"],
            tuple(table["columns"]),
            {row: tuple(values) for row, values in table["rows"].items()},
            {row: tuple(values) for row, values in table.get("costs", {}).items()},
        )
        for name, table in tomllib.loads(text).items()
    }


def method(row: Row, sources: Sequence[str], shots: int, scale: Scale) -> Method:
    """What a row is in a column: the recipe of its method.

    Args:
        row: of another kind than BEST.
        sources: data sets of the bank.
        shots: of the column, which meta-training takes too.
        scale: settings that the row changes.

    """
    bank = Bank(row.backbone, tuple(sources), replace(scale.pretune, **row.pretune))
    pool = Pool(bank, replace(scale.inversion, **row.inversion))
    images = pool.inversion.images_per_class
    if row.kind == RECYCLE:
        changed = replace(scale.meta, **row.meta)
        trained = Meta(pool, scale.of_shots(changed, shots, images))
        return Method(RECYCLE, row.backbone, trained=trained)
    of = BASELINES[row.kind]
    grid = scale.pmf_grid if of.model == "backbone" else scale.grid if of.grid else {}
    settings = dict(row.settings)
    if row.kind == "LoRAHub":
        settings.setdefault("steps", scale.search_steps)
    return Method(
        row.kind,
        row.backbone,
        bank=bank if of.takes_bank else None,
        trained=(
            Caml(pool, scale.of_shots(scale.caml, shots, images))
            if of.model == "network"
            else Meta(pool, scale.of_shots(scale.pmf, shots, images))
            if of.model == "backbone"
            else None
        ),
        settings=tuple(sorted(settings.items())),
        grid=tuple((k, tuple(v)) for k, v in grid.items() if k not in row.settings),
    )

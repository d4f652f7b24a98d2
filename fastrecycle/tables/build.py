"""One table from nothing to its pages: `fastrecycle report TABLE`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrecycle.baselines import BASELINES
from fastrecycle.files import atomic_write
from fastrecycle.tables.catalogue import SEPARATE, TABLES
from fastrecycle.tables.layout import BEST, MAIN, Context, Domain, Row, Table, method
from fastrecycle.tables.plots import plot_gains
from fastrecycle.tables.recipes import Choice, Score, Tasks, plain
from fastrecycle.tables.render import Filled, csv_lines, latex, markdown
from fastrecycle.tables.scales import SCALES, Scale
from fastrecycle.tables.scoring import scored
from fastrecycle.tables.stages import OutOfTime, Stages
from fastrecycle.tables.store import Store
from fastrecycle.tables.world import World

Say = Callable[[str], None]


def find_table(name: str) -> Table:
    """A table by its name.

    Raises:
        ValueError: there is none of this name.

    """
    if name in TABLES:
        return TABLES[name]
    if name in SEPARATE:
        raise ValueError(f"{name}: {SEPARATE[name]}; expected one of {', '.join(TABLES)}")
    raise ValueError(f"table: expected one of {', '.join(TABLES)}; got {name!r}")


@dataclass(frozen=True)
class Request:
    """What is asked for besides the world."""

    table: str
    scale: str
    command: str
    datasets: tuple[str, ...] = ()  # of the columns; empty: all that are there
    minutes: float | None = None
    quiet: bool = False


class Builder:
    """Fills the cells of one table; see `build`."""

    def __init__(self, request: Request, world: World, store: Store, say: Say):
        self.table, self.request, self.world = find_table(request.table), request, world
        if request.scale not in SCALES:
            raise ValueError(f"scale: expected one of {', '.join(SCALES)}; got {request.scale!r}")
        self.scale: Scale = SCALES[request.scale]
        self.store, self.say = store, say
        self.stages = Stages(world, store, minutes=request.minutes, quiet=request.quiet)
        further = tuple(label for label in world.backbones if label != MAIN)
        self.rows = self.table.rows(Context(self.scale, world.vit().config, further))
        self.absent: dict[str, str] = {}
        self.domains = self._present()

    def _present(self) -> list[tuple[Domain, tuple[str, ...]]]:
        """Domains whose data are there, with the sources of their banks."""
        asked = self.request.datasets
        known = [domain.dataset for domain in self.table.domains]
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ValueError(
                f"datasets: {self.table.name} has {', '.join(known)}; got {', '.join(unknown)}"
            )
        found = []
        for domain in self.table.domains:
            if asked and domain.dataset not in asked:
                continue
            reason = self.world.absent(domain.dataset, "test")
            sources = self.world.sources(domain) if reason is None else ()
            if reason is not None or isinstance(sources, str):
                self.absent[domain.dataset] = reason or str(sources)
            else:
                found.append((domain, sources))
        if not found:
            reasons = "; ".join(self.absent.values())
            raise FileNotFoundError(f"{self.table.name}: no data set of it is there ({reasons})")
        return found

    def run(self) -> dict[str, Any]:
        """Fill every cell, keep the plan after each; returns the plan."""
        plan = self._plan()
        for domain, sources in self.domains:
            for row in sorted(self.rows, key=_turn):
                for shots in self.table.shots:
                    cell = {"row": row.label, "dataset": domain.dataset, "shots": shots}
                    try:
                        cell |= self._cell(row, domain, sources, shots)
                    except OutOfTime as reason:
                        cell["left"] = reason.stage
                        self.say(f"left: {reason}")
                    plan["cells"].append(cell)
                    self.store.save_plan(plan)
        return plan

    def _plan(self) -> dict[str, Any]:
        """The plan before any cell, with the cells of earlier runs on other data sets."""
        world = self.world
        plan = {
            "table": self.table.name,
            "scale": self.request.scale,
            "settings": plain(self.scale),
            "command": self.request.command,
            "date": time.strftime("%Y-%m-%d"),
            "seed": world.seed,
            "setting": world.setting(),
            "backbones": {
                label: world.told("backbone", label)
                for label in dict.fromkeys(row.backbone for row in self.rows)
            },
            "prior": world.told("prior", ""),
            "domains": [{"dataset": d.dataset, "sources": list(s)} for d, s in self.domains],
            "absent": self.absent,
            "rows": [{"label": row.label, "kind": row.kind} for row in self.rows],
            "cells": [],
        }
        before = self.store.plan(self.table.name, self.request.scale)
        same = ("settings", "seed", "setting", "backbones", "prior", "rows")
        if before is None or not self.request.datasets:
            return plan
        now = json.loads(json.dumps(plan))
        if any(before[name] != now[name] for name in same):
            return plan  # of another run altogether
        kept = [d for d in before["domains"] if d["dataset"] not in self.request.datasets]
        plan["domains"] = [*kept, *plan["domains"]]
        names = [d["dataset"] for d in kept]
        plan["cells"] = [cell for cell in before["cells"] if cell["dataset"] in names]
        return plan

    def _cell(self, row: Row, domain: Domain, sources: Sequence[str], shots: int) -> dict[str, Any]:
        if row.kind == BEST:
            return self._best(row, domain, sources, shots)
        recipe = self._score(row, domain.dataset, "test", sources, shots, self.scale.tasks)
        record = scored(self.stages, recipe)
        told = f"{record['accuracy']:.2f} ± {record['ci95']:.2f} %"
        self.say(f"{row.label}, {domain.dataset}, {shots}-shot: {told}")
        return {"key": self.stages.key(recipe)}

    def _best(self, row: Row, domain: Domain, sources: Sequence[str], shots: int) -> dict[str, Any]:
        """The score of that row which is best on validation tasks."""
        means: dict[str, float] = {}
        candidates = {each.label: each for each in self.rows if each.label in row.of}
        for label, each in candidates.items():
            on = self._validation(sources)
            found = [
                scored(self.stages, self._score(each, name, "val", sources, shots,
                                                self.scale.validation_tasks))["accuracy"]
                for name in on
            ]  # fmt: skip
            means[label] = float(np.mean(found))
        chosen = max(means, key=means.__getitem__)
        cell = self._cell(candidates[chosen], domain, sources, shots)
        return {**cell, "chosen": chosen, "validation": means}

    def _validation(self, sources: Sequence[str]) -> list[str]:
        """Sources of the bank with validation classes.

        Raises:
            FileNotFoundError: none has.

        """
        found = [name for name in sources if self.world.absent(name, "val") is None]
        if not found:
            reason = self.world.absent(sources[0], "val")
            raise FileNotFoundError(f"{self.table.name}: no validation tasks; {reason}")
        return found

    def _score(
        self, row: Row, dataset: str, split: str, sources: Sequence[str], shots: int, count: int
    ) -> Score:
        of = method(row, sources, shots, self.scale)
        on = Tasks(dataset, split, self.table.ways, shots, self.scale.queries, count)
        choice = None
        if of.grid:
            validation = tuple(
                Tasks(name, "val", self.table.ways, shots, self.scale.queries,
                      self.scale.validation_tasks)
                for name in self._validation(sources)
            )  # fmt: skip
            choice = Choice(of, validation)
        return Score(of, on, choice)


def _turn(row: Row) -> int:
    """What is to be shown first, and last what takes longest: time may run out."""
    if row.kind in BASELINES:
        return 3 if BASELINES[row.kind].tunes else 2
    return 1 if row.kind == BEST else 0


def build(request: Request, world: World, store: Store, *, say: Say = print) -> dict[str, Any]:
    """Run what is missing of a table, reuse what the store has; returns the table's plan.

    Interrupted at any moment, the same call goes on from what is complete.

    Args:
        request: which table, at which scale.
        world: backbones, prior and data sets.
        store: of stages.
        say: takes a line for each cell.

    Raises:
        ValueError: unknown table, scale or data set.
        FileNotFoundError: no data set of the table is there.

    """
    builder = Builder(request, world, store, say)
    plan = builder.run()
    left = list(dict.fromkeys(c["left"] for c in plan["cells"] if c.get("left")))
    say(f"{request.table}: {len(builder.stages.ran)} stages run, {len(left)} left")
    return plan


def write(
    table: str, scale: str, store: Store, out: str | Path, results: str | Path | None = None
) -> list[Path]:
    """Write TABLE.md, .csv and .tex (and a picture) from the store's plan and scores alone.

    Args:
        table, scale: which plan.
        store: with the table's plan.
        out: folder to write to.
        results: folder of the benchmarks' records.

    Returns:
        What was written.

    Raises:
        ValueError: unknown table, or a damaged record.
        FileNotFoundError: it was never run here.

    """
    found, out = find_table(table), Path(out)
    plan = store.plan(table, scale)
    if plan is None:
        raise FileNotFoundError(
            f"{store.root}: no plan of {table} at scale {scale} to render; run it without --render"
        )
    keys = {cell.get("key") for cell in plan["cells"]} - {None}
    records = {key: record for key in keys if (record := store.record(key)) is not None}
    for key, record in records.items():
        if (count := len(record["per_task"])) != plan["settings"]["tasks"]:
            raise ValueError(
                f"{store.root}/done/{key}.json: a score of {count} tasks, its table has"
                f" {plan['settings']['tasks']}; remove it, and it is made again"
            )
    filled = Filled(found, plan, records)
    written: list[Path] = []
    picture = None
    if table == "gains":
        picture = f"{table}.png"
        plot_gains(filled, out / picture)
        written.append(out / picture)
    where = None if results is None else Path(results)
    for suffix, text in (
        ("md", markdown(filled, where, picture)),
        ("csv", csv_lines(filled)),
        ("tex", latex(filled)),
    ):
        path = out / f"{table}.{suffix}"
        atomic_write(path, text)
        written.append(path)
    return written

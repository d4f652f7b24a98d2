"""What a table's cell is made of: bank -> pool -> meta-LoRA or model -> choice -> score.

A recipe says how something is made, down to the data sets and the backbone; its key is a hash of
that and of what was read, so that tables share what they have in common.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from fastrecycle.baselines import CAMLConfig
from fastrecycle.config import InversionConfig, MetaConfig, PretuneConfig

RECYCLE = "LoRA Recycle"


@dataclass(frozen=True)
class Bank:
    """LoRAs pre-tuned on the training split of data sets, which take turns."""

    backbone: str  # its label
    sources: tuple[str, ...]
    pretune: PretuneConfig


@dataclass(frozen=True)
class Pool:
    """Images synthesised from a bank."""

    bank: Bank
    inversion: InversionConfig


@dataclass(frozen=True)
class Meta:
    """A meta-LoRA; where the backbone learns, that backbone (P>M>F, Table 8)."""

    pool: Pool
    config: MetaConfig


@dataclass(frozen=True)
class Caml:
    """CAML's network."""

    pool: Pool
    config: CAMLConfig


Trained = Meta | Caml


@dataclass(frozen=True)
class Tasks:
    """A frozen task list; it depends on nothing else but the data set's labels and the seed."""

    dataset: str
    split: str
    ways: int
    shots: int
    queries: int
    count: int


@dataclass(frozen=True)
class Method:
    """What is scored: a baseline by its name in `BASELINES`, or `RECYCLE`."""

    kind: str
    backbone: str
    bank: Bank | None = None
    trained: Trained | None = None
    settings: tuple[tuple[str, Any], ...] = ()  # of the baseline, given
    grid: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # of the baseline, chosen


@dataclass(frozen=True)
class Choice:
    """Settings of a method with the best mean accuracy over validation tasks."""

    method: Method
    on: tuple[Tasks, ...]


@dataclass(frozen=True)
class Score:
    """Accuracy of a method on tasks."""

    method: Method
    on: Tasks
    choice: Choice | None = None  # where the method has a grid


Recipe = Bank | Pool | Meta | Caml | Choice | Score
STAGES: dict[type, str] = {
    Bank: "bank", Pool: "pool", Meta: "meta", Caml: "caml", Choice: "choice", Score: "score",
}  # fmt: skip


def plain(recipe: Any, read: Callable[[str, str], Any] | None = None) -> Any:
    """A recipe as JSON values; what it reads becomes `read(kind, name)`.

    The kind is "backbone", "prior" or a data set's split. The recipe of a stage within another one
    is spelled out, so that a key answers for all of it.
    """
    if is_dataclass(recipe) and not isinstance(recipe, type):
        values = {f.name: plain(getattr(recipe, f.name), read) for f in fields(recipe)}
        kind = STAGES.get(type(recipe))
        if kind is not None:
            values["stage"] = kind
        if read is not None:
            _add_read(recipe, values, read)
        return values
    if isinstance(recipe, dict):
        return {str(k): plain(v, read) for k, v in recipe.items()}
    if isinstance(recipe, tuple | list):
        return [plain(v, read) for v in recipe]
    return recipe


def _add_read(recipe: Any, values: dict[str, Any], read: Callable[[str, str], Any]) -> None:
    """Replace names of what was read by its SHA-256: wherever a file lies, the key is the same."""
    if isinstance(recipe, Bank | Method):
        values["backbone"] = read("backbone", recipe.backbone)
    if isinstance(recipe, Bank):
        values["sources"] = [[name, read("train", name)] for name in recipe.sources]
    if isinstance(recipe, Pool):
        uses = recipe.inversion.alpha > 0
        values["prior"] = read("prior", "") if uses else None
    if isinstance(recipe, Tasks):
        values["dataset"] = [recipe.dataset, read(recipe.split, recipe.dataset)]


def key(recipe: Recipe, read: Callable[[str, str], Any], setting: dict[str, Any]) -> str:
    """Name of a recipe's result: 20 hex digits.

    Args:
        recipe: see above.
        read: (kind, name) -> SHA-256, see `plain`.
        setting: what else decides the result: seed, precision, backend, device type.

    """
    content = {"recipe": plain(recipe, read), "setting": setting}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{STAGES[type(recipe)]}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"

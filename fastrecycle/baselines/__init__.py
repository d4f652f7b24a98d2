"""The methods that LoRA Recycle is compared with, under one protocol (Sec. 5, App. D)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastrecycle.baselines.base import Baseline, Cost, FrozenFeatures
from fastrecycle.baselines.linear import LinearProbe
from fastrecycle.baselines.nearest import NearestCentre
from fastrecycle.baselines.protocol import (
    GRID,
    Choice,
    TaskFeatures,
    choose,
    embed_tasks,
    evaluate_baseline,
    score,
)
from fastrecycle.lora import LoRA
from fastrecycle.vit import ViT

__all__ = [
    "BASELINES",
    "GRID",
    "Baseline",
    "Choice",
    "Cost",
    "FrozenFeatures",
    "LinearProbe",
    "NearestCentre",
    "TaskFeatures",
    "choose",
    "embed_tasks",
    "evaluate_baseline",
    "make_baseline",
    "score",
]


class Row(NamedTuple):
    """A method of the paper's tables."""

    method: type[FrozenFeatures]
    takes_bank: bool
    tunes: bool  # fine-tuning-based ("FT"): has settings to choose


BASELINES = {
    "Linear-probe": Row(LinearProbe, takes_bank=False, tunes=True),
    "LoRAs Avg + Linear": Row(LinearProbe, takes_bank=True, tunes=True),
    "NN": Row(NearestCentre, takes_bank=False, tunes=False),
    "LoRAs Avg + NN": Row(NearestCentre, takes_bank=True, tunes=False),
}


def make_baseline(
    name: str, vit: ViT, bank: Sequence[LoRA] | None = None, **parameters: Any
) -> FrozenFeatures:
    """A method by its name in the paper's tables.

    Args:
        name: a key of `BASELINES`.
        vit: the backbone.
        bank: of LoRAs; left out where the method takes none, so that one call serves every row.
        parameters: of the method.

    Raises:
        ValueError: unknown name, or no bank where the method takes one.

    """
    if name not in BASELINES:
        raise ValueError(f"baseline: expected one of {', '.join(BASELINES)}; got {name!r}")
    row = BASELINES[name]
    if not row.takes_bank:
        return row.method(vit, **parameters)
    if bank is None:
        raise ValueError(f"{name}: needs a bank of LoRAs")
    return row.method(vit, bank=bank, **parameters)

"""The methods that LoRA Recycle is compared with, under one protocol (Sec. 5, App. D)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fastrecycle.baselines.base import Baseline, Cost, FrozenFeatures
from fastrecycle.baselines.caml import CAML, CAMLNetwork
from fastrecycle.baselines.caml_training import CAMLConfig, pool_views, train_caml
from fastrecycle.baselines.full_finetuning import FullFineTuning
from fastrecycle.baselines.linear import LinearProbe
from fastrecycle.baselines.lora_linear import LoRALinear
from fastrecycle.baselines.lorahub import LoRAHub
from fastrecycle.baselines.mole import MOLE
from fastrecycle.baselines.nearest import NearestCentre
from fastrecycle.baselines.network import AdaptedNetwork
from fastrecycle.baselines.pmf import PMF, PMF_GRID, PMF_META
from fastrecycle.baselines.protocol import (
    GRID,
    Choice,
    Method,
    TaskFeatures,
    TaskPixels,
    choose,
    decode_tasks,
    embed_tasks,
    evaluate_baseline,
    score,
)
from fastrecycle.baselines.zero_shot import ZeroShotRow, zero_shot_rows
from fastrecycle.lora import LoRA
from fastrecycle.vit import ViT

__all__ = [
    "BASELINES",
    "CAML",
    "GRID",
    "MOLE",
    "PMF",
    "PMF_GRID",
    "PMF_META",
    "AdaptedNetwork",
    "Baseline",
    "CAMLConfig",
    "CAMLNetwork",
    "Choice",
    "Cost",
    "FrozenFeatures",
    "FullFineTuning",
    "LinearProbe",
    "LoRAHub",
    "LoRALinear",
    "NearestCentre",
    "TaskFeatures",
    "TaskPixels",
    "ZeroShotRow",
    "choose",
    "decode_tasks",
    "embed_tasks",
    "evaluate_baseline",
    "make_baseline",
    "pool_views",
    "score",
    "train_caml",
    "zero_shot_rows",
]


class Row(NamedTuple):
    """A method of the paper's tables."""

    method: type[Method]
    takes_bank: bool
    tunes: bool  # fine-tuning-based ("FT")
    grid: Mapping[str, Sequence[Any]] = {}  # settings for `choose`; empty: none to choose
    model: Literal["network", "backbone"] | None = None  # what the synthetic pool trains for it


BASELINES = {
    "Full Finetuning": Row(FullFineTuning, takes_bank=False, tunes=True, grid=GRID),
    "Linear-probe": Row(LinearProbe, takes_bank=False, tunes=True, grid=GRID),
    "LoRA + Linear": Row(LoRALinear, takes_bank=False, tunes=True, grid=GRID),
    "LoRAs Avg + Linear": Row(LinearProbe, takes_bank=True, tunes=True, grid=GRID),
    "MOLE": Row(MOLE, takes_bank=True, tunes=True, grid=GRID),
    "LoRAHub": Row(LoRAHub, takes_bank=True, tunes=True),  # its settings are its authors'
    "NN": Row(NearestCentre, takes_bank=False, tunes=False),
    "LoRAs Avg + NN": Row(NearestCentre, takes_bank=True, tunes=False),
    "CAML": Row(CAML, takes_bank=False, tunes=False, model="network"),
    "P>M>F": Row(PMF, takes_bank=False, tunes=True, grid=PMF_GRID, model="backbone"),
}
"""The methods by their names in the paper's tables."""


def make_baseline(
    name: str, vit: ViT, bank: Sequence[LoRA] | None = None, **parameters: Any
) -> Method:
    """A method by its name in the paper's tables.

    Args:
        name: a key of `BASELINES`.
        vit: the backbone.
        bank: of LoRAs; left out where the method takes none, so that one call serves every row.
        parameters: of the method. Of those that the synthetic pool trains also `model`: for "CAML"
            see `train_caml`; for "P>M>F" the meta-trained backbone, which takes the place of `vit`.

    Raises:
        ValueError: unknown name, or no bank or model where the method takes one.

    """
    if name not in BASELINES:
        raise ValueError(f"baseline: expected one of {', '.join(BASELINES)}; got {name!r}")
    row = BASELINES[name]
    if row.model and "model" not in parameters:
        raise ValueError(f"{name}: needs model=..., trained on the synthetic pool beforehand")
    if row.model == "backbone":
        vit = parameters.pop("model")
    if row.takes_bank:
        if bank is None:
            raise ValueError(f"{name}: needs a bank of LoRAs")
        parameters["bank"] = bank
    method: Callable[..., Method] = row.method
    return method(vit, **parameters)

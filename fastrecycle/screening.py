"""Which LoRAs of a bank to trust, told by their synthetic images and by each other.

A market's LoRAs may be broken, swapped or poisoned on purpose, and meta-training believes them all.
Six scores of each task are compared with their median over the bank; `docs/scaling.md` says what
each finds. G tasks, m images of one, C classes, F features.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrecycle.lora import LoRA
from fastrecycle.ops import autocast
from fastrecycle.pool_files import TaskImages
from fastrecycle.vit import ViT

# Deviations from the median beyond which a value is an outlier: Iglewicz and Hoaglin, How to Detect
# and Handle Outliers (1993).
LIMIT = 3.5
# The least deviation of each score that counts as one, lest a bank of near equals lose members;
# shares of m images have at least 0.5 / sqrt(m).
FLOORS = {"plain": 0.05, "rest": 0.05, "teacher": 0.02, "agreement": 0.02, "size": 0.1}
_NAMES_TELL = 0.3  # median of `names` below which a bank's names say too little to go by
_FEWEST = 5  # tasks, below which a median says little and only the chance level is looked at

MEANINGS = {
    "teacher": "its own network names its own images",
    "plain": "its images separate under the plain backbone",
    "rest": "its images separate under the mean of the other LoRAs",
    "agreement": "its change of the weights points where the others' do",
    "size": "its change of the weights is about as large as the others'",
}


@dataclass(frozen=True)
class Score:
    """What is known of one task; shares in [0, 1], NaN where there is nothing to compare with."""

    task: int
    name: str | None
    teacher: float  # accuracy of its own network on its own images
    plain: float  # leave-one-out nearest-prototype accuracy under the plain backbone
    rest: float  # the same under the mean of the other LoRAs
    names: float  # mean cosine of its class means with those of their namesakes in other tasks
    agreement: float  # cosine of its change with the sum of the others', each of length 1
    size: float  # log of the Frobenius norm of its change
    reasons: tuple[str, ...] = ()  # why it is left out; none: it stays


def screen(
    vit: ViT,
    bank: Sequence[LoRA],
    parts: Sequence[TaskImages],
    *,
    precision: str = "fp32",
    batch_size: int = 100,
) -> list[Score]:
    """Score each task of a pool, and say which to leave out and why.

    A task is left out where a score lies more than `LIMIT` robust deviations (1.4826 times the
    median distance to the median, at least `FLOORS`) below the median of all; `size` on either
    side. So is one whose own network is at chance on its own images, and one whose `names` is below
    zero, where the median of `names` shows that names tell something.

    Args:
        vit: the backbone, on the device to use.
        bank: the LoRAs; part.task is a place in it.
        parts: what inversion made of them, or of some.
        precision: "fp32" or "bf16".
        batch_size: images a forward pass.

    Raises:
        ValueError: the images were made from another bank.

    """
    for part in parts:
        if part.task >= len(bank) or bank[part.task].name != part.name:
            raise ValueError(
                f"screen: images of task {part.task} ({part.name}) were not made from this bank;"
                " give the bank that was inverted"
            )
    chosen = [bank[part.task].to(vit.pos_embed.device) for part in parts]
    sums = _Changes(chosen)
    plain_means: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    for i, part in enumerate(parts):
        plain = _features(vit, part, None, precision, batch_size)
        rest = _features(vit, part, sums.mean_of_others(i), precision, batch_size)
        labels = part.labels.to(plain.device)
        right = part.teacher_logits.argmax(1) == part.labels
        plain_means.append(
            torch.stack([plain[labels == c].mean(0) for c in labels.unique(sorted=True)])
        )
        rows.append(
            {
                "teacher": right.float().mean().item(),
                "plain": leave_one_out(plain, labels),
                "rest": leave_one_out(rest, labels),
                "agreement": sums.agreement(i),
                "size": sums.size(i),
            }
        )
    scores = [
        Score(part.task, part.name, names=math.nan, **row)
        for part, row in zip(parts, rows, strict=True)
    ]
    reasons = _reasons(scores, parts)
    names = _trusted_names(parts, plain_means, reasons)
    return [
        replace(score, names=same, reasons=tuple(found))
        for score, same, found in zip(scores, names, reasons, strict=True)
    ]


def _reasons(scores: Sequence[Score], parts: Sequence[TaskImages]) -> list[list[str]]:
    """Why each task is left out, by all scores but `names`."""
    reasons: list[list[str]] = [[] for _ in scores]
    for found, score, part in zip(reasons, scores, parts, strict=True):
        if at_chance(part):
            found.append(f"its own network is at chance on its own images ({score.teacher:.0%})")
    for name, meaning in MEANINGS.items():
        values = torch.tensor([getattr(s, name) for s in scores], dtype=torch.float64)
        floor = FLOORS[name]
        if name in ("teacher", "plain", "rest"):  # shares of m images: what chance does to one
            floor = max(floor, 0.5 / math.sqrt(min(len(p.labels) for p in parts)))
        for i in outliers(values, floor, both=name == "size"):
            reasons[i].append(
                f"{name} {values[i]:.2f}, median {values.nanmedian():.2f}: less than the others'"
                f" do, {meaning}"
                if name != "size"
                else f"size e^{values[i]:.2f}, median e^{values.nanmedian():.2f}"
            )
    return reasons


def _trusted_names(
    parts: Sequence[TaskImages], means: Sequence[Tensor], reasons: list[list[str]]
) -> list[float]:
    """The score `names` of each task, against the tasks that stay; adds to their reasons.

    One task after the other leaves, the worst first, and the rest is scored again: a LoRA under a
    wrong head also makes its honest namesakes look bad.
    """
    while True:
        out = {i for i, found in enumerate(reasons) if found}
        names = _namesakes(parts, means, out)
        stay = torch.tensor([math.nan if i in out else x for i, x in enumerate(names)])
        known = stay[~stay.isnan()]
        if len(known) < _FEWEST or known.median() < _NAMES_TELL or known.min() >= 0:
            return names
        worst = int(stay.nan_to_num(math.inf).argmin())
        reasons[worst].append(
            f"names {names[worst]:.2f}, median {known.median():.2f}: its classes look no more like"
            " their namesakes in other tasks than like each other"
        )


def at_chance(part: TaskImages) -> bool:
    """Whether a LoRA's own network names its images no better than by guessing.

    Three standard deviations of guessing are not enough to tell.
    """
    right = (part.teacher_logits.argmax(1) == part.labels).float().mean().item()
    chance = 1 / part.teacher_logits.shape[1]
    return right < chance + 3 * math.sqrt(chance * (1 - chance) / len(part.labels))


def outliers(values: Tensor, floor: float, both: bool = False) -> list[int]:
    """Places of values far below the median, or on either side of it; NaN is none.

    Args:
        values: (G,).
        floor: least deviation.
        both: whether values far above count too.

    """
    known = values[~values.isnan()]
    if len(known) < _FEWEST:
        return []
    middle = known.median()
    deviation = max(floor, 1.4826 * (known - middle).abs().median().item())
    away = (values - middle) / deviation
    far = away.abs() > LIMIT if both else away < -LIMIT
    return torch.nonzero(far).flatten().tolist()


def leave_one_out(features: Tensor, labels: Tensor) -> float:
    """Share of images nearest to the prototype of their class, which they have no part in.

    Args:
        features: (m, F).
        labels: (m,), each class at least twice.

    """
    hot = torch.nn.functional.one_hot(labels).to(features)  # (m, C)
    counts = hot.sum(0)
    sums = hot.T @ features
    distances = torch.cdist(features, sums / counts.clamp_min(1)[:, None])
    own = (sums[labels] - features) / (counts[labels] - 1).clamp_min(1)[:, None]
    distances[torch.arange(len(labels)), labels] = (features - own).norm(dim=1)
    distances[:, counts == 0] = torch.inf
    return (distances.argmin(1) == labels).float().mean().item()


class _Changes:
    """The LoRAs' changes of the weights, each shortened to the median length at most.

    Shortened, since one LoRA of noise can be longer than all others together.
    """

    def __init__(self, loras: Sequence[LoRA]):
        self.loras = loras
        self.norms = [math.sqrt(sum(x.delta(t).square().sum().item() for t in x.a)) for x in loras]
        self.median = sorted(self.norms)[len(loras) // 2]
        self.total: dict[str, Tensor] = {}
        self.units: dict[str, Tensor] = {}
        for i, lora in enumerate(loras):
            for target in lora.a:
                delta = lora.delta(target)
                for sums, factor in ((self.total, self._short(i)), (self.units, self._unit(i))):
                    sums[target] = sums.get(target, 0) + factor * delta

    def _short(self, i: int) -> float:
        return min(1.0, self.median / max(self.norms[i], 1e-30))

    def _unit(self, i: int) -> float:
        return 1 / max(self.norms[i], 1e-30)

    def size(self, i: int) -> float:
        """Log of the length."""
        return math.log(max(self.norms[i], 1e-30))

    def mean_of_others(self, i: int) -> LoRA:
        """Full-rank LoRA of the mean change of all but one."""
        a, b, scale, ranks = {}, {}, {}, {}
        lora, others = self.loras[i], max(1, len(self.loras) - 1)
        for target, total in self.total.items():
            own = self._short(i) * lora.delta(target) if target in lora.a else 0
            b[target] = (total - own) / others
            depth, _, d_in = total.shape
            a[target] = torch.eye(d_in).to(total).expand(depth, -1, -1)
            scale[target] = total.new_ones(depth)
            ranks[target] = (d_in,) * depth
        return LoRA(a, b, scale, ranks)

    def agreement(self, i: int) -> float:
        """Cosine with the sum of the others', each of length 1."""
        lora, product, length = self.loras[i], 0.0, 0.0
        for target, total in self.units.items():
            own = self._unit(i) * lora.delta(target) if target in lora.a else None
            others = total if own is None else total - own
            length += others.square().sum().item()
            product += 0.0 if own is None else (own * others).sum().item()
        return product / math.sqrt(length) if length > 0 else math.nan


@torch.no_grad()
def _features(
    vit: ViT, part: TaskImages, lora: LoRA | None, precision: str, batch_size: int
) -> Tensor:
    """(m, F) float32 of a task's images."""
    device, rows = vit.pos_embed.device, []
    for batch in part.images.split(batch_size):
        images = vit.normalise(batch.to(device).float() / 255)
        with autocast(device, precision):
            rows.append(vit(images, lora).float())
    return torch.cat(rows)


def _namesakes(
    parts: Sequence[TaskImages], means: Sequence[Tensor], without: Collection[int]
) -> list[float]:
    """Mean cosine of each task's class means with those of its namesakes in tasks that stay."""
    shown: dict[str, list[tuple[int, Tensor]]] = {}
    for i, (part, mean) in enumerate(zip(parts, means, strict=True)):
        for row, label in enumerate(part.labels.unique(sorted=True).tolist()):
            if part.class_names is not None:
                shown.setdefault(part.class_names[label], []).append((i, mean[row]))
    cosines = []
    for i, (part, mean) in enumerate(zip(parts, means, strict=True)):
        own, others = [], []
        for row, label in enumerate(part.labels.unique(sorted=True).tolist()):
            if part.class_names is None:
                continue
            namesakes = shown[part.class_names[label]]
            elsewhere = [x for j, x in namesakes if j != i and j not in without]
            if elsewhere:
                own.append(mean[row])
                others.append(torch.stack(elsewhere).mean(0))
        if len(own) < 3:  # of two centred classes one is the other's negative
            cosines.append(math.nan)
            continue
        # what all these classes have in common tells nothing
        one, other = (x - x.mean(0) for x in (torch.stack(own), torch.stack(others)))
        cosines.append(torch.nn.functional.cosine_similarity(one, other).mean().item())
    return cosines


SCORES = ("teacher", "plain", "rest", "names", "agreement", "size")


def table(scores: Sequence[Score]) -> list[list[str]]:
    """Rows of text, those left out first: name, the six scores, why."""
    ordered = sorted(scores, key=lambda s: (not s.reasons, s.task))
    return [
        [s.name or str(s.task), *(f"{getattr(s, name):.2f}" for name in SCORES),
         "; ".join(s.reasons) or "stays"]
        for s in ordered
    ]  # fmt: skip


def as_json(scores: Sequence[Score]) -> dict[str, Any]:
    """What a run keeps of a screening: the rule and every score."""
    plain = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in vars(s).items()}
        for s in scores
    ]
    return {"limit": LIMIT, "floors": FLOORS, "meanings": MEANINGS, "tasks": plain}

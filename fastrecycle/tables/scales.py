"""How much of the method a table runs: seconds on a CPU, minutes on a GPU, or all the paper ran."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastrecycle.baselines import GRID, PMF_GRID, PMF_META, CAMLConfig
from fastrecycle.config import PAPER_META, InversionConfig, MetaConfig, PretuneConfig

ScaleName = Literal["smoke", "small", "paper"]


@dataclass(frozen=True)
class Scale:
    """Settings of every stage before a table's row changes some of them.

    A meta-LoRA, CAML and P>M>F meta-train on tasks of the shot that they are evaluated at, with as
    many queries as the pool's images of a class then leave, at most 15.
    """

    pretune: PretuneConfig
    inversion: InversionConfig
    meta: MetaConfig
    caml: CAMLConfig
    pmf: MetaConfig
    budgets: tuple[int, int] = (100, 20)  # LoRAs of Table 7, many and few
    tasks: int = 600
    queries: int = 15
    validation_tasks: int = 200
    grid: dict[str, tuple[Any, ...]] = field(default_factory=lambda: dict(GRID))
    pmf_grid: dict[str, tuple[Any, ...]] = field(default_factory=lambda: dict(PMF_GRID))
    backbone_rates: tuple[float, ...] = (1e-5, 1e-4)  # where the backbone learns (Table 8)
    search_steps: int = 40  # of LoRAHub
    most_steps: int = 50  # of Table 1's fine-tuning

    def of_shots(self, config: Any, shots: int, images_per_class: int) -> Any:
        """Meta-training settings at a shot: `MetaConfig` or `CAMLConfig`.

        Raises:
            ValueError: a class of the pool has too few images for this shot and one query.

        """
        queries = min(15, images_per_class - shots)
        if queries < 1:
            raise ValueError(
                f"shots: the pool has {images_per_class} images a class, too few for {shots} shots"
                " and a query; use a scale with more images_per_class"
            )
        return replace(config, shots=shots, queries=queries)


# from the average of the bank at 1e-4: chosen on CIFAR-FS's validation classes (docs/results.md)
_SMALL_META = MetaConfig(steps=400, tasks=4, lr=1e-4, start="average")

SCALES: dict[str, Scale] = {
    "smoke": Scale(
        PretuneConfig(num=2, steps=2, batch_size=4, rank=(2,), group=2),
        InversionConfig(images_per_class=6, iterations=2, group=2),
        MetaConfig(steps=2, rank=2, lr=0.05, schedule="constant", resolution=(4, 8)),
        CAMLConfig(steps=1, tasks=1, code_dim=8, layers=1, heads=2, resolution=(4, 8), sides=2),
        replace(PMF_META, steps=1, resolution=(4, 8)),
        budgets=(3, 2), tasks=4, queries=3, validation_tasks=2,
        grid={"lr": (0.1, 0.01), "steps": (1,)}, pmf_grid={"lr": (0.0, 1e-3)},
        backbone_rates=(1e-3, 1e-4), search_steps=2, most_steps=1,
    ),
    "small": Scale(
        PretuneConfig(num=20),  # as many as LoRAHub's authors weigh, and Table 7's few
        InversionConfig(images_per_class=10, iterations=300, group=10),
        _SMALL_META,
        CAMLConfig(steps=1000),
        replace(PMF_META, steps=400, tasks=4),
        validation_tasks=100,
    ),
    "paper": Scale(
        PretuneConfig(num=100),
        InversionConfig(images_per_class=20, iterations=2000, group=12),
        PAPER_META,
        CAMLConfig(steps=10_000),
        replace(PMF_META, steps=10_000),
    ),
}  # fmt: skip

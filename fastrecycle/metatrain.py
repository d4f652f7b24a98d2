"""Meta-training: one meta-LoRA from many synthetic few-shot tasks (LoRA Recycle, Sec. 4.2, 4.3).

A step is `MetaTrainer.step`, in `fastrecycle.meta_trainer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastrecycle.config import MetaConfig
from fastrecycle.inversion import OnStep
from fastrecycle.lora import LoRA
from fastrecycle.meta_loss import meta_loss, targets
from fastrecycle.meta_tasks import Episodes, EpisodeSampler, keep_ladder
from fastrecycle.meta_trainer import MetaTrainer
from fastrecycle.ops import Resolved
from fastrecycle.parallel import ALONE, Ranks
from fastrecycle.pool import SyntheticPool
from fastrecycle.vit import ViT

__all__ = [
    "EpisodeSampler",
    "Episodes",
    "MetaResult",
    "MetaTrainer",
    "keep_ladder",
    "meta_loss",
    "meta_train",
    "targets",
]


@dataclass(frozen=True)
class MetaResult:
    """What meta-training returns."""

    lora: LoRA
    vit: ViT  # the backbone given, or a trained copy where learn="backbone"
    best_step: int  # the step returned: the last, or the best on validation tasks
    validation: dict[int, float]


def meta_train(
    vit: ViT,
    pool: SyntheticPool,
    config: MetaConfig | None = None,
    *,
    seed: int = 0,
    precision: str = "fp32",
    backend: Resolved = "reference",
    start: LoRA | None = None,
    folder: str | Path | None = None,
    validate: Callable[[ViT, LoRA], float] | None = None,
    on_step: OnStep | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
    staged: bool | None = None,
) -> MetaResult:
    """Meta-train a meta-LoRA on a pool.

    Args:
        vit, pool, config, seed, precision, backend: see `MetaTrainer`.
        start: where the meta-LoRA starts, any rank; None: it changes nothing at first.
        folder: where checkpoints are kept; a second call goes on from there, to the same result.
        validate: scores a meta-LoRA on validation tasks, higher is better; with it the best step
            is returned instead of the last. Never give it test tasks.
        on_step: called after each step with the steps done and, from time to time, loss, accuracy,
            learning rate and validation score.
        stop: asked after each step; True saves the state and raises KeyboardInterrupt.
        ranks: processes that share each step's tasks, all of which call this with the same
            arguments; the first alone writes to the folder, validates and reports. See
            `fastrecycle.parallel`.
        staged: see `MetaTrainer`.

    Raises:
        ValueError: see `EpisodeSampler` and `SyntheticPool.keep`.
        KeyboardInterrupt: `stop` said so.

    """
    config = config or MetaConfig()
    trainer = MetaTrainer(
        vit, pool, config, seed=seed, precision=precision, backend=backend, start=start,
        ranks=ranks, staged=staged,
    )  # fmt: skip
    state = None if folder is None else Path(folder) / "meta.state.safetensors"
    best: tuple[int, float, list[Tensor]] | None = None
    validation: dict[int, float] = {}

    def extra() -> dict[str, Tensor]:
        scores = sorted(validation.items())
        tensors = {"validation": torch.tensor(scores, dtype=torch.float64).reshape(-1, 2)}
        if best is not None:
            tensors["best"] = torch.tensor([best[0], best[1]], dtype=torch.float64)
            tensors |= {f"best.{i}": x for i, x in enumerate(best[2])}
        return tensors

    if state is not None and state.exists():
        saved = trainer.restore(state)
        try:
            validation = {int(s): v for s, v in saved["validation"].tolist()}
            if "best" in saved:
                step, score = saved["best"].tolist()
                count = sum(name.startswith("best.") for name in saved)
                best = (int(step), score, [saved[f"best.{i}"] for i in range(count)])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{state}: a checkpoint of another configuration; remove it to restart"
            ) from None
    while not trainer.done:
        values = trainer.step()
        step = trainer.iteration
        report: dict[str, float] = {}
        if validate is not None and (step % config.validate_every == 0 or trainer.done):
            lora = trainer.meta_lora()
            score = ranks.told(lambda: validate(trainer.vit, lora))  # noqa: B023
            validation[step] = report["validation"] = score
            if best is None or score > best[1]:
                kept = lora.tensors() if config.learn != "backbone" else trainer.parameters
                best = (step, score, [x.detach().cpu().clone() for x in kept])
        if on_step is not None and ranks.first:
            if step % 20 == 0 or trainer.done:
                report |= {k: v.item() for k, v in values.items()}
                report["lr"] = config.lr_at(step - 1)
            on_step(step, report)
        halt = ranks.agree(stop, step)
        due = halt or trainer.done or step % config.checkpoint_every == 0
        if state is not None and due and ranks.first:
            trainer.save(state, extra())
        if halt and not trainer.done:
            raise KeyboardInterrupt
    lora = trainer.meta_lora()
    chosen = trainer.iteration
    if best is not None:
        chosen = best[0]
        with torch.no_grad():
            own = lora.tensors() if config.learn != "backbone" else trainer.parameters
            for tensor, value in zip(own, best[2], strict=True):
                tensor.copy_(value)
    return MetaResult(lora, trainer.vit.requires_grad_(False), chosen, validation)

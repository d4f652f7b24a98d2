"""Live curves of a run: each line of metrics also to TensorBoard or Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

OnMetrics = Callable[[str, int, Mapping[str, float]], None]
"""Takes a stage's name, its step, and values by name."""

KINDS = ("tensorboard", "wandb")


def check_log(kinds: Sequence[str]) -> None:
    """Raise unless every destination can be written to.

    Raises:
        ImportError: its library is not installed.
        ValueError: no such destination.

    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"log: expected {' or '.join(KINDS)}, got {kind!r}")
        if importlib.util.find_spec(kind) is None:
            raise ImportError(
                f'log: {kind} is not installed; pip install "fastrecycle[{kind}]", or leave out'
                f" --log {kind} (metrics.jsonl and fastrecycle report have the same values)"
            )


@contextmanager
def live_curves(kinds: Sequence[str], folder: str | Path) -> Iterator[OnMetrics | None]:
    """Destinations of a run's metrics, closed at the end; None where there are none.

    Args:
        kinds: of `KINDS`.
        folder: the run's own; TensorBoard's files go to its folder tensorboard, one a stage.

    Raises:
        ImportError, ValueError: see `check_log`.

    """
    check_log(kinds)
    with ExitStack() as stack:
        open_kind = {"tensorboard": _tensorboard, "wandb": _wandb}
        opened = [
            stack.enter_context(open_kind[kind](Path(folder))) for kind in dict.fromkeys(kinds)
        ]

        def on_metrics(stage: str, step: int, values: Mapping[str, float]) -> None:
            for write in opened:
                write(stage, step, values)

        yield on_metrics if opened else None


@contextmanager
def _tensorboard(folder: Path) -> Iterator[OnMetrics]:
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, Any] = {}

    def write(stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in writers:
            # a resumed run writes steps again that a kill cut off: TensorBoard hides the old ones
            where = str(folder / "tensorboard" / stage)
            writers[stage] = SummaryWriter(where, purge_step=step, flush_secs=10)
        for name, value in values.items():
            writers[stage].add_scalar(f"{stage}/{name}", value, step)

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()


@contextmanager
def _wandb(folder: Path) -> Iterator[OnMetrics]:
    import wandb

    runs: list[Any] = []

    def write(stage: str, step: int, values: Mapping[str, float]) -> None:
        if not runs:  # opened with the first values, when the folder is known to be this run's
            own = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            runs.append(
                wandb.init(
                    project="fastrecycle", name=folder.name, id=own, resume="allow", dir=str(folder)
                )
            )
        run = runs[0]
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        run.log(
            {f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step}
        )

    try:
        yield write
    finally:
        for run in runs:
            run.finish()

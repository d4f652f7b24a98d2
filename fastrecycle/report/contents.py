"""What a run's folder holds, read once for every kind of report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrecycle.inputs import same_inputs
from fastrecycle.pool import SyntheticPool
from fastrecycle.report.tables import (
    Evaluation,
    Metrics,
    is_number,
    metric_lines,
    read_evaluations,
    read_metrics,
)
from fastrecycle.run import read_manifest


@dataclass(frozen=True, eq=False)
class RunContents:
    """A run's folder, read."""

    folder: Path
    manifests: Mapping[str, dict[str, Any]]  # by path below the folder; at least one
    metrics: Metrics
    seconds: Mapping[str, float]  # of each stage, from its first line of metrics to its last
    pool: SyntheticPool | None
    evaluations: tuple[Evaluation, ...]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def manifest(self) -> dict[str, Any]:
        """That of the whole run."""
        return next(iter(self.manifests.values()))

    def setting(self, stage: str, name: str, default: Any = None) -> Any:
        """A value of a stage's settings, of whichever manifest has it."""
        for manifest in self.manifests.values():
            found = manifest.get("config", {}).get(stage, {})
            if isinstance(found, dict) and name in found:
                return found[name]
        return default

    def input(self, name: str) -> dict[str, Any]:
        """What the manifests say of an input; empty where they say nothing."""
        for manifest in self.manifests.values():
            found = manifest.get("inputs", {}).get(name)
            if isinstance(found, dict):
                return found
        return {}

    @property
    def without_prior(self) -> bool:
        """Whether its images were made without R_BN."""
        if self.setting("inversion", "alpha") is None:
            return False
        return self.setting("inversion", "alpha") == 0 or self.input("prior") == {"source": "none"}


def read_run(run: str | Path, *, pool: bool = True) -> RunContents:
    """Read what a run wrote into its folder.

    Args:
        run: the --out folder of pretune, invert, meta-train, recycle or demo.
        pool: whether to read the synthetic images too.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that a run writes.
        ValueError: a file of it is damaged.

    """
    run = Path(run)
    files = [p for p in (run / "run.json", *sorted(run.glob("*/run.json"))) if p.is_file()]
    if not files:
        what = "no run.json in it" if run.is_dir() else "no such folder"
        raise FileNotFoundError(f"{run}: {what}; expected the --out folder of a run")
    metrics: Metrics = {}
    seconds: dict[str, float] = {}
    for file in (run / "metrics.jsonl", *sorted(run.glob("*/metrics.jsonl"))):
        if file.is_file():
            metrics |= read_metrics(file)
            times: dict[str, list[float]] = {}
            for line in metric_lines(file):
                times.setdefault(line["stage"], []).append(line.get("time", 0.0))
            seconds |= {stage: max(of) - min(of) for stage, of in times.items()}
    found = pool_folder(run) if pool else None
    return RunContents(
        folder=run,
        manifests={file.relative_to(run).as_posix(): _manifest(file) for file in files},
        metrics=metrics,
        seconds=seconds,
        pool=None if found is None else SyntheticPool.load(found),
        evaluations=tuple(read_evaluations(run)),
    )


# settings that a page counts with, and their ranges
_SETTINGS = {
    ("inversion", "alpha"): (-1e30, 1e30),
    ("inversion", "iterations"): (0, 1e30),
    ("inversion", "images_per_class"): (0, 1e30),
    ("meta", "steps"): (0, 1e30),
    ("meta", "sparsity"): (0, 1),
}


def _manifest(file: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        ValueError: it is no manifest, or says what no run writes.

    """
    manifest = read_manifest(file)
    wrong = _settings_problem(manifest.get("config", {})) or _inputs_problem(
        manifest.get("inputs", {})
    )
    if wrong:
        raise ValueError(f"{file}: expected a run's manifest, {wrong}; it is damaged")
    return manifest


def _settings_problem(config: dict[str, Any]) -> str | None:
    for (stage, name), (least, most) in _SETTINGS.items():
        of = config.get(stage)
        value = of.get(name) if isinstance(of, dict) else None
        if value is not None and not is_number(value, least, most):
            return f"{stage}.{name} must be a number in [{least:g}, {most:g}], got {value!r:.40}"
    of = config.get("inversion")
    prune = (of.get("prune") if isinstance(of, dict) else None) or {}
    if not isinstance(prune, dict) or not all(
        re.fullmatch("[0-9]{1,4}", block) and is_number(share, 0, 1)
        for block, share in prune.items()
    ):
        return f"inversion.prune must be {{block: share in [0, 1]}}, got {prune!r:.40}"
    return None


def _inputs_problem(inputs: dict[str, Any]) -> str | None:
    for name, of in inputs.items():
        for key in ("source", "sha256"):
            if isinstance(of, dict) and not isinstance(of.get(key, ""), str):
                return f"inputs.{name}.{key} must be text, got {of[key]!r:.40}"
    if not isinstance(inputs.get("loras", []), list):
        return f"inputs.loras must be a list, got {inputs['loras']!r:.40}"
    return None


def pool_folder(run: Path) -> Path | None:
    """Where a run keeps its synthetic images; None: nowhere."""
    folders = (run, run / "pool")
    return next((f for f in folders if any(f.glob("task-*.safetensors"))), None)


def sibling_without_prior(run: RunContents) -> Path | None:
    """A folder beside the run's with images of the same LoRAs made without the prior."""
    if run.pool is None or run.without_prior:
        return None
    wanted = {name: run.input(name) for name in ("backbone", "bank")}
    for folder in sorted(run.folder.resolve().parent.iterdir()):
        if not (folder / "run.json").is_file() or folder == run.folder.resolve():
            continue
        try:
            other = read_run(folder, pool=False)
        except (OSError, ValueError, KeyError):  # a stranger's folder is no business of this run
            continue
        same = same_inputs(wanted, {name: other.input(name) for name in wanted})
        if other.without_prior and same and pool_folder(folder) is not None:
            return folder
    return None

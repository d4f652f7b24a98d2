"""A run's folder: manifest, metrics, progress bar, and a stop that loses nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import fastrecycle
from fastrecycle.files import read_json, remove_unfinished, write_json
from fastrecycle.inputs import same_inputs


def versions() -> dict[str, str]:
    """Versions of everything that could change a result."""
    found = {
        "fastrecycle": fastrecycle.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def settings(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def read_manifest(path: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it is no manifest.

    """
    manifest = read_json(path)
    tables = ("config", "inputs", "versions")
    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(key, {}), dict) for key in tables
    ):
        raise ValueError(
            f"{path}: expected a run's manifest, an object with {', '.join(tables)} as objects; it"
            " is damaged or another program's"
        )
    return manifest


class RunFolder:
    """Where a run writes its manifest and metrics; opened again, it must be the same run.

    Raises:
        ValueError: the folder holds a run with other settings.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.json"
        if path.exists():
            old, new = read_manifest(path), json.loads(json.dumps(manifest, default=str))
            changed = [key for key in ("config", "seed") if old.get(key) != new.get(key)]
            if not same_inputs(old.get("inputs", {}), new.get("inputs", {})):
                changed.append("input")
            if changed:
                raise ValueError(
                    f"{self.folder}: holds a run with another {' and '.join(changed)}; go on with"
                    " the same settings, or choose another folder"
                )
        else:
            write_json(path, {**manifest, "versions": versions()})
        # a run writes into folders below its own too, such as meta_lora
        for place in (self.folder, *(p for p in self.folder.iterdir() if p.is_dir())):
            remove_unfinished(place)
        self.log = self.folder / "metrics.jsonl"
        if self.log.exists():
            # a full disk may have cut the last line short
            whole = self.log.read_bytes().rpartition(b"\n")
            os.truncate(self.log, len(whole[0] + whole[1]))

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        if values:
            line = json.dumps({"stage": stage, "step": step, "time": time.time(), **values})
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")


@contextmanager
def progress(
    title: str, total: int, *, unit: str = "it", quiet: bool = False
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A progress bar with rate and ETA; yields `update(done, values)`."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc=title, unit=unit, file=sys.stderr, disable=quiet, dynamic_ncols=True,
        mininterval=0.5,
    ) as bar:  # fmt: skip

        def update(done: int, values: dict[str, float]) -> None:
            if values:
                bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            bar.update(done - bar.n)

        yield update


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C (and SIGTERM) ask to stop after the step under way; a second Ctrl-C stops at once.

    Yields a function that tells whether to stop. Outside the main thread, signals are left alone.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nstopping after this step; again to stop at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

"""Results of stages on disk, each under the key of its recipe; complete, resumable or absent.

    stages/KEY/       a bank, pool, meta-LoRA or model: large, may stay where it was made
    done/KEY.json     recipe, seconds and work of a finished stage; choices and scores live here
    claims/KEY.lock   held by the process that makes a stage, so that several share one store
    plans/TABLE-SCALE.json  which score stands in which cell of a table

A table is rendered from done/ and plans/ alone, some kilobytes a cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from fastrecycle.files import write_json
from fastrecycle.tables.reading import read_plan, read_record


class Store:
    """A folder of finished stages; see above.

    Args:
        root: of the store; made where it is absent.

    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def folder(self, key: str) -> Path:
        """Where a stage keeps its files, finished or not."""
        return self.root / "stages" / key

    def record(self, key: str) -> Any | None:
        """What a finished stage left; None: it is not finished.

        Raises:
            ValueError: a damaged record.

        """
        path = self.root / "done" / f"{key}.json"
        return read_record(path) if path.is_file() else None

    def has(self, key: str) -> bool:
        """Whether a stage is finished and its files, where it has any, are here."""
        whole = key.startswith(("choice-", "score-")) or self.folder(key).is_dir()
        return whole and (self.root / "done" / f"{key}.json").is_file()

    def claim(self, key: str, timeout: float | None = None) -> FileLock:
        """The lock under which one process at a time makes a stage; a killed one lets go.

        Args:
            key: of the stage.
            timeout: seconds to wait for another process; None waits for as long as it takes.
                Past it entering the lock raises `filelock.Timeout`.

        """
        path = self.root / "claims" / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path, timeout=-1 if timeout is None else timeout)

    def finish(self, key: str, record: dict[str, Any]) -> None:
        """Note that a stage is finished, last of all."""
        write_json(self.root / "done" / f"{key}.json", record)

    def records(self) -> list[Any]:
        """Of all finished stages.

        Raises:
            ValueError: a damaged one.

        """
        return [read_record(path) for path in sorted((self.root / "done").glob("*.json"))]

    def plan(self, table: str, scale: str) -> Any | None:
        """The plan of a table at a scale; None: it was never run here.

        Raises:
            ValueError: a damaged plan.

        """
        path = self._plan(table, scale)
        return read_plan(path) if path.is_file() else None

    def save_plan(self, plan: Mapping[str, Any]) -> None:
        """Write the plan of a table."""
        write_json(self._plan(plan["table"], plan["scale"]), plan)

    def _plan(self, table: str, scale: str) -> Path:
        return self.root / "plans" / f"{table}-{scale}.json"

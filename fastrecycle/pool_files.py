"""A synthetic pool on disk: one safetensors file a LoRA, an index, and reading by memory map.

A file is whole or absent, and holds all that the index says of it: the index only saves opening a
hundred thousand files, and is made again where it is missing or behind.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from fastrecycle.files import (
    Folder,
    load_safetensors,
    parse_json,
    safetensors_content,
    save_safetensors,
    tensors_sha256,
)

INDEX = "pool.json"
_VERSION = 2
_OPEN = 256  # files mapped at once; Linux allows a process 65,530 maps
_NEEDED = {"images", "labels", "order", "teacher_logits"}


@dataclass(frozen=True)
class TaskImages:
    """The images inverted from one LoRA; one file of a saved pool."""

    task: int  # index of the LoRA in its bank
    images: Tensor  # (m, 3, S, S) uint8 pixels
    labels: Tensor  # (m,) int64, rows of the LoRA's head
    order: Tensor  # (m, n) int64, all patches, the survivors of pruning first, best first
    survivors: int  # k, patches that pruning left
    teacher_logits: Tensor  # (m, classes) float32, of the LoRA's own network on these images
    class_names: tuple[str, ...] | None = None
    name: str | None = None
    # (classes, features) float32: the LoRA's head, where that is its class texts (scale included)
    text: Tensor | None = None

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of everything in it."""
        said = f"{self.task} {self.survivors} {self.class_names} {self.name}"
        tensors = [(said, self.images), ("labels", self.labels.int())]
        tensors += [("order", self.order.int()), ("teacher_logits", self.teacher_logits)]
        tensors += [] if self.text is None else [("text", self.text)]
        return tensors_sha256(tensors)

    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of its file."""
        meta = {"task": self.task, "class_names": self.class_names, "name": self.name,
                "survivors": self.survivors, "digest": self.digest}  # fmt: skip
        tensors = {
            "images": self.images,
            "labels": self.labels.to(torch.int32),
            "order": self.order.to(torch.int32),
            "teacher_logits": self.teacher_logits,
        }
        if self.text is not None:
            tensors["text"] = self.text
        return tensors, {"fastrecycle.task": json.dumps(meta)}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        save_safetensors(path, *self.content())

    @staticmethod
    def load(path: str | Path) -> TaskImages:
        """Read such a file; its images stay on disk until they are used.

        Raises:
            FileNotFoundError, ValueError: absent or damaged, or not part of a pool.

        """
        tensors, metadata = load_safetensors(path)
        if "fastrecycle.task" not in metadata or not set(tensors) >= _NEEDED:
            raise ValueError(f"{path}: not a file of a synthetic pool; expected {sorted(_NEEDED)}")
        meta = parse_json(metadata["fastrecycle.task"], f"{path}: fastrecycle.task must be JSON")
        wrong = _task_problem(meta) or _tensors_problem(tensors, meta)
        if wrong:
            raise ValueError(f"{path}: not a file of a synthetic pool; {wrong}")
        names = meta["class_names"]
        part = TaskImages(
            task=meta["task"],
            images=tensors["images"],
            labels=tensors["labels"].long(),
            order=tensors["order"].long(),
            survivors=meta["survivors"],
            teacher_logits=tensors["teacher_logits"],
            class_names=tuple(names) if names else None,
            name=meta["name"],
            text=tensors.get("text"),
        )
        if "digest" in meta:  # reckoned when it was written
            part.__dict__["digest"] = meta["digest"]
        return part


def _task_problem(meta: Any) -> str | None:
    """What is wrong with a file's description, where something is."""
    if not isinstance(meta, dict):
        return f"its description must be a table, got {type(meta).__name__}"
    for key in ("task", "survivors"):
        if type(meta.get(key)) is not int or not 0 <= meta[key] < 2**31:
            return f"{key} must be a count, got {meta.get(key)!r}"
    if not isinstance(meta.get("name", 0), str | None):
        return f"name must be text or null, got {meta.get('name')!r}"
    if not isinstance(meta.get("digest", ""), str):
        return f"digest must be text, got {meta['digest']!r}"
    names = meta.get("class_names", 0)
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        return f"class_names must be a list of texts or null, got {names!r}"
    return None


def _tensors_problem(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str | None:
    """What is wrong with a file's tensors, where something is."""
    images, labels, order, logits = (
        tensors[name] for name in ("images", "labels", "order", "teacher_logits")
    )
    m = len(images) if images.ndim else 0
    if images.dtype != torch.uint8 or images.shape[1:] != (3, images.shape[-1], images.shape[-1]):
        return f"images must be (m, 3, S, S) uint8, got {tuple(images.shape)} {images.dtype}"
    whole = {torch.int32, torch.int64}
    if labels.shape != (m,) or labels.dtype not in whole or not m:
        return f"labels must be ({m},) integers, got {tuple(labels.shape)} {labels.dtype}"
    if logits.ndim != 2 or len(logits) != m or not logits.is_floating_point():
        return f"teacher_logits must be ({m}, classes) floats, got {tuple(logits.shape)}"
    classes = logits.shape[1]
    if not torch.isfinite(logits).all():
        return "teacher_logits hold NaN or infinity"
    if labels.min() < 0 or labels.max() >= classes:
        return f"labels must be in [0, {classes})"
    if meta["class_names"] and len(meta["class_names"]) != classes:
        return f"{len(meta['class_names'])} class names for {classes} classes"
    if order.ndim != 2 or len(order) != m or order.dtype not in whole:
        return f"order must be ({m}, n) integers, got {tuple(order.shape)} {order.dtype}"
    text = tensors.get("text")
    if text is not None and not (
        text.ndim == 2 and len(text) == classes and torch.isfinite(text).all()
    ):
        return f"text must be ({classes}, features) numbers, got {tuple(text.shape)}"
    n = order.shape[1]
    if not 1 <= meta["survivors"] <= n:
        return f"survivors must be in [1, {n}], got {meta['survivors']}"
    if not torch.equal(order.sort(1).values.long(), torch.arange(n).expand(m, n)):
        return f"each row of order must hold 0 to {n - 1} once"
    return None


@dataclass(frozen=True)
class Entry:
    """What a pool must know of a LoRA's images without opening their file."""

    task: int
    name: str | None
    class_names: tuple[str, ...] | None
    runs: tuple[tuple[int, int], ...]  # (label, images) one after the other
    classes: int  # of the teacher's head
    side: int  # pixels
    patches: int
    survivors: int
    text: bool  # whether the head is class texts
    digest: str
    bytes: int  # of the file; 0: none

    @staticmethod
    def of(part: TaskImages, size: int = 0) -> Entry:
        """Of images at hand."""
        values, counts = torch.unique_consecutive(part.labels, return_counts=True)
        return Entry(
            part.task, part.name, part.class_names,
            tuple(zip(values.tolist(), counts.tolist(), strict=True)),
            part.teacher_logits.shape[1], part.images.shape[-1], part.order.shape[1],
            part.survivors, part.text is not None, part.digest if size else "", size,
        )  # fmt: skip

    @staticmethod
    def read(value: Any) -> Entry:
        """From the index.

        Raises:
            ValueError: it says what no file can hold.

        """
        known = {field.name for field in fields(Entry)}
        if not isinstance(value, dict) or set(value) != known:
            raise ValueError(f"expected parts of {', '.join(sorted(known))}; got {value!r:.80}")
        wrong = _task_problem(value) or _entry_problem(value)
        if wrong:
            raise ValueError(f"part {value['task']!r:.20}: {wrong}")
        names, runs = value["class_names"], tuple(map(tuple, value["runs"]))
        return Entry(**{**value, "class_names": tuple(names) if names else None, "runs": runs})

    @property
    def images(self) -> int:
        """Images of this LoRA."""
        return sum(count for _, count in self.runs)


def _entry_problem(value: Mapping[str, Any]) -> str | None:
    """What is wrong with the numbers of an index's entry, where something is."""
    for key in ("classes", "side", "patches", "survivors", "bytes"):
        if type(value[key]) is not int or not 0 < value[key] < 2**63:
            return f"{key} must be a count, got {value[key]!r:.20}"
    runs, classes, names = value["runs"], value["classes"], value["class_names"]
    if not isinstance(runs, list) or not runs:
        return f"runs must be a list of [label, images], got {runs!r:.40}"
    for run in runs:
        if not isinstance(run, list) or [type(x) for x in run] != [int, int]:
            return f"runs must be a list of [label, images], got {run!r:.40}"
        if not (0 <= run[0] < classes and run[1] > 0):
            return f"runs must have labels in [0, {classes}) and images, got {run}"
    if names and len(names) != classes:
        return f"{len(names)} class names for {classes} classes"
    if value["survivors"] > value["patches"]:
        return f"survivors must be in [1, {value['patches']}], got {value['survivors']}"
    if type(value["text"]) is not bool:
        return f"text must be true or false, got {value['text']!r:.20}"
    # memory is taken by what the index says: no more than the file has bytes for
    images = sum(count for _, count in runs)
    least = images * (3 * value["side"] ** 2 + 4 * value["patches"] + 4 + classes)
    if least > value["bytes"]:
        return f"{images} images cannot lie in {value['bytes']} bytes"
    return None


def task_file(folder: str | Path, task: int) -> Path:
    """Where a saved pool keeps the images of one LoRA."""
    return Path(folder) / task_name(task)


def task_name(task: int) -> str:
    """Name of that file."""
    return f"task-{task:06d}.safetensors"


def _task_of(name: str) -> int | None:
    found = re.fullmatch(r"task-([0-9]{6,10})\.safetensors", name)
    task = None if found is None else int(found[1])
    return task if task is not None and task_name(task) == name else None


class PoolFiles(Sequence[TaskImages]):
    """The files of a saved pool, each opened (by memory map) when it is asked for.

    Args:
        folder: a folder, or a URL of any file system that `fsspec` knows, whose files are first
            copied into a local cache.

    Raises:
        ValueError: a file is damaged, or not part of a pool.

    """

    def __init__(self, folder: str | Path):
        self.folder = Folder(folder)
        self._open: OrderedDict[int, TaskImages] = OrderedDict()
        self._indexed = 0  # files that the index on disk knows; -1: it may say what is not so
        self._by_task: dict[int, Entry] = {}
        self.refresh()

    @staticmethod
    def beginning(folder: str | Path) -> PoolFiles:
        """A pool to be written, whatever files of those names are there."""
        new = object.__new__(PoolFiles)
        new.folder, new._open, new._indexed, new._by_task = Folder(folder), OrderedDict(), -1, {}
        return new

    def refresh(self) -> None:
        """Learn of files that were written since, by whomever."""
        sizes = {
            t: n for name, n in self.folder.sizes().items() if (t := _task_of(name)) is not None
        }
        known = self._by_task
        if not known and sizes:
            try:
                index = self.folder.read_json(INDEX, {})
                if isinstance(index, dict) and index.get("version") == _VERSION:
                    known = {e.task: e for e in map(Entry.read, index["parts"])}
                    self._indexed = len(known)
            except (LookupError, TypeError, ValueError) as error:
                raise self._damaged(str(error)) from None
        self._by_task = {}
        for task, size in sorted(sizes.items()):
            entry = known.get(task)
            if entry is None or entry.bytes != size:
                entry = Entry.of(self._read(task), size)
            self._by_task[task] = entry

    def _damaged(self, why: str) -> ValueError:
        return ValueError(
            f"{self.folder.location}/{INDEX}: a damaged index ({why}); remove it, and it is made"
            " again"
        )

    def _read(self, task: int) -> TaskImages:
        path = self.folder.local(task_name(task))
        part = TaskImages.load(path)
        if part.task != task:
            raise ValueError(f"{path}: holds the images of task {part.task}; give it its own name")
        return part

    @property
    def entries(self) -> list[Entry]:
        """What is known of each file, in the order of tasks."""
        return list(self._by_task.values())

    def has(self, tasks: Iterable[int]) -> bool:
        """Whether the images of all these LoRAs are there."""
        return all(task in self._by_task for task in tasks)

    def write(self, parts: Sequence[TaskImages]) -> None:
        """Write the images of some LoRAs, and the index where it falls behind.

        Raises:
            OSError: it cannot be written, or the disk is full.

        """
        if self._indexed < 0 or any(part.task in self._by_task for part in parts):
            # a kill in between must leave no index that says other things than the new files
            for part in parts:
                self._by_task.pop(part.task, None)
            self._indexed = -1
            self.write_index()
        for part in parts:
            content = safetensors_content(*part.content())
            self.folder.write(task_name(part.task), content)
            self._open.pop(part.task, None)
            self._by_task[part.task] = Entry.of(part, len(content))
        self._by_task = dict(sorted(self._by_task.items()))
        # at every write in small pools; in large ones that would write more index than images
        if len(self._by_task) - self._indexed > self._indexed // 50:
            self.write_index()

    def write_index(self) -> None:
        """Write pool.json, so that later readers need not open every file."""
        if self._indexed == len(self._by_task):
            return
        value = {"version": _VERSION, "parts": [asdict(e) for e in self._by_task.values()]}
        self.folder.write(INDEX, json.dumps(value).encode())
        self._indexed = len(self._by_task)

    def task(self, task: int) -> TaskImages:
        """The images of one LoRA, by its index in the bank.

        Raises:
            KeyError: they are not there.
            ValueError: their file is damaged, or the index says other things of it.

        """
        if task not in self._by_task:
            raise KeyError(task)
        if task not in self._open:
            while len(self._open) >= _OPEN:
                self._open.popitem(last=False)
            part, entry = self._read(task), self._by_task[task]
            if Entry.of(part, entry.bytes) != entry:
                raise self._damaged(f"it says other things of {task_name(task)} than that file")
            self._open[task] = part
        self._open.move_to_end(task)
        return self._open[task]

    def only(self, tasks: Iterable[int]) -> PoolFiles:
        """The same files, some LoRAs of them."""
        chosen = set(tasks)
        other = PoolFiles.beginning(self.folder.location)
        other._by_task = {t: e for t, e in self._by_task.items() if t in chosen}
        return other

    def __len__(self) -> int:
        return len(self._by_task)

    @overload
    def __getitem__(self, i: int) -> TaskImages: ...
    @overload
    def __getitem__(self, i: slice) -> PoolFiles: ...
    def __getitem__(self, i: int | slice) -> TaskImages | PoolFiles:
        tasks = list(self._by_task)
        return self.only(tasks[i]) if isinstance(i, slice) else self.task(tasks[i])

    def __iter__(self) -> Iterator[TaskImages]:
        return (self.task(task) for task in list(self._by_task))

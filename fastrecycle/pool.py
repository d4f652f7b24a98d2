"""The synthetic pool: images made from LoRAs, with what meta-training needs to know of them.

M images of G LoRAs, S side, n patches, k of them surviving, C classes of the largest head.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrecycle.files import load_safetensors, save_safetensors
from fastrecycle.pruning import kept_count

log = logging.getLogger(__name__)


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

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        meta = {"task": self.task, "class_names": self.class_names, "name": self.name,
                "survivors": self.survivors}  # fmt: skip
        tensors = {
            "images": self.images,
            "labels": self.labels.to(torch.int32),
            "order": self.order.to(torch.int32),
            "teacher_logits": self.teacher_logits,
        }
        if self.text is not None:
            tensors["text"] = self.text
        save_safetensors(path, tensors, {"fastrecycle.task": json.dumps(meta)})

    @staticmethod
    def load(path: str | Path) -> TaskImages:
        """Read such a file.

        Raises:
            FileNotFoundError, ValueError: absent or damaged, or not part of a pool.

        """
        tensors, metadata = load_safetensors(path)
        needed = {"images", "labels", "order", "teacher_logits"}
        if "fastrecycle.task" not in metadata or not needed <= set(tensors):
            raise ValueError(f"{path}: not a file of a synthetic pool; expected {sorted(needed)}")
        meta = json.loads(metadata["fastrecycle.task"])
        names = meta["class_names"]
        return TaskImages(
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


class SyntheticPool:
    """Images of many LoRAs. Rows of one LoRA are consecutive and class-major.

    Attributes:
        images: (M, 3, S, S) uint8 pixels.
        labels: (M,) int64, row of the own LoRA's head.
        tasks: (M,) int64, position of the LoRA in this pool.
        order: (M, n) int64, all patches: those that survived pruning first, each part by the last
            block's CLS attention, the most important first.
        kept: (M, k) int64, the patches that survived pruning, ascending.
        teacher_logits: (M, C) float32, -inf where a LoRA's head has fewer than C classes.
        classes: (M,) int64: which class an image shows, over all LoRAs. By name where the bank has
            names; otherwise every LoRA's labels are classes of their own.
        class_names: a name for each value of `classes`.
        text: (rows, features) float32, the class texts of all LoRAs one after the other, scale
            included; None where a LoRA has another head.
        text_rows: (M,) int64, the row of `text` of each image's class.

    """

    def __init__(self, parts: Sequence[TaskImages]):
        if not parts:
            raise ValueError("SyntheticPool: expected images of at least one LoRA, got none")
        sides = {p.images.shape[-1] for p in parts}
        kept = {p.survivors for p in parts}
        if len(sides) > 1 or len(kept) > 1:
            raise ValueError(
                "SyntheticPool: images of one size and one number of kept patches expected, got"
                f" sides {sorted(sides)} and {sorted(kept)} patches"
            )
        self.parts = tuple(parts)
        self.order = torch.cat([p.order for p in parts])
        self.patches, self.survivors = self.order.shape[1], parts[0].survivors
        self.kept = self.order[:, : self.survivors].sort(dim=1).values
        self.images = torch.cat([p.images for p in parts])
        self.labels = torch.cat([p.labels for p in parts])
        self.tasks = torch.cat([torch.full_like(p.labels, i) for i, p in enumerate(parts)])
        widest = max(p.teacher_logits.shape[1] for p in parts)
        self.teacher_logits = torch.cat(
            [
                torch.nn.functional.pad(
                    p.teacher_logits, (0, widest - p.teacher_logits.shape[1]), value=-torch.inf
                )
                for p in parts
            ]
        )
        offsets = np.cumsum([0, *(p.teacher_logits.shape[1] for p in parts)])[:-1]
        self.text_rows = self.labels + torch.from_numpy(offsets)[self.tasks]
        texts = [p.text for p in parts if p.text is not None]
        self.text = torch.cat(texts) if len(texts) == len(parts) else None
        self.has_names = all(p.class_names is not None for p in parts)
        ids: dict[str, int] = {}
        classes = []
        for i, part in enumerate(parts):
            names = part.class_names if self.has_names else None
            for label in part.labels.tolist():
                name = f"LoRA {i} class {label}" if names is None else names[label]
                classes.append(ids.setdefault(name, len(ids)))
        self.classes = torch.tensor(classes)
        self.class_names = tuple(ids)
        if not self.has_names and len(parts) > 1:
            log.warning(
                "some LoRAs have no class names: in interpolated tasks each LoRA's labels count as"
                " classes of their own, so the same class from two LoRAs may face itself"
            )

    def __len__(self) -> int:
        return len(self.images)

    def keep(self, sparsity: float) -> Tensor:
        """The patches left at a sparsity, ascending: (M, k) int64.

        Raises:
            ValueError: inversion left fewer patches than that.

        """
        count = kept_count(self.patches, sparsity)
        if count > self.survivors:
            raise ValueError(
                f"sparsity: {sparsity} asks for {count} of {self.patches} patches, but inversion"
                f" pruned down to {self.survivors}; use at least"
                f" {1 - self.survivors / self.patches:.2f}"
            )
        return self.order[:, :count].sort(dim=1).values

    def save(self, folder: str | Path) -> None:
        """Write one safetensors file a LoRA.

        Raises:
            FileExistsError: the folder holds images of other LoRAs, which `load` would mix in.
            OSError: it cannot be written.

        """
        files = {task_file(folder, part.task) for part in self.parts}
        others = sorted(f.name for f in set(Path(folder).glob("task-*.safetensors")) - files)
        if others:
            raise FileExistsError(
                f"{folder}: already holds another pool ({others[0]}, ...); choose an empty folder"
            )
        for part in self.parts:
            part.save(task_file(folder, part.task))

    @staticmethod
    def load(folder: str | Path) -> SyntheticPool:
        """Read a saved pool.

        Raises:
            FileNotFoundError: no pool there.
            ValueError: a file of it is damaged.

        """
        files = sorted(Path(folder).glob("task-*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: no synthetic pool (task-*.safetensors) there")
        return SyntheticPool([TaskImages.load(f) for f in files])


def task_file(folder: str | Path, task: int) -> Path:
    """Where a saved pool keeps the images of one LoRA."""
    return Path(folder) / f"task-{task:06d}.safetensors"

"""The synthetic pool: images made from LoRAs, with what meta-training needs to know of them.

M images of G LoRAs, S side, n patches, k of them surviving, C classes of the largest head.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrecycle.files import Folder
from fastrecycle.pool_files import Entry, PoolFiles, TaskImages, task_file
from fastrecycle.pruning import kept_count

__all__ = ["SyntheticPool", "TaskImages", "task_file"]

log = logging.getLogger(__name__)


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
        self.mapped = isinstance(parts, PoolFiles)
        self.parts: Sequence[TaskImages] = parts if self.mapped else tuple(parts)
        entries = parts.entries if isinstance(parts, PoolFiles) else [Entry.of(p) for p in parts]
        sides, kept = {e.side for e in entries}, {e.survivors for e in entries}
        if len(sides) > 1 or len(kept) > 1:
            raise ValueError(
                "SyntheticPool: images of one size and one number of kept patches expected, got"
                f" sides {sorted(sides)} and {sorted(kept)} patches"
            )
        self.side, self.patches, self.survivors = entries[0].side, entries[0].patches, kept.pop()
        self.widest = max(e.classes for e in entries)
        counts = torch.tensor([e.images for e in entries])
        self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).numpy()
        self.tasks = torch.arange(len(entries)).repeat_interleave(counts)
        runs = [run for e in entries for run in e.runs]
        lengths = torch.tensor([count for _, count in runs])
        self.labels = torch.tensor([label for label, _ in runs]).repeat_interleave(lengths)
        offsets = np.cumsum([0, *(e.classes for e in entries)])[:-1]
        self.text_rows = self.labels + torch.from_numpy(offsets)[self.tasks]
        self.has_text = all(e.text for e in entries)
        self.has_names = all(e.class_names is not None for e in entries)
        ids: dict[str, int] = {}
        shown = []
        for i, entry in enumerate(entries):
            names = entry.class_names if self.has_names else None
            for label, _ in entry.runs:
                name = f"LoRA {i} class {label}" if names is None else names[label]
                shown.append(ids.setdefault(name, len(ids)))
        self.classes = torch.tensor(shown).repeat_interleave(lengths)
        self.class_names = tuple(ids)
        if not self.has_names and len(entries) > 1:
            log.warning(
                "some LoRAs have no class names: in interpolated tasks each LoRA's labels count as"
                " classes of their own, so the same class from two LoRAs may face itself"
            )

    @cached_property
    def text(self) -> Tensor | None:
        """(rows, features) float32; see above."""
        texts = [p.text for p in self.parts if p.text is not None] if self.has_text else []
        if len(widths := {x.shape[1] for x in texts}) > 1:
            raise ValueError(
                "SyntheticPool: class texts of one width expected, of one text tower; got"
                f" {sorted(widths)} features"
            )
        return torch.cat(texts) if texts else None

    @cached_property
    def images(self) -> Tensor:
        """(M, 3, S, S) uint8 pixels, all in memory; `gather` reads some."""
        return torch.cat([p.images for p in self.parts])

    @cached_property
    def order(self) -> Tensor:
        """(M, n) int64; see above."""
        return torch.cat([p.order for p in self.parts])

    @cached_property
    def kept(self) -> Tensor:
        """(M, k) int64; see above."""
        return self.order[:, : self.survivors].sort(dim=1).values

    @cached_property
    def teacher_logits(self) -> Tensor:
        """(M, C) float32; see above."""
        return torch.cat([self._padded(p.teacher_logits) for p in self.parts])

    def _padded(self, logits: Tensor) -> Tensor:
        missing = self.widest - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)

    @property
    def image_bytes(self) -> int:
        """Memory that all pixels take."""
        return 3 * self.side**2 * len(self)

    def gather(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Images, order and teacher logits of some rows (k,), in their order.

        Of a pool on disk only these are read.
        """
        images = torch.empty(len(rows), 3, self.side, self.side, dtype=torch.uint8)
        order = torch.empty(len(rows), self.patches, dtype=torch.int64)
        logits = torch.empty(len(rows), self.widest)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for i in np.unique(owner).tolist():
            part = self.parts[i]
            to = torch.from_numpy(np.flatnonzero(owner == i))
            of = torch.from_numpy(rows[owner == i] - self._starts[i])
            images[to], order[to] = part.images[of], part.order[of]
            logits[to] = self._padded(part.teacher_logits[of])
        return images, order, logits

    def __len__(self) -> int:
        return len(self.labels)

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
        """Write one safetensors file a LoRA, and an index.

        Args:
            folder: a folder, or a URL of any file system that `fsspec` knows.

        Raises:
            FileExistsError: the folder holds images of other LoRAs, which `load` would mix in.
            OSError: it cannot be written.

        """
        files = {task_file("", part.task).name for part in self.parts}
        there = Folder(folder).sizes()
        others = sorted(n for n in there if n.startswith("task-") and n not in files)
        if others:
            raise FileExistsError(
                f"{folder}: already holds another pool ({others[0]}, ...); choose an empty folder"
            )
        stored = PoolFiles.beginning(folder)
        for part in self.parts:
            stored.write([part])
        stored.write_index()

    @staticmethod
    def load(folder: str | Path) -> SyntheticPool:
        """A saved pool, of which images are read when they are used.

        Args:
            folder: see `save`.

        Raises:
            FileNotFoundError: no pool there.
            ValueError: a file of it is damaged.

        """
        stored = PoolFiles(folder)
        if not stored:
            raise FileNotFoundError(f"{folder}: no synthetic pool (task-*.safetensors) there")
        return SyntheticPool(stored)

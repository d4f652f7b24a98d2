"""Baselines that adapt the network itself: each task sees its images under weights of its own.

E tasks, W ways, n support images, Q queries in all, S side, F features.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import clone
from torch import Tensor

from fastrecycle.baselines.base import Baseline, Meter
from fastrecycle.classifier import Distance, as_batch, class_index, prototype_logits
from fastrecycle.data import Episodes
from fastrecycle.eval import Pixels, Progress
from fastrecycle.lora import LoRA, LoRABank, LoRAStack
from fastrecycle.ops import check_precision
from fastrecycle.vit import ViT

CPU_TASKS = 4  # at once: more gain nothing there
SHARE_OF_MEMORY = 0.8  # of what is free on a GPU; the rest is for what PyTorch cannot reuse


class Rule(ABC):
    """What classifies features once the network is adapted, and is trained along with it or not."""

    reads_support: bool  # whether `fitted` needs the support's features

    @abstractmethod
    def start(
        self, tasks: int, ways: int, features: int, device: torch.device
    ) -> dict[str, Tensor]:
        """What is trained, each (E, ...)."""

    @abstractmethod
    def parameters(self, ways: int, features: int) -> int:
        """Numbers trained for one task."""

    @abstractmethod
    def fitted(
        self, trained: dict[str, Tensor], support: Tensor | None, way: Tensor, ways: int
    ) -> dict[str, Tensor]:
        """What `logits` needs, from support features (E, n, F) with ways (n,)."""

    @abstractmethod
    def logits(self, rule: dict[str, Tensor], features: Tensor) -> Tensor:
        """(E, Q, F) -> (E, Q, W)."""


class LinearRule(Rule):
    """A linear head, trained. It starts at zero, so that nothing of it is random."""

    reads_support = False

    def start(
        self, tasks: int, ways: int, features: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Weights and biases, in float64 as `LinearProbe` has them, and for its reason."""
        zeros = torch.zeros(tasks, features + 1, ways, dtype=torch.float64, device=device)
        return {"weight": zeros[:, :-1].clone(), "bias": zeros[:, -1:].clone()}

    def parameters(self, ways: int, features: int) -> int:
        """Weights and biases."""
        return ways * (features + 1)

    def fitted(
        self, trained: dict[str, Tensor], support: Tensor | None, way: Tensor, ways: int
    ) -> dict[str, Tensor]:
        """The head itself."""
        return trained

    def logits(self, rule: dict[str, Tensor], features: Tensor) -> Tensor:
        """See `Rule.logits`."""
        return torch.baddbmm(rule["bias"], features.double(), rule["weight"])


@dataclass(frozen=True)
class PrototypeRule(Rule):
    """Nearest class centres of the support's features, as the network stands (Eq. 3b)."""

    distance: Distance = "euclidean"
    reads_support = True

    def start(
        self, tasks: int, ways: int, features: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def parameters(self, ways: int, features: int) -> int:
        """None."""
        return 0

    def fitted(
        self, trained: dict[str, Tensor], support: Tensor | None, way: Tensor, ways: int
    ) -> dict[str, Tensor]:
        """The centres, (E, W, F)."""
        assert support is not None
        support = support.to(torch.promote_types(support.dtype, torch.float32))
        member = (way == torch.arange(ways, device=way.device)[:, None]).to(support)  # (W, n)
        return {"centres": (member @ support) / member.sum(1, keepdim=True)}

    def logits(self, rule: dict[str, Tensor], features: Tensor) -> Tensor:
        """See `Rule.logits`."""
        return prototype_logits(rule["centres"], features, self.distance)


class Adapted(NamedTuple):
    """E adapted networks and their rules; the first axis of every tensor is the task."""

    network: dict[str, Tensor]
    rule: dict[str, Tensor]


class AdaptedNetwork(Baseline):
    """A baseline that adapts the network to each task, many tasks side by side in one batch.

    `fit` is the case of one task. A subclass says how, by `check`, `parameters`, `_adapt` and
    `_features`, has `steps` among its arguments, and declares these among its own:

    Args:
        vit: the backbone, never changed.
        batch_size: images a forward pass in `predict`; see `tasks` for what decides there.
        precision: "fp32" or "bf16": products in bf16, everything that is trained in float32.

    """

    vit: ViT
    batch_size: int
    precision: str
    rule: Rule

    def check(self) -> None:
        """Raise unless this method's parameters are in range.

        Raises:
            ValueError: one is not.

        """
        check_precision(self.precision, "reference", self._device)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {self.batch_size}")

    @abstractmethod
    def parameters(self, ways: int) -> int:
        """Numbers trained for one task."""

    @abstractmethod
    def _adapt(self, images: Tensor, way: Tensor, ways: int) -> Adapted:
        """Support images (E, n, 3, S, S), normalised, with ways (n,), the same for every task."""

    @abstractmethod
    def _features(self, network: dict[str, Tensor], images: Tensor) -> Tensor:
        """Features (E, n, F) of images (E, n, 3, S, S), each task's under its own network."""

    @property
    def _device(self) -> torch.device:
        return self.vit.pos_embed.device

    @torch.no_grad()
    def _logits(self, adapted: Adapted, images: Tensor) -> Tensor:
        return self.rule.logits(adapted.rule, self._features(adapted.network, images))

    def fit(self, images: Any, labels: Any) -> AdaptedNetwork:
        """Adapt to one task; see `Baseline.fit`."""
        self.check()
        images = as_batch(self.vit, images)
        self.classes_, index = class_index(labels, len(images))
        with Meter(self._device) as meter:
            way = torch.from_numpy(index).to(self._device)
            self.adapted_ = self._adapt(images[None].to(self._device), way, len(self.classes_))
        self._cost = meter.cost(self.parameters(len(self.classes_)))
        return self

    def decision_function(self, images: Any) -> np.ndarray:
        """See `Baseline.decision_function`."""
        self._check_fitted("adapted_")
        images = as_batch(self.vit, images)
        logits = [
            self._logits(self.adapted_, part[None].to(self._device))[0]
            for part in images.split(self.batch_size)
        ]
        return torch.cat(logits).float().cpu().numpy()

    def tasks(
        self,
        data: Pixels,
        tasks: Episodes,
        batch: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Adapt to many tasks, a batch of them side by side; each comes out as it would alone.

        A task whose training diverges has features that are not numbers, and all its guesses are
        the first way: chance. `cost` is then that of one of these tasks, its queries included.

        Args:
            data: decoded images, on any device.
            tasks: of indices into `data`, at least 2 ways and one query.
            batch: tasks at once. None: on CUDA as many as fit into free memory, found by adapting
                to one task with a single step; elsewhere 4. Halved, with a warning, when CUDA runs
                out of memory.
            progress: called with (tasks done, tasks in all).

        Returns:
            (T, Q) int64 on the CPU, the way of each query.

        Raises:
            ValueError: images of another size, fewer than 2 ways, no queries, or a parameter out
                of range.
            torch.OutOfMemoryError: one task alone does not fit.

        """
        self.check()
        side = self.vit.config.image_size
        if data.pixels.shape[1:] != (3, side, side):
            raise ValueError(
                f"data: expected pixels (N, 3, {side}, {side}), got {tuple(data.pixels.shape)};"
                " decode(vit, dataset) makes them"
            )
        if tasks.ways < 2 or tasks.queries < 1:
            raise ValueError(
                f"tasks: expected at least 2 ways and 1 query, got {tasks.ways} and {tasks.queries}"
            )
        if batch is not None and batch < 1:
            raise ValueError(f"batch: must be at least 1, got {batch}")
        batch = batch or self._batch(data, tasks)
        guesses: list[Tensor] = []
        done = 0
        with Meter(self._device) as meter:
            while done < len(tasks):
                guess = self._guess_if_it_fits(data, tasks, done, batch)
                if guess is None:
                    warnings.warn(
                        f"{type(self).__name__}: {batch} tasks at once ran out of memory; going on"
                        f" with {batch // 2}",
                        stacklevel=2,
                    )
                    batch //= 2
                    continue
                guesses.append(guess.cpu())
                done += len(guess)
                if progress is not None:
                    progress(done, len(tasks))
        self._cost = meter.cost(self.parameters(tasks.ways), tasks=len(tasks))
        return torch.cat(guesses)

    def _batch(self, data: Pixels, tasks: Episodes) -> int:
        """As many tasks as fit, in batches of one size."""
        if self._device.type != "cuda":
            return CPU_TASKS
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        clone(self).set_params(steps=1)._guess(data, tasks, 0, 1)
        used = torch.cuda.memory_allocated(self._device)
        one = torch.cuda.max_memory_allocated(self._device) - before
        reusable = torch.cuda.memory_reserved(self._device) - used
        free = torch.cuda.mem_get_info(self._device)[0] + reusable
        most = max(1, int(SHARE_OF_MEMORY * free / max(one, 1)))
        return math.ceil(len(tasks) / math.ceil(len(tasks) / most))

    def _guess_if_it_fits(
        self, data: Pixels, tasks: Episodes, start: int, count: int
    ) -> Tensor | None:
        """`_guess`; None where several tasks ran out of memory, and all of theirs is free again."""
        try:
            return self._guess(data, tasks, start, count)
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            return None

    def _guess(self, data: Pixels, tasks: Episodes, start: int, count: int) -> Tensor:
        """The ways of the queries of tasks start to start + count, (E, Q)."""
        chosen = slice(start, start + count)
        support, query = tasks.support[chosen], tasks.query[chosen]
        way = torch.from_numpy(tasks.support_ways).to(self._device)
        adapted = self._adapt(self._images(data, support), way, tasks.ways)
        # without gradients an image takes a small part of the memory that it takes in training
        columns = 4 * support.shape[1]
        parts = [
            self._logits(adapted, self._images(data, query[:, i : i + columns])).argmax(-1)
            for i in range(0, query.shape[1], columns)
        ]
        return torch.cat(parts, 1)

    def _images(self, data: Pixels, rows: np.ndarray) -> Tensor:
        """Normalised images (E, n, 3, S, S) of indices (E, n)."""
        index = torch.from_numpy(rows.ravel()).to(data.pixels.device)
        pixels = data.pixels[index].to(self._device).to(self.vit.pos_embed.dtype) / 255
        return self.vit.normalise(pixels).unflatten(0, rows.shape)


class OnBank:
    """A baseline with a bank of LoRAs, stacked once on the backbone's device."""

    vit: ViT
    bank: Sequence[LoRA]

    def _bank(self) -> LoRAStack:
        """The bank at the backbone's depth; made anew when a parameter was set to another.

        Raises:
            ValueError: LoRAs of another model.

        """
        like = self.vit.pos_embed
        known = getattr(self, "_stacked", None)
        if known is None or known[0] is not self.vit or known[1] is not self.bank:
            stack = LoRAStack.of(LoRABank(self.bank).fit(self.vit.config))
        else:
            stack = known[2]
        self._stacked = (self.vit, self.bank, stack.to(like))
        return self._stacked[2]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_stacked"}  # type: ignore

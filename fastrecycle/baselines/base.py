"""One interface for what LoRA Recycle is compared with: images in, labels out, costs recorded.

E tasks, W ways, K shots, Q queries in all, n images, F features.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from fastrecycle.classifier import FewShotClassifier, class_index
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.ops import Backend
from fastrecycle.vit import ViT

AverageOf = Literal["factors", "products"]


@dataclass(frozen=True)
class Cost:
    """What adapting to one task took."""

    seconds: float  # wall time a task
    peak_memory_bytes: int | None  # the most that PyTorch held on the CUDA device; None elsewhere
    parameters: int  # trained numbers a task


class Meter:
    """Wall time, and on CUDA the peak of memory, of what runs within `with Meter(device)`.

    Resets PyTorch's own record of the peak; one meter within another would cut the outer one's.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.peak_memory_bytes = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_memory_bytes = torch.cuda.max_memory_allocated(self.device)
        self.seconds = time.perf_counter() - self.start

    def cost(self, parameters: int, tasks: int = 1) -> Cost:
        """Of one of so many tasks."""
        return Cost(self.seconds / tasks, self.peak_memory_bytes, parameters)


class Baseline(ClassifierMixin, BaseEstimator, ABC):
    """A few-shot classifier of images with scikit-learn's conventions and its `cost`.

    `sklearn.base.clone` shares the backbone and LoRAs instead of copying them.
    """

    @abstractmethod
    def fit(self, images: Any, labels: Any) -> Baseline:
        """Adapt to one task.

        Args:
            images: a list of PIL images, or (n, 3, S, S) from `vit.transform`.
            labels: n labels of any sortable kind.

        Raises:
            TypeError, ValueError: not images, or another number of labels than of images.

        """

    @abstractmethod
    def decision_function(self, images: Any) -> np.ndarray:
        """Logits, (n, classes), columns as in `classes_`.

        Raises:
            NotFittedError: before `fit`.

        """

    def predict_proba(self, images: Any) -> np.ndarray:
        """Class probabilities, (n, classes), columns as in `classes_`."""
        return torch.from_numpy(self.decision_function(images)).softmax(-1).numpy()

    def predict(self, images: Any) -> np.ndarray:
        """The most probable label, (n,)."""
        likeliest = self.decision_function(images).argmax(-1)  # raises if not fitted
        return self.classes_[likeliest]

    @property
    def cost(self) -> Cost:
        """Of the last adaptation; reading images from disk is not in it.

        Raises:
            NotFittedError: nothing was adapted yet.

        """
        self._check_fitted("_cost")
        return self._cost

    def __sklearn_clone__(self) -> Baseline:
        return type(self)(**self.get_params(deep=False))

    def _check_fitted(self, attribute: str) -> None:
        if not hasattr(self, attribute):
            raise NotFittedError(f"{type(self).__name__}: call fit(support_images, labels) first")


class FrozenFeatures(Baseline):
    """A baseline that adapts a rule on features which stay as they are.

    One method adapts many tasks at once, of which `fit` is the case of one. A subclass says how,
    by `check`, `parameters`, `_adapt` and `_logits`, and declares these arguments among its own:

    Args:
        vit: the frozen backbone.
        bank: LoRAs whose average the backbone runs under ("LoRAs Avg"); None: the plain backbone.
        of: what is averaged: "factors", as the paper's baseline has it, or "products", for which
            ranks and targets may differ (see `LoRA.average`).
        batch_size: images a forward pass.
        precision: of the features: "fp32", "bf16" or "fp8", which needs the backend "triton".
        backend: "auto", "triton", "compile" or "reference": see `fastrecycle.ops`.

    """

    vit: ViT
    bank: Sequence[LoRA] | None
    of: AverageOf
    batch_size: int
    precision: str
    backend: Backend

    def check(self) -> None:
        """Raise unless this method's own parameters are in range.

        Raises:
            ValueError: one is not.

        """

    @abstractmethod
    def parameters(self, ways: int, features: int) -> int:
        """Numbers trained for one task."""

    @abstractmethod
    def _adapt(self, support: Tensor, index: Tensor, ways: int) -> tuple[Tensor, ...]:
        """Support (E, n, F) float32 with ways (n,), the same for every task -> E fitted rules."""

    @abstractmethod
    def _logits(self, rule: tuple[Tensor, ...], query: Tensor) -> Tensor:
        """E rules and queries (E, Q, F) float32 -> (E, Q, W)."""

    def lora(self) -> LoRA | None:
        """The average of the bank at the backbone's depth.

        Raises:
            ValueError: LoRAs of another model, factors of different shapes, or unknown `of`.

        """
        if self.of not in ("factors", "products"):
            raise ValueError(f'of: expected "factors" or "products", got {self.of!r}')
        if self.bank is None:
            return None
        return LoRA.average(LoRABank(self.bank).fit(self.vit.config), of=self.of)

    def embedder(self) -> FewShotClassifier:
        """What embeds images for this method; made anew when a parameter was set to another."""
        made_of = (self.vit, self.bank, self.of, self.batch_size, self.precision, self.backend)
        known = getattr(self, "_embedder", None)
        if known is None or any(a is not b for a, b in zip(known[0], made_of, strict=True)):
            made = FewShotClassifier(
                self.vit, self.lora(), batch_size=self.batch_size, precision=self.precision,
                backend=self.backend,
            )  # fmt: skip
            self._embedder = known = (made_of, made)
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        # made anew where it is needed: its recorded graphs live on one device of one process
        return {k: v for k, v in super().__getstate__().items() if k != "_embedder"}

    def fit(self, images: Any, labels: Any) -> FrozenFeatures:
        """Embed the support images and adapt to them; see `Baseline.fit`."""
        embedder = self.embedder()
        with Meter(self.vit.pos_embed.device) as meter:
            self._fit(embedder.features(images), labels)
        self._cost = meter.cost(self.parameters(len(self.classes_), self.n_features_in_))
        return self

    def fit_features(self, features: Any, labels: Any) -> FrozenFeatures:
        """Adapt to the features of support images.

        Args:
            features: (n, F), an array or tensor.
            labels: n labels of any sortable kind.

        Raises:
            ValueError: shapes that do not fit, NaN or infinity, fewer than 2 classes, or a
                parameter out of range.

        """
        features = _finite(features, 2, "features")
        with Meter(features.device) as meter:
            self._fit(features, labels)
        self._cost = meter.cost(self.parameters(len(self.classes_), self.n_features_in_))
        return self

    def _fit(self, features: Tensor, labels: Any) -> None:
        self.check()
        self.classes_, index = class_index(labels, len(features))
        way = torch.from_numpy(index).to(features.device)
        self.rule_ = self._adapt(features[None], way, len(self.classes_))
        self.n_features_in_ = features.shape[1]

    def logits(self, features: Any) -> Tensor:
        """Logits of features (n, F): (n, classes), columns as in `classes_`.

        Raises:
            NotFittedError: before `fit` or `fit_features`.
            ValueError: another number of features, NaN or infinity.

        """
        self._check_fitted("rule_")
        features = _finite(features, 2, "features")
        if features.shape[1] != self.n_features_in_:
            raise ValueError(
                f"features: expected (n, {self.n_features_in_}), got {tuple(features.shape)}"
            )
        return self._logits(self.rule_, features[None])[0]

    def predict_features(self, features: Any) -> np.ndarray:
        """The most probable label of features (n, F), (n,)."""
        likeliest = self.logits(features).argmax(-1).cpu().numpy()  # raises if not fitted
        return self.classes_[likeliest]

    def decision_function(self, images: Any) -> np.ndarray:
        """See `Baseline.decision_function`."""
        self._check_fitted("rule_")
        return self.logits(self.embedder().features(images)).cpu().numpy()

    def tasks(self, support: Any, ways: int, query: Any) -> Tensor:
        """Adapt to many tasks side by side; each comes out as it would alone.

        `cost` is then that of a task of this batch, from features on.

        Args:
            support: (E, W K, F), class-major.
            ways: W, at least 2.
            query: (E, Q, F).

        Returns:
            (E, Q) int64, the way of each query.

        Raises:
            ValueError: shapes that do not fit, NaN or infinity, or a parameter out of range.

        """
        self.check()
        support, query = _finite(support, 3, "support"), _finite(query, 3, "query")
        count, rows, width = support.shape
        if not count or not rows or ways < 2 or rows % ways:
            raise ValueError(
                f"support: expected (E, W K, F), none of them 0, with W = {ways} at least 2, got"
                f" {tuple(support.shape)}"
            )
        if (query.shape[0], query.shape[2]) != (count, width):
            raise ValueError(
                f"query: expected ({count}, Q, {width}) as support is {tuple(support.shape)}, got"
                f" {tuple(query.shape)}"
            )
        index = torch.arange(ways, device=support.device).repeat_interleave(rows // ways)
        with Meter(support.device) as meter:
            rules = self._adapt(support, index, ways)
            guess = self._logits(rules, query).argmax(-1)
        self._cost = meter.cost(self.parameters(ways, width), tasks=count)
        return guess


def _finite(features: Any, axes: int, name: str) -> Tensor:
    """As a detached float32 tensor of so many axes.

    Raises:
        ValueError: other shapes, or NaN or infinity.

    """
    if not isinstance(features, Tensor):
        features = torch.from_numpy(np.array(features))
    if features.ndim != axes or not features.is_floating_point():
        shape = "(n, F)" if axes == 2 else "(E, n, F)"
        raise ValueError(
            f"{name}: expected {shape} floats, got {tuple(features.shape)} {features.dtype}"
        )
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: hold NaN or infinity")
    return features.detach().float()

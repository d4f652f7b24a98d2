"""Fine-tuning-free classification by prototypes (LoRA Recycle, Eq. 3b).

E episodes, W ways, K shots, Q queries in all, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

from fastrecycle.capture import Graphs
from fastrecycle.lora import LoRA
from fastrecycle.ops import (
    Backend,
    Impl,
    autocast,
    check_precision,
    impl_of,
    kernels_suit,
    resolve_backend,
    weight_dtype,
)
from fastrecycle.pruning import PruneSchedule
from fastrecycle.vit import ViT

Distance = Literal["euclidean", "squared", "cosine"]


def prototype_logits(
    prototypes: Tensor, features: Tensor, distance: Distance = "euclidean"
) -> Tensor:
    """Minus the distance of each feature to each prototype: the logits of Eq. 3b.

    Args:
        prototypes: (..., W, F), class means of the support features.
        features: (..., Q, F).
        distance: "euclidean" (the paper), its square, or "cosine" (10 times the similarity).

    Returns:
        (..., Q, W) float32 (float64 for float64 input).

    """
    wide = torch.promote_types(features.dtype, torch.float32)
    features, prototypes = features.to(wide), prototypes.to(wide)
    if distance == "cosine":
        unit = torch.nn.functional.normalize
        return 10 * unit(features, dim=-1) @ unit(prototypes, dim=-1).transpose(-1, -2)
    # Differences first, then squares: |a|^2 - 2ab + |b|^2 cancels badly for near neighbours.
    squared = (features[..., :, None, :] - prototypes[..., None, :, :]).square().sum(-1)
    if distance == "squared":
        return -squared
    # A query on its prototype has distance 0, where the square root's slope is infinite.
    return -squared.clamp_min(torch.finfo(wide).tiny ** 0.5).sqrt()


def class_index(labels: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted classes of labels of any sortable kind, and the position of each label among them.

    Args:
        labels: one for each image.
        count: number of images.

    Raises:
        ValueError: another number of labels than of images, or fewer than 2 classes.

    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) != count:
        raise ValueError(f"labels: expected one for each of {count} images, got {labels.shape}")
    classes, index = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels: expected at least 2 classes, got {len(classes)}")
    return classes, index


def class_means(features: Tensor, ways: int) -> Tensor:
    """Prototypes of class-major support features: (..., W K, F) -> (..., W, F)."""
    return features.unflatten(-2, (ways, -1)).mean(-2)


class Embedder:
    """Features of batches of images under one LoRA, as fast as the device does them.

    On CUDA each shape of batch is recorded once as a CUDA graph; a smaller last batch is filled up
    rather than recorded. A LoRA already on the device is read anew at each call, the backbone's
    weights when this is made.

    Args:
        vit: the backbone.
        lora: see `ViT.encode`; None for none.
        prune: see `ViT.encode`.
        precision: "fp32", "bf16" or "fp8", which needs the backend "triton".
        backend: see `fastrecycle.ops`; "compile" records the plain operations.

    """

    def __init__(
        self,
        vit: ViT,
        lora: LoRA | None = None,
        *,
        prune: PruneSchedule | None = None,
        precision: str = "fp32",
        backend: Backend = "reference",
    ):
        self.device = vit.pos_embed.device
        self.source = vit
        rank = 1 if lora is None else max((a.shape[1] for a in lora.a.values()), default=1)
        resolved = resolve_backend(
            backend, self.device, precision,
            suited=kernels_suit(vit.config.width, vit.config.heads, rank),
        )  # fmt: skip
        check_precision(precision, resolved, self.device)
        if resolved != "reference" and precision != "fp32":
            vit = vit.prepared(weight_dtype(precision))
        self.vit, self.prune, self.precision = vit, prune, precision
        self.lora = None if lora is None else lora.to(self.device)
        self.backend = resolved
        self.impl: Impl = impl_of(resolved)
        self.graphs = None
        if resolved != "reference" and self.device.type == "cuda":
            self.graphs = Graphs(self._forward)

    def _forward(self, images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device, self.precision):
            return self.vit(images, self.lora, prune=self.prune, impl=self.impl).float()

    def __call__(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """(B, 3, S, S), normalised -> (B, features) float32.

        Args:
            images: one batch.
            batch_size: images that a full batch of this caller has.

        """
        images = images.to(self.device)
        if self.graphs is None or not len(images):
            return self._forward(images)
        missing = max(batch_size or 0, len(images)) - len(images)
        if missing:
            images = torch.cat((images, images.new_zeros(missing, *images.shape[1:])))
        return self.graphs(images)[: len(images) - missing].clone()


def as_batch(vit: ViT, images: Any) -> Tensor:
    """Images that a caller hands in, checked: (n, 3, S, S), normalised, where they lie.

    Args:
        vit: decides size, normalisation and dtype.
        images: a list of PIL images, or (n, 3, S, S) from `vit.transform`.

    Raises:
        TypeError, ValueError: not images, or NaN or infinity in them.

    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Sequence) and len(images) and isinstance(images[0], Image.Image):
        images = vit.transform(list(images))
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor):
        raise TypeError(
            "images: expected PIL images or a normalised (B, 3, S, S) tensor from"
            f" vit.transform, got {type(images).__name__}"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"images: expected normalised floats, got {images.dtype}; vit.transform(PIL images)"
            " makes them"
        )
    if not torch.isfinite(images).all():
        raise ValueError("images: hold NaN or infinity")
    return images.to(vit.pos_embed.dtype)  # NumPy's own is float64


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Classify images by the nearest class mean of a frozen ViT's features under a meta-LoRA.

    `fit` is one forward pass over the support images: nothing is trained. Follows scikit-learn's
    conventions; `sklearn.base.clone` shares the backbone instead of copying it.

    Args:
        vit: the backbone.
        lora: a meta-LoRA, or None for plain nearest class centre.
        distance: see `prototype_logits`.
        batch_size: images a forward pass.
        precision: "fp32", "bf16" or "fp8", which needs the backend "triton".
        backend: "auto", "triton", "compile" or "reference": see `fastrecycle.ops`.

    >>> clf = FewShotClassifier(vit, meta_lora).fit(support_images, ["cat", "cat", "dog", "dog"])
    >>> clf.predict(images)

    """

    def __init__(
        self,
        vit: ViT,
        lora: LoRA | None = None,
        distance: Distance = "euclidean",
        batch_size: int = 64,
        precision: str = "fp32",
        backend: Backend = "auto",
    ):
        self.vit = vit
        self.lora = lora
        self.distance = distance
        self.batch_size = batch_size
        self.precision = precision
        self.backend = backend

    def __getstate__(self) -> dict[str, Any]:
        # recorded graphs live on one device of one process
        return {k: v for k, v in super().__getstate__().items() if k != "_embedder"}

    def _embed(self) -> Embedder:
        """Made anew when a parameter was set to another object."""
        made_of = (self.vit, self.lora, self.precision, self.backend)
        known = getattr(self, "_embedder", None)
        if known is None or any(a is not b for a, b in zip(known[0], made_of, strict=True)):
            embedder = Embedder(self.vit, self.lora, precision=self.precision, backend=self.backend)
            self._embedder = known = (made_of, embedder)
        return known[1]

    def __sklearn_clone__(self) -> FewShotClassifier:
        return FewShotClassifier(**self.get_params(deep=False))

    def features(self, images: Any) -> Tensor:
        """Features of images under the LoRA, (n, F) float32.

        Args:
            images: a list of PIL images, or (n, 3, S, S) from `vit.transform`.

        Raises:
            TypeError, ValueError: not images, or NaN or infinity in them.

        """
        images = as_batch(self.vit, images)
        embed = self._embed()
        # a few images alone are not filled up to a whole batch, only to the next power of two
        full = min(self.batch_size, 1 << max(len(images) - 1, 0).bit_length())
        return torch.cat([embed(batch, full) for batch in images.split(self.batch_size)])

    def fit(self, images: Any, labels: Any) -> FewShotClassifier:
        """Take class means of the support images' features.

        Args:
            images: a list of PIL images, or (n, 3, S, S) from `vit.transform`.
            labels: n labels of any sortable kind.

        Raises:
            TypeError, ValueError: not images, or another number of labels than of images.

        """
        features = self.features(images)
        self.classes_, index = class_index(labels, len(features))
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(index), len(self.classes_))
        one_hot = one_hot.to(features)
        self.prototypes_ = (one_hot.T @ features) / one_hot.sum(0)[:, None]
        return self

    def decision_function(self, images: Any) -> np.ndarray:
        """Minus the distances to the prototypes, (n, classes)."""
        if not hasattr(self, "prototypes_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError("FewShotClassifier: call fit(support_images, labels) first")
        return (
            prototype_logits(self.prototypes_, self.features(images), self.distance).cpu().numpy()
        )

    def predict_proba(self, images: Any) -> np.ndarray:
        """Class probabilities (Eq. 3b), (n, classes), columns as in `classes_`."""
        return torch.from_numpy(self.decision_function(images)).softmax(-1).numpy()

    def predict(self, images: Any) -> np.ndarray:
        """The nearest prototype's label, (n,)."""
        nearest = self.decision_function(images).argmax(-1)  # raises if not fitted
        return self.classes_[nearest]

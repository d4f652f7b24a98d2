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

from fastrecycle.lora import LoRA
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


def class_means(features: Tensor, ways: int) -> Tensor:
    """Prototypes of class-major support features: (..., W K, F) -> (..., W, F)."""
    return features.unflatten(-2, (ways, -1)).mean(-2)


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Classify images by the nearest class mean of a frozen ViT's features under a meta-LoRA.

    `fit` is one forward pass over the support images: nothing is trained. Follows scikit-learn's
    conventions; `sklearn.base.clone` shares the backbone instead of copying it.

    Args:
        vit: the backbone.
        lora: a meta-LoRA, or None for plain nearest class centre.
        distance: see `prototype_logits`.
        batch_size: images a forward pass.

    >>> clf = FewShotClassifier(vit, meta_lora).fit(support_images, ["cat", "cat", "dog", "dog"])
    >>> clf.predict(images)

    """

    def __init__(
        self,
        vit: ViT,
        lora: LoRA | None = None,
        distance: Distance = "euclidean",
        batch_size: int = 64,
    ):
        self.vit = vit
        self.lora = lora
        self.distance = distance
        self.batch_size = batch_size

    def __sklearn_clone__(self) -> FewShotClassifier:
        return FewShotClassifier(**self.get_params(deep=False))

    def _features(self, images: Any) -> Tensor:
        device = self.vit.pos_embed.device
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, Sequence) and len(images) and isinstance(images[0], Image.Image):
            images = self.vit.transform(list(images))
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
        images = images.to(self.vit.pos_embed.dtype)  # NumPy's own is float64
        lora = None if self.lora is None else self.lora.to(device)
        with torch.no_grad():
            parts = [
                self.vit(batch.to(device), lora).float() for batch in images.split(self.batch_size)
            ]
        return torch.cat(parts)

    def fit(self, images: Any, labels: Any) -> FewShotClassifier:
        """Take class means of the support images' features.

        Args:
            images: a list of PIL images, or (n, 3, S, S) from `vit.transform`.
            labels: n labels of any sortable kind.

        Raises:
            TypeError, ValueError: not images, or another number of labels than of images.

        """
        labels = np.asarray(labels)
        features = self._features(images)
        if labels.ndim != 1 or len(labels) != len(features):
            raise ValueError(
                f"labels: expected one for each of {len(features)} images, got {labels.shape}"
            )
        self.classes_, index = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"labels: expected at least 2 classes, got {len(self.classes_)}")
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
            prototype_logits(self.prototypes_, self._features(images), self.distance).cpu().numpy()
        )

    def predict_proba(self, images: Any) -> np.ndarray:
        """Class probabilities (Eq. 3b), (n, classes), columns as in `classes_`."""
        return torch.from_numpy(self.decision_function(images)).softmax(-1).numpy()

    def predict(self, images: Any) -> np.ndarray:
        """The nearest prototype's label, (n,)."""
        nearest = self.decision_function(images).argmax(-1)  # raises if not fitted
        return self.classes_[nearest]

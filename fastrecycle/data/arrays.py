"""(images, labels) in memory as a data set."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastrecycle.data.images import ArrayImages, ImageDataset

_ACCEPTED = (
    "uint8 arrays (N, H, W, 3) or (N, H, W), float tensors (N, 3, H, W) in [0, 1], "
    "or lists of PIL images"
)


def from_arrays(images: Any, labels: Any, split: str, name: str = "arrays") -> ImageDataset:
    """A data set of images and labels in memory; arrays are read, not copied.

    Args:
        images: uint8 array (N, H, W, 3) or (N, H, W), float tensor (N, 3, H, W) in [0, 1]
            (rounded to 8 bits), or a list of N PIL images.
        labels: N hashable labels; their sorted distinct values become the class names.
        split: kept as the set's split.
        name: of the set.

    Raises:
        TypeError: images of another kind, or labels that cannot be hashed.
        ValueError: wrong shapes or counts, NaN or values outside [0, 1].

    """
    pixels = _pixels(images)
    if len(pixels) == 0:
        raise ValueError("load_dataset: images must not be empty")
    class_names, codes = _classes(labels)
    if len(codes) != len(pixels):
        raise ValueError(
            f"load_dataset: labels must have one entry an image ({len(pixels)}), got {len(codes)}"
        )
    files = [f"image {index}" for index in range(len(pixels))]
    return ImageDataset(name, split, class_names, codes, files, pixels)


def _pixels(images: Any) -> Sequence[Image.Image]:
    if isinstance(images, Tensor):
        return ArrayImages(_from_tensor(images))
    if isinstance(images, np.ndarray):
        shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
        if images.dtype != np.uint8 or not shaped:
            raise TypeError(
                f"load_dataset: images must be {_ACCEPTED}; got a {images.dtype} array of shape "
                f"{images.shape}"
            )
        if images.size == 0 and len(images):
            raise ValueError(f"load_dataset: images have no pixels, shape {images.shape}")
        return ArrayImages(images)
    if isinstance(images, (list, tuple)):
        for index, image in enumerate(images):
            if not isinstance(image, Image.Image):
                raise TypeError(
                    f"load_dataset: images must be {_ACCEPTED}; got a "
                    f"{type(image).__name__} at index {index} of a list"
                )
        return list(images)
    raise TypeError(f"load_dataset: images must be {_ACCEPTED}; got {type(images).__name__}")


def _from_tensor(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) float in [0, 1] -> (N, H, W, 3) uint8."""
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(
            f"load_dataset: images must be {_ACCEPTED}; got a {images.dtype} tensor of shape "
            f"{tuple(images.shape)}"
        )
    if images.numel() == 0 and len(images):
        raise ValueError(f"load_dataset: images have no pixels, shape {tuple(images.shape)}")
    images = images.detach().float()
    inside = ((images >= 0) & (images <= 1)).flatten(1).all(1)  # NaN compares false
    if not bool(inside.all()):
        index = int((~inside).nonzero()[0])
        if bool(images[index].isnan().any()):
            raise ValueError(f"load_dataset: images[{index}] has NaN values")
        low, high = images[index].min().item(), images[index].max().item()
        raise ValueError(
            f"load_dataset: images must be in [0, 1], images[{index}] is in "
            f"[{low:.3g}, {high:.3g}]; give them before normalisation"
        )
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _classes(labels: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and (N,) int64 codes into them."""
    if isinstance(labels, (Tensor, np.ndarray)):
        if labels.ndim != 1:
            raise ValueError(
                f"load_dataset: labels must be (N,), got shape {tuple(labels.shape)}; "
                "give class labels, not one-hot rows"
            )
        labels = labels.tolist()
    values = list(labels)
    for index, value in enumerate(values):
        if not isinstance(value, Hashable):
            raise TypeError(
                f"load_dataset: labels must be hashable, got {value!r} at index {index}"
            )
        if value != value:
            raise ValueError(f"load_dataset: labels must not be NaN, got one at index {index}")
    distinct = list(dict.fromkeys(values))
    try:
        distinct.sort()
    except TypeError:  # of several types
        distinct.sort(key=lambda value: (type(value).__name__, str(value)))
    names = [str(value) for value in distinct]
    if len(set(names)) < len(names):  # 1 and "1"
        names = [repr(value) for value in distinct]
    code = {value: index for index, value in enumerate(distinct)}
    return tuple(names), np.array([code[value] for value in values], dtype=np.int64)

"""A world of toys, in which every table runs in seconds: `fastrecycle report TABLE --smoke`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fastrecycle.data import ImageDataset
from fastrecycle.data.arrays import from_arrays
from fastrecycle.prior import ResNetPrior, ResNetSpec
from fastrecycle.tables.layout import MAIN
from fastrecycle.tables.world import World
from fastrecycle.vit import ViT
from fastrecycle.vit_config import HALF, ViTConfig

CONFIG = ViTConfig(
    image_size=16, patch_size=4, width=16, depth=2, heads=2, mlp_dim=32, mean=HALF, std=HALF
)
CLASSES, IMAGES = 6, 8
HERE = ("cifar_fs", "tiny_imagenet", "isic", "omniglot", "omniglot_alphabets", "digits")


class ToySets:
    """Images of 16 pixels whose classes have colours; under the names of `HERE`."""

    def load(self, name: str, split: str) -> ImageDataset:
        """See `fastrecycle.tables.world.DataSets`."""
        if name not in HERE:
            raise FileNotFoundError(f"{name}: the toys have only {', '.join(HERE)}")
        rng = np.random.Generator(np.random.Philox(key=[zlib.crc32(f"{name} {split}".encode()), 0]))
        colour = rng.integers(0, 40, (CLASSES, 1, 1, 1, 3))
        light = rng.integers(0, 60, (CLASSES, IMAGES, 1, 1, 3))
        noise = rng.integers(0, 90, (CLASSES, IMAGES, 16, 16, 3))
        pixels = (colour + light + noise).astype(np.uint8).reshape(-1, 16, 16, 3)
        labels = [f"{split} {i // IMAGES}" for i in range(len(pixels))]
        return from_arrays(pixels, labels, split, name)

    def sha256(self, name: str, dataset: ImageDataset) -> str:
        """See `fastrecycle.tables.world.DataSets`."""
        return dataset.sha256()


def toy_prior() -> ResNetPrior:
    """A ResNet of one block with random weights and statistics."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"conv1.weight": torch.randn(4, 3, 3, 3, generator=generator)}
    for name in ("layer1.0.conv1", "layer1.0.conv2"):
        tensors[f"{name}.weight"] = torch.randn(4, 4, 3, 3, generator=generator)
    for name in ("bn1", "layer1.0.bn1", "layer1.0.bn2"):
        tensors |= {
            f"{name}.weight": torch.ones(4),
            f"{name}.bias": torch.zeros(4),
            f"{name}.running_mean": torch.randn(4, generator=generator),
            f"{name}.running_var": torch.rand(4, generator=generator) + 0.5,
        }
    return ResNetPrior(tensors, ResNetSpec(stem_stride=1, maxpool=False))


def toy_world(seed: int = 0) -> World:
    """On the CPU in fp32, wherever it runs."""
    return World(
        {MAIN: ViT.random(CONFIG), "DeiT-B": ViT.random(CONFIG, seed=1)}, toy_prior(), ToySets(),
        device="cpu", precision="fp32", backend="reference", seed=seed,
    )  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """On networks this small, threads that wait for one another cost most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

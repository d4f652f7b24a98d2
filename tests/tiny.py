"""A tiny world for tests of the command line: backbone, prior, bank and images, all on disk."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastrecycle.files import save_safetensors
from fastrecycle.lora import Head, LoRA, LoRABank
from fastrecycle.prior import ResNetSpec, prior_metadata
from fastrecycle.vit import ViT
from fastrecycle.vit_config import ViTConfig

CONFIG = ViTConfig(
    image_size=16, patch_size=4, width=32, depth=2, heads=2, mlp_dim=64,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip
CLASSES = ("ant", "bee", "cat", "dog", "eel")


@dataclass(frozen=True)
class World:
    """Paths of what `make` wrote."""

    root: Path
    backbone: Path
    prior: Path
    bank: Path
    images: Path


def random_lora(config: ViTConfig, seed: int, ways: int = 3, rank: int = 2) -> LoRA:
    """A LoRA that changes something, with a head and class names."""
    generator = torch.Generator().manual_seed(seed)
    lora = LoRA.init(config, rank, seed=seed)
    for b in lora.b.values():
        b.normal_(std=0.1, generator=generator)
    weight = torch.randn(ways, config.features, generator=generator)
    names = tuple(CLASSES[(seed + i) % len(CLASSES)] for i in range(ways))
    return replace(
        lora, head=Head(weight, torch.zeros(ways)), class_names=names, name=f"{seed:04d}"
    )


def write_prior(path: Path) -> None:
    """A one-block ResNet with random weights and statistics."""
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
    save_safetensors(path, tensors, prior_metadata(ResNetSpec(stem_stride=1, maxpool=False)))


def write_images(folder: Path) -> None:
    """SPLIT/CLASS/FILE, classes of different colours; validation tasks take 16 images a class."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for i, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for k in range(16 if split == "val" else 8):
                pixels = rng.integers(0, 90, (16, 16, 3)) + np.array([30 * i, 150 - 30 * i, 40])
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / split / name / f"{k}.png")


def make(root: Path) -> World:
    """Write everything below `root`."""
    world = World(
        root, root / "vit.safetensors", root / "prior.safetensors", root / "bank", root / "images"
    )
    ViT.random(CONFIG).save(world.backbone)
    write_prior(world.prior)
    LoRABank([random_lora(CONFIG, i) for i in range(3)]).save(world.bank)
    write_images(world.images)
    return world

"""What of a report needs the run's backbone: kept patches over layers, features of the pool.

B images, n patches, L blocks, F features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastrecycle.classifier import Embedder
from fastrecycle.inputs import loras_input, network_input
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.pool import SyntheticPool
from fastrecycle.report.contents import RunContents
from fastrecycle.vit import ViT

Projection = Literal["tsne", "umap"]


def check_projection(projection: Projection) -> None:
    """Raise where a projection's library is absent.

    Raises:
        ImportError: umap-learn is not installed.
        ValueError: no such projection.

    """
    if projection not in ("tsne", "umap"):
        raise ValueError(f'projection: expected "tsne" or "umap", got {projection!r}')
    if projection == "umap" and importlib.util.find_spec("umap") is None:
        raise ImportError(
            "projection: umap needs umap-learn, which is not installed; pip install"
            ' "fastrecycle[umap]", or take tsne'
        )


@dataclass(frozen=True, eq=False)
class Networks:
    """A run's frozen backbone and its LoRAs, known to be those of the run."""

    vit: ViT
    bank: Sequence[LoRA] | None  # None: the run names none
    meta_lora: LoRA | None


def load_networks(
    run: RunContents,
    backbone: str | None = None,
    bank: str | None = None,
    device: torch.device | str = "cpu",
) -> Networks:
    """The networks that a run's manifest names, compared by their SHA-256.

    Args:
        run: see `read_run`.
        backbone: where it is now; None: where the manifest says.
        bank: likewise.
        device: to compute on.

    Raises:
        FileNotFoundError, ValueError: absent, damaged, or with other contents than the run's.

    """
    told = run.input("backbone")
    source = backbone or told.get("source")
    if not source:
        raise ValueError("backbone: the run's manifest names none; tell it with --run-backbone")
    vit = ViT.from_pretrained(source, told.get("config"))
    _same("backbone", source, network_input(source, vit), told)
    found: Sequence[LoRA] | None = None
    told = run.input("bank")
    source = bank or told.get("source")
    if source:
        # a run may have taken the first LoRAs of a bank, as the demo does
        count = len(run.manifest.get("inputs", {}).get("loras", ())) or None
        found = LoRABank.load(source, vit)[:count]
        _same("bank", source, loras_input(source, found), told)
    folder = run.folder / "meta_lora"
    meta = LoRA.load(folder, vit) if (folder / "adapter_config.json").is_file() else None
    return Networks(vit.to(device), found, meta)


def _same(name: str, source: str, found: dict[str, str], told: dict[str, Any]) -> None:
    if told.get("sha256", found["sha256"]) != found["sha256"]:
        raise ValueError(
            f"{name}: {source} has other contents than the run's (SHA-256 {found['sha256'][:12]},"
            f" expected {told['sha256'][:12]}); tell where the run's own is with --run-{name}"
        )


@torch.no_grad()
def kept_by_block(vit: ViT, lora: LoRA | None, images: Tensor, share: float = 0.25) -> Tensor:
    """Which patches each block's CLS attention would keep (Eq. 5), if it alone pruned.

    Args:
        vit: the backbone.
        lora: the images' own.
        images: (B, 3, S, S), normalised.
        share: of the patches that stay.

    Returns:
        (L, B, n) bool.

    """
    kept = []
    for block in range(vit.config.depth):
        alive = vit.encode(images, lora, prune={block: 1 - share}).kept
        mask = torch.zeros(len(images), vit.config.patches, dtype=torch.bool, device=alive.device)
        kept.append(mask.scatter_(1, alive, True))
    return torch.stack(kept)


def kept_maps(networks: Networks, pool: SyntheticPool, indices: Sequence[int]) -> Tensor:
    """`kept_by_block` of images of a pool, each under its own LoRA: (L, B, n) bool.

    Args:
        networks: those of the run.
        pool: its images.
        indices: B images of the pool.

    """
    vit, device = networks.vit, networks.vit.pos_embed.device
    chosen = torch.as_tensor(indices)
    maps = torch.zeros(vit.config.depth, len(chosen), vit.config.patches, dtype=torch.bool)
    for task in pool.tasks[chosen].unique().tolist():
        rows = (pool.tasks[chosen] == task).nonzero()[:, 0]
        number = pool.parts[task].task
        known = networks.bank is not None and number < len(networks.bank)
        lora = networks.bank[number].to(device) if known and networks.bank else None
        images = vit.normalise(pool.images[chosen[rows]].to(device).float() / 255)
        maps[:, rows] = kept_by_block(vit, lora, images).cpu()
    return maps


def pool_features(
    vit: ViT, lora: LoRA | None, pool: SyntheticPool, indices: Sequence[int], precision: str
) -> np.ndarray:
    """Features of images of a pool under one LoRA, (B, F)."""
    embed = Embedder(vit, lora, precision=precision)
    batches = torch.as_tensor(indices).split(64)
    pixels = (pool.images[batch].to(embed.device).float() / 255 for batch in batches)
    return torch.cat([embed(vit.normalise(x), 64) for x in pixels]).cpu().numpy()


def project(features: np.ndarray, projection: Projection = "tsne", seed: int = 0) -> np.ndarray:
    """Features in the plane, (B, F) -> (B, 2), by scikit-learn's t-SNE or by UMAP.

    Raises:
        ImportError, ValueError: see `check_projection`; fewer than four images.

    """
    check_projection(projection)
    if len(features) < 4:
        raise ValueError(f"projection: needs at least 4 images, got {len(features)}")
    if projection == "umap":
        from umap import UMAP

        neighbours = min(15, len(features) - 1)
        return UMAP(n_neighbors=neighbours, random_state=seed).fit_transform(features)
    from sklearn.manifold import TSNE

    # scikit-learn asks for a perplexity below the number of images
    perplexity = min(30.0, (len(features) - 1) / 3)
    method = "barnes_hut" if len(features) > 50 else "exact"
    return TSNE(perplexity=perplexity, init="pca", random_state=seed, method=method).fit_transform(
        features
    )

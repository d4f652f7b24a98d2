"""SHA-256 of what a run reads, for its manifest: {"source": ..., "sha256": ...} for each input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrecycle.data import ImageDataset
from fastrecycle.data.registry import DATASETS, find_files, find_root
from fastrecycle.data.stores import ARCHIVE_SUFFIXES
from fastrecycle.files import sha256, tensors_sha256
from fastrecycle.lora import LoRA
from fastrecycle.pool import SyntheticPool
from fastrecycle.pool_files import PoolFiles
from fastrecycle.text import TextTower

Input = dict[str, str]


def network_input(source: str | Path, network: nn.Module) -> Input:
    """A backbone or prior: of its file, else (packaged, a folder, a download) of its tensors."""
    if Path(source).is_file():
        return {"source": str(source), "sha256": sha256(source)}
    tensors = {**dict(network.named_buffers()), **dict(network.named_parameters())}
    return {"source": str(source), "sha256": tensors_sha256(sorted(tensors.items()))}


def text_input(source: str | Path, text: TextTower) -> Input:
    """A text tower: of its tensors and templates."""
    tensors = dict(text.named_parameters()) | dict(text.named_buffers())
    told = [(f"templates {text.templates}", torch.zeros(0))]
    return {"source": str(source), "sha256": tensors_sha256([*sorted(tensors.items()), *told])}


def loras_input(source: str | Path, loras: Iterable[LoRA]) -> Input:
    """A LoRA or a bank: of factors, scales, heads and class names, in order."""

    def named() -> Iterable[tuple[str, Tensor]]:
        for i, lora in enumerate(loras):
            yield from ((f"{i} {t} a", x) for t, x in sorted(lora.a.items()))
            yield from ((f"{i} {t} b", x) for t, x in sorted(lora.b.items()))
            yield from ((f"{i} {t} scale", x) for t, x in sorted(lora.scale.items()))
            if lora.head is not None:
                reads = " normalised" if lora.head.normalised else ""
                yield f"{i} head {lora.class_names}{reads}", lora.head.weight
                if lora.head.bias is not None:
                    yield f"{i} bias", lora.head.bias

    return {"source": str(source), "sha256": tensors_sha256(named())}


def pool_input(source: str | Path, pool: SyntheticPool) -> Input:
    """A synthetic pool: of its images, labels, order of patches, teachers and class names.

    Of a pool on disk, by what its files say they hold: reading them all may take hours.
    """
    if isinstance(pool.parts, PoolFiles):
        digests = [entry.digest for entry in pool.parts.entries]
    else:
        digests = [part.digest for part in pool.parts]
    return {
        "source": str(source),
        "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }


def dataset_input(
    source: str | Path, dataset: ImageDataset, data_root: str | Path | None = None
) -> Input:
    """A data set: of the archive it lies in, else of the names, labels and images of the split."""
    path: Path | None = Path(source)
    if str(source) in DATASETS:
        root = None if DATASETS[str(source)].packaged else find_root(data_root)
        found = None if root is None else find_files(str(source), dataset.split, root)
        path = None if found is None else found[0]
    if path is not None and path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return {"source": str(source), "file": path.name, "sha256": sha256(path)}
    return {"source": str(source), "sha256": dataset.sha256()}


def same_inputs(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Whether two manifests read the same contents, wherever they lay."""

    def contents(inputs: Mapping[str, object]) -> dict[str, object]:
        return {
            name: value.get("sha256") if isinstance(value, dict) and "sha256" in value else value
            for name, value in inputs.items()
        }

    return contents(one) == contents(other)

"""Features of images kept on disk, so that what was embedded once is not embedded again.

FOLDER/SETTING/CONTENT.safetensors holds the SHA-256 of some images and their features. SETTING is
the SHA-256 of all that decides features besides the image: weights, LoRA, pruning, preprocessing,
arithmetic. CONTENT is the file's own, so that damage shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

import fastrecycle
from fastrecycle.classifier import Embedder
from fastrecycle.files import atomic_write, safetensors_content, tensors_sha256, write_json
from fastrecycle.lora import LoRA
from fastrecycle.vit import ViT

log = logging.getLogger(__name__)

# Of what is written and hashed here, of decoding and of `ViT.resize`: count up on a change.
_FORMAT = 1
# of a LoRA, which features do not depend on
_NO_PART = ("head", "class_names", "layout", "base_model", "name", "prefix", "head_module")


class EmbeddingCache:
    """Features under one setting, in a folder that many settings share.

    Processes may share it too: files are written atomically and never changed.

    Args:
        folder: made where it is absent.
        embedder: decides the setting.

    """

    def __init__(self, folder: str | Path, embedder: Embedder) -> None:
        setting = _setting(embedder)
        text = json.dumps(setting, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()
        self.features = embedder.vit.config.features
        if not (self.folder / "setting.json").exists():
            write_json(self.folder / "setting.json", setting)

    def find(self, images: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Which images are known, and the features of these.

        A damaged file is warned about and removed; its images count as unknown.

        Args:
            images: (n, 32) uint8, SHA-256 of each, see `ImageDataset.digests`.

        Returns:
            (n,) bool, and (n, F) float32 on the CPU, zero where unknown.

        """
        places: dict[bytes, list[int]] = {}
        for place, digest in enumerate(images):
            places.setdefault(digest.tobytes(), []).append(place)
        known = np.zeros(len(images), bool)
        features = torch.zeros(len(images), self.features)
        for kept, rows in self._files():
            for row, digest in enumerate(kept):
                for place in places.get(digest.tobytes(), ()):
                    known[place], features[place] = True, rows[row]
        return known, features

    def add(self, images: np.ndarray, features: Tensor) -> None:
        """Keep the features (n, F) of images (n, 32) in a file of their own.

        Raises:
            OSError: the folder cannot be written, or the disk is full.

        """
        if not len(images):
            return
        tensors = {"images": torch.from_numpy(images), "features": features.float().cpu()}
        content = safetensors_content(tensors)
        name = hashlib.sha256(content).hexdigest()
        atomic_write(self.folder / f"{name}.safetensors", content)

    def _files(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(images, features) of each whole file."""
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # damaged, and removed by a process that shares the folder
                continue
            found = self._parse(content, path.stem)
            if found is None:
                log.warning("%s: damaged; removed, its images are embedded again", path)
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            yield found

    def _parse(self, content: bytes, sha256: str) -> tuple[np.ndarray, Tensor] | None:
        """(images, features) of a file; None: it is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        if hashlib.sha256(content).hexdigest() != sha256:
            return None
        try:
            tensors = load(content)
            images, features = tensors["images"], tensors["features"]
        except (SafetensorError, KeyError, ValueError, RuntimeError):
            return None
        shapes = [(len(images), 32), (len(images), self.features)] if images.ndim else []
        types = [torch.uint8, torch.float32]
        if [images.shape, features.shape] != shapes or [images.dtype, features.dtype] != types:
            return None
        return images.numpy(), features


def _setting(embedder: Embedder) -> dict[str, Any]:
    """All that decides features besides the image."""
    vit, lora = embedder.source, embedder.lora
    return {
        "format": _FORMAT,
        "backbone": _network(vit),
        "config": dataclasses.asdict(vit.config),
        "lora": None if lora is None else _lora(lora),
        "prune": {str(block): ratio for block, ratio in (embedder.prune or {}).items()},
        "precision": embedder.precision,
        "backend": embedder.backend,
        "device": embedder.device.type,
        "float32_products": torch.get_float32_matmul_precision(),
        "versions": [fastrecycle.__version__, torch.__version__, PIL.__version__],
    }


def _network(vit: ViT) -> str:
    tensors = {**dict(vit.named_buffers()), **dict(vit.named_parameters())}
    return tensors_sha256(sorted(tensors.items()))


def _lora(lora: LoRA) -> str:
    """Of every part that features may depend on, also of kinds of LoRA still to come."""
    tensors: list[tuple[str, Tensor]] = []
    plain: dict[str, str] = {}
    for field in dataclasses.fields(lora):
        value = getattr(lora, field.name)
        if field.name in _NO_PART:
            continue
        if isinstance(value, Tensor):
            tensors.append((field.name, value))
        elif isinstance(value, dict) and all(isinstance(x, Tensor) for x in value.values()):
            tensors += [(f"{field.name} {target}", x) for target, x in sorted(value.items())]
        else:
            plain[field.name] = repr(value)
    return hashlib.sha256(f"{tensors_sha256(tensors)} {sorted(plain.items())}".encode()).hexdigest()

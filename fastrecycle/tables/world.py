"""What tables run on: backbones, prior, data sets, device; and what each of them hashes to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fastrecycle.config import Precision
from fastrecycle.data import DATASETS, ImageDataset, load_dataset
from fastrecycle.eval import Pixels, decode
from fastrecycle.inputs import Input, dataset_input, network_input
from fastrecycle.ops import Backend, Resolved, kernels_suit, resolve_backend
from fastrecycle.prior import load_prior
from fastrecycle.recycler import resolve_device, resolve_precision
from fastrecycle.run import settings
from fastrecycle.tables.layout import MAIN, STAND_INS, Domain
from fastrecycle.vit import ViT


class DataSets(Protocol):
    """Where data sets come from."""

    def load(self, name: str, split: str) -> ImageDataset:
        """A split; raises FileNotFoundError where it is absent."""

    def sha256(self, name: str, dataset: ImageDataset) -> str:
        """Of what was read for it."""


@dataclass(frozen=True)
class Registered:
    """The registered data sets of a folder; see `load_dataset`."""

    data_root: Path | None = None

    def load(self, name: str, split: str) -> ImageDataset:
        """See `DataSets`."""
        return load_dataset(name, split, self.data_root)

    def sha256(self, name: str, dataset: ImageDataset) -> str:
        """See `DataSets`."""
        return dataset_input(name, dataset, self.data_root)["sha256"]


@dataclass(eq=False)
class World:
    """Inputs by name, each opened once.

    Args:
        backbones: label -> source or network; `MAIN` must be among them.
        prior: source or network; None: none.
        datasets: where data sets come from.
        device, precision, backend: as `MetaLoRARecycler` takes them; resolved here.
        seed: of everything drawn.
        backbone_config: of the main backbone, see `ViT.from_pretrained`.
        prior_options: see `load_prior`.

    Raises:
        ValueError: no such device or precision, or "fp8", which banks and baselines cannot take.

    """

    backbones: Mapping[str, str | ViT]
    prior: str | nn.Module | None
    datasets: DataSets
    device: str | None = None
    precision: Precision = "auto"
    backend: Backend = "auto"
    seed: int = 0
    backbone_config: Any = None
    prior_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.where = resolve_device(self.device)
        self.arithmetic = resolve_precision(self.precision, self.where)
        if self.arithmetic == "fp8":
            raise ValueError(
                'precision: tables run in "fp32" or "bf16", as their banks and baselines train in'
                ' no other, got "fp8"'
            )
        self._vits: dict[str, tuple[ViT, Input]] = {}
        self._splits: dict[tuple[str, str], ImageDataset | Exception] = {}
        self._hashes: dict[tuple[str, str], str] = {}
        self._pixels: dict[tuple[str, str, int], Pixels] = {}

    def vit(self, label: str = MAIN) -> ViT:
        """A backbone on the device."""
        return self._backbone(label)[0]

    def _backbone(self, label: str) -> tuple[ViT, Input]:
        if label not in self._vits:
            source = self.backbones[label]
            if isinstance(source, ViT):
                vit, name = source, label
            else:
                config = self.backbone_config if label == MAIN else None
                vit, name = ViT.from_pretrained(source, config), source
            self._vits[label] = (vit.to(self.where), network_input(name, vit))
        return self._vits[label]

    @cached_property
    def _prior(self) -> tuple[nn.Module | None, Input]:
        if isinstance(self.prior, str):
            network = load_prior(self.prior, **self.prior_options)
        else:
            network = self.prior
        if network is None:
            return None, {"source": "none", "sha256": "none"}
        told = {k: str(v) for k, v in self.prior_options.items() if v is not None}
        source = self.prior if isinstance(self.prior, str) else "given"
        return network.to(self.where), {**network_input(source, network), **told}

    def network(self) -> nn.Module | None:
        """The prior on the device."""
        return self._prior[0]

    def resolved(self, label: str = MAIN, rank: int = 8) -> Resolved:
        """The backend for a backbone."""
        config = self.vit(label).config
        return resolve_backend(
            self.backend, self.where, self.arithmetic,
            suited=kernels_suit(config.width, config.heads, rank),
        )  # fmt: skip

    def dataset(self, name: str, split: str) -> ImageDataset:
        """A split.

        Raises:
            FileNotFoundError: it is absent; the text says what to put where.

        """
        found = self._look(name, split)
        if isinstance(found, Exception):
            raise FileNotFoundError(str(found))
        return found

    def _look(self, name: str, split: str) -> ImageDataset | Exception:
        if (name, split) not in self._splits:
            try:
                self._splits[name, split] = self.datasets.load(name, split)
            except FileNotFoundError as error:
                self._splits[name, split] = error
            except ValueError as error:
                if "has no split" not in str(error):
                    raise
                self._splits[name, split] = error
        return self._splits[name, split]

    def absent(self, name: str, split: str) -> str | None:
        """Why a split cannot be read, in short; None where it can."""
        found = self._look(name, split)
        if not isinstance(found, Exception):
            return None
        if isinstance(found, ValueError):
            return f"{name}: has no split {split}"
        where = f"; get it from {DATASETS[name].url}" if name in DATASETS else ""
        return f"{name}: split {split} is not under the data root{where}"

    def pixels(self, name: str, split: str, label: str = MAIN) -> Pixels:
        """A decoded split at a backbone's size, on the device."""
        vit = self.vit(label)
        known = (name, split, vit.config.image_size)
        if known not in self._pixels:
            self._pixels[known] = decode(vit, self.dataset(name, split)).to(self.where)
        return self._pixels[known]

    def forget(self, split: str) -> None:
        """Drop decoded images of a split that is not needed for long."""
        self._pixels = {k: v for k, v in self._pixels.items() if k[1] != split}

    def sources(self, domain: Domain) -> tuple[str, ...] | str:
        """Data sets of a domain's bank, or why it has none."""
        found: list[str] = []
        for name in domain.sources:
            reason = self.absent(name, "train")
            if reason is None:
                found.append(name)
            elif not domain.whichever:
                return reason
            elif STAND_INS.get(name) and self.absent(STAND_INS[name], "train") is None:
                found.append(STAND_INS[name])
        if not found:
            return f"none of {', '.join(domain.sources)} is there to make LoRAs from"
        return tuple(found)

    def read(self, kind: str, name: str) -> str:
        """What an input is known by; see `fastrecycle.tables.recipes.plain`.

        The SHA-256 of its content, and what was told beside the file: pixel statistics and shape of
        a backbone, strides and epsilon of a prior.
        """
        told = self.told(kind, name)
        if kind == "backbone":
            beside = settings(self.vit(name).config)
        elif kind == "prior":
            beside = {k: v for k, v in told.items() if k not in ("source", "sha256")}
        else:
            return told["sha256"]
        return f"{told['sha256']} {json.dumps(beside, sort_keys=True)}"

    def told(self, kind: str, name: str) -> Input:
        """Source and SHA-256 of an input."""
        if kind == "backbone":
            return self._backbone(name)[1]
        if kind == "prior":
            return self._prior[1]
        if (kind, name) not in self._hashes:
            self._hashes[kind, name] = self.datasets.sha256(name, self.dataset(name, kind))
        return {"source": name, "sha256": self._hashes[kind, name]}

    def setting(self, label: str = MAIN) -> dict[str, Any]:
        """What decides a result besides recipe and inputs."""
        return {
            "seed": self.seed,
            "precision": self.arithmetic,
            "backend": self.resolved(label),
            "device": self.where.type,
        }

    def empty_cache(self) -> None:
        """Hand memory that a finished stage held back to the device."""
        if self.where.type == "cuda":
            torch.cuda.empty_cache()

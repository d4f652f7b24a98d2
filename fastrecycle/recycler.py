"""LoRA Recycle, Algorithm 1, from a bank to a meta-LoRA: the stages in order, resumable."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrecycle import run as runs
from fastrecycle.cluster import cluster_invert, cluster_meta_train
from fastrecycle.config import InversionConfig, MetaConfig, Precision
from fastrecycle.eval import evaluate
from fastrecycle.files import write_json
from fastrecycle.inputs import loras_input, network_input, pool_input, text_input
from fastrecycle.inversion import check_inversion, invert
from fastrecycle.live import OnMetrics
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.metatrain import MetaResult, meta_train
from fastrecycle.ops import Backend, check_precision, kernels_suit, resolve_backend
from fastrecycle.parallel import ALONE, Ranks
from fastrecycle.pool import SyntheticPool
from fastrecycle.pool_files import PoolFiles, TaskImages
from fastrecycle.prior import load_prior
from fastrecycle.screening import Score, as_json, screen
from fastrecycle.text import TextTower, text_heads
from fastrecycle.vit import ViT

log = logging.getLogger(__name__)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None: CUDA where there is one, else the CPU.

    Raises:
        ValueError: CUDA was asked for and there is none.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but PyTorch sees no CUDA device; use cpu")
    return chosen


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """bf16 on CUDA and fp32 elsewhere, where "auto" leaves it open.

    Raises:
        ValueError: no such precision.
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision not in ("fp32", "bf16", "fp8"):
        raise ValueError(f'precision: expected "auto", "fp32", "bf16" or "fp8", got {precision!r}')
    return precision


class MetaLoRARecycler:
    """Recycle a bank of LoRAs into one meta-LoRA (LoRA Recycle, Alg. 1).

    Images are synthesised first and reused by all meta-training steps, where the paper's listing
    inverts inside the loop; the authors' own code does the same.

    Args:
        vit: the frozen backbone.
        bank: LoRAs of that backbone, with heads; may be empty for meta-training on a given pool.
        prior: a network with BatchNorm for R_BN; "demo", a path, "torchvision:resnet50", a module
            (see `fastrecycle.prior.load_prior`), or None.
        inversion: settings of LoRA Inversion.
        meta: settings of meta-training.
        device: None: CUDA where there is one, else the CPU.
        backend: "reference" (eager), "compile" (`torch.compile`), or "auto".
        precision: "fp32", "bf16", "auto", or "fp8": bf16 with the backbone's larger products in
            float8, on a GPU of compute capability 8.9 or above and the backend "triton".
        seed: of everything drawn.
        validation: a data set for choosing the step that is returned, never test data; None returns
            the last.
        text: the text tower of a two-tower model whose image tower is `vit`: the LoRAs' heads are
            then the texts of their class names, whatever heads they have, and validation may be
            0-shot (`meta.shots`; Table 12).
        inputs: for the manifest, what was read and its SHA-256 (see `fastrecycle.inputs`).
        quiet: no progress bars.
        on_metrics: called with stage, step and values where metrics.jsonl gets a line (see
            `fastrecycle.live`).
        screening: leave LoRAs out of meta-training whose images or weights are unlike the others';
            see `fastrecycle.screening`. Their images are made and kept.
        ranks: processes that share meta-training; see `fastrecycle.parallel`.
        cluster: address of a Ray cluster, or "auto", on which both stages run; see
            `fastrecycle.cluster`. It takes a folder, and no validation.

    Raises:
        ValueError: LoRAs that do not fit the backbone or have no head, settings out of range.

    >>> rec = MetaLoRARecycler(ViT.from_pretrained("demo"), LoRABank.load("demo"))
    >>> meta_lora = rec.run("runs/demo")
    """

    def __init__(
        self,
        vit: ViT,
        bank: LoRABank | Sequence[LoRA],
        prior: str | Path | nn.Module | None = "demo",
        inversion: InversionConfig | None = None,
        meta: MetaConfig | None = None,
        *,
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        precision: Precision = "auto",
        seed: int = 0,
        validation: Any = None,
        text: TextTower | None = None,
        inputs: Mapping[str, Any] | None = None,
        quiet: bool = False,
        on_metrics: OnMetrics | None = None,
        screening: bool = False,
        ranks: Ranks = ALONE,
        cluster: str | None = None,
    ):
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.inversion = inversion or InversionConfig()
        self.meta = meta or MetaConfig()
        if text is not None and len(bank):
            bank = text_heads(bank, text)
        self.bank: Sequence[LoRA] = LoRABank(bank).fit(vit.config) if len(bank) else ()
        if self.meta.shots == 0 and validation is not None and text is None:
            raise ValueError("text: 0-shot validation needs a text tower, got none; give text=...")
        rank = max([self.meta.rank, *(a.shape[1] for x in self.bank for a in x.a.values())])
        self.backend = resolve_backend(
            backend, self.device, self.precision,
            suited=kernels_suit(vit.config.width, vit.config.heads, rank),
        )  # fmt: skip
        check_precision(self.precision, self.backend, self.device)
        for lora in self.bank:
            check_inversion(vit, [lora], self.inversion)
        network = load_prior(prior)
        self.prior = None if network is None else network.to(self.device)
        self.prior_name = prior if isinstance(prior, str | Path) else type(prior).__name__
        self.vit = vit.to(self.device)
        self.text = None if text is None else text.to(self.device)
        self.on_metrics = on_metrics
        self.seed, self.validation, self.quiet = seed, validation, quiet or not ranks.first
        self.ranks, self.cluster = ranks, cluster
        if cluster is not None and validation is not None:
            raise ValueError("validation: is not done on a cluster; leave it out")
        self.inputs, self.screening = dict(inputs or {}), screening
        self.scores: list[Score] = []
        self.pool: SyntheticPool | None = None
        self.result: MetaResult | None = None
        log.info("device %s, backend %s, precision %s", self.device, self.backend, self.precision)

    def manifest(self) -> dict[str, Any]:
        """All that decides the result, as plain values."""
        inputs = dict(self.inputs)
        # what came without a description of its own is told by its numbers
        if "backbone" not in inputs:
            inputs["backbone"] = network_input("vit", self.vit)
        if "bank" not in inputs and len(self.bank):
            inputs["bank"] = loras_input("bank", self.bank)
        if self.text is not None and "text" not in inputs:
            inputs["text"] = text_input("text", self.text)
        if "prior" not in inputs and self.prior is not None:
            inputs["prior"] = network_input(str(self.prior_name), self.prior)
        return {
            "config": {
                **({"screen": True} if self.screening else {}),
                "inversion": runs.settings(self.inversion),
                "meta": runs.settings(self.meta),
                "backend": self.backend,
                "precision": self.precision,
                "device": self.device.type,
            },
            "seed": self.seed,
            "inputs": {
                "loras": [lora.name for lora in self.bank],
                "prior": str(self.prior_name),
                **inputs,
            },
        }

    def invert(self, folder: str | Path | None = None) -> SyntheticPool:
        """Synthesise the pool; with a folder, go on from what it holds and save there."""
        if not len(self.bank):
            raise ValueError("bank: no LoRAs to invert")
        total = len(self.bank) * self.inversion.iterations
        target = None if folder is None else runs.RunFolder(folder, self._stage_manifest("invert"))
        with (
            runs.progress("inversion", total, quiet=self.quiet) as update,
            runs.stop_on_interrupt() as stop,
        ):

            def on_step(done: int, values: dict[str, float]) -> None:
                update(done, values)
                self._record(target, "invert", done, values)

            settings: dict[str, Any] = {
                "seed": self.seed, "precision": self.precision, "backend": self.backend,
                "folder": self._on_cluster(folder), "on_step": on_step, "stop": stop,
            }  # fmt: skip
            networks = self.vit, self.bank, self.prior, self.inversion
            if self.cluster is not None:
                parts: Sequence[TaskImages] = cluster_invert(
                    *networks, address=self.cluster, **settings
                )
            else:
                parts = invert(*networks, **settings)
        self.pool = SyntheticPool(parts)
        return self.pool

    def meta_train(
        self, pool: SyntheticPool | None = None, folder: str | Path | None = None
    ) -> LoRA:
        """Meta-train on a pool (the one that `invert` made); with a folder, resumable."""
        pool = pool or self.pool
        if pool is None:
            raise ValueError("pool: none yet; call invert() first or pass SyntheticPool.load(...)")
        stay: Sequence[LoRA] = self.bank
        if self.screening:
            pool, stay = self._screened(pool, folder)
        target = None
        if folder is not None and self.ranks.first:
            manifest = self._stage_manifest("meta")
            manifest["inputs"].setdefault("pool", pool_input("pool", pool))
            target = runs.RunFolder(folder, manifest)
        if self.cluster is not None:
            return self._cluster_meta_train(pool, stay, self._on_cluster(folder))
        with (
            runs.progress("meta-training", self.meta.steps, quiet=self.quiet) as update,
            runs.stop_on_interrupt() as stop,
        ):

            def on_step(done: int, values: dict[str, float]) -> None:
                update(done, values)
                self._record(target, "meta-train", done, values)

            self.result = meta_train(
                self.vit,
                pool,
                self.meta,
                seed=self.seed,
                precision=self.precision,
                backend=self.backend,
                start=self._start(stay),
                folder=folder,
                validate=self._validate if self.validation is not None else None,
                on_step=on_step,
                stop=stop,
                ranks=self.ranks,
            )
        return self.result.lora

    def _on_cluster(self, folder: str | Path | None) -> str | Path | None:
        if self.cluster is not None and folder is None:
            raise ValueError("cluster: needs a folder that every node reaches, got none")
        return folder

    def _cluster_meta_train(
        self, pool: SyntheticPool, bank: Sequence[LoRA], folder: str | Path | None
    ) -> LoRA:
        assert self.cluster is not None
        assert folder is not None
        if not isinstance(pool.parts, PoolFiles) or self.meta.learn == "backbone":
            raise ValueError(
                "cluster: meta-training there takes a pool on disk, and learns a LoRA;"
                ' got learn="backbone" or a pool in memory'
            )
        lora = cluster_meta_train(
            self.vit, pool.parts.folder.location, self.meta, folder=folder, address=self.cluster,
            seed=self.seed, precision=self.precision, backend=self.backend,
            start=self._start(bank), tasks=[e.task for e in pool.parts.entries],
        )  # fmt: skip
        self.result = MetaResult(lora, self.vit, self.meta.steps, {})
        return lora

    def _screened(
        self, pool: SyntheticPool, folder: str | Path | None
    ) -> tuple[SyntheticPool, list[LoRA]]:
        """The part of a pool to trust, and its LoRAs; the others are logged, and kept in a file."""
        precision = "fp32" if self.precision == "fp32" else "bf16"
        self.scores = screen(self.vit, self.bank, pool.parts, precision=precision)
        if folder is not None and self.ranks.first:
            write_json(Path(folder) / "screen.json", as_json(self.scores))
        stay = [i for i, score in enumerate(self.scores) if not score.reasons]
        for score in self.scores:
            for reason in score.reasons:
                log.warning("left out %s: %s", score.name or score.task, reason)
        log.info("screening: %d of %d LoRAs stay", len(stay), len(self.scores))
        if not stay:
            raise ValueError(
                "screen: no LoRA's images can be trusted; see the reasons above, and whether"
                " inversion ran long enough"
            )
        if isinstance(pool.parts, PoolFiles):
            kept: Sequence[TaskImages] = pool.parts.only(self.scores[i].task for i in stay)
        else:
            kept = [pool.parts[i] for i in stay]
        return SyntheticPool(kept), [self.bank[self.scores[i].task] for i in stay]

    def _record(
        self, target: runs.RunFolder | None, stage: str, step: int, values: dict[str, float]
    ) -> None:
        """Values of a step, which most steps have none of, to wherever they go."""
        if target is not None:
            target.metrics(stage, step, values)
        if values and self.on_metrics is not None:
            self.on_metrics(stage, step, values)

    def _start(self, bank: Sequence[LoRA]) -> LoRA | None:
        """Where the meta-LoRA starts; None: from nothing."""
        if self.meta.start == "zero" or self.meta.learn == "backbone":
            return None
        if not len(bank):
            raise ValueError(
                'start: "average" needs the bank that the pool was inverted from, got no LoRAs;'
                ' pass bank=..., or MetaConfig(start="zero")'
            )
        return LoRA.average(bank)

    def _validate(self, vit: ViT, lora: LoRA) -> float:
        """Accuracy on 200 validation tasks, in percent."""
        return evaluate(
            vit, lora, self.validation, ways=self.meta.ways, shots=self.meta.shots, tasks=200,
            split="val", seed=self.seed, precision=self.precision, text=self.text,
        ).accuracy  # fmt: skip

    def run(self, out_dir: str | Path) -> LoRA:
        """Both stages, resumable: `out_dir/pool`, `out_dir/meta`, `out_dir/meta_lora`.

        Where the backbone learns, it is `out_dir/vit.safetensors`; the meta-LoRA changes nothing.

        Interrupted at any moment and called again, it ends in the same meta-LoRA (bit-equal on
        the CPU).

        Raises:
            ValueError: the folder holds a run with other settings.
            OSError: it cannot be written, or the disk is full; finished work is kept.
        """
        out = Path(out_dir)
        runs.RunFolder(out, self.manifest())
        self.invert(out / "pool")
        lora = self.meta_train(folder=out / "meta")
        if self.meta.learn == "backbone" and self.result is not None:
            self.result.vit.save(out / "vit.safetensors")
        lora.save(out / "meta_lora")
        return lora

    def _stage_manifest(self, stage: str) -> dict[str, Any]:
        whole = self.manifest()
        # a pool serves any meta-training, so each stage answers for its own settings alone
        others = {"invert": ("meta", "screen"), "meta": ("inversion",)}[stage]
        config = {k: v for k, v in whole["config"].items() if k not in others}
        return {**whole, "config": config}

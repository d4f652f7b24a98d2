"""LoRA Recycle on real images: CIFAR-FS with ViT-Ti/16 and a ResNet-50 prior, or the demo models.

Stages, each resumable or repeatable on its own (`--help` of each lists its options):

    python examples/recycle_cifar_fs.py decode     # resize the splits once
    python examples/recycle_cifar_fs.py bank       # LoRAs from the 64 training classes
    python examples/recycle_cifar_fs.py invert     # synthetic images
    python examples/recycle_cifar_fs.py real       # or a pool of real ones, to compare with
    python examples/recycle_cifar_fs.py meta       # meta-LoRAs, one for each named variant
    python examples/recycle_cifar_fs.py score      # test tasks of chosen meta-LoRAs

Choices are made on the validation classes; `score` alone touches test images. The data folder holds
cifar_fs_{train,val,test}.zip and weights/{vit_tiny_patch16_224_augreg,
resnet50_v1_stem_to_layer3}.safetensors. Made for one GPU; docs/results.md has its tables.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fastrecycle import LoRA, LoRABank, MetaConfig, PretuneConfig, SyntheticPool, ViT, evaluate
from fastrecycle.config import InversionConfig
from fastrecycle.eval import Pixels, decode, evaluate_shots
from fastrecycle.files import atomic_write
from fastrecycle.inversion import invert
from fastrecycle.metatrain import meta_train
from fastrecycle.pool import TaskImages
from fastrecycle.pretune import pretune
from fastrecycle.prior import load_prior

HALF = (0.5, 0.5, 0.5)
BANK = PretuneConfig()
INVERSION = InversionConfig(images_per_class=10, iterations=300, group=8)
ZERO = MetaConfig(steps=1000, queries=9, tasks=4, start="zero", lr=3e-4)
AVERAGE = MetaConfig(steps=1000, queries=9, tasks=4)
# Of eight tasks a step one sees whole images, the others mask so much more: 75 % in the mean.
MIXED = replace(ZERO, tasks=8, sparsity=0.75, whole=0.125)
VARIANTS: dict[str, MetaConfig] = {
    "zero": ZERO,
    "zero_one_task": replace(ZERO, tasks=1),
    "zero_flip": replace(ZERO, resolution=(0, 0)),
    "zero_no_interpolation": replace(ZERO, interpolation=0.0),
    "zero_interpolation_1": replace(ZERO, interpolation=1.0),
    "zero_holders": replace(ZERO, holders="all"),
    "zero_lr1e3": replace(ZERO, lr=1e-3),
    "zero_lr1e4": replace(ZERO, lr=1e-4),
    "zero_narrow": replace(ZERO, resolution=(24, 48)),
    "zero_crop": replace(ZERO, crop=0.4),
    "zero_ways20": replace(ZERO, tasks=2, ways=20, queries=4, interpolation=1.0, holders="all"),
    "zero_long": replace(ZERO, steps=3000, schedule="cosine"),
    "zero_s25": replace(ZERO, sparsity=0.25),
    "zero_s50": replace(ZERO, sparsity=0.50),
    "zero_s75": replace(ZERO, sparsity=0.75),
    "zero_s75_image": replace(ZERO, sparsity=0.75, sparsity_per="image"),
    "zero_s75_mixed": MIXED,
    "zero_s75_mixed_full": replace(MIXED, masked_resolution=(24, 96)),
    "average": AVERAGE,
    "average_fast": replace(AVERAGE, lr=3e-4),
    "average_flip": replace(AVERAGE, resolution=(0, 0)),
    "average_no_interpolation": replace(AVERAGE, interpolation=0.0),
    "average_interpolation_1": replace(AVERAGE, interpolation=1.0),
    "average_holders": replace(AVERAGE, holders="all"),
    "average_long": replace(AVERAGE, steps=3000, schedule="cosine"),
    "average_rank16": replace(AVERAGE, rank=16),
    "average_s25": replace(AVERAGE, sparsity=0.25),
    "average_s50": replace(AVERAGE, sparsity=0.50),
    "average_s75": replace(AVERAGE, sparsity=0.75),
    "average_s75_mild": replace(AVERAGE, sparsity=0.75, resolution=(64, 160)),
    "demo_half": replace(ZERO, resolution=(16, 48)),
    "demo_low": replace(ZERO, resolution=(7, 28)),
    "demo_average_half": replace(AVERAGE, resolution=(16, 48)),
}


@dataclass(frozen=True)
class Common:
    """Options of every stage."""

    # Folder of the data set archives and of weights/.
    data_root: Path = Path(os.environ.get("FASTRECYCLE_DATA", "data"))
    # Folder of everything made here.
    work: Path = Path("runs/cifar_fs")
    # Seed of the stage.
    seed: int = 0
    # bf16, fp32, or fp8 for meta-training.
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    # triton, compile or reference.
    backend: Literal["triton", "compile", "reference"] = "compile"
    # cuda or cpu.
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    # "vit_tiny": ViT-Ti/16 and the ResNet-50 prior of data_root/weights; or a folder with
    # vit.safetensors and prior.safetensors; or "demo", the packaged ones.
    models: str = "vit_tiny"

    def vit(self) -> ViT:
        """The backbone."""
        if self.models == "vit_tiny":
            path = self.data_root / "weights/vit_tiny_patch16_224_augreg.safetensors"
            return ViT.from_pretrained(path, config={"mean": HALF, "std": HALF}).to(self.device)
        demo = self.models == "demo"
        source = "demo" if demo else Path(self.models) / "vit.safetensors"
        return ViT.from_pretrained(source).to(self.device)

    def prior(self) -> torch.nn.Module:
        """The naturalness prior."""
        if self.models == "vit_tiny":
            path = self.data_root / "weights/resnet50_v1_stem_to_layer3.safetensors"
            return load_prior(path, stride_in="conv1", eps=1.001e-5).to(self.device)
        demo = self.models == "demo"
        return load_prior("demo" if demo else Path(self.models) / "prior.safetensors").to(
            self.device
        )

    def pixels(self, split: str) -> Pixels:
        """A decoded split on the device."""
        stored = np.load(self.work / f"{split}.npz")
        names = tuple(stored["names"].tolist())
        on_device = torch.from_numpy(stored["pixels"]).to(self.device)
        return Pixels(on_device, stored["labels"], names, f"cifar_fs {split}")


def say(stage: str, **values: object) -> None:
    """One JSON line to the standard output, with the time of day."""
    print(json.dumps({"t": round(time.time() % 100_000, 1), "stage": stage, **values}), flush=True)


def decode_splits(common: Common, splits: tuple[str, ...] = ("train", "val", "test")) -> None:
    """Resize the splits to 224 pixels and keep them as arrays."""
    vit = common.vit()
    common.work.mkdir(parents=True, exist_ok=True)
    for split in splits:
        start = time.time()
        data = decode(vit, "cifar_fs", split, common.data_root)
        np.savez(
            common.work / f"{split}.npz",
            pixels=data.pixels.numpy(),
            labels=data.labels,
            names=np.array(data.class_names),
        )
        say("decode", split=split, images=len(data.labels), seconds=round(time.time() - start, 1))


def bank(common: Common, config: PretuneConfig = BANK, name: str = "bank") -> None:
    """Pre-tune LoRAs on random tasks of the training classes."""
    start = time.time()
    last: dict[str, float] = {}

    def on_step(step: int, values: dict[str, float]) -> None:
        last.update(values)

    loras = pretune(
        common.vit(), common.pixels("train"), config, seed=common.seed,
        precision=common.precision, on_step=on_step,
    )  # fmt: skip
    loras.save(common.work / name)
    say("bank", loras=len(loras), seconds=round(time.time() - start, 1), **last)


def invert_bank(
    common: Common,
    config: InversionConfig = INVERSION,
    name: str = "pool",
    bank: str = "bank",
    prior: bool = True,
    control: Literal["none", "untrained", "shuffled_heads"] = "none",
    first: int = 30,
) -> None:
    """Invert the first LoRAs of the bank; `control` spoils them first."""
    loras = list(LoRABank.load(common.work / bank))[:first]
    vit = common.vit()
    if control == "untrained":
        loras = [
            replace(LoRA.init(vit.config, seed=i), head=x.head, class_names=x.class_names)
            for i, x in enumerate(loras)
        ]
    if control == "shuffled_heads":  # each LoRA under the head of the next
        loras = [replace(x, head=y.head) for x, y in zip(loras, loras[1:] + loras[:1], strict=True)]
    network = common.prior() if prior else None
    start = time.time()
    first_step: list[float] = []

    def on_step(done: int, values: dict[str, float]) -> None:
        first_step.append(time.time())
        if values and done % 2000 < 160:
            say("invert", pool=name, done=done, **{k: round(v, 3) for k, v in values.items()})

    parts = invert(
        vit, loras, network, config, seed=common.seed, precision=common.precision,
        backend=common.backend, folder=common.work / name, on_step=on_step,
    )  # fmt: skip
    pool = SyntheticPool(parts)
    right = (pool.teacher_logits.argmax(1) == pool.labels).float().mean().item()
    seconds = time.time() - start
    say(
        "invert", pool=name, images=len(pool), seconds=round(seconds, 1),
        first_steps_s=round(first_step[min(3, len(first_step) - 1)] - start, 1),
        image_iterations_per_s=round(len(pool) * config.iterations / seconds),
        teacher_accuracy=round(100 * right, 2),
    )  # fmt: skip


def real_pool(
    common: Common, name: str = "real", bank: str = "bank", first: int = 30, per_class: int = 10
) -> None:
    """A pool of real training images in place of synthetic ones: the upper reference."""
    vit, train = common.vit(), common.pixels("train")
    rng = np.random.default_rng(common.seed)
    parts = []
    for task, lora in enumerate(list(LoRABank.load(common.work / bank))[:first]):
        assert lora.class_names is not None
        classes = [train.class_names.index(c) for c in lora.class_names]
        rows = np.concatenate(
            [rng.choice(np.flatnonzero(train.labels == c), per_class, False) for c in classes]
        )
        pixels = train.pixels[torch.from_numpy(rows).to(common.device)]
        with torch.no_grad():
            output = vit.encode(vit.normalise(pixels.float() / 255), lora.to(common.device))
            logits = lora.to(common.device).require_head()(output.features)
        order = output.cls_scores.sort(dim=1, descending=True, stable=True).indices
        labels = torch.arange(len(classes)).repeat_interleave(per_class)
        part = TaskImages(
            task, pixels.cpu(), labels, order.cpu(), vit.config.patches, logits.cpu(),
            lora.class_names, lora.name,
        )  # fmt: skip
        parts.append(part)
    SyntheticPool(parts).save(common.work / name)
    say("real_pool", pool=name, images=sum(len(p.images) for p in parts))


def meta(
    common: Common,
    variants: tuple[str, ...] = ("average",),
    pool: str = "pool",
    bank: str = "bank",
    first: int = 0,
    minutes: float = 8.0,
    steps: int = 0,
    five_shot: bool = True,
) -> None:
    """Meta-train the named variants and score them on validation tasks.

    Args:
        common: options of every stage.
        variants: of the table in this file.
        pool: name of the pool.
        bank: name of the bank, for variants that start from its average.
        first: LoRAs of the pool to use; 0 for all.
        minutes: no further variant starts after this.
        steps: overrides the variant's steps; 0 keeps them.
        five_shot: also score 5-shot tasks.
    """
    start = time.time()
    vit, val = common.vit(), common.pixels("val")
    images = SyntheticPool.load(common.work / pool)
    if first:
        images = SyntheticPool(images.parts[:first])
    for name in variants:
        if time.time() - start > 60 * minutes:
            say("meta", variant=name, skipped="out of time")
            continue
        config = VARIANTS[name]
        if steps:
            config = replace(config, steps=steps)
        began = time.time()
        result = meta_train(
            vit, images, config, seed=common.seed, precision=common.precision,
            backend=common.backend,
            start=LoRA.average(LoRABank.load(common.work / bank))
            if config.start == "average" else None,
        )  # fmt: skip
        torch.cuda.synchronize() if common.device == "cuda" else None
        trained = time.time() - began
        result.lora.save(common.work / "meta" / f"{pool}-{name}-{common.seed}")
        scores = {}
        for shots in (1, 5) if five_shot else (1,):
            scores[f"val{shots}"] = str(evaluate(vit, result.lora, val, shots=shots, split="val"))
        say(
            "meta", variant=name, pool=pool, loras=len(images.parts), steps=config.steps,
            seconds=round(trained, 1), seed=common.seed, **scores,
        )  # fmt: skip


def score(
    common: Common,
    loras: tuple[str, ...] = (),
    bank: str = "bank",
    cross: tuple[str, ...] = ("isic", "omniglot"),
    split: Literal["val", "test"] = "test",
) -> None:
    """Score plain nearest centres, averaged LoRAs and the named meta-LoRAs on test tasks."""
    vit = common.vit()
    sets: dict[str, object] = {"cifar_fs": common.pixels(split)}
    for name in cross:
        if list(common.data_root.glob(f"{name}*")):
            sets[name] = decode(vit, name, "test", common.data_root).to(common.device)
    rows: dict[str, LoRA | None] = {"nn": None}
    if (common.work / bank).exists():
        loras_of_bank = LoRABank.load(common.work / bank)
        rows["average_factors"] = LoRA.average(loras_of_bank, of="factors")
        rows["average_products"] = LoRA.average(loras_of_bank)
    for name in loras:
        rows[name] = LoRA.load(common.work / "meta" / name)
    table = {}
    for set_name, data in sets.items():
        results = {}
        for name, lora in rows.items():
            results[name] = evaluate_shots(vit, lora, data, shots=(1, 5))
            for shots, result in results[name].items():
                over = {
                    f"over_{other}": result.minus(results[other][shots])
                    for other in ("nn", "average_factors", "average_products")
                    if other in results and other != name
                }
                table[f"{set_name}/{shots}/{name}"] = {
                    "accuracy": result.accuracy,
                    "ci95": result.ci95,
                    **{k: [v.accuracy, v.ci95] for k, v in over.items()},
                    "per_task": result.per_task.tolist(),
                }
                say("score", set=set_name, split=split, shots=shots, lora=name, result=str(result),
                    **{k: str(v) for k, v in over.items()})  # fmt: skip
    atomic_write(common.work / f"results-{split}.json", json.dumps(table))


if __name__ == "__main__":
    import tyro

    tyro.extras.subcommand_cli_from_dict(
        {
            "decode": decode_splits,
            "bank": bank,
            "invert": invert_bank,
            "real": real_pool,
            "meta": meta,
            "score": score,
        },
        args=sys.argv[1:],
    )

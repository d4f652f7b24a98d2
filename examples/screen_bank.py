"""What `--screen` is worth: a bank, a fifth of it poisoned, recycled with and without it.

    python examples/screen_bank.py --bank runs/cifar_fs/bank --dataset cifar_fs \
        --backbone data/weights/vit_tiny_patch16_224_augreg.safetensors --mean-std 0.5 \
        --prior data/weights/resnet50_v1_stem_to_layer3.safetensors --stride-in conv1 --eps 1.001e-5

Of the poisoned LoRAs a third each has the rows of its head shuffled, noise for weights of the same
size, or belongs to another backbone: one whose features stand in another order. The clean bank, the
poisoned one and the poisoned one screened are recycled with the same seed and settings and scored
on the same frozen tasks. Runs resume; the last lines are the losses by poison, in points.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from fastrecycle import InversionConfig, LoRABank, MetaConfig, MetaLoRARecycler, ViT, evaluate
from fastrecycle.eval import Result, decode
from fastrecycle.lora import LoRA
from fastrecycle.pool import SyntheticPool
from fastrecycle.prior import load_prior

INVERSION = InversionConfig(images_per_class=10, iterations=300)
META = MetaConfig(steps=1000, queries=9)


def shuffled_head(lora: LoRA, generator: torch.Generator) -> LoRA:
    """Every class under the row of another."""
    head = lora.require_head()
    rows = torch.arange(head.classes).roll(1)
    bias = None if head.bias is None else head.bias[rows]
    return replace(lora, head=replace(head, weight=head.weight[rows], bias=bias))


def noise_weights(lora: LoRA, generator: torch.Generator) -> LoRA:
    """Normal numbers of the same spread in place of both factors."""

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator) * x.std()

    a, b = ({t: noise(x) for t, x in factors.items()} for factors in (lora.a, lora.b))
    return replace(lora, a=a, b=b)


def other_base(lora: LoRA, generator: torch.Generator) -> LoRA:
    """For the same network with its features in another order: the shapes still fit."""
    width = lora.require_head().weight.shape[1]
    order = torch.randperm(width, generator=generator)

    def permuted(x: torch.Tensor, axis: int) -> torch.Tensor:
        return x.index_select(axis, order) if x.shape[axis] == width else x

    a = {t: permuted(x, 2) for t, x in lora.a.items()}
    b = {t: permuted(x, 1) for t, x in lora.b.items()}
    head = lora.require_head()
    return replace(lora, a=a, b=b, head=replace(head, weight=head.weight[:, order]))


KINDS = (shuffled_head, noise_weights, other_base)


def poison(bank: Sequence[LoRA], share: float, seed: int) -> tuple[LoRABank, dict[str, str]]:
    """A bank with a share of its LoRAs poisoned, and {name: how}."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(bank), generator=generator)[: round(share * len(bank))]
    loras, how = list(bank), {}
    for number, place in enumerate(sorted(chosen.tolist())):
        kind = KINDS[number % len(KINDS)]
        loras[place] = kind(loras[place], generator)
        how[str(loras[place].name)] = kind.__name__
    return LoRABank(loras), how


def main(
    bank: Path,
    dataset: str,
    backbone: str = "demo",
    prior: str = "demo",
    out: Path = Path("runs/screen_bank"),
    mean_std: float | None = None,
    stride_in: Literal["conv1", "conv2"] | None = None,
    eps: float | None = None,
    data_root: Path | None = None,
    loras: int = 30,
    share: float = 0.2,
    shots: tuple[int, ...] = (1, 5),
    ways: int = 5,
    queries: int = 15,
    tasks: int = 600,
    seed: int = 0,
    device: str = "auto",
    inversion: InversionConfig = INVERSION,
    meta: MetaConfig = META,
) -> dict[str, dict[int, Result]]:
    """Recycle three banks and compare.

    Args:
        bank: folder of clean LoRAs, as `fastrecycle pretune` writes it.
        dataset: for evaluation, split "test"; see `fastrecycle eval`.
        backbone: of the bank; see `ViT.from_pretrained`.
        prior: see `load_prior`; stride_in and eps are its own.
        out: folder of the runs and of results.json.
        mean_std: mean and std of the backbone's pixels, where its file does not tell.
        stride_in: see prior.
        eps: see prior.
        data_root: folder of registered data sets.
        loras: of the bank to use, from the first on.
        share: of them poisoned.
        shots: of the evaluation's tasks, like ways, queries and tasks.
        ways: see shots.
        queries: see shots.
        tasks: see shots.
        seed: of everything drawn.
        device: auto, cuda or cpu.
        inversion: settings of inversion.
        meta: settings of meta-training.
    """
    triple = None if mean_std is None else (mean_std,) * 3
    vit = ViT.from_pretrained(backbone, triple and {"mean": triple, "std": triple})
    network = load_prior(prior, stride_in=stride_in, eps=eps)
    clean = LoRABank.load(bank)[:loras]
    poisoned, how = poison(clean, share, seed)
    images = decode(vit, dataset, "test", data_root)
    results: dict[str, dict[int, Result]] = {}
    said: dict[str, Any] = {"poison": how}
    for name, chosen, screening in (
        ("clean", clean, False),
        ("poisoned", poisoned, False),
        ("screened", poisoned, True),
    ):
        rec = MetaLoRARecycler(
            vit, chosen, network, inversion, meta, device=device, seed=seed, screening=screening
        )
        # both runs on the poisoned bank share its pool
        pool = rec.invert(out / ("pool-clean" if name == "clean" else "pool-poisoned"))
        lora = rec.meta_train(SyntheticPool(pool.parts), out / f"meta-{name}")
        results[name] = {
            k: evaluate(
                vit, lora, images, ways=ways, shots=k, queries=queries, tasks=tasks, seed=seed
            )
            for k in shots
        }
        said[name] = {k: str(r) for k, r in results[name].items()}
        if screening:
            left = {str(s.name): list(s.reasons) for s in rec.scores if s.reasons}
            said |= {
                "found": sorted(set(left) & set(how)),
                "missed": sorted(set(how) - set(left)),
                "left out though clean": {n: r for n, r in left.items() if n not in how},
            }
    for name in ("poisoned", "screened"):
        for k in shots:
            said[f"{name} minus clean, {k}-shot"] = str(results[name][k].minus(results["clean"][k]))
    (out / "results.json").write_text(json.dumps(said, indent=2) + "\n")
    print(json.dumps(said, indent=2))
    return results


if __name__ == "__main__":
    tyro.cli(main)

"""The baselines that train on a synthetic pool, CAML and P>M>F, from a saved pool folder.

    python examples/train_pooled_baselines.py --pool runs/demo/pool --data cifar_fs

Trains both with the tasks and augmentation of the meta-LoRA, writes `caml.safetensors` and
`pmf.safetensors`, and prints their accuracy on validation tasks beside that of the plain backbone;
P>M>F's rate of fine-tuning is chosen on these tasks. In a program of your own:

    CAML(vit, CAMLNetwork.load("caml.safetensors"))
    PMF(ViT.from_pretrained("pmf.safetensors"), lr=1e-4)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import tyro

from fastrecycle import MetaConfig, SyntheticPool, ViT
from fastrecycle.baselines import (
    CAML,
    PMF,
    PMF_GRID,
    PMF_META,
    CAMLConfig,
    NearestCentre,
    choose,
    decode_tasks,
    embed_tasks,
    score,
    train_caml,
)
from fastrecycle.eval import Result, decode
from fastrecycle.metatrain import meta_train

CUDA = torch.cuda.is_available()
CAML_TRAINING = CAMLConfig()
Report = Callable[[int, dict[str, float]], None]


def printed(title: str, steps: int) -> Report:
    """A line every 200 steps, and at the last."""

    def report(step: int, values: dict[str, float]) -> None:
        if step % 200 == 0 or step == steps:
            told = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"{title} step {step}  {told}", flush=True)

    return report


def main(
    pool: Path,
    data: str = "cifar_fs",
    backbone: str = "demo",
    out: Path = Path("runs/pooled_baselines"),
    data_root: Path | None = None,
    caml: CAMLConfig = CAML_TRAINING,
    pmf: MetaConfig = PMF_META,
    rates: tuple[float, ...] = PMF_GRID["lr"],
    steps: int = 50,
    ways: int = 5,
    shots: tuple[int, ...] = (1, 5),
    queries: int = 15,
    tasks: int = 200,
    seed: int = 0,
    precision: Literal["bf16", "fp32"] = "bf16" if CUDA else "fp32",
    backend: Literal["compile", "reference"] = "compile" if CUDA else "reference",
    device: str = "cuda" if CUDA else "cpu",
) -> dict[str, dict[int, Result]]:
    """Train both and score them.

    Args:
        pool: folder of a saved pool, as `fastrecycle invert` writes it.
        data: a registered data set or a folder, whose validation split is scored.
        backbone: "demo", or a file of weights that the pool was inverted from.
        out: where both models are written.
        data_root: folder of registered data sets; unset: FASTRECYCLE_DATA.
        caml: network and training of CAML.
        pmf: meta-training of P>M>F.
        rates: of its fine-tuning, of which the best is taken; 0 does without.
        steps: of its fine-tuning.
        ways: classes of a validation task.
        shots: support images a class; several are scored one after the other.
        queries: query images a class.
        tasks: validation tasks.
        seed: of training and tasks.
        precision: of training and features.
        backend: of the forward passes.
        device: cuda or cpu.

    Returns:
        {method: {shots: accuracy}}.

    """
    vit = ViT.from_pretrained(backbone).to(device)
    images = SyntheticPool.load(pool)
    how = {"precision": precision, "backend": backend}
    network = train_caml(vit, images, caml, seed=seed, on_step=printed("CAML", caml.steps), **how)
    network.save(out / "caml.safetensors")
    learnt = meta_train(vit, images, pmf, seed=seed, on_step=printed("P>M>F", pmf.steps), **how).vit
    learnt.save(out / "pmf.safetensors")

    pixels = decode(vit, data, "val", data_root)
    shape = {"shots": shots, "ways": ways, "queries": queries, "tasks": tasks, "seed": seed}
    results: dict[str, dict[int, Result]] = {}
    for name, method in (("NN", NearestCentre(vit, **how)), ("CAML", CAML(vit, network, **how))):
        embedded = embed_tasks(method, pixels, split="val", **shape)
        results[name] = {count: score(method, embedded[count]) for count in shots}
    results["P>M>F"] = {}
    for count, on in decode_tasks(learnt, pixels, split="val", **shape).items():
        choice = choose(PMF(learnt, steps=steps, precision=precision), on, {"lr": rates})
        tried = {settings["lr"]: result for settings, result in choice.results}
        results["P>M>F"][count] = tried[choice.settings["lr"]]
        print(f"P>M>F at {count}-shot: the best rate of fine-tuning is {choice.settings['lr']:g}")
    for name, of in results.items():
        for count, result in of.items():
            print(f"{name:6s} {count}-shot  {result}", flush=True)
    return results


if __name__ == "__main__":
    tyro.cli(main)

"""Table 12 on real images: a bank of a two-tower model recycled and compared at 0 shots.

    python examples/train_text_tower.py --data-root data --out runs/two_tower
    python examples/recycle_zero_shot.py --data-root data --towers runs/two_tower

Pre-tunes LoRAs on the image tower against class texts, inverts them, meta-trains at 0 shots, and
prints each method's accuracy on the same frozen tasks. Stages that are done are read from --out.
Settings are chosen on validation classes; --split test is for the end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
import tyro

from fastrecycle import InversionConfig, LoRABank, MetaConfig, MetaLoRARecycler, PretuneConfig, ViT
from fastrecycle.baselines import ZeroShotRow, zero_shot_rows
from fastrecycle.baselines.zero_shot import POOL_TASKS
from fastrecycle.eval import decode
from fastrecycle.files import write_json
from fastrecycle.pretune import pretune
from fastrecycle.prior import load_prior
from fastrecycle.report import text_table
from fastrecycle.text import TextTower

CUDA = torch.cuda.is_available()
DATA = Path(os.environ.get("FASTRECYCLE_DATA", "data"))
BANK = PretuneConfig(num=40)
INVERSION = InversionConfig(images_per_class=10, iterations=300, group=8)
META = MetaConfig(steps=1000, shots=0, queries=9, tasks=4, start="zero", lr=3e-4)


def main(
    data_root: Path = DATA,
    towers: Path = Path("runs/two_tower"),
    out: Path = Path("runs/zero_shot"),
    data: str = "cifar_fs",
    split: Literal["val", "test"] = "val",
    prior: str | None = None,
    pretuning: PretuneConfig = BANK,
    inversion: InversionConfig = INVERSION,
    meta: MetaConfig = META,
    pool_tasks: MetaConfig = POOL_TASKS,
    choose: bool = True,
    ways: int = 5,
    queries: int = 15,
    tasks: int = 600,
    seed: int = 0,
    device: str = "cuda" if CUDA else "cpu",
) -> dict[str, ZeroShotRow]:
    """Recycle and compare.

    Args:
        data_root: folder of the data sets and of weights/.
        towers: folder with vit.safetensors and text/.
        out: bank, pool, meta-LoRA and zero_shot.json go there.
        data: data set; LoRAs see its training classes.
        split: whose classes are scored.
        prior: see `load_prior`, "none" for none; unset: the ResNet-50 of data_root/weights.
        pretuning: of the bank.
        inversion: of the pool.
        meta: of the meta-LoRA.
        pool_tasks: tasks of the pool for MOLE and LoRAHub; their queries fit the pool's images.
        choose: choose MOLE's settings on validation tasks.
        ways: classes of a task.
        queries: images of each class in a task.
        tasks: number of tasks.
        seed: of everything drawn.
        device: cuda or cpu.

    """
    vit = ViT.from_pretrained(towers / "vit.safetensors").to(device)
    text = TextTower.from_pretrained(towers / "text").to(device)
    precision = "bf16" if device.startswith("cuda") else "fp32"
    if not (out / "bank").is_dir():
        images = decode(vit, data, "train", data_root)
        pretune(vit, images, pretuning, seed=seed, precision=precision, text=text).save(
            out / "bank"
        )
    bank = LoRABank.load(out / "bank")
    if prior is None:
        path = data_root / "weights/resnet50_v1_stem_to_layer3.safetensors"
        network = load_prior(path, stride_in="conv1", eps=1.001e-5)
    else:
        network = load_prior(prior)
    recycler = MetaLoRARecycler(
        vit, bank, network, inversion, meta, device=device, precision=precision, seed=seed
    )
    lora = recycler.run(out / "run")
    assert recycler.pool is not None
    rows = zero_shot_rows(
        recycler.vit, text, data, bank=bank, pool=recycler.pool, meta_lora=lora,
        validation=data if choose else None, config=pool_tasks, ways=ways, queries=queries,
        tasks=tasks, split=split, seed=seed, data_root=data_root, precision=precision,
    )  # fmt: skip
    ours = rows["LoRA Recycle"].result
    lines = []
    for name, row in rows.items():
        gain = "" if row.result is ours else str(ours.minus(row.result))
        tuned = "no" if row.tunes else "yes"
        lines.append([name, tuned, str(row.result), gain])
    title = f"{ways}-way 0-shot"
    print(text_table(["method", "fine-tuning-free", title, "LoRA Recycle is ahead by"], lines))
    content = {
        name: {
            "accuracy": row.result.accuracy,
            "ci95": row.result.ci95,
            "per_task": row.result.per_task.tolist(),
            "settings": row.settings,
            "seconds": None if row.cost is None else row.cost.seconds,
        }
        for name, row in rows.items()
    }
    write_json(out / f"zero_shot_{split}.json", content)
    return rows


if __name__ == "__main__":
    tyro.cli(main)

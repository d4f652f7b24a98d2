"""What a path holds (backbone, prior, LoRA, bank, pool, run, data set), and what is wrong with it.

Each `describe_...` returns lines to print and a list of problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastrecycle.data import DATASETS, ImageDataset, load_dataset
from fastrecycle.data.layouts import SPLITS
from fastrecycle.data.stores import ARCHIVE_SUFFIXES
from fastrecycle.files import load_safetensors, load_torch
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.lora_files import holds_lora
from fastrecycle.pool import SyntheticPool, TaskImages
from fastrecycle.prior import load_prior
from fastrecycle.run import read_manifest
from fastrecycle.screening import at_chance
from fastrecycle.vetting import read_members, vet
from fastrecycle.vit import ViT
from fastrecycle.vit_config import ViTConfig, flops

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".index.json")
_REFUSED = (OSError, ValueError, TypeError)


@dataclass
class Description:
    """Lines about something, and its problems."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, other: Description) -> None:
        """Append another's."""
        self.lines += other.lines
        self.problems += other.problems


def describe(
    source: str,
    *,
    config: Any = None,
    data_root: str | Path | None = None,
    full: bool = False,
) -> Description:
    """Describe whatever `source` is.

    Args:
        source: a path, a registered data set's name, "demo", or a backbone that
            `ViT.from_pretrained` takes.
        config: for a backbone, see `ViT.from_pretrained`.
        data_root: where registered data sets are.
        full: decode every image of a data set.

    Raises:
        FileNotFoundError: there is no such thing.

    """
    if source == "demo":
        return describe_demo()
    if source in DATASETS:
        return describe_dataset(source, data_root, full)
    if source.endswith(".txt"):
        return describe_bank(source)
    path = Path(source)
    if not path.exists():
        if source.partition(":")[0] in ("open_clip", "timm", "hf"):
            return describe_backbone(source, config)
        raise FileNotFoundError(
            f"{source}: no such file or folder, and not one of demo, {', '.join(DATASETS)}"
        )
    kind = _kind(path)
    if kind is None:
        raise ValueError(
            f"{source}: expected weights, a PEFT folder, a bank, a pool, a run or a data set"
        )
    if kind == "dataset":
        return describe_dataset(source, data_root, full)
    if kind == "weights":
        return describe_weights(path, config)
    describers: dict[str, Callable[[Path], Description]] = {
        "lora": describe_lora, "pool": describe_pool, "run": describe_run, "bank": describe_bank,
    }  # fmt: skip
    return describers[kind](path)


def _kind(path: Path) -> str | None:
    if path.is_file():
        name = path.name.lower()
        if name.endswith((*ARCHIVE_SUFFIXES, ".csv")):
            return "dataset"
        return "weights" if name.endswith(_WEIGHTS) else None
    if (path / "adapter_config.json").exists():
        return "lora"
    pool = any(path.glob("task-*.safetensors"))
    run = (path / "run.json").exists()
    if pool:
        return "pool"
    if any(path.glob("*/adapter_config.json")) and not (path / "pool").exists():
        named = not run or read_manifest(path / "run.json").get("command") == "pretune"
        if named:
            return "bank"
    if run:
        return "run"
    if any(path.glob("**/adapter_config.json")):
        return "bank"
    if any(child.name.lower().endswith(_WEIGHTS) for child in path.iterdir()):
        return "weights"
    return "dataset"


def describe_demo() -> Description:
    """The packaged backbone, prior, bank and meta-LoRA."""
    from fastrecycle.assets import asset

    whole = Description()
    for title, describer, name in (
        ("backbone", lambda: describe_backbone("demo", None), "vit.safetensors"),
        ("prior", lambda: _prior("demo"), "prior.safetensors"),
        ("bank", _demo_bank, "bank"),
        ("meta-LoRA", lambda: _lora(LoRA.load("demo")), "meta_lora"),
    ):
        try:
            part = describer()
        except FileNotFoundError as error:
            part = Description([str(error)], [str(error)])
        whole.lines += [f"{title} ({asset.__module__}: {name})", *("  " + x for x in part.lines)]
        whole.problems += part.problems
    return whole


def _demo_bank() -> Description:
    bank = LoRABank.load("demo")
    return _bank(bank, len(bank))


def describe_backbone(source: str, config: Any) -> Description:
    """A vision transformer."""
    vit = ViT.from_pretrained(source, config)
    c: ViTConfig = vit.config
    count = sum(p.numel() for p in vit.parameters())
    found = Description(
        [
            f"vision transformer, {count / 1e6:.1f} M parameters",
            f"image {c.image_size} px, patch {c.patch_size} px ({c.patches} patches),"
            f" {c.prefix_tokens} prefix token{'' if c.prefix_tokens == 1 else 's'}"
            + (f", {c.registers} of them registers" if c.registers else "")
            + ("" if c.pool == "cls" else f", features by {c.pool}"),
            f"width {c.width}, {c.depth} blocks, {c.heads} heads, MLP {c.mlp_dim},"
            f" features {c.features}",
            f"{c.activation}, LayerNorm eps {c.norm_eps:g}, mean {_numbers(c.mean)},"
            f" std {_numbers(c.std)}",
            f"a training step costs {flops(c):.2f} G an image (the paper's definition)",
        ]
    )
    bad = [name for name, p in vit.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        found.problems.append(f"NaN or infinity in {', '.join(bad[:3])}")
    return found


def describe_weights(path: Path, config: Any) -> Description:
    """A file or folder of weights: a pool's file, a LoRA's, a prior or a backbone."""
    try:
        if path.is_file() and path.suffix in (".pt", ".pth") and holds_lora(load_torch(path)):
            return describe_lora(path)
        if path.suffix == ".safetensors":
            tensors, metadata = load_safetensors(path)
            if "fastrecycle.task" in metadata:
                return _pool([TaskImages.load(path)])
            if holds_lora(tensors):
                return describe_lora(path)
            if any(name.endswith("running_var") for name in tensors) and "bn1.weight" in tensors:
                return _prior(path)
        return describe_backbone(str(path), config)
    except FileNotFoundError:
        raise
    except _REFUSED as error:
        return Description([f"{path}: weights"], [str(error)])


def _prior(source: str | Path) -> Description:
    network: Any = load_prior(source)
    found = Description([f"prior network, {network.num_bn} BatchNorms"])
    spec = getattr(network, "spec", None)
    if spec is not None:
        found.lines.append(f"stride in {spec.stride_in}, BatchNorm eps {spec.eps:g}")
    return found


def describe_lora(path: Path) -> Description:
    """A PEFT folder, or a LoRA's file."""
    try:
        return _lora(LoRA.load(path))
    except _REFUSED as error:
        return Description([f"{path}: LoRA"], [str(error)])


def _lora(lora: LoRA) -> Description:
    lines = [f"LoRA, {lora.parameters:,} parameters, {lora.depth} blocks"]
    for target, ranks in lora.ranks.items():
        used = [r for r in ranks if r]
        span = f"{min(used)} to {max(used)}" if min(used) < max(used) else f"{used[0]}"
        sizes = f"{lora.a[target].shape[2]} -> {lora.b[target].shape[1]}"
        lines.append(f"{target}: {sizes}, rank {span} in {len(used)} blocks")
    if lora.head is None:
        lines.append("no head (enough for use and evaluation; inversion needs one)")
    else:
        names = ", ".join(lora.class_names) if lora.class_names else "without names"
        kind = "class texts" if lora.head.normalised else "classes"
        lines.append(f"head: {lora.head.classes} {kind} ({names})")
    if lora.base_model:
        lines.append(f"made for {lora.base_model}")
    return Description(lines)


def describe_bank(source: str | Path) -> Description:
    """A folder of PEFT folders, or a list of them; each broken or doubled one is named."""
    members = read_members(source)
    loras, left_out = vet(members, heads=False)
    found = _bank(loras, len(members)) if loras else Description([f"{source}: bank"])
    found.problems += [f"{name}: {reason}" for name, reason in left_out.items()]
    return found


def _bank(loras: Sequence[LoRA], of: int) -> Description:
    names = Counter(name for lora in loras for name in lora.class_names or ())
    usable = "" if of == len(loras) else f", {len(loras)} of them usable"
    found = Description(
        [
            f"bank of {of} LoRAs{usable}",
            f"made for {_counts(lora.base_model or 'an unnamed model' for lora in loras)}",
            f"ranks {_counts(lora.rank for lora in loras)}",
            f"targets {_counts(' '.join(lora.ranks) for lora in loras)}",
            f"heads {_counts(x.head.classes if x.head else 'none' for x in loras)} classes",
            f"{len(names)} class names, {sum(names.values())} uses",
        ]
    )
    headless = sum(lora.head is None for lora in loras)
    if headless:
        found.lines.append(f"{headless} without a head, which inversion needs")
    return found


def describe_pool(path: Path) -> Description:
    """Files task-*.safetensors."""
    parts, problems = [], []
    for file in sorted(path.glob("task-*.safetensors")):
        try:
            parts.append(TaskImages.load(file))
        except _REFUSED as error:
            problems.append(str(error))
    found = _pool(parts) if parts else Description([f"{path}: synthetic pool"])
    found.problems += problems
    return found


def _pool(parts: list[TaskImages]) -> Description:
    try:
        pool = SyntheticPool(parts)
    except ValueError as error:
        return Description(["synthetic pool"], [str(error)])
    right, per_class, guessing = 0, [], []
    for part in parts:
        own = int((part.teacher_logits.argmax(1) == part.labels).sum())
        right += own
        per_class += part.labels.bincount()[part.labels.unique()].tolist()
        if at_chance(part):
            guessing.append(part.name or f"task {part.task}")
    found = Description(
        [
            f"synthetic pool, {len(pool)} images of {len(parts)} LoRAs, {pool.side} x {pool.side}"
            " px",
            f"{len(pool.class_names)} classes"
            + ("" if pool.has_names else " (without names)")
            + f", {min(per_class)} to {max(per_class)} images of each and LoRA",
            f"{pool.survivors} of {pool.patches} patches survived pruning",
            f"teachers name {100 * right / len(pool):.1f} % of their own images rightly",
        ]
    )
    if guessing:  # too few iterations, or a broken LoRA; meta-training would learn from noise
        found.lines.append(f"no better than guessing: the teachers of {', '.join(guessing)}")
    return found


def describe_run(path: Path) -> Description:
    """A run's folder: settings, and how far its stages are."""
    found = Description()
    try:
        manifest = read_manifest(path / "run.json")
    except ValueError as error:
        return Description([f"{path}: run"], [str(error)])
    made = manifest.get("versions", {})
    found.lines += [
        f"run with seed {manifest.get('seed')}, fastrecycle {made.get('fastrecycle')},"
        f" torch {made.get('torch')}",
        *(f"input {name}: {value}" for name, value in manifest.get("inputs", {}).items()),
    ]
    if (path / "pool").is_dir():
        pool = describe_pool(path / "pool")
        unfinished = (path / "pool" / "group.state.safetensors").exists()
        found.lines += ["pool:" + (" not finished" if unfinished else "")]
        found.lines += ["  " + x for x in pool.lines]
        found.problems += pool.problems
    for folder in (path, path / "meta"):
        state = folder / "meta.state.safetensors"
        if state.exists():
            try:
                step = load_safetensors(state)[1].get("iteration", "?")
                found.lines.append(f"meta-training: {step} steps done")
            except ValueError as error:
                found.problems.append(str(error))
    if (path / "meta_lora").is_dir():
        lora = describe_lora(path / "meta_lora")
        found.lines += ["meta_lora:", *("  " + x for x in lora.lines)]
        found.problems += lora.problems
    elif "meta" in manifest.get("config", {}):
        found.lines.append("no meta_lora yet: not finished; the same command goes on with it")
    return found


def describe_dataset(source: str, data_root: str | Path | None, full: bool) -> Description:
    """A data set: classes and images of each split; one image of each class is decoded."""
    found = Description([f"data set {source}"])
    seen: dict[tuple[str, ...], str] = {}
    missing: list[str] = []
    for split in SPLITS:
        try:
            dataset = load_dataset(source, split, data_root)
        except FileNotFoundError as error:
            missing.append(str(error))
            continue
        except _REFUSED as error:
            if f"has no split {split!r}" not in str(error):
                found.problems.append(str(error))
            continue
        same = seen.get(tuple(dataset.files))
        if same is not None:
            found.lines.append(f"{split}: the same as {same} (no splits)")
            continue
        seen[tuple(dataset.files)] = split
        found.add(_split(dataset, full))
    if not seen and not found.problems:
        raise FileNotFoundError(missing[0] if missing else f"{source}: no images")
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _split(dataset: ImageDataset, full: bool) -> Description:
    counts = np.bincount(dataset.labels, minlength=len(dataset.class_names))
    found = Description(
        [
            f"{dataset.split}: {len(dataset)} images, {len(counts)} classes of"
            f" {counts.min()} to {counts.max()} images"
        ]
    )
    chosen = range(len(dataset)) if full else np.unique(dataset.labels, return_index=True)[1]
    for index in chosen:
        try:
            dataset.open(int(index))
        except _REFUSED as error:
            found.problems.append(str(error))
    return found


def _counts(values: Iterable[Any]) -> str:
    return ", ".join(f"{value} ({count}x)" for value, count in Counter(values).most_common())


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{x:g}" for x in values)

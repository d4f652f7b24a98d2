"""A bank from anywhere, member by member: what cannot be used is named, and the rest goes on.

A bank is a folder of PEFT folders or LoRA files, one of those, "hf:OWNER/REPO" (also @REVISION),
"demo", or a .txt file that lists any of these, one a line.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastrecycle.lora import Head, LoRA, LoRABank
from fastrecycle.vit import ViT
from fastrecycle.vit_config import ViTConfig

log = logging.getLogger(__name__)

_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "config.json",
          "head.safetensors", "class_names.json")  # fmt: skip
_REFUSED = (OSError, ValueError, TypeError)
_PROBES = 4  # random vectors that a change is told by
_SAME = 1e-3  # relative difference below which two changes are one, as of a float16 copy


@dataclass(frozen=True)
class Member:
    """One LoRA of a bank, or why it could not be read."""

    name: str
    lora: LoRA | None
    problem: str | None = None


def read_members(source: str | Path, vit: ViT | None = None) -> list[Member]:
    """Every LoRA that a source names, read or refused.

    Args:
        source: see the module.
        vit: the backbone, which DoRA needs (see `LoRA.load`).

    Raises:
        FileNotFoundError: no such folder, no such list, or no LoRA in it.
        ValueError: no PEFT folder in it, and no file of it is a LoRA.

    """
    text = str(source)
    if text.endswith(".txt"):
        return [member for line in _lines(Path(text)) for member in read_members(line, vit)]
    if text.startswith("hf:"):
        return [_read(text, text, vit)]
    if text == "demo":
        return [Member(str(x.name), x) for x in LoRABank.load("demo")]
    folder = Path(text)
    if folder.is_file():
        return [_read(folder.stem, folder, vit)]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a bank is a folder of PEFT folders")
    found = sorted(p.parent for p in folder.glob("**/adapter_config.json"))
    files = sorted(p for p in folder.glob("**/*") if p.suffix in (".safetensors", ".pt"))
    if not found and not files:
        raise FileNotFoundError(
            f"{folder}: no PEFT folder (adapter_config.json) in it, and no LoRA file"
        )
    if found:
        named = [p.name if p == folder else p.relative_to(folder).as_posix() for p in found]
    else:
        named = [p.relative_to(folder).with_suffix("").as_posix() for p in files]
    members = [_read(name, path, vit) for name, path in zip(named, found or files, strict=True)]
    if not found and all(member.lora is None for member in members):
        raise ValueError(f"{folder}: no PEFT folder in it, and {members[0].problem}")
    return members


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list of LoRAs")
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].strip()
        if words:
            local = words != "demo" and not words.startswith("hf:")
            # paths are meant from where the list lies
            yield str(path.parent / words) if local else words


def _read(name: str, source: str | Path, vit: ViT | None) -> Member:
    try:
        path = _from_hub(str(source)) if str(source).startswith("hf:") else Path(source)
        return Member(name, replace(LoRA.load(path, vit), name=name))
    except _REFUSED as error:
        return Member(name, None, " ".join(str(error).split()))


def _from_hub(source: str) -> Path:
    repo, _, revision = source.removeprefix("hf:").partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise ValueError(f"{source}: expected hf:OWNER/REPO or hf:OWNER/REPO@REVISION")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{source}: needs pip install 'fastrecycle[hf]'") from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision or None, allow_patterns=list(_FILES)
            )
        )
    except Exception as error:  # the hub's own errors have no common base
        raise ValueError(f"{source}: cannot be downloaded ({error})") from None


def vet(
    members: Sequence[Member], config: ViTConfig | None = None, heads: bool = True
) -> tuple[list[LoRA], dict[str, str]]:
    """The LoRAs that can be used together, and why each of the others is left out.

    Args:
        members: of a bank.
        config: of the backbone; None: the shape that most of them have decides.
        heads: whether a LoRA needs one, as inversion does.

    Returns:
        LoRAs in their order, and {name: reason}.

    """
    out: dict[str, str] = {}
    good: list[LoRA] = []
    for member in members:
        reason = member.problem
        if member.lora is not None:
            reason = _unusable(member.lora, config, heads)
        if reason is None and member.lora is not None:
            good.append(member.lora if config is None else member.lora.fit(config))
        else:
            out[member.name] = str(reason)
    for reasons in (_of_other_models(good) if config is None else {}, _of_other_bases(good)):
        out |= reasons
        good = [x for x in good if x.name not in reasons]
    doubles = _duplicates(good)
    return [x for x in good if x.name not in doubles], out | doubles


def vetted_bank(
    source: str | Path, vit: ViT, heads: bool = True
) -> tuple[LoRABank, dict[str, str]]:
    """The usable LoRAs of a bank, at the backbone's depth; each of the others is logged by name.

    Raises:
        FileNotFoundError: see `read_members`.
        ValueError: none can be used.

    """
    loras, out = vet(read_members(source, vit), vit.config, heads)
    if not loras:
        name, reason = next(iter(out.items()))
        raise ValueError(f"{source}: none of {len(out)} LoRAs can be used; {name}: {reason}")
    for name, reason in out.items():
        log.warning("left out %s: %s", name, reason)
    return LoRABank(loras), out


def _unusable(lora: LoRA, config: ViTConfig | None, heads: bool) -> str | None:
    if config is not None:
        try:
            lora.fit(config)
        except ValueError as error:
            return str(error)
    if all(not lora.delta(t).any() for t in lora.a):
        return "changes nothing: every product of its factors is zero"
    head = lora.head
    if heads and head is None:
        return "has no head, which inversion needs"
    if head is not None and head.classes < 2:
        return f"its head has {head.classes} class; at least 2 expected"
    if head is not None and not (head.weight - head.weight[:1]).any():
        return "its head tells no classes apart: all rows are the same"
    return None


def _of_other_models(loras: Sequence[LoRA]) -> dict[str, str]:
    """LoRAs whose products have other sizes than those of most."""

    def sizes(lora: LoRA) -> dict[str, tuple[int, int]]:
        return {t: (lora.a[t].shape[2], lora.b[t].shape[1]) for t in sorted(lora.a)}

    counts = Counter(pair for lora in loras for pair in sizes(lora).items())
    usual = {target: pair for (target, pair), _ in reversed(counts.most_common())}
    found: dict[str, str] = {}
    for lora in loras:
        for target, (d_in, d_out) in sizes(lora).items():
            if (d_in, d_out) != usual[target]:
                found.setdefault(
                    str(lora.name),
                    f"made for another model: {target} is {d_in} -> {d_out}, most are"
                    f" {usual[target][0]} -> {usual[target][1]}",
                )
    return found


def _of_other_bases(loras: Sequence[LoRA]) -> dict[str, str]:
    """LoRAs that say they were made for another hub model than most; paths say nothing."""
    said = {str(x.name): x.base_model for x in loras if x.base_model}
    said = {name: base for name, base in said.items() if re.fullmatch(r"[\w.-]+/[\w.-]+", base)}
    if not said:
        return {}
    usual, count = Counter(said.values()).most_common(1)[0]
    if 2 * count <= len(said):  # no model has most of them
        return {}
    return {
        name: f"made for {base}, most for {usual}" for name, base in said.items() if base != usual
    }


def _duplicates(loras: Sequence[LoRA]) -> dict[str, str]:
    """LoRAs that change what an earlier one changes, under the same head."""
    prints = [_fingerprint(lora) for lora in loras]
    norms = [x.norm().item() for x in prints]
    order = sorted(range(len(loras)), key=lambda i: norms[i])
    found: dict[str, str] = {}
    for place, i in enumerate(order):
        for j in order[place + 1 :]:
            if norms[j] > norms[i] * (1 + _SAME):
                break
            apart = prints[i].shape != prints[j].shape or (
                (prints[i] - prints[j]).norm() > _SAME * prints[i].norm()
            )
            if not apart and _same_head(loras[i].head, loras[j].head):
                first, second = sorted((i, j))
                found.setdefault(str(loras[second].name), f"the same as {loras[first].name}")
    return found


def _fingerprint(lora: LoRA) -> Tensor:
    """A change applied to fixed random vectors: the same whatever its factors or rank."""
    rows = []
    for target in sorted(lora.a):
        a = lora.a[target].double()
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(a.shape[2], _PROBES, generator=generator, dtype=torch.float64)
        scale = lora.scale[target].double()[:, None, None]
        rows.append((scale * (lora.b[target].double() @ (a @ probes))).flatten())
    return torch.cat(rows)


def _same_head(one: Head | None, other: Head | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.weight.shape != other.weight.shape:
        return False
    return bool((one.weight - other.weight).norm() <= _SAME * one.weight.norm())

"""The classification head of a PEFT folder, and the names of its classes.

C classes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrecycle.files import load_safetensors, parse_json, read_json
from fastrecycle.lora import Head
from fastrecycle.peft_format.names import TEXT, base_class, some

log = logging.getLogger(__name__)

HEADS = ("classifier", "head", "fc", "score")  # names of a linear head in PEFT's modules_to_save

HEAD = re.compile(
    rf"(?P<module>(?:\w+\.)*?(?:{'|'.join(HEADS)}))"
    r"\.(?:modules_to_save\.(?:\w+\.)?)?(?P<which>weight|bias)"
)
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # transformers' stand-in for a missing class name


def read_head(
    path: Path, config: Mapping[str, Any], others: Mapping[str, Tensor], text: list[str]
) -> tuple[Head | None, str | None, tuple[str, ...] | None]:
    """The head, its module's name if PEFT trained it, and the class names. Grows `text`."""
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, x in others.items():
        if match := HEAD.fullmatch(name):
            parts.setdefault(match["module"], {})[match["which"]] = x
        elif TEXT.search(name):
            text.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{path}: unknown tensors {some(unknown)}; beside LoRA factors only a linear head"
            f" ({', '.join(HEADS)}) is read, anything else would change the frozen backbone"
        )
    if len(parts) > 1:
        raise ValueError(f"{path}: expected one head, got {', '.join(sorted(parts))}")
    module = next(iter(parts), None)
    head = None if module is None else _head(f"{path}: {module}", parts[module])
    names: tuple[str, ...] | None = None
    source = "head.safetensors"
    file = path / source
    if file.is_file():
        tensors, metadata = load_safetensors(file)
        beside = _head(str(file), {k.rpartition(".")[2]: x.float() for k, x in tensors.items()})
        if metadata.get("normalised", "false") not in ("true", "false"):
            raise ValueError(
                f"{file}: normalised must be true or false, got {metadata['normalised']!r}"
            )
        beside = replace(beside, normalised=metadata.get("normalised") == "true")
        if head is not None and not _same(head, beside):
            raise ValueError(
                f"{path}: the head in head.safetensors and {module} in the adapter differ; delete"
                " the outdated one"
            )
        head = beside
        if "class_names" in metadata:
            told = parse_json(metadata["class_names"], f"{file}: class_names must be a JSON list")
            names = _names(file, told)
    elif head is not None and base_class(config) in (
        "CLIPForImageClassification", "SiglipForImageClassification"
    ):  # fmt: skip
        log.warning(
            "%s: its head reads the mean of the patches, where the backbone here gives CLS or pools"
            " by attention; it is left out", path,
        )  # fmt: skip
        head = module = None
    if names is None and (path / "class_names.json").is_file():
        source = "class_names.json"
        names = _names(path / source, read_json(path / source))
    if names is None and head is not None:
        names, source = _id2label(path, config)
    if names is not None and head is not None and len(names) != head.classes:
        raise ValueError(
            f"{path}: the head has {head.classes} classes, {source} names {len(names)}; correct one"
        )
    return head, module, names


def _head(where: str, parts: Mapping[str, Tensor]) -> Head:
    weight, bias = parts.get("weight"), parts.get("bias")
    if weight is None or weight.ndim != 2 or not set(parts) <= {"weight", "bias"}:
        shapes = {name: tuple(x.shape) for name, x in parts.items()}
        raise ValueError(
            f"{where}: a head must be weight (C, features) and an optional bias (C,), got {shapes}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{where}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    if not all(torch.isfinite(x).all() for x in parts.values()):
        raise ValueError(f"{where}: the head holds NaN or infinity")
    return Head(weight, bias)


def _same(one: Head, other: Head) -> bool:
    """Equal up to float16's rounding."""
    if one.weight.shape != other.weight.shape or (one.bias is None) != (other.bias is None):
        return False
    if one.normalised != other.normalised:
        return False
    near = torch.allclose(one.weight, other.weight, rtol=2e-3, atol=1e-6)
    return near and (
        one.bias is None
        or other.bias is None
        or torch.allclose(one.bias, other.bias, rtol=2e-3, atol=1e-6)
    )


def _names(where: Path, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}: class names must be a JSON list of strings")
    return tuple(value)


def _id2label(path: Path, config: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, str]:
    """Class names from id2label, unless they are transformers' LABEL_0, LABEL_1, ..."""
    file = path / "config.json"
    base = read_json(file) if file.is_file() else {}
    for source, mapping in (
        ("id2label of adapter_config.json", config.get("id2label")),
        ("id2label of config.json", base.get("id2label") if isinstance(base, dict) else None),
    ):
        if not mapping:
            continue
        if not isinstance(mapping, dict) or {str(k) for k in mapping} != {
            str(i) for i in range(len(mapping))
        }:
            raise ValueError(f"{path}: {source} must map 0, 1, ... to names, got {mapping!r}")
        names = [str(mapping[str(i)]) for i in range(len(mapping))]
        if not all(_PLACEHOLDER.fullmatch(name) for name in names):
            return tuple(names), source
    return None, "id2label"

"""A PEFT folder out, which PEFT itself loads with the same output."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrecycle.files import atomic_open, safetensors_content
from fastrecycle.lora import LoRA
from fastrecycle.peft_format.fused import QKV, Triple, fuse_qkv, whole_attention
from fastrecycle.peft_format.names import LAYOUTS, METADATA, Layout


def write_peft(
    lora: LoRA, path: Path, layout: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a PEFT folder that PEFT itself loads with the same output.

    The config appears last and an old one goes first, so a kill at any moment leaves the old
    LoRA, the new one, or a folder that says it holds none; nothing mixed. All bytes are on disk
    before an old LoRA is touched, so a full disk does not cost it. Other files are left alone.

    Args:
        lora: what to write.
        path: the folder.
        layout: of `LAYOUTS`; None: the one it was read from, else "timm".
        dtype: of the stored numbers; None for float32.

    Raises:
        ValueError: unknown layout, nothing to write, or numbers beyond the dtype's range.
        OSError: the folder cannot be written, or the disk is full.

    """
    path = Path(path)
    name = layout or lora.layout or "timm"
    if name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}; got {name!r}")
    # the same model, under transformers 5 or 4
    at_home = name.removesuffix("_v4") == (lora.layout or "").removesuffix("_v4")
    prefix = lora.prefix if lora.prefix is not None and at_home else LAYOUTS[name].prefix
    tensors, sizes = _named_factors(lora, LAYOUTS[name], prefix)
    if not tensors:
        raise ValueError("LoRA.save: every rank is 0, there is nothing to write")
    # PEFT puts the head back only into a model that has such a module: the one it came from
    plain = lora.head is not None and not lora.head.normalised
    to_save = lora.head_module if at_home and plain else None
    if lora.head is not None and to_save is not None:
        tensors[f"{to_save}.weight"] = lora.head.weight
        if lora.head.bias is not None:
            tensors[f"{to_save}.bias"] = lora.head.bias
    config = _config(lora, sizes, [] if to_save is None else [to_save])
    own = {"depth": lora.depth, "ranks": {t: list(r) for t, r in lora.ranks.items()}}
    files = {
        "adapter_model.safetensors": _bytes(
            {f"base_model.model.{k}": x for k, x in tensors.items()},
            dtype,
            {"format": "pt", METADATA: json.dumps(own)},
        )
    }
    names = None if lora.class_names is None else json.dumps(list(lora.class_names))
    if lora.head is not None:
        parts = {"weight": lora.head.weight}
        if lora.head.bias is not None:
            parts["bias"] = lora.head.bias
        told = {} if names is None else {"class_names": names}
        if lora.head.normalised:
            told["normalised"] = "true"
        files["head.safetensors"] = _bytes(parts, dtype, told or None)
    elif names is not None:
        files["class_names.json"] = (names + "\n").encode()
    _write_folder(path, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n", files)


def _named_factors(
    lora: LoRA, layout: Layout, prefix: str
) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]]]:
    """Tensors by PEFT's names, and {module of the config: (rank, scale)}."""
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}

    def add(module: str, factors: Triple) -> None:
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = factors[:2]

    for i in range(lora.depth):
        own = {t: _real(lora, t, i) for t in lora.a if lora.ranks[t][i]}
        if "qkv" in layout.modules and any(t in own for t in QKV):
            own["qkv"] = fuse_qkv({t: own.pop(t) for t in QKV if t in own})
        attention = layout.module(prefix, i, "qkv") if "qkv" in layout.modules else ""
        if layout is LAYOUTS["open_clip"] and ("qkv" in own or "proj" in own):
            qkv, proj = whole_attention(own.pop("qkv", None), own.pop("proj", None))
            add(attention, qkv)
            add(layout.module(prefix, i, "proj"), proj)
            sizes[attention] = (len(qkv[0]), qkv[2])
        for target, factors in own.items():
            module = layout.module(prefix, i, target)
            add(module, factors)
            sizes[module] = (len(factors[0]), factors[2])
    return tensors, sizes


def _real(lora: LoRA, target: str, block: int) -> Triple:
    """A and B without their padding, and the scale."""
    rank = lora.ranks[target][block]
    a, b = lora.a[target][block, :rank], lora.b[target][block, :, :rank]
    return a.detach().float().cpu(), b.detach().float().cpu(), float(lora.scale[target][block])


def _alpha(rank: int, scale: float) -> float | int:
    """Alpha with alpha / rank = scale in float32, an integer where that is one."""
    alpha = scale * rank
    whole = round(alpha)
    exact = torch.tensor(whole / rank).item() == torch.tensor(scale).item()
    return whole if exact else alpha


def _config(
    lora: LoRA, sizes: Mapping[str, tuple[int, float]], to_save: list[str]
) -> dict[str, Any]:
    """adapter_config.json: the most common rank and alpha, and what differs as patterns."""
    alphas = {module: _alpha(rank, scale) for module, (rank, scale) in sizes.items()}
    rank = Counter(r for r, _ in sizes.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": lora.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        # full names: a suffix such as "proj" would also match the patch embedding
        "target_modules": list(sizes),
        "modules_to_save": to_save or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _bytes(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: dict[str, str] | None
) -> bytes:
    plain = {}
    for name, x in tensors.items():
        y = x.detach().cpu().to(dtype or torch.float32)
        if not torch.isfinite(y).all():
            raise ValueError(f"LoRA.save: {name} holds NaN, infinity or numbers beyond {y.dtype}")
        plain[name] = y
    return safetensors_content(plain, metadata)


def _write_folder(path: Path, config: bytes, files: Mapping[str, bytes]) -> None:
    """Write the files, then the config; see `write_peft` for what a kill leaves."""
    old = path / "adapter_config.json"
    with contextlib.ExitStack() as stack:
        streams = [(stack.enter_context(atomic_open(old)), config)]  # first in, so replaced last
        streams += [(stack.enter_context(atomic_open(path / n)), x) for n, x in files.items()]
        for stream, content in streams:
            stream.write(content)
            stream.flush()
        for stale in ("adapter_config.json", "adapter_model.bin", "head.safetensors",
                      "class_names.json"):  # fmt: skip
            if stale not in files:
                (path / stale).unlink(missing_ok=True)

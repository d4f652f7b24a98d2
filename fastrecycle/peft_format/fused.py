"""LoRAs on fused products, as one and as several: q, k, v, and nn.MultiheadAttention whole.

Where queries, keys and values are one fused product (timm, open_clip), one LoRA changes all three;
it is split here exactly, and written back with A stacked and B block-diagonal:

    [dq; dk; dv] = [Bq 0 0; 0 Bk 0; 0 0 Bv] [Aq; Ak; Av]

R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

QKV = ("q", "k", "v")

# Released PEFT adds the LoRA of nn.MultiheadAttention's out_proj twice, W + 2 scale B A, in
# training and after merging (huggingface/peft#3774; measured with 0.17 to 0.21). Folders mean what
# PEFT computes.
_OUT_PROJ_TIMES = 2
_OUT_PROJ_KNOWN = (0, 21)  # last PEFT release this holds for

Pair = tuple[Tensor, Tensor]  # A (R, d_in), B (d_out, R)
Triple = tuple[Tensor, Tensor, float]  # A, B, scale


def split_qkv(
    path: Path, module: str, a: Tensor, b: Tensor, ranks: list[int] | None
) -> dict[str, Pair]:
    """One LoRA on [q; k; v] as three on their own.

    Columns of B that are zero for a part do nothing there and are dropped, unless they are zero
    for all parts: a LoRA that was not trained yet keeps its rank. `ranks`, where this library
    wrote the file, says it outright.
    """
    if b.shape[0] != 3 * a.shape[1]:
        raise ValueError(
            f"{path}: {module} fuses queries, keys and values, so lora_B must have"
            f" {3 * a.shape[1]} rows, got {b.shape[0]}"
        )
    thirds = b.chunk(3)
    if ranks is None:
        idle = ~b.any(0)
        keep = [third.any(0) | idle for third in thirds]
        return {t: (a[k], third[:, k]) for t, third, k in zip(QKV, thirds, keep, strict=True)}
    parts, start, nonzero = {}, 0, 0
    for target, third, rank in zip(QKV, thirds, ranks, strict=True):
        own = third[:, start : start + rank]
        parts[target] = (a[start : start + rank], own)
        nonzero += int(own.count_nonzero())
        start += rank
    if start > a.shape[0] or nonzero != int(b.count_nonzero()):
        raise ValueError(f"{path}: damaged metadata in adapter_model.safetensors")
    return parts


def fuse_qkv(parts: Mapping[str, Triple]) -> Triple:
    """LoRAs on some of q, k, v as one on [q; k; v]: A stacked, B block-diagonal."""
    d = next(iter(parts.values()))[1].shape[0]
    scale = max((s for _, _, s in parts.values()), key=abs)
    a = torch.cat([part[0] for part in parts.values()])
    b = a.new_zeros(3 * d, len(a))
    start = 0
    for position, target in enumerate(QKV):
        if target in parts:
            part_a, part_b, part_scale = parts[target]
            rows, columns = (
                slice(position * d, (position + 1) * d),
                slice(start, start + len(part_a)),
            )
            b[rows, columns] = _rescale(part_b, part_scale, scale)
            start += len(part_a)
    return a, b, scale


def whole_attention(qkv: Triple | None, proj: Triple | None) -> tuple[Triple, Triple]:
    """LoRAs on in_proj and out_proj with one rank and one scale, as PEFT needs them."""
    if qkv is None:
        assert proj is not None
        d = proj[0].shape[1]
        qkv = (proj[0].new_zeros(1, d), proj[1].new_zeros(3 * d, 1), proj[2])
    if proj is None:
        d = qkv[0].shape[1]
        proj = (qkv[0].new_zeros(1, d), qkv[1].new_zeros(d, 1), qkv[2])
    proj = (proj[0], proj[1], proj[2] / _OUT_PROJ_TIMES)
    rank = max(len(qkv[0]), len(proj[0]))
    scale = max(qkv[2], proj[2], key=abs)

    def grow(factors: Triple) -> Triple:
        a, b, old = factors
        more = rank - len(a)
        return pad(a, (0, 0, 0, more)), pad(_rescale(b, old, scale), (0, more)), scale

    return grow(qkv), grow(proj)


def _rescale(b: Tensor, scale: float, to: float) -> Tensor:
    """B such that `to` times it is `scale` times the old one."""
    return b if scale == to or to == 0 else b * (scale / to)


def out_proj_times(path: Path, config: Mapping[str, Any], own: Mapping[str, Any]) -> int:
    """How often the PEFT that wrote this folder adds the LoRA on MultiheadAttention's out_proj."""
    told = config.get("out_proj_times")
    if told is not None and told not in (1, 2):
        raise ValueError(f"{path}: out_proj_times must be 1 or 2, got {told!r}")
    if told is not None and not own:
        return told
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if own or version is None or (int(version[1]), int(version[2])) <= _OUT_PROJ_KNOWN:
        return _OUT_PROJ_TIMES
    raise ValueError(
        f"{path}: PEFT up to {'.'.join(map(str, _OUT_PROJ_KNOWN))} adds the LoRA on"
        f" nn.MultiheadAttention's out_proj twice, for {config['peft_version']} this is not known;"
        ' add "out_proj_times": 2, or 1 where it was corrected, to adapter_config.json'
    )

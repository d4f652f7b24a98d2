"""Factors of a PEFT folder as a `LoRA` has them: scaled, split, stacked over the blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex
import torch
from torch import Tensor

from fastrecycle.dora import base_weight, dora_change, full_rank
from fastrecycle.lora import TARGETS
from fastrecycle.peft_format.fused import QKV, Pair, Triple, out_proj_times, split_qkv
from fastrecycle.peft_format.names import WHOLE, Place

if TYPE_CHECKING:
    from fastrecycle.vit import ViT

_PATTERN_SECONDS = 0.1  # of the processor, for a pattern and a name: microseconds are usual


def plain_factors(
    path: Path,
    config: Mapping[str, Any],
    pairs: Mapping[str, Pair],
    placed: Mapping[str, Place],
    own: Mapping[str, Any],
) -> tuple[dict[tuple[str, int], Triple], int]:
    """{(target, block): (A, B, scale)} with fused products split, and the number of blocks."""
    depth = max(place.block for place in placed.values()) + 1
    if own:
        if own["depth"] < depth or any(len(r) != own["depth"] for r in own["ranks"].values()):
            raise ValueError(f"{path}: damaged metadata in adapter_model.safetensors")
        depth = own["depth"]
    ranks: dict[str, list[int]] | None = own.get("ranks")
    factors: dict[tuple[str, int], Triple] = {}
    for module, place in placed.items():
        a, b = pairs[module]
        scale = _scale(path, config, module, a, b)
        if place.target == "qkv":
            known = None if ranks is None else [ranks.get(t, [0] * depth)[place.block] for t in QKV]
            parts = split_qkv(path, module, a, b, known)
        elif module.endswith(WHOLE):  # PEFT adds this one to every in_proj, wanted or not
            twin = pairs.get(module.removesuffix(WHOLE))
            rank = a.shape[0]
            if b.any():
                scale *= out_proj_times(path, config, own)
            if ranks is not None:
                rank = ranks.get("proj", [0] * depth)[place.block]
            elif twin is not None and not b.any() and twin[1].any():
                rank = 0
            parts = {"proj": (a[:rank], b[:, :rank])}
        else:
            parts = {place.target: (a, b)}
        for target, (part_a, part_b) in parts.items():
            if part_a.shape[0] == 0:
                continue
            if (target, place.block) in factors:
                raise ValueError(f"{path}: two LoRAs on {target} of block {place.block}")
            factors[target, place.block] = (part_a, part_b, scale)
    return factors, depth


def dora_factors(
    path: Path,
    config: Mapping[str, Any],
    pairs: Mapping[str, Pair],
    placed: Mapping[str, Place],
    magnitudes: Mapping[str, Tensor],
    vit: ViT,
) -> tuple[dict[tuple[str, int], Triple], int]:
    """`plain_factors` of DoRA: changes of full rank."""
    factors: dict[tuple[str, int], Triple] = {}
    for module, place in placed.items():
        if place.layout == "open_clip" and (place.target == "qkv" or module.endswith(WHOLE)):
            raise ValueError(f"{path}: DoRA on nn.MultiheadAttention ({module}) is not supported")
        if place.block >= vit.config.depth:
            raise ValueError(
                f"{path}: {module} is not in the backbone, which has {vit.config.depth} blocks"
            )
        (a, b), weight = pairs[module], base_weight(vit, place.block, place.target)
        scale = _scale(path, config, module, a, b)
        try:
            change = dora_change(weight, a, b, scale, magnitudes[module])
        except ValueError as error:
            raise ValueError(f"{path}: {module}: {error}") from None
        parts = change.chunk(3) if place.target == "qkv" else (change,)
        for target, part in zip(QKV if len(parts) == 3 else (place.target,), parts, strict=True):
            factors[target, place.block] = (*full_rank(part), 1.0)
    return factors, vit.config.depth


def _scale(path: Path, config: Mapping[str, Any], module: str, a: Tensor, b: Tensor) -> float:
    """Alpha / r of a module, after checking its factors' shapes against the config."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise ValueError(
            f"{path}: {module} must have lora_A (r, d_in) and lora_B (d_out, r),"
            f" got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    name = module.removesuffix(WHOLE)  # PEFT sizes it as its nn.MultiheadAttention
    rank = _pattern(path, config.get("rank_pattern"), name, config["r"])
    alpha = _pattern(path, config.get("alpha_pattern"), name, config["lora_alpha"])
    if a.shape[0] != rank:
        raise ValueError(
            f"{path}: {module} has rank {a.shape[0]}, adapter_config.json says {rank}; config and"
            " weights do not belong together"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if abs(scale) > torch.finfo(torch.float32).max:
        raise ValueError(f"{path}: {module} has alpha {alpha:.3g}, a scale beyond float32")
    return scale


def _pattern(path: Path, patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the name, else the default."""
    for key, value in (patterns or {}).items():
        try:
            # somebody else's pattern: re would take years over some
            if regex.match(rf"(.*\.)?({key})$", name, timeout=_PATTERN_SECONDS):
                return value
        except (regex.error, TimeoutError, OverflowError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"{path}: pattern {key[:80]!r} of adapter_config.json:"
                f" {error or type(error).__name__}"
            ) from None
    return default


def pad_and_stack(
    path: Path, factors: Mapping[tuple[str, int], Triple], depth: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """The a, b, scale and ranks of a `LoRA`, all blocks zero-padded to the largest rank."""
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    scale: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    for target in TARGETS:
        own = {i: f for (t, i), f in factors.items() if t == target}
        if not own:
            continue
        shapes = {(x.shape[1], y.shape[0]) for x, y, _ in own.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"{path}: {target} must have the same (d_in, d_out) in all blocks,"
                f" got {sorted(shapes)}"
            )
        d_in, d_out = shapes.pop()
        ranks[target] = tuple(own[i][0].shape[0] if i in own else 0 for i in range(depth))
        rank = max(ranks[target])
        a[target] = torch.zeros(depth, rank, d_in)
        b[target] = torch.zeros(depth, d_out, rank)
        scale[target] = torch.zeros(depth)
        for i, (x, y, s) in own.items():
            a[target][i, : len(x)] = x
            b[target][i, :, : len(x)] = y
            scale[target][i] = s
    if not a:
        raise ValueError(f"{path}: every LoRA in the file has rank 0")
    return a, b, scale, ranks

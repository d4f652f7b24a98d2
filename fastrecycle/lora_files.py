"""LoRAs in single files: LoRA Recycle's own release, and CLIP-LoRA's checkpoints.

L blocks, D width, R rank, C classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrecycle.files import load_safetensors, load_torch
from fastrecycle.lora import TARGETS, Head, LoRA

SUFFIXES = (".safetensors", ".pt", ".pth")

_NUMBERED = re.compile(r"w_(?P<which>[ab])_(?P<i>\d{3,})")
_HEAD = re.compile(r"fc_(?P<features>\d+)in_(?P<classes>\d+)out")
_CLIP_LORA = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "proj"}
# The blocks of CLIP-LoRA's `position`, the same in both towers; "all" are all there are.
_POSITIONS: dict[str, tuple[int, ...]] = {
    "top1": (11,), "top": (11,), "top2": (10, 11), "top3": (9, 10, 11), "bottom": (0, 1, 2, 3),
    "mid": (4, 5, 6, 7), "up": (8, 9, 10, 11), "half-up": (6, 7, 8, 9, 10, 11),
    "half-bottom": (0, 1, 2, 3, 4, 5), "all": tuple(range(12)),
}  # fmt: skip

_Factors = dict[tuple[str, int], tuple[Tensor, Tensor]]  # (target, block) -> a (R, D), b (D, R)


def read_lora_file(path: Path) -> LoRA:
    """Read a LoRA from one file, whose kind is detected.

    LoRA Recycle's release (.safetensors): w_a_000, w_b_000, ... of q and v of each block in turn,
    of scale 1, and the head's weight fc_{features}in_{classes}out; its bias is not in the file, nor
    which blocks they are: they are taken for all. CLIP-LoRA (.pt, read with `weights_only=True`):
    factors by layer and module and their metadata; scale alpha / sqrt(R); of LoRAs in both towers
    those of the image tower are read; without a head, since its classes are texts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of neither kind, or with tensors that do not belong together.

    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected one of {', '.join(SUFFIXES)}, or a PEFT folder")
    content = load_safetensors(path)[0] if path.suffix == ".safetensors" else load_torch(path)
    if holds_lora(content):
        return _clip_lora(path, content) if "weights" in content else _release(path, content)
    names = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise ValueError(
        f"{path}: expected LoRA Recycle's w_a_000, w_b_000, ..., or CLIP-LoRA's weights and"
        f" metadata, got {names[:80] or 'nothing'}; a PEFT LoRA is loaded by its folder"
    )


def holds_lora(content: Any) -> bool:
    """Whether what was read from a file is a LoRA of a kind that `read_lora_file` knows."""
    if not isinstance(content, dict):
        return False
    released = any(_NUMBERED.fullmatch(str(name)) for name in content)
    return released or {"weights", "metadata"} <= content.keys()


def _release(path: Path, content: Mapping[str, Any]) -> LoRA:
    halves: dict[str, dict[int, Tensor]] = {"a": {}, "b": {}}
    head: Head | None = None
    unknown = []
    for name, x in content.items():
        _check(path, name, x)
        if found := _NUMBERED.fullmatch(name):
            halves[found["which"]][int(found["i"])] = x.float()
        elif (found := _HEAD.fullmatch(name)) and head is None:
            if x.shape != (int(found["classes"]), int(found["features"])):
                raise ValueError(f"{path}: {name} has shape {tuple(x.shape)}")
            head = Head(x.float())
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{path}: unknown tensors {', '.join(sorted(unknown)[:4])}")
    count = len(halves["a"])
    whole = set(range(count))
    if count % 2 or halves["a"].keys() != whole or halves["b"].keys() != whole:
        raise ValueError(
            f"{path}: expected w_a_000, w_b_000, ... of q and v of each block, an even number of"
            f" pairs without gaps, got {count} of a and {len(halves['b'])} of b"
        )
    factors = {
        ("qv"[i % 2], i // 2): (halves["a"][i], halves["b"][i]) for i in range(count)
    }  # fmt: skip
    # the authors' model is transformers' CLIP
    lora = _lora(path, factors, 1.0, count // 2, "hf_clip")
    return replace(lora, head=head, whole=True)


def _clip_lora(path: Path, content: Mapping[str, Any]) -> LoRA:
    weights, metadata = content["weights"], content["metadata"]
    try:
        if not isinstance(weights, Mapping) or not isinstance(metadata, Mapping):
            raise TypeError("two tables expected")
        encoder, position = str(metadata["encoder"]), metadata["position"]
        rank, alpha = metadata["r"], metadata["alpha"]
        if type(rank) is not int or not isinstance(alpha, int | float):
            raise TypeError("r and alpha must be numbers")
        alpha = float(alpha)
        layers = [weights[f"layer_{i}"] for i in range(len(weights))]
        if not all(isinstance(modules, Mapping) for modules in layers):
            raise TypeError("each layer must be a table of modules")
        positions = _POSITIONS[position]
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected CLIP-LoRA's layer_0, layer_1, ... and metadata r, alpha, encoder and"
            f" a position of {', '.join(_POSITIONS)}; {type(error).__name__}: {error}"
        ) from None
    if encoder not in ("vision", "both") or rank < 1 or not abs(alpha) < 1e30:  # of float32
        raise ValueError(
            f"{path}: expected a LoRA on the encoder vision or both, a rank above 0 and a finite"
            f" alpha; got {encoder!r}, {rank} and {alpha}"
        )
    if encoder == "both":  # the text tower's come first
        layers = layers[len(positions) :]
    blocks = tuple(range(len(layers))) if position == "all" else positions
    if not layers or len(blocks) != len(layers):
        raise ValueError(
            f"{path}: position {position!r} of encoder {encoder!r} has {len(blocks)} blocks in the"
            f" image tower, the file {len(layers)}"
        )
    factors: _Factors = {}
    for block, modules in zip(blocks, layers, strict=True):
        for module, pair in modules.items():
            target = _CLIP_LORA.get(module)
            if target is None or not isinstance(pair, Mapping) or set(pair) != {
                "w_lora_A", "w_lora_B"
            }:  # fmt: skip
                raise ValueError(
                    f"{path}: expected w_lora_A and w_lora_B of {', '.join(_CLIP_LORA)}, got"
                    f" {module}"
                )
            for name, x in pair.items():
                _check(path, f"{module}.{name}", x)
            factors[target, block] = (pair["w_lora_A"].float(), pair["w_lora_B"].float())
    if any(len(a) != rank for a, _ in factors.values()):
        raise ValueError(f"{path}: metadata says rank {rank}, which the factors do not have")
    # CLIP-LoRA divides by the root of the rank, as rsLoRA does
    return _lora(path, factors, alpha / math.sqrt(rank), max(blocks) + 1, "open_clip")


def _check(path: Path, name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{path}: {name} must be a matrix of floats, got {what}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{path}: {name} holds NaN or infinity")


def _lora(path: Path, factors: _Factors, scale: float, depth: int, layout: str) -> LoRA:
    """Blocks stacked; all factors of a file have one rank and belong to square products."""
    shapes = {(tuple(a.shape), tuple(b.shape)) for a, b in factors.values()}
    (rank, width), second = next(iter(shapes), ((0, 0), (0, 0)))
    if len(shapes) != 1 or second != (width, rank):
        raise ValueError(
            f"{path}: expected one shape of a (R, D) and of b (D, R), got {sorted(shapes)[:3]}"
        )
    a, b, scales, ranks = {}, {}, {}, {}
    for target in (t for t in TARGETS if any(t == name for name, _ in factors)):
        a[target], b[target] = torch.zeros(depth, rank, width), torch.zeros(depth, width, rank)
        scales[target] = torch.zeros(depth)
        for i in (i for i in range(depth) if (target, i) in factors):
            a[target][i], b[target][i] = factors[target, i]
            scales[target][i] = scale
        ranks[target] = tuple(rank if (target, i) in factors else 0 for i in range(depth))
    return LoRA(a, b, scales, ranks, layout=layout, name=path.stem)

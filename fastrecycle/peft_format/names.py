"""What libraries call a block's products, and where a module of a PEFT folder therefore sits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrecycle.lora import MAX_BLOCKS
from fastrecycle.peft_format.fused import Pair

WHOLE = ".base_layer.out_proj"  # out_proj inside the nn.MultiheadAttention that PEFT wraps
METADATA = "fastrecycle"  # key of depth and real ranks in the safetensors metadata
TEXT = re.compile(r"(?:^|\.)(?:text|text_model|text_projection|token_embedding)(?:\.|$)")


@dataclass(frozen=True)
class Layout:
    """What a library calls the blocks of a vision transformer and the products in them."""

    prefix: str  # before the list of blocks, in the model that PEFT usually wraps
    blocks: str  # the list of blocks
    modules: dict[str, str]  # our target, or "qkv" where the three are fused -> module in a block
    also: dict[str, str] = field(default_factory=dict)  # further names, read but never written

    def module(self, prefix: str, block: int, target: str) -> str:
        """Full name of a product's module."""
        return f"{prefix}{self.blocks}.{block}.{self.modules[target]}"


LAYOUTS: dict[str, Layout] = {
    "hf_clip": Layout(
        "vision_model.",
        "encoder.layers",
        {
            "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
            "proj": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
        },
    ),
    "hf_vit": Layout(  # ViT and DeiT of transformers 5
        "",
        "layers",
        {
            "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
            "proj": "attention.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
        },
    ),
    "hf_vit_v4": Layout(  # the same of transformers 4
        "",
        "encoder.layer",
        {
            "q": "attention.attention.query", "k": "attention.attention.key",
            "v": "attention.attention.value", "proj": "attention.output.dense",
            "fc1": "intermediate.dense", "fc2": "output.dense",
        },
    ),
    "hf_dinov2": Layout(  # of transformers 5
        "",
        "encoder.layer",
        {
            "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
            "proj": "attention.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
        },
    ),
    "hf_dinov2_v4": Layout(
        "",
        "encoder.layer",
        {
            "q": "attention.attention.query", "k": "attention.attention.key",
            "v": "attention.attention.value", "proj": "attention.output.dense", "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
        },
    ),
    "timm": Layout(  # also Eva, and open_clip's timm towers
        "",
        "blocks",
        {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    ),
    "open_clip": Layout(  # PEFT wraps nn.MultiheadAttention whole: in_proj and out_proj together
        "visual.",
        "transformer.resblocks",
        {
            "qkv": "attn", "proj": f"attn{WHOLE}",
            "fc1": "mlp.c_fc", "fc2": "mlp.c_proj",
        },
        {"attn.out_proj": "proj"},
    ),
    "hf_dinov3": Layout(  # last: with a prefix its names of queries fit hf_dinov2's
        "model.",
        "layer",
        {
            "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
            "proj": "attention.o_proj", "fc1": "mlp.up_proj", "fc2": "mlp.down_proj",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a module sits: whose names, what comes before the blocks, which product."""

    layout: str
    prefix: str
    block: int
    target: str  # of TARGETS, or "qkv"


def place_modules(
    path: Path, config: Mapping[str, Any], pairs: Mapping[str, Pair]
) -> tuple[dict[str, Place], list[str]]:
    """The image tower's modules with their places, and the text tower's."""
    located = {module: _locate(module) for module in pairs}
    named = [x for module, x in located.items() if x and not TEXT.search(module)]
    # layouts share names: the one that has all of them
    common = next((name for name in LAYOUTS if all(name in x for x in named)), None)
    places = {
        module: x.get(common or "") or next(iter(x.values()), None) for module, x in located.items()
    }
    prefixes = {p.prefix for p in places.values() if p is not None and p.layout == "open_clip"}
    two_towers = base_class(config) in ("CLIP", "CoCa")  # of open_clip
    placed: dict[str, Place] = {}
    text, unknown = [], []
    for module, place in places.items():
        if TEXT.search(module):
            text.append(module)
        elif place is None:
            unknown.append(module)
        elif place.layout == "open_clip" and (
            f"{place.prefix}visual." in prefixes
            or (two_towers and not place.prefix.endswith("visual."))
        ):
            text.append(module)  # open_clip's text tower has no name of its own beside `visual`
        else:
            placed[module] = place
    beyond = [module for module, place in placed.items() if place.block >= MAX_BLOCKS]
    if beyond:
        raise ValueError(
            f"{path}: LoRA on {some(beyond)}; backbones of up to {MAX_BLOCKS} blocks are read"
        )
    if unknown:
        raise ValueError(
            f"{path}: LoRA on unknown modules {some(unknown)}; known are {_known_targets()}"
        )
    if not placed:
        raise ValueError(f"{path}: this LoRA changes the text tower alone; nothing to use")
    sources = {(p.layout, p.prefix) for p in placed.values()}
    if len(sources) > 1:
        listed = ", ".join(f"{p or '(top)'} ({x})" for x, p in sorted(sources))
        raise ValueError(f"{path}: LoRAs on several models at once: {listed}; expected one")
    return placed, text


def _locate(module: str) -> dict[str, Place]:
    """Where a module may sit, by layout."""
    places = {}
    for name, layout in LAYOUTS.items():
        known = {m: t for t, m in layout.modules.items()} | layout.also
        match = re.fullmatch(
            rf"(?P<prefix>(?:\w+\.)*?){re.escape(layout.blocks)}\.(?P<block>\d{{1,4}})\.(?P<in>.+)",
            module,
        )
        if match and match["in"] in known:
            places[name] = Place(name, match["prefix"], int(match["block"]), known[match["in"]])
    return places


def some(names: list[str], most: int = 4) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _known_targets() -> str:
    return "; ".join(
        f"{name}: {layout.blocks}.N.{{{', '.join(layout.modules.values())}}}"
        for name, layout in LAYOUTS.items()
    )


def base_class(config: Mapping[str, Any]) -> object:
    """Class of the model that PEFT wrapped, where it wrote that down."""
    mapping = config.get("auto_mapping")
    return mapping.get("base_model_class") if isinstance(mapping, dict) else None

"""Name maps between our ViT and other people's weights: one table a layout, read both ways.

D width, n patches. Names and shapes give the architecture; what they cannot give (activation,
pixel statistics, heads, LayerNorm's eps) comes from `config`, from metadata beside the weights, or
from a convention that every published model of the layout follows. Otherwise it is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastrecycle.conventions import FREE, Told, ask, check_fields, check_shapes, conventions
from fastrecycle.files import save_safetensors
from fastrecycle.layouts import APART, LAYOUTS, LayoutName, our_name, their_name
from fastrecycle.vit import ViT
from fastrecycle.vit_config import ViTConfig

CONFIG_KEY, CARD_KEY = "fastrecycle.config", "fastrecycle.card"  # safetensors metadata


# ---------------------------------------------------------------------- state dict -> ours


def convert(
    state_dict: Mapping[str, Tensor], config: Told = None, facts: Mapping[str, Any] | None = None
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Our config and tensors from a state dict in any layout that we know.

    Args:
        state_dict: tensors by name, in any float dtype and on any device: OpenAI's or open_clip's
            CLIP, SigLIP in open_clip; Hugging Face's CLIPVisionModel(WithProjection), CLIPModel,
            SiglipVisionModel, SiglipModel, ViT, DeiT, DINOv2 or DINOv3; timm's VisionTransformer
            or Eva; LV-ViT, or ours. Heads and text towers are ignored.
        config: what names and shapes cannot tell: a dict of some `ViTConfig` fields, a whole
            `ViTConfig`, or a preset's name. Fields that shapes do tell must agree with them.
        facts: the same from metadata; `config` goes before it.

    Returns:
        The config, and our names -> float32 tensors on the CPU, fit for `ViT(config)`.

    Raises:
        TypeError: not a mapping of tensors.
        ValueError: an unknown layout; unknown, missing, misshaped or non-finite tensors (named);
            or something that must be told through `config` (the message says how).

    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state dict: expected a mapping of tensors, got {type(state_dict).__name__};"
            " model.state_dict() is one"
        )
    layout, tower = detect(state_dict)
    parts, origin, unknown = _rename(state_dict, layout, tower)
    if unknown:
        raise ValueError(
            f"weights ({layout} layout): unknown tensors {listed(unknown)}; this model has parts"
            f" that a plain ViT lacks{_hint(unknown)}"
        )
    told, facts = check_fields(config), check_fields(facts)
    shape = _shape(parts, layout, {**facts, **told})
    check_shapes("config", told, shape, layout)
    check_shapes("metadata", facts, shape, layout)
    free = {**conventions(layout, shape, parts), **facts, **told}
    missing = [field for field in FREE if field not in free]
    if missing:
        raise ValueError(ask(layout, shape, missing))
    if {"norm.weight", "fc_norm.weight"} <= parts.keys():
        raise ValueError(
            f"weights ({layout} layout): two last norms, {origin['norm.weight']} and"
            f" {origin['fc_norm.weight']}; where features are averaged over patches there is one"
        )
    if free["pool"] == "map" and "pool.probe" not in parts:
        raise ValueError(
            f'weights ({layout} layout): pool is "map", but there is no attention pooling in them'
        )
    full = ViTConfig(**{**shape, **{field: free[field] for field in FREE}})
    return full, _assemble(full, layout, parts, origin)


def detect(state_dict: Mapping[str, Tensor]) -> tuple[LayoutName, str]:
    """The layout, and the prefix of the vision tower in it ("visual.", "vit.", "module.", "").

    Raises:
        ValueError: no layout that we know, or several towers.

    """
    for layout, table in LAYOUTS.items():
        first, *others = table.marks
        towers = [
            name[: -len(first)]
            for name in state_dict
            if isinstance(name, str) and (name == first or name.endswith("." + first))
        ]
        towers = [
            t
            for t in towers
            if all(t + other in state_dict for other in others)
            and (not table.one_of or any(t + other in state_dict for other in table.one_of))
        ]
        if len(towers) == 1:
            return layout, towers[0]
        if towers:
            raise ValueError(
                f"weights ({layout} layout): expected one vision tower, got {len(towers)}"
                f" ({listed(towers)}); pass the state dict of one of them"
            )
    names = [str(name) for name in state_dict]
    raise ValueError(
        "weights: expected the tensor names of OpenAI's or open_clip's CLIP, Hugging Face's CLIP,"
        " SigLIP, ViT, DeiT, DINOv2 or DINOv3, timm's VisionTransformer or Eva, or LV-ViT; got "
        + (listed(names) + _hint(names) if names else "no tensors")
    )


def _rename(
    state_dict: Mapping[str, Tensor], layout: LayoutName, tower: str
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """(our parts, the original name of each, names that are neither known nor ignored)."""
    root = tower[:-1].rpartition(".")[0] + "." if "." in tower[:-1] else ""
    ignored = re.compile(LAYOUTS[layout].ignored)
    parts: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in state_dict.items():
        inside = name.startswith(tower)
        short = name[len(tower) :] if inside else "/" + name.removeprefix(root)
        ours = our_name(layout, short)
        if ours is None:
            if not ignored.fullmatch(short):
                unknown.append(name)
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if ours in parts:
            raise ValueError(f"weights ({layout} layout): {origin[ours]} and {name} are the same")
        if not tensor.is_floating_point() and not ours.endswith("num_batches_tracked"):
            raise ValueError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
        parts[ours], origin[ours] = tensor, name
    return parts, origin, unknown


def _shape(
    parts: Mapping[str, Tensor], layout: LayoutName, told: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of `ViTConfig` that names and shapes give; `told` settles what is ambiguous."""
    stem: Literal["patch", "lvvit"] = "lvvit" if "stem.0.weight" in parts else "patch"
    # where these are missing or misshaped nothing else can be checked
    convolution = _need(parts, layout, "patch_embed.weight", 4)
    width, channels, kernel, other = convolution.shape
    if kernel != other or channels != (64 if stem == "lvvit" else 3) or 0 in convolution.shape:
        raise ValueError(
            f"{their_name(layout, 'patch_embed.weight')}: expected square patches of"
            f" {64 if stem == 'lvvit' else 3} channels, got shape {tuple(convolution.shape)}"
        )
    blocks = {int(name.split(".")[1]) for name in parts if name.startswith("blocks.")}
    depth = len(blocks)
    if blocks != set(range(depth)):
        absent = min(set(range(depth)) - blocks)
        raise ValueError(f"weights ({layout} layout): there is no block {absent}, but later ones")
    mlp_dim = _mlp_dim(parts, layout)
    registers = int(told.get("registers", 0))  # in our own files a part of the prefix
    if layout == "native":
        prefix = _need(parts, layout, "prefix", 2).shape[0]
    else:
        if "registers" in parts:
            registers = _need(parts, layout, "registers", None).shape[-2]
        prefix = registers + ("prefix.0" in parts) + ("prefix.1" in parts)
    patch_size = kernel * (2 if stem == "lvvit" else 1)
    grid = _grid(parts, layout, told, width, prefix, registers, patch_size)
    projection = None
    if "head_proj.T" in parts:
        projection = _need(parts, layout, "head_proj.T", 2).shape[1]
    elif "head_proj.weight" in parts:
        projection = _need(parts, layout, "head_proj.weight", 2).shape[0]
    biased = ("blocks.0.qkv.bias", "blocks.0.q.bias", "blocks.0.k.bias", "blocks.0.v.bias")
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "out_dim": projection,
        "prefix_tokens": prefix,
        "registers": registers,
        "pre_norm": any(name.startswith("pre_norm.") for name in parts),
        "patch_bias": "patch_embed.bias" in parts,
        "qkv_bias": any(name in parts for name in biased),
        "qk_norm": any(name.endswith(("q_norm.weight", "k_norm.weight")) for name in parts),
        "layer_scale": any(name.endswith((".ls1", ".ls2")) for name in parts),
        "stem": stem,
    }


def _mlp_dim(parts: Mapping[str, Tensor], layout: LayoutName) -> int:
    first = _need(parts, layout, "blocks.0.fc1.weight", 2)
    second = parts.get("blocks.0.fc2.weight")
    if second is not None and second.ndim == 2 and len(first) == 2 * second.shape[1]:
        raise ValueError(
            f"weights ({layout} layout): the MLP is gated (SwiGLU), which is not supported; its"
            f" first product has {len(first)} rows, its second {second.shape[1]} columns"
        )
    return first.shape[0]


def _grid(
    parts: Mapping[str, Tensor],
    layout: LayoutName,
    told: Mapping[str, Any],
    width: int,
    prefix: int,
    registers: int,
    patch_size: int,
) -> int:
    """Patches along one side, by the table of positions or, without one, by `told`."""
    size = told.get("image_size")
    if "pos_embed" not in parts and (
        layout == "hf_dinov3" or (layout == "timm_eva" and told.get("rope", "none") != "none")
    ):
        if not isinstance(size, int) or not patch_size <= size <= 8192 or size % patch_size:
            raise ValueError(
                f"weights ({layout} layout): without a table of positions the image size must be"
                f' told, in multiples of {patch_size}: config={{"image_size": 224}}; got {size!r}'
            )
        return size // patch_size
    if "pos_embed" not in parts and layout == "timm_eva":
        raise ValueError(
            f"weights ({layout} layout): missing pos_embed; DINOv3, whose positions are rotary"
            ' (RoPE), is config={"rope": "dinov3", "image_size": 256, ...}; other rotary positions'
            " are not supported"
        )
    positions = _need(parts, layout, "pos_embed", None)
    rows = math.prod(positions.shape[:-1])
    left = [rows - k for k in _positioned(layout, prefix, registers) if rows > k]
    counts = sorted({math.isqrt(n) for n in left if math.isqrt(n) ** 2 == n})
    if len(counts) > 1 and isinstance(size, int):
        counts = [x for x in counts if x * patch_size == size] or counts
    if len(counts) > 1:
        raise ValueError(
            f"weights ({layout} layout): {rows} positions may be those of {counts[0]} or"
            f" {counts[1]} patches a side; say which: config={{"
            f'"image_size": {counts[1] * patch_size}}}'
        )
    if positions.shape[-1] != width or not counts:
        named = f", {registers} of them {their_name(layout, 'registers')} (register tokens)"
        raise ValueError(
            f"{their_name(layout, 'pos_embed')}: expected {prefix} + (patches a side)^2 rows of"
            f" {width}, got shape {tuple(positions.shape)}; only square images are supported. The"
            f" model has {prefix} prefix tokens{named if registers else ''}"
        )
    return counts[0]


def _positioned(layout: LayoutName, prefix: int, registers: int) -> tuple[int, ...]:
    """How many prefix tokens may have a row in the table of positions."""
    if layout in ("timm", "timm_eva"):
        return (prefix, 0)
    return (prefix - registers,) if layout == "hf_dinov2" else (prefix,)


def _need(parts: Mapping[str, Tensor], layout: LayoutName, name: str, ndim: int | None) -> Tensor:
    tensor = parts.get(name)
    if tensor is None:
        raise ValueError(f"weights ({layout} layout): missing {their_name(layout, name)}")
    if tensor.ndim != ndim if ndim is not None else tensor.ndim < 2:
        raise ValueError(
            f"{their_name(layout, name)}: expected {ndim or 2} dimensions, got shape"
            f" {tuple(tensor.shape)}"
        )
    return tensor


def _assemble(
    config: ViTConfig, layout: LayoutName, parts: dict[str, Tensor], origin: Mapping[str, str]
) -> dict[str, Tensor]:
    """Whole tensors from parts, checked one by one against `ViT(config)`."""
    with torch.device("meta"):
        expected = ViT(config).state_dict()
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    misshaped: list[str] = []
    damaged: list[str] = []
    used: set[str] = set()

    def part(name: str, shape: tuple[int, ...], loose: bool = False) -> Tensor | None:
        """One part in float32; loose: leading dimensions of 1 and the like do not matter."""
        tensor = parts.get(name)
        used.add(name)
        if tensor is None:
            missing.append(their_name(layout, name) or name)
            return None
        if tensor.numel() != math.prod(shape) or not (loose or tuple(tensor.shape) == shape):
            misshaped.append(f"{origin[name]} (expected {shape}, got {tuple(tensor.shape)})")
            return None
        tensor = tensor.detach().to("cpu", torch.float32).reshape(shape)
        if not torch.isfinite(tensor).all():
            damaged.append(origin[name])
        return tensor

    for name, target in expected.items():
        if name.endswith("num_batches_tracked"):  # a counter of training: some files drop it
            used.add(name)
            ours[name] = parts.get(name, torch.tensor(0)).detach().to("cpu", torch.int64)
            continue
        pieces = _pieces(name, tuple(target.shape), config, layout, parts, part)
        found = [x for x in pieces if x is not None]
        if len(found) == len(pieces):
            ours[name] = found[0] if len(found) == 1 else torch.cat(found)
    surplus = [origin[name] for name in parts if name not in used]
    problems = [
        f"{what} {listed(names)}"
        for what, names in (
            ("missing", missing),
            ("misshaped", misshaped),
            ("NaN or infinity in", damaged),
            ("not in every block:", surplus),
        )
        if names
    ]
    if problems:
        hint = _hint([*missing, *surplus])
        raise ValueError(f"weights ({layout} layout): {'; '.join(problems)}{hint}")
    return ours


def _pieces(
    name: str,
    shape: tuple[int, ...],
    config: ViTConfig,
    layout: LayoutName,
    parts: Mapping[str, Tensor],
    part: Callable[..., Tensor | None],
) -> list[Tensor | None]:
    """What one of our tensors is made of, one below the other."""
    if name == "head_proj.weight" and layout == "openai":
        whole = part("head_proj.T", shape[::-1])
        return [None if whole is None else whole.T.contiguous()]
    if name == "prefix" and layout != "native":
        alone = config.prefix_tokens - config.registers
        tokens = [part(f"prefix.{i}", (1, shape[1]), loose=True) for i in range(alone)]
        if "registers" in parts:
            tokens.append(part("registers", (config.registers, shape[1]), loose=True))
        return tokens or [torch.zeros(shape)]
    if name == "pos_embed":
        return _positions(config, parts, part)
    if ".qkv." in name:
        third = (shape[0] // 3, *shape[1:])
        q, k, v = (name.replace("qkv", x) for x in "qkv")
        keyless = name.endswith("bias") and k not in parts  # EVA, DINOv3: zeros by definition
        if layout in APART:
            absent = layout == "hf_dinov3" and keyless
            return [
                part(q, third), torch.zeros(third) if absent else part(k, third), part(v, third)
            ]  # fmt: skip
        if layout == "timm_eva" and keyless and name not in parts:
            return [part(q, third), torch.zeros(third), part(v, third)]
    if name.startswith(("pool.q.", "pool.kv.")) and layout == "hf_siglip":
        d = config.width
        whole = part(f"pool.in_proj.{name.rpartition('.')[2]}", (3 * d, *shape[1:]))
        return [None if whole is None else whole[:d] if ".q." in name else whole[d:]]
    if name.startswith("norm.") and f"fc_{name}" in parts:
        return [part(f"fc_{name}", shape)]
    return [part(name, shape, loose=name == "pool.probe")]


def _positions(
    config: ViTConfig,
    parts: Mapping[str, Tensor],
    part: Callable[..., Tensor | None],
) -> list[Tensor | None]:
    """The table of positions, with rows of zeros for tokens that have none."""
    d, prefix, patches = config.width, config.prefix_tokens, config.patches
    if "pos_embed" not in parts:
        return [torch.zeros(prefix + patches, d)]
    rows = parts["pos_embed"].numel() // d
    table = part("pos_embed", (rows, d), loose=True)
    if rows == prefix + patches or table is None:
        return [table]
    own = rows - patches  # of CLS where registers have none, or of no prefix token
    return [table[:own], torch.zeros(prefix - own, d), table[own:]]


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, for a message."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _hint(names: Iterable[str]) -> str:
    """What some foreign names are known to mean."""
    names = list(names)
    for mark, meaning in (
        ("lora_", ": a LoRA's weights, which LoRA.load reads"),
        ("storage_tokens", ": Meta's own file of DINOv3; use timm's or Hugging Face's"),
        ("fc1_g", " (SwiGLU: a gated MLP)"),
        ("weights_in", " (SwiGLU: a gated MLP)"),
        ("gate_proj", " (SwiGLU: a gated MLP)"),
        ("rope.freqs", " (RoPE with learned frequencies; DINOv3's alone is supported)"),
        ("fc_norm", ": features of this model are averaged over patches, not read from CLS"),
        ("gamma", " (LayerScale)"),
        ("lambda1", " (LayerScale)"),
        ("ls_1", " (LayerScale)"),
        ("reg_token", " (register tokens)"),
        ("attn_pool", " (attention pooling)"),
        ("q_norm", " (normalised queries)"),
        ("relative_position", " (relative positions)"),
    ):
        if any(mark in name for name in names):
            return meaning
    return ""


# ---------------------------------------------------------------------- ours -> state dict


def export(
    vit: ViT,
    layout: Literal[
        "timm", "timm_eva", "hf_vit", "hf_dinov2", "hf_dinov3", "hf_clip", "hf_siglip", "openai",
        "lvvit",
    ],
) -> dict[str, Tensor]:  # fmt: skip
    """The weights under another library's names: the inverse of `convert`.

    Args:
        vit: the model.
        layout: "timm" (VisionTransformer), "timm_eva" (Eva: DINOv3, EVA), names as in Hugging
            Face's files ("hf_vit", also DeiT, "hf_clip", "hf_siglip", "hf_dinov2", "hf_dinov3"),
            "openai" (open_clip's `model.visual`, without prefix), "lvvit".

    Returns:
        Copies on the CPU, in the model's dtype and the layout's shapes.

    Raises:
        ValueError: an unknown layout, or one without a place for some of the weights.

    """
    rotary = vit.config.rope != "none"
    if (
        layout in LAYOUTS
        and rotary != (layout in ("hf_dinov3", "timm_eva"))
        and (rotary or layout == "hf_dinov3")
    ):
        raise ValueError(
            f"export: layout {layout} has {'no' if rotary else 'always'} rotary positions, the"
            f" model's rope is {vit.config.rope!r}"
        )
    if layout not in LAYOUTS or layout == "native":
        known = ", ".join(name for name in LAYOUTS if name != "native")
        raise ValueError(f"export: expected a layout of {known}; got {layout!r}")
    if vit.config.residual_scale != 1.0 and layout != "lvvit":
        raise ValueError(
            f"export: layout {layout} has no residual scale, the model's is"
            f" {vit.config.residual_scale}"
        )
    table, homeless, out = LAYOUTS[layout], [], {}
    for name, tensor in _split(vit, layout).items():
        theirs = their_name(layout, name)
        if theirs is None:
            homeless.append(name)
            continue
        # "/" is beside the tower
        key = theirs[1:] if theirs.startswith("/") else table.tower + theirs
        out[key] = tensor.detach().cpu().clone()
    if layout == "lvvit" and vit.config.stem != "lvvit":
        raise ValueError("export: layout lvvit needs LV-ViT's stem, which this model lacks")
    if homeless:
        raise ValueError(f"export: layout {layout} has no place for {listed(homeless)}")
    return out


def _split(vit: ViT, layout: LayoutName) -> dict[str, Tensor]:
    """Our tensors in the parts and shapes of a layout."""
    flat = layout in ("openai", "hf_clip", "hf_siglip")  # the others keep a batch dimension of 1
    config = vit.config
    prefix, table = _prefix_and_positions(vit, layout)
    parts: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        if name == "prefix":
            alone = config.prefix_tokens - config.registers
            for i, token in enumerate(prefix[:alone]):
                parts[f"prefix.{i}"] = token if flat else token[None, None]
            if config.registers or layout == "hf_dinov3":
                parts["registers"] = prefix[None, alone:]
        elif name == "pos_embed":
            if table is not None:
                parts[name] = table if flat else table[None]
        elif name == "head_proj.weight" and layout == "openai":
            parts["head_proj.T"] = tensor.T.contiguous()
        elif ".qkv." in name and layout in APART:
            for x, third in zip("qkv", tensor.chunk(3), strict=True):
                if layout == "hf_dinov3" and x == "k" and name.endswith("bias") and not third.any():
                    continue  # DINOv3's keys have none
                parts[name.replace("qkv", x)] = third
        elif name.endswith("qkv.bias") and layout == "timm_eva":
            q, k, v = tensor.chunk(3)
            if k.any():
                raise ValueError(f"export: layout {layout} has no place for biases of keys")
            parts |= {name.replace("qkv", "q"): q, name.replace("qkv", "v"): v}
        elif name.startswith(("pool.q.", "pool.kv.")) and layout == "hf_siglip":
            what = name.rpartition(".")[2]
            pair = [getattr(getattr(vit.pool, x), what) for x in ("q", "kv")]
            parts[f"pool.in_proj.{what}"] = torch.cat(pair)
        elif name == "pool.probe":
            parts[name] = tensor[None, None]
        elif name.startswith("norm.") and config.pool == "mean_norm":
            parts[f"fc_{name}"] = tensor
        else:
            parts[name] = tensor
    return parts


def _prefix_and_positions(vit: ViT, layout: LayoutName) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens, and positions with as many rows as the layout has; the sums stay the same."""
    config, prefix, table = vit.config, vit.prefix.detach(), vit.pos_embed.detach()
    k = config.prefix_tokens
    own = k  # prefix tokens that have positions there
    if layout == "hf_dinov2":
        own -= config.registers
    elif layout in ("timm", "timm_eva") and (config.registers or not table[:k].any()):
        own = 0
    # what has no row of its own goes into the token
    prefix = torch.cat((prefix[:own], prefix[own:] + table[own:k]))
    if config.rope != "none" and not table[k:].any():
        return torch.cat((prefix[:own] + table[:own], prefix[own:])), None
    return prefix, torch.cat((table[:own], table[k:]))


def save_vit(
    vit: ViT,
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write one safetensors file with our names, the config and a model card in its metadata.

    `ViT.from_pretrained(path)` reads it without being told anything.

    Args:
        vit: the model.
        path: of the file, replaced atomically.
        dtype: torch.float32 or torch.float16, of the stored weights.
        card: anything JSON about the weights: data, recipe, accuracy, licence.

    Raises:
        ValueError: another dtype, or weights that it cannot hold.
        OSError: the file cannot be written.

    """
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"save: dtype must be torch.float32 or torch.float16, got {dtype}")
    tensors = {
        name: x.detach().cpu().to(dtype) if x.is_floating_point() else x
        for name, x in vit.state_dict().items()
    }
    damaged = [name for name, x in tensors.items() if not torch.isfinite(x).all()]
    if damaged:
        raise ValueError(f"save: NaN or infinity in {listed(damaged)} as {dtype}")
    metadata = {CONFIG_KEY: json.dumps(dataclasses.asdict(vit.config)), "format": "pt"}
    if card is not None:
        metadata[CARD_KEY] = json.dumps(dict(card))
    save_safetensors(path, tensors, metadata)

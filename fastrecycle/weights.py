"""Name maps between our ViT and other people's weights: one table a layout, read both ways.

D width, n patches. Names and shapes give the architecture; what they cannot give (activation,
pixel statistics, heads, LayerNorm's eps) comes from `config`, from metadata beside the weights, or
from a convention that every published model of the layout follows. Otherwise it is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastrecycle.files import save_safetensors
from fastrecycle.vit import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRESETS,
    ViT,
    ViTConfig,
)

LayoutName = Literal["native", "openai", "hf_clip", "hf_vit", "lvvit", "timm"]
Told = ViTConfig | Mapping[str, Any] | str | None
"""A whole config, some of its fields, or a preset's name."""

CONFIG_KEY, CARD_KEY = "fastrecycle.config", "fastrecycle.card"  # safetensors metadata
_FREE = ("heads", "activation", "norm_eps", "residual_scale", "mean", "std")  # not in the shapes
_SHAPED = tuple(f.name for f in dataclasses.fields(ViTConfig) if f.name not in _FREE)


# ---------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Layout:
    """One way of naming a vision transformer's tensors.

    In `names` (ours -> theirs) `#` is a block's number and `*` is weight, bias or a BatchNorm
    buffer. "/" marks a tensor beside the vision tower instead of in it. Tokens of the prefix are
    apart, as are q, k and v where they have a matrix each; ".T" is stored transposed.
    """

    marks: tuple[str, ...]  # tensors that give the layout away; the first one's prefix is the tower
    names: dict[str, str]
    ignored: str  # regular expression: heads, text towers, buffers, known and not needed
    older: tuple[tuple[str, str], ...] = ()  # (ours, theirs): other spellings, read only
    tower: str = ""  # prefix of the tower when writing


_BLOCK = {f"blocks.#.{n}.*": f"blocks.#.{n}.*" for n in ("norm1", "norm2")}
_TIMM_BLOCK = _BLOCK | {
    "blocks.#.qkv.*": "blocks.#.attn.qkv.*",
    "blocks.#.proj.*": "blocks.#.attn.proj.*",
    "blocks.#.fc1.*": "blocks.#.mlp.fc1.*",
    "blocks.#.fc2.*": "blocks.#.mlp.fc2.*",
    "norm.*": "norm.*",
}
_OPENAI_BLOCK = "transformer.resblocks.#"
_HF_CLIP_BLOCK = "encoder.layers.#"
_HF_VIT_BLOCK = "encoder.layer.#"

LAYOUTS: dict[LayoutName, Layout] = {
    "native": Layout(
        marks=("patch_embed.weight", "prefix", "pos_embed"),
        names={
            "patch_embed.*": "patch_embed.*",
            "prefix": "prefix",
            "pos_embed": "pos_embed",
            "pre_norm.*": "pre_norm.*",
            **{f"stem.{i}.*": f"stem.{i}.*" for i in (0, 1, 3, 4, 6, 7)},
            **{
                f"blocks.#.{n}.*": f"blocks.#.{n}.*"
                for n in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
            },
            "norm.*": "norm.*",
            "head_proj.weight": "head_proj.weight",
        },
        ignored="(?!)",
    ),
    "openai": Layout(
        marks=("conv1.weight", "class_embedding"),
        names={
            "patch_embed.weight": "conv1.weight",
            "prefix.0": "class_embedding",
            "pos_embed": "positional_embedding",
            "pre_norm.*": "ln_pre.*",
            "blocks.#.norm1.*": f"{_OPENAI_BLOCK}.ln_1.*",
            # nn.MultiheadAttention and open_clip's own fused Attention name it alike
            "blocks.#.qkv.*": f"{_OPENAI_BLOCK}.attn.in_proj_*",
            "blocks.#.proj.*": f"{_OPENAI_BLOCK}.attn.out_proj.*",
            "blocks.#.norm2.*": f"{_OPENAI_BLOCK}.ln_2.*",
            "blocks.#.fc1.*": f"{_OPENAI_BLOCK}.mlp.c_fc.*",
            "blocks.#.fc2.*": f"{_OPENAI_BLOCK}.mlp.c_proj.*",
            "norm.*": "ln_post.*",
            "head_proj.T": "proj",
        },
        ignored=(
            r"/(transformer|token_embedding|ln_final|text)\..*"
            r"|/(positional_embedding|text_projection(\.\w+)?|logit_scale|logit_bias|attn_mask"
            r"|input_resolution|context_length|vocab_size)"
        ),
    ),
    "hf_clip": Layout(
        marks=("embeddings.class_embedding",),
        names={
            "patch_embed.weight": "embeddings.patch_embedding.weight",
            "prefix.0": "embeddings.class_embedding",
            "pos_embed": "embeddings.position_embedding.weight",
            "pre_norm.*": "pre_layrnorm.*",  # sic
            "blocks.#.norm1.*": f"{_HF_CLIP_BLOCK}.layer_norm1.*",
            "blocks.#.q.*": f"{_HF_CLIP_BLOCK}.self_attn.q_proj.*",
            "blocks.#.k.*": f"{_HF_CLIP_BLOCK}.self_attn.k_proj.*",
            "blocks.#.v.*": f"{_HF_CLIP_BLOCK}.self_attn.v_proj.*",
            "blocks.#.proj.*": f"{_HF_CLIP_BLOCK}.self_attn.out_proj.*",
            "blocks.#.norm2.*": f"{_HF_CLIP_BLOCK}.layer_norm2.*",
            "blocks.#.fc1.*": f"{_HF_CLIP_BLOCK}.mlp.fc1.*",
            "blocks.#.fc2.*": f"{_HF_CLIP_BLOCK}.mlp.fc2.*",
            "norm.*": "post_layernorm.*",
            "head_proj.weight": "/visual_projection.weight",
        },
        older=(("pre_norm.*", "pre_layernorm.*"),),
        ignored=(
            r"/?text_model\..*|/?(text_projection|classifier)\.(weight|bias)|/?logit_scale"
            r"|embeddings\.position_ids"
        ),
        tower="vision_model.",
    ),
    "hf_vit": Layout(
        marks=("embeddings.patch_embeddings.projection.weight",),
        names={
            "patch_embed.*": "embeddings.patch_embeddings.projection.*",
            "prefix.0": "embeddings.cls_token",
            "prefix.1": "embeddings.distillation_token",
            "pos_embed": "embeddings.position_embeddings",
            "blocks.#.norm1.*": f"{_HF_VIT_BLOCK}.layernorm_before.*",
            "blocks.#.q.*": f"{_HF_VIT_BLOCK}.attention.attention.query.*",
            "blocks.#.k.*": f"{_HF_VIT_BLOCK}.attention.attention.key.*",
            "blocks.#.v.*": f"{_HF_VIT_BLOCK}.attention.attention.value.*",
            "blocks.#.proj.*": f"{_HF_VIT_BLOCK}.attention.output.dense.*",
            "blocks.#.norm2.*": f"{_HF_VIT_BLOCK}.layernorm_after.*",
            "blocks.#.fc1.*": f"{_HF_VIT_BLOCK}.intermediate.dense.*",
            "blocks.#.fc2.*": f"{_HF_VIT_BLOCK}.output.dense.*",
            "norm.*": "layernorm.*",
        },
        older=(  # in memory since transformers 5; its files keep the names above
            ("blocks.#.norm1.*", "layers.#.layernorm_before.*"),
            ("blocks.#.q.*", "layers.#.attention.q_proj.*"),
            ("blocks.#.k.*", "layers.#.attention.k_proj.*"),
            ("blocks.#.v.*", "layers.#.attention.v_proj.*"),
            ("blocks.#.proj.*", "layers.#.attention.o_proj.*"),
            ("blocks.#.norm2.*", "layers.#.layernorm_after.*"),
            ("blocks.#.fc1.*", "layers.#.mlp.fc1.*"),
            ("blocks.#.fc2.*", "layers.#.mlp.fc2.*"),
        ),
        ignored=(
            r"/?(classifier|cls_classifier|distillation_classifier)\.(weight|bias)"
            r"|pooler\.dense\.(weight|bias)|embeddings\.(mask_token|position_ids)"
        ),
    ),
    "lvvit": Layout(
        marks=("patch_embed.conv1.weight", "cls_token"),
        names={
            "patch_embed.*": "patch_embed.proj.*",
            "stem.0.*": "patch_embed.conv1.*",
            "stem.1.*": "patch_embed.bn1.*",
            "stem.3.*": "patch_embed.conv2.*",
            "stem.4.*": "patch_embed.bn2.*",
            "stem.6.*": "patch_embed.conv3.*",
            "stem.7.*": "patch_embed.bn3.*",
            "prefix.0": "cls_token",
            "pos_embed": "pos_embed",
            **_TIMM_BLOCK,
        },
        ignored=r"(head|aux_head)\.(weight|bias)",
    ),
    "timm": Layout(
        marks=("patch_embed.proj.weight", "cls_token"),
        names={
            "patch_embed.*": "patch_embed.proj.*",
            "prefix.0": "cls_token",
            "prefix.1": "dist_token",
            "pos_embed": "pos_embed",
            "pre_norm.*": "norm_pre.*",
            **_TIMM_BLOCK,
        },
        # timm keeps CLIP's projection as a classifier: ignored, so that the feature is the CLS
        # token after the norm, as for every timm model
        ignored=r"(head|head_dist|pre_logits\.fc)\.(weight|bias)",
    ),
}


@functools.cache
def _patterns(layout: LayoutName) -> list[tuple[re.Pattern[str], str]]:
    """(pattern of their name, template of ours), for reading."""
    table = LAYOUTS[layout]
    pairs = [*table.names.items(), *table.older]
    what = "(?P<what>weight|bias|running_mean|running_var|num_batches_tracked)"
    return [
        (
            re.compile(re.escape(theirs).replace(r"\#", r"(?P<i>0|[1-9]\d*)").replace(r"\*", what)),
            ours,
        )
        for ours, theirs in pairs
    ]


def _ours(layout: LayoutName, name: str) -> str | None:
    """Our name of one of their tensors, or None."""
    for pattern, ours in _patterns(layout):
        if found := pattern.fullmatch(name):
            groups = found.groupdict()
            return ours.replace("#", groups.get("i") or "").replace("*", groups.get("what") or "")
    return None


def _theirs(layout: LayoutName, name: str) -> str | None:
    """Their name of one of our tensors (in parts, see `_split`), or None."""
    block = re.match(r"blocks\.(\d+)\.", name)
    general = re.sub(r"^blocks\.\d+\.", "blocks.#.", name)
    stem, _, what = general.rpartition(".")
    names = LAYOUTS[layout].names
    theirs = names.get(general) or names.get(f"{stem}.*")
    if theirs is None:
        return None
    return theirs.replace("#", block[1] if block else "").replace("*", what)


# ---------------------------------------------------------------------- state dict -> ours


def convert(
    state_dict: Mapping[str, Tensor], config: Told = None, facts: Mapping[str, Any] | None = None
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Our config and tensors from a state dict in any layout that we know.

    Args:
        state_dict: tensors by name, in any float dtype and on any device: OpenAI's or open_clip's
            CLIP, Hugging Face's CLIPVisionModel(WithProjection), CLIPModel, ViT or DeiT, timm's
            ViT or DeiT, LV-ViT, or ours. Heads and text towers are ignored.
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
    shape = _shape(parts, layout)
    told, facts = check_fields(config), check_fields(facts)
    _check_shapes("config", told, shape, layout)
    _check_shapes("metadata", facts, shape, layout)
    free = {**_conventions(layout, shape), **facts, **told}
    missing = [field for field in _FREE if field not in free]
    if missing:
        raise ValueError(_ask(layout, shape, missing))
    full = ViTConfig(**{**shape, **{field: free[field] for field in _FREE}})
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
        towers = [t for t in towers if all(t + other in state_dict for other in others)]
        if len(towers) == 1:
            return layout, towers[0]
        if towers:
            raise ValueError(
                f"weights ({layout} layout): expected one vision tower, got {len(towers)}"
                f" ({listed(towers)}); pass the state dict of one of them"
            )
    names = [str(name) for name in state_dict]
    raise ValueError(
        "weights: expected the tensor names of OpenAI's or open_clip's CLIP, Hugging Face's CLIP"
        " or ViT, timm's ViT or DeiT, or LV-ViT, with a CLS token; got "
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
        ours = _ours(layout, short)
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


def _shape(parts: Mapping[str, Tensor], layout: LayoutName) -> dict[str, Any]:
    """The fields of `ViTConfig` that names and shapes give."""
    stem: Literal["patch", "lvvit"] = "lvvit" if "stem.0.weight" in parts else "patch"
    # where these are missing or misshaped nothing else can be checked
    convolution = _need(parts, layout, "patch_embed.weight", 4)
    width, channels, kernel, other = convolution.shape
    if kernel != other or channels != (64 if stem == "lvvit" else 3):
        raise ValueError(
            f"{_theirs(layout, 'patch_embed.weight')}: expected square patches of"
            f" {64 if stem == 'lvvit' else 3} channels, got shape {tuple(convolution.shape)}"
        )
    blocks = {int(name.split(".")[1]) for name in parts if name.startswith("blocks.")}
    depth = max(blocks, default=-1) + 1
    fc1 = _need(parts, layout, "blocks.0.fc1.weight", 2)
    prefix = (
        _need(parts, layout, "prefix", 2).shape[0]
        if layout == "native"
        else 1 + ("prefix.1" in parts)
    )
    positions = _need(parts, layout, "pos_embed", None)
    rows = math.prod(positions.shape[:-1])
    grid = math.isqrt(max(rows - prefix, 0))
    if positions.shape[-1] != width or grid < 1 or grid**2 != rows - prefix:
        raise ValueError(
            f"{_theirs(layout, 'pos_embed')}: expected {prefix} + (patches a side)^2 rows of"
            f" {width}, got shape {tuple(positions.shape)}; only square images are supported"
        )
    projection = None
    if "head_proj.T" in parts:
        projection = _need(parts, layout, "head_proj.T", 2).shape[1]
    elif "head_proj.weight" in parts:
        projection = _need(parts, layout, "head_proj.weight", 2).shape[0]
    patch_size = kernel * (2 if stem == "lvvit" else 1)
    biased = ("blocks.0.qkv.bias", "blocks.0.q.bias", "blocks.0.k.bias", "blocks.0.v.bias")
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "mlp_dim": fc1.shape[0],
        "out_dim": projection,
        "prefix_tokens": prefix,
        "pre_norm": any(name.startswith("pre_norm.") for name in parts),
        "patch_bias": "patch_embed.bias" in parts,
        "qkv_bias": any(name in parts for name in biased),
        "stem": stem,
    }


def _need(parts: Mapping[str, Tensor], layout: LayoutName, name: str, ndim: int | None) -> Tensor:
    tensor = parts.get(name)
    if tensor is None:
        raise ValueError(f"weights ({layout} layout): missing {_theirs(layout, name)}")
    if tensor.ndim != ndim if ndim is not None else tensor.ndim < 2:
        raise ValueError(
            f"{_theirs(layout, name)}: expected {ndim or 2} dimensions, got shape"
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
            missing.append(_theirs(layout, name) or name)
            return None
        if tensor.numel() != math.prod(shape) or not (loose or tuple(tensor.shape) == shape):
            misshaped.append(f"{origin[name]} (expected {shape}, got {tuple(tensor.shape)})")
            return None
        tensor = tensor.detach().to("cpu", torch.float32).reshape(shape)
        if not torch.isfinite(tensor).all():
            damaged.append(origin[name])
        return tensor

    for name, target in expected.items():
        shape = tuple(target.shape)
        if name.endswith("num_batches_tracked"):  # a counter of training: some files drop it
            used.add(name)
            ours[name] = parts.get(name, torch.tensor(0)).detach().to("cpu", torch.int64)
            continue
        if name == "head_proj.weight" and layout == "openai":
            pieces = [part("head_proj.T", shape[::-1])]
            pieces = [None if x is None else x.T.contiguous() for x in pieces]
        elif name == "prefix" and layout != "native":
            row = (1, shape[1])
            pieces = [part(f"prefix.{i}", row, loose=True) for i in range(shape[0])]
        elif ".qkv." in name and layout in ("hf_clip", "hf_vit"):
            third = (shape[0] // 3, *shape[1:])
            pieces = [part(name.replace("qkv", x), third) for x in ("q", "k", "v")]
        else:
            pieces = [part(name, shape, loose=name == "pos_embed")]
        whole = [x for x in pieces if x is not None]
        if len(whole) == len(pieces):
            ours[name] = whole[0] if len(whole) == 1 else torch.cat(whole)
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
        raise ValueError(f"weights ({layout} layout): {'; '.join(problems)}")
    return ours


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, for a message."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _hint(names: Iterable[str]) -> str:
    """What some foreign names are known to mean."""
    for mark, meaning in (
        ("lora_", ": a LoRA's weights, which LoRA.load reads"),
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


# ---------------------------------------------------------------------- what names cannot tell


def _check_shapes(
    who: str, given: Mapping[str, Any], shape: Mapping[str, Any], layout: LayoutName
) -> None:
    """Raise where what is given differs from what the shapes say."""
    for field in _SHAPED:
        if field in given and given[field] != shape[field]:
            remedy = (
                "position tables are not interpolated, use weights of that image size"
                if field == "image_size"
                else 'to tell only what names cannot, pass a dict: config={"activation": ...}'
            )
            raise ValueError(
                f"{who}: {field} is {given[field]!r}, but the weights ({layout} layout) have"
                f" {shape[field]!r}; {remedy}"
            )


def check_fields(config: Told) -> dict[str, Any]:
    """The fields of `ViTConfig` that are given, with lists as tuples.

    Raises:
        TypeError: not a config, a dict or a name.
        ValueError: unknown fields, or no such preset.

    """
    if config is None:
        return {}
    if isinstance(config, ViTConfig):
        return dataclasses.asdict(config)
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"config: expected one of {', '.join(PRESETS)}; got {config!r}")
        return dataclasses.asdict(PRESETS[config])
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config: expected a dict, a ViTConfig or a preset's name, got {type(config).__name__}"
        )
    fields = (*_SHAPED, *_FREE)
    for field in config:
        if field not in fields:
            close = difflib.get_close_matches(str(field), fields, 1)
            raise ValueError(
                f"config: unknown field {field!r}"
                + (f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields)}")
            )
    told = dict(config)
    for field in ("mean", "std"):
        if isinstance(told.get(field), list | tuple):
            told[field] = tuple(float(x) for x in told[field])
    return told


def _conventions(layout: LayoutName, shape: Mapping[str, Any]) -> dict[str, Any]:
    """What every published model of a layout has in common, at these shapes."""
    width, depth = shape["width"], shape["depth"]
    clip: dict[str, Any] = {"norm_eps": 1e-5, "residual_scale": 1.0}
    if layout in ("openai", "hf_clip"):
        if width <= 1024 and width % 64 == 0:  # OpenAI's rule; ViT-H and larger break it
            clip["heads"] = width // 64
        if not (width == 1024 and shape["patch_size"] == 14):  # LAION's L/14 has its own
            clip |= {"mean": CLIP_MEAN, "std": CLIP_STD}
        return clip
    if layout == "lvvit":
        known: dict[str, Any] = {
            "activation": "gelu",
            "norm_eps": 1e-5,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        }
        if (width, depth) == (512, 20):
            known |= {"heads": 8, "residual_scale": 0.5}
        return known
    if layout == "native":
        return {}
    vit: dict[str, Any] = {"residual_scale": 1.0}
    heads = {(192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16}.get((width, depth))
    if heads is not None and shape["mlp_dim"] == 4 * width:  # ViT-Ti, S, B, L
        vit["heads"] = heads
    if shape["pre_norm"]:  # a CLIP tower in timm's names: published with either activation
        vit["norm_eps"] = 1e-5
    else:
        vit |= {"norm_eps": 1e-12 if layout == "hf_vit" else 1e-6, "activation": "gelu"}
    if shape["prefix_tokens"] == 2:  # DeiT, distilled
        vit |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return vit


_EXAMPLES = {
    "heads": "12",
    "activation": '"quick_gelu"',
    "norm_eps": "1e-06",
    "residual_scale": "1.0",
    "mean": "(0.5, 0.5, 0.5)",
    "std": "(0.5, 0.5, 0.5)",
}
_WHY = {
    "activation": '"quick_gelu" in OpenAI\'s weights, "gelu" in most of LAION\'s',
    "mean": "0.5 in AugReg and google's ViTs, ImageNet's in DeiT, CLIP's in CLIP",
}


def _ask(layout: LayoutName, shape: Mapping[str, Any], missing: list[str]) -> str:
    """The error for what must be told."""
    why = "; ".join(f"{field}: {_WHY[field]}" for field in missing if field in _WHY)
    example = ", ".join(f'"{field}": {_EXAMPLES[field]}' for field in missing)
    fits = [
        name
        for name, preset in PRESETS.items()
        if all(getattr(preset, field) == shape[field] for field in _SHAPED)
    ]
    names = " or ".join(f'config="{name}"' for name in fits)
    return (
        f"weights ({layout} layout): {', '.join(missing)} cannot be told from names and shapes"
        + (f" ({why})" if why else "")
        + f"; say for example config={{{example}}}"
        + (f", or {names} if that is the model" if fits else "")
    )


# ---------------------------------------------------------------------- ours -> state dict


def export(
    vit: ViT, layout: Literal["timm", "hf_vit", "hf_clip", "openai", "lvvit"]
) -> dict[str, Tensor]:
    """The weights under another library's names: the inverse of `convert`.

    Args:
        vit: the model.
        layout: "timm" (ViT, DeiT), "hf_vit" and "hf_clip" (names as in Hugging Face's files),
            "openai" (open_clip's `model.visual`, without prefix), "lvvit".

    Returns:
        Copies on the CPU, in the model's dtype and the layout's shapes.

    Raises:
        ValueError: an unknown layout, or one without a place for some of the weights.

    """
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
        theirs = _theirs(layout, name)
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
    flat = layout in ("openai", "hf_clip")  # the others keep a batch dimension of 1
    parts: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        if name == "prefix":
            for i, token in enumerate(tensor):
                parts[f"prefix.{i}"] = token if flat else token[None, None]
        elif name == "pos_embed":
            parts[name] = tensor if flat else tensor[None]
        elif name == "head_proj.weight" and layout == "openai":
            parts["head_proj.T"] = tensor.T.contiguous()
        elif ".qkv." in name and layout in ("hf_clip", "hf_vit"):
            for x, third in zip("qkv", tensor.chunk(3), strict=True):
                parts[name.replace("qkv", x)] = third
        else:
            parts[name] = tensor
    return parts


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

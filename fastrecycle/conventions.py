"""What names and shapes of weights cannot tell: told by the user, by metadata, or by convention."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastrecycle.layouts import LayoutName
from fastrecycle.vit_config import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRESETS,
    ViTConfig,
)

Told = ViTConfig | Mapping[str, Any] | str | None
"""A whole config, some of its fields, or a preset's name."""

FREE = (  # not in the shapes
    "heads", "activation", "norm_eps", "residual_scale", "mean", "std", "pool", "rope"
)  # fmt: skip
SHAPED = tuple(f.name for f in dataclasses.fields(ViTConfig) if f.name not in FREE)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e6


def _count(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**20


# what a field of ViTConfig must be, by its annotation; the others are names
_ANNOTATIONS = {f.name: str(f.type) for f in dataclasses.fields(ViTConfig)}
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a count", _count),
    "int | None": ("a count or null", lambda x: x is None or _count(x)),
    "bool": ("true or false", lambda x: isinstance(x, bool)),
    "float": ("a number", _number),
    "Triple": (
        "3 numbers",
        lambda x: isinstance(x, tuple) and len(x) == 3 and all(map(_number, x)),
    ),
}
_RESIZE = "load these weights as they are, then vit.resized(...)"


def check_shapes(
    who: str, given: Mapping[str, Any], shape: Mapping[str, Any], layout: LayoutName
) -> None:
    """Raise where what is given differs from what the shapes say."""
    for field in SHAPED:
        if field in given and given[field] != shape[field]:
            remedy = (
                f"position tables are not interpolated in reading; {_RESIZE}"
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
    fields = (*SHAPED, *FREE)
    for field in config:
        if field not in fields:
            close = difflib.get_close_matches(str(field), fields, 1)
            raise ValueError(
                f"config: unknown field {field!r}"
                + (f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields)}")
            )
    told = dict(config)
    for field in ("mean", "std"):
        if isinstance(told.get(field), list):
            told[field] = tuple(told[field])
    for field, value in told.items():
        expected, good = _KINDS.get(_ANNOTATIONS[field], ("text", lambda x: isinstance(x, str)))
        if not good(value):
            raise ValueError(f"config: {field} must be {expected}, got {value!r}")
    return {k: tuple(map(float, v)) if k in ("mean", "std") else v for k, v in told.items()}


def conventions(
    layout: LayoutName, shape: Mapping[str, Any], parts: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What every published model of a layout has in common, at these shapes."""
    width, depth = shape["width"], shape["depth"]
    if layout == "native":
        return {"pool": "cls", "rope": "none"}  # files of the first version do not say
    if layout in ("timm", "timm_eva"):
        return _timm_conventions(layout, shape, parts)
    known: dict[str, Any] = {"residual_scale": 1.0, "pool": "cls", "rope": "none"}
    if layout in ("openai", "hf_clip"):
        known["norm_eps"] = 1e-5
        if width <= 1024 and width % 64 == 0:  # OpenAI's rule; ViT-H and larger break it
            known["heads"] = width // 64
        if not (width == 1024 and shape["patch_size"] == 14):  # LAION's L/14 has its own
            known |= {"mean": CLIP_MEAN, "std": CLIP_STD}
        return known
    imagenet = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if layout == "lvvit":
        del known["residual_scale"]
        known |= {"activation": "gelu", "norm_eps": 1e-5, **imagenet}
        if (width, depth) == (512, 20):
            known |= {"heads": 8, "residual_scale": 0.5}
        return known
    known |= _heads(shape)
    if layout == "hf_siglip":
        return known | {
            "activation": "gelu_tanh", "norm_eps": 1e-6, "pool": "map", "mean": HALF, "std": HALF
        }  # fmt: skip
    if layout in ("hf_dinov2", "hf_dinov3"):
        three = layout == "hf_dinov3"
        known |= {"activation": "gelu", "norm_eps": 1e-5 if three else 1e-6, **imagenet}
        return known | {"rope": "dinov3" if three else "none"}
    known |= {"activation": "gelu", "norm_eps": 1e-12}  # hf_vit
    return known | (imagenet if "prefix.1" in parts else {})  # DeiT, distilled


def _heads(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Of ViT-Ti, S, B and L."""
    by_size = {(192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16}
    heads = by_size.get((shape["width"], shape["depth"]))
    return {"heads": heads} if heads and shape["mlp_dim"] == 4 * shape["width"] else {}


def _timm_conventions(
    layout: LayoutName, shape: Mapping[str, Any], parts: Mapping[str, Tensor]
) -> dict[str, Any]:
    known: dict[str, Any] = {"residual_scale": 1.0, "pool": "cls", "rope": "none", **_heads(shape)}
    if shape["pre_norm"]:  # a CLIP tower in timm's names: published with either activation
        known["norm_eps"] = 1e-5
    else:
        known |= {"norm_eps": 1e-6, "activation": "gelu"}
    if "prefix.1" in parts:  # DeiT, distilled
        known |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if "pool.probe" in parts:
        known["pool"] = "map"
    elif any(name.startswith("fc_norm.") for name in parts):
        known["pool"] = "mean_norm"
    elif "prefix.0" not in parts:
        known["pool"] = "norm_mean"
    if layout == "timm":
        return known
    if shape["width"] == 1792:
        raise ValueError(
            "weights (timm_eva layout): EVA-02's largest model normalises after each branch, which"
            " is not supported"
        )
    if (shape["width"], shape["depth"]) == (1408, 40):  # EVA-g
        known["heads"] = 16
    if "pos_embed" not in parts:  # DINOv3, which timm reads in another way than its authors
        known["norm_eps"] = 1e-5
        del known["pool"], known["rope"]
    elif shape["layer_scale"]:  # with RoPE or without: no tensor shows it
        del known["rope"]
    return known


_EXAMPLES = {
    "heads": "12",
    "activation": '"quick_gelu"',
    "norm_eps": "1e-06",
    "residual_scale": "1.0",
    "mean": "(0.5, 0.5, 0.5)",
    "std": "(0.5, 0.5, 0.5)",
    "pool": '"cls"',
    "rope": '"none"',
}
_WHY = {
    "activation": '"quick_gelu" in OpenAI\'s weights, "gelu" in most of LAION\'s',
    "pool": 'DINOv3 was trained with "cls", timm reads it by "norm_mean"',
    "rope": '"dinov3" in DINOv3; other rotary positions are not supported',
    "mean": "0.5 in AugReg, SigLIP and google's ViTs, ImageNet's in DeiT, CLIP's in CLIP",
}


def ask(layout: LayoutName, shape: Mapping[str, Any], missing: list[str]) -> str:
    """The error for what must be told."""
    why = "; ".join(f"{field}: {_WHY[field]}" for field in missing if field in _WHY)
    example = ", ".join(f'"{field}": {_EXAMPLES[field]}' for field in missing)
    fits = [
        name
        for name, preset in PRESETS.items()
        if all(getattr(preset, field) == shape[field] for field in SHAPED)
    ]
    names = " or ".join(f'config="{name}"' for name in fits)
    return (
        f"weights ({layout} layout): {', '.join(missing)} cannot be told from names and shapes"
        + (f" ({why})" if why else "")
        + f"; say for example config={{{example}}}"
        + (f", or {names} if that is the model" if fits else "")
    )

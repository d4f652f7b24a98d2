"""PEFT folders in and out: adapter_config.json, adapter_model.safetensors, head.safetensors.

A layout says what a library calls the products of a block. Where queries, keys and values are one
fused product (timm, open_clip), one LoRA changes all three; it is split here exactly, and written
back with A stacked and B block-diagonal:

    [dq; dk; dv] = [Bq 0 0; 0 Bk 0; 0 0 Bv] [Aq; Ak; Av]

L blocks, D width, R rank, C classes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrecycle.dora import base_weight, dora_change, full_rank
from fastrecycle.files import (
    atomic_open,
    load_safetensors,
    load_torch,
    parse_json,
    read_json,
    safetensors_content,
)
from fastrecycle.lora import MAX_BLOCKS, TARGETS, Head, LoRA

if TYPE_CHECKING:
    from fastrecycle.vit import ViT

log = logging.getLogger(__name__)

QKV = ("q", "k", "v")

_WHOLE = ".base_layer.out_proj"  # out_proj inside the nn.MultiheadAttention that PEFT wraps
# Released PEFT adds the LoRA of that out_proj twice, W + 2 scale B A, in training and after
# merging (huggingface/peft#3774; measured with 0.17 to 0.21). Folders mean what PEFT computes.
_OUT_PROJ_TIMES = 2
_OUT_PROJ_KNOWN = (0, 21)  # last PEFT release this holds for


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
            "qkv": "attn", "proj": f"attn{_WHOLE}",
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

HEADS = ("classifier", "head", "fc", "score")  # names of a linear head in PEFT's modules_to_save

# Options under which scale B A is not the whole change of a weight, and what to do instead.
_REFUSED = {
    "use_qalora": "QA-LoRA pools the input; train a plain LoRA",
    "use_bdlora": "block-diagonal LoRA has other factors; train a plain LoRA",
    "lora_bias": "it adds a bias; train with lora_bias=False",
    "layer_replication": "it changes the number of blocks; train without layer_replication",
    "target_parameters": "LoRAs on bare parameters are not read; name modules in target_modules",
    "alora_invocation_tokens": "activated LoRA belongs to text models; train a plain LoRA",
    "kasa_config": "KaSA changes the base weights too; train a plain LoRA",
    "monteclora_config": "MonteCLoRA has further factors; train a plain LoRA",
    "arrow_config": "Arrow routes between several LoRAs; load each alone",
    "fan_in_fan_out": "the weights would be transposed; no known vision transformer stores them so",
}
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(?:\.[^.]+)?\.weight")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
_HEAD = re.compile(
    rf"(?P<module>(?:\w+\.)*?(?:{'|'.join(HEADS)}))"
    r"\.(?:modules_to_save\.(?:\w+\.)?)?(?P<which>weight|bias)"
)
_TEXT = re.compile(r"(?:^|\.)(?:text|text_model|text_projection|token_embedding)(?:\.|$)")
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # transformers' stand-in for a missing class name
_PATTERN_SECONDS = 0.1  # of the processor, for a pattern and a name: microseconds are usual
_METADATA = "fastrecycle"  # key of depth and real ranks in the safetensors metadata

_Pair = tuple[Tensor, Tensor]  # A (R, d_in), B (d_out, R)
_Triple = tuple[Tensor, Tensor, float]  # A, B, scale


@dataclass(frozen=True)
class _Place:
    """Where a module sits: whose names, what comes before the blocks, which product."""

    layout: str
    prefix: str
    block: int
    target: str  # of TARGETS, or "qkv"


# ---------------------------------------------------------------------------- reading


def read_peft(path: Path, vit: ViT | None = None) -> LoRA:
    """Read a PEFT folder; one of DoRA as the exact change of the weights of `vit`.

    The head is head.safetensors (weight (C, features), optional bias; in its metadata class names
    as a JSON list under "class_names", and "normalised": see `Head`), else the `classifier`,
    `head`, `fc` or `score` of PEFT's modules_to_save. Class names not found there come from
    class_names.json, or from the id2label of adapter_config.json or config.json. Factors of any
    float dtype become float32.

    Raises:
        FileNotFoundError: no such folder, or no adapter in it.
        ValueError: damaged files, unknown modules, NaN, a variant that is not plain LoRA, a head
            whose classes disagree with the names, or DoRA without a backbone or for another one.

    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: expected a PEFT folder, which holds adapter_config.json and"
            f" adapter_model.safetensors; got {'a file' if path.exists() else 'nothing there'}"
        )
    config = _read_config(path)
    if config.get("use_dora") and vit is None:
        raise ValueError(
            f"{path}: DoRA (use_dora) rescales rows of the weights that it changes, so its change"
            " depends on them; give the backbone, LoRA.load(path, vit), to read it exactly, at full"
            " rank"
        )
    tensors, metadata = _read_tensors(path)
    pairs, others = _pair(path, tensors)
    magnitudes = _magnitudes(path, config, pairs, others)
    _refuse_biases(path, config, others)
    placed, text = _place(path, config, pairs)
    head, head_module, names = _read_head(path, config, others, text)
    if text:
        log.warning(
            "%s: %d modules of the text tower are left out; only the image tower is used", path,
            len(text),
        )  # fmt: skip
    if vit is not None and magnitudes:
        factors, depth = _dora_factors(path, config, pairs, placed, magnitudes, vit)
    else:
        factors, depth = _factors(path, config, pairs, placed, _own_metadata(path, metadata))
    a, b, scale, ranks = _pad_and_stack(path, factors, depth)
    first = next(iter(placed.values()))
    return LoRA(
        a, b, scale, ranks, head, names, first.layout,
        config.get("base_model_name_or_path") or None, path.name, first.prefix, head_module,
    )  # fmt: skip


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {path} is not a PEFT folder")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f'{file}: peft_type must be "LORA", got {kind!r}; only LoRAs are read')
    for option, remedy in _REFUSED.items():
        if config.get(option):
            raise ValueError(f"{file}: {option}={config[option]!r} is not supported: {remedy}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MOVES_THE_BASE):
        raise ValueError(
            f"{file}: init_lora_weights={init!r} changed the base weights in training, so these"
            " factors alone are not the change; convert with PEFT's save_pretrained(...,"
            " path_initial_model_for_weight_conversion=...)"
        )
    for option in ("r", "lora_alpha"):
        value = config.get(option)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise ValueError(f"{file}: {option} must be a finite number, got {value!r}")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise ValueError(f"{file}: base_model_name_or_path must be a name, got {base!r}")
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(option) or {}
        if not isinstance(patterns, dict) or not all(_finite(v) for v in patterns.values()):
            raise ValueError(f"{file}: {option} must map module names to numbers, got {patterns!r}")
    return config


def _finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The adapter's tensors by name without "base_model.model.", and the file's metadata."""
    safe, pickled = path / "adapter_model.safetensors", path / "adapter_model.bin"
    metadata: dict[str, str] = {}
    if safe.is_file():
        tensors, metadata = load_safetensors(safe)
    elif pickled.is_file():
        tensors = load_torch(pickled)
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(x, Tensor) for name, x in tensors.items()
        ):
            raise ValueError(f"{pickled}: expected a state dict, tensors by name")
    else:
        raise FileNotFoundError(f"{safe}: no such file, and no adapter_model.bin beside it")
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{path}: {name} must hold floats, got {x.dtype}")
        if not torch.isfinite(x.float()).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    return {k.removeprefix("base_model.model."): x.float() for k, x in tensors.items()}, metadata


def _pair(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """Tensors to {module: (A, B)} and the rest."""
    halves: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, x in tensors.items():
        if match := _FACTOR.fullmatch(name):
            halves.setdefault(match["module"], {})[match["which"]] = x
        else:
            others[name] = x
    pairs = {}
    for module, half in halves.items():
        if len(half) < 2:
            raise ValueError(f"{path}: {module} has lora_{next(iter(half))} alone, its pair lacks")
        pairs[module] = (half["A"], half["B"])
    if not pairs:
        raise ValueError(f"{path}: no LoRA factors (names ending in lora_A.weight) in the file")
    return pairs, others


def _magnitudes(
    path: Path,
    config: Mapping[str, Any],
    pairs: Mapping[str, _Pair],
    others: dict[str, Tensor],
) -> dict[str, Tensor]:
    """DoRA's magnitudes by module, taken out of `others`."""
    if not config.get("use_dora"):
        return {}
    found = {}
    for name in list(others):
        if match := _MAGNITUDE.fullmatch(name):
            found[match["module"]] = others.pop(name)
    if found.keys() != pairs.keys():
        lacking = sorted(pairs.keys() ^ found.keys())
        raise ValueError(f"{path}: no magnitude, or no factors, of {_some(lacking)}")
    return found


def _refuse_biases(path: Path, config: Mapping[str, Any], others: Mapping[str, Tensor]) -> None:
    bias = config.get("bias", "none")
    trained = [n for n in others if n.endswith(".bias") and not _HEAD.fullmatch(n)]
    if bias not in (None, "none") and trained:
        raise ValueError(
            f"{path}: bias={bias!r} trained {len(trained)} biases of the backbone ({trained[0]},"
            ' ...), which the frozen backbone does not have; train with bias="none"'
        )


def _locate(module: str) -> dict[str, _Place]:
    """Where a module may sit, by layout."""
    places = {}
    for name, layout in LAYOUTS.items():
        known = {m: t for t, m in layout.modules.items()} | layout.also
        match = re.fullmatch(
            rf"(?P<prefix>(?:\w+\.)*?){re.escape(layout.blocks)}\.(?P<block>\d{{1,4}})\.(?P<in>.+)",
            module,
        )
        if match and match["in"] in known:
            places[name] = _Place(name, match["prefix"], int(match["block"]), known[match["in"]])
    return places


def _place(
    path: Path, config: Mapping[str, Any], pairs: Mapping[str, _Pair]
) -> tuple[dict[str, _Place], list[str]]:
    """The image tower's modules with their places, and the text tower's."""
    located = {module: _locate(module) for module in pairs}
    named = [x for module, x in located.items() if x and not _TEXT.search(module)]
    # layouts share names: the one that has all of them
    common = next((name for name in LAYOUTS if all(name in x for x in named)), None)
    places = {
        module: x.get(common or "") or next(iter(x.values()), None) for module, x in located.items()
    }
    prefixes = {p.prefix for p in places.values() if p is not None and p.layout == "open_clip"}
    two_towers = _base_class(config) in ("CLIP", "CoCa")  # of open_clip
    placed: dict[str, _Place] = {}
    text, unknown = [], []
    for module, place in places.items():
        if _TEXT.search(module):
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
            f"{path}: LoRA on {_some(beyond)}; backbones of up to {MAX_BLOCKS} blocks are read"
        )
    if unknown:
        raise ValueError(
            f"{path}: LoRA on unknown modules {_some(unknown)}; known are {_known_targets()}"
        )
    if not placed:
        raise ValueError(f"{path}: this LoRA changes the text tower alone; nothing to use")
    sources = {(p.layout, p.prefix) for p in placed.values()}
    if len(sources) > 1:
        listed = ", ".join(f"{p or '(top)'} ({x})" for x, p in sorted(sources))
        raise ValueError(f"{path}: LoRAs on several models at once: {listed}; expected one")
    return placed, text


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _known_targets() -> str:
    return "; ".join(
        f"{name}: {layout.blocks}.N.{{{', '.join(layout.modules.values())}}}"
        for name, layout in LAYOUTS.items()
    )


def _own_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Depth and real ranks, which this library writes and PEFT does not: {} in PEFT's own files."""
    if _METADATA not in metadata:
        return {}
    try:
        own = json.loads(metadata[_METADATA])
        ranks = {t: [int(r) for r in own["ranks"][t]] for t in own["ranks"]}
        depth = int(own["depth"])
        if depth > MAX_BLOCKS or any(r < 0 for row in ranks.values() for r in row):
            raise ValueError
        return {"depth": depth, "ranks": ranks}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{path}: damaged metadata in adapter_model.safetensors") from None


def _factors(
    path: Path,
    config: Mapping[str, Any],
    pairs: Mapping[str, _Pair],
    placed: Mapping[str, _Place],
    own: Mapping[str, Any],
) -> tuple[dict[tuple[str, int], _Triple], int]:
    """{(target, block): (A, B, scale)} with fused products split, and the number of blocks."""
    depth = max(place.block for place in placed.values()) + 1
    if own:
        if own["depth"] < depth or any(len(r) != own["depth"] for r in own["ranks"].values()):
            raise ValueError(f"{path}: damaged metadata in adapter_model.safetensors")
        depth = own["depth"]
    ranks: dict[str, list[int]] | None = own.get("ranks")
    factors: dict[tuple[str, int], _Triple] = {}
    for module, place in placed.items():
        a, b = pairs[module]
        scale = _scale(path, config, module, a, b)
        if place.target == "qkv":
            known = None if ranks is None else [ranks.get(t, [0] * depth)[place.block] for t in QKV]
            parts = _split_qkv(path, module, a, b, known)
        elif module.endswith(_WHOLE):  # PEFT adds this one to every in_proj, wanted or not
            twin = pairs.get(module.removesuffix(_WHOLE))
            rank = a.shape[0]
            if b.any():
                scale *= _out_proj_times(path, config, own)
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


def _dora_factors(
    path: Path,
    config: Mapping[str, Any],
    pairs: Mapping[str, _Pair],
    placed: Mapping[str, _Place],
    magnitudes: Mapping[str, Tensor],
    vit: ViT,
) -> tuple[dict[tuple[str, int], _Triple], int]:
    """`_factors` of DoRA: changes of full rank."""
    factors: dict[tuple[str, int], _Triple] = {}
    for module, place in placed.items():
        if place.layout == "open_clip" and (place.target == "qkv" or module.endswith(_WHOLE)):
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
    name = module.removesuffix(_WHOLE)  # PEFT sizes it as its nn.MultiheadAttention
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


def _out_proj_times(path: Path, config: Mapping[str, Any], own: Mapping[str, Any]) -> int:
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


def _split_qkv(
    path: Path, module: str, a: Tensor, b: Tensor, ranks: list[int] | None
) -> dict[str, _Pair]:
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


def _pad_and_stack(
    path: Path, factors: Mapping[tuple[str, int], _Triple], depth: int
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


def _read_head(
    path: Path, config: Mapping[str, Any], others: Mapping[str, Tensor], text: list[str]
) -> tuple[Head | None, str | None, tuple[str, ...] | None]:
    """The head, its module's name if PEFT trained it, and the class names. Grows `text`."""
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, x in others.items():
        if match := _HEAD.fullmatch(name):
            parts.setdefault(match["module"], {})[match["which"]] = x
        elif _TEXT.search(name):
            text.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{path}: unknown tensors {_some(unknown)}; beside LoRA factors only a linear head"
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
    elif head is not None and _base_class(config) in (
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


def _base_class(config: Mapping[str, Any]) -> object:
    """Class of the model that PEFT wrapped, where it wrote that down."""
    mapping = config.get("auto_mapping")
    return mapping.get("base_model_class") if isinstance(mapping, dict) else None


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


# ---------------------------------------------------------------------------- writing


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
            {"format": "pt", _METADATA: json.dumps(own)},
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

    def add(module: str, factors: _Triple) -> None:
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = factors[:2]

    for i in range(lora.depth):
        own = {t: _real(lora, t, i) for t in lora.a if lora.ranks[t][i]}
        if "qkv" in layout.modules and any(t in own for t in QKV):
            own["qkv"] = _fuse_qkv({t: own.pop(t) for t in QKV if t in own})
        attention = layout.module(prefix, i, "qkv") if "qkv" in layout.modules else ""
        if layout is LAYOUTS["open_clip"] and ("qkv" in own or "proj" in own):
            qkv, proj = _whole_attention(own.pop("qkv", None), own.pop("proj", None))
            add(attention, qkv)
            add(layout.module(prefix, i, "proj"), proj)
            sizes[attention] = (len(qkv[0]), qkv[2])
        for target, factors in own.items():
            module = layout.module(prefix, i, target)
            add(module, factors)
            sizes[module] = (len(factors[0]), factors[2])
    return tensors, sizes


def _real(lora: LoRA, target: str, block: int) -> _Triple:
    """A and B without their padding, and the scale."""
    rank = lora.ranks[target][block]
    a, b = lora.a[target][block, :rank], lora.b[target][block, :, :rank]
    return a.detach().float().cpu(), b.detach().float().cpu(), float(lora.scale[target][block])


def _rescale(b: Tensor, scale: float, to: float) -> Tensor:
    """B such that `to` times it is `scale` times the old one."""
    return b if scale == to or to == 0 else b * (scale / to)


def _fuse_qkv(parts: Mapping[str, _Triple]) -> _Triple:
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


def _whole_attention(qkv: _Triple | None, proj: _Triple | None) -> tuple[_Triple, _Triple]:
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

    def grow(factors: _Triple) -> _Triple:
        a, b, old = factors
        more = rank - len(a)
        return pad(a, (0, 0, 0, more)), pad(_rescale(b, old, scale), (0, more)), scale

    return grow(qkv), grow(proj)


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

"""A PEFT folder in: its config and tensors, checked, to one `LoRA`.

C classes.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrecycle.files import load_safetensors, load_torch, read_json
from fastrecycle.lora import MAX_BLOCKS, LoRA
from fastrecycle.peft_format.factors import dora_factors, pad_and_stack, plain_factors
from fastrecycle.peft_format.fused import Pair
from fastrecycle.peft_format.head import HEAD, read_head
from fastrecycle.peft_format.names import METADATA, place_modules, some

if TYPE_CHECKING:
    from fastrecycle.vit import ViT

log = logging.getLogger(__name__)

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
    placed, text = place_modules(path, config, pairs)
    head, head_module, names = read_head(path, config, others, text)
    if text:
        log.warning(
            "%s: %d modules of the text tower are left out; only the image tower is used", path,
            len(text),
        )  # fmt: skip
    if vit is not None and magnitudes:
        factors, depth = dora_factors(path, config, pairs, placed, magnitudes, vit)
    else:
        factors, depth = plain_factors(path, config, pairs, placed, _own_metadata(path, metadata))
    a, b, scale, ranks = pad_and_stack(path, factors, depth)
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


def _pair(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
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
    pairs: Mapping[str, Pair],
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
        raise ValueError(f"{path}: no magnitude, or no factors, of {some(lacking)}")
    return found


def _refuse_biases(path: Path, config: Mapping[str, Any], others: Mapping[str, Tensor]) -> None:
    bias = config.get("bias", "none")
    trained = [n for n in others if n.endswith(".bias") and not HEAD.fullmatch(n)]
    if bias not in (None, "none") and trained:
        raise ValueError(
            f"{path}: bias={bias!r} trained {len(trained)} biases of the backbone ({trained[0]},"
            ' ...), which the frozen backbone does not have; train with bias="none"'
        )


def _own_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Depth and real ranks, which this library writes and PEFT does not: {} in PEFT's own files."""
    if METADATA not in metadata:
        return {}
    try:
        own = json.loads(metadata[METADATA])
        ranks = {t: [int(r) for r in own["ranks"][t]] for t in own["ranks"]}
        depth = int(own["depth"])
        if depth > MAX_BLOCKS or any(r < 0 for row in ranks.values() for r in row):
            raise ValueError
        return {"depth": depth, "ranks": ranks}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{path}: damaged metadata in adapter_model.safetensors") from None

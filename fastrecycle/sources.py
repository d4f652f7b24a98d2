"""Where weights come from: files, folders, and the downloads of open_clip, timm and the Hub.

What a library or the files beside the weights say of a model (activation, pixel statistics, heads)
goes to `fastrecycle.weights.convert` together with the weights.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastrecycle.conventions import Told, check_fields
from fastrecycle.files import load_safetensors, load_torch, read_json
from fastrecycle.layouts import LayoutName
from fastrecycle.vit_config import PRESETS, ViTConfig
from fastrecycle.weights import CONFIG_KEY, convert, detect, listed

if TYPE_CHECKING:
    from torch import nn


def load_source(source: str | Path, config: Told = None) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Config and tensors from "demo", a file or folder, or a library's own downloads.

    Args:
        source: "demo"; a .safetensors, .pt, .pth or .bin file, or a folder with one (or with an
            index and its shards); "open_clip:MODEL/PRETRAINED", where PRETRAINED may be a file;
            "timm:NAME"; "hf:OWNER/REPO", "hf:OWNER/REPO@REVISION".
        config: see `convert`; it goes before what files beside the weights say.

    Raises:
        FileNotFoundError: no such file or folder, or no weights in it.
        OSError: a download failed.
        ValueError: damaged files, pickled objects, or see `convert`.

    """
    if isinstance(source, str):
        scheme, _, name = source.partition(":")
        if source == "demo":
            from fastrecycle.assets import asset

            return _from_path(Path(asset("vit.safetensors")), config)
        if scheme == "open_clip":
            return _from_open_clip(name, config)
        if scheme == "timm":
            return _from_timm(name, config)
        if scheme == "hf":
            return _from_hub(name, config)
    return _from_path(Path(source), config)


# in the order of preference; OpenAI's own .pt files are programs, not plain tensors
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_CONFIGS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "open_clip_config.json",
)


def _choose(names: Iterable[str], where: str) -> str:
    """The weights file among a folder's names."""
    names = sorted(names)
    for name in _FILES:
        if name in names:
            return name
    for endings in ((".safetensors",), (".bin", ".pt", ".pth")):
        found = [name for name in names if name.endswith(endings) and "/" not in name]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{where}: expected one weights file, got {listed(found)}; name one")
    raise FileNotFoundError(
        f"{where}: no weights in it; expected {', '.join(_FILES)}, or one .safetensors, .bin, .pt"
        " or .pth file"
    )


def _from_path(path: Path, config: Told) -> tuple[ViTConfig, dict[str, Tensor]]:
    if path.is_dir():
        return _from_path(path / _choose((p.name for p in path.iterdir()), str(path)), config)
    if not path.exists():
        preset = f'; random weights of this shape: ViT.preset("{path}")'
        raise FileNotFoundError(
            f"{path}: no such file or folder"
            + (
                preset
                if str(path) in PRESETS
                else '; besides paths, sources are "demo", "open_clip:MODEL/PRETRAINED",'
                ' "timm:NAME" and "hf:OWNER/REPO"'
            )
        )
    tensors, metadata = _read(path)
    try:
        if CONFIG_KEY in metadata:
            return convert(tensors, config, _written_config(metadata[CONFIG_KEY]))
        layout = detect(tensors)[0]
        try:
            facts = _beside(path.parent, layout)
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
            # files of any content: what they lack is told by the place where it was missed
            raise ValueError(
                f"the JSON files beside it do not describe such a model ({type(error).__name__}:"
                f" {error}); correct or move them"
            ) from None
        return convert(tensors, config, facts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _written_config(text: str) -> dict[str, Any]:
    """The config that `save_vit` wrote."""
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"expected an object, got {type(fields).__name__}")
        return check_fields(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"metadata {CONFIG_KEY} is damaged: {error}") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of one file, or of an index and its shards."""
    if path.name.endswith(".index.json"):
        return _read_shards(path), {}
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(
            f"{path}: expected .safetensors, .pt, .pth, .bin or .index.json, got {path.suffix!r}"
        )
    return _unwrap(load_torch(path), path), {}


def _read_shards(index: Path) -> dict[str, Tensor]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index}: expected an index of shards with a "weight_map"')
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or "\\" in shard:
            raise ValueError(f"{index}: a shard must lie beside the index, got {shard!r}")
        tensors |= _read(index.parent / shard)[0]
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise ValueError(f"{index}: its shards lack {listed(absent)}")
    return tensors


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The one state dict in a checkpoint, bare or under a key such as "model"."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(content).__name__}")
    if any(isinstance(x, Tensor) for x in content.values()):
        return dict(content)
    found = [
        name
        for name, value in content.items()
        if isinstance(value, Mapping) and any(isinstance(x, Tensor) for x in value.values())
    ]
    if len(found) != 1:
        raise ValueError(
            f"{path}: expected one state dict, got "
            + (f"several ({listed(map(str, found))}); save the one you mean" if found else "none")
        )
    return dict(content[found[0]])


def _lazily(name: str, source: str, install: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{source}: needs {name} ({error}); pip install {install}") from None


def _download_failed(source: str, error: Exception) -> OSError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OSError(
        f"{source}: could not be downloaded ({type(error).__name__}: {first}); without a network,"
        " give the path of a file"
    )


def open_clip_model(name: str) -> Any:
    """A model of open_clip with its weights, both towers.

    Args:
        name: MODEL/PRETRAINED, where PRETRAINED may be a file; or hf-hub:..., local-dir:...

    Raises:
        FileNotFoundError: no such file or tag.
        OSError: a download failed.
        ValueError: no such model, or weights of another one.

    """
    source = f"open_clip:{name}"
    open_clip = _lazily("open_clip", source, "open_clip_torch")
    whole = name.startswith(("hf-hub:", "local-dir:"))  # these name their weights themselves
    model_name, _, pretrained = (name, "", "") if whole else name.partition("/")
    if not whole:
        if model_name not in open_clip.list_models():
            close = difflib.get_close_matches(model_name, open_clip.list_models(), 3, 0.4)
            raise ValueError(f"{source}: no such model; close to it: {listed(close) or 'none'}")
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if not pretrained:
            raise ValueError(
                f"{source}: expected open_clip:MODEL/PRETRAINED; pretrained weights of"
                f" {model_name}: {listed(tags, 20) or 'none, so give a file'}"
            )
        quick = bool((open_clip.get_pretrained_cfg(model_name, pretrained) or {}).get("quick_gelu"))
        wants = bool((open_clip.get_model_config(model_name) or {}).get("quick_gelu"))
        if pretrained in tags and quick != wants:
            # open_clip only warns, and runs the weights with the wrong activation
            other = f"{model_name}-quickgelu" if quick else model_name.removesuffix("-quickgelu")
            raise ValueError(
                f"{source}: these weights were trained with {'Quick' if quick else ''}GELU, which"
                f" this model does not use; take open_clip:{other}/{pretrained}"
            )
        if pretrained not in tags and not Path(pretrained).is_file():
            raise FileNotFoundError(
                f"{source}: {pretrained} is no file and no pretrained tag of {model_name};"
                f" tags: {listed(tags, 20) or 'none'}"
            )
    try:
        return open_clip.create_model(model_name, pretrained=pretrained or None)
    except OSError as error:
        raise _download_failed(source, error) from None
    except Exception as error:  # a damaged file, or weights of another model
        raise ValueError(f"{source}: open_clip cannot load this ({error})") from None


def _from_open_clip(name: str, config: Told) -> tuple[ViTConfig, dict[str, Tensor]]:
    visual = open_clip_model(name).visual
    return convert(visual.state_dict(), config, open_clip_facts(visual))


def open_clip_facts(visual: nn.Module) -> dict[str, Any]:
    """What an open_clip vision tower says of itself and its names do not.

    Raises:
        ValueError: neither a plain ViT with a CLS feature nor a timm tower that `timm_facts` takes.

    """
    tower: Any = visual
    mean, std = getattr(tower, "image_mean", None), getattr(tower, "image_std", None)
    pixels = _statistics({"mean": mean, "std": std}, "mean", "std")
    if type(tower).__name__ == "TimmModel":  # SigLIP, EVA and others
        return timm_facts(tower.trunk) | pixels
    if type(tower).__name__ != "VisionTransformer" or tower.pool_type != "tok":
        raise ValueError(
            f"open_clip: expected a VisionTransformer read from its CLS token, got"
            f" {type(tower).__name__} with pooling {getattr(tower, 'pool_type', None)!r}"
        )
    block = tower.transformer.resblocks[0]
    facts = {
        "activation": _activation(type(block.mlp.gelu).__name__, "open_clip"),
        "heads": block.attn.num_heads,
        "norm_eps": tower.ln_post.eps,
    }
    return facts | pixels


def _from_timm(name: str, config: Told) -> tuple[ViTConfig, dict[str, Tensor]]:
    source = f"timm:{name}"
    timm = _lazily("timm", source, "timm")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        if "Unknown model" in str(error):
            close = difflib.get_close_matches(name, timm.list_models("*vit*"), 3)
            raise ValueError(f"{source}: no such model; close to it: {listed(close)}") from None
        raise _download_failed(source, error) from None
    return convert(model.state_dict(), config, timm_facts(model))


def timm_facts(model: nn.Module) -> dict[str, Any]:
    """What a timm model says of itself and its names do not.

    Raises:
        ValueError: not a `VisionTransformer` or `Eva`, or with parts that `ViT` lacks: gated MLPs,
            other rotary positions than DINOv3's, norms after the branches, another pooling.

    """
    vit: Any = model
    kind, pooling = type(vit).__name__, getattr(vit, "global_pool", None)
    if not (kind.startswith("VisionTransformer") or kind == "Eva"):
        raise ValueError(
            f"timm: expected a VisionTransformer or an Eva, got {kind} with pooling {pooling!r}"
        )
    block = vit.blocks[0]
    norm = vit.norm if hasattr(vit.norm, "eps") else vit.fc_norm
    missing = [
        what
        for what, there in (
            (f"its pooling {pooling!r}", pooling not in ("token", "avg", "map")
             or getattr(vit, "pool_include_prefix", False)),
            ("two last norms", hasattr(vit.norm, "eps") and hasattr(vit.fc_norm, "eps")),
            ("no last norm", not hasattr(norm, "eps")),
            (f"blocks of type {type(block).__name__}",
             type(block).__name__ not in ("Block", "EvaBlock")),
            (f"its {type(block.norm1).__name__}", type(block.norm1).__name__ != "LayerNorm"),
            (f"its MLP, {type(getattr(block, 'mlp', None)).__name__} (SwiGLU is not supported)",
             type(getattr(block, "mlp", None)).__name__ != "Mlp"),
            ("its patch embedding", type(vit.patch_embed).__name__ != "PatchEmbed"),
        )
        if there
    ]  # fmt: skip
    if missing:
        raise ValueError(f"timm: this model has parts that a plain ViT lacks: {missing[0]}")
    pools = {
        "token": "cls",
        "map": "map",
        "avg": "mean_norm" if norm is vit.fc_norm else "norm_mean",
    }
    facts = {
        "activation": _timm_activation(block.mlp.act),
        "heads": block.attn.num_heads,
        "norm_eps": norm.eps,
        "pool": pools[str(pooling)],
        "rope": _timm_rope(getattr(vit, "rope", None), block.attn),
    }
    if getattr(vit, "pos_embed", None) is None:  # no table tells the image size
        facts["image_size"] = vit.pretrained_cfg["input_size"][-1]
    return facts | _statistics(vit.pretrained_cfg, "mean", "std")


def _timm_activation(act: nn.Module) -> str:
    tanh = type(act).__name__ == "GELUTanh" or getattr(act, "approximate", "none") == "tanh"
    return _activation("gelu_tanh" if tanh else type(act).__name__, "timm")


def _timm_rope(rope: Any, attention: Any) -> str:
    """Our name of timm's rotary positions.

    Raises:
        ValueError: others than DINOv3's.

    """
    if rope is None:
        return "none"
    ours = {
        "temperature": 100.0, "min_period": None, "max_period": None, "grid_offset": 0.0,
        "grid_indexing": "ij", "normalize_coords": "separate",
    }  # fmt: skip
    if (
        type(rope).__name__ != "RotaryEmbeddingDinoV3"
        or not attention.rotate_half
        or any(getattr(rope, name) != value for name, value in ours.items())
    ):
        raise ValueError(
            f"timm: expected no rotary positions (RoPE) or DINOv3's, got {type(rope).__name__}"
        )
    return "dinov3"


def _from_hub(name: str, config: Told) -> tuple[ViTConfig, dict[str, Tensor]]:
    source = f"hf:{name}"
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise ValueError(f"{source}: expected hf:OWNER/REPO or hf:OWNER/REPO@REVISION")
    hub = _lazily("huggingface_hub", source, "'fastrecycle[hf]'")
    try:
        names = hub.list_repo_files(repo, revision=revision or None)
    except Exception as error:  # offline: what an earlier call left in the cache
        try:
            folder = hub.snapshot_download(repo, revision=revision or None, local_files_only=True)
        except Exception:
            raise _download_failed(source, error) from None
        return _from_path(Path(folder), config)
    chosen = _choose(names, source)
    wanted = [*_CONFIGS, chosen]
    if chosen.endswith(".index.json"):
        wanted.append("*" + Path(chosen.removesuffix(".index.json")).suffix)
    try:
        folder = hub.snapshot_download(repo, revision=revision or None, allow_patterns=wanted)
    except Exception as error:
        raise _download_failed(source, error) from None
    return _from_path(Path(folder) / chosen, config)


# ---------------------------------------------------------------------- metadata


def _activation(name: str, where: str) -> str:
    """Our name of a library's activation."""
    known = {
        "gelu": "gelu", "GELU": "gelu", "GELUActivation": "gelu",
        "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu", "QuickGELU": "quick_gelu",
        "QuickGELUActivation": "quick_gelu",
        "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "GELUTanh": "gelu_tanh",
    }  # fmt: skip
    if name not in known:
        raise ValueError(f"{where}: expected activation gelu, gelu_tanh or quick_gelu, got {name}")
    return known[name]


def _statistics(config: Mapping[str, Any], mean: str, std: str) -> dict[str, Any]:
    if config.get(mean) is None or config.get(std) is None:
        return {}
    return check_fields({"mean": list(config[mean]), "std": list(config[std])})


def _beside(folder: Path, layout: LayoutName) -> dict[str, Any]:
    """What configuration files in a weights' folder tell; another layout's are passed over."""

    def read(name: str) -> dict[str, Any]:
        value = read_json(folder / name) if (folder / name).is_file() else {}
        return value if isinstance(value, dict) else {}

    config = read("config.json")
    if layout in _HF_KINDS:
        facts = _hf_facts(config, layout, str(folder / "config.json"))
        processor = read("preprocessor_config.json") or read("processor_config.json")
        processor = processor.get("image_processor", processor)
        if processor.get("do_normalize") is False:
            return facts | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        return facts | _statistics(processor, "image_mean", "image_std")
    if layout in ("timm", "timm_eva") and "architecture" in config:
        return _timm_folder(config, layout, str(folder / "config.json"))
    if layout == "openai":
        config = read("open_clip_config.json")
        model = config.get("model_cfg", {})
        vision = model.get("vision_cfg", {})
        if not vision:
            return {}
        facts = _statistics(config.get("preprocess_cfg", {}), "mean", "std")
        facts["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
        if "width" in vision:
            facts["heads"] = vision["width"] // vision.get("head_width", 64)
        return facts
    return {}


def _timm_folder(config: Mapping[str, Any], layout: LayoutName, where: str) -> dict[str, Any]:
    """From timm's config.json."""
    arguments, name = config.get("model_args") or {}, str(config["architecture"])
    pretrained = config.get("pretrained_cfg", config)
    facts = _statistics(pretrained, "mean", "std")
    act = arguments.get("act_layer") or ("quickgelu" if "quickgelu" in name else "gelu")
    facts["activation"] = _activation(act, where)
    if layout == "timm_eva" and "_dinov3" in name:
        facts["rope"] = "dinov3"
        facts["image_size"] = int(pretrained.get("input_size", (3, 256, 256))[-1])
        pooling = config.get("global_pool") or "avg"
        facts["pool"] = {"token": "cls", "avg": "norm_mean"}.get(pooling, pooling)
    elif layout == "timm_eva" and name.startswith("eva_giant"):
        facts["rope"] = "none"
    return facts


_HF_KINDS: dict[LayoutName, tuple[tuple[str, ...], str, float]] = {
    # model types, and their defaults of activation and eps
    "hf_clip": (("clip", "clip_vision_model"), "quick_gelu", 1e-5),
    "hf_siglip": (("siglip", "siglip_vision_model"), "gelu_pytorch_tanh", 1e-6),
    "hf_vit": (("vit", "deit"), "gelu", 1e-12),
    "hf_dinov2": (("dinov2", "dinov2_with_registers"), "gelu", 1e-6),
    "hf_dinov3": (("dinov3_vit",), "gelu", 1e-5),
}


def _hf_facts(config: Mapping[str, Any], layout: LayoutName, where: str) -> dict[str, Any]:
    """From a config.json; fields that it leaves out have the defaults of its model type."""
    kinds, act, eps = _HF_KINDS[layout]
    if config.get("model_type") not in kinds:
        return {}
    vision = config.get("vision_config") or config
    facts = {
        "activation": _activation(str(vision.get("hidden_act", act)), where),
        "norm_eps": float(vision.get("layer_norm_eps", eps)),
        "heads": int(vision.get("num_attention_heads", 6 if layout == "hf_dinov3" else 12)),
    }
    if layout == "hf_dinov3" and float(vision.get("rope_theta", 100.0)) != 100.0:
        raise ValueError(f"{where}: rope_theta must be 100, got {vision['rope_theta']}")
    if isinstance(vision.get("image_size"), int):
        facts["image_size"] = vision["image_size"]
    return facts

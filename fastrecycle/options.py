"""Options of the command line: the stage dataclasses, what commands share, and config files.

The comment above a field is its help text. A value comes from the command line, else from the
file that --config names, else from the preset, else from the dataclass.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import tyro
from tyro.conf import OmitArgPrefixes, Positional
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fastrecycle.config import (
    PRESETS,
    EvalConfig,
    InversionConfig,
    MetaConfig,
    Precision,
    PretuneConfig,
)
from fastrecycle.ops import Backend

Options = TypeVar("Options")
Preset = Literal["default", "paper", "quick"]

# Sections of a config file, which may serve several commands.
STAGES: dict[str, type] = {
    "pretune": PretuneConfig,
    "inversion": InversionConfig,
    "meta": MetaConfig,
    "eval": EvalConfig,
}


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    # Where to compute: auto (CUDA where there is one), cpu, cuda, cuda:1.
    device: str = "auto"
    # Arithmetic; auto is bf16 on CUDA and fp32 elsewhere. fp8 is bf16 with the backbone's larger
    # products in float8, on GPUs of compute capability 8.9 or above.
    precision: Precision = "auto"
    # Folder of the registered data sets; unset means the environment's FASTRECYCLE_DATA.
    data_root: Path | None = None
    # YAML or TOML file with any of these options; the command line goes before it.
    config: Path | None = None
    # No progress bars.
    no_progress: bool = False
    # Results and errors alone.
    quiet: bool = False
    # Show where in the code an error came from (as FASTRECYCLE_DEBUG=1 does).
    debug: bool = False


@dataclass(frozen=True)
class Training:
    """What every stage that trains takes."""

    # reference is eager PyTorch, compile is torch.compile; auto: compile on CUDA.
    backend: Backend = "auto"
    # Seed of everything drawn.
    seed: int = 0
    # Live curves beside metrics.jsonl: tensorboard (extra "tensorboard"; its files are below --out)
    # or wandb (extra "wandb").
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()


@dataclass(frozen=True)
class Backbone:
    """The frozen vision transformer."""

    # demo (packaged), a file or folder, open_clip:MODEL/PRETRAINED, timm:NAME or hf:OWNER/REPO.
    backbone: str = "demo"
    # What the weights do not tell: a JSON file, a preset's name, or pairs such as
    # activation=quick_gelu mean=0.5,0.5,0.5.
    backbone_config: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """The text tower of a two-tower model, whose image tower is the backbone."""

    # A folder with text.json and text.safetensors, or open_clip:MODEL/PRETRAINED: classes are then
    # told apart by the texts of their names (0 shots, Table 12).
    text: str | None = None
    # Prompts with {} for the class name, in the place of the tower's own.
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prior:
    """The network with BatchNorm whose statistics natural images have."""

    # demo (packaged), a ResNet's file, torchvision:resnet50, timm:NAME, or none.
    prior: str = "demo"
    # Where a bottleneck's stride is, if the file does not say.
    prior_stride_in: Literal["conv1", "conv2"] | None = None
    # Epsilon of its BatchNorms, likewise.
    prior_eps: float | None = None


@dataclass(frozen=True)
class Demo:
    """Recycle a part of the packaged bank, evaluate it, and show what came out."""

    common: OmitArgPrefixes[Common]
    # Folder of the results.
    out: Path = Path("runs/demo")
    # Seed of everything drawn.
    seed: int = 0
    # quick fits two CPU cores in minutes; full takes a GPU; auto chooses by the device.
    schedule: Literal["auto", "quick", "full"] = "auto"


@dataclass(frozen=True)
class Pretune:
    """Make a bank of LoRAs from labelled images."""

    common: OmitArgPrefixes[Common]
    backbone: OmitArgPrefixes[Backbone]
    text: OmitArgPrefixes[Text]
    pretune: OmitArgPrefixes[PretuneConfig]
    # A registered name, or the path of a folder, .zip, .tar(.gz) or .csv. Several take turns, LoRA
    # by LoRA, and class names then begin with their set's.
    dataset: tuple[str, ...]
    # Split of the data set: train, val or test.
    split: str = "train"
    # Folder of the bank.
    out: Path = Path("runs/bank")
    # Seed of everything drawn.
    seed: int = 0
    # Fetch a registered data set that is absent, where it has an official direct link.
    download: bool = False


@dataclass(frozen=True)
class Invert:
    """Synthesise images from a bank of LoRAs."""

    common: OmitArgPrefixes[Common]
    training: OmitArgPrefixes[Training]
    backbone: OmitArgPrefixes[Backbone]
    text: OmitArgPrefixes[Text]
    prior: OmitArgPrefixes[Prior]
    inversion: OmitArgPrefixes[InversionConfig]
    # demo (packaged), a folder of PEFT folders, hf:OWNER/REPO, or a .txt file that lists any of
    # these, one a line. What cannot be used is named and left out.
    bank: str = "demo"
    # Folder of the synthetic pool.
    out: Path = Path("runs/pool")
    # Ray cluster to run on: auto (the one that runs here, else this machine alone) or an address.
    cluster: str | None = None
    # Settings to start from: default, paper (the paper's), quick.
    preset: Preset = "default"


@dataclass(frozen=True)
class MetaTrain:
    """Meta-train a meta-LoRA on a synthetic pool."""

    common: OmitArgPrefixes[Common]
    training: OmitArgPrefixes[Training]
    backbone: OmitArgPrefixes[Backbone]
    text: OmitArgPrefixes[Text]
    meta: OmitArgPrefixes[MetaConfig]
    # Folder that `fastrecycle invert` wrote, or a URL of any file system that fsspec knows.
    pool: str
    # The bank it was inverted from, where the meta-LoRA starts: demo (packaged), or a folder of
    # PEFT folders. Only --start zero goes without.
    bank: str | None = None
    # Leave out LoRAs whose images or weights are unlike the others'; needs --bank.
    screen: bool = False
    # Data set whose split "val" chooses the step that is returned; unset returns the last.
    validation: str | None = None
    # Folder of the results.
    out: Path = Path("runs/meta")
    # Settings to start from: default, paper (the paper's), quick.
    preset: Preset = "default"


@dataclass(frozen=True)
class Recycle:
    """Both steps of LoRA Recycle: invert a bank, then meta-train."""

    common: OmitArgPrefixes[Common]
    training: OmitArgPrefixes[Training]
    backbone: OmitArgPrefixes[Backbone]
    text: OmitArgPrefixes[Text]
    prior: OmitArgPrefixes[Prior]
    inversion: InversionConfig
    meta: MetaConfig
    # demo (packaged), a folder of PEFT folders, hf:OWNER/REPO, or a .txt file that lists any of
    # these, one a line. What cannot be used is named and left out.
    bank: str = "demo"
    # Leave LoRAs out of meta-training whose images or weights are unlike the others'; the scores
    # are in meta/screen.json.
    screen: bool = False
    # Data set whose split "val" chooses the step that is returned; unset returns the last.
    validation: str | None = None
    # Folder of the results.
    out: Path = Path("runs/recycle")
    # Ray cluster to run on: auto (the one that runs here, else this machine alone) or an address.
    cluster: str | None = None
    # Settings to start from: default, paper (the paper's), quick.
    preset: Preset = "default"


@dataclass(frozen=True)
class Eval:
    """Accuracy on few-shot tasks, without fine-tuning."""

    common: OmitArgPrefixes[Common]
    backbone: OmitArgPrefixes[Backbone]
    text: OmitArgPrefixes[Text]
    eval: OmitArgPrefixes[EvalConfig]
    # A registered name, or the path of a folder, .zip, .tar(.gz) or .csv.
    dataset: str
    # demo (packaged, for the demo backbone), none (plain nearest class mean), a PEFT folder, or
    # average:BANK (the mean of the products B A of a bank's LoRAs), average-factors:BANK (the
    # product of their mean B and mean A, the usual baseline "LoRAs Avg").
    lora: str = "demo"
    # Also write the results here, as JSON.
    json: Path | None = None
    # Folder where features of images are kept and looked up: of the same file, weights, LoRA and
    # settings alone.
    embedding_cache: Path | None = None
    # Ray cluster to embed on: auto (the one that runs here, else this machine alone) or an address.
    cluster: str | None = None
    # Fetch a registered data set that is absent, where it has an official direct link.
    download: bool = False


@dataclass(frozen=True)
class Report:
    """Pictures and tables of a run, of the benchmarks, or of the paper's experiments."""

    common: OmitArgPrefixes[Common]
    training: OmitArgPrefixes[Training]
    backbone: OmitArgPrefixes[Backbone]
    prior: OmitArgPrefixes[Prior]
    # Folder of a run; benchmarks: all records; table1 to table14 (without 12): a table of the
    # paper; sensitivity: App. C's sweeps; gains: App. E's plot.
    what: Positional[str]
    # Folder of the benchmarks' records.
    results: Path = Path("benchmarks/results")
    # For table4 and table5 without --store or --smoke, speed beside the accuracies of runs made by
    # hand: folders of runs with evaluations in JSON, one for each setting.
    runs: tuple[Path, ...] = ()
    # With --runs: data set whose evaluations to show.
    dataset: str = "cifar_fs"
    # Where tables go; unset means beside the benchmarks' records, or for tables of the paper
    # STORE/tables. A run's stay in its folder.
    out: Path | None = None
    # Banks, pools, meta-LoRAs and scores of the paper's tables, shared by all of them; unset means
    # runs/tables.
    store: Path | None = None
    # How much a table runs: small takes minutes on a GPU (20 LoRAs, 300 iterations, 400 steps),
    # paper what the paper ran (100, 2000, 60000), smoke seconds on toys.
    scale: Literal["smoke", "small", "paper"] = "small"
    # Toy networks and images on the CPU, in seconds: --scale smoke, in runs/tables-smoke.
    smoke: bool = False
    # Data sets of the table to run; unset means all that are there.
    datasets: tuple[str, ...] = ()
    # Further backbones for table13, as LABEL=SOURCE.
    backbones: tuple[str, ...] = ()
    # Start no stage that would not end within so many minutes; unset means no limit.
    minutes: float | None = None
    # Run nothing: write the pages from the scores that the store has.
    render: bool = False
    # Runs on the same LoRAs whose images to show beside the run's, such as one without the prior;
    # unset takes one without the prior that lies beside the run's folder.
    compare: tuple[Path, ...] = ()
    # Also invert a small CNN, for comparison: demo (the packaged prior), or a ResNet's file.
    small_cnn: str | None = None
    # Where the run's backbone is now, if not where its manifest says.
    run_backbone: str | None = None
    # Where its bank is now, likewise.
    run_bank: str | None = None
    # How to draw the pool's features in the plane: tsne, or umap (extra "umap").
    projection: Literal["tsne", "umap"] = "tsne"


@dataclass(frozen=True)
class Serve:
    """A page on which a person shows a few labelled pictures and classifies others."""

    common: OmitArgPrefixes[Common]
    backbone: OmitArgPrefixes[Backbone]
    # A PEFT folder, demo (packaged, for the demo backbone), or none.
    meta_lora: Positional[str]
    # Address to listen on. The page has no password: any other than this lets everyone in who can
    # reach it.
    host: str = "127.0.0.1"
    # Port to listen on.
    port: int = 7860
    # Largest picture file, in MB.
    file_mb: int = 10
    # Largest picture, in millions of pixels; a larger one is not decoded.
    megapixels: int = 40
    # Labelled pictures at a time, and pictures to classify at a time.
    pictures: int = 50


@dataclass(frozen=True)
class Export:
    """Write a LoRA for another library, or the backbone with it in its weights."""

    common: OmitArgPrefixes[Common]
    backbone: OmitArgPrefixes[Backbone]
    # A PEFT folder, a file of LoRA Recycle's release or of CLIP-LoRA, or demo.
    lora: str
    # A folder for PEFT; with --merged a .safetensors file.
    out: Path
    # Whose names to write. For PEFT hf_clip, hf_vit, hf_vit_v4, hf_dinov2, hf_dinov2_v4, hf_dinov3,
    # timm or open_clip, unsaid those it was read with; with --merged timm, timm_eva, hf_vit,
    # hf_dinov2, hf_dinov3, hf_clip, hf_siglip, openai or lvvit, unsaid this library's own.
    layout: str | None = None
    # The backbone's weights with the LoRA's changes added, in the place of a LoRA.
    merged: bool = False


@dataclass(frozen=True)
class Info:
    """Describe a backbone, LoRA, bank, pool, run or data set, and check it."""

    common: OmitArgPrefixes[Common]
    backbone: OmitArgPrefixes[Backbone]
    # A path, a registered data set's name, or demo.
    source: Positional[str]
    # Decode every image of a data set, not one of each class.
    full: bool = False


# ---------------------------------------------------------------------- parsing


def _is_table(info: PrimitiveTypeInfo) -> bool:
    return typing.get_origin(info.type) is dict


def _read_table(words: list[str]) -> dict[int, float]:
    table = {}
    for word in words:
        block, colon, ratio = word.partition(":")
        if not colon:
            raise ValueError(f"expected BLOCK:RATIO such as 6:0.75, got {word!r}")
        table[int(block)] = float(ratio)
    return table


def _registry() -> ConstructorRegistry:
    """tyro's, and pruning schedules written as 6:0.75 8:0.5."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def schedule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if not _is_table(info):
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[BLOCK:RATIO ...]",
            instance_from_str=_read_table,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda table: [f"{block}:{ratio}" for block, ratio in table.items()],
        )

    return registry


def parse(kind: type[Options], arguments: Sequence[str], *, prog: str, description: str) -> Options:
    """A command's options.

    Raises:
        SystemExit: --help, or a word that tyro refuses (its text is on stderr).
        FileNotFoundError, ValueError: the config file is absent, or a key or value of it is wrong.

    """
    default: Any = _defaults(kind)
    values: dict[str, Any] = {}
    file = _told(arguments, "--config")
    if file is not None:
        values = read_config(Path(file))
    preset = _told(arguments, "--preset") or values.get("preset")
    if preset in PRESETS and hasattr(default, "preset"):
        for name, stage in zip(("inversion", "meta"), PRESETS[preset], strict=True):
            if hasattr(default, name):
                default = replace(default, **{name: stage})
    default = overlay(default, values, where=str(file))
    return tyro.cli(
        kind,
        prog=prog,
        description=description,
        args=list(arguments),
        default=default,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=_registry(),
    )


def _defaults(kind: type) -> Any:
    """The options before anything is said; what must be said is MISSING."""
    hints = typing.get_type_hints(kind)
    values = {}
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            values[field.name] = hints[field.name]()
        elif field.default is MISSING:
            values[field.name] = tyro.MISSING
    return kind(**values)


def _told(arguments: Sequence[str], option: str) -> str | None:
    """The last value of an option among the words."""
    value = None
    for i, word in enumerate(arguments):
        if word == option and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif word.startswith(option + "="):
            value = word.partition("=")[2]
    return value


# ---------------------------------------------------------------------- config files

_MAX_CONFIG_BYTES = 64 * 2**10


def read_config(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML or TOML file.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it does not parse, or is no table of keys.

    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (--config)")
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"{path}: expected a .yaml or .toml file (--config)")
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"a config file has up to {_MAX_CONFIG_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            values = tomllib.loads(text)
        else:
            import yaml

            try:
                if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
                    # a few lines of them may stand for more values than memory holds
                    raise ValueError("aliases (*name) are not read; write the value out")
                values = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(error) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a table of options, got {type(values).__name__}")
    return values


def overlay(options: Options, values: Mapping[str, Any], *, where: str) -> Options:
    """Options with the values of a config file.

    Keys are option names, with - or _, of a stage also below its section ("inversion:"). Sections
    of stages that this command does not run are checked and left out.

    Raises:
        ValueError: an unknown key (the closest one is suggested), or a value of the wrong kind.

    """
    slots = _slots(options)
    found: dict[tuple[str, ...], Any] = {}

    def walk(table: Mapping[str, Any], prefix: str) -> None:
        for key, value in table.items():
            name = prefix + str(key).replace("-", "_")
            if name in slots:
                path, hint = slots[name]
                found[path] = coerce(value, hint, f"{where}: {name}")
            elif isinstance(value, Mapping) and any(s.startswith(f"{name}.") for s in slots):
                walk(value, f"{name}.")
            else:
                close = difflib.get_close_matches(name, slots, n=1, cutoff=0.5)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{where}: unknown key {name}{hint}")

    walk(values, "")
    changes: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    for path, value in found.items():
        if len(path) == 1:
            plain[path[0]] = value
        elif hasattr(options, path[0]):
            changes.setdefault(path[0], {})[path[1]] = value
    try:
        for group, named in changes.items():
            plain[group] = replace(getattr(options, group), **named)
        return replace(options, **plain)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _slots(options: Any) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Key -> (where its value goes, its type)."""
    slots: dict[str, tuple[tuple[str, ...], Any]] = {}
    several = all(hasattr(options, name) for name in ("inversion", "meta"))
    for name, hint in typing.get_type_hints(type(options)).items():
        if not is_dataclass(hint):
            slots[name] = ((name,), hint)
            continue
        for inner, kind in _field_types(hint).items():
            if not (several and name in STAGES):
                slots[inner] = ((name, inner), kind)
    for stage, hint in STAGES.items():
        for inner, kind in _field_types(hint).items():
            slots[f"{stage}.{inner}"] = ((stage, inner), kind)
    return slots


def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def coerce(value: Any, hint: Any, where: str) -> Any:
    """A file's value as an option's type.

    Raises:
        ValueError: it is of another kind.

    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{where}: expected {_spelled(hint)}, got {value!r}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (kind,) = (x for x in inner if x is not type(None))
        return coerce(value, kind, where)
    if origin is Literal:
        if value not in inner:
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, list):
            value = [value]
        if inner[-1] is Ellipsis:
            return tuple(coerce(x, inner[0], where) for x in value)
        if len(value) != len(inner):
            raise wrong
        return tuple(coerce(x, kind, where) for x, kind in zip(value, inner, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong
        try:
            return {int(k): float(v) for k, v in value.items()}
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
    if isinstance(value, bool) != (hint is bool):
        raise wrong
    if hint is int and not isinstance(value, int):
        raise wrong
    try:  # YAML reads 1e-3 as a string
        return hint(value) if isinstance(value, str | int | float) else hint(str(value))
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


def _spelled(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        return f"a list of {count}values ({inner[0].__name__})"
    if origin is dict:
        return "a table {block: ratio}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def backbone_config(words: Sequence[str]) -> dict[str, Any] | str | None:
    """What --backbone-config says, as `ViT.from_pretrained` takes it.

    Raises:
        FileNotFoundError, ValueError: a JSON file that is absent or damaged, or no key=value pair.

    """
    if not words:
        return None
    if len(words) == 1 and "=" not in words[0]:
        if not words[0].endswith(".json"):
            return words[0]
        from fastrecycle.files import read_json

        return read_json(words[0])
    config = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"backbone-config: expected key=value, got {word!r}")
        config[key] = [_scalar(x) for x in text.split(",")] if "," in text else _scalar(text)
    return config


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text

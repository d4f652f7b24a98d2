"""Hostile backbones, priors, pools, checkpoints, manifests, records and config files."""

import json
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from mangled import altered, attempt, damaged, hostile_metadata, hostile_safetensors

from fastrecycle.bench_report import latest, plain_table, read_record
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.files import load_checkpoint, safetensors_content, save_checkpoint
from fastrecycle.info import describe_run
from fastrecycle.inversion import InversionGroup
from fastrecycle.metatrain import MetaTrainer
from fastrecycle.options import Common, overlay, read_config
from fastrecycle.pool import SyntheticPool, TaskImages
from fastrecycle.prior import ResNetSpec, load_prior, prior_metadata
from fastrecycle.run import RunFolder
from fastrecycle.vit import ViT

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning"),  # of long contents
]


def written(name, write):
    """Bytes of what `write(path)` puts into a file of this name."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def in_file(name, content, load, names=()):
    """Load from a file of this name and content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content if isinstance(content, bytes) else content.encode(errors="replace")
        )
        return attempt(lambda: load(path), names=[name, *names])


# ------------------------------------------------------------------ weights


@cache
def backbone():
    return written("vit.safetensors", ViT.random(tiny.CONFIG).save)


@given(st.one_of(
    hostile_safetensors(backbone()), hostile_metadata(backbone(), "fastrecycle.config")
))  # fmt: skip
def test_fuzz_backbone(content):
    vit = in_file("vit.safetensors", content, ViT.from_pretrained)
    if vit is not None:
        image = torch.zeros(1, 3, vit.config.image_size, vit.config.image_size)
        assert vit(image).shape == (1, vit.config.features)


HF = {
    "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "num_attention_heads": 2, "image_size": 16,
}  # fmt: skip
PROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_normalize": True}


@cache
def clip():
    """A CLIP vision tower in transformers' names."""
    from fastrecycle.weights import export

    return safetensors_content(export(ViT.random(toys.CONFIG), "hf_vit"))


@given(altered(HF | {"model_type": "vit"}), altered(PROCESSOR))
def test_fuzz_config_beside_weights(config, processor):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "model.safetensors").write_bytes(clip())
        for name, value in (("config", config), ("preprocessor_config", processor)):
            text = json.dumps(value)
            (path / f"{name}.json").write_bytes(text.encode(errors="replace"))
        attempt(lambda: ViT.from_pretrained(path), names=[path.name])


@cache
def prior():
    return safetensors_content(toys.resnet_state(), prior_metadata(ResNetSpec()))


@given(st.one_of(hostile_safetensors(prior()), hostile_metadata(prior(), "fastrecycle.prior")))
def test_fuzz_prior(content):
    in_file("prior.safetensors", content, load_prior)


# ------------------------------------------------------------------ runs


@cache
def task():
    return written("task-000000.safetensors", toys.task_images().save)


@given(st.one_of(hostile_safetensors(task()), hostile_metadata(task(), "fastrecycle.task")))
def test_fuzz_pool(content):
    def load(path):
        toys.task_images(1).save(path.parent / "task-000001.safetensors")
        return SyntheticPool([TaskImages.load(path)]), SyntheticPool.load(path.parent)

    loaded = in_file("task-000000.safetensors", content, load, names=["SyntheticPool: images of"])
    if loaded is not None:
        assert len(loaded[0]) == len(loaded[0].class_names and loaded[0].classes)
        assert loaded[0].keep(0.9).shape[1] <= loaded[0].patches


INVERSION = InversionConfig(images_per_class=2, iterations=9, group=2)
META = MetaConfig(
    steps=9, ways=3, shots=1, queries=1, rank=2, resolution=(8, 16), start="zero", ema=0.5
)


def group():
    return InversionGroup(toys.vit(), list(toys.bank(2)), [0, 1], None, INVERSION)


def trainer():
    return MetaTrainer(toys.vit(), toys.pool(), META)


@cache
def state(make):
    """A checkpoint after two steps."""

    def write(path):
        worker = make()
        worker.step()
        worker.step()
        worker.save(path, *([{}] if make is trainer else []))

    return written("state.safetensors", write)


@pytest.mark.parametrize("make", [group, trainer])
@given(st.data())
def test_fuzz_checkpoint(make, data):
    if data.draw(st.booleans()):
        content = data.draw(hostile_safetensors(state(make)))
    else:  # made by somebody who knows how to write one
        tensors, metadata = in_file("x.safetensors", state(make), load_checkpoint)
        strange = st.sampled_from(
            [torch.ones(2), torch.ones(()), torch.ones(2, 6, 3, 16, 16).int()]
        )
        tensors = data.draw(altered(tensors, strange, most=1))
        metadata = data.draw(altered(metadata, st.text(max_size=12), most=1))
        if not isinstance(tensors, dict) or not isinstance(metadata, dict):
            return
        content = written("x.safetensors", lambda p: save_checkpoint(p, tensors, metadata))
    worker = make()
    own = list(worker.parameters) if make is trainer else [worker.images]
    before = [x.detach().clone() for x in own]
    if in_file("state.safetensors", content, worker.restore) is not None:
        assert 0 <= worker.iteration <= 9
        if not worker.done:
            worker.step()
    else:  # refused before anything was taken from it
        assert worker.iteration == 0
        assert all(map(torch.equal, before, own))


MANIFEST = {
    "config": {"meta": {"steps": 3}}, "seed": 0, "versions": {"torch": "2"},
    "inputs": {"bank": {"source": "x", "sha256": "0"}, "loras": ["a"]},
}  # fmt: skip


def as_json(value, most=3):
    """JSON text of altered versions of a value, or damaged text."""
    text = json.dumps(value).encode()
    good = altered(value, most=most).map(lambda x: json.dumps(x).encode(errors="replace"))
    return st.one_of(good, damaged(text))


@given(as_json(MANIFEST))
def test_fuzz_manifest(content):
    in_file(
        "run.json", content, lambda path: RunFolder(path.parent, MANIFEST), ["holds a run with"]
    )
    in_file("run.json", content, lambda path: describe_run(path.parent))


ROW = {"setting": "a", "variant": "b", "ms": 1.5}
RECORD = [{"machine": {"device": "cpu", "time": time}, "rows": [ROW]} for time in "xy"]


@given(as_json(RECORD))
def test_fuzz_record(content):
    runs = in_file("x.json", content, read_record)
    for run in latest(runs or []):
        plain_table(run["rows"])


# ------------------------------------------------------------------ config files


@dataclass(frozen=True)
class Options:
    """As the command `recycle` has them, in small."""

    common: Common = field(default_factory=Common)
    inversion: InversionConfig = field(default_factory=InversionConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    out: Path = Path("runs")


OPTIONS = {
    "out": "runs/x", "quiet": True, "device": "cpu",
    "inversion": {"iterations": 5, "lr": 0.1, "prune": {"1": 0.5}},
    "meta": {"steps": 4, "resolution": [8, 16], "start": "zero"},
}  # fmt: skip


def as_toml(value):
    """TOML text of a table; what has no spelling there is left out."""
    lines = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            pairs = ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in inner.items())
            lines.append(f"{json.dumps(key)} = {{{pairs}}}")
        else:
            lines.append(f"{json.dumps(key)} = {json.dumps(inner)}")
    return "\n".join(lines)


@given(altered(OPTIONS), st.sampled_from(["x.yaml", "x.toml"]), st.data())
def test_fuzz_config_file(value, name, data):
    if name.endswith("toml") and isinstance(value, dict):
        text = as_toml(value)
    else:
        text = json.dumps(value)  # JSON is YAML
    content = text.encode(errors="replace")
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    in_file(name, content, lambda path: overlay(Options(), read_config(path), where=name))


@given(st.text(alphabet="[]{}:-&*!<>|\"'#%@, \nab1.~?", max_size=40))
def test_fuzz_yaml(text):
    in_file("x.yaml", text, lambda path: overlay(Options(), read_config(path), where="x.yaml"))

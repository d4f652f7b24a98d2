"""Hostile indexes of pools, embedding caches, text towers, and what `fastrecycle export` reads."""

import hashlib
import io
import json
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from filled import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from mangled import altered, attempt, bounded_memory, damaged, hostile_safetensors

from fastrecycle.classifier import Embedder
from fastrecycle.cli import FAILED, OK, main
from fastrecycle.embedding_cache import EmbeddingCache
from fastrecycle.files import safetensors_content
from fastrecycle.lora import LoRA
from fastrecycle.pool import SyntheticPool
from fastrecycle.pool_files import INDEX, PoolFiles
from fastrecycle.text import TextConfig, TextNetwork, TextTower, text_tokenizer
from fastrecycle.vit import ViT

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning"),  # of long contents
]


def written(write):
    """{name: bytes} of what `write(folder)` puts there."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        found = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def put(folder, files):
    for name, content in files.items():
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(content)


def as_json(value):
    """JSON text of altered versions of a value, or damaged text."""
    good = altered(value).map(lambda x: json.dumps(x).encode())
    return st.one_of(good, good, damaged(json.dumps(value).encode()))


# ------------------------------------------------------------------ a pool's index


@cache
def pool():
    return written(SyntheticPool([toys.task_images(i, per_class=2) for i in range(3)]).save)


@given(as_json(json.loads(pool()[INDEX])))
def test_fuzz_index_of_a_pool(content):
    with tempfile.TemporaryDirectory() as folder:
        put(folder, pool() | {INDEX: content})
        loaded = attempt(lambda: SyntheticPool.load(folder), names=[INDEX, "SyntheticPool: images"])
        if loaded is None:
            return
        whole = attempt(lambda: loaded.gather(np.arange(len(loaded))), names=[INDEX])
        if whole is not None:  # then the index says what the files hold
            assert (len(loaded), loaded.patches, loaded.side) == (18, 16, 16)
            assert torch.equal(loaded.labels, torch.cat([p.labels for p in loaded.parts]))
            assert torch.equal(whole[0], loaded.images)


@given(st.text(max_size=6), st.sampled_from(["task-{}.safetensors", "{}.safetensors", "task-{}"]))
def test_fuzz_names_of_a_pools_files(text, form):
    with tempfile.TemporaryDirectory() as folder:
        put(folder, pool())
        try:
            (Path(folder) / form.format(text)).write_bytes(b"x")
        except (OSError, ValueError):  # no name
            return
        assert len(PoolFiles(folder)) == 3


def index(**changes):
    """An index whose first part says something else."""
    value = json.loads(pool()[INDEX])
    value["parts"][0].update(changes)
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": [[0, 10**12]]}, r"part 0: 1000000000000 images cannot lie in \d+ bytes"),
        ({"runs": [[3, 6]]}, r"labels in \[0, 3\)"),
        ({"runs": [[0, -6]]}, "and images, got"),
        ({"runs": 3}, "runs must be a list"),
        ({"patches": 10**9}, "cannot lie in"),
        ({"classes": 2**62, "class_names": None}, "cannot lie in"),
        ({"survivors": 17}, r"survivors must be in \[1, 16\]"),
        ({"class_names": "abc"}, "class_names must be a list"),
        ({"class_names": ["a"]}, "1 class names for 3 classes"),
        ({"side": 16.0}, "side must be a count"),
        ({"other": 1}, "expected parts of"),
    ],
    ids=str,
)
def test_index_that_no_file_can_keep_is_refused(changes, message, tmp_path):
    put(tmp_path, pool() | {INDEX: index(**changes)})
    with bounded_memory(), pytest.raises(ValueError, match=rf"pool\.json: a damaged.*{message}"):
        SyntheticPool.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"runs": [[0, 3], [1, 3]]}, {"class_names": ["x", "y", "z"]}, {"name": "x"}, {"digest": "0"},
     {"survivors": 3}, {"text": True}],
    ids=str,
)  # fmt: skip
def test_index_that_contradicts_its_file_is_refused_with_the_file(changes, tmp_path):
    put(tmp_path, pool() | {INDEX: index(**changes)})
    files = PoolFiles(tmp_path)
    assert files.task(1).task == 1
    with pytest.raises(ValueError, match=r"pool\.json: a damaged index .*task-000000.*remove it"):
        files.task(0)


def test_a_file_under_the_name_of_another_task_is_refused(tmp_path):
    put(tmp_path, pool())
    (tmp_path / INDEX).unlink()
    shutil.copy(tmp_path / "task-000001.safetensors", tmp_path / "task-000007.safetensors")
    with pytest.raises(ValueError, match=r"task-000007\.safetensors: holds the images of task 1"):
        SyntheticPool.load(tmp_path)


def test_texts_of_several_widths_are_refused():
    from dataclasses import replace

    parts = [replace(toys.task_images(i), text=torch.ones(3, 4 + i)) for i in range(2)]
    with pytest.raises(ValueError, match=r"class texts of one width expected.*\[4, 5\]"):
        _ = SyntheticPool(parts).text


# ------------------------------------------------------------------ an embedding cache


@cache
def embedder():
    return Embedder(toys.vit())


DIGESTS = np.arange(96, dtype=np.uint8).reshape(3, 32)
FEATURES = torch.arange(48.0).view(3, 16)
KEPT = safetensors_content({"images": torch.from_numpy(DIGESTS), "features": FEATURES})
STRANGE = st.sampled_from([
    torch.ones(3, 32), torch.ones(3, 32).byte(), torch.ones(3, 16), torch.ones(2, 16),
    torch.ones(3, 15), torch.ones(()), torch.ones(()).byte(), torch.ones(0, 32).byte(),
    torch.ones(3, 16).double(), torch.ones(3, 16, 1), torch.ones(3, 16).long(),
])  # fmt: skip


@given(st.data())
def test_fuzz_embedding_cache(data):
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddingCache(folder, embedder())
        named = data.draw(st.booleans())  # by somebody who knows how: under its own SHA-256
        if named and data.draw(st.booleans()):
            tensors = {"images": torch.from_numpy(DIGESTS), "features": FEATURES}
            tensors = data.draw(altered(tensors, STRANGE, most=1))
            content = safetensors_content(tensors) if isinstance(tensors, dict) else b""
        else:
            content = data.draw(hostile_safetensors(KEPT))
        name = hashlib.sha256(content if named else KEPT).hexdigest()
        (store.folder / f"{name}.safetensors").write_bytes(content)
        with bounded_memory():
            known, features = store.find(DIGESTS)
        assert features.shape == (3, 16)
        assert not features[~torch.from_numpy(known)].any()
        if not named:  # a damaged file gives nothing
            assert content == KEPT or not known.any()


@pytest.mark.parametrize("tensors", [
    {}, {"images": torch.from_numpy(DIGESTS)},
    {"images": torch.from_numpy(DIGESTS), "features": torch.ones(3, 17)},
    {"images": torch.from_numpy(DIGESTS), "features": torch.ones(2, 16)},
    {"images": torch.ones(3, 32), "features": FEATURES},
    {"images": torch.ones(()).byte(), "features": FEATURES},
])  # fmt: skip
def test_cache_file_of_another_form_is_removed(tensors, tmp_path, caplog):
    store = EmbeddingCache(tmp_path, embedder())
    content = safetensors_content(tensors)
    path = store.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    path.write_bytes(content)
    assert not store.find(DIGESTS)[0].any()
    assert f"{path}: damaged; removed" in caplog.text
    assert not path.exists()


def test_cache_file_that_another_process_removes_is_passed_over(tmp_path):
    store = EmbeddingCache(tmp_path, embedder())
    store.add(DIGESTS, FEATURES)
    (store.folder / "0.safetensors").symlink_to(tmp_path / "gone")  # listed, not there
    known, features = store.find(DIGESTS)
    assert known.all()
    assert torch.equal(features, FEATURES)


# ------------------------------------------------------------------ text towers


TEXT = TextConfig(output_dim=6, width=4, heads=2, layers=1, context_length=8)


@cache
def tower():
    network = fill(TextNetwork(TEXT))
    return written(TextTower(network, text_tokenizer(TEXT), ["a {}.", "{}"]).save)


def read_tower(files):
    with tempfile.TemporaryDirectory() as folder:
        put(folder, files)
        found = attempt(lambda: TextTower.from_pretrained(folder), names=[folder])
    if found is not None:
        embeddings = found.encode(["cat", "dog"])
        assert embeddings.shape == (2, found.model.config.output_dim)


@given(as_json(json.loads(tower()["text.json"])))
def test_fuzz_sizes_of_a_text_tower(content):
    read_tower(tower() | {"text.json": content})


@settings(max_examples=50)
@given(hostile_safetensors(tower()["text.safetensors"]))
def test_fuzz_weights_of_a_text_tower(content):
    read_tower(tower() | {"text.safetensors": content})


@pytest.mark.parametrize(
    ("network", "templates", "message"),
    [
        ({"vocab_size": 2**40}, ["{}"], "token_embedding.weight: size mismatch"),
        ({"output_dim": 2**40}, ["{}"], "text_projection: size mismatch"),
        ({"context_length": 2**31}, ["{}"], "context_length: must be at most"),
        ({"layers": 10**12}, ["{}"], r"layers: text\.json has 1000000000000"),
        ({"heads": 0}, ["{}"], "heads: must be a positive integer"),
        ({"heads": 3}, ["{}"], "heads: must divide the width 4"),
        ({"width": 4.0}, ["{}"], "width: must be a positive integer"),
        ({}, [3], r"templates: each needs one \{\}, got 3"),
        ({}, {"{}": 1}, "templates: expected a list"),
    ],
    ids=str,
)
def test_text_tower_of_sizes_not_in_its_file_is_refused(network, templates, message, tmp_path):
    told = json.loads(tower()["text.json"])["network"] | network
    content = json.dumps({"network": told, "templates": templates}).encode()
    put(tmp_path, tower() | {"text.json": content})
    with bounded_memory(), pytest.raises(ValueError, match=rf"a damaged text tower \({message}"):
        TextTower.from_pretrained(tmp_path)


# ------------------------------------------------------------------ fastrecycle export


@cache
def export_inputs():
    def write(folder):
        toys.vit().save(folder / "vit.safetensors")
        toys.lora().save(folder / "lora")

    return written(write)


@settings(max_examples=30)  # parsing the command takes longest
@given(
    st.sampled_from(["vit.safetensors", "lora/adapter_model.safetensors",
                     "lora/adapter_config.json", "lora/head.safetensors"]),
    st.booleans(), st.data(),
)  # fmt: skip
def test_fuzz_export(name, merged, data):
    """Exports what can be read again, or says one line and leaves nothing."""
    files = export_inputs()
    if name.endswith("json"):
        content = data.draw(as_json(json.loads(files[name])))
    else:
        content = data.draw(hostile_safetensors(files[name]))
    with tempfile.TemporaryDirectory() as folder:
        put(folder, files | {name: content})
        out = Path(folder) / ("out.safetensors" if merged else "out")
        words = ["export", "--lora", f"{folder}/lora", "--out", str(out), "--quiet"]
        words += ["--merged", "--backbone", f"{folder}/vit.safetensors"] if merged else []
        said = io.StringIO()
        with bounded_memory(), redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = main(words)
        assert code in (OK, FAILED)
        assert (said.getvalue().count("fastrecycle: error: "), code) in ((0, OK), (1, FAILED))
        assert out.exists() == (code == OK)
        if code == OK:
            (ViT.from_pretrained if merged else LoRA.load)(out)

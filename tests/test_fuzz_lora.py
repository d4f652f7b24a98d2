"""Hostile LoRAs: whatever the file says, only documented errors come out."""

import io
import json
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from mangled import altered, attempt, damaged, hostile_metadata, hostile_safetensors

from fastrecycle.files import load_safetensors, load_torch, safetensors_content
from fastrecycle.lora import LoRA, LoRABank

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning"),  # of long contents
]

WEIGHTS, CONFIG, HEAD = "adapter_model.safetensors", "adapter_config.json", "head.safetensors"
LAYOUTS = ("timm", "hf_clip", "open_clip")


@contextmanager
def folder(files):
    """A folder of its own with these files."""
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name)


@cache
def peft(layout="timm"):
    """A good PEFT folder's files."""
    with folder({}) as path:
        toys.lora().save(path, layout)
        return {file.name: file.read_bytes() for file in path.iterdir()}


@cache
def release():
    """LoRA Recycle's own format: factors of q and v of each block in turn, and a head."""
    made, tensors = toys.lora(), {}
    for i in range(2 * made.depth):
        target = "qv"[i % 2]
        tensors[f"w_a_{i:03d}"], tensors[f"w_b_{i:03d}"] = (
            made.a[target][i // 2], made.b[target][i // 2],
        )  # fmt: skip
    tensors["fc_16in_3out"] = made.head.weight
    return safetensors_content(tensors)


def clip_lora():
    """CLIP-LoRA's checkpoint of three blocks."""
    pair = {"w_lora_A": torch.ones(2, 16), "w_lora_B": torch.ones(16, 2)}
    metadata = {"r": 2, "alpha": 1, "encoder": "vision", "position": "all", "params": ["q", "v"]}
    weights = {f"layer_{i}": {"q_proj": pair, "v_proj": pair} for i in range(3)}
    return {"weights": weights, "metadata": metadata}


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def use(lora):
    """What is read is of a size that its file explains, and fits a backbone or says why not."""
    if lora is None:
        return
    assert lora.depth <= 10_000
    if attempt(lambda: lora.fit(toys.CONFIG), names=[""]) is None:
        return
    assert all(torch.isfinite(x).all() for x in lora.tensors())
    assert all(torch.isfinite(x).all() for x in lora.scale.values())
    assert lora.class_names is None or all(isinstance(x, str) for x in lora.class_names)
    assert lora.base_model is None or isinstance(lora.base_model, str)


def load_folder(files):
    with folder(files) as path:
        use(attempt(lambda: LoRA.load(path), names=[path.name]))


@given(hostile_safetensors(peft()[WEIGHTS]))
def test_fuzz_safetensors(content):
    with folder({"x.safetensors": content}) as path:
        attempt(lambda: load_safetensors(path / "x.safetensors"), names=["x.safetensors"])


@given(st.data(), st.sampled_from(LAYOUTS))
def test_fuzz_adapter_config(data, layout):
    files = peft(layout)
    config = json.loads(files[CONFIG]) | {"id2label": {"0": "a", "1": "b", "2": "c"}}
    config |= {"auto_mapping": {"base_model_class": "CLIP"}, "rank_pattern": {"qkv": 4}}
    changed = data.draw(altered(config))
    load_folder({**files, CONFIG: json.dumps(changed).encode("utf-8", "replace")})


@given(st.data())
def test_fuzz_damaged_adapter_config(data):
    load_folder({**peft(), CONFIG: data.draw(damaged(peft()[CONFIG]))})


@given(st.data(), st.sampled_from(LAYOUTS))
def test_fuzz_adapter_weights(data, layout):
    files = peft(layout)
    load_folder({**files, WEIGHTS: data.draw(hostile_safetensors(files[WEIGHTS]))})


@given(st.data(), st.sampled_from(LAYOUTS))
def test_fuzz_adapter_metadata(data, layout):
    files = peft(layout)
    load_folder({**files, WEIGHTS: data.draw(hostile_metadata(files[WEIGHTS], "fastrecycle"))})


@given(st.one_of(hostile_safetensors(peft()[HEAD]), hostile_metadata(peft()[HEAD], "class_names")))
def test_fuzz_head(content):
    load_folder({**peft(), HEAD: content})


@given(altered({"class_names": ["a", "b", "c"]}))
def test_fuzz_class_names(changed):
    files = {name: content for name, content in peft().items() if name != HEAD}
    names = changed.get("class_names") if isinstance(changed, dict) else changed
    load_folder({**files, "class_names.json": json.dumps(names).encode("utf-8", "replace")})


@given(hostile_safetensors(release()))
def test_fuzz_release(content):
    with folder({"x.safetensors": content}) as path:
        use(attempt(lambda: LoRA.load(path / "x.safetensors"), names=["x.safetensors"]))
        attempt(lambda: LoRABank.load(path), names=[path.name])


TENSORS = st.one_of(
    st.sampled_from([
        torch.ones(2, 16), torch.ones(16, 3), torch.ones(()), torch.ones(0, 16), torch.ones(2),
        torch.full((2, 16), torch.nan), torch.ones(2, 16, dtype=torch.complex64),
        torch.ones(2, 16, dtype=torch.int8), torch.ones(2, 16).to_sparse(),
        torch.ones(1).expand(2, 2**40), torch.ones(2, 16, device="meta"),
        torch.ones(2, 16, dtype=torch.float8_e4m3fn), "vision", "both", "up", 4, 1e300, -2,
        10**400, [], {}, None,
    ]),
)  # fmt: skip


@given(altered(clip_lora(), TENSORS))
def test_fuzz_clip_lora(changed):
    with folder({"x.pt": saved(changed)}) as path:
        use(attempt(lambda: LoRA.load(path / "x.pt"), names=["x.pt"]))


@given(st.data())
def test_fuzz_damaged_checkpoint(data):
    with folder({"x.pt": data.draw(damaged(saved(clip_lora())))}) as path:
        attempt(lambda: load_torch(path / "x.pt"), names=["x.pt"])


@given(altered({f"blocks.{i}.attn.qkv.lora_{x}.weight": torch.ones(48, 4)
                                    if x == "B" else torch.ones(4, 16)
                                    for i in range(2) for x in "AB"}, TENSORS))  # fmt: skip
def test_fuzz_adapter_bin(changed):
    files = {CONFIG: json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}).encode()}
    load_folder({**files, "adapter_model.bin": saved(changed)})

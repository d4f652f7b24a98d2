"""Files made to crash, hang, fill memory or run code; each is refused in a sentence."""

import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import toys
from mangled import bounded_memory, join_safetensors, split_safetensors
from PIL import Image

from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.data import load_dataset
from fastrecycle.files import load_checkpoint, load_torch, read_json, save_checkpoint
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.options import read_config
from fastrecycle.pool import SyntheticPool, TaskImages
from fastrecycle.prior import load_prior
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.vit import ViT

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------ pickles


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def pickled(how, mark, path):
    """A file that runs code where anything unpickles it, plainly or as torch's checkpoint."""
    if how == "pickle":
        path.write_bytes(pickle.dumps({"w_a_000": Payload(mark)}))
    else:
        torch.save(
            {"w_a_000": Payload(mark), "weights": Payload(mark), "metadata": {}}, path,
            _use_new_zipfile_serialization=how == "zip",
        )  # fmt: skip


def in_adapter(path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    path.rename(path.parent / "adapter_model.bin")
    return LoRA.load(path.parent)


def in_shards(path):
    path.rename(path.parent / "a.bin")
    index = path.parent / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.bin"}}))
    return ViT.from_pretrained(path.parent)


def in_run(path):
    """A run's folder whose checkpoint is a pickle."""
    settings = InversionConfig(images_per_class=2, iterations=3, group=2)
    run = lambda: MetaLoRARecycler(  # noqa: E731
        toys.vit(), toys.bank(2), None, settings, device="cpu", quiet=True
    ).invert(path.parent / "pool")
    run()
    (path.parent / "pool" / "task-000001.safetensors").unlink()
    path.rename(path.parent / "pool" / "group.state.safetensors")
    return run()


LOADERS = {
    "LoRA.load": LoRA.load,
    "LoRA.load of a folder": in_adapter,
    "LoRABank.load": lambda path: LoRABank.load(path.parent),
    "ViT.from_pretrained": ViT.from_pretrained,
    "ViT.from_pretrained of shards": in_shards,
    "load_prior": load_prior,
    "load_dataset": load_dataset,
    "load_dataset of a folder": lambda path: load_dataset(path.parent),
    "SyntheticPool.load": lambda path: SyntheticPool.load(path.parent),
    "resume": in_run,
}


@pytest.mark.parametrize("how", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("name", LOADERS)
def test_pickles_are_never_executed(name, how, tmp_path):
    suffix = ".pt"
    if name.startswith("load_dataset"):
        suffix = ".pkl"
    elif name == "SyntheticPool.load":
        suffix = ".safetensors"
    mark, path = tmp_path / "executed", tmp_path / "x" / f"task-000000{suffix}"
    path.parent.mkdir()
    pickled(how, mark, path)
    with pytest.raises(ValueError, match=r"weights_only=True|is a pickle|safetensors file|damaged"):
        LOADERS[name](path)
    assert not mark.exists()


def test_the_payload_works(tmp_path):
    path = tmp_path / "x.pkl"
    pickled("pickle", tmp_path / "executed", path)
    pickle.loads(path.read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["set.yaml", "set.yml"])
def test_yaml_makes_no_objects(name, tmp_path):
    mark = tmp_path / "executed"
    text = f'x: !!python/object/apply:os.system ["touch {mark}"]'
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_config(tmp_path / name)
    assert not mark.exists()


# ------------------------------------------------------------------ JSON and config files


def test_json_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"x\.json: expected a JSON file, got maximum recursion"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.yaml", "[" * 5_000, "maximum recursion"),
        ("x.toml", "a = " + "[" * 5_000, "maximum recursion"),
        ("x.yaml", "#" * 70_000, "up to 65,536 bytes"),
        # nine of nine of nine ...: ten lines stand for a billion values
        ("x.yaml", "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
        ("x.yaml", "a: &a [*a]", "aliases"),
    ],
)
def test_config_files_that_grow_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        read_config(tmp_path / name)


# ------------------------------------------------------------------ LoRAs


@pytest.fixture
def folder(tmp_path):
    """A PEFT folder of transformers' CLIP, whose module names are long."""
    toys.lora().save(tmp_path / "lora", "hf_clip")
    return tmp_path / "lora"


def configure(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def reheaded(folder, change):
    file = folder / "adapter_model.safetensors"
    header, data = split_safetensors(file.read_bytes())
    file.write_bytes(join_safetensors(change(header), data))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 10**400}, "r must be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"lora_alpha": 1e300}, "a scale beyond float32"),
        ({"alpha_pattern": {"x": 10**400}}, "alpha_pattern must map"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path must be a name"),
        ({"rank_pattern": {"(?:" * 5_000: 2}}, "pattern .* of adapter_config"),
        ({"rank_pattern": {"a{99999999999999999}": 2}}, "pattern .* of adapter_config"),
        ({"rank_pattern": {"(.?)" * 30 + r"\30\29[^\w.]": 4}}, "of adapter_config.*timed out"),
    ],
)
def test_adapter_config_of_extremes_is_refused(fields, message, folder):
    configure(folder, **fields)
    with pytest.raises(ValueError, match=message):
        LoRA.load(folder)


@pytest.mark.timeout(30)
def test_adapter_patterns_take_no_years(folder):
    configure(folder, rank_pattern={r"([\w.]+)+!": 4})  # in re, 2^46 ways to divide a name
    assert LoRA.load(folder).rank == 2


@pytest.mark.parametrize("block", ["128", "9999", "99999999999", "9" * 5_000])
def test_adapter_of_a_distant_block_is_refused(block, folder):
    def change(header):
        del header["__metadata__"]
        return {k.replace("layers.2.", f"layers.{block}."): v for k, v in header.items()}

    reheaded(folder, change)
    with bounded_memory(), pytest.raises(ValueError, match=r"of up to 128 blocks|unknown modules"):
        LoRA.load(folder)


@pytest.mark.parametrize(
    "told",
    [
        {"depth": 10**11, "ranks": {}},
        {"depth": 3, "ranks": {"q": [-2] * 3, "v": [2] * 3}},
        {"depth": 3, "ranks": [1]},
        {"depth": float("inf"), "ranks": {}},
    ],
)
def test_adapter_metadata_of_extremes_is_refused(told, folder):
    reheaded(folder, lambda h: h | {"__metadata__": {"fastrecycle": json.dumps(told)}})
    with bounded_memory(), pytest.raises(ValueError, match="damaged metadata"):
        LoRA.load(folder)


def test_class_names_nested_too_deeply_are_refused(folder):
    file = folder / "head.safetensors"
    header, data = split_safetensors(file.read_bytes())
    header["__metadata__"] = {"class_names": "[" * 50_000}
    file.write_bytes(join_safetensors(header, data))
    with pytest.raises(ValueError, match="class_names must be a JSON list"):
        LoRA.load(folder)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(2**20, 2**20),  # of four bytes
        torch.ones(2**20, 2**20, device="meta"),  # of none
        torch.ones(2, 3).to_sparse(),
    ],
    ids=["expanded", "meta", "sparse"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of sparse tensors
def test_checkpoint_of_tensors_without_numbers_is_refused(tensor, tmp_path):
    torch.save({"a": [{"w_a_000": tensor}]}, tmp_path / "x.pt")
    with bounded_memory(), pytest.raises(ValueError, match="whose numbers are not in the file"):
        load_torch(tmp_path / "x.pt")


def test_checkpoint_that_holds_itself_is_read(tmp_path):
    content = {"x": torch.ones(2), "tied": None}
    content["tied"], content["self"] = content["x"], content
    torch.save(content, tmp_path / "x.pt")
    assert load_torch(tmp_path / "x.pt")["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("metadata", "weights"),
    [
        ({"r": 2, "alpha": 10**400}, {}),
        ({"r": 2.5}, {}),
        ({"alpha": "1"}, {}),
        ({"encoder": torch.ones(2)}, {}),
        ({"position": []}, {}),
        ({}, {"layer_0": torch.ones(2)}),
        ({}, torch.ones(2, 2)),
    ],
)
def test_clip_lora_of_other_types_is_refused(metadata, weights, tmp_path):
    pair = {"w_lora_A": torch.ones(2, 16), "w_lora_B": torch.ones(16, 2)}
    told = {"r": 2, "alpha": 1, "encoder": "vision", "position": "all"} | metadata
    if isinstance(weights, dict):
        weights = {"layer_0": {"q_proj": pair}} | weights
    torch.save({"weights": weights, "metadata": told}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: expected"):
        LoRA.load(tmp_path / "x.pt")


# ------------------------------------------------------------------ backbones and priors


def test_backbone_with_a_gap_is_refused():
    state = ViT.random(toys.CONFIG).state_dict()
    state["blocks.99999999.norm1.weight"] = torch.ones(16)
    with bounded_memory(), pytest.raises(ValueError, match="there is no block 3, but later ones"):
        ViT.from_state_dict(state, {"heads": 2})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", "2", "heads must be a count"),
        ("heads", 2**40, "heads must be a count"),
        ("norm_eps", [1], "norm_eps must be a number"),
        ("mean", [1, "x", 2], "mean must be 3 numbers"),
        ("mean", [float("nan")] * 3, "mean must be 3 numbers"),
        ("registers", "x", "registers must be a count"),
        ("activation", {}, "activation must be text"),
    ],
)
def test_backbone_of_another_type_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        ViT.from_state_dict(ViT.random(toys.CONFIG).state_dict(), {"heads": 2, field: value})


def test_config_beside_weights_of_another_form_is_refused(tmp_path):
    from fastrecycle.files import save_safetensors
    from fastrecycle.weights import export

    save_safetensors(tmp_path / "model.safetensors", export(ViT.random(toys.CONFIG), "hf_vit"))
    told = {"model_type": "vit", "num_attention_heads": [2]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="JSON files beside it do not describe such a model"):
        ViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("[" * 50_000, "must be an object"),
        ("[]", "must be an object"),
        ('{"stride_in": "conv3", "eps": 1e-5}', "stride_in: must be"),
        ('{"stride_in": "conv1", "eps": "x"}', "eps: must be"),
        ('{"stride_in": "conv1", "eps": 1e-5, "stem_stride": 0}', "stem_stride: must be"),
        ('{"stride_in": "conv1", "eps": 1e-5, "std": [0, 1, 1]}', "std: must be"),
    ],
)
def test_prior_of_another_form_is_refused(told, message, tmp_path):
    from fastrecycle.files import save_safetensors

    file = tmp_path / "prior.safetensors"
    save_safetensors(file, toys.resnet_state(), {"fastrecycle.prior": told})
    with pytest.raises(ValueError, match=rf"prior\.safetensors: .*{message}"):
        load_prior(file)


@pytest.mark.parametrize("name", ["bn1.bias", "layer1.0.bn2.running_mean"])
def test_prior_without_a_part_of_its_batch_norms_is_refused(name):
    from fastrecycle.prior import ResNetPrior

    state = toys.resnet_state()
    with pytest.raises(ValueError, match=rf"{name} must be \(\d,\)"):
        ResNetPrior({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=rf"{name} must be \(\d,\)"):
        ResNetPrior(state | {name: torch.ones(9)})


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize(
    "changes",
    [
        {"images": torch.zeros(18, 3, 16, 15, dtype=torch.uint8)},
        {"images": torch.zeros(18, 3, 16, 16)},
        {"labels": torch.full((18,), 3)},
        {"labels": torch.full((18,), -1)},
        {"order": torch.zeros(18, 16, dtype=torch.int64)},
        {"survivors": 17},
        {"survivors": 0},
        {"teacher_logits": torch.full((18, 3), torch.nan)},
        {"class_names": ("a",)},
        {"class_names": (1, 2, 3)},
        {"name": 3},
        {"task": -1},
    ],
    ids=str,
)
def test_pool_that_contradicts_itself_is_refused(changes, tmp_path):
    from dataclasses import replace

    file = tmp_path / "task-000000.safetensors"
    replace(toys.task_images(), **changes).save(file)
    with pytest.raises(ValueError, match="not a file of a synthetic pool; "):
        TaskImages.load(file)


@pytest.mark.parametrize("at", ["tensor", "iteration", "end"])
def test_damage_of_a_checkpoint_shows(at, tmp_path):
    file = tmp_path / "x.state.safetensors"
    save_checkpoint(file, {"x": torch.ones(4)}, {"iteration": "12"})
    assert load_checkpoint(file)[1] == {"iteration": "12"}
    content = bytearray(file.read_bytes())
    if at == "tensor":
        content[-3] ^= 1
    elif at == "iteration":
        content = content.replace(b'"12"', b'"13"')
    else:
        del content[-1]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a damaged checkpoint.*remove it to restart"):
        load_checkpoint(file)


@pytest.mark.parametrize("content", ["[]", '{"inputs": []}', '{"config": 3}', "["])
def test_damaged_manifest_is_refused(content, tmp_path):
    from fastrecycle.info import describe_run
    from fastrecycle.run import RunFolder

    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json: expected a"):
        RunFolder(tmp_path, {"seed": 0})
    assert "run.json: expected a" in describe_run(tmp_path).problems[0]


def test_settings_and_state_of_meta_training_must_agree(tmp_path):
    from fastrecycle.metatrain import MetaTrainer

    config = MetaConfig(
        steps=3, ways=3, shots=1, queries=1, rank=2, resolution=(8, 16), start="zero"
    )
    trainer = MetaTrainer(toys.vit(), toys.pool(), config)
    trainer.save(tmp_path / "x", {})
    tensors, metadata = load_checkpoint(tmp_path / "x")
    for changed, told in (
        ({**tensors, "parameter.0": torch.ones(1)}, metadata),
        ({**tensors, "optimiser.0.step": torch.ones(())}, metadata),  # without its moments
        (tensors, {**metadata, "iteration": "4"}),
        (tensors, {**metadata, "iteration": "-1"}),
    ):
        save_checkpoint(tmp_path / "y", changed, told)
        with pytest.raises(ValueError, match="a checkpoint of another configuration"):
            trainer.restore(tmp_path / "y")


# ------------------------------------------------------------------ archives and images


def tar_headers(size: bytes, kind: bytes, count: int = 1) -> bytes:
    """A tar of bare headers with this field of size."""
    header = bytearray(tarfile.TarInfo("a/b.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = size, kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) * count + bytes(1024)


BACK = b"\xff" * 10 + (-1024).to_bytes(2, "big", signed=True)  # base 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_headers(BACK, b"0", 3), "has -1024 bytes"),  # tarfile would read it for ever
        (tar_headers(BACK, b"L"), "a header of -1,024 bytes"),
        (tar_headers(BACK, b"x"), "a header of -1,024 bytes"),
        (tar_headers(b"%011o\0" % 0, b"L", 3_000), "not a complete tar archive"),
        (tar_headers(b"%011o\0" % 0, b"x", 3_000), "not a complete tar archive"),
    ],
    ids=["member", "long name", "pax", "long names", "pax headers"],
)
@pytest.mark.timeout(30)
def test_tar_that_leads_in_circles_is_refused(content, message, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "x.tar")


def test_zip_with_a_nameless_member_is_read(tmp_path):
    path = tmp_path / "x.zip"
    Image.new("RGB", (3, 3)).save(tmp_path / "x.png")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "x.png", "a/x.png")
        archive.writestr(zipfile.ZipInfo("\0"), b"")
    assert len(load_dataset(path)) == 1


def test_table_of_a_name_too_long_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text(f"filename,label\n{'x' * 300}.png,a\n")
    with pytest.raises(FileNotFoundError, match=r"x\.csv line 2: no file"):
        load_dataset(tmp_path / "x.csv")


def test_image_of_one_line_is_not_enlarged(tmp_path):
    (tmp_path / "ant").mkdir()
    Image.fromarray(np.zeros((1, 100_000, 3), np.uint8)).save(tmp_path / "ant" / "0.png")
    dataset, vit = load_dataset(tmp_path), toys.vit()
    with bounded_memory(), pytest.raises(ValueError, match=r"0\.png: image: expected up to 256"):
        list(dataset.images([0], vit.transform))

"""`fastrecycle export`: what it writes is what other libraries, and this one, read back."""

import json

import pytest
import torch
from tiny import CONFIG, make

from fastrecycle.cli import main
from fastrecycle.files import load_safetensors
from fastrecycle.lora import LoRA
from fastrecycle.vit import ViT


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


def run(world, out, *more):
    return main(["export", "--backbone", str(world.backbone), "--lora", str(world.bank / "0000"),
                 "--out", str(out), *more])  # fmt: skip


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_export_writes_peft_under_other_names(world, tmp_path):
    assert run(world, tmp_path / "lora", "--layout", "hf_vit") == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert "layers.0.attention.q_proj" in config["target_modules"]
    before, after = LoRA.load(world.bank / "0000"), LoRA.load(tmp_path / "lora")
    torch.testing.assert_close(after.delta("v"), before.delta("v"))
    assert torch.equal(after.require_head().weight, before.require_head().weight)


@pytest.mark.parametrize("layout", [None, "timm", "hf_vit"])
def test_export_merges_into_the_backbone(world, tmp_path, layout, capsys):
    file = tmp_path / "vit.safetensors"
    assert run(world, file, "--merged", *(["--layout", layout] if layout else [])) == 0
    assert capsys.readouterr().out.strip() == str(file)
    vit, lora = ViT.from_pretrained(world.backbone), LoRA.load(world.bank / "0000")
    merged = ViT.from_pretrained(file, None if layout is None else CONFIG)
    torch.testing.assert_close(merged(images()), vit(images(), lora), rtol=0, atol=1e-5)
    assert ("blocks.0.attn.qkv.weight" in load_safetensors(file)[0]) == (layout == "timm")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--layout", "keras"), "layout: expected one of hf_clip"),
        (("--merged", "--layout", "keras"), "one .safetensors file"),
    ],
)
def test_export_says_what_is_wrong(world, tmp_path, more, message, capsys):
    assert run(world, tmp_path / "x", *more) == 2
    assert message in capsys.readouterr().err
    assert run(world, tmp_path / "x.safetensors", "--merged", "--layout", "openai") == 2
    assert "no place for patch_embed.bias" in capsys.readouterr().err

"""Weights of other libraries: the same output as theirs, and clear errors."""

import dataclasses
import functools
import json
import math
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from filled import bare, fill
from torch import nn

from fastrecycle import layouts, sources
from fastrecycle.files import load_safetensors, save_safetensors
from fastrecycle.lora import LoRA
from fastrecycle.sources import load_source, open_clip_facts, timm_facts
from fastrecycle.vit import ViT
from fastrecycle.vit_config import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, PRESETS, ViTConfig
from fastrecycle.weights import CARD_KEY, CONFIG_KEY, convert, export

HALVES = {"mean": HALF, "std": HALF}
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def images(config: ViTConfig, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, config.image_size, config.image_size, generator=generator)


def assert_agrees(vit: ViT, reference, tolerance=TOLERANCE) -> None:
    """`reference` maps a batch of normalised images to features."""
    batch = images(vit.config)
    with torch.no_grad():
        expected, got = reference(batch), vit(batch)
    assert expected.abs().mean() > 0.05  # a comparison of zeros shows nothing
    assert not torch.allclose(expected[0], expected[1], atol=0.01)
    torch.testing.assert_close(got, expected, **tolerance)


# ------------------------------------------------------------------ true shapes


@pytest.fixture(scope="module")
def open_clip_b16():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):  # the text tower stays there: it is never read
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
    fill(model.visual.to_empty(device="cpu"))
    model.visual.image_mean, model.visual.image_std = CLIP_MEAN, CLIP_STD  # as create_model does
    return model


def test_open_clip_b16_matches(open_clip_b16):
    vit = ViT.from_state_dict(open_clip_b16.state_dict(), {"activation": "quick_gelu"})
    assert vit.config == PRESETS["vit_b_16"]
    assert_agrees(vit, open_clip_b16.encode_image)


def test_open_clip_b32_matches():
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    build = open_clip.model._build_vision_tower
    tower = bare(build, config["embed_dim"], vision, config["quick_gelu"])
    vit = ViT.from_state_dict(fill(tower).state_dict(), "vit_b_32")  # no "visual." prefix
    assert vit.config == PRESETS["vit_b_32"]
    assert_agrees(vit, tower)


def test_hf_clip_b16_matches():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(patch_size=16)
    model = fill(bare(transformers.CLIPVisionModelWithProjection, config))
    vit = ViT.from_state_dict(model.state_dict(), {"activation": config.hidden_act})
    assert vit.config == PRESETS["vit_b_16"]
    assert_agrees(vit, lambda x: model(pixel_values=x).image_embeds)


def test_hf_vit_b16_matches():
    transformers = pytest.importorskip("transformers")
    model = fill(bare(transformers.ViTModel, transformers.ViTConfig()))
    vit = ViT.from_state_dict(model.state_dict(), HALVES)
    assert (vit.config.norm_eps, vit.config.heads, vit.config.image_size) == (1e-12, 12, 224)
    assert_agrees(vit, lambda x: model(pixel_values=x).last_hidden_state[:, 0])


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("deit_base_patch16_224", "deit_b_16"),
        ("deit_base_distilled_patch16_224", "deit_b_16_distilled"),
    ],
)
def test_timm_deit_matches(name, preset):
    timm = pytest.importorskip("timm")
    model = fill(bare(timm.create_model, name))
    vit = ViT.from_state_dict(model.state_dict(), preset)
    assert vit.config == PRESETS[preset]
    assert_agrees(vit, lambda x: model.forward_features(x)[:, 0])
    assert timm_facts(model).items() <= dataclasses.asdict(vit.config).items()


def test_timm_vit_tiny_with_real_weights_matches(data_root):
    timm = pytest.importorskip("timm")
    path = data_root / "weights" / "vit_tiny_patch16_224_augreg.safetensors"
    if not path.is_file():
        pytest.skip(f"{path}: absent")
    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict({k: v.float() for k, v in load_safetensors(path)[0].items()})
    vit = ViT.from_pretrained(path, HALVES)
    assert vit.config == PRESETS["vit_ti_16"]
    assert_agrees(vit, lambda x: model.forward_features(x)[:, 0])


class PlainLVViT(nn.Module):
    """LV-ViT from its description, with its authors' names; nothing shared with `fastrecycle`."""

    def __init__(self, width=512, depth=20, heads=8, ratio=3):
        super().__init__()
        self.heads = heads
        stem = self.patch_embed = nn.Module()
        stem.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        stem.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        stem.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        stem.bn1, stem.bn2, stem.bn3 = (nn.BatchNorm2d(64) for _ in range(3))
        stem.proj = nn.Conv2d(64, width, 8, stride=8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)  # eps 1e-5
            block.attn, block.mlp = nn.Module(), nn.Module()
            block.attn.qkv = nn.Linear(width, 3 * width, bias=False)
            block.attn.proj = nn.Linear(width, width)
            block.mlp.fc1 = nn.Linear(width, ratio * width)
            block.mlp.fc2 = nn.Linear(ratio * width, width)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(width)
        self.head, self.aux_head = nn.Linear(width, 10), nn.Linear(width, 10)

    def forward(self, x):
        stem = self.patch_embed
        x = stem.bn1(stem.conv1(x)).clamp(min=0)
        x = stem.bn2(stem.conv2(x)).clamp(min=0)
        x = stem.bn3(stem.conv3(x)).clamp(min=0)
        x = stem.proj(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, -1)
            heads = []
            for one in zip(*(y.chunk(self.heads, -1) for y in (q, k, v)), strict=True):
                weight = (one[0] @ one[1].mT / math.sqrt(one[0].shape[-1])).softmax(-1)
                heads.append(weight @ one[2])
            x = x + block.attn.proj(torch.cat(heads, -1)) / 2
            x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x)))) / 2
        return self.norm(x)[:, 0]


def test_lvvit_m_matches_description():
    model = fill(bare(PlainLVViT))
    vit = ViT.from_state_dict(model.state_dict())
    assert vit.config == PRESETS["lvvit_m"]
    assert_agrees(vit, model)


# ------------------------------------------------------------------ other spellings, small


def small_open_clip(**changes):
    open_clip = pytest.importorskip("open_clip")
    fields = {"image_size": 32, "patch_size": 16, "width": 128, "layers": 2}
    config = open_clip.CLIPVisionCfg(**{**fields, **changes})
    return fill(open_clip.model._build_vision_tower(24, config, quick_gelu=True))


def small_clip(kind="CLIPVisionModelWithProjection", **changes):
    transformers = pytest.importorskip("transformers")
    fields = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 16, "projection_dim": 24,
    }  # fmt: skip
    vision = transformers.CLIPVisionConfig(**{**fields, **changes})
    if kind.startswith("CLIPVision"):
        return fill(getattr(transformers, kind)(vision))
    text = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50,
        "num_attention_heads": 2, "max_position_embeddings": 8, "projection_dim": 24,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        vision_config=vision.to_dict(), text_config=text, projection_dim=24
    )
    return fill(getattr(transformers, kind)(config))


def small_vit(kind="ViTModel", **changes):
    transformers = pytest.importorskip("transformers")
    fields = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    family = transformers.DeiTConfig if kind.startswith("DeiT") else transformers.ViTConfig
    return fill(getattr(transformers, kind)(family(**{**fields, **changes})))


def test_open_clip_fused_attention_layout():
    tower = small_open_clip(block_type="custom")
    assert type(tower.transformer.resblocks[0].attn).__name__ == "Attention"
    assert_agrees(ViT.from_state_dict(tower.state_dict(), {"activation": "quick_gelu"}), tower)


def test_open_clip_without_first_norm():
    tower = small_open_clip(no_ln_pre=True)
    vit = ViT.from_state_dict(tower.state_dict(), {"activation": "quick_gelu"})
    assert not vit.config.pre_norm
    assert_agrees(vit, tower)


def test_prefixes_of_wrappers_are_stripped():
    tower = small_open_clip()
    wrapped = {f"module.visual.{k}": v for k, v in tower.state_dict().items()}
    wrapped["module.logit_scale"] = torch.tensor(1.0)
    wrapped["module.positional_embedding"] = torch.zeros(77, 16)
    assert_agrees(ViT.from_state_dict(wrapped, {"activation": "quick_gelu"}), tower)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(
    "kind",
    ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel", "CLIPForImageClassification"],
)
def test_hf_clip_folder(kind, act, tmp_path):
    model = small_clip(kind, hidden_act=act)
    model.save_pretrained(tmp_path)
    vit = ViT.from_pretrained(tmp_path)
    assert (vit.config.activation, vit.config.heads) == (act, 4)
    assert (vit.config.mean, vit.config.std) == (CLIP_MEAN, CLIP_STD)

    def reference(x):
        if kind == "CLIPForImageClassification":
            tower = model.base_model if hasattr(model.base_model, "embeddings") else model
            return getattr(tower, "vision_model", tower)(pixel_values=x).pooler_output
        if kind == "CLIPModel":
            return model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
        output = model(pixel_values=x)
        return output.pooler_output if kind == "CLIPVisionModel" else output.image_embeds

    assert_agrees(vit, reference)
    told = {"activation": act, "heads": 4}
    assert_agrees(ViT.from_state_dict(model.state_dict(), told), reference)


@pytest.mark.parametrize(
    "kind",
    ["ViTModel", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassificationWithTeacher"],
)
def test_hf_vit_folder(kind, tmp_path):
    model = small_vit(kind, layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    vit = ViT.from_pretrained(tmp_path)
    assert vit.config.mean == (0.1, 0.2, 0.3)
    assert vit.config.std == (0.4, 0.5, 0.6)
    assert vit.config.norm_eps == 1e-3
    assert vit.config.prefix_tokens == (2 if kind.startswith("DeiT") else 1)
    assert_agrees(vit, lambda x: model.base_model(pixel_values=x).last_hidden_state[:, 0])
    in_memory = ViT.from_state_dict(model.state_dict(), vit.config)  # transformers 5's other names
    assert_same_weights(in_memory, vit)
    told = ViT.from_pretrained(tmp_path / "model.safetensors", {"mean": HALF})
    assert told.config == dataclasses.replace(vit.config, mean=HALF)


def test_hf_folder_without_normalisation(tmp_path):
    small_vit().save_pretrained(tmp_path)
    processor = {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    vit = ViT.from_pretrained(tmp_path)
    assert (vit.config.mean, vit.config.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_timm_folder(tmp_path):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    model = fill(timm.create_model("vit_base_patch16_clip_quickgelu_224", **sizes))
    save_safetensors(tmp_path / "model.safetensors", model.state_dict())
    config = {
        "architecture": "vit_base_patch16_clip_quickgelu_224",
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    vit = ViT.from_pretrained(tmp_path, {"heads": 4})
    assert (vit.config.activation, vit.config.pre_norm) == ("quick_gelu", True)
    assert (vit.config.mean, vit.config.norm_eps) == ((0.1, 0.2, 0.3), 1e-5)
    assert_agrees(vit, lambda x: model.forward_features(x)[:, 0])


def test_open_clip_folder(tmp_path):
    tower = small_open_clip(head_width=32)
    visual = {f"visual.{k}": v for k, v in tower.state_dict().items()}
    save_safetensors(tmp_path / "open_clip_model.safetensors", visual)
    config = {
        "model_cfg": {"quick_gelu": True, "vision_cfg": {"width": 128, "head_width": 32}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    vit = ViT.from_pretrained(tmp_path)
    assert (vit.config.heads, vit.config.mean) == (4, (0.1, 0.2, 0.3))
    assert_agrees(vit, tower)


# ------------------------------------------------------------------ ambiguity


def test_what_names_cannot_tell_is_asked_for():
    sd = small_open_clip().state_dict()
    with pytest.raises(ValueError, match=r'activation.*config=\{"activation": "quick_gelu"\}'):
        ViT.from_state_dict(sd)
    deit = export(vit_ti(), "timm")
    with pytest.raises(ValueError, match=r'mean, std.*config="vit_ti_16"'):
        ViT.from_state_dict(deit)
    with pytest.raises(ValueError, match="mean, std cannot be told"):
        ViT.from_state_dict(deit, {"activation": "gelu"})
    odd = ViT.random(ViTConfig(image_size=32, width=120, depth=2, heads=5, mlp_dim=240))
    with pytest.raises(ValueError, match=r"heads cannot be told"):
        ViT.from_state_dict(export(odd, "timm"), HALVES)
    assert ViT.from_state_dict(export(odd, "timm"), odd.config).config == odd.config
    with pytest.raises(ValueError, match="heads, activation, norm_eps, residual_scale, mean, std"):
        ViT.from_state_dict(odd.state_dict())


def test_large_clips_do_not_follow_the_rules():
    wide = ViTConfig(
        image_size=28, patch_size=14, width=1280, depth=1, heads=16, mlp_dim=64, pre_norm=True,
        patch_bias=False, norm_eps=1e-5,
    )  # fmt: skip
    sd = export(ViT.random(wide), "openai")
    with pytest.raises(ValueError, match="heads, activation cannot be told"):  # H/14: 80 a head
        convert(sd)
    wide = dataclasses.replace(wide, width=1024)
    sd = export(ViT.random(wide), "openai")
    with pytest.raises(ValueError, match="activation, mean, std cannot be told"):  # L/14: LAION's
        convert(sd)


def test_config_must_fit_the_weights():
    sd = export(vit_ti(), "timm")
    for told, message in (
        ("vit_b_16", "config: patch_bias is False|config: width is 768, but"),
        ({**HALVES, "image_size": 384}, "image_size is 384, but .* 224; position tables are not"),
        ({**HALVES, "prefix_tokens": 2}, "prefix_tokens is 2, but"),
        ({**HALVES, "activaton": "gelu"}, "unknown field 'activaton', did you mean 'activation'"),
        ({**HALVES, "activation": "relu"}, "activation: must be"),
        ({**HALVES, "heads": 7}, "multiple of heads 7"),
        ("vit_b_61", "config: expected one of vit_b_16"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(sd, told)
    with pytest.raises(TypeError, match="config: expected a dict"):
        convert(sd, 3)
    assert convert(sd, {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})[0].mean == HALF


# ------------------------------------------------------------------ damage


@functools.cache
def vit_ti() -> ViT:
    return fill(ViT.random(PRESETS["vit_ti_16"]))


def damaged(change):
    sd = export(vit_ti(), "timm")
    change(sd)
    return sd


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.clear(), "got no tensors"),
        (lambda sd: sd.pop("cls_token"), r"0 \+ \(patches a side"),
        (lambda sd: sd.pop("patch_embed.proj.weight"), "weights: expected the tensor names of"),
        (lambda sd: sd.pop("pos_embed"), "missing pos_embed"),
        (lambda sd: sd.pop("norm.weight"), "missing norm.weight"),
        (lambda sd: sd.pop("blocks.3.norm1.bias"), "missing blocks.3.norm1.bias"),
        (lambda sd: sd.pop("blocks.0.mlp.fc1.weight"), "missing blocks.0.mlp.fc1.weight"),
        (lambda sd: sd.pop("blocks.0.attn.qkv.bias"), "not in every block: blocks.1.attn.qkv.bias"),
        (lambda sd: sd.update({"reg_token": torch.zeros(1, 4, 192)}), "reg_token.*register"),
        (lambda sd: sd.update({"blocks.0.ls1.gamma": torch.zeros(192)}), "ls1.gamma.*LayerScale"),
        (lambda sd: sd.update({"fc_norm.weight": torch.zeros(192)}), "averaged over patches"),
        (lambda sd: sd.update({"blocks.07.norm1.bias": torch.zeros(192)}), "unknown tensors"),
        (
            lambda sd: sd.update({"blocks.5.norm2.weight": torch.zeros(191)}),
            r"misshaped blocks.5.norm2.weight \(expected \(192,\), got \(191,\)\)",
        ),
        (lambda sd: sd.update({"cls_token": torch.zeros(1, 1, 96)}), "misshaped cls_token"),
        (lambda sd: sd.update({"pos_embed": torch.zeros(1, 195, 192)}), r"1 \+ \(patches a side"),
        (lambda sd: sd.update({"pos_embed": torch.zeros(192)}), "expected 2 dimensions"),
        (
            lambda sd: sd.update({"patch_embed.proj.weight": torch.zeros(192, 3, 16, 8)}),
            "expected square patches of 3 channels",
        ),
        (
            lambda sd: sd.update({"patch_embed.proj.weight": torch.zeros(192, 1, 16, 16)}),
            "expected square patches of 3 channels",
        ),
        (lambda sd: sd["blocks.11.mlp.fc2.weight"].view(-1)[7:].fill_(math.nan), "NaN or infinity"),
        (lambda sd: sd["pos_embed"].view(-1)[:1].fill_(math.inf), "infinity in pos_embed"),
        (
            lambda sd: sd.update({"norm.bias": torch.zeros(192, dtype=torch.int8)}),
            "norm.bias: expected floating-point numbers, got torch.int8",
        ),
        (lambda sd: sd.update({"module.norm.bias": torch.zeros(192)}), "unknown tensors module"),
    ],
)
def test_rejects_damaged_state_dicts(change, message):
    with pytest.raises(ValueError, match=message):
        ViT.from_state_dict(damaged(change), HALVES)


def test_rejects_what_is_no_state_dict():
    with pytest.raises(TypeError, match="expected a mapping of tensors, got ViT"):
        convert(ViT.random(PRESETS["demo"]))
    with pytest.raises(TypeError, match=r"norm\.bias: expected a tensor, got list"):
        convert(damaged(lambda sd: sd.update({"norm.bias": [0.0] * 192})), HALVES)
    names = {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 192)}
    with pytest.raises(ValueError, match=r"a LoRA's weights, which LoRA\.load reads"):
        convert(names)
    tower = small_open_clip().state_dict()
    two = {f"{name}.{k}": v for name in ("a", "b") for k, v in tower.items()}
    with pytest.raises(ValueError, match="expected one vision tower, got 2"):
        convert(two, {"activation": "gelu"})


def test_queries_of_another_shape_are_named():
    sd = small_vit().state_dict()
    name = next(k for k in sd if "1." in k and k.endswith("q_proj.weight"))
    sd[name] = sd[name][:-1]
    with pytest.raises(ValueError, match=f"misshaped {re.escape(name)}"):
        convert(sd, {**HALVES, "heads": 4})


def test_tensors_are_copied_and_half_precision_is_widened():
    original = vit_ti()
    sd = {k: v.half() for k, v in export(original, "timm").items()}
    vit = ViT.from_state_dict(sd, HALVES)
    assert {x.dtype for x in vit.parameters()} == {torch.float32}
    sd = export(original, "timm")
    vit = ViT.from_state_dict(sd, HALVES)
    sd["norm.weight"].fill_(7)
    assert torch.equal(vit.norm.weight, original.norm.weight)


# ------------------------------------------------------------------ export


def assert_same_weights(first: ViT, second: ViT) -> None:
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(x, right[name]) for name, x in left.items())


_CLIP_SMALL = ViTConfig(
    image_size=32, patch_size=16, width=64, depth=2, heads=4, mlp_dim=96, out_dim=24,
    activation="quick_gelu", norm_eps=1e-5, pre_norm=True, patch_bias=False, mean=CLIP_MEAN,
    std=CLIP_STD,
)  # fmt: skip
_VIT_SMALL = ViTConfig(
    image_size=32, patch_size=16, width=64, depth=2, heads=4, mlp_dim=96, norm_eps=1e-12
)
_LVVIT_SMALL = dataclasses.replace(
    PRESETS["lvvit_m"], image_size=32, width=64, depth=2, heads=4, mlp_dim=96
)


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("openai", _CLIP_SMALL),
        ("hf_clip", _CLIP_SMALL),
        ("hf_clip", dataclasses.replace(_CLIP_SMALL, out_dim=None)),
        ("hf_vit", _VIT_SMALL),
        ("hf_vit", dataclasses.replace(_VIT_SMALL, prefix_tokens=2)),
        ("timm", _VIT_SMALL),
        ("timm", dataclasses.replace(_VIT_SMALL, prefix_tokens=2, qkv_bias=False)),
        ("timm", dataclasses.replace(_CLIP_SMALL, out_dim=None)),
        ("lvvit", _LVVIT_SMALL),
    ],
)
def test_export_round_trip(layout, config):
    vit = fill(ViT.random(config, seed=3))
    back = ViT.from_state_dict(export(vit, layout), config)
    assert back.config == config
    assert_same_weights(back, vit)


def test_export_loads_into_open_clip():
    vit, tower = fill(ViT.random(dataclasses.replace(_CLIP_SMALL, width=128, heads=2))), None
    tower = small_open_clip(mlp_ratio=0.75)
    tower.load_state_dict(export(vit, "openai"))
    assert_agrees(vit, tower)


def test_export_loads_into_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    vit, folder = fill(ViT.random(_VIT_SMALL)), tmp_path / "vit"
    small_vit().save_pretrained(folder)  # for its config.json
    save_safetensors(folder / "model.safetensors", export(vit, "hf_vit"), {"format": "pt"})
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert_agrees(vit, lambda x: model(pixel_values=x).last_hidden_state[:, 0])
    clip, folder = fill(ViT.random(_CLIP_SMALL)), tmp_path / "clip"
    small_clip().save_pretrained(folder)
    save_safetensors(folder / "model.safetensors", export(clip, "hf_clip"), {"format": "pt"})
    projected = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    assert_agrees(clip, lambda x: projected(pixel_values=x).image_embeds)


def test_export_loads_into_timm():
    timm = pytest.importorskip("timm")
    vit = fill(ViT.random(dataclasses.replace(_VIT_SMALL, norm_eps=1e-6)))
    sizes = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **sizes).eval()
    model.load_state_dict(export(vit, "timm"))
    assert_agrees(vit, lambda x: model.forward_features(x)[:, 0])


def test_export_loads_into_lvvit():
    small = dataclasses.replace(PRESETS["lvvit_m"], width=64, depth=2, heads=4, mlp_dim=192)
    vit, theirs = ViT.random(small), PlainLVViT(width=64, depth=2).state_dict()
    names = export(vit, "lvvit")
    assert names.keys() == {k for k in theirs if "head" not in k}
    assert all(theirs[k].shape == v.shape for k, v in names.items())


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (_VIT_SMALL, "pytorch", "expected a layout of openai, hf_clip"),
        (_VIT_SMALL, "native", "expected a layout of"),
        (_VIT_SMALL, "openai", "no place for patch_embed.bias"),
        (_CLIP_SMALL, "hf_vit", "no place for pre_norm.weight, pre_norm.bias, head_proj.weight"),
        (_CLIP_SMALL, "timm", "no place for head_proj.weight"),
        (_VIT_SMALL, "lvvit", "needs LV-ViT's stem"),
        (_LVVIT_SMALL, "timm", "has no residual scale"),
    ],
)
def test_export_rejects_what_a_layout_cannot_hold(config, layout, message):
    with pytest.raises(ValueError, match=message):
        export(ViT.random(config), layout)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", [_CLIP_SMALL, _LVVIT_SMALL, PRESETS["demo"]])
def test_save_round_trip(config, dtype, tmp_path):
    vit, path = fill(ViT.random(config)), tmp_path / "vit.safetensors"
    vit.save(path, dtype, card={"licence": "Apache-2.0", "accuracy": 53.6})
    back = ViT.from_pretrained(path)
    assert back.config == config
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-6}
    for name, x in vit.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], x, **tolerance)
    tensors, metadata = load_safetensors(path)
    assert tensors["norm.weight"].dtype == dtype
    assert json.loads(metadata[CARD_KEY])["licence"] == "Apache-2.0"
    assert ViT.from_pretrained(tmp_path, {"mean": HALF}).config.mean == HALF  # the folder, too


def test_save_rejects_what_half_precision_cannot_hold(tmp_path):
    vit = ViT.random(_VIT_SMALL)
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.float16"):
        vit.save(tmp_path / "x.safetensors", torch.bfloat16)
    vit.norm.weight.fill_(1e6)
    with pytest.raises(ValueError, match=r"NaN or infinity in norm\.weight as torch\.float16"):
        vit.save(tmp_path / "x.safetensors", torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"wdth": 3}', '{"image_size": 96, "heads": 4}', '{"mean": 3}']
)
def test_damaged_metadata_is_reported(text, tmp_path):
    vit, path = ViT.random(_VIT_SMALL), tmp_path / "vit.safetensors"
    save_safetensors(path, vit.state_dict(), {CONFIG_KEY: text})
    with pytest.raises(ValueError, match=r"metadata|cannot be told"):
        ViT.from_pretrained(path)


def test_torch_checkpoints(tmp_path):
    vit = vit_ti()
    sd = export(vit, "timm")
    optimiser = {"state": {}, "param_groups": [{"lr": 0.1}]}
    for name, content in (
        ("a.pt", sd),
        ("b.pth", {"model": sd, "epoch": 3, "optimizer": optimiser}),
        ("c.bin", {"state_dict": {f"module.{k}": v for k, v in sd.items()}}),
    ):
        torch.save(content, tmp_path / name)
        assert_same_weights(ViT.from_pretrained(tmp_path / name, HALVES), vit)
    for content, message in (
        ({"model": sd, "model_ema": sd}, r"several \(model, model_ema\)"),
        ({"epoch": 3}, "expected one state dict, got none"),
        ([1, 2], "expected a state dict, got list"),
    ):
        torch.save(content, tmp_path / "d.pt")
        with pytest.raises(ValueError, match=message):
            ViT.from_pretrained(tmp_path / "d.pt", HALVES)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def test_pickles_are_never_run(tmp_path):
    bomb = Bomb()
    bomb.target = str(tmp_path / "boom")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": bomb}))
    torch.save({"cls_token": torch.zeros(1, 1, 8), "extra": bomb}, tmp_path / "zip.bin")
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps({"model": bomb}))
    for name in ("pickle.pt", "zip.bin", "named.safetensors"):
        with pytest.raises(ValueError, match=re.escape(name)):
            ViT.from_pretrained(tmp_path / name, HALVES)
    assert not (tmp_path / "boom").exists()


def test_damaged_files_are_reported(tmp_path):
    vit, path = ViT.random(_VIT_SMALL), tmp_path / "vit.safetensors"
    vit.save(path)
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:20], b"", b"{}", b"\xff" * 4096):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"vit\.safetensors: expected a complete safetensors"):
            ViT.from_pretrained(path)
    (tmp_path / "weights.h5").touch()
    with pytest.raises(ValueError, match=r"expected \.safetensors, \.pt, \.pth, \.bin"):
        ViT.from_pretrained(tmp_path / "weights.h5")
    with pytest.raises(FileNotFoundError, match='"open_clip:MODEL/PRETRAINED"'):
        ViT.from_pretrained(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match=r'ViT\.preset\("vit_b_16"\)'):
        ViT.from_pretrained("vit_b_16")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no weights in it"):
        ViT.from_pretrained(tmp_path / "empty")
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / "empty" / name).write_bytes(whole)
    with pytest.raises(ValueError, match="expected one weights file, got a"):
        ViT.from_pretrained(tmp_path / "empty")


def test_shards(tmp_path):
    vit = vit_ti()
    sd = export(vit, "timm")
    shards = {"one.safetensors": dict(list(sd.items())[:40])}
    shards["two.safetensors"] = {k: v for k, v in sd.items() if k not in shards["one.safetensors"]}
    for name, tensors in shards.items():
        save_safetensors(tmp_path / name, tensors)
    weight_map = {k: name for name, tensors in shards.items() for k in tensors}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_weights(ViT.from_pretrained(tmp_path, HALVES), vit)
    for content, error, message in (
        ({**weight_map, "more": "one.safetensors"}, ValueError, "its shards lack more"),
        ({**weight_map, "more": "absent.safetensors"}, FileNotFoundError, "absent.safetensors"),
        ({**weight_map, "more": "../one.safetensors"}, ValueError, "must lie beside the index"),
        ({}, ValueError, "expected an index of shards"),
    ):
        index.write_text(json.dumps({"weight_map": content}))
        with pytest.raises(error, match=message):
            ViT.from_pretrained(tmp_path, HALVES)
    index.write_text("[1")
    with pytest.raises(ValueError, match="expected a JSON file"):
        ViT.from_pretrained(tmp_path, HALVES)


def test_config_json_must_fit_the_weights(tmp_path):
    small_vit().save_pretrained(tmp_path)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"image_size": 48}, "image_size is 48, but .* 32; position tables are not interpolated"),
        ({"hidden_act": "relu"}, "expected activation gelu, gelu_tanh or quick_gelu"),
        ({"num_attention_heads": 5}, "multiple of heads 5"),
        ({"model_type": "bert"}, "heads cannot be told"),  # not this model's: unread
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            ViT.from_pretrained(tmp_path)


# ------------------------------------------------------------------ libraries' own downloads


def test_source_open_clip(open_clip_b16, monkeypatch, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    asked = []

    def create_model(name, pretrained=None):
        asked.append((name, pretrained))
        return open_clip_b16

    monkeypatch.setattr(open_clip, "create_model", create_model)
    config, tensors = load_source("open_clip:ViT-B-16-quickgelu/openai")
    assert asked == [("ViT-B-16-quickgelu", "openai")]
    assert config == PRESETS["vit_b_16"]
    assert torch.equal(tensors["norm.weight"], open_clip_b16.visual.ln_post.weight)
    file = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match=r"weights\.pt is no file and no pretrained tag"):
        load_source(f"open_clip:ViT-B-16-quickgelu/{file}")
    file.touch()
    load_source(f"open_clip:ViT-B-16-quickgelu/{file}")
    assert asked[1] == ("ViT-B-16-quickgelu", str(file))
    for source, message in (
        ("open_clip:ViT-B-16-quickgelu", "expected open_clip:MODEL/PRETRAINED.*openai"),
        ("open_clip:ViT-B-61/openai", "no such model; close to it: ViT-B-"),
        # open_clip itself only warns here, and computes something else
        ("open_clip:ViT-B-16/openai", "take open_clip:ViT-B-16-quickgelu/openai"),
    ):
        with pytest.raises(ValueError, match=message):
            load_source(source)

    def offline(name, pretrained=None):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(OSError, match=r"could not be downloaded .*no route to host"):
        load_source("open_clip:ViT-B-16-quickgelu/openai")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="open_clip cannot load this"):  # the empty file
        load_source(f"open_clip:ViT-B-16-quickgelu/{file}")


def test_open_clip_models_that_are_no_plain_vit():
    with pytest.raises(ValueError, match="pooling 'avg'"):
        open_clip_facts(small_open_clip(pool_type="avg"))
    with pytest.raises(ValueError, match="got Linear with pooling None"):
        open_clip_facts(nn.Linear(1, 1))


def test_source_timm(monkeypatch):
    timm = pytest.importorskip("timm")
    model = fill(bare(timm.create_model, "deit_tiny_distilled_patch16_224"))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    vit = ViT.from_pretrained("timm:deit_tiny_distilled_patch16_224")
    assert vit.config.mean == IMAGENET_MEAN
    assert vit.config.prefix_tokens == 2
    assert_agrees(vit, lambda x: model.forward_features(x)[:, 0])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no such model; close to it: vit_tiny_patch16_224"):
        load_source("timm:vit_tinny_patch16_224")
    with pytest.raises(ValueError, match="pooling 'avgmax'"):
        timm_facts(timm.create_model("vit_tiny_patch16_224", global_pool="avgmax"))
    with pytest.raises(ValueError, match="got ResNet"):
        timm_facts(timm.create_model("resnet10t"))


def test_source_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    small_clip().save_pretrained(tmp_path)
    names = ["README.md", "config.json", "pytorch_model.bin", "model.safetensors"]
    calls = []

    def snapshot_download(repo, **arguments):
        calls.append((repo, arguments))
        return str(tmp_path)

    monkeypatch.setattr(hub, "list_repo_files", lambda repo, revision=None: names)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert ViT.from_pretrained("hf:owner/clip@main").config == dataclasses.replace(
        _CLIP_SMALL, heads=4
    )
    repo, arguments = calls[0]
    assert (repo, arguments["revision"]) == ("owner/clip", "main")
    assert "model.safetensors" in arguments["allow_patterns"]
    assert "pytorch_model.bin" not in arguments["allow_patterns"]  # safetensors first

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "list_repo_files", offline)
    ViT.from_pretrained("hf:owner/clip")  # offline: from the cache
    assert calls[-1][1]["local_files_only"]
    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(OSError, match="hf:owner/clip: could not be downloaded"):
        ViT.from_pretrained("hf:owner/clip")
    monkeypatch.setattr(hub, "list_repo_files", lambda repo, revision=None: ["README.md"])
    with pytest.raises(FileNotFoundError, match="no weights in it"):
        ViT.from_pretrained("hf:owner/clip")
    with pytest.raises(ValueError, match="expected hf:OWNER/REPO"):
        ViT.from_pretrained("hf:../../etc")


def test_missing_libraries_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs timm .*pip install timm"):
        load_source("timm:vit_tiny_patch16_224")


def test_source_demo_is_the_packaged_file(monkeypatch, tmp_path):
    ViT.random(PRESETS["demo"]).save(tmp_path / "vit.safetensors")
    fake = types.SimpleNamespace(asset=lambda name: tmp_path / name)
    monkeypatch.setitem(sys.modules, "fastrecycle.assets", fake)
    assert ViT.from_pretrained("demo").config == PRESETS["demo"]


def test_lora_fits_a_converted_model():
    """The layouts share one order of q, k, v: a LoRA on q changes q, whatever the source."""
    model = small_vit()
    vit = ViT.from_state_dict(model.state_dict(), {**HALVES, "heads": 4})
    lora = LoRA.init(vit.config, targets=("q",))
    lora.b["q"].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    sd = model.state_dict()
    for block in range(2):
        name = next(k for k in sd if f".{block}." in "." + k and k.endswith("q_proj.weight"))
        sd[name] += lora.delta("q")[block]
    model.load_state_dict(sd)
    batch = images(vit.config)
    with torch.no_grad():
        expected = model(pixel_values=batch).last_hidden_state[:, 0]
        torch.testing.assert_close(vit(batch, lora), expected, **TOLERANCE)


def test_every_layout_reads_back_its_own_names():
    for name, layout in layouts.LAYOUTS.items():
        for ours, theirs in layout.names.items():
            concrete = theirs.replace("#", "3").replace("*", "weight")
            expected = ours.replace("#", "3").replace("*", "weight")
            assert layouts.our_name(name, concrete) == expected
            assert layouts.their_name(name, expected) == concrete
    assert sources._choose(["b.bin", "model.safetensors"], "x") == "model.safetensors"

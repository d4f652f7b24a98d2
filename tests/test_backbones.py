"""Backbones beside CLIP, ViT and DeiT: the same features as the libraries they come from."""

import dataclasses
import functools
import json

import pytest
import torch
import toys
from filled import bare, fill
from torch import nn

from fastrecycle.classifier import FewShotClassifier
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.files import save_safetensors
from fastrecycle.lora import LoRA
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.sources import load_source, open_clip_facts, timm_facts
from fastrecycle.vit import RaggedKeep, ViT
from fastrecycle.vit_config import HALF, IMAGENET_MEAN, PRESETS, ViTConfig, flops
from fastrecycle.weights import convert, export

timm = pytest.importorskip("timm", reason="needs the real models")
TOLERANCE = {"rtol": 0, "atol": 1e-4}
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 4}
HF = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip

# name in timm -> (its arguments at a small size, fields that ours then has)
TIMM = {
    "vit_base_patch16_siglip_224": ({"img_size": 64}, {"pool": "map", "prefix_tokens": 0}),
    "vit_base_patch16_siglip_gap_224": ({"img_size": 64}, {"pool": "norm_mean"}),
    "vit_base_patch14_dinov2": ({"img_size": 56}, {"layer_scale": True, "patch_size": 14}),
    "vit_base_patch14_reg4_dinov2": ({"img_size": 56}, {"prefix_tokens": 5, "registers": 4}),
    "vit_base_patch16_dinov3": ({"img_size": 64}, {"rope": "dinov3", "pool": "norm_mean"}),
    "vit_base_patch16_dinov3_qkvb": (
        {"img_size": 64, "global_pool": "token"},
        {"rope": "dinov3", "pool": "cls", "qkv_bias": True, "norm_eps": 1e-5},
    ),
    "eva_giant_patch14_224": ({"img_size": 56}, {"pool": "mean_norm", "qkv_bias": True}),
    "eva_giant_patch14_clip_224": ({"img_size": 56, "global_pool": "token"}, {"pool": "cls"}),
    "vit_medium_patch16_gap_240": ({"img_size": 64}, {"pool": "norm_mean", "prefix_tokens": 0}),
    "vit_medium_patch16_reg4_gap_256": (
        {"img_size": 64}, {"pool": "mean_norm", "prefix_tokens": 4, "registers": 4}
    ),
    "vit_so150m_patch16_reg4_gap_256": ({"img_size": 64}, {"registers": 4}),  # with positions
    "deit3_base_patch16_224": ({"img_size": 64}, {"layer_scale": True, "prefix_tokens": 1}),
    "vit_base_patch16_224": ({"img_size": 64, "qk_norm": True}, {"qk_norm": True}),
    "vit_tiny_patch16_224": (
        {"img_size": 64, "act_layer": "gelu_tanh", "global_pool": "avg"},
        {"activation": "gelu_tanh", "pool": "mean_norm"},
    ),
}  # fmt: skip


@functools.cache
def timm_model(name: str) -> nn.Module:
    model = timm.create_model(name, **SMALL, **TIMM[name][0])
    size = TIMM[name][0]["img_size"]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    return fill(model)


def timm_features(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model.forward_head(model.forward_features(batch), pre_logits=True)


def images(config: ViTConfig, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, config.image_size, config.image_size, generator=generator)


def assert_agrees(vit: ViT, reference) -> None:
    batch = images(vit.config)
    with torch.no_grad():
        expected, got = reference(batch), vit(batch)
    assert expected.abs().mean() > 0.05
    assert not torch.allclose(expected[0], expected[1], atol=0.01)
    torch.testing.assert_close(got, expected, **TOLERANCE)


# ------------------------------------------------------------------ timm


@pytest.mark.parametrize("name", TIMM)
def test_timm_model_matches(name):
    model = timm_model(name)
    vit = ViT._load(*convert(model.state_dict(), None, timm_facts(model)))
    for field, value in TIMM[name][1].items():
        assert getattr(vit.config, field) == value, field
    assert_agrees(vit, lambda x: timm_features(model, x))


@pytest.mark.parametrize("name", TIMM)
def test_export_loads_into_timm(name):
    model = timm_model(name)
    vit = ViT._load(*convert(model.state_dict(), None, timm_facts(model)))
    other = timm.create_model(name, **SMALL, **TIMM[name][0], num_classes=0).eval()
    theirs = export(vit, "timm_eva" if type(other).__name__ == "Eva" else "timm")
    tokens = vit.config.prefix_tokens - vit.config.registers
    if name == "vit_so150m_patch16_reg4_gap_256":  # positions of registers became part of them
        theirs["pos_embed"] = torch.cat((torch.zeros(1, 4, 64), theirs["pos_embed"]), dim=1)
    assert ("cls_token" in theirs) == (tokens > 0)
    other.load_state_dict(theirs)
    assert_agrees(vit, lambda x: timm_features(other, x))


def test_dinov3_at_true_shape():
    model = fill(bare(timm.create_model, "vit_small_patch16_dinov3"))
    model.rope.init_non_persistent_buffers()
    vit = ViT._load(*convert(model.state_dict(), None, timm_facts(model)))
    assert (vit.config.image_size, vit.config.heads) == (256, 6)
    assert_agrees(vit, lambda x: timm_features(model, x))


def test_siglip_of_open_clip_matches():
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    tower = bare(open_clip.model._build_vision_tower, config["embed_dim"], vision)
    tower.trunk = timm_model("vit_base_patch16_siglip_224")  # the same, smaller
    tower.image_mean, tower.image_std = HALF, HALF
    vit = ViT._load(*convert(tower.state_dict(), None, open_clip_facts(tower)))
    assert (vit.config.pool, vit.config.mean, vit.config.out_dim) == ("map", HALF, None)
    assert_agrees(vit, tower)
    whole = {f"visual.{k}": v for k, v in tower.state_dict().items()}
    whole |= {"text.positional_embedding": torch.zeros(64, 8), "logit_bias": torch.zeros(())}
    assert convert(whole, {"mean": HALF, "std": HALF, "heads": 4})[0] == vit.config


def test_projection_of_open_clips_timm_towers_is_read():
    timm_model = pytest.importorskip("open_clip.timm_model")
    tower = timm_model.TimmModel(
        "vit_tiny_patch16_224", 24, image_size=64, pool="token", proj="linear", pretrained=False
    )
    vit = ViT._load(*convert(fill(tower).state_dict(), None, open_clip_facts(tower)))
    assert vit.config.out_dim == 24
    assert_agrees(vit, tower)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("eva02_tiny_patch14_224", {}, "GluMlp .SwiGLU is not supported"),
        ("eva02_base_patch14_224", {}, "SwiGLU"),
        ("vit_small_plus_patch16_dinov3", {}, "SwiGLU"),
        ("vit_base_patch16_rope_224", {}, "RoPE.*DINOv3's, got RotaryEmbeddingCat"),
        ("vit_base_patch16_rope_mixed_224", {}, "RoPE.*got RotaryEmbeddingMixed"),
        ("eva02_enormous_patch14_clip_224", {}, "EvaBlockPostNorm"),
        ("vit_small_patch16_36x1_224", {"block_fn": timm.models.vision_transformer.ResPostBlock},
         "ResPostBlock"),
        ("vit_base_patch16_224", {"global_pool": "max"}, "pooling 'max'"),
        ("vit_base_patch16_224", {"norm_layer": "rmsnorm"}, "RmsNorm"),
    ],
)  # fmt: skip
def test_timm_models_that_are_refused(name, arguments, message):
    model = bare(timm.create_model, name, depth=1, **arguments)
    with pytest.raises(ValueError, match=message):
        timm_facts(model)


@pytest.mark.parametrize(
    ("name", "told", "message"),
    [
        ("eva02_tiny_patch14_224", {}, "gated .SwiGLU"),
        ("eva02_base_patch14_224", {}, "expected the tensor names"),  # q, k, v apart
        ("vit_base_patch16_rope_mixed_224", {"rope": "none"}, "rope.freqs.*RoPE"),
        ("vit_base_patch16_rope_ape_224", {"heads": 12, "mean": HALF, "std": HALF}, "rope cannot"),
        ("vit_base_patch16_dinov3", {}, r"missing pos_embed; DINOv3.*RoPE"),
        ("vit_base_patch16_dinov3", {"rope": "dinov3"}, "image size must be told"),
        ("vit_base_patch16_dinov3", {"rope": "dinov3", "image_size": 250}, "multiples of 16"),
        ("vit_base_patch16_dinov3", {"rope": "dinov3", "image_size": 256, "heads": 12},
         "pool.*cannot be told"),
        ("eva02_enormous_patch14_clip_224", {}, "normalises after each branch"),
    ],
)  # fmt: skip
def test_state_dicts_that_are_refused(name, told, message):
    model = bare(timm.create_model, name, depth=1)
    with pytest.raises(ValueError, match=message):
        convert(model.state_dict(), told)


def test_tables_that_fit_two_grids_are_asked_about():
    config = ViTConfig(
        image_size=48, patch_size=16, width=64, depth=1, heads=4, mlp_dim=64, prefix_tokens=5,
        registers=4,
    )  # fmt: skip
    vit = fill(ViT.random(config))
    theirs = export(vit, "timm")  # 9 rows: 9 patches, or 5 tokens and 4 patches
    told = {"heads": 4, "mean": HALF, "std": HALF}
    with pytest.raises(ValueError, match=r"9 positions may be those of 2 or 3 patches a side"):
        convert(theirs, told)
    assert convert(theirs, {**told, "image_size": 48})[0].grid == 3


def test_timm_folder_of_dinov3(tmp_path):
    model = timm_model("vit_base_patch16_dinov3")
    save_safetensors(tmp_path / "model.safetensors", model.state_dict())
    config = {
        "architecture": "vit_base_patch16_dinov3", "global_pool": "avg",
        "pretrained_cfg": {
            "mean": list(IMAGENET_MEAN), "std": [0.5] * 3, "input_size": [3, 64, 64]
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    vit = ViT.from_pretrained(tmp_path, {"heads": 4})
    assert (vit.config.pool, vit.config.norm_eps) == ("norm_mean", 1e-5)
    assert_agrees(vit, lambda x: timm_features(model, x))
    assert ViT.from_pretrained(tmp_path, {"heads": 4, "pool": "cls"}).config.pool == "cls"


# ------------------------------------------------------------------ transformers


def small_hf(kind: str, **changes) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    fields = {**HF, **({} if kind.startswith("Dinov2") else {"intermediate_size": 96}), **changes}
    if kind == "SiglipModel":
        text = {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50,
            "num_attention_heads": 2, "max_position_embeddings": 8,
        }  # fmt: skip
        config = transformers.SiglipConfig(text_config=text, vision_config=fields)
    else:
        config = getattr(transformers, kind.replace("Model", "Config"))(**fields)
    return fill(getattr(transformers, kind)(config))


@pytest.mark.parametrize(
    ("kind", "changes", "layout", "pool"),
    [
        ("SiglipVisionModel", {}, "hf_siglip", "map"),
        ("SiglipModel", {}, None, "map"),
        ("Dinov2Model", {"mlp_ratio": 2}, "hf_dinov2", "cls"),
        ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, "hf_dinov2", "cls"),
        ("DINOv3ViTModel", {"num_register_tokens": 4}, "hf_dinov3", "cls"),
        ("DINOv3ViTModel", {"num_register_tokens": 0}, "hf_dinov3", "cls"),
    ],
)
def test_transformers_model_matches(kind, changes, layout, pool, tmp_path):
    model = small_hf(kind, **changes)
    model.save_pretrained(tmp_path)
    told = {"mean": IMAGENET_MEAN}
    vit = ViT.from_pretrained(tmp_path, told)
    assert (vit.config.pool, vit.config.heads) == (pool, 4)
    tower = getattr(model, "vision_model", model)

    def reference(x):
        return tower(pixel_values=x).pooler_output

    assert_agrees(vit, reference)
    in_memory = ViT.from_state_dict(model.state_dict(), vit.config)
    assert_agrees(in_memory, reference)
    if layout is None:
        return
    other = type(model)(model.config).eval()
    theirs = export(vit, layout)
    prefix = "vision_model." if layout == "hf_siglip" else ""
    (tmp_path / "model.safetensors").unlink()
    extra = {} if kind.startswith("Siglip") else {"embeddings.mask_token": torch.zeros(1, 64)}
    if kind.startswith("DINOv3"):
        extra = {"embeddings.mask_token": torch.zeros(1, 1, 64)}
    assert all(name.startswith(prefix) for name in theirs)
    save_safetensors(tmp_path / "model.safetensors", theirs | extra, {"format": "pt"})
    other = type(model).from_pretrained(tmp_path).eval()
    assert_agrees(vit, lambda x: other(pixel_values=x).pooler_output)


def test_gated_dinov2_is_refused():
    model = small_hf("Dinov2Model", use_swiglu_ffn=True)
    with pytest.raises(ValueError, match="SwiGLU"):
        convert(model.state_dict(), {"heads": 4})
    model = small_hf("DINOv3ViTModel", use_gated_mlp=True)
    with pytest.raises(ValueError, match="SwiGLU"):
        convert(model.state_dict(), {"heads": 4, "image_size": 56})


def test_missing_keys_of_dinov3_are_named():
    state = small_hf("DINOv3ViTModel", num_register_tokens=4).state_dict()
    state.pop("model.layer.1.attention.k_proj.weight")
    with pytest.raises(ValueError, match=r"missing layer\.1\.attention\.k_proj\.weight"):
        convert(state, {"heads": 4, "image_size": 56})


# ------------------------------------------------------------------ another image size


def test_resized_matches_timm_and_transformers():
    model = timm_model("vit_base_patch14_reg4_dinov2")
    vit = ViT._load(*convert(model.state_dict(), None, timm_facts(model)))
    larger = timm.create_model("vit_base_patch14_reg4_dinov2", **SMALL, img_size=56).eval()
    larger.load_state_dict(model.state_dict())
    larger.set_input_size(img_size=84)
    assert_agrees(vit.resized(84), lambda x: timm_features(larger, x))
    assert vit.config.image_size == 56
    theirs = small_hf("Dinov2Model")
    ours = ViT.from_state_dict(theirs.state_dict(), {"heads": 4})
    assert_agrees(ours.resized(28, antialias=False), lambda x: theirs(pixel_values=x).pooler_output)
    turned = small_hf("DINOv3ViTModel", num_register_tokens=4)
    ours = ViT.from_state_dict(turned.state_dict(), {"heads": 4, "image_size": 56})
    assert_agrees(ours.resized(84), lambda x: turned(pixel_values=x).pooler_output)
    with pytest.raises(ValueError, match="multiple of patch_size 14"):
        ours.resized(60)


def test_another_image_size_is_told_by_resizing():
    sd = export(fill(ViT.random(ViTConfig(width=64, depth=1, heads=4, mlp_dim=64))), "timm")
    with pytest.raises(ValueError, match=r"position tables.*vit\.resized"):
        convert(sd, {"heads": 4, "mean": HALF, "std": HALF, "image_size": 384})


# ------------------------------------------------------------------ files, presets


@pytest.mark.parametrize("name", TIMM)
def test_save_round_trip(name, tmp_path):
    model = timm_model(name)
    vit = ViT._load(*convert(model.state_dict(), None, timm_facts(model)))
    vit.save(tmp_path / "vit.safetensors")
    back = ViT.from_pretrained(tmp_path / "vit.safetensors")
    assert back.config == vit.config
    batch = images(vit.config)
    assert torch.equal(back(batch), vit(batch))


def test_source_timm_by_name(monkeypatch):
    model = timm_model("vit_base_patch16_siglip_224")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    config, tensors = load_source("timm:vit_base_patch16_siglip_224")
    assert (config.pool, config.mean, config.heads) == ("map", HALF, 4)
    assert torch.equal(tensors["pool.probe"], model.attn_pool.latent[0, 0])


@pytest.mark.parametrize(
    ("preset", "kind", "changes"),
    [
        ("siglip_b_16", "SiglipVision", {"patch_size": 16}),
        ("dinov2_b_14", "Dinov2", {"image_size": 518, "patch_size": 14}),
        ("dinov2_b_14_reg4", "Dinov2WithRegisters", {"image_size": 518, "patch_size": 14}),
        ("dinov3_b_16", "DINOv3ViT", {"hidden_size": 768, "intermediate_size": 3072,
                                      "num_attention_heads": 12, "num_register_tokens": 4}),
    ],
)  # fmt: skip
def test_presets_are_the_published_shapes(preset, kind, changes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**changes, num_hidden_layers=1)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(config)
    theirs = {name: torch.zeros(x.shape) for name, x in model.state_dict().items()}
    told = {"heads": 12} | ({"image_size": 224} if kind == "DINOv3ViT" else {})
    assert convert(theirs, told)[0] == dataclasses.replace(PRESETS[preset], depth=1)


# ------------------------------------------------------------------ pruning, packing, LoRA


@pytest.fixture(params=["vit_base_patch16_siglip_224", "vit_base_patch16_dinov3",
                        "vit_base_patch16_dinov3_qkvb", "vit_medium_patch16_reg4_gap_256",
                        "vit_base_patch14_reg4_dinov2"])  # fmt: skip
def vit(request):
    model = timm_model(request.param)
    return ViT._load(*convert(model.state_dict(), None, timm_facts(model)))


def test_keeping_all_is_dense_and_packing_is_keeping(vit):
    batch = images(vit.config, 3)
    n = vit.config.patches
    lora = LoRA.init(vit.config, targets=("q", "v", "proj"))
    for b in lora.b.values():
        b.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    order = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i))
                         for i in range(3)])  # fmt: skip
    dense = vit(batch, lora)
    torch.testing.assert_close(vit(batch, lora, keep=order), dense, rtol=0, atol=1e-5)
    counts = torch.tensor([n, 5, 9])
    packed = vit(batch, lora, keep=RaggedKeep.of_orders(order, counts))
    for i, count in enumerate(counts.tolist()):
        alone = vit(batch[i : i + 1], lora, keep=order[i : i + 1, :count].sort(1).values)
        torch.testing.assert_close(packed[i], alone[0], rtol=0, atol=1e-5)


def test_pruning_then_is_keeping_before(vit):
    """Block 0's survivors alone, where block 0 does nothing but choose."""
    for block in list(vit.blocks)[:1]:
        for linear in (block.proj, block.fc2):
            linear.weight.zero_(), linear.bias.zero_()
    batch = images(vit.config)
    out = vit.encode(batch, prune={0: 0.5})
    assert out.kept.shape == (2, vit.config.patches - vit.config.patches // 2)
    torch.testing.assert_close(out.features, vit(batch, keep=out.kept), rtol=0, atol=1e-5)


def test_flops_count_attention_pooling():
    config = ViTConfig(pool="map", prefix_tokens=0)
    plain = dataclasses.replace(config, pool="norm_mean")
    more = 3 * (2 * 196 * 768**2 + 768**2 + 2 * 768 * 3072 + 4 * 196 * 768) / 1e9
    assert flops(config) - flops(plain) == pytest.approx(more)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": "max"}, 'pool: must be one of "cls"'),
        ({"rope": "cat"}, 'rope: must be one of "none", "dinov3"'),
        ({"registers": 2}, r"registers: must be in \[0, prefix_tokens = 1\], got 2"),
        ({"prefix_tokens": 0}, 'pool: "cls" needs a CLS token'),
        ({"rope": "dinov3", "width": 36, "heads": 6}, "multiple of 4, got 6"),
    ],
)
def test_config_says_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**fields)


# ------------------------------------------------------------------ merged


def test_merged_backbone_has_the_same_features(vit):
    lora = LoRA.init(vit.config, targets=("q", "k", "v", "proj", "fc1", "fc2"))
    for b in lora.b.values():
        b.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    batch = images(vit.config)
    before = vit(batch)
    merged = vit.merged(lora)
    torch.testing.assert_close(merged(batch), vit(batch, lora), rtol=0, atol=2e-5)
    assert torch.equal(vit(batch), before)


# ------------------------------------------------------------------ the whole method


@pytest.mark.parametrize("per", ["batch", "image"])  # image: ragged, so packed
@pytest.mark.parametrize(
    "fields",
    [
        {"prefix_tokens": 0, "pool": "map", "activation": "gelu_tanh"},
        {"prefix_tokens": 3, "registers": 2, "layer_scale": True, "rope": "dinov3"},
        {"prefix_tokens": 2, "registers": 2, "qk_norm": True, "pool": "mean_norm",
         "image_size": 18, "patch_size": 6},
    ],
    ids=["siglip", "dinov3", "averaged"],
)  # fmt: skip
def test_recycling(fields, per, tmp_path):
    config = dataclasses.replace(toys.CONFIG, **fields)
    meta = MetaConfig(steps=2, ways=3, shots=1, queries=2, rank=2, sparsity=0.5, sparsity_per=per)
    inversion = InversionConfig(
        images_per_class=4, iterations=3, group=2, prune={1: 0.5}, prune_from=0.4
    )
    recycler = MetaLoRARecycler(
        toys.vit(config), toys.bank(2, config=config), prior=toys.prior(), inversion=inversion,
        meta=meta, device="cpu", quiet=True,
    )  # fmt: skip
    lora = recycler.run(tmp_path)
    assert all(b.any() for b in lora.b.values())
    clf = FewShotClassifier(recycler.vit, lora)
    labels = ["a", "a", "b", "b"]
    size = config.image_size
    pixels = torch.cat((torch.zeros(2, 3, size, size), torch.ones(2, 3, size, size)))
    assert clf.fit(pixels, labels).predict(pixels).tolist() == labels

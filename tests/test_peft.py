"""LoRAs of the real PEFT on the real libraries' models, read and written."""

import contextlib
import dataclasses
import functools
import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastrecycle.lora import Head, LoRA, LoRABank, LoRAStack
from fastrecycle.vit import ViT
from fastrecycle.vit_config import ViTConfig

peft = pytest.importorskip("peft", reason="needs the real PEFT")
transformers = pytest.importorskip("transformers", reason="needs the real models")

SIDE, PATCH, WIDTH, MLP, DEPTH, HEADS, OUT = 32, 8, 48, 96, 3, 3, 24
SHAPE = {
    "image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "mlp_dim": MLP, "depth": DEPTH,
    "heads": HEADS,
}  # fmt: skip
HF = {
    "image_size": SIDE, "patch_size": PATCH, "hidden_size": WIDTH, "intermediate_size": MLP,
    "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
}  # fmt: skip
CLIP = ViTConfig(
    **SHAPE, out_dim=OUT, activation="quick_gelu", norm_eps=1e-5, pre_norm=True, patch_bias=False
)
PLAIN = ViTConfig(**SHAPE, norm_eps=1e-6)
TOLERANCE = 1e-4  # absolute, float32, features of order 1


def hf_clip():
    config = transformers.CLIPVisionConfig(**HF, projection_dim=OUT, hidden_act="quick_gelu")
    model = transformers.CLIPVisionModelWithProjection(config)
    return model, lambda m, x: m(pixel_values=x).image_embeds, CLIP


def hf_vit():
    model = transformers.ViTModel(
        transformers.ViTConfig(**HF, layer_norm_eps=1e-6), add_pooling_layer=False
    )
    return model, lambda m, x: m(pixel_values=x).last_hidden_state[:, 0], PLAIN


def hf_vit_classifier():
    config = transformers.ViTConfig(**HF, layer_norm_eps=1e-6, num_labels=5)
    model = transformers.ViTForImageClassification(config)
    return model, lambda m, x: m(pixel_values=x).logits, PLAIN


def timm_vit():
    timm = pytest.importorskip("timm", reason="needs the real models")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
        mlp_ratio=MLP / WIDTH, num_classes=5,
    )  # fmt: skip
    return model, lambda m, x: m(x), PLAIN


def open_clip_visual():
    transformer = pytest.importorskip("open_clip.transformer", reason="needs the real models")
    model = transformer.VisionTransformer(
        image_size=SIDE, patch_size=PATCH, width=WIDTH, layers=DEPTH, heads=HEADS,
        mlp_ratio=MLP / WIDTH, output_dim=OUT, act_layer=transformer.QuickGELU,
    )  # fmt: skip
    return model, lambda m, x: m(x), CLIP


def hf_siglip():
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF))
    config = dataclasses.replace(PLAIN, prefix_tokens=0, pool="map", activation="gelu_tanh")
    return model, lambda m, x: m(pixel_values=x).pooler_output, config


def hf_dinov2():
    fields = {k: v for k, v in HF.items() if k != "intermediate_size"} | {"mlp_ratio": MLP // WIDTH}
    config = transformers.Dinov2WithRegistersConfig(**fields, num_register_tokens=2)
    model = transformers.Dinov2WithRegistersModel(config)
    ours = dataclasses.replace(PLAIN, prefix_tokens=3, registers=2, layer_scale=True)
    return model, lambda m, x: m(pixel_values=x).pooler_output, ours


def hf_dinov3():
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**HF, num_register_tokens=2))
    ours = dataclasses.replace(
        PLAIN, prefix_tokens=3, registers=2, layer_scale=True, rope="dinov3", norm_eps=1e-5
    )
    return model, lambda m, x: m(pixel_values=x).pooler_output, ours


def timm_dinov3():
    timm = pytest.importorskip("timm", reason="needs the real models")
    model = timm.create_model(
        "vit_base_patch16_dinov3", img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH,
        num_heads=HEADS, mlp_ratio=MLP / WIDTH, num_classes=0, global_pool="token",
    )  # fmt: skip
    ours = dataclasses.replace(
        PLAIN, prefix_tokens=5, registers=4, layer_scale=True, rope="dinov3", norm_eps=1e-5,
        qkv_bias=False,
    )  # fmt: skip
    return model, lambda m, x: m(x), ours


TARGETS = {  # model -> (layout, target_modules, modules_to_save)
    hf_clip: ("hf_clip", ["q_proj", "v_proj", "out_proj", "fc1", "fc2"], None),
    hf_vit: ("hf_vit", ["q_proj", "v_proj"], None),
    hf_vit_classifier: ("hf_vit", ["q_proj", "k_proj", "o_proj", "fc1", "fc2"], ["classifier"]),
    timm_vit: ("timm", ["qkv", "attn.proj", "mlp.fc1", "fc2"], ["head"]),
    open_clip_visual: ("open_clip", ["attn", "c_fc", "c_proj"], None),
    hf_siglip: ("hf_clip", ["q_proj", "v_proj", "self_attn.out_proj"], None),
    hf_dinov2: ("hf_dinov2", ["q_proj", "v_proj", "o_proj", "fc1", "fc2"], None),
    hf_dinov3: ("hf_dinov3", ["q_proj", "v_proj", "up_proj"], None),
    timm_dinov3: ("timm", ["qkv", "attn.proj", "mlp.fc2"], None),
}
MODELS = pytest.mark.parametrize("make", list(TARGETS), ids=lambda make: make.__name__)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@functools.cache
def out_proj_times():
    """How often the installed PEFT adds the LoRA on out_proj of nn.MultiheadAttention."""
    attention = nn.MultiheadAttention(4, 1, bias=False)
    x, weight = torch.eye(4), attention.out_proj.weight.detach().clone()
    options = peft.LoraConfig(r=4, lora_alpha=4, target_modules="attn", init_lora_weights=False)
    wrapped = peft.get_peft_model(nn.ModuleDict({"attn": attention}), options)
    layer = wrapped.base_model.model["attn"]
    nn.init.zeros_(layer.lora_B["default"].weight)
    delta = attention.out_proj.get_delta_weight("default").detach()
    values = x @ attention.in_proj_weight[8:].detach().T  # one token: attention passes v on
    y = torch.cat([layer(t[None], t[None], t[None])[0] for t in x]).detach()
    times = (y - values @ weight.T).norm() / (values @ delta.T).norm()
    return round(times.item())


def build(make):
    """A random model, its state dict before PEFT renames it, its output, our config."""
    model, output, config = make()
    model.eval()
    for name, p in model.named_parameters():  # zero embeddings and biases would hide mistakes
        if p.ndim < 3 and "norm" not in name and "ln_" not in name:
            nn.init.normal_(p, std=0.15)
    return model, {k: v.clone() for k, v in model.state_dict().items()}, output, config


def train(model, output, images, config, path, steps=3):
    """A LoRA by the real PEFT: a few steps of Adam, then save_pretrained."""
    wrapped = peft.get_peft_model(model, config).eval()
    optimiser = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        y = output(wrapped, images)
        (y - torch.randn_like(y)).square().mean().backward()
        optimiser.step()
    wrapped.save_pretrained(str(path))
    file = path / "adapter_config.json"
    told = json.loads(file.read_text()) | {"out_proj_times": out_proj_times()}
    if told.get("peft_version", "") >= "0.22":  # a later PEFT: LoRA.load asks for this
        file.write_text(json.dumps(told))
    return output(wrapped, images).detach()


def through_ours(state, config, lora, images):
    vit = ViT.from_state_dict(state, config)
    features = vit(images, lora.fit(config))
    return features if lora.head is None else lora.head(features)


def through_peft(make, state, path, images):
    if make is open_clip_visual and out_proj_times() != 2:
        pytest.skip("written for PEFT releases that add the LoRA on out_proj twice")
    model, output, _ = make()
    model.load_state_dict(state)
    return output(peft.PeftModel.from_pretrained(model, str(path)).eval(), images).detach()


@MODELS
def test_lora_of_peft_gives_the_same_output(make, images, tmp_path):
    layout, targets, to_save = TARGETS[make]
    model, state, output, config = build(make)
    before = output(model, images).detach()
    wanted = train(
        model, output, images,
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, modules_to_save=to_save),
        tmp_path,
    )  # fmt: skip
    lora = LoRA.load(tmp_path)
    assert lora.layout == layout
    assert (lora.head is None) == (to_save is None)
    got = through_ours(state, config, lora, images)
    assert (wanted - before).abs().max() > 0.1  # the LoRA does something
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


@MODELS
def test_save_loads_in_peft_with_the_same_output(make, images, tmp_path):
    _, targets, to_save = TARGETS[make]
    model, state, output, config = build(make)
    wanted = train(
        model, output, images,
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, modules_to_save=to_save),
        tmp_path / "peft",
    )  # fmt: skip
    LoRA.load(tmp_path / "peft").save(tmp_path / "ours")
    got = through_peft(make, state, tmp_path / "ours", images)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
    again = LoRA.load(tmp_path / "ours")
    torch.testing.assert_close(
        through_ours(state, config, again, images), wanted, rtol=0, atol=TOLERANCE
    )


def mixed_lora(config, head=None, names=None):
    """Trained-looking LoRA: q of all blocks, v of two at another rank and alpha, fc1 of one."""
    generator = torch.Generator().manual_seed(3)
    lora = LoRA.init(config, rank=4, alpha=6, targets=("q", "v", "proj", "fc1"))
    ranks = {"q": (4, 4, 4), "v": (2, 0, 2), "proj": (1, 3, 1), "fc1": (0, 2, 0)}
    alpha = {"q": 6.0, "v": 3.0, "proj": 1.0, "fc1": 0.7}
    for t, rank in ranks.items():
        lora.b[t].normal_(generator=generator)
        for i, r in enumerate(rank):
            lora.a[t][i, r:] = 0
            lora.b[t][i, :, r:] = 0
            lora.scale[t][i] = alpha[t] / r if r else 0
    return dataclasses.replace(lora, ranks=ranks, head=head, class_names=names)


@pytest.mark.parametrize(
    ("layout", "make", "prefix"),
    [
        ("hf_clip", hf_clip, None),
        ("hf_vit", hf_vit, None),
        ("hf_vit", hf_vit_classifier, "vit."),
        ("timm", timm_vit, None),
        ("timm", timm_dinov3, None),
        ("hf_clip", hf_siglip, ""),
        ("hf_dinov2", hf_dinov2, None),
        ("hf_dinov3", hf_dinov3, None),
        ("open_clip", open_clip_visual, ""),
    ],
)
def test_mixed_ranks_load_in_peft_with_the_same_output(layout, make, prefix, images, tmp_path):
    _, state, _, config = build(make)
    lora = mixed_lora(config)
    lora = dataclasses.replace(lora, layout=layout, prefix=prefix)
    lora.save(tmp_path)
    tops = [k for k in state if k.startswith("classifier.") or k in ("head.weight", "head.bias")]
    head = {k.rpartition(".")[2]: state[k] for k in tops}
    theirs = dataclasses.replace(lora, head=Head(head["weight"], head["bias"]) if head else None)
    wanted = through_ours(state, config, theirs, images)
    got = through_peft(make, state, tmp_path, images)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())
    again = LoRA.load(tmp_path)
    assert again.ranks == lora.ranks
    for t in lora.a:
        torch.testing.assert_close(again.delta(t), lora.delta(t))


@pytest.mark.parametrize("make", [hf_clip, timm_vit], ids=lambda make: make.__name__)
def test_patterns_and_rslora_match_peft(make, images, tmp_path):
    model, state, output, config = build(make)
    attention = "attn.qkv" if make is timm_vit else "q_proj"
    targets = ["mlp.fc1", attention, "mlp.fc2"]
    if make is timm_vit:  # layers_to_transform needs a name before the list of blocks
        some = {"target_modules": [f"blocks.{i}.{t}" for i in range(2) for t in targets]}
    else:
        some = {"target_modules": targets, "layers_to_transform": [0, 1]}
    options = peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, **some,  # depth is not to be had from the file
        rank_pattern={attention: 2, r"1\.mlp\.fc1": 6}, alpha_pattern={"fc2": 9},
    )  # fmt: skip
    if make is timm_vit:
        model.head = nn.Identity()
    wanted = train(model, output, images, options, tmp_path)
    lora = LoRA.load(tmp_path)
    assert lora.depth == 2
    assert lora.ranks["fc1"] == (4, 6)
    assert lora.ranks["q"] == (2, 2)
    assert lora.scale["fc2"].tolist() == pytest.approx([9 / 2, 9 / 2])
    state = {k: v for k, v in state.items() if not k.startswith("head.")}
    got = through_ours(state, config, lora, images)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match=r"2 blocks.*3.*fit"):
        ViT(config)(images, lora)
    lora.save(tmp_path / "again")  # rsLoRA becomes a plain alpha
    assert LoRA.load(tmp_path / "again").scale["fc2"].tolist() == lora.scale["fc2"].tolist()


@pytest.mark.parametrize("make", [hf_vit, timm_dinov3], ids=lambda make: make.__name__)
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_is_exact_with_its_backbone(make, rslora, images, tmp_path):
    model, state, output, config = build(make)
    _, targets, _ = TARGETS[make]
    options = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[*targets, "fc1"], use_dora=True, use_rslora=rslora
    )
    wanted = train(model, output, images, options, tmp_path)
    vit = ViT.from_state_dict(state, config)
    with pytest.raises(ValueError, match=r"DoRA.*LoRA\.load\(path, vit\)"):
        LoRA.load(tmp_path)
    lora = LoRA.load(tmp_path, vit)
    assert lora.ranks["q"] == (WIDTH,) * DEPTH
    torch.testing.assert_close(vit(images, lora), wanted, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(vit.merged(lora)(images), wanted, rtol=0, atol=TOLERANCE)
    plain = vit(images)
    assert (vit(images, lora.compress(8)) - wanted).norm() < (plain - wanted).norm()
    other = ViT.random(dataclasses.replace(config, width=2 * WIDTH))
    with pytest.raises(ValueError, match="the backbone is another model"):
        LoRA.load(tmp_path, other)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(k for k in tensors if "magnitude" in k)
    save_file(
        {k: v for k, v in tensors.items() if k != name}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="no magnitude"):
        LoRA.load(tmp_path, vit)


def test_dora_of_multihead_attention_is_refused(tmp_path):
    config = dataclasses.replace(CLIP, width=8, heads=2, depth=1, mlp_dim=8)
    tensors = factors(["transformer.resblocks.0.attn"])
    tensors["base_model.model.transformer.resblocks.0.attn.lora_magnitude_vector"] = torch.ones(24)
    path = folder(tmp_path, tensors, use_dora=True)
    with pytest.raises(ValueError, match=r"DoRA on nn\.MultiheadAttention"):
        LoRA.load(path, ViT.random(config))


def test_peft_cannot_target_part_of_multihead_attention_but_we_can(images, tmp_path):
    _, state, _, config = build(open_clip_visual)
    lora = LoRA.init(config, rank=2, targets=("q", "v"))
    for t in lora.b:
        lora.b[t].normal_()
    lora = dataclasses.replace(lora, prefix="", layout="open_clip")
    lora.save(tmp_path)
    got = through_peft(open_clip_visual, state, tmp_path, images)
    wanted = through_ours(state, config, lora, images)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
    # PEFT drops our metadata when it saves; idle parts are still recognised
    model, _, _ = open_clip_visual()
    peft.PeftModel.from_pretrained(model, str(tmp_path)).save_pretrained(str(tmp_path / "theirs"))
    again = LoRA.load(tmp_path / "theirs")
    assert again.ranks == lora.ranks
    torch.testing.assert_close(again.a, lora.a)
    torch.testing.assert_close(again.b, lora.b)


def test_out_proj_of_multihead_attention_counts_as_often_as_peft_adds_it(tmp_path):
    module = "transformer.resblocks.0.attn"
    tensors = factors([module]) | factors([f"{module}.base_layer.out_proj"])
    path = folder(tmp_path, tensors, peft_version="0.21.2")
    assert LoRA.load(path).scale["proj"].item() == 2 * LoRA.load(path).scale["q"].item() == 4
    folder(tmp_path, tensors, peft_version="0.40.0")
    with pytest.raises(ValueError, match="out_proj_times"):
        LoRA.load(path)
    folder(tmp_path, tensors, peft_version="0.40.0", out_proj_times=1)
    assert LoRA.load(path).scale["proj"].item() == 2


def test_untrained_lora_keeps_its_ranks_through_fused_layouts(tmp_path):
    lora = LoRA.init(PLAIN, rank=3, alpha=2, targets=("q", "v", "fc1"), blocks=[0, 1])
    for layout in ("timm", "open_clip", "hf_vit", "hf_vit_v4", "hf_clip"):
        lora.save(tmp_path / layout, layout)
        again = LoRA.load(tmp_path / layout)
        assert again.ranks == lora.ranks, layout
        torch.testing.assert_close(again.a, lora.a, rtol=0, atol=0)
        torch.testing.assert_close(again.scale, lora.scale)


def test_untrained_fused_lora_of_peft_keeps_its_rank(images, tmp_path):
    model, _, output, _ = build(timm_vit)
    train(model, output, images, peft.LoraConfig(r=3, target_modules=["qkv"]), tmp_path, steps=0)
    assert LoRA.load(tmp_path).ranks == {t: (3,) * DEPTH for t in ("q", "k", "v")}


# ---------------------------------------------------------------------------- names


def factors(modules, d_in=8, d_out=8, rank=2, prefix="base_model.model."):
    out = {}
    for m in modules:
        rows = 3 * d_out if m.endswith(("qkv", ".attn")) else d_out
        out[f"{prefix}{m}.lora_A.weight"] = torch.randn(rank, d_in)
        out[f"{prefix}{m}.lora_B.weight"] = torch.randn(rows, rank)
    return out


def folder(path, tensors, metadata=None, **config):
    Path(path).mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (Path(path) / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, Path(path) / "adapter_model.safetensors", metadata)
    return Path(path)


@pytest.mark.parametrize(
    ("module", "layout", "prefix", "targets"),
    [
        ("vision_model.encoder.layers.2.self_attn.k_proj", "hf_clip", "vision_model.", "k"),
        ("encoder.layers.2.self_attn.out_proj", "hf_clip", "", "proj"),
        ("clip.vision_model.encoder.layers.2.mlp.fc2", "hf_clip", "clip.vision_model.", "fc2"),
        ("vit.layers.2.attention.o_proj", "hf_vit", "vit.", "proj"),
        ("deit.layers.2.mlp.fc1", "hf_vit", "deit.", "fc1"),
        ("encoder.layer.2.attention.attention.query", "hf_vit_v4", "", "q"),
        ("vit.encoder.layer.2.attention.output.dense", "hf_vit_v4", "vit.", "proj"),
        ("vit.encoder.layer.2.intermediate.dense", "hf_vit_v4", "vit.", "fc1"),
        ("vit.encoder.layer.2.output.dense", "hf_vit_v4", "vit.", "fc2"),
        ("blocks.2.attn.qkv", "timm", "", "qkv"),
        ("model.blocks.2.mlp.fc2", "timm", "model.", "fc2"),
        ("visual.transformer.resblocks.2.attn", "open_clip", "visual.", "qkv"),
        ("transformer.resblocks.2.attn.out_proj", "open_clip", "", "proj"),
        ("transformer.resblocks.2.mlp.c_fc", "open_clip", "", "fc1"),
    ],
)
def test_module_names(module, layout, prefix, targets, tmp_path):
    lora = LoRA.load(folder(tmp_path, factors([module])))
    targets = list(targets) if targets == "qkv" else [targets]
    assert (lora.layout, lora.prefix, list(lora.a)) == (layout, prefix, targets)
    assert lora.depth == 3
    assert all(lora.ranks[t] == (0, 0, 2) for t in targets)
    assert all(lora.scale[t].tolist() == [0, 0, 2] for t in targets)
    assert lora.name == tmp_path.name


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("vision_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"),
        ("visual.transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.0.attn"),
        ("visual.transformer.resblocks.0.mlp.c_fc", "text.transformer.resblocks.0.mlp.c_fc"),
        ("vision_model.encoder.layers.0.mlp.fc1", "text_projection"),
    ],
)
def test_text_tower_is_left_out_with_a_warning(image, text, tmp_path, caplog):
    folder(tmp_path, factors([image]) | factors([text], 12, 12))
    with caplog.at_level(logging.WARNING):
        lora = LoRA.load(tmp_path)
    assert "text tower" in caplog.text
    assert len(lora.a) == 1
    assert lora.depth == 1
    folder(tmp_path, factors([text]), auto_mapping={"base_model_class": "CLIP"})
    with pytest.raises(ValueError, match="text tower alone"):
        LoRA.load(tmp_path)


def test_rejects_unknown_modules_and_lists_them(tmp_path):
    folder(tmp_path, factors(["blocks.0.attn.qkv", "patch_embed.proj", "blocks.0.attn.rope"]))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.rope, patch_embed\.proj.*attn\.qkv"):
        LoRA.load(tmp_path)


def test_rejects_two_models_at_once(tmp_path):
    folder(tmp_path, factors(["blocks.0.mlp.fc1", "vit.layers.0.mlp.fc2"]))
    with pytest.raises(ValueError, match="several models"):
        LoRA.load(tmp_path)


def test_lora_of_transformers_4_moves_to_the_names_of_5(images, tmp_path):
    model, state, output, config = build(hf_vit_classifier)
    _, targets, to_save = TARGETS[hf_vit_classifier]
    options = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=to_save)
    wanted = train(model, output, images, options, tmp_path / "new")
    LoRA.load(tmp_path / "new").save(tmp_path / "old", "hf_vit_v4")
    keys = load_file(tmp_path / "old/adapter_model.safetensors")
    assert "base_model.model.vit.encoder.layer.0.output.dense.lora_A.weight" in keys
    assert "base_model.model.classifier.weight" in keys
    old = LoRA.load(tmp_path / "old")
    got = through_ours(state, config, old, images)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
    old.save(tmp_path / "again", "hf_vit")
    got = through_peft(hf_vit_classifier, state, tmp_path / "again", images)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


def test_half_precision_becomes_float32(tmp_path):
    tensors = factors(["blocks.0.mlp.fc1"])
    for dtype in (torch.float16, torch.bfloat16):
        folder(tmp_path, {k: v.to(dtype) for k, v in tensors.items()})
        lora = LoRA.load(tmp_path)
        assert lora.a["fc1"].dtype == torch.float32
        torch.testing.assert_close(
            lora.a["fc1"][0], next(iter(tensors.values())), rtol=1e-2, atol=1e-2
        )


# ---------------------------------------------------------------------------- variants, bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "LORA"),
        ({"peft_type": None}, "LORA"),
        ({"use_dora": True}, "DoRA"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "base weights"),
        ({"r": "four"}, "r must be"),
        ({"r": 4}, "rank 2.*says 4"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": {"fc1": None}}, "rank_pattern"),
        ({"rank_pattern": {"(fc1": 2}}, "pattern"),
    ],
)
def test_rejects_variants_that_are_not_plain_lora(options, message, tmp_path):
    folder(tmp_path, factors(["blocks.0.mlp.fc1"]), **options)
    with pytest.raises(ValueError, match=message):
        LoRA.load(tmp_path)


@pytest.mark.parametrize("kind", ["dora", "ia3", "bias"])
def test_rejects_real_folders_of_other_kinds(kind, images, tmp_path):
    model, _, output, _ = build(hf_vit)
    config = {
        "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "bias": lambda: peft.LoraConfig(target_modules=["q_proj"], bias="lora_only"),
    }[kind]()
    train(model, output, images, config, tmp_path, steps=1)
    message = {"dora": "DoRA", "ia3": "IA3", "bias": 'biases.*bias="none"'}[kind]
    with pytest.raises(ValueError, match=message):
        LoRA.load(tmp_path)


def test_rejects_a_pickle_with_code_without_running_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "adapter_config.json").write_text('{"peft_type":"LORA","r":2,"lora_alpha":2}')
    for write in (lambda x, f: torch.save(x, f), lambda x, f: f.write_bytes(pickle.dumps(x))):
        write({"x": Evil()}, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match="weights_only"):
            LoRA.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_reads_adapter_model_bin(tmp_path):
    tensors = factors(["blocks.0.attn.qkv"])
    folder(tmp_path / "safe", tensors)
    folder(tmp_path / "bin", tensors)
    (tmp_path / "bin/adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "bin/adapter_model.bin")
    a, b = LoRA.load(tmp_path / "safe"), LoRA.load(tmp_path / "bin")
    torch.testing.assert_close(a.a, b.a, rtol=0, atol=0)
    torch.save([1, 2], tmp_path / "bin/adapter_model.bin")
    with pytest.raises(ValueError, match="state dict"):
        LoRA.load(tmp_path / "bin")
    (tmp_path / "bin/adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        LoRA.load(tmp_path / "bin")


def test_rejects_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="PEFT folder"):
        LoRA.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        LoRA.load(tmp_path)
    file = folder(tmp_path, factors(["blocks.0.mlp.fc1"])) / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"<html>not found</html>"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="safetensors"):
            LoRA.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        LoRA.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        LoRA.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["blocks.0.mlp.fc1.lora_A.weight"].fill_(float("nan")), "NaN"),
        (lambda x: x["blocks.0.mlp.fc1.lora_B.weight"].fill_(float("inf")), "NaN"),
        (lambda x: x.pop("blocks.0.mlp.fc1.lora_B.weight"), "alone"),
        (lambda x: x.update({"blocks.0.mlp.fc1.lora_B.weight": torch.zeros(8, 3)}), "lora_B"),
        (lambda x: x.update({"blocks.0.mlp.fc1.lora_B.weight": torch.zeros(8)}), "lora_B"),
        (lambda x: x.update({"blocks.0.mlp.fc1.lora_B.weight": torch.ones(8, 2).int()}), "float"),
        (lambda x: x.update(factors(["blocks.1.mlp.fc1"], 12, 12, prefix="")), "same"),
        (lambda x: x.update(factors(["blocks.1.attn.qkv"], 8, 12, prefix="")), "24 rows"),
        (lambda x: x.update({"blocks.0.norm1.weight": torch.ones(8)}), r"norm1.*backbone"),
        (lambda x: x.update({"blocks.0.mlp.fc1.lora_magnitude_vector": torch.ones(8)}), "unknown"),
        (lambda x: x.clear(), "no LoRA factors"),
    ],
)
def test_rejects_damaged_tensors(change, message, tmp_path):
    tensors = factors(["blocks.0.mlp.fc1"], prefix="")
    change(tensors)
    folder(tmp_path, tensors)
    with pytest.raises(ValueError, match=message):
        LoRA.load(tmp_path)


def test_rejects_damaged_metadata(tmp_path):
    tensors = factors(["blocks.0.attn.qkv"])
    for own in (
        "{",
        "[]",
        '{"depth": 1, "ranks": {"q": [1], "k": [1], "v": [1]}}',
        '{"depth": 2, "ranks": {"q": [2]}}',
        '{"depth": 1, "ranks": {"q": [2]}}',
    ):
        folder(tmp_path, tensors, {"fastrecycle": own})
        with pytest.raises(ValueError, match="damaged metadata"):
            LoRA.load(tmp_path)


def test_rejects_another_width(tmp_path):
    lora = LoRA.load(folder(tmp_path, factors(["blocks.0.mlp.fc1"])))
    with pytest.raises(ValueError, match=r"8 -> 8.*48.*another model"):
        lora.fit(PLAIN)


# ---------------------------------------------------------------------------- heads


def with_head(path, name="classifier", classes=3, **config):
    tensors = factors(["blocks.0.mlp.fc1"])
    tensors |= {
        f"base_model.model.{name}.weight": torch.randn(classes, 8),
        f"base_model.model.{name}.bias": torch.randn(classes),
    }
    return folder(path, tensors, modules_to_save=[name], **config), tensors


@pytest.mark.parametrize("name", ["classifier", "head", "fc", "score", "model.classifier"])
def test_head_from_modules_to_save(name, tmp_path):
    path, tensors = with_head(tmp_path, name)
    lora = LoRA.load(path)
    assert torch.equal(lora.head.weight, tensors[f"base_model.model.{name}.weight"])
    assert torch.equal(lora.head.bias, tensors[f"base_model.model.{name}.bias"])
    assert lora.class_names is None
    lora.save(tmp_path / "again")
    saved = load_file(tmp_path / "again/adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.model.{name}.weight"], lora.head.weight)
    lora.save(tmp_path / "elsewhere", "hf_vit")  # another model may lack that module
    saved = load_file(tmp_path / "elsewhere/adapter_model.safetensors")
    assert f"base_model.model.{name}.weight" not in saved
    assert torch.equal(LoRA.load(tmp_path / "elsewhere").head.weight, lora.head.weight)


def test_head_beside_the_adapter_with_names(tmp_path):
    folder(tmp_path, factors(["blocks.0.mlp.fc1"]))
    file = tmp_path / "head.safetensors"
    save_file({"weight": torch.ones(2, 8)}, file, {"class_names": '["ant", "bee"]'})
    lora = LoRA.load(tmp_path)
    assert lora.class_names == ("ant", "bee")
    assert lora.head.bias is None
    save_file({"weight": torch.ones(2, 8)}, file)
    assert LoRA.load(tmp_path).class_names is None
    (tmp_path / "class_names.json").write_text('["cat", "dog"]')
    assert LoRA.load(tmp_path).class_names == ("cat", "dog")


def test_class_names_from_id2label(tmp_path):
    path, _ = with_head(tmp_path, id2label={"0": "x", "2": "z", "1": "y"})
    assert LoRA.load(path).class_names == ("x", "y", "z")
    with_head(path)
    (path / "config.json").write_text('{"id2label": {"0": "a", "1": "b", "2": "c"}}')
    assert LoRA.load(path).class_names == ("a", "b", "c")
    (path / "config.json").write_text(
        '{"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}'
    )
    assert LoRA.load(path).class_names is None  # stand-ins would make all tasks' classes the same
    (path / "config.json").write_text('{"id2label": {"0": "a", "5": "b", "2": "c"}}')
    with pytest.raises(ValueError, match="id2label"):
        LoRA.load(path)


def test_rejects_a_head_whose_classes_disagree_with_the_names(tmp_path):
    path, _ = with_head(tmp_path)
    (path / "class_names.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match=r"3 classes.*names 2"):
        LoRA.load(path)
    (path / "class_names.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="list"):
        LoRA.load(path)
    (path / "class_names.json").unlink()
    save_file({"weight": torch.ones(4, 8)}, path / "head.safetensors")
    with pytest.raises(ValueError, match="differ"):
        LoRA.load(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"bias": torch.ones(3)}, "weight"),
        ({"weight": torch.ones(3)}, "weight"),
        ({"weight": torch.ones(3, 8), "scale": torch.ones(3)}, "weight"),
        ({"weight": torch.ones(3, 8), "bias": torch.ones(2)}, "bias"),
        ({"weight": torch.full((3, 8), float("nan"))}, "NaN"),
    ],
)
def test_rejects_damaged_heads(tensors, message, tmp_path):
    folder(tmp_path, factors(["blocks.0.mlp.fc1"]))
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=message):
        LoRA.load(tmp_path)


def test_missing_head_says_how_to_add_one(tmp_path):
    lora = LoRA.load(folder(tmp_path / "mine", factors(["blocks.0.mlp.fc1"])))
    assert lora.head is None
    with pytest.raises(ValueError, match=r"mine: has no head.*head\.safetensors.*modules_to_save"):
        lora.require_head()


def test_head_on_mean_patches_is_left_out_with_a_warning(tmp_path, caplog):
    path, _ = with_head(tmp_path, auto_mapping={"base_model_class": "CLIPForImageClassification"})
    with caplog.at_level(logging.WARNING):
        assert LoRA.load(path).head is None
    assert "mean of the patches" in caplog.text


# ---------------------------------------------------------------------------- writing


def test_save_in_half_precision(tmp_path):
    lora = mixed_lora(PLAIN, Head(torch.randn(2, WIDTH), torch.randn(2)), ("a", "b"))
    lora.save(tmp_path, dtype=torch.float16)
    assert load_file(tmp_path / "adapter_model.safetensors").popitem()[1].dtype == torch.float16
    again = LoRA.load(tmp_path)
    assert again.class_names == ("a", "b")
    for t in lora.a:
        torch.testing.assert_close(again.delta(t), lora.delta(t), rtol=1e-2, atol=1e-2)
    lora.b["q"][0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"beyond torch\.float16"):
        lora.save(tmp_path, dtype=torch.float16)
    assert LoRA.load(tmp_path).ranks == lora.ranks  # the old one is whole


def test_save_replaces_an_older_lora_entirely(tmp_path):
    head = Head(torch.randn(2, WIDTH), torch.randn(2))
    mixed_lora(PLAIN, head, ("a", "b")).save(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    LoRA.init(PLAIN, targets=("k",)).save(tmp_path)
    lora = LoRA.load(tmp_path)
    assert (list(lora.a), lora.head, lora.class_names) == (["k"], None, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("stop", range(1, 8))
def test_interrupted_save_leaves_nothing_mixed(stop, tmp_path, monkeypatch):
    import fastrecycle.files as files

    old = mixed_lora(PLAIN, Head(torch.zeros(2, WIDTH)), ("a", "b"))
    new = LoRA.init(PLAIN, rank=2, alpha=9, seed=5)
    new = dataclasses.replace(new, head=Head(torch.ones(4, WIDTH)))
    old.save(tmp_path)
    calls = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= stop:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(files.os, "replace", dying(files.os.replace))
    monkeypatch.setattr(files.os, "fsync", dying(files.os.fsync))
    with contextlib.suppress(OSError):
        new.save(tmp_path)
    monkeypatch.undo()
    try:
        found = LoRA.load(tmp_path)
    except FileNotFoundError:
        return  # a folder that says it holds none
    assert found.ranks in (old.ranks, new.ranks)
    assert found.head.classes == (2 if found.ranks == old.ranks else 4)


def test_rejects_unknown_layouts_and_empty_loras(tmp_path):
    lora = LoRA.init(PLAIN)
    with pytest.raises(ValueError, match="hf_clip"):
        lora.save(tmp_path, "keras")
    with pytest.raises(ValueError, match="nothing to write"):
        LoRA.init(PLAIN, blocks=[]).save(tmp_path)


def test_bank_round_trip_with_mixed_everything(tmp_path):
    heads = [Head(torch.randn(c, WIDTH), torch.randn(c) if c > 3 else None) for c in (2, 5)]
    loras = [
        mixed_lora(PLAIN, heads[0], ("ant", "bee")),
        dataclasses.replace(LoRA.init(PLAIN, 8, 16, ("q", "k", "fc2"), seed=1), head=heads[1]),
        dataclasses.replace(LoRA.init(PLAIN, 1, seed=2), layout="hf_vit", prefix="vit."),
    ]
    bank = LoRABank(loras)
    bank.save(tmp_path / "bank")
    again = LoRABank.load(tmp_path / "bank")
    assert [x.name for x in again] == ["0000", "0001", "0002"]
    assert again[2].prefix == "vit."
    again.check(PLAIN)
    for x, y in zip(bank, again, strict=True):
        assert (x.ranks, x.class_names) == (y.ranks, y.class_names)
        assert (x.head is None) == (y.head is None)
        if x.head is not None:
            torch.testing.assert_close(vars(x.head), vars(y.head), rtol=0, atol=0)
        for t in x.a:
            torch.testing.assert_close(x.delta(t), y.delta(t))
    again.save(tmp_path / "bank")  # the same names: an update
    with pytest.raises(FileExistsError, match="other LoRAs"):
        again[:2].save(tmp_path / "bank")
    with pytest.raises(ValueError, match="no name"):
        LoRABank([dataclasses.replace(loras[0], name="../out")]).save(tmp_path / "bank")


def test_bank_names_the_damaged_member(tmp_path):
    LoRABank([LoRA.init(PLAIN), LoRA.init(PLAIN)]).save(tmp_path)
    (tmp_path / "0001/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="0001"):
        LoRABank.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="bank"):
        LoRABank.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no PEFT folder"):
        LoRABank.load(tmp_path / "empty")


def test_loras_of_peft_side_by_side_in_one_batch(images, tmp_path):
    """Different ranks and targets stacked: each image as under its own LoRA alone."""
    model, state, output, config = build(hf_clip)
    wanted = []
    for i, (r, targets) in enumerate([(2, ["q_proj", "v_proj"]), (5, ["k_proj", "fc1"])]):
        fresh, _, _ = hf_clip()
        fresh.load_state_dict(state)
        options = peft.LoraConfig(r=r, target_modules=targets)
        wanted.append(train(fresh.eval(), output, images, options, tmp_path / str(i)))
    wanted.append(output(model, images).detach())
    bank = LoRABank.load(tmp_path).fit(config)
    none = LoRA.init(config)  # b is zero
    vit = ViT.from_state_dict(state, config)
    index = torch.tensor([1, 2, 0])
    got = vit(images, LoRAStack.of([*bank, none]), lora_index=index)
    expected = torch.stack([wanted[g][i] for i, g in enumerate(index)])
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)

"""Whose tensor names mean what: one table a library's layout, read both ways."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

LayoutName = Literal[
    "native", "openai", "hf_clip", "hf_siglip", "hf_dinov2", "hf_dinov3", "hf_vit", "lvvit",
    "timm_eva", "timm",
]  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One way of naming a vision transformer's tensors.

    In `names` (ours -> theirs) `#` is a block's number and `*` is weight, bias or a BatchNorm
    buffer. "/" marks a tensor beside the vision tower instead of in it. Tokens of the prefix are
    apart, as are q, k and v where they have a matrix each; ".T" is stored transposed. "registers"
    are all in one tensor, "fc_norm" is a last norm that comes after pooling, and "pool.in_proj" is
    attention pooling's q, k, v in one.
    """

    marks: tuple[str, ...]  # tensors that give the layout away; the first one's prefix is the tower
    names: dict[str, str]
    ignored: str  # regular expression: heads, text towers, buffers, known and not needed
    older: tuple[tuple[str, str], ...] = ()  # (ours, theirs): other spellings, read only
    tower: str = ""  # prefix of the tower when writing
    one_of: tuple[str, ...] = ()  # further marks, of which one is enough


_BLOCK = {f"blocks.#.{n}.*": f"blocks.#.{n}.*" for n in ("norm1", "norm2")}
_POOL = {
    "pool.probe": "attn_pool.latent",
    **{f"pool.{n}.*": f"attn_pool.{n}.*" for n in ("q", "kv", "proj", "norm")},
    **{f"pool.{n}.*": f"attn_pool.mlp.{n}.*" for n in ("fc1", "fc2")},
}
_TIMM_BLOCK = _BLOCK | {
    "blocks.#.qkv.*": "blocks.#.attn.qkv.*",
    "blocks.#.proj.*": "blocks.#.attn.proj.*",
    "blocks.#.fc1.*": "blocks.#.mlp.fc1.*",
    "blocks.#.fc2.*": "blocks.#.mlp.fc2.*",
    "norm.*": "norm.*",
}
_TIMM = {
    "patch_embed.*": "patch_embed.proj.*",
    "prefix.0": "cls_token",
    "registers": "reg_token",
    "pos_embed": "pos_embed",
    "pre_norm.*": "norm_pre.*",
    **_TIMM_BLOCK,
    "fc_norm.*": "fc_norm.*",
    **_POOL,
}
# timm keeps CLIP's projection as a classifier: ignored, so that the feature is what its head reads,
# as for every timm model. Beside the tower ("/") lie open_clip's text tower and scale.
_TIMM_IGNORED = (
    r"(head|head_dist|pre_logits\.fc)\.(weight|bias)"
    r"|/(text|transformer|token_embedding|ln_final)\..*"
    r"|/(positional_embedding|text_projection(\.\w+)?|logit_scale|logit_bias|attn_mask)"
)
_OPENAI_BLOCK = "transformer.resblocks.#"
_HF_CLIP_BLOCK = "encoder.layers.#"
_HF_VIT_BLOCK = "encoder.layer.#"
_HF_CLIP_BLOCKS = {
    "blocks.#.norm1.*": f"{_HF_CLIP_BLOCK}.layer_norm1.*",
    **{f"blocks.#.{n}.*": f"{_HF_CLIP_BLOCK}.self_attn.{n}_proj.*" for n in ("q", "k", "v")},
    "blocks.#.proj.*": f"{_HF_CLIP_BLOCK}.self_attn.out_proj.*",
    "blocks.#.norm2.*": f"{_HF_CLIP_BLOCK}.layer_norm2.*",
    **{f"blocks.#.{n}.*": f"{_HF_CLIP_BLOCK}.mlp.{n}.*" for n in ("fc1", "fc2")},
}
_HF_VIT_ATTENTION = {
    "blocks.#.q.*": f"{_HF_VIT_BLOCK}.attention.attention.query.*",
    "blocks.#.k.*": f"{_HF_VIT_BLOCK}.attention.attention.key.*",
    "blocks.#.v.*": f"{_HF_VIT_BLOCK}.attention.attention.value.*",
    "blocks.#.proj.*": f"{_HF_VIT_BLOCK}.attention.output.dense.*",
}
_DINOV3_BLOCK = (
    *((f"{n}.*", f"{n}.*") for n in ("norm1", "norm2")),
    *((f"{n}.*", f"attention.{n}_proj.*") for n in ("q", "k", "v")),
    ("proj.*", "attention.o_proj.*"),
    ("fc1.*", "mlp.up_proj.*"),
    ("fc2.*", "mlp.down_proj.*"),
    ("ls1", "layer_scale1.lambda1"),
    ("ls2", "layer_scale2.lambda1"),
)

LAYOUTS: dict[LayoutName, Layout] = {
    "native": Layout(
        marks=("patch_embed.weight", "prefix", "pos_embed"),
        names={
            "patch_embed.*": "patch_embed.*",
            "prefix": "prefix",
            "pos_embed": "pos_embed",
            "pre_norm.*": "pre_norm.*",
            **{f"stem.{i}.*": f"stem.{i}.*" for i in (0, 1, 3, 4, 6, 7)},
            **{
                f"blocks.#.{n}.*": f"blocks.#.{n}.*"
                for n in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2", "q_norm", "k_norm")
            },
            "blocks.#.ls1": "blocks.#.ls1",
            "blocks.#.ls2": "blocks.#.ls2",
            "pool.probe": "pool.probe",
            **{f"pool.{n}.*": f"pool.{n}.*" for n in ("q", "kv", "proj", "norm", "fc1", "fc2")},
            "norm.*": "norm.*",
            "head_proj.weight": "head_proj.weight",
        },
        ignored="(?!)",
    ),
    "openai": Layout(
        marks=("conv1.weight", "class_embedding"),
        names={
            "patch_embed.weight": "conv1.weight",
            "prefix.0": "class_embedding",
            "pos_embed": "positional_embedding",
            "pre_norm.*": "ln_pre.*",
            "blocks.#.norm1.*": f"{_OPENAI_BLOCK}.ln_1.*",
            # nn.MultiheadAttention and open_clip's own fused Attention name it alike
            "blocks.#.qkv.*": f"{_OPENAI_BLOCK}.attn.in_proj_*",
            "blocks.#.proj.*": f"{_OPENAI_BLOCK}.attn.out_proj.*",
            "blocks.#.norm2.*": f"{_OPENAI_BLOCK}.ln_2.*",
            "blocks.#.fc1.*": f"{_OPENAI_BLOCK}.mlp.c_fc.*",
            "blocks.#.fc2.*": f"{_OPENAI_BLOCK}.mlp.c_proj.*",
            "norm.*": "ln_post.*",
            "head_proj.T": "proj",
        },
        ignored=(
            r"/(transformer|token_embedding|ln_final|text)\..*"
            r"|/(positional_embedding|text_projection(\.\w+)?|logit_scale|logit_bias|attn_mask"
            r"|input_resolution|context_length|vocab_size)"
        ),
    ),
    "hf_clip": Layout(
        marks=("embeddings.class_embedding",),
        names={
            "patch_embed.weight": "embeddings.patch_embedding.weight",
            "prefix.0": "embeddings.class_embedding",
            "pos_embed": "embeddings.position_embedding.weight",
            "pre_norm.*": "pre_layrnorm.*",  # sic
            **_HF_CLIP_BLOCKS,
            "norm.*": "post_layernorm.*",
            "head_proj.weight": "/visual_projection.weight",
        },
        older=(("pre_norm.*", "pre_layernorm.*"),),
        ignored=(
            r"/?text_model\..*|/?(text_projection|classifier)\.(weight|bias)|/?logit_scale"
            r"|embeddings\.position_ids"
        ),
        tower="vision_model.",
    ),
    "hf_siglip": Layout(
        marks=("embeddings.patch_embedding.weight", "head.probe"),
        names={
            "patch_embed.*": "embeddings.patch_embedding.*",
            "pos_embed": "embeddings.position_embedding.weight",
            **_HF_CLIP_BLOCKS,
            "norm.*": "post_layernorm.*",
            "pool.probe": "head.probe",
            "pool.in_proj.*": "head.attention.in_proj_*",
            "pool.proj.*": "head.attention.out_proj.*",
            "pool.norm.*": "head.layernorm.*",
            "pool.fc1.*": "head.mlp.fc1.*",
            "pool.fc2.*": "head.mlp.fc2.*",
        },
        ignored=(
            r"/?text_model\..*|/?classifier\.(weight|bias)|/?logit_(scale|bias)"
            r"|embeddings\.position_ids"
        ),
        tower="vision_model.",
    ),
    "hf_dinov2": Layout(
        marks=(
            "embeddings.patch_embeddings.projection.weight",
            f"{_HF_VIT_BLOCK.replace('#', '0')}.layer_scale1.lambda1",
        ),
        names={
            "patch_embed.*": "embeddings.patch_embeddings.projection.*",
            "prefix.0": "embeddings.cls_token",
            "registers": "embeddings.register_tokens",
            "pos_embed": "embeddings.position_embeddings",
            **{f"blocks.#.{n}.*": f"{_HF_VIT_BLOCK}.{n}.*" for n in ("norm1", "norm2")},
            **_HF_VIT_ATTENTION,
            **{f"blocks.#.{n}.*": f"{_HF_VIT_BLOCK}.mlp.{n}.*" for n in ("fc1", "fc2")},
            "blocks.#.ls1": f"{_HF_VIT_BLOCK}.layer_scale1.lambda1",
            "blocks.#.ls2": f"{_HF_VIT_BLOCK}.layer_scale2.lambda1",
            "norm.*": "layernorm.*",
        },
        older=tuple(  # in memory since transformers 5; its files keep the names above
            (f"blocks.#.{ours}.*", f"{_HF_VIT_BLOCK}.attention.{theirs}_proj.*")
            for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("proj", "o"))
        ),
        ignored=r"/?classifier\.(weight|bias)|embeddings\.mask_token",
    ),
    "hf_dinov3": Layout(
        marks=("embeddings.patch_embeddings.weight", "embeddings.register_tokens"),
        names={
            "patch_embed.*": "embeddings.patch_embeddings.*",
            "prefix.0": "embeddings.cls_token",
            "registers": "embeddings.register_tokens",
            **{f"blocks.#.{ours}": f"layer.#.{theirs}" for ours, theirs in _DINOV3_BLOCK},
            "norm.*": "norm.*",
        },
        older=tuple(  # in memory
            (f"blocks.#.{ours}", f"model.layer.#.{theirs}") for ours, theirs in _DINOV3_BLOCK
        ),
        ignored=r"/?classifier\.(weight|bias)|embeddings\.mask_token",
    ),
    "hf_vit": Layout(
        marks=("embeddings.patch_embeddings.projection.weight",),
        names={
            "patch_embed.*": "embeddings.patch_embeddings.projection.*",
            "prefix.0": "embeddings.cls_token",
            "prefix.1": "embeddings.distillation_token",
            "pos_embed": "embeddings.position_embeddings",
            "blocks.#.norm1.*": f"{_HF_VIT_BLOCK}.layernorm_before.*",
            **_HF_VIT_ATTENTION,
            "blocks.#.norm2.*": f"{_HF_VIT_BLOCK}.layernorm_after.*",
            "blocks.#.fc1.*": f"{_HF_VIT_BLOCK}.intermediate.dense.*",
            "blocks.#.fc2.*": f"{_HF_VIT_BLOCK}.output.dense.*",
            "norm.*": "layernorm.*",
        },
        older=(  # in memory since transformers 5; its files keep the names above
            ("blocks.#.norm1.*", "layers.#.layernorm_before.*"),
            ("blocks.#.q.*", "layers.#.attention.q_proj.*"),
            ("blocks.#.k.*", "layers.#.attention.k_proj.*"),
            ("blocks.#.v.*", "layers.#.attention.v_proj.*"),
            ("blocks.#.proj.*", "layers.#.attention.o_proj.*"),
            ("blocks.#.norm2.*", "layers.#.layernorm_after.*"),
            ("blocks.#.fc1.*", "layers.#.mlp.fc1.*"),
            ("blocks.#.fc2.*", "layers.#.mlp.fc2.*"),
        ),
        ignored=(
            r"/?(classifier|cls_classifier|distillation_classifier)\.(weight|bias)"
            r"|pooler\.dense\.(weight|bias)|embeddings\.(mask_token|position_ids)"
        ),
    ),
    "lvvit": Layout(
        marks=("patch_embed.conv1.weight", "cls_token"),
        names={
            "patch_embed.*": "patch_embed.proj.*",
            "stem.0.*": "patch_embed.conv1.*",
            "stem.1.*": "patch_embed.bn1.*",
            "stem.3.*": "patch_embed.conv2.*",
            "stem.4.*": "patch_embed.bn2.*",
            "stem.6.*": "patch_embed.conv3.*",
            "stem.7.*": "patch_embed.bn3.*",
            "prefix.0": "cls_token",
            "pos_embed": "pos_embed",
            **_TIMM_BLOCK,
        },
        ignored=r"(head|aux_head)\.(weight|bias)",
    ),
    "timm_eva": Layout(
        marks=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
        one_of=("blocks.0.gamma_1", "blocks.0.attn.q_bias"),
        names={
            **_TIMM,
            "blocks.#.q.bias": "blocks.#.attn.q_bias",  # keys have none
            "blocks.#.v.bias": "blocks.#.attn.v_bias",
            "blocks.#.ls1": "blocks.#.gamma_1",
            "blocks.#.ls2": "blocks.#.gamma_2",
        },
        older=(("head_proj.weight", "/head.proj.weight"),),
        ignored=_TIMM_IGNORED,
    ),
    "timm": Layout(
        marks=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
        names={
            **_TIMM,
            "prefix.1": "dist_token",
            "blocks.#.ls1": "blocks.#.ls1.gamma",
            "blocks.#.ls2": "blocks.#.ls2.gamma",
            "blocks.#.q_norm.*": "blocks.#.attn.q_norm.*",
            "blocks.#.k_norm.*": "blocks.#.attn.k_norm.*",
        },
        older=(("head_proj.weight", "/head.proj.weight"),),  # of open_clip's timm towers
        ignored=_TIMM_IGNORED,
    ),
}

# with a matrix each for q, k and v
APART: tuple[LayoutName, ...] = ("hf_clip", "hf_siglip", "hf_dinov2", "hf_dinov3", "hf_vit")


@functools.cache
def _patterns(layout: LayoutName) -> list[tuple[re.Pattern[str], str]]:
    """(pattern of their name, template of ours), for reading."""
    table = LAYOUTS[layout]
    pairs = [*table.names.items(), *table.older]
    what = "(?P<what>weight|bias|running_mean|running_var|num_batches_tracked)"
    return [
        (
            re.compile(re.escape(theirs).replace(r"\#", r"(?P<i>0|[1-9]\d*)").replace(r"\*", what)),
            ours,
        )
        for ours, theirs in pairs
    ]


def our_name(layout: LayoutName, name: str) -> str | None:
    """Our name of one of their tensors, or None."""
    for pattern, ours in _patterns(layout):
        if found := pattern.fullmatch(name):
            groups = found.groupdict()
            return ours.replace("#", groups.get("i") or "").replace("*", groups.get("what") or "")
    return None


def their_name(layout: LayoutName, name: str) -> str | None:
    """Their name of one of our tensors (in parts, see `_split`), or None."""
    block = re.match(r"blocks\.(\d+)\.", name)
    general = re.sub(r"^blocks\.\d+\.", "blocks.#.", name)
    stem, _, what = general.rpartition(".")
    names = LAYOUTS[layout].names
    theirs = names.get(general) or names.get(f"{stem}.*")
    if theirs is None:
        return None
    return theirs.replace("#", block[1] if block else "").replace("*", what)

"""Sizes and conventions of a backbone, the presets, and what a step of one costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fastrecycle import ops
from fastrecycle.pruning import PruneSchedule, kept_count, patches_after_blocks

if TYPE_CHECKING:
    from fastrecycle.vit import ViT

Triple = tuple[float, float, float]
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ViTConfig:
    """Shape and arithmetic of a vision transformer."""

    image_size: int = 224  # pixels
    patch_size: int = 16  # pixels
    width: int = 768
    depth: int = 12  # blocks
    heads: int = 12
    mlp_dim: int = 3072
    out_dim: int | None = None  # width of a projection after the last norm; None: none
    prefix_tokens: int = 1  # CLS, DeiT's distillation token, registers: in this order
    registers: int = 0  # of the prefix tokens
    pool: Literal["cls", "norm_mean", "mean_norm", "map"] = "cls"
    """The feature: CLS after the last norm; the mean of the patches after it, or normalised after
    the mean; or attention pooling of the normalised patches (`fastrecycle.pooling.MapPool`)."""
    activation: ops.ActivationKind = "gelu"
    norm_eps: float = 1e-6
    pre_norm: bool = False  # CLIP's LayerNorm after the embedding
    patch_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False  # LayerNorm of each head's queries and keys
    layer_scale: bool = False  # learned factors of each residual branch's channels
    rope: Literal["none", "dinov3"] = "none"  # rotary positions
    residual_scale: float = 1.0  # factor of each residual branch; LV-ViT's is 1/2
    stem: Literal["patch", "lvvit"] = "patch"
    mean: Triple = IMAGENET_MEAN  # of the pixels, range [0, 1]
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: must be a multiple of patch_size {self.patch_size},"
                f" got {self.image_size}"
            )
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width: must be a multiple of heads {self.heads}, got {self.width}")
        for name, known in (
            ("activation", ("gelu", "gelu_tanh", "quick_gelu")),
            ("pool", ("cls", "norm_mean", "mean_norm", "map")),
            ("rope", ("none", "dinov3")),
        ):
            if getattr(self, name) not in known:
                listed = ", ".join(f'"{x}"' for x in known)
                raise ValueError(f"{name}: must be one of {listed}; got {getattr(self, name)!r}")
        if not 0 <= self.registers <= self.prefix_tokens:
            raise ValueError(
                f"registers: must be in [0, prefix_tokens = {self.prefix_tokens}],"
                f" got {self.registers}"
            )
        if self.pool == "cls" and self.registers == self.prefix_tokens:
            raise ValueError(
                'pool: "cls" needs a CLS token, got none; use "norm_mean", "mean_norm" or "map"'
            )
        if self.rope != "none" and self.width // self.heads % 4:
            raise ValueError(
                f"rope: needs a head width that is a multiple of 4, got {self.width // self.heads}"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not (isinstance(values, tuple) and len(values) == 3):
                raise ValueError(f"{name}: must be a tuple of 3 numbers, got {values!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std: must be above 0, got {self.std}")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one image, n."""
        return self.grid**2

    @property
    def features(self) -> int:
        """Width of the feature that `ViT` returns."""
        return self.out_dim or self.width


_CLIP_B = ViTConfig(
    out_dim=512, activation="quick_gelu", norm_eps=1e-5, pre_norm=True, patch_bias=False,
    mean=CLIP_MEAN, std=CLIP_STD,
)  # fmt: skip
PRESETS: dict[str, ViTConfig] = {
    "vit_b_16": _CLIP_B,
    "vit_b_32": replace(_CLIP_B, patch_size=32),
    "deit_b_16": ViTConfig(),
    "deit_b_16_distilled": ViTConfig(prefix_tokens=2),
    "lvvit_m": ViTConfig(
        width=512, depth=20, heads=8, mlp_dim=1536, norm_eps=1e-5, qkv_bias=False,
        residual_scale=0.5, stem="lvvit",
    ),
    "siglip_b_16": ViTConfig(
        prefix_tokens=0, pool="map", activation="gelu_tanh", mean=HALF, std=HALF
    ),
    "dinov2_b_14": ViTConfig(image_size=518, patch_size=14, layer_scale=True),
    "dinov2_b_14_reg4": ViTConfig(
        image_size=518, patch_size=14, prefix_tokens=5, registers=4, layer_scale=True
    ),
    "dinov3_b_16": ViTConfig(
        prefix_tokens=5, registers=4, norm_eps=1e-5, layer_scale=True, rope="dinov3"
    ),
    "vit_ti_16": ViTConfig(width=192, heads=3, mlp_dim=768, mean=HALF, std=HALF),
    "demo": ViTConfig(
        image_size=64, patch_size=8, width=192, heads=3, mlp_dim=768, mean=HALF, std=HALF
    ),
}  # fmt: skip


def flops(
    vit: ViT | ViTConfig | str,
    prune: PruneSchedule | None = None,
    sparsity: float = 0.0,
) -> float:
    """Cost of a training step for one image in G, by the paper's definition.

    Three times the multiply-adds of one forward pass: Linear layers and the patch convolution are
    counted, Q K^T and A V are not; LayerNorm costs 4 per element. The patch embedding is counted
    for all patches even where only the kept ones are computed, so the work really done is less.

    Args:
        vit: a model, its config, or a preset's name.
        prune: pruning schedule, as in `ViT.encode`.
        sparsity: share of patches masked before the first block.

    Raises:
        ValueError: an unknown preset, a schedule or a sparsity out of range.

    """
    if isinstance(vit, str):
        if vit not in PRESETS:
            raise ValueError(f"flops: expected one of {', '.join(PRESETS)}; got {vit!r}")
        vit = PRESETS[vit]
    config = vit if isinstance(vit, ViTConfig) else vit.config
    d, prefix = config.width, config.prefix_tokens
    n = kept_count(config.patches, sparsity)
    counts = patches_after_blocks(n, config.depth, prune)
    if config.stem == "lvvit":
        half = (config.image_size // 2) ** 2
        total = (
            half * (3 * 64 * 49 + 2 * 64 * 64 * 9)
            + config.patches * 64 * d * (config.patch_size // 2) ** 2
        )
    else:
        total = config.patches * 3 * config.patch_size**2 * d
    if config.pre_norm:
        total += 4 * (n + prefix) * d
    for after in counts:
        before, left = n + prefix, after + prefix
        total += 4 * before * d * d + 4 * before * d
        total += 2 * left * d * config.mlp_dim + 4 * left * d
        n = after
    if config.pool == "map":  # its query is the same for every image
        total += 2 * n * d * d + d * d + 2 * d * config.mlp_dim + 4 * n * d
    total += 4 * d + (d * config.out_dim if config.out_dim else 0)
    return 3 * total / 1e9

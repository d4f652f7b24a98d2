"""One vision transformer for every backbone: adapter, pruning and kept patches are arguments.

B images, S side, P patch side, n patches, N tokens, D width, H heads, L blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastrecycle import ops
from fastrecycle.block import FP8_PRODUCTS, Block, Fp8Linear
from fastrecycle.lora import LoRA, LoRAStack
from fastrecycle.pooling import MapPool, patch_mean
from fastrecycle.positions import resized_table, rotary_table
from fastrecycle.pruning import PruneSchedule, patches_after_blocks
from fastrecycle.vit_config import PRESETS, ViTConfig


class ViTOutput(NamedTuple):
    """What `ViT.encode` returns."""

    features: Tensor  # (B, features)
    kept: Tensor  # (B, k) int64, patches alive after the last block, ascending
    cls_scores: Tensor  # (B, k') float32: last block's attention on its patches, see `encode`


@dataclass(frozen=True)
class RaggedKeep:
    """Kept patches whose number differs from image to image, for a packed forward pass.

    Attributes:
        patches: (sum of k,) int64 patch indices, image after image, ascending within each.
        image: (sum of k,) int64, the image of each.
        cu_seqlens: (B + 1,) int32, starts of the images among tokens without prefix.
        longest: the largest k possible; fixed, so that shapes stay static.

    """

    patches: Tensor
    image: Tensor
    cu_seqlens: Tensor
    longest: int

    @staticmethod
    def of_orders(order: Tensor, counts: Tensor) -> RaggedKeep:
        """The first counts[i] patches of each row of `order`, (B, K) int64, best first."""
        width = order.shape[1]
        chosen = torch.arange(width, device=order.device) < counts[:, None]
        # what is not chosen sorts behind every patch index, and is then cut off
        ascending = torch.where(chosen, order, order.max() + 1).sort(dim=1).values
        images = torch.arange(len(order), device=order.device)[:, None].expand(-1, width)
        cu_seqlens = nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return RaggedKeep(ascending[chosen], images[chosen], cu_seqlens, width)


def _lvvit_stem() -> nn.Sequential:
    """LV-ViT's overlapping stem, 3 -> 64 channels at half resolution."""
    layers: list[nn.Module] = []
    for channels, kernel, stride in ((3, 7, 2), (64, 3, 1), (64, 3, 1)):
        layers += [
            nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class ViT(nn.Module):
    """A frozen vision transformer under any LoRA: CLIP, SigLIP, DeiT, DINOv2, DINOv3, LV-ViT, EVA,
    timm's ViTs; docs/backbones.md lists them.

    Nothing is patched or stored between calls: LoRA, pruning schedule and kept patches are
    arguments. Parameters require no gradient unless the caller asks for it.

    >>> vit = ViT.from_pretrained("demo")
    >>> features = vit(vit.transform(image)[None])              # (1, features)
    >>> features = vit(images, lora, prune={6: 0.75})           # drop 75 % of patches in block 6
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        d = config.width
        stem_stride = 2 if config.stem == "lvvit" else 1
        self.stem = _lvvit_stem() if config.stem == "lvvit" else None
        kernel = config.patch_size // stem_stride
        self.patch_embed = nn.Conv2d(
            64 if self.stem is not None else 3, d, kernel, kernel, bias=config.patch_bias
        )
        self.prefix = nn.Parameter(torch.zeros(config.prefix_tokens, d))
        self.pos_embed = nn.Parameter(torch.zeros(config.prefix_tokens + config.patches, d))
        self.pre_norm = nn.LayerNorm(d, eps=config.norm_eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.pool = (
            MapPool(d, config.heads, config.mlp_dim, config.activation, config.norm_eps)
            if config.pool == "map"
            else None
        )
        self.head_proj = nn.Linear(d, config.out_dim, bias=False) if config.out_dim else None
        self.rotary: Tensor | None  # (2, N, d) cosines and sines, not among the weights
        self.register_buffer("rotary", None, persistent=False)
        self.stream_dtype: torch.dtype | None = None  # of the residual stream; None: as embedded
        self._turn_patches()
        self.requires_grad_(False).eval()

    def _turn_patches(self) -> None:
        """Compute the rotary positions, which no file holds, also for a model without data yet."""
        config, device = self.config, self.pos_embed.device
        if config.rope == "dinov3":
            with torch.device("cpu"):
                table = rotary_table(
                    config.grid, config.prefix_tokens, config.width // config.heads
                )
            self.rotary = table.to("cpu" if device.type == "meta" else device, torch.float32)

    # ------------------------------------------------------------------ construction

    @staticmethod
    def preset(name: str, seed: int = 0) -> ViT:
        """Random weights at the shape of a known backbone: "vit_b_16", "vit_b_32", "deit_b_16",
        "deit_b_16_distilled", "lvvit_m", "siglip_b_16", "dinov2_b_14", "dinov2_b_14_reg4",
        "dinov3_b_16", "vit_ti_16" or "demo".

        Raises:
            ValueError: no such preset.

        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}; got {name!r}")
        return ViT.random(PRESETS[name], seed)

    @staticmethod
    def random(config: ViTConfig, seed: int = 0) -> ViT:
        """Random weights (normal, std .02; biases 0) at any shape."""
        with torch.device("meta"):  # PyTorch's own initial values are not wanted
            vit = ViT(config)
        vit.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for module in vit.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                module.reset_parameters()
        nn.init.normal_(vit.prefix, std=0.02, generator=generator)
        nn.init.normal_(vit.pos_embed, std=0.02, generator=generator)
        if vit.pool is not None:
            nn.init.normal_(vit.pool.probe, std=0.02, generator=generator)
        if config.layer_scale:
            for block in cast("list[Block]", vit.blocks):
                for scale in (block.ls1, block.ls2):
                    nn.init.ones_(cast("Tensor", scale))
        vit._turn_patches()
        return vit

    @staticmethod
    def from_state_dict(
        state_dict: Mapping[str, Tensor], config: ViTConfig | Mapping[str, Any] | str | None = None
    ) -> ViT:
        """From the weights of OpenAI's or open_clip's CLIP, Hugging Face's CLIPVisionModel,
        CLIPModel or ViT, timm's ViT or DeiT, or LV-ViT; the layout is detected from the names.

        Args:
            state_dict: tensors by name, in any float dtype; loaded as float32.
            config: what names and shapes cannot tell ("activation", "mean", "std", "heads", ...),
                as a dict of `ViTConfig` fields, a whole `ViTConfig`, or a preset's name.

        Raises:
            ValueError: unknown layout, missing or misshaped tensors, NaN, or something that must
                be told through `config`.

        """
        from fastrecycle.weights import convert

        full, ours = convert(state_dict, config)
        return ViT._load(full, ours)

    @staticmethod
    def from_pretrained(
        source: str | Path, config: ViTConfig | Mapping[str, Any] | str | None = None
    ) -> ViT:
        """From "demo", a file or folder, "open_clip:MODEL/PRETRAINED", "timm:NAME" or "hf:REPO_ID".

        Args:
            source: as above; files are .safetensors, or .pt/.bin read with `weights_only=True`.
            config: see `from_state_dict`; a `config.json` beside the weights is read.

        Raises:
            FileNotFoundError: no such file.
            ValueError: see `from_state_dict`; also damaged files.

        """
        from fastrecycle.sources import load_source

        full, ours = load_source(source, config)
        return ViT._load(full, ours)

    def save(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one safetensors file that `from_pretrained` reads without being told anything.

        Args:
            path: of the file, replaced atomically.
            dtype: of the stored weights, torch.float32 or torch.float16.
            card: anything JSON about the weights: data, recipe, accuracy, licence.

        Raises:
            ValueError: another dtype, or weights that it cannot hold.
            OSError: the file cannot be written.

        """
        from fastrecycle.weights import save_vit

        save_vit(self, path, dtype, card)

    @staticmethod
    def _load(config: ViTConfig, tensors: Mapping[str, Tensor]) -> ViT:
        with torch.device("meta"):  # no time spent on initial values that are replaced
            vit = ViT(config)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        vit.load_state_dict(copies, strict=True, assign=True)
        return vit.requires_grad_(False).eval()

    def resized(self, image_size: int, antialias: bool = True) -> ViT:
        """The same backbone for another image size: learned positions are interpolated (bicubic),
        rotary ones computed anew.

        Args:
            image_size: in pixels, a multiple of the patch size.
            antialias: as timm and DINOv2 with registers interpolate; False: as DINOv2 does.

        Raises:
            ValueError: not a multiple of the patch size.

        """
        config = replace(self.config, image_size=image_size)
        other = copy.deepcopy(self)
        other.config = config
        if config.grid != self.config.grid:
            table = resized_table(
                self.pos_embed.detach(), config.prefix_tokens, config.grid, antialias
            )
            other.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
            other._turn_patches()
        return other

    def merged(self, lora: LoRA) -> ViT:
        """A backbone with a LoRA's changes scale b a added to its weights: the same features.

        Args:
            lora: for this backbone; its head is not part of the result.

        Raises:
            ValueError: the LoRA does not fit (see `LoRA.fit`), or weights in float8.

        """
        lora = lora.fit(self.config).to(self.pos_embed.device)
        other = copy.deepcopy(self)
        d = self.config.width
        for target in lora.a:
            for block, delta in zip(other.blocks, lora.delta(target), strict=True):
                linear = getattr(block, "qkv" if target in ("q", "k", "v") else target)
                if isinstance(linear, Fp8Linear):
                    raise ValueError("merged: weights are in float8; merge first, then prepare")
                start = {"k": d, "v": 2 * d}.get(target, 0)
                rows = linear.weight.data[start : start + len(delta)]
                rows.copy_(rows.to(delta.dtype) + delta)
        return other

    def prepared(self, dtype: torch.dtype) -> ViT:
        """The same backbone, frozen, with the weights of its products and its residual stream in
        this dtype, once for all: under autocast weights would be cast again at every step. Norms
        and positions stay as they are.

        torch.float8_e4m3fn is bfloat16 with the products of `FP8_PRODUCTS` in float8, unless a LoRA
        is on them.

        Raises:
            ValueError: float8, and a width or mlp_dim that is no multiple of 16.

        """
        other = copy.deepcopy(self).requires_grad_(False)
        if dtype == torch.float8_e4m3fn:
            dtype = torch.bfloat16
            for block in other.blocks:
                for name in FP8_PRODUCTS:
                    setattr(block, name, Fp8Linear(getattr(block, name)))
        other.stream_dtype = dtype
        for module in other.modules():
            if isinstance(module, Fp8Linear):
                continue
            if isinstance(module, nn.Linear) or module is other.patch_embed:
                module.to(dtype)
        return other

    # ------------------------------------------------------------------ images

    def transform(self, images: Image.Image | list[Image.Image]) -> Tensor:
        """PIL images to normalised float32: shorter side to image_size (bicubic), centre crop.

        Returns:
            (3, S, S) for one image, (B, 3, S, S) for a list.

        Raises:
            TypeError: not a PIL image or a list of them.

        """
        if isinstance(images, Image.Image):
            return self._transform_one(images)
        if not isinstance(images, list | tuple) or not images:
            raise TypeError(
                f"transform: expected a PIL image or a list of them, got {type(images).__name__}"
            )
        return torch.stack([self.transform(image) for image in images])

    def _transform_one(self, image: Image.Image) -> Tensor:
        return self.normalise(self.resize(image).float() / 255)

    def resize(self, image: Image.Image) -> Tensor:
        """The 8-bit pixels that `transform` normalises: (3, S, S) uint8."""
        side = self.config.image_size
        image = image.convert("RGB")
        shorter = min(image.size)
        # truncated size and rounded offset, as torchvision has them: other choices shift by a pixel
        width, height = (int(x * side / shorter) for x in image.size)
        if max(width, height) > 256 * side:  # a line of pixels would grow to terabytes
            raise ValueError(f"image: expected up to 256 times as long as wide, got {image.size}")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - side) / 2), round((height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, S, S) in [0, 1] to the backbone's input space."""
        mean, std = self._mean_std(pixels)
        return (pixels - mean) / std

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`: input space to [0, 1]."""
        mean, std = self._mean_std(images)
        return images * std + mean

    def _mean_std(self, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = like.dtype if like.is_floating_point() else torch.float32
        # filled on the device: a copy from the host could not be recorded in a CUDA graph
        mean, std = (
            torch.stack([torch.full((), v, dtype=dtype, device=like.device) for v in values])
            for values in (self.config.mean, self.config.std)
        )
        return mean[:, None, None], std[:, None, None]

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        images: Tensor,
        lora: LoRA | LoRAStack | None = None,
        *,
        lora_index: Tensor | None = None,
        prune: PruneSchedule | None = None,
        keep: Tensor | RaggedKeep | None = None,
        impl: ops.Impl = "reference",
    ) -> Tensor:
        """Features of a batch, (B, features); see `encode` for the arguments.

        Here `keep` may also be a `RaggedKeep`: images of different token counts, packed.
        """
        if isinstance(keep, RaggedKeep):
            return self._packed(images, lora, lora_index, prune, keep, impl)
        return self._encode(images, lora, lora_index, prune, keep, False, impl)[0]

    def encode(
        self,
        images: Tensor,
        lora: LoRA | LoRAStack | None = None,
        *,
        lora_index: Tensor | None = None,
        prune: PruneSchedule | None = None,
        keep: Tensor | None = None,
        impl: ops.Impl = "reference",
    ) -> ViTOutput:
        """Features, surviving patches and the last block's scores of them.

        Args:
            images: (B, 3, S, S), normalised.
            lora: one LoRA for all images, or a `LoRAStack`.
            lora_index: (B,) int64: the LoRA of each image; None: each has an equal share of
                consecutive images.
            prune: {block: ratio}, 0-based: after that block's attention and its residual, before
                its MLP, int(ratio * patches) of the current patches with the lowest head-averaged
                CLS attention are dropped (Eq. 5). Survivors keep their own residual; prefix tokens
                always stay; the choice carries no gradient. Where the feature is not CLS, the mean
                query of the current patches asks in its stead, mean over heads of
                softmax(mean(q) k^T / sqrt d): a departure from the paper, whose backbones have CLS.
            keep: (B, k) int64 patch indices: only these are embedded and fed forward (Sec. 4.3).
            impl: code of the operations: "reference" (PyTorch) or "triton" (CUDA, frozen weights).

        Raises:
            ValueError: shapes, blocks, ratios or indices that do not fit.

        """
        features, kept, scores = self._encode(images, lora, lora_index, prune, keep, True, impl)
        assert scores is not None
        return ViTOutput(features, kept, scores)

    def embed(
        self, images: Tensor, keep: Tensor | None = None, impl: ops.Impl = "reference"
    ) -> Tensor:
        """Token embeddings with positions: (B, 3, S, S) -> (B, prefix + patches or k, D).

        With the plain patch stem only the kept patches are read and projected; LV-ViT's stem
        overlaps, so there all are embedded and then gathered.
        """
        config, p = self.config, self.config.patch_size
        if self.stem is None and impl == "triton":
            tokens = ops.embed_kept(
                images, self._all(images) if keep is None else keep, self.patch_embed.weight,
                self.patch_embed.bias,
            )  # fmt: skip
        elif self.stem is None:
            g = config.grid
            patches = images.unflatten(3, (g, p)).unflatten(2, (g, p))  # (B, 3, g, P, g, P)
            patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, n, 3 P P)
            if keep is not None:
                patches = ops.token_gather(patches, keep)
            tokens = nn.functional.linear(
                patches, self.patch_embed.weight.flatten(1), self.patch_embed.bias
            )
        else:
            tokens = self.patch_embed(self.stem(images)).flatten(2).transpose(1, 2)
            if keep is not None:
                tokens = ops.token_gather(tokens, keep, impl=impl)
        prefix, positions = self.pos_embed.split((config.prefix_tokens, config.patches))
        tokens = tokens + (positions if keep is None else positions[keep])
        first = (self.prefix + prefix).to(tokens.dtype).expand(len(images), -1, -1)
        return self._stream(torch.cat((first, tokens), dim=1))

    def _stream(self, x: Tensor) -> Tensor:
        """The residual stream's first state, from embedded tokens."""
        x = x if self.pre_norm is None else self.pre_norm(x)
        return x if self.stream_dtype is None else x.to(self.stream_dtype)

    def _all(self, images: Tensor) -> Tensor:
        """Every patch of every image, (B, n)."""
        return torch.arange(self.config.patches, device=images.device).expand(len(images), -1)

    def _packed(
        self,
        images: Tensor,
        lora: LoRA | LoRAStack | None,
        lora_index: Tensor | None,
        prune: PruneSchedule | None,
        keep: RaggedKeep,
        impl: ops.Impl,
    ) -> Tensor:
        """`forward` over images with different numbers of kept patches, without padding."""
        self._check(images, None)
        if prune or lora_index is not None or self.stem is not None:
            raise ValueError(
                "keep: ragged patches go with one LoRA, no pruning schedule and a plain patch stem"
            )
        config, p, g = self.config, self.config.patch_size, self.config.grid
        stack = lora.stack() if isinstance(lora, LoRA) else lora
        if stack is not None:
            stack.check_depth(self.config.depth)
        patches = images.unflatten(3, (g, p)).unflatten(2, (g, p)).permute(0, 2, 4, 1, 3, 5)
        patches = patches.flatten(3).flatten(1, 2)  # (B, n, 3 P P)
        tokens = nn.functional.linear(
            ops.token_gather(patches, keep.image * config.patches + keep.patches, impl=impl),
            self.patch_embed.weight.flatten(1),
            self.patch_embed.bias,
        )
        prefix, positions = self.pos_embed.split((config.prefix_tokens, config.patches))
        tokens = tokens + positions[keep.patches]
        first = (self.prefix + prefix).to(tokens.dtype).repeat(len(images), 1)
        # image after image, each with its prefix tokens first
        image = torch.arange(len(images), device=images.device)
        owner = torch.cat((image.repeat_interleave(config.prefix_tokens), keep.image))
        order = owner.argsort(stable=True)
        x = self._stream(torch.cat((first, tokens))[order][None])
        rotation = None
        if self.rotary is not None:
            always = torch.arange(config.prefix_tokens, device=images.device).repeat(len(images))
            tokens = torch.cat((always, config.prefix_tokens + keep.patches))[order]
            rotation = self.rotary[:, tokens][:, None, :, None]
        starts = keep.cu_seqlens + config.prefix_tokens * torch.arange(
            len(images) + 1, device=images.device, dtype=torch.int32
        )
        packing = (starts, keep.longest + config.prefix_tokens)
        branch, adapters = None, [] if stack is None else stack.blocks()
        for i, block in enumerate(cast("list[Block]", self.blocks)):
            adapter = adapters[i] if adapters else {}
            x, branch, _ = block.attend(
                x, branch, adapter, None, packing=packing, rotation=rotation, impl=impl
            )
            x, branch = block.transform(x, branch, adapter, None, impl)
        assert branch is not None
        if config.pool != "cls":
            patch = order >= len(first)
            member = (owner[order] == image[:, None]) & patch
            return self._pooled(x, branch, member, impl)
        # rows by `image`: Inductor 2.11 cannot lower an index that is a slice
        cls = starts[image].long()
        return self._features(x[0, cls], branch[0, cls])

    def _features(self, x: Tensor, branch: Tensor) -> Tensor:
        """CLS tokens and what the last block adds to them, (B, D) each -> (B, features)."""
        return self._projected(self.norm(x + self.config.residual_scale * branch))

    def _projected(self, features: Tensor) -> Tensor:
        return features if self.head_proj is None else self.head_proj(features)

    def _pooled(self, x: Tensor, branch: Tensor, member: Tensor | None, impl: ops.Impl) -> Tensor:
        """Patches and what the last block adds to them, (B, k, D) each or packed, -> features."""
        tokens = x + self.config.residual_scale * branch
        if self.config.pool == "mean_norm":
            return self._projected(self.norm(patch_mean(tokens, member)))
        tokens = self.norm(tokens)
        if self.pool is not None:
            return self._projected(self.pool(tokens, member, impl))
        return self._projected(patch_mean(tokens, member))

    def _rotation(self, kept: Tensor | None) -> Tensor | None:
        """The rotary positions of these patches of each image, (2, B or 1, N, 1, d); None: all."""
        if self.rotary is None:
            return None
        if kept is None:
            return self.rotary[:, None, :, None]
        prefix = self.config.prefix_tokens
        always = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
        return self.rotary[:, torch.cat((always, kept + prefix), dim=1)][:, :, :, None]

    def _check(self, images: Tensor, keep: Tensor | None) -> None:
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images: expected (B, 3, {side}, {side}), got {tuple(images.shape)}; "
                "vit.transform(PIL images) makes such a batch"
            )
        if keep is not None and (keep.ndim != 2 or len(keep) != len(images)):
            raise ValueError(
                f"keep: expected patch indices ({len(images)}, k), got {tuple(keep.shape)}"
            )

    def _encode(
        self,
        images: Tensor,
        lora: LoRA | LoRAStack | None,
        lora_index: Tensor | None,
        prune: PruneSchedule | None,
        keep: Tensor | None,
        with_scores: bool,
        impl: ops.Impl,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self._check(images, keep)
        config = self.config
        stack = lora.stack() if isinstance(lora, LoRA) else lora
        if stack is not None:
            stack.check_depth(self.config.depth)
        patches = config.patches if keep is None else keep.shape[1]
        counts = patches_after_blocks(patches, config.depth, prune)
        kept = self._all(images) if keep is None else keep
        adapters = [] if stack is None else stack.blocks()
        x, branch, scores = self.embed(images, keep, impl), None, None
        rotation, by_cls = self._rotation(keep), config.pool == "cls"
        for i, block in enumerate(cast("list[Block]", self.blocks)):
            adapter = adapters[i] if adapters else {}
            drops, last = counts[i] < patches, i == config.depth - 1
            x, branch, scores = block.attend(
                x, branch, adapter, lora_index, queries=1 if last and by_cls else None,
                with_scores=drops or (last and with_scores), rotation=rotation, impl=impl,
            )  # fmt: skip
            if drops:
                assert scores is not None
                own = scores[:, config.prefix_tokens :]
                alive = ops.top_patches(own, counts[i], impl=impl)
                kept = kept.gather(1, alive)
                patches = counts[i]
            if last and by_cls:  # nothing reads the other tokens any more
                x = x[:, :1]
            elif drops:
                rotation = self._rotation(kept)
                always = torch.arange(config.prefix_tokens, device=x.device)
                tokens = torch.cat((always.expand(len(x), -1), alive + config.prefix_tokens), dim=1)
                x = ops.token_gather(x, tokens, impl=impl)
                branch = ops.token_gather(branch, tokens, impl=impl)
            x, branch = block.transform(x, branch, adapter, lora_index, impl)
        assert branch is not None
        if by_cls:
            features = self._features(x[:, 0], branch[:, 0])
        else:
            p = config.prefix_tokens
            features = self._pooled(x[:, p:], branch[:, p:], None, impl)
        if with_scores and scores is not None:
            scores = scores[:, config.prefix_tokens :]
        return features, kept, scores if with_scores else None

"""LoRAs with heads, in memory: one LoRA, many stacked for one batch, and a bank of them.

L blocks, R the largest rank, G LoRAs, C classes. On disk a LoRA is a PEFT folder
(`fastrecycle.peft_format`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fastrecycle.ops import GatedLowRank, LowRank

if TYPE_CHECKING:
    from fastrecycle.vit import ViT
    from fastrecycle.vit_config import ViTConfig

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
# Read from files: all blocks take as much memory as the largest. Published ViTs have up to 48.
MAX_BLOCKS = 128


def target_sizes(width: int, mlp_dim: int) -> dict[str, tuple[int, int]]:
    """{target: (d_in, d_out)} of the products that a LoRA can change."""
    square = (width, width)
    return {
        "q": square, "k": square, "v": square, "proj": square,
        "fc1": (width, mlp_dim), "fc2": (mlp_dim, width),
    }  # fmt: skip


@dataclass(frozen=True)
class Head:
    """A linear classifier on the backbone's feature: logits = features weight^T + bias.

    The class texts of a two-tower model are one, too: normalised, without a bias, the scale of the
    cosines within the weight (see `fastrecycle.text`).
    """

    weight: Tensor  # (C, features)
    bias: Tensor | None = None  # (C,)
    normalised: bool = False  # it reads features divided by their norm

    @property
    def classes(self) -> int:
        """Number of classes, C."""
        return self.weight.shape[0]

    def __call__(self, features: Tensor) -> Tensor:
        """(B, features) -> logits (B, C)."""
        if self.normalised:
            features = torch.nn.functional.normalize(features, dim=-1)
        return torch.nn.functional.linear(features, self.weight, self.bias)

    def to(self, *args, **kwargs) -> Head:
        """The head on another device or in another dtype."""
        bias = None if self.bias is None else self.bias.to(*args, **kwargs)
        return replace(self, weight=self.weight.to(*args, **kwargs), bias=bias)


def _depth_message(got: int, depth: int) -> str:
    remedy = (
        "if its last blocks were left alone on purpose, lora.fit(vit.config) adds them as zeros"
        if got < depth
        else "it belongs to another model"
    )
    return f"made for {got} blocks, the backbone has {depth}; {remedy}"


def _average_factors(loras: Sequence[LoRA]) -> LoRA:
    """Mean a and mean scale b, so that one LoRA averages to itself."""
    first = loras[0]
    for other in loras[1:]:
        if other.ranks != first.ranks:
            raise ValueError(
                "average: averaging factors needs LoRAs of one rank on the same targets, got ranks"
                f" {first.ranks} and {other.ranks}; average the products"
            )
    a, b, scale = {}, {}, {}
    for target in first.a:
        a[target] = torch.stack([x.a[target] for x in loras]).mean(0)
        scaled = [x.b[target] * x.scale[target][:, None, None] for x in loras]
        b[target] = torch.stack(scaled).mean(0)
        scale[target] = torch.ones_like(first.scale[target])
    return LoRA(
        a, b, scale, dict(first.ranks), layout=first.layout, base_model=first.base_model,
        prefix=first.prefix,
    )  # fmt: skip


@dataclass(frozen=True)
class LoRAStack:
    """G LoRAs side by side, so that each image of a batch can run under its own."""

    a: dict[str, Tensor]  # target -> (G, L, R, d_in)
    b: dict[str, Tensor]  # target -> (G, L, d_out, R)
    scale: dict[str, Tensor]  # target -> (G, L)

    def __len__(self) -> int:
        return next(iter(self.scale.values())).shape[0] if self.scale else 0

    def check_depth(self, depth: int) -> None:
        """Raise unless these LoRAs have as many blocks as the backbone.

        Raises:
            ValueError: they have more or fewer.

        """
        got = next(iter(self.scale.values())).shape[1] if self.scale else depth
        if got != depth:
            raise ValueError(f"lora: {_depth_message(got, depth)}")

    def blocks(self) -> list[dict[str, LowRank | GatedLowRank]]:
        """The factors of each block: target -> (a (G, R, d_in), b (G, d_out, R), scale (G,)).

        All at once, since the gradient of one block taken alone is as large as that of all.
        """
        apart = {
            t: zip(*(x.unbind(1) for x in (self.a[t], self.b[t], self.scale[t])), strict=True)
            for t in self.a
        }
        return [dict(zip(apart, each, strict=True)) for each in zip(*apart.values(), strict=True)]

    def to(self, *args, **kwargs) -> LoRAStack:
        """The stack on another device or in another dtype."""
        move = lambda d: {t: x.to(*args, **kwargs) for t, x in d.items()}  # noqa: E731
        return LoRAStack(move(self.a), move(self.b), move(self.scale))

    @staticmethod
    def of(loras: Sequence[LoRA]) -> LoRAStack:
        """Stack LoRAs of any ranks and targets; what one lacks is zero.

        Raises:
            ValueError: none are given, or they belong to models of different sizes.

        """
        if not loras:
            raise ValueError("LoRAStack.of: expected at least one LoRA, got none")
        a, b, scale = {}, {}, {}
        for target in TARGETS:
            having = [x for x in loras if target in x.a]
            if not having:
                continue
            rank = max(x.a[target].shape[1] for x in having)
            shapes = {(x.depth, x.a[target].shape[2], x.b[target].shape[1]) for x in having}
            depths = {x.depth for x in loras}
            if len(shapes) > 1 or len(depths) > 1:
                raise ValueError(
                    f"LoRAStack.of: LoRAs of one model expected, got sizes (blocks, d_in, d_out)"
                    f" {sorted(shapes)} on {target}"
                    + (
                        f" and depths {sorted(depths)}; lora.fit(vit.config) gives each the"
                        " backbone's depth"
                        if len(depths) > 1
                        else ""
                    )
                )
            depth, d_in, d_out = shapes.pop()
            like = having[0].a[target]
            stack_a, stack_b, stack_scale = [], [], []
            for x in loras:
                if target in x.a:
                    pad = rank - x.a[target].shape[1]
                    stack_a.append(torch.nn.functional.pad(x.a[target], (0, 0, 0, pad)))
                    stack_b.append(torch.nn.functional.pad(x.b[target], (0, pad)))
                    stack_scale.append(x.scale[target])
                else:
                    stack_a.append(like.new_zeros(depth, rank, d_in))
                    stack_b.append(like.new_zeros(depth, d_out, rank))
                    stack_scale.append(like.new_zeros(depth))
            a[target] = torch.stack(stack_a)
            b[target] = torch.stack(stack_b)
            scale[target] = torch.stack(stack_scale)
        return LoRAStack(a, b, scale)


@dataclass(frozen=True)
class LoRA:
    """One LoRA: y = x W^T + scale (x a^T) b^T on some products of some blocks, with its head.

    Factors of all blocks are stacked and zero-padded to the largest rank; `ranks` keeps the real
    ones (0: this block is not changed). Padding stays zero under training: its gradient is zero.
    """

    a: dict[str, Tensor]  # target -> (L, R, d_in)
    b: dict[str, Tensor]  # target -> (L, d_out, R)
    scale: dict[str, Tensor]  # target -> (L,), alpha / rank
    ranks: dict[str, tuple[int, ...]]
    head: Head | None = None
    class_names: tuple[str, ...] | None = None
    layout: str | None = None  # names of the model it came from: "hf_clip", "hf_vit", "timm", ...
    base_model: str | None = None
    name: str | None = None
    prefix: str | None = None  # of the module names there, such as "vit."; None: the layout's own
    head_module: str | None = None  # name of the head there, where PEFT trained it
    whole: bool = False  # it is on all blocks of its backbone, which its file does not name

    @staticmethod
    def init(
        config: ViTConfig,
        rank: int = 4,
        alpha: float | None = None,
        targets: Sequence[str] = ("q", "v"),
        blocks: Sequence[int] | None = None,
        seed: int = 0,
    ) -> LoRA:
        """A fresh LoRA: a Kaiming-uniform, b zero, so that it changes nothing yet.

        Args:
            config: of the backbone.
            rank: of every factor pair.
            alpha: scale is alpha / rank; None means alpha = rank, a scale of 1.
            targets: of "q", "k", "v", "proj", "fc1", "fc2".
            blocks: 0-based; None for all.
            seed: of `a`.

        Raises:
            ValueError: unknown target or block, or a rank below 1.

        """
        unknown = [t for t in targets if t not in TARGETS]
        if unknown or not targets:
            raise ValueError(f"targets: expected some of {', '.join(TARGETS)}; got {targets}")
        if rank < 1:
            raise ValueError(f"rank: must be at least 1, got {rank}")
        chosen = range(config.depth) if blocks is None else blocks
        if any(not 0 <= i < config.depth for i in chosen):
            raise ValueError(f"blocks: must be in [0, {config.depth - 1}], got {list(chosen)}")
        generator = torch.Generator().manual_seed(seed)
        sizes = target_sizes(config.width, config.mlp_dim)
        a, b, scale, ranks = {}, {}, {}, {}
        for target in (t for t in TARGETS if t in targets):
            d_in, d_out = sizes[target]
            bound = d_in**-0.5  # Kaiming-uniform with a = sqrt(5), nn.Linear's own, as PEFT has it
            draw = torch.rand(config.depth, rank, d_in, generator=generator) * 2 * bound - bound
            on = torch.tensor([float(i in chosen) for i in range(config.depth)])
            a[target] = draw * on[:, None, None]
            b[target] = torch.zeros(config.depth, d_out, rank)
            scale[target] = on * ((rank if alpha is None else alpha) / rank)
            ranks[target] = tuple(rank if i in chosen else 0 for i in range(config.depth))
        return LoRA(a, b, scale, ranks)

    @property
    def depth(self) -> int:
        """Number of blocks of the backbone it belongs to."""
        return next(iter(self.scale.values())).shape[0]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(max(r) for r in self.ranks.values())

    @property
    def parameters(self) -> int:
        """Number of trained numbers, padding and head left out."""
        return sum(
            r * (self.a[t].shape[2] + self.b[t].shape[1]) for t in self.ranks for r in self.ranks[t]
        )

    def stack(self) -> LoRAStack:
        """As a stack of one; its tensors are views, so gradients reach this LoRA's."""
        one = lambda d: {t: x[None] for t, x in d.items()}  # noqa: E731
        return LoRAStack(one(self.a), one(self.b), one(self.scale))

    def tensors(self) -> list[Tensor]:
        """The factors, a and b of each target in a fixed order: what a meta-LoRA trains."""
        return [x for t in self.a for x in (self.a[t], self.b[t])]

    def to(self, *args, **kwargs) -> LoRA:
        """The LoRA (and its head) on another device or in another dtype."""
        move = lambda d: {t: x.to(*args, **kwargs) for t, x in d.items()}  # noqa: E731
        head = None if self.head is None else self.head.to(*args, **kwargs)
        return replace(self, a=move(self.a), b=move(self.b), scale=move(self.scale), head=head)

    def clone(self) -> LoRA:
        """A detached, contiguous copy that shares no memory: what fused optimisers take."""
        dense = torch.contiguous_format
        copy = lambda d: {t: x.detach().clone(memory_format=dense) for t, x in d.items()}  # noqa: E731
        head = self.head
        if head is not None:
            bias = None if head.bias is None else head.bias.detach().clone()
            head = replace(head, weight=head.weight.detach().clone(), bias=bias)
        return replace(self, a=copy(self.a), b=copy(self.b), scale=copy(self.scale), head=head)

    def delta(self, target: str) -> Tensor:
        """The change of a weight matrix, scale b a: (L, d_out, d_in)."""
        return self.scale[target][:, None, None] * (self.b[target] @ self.a[target])

    def compress(self, rank: int, targets: Sequence[str] | None = None) -> LoRA:
        """The nearest LoRA of a rank (in the Frobenius norm): a truncated SVD of each change.

        Args:
            rank: of every factor pair; the scale becomes 1 and the singular values are shared
                evenly between a and b.
            targets: products to keep; None for all.

        Raises:
            ValueError: a rank below 1, or a target that this LoRA does not change.
        """
        chosen = tuple(self.a) if targets is None else tuple(targets)
        missing = [t for t in chosen if t not in self.a]
        if rank < 1 or missing:
            raise ValueError(
                f"compress: expected a rank >= 1 and targets of {', '.join(self.a)}; got rank"
                f" {rank}, targets {', '.join(chosen)}"
            )
        a, b, scale, ranks = {}, {}, {}, {}
        for target in (t for t in TARGETS if t in chosen):
            u, s, vh = torch.linalg.svd(self.delta(target).double(), full_matrices=False)
            keep = min(rank, s.shape[1])
            root = s[:, :keep].sqrt()
            like = self.a[target].dtype
            a[target] = (root[:, :, None] * vh[:, :keep]).to(like)
            b[target] = (u[:, :, :keep] * root[:, None]).to(like)
            scale[target] = torch.ones_like(self.scale[target])
            ranks[target] = (keep,) * self.depth
        return replace(
            self, a=a, b=b, scale=scale, ranks=ranks, head=None, class_names=None, name=None
        )

    def check(self, config: ViTConfig, who: str = "lora") -> None:
        """Raise unless this LoRA, with its head, fits a backbone.

        Raises:
            ValueError: another width or depth, a head on other features or with another number of
                classes than names, or numbers that are not finite.

        """
        who = self.name or who
        if self.depth != config.depth:
            raise ValueError(f"{who}: {_depth_message(self.depth, config.depth)}")
        sizes = target_sizes(config.width, config.mlp_dim)
        for target in self.a:
            d_in, d_out = sizes[target]
            got = (self.a[target].shape[2], self.b[target].shape[1])
            if got != (d_in, d_out):
                raise ValueError(
                    f"{who}: the LoRA on {target} is for a {got[0]} -> {got[1]} product, the"
                    f" backbone's (width {config.width}) is {d_in} -> {d_out}; it belongs to"
                    " another model"
                )
            for factor in (self.a[target], self.b[target]):
                if not torch.isfinite(factor).all():
                    raise ValueError(f"{who}: weights on {target} hold NaN or infinity")
        if self.head is not None:
            if self.head.weight.shape[1] != config.features:
                raise ValueError(
                    f"{who}: the head expects {self.head.weight.shape[1]} features, the backbone"
                    f" gives {config.features}"
                )
            bias = self.head.bias
            if bias is not None and bias.shape != (self.head.classes,):
                raise ValueError(
                    f"{who}: the head's bias must have shape ({self.head.classes},),"
                    f" got {tuple(bias.shape)}"
                )
            for part in (self.head.weight, bias):
                if part is not None and not torch.isfinite(part).all():
                    raise ValueError(f"{who}: the head holds NaN or infinity")
            if self.class_names is not None and len(self.class_names) != self.head.classes:
                raise ValueError(
                    f"{who}: the head has {self.head.classes} classes, but {len(self.class_names)}"
                    " class names are given"
                )

    def fit(self, config: ViTConfig) -> LoRA:
        """The LoRA at a backbone's depth, checked against it.

        A PEFT folder names the blocks it changes, not how many there are; blocks after the last
        named one are added here as zeros, which change nothing.

        Raises:
            ValueError: see `check`.

        """
        more = config.depth - self.depth
        lora = self
        if more > 0 and self.whole:
            raise ValueError(f"{self.name or 'lora'}: {_depth_message(self.depth, config.depth)}")
        if more > 0:
            zeros = lambda x: torch.cat((x, x.new_zeros(more, *x.shape[1:])))  # noqa: E731
            lora = replace(
                self,
                a={t: zeros(x) for t, x in self.a.items()},
                b={t: zeros(x) for t, x in self.b.items()},
                scale={t: zeros(x) for t, x in self.scale.items()},
                ranks={t: (*r, *(0,) * more) for t, r in self.ranks.items()},
            )
        lora.check(config)
        return lora

    def require_head(self) -> Head:
        """The head, for a task that cannot do without it.

        Raises:
            ValueError: there is none; the text says how to add one.

        """
        if self.head is None:
            raise ValueError(
                f"{self.name or 'lora'}: has no head, so its classes cannot be told apart; put"
                " head.safetensors (weight (C, features), bias (C,)) into its folder, or save it"
                ' with PEFT\'s modules_to_save=["classifier"]'
            )
        return self.head

    def save(
        self, path: str | Path, layout: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write a PEFT folder: adapter_config.json, adapter_model.safetensors, head.safetensors.

        Args:
            path: the folder.
            layout: whose module names to use: "hf_clip" (also SigLIP), "hf_vit" and "hf_dinov2"
                (transformers 5), "hf_vit_v4", "hf_dinov2_v4", "hf_dinov3", "timm" (also Eva) or
                "open_clip"; None: those it was loaded with, else "timm".
            dtype: of the stored numbers; None for float32.

        Raises:
            ValueError: unknown layout, or numbers that are not finite in this dtype.
            OSError: the folder cannot be written.

        """
        from fastrecycle.peft_format import write_peft

        write_peft(self, Path(path), layout, dtype)

    @staticmethod
    def load(path: str | Path, vit: ViT | None = None) -> LoRA:
        """Read a PEFT folder, a file of LoRA Recycle's release or of CLIP-LoRA, or "demo": the
        packaged meta-LoRA.

        Args:
            path: as above; which it is, is detected. rsLoRA's scale is alpha / sqrt(rank).
            vit: the backbone, which DoRA alone needs: its change depends on the frozen weights and
                has full rank. `compress` brings it to a small rank, no longer exactly.

        Raises:
            FileNotFoundError: no such folder or file, or no adapter in it.
            ValueError: damaged files, unknown targets, a variant that is not plain LoRA, or DoRA
                without its backbone.

        """
        from fastrecycle.lora_files import read_lora_file
        from fastrecycle.peft_format import read_peft

        if str(path) == "demo":
            from fastrecycle.assets import asset

            return replace(read_peft(asset("meta_lora")), name="demo")
        path = Path(path)
        return read_lora_file(path) if path.is_file() else read_peft(path, vit)

    @staticmethod
    def average(loras: Sequence[LoRA], *, of: Literal["products", "factors"] = "products") -> LoRA:
        """The average of LoRAs.

        Args:
            loras: of one model.
            of: "products": the LoRA whose change is the mean of the given ones' changes scale b a.
                Ranks and targets may differ: factors are concatenated along the rank. "factors":
                mean a and mean b, as weighted sums of LoRAs are usually taken (LoRAHub, and the
                baseline "LoRAs Avg"). Its product is another, mostly a much smaller change: LoRAs
                that started from different random a share no basis, so their means cancel.

        Raises:
            ValueError: none are given, they belong to different models, or the factors' shapes
                differ.

        """
        LoRAStack.of(loras)  # raises unless they belong together
        loras = tuple(loras)  # no part of a bank is empty
        if of == "factors":
            return _average_factors(loras)
        a, b, scale, ranks = {}, {}, {}, {}
        for target in (t for t in TARGETS if any(t in x.a for x in loras)):
            having = [x for x in loras if target in x.a]
            pairs = []
            for i in range(having[0].depth):
                real = [(x, slice(x.ranks[target][i])) for x in having]
                rows = torch.cat([x.a[target][i, r] for x, r in real])
                columns = torch.cat(
                    [x.b[target][i, :, r] * (x.scale[target][i] / len(loras)) for x, r in real], 1
                )
                if len(rows) > min(rows.shape[1], len(columns)):  # then the product is smaller
                    rows, columns = torch.eye(rows.shape[1]).to(rows), columns @ rows
                pairs.append((rows, columns))
            ranks[target] = tuple(len(rows) for rows, _ in pairs)
            most = max(ranks[target])
            pad = torch.nn.functional.pad
            a[target] = torch.stack([pad(x, (0, 0, 0, most - len(x))) for x, _ in pairs])
            b[target] = torch.stack([pad(y, (0, most - len(x))) for x, y in pairs])
            scale[target] = torch.tensor([float(r > 0) for r in ranks[target]]).to(a[target])
        first = loras[0]
        return LoRA(
            a, b, scale, ranks, layout=first.layout, base_model=first.base_model,
            prefix=first.prefix,
        )  # fmt: skip


class LoRABank(Sequence[LoRA]):
    """LoRAs of one backbone: mixed ranks, alphas, targets and head sizes."""

    def __init__(self, loras: Sequence[LoRA]):
        if not loras:
            raise ValueError("LoRABank: expected at least one LoRA, got none")
        self._loras = tuple(loras)

    def __getitem__(self, i):
        return LoRABank(self._loras[i]) if isinstance(i, slice) else self._loras[i]

    def __len__(self) -> int:
        return len(self._loras)

    def __iter__(self) -> Iterator[LoRA]:
        return iter(self._loras)

    def check(self, config: ViTConfig) -> None:
        """Raise unless every LoRA fits the backbone (see `LoRA.check`)."""
        for i, lora in enumerate(self):
            lora.check(config, who=f"LoRA {i}")

    def fit(self, config: ViTConfig) -> LoRABank:
        """Every LoRA at the backbone's depth, checked against it (see `LoRA.fit`)."""
        return LoRABank([lora.fit(config) for lora in self])

    def save(
        self, folder: str | Path, layout: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write one PEFT folder a LoRA, named as the LoRAs are, or 0000, 0001, ...

        Raises:
            FileExistsError: the folder already holds other LoRAs, which `load` would mix in.
            ValueError: see `LoRA.save`; a name that leads out of the folder.

        """
        folder = Path(folder)
        names = [x.name or f"{i:04d}" for i, x in enumerate(self)]
        if len(set(names)) < len(names):
            names = [f"{i:04d}" for i in range(len(self))]
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"LoRABank.save: {name!r} is no name for a folder in {folder}")
        found = {p.parent.relative_to(folder) for p in folder.glob("**/adapter_config.json")}
        others = sorted(str(p) for p in found - {Path(name) for name in names})
        if others:
            raise FileExistsError(
                f"{folder}: already holds {len(others)} other LoRAs ({', '.join(others[:3])}...);"
                " choose an empty folder, or delete them"
            )
        for lora, name in zip(self, names, strict=True):
            lora.save(folder / name, layout, dtype)

    @staticmethod
    def load(folder: str | Path, vit: ViT | None = None) -> LoRABank:
        """Read every PEFT folder below `folder` or, where there is none, every LoRA file (see
        `LoRA.load`), in the order of their names; "demo": packaged.

        Raises:
            FileNotFoundError: no such folder, or no LoRA in it.
            ValueError: one of them cannot be read (its name is in the message).

        """
        if str(folder) == "demo":
            from fastrecycle.assets import asset

            return LoRABank.load(asset("bank"))
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; a bank is a folder of PEFT folders")
        found = sorted(p.parent for p in folder.glob("**/adapter_config.json"))
        files = [] if found else sorted(
            p for p in folder.glob("**/*") if p.suffix in (".safetensors", ".pt")
        )  # fmt: skip
        if not found and not files:
            raise FileNotFoundError(
                f"{folder}: no PEFT folder (adapter_config.json) in it, and no LoRA file"
            )
        loras = []
        for path in found or files:
            below = path.relative_to(folder)
            below = below.with_suffix("") if files else below
            try:
                lora = LoRA.load(path, vit)
            except ValueError as error:
                if found:
                    raise
                raise ValueError(f"{folder}: no PEFT folder in it, and {error}") from None
            loras.append(replace(lora, name=below.as_posix() if below.name else path.name))
        return LoRABank(loras)

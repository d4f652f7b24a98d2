"""CAML: a transformer reads the support set and answers for the query, nothing is tuned.

Context-Aware Meta-Learning (Fifty et al., ICLR 2024), trained on the synthetic pool (App. D).

E tasks, W ways, n support images, Q queries, F features, C numbers of a label code.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrecycle.baselines.base import FrozenFeatures
from fastrecycle.files import load_safetensors, parse_json, save_safetensors
from fastrecycle.ops import Backend, autocast
from fastrecycle.vit import ViT

# Tokens of one pass at prediction: 2^16 of width 448 and their MLP take half a gigabyte in float32.
TOKENS = 1 << 16
_METADATA = "fastrecycle.caml"


def elmes(ways: int, dim: int, seed: int = 0) -> Tensor:
    """Label codes as far apart as can be: an equal-length, maximally equiangular set.

    The corners of a regular simplex, sqrt(W / (W - 1)) (I - 1 1^T / W) U^T with U^T U = I drawn at
    random: unit vectors with u_i . u_j = -1 / (W - 1), which no set of W vectors can undercut.

    Args:
        ways: W, number of codes, at least 2.
        dim: their length C, at least W.
        seed: of U.

    Returns:
        (W, C) float32.

    Raises:
        ValueError: a number out of range.

    """
    if ways < 2:
        raise ValueError(f"ways: must be at least 2, got {ways}")
    if dim < ways:
        raise ValueError(f"dim: must be at least the {ways} ways, got {dim}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(dim, ways, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(drawn).Q  # (C, W)
    centred = torch.eye(ways, dtype=torch.float64) - 1 / ways
    return ((ways / (ways - 1)) ** 0.5 * centred @ axes.T).float()


class CAMLNetwork(nn.Module):
    """The sequence model: label codes, a transformer encoder without positions, an answer.

    A sequence is [query; support]: each token an image's feature beside the code of its way, the
    query's beside a learned one that says "unknown". The logits are the products of what the
    query's token turns into with the codes. There are no positions, so the order of the support
    set does not matter; more ways than a task has leave codes unused.

    Features are centred on `centre` and scaled to length 1 like the codes, so that neither half of
    a token drowns the other whatever the backbone's scale; its authors take CLIP's as they are, and
    logits from a linear layer of one output a way.

    Relabelling the ways permutes the logits exactly where each way keeps its code; where the codes
    stay in their order, only as far as training, which deals them out at random, has taught it.

    Args:
        features: F, of the backbone.
        max_ways: the most ways of a task.
        code_dim: C; with it the transformer has width F + C.
        layers, heads: of the transformer, whose MLP is 4 times as wide as itself.
        seed: of all weights.

    Raises:
        ValueError: a number out of range, or a width that the heads do not divide.

    """

    codes: Tensor
    centre: Tensor

    def __init__(
        self,
        features: int,
        *,
        max_ways: int = 5,
        code_dim: int = 256,
        layers: int = 24,
        heads: int = 8,
        seed: int = 0,
    ):
        for name, value in (("features", features), ("layers", layers), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        width = features + code_dim
        if width % heads:
            raise ValueError(
                f"heads: {heads} do not divide the width {width} = {features} features +"
                f" {code_dim} of a code; change heads or code_dim"
            )
        codes = elmes(max_ways, code_dim, seed)
        super().__init__()
        self.shape = {
            "features": features, "max_ways": max_ways, "code_dim": code_dim, "layers": layers,
            "heads": heads,
        }  # fmt: skip
        with torch.device("meta"):  # PyTorch's own initial values are not wanted
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0, activation="gelu", batch_first=True,
                    norm_first=True,
                )
                for _ in range(layers)
            )  # fmt: skip
            self.norm = nn.LayerNorm(width)
            self.answer = nn.Linear(width, code_dim)
        self.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
        self.unknown = nn.Parameter(torch.zeros(code_dim))
        self.register_buffer("codes", codes)
        self.register_buffer("centre", torch.zeros(features))
        self.requires_grad_(False).eval()

    @property
    def features(self) -> int:
        """F."""
        return self.shape["features"]

    @property
    def max_ways(self) -> int:
        """The most ways of a task."""
        return self.shape["max_ways"]

    def forward(self, support: Tensor, way: Tensor, query: Tensor, codes: Tensor) -> Tensor:
        """Logits of the queries, each read together with its task's whole support set.

        Args:
            support: (E, n, F).
            way: (n,) int64, of each support image.
            query: (E, Q, F).
            codes: (E, W) int64, which code stands for each way.

        Returns:
            (E, Q, W) float32.

        """
        count, queries, _ = query.shape
        own = self.codes[codes]  # (E, W, C)
        shown = torch.cat((self._unit(support), own[:, way]), -1)
        asked = torch.cat((self._unit(query), self.unknown.expand(count, queries, -1)), -1)
        shown = shown[:, None].expand(-1, queries, -1, -1)
        x = torch.cat((asked[:, :, None], shown), 2).flatten(0, 1)  # (E Q, 1 + n, F + C)
        for block in self.blocks:
            x = block(x)
        answer = self.answer(self.norm(x[:, 0])).unflatten(0, (count, queries))
        with torch.autocast(x.device.type, enabled=False):
            return answer.float() @ own.mT

    def _unit(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features.float() - self.centre, dim=-1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        save_safetensors(path, self.state_dict(), {_METADATA: json.dumps(self.shape)})

    @staticmethod
    def load(path: str | Path) -> CAMLNetwork:
        """Read such a file, to the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or not a network of CAML.

        """
        tensors, metadata = load_safetensors(path)
        if _METADATA not in metadata:
            raise ValueError(f"{path}: not a network of CAML; `CAMLNetwork.save` writes one")
        shape = parse_json(metadata[_METADATA], f"{path}: expected the sizes of a network of CAML")
        told = _sizes(tensors)  # before anything of the promised size is built
        if not isinstance(shape, dict) or {k: v for k, v in shape.items() if k != "heads"} != told:
            raise ValueError(
                f"{path}: not the tensors of its own description: expected the sizes {told} and"
                f" heads, got {str(shape)[:200]}"
            )
        if type(shape.get("heads")) is not int:
            raise ValueError(f"{path}: heads: expected a number, got {shape.get('heads')!r}")
        width = told["features"] + told["code_dim"]
        least = 12 * width**2 * told["layers"]  # numbers in the products of the blocks
        if (held := sum(x.numel() for x in tensors.values())) < least:
            raise ValueError(
                f"{path}: not the tensors of its own description: expected at least {least} numbers"
                f" for {told['layers']} layers of width {width}, got {held}"
            )
        try:
            model = CAMLNetwork(**shape)
            model.load_state_dict(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except RuntimeError as error:
            raise ValueError(f"{path}: not the tensors of its own description: {error}") from None
        return model


def _sizes(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The sizes of a network that tensors tell by their shapes; what is missing counts as 0."""
    codes, centre = tensors.get("codes"), tensors.get("centre")
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    ways, length = codes.shape if codes is not None and codes.ndim == 2 else (0, 0)
    return {
        "features": 0 if centre is None else centre.numel(),
        "max_ways": ways,
        "code_dim": length,
        "layers": len(blocks),
    }


class CAML(FrozenFeatures):
    """Classify by a network that reads the support set, on features of the plain backbone: "CAML".

    Args:
        vit, batch_size, precision, backend: see `FrozenFeatures`.
        model: trained on features of this backbone (see `train_caml`).

    """

    bank = None  # it runs on the plain backbone
    of = "factors"

    def __init__(
        self,
        vit: ViT,
        model: CAMLNetwork,
        batch_size: int = 64,
        precision: str = "fp32",
        backend: Backend = "auto",
    ):
        self.vit = vit
        self.model = model
        self.batch_size = batch_size
        self.precision = precision
        self.backend = backend

    def check(self) -> None:
        """See `FrozenFeatures.check`."""
        if not isinstance(self.model, CAMLNetwork):
            raise ValueError(
                f"model: expected a CAMLNetwork, got {type(self.model).__name__}; `train_caml`"
                " trains one, `CAMLNetwork.load` reads one"
            )

    def parameters(self, ways: int, features: int) -> int:
        """None are trained for a task."""
        return 0

    def _adapt(self, support: Tensor, index: Tensor, ways: int) -> tuple[Tensor, ...]:
        model = self.model
        if support.shape[-1] != model.features:
            raise ValueError(
                f"features: the model was trained on {model.features} a picture, got"
                f" {support.shape[-1]}; they belong to another backbone"
            )
        if ways > model.max_ways:
            raise ValueError(
                f"ways: the model tells up to {model.max_ways} apart, got {ways}; train one with"
                " more max_ways"
            )
        if model.centre.device != support.device:
            raise ValueError(
                f"model: is on {model.centre.device}, the features on {support.device}; move it by"
                " model.to(...)"
            )
        return support, index, torch.arange(ways, device=support.device)

    @torch.no_grad()
    def _logits(self, rule: tuple[Tensor, ...], query: Tensor) -> Tensor:
        support, index, codes = rule
        count, queries, width = query.shape
        # each query is a sequence of its own, of whichever task
        task = torch.arange(count, device=query.device).repeat_interleave(queries)
        asked = query.reshape(-1, 1, width)
        most = max(1, TOKENS // (1 + support.shape[1]))
        logits = []
        with autocast(query.device, self.precision):
            for tasks, some in zip(task.split(most), asked.split(most), strict=True):
                dealt = codes.expand(len(tasks), -1)
                logits.append(self.model(support[tasks], index, some, dealt))
        return torch.cat(logits).view(count, queries, len(codes))

"""DoRA as a plain change of weights, which needs the weights that it was trained on.

W' = m (W + scale B A) / ||W + scale B A||, each row by its own norm and magnitude m ("DoRA:
Weight-Decomposed Low-Rank Adaptation", Liu et al. 2024, Eq. 5, as PEFT has it). W' - W has full
rank, and so have the factors that carry it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastrecycle.vit import ViT


def base_weight(vit: ViT, block: int, target: str) -> Tensor:
    """The frozen weight (d_out, d_in) that a LoRA on "qkv" or one of `TARGETS` changes."""
    module: Any = vit.blocks[block]
    if target in ("q", "k", "v"):
        return module.qkv.weight.chunk(3)["qkv".index(target)]
    return getattr(module, target).weight


def dora_change(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """W' - W, (d_out, d_in), in the dtype of a.

    Args:
        weight: W, (d_out, d_in).
        a: (R, d_in); b (d_out, R).
        scale: of b a.
        magnitude: m, (d_out,).

    Raises:
        ValueError: shapes that do not belong together, or a row of W + scale B A that is 0.

    """
    if weight.shape != (b.shape[0], a.shape[1]) or magnitude.shape != b.shape[:1]:
        raise ValueError(
            f"expected a weight {(b.shape[0], a.shape[1])} and a magnitude {(b.shape[0],)}, got"
            f" {tuple(weight.shape)} and {tuple(magnitude.shape)}; the backbone is another model"
        )
    old = weight.detach().double().cpu()
    moved = old + scale * (b.double() @ a.double())
    norm = torch.linalg.vector_norm(moved, dim=1)
    if not norm.all():
        raise ValueError("a row of the changed weight is 0, which has no direction")
    return (moved * (magnitude.double() / norm)[:, None] - old).to(a.dtype)


def full_rank(change: Tensor) -> tuple[Tensor, Tensor]:
    """Factors a, b with b a = change (d_out, d_in), of the smaller side's rank."""
    rows, columns = change.shape
    if columns <= rows:
        return torch.eye(columns, dtype=change.dtype), change
    return change, torch.eye(rows, dtype=change.dtype)

"""Residual stream, LayerNorm and the QKV projection with a training LoRA, as one operation.

    s, n = residual_norm(x, branch)        n = LayerNorm(x + scale branch)
    y    = n (W + s b a)^T + bias          merged anew each step, see `lora_qkv`

    dn = dy (W + s b a),   dx and dbranch = residual_norm's,   da and db from n and dy

The launches are those of `residual_norm` and `lora_qkv`. But n, which only da and db ask for again,
is not kept: the kernel that takes the norm's gradient has it in registers and writes it once more,
so that a block keeps one tensor of the stream's size less, for a write of it.

B images, N tokens, D width, R rank, G LoRAs, each with an equal share of consecutive images.
"""

from __future__ import annotations

import torch
from fastrecycle_kernels import lora_qkv, residual_norm
from fastrecycle_kernels.lora_qkv import POSITIONS
from fastrecycle_kernels.reference import LowRank
from torch import Tensor


@torch.library.custom_op("fastrecycle::norm_qkv", mutates_args=())
def _norm_qkv(
    x: Tensor, branch: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    scale: float, weight: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor],
    scales: list[Tensor], positions: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the stream (empty without a branch), y, mean, rstd and the merged weights."""
    with torch.cuda.device_of(x):
        stream, n, mean, rstd = residual_norm._launch_forward(
            x, branch, norm_weight, norm_bias, eps, scale, weight.dtype
        )
    y, _, merged = lora_qkv._lora_qkv(n, weight, bias, a, b, scales, None, positions, "merge")
    return stream, y, mean, rstd, merged


@_norm_qkv.register_fake
def _(x, branch, norm_weight, norm_bias, eps, scale, weight, bias, a, b, scales, positions):
    mean, rstd = (x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2))
    y = weight.new_empty((*x.shape[:2], len(weight)))
    merged = weight.new_empty((a[0].shape[0], *weight.shape))
    return x.new_empty(x.shape if branch is not None else (0,)), y, mean, rstd, merged


@torch.library.custom_op("fastrecycle::norm_qkv_backward", mutates_args=())
def _norm_qkv_backward(
    dy: Tensor, ds: Tensor | None, stream: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    mean: Tensor, rstd: Tensor, scale: float, merged: Tensor, a: list[Tensor], b: list[Tensor],
    scales: list[Tensor], positions: list[int], dx_dtype: torch.dtype | None,
    dbranch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    dn = dy @ merged[0] if len(merged) == 1 else lora_qkv._shares_input_grad(dy, merged)
    with torch.cuda.device_of(dy):
        dx, dbranch, n = residual_norm._launch_backward(
            dn, ds, stream, norm_weight, mean, rstd, scale, dx_dtype, dbranch_dtype, norm_bias
        )
    da, db = lora_qkv._lora_qkv_fused_factor_grad(dy, n, a, b, scales, positions)
    return dx, dbranch, da, db


@_norm_qkv_backward.register_fake
def _(
    dy, ds, stream, norm_weight, norm_bias, mean, rstd, scale, merged, a, b, scales, positions,
    dx_dtype, dbranch_dtype,
):  # fmt: skip
    dx, dbranch = residual_norm._gradients(stream, dx_dtype, dbranch_dtype)
    return dx, dbranch, [v.new_empty(v.shape) for v in a], [v.new_empty(v.shape) for v in b]


def _save(ctx, inputs, output):
    x, branch, norm_weight, norm_bias, _, ctx.scale, _, _, a, b, scales, ctx.positions = inputs
    stream, _, mean, rstd, merged = output
    ctx.count, ctx.branch_dtype = len(a), None if branch is None else branch.dtype
    ctx.save_for_backward(
        x if branch is None else stream, norm_weight, norm_bias, mean, rstd, merged, *a, *b, *scales
    )
    ctx.set_materialize_grads(False)


def _backward(ctx, ds, dy, *_):
    stream, norm_weight, norm_bias, mean, rstd, merged, *factors = ctx.saved_tensors
    n, frozen = ctx.count, ctx.needs_input_grad
    ds = None if ctx.branch_dtype is None else ds  # without a branch the stream is x itself
    residual_norm._check_frozen((*frozen[2:4], *frozen[6:8]))
    wants_x, wants_branch = frozen[0], frozen[1] and ctx.branch_dtype is not None
    if dy is None and ds is None:
        return *[None] * 8, [None] * n, [None] * n, [None] * n, None
    if dy is None:
        dx, dbranch = residual_norm.gradients_of_sum(
            None, ds, stream, norm_weight, mean, rstd, ctx.scale, ctx.branch_dtype,
            (wants_x, wants_branch),
        )  # fmt: skip
        return dx, dbranch, *[None] * 6, [None] * n, [None] * n, [None] * n, None
    same = wants_x and ctx.scale == 1 and ctx.branch_dtype == stream.dtype
    dx, dbranch, da, db = _norm_qkv_backward(
        dy, ds, stream, norm_weight, norm_bias, mean, rstd, ctx.scale, merged, factors[:n],
        factors[n : 2 * n], factors[2 * n :], ctx.positions, stream.dtype if wants_x else None,
        ctx.branch_dtype if wants_branch and not same else None,
    )  # fmt: skip
    dbranch = dx if same else dbranch
    return (
        dx if wants_x else None, dbranch if wants_branch else None, *[None] * 6, da, db,
        [None] * n, None,
    )  # fmt: skip


_norm_qkv.register_autograd(_backward, setup_context=_save)


# ------------------------------------------------------------------ function


def norm_qkv(
    x: Tensor,
    branch: Tensor | None,
    norm: tuple[Tensor, Tensor],
    eps: float,
    scale: float,
    weight: Tensor,
    bias: Tensor | None,
    lora: dict[str, LowRank],
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S = x + scale branch, and the queries, keys and values of LayerNorm(s) with a LoRA.

    Where no factor trains, or images are in no equal shares, the two operations one after the
    other: then n is not kept, or `lora_qkv` needs it otherwise.

    Args:
        x, branch, eps, scale: see `residual_norm`; `norm` has its weight and bias.
        weight, bias, lora, index: see `lora_qkv`.

    Returns:
        s in x's dtype, x itself without a branch; (B, N, 3, D).

    Raises:
        ValueError: see `residual_norm` and `lora_qkv`.

    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    positions = [p for p, target in enumerate(POSITIONS) if target in lora]
    a, b, scales = ([lora[POSITIONS[p]][i] for p in positions] for i in range(3))
    trains = torch.is_grad_enabled() and any(v.requires_grad for v in (*a, *b))
    if not trains or (index is not None and len(a[0]) > 1):
        s, n = residual_norm.residual_norm(x, branch, *norm, eps, scale, dtype)
        return s, lora_qkv.lora_qkv(n, weight, bias, lora, index)
    residual_norm.check(x, branch, *norm)
    lora_qkv.check(x, weight, bias, lora)
    lora_qkv.check_shares(len(x), len(a[0]))
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    scales = [v.detach() for v in scales]
    s, y, *_ = _norm_qkv(x, branch, *norm, eps, scale, weight, bias, a, b, scales, positions)
    return x if branch is None else s, y.unflatten(-1, (3, -1))

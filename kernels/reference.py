"""The oracle: every operation of `fastrecycle.ops` in readable, eager PyTorch.

B images, N tokens, D width, H heads, d head width, R rank, G LoRAs (or tasks) in one batch,
C channels. Everything that sums is computed in float32 at least; outputs have the input's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

LowRank = tuple[Tensor, Tensor, Tensor]
"""a (G, R, D_in), b (G, D_out, R), scale (G,): y += scale (x a^T) b^T."""


class GatedLowRank(NamedTuple):
    """Outputs of G LoRAs, weighed by E gates: y += sum_g gate_g(x) scale_g (x a_g^T) b_g^T.

    gate(x) = softmax(x weight^T + bias), of each token by itself.
    """

    a: Tensor  # (G, R, D_in)
    b: Tensor  # (G, D_out, R)
    scale: Tensor  # (G,)
    weight: Tensor  # (E, G, D_in)
    bias: Tensor  # (E, G)


class Fp8Weight(NamedTuple):
    """A frozen weight (N, K) in e4m3, by its rows for y = x W^T and by its columns for dy W."""

    w8: Tensor  # (N, K)
    w_scale: Tensor  # (1, N) float32
    wt8: Tensor  # (K, N)
    wt_scale: Tensor  # (1, K) float32


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Keep float32 products in float32, which an autocast around the caller would round to bf16."""
    return torch.autocast(x.device.type, enabled=False)


def wide(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 input: what sums are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def gated_low_rank(x: Tensor, lora: GatedLowRank, index: Tensor | None) -> Tensor:
    """Sum_g gate_g(x) scale_g (x a_g^T) b_g^T, each image under its own gate; see `low_rank`.

    One product of rank G R: the gate of a LoRA is a factor of its R columns.
    """
    a, b, scale, weight, bias = lora
    if index is None:
        shares = x.unflatten(0, (len(weight), x.shape[0] // len(weight))).flatten(1, 2)
        scores = (shares @ weight.mT + bias[:, None]).view(*x.shape[:-1], -1)  # (B, N, G)
    else:
        scores = x @ weight[index].mT + bias[index][:, None]
    gate = (scores.to(wide(x)).softmax(-1) * scale)[..., None]
    down = (x @ a.flatten(0, 1).T).unflatten(-1, a.shape[:2])  # (B, N, G, R)
    return (down * gate.to(down.dtype)).flatten(-2) @ b.mT.flatten(0, 1)


def low_rank(x: Tensor, lora: LowRank | GatedLowRank, index: Tensor | None) -> Tensor:
    """Scale (x a^T) b^T, each image under its own LoRA. x (B, N, D_in) -> (B, N, D_out).

    Without an index each LoRA has an equal share of consecutive images, the first LoRA the first.
    """
    if isinstance(lora, GatedLowRank):
        return gated_low_rank(x, lora, index)
    a, b, scale = lora
    if index is None and len(a) == 1:
        a, b, scale = a[0], b[0], scale[0]
        return (x @ a.T) @ (b * scale).T
    if index is None:
        shares = x.unflatten(0, (len(a), x.shape[0] // len(a)))  # (G, B / G, N, D_in)
        up = (b * scale[:, None, None])[:, None]
        return ((shares @ a[:, None].mT) @ up.mT).flatten(0, 1)
    a, b, scale = a[index], b[index], scale[index]
    return (x @ a.transpose(1, 2)) @ (b * scale[:, None, None]).transpose(1, 2)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LowRank | GatedLowRank | None,
    index: Tensor | None,
) -> Tensor:
    """X W^T + bias + scale (x a^T) b^T."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if lora is None else y + low_rank(x, lora, index)


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Mapping[str, LowRank | GatedLowRank],
    index: Tensor | None,
) -> Tensor:
    """The fused QKV projection with a LoRA on any of q, k, v. (B, N, D) -> (B, N, 3, D)."""
    y = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (3, -1))
    parts = list(y.unbind(-2))
    for position, target in enumerate(("q", "k", "v")):
        if target in lora:
            parts[position] = parts[position] + low_rank(x, lora[target], index)
    return torch.stack(parts, dim=-2)


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """S = x + scale branch in x's dtype, y = LayerNorm(s) in `dtype` (None: the branch's or x's).

    x, branch (..., D); branch None: s is x. weight, bias (D,).
    """
    to = wide(x)
    stream = x if branch is None else (x.to(to) + scale * branch.to(to)).to(x.dtype)
    y = torch.nn.functional.layer_norm(stream.to(to), x.shape[-1:], weight.to(to), bias.to(to), eps)
    return stream, y.to(dtype or (x if branch is None else branch).dtype)


def activation(u: Tensor, kind: str) -> Tensor:
    """GELU, u Phi(u), "gelu_tanh", its approximation, or "quick_gelu", u sigmoid(1.702 u)."""
    if kind == "quick_gelu":
        wider = u.to(wide(u))
        return (wider * torch.sigmoid(1.702 * wider)).to(u.dtype)
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(u, approximate=approximate)  # in float32 of itself


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) -> rows (T, K) in e4m3, and (T, 1) float32 by which to multiply them.

    The largest number of a row becomes 448, e4m3's largest. A row of zeros stays one.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) * (1 / 448)
    return (rows * (1 / scale)).to(torch.float8_e4m3fn), scale


def dequantise(x8: Tensor, scale: Tensor) -> Tensor:
    """The numbers that rows in e4m3 stand for, float32."""
    return x8.float() * scale


def fp8_weight(weight: Tensor) -> Fp8Weight:
    """Of a weight (N, K)."""
    w8, w_scale = quantise_rows(weight.detach())
    wt8, wt_scale = quantise_rows(weight.detach().T.contiguous())
    return Fp8Weight(w8, w_scale.mT.contiguous(), wt8, wt_scale.mT.contiguous())


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        y = dequantise(*quantise_rows(x)) @ dequantise(weight.w8, weight.w_scale.mT).T
        y = y if bias is None else y + bias.float()
        return y.view(*x.shape[:-1], -1).to(torch.bfloat16)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        dx = dequantise(*quantise_rows(dy)) @ dequantise(ctx.weight.wt8, ctx.weight.wt_scale.mT).T
        return dx.view(*dy.shape[:-1], -1).to(torch.bfloat16).to(ctx.dtype), None, None


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """X W^T + bias in bf16, both factors rounded to e4m3; so is dy for dx = dy W."""
    with no_autocast(x):
        return _Fp8Linear.apply(x, weight, bias)


def residual_mlp(
    x: Tensor,
    branch: Tensor,
    norm: tuple[Tensor, Tensor],
    eps: float,
    scale: float,
    first: Fp8Weight,
    first_bias: Tensor | None,
    second: Fp8Weight,
    second_bias: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """S = x + scale branch, and MLP(LayerNorm(s)) by `fp8_linear`."""
    stream, y = residual_norm(x, branch, *norm, eps, scale, torch.float32)
    u = fp8_linear(y, first, first_bias)
    return stream, fp8_linear(activation(u.float(), kind), second, second_bias)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt d) v. Each (B, H, N, d)."""
    to = wide(q)
    with no_autocast(q):
        scores = (q.to(to) @ k.to(to).transpose(-1, -2)) * q.shape[-1] ** -0.5
        return (scores.softmax(-1) @ v.to(to)).to(v.dtype)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Attention within each sequence of a packed batch. q, k, v (T, H, d); cu_seqlens (B + 1,)."""
    length = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens, length, right=True) - 1
    same = sequence[:, None] == sequence[None, :]
    to = wide(q)
    with no_autocast(q):
        scores = torch.einsum("thd,shd->hts", q.to(to), k.to(to)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~same, float("-inf"))
        return torch.einsum("hts,shd->thd", scores.softmax(-1), v.to(to)).to(v.dtype)


def cls_scores(q_cls: Tensor, k: Tensor) -> Tensor:
    """Head-averaged attention of the CLS token, LoRA Recycle, Eq. 5.

    q_cls (B, H, d), k (B, H, N, d) -> (B, N) float32 (float64 for float64 input), rows sum to 1.
    """
    to = wide(q_cls)
    with no_autocast(q_cls):
        scores = (k.to(to) @ q_cls.to(to)[..., None]).squeeze(-1) * q_cls.shape[-1] ** -0.5
        return scores.softmax(-1).mean(1)


def packed_attention(
    qkv: Tensor, *, queries: int | None = None, with_scores: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of the first `queries` tokens, and the CLS scores, which carry no gradient.

    qkv (B, N, 3, H, d) -> (B, Q, H d), and (B, N) float32 or None.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
    scores = cls_scores(q[:, :, 0], k).detach() if with_scores else None
    return attention(q[:, :, :queries], k, v).transpose(1, 2).flatten(2), scores


def token_gather(x: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index`: (B, N, D) and (B, k) -> (B, k, D); or flat (T',) -> packed (T', D)."""
    if index.ndim == 1:
        return x.reshape(-1, x.shape[-1])[index]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def bn_prior(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    segments: int,
    relu: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inference BatchNorm (-add)(-ReLU), with the moments of its input for each task.

    x (B, C, H, W), B a multiple of `segments`, consecutive images belong together. Returns y
    (B, C, H, W) in x's dtype, and the tasks' mean and biased variance (segments, C) in float32.

    A stored variance of 0 marks a channel that was constant over the training set: its output
    there was `bias`, whatever the input. Dividing a synthetic image's deviation by sqrt(eps)
    instead would amplify it some 300 times, so such a channel passes on `bias` alone.
    """
    to = wide(x)
    by_task = x.to(to).unflatten(0, (segments, -1))  # (G, b, C, H, W)
    mu = by_task.mean((1, 3, 4))
    sigma2 = by_task.var((1, 3, 4), correction=0)
    scale = torch.where(var > 0, weight * torch.rsqrt(var + eps), torch.zeros_like(var)).to(to)
    shift = bias.to(to) - mean.to(to) * scale
    y = x.to(to) * scale[:, None, None] + shift[:, None, None]
    if residual is not None:
        y = y + residual.to(to)
    if relu:
        y = y.relu()
    return y.to(x.dtype), mu, sigma2


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    """(3, 1, 1), filled on the device: no copy from the host."""
    return torch.stack([like.new_full((), value) for value in values])[:, None, None]


def augment(
    images: Tensor,
    rows: Tensor,
    row_maps: Tensor | None,
    column_maps: Tensor | None,
    which: Tensor | None,
    flip: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Images of a pool: R X C^T clamped to [0, 1], mirrored, normalised.

    images (P, 3, S, S) uint8; rows, which (B,) int64; maps (M, S, S), which None: M = B; without
    maps nothing is clamped; flip (B,) bool; mean, std of 3 channels. Returns (B, 3, S, S).
    """
    pixels = images[rows].float() / 255
    if row_maps is not None and column_maps is not None:
        maps = [m if which is None else m[which] for m in (row_maps, column_maps)]
        r, c = (m.float()[:, None] for m in maps)
        with no_autocast(images):
            pixels = (r @ pixels @ c.mT).clamp(0, 1)
    pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
    return ((pixels - _channels(mean, pixels)) / _channels(std, pixels)).to(dtype)


def moment_distance(
    moments: Sequence[tuple[Tensor, Tensor]], mean: Tensor, var: Tensor, first_bn: float
) -> Tensor:
    """R_BN of each task: sum over layers of ||mu - mean||_2 + ||sigma2 - var||_2.

    moments: mu and sigma2 of each layer, each (G, C); mean, var: the layers' stored statistics one
    after the other; first_bn: factor of the first layer's term. Returns (G,).
    """
    widths = [mu.shape[1] for mu, _ in moments]
    norm = torch.linalg.vector_norm  # its gradient at 0 is 0, not NaN
    terms = [
        norm(mu - m, dim=1) + norm(sigma2 - v, dim=1)
        for (mu, sigma2), m, v in zip(moments, mean.split(widths), var.split(widths), strict=True)
    ]
    return torch.stack([first_bn * terms[0], *terms[1:]]).sum(0)


def jittered(images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Each task's images rolled by shift (G, 2), then mirrored where flip (G,).

    images (G, m, 3, S, S). out[g, ..., r, c] = images[g, ..., (r - shift_0) mod S, (c - shift_1)
    mod S], the columns of a mirrored task in reversed order.
    """
    side = images.shape[-1]
    line = torch.arange(side, device=images.device)
    rows, columns = ((line - s[:, None]) % side for s in shift.unbind(1))  # (G, S) each
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    task = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 3, 4, 1, 2)[task, rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 4, 1, 2).contiguous()


def jitter_pixels(
    images: Tensor,
    shift: Tensor,
    flip: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    prior_mean: Sequence[float] | None,
    prior_std: Sequence[float] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Images as the backbone sees them, and in the prior's normalisation (None without a prior).

    images (G, m, 3, S, S) in the backbone's; shift (G, 2), flip (G,). Returns (G, m, 3, S, S) and
    (G m, 3, S, S), ((seen std + mean) - prior_mean) / prior_std.
    """
    seen = jittered(images, shift, flip)
    if prior_mean is None or prior_std is None:
        return seen.to(dtype), None
    own_mean, own_std, mean_to, std_to = (
        _channels(values, images) for values in (mean, std, prior_mean, prior_std)
    )
    natural = (seen * own_std + own_mean - mean_to) / std_to
    return seen.to(dtype), natural.flatten(0, 1).to(dtype)


@torch.no_grad()
def pixel_step(
    images: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    d_seen: Tensor,
    d_natural: Tensor | None,
    shift: Tensor,
    flip: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    low: Sequence[float],
    high: Sequence[float],
    std: Sequence[float],
    prior_std: Sequence[float] | None,
) -> None:
    """Adam's step from the gradients of `jitter_pixels`' results; x clamped to [low, high].

    In place on images, exp_avg, exp_avg_sq (G, m, 3, S, S) and step. d_seen (G, m, 3, S, S),
    d_natural (G m, 3, S, S) or None; low, high, std, prior_std of each channel.
    """
    gradient = d_seen.to(wide(images))
    if d_natural is not None and prior_std is not None:
        factor = _channels(std, images) / _channels(prior_std, images)
        gradient = gradient + factor * d_natural.view_as(images)
    # undone in the order opposite to the jitter's: mirrored, then rolled back
    still = torch.zeros_like(flip)
    gradient = torch.where(flip[:, None, None, None, None], gradient.flip(-1), gradient)
    gradient = jittered(gradient, -shift, still)
    step += 1
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    unbiased = [s / (1 - b ** step.double()) for s, b in zip((exp_avg, exp_avg_sq), betas)]
    images -= lr * unbiased[0] / (unbiased[1].sqrt() + eps)
    images.clamp_(_channels(low, images), _channels(high, images))

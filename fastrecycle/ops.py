"""The operations of LoRA Recycle: the equation of each, its checks, and the door to its code.

B images, N tokens, D width, H heads, d head width, R rank, G LoRAs (or tasks) in one batch,
C channels. Every function but `pixel_step`, an optimiser, is differentiable and functional (nothing
is written in place); all trace under `torch.compile(fullgraph=True)`.

Backends are resolved once, when a stage is built (`resolve_backend`), logged and written to the
run's manifest; an operation itself never falls back to another implementation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from fastrecycle_kernels import host, reference
from fastrecycle_kernels.reference import Fp8Weight, GatedLowRank, LowRank
from torch import Tensor

from fastrecycle import pruning

__all__ = [
    "ActivationKind", "Backend", "Fp8Weight", "GatedLowRank", "Impl", "LowRank", "Resolved",
    "activation", "attention", "augment", "autocast", "bn_pool_chunks", "bn_prior",
    "bn_prior_chunks", "carry", "check_precision", "cls_scores", "embed_kept", "fp8_weight",
    "host", "impl_of", "jitter_pixels", "kernels_suit", "lora_linear", "lora_qkv",
    "moment_distance", "norm_qkv", "pixel_step", "residual_mlp", "residual_norm", "resolve_backend",
    "stem_conv", "stem_conv_fits", "token_gather", "top_patches", "varlen_attention",
    "weight_dtype",
]  # fmt: skip

log = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "compile", "reference"]
"""reference: eager PyTorch. compile: the same step under `torch.compile`, on CUDA in a CUDA graph.
triton: our kernels, in a CUDA graph without `torch.compile`. auto: see `resolve_backend`."""

Resolved = Literal["triton", "compile", "reference"]
"""What a stage runs on, "auto" decided."""

Impl = Literal["reference", "triton"]
"""Which code computes an operation."""

ActivationKind = Literal["gelu", "gelu_tanh", "quick_gelu"]
"""The activation of an MLP, see `activation`."""


def kernels_suit(width: int, heads: int, rank: int = 1) -> bool:
    """Whether our kernels take a backbone of this width and LoRAs up to this rank."""
    return width % 16 == 0 and width // heads <= 128 and rank <= 64


def resolve_backend(
    backend: Backend, device: torch.device, precision: str = "bf16", *, suited: bool = True
) -> Resolved:
    """The backend that a stage runs on.

    "auto" is "triton" in half precision on a CUDA device that Triton knows (compute capability 8.0
    on), else "compile" on CUDA, and "reference" on the CPU.

    Args:
        backend: as asked for.
        device: where the stage runs.
        precision: "bf16", "fp8" or "fp32", in which our kernels only serve checks.
        suited: see `kernels_suit`.

    Raises:
        ValueError: no such backend, or "triton" without a CUDA device.

    """
    if backend == "auto":
        if device.type != "cuda" or find_spec("triton") is None:
            return "reference"
        known = torch.cuda.get_device_capability(device) >= (8, 0)
        return "triton" if suited and known and precision != "fp32" else "compile"
    if backend not in ("triton", "compile", "reference"):
        raise ValueError(
            f'backend: expected "auto", "triton", "compile" or "reference", got {backend!r}'
        )
    if backend == "triton" and device.type != "cuda":
        raise ValueError(
            f'backend: "triton" needs a CUDA device, got {device.type}; use "reference" or'
            ' "compile"'
        )
    return backend


def impl_of(backend: Resolved) -> Impl:
    """The code that a stage's operations use."""
    return "triton" if backend == "triton" else "reference"


def check_precision(precision: str, backend: Resolved, device: torch.device) -> None:
    """Raise where a stage on this backend and device cannot compute so.

    Raises:
        ValueError: no such precision; "fp8" without our kernels, or on a device without float8
            products.

    """
    if precision not in ("fp32", "bf16", "fp8"):
        raise ValueError(f'precision: expected "fp32", "bf16" or "fp8", got {precision!r}')
    if precision != "fp8":
        return
    if backend != "triton":
        raise ValueError(
            f'precision: "fp8" needs backend "triton", got "{backend}" on {device.type}; use "bf16"'
            ' or "fp32"'
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            'precision: "fp8" needs a GPU of compute capability 8.9 (Ada, Hopper) or above, got'
            f' {capability[0]}.{capability[1]}; use "bf16"'
        )


def weight_dtype(precision: str) -> torch.dtype:
    """What a frozen backbone's weights are prepared in."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    return dtypes[precision]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bf16 products with fp32 parameters, norms, softmax and losses; nothing for "fp32".

    For "fp8" bf16 is everything but the products of `Fp8Weight`.
    """
    if precision in ("bf16", "fp8"):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _check_low_rank(
    name: str, x: Tensor, lora: LowRank | GatedLowRank, d_out: int, index: Tensor | None
) -> None:
    a, b, scale = lora[:3]
    sharing = len(lora.weight) if isinstance(lora, GatedLowRank) else len(a)
    if a.ndim != 3 or a.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{name}: a must have shape (G, R, {x.shape[-1]}), got {tuple(a.shape)}; this LoRA was"
            " made for a model of another width"
        )
    if b.shape != (a.shape[0], d_out, a.shape[1]):
        raise ValueError(
            f"{name}: b must have shape {(a.shape[0], d_out, a.shape[1])}, got {tuple(b.shape)}"
        )
    if scale.shape != a.shape[:1]:
        raise ValueError(f"{name}: scale must have shape {(a.shape[0],)}, got {tuple(scale.shape)}")
    if isinstance(lora, GatedLowRank) and (
        lora.weight.shape != (sharing, len(a), x.shape[-1]) or lora.bias.shape != (sharing, len(a))
    ):
        raise ValueError(
            f"{name}: gates of {len(a)} LoRAs must have weights (E, {len(a)}, {x.shape[-1]}) and"
            f" biases (E, {len(a)}), got {tuple(lora.weight.shape)} and {tuple(lora.bias.shape)}"
        )
    if index is None and x.shape[0] % sharing:
        raise ValueError(
            f"{name}: {x.shape[0]} images cannot be shared equally by {sharing}"
            f" {'gates' if isinstance(lora, GatedLowRank) else 'LoRAs'}; pass lora_index, the LoRA"
            " of each image"
        )
    if index is not None and index.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: lora_index must have shape {(x.shape[0],)}, got {tuple(index.shape)}"
        )


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora: LowRank | GatedLowRank | None = None,
    *,
    lora_index: Tensor | None = None,
    fp8: Fp8Weight | None = None,
    impl: Impl = "reference",
) -> Tensor:
    """Y = x W^T + bias + scale (x a^T) b^T.

    Args:
        x: (B, N, D_in).
        weight: (D_out, D_in), frozen or not; bias (D_out,) or None.
        lora: a (G, R, D_in), b (G, D_out, R), scale (G,); None for the plain product. Or a
            `GatedLowRank`: y = x W^T + bias + sum_g gate_g(x) scale_g (x a_g^T) b_g^T.
        lora_index: (B,) int64, the LoRA (or gate) of each image; None: each has an equal share of
            consecutive images.
        fp8: the weight, frozen, in float8, which a product without a LoRA takes: bf16 out.
        impl: which code computes a product in float8; all others are the library's.

    Returns:
        (B, N, D_out).

    Raises:
        ValueError: shapes disagree.

    """
    if lora is not None:
        _check_low_rank("lora_linear", x, lora, weight.shape[0], lora_index)
    elif fp8 is not None:
        return _fp8_linear(x, fp8, bias, impl)
    return reference.lora_linear(x, weight, bias, lora, lora_index)


def fp8_weight(weight: Tensor) -> Fp8Weight:
    """A frozen weight (D_out, D_in) in float8 (e4m3), each row, and each column, by its own scale.

    Raises:
        ValueError: a side that is no multiple of 16.

    """
    if any(side % 16 for side in weight.shape):
        raise ValueError(
            f'fp8_weight: sides must be multiples of 16, got {tuple(weight.shape)}; use "bf16"'
        )
    return reference.fp8_weight(weight)


def _fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None, impl: Impl) -> Tensor:
    """X W^T + bias, x rounded to e4m3 by rows, and so its gradient."""
    if impl == "triton":
        from fastrecycle_kernels.fp8 import fp8_linear as kernel

        return kernel(x, weight, bias)
    return reference.fp8_linear(x, weight, bias)


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
    kind: ActivationKind,
    *,
    impl: Impl = "reference",
) -> tuple[Tensor, Tensor]:
    """`residual_norm` and an MLP in float8: s = x + scale branch, y = W2 act(W1 LayerNorm(s)).

    Args:
        x: (..., D), the stream; branch (..., D).
        norm: weight and bias (D,), frozen.
        eps: of the norm.
        scale: of the branch.
        first, second: (M, D) and (D, M); biases (M,) and (D,) bfloat16, or None.
        kind: of the activation, see `activation`.
        impl: which code.

    Returns:
        s in x's dtype; y in bfloat16.

    Raises:
        ValueError: shapes disagree.

    """
    if branch.shape != x.shape:
        raise ValueError(
            f"residual_mlp: branch must have shape {tuple(x.shape)}, got {tuple(branch.shape)}"
        )
    arguments = (x, branch, norm, eps, scale, first, first_bias, second, second_bias, kind)
    if impl == "triton":
        from fastrecycle_kernels.fp8 import residual_mlp as kernel

        return kernel(*arguments)
    return reference.residual_mlp(*arguments)


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora: Mapping[str, LowRank | GatedLowRank] | None = None,
    *,
    lora_index: Tensor | None = None,
    fp8: Fp8Weight | None = None,
    impl: Impl = "reference",
) -> Tensor:
    """Queries, keys and values with a LoRA on any of them: y = x W^T + bias + scale (x a^T) b^T.

    Args:
        x: (B, N, D).
        weight: (3 D, D), rows in the order q, k, v; bias (3 D,) or None.
        lora: {"q" | "k" | "v": (a (G, R, D), b (G, D, R), scale (G,))}; ranks below R are
            zero-padded. Or a `GatedLowRank` each, see `lora_linear`.
        lora_index: (B,) int64, the LoRA (or gate) of each image; None: each has an equal share of
            consecutive images.
        fp8: see `lora_linear`.
        impl: "triton" wants frozen weight, bias and scale, D a multiple of 16, R at most 64, and
            no gate.

    Returns:
        (B, N, 3, D).

    Raises:
        ValueError: shapes disagree, or `impl` cannot do this.

    """
    lora = lora or {}
    _check_qkv(x, weight, lora, lora_index)
    if fp8 is not None and not lora:
        return _fp8_linear(x, fp8, bias, impl).unflatten(-1, (3, -1))
    if impl == "triton":
        from fastrecycle_kernels.lora_qkv import lora_qkv as kernel

        return kernel(x, weight, bias, _not_gated(lora), lora_index)
    return reference.lora_qkv(x, weight, bias, lora, lora_index)


def _check_qkv(
    x: Tensor,
    weight: Tensor,
    lora: Mapping[str, LowRank | GatedLowRank],
    lora_index: Tensor | None,
) -> None:
    if weight.shape != (3 * x.shape[-1], x.shape[-1]):
        raise ValueError(
            f"lora_qkv: weight must have shape {(3 * x.shape[-1], x.shape[-1])},"
            f" got {tuple(weight.shape)}"
        )
    for target, factors in lora.items():
        if target not in ("q", "k", "v"):
            raise ValueError(f'lora_qkv: targets are "q", "k" and "v", got {target!r}')
        _check_low_rank(f"lora_qkv[{target}]", x, factors, x.shape[-1], lora_index)


def _not_gated(lora: Mapping[str, LowRank | GatedLowRank]) -> dict[str, LowRank]:
    plain = {t: f for t, f in lora.items() if not isinstance(f, GatedLowRank)}
    if len(plain) < len(lora):
        raise ValueError('lora_qkv: gated LoRAs have no kernel; impl must be "reference"')
    return plain


def norm_qkv(
    x: Tensor,
    branch: Tensor | None,
    norm: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    lora: Mapping[str, LowRank | GatedLowRank] | None = None,
    *,
    eps: float,
    scale: float = 1.0,
    lora_index: Tensor | None = None,
    fp8: Fp8Weight | None = None,
    impl: Impl = "reference",
) -> tuple[Tensor, Tensor]:
    """`residual_norm`, then `lora_qkv` of what it normalised.

    Args:
        x, branch, eps, scale: see `residual_norm`; norm is its weight and bias (D,).
        weight, bias, lora, lora_index, fp8: see `lora_qkv`.
        impl: "triton" does not keep the normalised rows where factors train, each LoRA with an
            equal share of the images.

    Returns:
        s in x's dtype, x itself without a branch; (B, N, 3, D).

    Raises:
        ValueError: see `residual_norm` and `lora_qkv`.

    """
    lora = lora or {}
    if impl == "triton" and lora:
        _check_norm(x, branch, *norm)
        _check_qkv(x, weight, lora, lora_index)
        from fastrecycle_kernels.norm_qkv import norm_qkv as kernel

        plain = _not_gated(lora)
        return kernel(x, branch, norm, eps, scale, weight, bias, plain, lora_index)
    s, n = residual_norm(x, branch, *norm, eps, scale, impl=impl)
    return s, lora_qkv(n, weight, bias, lora, lora_index=lora_index, fp8=fp8, impl=impl)


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float = 1.0,
    *,
    impl: Impl = "reference",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise: s = x + scale branch, y = LayerNorm(s).

    Args:
        x: (..., D), the stream; branch (..., D), or None where there is nothing to add.
        weight, bias: (D,) of the norm.
        eps: of the norm.
        scale: of the branch.
        impl: "triton" wants frozen weight and bias.

    Returns:
        s in x's dtype; y in the branch's (without one: x's), under autocast in autocast's.

    Raises:
        ValueError: shapes disagree, or `impl` cannot do this.

    """
    _check_norm(x, branch, weight, bias)
    dtype = x.dtype if branch is None else branch.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if impl == "triton":
        from fastrecycle_kernels.residual_norm import residual_norm as kernel

        return kernel(x, branch, weight, bias, eps, scale, dtype)
    return reference.residual_norm(x, branch, weight, bias, eps, scale, dtype)


def _check_norm(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    if branch is not None and branch.shape != x.shape:
        raise ValueError(
            f"residual_norm: branch must have shape {tuple(x.shape)}, got {tuple(branch.shape)}"
        )
    if weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        raise ValueError(
            f"residual_norm: weight and bias must have shape {tuple(x.shape[-1:])},"
            f" got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )


def activation(u: Tensor, kind: ActivationKind, *, impl: Impl = "reference") -> Tensor:
    """GELU, exact by the error function; by tanh, as SigLIP has it; or "quick_gelu",
    u sigmoid(1.702 u), as OpenAI's CLIP has it.
    """
    if impl == "triton":
        from fastrecycle_kernels.activation import activation as kernel

        return kernel(u, kind)
    return reference.activation(u, kind)


def attention(
    qkv: Tensor,
    *,
    queries: int | None = None,
    with_scores: bool = False,
    impl: Impl = "reference",
) -> tuple[Tensor, Tensor | None]:
    """Self-attention within each image, and the importance of its tokens.

    Args:
        qkv: (B, N, 3, H, d), as `lora_qkv` leaves it.
        queries: only the first so many tokens ask; None for all.
        with_scores: also return `cls_scores`, which carry no gradient.
        impl: which code; "reference" is PyTorch's scaled dot product attention.

    Returns:
        y (B, queries, H d); scores (B, N) float32, or None.

    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention: expected qkv (B, N, 3, H, d), got {tuple(qkv.shape)}")
    if impl == "triton":
        from fastrecycle_kernels.attention import packed_attention as kernel

        return kernel(qkv, queries=queries, with_scores=with_scores)
    kind = qkv.device.type
    if torch.is_autocast_enabled(kind):
        qkv = qkv.to(torch.get_autocast_dtype(kind))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
    scores = reference.cls_scores(q[:, :, 0], k).detach() if with_scores else None
    # Under autocast PyTorch's softmax inside returns float32, and under vmap its gradient then
    # does not take bfloat16.
    with torch.autocast(kind, enabled=False):
        y = torch.nn.functional.scaled_dot_product_attention(q[:, :, :queries], k, v)
    return y.transpose(1, 2).flatten(2), scores


def cls_scores(q_cls: Tensor, k: Tensor, *, impl: Impl = "reference") -> Tensor:
    """Importance of each token: head mean of softmax(q_cls k^T / sqrt d). LoRA Recycle, Eq. 5.

    Args:
        q_cls: (B, H, d), the CLS token's queries.
        k: (B, H, N, d), all keys.
        impl: "triton" computes no gradient.

    Returns:
        (B, N) float32; each row sums to 1. Use `.detach()`: pruning carries no gradient.

    Raises:
        ValueError: shapes disagree.

    """
    if q_cls.ndim != 3 or k.ndim != 4 or q_cls.shape != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            "cls_scores: expected q_cls (B, H, d) and k (B, H, N, d),"
            f" got {tuple(q_cls.shape)} and {tuple(k.shape)}"
        )
    if impl == "triton":
        from fastrecycle_kernels.cls_scores import cls_scores as kernel

        return kernel(q_cls, k)
    return reference.cls_scores(q_cls, k)


def top_patches(scores: Tensor, count: int, *, impl: Impl = "reference") -> Tensor:
    """The patches that stay: see `fastrecycle.pruning.top_patches`; "triton" takes up to 4096."""
    if impl == "triton":
        from fastrecycle_kernels.cls_scores import top_patches as kernel

        return kernel(scores, count)
    return pruning.top_patches(scores, count)


def token_gather(x: Tensor, index: Tensor, *, impl: Impl = "reference") -> Tensor:
    """The tokens at `index`; the gradient reaches only those.

    Args:
        x: (B, N, D).
        index: (B, k) int64 positions within each image, giving (B, k, D); or (T',) int64 positions
            in the flattened (B N) tokens, giving a packed (T', D) batch for `varlen_attention`.
        impl: which code.

    Raises:
        ValueError: shapes disagree.

    """
    if x.ndim != 3 or index.ndim not in (1, 2) or (index.ndim == 2 and len(index) != len(x)):
        raise ValueError(
            "token_gather: expected x (B, N, D) and index (B, k) or (T',),"
            f" got {tuple(x.shape)} and {tuple(index.shape)}"
        )
    if impl == "triton":
        from fastrecycle_kernels.token_gather import token_gather as kernel

        return kernel(x, index)
    return reference.token_gather(x, index)


def embed_kept(images: Tensor, keep: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Embeddings of the kept patches, of which alone pixels are read. Triton only.

    Args:
        images: (B, 3, S, S).
        keep: (B, k) int64 patch indices.
        weight: (D, 3, P, P) of the patch convolution; bias (D,) or None.

    Returns:
        (B, k, D).

    """
    from fastrecycle_kernels.token_gather import gather_patches_embed

    return gather_patches_embed(images, keep, weight, bias)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt d) v within each image.

    Args:
        q, k, v: (B, H, N, d) for images of equal length; packed (T, H, d) with `cu_seqlens`.
        cu_seqlens: (B + 1,) int32, starts of the images in the packed batch, ending with T.
        longest: tokens of the longest image, or more; needed with `cu_seqlens` on CUDA in half
            precision.

    Returns:
        The shape of q.

    Raises:
        ValueError: shapes disagree.

    """
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "varlen_attention: q, k and v must have one shape,"
            f" got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if cu_seqlens is None:
        if q.ndim != 4:
            raise ValueError(f"varlen_attention: expected q (B, H, N, d), got {tuple(q.shape)}")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    if q.ndim != 3:
        raise ValueError(f"varlen_attention: expected packed q (T, H, d), got {tuple(q.shape)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            "varlen_attention: cu_seqlens must be (B + 1,) int32,"
            f" got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    # PyTorch's variable-length kernel takes half precision on CUDA only
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        if longest is None:
            raise ValueError("varlen_attention: packed tokens on CUDA need longest, got None")
        from torch.nn.attention.varlen import varlen_attn

        y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
        assert isinstance(y, Tensor)  # a tuple only where more than the output is asked for
        return y
    # its mask is made of lengths on the host, which a traced step cannot read
    plain = q.is_cuda and q.dtype == torch.float32 and not torch.compiler.is_compiling()
    if plain and (fmha := xformers_attention()) is not None:
        lengths = cu_seqlens.diff().tolist()
        mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)
        y = fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
        return y[0]
    return reference.varlen_attention(q, k, v, cu_seqlens)


@cache
def xformers_attention() -> Any:
    """The attention of xformers, or None where it is not installed or built for another CUDA.

    It serves packed tokens in float32, for which PyTorch's kernel is not made.
    """
    if find_spec("xformers") is None:
        return None
    try:
        from xformers.ops import fmha
        from xformers.ops.fmha import cutlass
    except (ImportError, OSError) as error:
        log.warning("xformers is installed but does not load: %s", error)
        return None
    if cutlass.FwOp.is_available() and cutlass.BwOp.is_available():
        return fmha
    log.warning("xformers is installed but its operators are not available for this PyTorch")
    return None


def augment(
    images: Tensor,
    rows: Tensor,
    row_maps: Tensor | None,
    column_maps: Tensor | None,
    which: Tensor | None,
    flip: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
    *,
    impl: Impl = "reference",
) -> Tensor:
    """Images of a pool as the backbone sees them: R X C^T, clamped, mirrored, normalised.

    Args:
        images: (P, 3, S, S) uint8, the pool.
        rows: (B,) int64, the images to take.
        row_maps, column_maps: (M, S, S) float32, linear maps of rows and of columns; None: neither
            maps nor clamping to [0, 1].
        which: (B,) int64, the maps of each image; None: M = B.
        flip: (B,) bool, which images to mirror.
        mean, std: of each channel, in [0, 1].
        dtype: of the result.
        impl: "triton" rounds maps to float16 where the result is in half precision.

    Returns:
        (B, 3, S, S).

    Raises:
        ValueError: one map without the other.

    """
    if (row_maps is None) != (column_maps is None):
        raise ValueError("augment: row_maps and column_maps go together")
    arguments = (images, rows, row_maps, column_maps, which, flip, mean, std, dtype)
    if impl == "triton":
        from fastrecycle_kernels.augment import augment as kernel

        return kernel(*arguments)
    return reference.augment(*arguments)


def bn_prior(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    segments: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One BatchNorm of the prior network, in inference mode, and the moments of its input.

    y = relu(weight (x - mean) / sqrt(var + eps) + bias + residual), with the mean and biased
    variance of x over each task's images: the two terms of LoRA Recycle, Eq. 2.

    Args:
        x: (B, C, H, W); B / segments consecutive images belong to one task.
        mean, var, weight, bias: (C,), as stored. A channel with var 0 passes on its bias.
        eps: added to var.
        segments: number of tasks in the batch.
        relu: apply ReLU last.
        residual: (B, C, H, W), added before the ReLU, or None.

    Returns:
        y (B, C, H, W) in x's dtype; mean and variance, each (segments, C) float32.

    Raises:
        ValueError: B is not a multiple of `segments`, or shapes disagree.

    """
    if x.ndim != 4:
        raise ValueError(f"bn_prior: expected x (B, C, H, W), got {tuple(x.shape)}")
    if segments < 1 or x.shape[0] % segments:
        raise ValueError(
            f"bn_prior: {x.shape[0]} images cannot be split into {segments} equal tasks"
        )
    for name, stored in (("mean", mean), ("var", var), ("weight", weight), ("bias", bias)):
        if stored.shape != x.shape[1:2]:
            raise ValueError(
                f"bn_prior: {name} must have shape {tuple(x.shape[1:2])}, got {tuple(stored.shape)}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"bn_prior: residual must have shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    return reference.bn_prior(x, mean, var, weight, bias, eps, segments, relu, residual)


def bn_prior_chunks(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    segments: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
    twin: Tensor | None = None,
    output: bool = True,
) -> tuple[Tensor, Tensor, Any]:
    """`bn_prior` within a whole network, Triton only: see `fastrecycle_kernels.bn_prior`.

    Returns:
        y; its twin, which takes y's gradient as the next block's `residual`; the moments in
        chunks, for `moment_distance`.

    """
    from fastrecycle_kernels.bn_prior import bn_prior_chunks as kernel

    return kernel(x, mean, var, weight, bias, eps, segments, relu, residual, twin, output)


def bn_pool_chunks(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    segments: int = 1,
) -> tuple[Tensor, Tensor, Any]:
    """`bn_prior_chunks` with ReLU, then a 3x3 max pool of stride 2 and padding 1. Triton only."""
    from fastrecycle_kernels.bn_pool import bn_pool_chunks as kernel

    return kernel(x, mean, var, weight, bias, eps, segments)


def stem_conv_fits(weight: Tensor, stride: int, padding: int) -> bool:
    """Whether `stem_conv` takes a convolution of this shape."""
    from fastrecycle_kernels.stem_conv import fits

    return fits(weight, stride, padding)


def stem_conv(
    pixels: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Conv2d((pixels - mean) / std, weight) with a frozen weight. Triton only.

    Args:
        pixels: (B, C, H, W), C at most 4.
        weight: (K, C, R, R), R 3, 5 or 7.
        stride: 1 or 2.
        padding: of the normalised pixels, below R.
        mean, std: of each channel.

    Returns:
        (B, K, H', W') in the pixels' dtype, under autocast in autocast's.

    """
    from fastrecycle_kernels.stem_conv import stem_conv as kernel

    dtype = pixels.dtype
    if torch.is_autocast_enabled(pixels.device.type):
        dtype = torch.get_autocast_dtype(pixels.device.type)
    return kernel(pixels, weight.to(dtype), stride, padding, mean, std)


def carry(y: Tensor, twin: Tensor) -> Tensor:
    """Y, whose gradient goes to its twin (see `bn_prior_chunks`). Triton only."""
    from fastrecycle_kernels.bn_prior import carry as kernel

    return kernel(y, twin)


def moment_distance(chunks: list[Any], mean: Tensor, var: Tensor, first_bn: float) -> Tensor:
    """R_BN of each task from all layers' moments in chunks, LoRA Recycle, Eq. 2. Triton only.

    Args:
        chunks: of each BatchNorm, from `bn_prior_chunks`.
        mean, var: (channels of all layers,), stored statistics one after the other.
        first_bn: factor of the first layer.

    Returns:
        (segments,) float32.

    """
    from fastrecycle_kernels.moment_distance import moment_distance as kernel

    return kernel(chunks, mean, var, first_bn)


def jitter_pixels(
    images: Tensor,
    shift: Tensor,
    flip: Tensor,
    norm: tuple[tuple[float, ...], tuple[float, ...]],
    prior_norm: tuple[tuple[float, ...], tuple[float, ...]] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Images of each task rolled and flipped, for the backbone and for the prior. Triton only.

    Args:
        images: (G, m, 3, S, S) float32, in the backbone's input space.
        shift: (G, 2) int64, how far rows and columns are rolled.
        flip: (G,) bool, which tasks are mirrored then.
        norm: mean and std of the backbone's input; prior_norm: of the prior's, None without one.
        dtype: of the results.

    Returns:
        (G, m, 3, S, S) for the backbone; (G m, 3, S, S), normalised for the prior, or None.

    """
    from fastrecycle_kernels.pixels import jitter_pixels as kernel

    return kernel(images, shift, flip, *norm, *(prior_norm or (None, None)), dtype)


def pixel_step(
    images: Tensor,
    state: dict[str, Tensor],
    gradients: tuple[Tensor, Tensor | None],
    shift: Tensor,
    flip: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    bounds: tuple[list[float], list[float]],
    std: tuple[float, ...],
    prior_std: tuple[float, ...] | None,
) -> None:
    """Adam's step on pixels from the gradients of `jitter_pixels`' results, and a clamp, in place.

    Triton only.

    Args:
        images: (G, m, 3, S, S) float32; changed.
        state: Adam's "step", "exp_avg" and "exp_avg_sq"; changed.
        gradients: of both results of `jitter_pixels`; None for that of a prior that is not there.
        shift, flip, std, prior_std: as `jitter_pixels` had them.
        lr: one number, on the images' device.
        betas, eps: Adam's.
        bounds: lowest and highest value of each channel.

    """
    from fastrecycle_kernels.pixels import pixel_step as kernel

    kernel(
        images, state["exp_avg"], state["exp_avg_sq"], state["step"], *gradients, shift, flip, lr,
        betas, eps, *bounds, std, prior_std,
    )  # fmt: skip

"""The activation of an MLP, and its gradient from the input alone: one elementwise pass each way.

gelu:        g = u Phi(u),          g' = Phi(u) + u phi(u),    Phi(u) = (1 + erf(u / sqrt 2)) / 2
gelu_tanh:   g = u s,  s = sigmoid(2 z) = (1 + tanh z) / 2,    g' = s (1 + 2 u z' (1 - s)),
             z = sqrt(2 / pi) (u + 0.044715 u^3)
quick_gelu:  g = u q,  q = sigmoid(1.702 u),                   g' = q (1 + 1.702 u (1 - q))
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = ("gelu", "quick_gelu", "gelu_tanh")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK, WARPS = 2048, 4  # numbers of a program, its warps


@triton.jit
def _both(u, KIND: tl.constexpr):
    """The share of u that passes, and the gradient; KIND counts in `KINDS`."""
    if KIND == 1:
        share = tl.sigmoid(1.702 * u)
        return share, share * (1 + 1.702 * u * (1 - share))
    elif KIND == 2:
        share = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        slope = 1.5957691216057308 * (1 + 0.134145 * u * u)
        # far out, where u slope overflows, the share is 0 or 1 already
        inner = tl.where(share * (1 - share) == 0, 0.0, u * slope)
        return share, share * (1 + inner * (1 - share))
    else:
        share = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
        return share, share + u * (0.3989422804014327 * tl.exp(-0.5 * u * u))


@triton.jit
def _forward(u, g, numbers, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(u + at, mask=at < numbers).to(tl.float32)
    share, _ = _both(value, KIND)
    tl.store(g + at, (value * share).to(g.dtype.element_ty), mask=at < numbers)


@triton.jit
def _backward(dg, u, du, numbers, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    flow = tl.load(dg + at, mask=at < numbers).to(tl.float32)
    value = tl.load(u + at, mask=at < numbers).to(tl.float32)
    _, slope = _both(value, KIND)
    tl.store(du + at, (flow * slope).to(du.dtype.element_ty), mask=at < numbers)


# ------------------------------------------------------------------ launchers


def _launch_forward(u: Tensor, kind: str) -> Tensor:
    g = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if numbers := u.numel():
        _forward[(triton.cdiv(numbers, BLOCK),)](
            u.contiguous(), g, numbers, KIND=KINDS.index(kind), BLOCK=BLOCK, num_warps=WARPS
        )
    return g


def _launch_backward(dg: Tensor, u: Tensor, kind: str) -> Tensor:
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if numbers := u.numel():
        _backward[(triton.cdiv(numbers, BLOCK),)](
            dg.contiguous(), u.contiguous(), du, numbers, KIND=KINDS.index(kind),
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return du


# ------------------------------------------------------------------ operator and its gradient


@torch.library.custom_op("fastrecycle::activation", mutates_args=())
def _activation(u: Tensor, kind: str) -> Tensor:
    with torch.cuda.device_of(u):
        return _launch_forward(u, kind)


@_activation.register_fake
def _(u, kind):
    return u.new_empty(u.shape)


@torch.library.custom_op("fastrecycle::activation_backward", mutates_args=())
def _activation_backward(dg: Tensor, u: Tensor, kind: str) -> Tensor:
    with torch.cuda.device_of(u):
        return _launch_backward(dg, u, kind)


@_activation_backward.register_fake
def _(dg, u, kind):
    return u.new_empty(u.shape)


def _save(ctx, inputs, output):
    u, ctx.kind = inputs
    ctx.save_for_backward(u)


def _gradient(ctx, dg):
    return _activation_backward(dg, *ctx.saved_tensors, ctx.kind), None


_activation.register_autograd(_gradient, setup_context=_save)


# ------------------------------------------------------------------ function


def activation(u: Tensor, kind: Literal["gelu", "quick_gelu", "gelu_tanh"]) -> Tensor:
    """GELU, exact by the error function or by tanh, or u sigmoid(1.702 u); computed in float32.

    Args:
        u: bfloat16, float16 or float32, any shape.
        kind: which.

    Returns:
        As u.

    Raises:
        ValueError: another kind or dtype.

    """
    if kind not in KINDS:
        raise ValueError(f"activation: kind must be one of {KINDS}, got {kind!r}")
    if u.dtype not in DTYPES:
        raise ValueError(f"activation: bfloat16, float16 or float32, got {u.dtype}")
    return _activation(u.contiguous(), kind)

"""Products with frozen weights in float8 (e4m3), each row with a scale of its own.

    x8 = e4m3(x / s),  s = max |x| / 448 of each row                 quantise_rows
    y  = s_x s_w (x8 w8^T) + bias                                    fp8_linear
    dx = s_dy s_wt (dy8 wt8^T)

    s = x + scale branch,  n = LayerNorm(s)                          residual_mlp
    u = n W1^T + b1,  g = activation(u),  y = g W2^T + b2
    dg = dy W2,  du = activation'(u) dg,  dn = du W1, and the gradient of the norm

The products are the library's (cuBLAS or CUTLASS behind `torch._scaled_mm`): bf16 out, K and N
multiples of 16, any number of rows, sums in fp32. The tensor cores' own sums of some 14 bits are 15
% faster, but cut a sum of 3072 products of one sign by 3 %. Both operands need K side by side, so W
and W^T are quantised apart, once. dy is e4m3 as well: e5m2 has the range that a scale of a whole
tensor needs, but e4m3 reaches from a row's largest number 2^-17 down, and has one bit more.

A row is scaled where it is made, so that it is written once, in 8 bits: normalised rows, g and du
are in no memory wider than that. x and dy of other origin are read and written once.

T rows, K columns, N columns of the result.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from fastrecycle_kernels import reference, residual_norm
from fastrecycle_kernels.activation import DTYPES, KINDS, _both
from fastrecycle_kernels.reference import Fp8Weight
from torch import Tensor

E4M3 = torch.float8_e4m3fn
WIDEST = 9216  # columns: a row is in registers
NUMBERS, WARPS = 1024, 4  # numbers of a program's chunk of columns, its warps


@triton.jit
def _quantise(
    x, u, out, scales, rows, x_row, u_row,
    WIDTH: tl.constexpr, SHARE: tl.constexpr, SLOPE: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """x, or activation(x) (SHARE), or activation'(u) x (SLOPE), in 8 bits and a scale a row."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    most = tl.zeros((ROWS,), tl.float32)
    parts = ()
    for j in tl.static_range(CHUNKS):
        c = j * CHUNK + tl.arange(0, CHUNK)
        inside = (r < rows)[:, None] & (c < WIDTH)[None, :]
        value = tl.load(x + r[:, None] * x_row + c[None, :], mask=inside, other=0.0)
        value = value.to(tl.float32)
        if SHARE:
            share, _ = _both(value, KIND)
            value *= share
        if SLOPE:
            at = tl.load(u + r[:, None] * u_row + c[None, :], mask=inside, other=0.0)
            _, slope = _both(at.to(tl.float32), KIND)
            value *= slope
        parts = parts + (value,)  # noqa: RUF005 (Triton knows no star)
        most = tl.maximum(most, tl.max(tl.abs(value), 1))
    scale = tl.maximum(most, 1e-30) * (1 / 448)
    inverse = 1 / scale
    tl.store(scales + r, scale, mask=r < rows)
    for j in tl.static_range(CHUNKS):
        c = j * CHUNK + tl.arange(0, CHUNK)
        inside = (r < rows)[:, None] & (c < WIDTH)[None, :]
        eight = (parts[j] * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(out + r[:, None] * WIDTH + c[None, :], eight, mask=inside)


# ------------------------------------------------------------------ launchers


def cut(width: int) -> tuple[int, int, int, int]:
    """Rows of a program, its chunks of columns and their width, its warps: few idle columns."""
    sizes = {n: n * triton.next_power_of_2(triton.cdiv(width, n)) for n in range(1, 10)}
    count = min(sizes, key=lambda n: (sizes[n], n))
    chunk = triton.next_power_of_2(triton.cdiv(width, count))
    rows = max(1, NUMBERS // chunk)
    return rows, count, chunk, max(WARPS, rows * chunk // 2048)


def _launch(
    x: Tensor, u: Tensor | None = None, kind: str | None = None, *, forward: bool = True
) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits (T, K), and their scales (T, 1)."""
    rows = residual_norm._rows_of(x)
    out = torch.empty(rows.shape, dtype=E4M3, device=x.device)
    scales = torch.empty((len(rows), 1), dtype=torch.float32, device=x.device)
    if rows.numel():
        other = rows if u is None else residual_norm._rows_of(u)
        count, chunks, chunk, warps = cut(rows.shape[1])
        _quantise[(triton.cdiv(len(rows), count),)](
            rows, other, out, scales, len(rows), rows.stride(0), other.stride(0),
            WIDTH=rows.shape[1], SHARE=kind is not None and forward, SLOPE=not forward,
            KIND=0 if kind is None else KINDS.index(kind), ROWS=count, CHUNK=chunk, CHUNKS=chunks,
            num_warps=warps,
        )  # fmt: skip
    return out, scales


def _product(
    x8: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """(T, K), (N, K) -> (T, N) bf16. PyTorch has it on CUDA alone: elsewhere for checks only."""
    if x8.is_cuda:
        return torch._scaled_mm(
            x8, w8.t(), scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )  # fmt: skip
    y = reference.dequantise(x8, x_scale) @ reference.dequantise(w8, w_scale.mT).T
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


# ------------------------------------------------------------------ operators and their gradients


@torch.library.custom_op("fastrecycle::fp8_quantise_rows", mutates_args=())
def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return _launch(x)


@_quantise_rows.register_fake
def _(x):
    rows = x.shape[:-1].numel()
    return (
        x.new_empty((rows, x.shape[-1]), dtype=E4M3),
        x.new_empty((rows, 1), dtype=torch.float32),
    )


@torch.library.custom_op("fastrecycle::fp8_linear", mutates_args=())
def _linear(
    x: Tensor, w8: Tensor, w_scale: Tensor, wt8: Tensor, wt_scale: Tensor, bias: Tensor | None
) -> Tensor:
    with torch.cuda.device_of(x):
        return _product(*_launch(x), w8, w_scale, bias).view(*x.shape[:-1], len(w8))


@_linear.register_fake
def _(x, w8, w_scale, wt8, wt_scale, bias):
    return x.new_empty((*x.shape[:-1], len(w8)), dtype=torch.bfloat16)


def _save(ctx, inputs, output):
    x, _, _, wt8, wt_scale, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(wt8, wt_scale)


def _gradient(ctx, dy):
    wt8, wt_scale = ctx.saved_tensors
    # dx is the same product, with the other copy of the weight
    dx = _linear(dy, wt8, wt_scale, wt8, wt_scale, None).to(ctx.dtype)
    return dx, None, None, None, None, None


_linear.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("fastrecycle::fp8_residual_mlp", mutates_args=())
def _residual_mlp(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, scale: float,
    first: list[Tensor], first_bias: Tensor | None, second: list[Tensor],
    second_bias: Tensor | None, kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        rows = x.shape[:-1].numel()
        n_scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
        stream, n8, mean, rstd = residual_norm._launch_forward(
            x, branch, norm_weight, norm_bias, eps, scale, E4M3, n_scale
        )
        u = _product(n8.view(rows, -1), n_scale, *first[:2], first_bias)
        y = _product(*_launch(u, kind=kind), *second[:2], second_bias)
        return stream, y.view(x.shape), u, mean, rstd


@_residual_mlp.register_fake
def _(x, branch, norm_weight, norm_bias, eps, scale, first, first_bias, second, second_bias, kind):
    rows = x.shape[:-1].numel()
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    y = x.new_empty(x.shape, dtype=torch.bfloat16)
    u = x.new_empty((rows, len(first[0])), dtype=torch.bfloat16)
    return x.new_empty(x.shape), y, u, mean, rstd


@torch.library.custom_op("fastrecycle::fp8_mlp_backward", mutates_args=())
def _mlp_backward(
    dy: Tensor, u: Tensor, first: list[Tensor], second: list[Tensor], kind: str
) -> Tensor:
    """Gradient of the normalised rows, bf16."""
    with torch.cuda.device_of(dy):
        dg = _product(*_launch(dy), *second[2:], None)
        du = _launch(dg, u, kind, forward=False)
        return _product(*du, *first[2:], None).view(dy.shape)


@_mlp_backward.register_fake
def _(dy, u, first, second, kind):
    return dy.new_empty(dy.shape, dtype=torch.bfloat16)


def _save_mlp(ctx, inputs, output):
    _, branch, weight, _, _, ctx.scale, first, _, second, _, ctx.kind = inputs
    stream, _, u, mean, rstd = output
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(stream, weight, mean, rstd, u, *first, *second)
    ctx.set_materialize_grads(False)


def _mlp_gradient(ctx, ds, dy, *_):
    stream, weight, mean, rstd, u, *weights = ctx.saved_tensors
    dn = None if dy is None else _mlp_backward(dy, u, weights[:4], weights[4:], ctx.kind)
    dx, dbranch = residual_norm.gradients_of_sum(
        dn, ds, stream, weight, mean, rstd, ctx.scale, ctx.branch_dtype, ctx.needs_input_grad[:2]
    )
    return dx, dbranch, None, None, None, None, [None] * 4, None, [None] * 4, None, None


_residual_mlp.register_autograd(_mlp_gradient, setup_context=_save_mlp)


# ------------------------------------------------------------------ functions


def _check(name: str, columns: int, weight: Fp8Weight, bias: Tensor | None) -> None:
    n, k = weight.w8.shape
    if columns != k:
        raise ValueError(f"{name}: {k} columns meet this weight, got {columns}")
    if n % 16 or k % 16 or max(n, k) > WIDEST:
        raise ValueError(
            f"{name}: rows and columns of the weight must be multiples of 16 up to {WIDEST}, got"
            f" {(n, k)}; use bf16"
        )
    if bias is None:
        return
    if bias.dtype != torch.bfloat16 or bias.shape != (n,):
        raise ValueError(
            f"{name}: bias must be ({n},) bfloat16, got {tuple(bias.shape)} {bias.dtype}"
        )
    if bias.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: bias is frozen here, but its gradient is asked for")


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, each by its own scale. No gradient.

    Args:
        x: (..., K) bfloat16, float16 or float32, K at most 9216.

    Returns:
        (T, K) float8_e4m3fn; (T, 1) float32, by which it is multiplied to give x.

    Raises:
        ValueError: another dtype, or more columns.

    """
    if x.dtype not in DTYPES:
        raise ValueError(f"quantise_rows: bfloat16, float16 or float32, got {x.dtype}")
    if x.shape[-1] > WIDEST:
        raise ValueError(f"quantise_rows: at most {WIDEST} columns, got {x.shape[-1]}")
    return _quantise_rows(x.detach())


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """Y = x W^T + bias with both factors in e4m3; W and bias are frozen.

    Args:
        x: (..., K) bfloat16, float16 or float32.
        weight: of `reference.fp8_weight`; K and N multiples of 16.
        bias: (N,) bfloat16, or None.

    Returns:
        (..., N) bfloat16.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a gradient of the bias is asked for.

    """
    if x.dtype not in DTYPES:
        raise ValueError(f"fp8_linear: x in bfloat16, float16 or float32, got {x.dtype}")
    _check("fp8_linear", x.shape[-1], weight, bias)
    return _linear(x, *weight, bias)


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
    kind: Literal["gelu", "quick_gelu", "gelu_tanh"],
) -> tuple[Tensor, Tensor]:
    """S = x + scale branch, and MLP(LayerNorm(s)) with products in e4m3; all weights are frozen.

    Args:
        x: (..., D), the stream; branch (..., D); bfloat16, float16 or float32 each.
        norm: weight and bias (D,).
        eps: of the norm.
        scale: of the branch.
        first, second: of `reference.fp8_weight`, (M, D) and (D, M); biases bfloat16 or None.
        kind: of the activation.

    Returns:
        s in x's dtype; (..., D) bfloat16.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a gradient of a weight is asked for.

    """
    _check("residual_mlp", x.shape[-1], first, first_bias)
    _check("residual_mlp", len(first.w8), second, second_bias)
    residual_norm.check(x, branch, *norm)
    if kind not in KINDS:
        raise ValueError(f"residual_mlp: kind must be one of {KINDS}, got {kind!r}")
    stream, y, *_ = _residual_mlp(
        x, branch, *norm, eps, scale, list(first), first_bias, list(second), second_bias, kind
    )
    return stream, y

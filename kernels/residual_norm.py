"""A branch added to the residual stream, and the LayerNorm that reads the stream next, in one pass.

    s  = x + scale branch                         rounded to x's dtype
    y  = (s - mean) rstd weight + bias            mean, rstd = 1 / sqrt(variance + eps) of each row

    dx = ds + rstd (g - mean(g) - n mean(g n))    g = weight dy,  n = (s - mean) rstd
    dbranch = scale dx

ds, what flows into s from later on, is added in the backward's one pass. weight and bias are
frozen. A program takes some rows and all of their columns; it sums in float32 and keeps mean and
rstd of each row. Nothing but s, which the next addition reads anyhow, is kept besides. For products
in float8 (`fastrecycle_kernels.fp8`) y is written in e4m3 with a scale of each row.

D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 4096
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORWARD = (4, 4)  # rows of a program of at most 1024 columns, its warps
BACKWARD = (4, 4)


@triton.jit
def _forward(
    x, branch, weight, bias, stream, y, y_scale, mean, rstd, rows, x_row, branch_row, scale, eps,
    WIDTH: tl.constexpr, ADD: tl.constexpr, EIGHT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (c < WIDTH)[None, :]
    s = tl.load(x + r[:, None] * x_row + c[None, :], mask=inside, other=0.0).to(tl.float32)
    place = r[:, None] * WIDTH + c[None, :]
    if ADD:
        more = tl.load(branch + r[:, None] * branch_row + c[None, :], mask=inside, other=0.0)
        rounded = (s + scale * more.to(tl.float32)).to(stream.dtype.element_ty)
        tl.store(stream + place, rounded, mask=inside)
        s = rounded.to(tl.float32)
    m = tl.sum(s, 1) / WIDTH
    apart = tl.where(inside, s - m[:, None], 0.0)
    spread = tl.sum(apart * apart, 1) / WIDTH
    inverse = 1 / tl.sqrt_rn(spread + eps)
    w = tl.load(weight + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    out = apart * inverse[:, None] * w[None, :] + b[None, :]
    if EIGHT:
        unit = tl.maximum(tl.max(tl.abs(out), 1), 1e-30) * (1 / 448)
        tl.store(y_scale + r, unit, mask=r < rows)
        out *= (1 / unit)[:, None]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + r, m, mask=r < rows)
    tl.store(rstd + r, inverse, mask=r < rows)


@triton.jit
def _backward(
    dy, ds, stream, weight, bias, mean, rstd, dx, dbranch, y, rows, dy_row, ds_row, stream_row,
    scale,
    WIDTH: tl.constexpr, DS: tl.constexpr, DX: tl.constexpr, DBRANCH: tl.constexpr, Y: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (c < WIDTH)[None, :]
    flow = tl.load(dy + r[:, None] * dy_row + c[None, :], mask=inside, other=0.0)
    s = tl.load(stream + r[:, None] * stream_row + c[None, :], mask=inside, other=0.0)
    m = tl.load(mean + r, mask=r < rows, other=0.0)
    inverse = tl.load(rstd + r, mask=r < rows, other=0.0)
    w = tl.load(weight + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    g = flow.to(tl.float32) * w[None, :]
    n = tl.where(inside, (s.to(tl.float32) - m[:, None]) * inverse[:, None], 0.0)
    level = tl.sum(g, 1) / WIDTH
    slope = tl.sum(g * n, 1) / WIDTH
    out = inverse[:, None] * (g - level[:, None] - n * slope[:, None])
    if DS:
        later = tl.load(ds + r[:, None] * ds_row + c[None, :], mask=inside, other=0.0)
        out += later.to(tl.float32)
    place = r[:, None] * WIDTH + c[None, :]
    if DX:
        tl.store(dx + place, out.to(dx.dtype.element_ty), mask=inside)
    if DBRANCH:
        tl.store(dbranch + place, (scale * out).to(dbranch.dtype.element_ty), mask=inside)
    if Y:
        b = tl.load(bias + c, mask=c < WIDTH, other=0.0).to(tl.float32)
        again = n * w[None, :] + b[None, :]
        tl.store(y + place, again.to(y.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------ launchers


def _cut(width: int, rows: int, warps: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program; wider rows, fewer of them."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(rows, 1024 * rows // columns))
    return rows, columns, max(warps, columns // 1024)


def _rows_of(x: Tensor) -> Tensor:
    """X as rows whose numbers stand side by side; a copy only where its memory forbids that."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _launch_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float,
    dtype: torch.dtype,
    y_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream (empty without a branch), y, mean and rstd; scales of y's rows into `y_scale`."""
    add, width = branch is not None, x.shape[-1]
    stream = torch.empty(x.shape if add else (0,), dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    x = _rows_of(x)
    rows = len(x)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        more = x if branch is None else _rows_of(branch)
        count, columns, warps = _cut(width, *FORWARD)
        _forward[(triton.cdiv(rows, count),)](
            x, more, weight.contiguous(), bias.contiguous(), stream, y,
            mean if y_scale is None else y_scale, mean, rstd,
            rows, x.stride(0), more.stride(0), scale, eps,
            WIDTH=width, ADD=add, EIGHT=y_scale is not None, ROWS=count, COLUMNS=columns,
            num_warps=warps,
        )  # fmt: skip
    return stream, y, mean, rstd


def _launch_backward(
    dy: Tensor,
    ds: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    dx_dtype: torch.dtype | None,
    dbranch_dtype: torch.dtype | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the branch in these dtypes, empty where None is asked for; with a bias
    y once more, in dy's dtype, else empty.
    """
    width = stream.shape[-1]
    dx, dbranch = _gradients(stream, dx_dtype, dbranch_dtype)
    y = torch.empty((0,) if bias is None else stream.shape, dtype=dy.dtype, device=dy.device)
    if stream.numel():
        stream, dy = _rows_of(stream), _rows_of(dy)
        later = dy if ds is None else _rows_of(ds)
        rows = len(stream)
        count, columns, warps = _cut(width, *BACKWARD)
        _backward[(triton.cdiv(rows, count),)](
            dy, later, stream, weight.contiguous(), weight if bias is None else bias.contiguous(),
            mean, rstd, dx, dbranch, y, rows, dy.stride(0), later.stride(0), stream.stride(0),
            scale, WIDTH=width, DS=ds is not None, DX=dx_dtype is not None,
            DBRANCH=dbranch_dtype is not None, Y=bias is not None, ROWS=count, COLUMNS=columns,
            num_warps=warps,
        )  # fmt: skip
    return dx, dbranch, y


def _gradients(
    stream: Tensor, dx_dtype: torch.dtype | None, dbranch_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    dx, dbranch = (
        torch.empty(stream.shape if t else (0,), dtype=t or stream.dtype, device=stream.device)
        for t in (dx_dtype, dbranch_dtype)
    )
    return dx, dbranch


# ------------------------------------------------------------------ operators and their gradients


@torch.library.custom_op("fastrecycle::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        return _launch_forward(x, branch, weight, bias, eps, scale, dtype)


@_residual_norm.register_fake
def _(x, branch, weight, bias, eps, scale, dtype):
    mean, rstd = (x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), mean, rstd


@torch.library.custom_op("fastrecycle::row_norm", mutates_args=())
def _row_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return _launch_forward(x, None, weight, bias, eps, 1.0, dtype)[1:]


@_row_norm.register_fake
def _(x, weight, bias, eps, dtype):
    mean, rstd = (x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd


@torch.library.custom_op("fastrecycle::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    dy: Tensor, ds: Tensor | None, stream: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    scale: float, dx_dtype: torch.dtype | None, dbranch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(stream):
        return _launch_backward(dy, ds, stream, weight, mean, rstd, scale, dx_dtype, dbranch_dtype)[
            :2
        ]


@_residual_norm_backward.register_fake
def _(dy, ds, stream, weight, mean, rstd, scale, dx_dtype, dbranch_dtype):
    return _gradients(stream, dx_dtype, dbranch_dtype)


def _check_frozen(needs: tuple[bool, ...]) -> None:
    if any(needs):
        raise ValueError("residual_norm: weight and bias are frozen here; theirs is no gradient")


def _save(ctx, inputs, output):
    _, branch, weight, _, _, ctx.scale, _ = inputs
    stream, _, mean, rstd = output
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(stream, weight, mean, rstd)
    ctx.set_materialize_grads(False)


def gradients_of_sum(
    dy: Tensor | None, ds: Tensor | None, stream: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, scale: float, branch_dtype: torch.dtype, wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and of the branch, where wanted, from those of s and of y."""
    wants_x, wants_branch = wanted
    if dy is None:
        dx = ds
        dbranch = None if ds is None or not wants_branch else (scale * ds).to(branch_dtype)
    else:
        # where both gradients are the same numbers, one tensor is both
        same = wants_x and scale == 1 and branch_dtype == stream.dtype
        dx, dbranch = _residual_norm_backward(
            dy, ds, stream, weight, mean, rstd, scale, stream.dtype if wants_x else None,
            branch_dtype if wants_branch and not same else None,
        )  # fmt: skip
        dbranch = dx if same else dbranch
    return dx if wants_x else None, dbranch if wants_branch else None


def _add_norm_backward(ctx, ds, dy, *_):
    _check_frozen(ctx.needs_input_grad[2:])
    dx, dbranch = gradients_of_sum(
        dy, ds, *ctx.saved_tensors, ctx.scale, ctx.branch_dtype, ctx.needs_input_grad[:2]
    )
    return dx, dbranch, *[None] * 5


_residual_norm.register_autograd(_add_norm_backward, setup_context=_save)


def _save_norm(ctx, inputs, output):
    x, weight = inputs[:2]
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, dy, *_):
    wants_x, *frozen = ctx.needs_input_grad
    _check_frozen(frozen)
    dx = None
    if wants_x and dy is not None:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, _ = _residual_norm_backward(dy, None, x, weight, mean, rstd, 1.0, x.dtype, None)
    return dx, None, None, None, None


_row_norm.register_autograd(_norm_backward, setup_context=_save_norm)


# ------------------------------------------------------------------ function


def check(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    """Raise a ValueError for what the kernels cannot do."""
    if branch is not None and branch.shape != x.shape:
        raise ValueError(
            f"residual_norm: branch must have shape {tuple(x.shape)}, got {tuple(branch.shape)}"
        )
    if x.shape[-1] > WIDEST:
        raise ValueError(f"residual_norm: at most {WIDEST} columns, got {x.shape[-1]}")
    for t in (x, branch):
        if t is not None and t.dtype not in DTYPES:
            raise ValueError(f"residual_norm: bfloat16, float16 or float32, got {t.dtype}")
    _check_frozen((torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad),))


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """S = x + scale branch, y = LayerNorm(s).

    Args:
        x: (..., D), the stream; branch (..., D), or None where there is nothing to add. bfloat16,
            float16 or float32 each.
        weight, bias: (D,) of the norm, frozen.
        eps: of the norm.
        scale: of the branch.
        dtype: of y; None for the branch's, without one x's.

    Returns:
        s in x's dtype, x itself without a branch; y.

    Raises:
        ValueError: D is above 4096, another dtype, or a gradient of weight or bias is asked for.

    """
    check(x, branch, weight, bias)
    if branch is None:
        return x, _row_norm(x, weight, bias, eps, dtype or x.dtype)[0]
    stream, y, _, _ = _residual_norm(x, branch, weight, bias, eps, scale, dtype or branch.dtype)
    return stream, y

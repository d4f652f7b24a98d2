"""Products in float8 against bf16's: alone, with the rows scaled before, and a whole MLP.

`python benchmarks/bench_fp8.py` prints one table; `pytest benchmarks/bench_fp8.py --benchmark-only`
does the same case by case. x (T, K) by W (N, K): the forward pass of one layer is the gradient of
another, as dx = dy W has K and N change places, so forward 768 -> 3072 is also dx of 3072 -> 768.
Errors are against the product in float32, by norms. Bytes: operands read and results written once.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import compare
import pytest
import torch
from compare import Case
from timing import copies, device, on_gpu, record, sets_for

pytest.importorskip("triton")
# variants of a launch are the kernels' own business, which fastrecycle.ops does not show
kernels = importlib.import_module("fastrecycle_kernels.fp8")
residual_norm = importlib.import_module("fastrecycle_kernels.residual_norm")
activation = importlib.import_module("fastrecycle_kernels.activation")
reference = importlib.import_module("fastrecycle_kernels.reference")

BF16 = torch.bfloat16 if on_gpu() else torch.float32  # the interpreter's bf16 is not to be trusted
CUTS = [(1024, 4), (2048, 4), (2048, 8), (4096, 8)] if on_gpu() else [(1024, 4)]
BOUND = math.sqrt(2) * 2**-4  # of a product of two factors that err by 2^-4 at most


class Sized(NamedTuple):
    """A case, its products' operations, and how far each variant is from float32."""

    case: Case
    flops: int
    errors: dict[str, float]


@contextmanager
def settings(**values):
    """Other constants than the file's."""
    before = {name: getattr(kernels, name) for name in values}
    vars(kernels).update(values)
    try:
        yield
    finally:
        vars(kernels).update(before)


def within(call, **values):
    def run():
        with settings(**values):
            return call()

    return run


def error(got, want) -> float:
    return float((got.float() - want).norm() / want.norm())


def rows_of(rows: int, width: int, count: int) -> list[torch.Tensor]:
    return [torch.randn(rows, width, device=device()).to(BF16) for _ in range(count)]


def product(rows: int, k: int, n: int) -> Sized:
    """One layer."""
    moved = 2 * (rows * (k + n) + k * n)
    sets = sets_for(moved, most=16)
    xs = rows_of(rows, k, sets)
    plain = torch.randn(n, k, device=device()) / k**0.5
    weight, half = reference.fp8_weight(plain), plain.to(BF16)
    bias = torch.randn(n, device=device()).to(torch.bfloat16)
    half_bias = bias.to(BF16)
    ready = [kernels._launch(x) for x in xs]
    operands = (weight.w8, weight.w_scale)
    variants = {
        "bf16": lambda i: lambda: torch.nn.functional.linear(xs[i], half, half_bias),
        "fp8 product": lambda i: lambda: kernels._product(*ready[i], *operands, bias),
        "scaling the rows": lambda i: lambda: kernels._launch(xs[i]),
        "fp8 with scaling": lambda i: lambda: kernels.fp8_linear(xs[i], weight, bias),
    }
    errors: dict[str, float] = {}

    def check():
        few = slice(None, 4096)
        want = torch.nn.functional.linear(xs[0][few].float(), plain, bias.float())
        for name, make in variants.items():
            got = make(0)()
            if not isinstance(got, tuple):
                errors[name] = error(got[few], want)
        assert errors["bf16"] < 2**-7, errors
        assert all(e < BOUND for e in errors.values()), errors

    name = f"{rows} x ({k} -> {n})"
    return Sized(Case(name, moved, "bf16", variants, check), 2 * rows * k * n, errors)


def mlp(rows: int, width: int, inner: int, backward: bool) -> Sized:
    """The second half of a block: residual, norm, MLP; with its gradient or without."""
    moved = 2 * rows * (4 * width + 2 * inner) * (2 if backward else 1)
    sets = sets_for(moved, most=4)
    xs, branches, flows = (rows_of(rows, width, sets) for _ in range(3))
    w1 = torch.randn(inner, width, device=device()) / width**0.5
    w2 = torch.randn(width, inner, device=device()) / inner**0.5
    norm = (torch.ones(width, device=device()), torch.zeros(width, device=device()))
    eights, halves = [reference.fp8_weight(w) for w in (w1, w2)], [w.to(BF16) for w in (w1, w2)]
    biases = [torch.zeros(len(w), device=device(), dtype=torch.bfloat16) for w in (w1, w2)]

    def plain(x, branch, products, norms=residual_norm.residual_norm, act=activation.activation):
        stream, y = norms(x, branch, *norm, 1e-6)
        y = torch.nn.functional.linear(y, products[0])
        return stream, torch.nn.functional.linear(act(y, "gelu"), products[1])

    def fp8(x, branch):
        return kernels.residual_mlp(
            x, branch, norm, 1e-6, 1.0, eights[0], biases[0], eights[1], biases[1], "gelu"
        )

    def call(function, i, wide=False):
        to = torch.float32 if wide else BF16
        leaves = [t.to(to).detach().requires_grad_(backward) for t in (xs[i], branches[i])]
        results = function(*leaves)
        if not backward:
            return results[1]
        flow = [flows[i].to(r.dtype) for r in results]
        return torch.autograd.grad(results, leaves, flow)[0]

    variants = {
        "bf16": lambda i: lambda: call(lambda x, b: plain(x, b, halves), i),
        "fp8": lambda i: lambda: call(fp8, i),
    }
    errors: dict[str, float] = {}

    def check():
        exact = (reference.residual_norm, reference.activation)
        want = call(lambda x, b: plain(x, b, (w1, w2), *exact), 0, wide=True)
        errors.update({name: error(make(0)(), want) for name, make in variants.items()})
        assert errors["bf16"] < 2**-6, errors
        assert all(e < 2 * BOUND for e in errors.values()), errors

    name = f"MLP {rows} x {width} x {inner} {'and gradient' if backward else 'forward'}"
    products = 4 if backward else 2
    return Sized(Case(name, moved, "bf16", variants, check), products * 2 * rows * width * inner,
                 errors)  # fmt: skip


def scaling(kind: str | None, rows: int, width: int, forward: bool = True) -> Sized:
    """The kernel that scales rows, at several cuts."""
    moved = rows * width * (BF16.itemsize * (1 if forward else 2) + 1)
    sets = sets_for(moved, most=8)
    xs, us = rows_of(rows, width, sets), rows_of(rows, width, sets)

    def ours(numbers, warps):
        return lambda i: within(
            lambda: kernels._launch(xs[i], None if forward else us[i], kind, forward=forward),
            NUMBERS=numbers, WARPS=warps,
        )  # fmt: skip

    variants = {f"ours {c}": ours(*c) for c in CUTS}
    errors: dict[str, float] = {}

    def check():
        few = slice(None, 2048)
        want, u = xs[0][few].float(), us[0][few].float().requires_grad_()
        if kind is not None and forward:
            want = reference.activation(want, kind)
        elif kind is not None:
            (want,) = torch.autograd.grad(reference.activation(u, kind), u, want)
        for name, make in variants.items():
            eight, scale = make(0)()
            errors[name] = error(reference.dequantise(eight[few], scale[few]), want)
        assert all(0 < e < 2**-4 for e in errors.values()), errors

    what = "rows" if kind is None else f"{kind} {'forward' if forward else 'gradient'}"
    case = Case(f"scaling {what} {rows} x {width}", moved, "copy", variants, check,
                {"copy": copies(moved)})  # fmt: skip
    return Sized(case, 0, errors)


def gradient_formats() -> str:
    """What e4m3 and e5m2 lose of a gradient, each row by its own scale."""
    lines = []
    for name, spread in (("normal", 0.0), ("heavy tails", 2.0)):
        dy = torch.randn(2048, 768) * torch.exp(spread * torch.randn(2048, 768))
        most = dy.abs().amax(1, keepdim=True)
        lost = {
            str(dtype)[13:]: error((dy * (top / most)).to(dtype).float() * (most / top), dy)
            for dtype, top in ((torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344))
        }
        lines.append(f"dy, {name}: " + ", ".join(f"{k} errs by {v:.3f}" for k, v in lost.items()))
    return "\n".join(lines)


LAYERS = ((768, 3072), (3072, 768), (768, 768), (768, 2304), (2304, 768))
CASES: dict[str, Callable[[], Sized]] = {
    f"product_{rows}_{k}_{n}": lambda rows=rows, k=k, n=n: product(rows, k, n)
    for rows in (19700, 4925, 5000)
    for k, n in LAYERS
}
CASES |= {
    f"mlp_{rows}_{'gradient' if backward else 'forward'}": (
        lambda rows=rows, backward=backward: mlp(rows, 768, 3072, backward)
    )
    for rows in (19700, 4925, 5000)
    for backward in (False, True)
}
CASES |= {
    "scaling_768": lambda: scaling(None, 19700, 768),
    "scaling_3072": lambda: scaling(None, 19700, 3072),
    "scaling_gelu": lambda: scaling("gelu", 19700, 3072),
    "scaling_gelu_gradient": lambda: scaling("gelu", 19700, 3072, forward=False),
    "scaling_quick_gelu_gradient": lambda: scaling("quick_gelu", 19700, 3072, forward=False),
}
SMALL: dict[str, Callable[[], Sized]] = {
    "product": lambda: product(9, 48, 32),
    "mlp_gradient": lambda: mlp(9, 32, 64, True),
    "scaling_gelu": lambda: scaling("gelu", 9, 48),
}


@pytest.mark.parametrize("name", CASES if on_gpu() else SMALL)
def test_fp8(benchmark, name):
    case = (CASES if on_gpu() else SMALL)[name]().case
    ours = next(v for v in case.variants if v.startswith(("fp8", "ours")))
    compare.bench_with_pytest(benchmark, lambda: case, ours)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if on_gpu() else "CPU, interpreted: shows no speed"
    print(f"fp8 on {where}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    print(gradient_formats())
    found: list[dict] = []
    for name, build in (CASES if on_gpu() else SMALL).items():
        if not name.startswith(options.only):
            continue
        case, flops, errors = build()
        print(f"\n{case.name}  ({case.bytes_moved / 2**20:.0f} MiB, floor: {case.floor})")
        for row in compare.run(case, repeats=12):
            row["tflop_per_s"] = flops / row["median_us"] / 1e6
            row["error"] = errors.get(row["variant"], 0.0)
            speed = (
                f"{row['tflop_per_s']:7.0f} TFLOP/s" if flops else f"{row['gb_per_s']:7.0f} GB/s"
            )
            print(
                f"  {row['variant']:26}{row['median_us']:10.2f} us"
                f" [{row['p20_us']:.2f}, {row['p80_us']:.2f}]".ljust(60)
                + f"{row['times_floor']:6.2f}x floor {speed}  error {row['error']:.4f}"
            )
            found.append(row)
        del case
        if on_gpu():
            torch.cuda.empty_cache()
    if options.record:
        record("fp8", found)


if __name__ == "__main__":
    main()

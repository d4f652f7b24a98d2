"""Residual, LayerNorm and QKV with a training LoRA: one operation against two."""

import argparse

import compare
import pytest
import torch
from compare import Case
from timing import device, on_gpu, record, sets_for

from fastrecycle import ops

pytest.importorskip("triton")
BF16 = torch.bfloat16 if on_gpu() else torch.float32  # the interpreter's bf16 is not to be trusted
EPS = 1e-5


def apart(x, branch, norm, weight, bias, lora, impl: ops.Impl = "triton"):
    s, n = ops.residual_norm(x, branch, *norm, EPS, impl=impl)
    return s, ops.lora_qkv(n, weight, bias, lora, impl=impl)


def together(x, branch, norm, weight, bias, lora):
    return ops.norm_qkv(x, branch, norm, weight, bias, lora, eps=EPS, impl="triton")


def eager(x, branch, norm, weight, bias, lora):
    half = {t: tuple(v.to(x.dtype) for v in f) for t, f in lora.items()}
    return apart(x, branch, norm, weight, bias, half, "reference")


WAYS = {"ours": together, "ours, two operations": apart, "eager": eager}


def case(images: int, tokens: int, width: int = 768) -> Case:
    rows = images * tokens
    moved = 2 * rows * width * (2 + 2 + 3 + 3 + 3)  # x, branch, s, dx, y, dy and n, once each
    n = sets_for(moved, most=8)
    make = lambda *shape: torch.randn(*shape, device=device()).to(BF16)  # noqa: E731
    xs, branches = ([make(images, tokens, width) for _ in range(n)] for _ in range(2))
    flows = [(make(images, tokens, width), make(images, tokens, 3, width)) for _ in range(n)]
    norm = (torch.ones(width, device=device()), torch.zeros(width, device=device()))
    weight, bias = make(3 * width, width) / width**0.5, make(3 * width)
    lora = {
        t: (
            torch.randn(1, 4, width, device=device()) / width**0.5,
            torch.randn(1, width, 4, device=device()) / 2,
            torch.ones(1, device=device()),
        )
        for t in "qv"
    }

    def call(function, i, to=BF16):
        leaves = [t[i % n].to(to).detach().requires_grad_() for t in (xs, branches)]
        factors = {
            t: tuple(v.detach().requires_grad_(v.ndim == 3) for v in f) for t, f in lora.items()
        }
        trained = [v for f in factors.values() for v in f[:2]]
        outputs = function(*leaves, norm, weight.to(to), bias.to(to), factors)
        return torch.autograd.grad(outputs, (*leaves, *trained), [f.to(to) for f in flows[i % n]])

    def check():
        want = call(eager, 0, torch.float32)
        rough = call(eager, 0)
        for name, function in WAYS.items():
            for got, plain, exact in zip(call(function, 0), rough, want, strict=True):
                allowed = 2 * (plain.float() - exact.float()).norm() + 1e-5 * exact.norm()
                assert (got.float() - exact.float()).norm() <= allowed, name

    variants = {name: (lambda i, f=f: lambda: call(f, i)) for name, f in WAYS.items()}
    return Case(f"{images}x{tokens}", moved, "ours, two operations", variants, check)


CASES = {"25": lambda: case(25, 197), "100": lambda: case(100, 197)}
SMALL = {"small": lambda: case(2, 5, 32)}


@pytest.mark.parametrize("name", list(CASES if on_gpu() else SMALL))
def test_norm_qkv(benchmark, name):
    compare.bench_with_pytest(benchmark, (CASES if on_gpu() else SMALL)[name], "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    rows = compare.report("norm_qkv", list((CASES if on_gpu() else SMALL).values()))
    if options.record:
        record("norm_qkv", rows)


if __name__ == "__main__":
    main()

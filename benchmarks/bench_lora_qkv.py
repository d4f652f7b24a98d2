"""lora_qkv: its methods, the library's ways to the same function, and the plain QKV product.

`python benchmarks/bench_lora_qkv.py` prints one table; `--tiles` times every way to cut the
products instead, `--parts` the kernels beside them against the time of a copy of their bytes,
`pytest benchmarks/bench_lora_qkv.py --benchmark-only` the cases one by one.
The floor is the plain product x W^T + bias (backward too: dy W), which no LoRA can undercut.

Ways of the library, in bf16 like all others:
  eager      x W^T, then the low-rank products, added and stacked as the reference has it
  compiled   the same under torch.compile
  addmm      x W^T, then one skinny product and an accumulating one into each of q and v
  augmented  one product of [x, x a^T] with [W, s b]: LoRA as some more columns of K
  merged     W + s b a by PyTorch, then the plain product
  bmm        many LoRAs, in equal consecutive shares only: a product for each with its merged W
In cases "many" ours are told the LoRA of each image, in cases "shares" that the shares are equal.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import compare
import pytest
import torch
from compare import Case
from timing import Call, copy_bandwidth, device, measure, on_gpu, record, sets_for
from torch import Tensor
from torch.nn.functional import linear

pytest.importorskip("triton")
# variants of a launch are the kernels' own business, which fastrecycle.ops does not show
kernels = importlib.import_module("fastrecycle_kernels.lora_qkv")
reference = importlib.import_module("fastrecycle_kernels.reference")

DTYPE = torch.bfloat16 if on_gpu() else torch.float32  # the interpreter's bf16 is not to be trusted
WIDTH = 768 if on_gpu() else 64
TARGETS = ("q", "v")


class Problem:
    """Inputs of one size; LoRAs on q and v in float32, as they are trained."""

    def __init__(
        self,
        images: int,
        tokens: int,
        rank: int = 4,
        loras: int = 1,
        seed: int = 0,
        shares: bool = False,
    ):
        self.images, self.tokens, self.rank, self.loras = images, tokens, rank, loras
        generator = torch.Generator(device()).manual_seed(seed)

        def randn(*shape, scale=1.0):
            return scale * torch.randn(shape, device=device(), generator=generator)

        root = WIDTH**-0.5
        self.x = randn(images, tokens, WIDTH).to(DTYPE)
        self.weight = randn(3 * WIDTH, WIDTH, scale=root).to(DTYPE)
        self.bias = randn(3 * WIDTH).to(DTYPE)
        self.dy = randn(images, tokens, 3, WIDTH).to(DTYPE)
        self.lora = {
            t: (
                randn(loras, rank, WIDTH, scale=root),
                randn(loras, WIDTH, rank, scale=0.5),
                torch.ones(loras, device=device()),
            )
            for t in TARGETS
        }
        self.index = None
        if loras > 1 and not shares:
            self.index = torch.arange(images, device=device()) * loras // images  # equal shares

    def with_grad(self, train: str) -> list[Tensor]:
        """Leaves of a backward: "x" (inversion) or "x and factors" (meta-training)."""
        self.x.requires_grad_()
        leaves = [self.x]
        if train == "x and factors":
            leaves += [v.requires_grad_() for f in self.lora.values() for v in f[:2]]
        return leaves

    @property
    def factors(self):
        a, b, scale = ([f[i] for f in self.lora.values()] for i in range(3))
        return kernels._factors(a, b, scale, [0, 2])


Way = Callable[[Problem], Tensor]


def plain(p: Problem) -> Tensor:
    return linear(p.x, p.weight, p.bias).unflatten(-1, (3, -1))


def eager(p: Problem) -> Tensor:
    cast = {t: tuple(v.to(DTYPE) for v in f) for t, f in p.lora.items()}
    return reference.lora_qkv(p.x, p.weight, p.bias, cast, p.index)


def addmm(p: Problem) -> Tensor:
    """Without autograd: it accumulates in place."""
    y = linear(p.x, p.weight, p.bias)
    rows = y.view(-1, 3 * WIDTH)
    down = torch.cat([f[0][0] for f in p.lora.values()]).to(DTYPE)
    low = p.x.view(-1, WIDTH) @ down.T
    for i, (target, (_, b, scale)) in enumerate(p.lora.items()):
        place = "qkv".index(target) * WIDTH
        up = (b[0] * scale[0]).to(DTYPE)
        rows[:, place : place + WIDTH].addmm_(low[:, i * p.rank : (i + 1) * p.rank], up.T)
    return y.unflatten(-1, (3, -1))


def augmented(p: Problem) -> Tensor:
    down = torch.cat([f[0][0] for f in p.lora.values()]).to(DTYPE)
    pad = -len(down) % 16  # rows of 32 bytes, as the products like them
    columns = []
    for target, (_, b, scale) in p.lora.items():
        place = "qkv".index(target)
        up = (b[0] * scale[0]).to(DTYPE)
        columns.append(torch.nn.functional.pad(up, (0, 0, place * WIDTH, (2 - place) * WIDTH)))
    x = torch.cat((p.x, torch.nn.functional.pad(linear(p.x, down), (0, pad))), -1)
    w = torch.cat((p.weight, *columns, p.weight.new_zeros(3 * WIDTH, pad)), 1)
    return linear(x, w, p.bias).unflatten(-1, (3, -1))


def merged(p: Problem) -> Tensor:
    parts = list(p.weight.unflatten(0, (3, -1)).unbind(0))
    for target, (a, b, scale) in p.lora.items():
        place = "qkv".index(target)
        parts[place] = (parts[place].float() + (b[0] * scale[0]) @ a[0]).to(DTYPE)
    return linear(p.x, torch.cat(parts), p.bias).unflatten(-1, (3, -1))


def bmm(p: Problem) -> Tensor:
    w = p.weight.unflatten(0, (3, -1)).float().expand(p.loras, -1, -1, -1)
    parts = list(w.unbind(1))
    for target, (a, b, scale) in p.lora.items():
        place = "qkv".index(target)
        parts[place] = torch.baddbmm(parts[place], b * scale[:, None, None], a)
    w = torch.cat(parts, 1).to(DTYPE)
    x = p.x.view(p.loras, -1, WIDTH)
    y = torch.baddbmm(p.bias.expand(p.loras, 1, -1), x, w.mT)
    return y.view(p.images, p.tokens, 3, WIDTH)


def ours(method: str) -> Way:
    return lambda p: kernels.lora_qkv(p.x, p.weight, p.bias, p.lora, p.index, method=method)


def ways(p: Problem, backward: bool) -> dict[str, Way]:
    found: dict[str, Way] = {"plain": plain, "eager": eager}
    if p.loras == 1:
        found |= {"augmented": augmented, "merged": merged}
        if not backward:
            found["addmm"] = addmm
        return found | {f"ours, {m}": ours(m) for m in ("merge", "loop", "pass")}
    found |= {"bmm": bmm, "ours, pass": ours("pass")}
    return found if p.index is not None else found | {"ours, merge": ours("merge")}


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def case(
    images: int,
    tokens: int,
    rank: int = 4,
    loras: int = 1,
    train: str = "",
    compile: bool = False,
    shares: bool = False,
) -> Case:
    """Forward alone, or forward and backward where something trains."""
    rows = images * tokens
    moved = rows * 4 * WIDTH * DTYPE.itemsize * (2 if train else 1) + 3 * WIDTH**2 * DTYPE.itemsize
    problems = [
        Problem(images, tokens, rank, loras, seed, shares)
        for seed in range(min(4, sets_for(moved)))
    ]
    leaves = [p.with_grad(train) if train else [] for p in problems]

    def step(way: Way, i: int):
        i %= len(problems)
        p = problems[i]
        y = way(p)
        if not train:
            return y
        used = leaves[i] if way is not plain else leaves[i][:1]
        return y, torch.autograd.grad(y, used, p.dy)

    def make_of(way: Way):
        return lambda i: lambda: step(way, i)

    found = ways(problems[0], bool(train))
    if on_gpu() and compile:
        # tensors as arguments: a Problem would be guarded by its identity
        def traced(x, weight, bias, index, *flat):
            cast = {t: tuple(v.to(DTYPE) for v in flat[3 * j : 3 * j + 3])
                    for j, t in enumerate(TARGETS)}  # fmt: skip
            return reference.lora_qkv(x, weight, bias, cast, index)

        run = torch.compile(traced, fullgraph=True, dynamic=False)
        found["compiled"] = lambda p: run(
            p.x, p.weight, p.bias, p.index, *(v for f in p.lora.values() for v in f)
        )
    variants = {name: make_of(way) for name, way in found.items()}

    def check():
        """No way is more than twice as far from the truth in float64 as eager is."""
        for i, p in enumerate(problems[:2]):
            wide = {t: tuple(v.double() for v in f) for t, f in p.lora.items()}
            x = p.x.double()
            want = reference.lora_qkv(x, p.weight.double(), p.bias.double(), wide, p.index)
            exact = [want]
            if train:
                exact += torch.autograd.grad(want, leaves[i], p.dy.double())
            results = {}
            for name, way in found.items():
                if name == "plain":
                    continue
                got = step(way, i)
                results[name] = [got] if not train else [got[0], *got[1]]
            limit = [max(1e-6, 2 * error(*pair)) for pair in zip(results["eager"], exact)]
            for name, got in results.items():
                for j, (value, truth) in enumerate(zip(got, exact, strict=True)):
                    assert error(value, truth) <= limit[j], (name, j, error(value, truth), limit[j])

    grown = "" if loras == 1 else f", {loras} LoRAs{' in equal shares' if shares else ''}"
    name = f"{images}x{tokens}, r {rank}{grown}, " + (f"trains {train}" if train else "forward")
    return Case(name, moved, "plain", variants, check)


CASES = {
    "25": lambda: case(25, 197, compile=True),
    "25x": lambda: case(25, 197, train="x", compile=True),
    "100": lambda: case(100, 197),
    "100f": lambda: case(100, 197, train="x and factors", compile=True),
    "50t": lambda: case(100, 50),
    "50tf": lambda: case(100, 50, train="x and factors", compile=True),
    "many": lambda: case(100, 197, loras=4),
    "manyx": lambda: case(100, 197, loras=4, train="x", compile=True),
    "manyf": lambda: case(100, 197, loras=4, train="x and factors"),
    "shares": lambda: case(100, 197, loras=4, shares=True),
    "sharesx": lambda: case(100, 197, loras=4, train="x", compile=True, shares=True),
    "sharesf": lambda: case(100, 197, loras=4, train="x and factors", shares=True),
}
RANKS = {f"rank{r}": lambda r=r: case(100, 197, rank=r, train="x and factors") for r in (1, 16, 64)}
COUNTS = {f"count{g}": lambda g=g: case(128, 197, loras=g, train="x") for g in (2, 8, 32)}
SMALL = {
    "small": lambda: case(2, 5),
    "smallf": lambda: case(2, 5, train="x and factors"),
    "many": lambda: case(4, 5, loras=2, train="x and factors"),
    "shares": lambda: case(4, 5, loras=2, train="x and factors", shares=True),
}


@pytest.mark.parametrize("name", CASES if on_gpu() else SMALL)
def test_lora_qkv(benchmark, name):
    build = (CASES if on_gpu() else SMALL)[name]
    compare.bench_with_pytest(benchmark, build, "ours, pass")


# ------------------------------------------------------------------ how the products are cut

SHAPES = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (256, 128, 64, 8, 3))
TILES = [
    kernels.Tile(*shape, persistent=persistent, flatten=flatten)
    for shape in SHAPES
    for persistent, flatten in ((True, False), (True, True), (False, False))
]
MERGE = ("MERGE_ROWS", "MERGE_COLUMNS", "MERGE_WARPS")
MERGES = ((16, 256, 4), (8, 256, 4), (8, 256, 2), (32, 256, 8), (16, 128, 4), (4, 256, 1))
PROJECT = ("PROJECT_ROWS", "PROJECT_DEPTH", "PROJECT_WARPS")
PROJECTS = ((32, 128, 4), (64, 128, 4))
PART = ("PART_COLUMNS", "PART_ROWS", "PART_PROGRAMS")
PARTS = ((128, 64, 256), (128, 64, 512))
SWEEPS = (
    (128, 64, 8, 4), (128, 64, 4, 4), (128, 64, 8, 5), (128, 64, 4, 3), (128, 128, 8, 2),
    (128, 128, 4, 2), (128, 128, 8, 3), (64, 128, 4, 4), (64, 128, 4, 3), (64, 128, 8, 3),
    (64, 128, 4, 6), (64, 128, 8, 6), (64, 64, 4, 4), (64, 64, 4, 6), (64, 256, 8, 2),
    (32, 128, 4, 4), (256, 64, 8, 3), (64, 128, 8, 3, True), (64, 128, 4, 3, True),
    (64, 256, 8, 2, True), (32, 128, 4, 3, True),
)  # fmt: skip
SUM = ("SUM_PARTS", "SUM_ELEMENTS")
SUMS = ((32, 64), (32, 32), (64, 32), (16, 128))
SIZES = ((25, 197), (100, 197), (100, 50)) if on_gpu() else ((2, 5),)
IN_A_GRAPH = 4  # calls, so that the gaps between launches stay out


def product(p: Problem, name: str, loop: bool, tile: kernels.Tile) -> Call:
    x, dy = p.x.view(-1, WIDTH), p.dy.view(-1, 3 * WIDTH)
    f = p.factors
    if name == "forward":
        return lambda: kernels.launch_forward(x, p.weight, p.bias, f, p.index, p.tokens, loop, tile)
    return lambda: kernels.launch_input_grad(dy, p.weight, f, p.index, p.tokens, loop, tile)


def builds(call: Call, tile: kernels.Tile) -> bool:
    try:
        call()
    except Exception as problem:  # of this tile: said, and the others go on
        print("  left out", tuple(tile), type(problem).__name__)
        return False
    return True


def tiles_of(p: Problem, name: str, loop: bool) -> list[dict]:
    chosen = [t for t in (TILES if on_gpu() else TILES[:2]) if not (loop and t.flatten)]
    calls = {t: product(p, name, loop, t) for t in chosen}
    found = {str(tuple(t)): [call] * IN_A_GRAPH for t, call in calls.items() if builds(call, t)}
    dy = p.dy.view(-1, 3 * WIDTH)
    library = (lambda: plain(p)) if name == "forward" else (lambda: dy @ p.weight)
    timings = measure({**found, "plain": [library] * IN_A_GRAPH}, 7 if on_gpu() else 2)
    base = timings.pop("plain").median_ms
    method = "loop" if loop else "pass"
    title = f"{name}, {method}, {p.images}x{p.tokens}, {p.loras} LoRAs"
    print(f"{title}: plain {1000 * base:.1f} us")
    rows = [
        {"product": title, "tile": tile, "median_us": 1000 * t.median_ms,
         "times_plain": t.median_ms / base}
        for tile, t in sorted(timings.items(), key=lambda item: item[1].median_ms)
    ]  # fmt: skip
    for row in rows[:4]:
        print(f"    {row['median_us']:8.1f} us {row['times_plain']:5.2f}x  {row['tile']}")
    return rows


def tiles() -> list[dict]:
    """Every tile of every product; the four best are printed, the best first."""
    rows = []
    for images, tokens in SIZES:
        for loras in (1, 2):
            p = Problem(images, tokens, loras=loras)
            for loop in (True, False) if loras == 1 else (False,):
                for name in ("forward", "input_grad"):
                    rows += tiles_of(p, name, loop)
    return rows


def setting_each(names: tuple[str, ...], values: tuple[int, ...], call: Callable[[int], object]):
    return lambda i: setting(names, values, lambda: call(i))()


def setting(names: tuple[str, ...], values: tuple[int, ...], call: Call) -> Call:
    """The call under other launch constants than the file's."""

    def run():
        before = [getattr(kernels, name) for name in names]
        for name, value in zip(names, values):
            setattr(kernels, name, value)
        try:
            return call()
        finally:
            for name, value in zip(names, before):
                setattr(kernels, name, value)

    return run


@dataclass(frozen=True)
class Part:
    """A kernel beside the products, or a product of shares."""

    calls: list[Call]  # on several inputs, together more than the L2 cache holds
    moved: int  # bytes a call reads and writes at least


def merge_parts(loras: int) -> dict[str, Part]:
    """W + s b a; so many weights that each comes from memory."""
    problems = [Problem(loras, 1, loras=loras, seed=i) for i in range(20 if on_gpu() else 1)]
    moved = (1 + loras) * 3 * WIDTH**2 * DTYPE.itemsize

    def call(p: Problem) -> Call:
        return lambda: kernels.launch_merge(p.weight, p.factors)

    return {
        f"merge, {loras} LoRAs {cut}": Part([setting(MERGE, cut, call(p)) for p in problems], moved)
        for cut in (MERGES if loras == 1 else MERGES[:3])
    }


def gradient_parts(problems: list[Problem]) -> dict[str, Part]:
    """da and db: in one sweep, and its kernels alone; in passes, as any index needs them."""
    p = problems[0]
    rows, slots = p.images * p.tokens, len(TARGETS)
    read = rows * (1 + slots) * WIDTH * DTYPE.itemsize
    factors = [q.factors for q in problems]
    x, dy = ([getattr(q, n).view(rows, -1) for q in problems] for n in ("x", "dy"))
    packed = [kernels.launch_pack_all(f, WIDTH, DTYPE) for f in factors]
    each = range(len(problems))
    found: dict[str, Part] = {}

    def add(name: str, moved: int, call: Callable[[int], object]) -> None:
        found[name] = Part([lambda i=i: call(i) for i in each], moved)

    add("pack", 0, lambda i: kernels.launch_pack_all(factors[i], WIDTH, DTYPE))
    add("da, db", read, lambda i: kernels.launch_fused_factor_grad(dy[i], x[i], factors[i]))
    for cut in SWEEPS if on_gpu() else SWEEPS[:1]:
        sweep = kernels.Sweep(*cut)
        size = 8 * sum(p.factors.ranks) * WIDTH * -(-rows // p.loras // sweep.m) * p.loras
        add(
            f"sweep {cut}", read + size,
            lambda i, s=sweep: kernels.launch_sweep(dy[i], x[i], packed[i], factors[i], s),
        )  # fmt: skip
    sweep = kernels._sweep_of(rows // p.loras, p.loras, DTYPE, kernels._chip(p.x.device))
    swept = [kernels.launch_sweep(dy[i], x[i], packed[i], factors[i], sweep) for i in each]
    for values in SUMS:
        part = setting_each(SUM, values, lambda i: kernels.launch_sweep_sum(swept[i], factors[i]))
        add(f"sum {values}", swept[0].nbytes, part)
    if p.loras > 1:
        return found
    low = kernels.launch_project(x[0], p.factors, None, p.tokens, False)
    for name, up in (("x a^T", False), ("dy b", True)):
        for values in PROJECTS:
            source = dy if up else x
            call = setting_each(
                PROJECT, values,
                lambda i, up=up, source=source: kernels.launch_project(
                    source[i], factors[i], None, p.tokens, up
                ),
            )  # fmt: skip
            add(f"{name} {values}", read * (slots if up else 1) // (1 + slots), call)
    for values in PARTS:
        call = setting_each(
            PART, values,
            lambda i: kernels.launch_factor_grad(
                dy[i], x[i], low, low, factors[i], None, p.tokens
            ),
        )  # fmt: skip
        add(f"da, db after {values}", read, call)
    return found


def product_parts(problems: list[Problem]) -> dict[str, Part]:
    """Ways to multiply equal shares with a weight each; plain is one product with one weight."""
    p = problems[0]
    rows = p.images * p.tokens
    moved = 4 * rows * WIDTH * DTYPE.itemsize + (1 + p.loras) * 3 * WIDTH**2 * DTYPE.itemsize
    weights = [kernels.launch_merge(q.weight, q.factors) for q in problems]
    each = range(len(problems))
    x = [q.x.view(p.loras, -1, WIDTH) for q in problems]
    dy = [q.dy.view(p.images, p.tokens, -1) for q in problems]

    def batched(i: int):
        bias = problems[i].bias.expand(p.loras, 1, -1)
        return torch.baddbmm(bias, x[i], weights[i].mT)

    def on_streams(i: int):
        """As ours, but each share on a stream of its own, to fill another's last wave of tiles."""
        current = torch.cuda.current_stream()
        y = x[i].new_empty((*x[i].shape[:2], 3 * WIDTH))
        for stream, x_rows, w, y_rows in zip(streams, x[i], weights[i], y):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                torch.addmm(problems[i].bias, x_rows, w.T, out=y_rows)
        for stream in streams:
            current.wait_stream(stream)
        return y

    found: dict[str, Callable[[int], object]] = {
        "forward, plain": lambda i: plain(problems[i]),
        "forward, in turn (ours)": lambda i: kernels._shares_forward(
            problems[i].x, weights[i], problems[i].bias
        ),
        "forward, baddbmm": batched,
        "forward, bmm without bias": lambda i: torch.bmm(x[i], weights[i].mT),
        "backward, plain": lambda i: dy[i] @ problems[i].weight,
        "backward, bmm (ours)": lambda i: kernels._shares_input_grad(dy[i], weights[i]),
        "backward, in turn": lambda i: [
            a @ w for a, w in zip(dy[i].view(p.loras, -1, 3 * WIDTH), weights[i])
        ],
    }
    if on_gpu():
        streams = [torch.cuda.Stream() for _ in range(p.loras)]
        found["forward, on streams"] = on_streams
    return {n: Part([lambda i=i, c=c: c(i) for i in each], moved) for n, c in found.items()}


def report_parts(title: str, found: dict[str, Part], bandwidth: float) -> list[dict]:
    good = {}
    for name, part in found.items():
        try:
            part.calls[0]()
            good[name] = part
        except Exception as problem:  # of this cut: said, and the others go on
            print("  left out", name, type(problem).__name__)
    timings = measure({name: p.calls for name, p in good.items()}, 9 if on_gpu() else 2)
    print(f"{title}   (roofline: a copy of as many bytes, {bandwidth / 1e12:.2f} TB/s)")
    rows = []
    for name, t in timings.items():
        roofline = 1e6 * good[name].moved / bandwidth
        rows.append(
            {"part": name, "size": title, "median_us": 1000 * t.median_ms,
             "roofline_us": roofline, "megabytes": good[name].moved / 1e6}
        )  # fmt: skip
        times = f"{1000 * t.median_ms / roofline:6.2f}x" if roofline else ""
        print(f"  {1000 * t.median_ms:8.1f} us  roofline {roofline:6.1f} us {times:8} {name}")
    return rows


def parts() -> list[dict]:
    """What runs beside the products, by how it is cut, and the products of shares."""
    bandwidth = copy_bandwidth(2**30 if on_gpu() else 2**20)
    rows = []
    for loras in (1, 4):
        rows += report_parts(f"weights, {loras} LoRAs", merge_parts(loras), bandwidth)
    for images, tokens in SIZES:
        problems = [Problem(images, tokens, seed=i) for i in range(4 if on_gpu() else 1)]
        rows += report_parts(f"{images}x{tokens}", gradient_parts(problems), bandwidth)
    images, tokens = SIZES[1] if on_gpu() else (4, 5)
    problems = [
        Problem(images, tokens, loras=4, seed=i, shares=True) for i in range(4 if on_gpu() else 1)
    ]
    title = f"{images}x{tokens} in 4 shares"
    rows += report_parts(title, gradient_parts(problems), bandwidth)
    return rows + report_parts(title, product_parts(problems), bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="one case, by name; more: rank*, count*")
    parser.add_argument("--tiles", action="store_true", help="how to cut the products")
    parser.add_argument("--parts", action="store_true", help="the kernels beside the products")
    parser.add_argument("--curves", action="store_true", help="against rank and number of LoRAs")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    if options.tiles or options.parts:
        rows = (tiles() if options.tiles else []) + (parts() if options.parts else [])
    else:
        cases = {**CASES, **RANKS, **COUNTS} if on_gpu() else SMALL
        if options.only:
            cases = {options.only: cases[options.only]}
        elif options.curves:
            cases = {**RANKS, **COUNTS} if on_gpu() else SMALL
        elif on_gpu():
            cases = CASES
        rows = compare.report("lora_qkv", list(cases.values()))
    if options.record:
        record("lora_qkv", rows)


if __name__ == "__main__":
    main()

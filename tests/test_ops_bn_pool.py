"""bn_pool: BatchNorm, ReLU and pooling at once, against the three one after the other.

In Triton's interpreter where no GPU is. fp32 tolerance as for bn_prior: sums of some hundred
numbers near 1 in another order.
"""

import sys
from itertools import product

import pytest
import torch

pytest.importorskip("triton")
import aot
from fastrecycle_kernels import bn_pool as kernels
from fastrecycle_kernels import bn_prior, moment_distance, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
F32 = {"rtol": 1e-5, "atol": 1e-5}
F16 = {"rtol": 2e-3, "atol": 2e-3}  # 11 bits


def randn(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def stored(c, seed=5):
    """Weights of both signs: where one is negative the smallest number of a window counts."""
    mean, var, weight, bias = (randn(c, seed=seed + i) for i in range(4))
    return mean, var.square() + 0.1, weight, bias


def pool(x):
    return torch.nn.functional.max_pool2d(x, 3, 2, 1)


def explicit(x, statistics, segments, chunk_rows, eps=1e-3):
    """Y and the moments of chunks in plain PyTorch: an image is a chunk where a side is odd."""
    x = x.to(reference.wide(x))  # before the pool: rounding y would make ties that x has not
    y = pool(reference.bn_prior(x, *statistics, eps, segments, True, None)[0])
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        rows = x.permute(0, 2, 3, 1).reshape(segments, b // segments * h * w, c)
    else:
        units = x.reshape(b, c, h // 2, 2, w // 2, 2)
        rows = units.permute(0, 2, 4, 3, 5, 1).reshape(segments, -1, c)
    parts = rows.split(chunk_rows, dim=1)
    mu = torch.stack([p.mean(1) for p in parts], 1)
    return y, torch.stack([mu, torch.stack([p.var(1, correction=0) for p in parts], 1)])


def assert_both_agree(x, statistics, segments=1, which=(0, 1), tolerance=F32):
    x.requires_grad_()
    y, _, chunks = kernels.bn_pool_chunks(x, *statistics, 1e-3, segments)
    assert y.dtype == x.dtype
    assert chunks.rows == x[:, 0].numel() // segments
    ours = y, chunks.moments
    expected = explicit(x, statistics, segments, chunks.chunk_rows)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), **tolerance)
    flows = [randn(*o.shape, seed=20 + i, dtype=o.dtype) for i, o in enumerate(ours)]
    gradients = [
        torch.autograd.grad(sum((o[i].float() * flows[i]).sum() for i in which), x)[0]
        for o in (ours, expected)
    ]
    torch.testing.assert_close(*gradients, **tolerance)


# ------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("channels", [20, 72])  # below and above one block, no multiple of it
@pytest.mark.parametrize("sides", [(6, 8), (5, 8), (6, 7), (7, 5)])
def test_bn_pool_matches_reference(segments, channels, sides):
    assert_both_agree(randn(3, channels, *sides, seed=1), stored(channels), segments)


def test_bn_pool_matches_reference_in_float16():
    x = randn(4, 64, 6, 8, seed=1, dtype=torch.float16)
    assert_both_agree(x, stored(64), 2, tolerance=F16)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 16, 2, 2), (2, 64, 14, 14), (1, 3, 1, 9)])
@pytest.mark.parametrize("programs", [1, 5, 1056])
def test_bn_pool_matches_reference_however_units_are_cut(shape, programs, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    plan = kernels.launch(shape[0], *shape[2:], shape[1], 1)
    units = shape[0] * ((shape[2] + 1) // 2) * ((shape[3] + 1) // 2)
    assert (plan.chunks - 1) * plan.chunk_units < units <= plan.chunks * plan.chunk_units
    assert_both_agree(randn(*shape, seed=1), stored(shape[1]))


@pytest.mark.parametrize("which", [(0,), (1,)])
def test_bn_pool_gradient_of_one_output(which):
    assert_both_agree(randn(2, 16, 6, 8, seed=1), stored(16), which=which)


def test_bn_pool_gives_ties_to_the_first_as_pytorch():
    """Numbers of a few values, so that most windows have several maxima."""
    x = randn(4, 16, 8, 8, seed=1).round()
    assert_both_agree(x, stored(16))
    assert_both_agree(torch.ones(2, 16, 6, 6, device=DEVICE), stored(16))


def test_bn_pool_of_no_image():
    x = randn(0, 16, 6, 8).requires_grad_()
    y, twin, chunks = kernels.bn_pool_chunks(x, *stored(16), 1e-5, 1)
    assert y.shape == twin.shape == (0, 16, 3, 4)
    assert chunks.moments.isnan().all()
    assert torch.autograd.grad(y.sum() + chunks.moments.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("kind", ["nchw", "every second channel", "expanded"])
def test_bn_pool_takes_any_memory(kind):
    x = {
        "nchw": randn(2, 16, 6, 8, seed=1).contiguous(),
        "every second channel": randn(2, 32, 6, 8, seed=1)[:, ::2],
        "expanded": randn(2, 16, 1, 8, seed=1).expand(2, 16, 6, 8),
    }[kind]
    y = kernels.bn_pool_chunks(x, *stored(16), 1e-5, 1)[0]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_both_agree(x.detach(), stored(16))


def test_bn_pool_takes_gradients_in_any_memory():
    x = randn(2, 16, 6, 8, seed=1).requires_grad_()
    y, _, chunks = kernels.bn_pool_chunks(x, *stored(16), 1e-3, 2)
    expected = explicit(x, stored(16), 2, chunks.chunk_rows)
    for got, want in ((y, expected[0]), (chunks.moments, expected[1])):
        results = [torch.autograd.grad(o.sum(), x, retain_graph=True)[0] for o in (got, want)]
        torch.testing.assert_close(*results, **F32)


def test_bn_pool_guards_a_stored_variance_of_zero():
    mean, var, weight, bias = stored(16)
    var[3] = 0
    bias[3] = 0.7
    x = randn(2, 16, 6, 8, seed=1)
    y = kernels.bn_pool_chunks(x, mean, var, weight, bias, 1e-3, 1)[0]
    assert torch.equal(y[:, 3], bias[3].expand(2, 3, 4))
    assert_both_agree(x, (mean, var, weight, bias))


def test_bn_pool_moments_far_from_0_keep_their_digits():
    x = (100 + randn(8, 16, 16, 16, seed=1)).to(torch.float16)
    _, _, chunks = kernels.bn_pool_chunks(x, *stored(16), 1e-5, 1)
    mu, sigma2 = bn_prior._run_merge(chunks.moments, chunks.rows, chunks.chunk_rows)
    exact = x.double()
    torch.testing.assert_close(mu[0].double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    variance = exact.var((0, 2, 3), correction=0)
    torch.testing.assert_close(sigma2[0].double(), variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sides", [(8, 6), (5, 7)])
def test_bn_pool_chunks_merge_to_the_distance_of_tasks(sides):
    x, statistics = randn(6, 24, *sides, seed=1).requires_grad_(), stored(24)
    mean, var = statistics[:2]
    _, _, chunks = kernels.bn_pool_chunks(x, *statistics, 1e-3, 3)
    ours = moment_distance.moment_distance([chunks], mean, var, 2.0)
    moments = [reference.bn_prior(x, *statistics, 1e-3, 3, True, None)[1:]]
    expected = reference.moment_distance(moments, mean, var, 2.0)
    torch.testing.assert_close(ours, expected, **F32)
    gradients = [torch.autograd.grad(total.sum(), x)[0] for total in (ours, expected)]
    torch.testing.assert_close(*gradients, **F32)


def test_bn_pool_moments_pass_on_nan():
    """A kernel that hid one would let a broken image look natural."""
    x = randn(2, 16, 6, 8, seed=1)
    x[1, 3, 2, 2] = float("nan")
    moments = kernels.bn_pool_chunks(x, *stored(16), 1e-5, 2)[2].moments
    assert moments[:, 1, :, 3].isnan().any(-1).all()
    assert not moments[:, 0].isnan().any()


@pytest.mark.parametrize("used", ["both", "second"])
def test_twin_takes_over_the_second_use(used):
    x = randn(4, 16, 6, 8, seed=1).requires_grad_()
    flows = randn(4, 16, 3, 4, seed=2), randn(4, 16, 3, 4, seed=3)
    y, twin, _ = kernels.bn_pool_chunks(x, *stored(16), 1e-3, 1)
    total = (bn_prior.carry(y, twin) * flows[1]).sum()
    expected = explicit(x, stored(16), 1, 10**6)[0]
    want = (expected * flows[1]).sum()
    if used == "both":
        total, want = total + (y * flows[0]).sum(), want + (expected * flows[0]).sum()
    gradients = [torch.autograd.grad(t, x)[0] for t in (total, want)]
    torch.testing.assert_close(*gradients, **F32)


def test_bn_pool_is_the_same_each_time():
    x = randn(6, 72, 8, 8, seed=1).requires_grad_()
    runs = []
    for _ in range(2):
        y, _, chunks = kernels.bn_pool_chunks(x, *stored(72), 1e-5, 2)
        dx = torch.autograd.grad(y.square().sum() + chunks.moments.square().sum(), x)[0]
        runs.append([y, chunks.moments, dx])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ------------------------------------------------------------------ as an operator


def test_rejects_what_the_kernels_cannot_do():
    with pytest.raises(ValueError, match=r"expected x in .* got torch.float64"):
        kernels.bn_pool_chunks(randn(2, 16, 6, 8).double(), *stored(16), 1e-5, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sides", [(6, 8), (5, 7)])
def test_bn_pool_is_a_proper_operator(sides):
    x = randn(4, 24, *sides, seed=1).requires_grad_()
    rest = (*stored(24), 1e-5, 2)
    ops = torch.ops.fastrecycle
    torch.library.opcheck(ops.bn_pool.default, (x, *rest))
    y, _, chunks, code = (t.detach() for t in ops.bn_pool(x, *rest))
    arguments = (y, None, chunks, x.detach(), code, chunks, *rest[:5])
    torch.library.opcheck(ops.bn_pool_backward.default, arguments)


@pytest.mark.filterwarnings("ignore")
def test_bn_pool_traces_as_one_graph():
    x, statistics = randn(4, 24, 6, 4, seed=1).requires_grad_(), stored(24)

    def run(x):
        y, _, chunks = kernels.bn_pool_chunks(x, *statistics, 1e-5, 2)
        return y.square().sum() + chunks.moments.square().sum()

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(x), run(x))
    assert torch.equal(*(torch.autograd.grad(f(x), x)[0] for f in (traced, run)))


# ------------------------------------------------------------------ built for GPUs

FLOATS = ("mean", "var", "weight", "bias", "chunk_mean", "chunk_var", "mu", "dmoments")
SIZES = ("images", "height", "width", "channels", "strips", "chunks", "chunk_units", "chunk_rows")


def case(kernel, arch, dtype, plan, **constants):
    types = dict.fromkeys(("x", "y", "twin", "dy", "dtwin", "dx"), aot.POINTERS[dtype])
    types |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(SIZES, "i32")
    types |= {"code": "*u8", "eps": "fp32"}
    constants |= {"BLOCK_U": plan.block_u, "BLOCK_C": plan.block_c}
    aligned = ("channels", "height", "width", "chunk_units", "chunk_rows")
    return aot.Case(f"bn_pool:{kernel}", arch, types, constants, plan.warps, aligned=aligned)


def cases():
    for arch, dtype in product((80, 90, 100), ("bfloat16", "float32")):
        plan = kernels.launch(25, 112, 112, 64, 1, getattr(torch, dtype).itemsize)
        yield case("_forward", arch, dtype, plan)
        for twin in (False, True):
            yield case("_backward", arch, dtype, plan, DY=True, DTWIN=twin, DMOMENTS=True)
    plan = kernels.launch(25, 112, 112, 64, 1)
    yield case("_backward", 90, "bfloat16", plan, DY=False, DTWIN=False, DMOMENTS=True)
    yield case("_backward", 90, "bfloat16", plan, DY=True, DTWIN=False, DMOMENTS=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_bn_pool_builds_for_every_gpu():
    asked = list(cases())
    for want, built in zip(asked, aot.compiled(asked), strict=True):
        assert built.shared_bytes <= aot.SHARED_BYTES[want.arch]
        assert not built.stack_bytes, f"{want} spills"
        assert built.wide_loads > 0, f"{want} reads fewer than 16 bytes at once"


# ------------------------------------------------------------------ on a GPU


def error(got, exact):
    return (got.double() - exact.double()).abs().max().item()


@pytest.mark.parametrize(
    ("batch", "segments", "channels", "side"),
    [(25, 1, 64, 112), (50, 2, 64, 112), (6, 3, 64, 56), (4, 2, 64, 113), (8, 1, 32, 96)],
)
class TestGPU:
    pytestmark = gpu

    def test_bf16_errs_no_more_than_twice_eager(self, batch, segments, channels, side):
        x, statistics = (2 * randn(batch, channels, side, side, seed=1) + 1), stored(channels)
        x = x.bfloat16()
        flow = randn(batch, channels, (side + 1) // 2, (side + 1) // 2, seed=3).bfloat16()

        def run(stem, dtype):
            leaf = x.detach().to(dtype).requires_grad_()
            y, mu, sigma2 = stem(leaf)
            weights = [100 * randn(segments, channels, seed=s).to(mu.dtype) for s in (4, 5)]
            total = (mu * weights[0]).sum() + (sigma2 * weights[1]).sum()
            gradients = [torch.autograd.grad(y, leaf, flow.to(dtype), retain_graph=True)[0],
                         torch.autograd.grad(total, leaf)[0]]  # fmt: skip
            return [y, mu, sigma2, *gradients]

        def exact(x):
            y, mu, sigma2 = reference.bn_prior(x, *statistics, 1e-5, segments, True, None)
            return pool(y), mu, sigma2

        def eager(x):
            mean, var, weight, bias = statistics
            y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)
            parts = x.float().unflatten(0, (segments, -1))
            return pool(y.relu()), parts.mean((1, 3, 4)), parts.var((1, 3, 4), correction=0)

        def ours(x):
            y, _, chunks = kernels.bn_pool_chunks(x, *statistics, 1e-5, segments)
            count = torch.full((chunks.moments.shape[2],), chunks.chunk_rows, device=DEVICE)
            count[-1] = chunks.rows - (len(count) - 1) * chunks.chunk_rows
            share = (count.double() / chunks.rows)[:, None]
            mu_p, sigma2_p = chunks.moments.double()
            mu = (share * mu_p).sum(1)
            return y, mu, (share * (sigma2_p + (mu_p - mu[:, None]).square())).sum(1)

        results = run(ours, torch.bfloat16), run(eager, torch.bfloat16), run(exact, torch.float64)
        for name, a, b, c in zip(("y", "mu", "sigma2", "dx of y", "dx of moments"), *results):
            if name in ("mu", "sigma2"):
                torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
            else:
                assert error(a, c) <= 2 * error(b, c) + 1e-6, name

    def test_graph_replays_what_eager_gives(self, batch, segments, channels, side):
        x = randn(batch, channels, side, side, seed=1, dtype=torch.bfloat16).requires_grad_()
        statistics = stored(channels)

        def step():
            y, _, chunks = kernels.bn_pool_chunks(x, *statistics, 1e-5, segments)
            flows = [y.detach(), chunks.moments.detach()]
            return y, chunks.moments, torch.autograd.grad([y, chunks.moments], x, flows)[0]

        stream = torch.cuda.Stream()  # autograd remembers it, and the default one cannot record
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = [t.clone() for t in step()]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = step()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


class TestLarge:
    pytestmark = gpu

    def test_offsets_beyond_two_to_the_31(self):
        b = 172  # 2.2e9 numbers, the last task begins beyond 2^31
        x = torch.randn(b, 64, 448, 448, device=DEVICE, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        statistics = stored(64)
        y, _, chunks = kernels.bn_pool_chunks(x, *statistics, 1e-5, 43)
        (dx,) = torch.autograd.grad(y.sum(), x)
        for task in (0, 42):
            part = x[4 * task : 4 * task + 4].detach().requires_grad_()
            want, _, parts = kernels.bn_pool_chunks(part, *statistics, 1e-5, 1)
            assert torch.equal(y[4 * task : 4 * task + 4], want)
            assert torch.equal(
                dx[4 * task : 4 * task + 4], torch.autograd.grad(want.sum(), part)[0]
            )
            moments = [bn_prior._run_merge(*c) for c in (chunks, parts)]
            for a, b in zip(*moments, strict=True):  # cut into other chunks
                torch.testing.assert_close(a[task], b[0], rtol=1e-5, atol=1e-6)

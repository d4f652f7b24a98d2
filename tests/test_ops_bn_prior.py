"""bn_prior: the kernels against their reference; in Triton's interpreter where no GPU is.

fp32 tolerance: sums of some hundred numbers near 1 in another order agree to 1e-5; dx holds sums of
three products of such numbers.
"""

import sys
from itertools import product

import pytest
import torch

pytest.importorskip("triton")
import aot
from fastrecycle_kernels import bn_prior as kernels
from fastrecycle_kernels import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
F32 = {"rtol": 1e-5, "atol": 1e-5}
F16 = {"rtol": 2e-3, "atol": 2e-3}  # 11 bits


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def randn(*shape, seed=0, dtype=torch.float32, nhwc=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if nhwc and x.ndim == 4 else x


def stored(c, seed=5):
    mean, var, weight, bias = (randn(c, seed=seed + i) for i in range(4))
    return mean, var.square() + 0.1, weight, bias


def both(x, statistics, segments=1, relu=True, residual=None, eps=1e-3):
    """(y, mu, sigma2) of the kernels and of the reference."""
    rest = (*statistics, eps, segments, relu, residual)
    return kernels.bn_prior(x, *rest), reference.bn_prior(x, *rest)


def gradients(outputs, leaves, which=(0, 1, 2), seed=20):
    """Of a random combination of some of the outputs."""
    total = sum(
        (randn(*outputs[i].shape, seed=seed + i, nhwc=False) * outputs[i].float()).sum()
        for i in which
    )
    return torch.autograd.grad(total, leaves, allow_unused=True)


def assert_both_agree(x, statistics, which=(0, 1, 2), tolerance=F32, **arguments):
    leaves = [x.requires_grad_()]
    if arguments.get("residual") is not None:
        leaves.append(arguments["residual"].requires_grad_())
    ours, expected = both(x, statistics, **arguments)
    assert ours[0].dtype == x.dtype
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    for got, want in zip(gradients(ours, leaves, which), gradients(expected, leaves, which)):
        if want is None or got is None:  # no path: nothing was computed for it
            assert want is None or not want.any()
            assert got is None
        else:
            torch.testing.assert_close(got, want, **tolerance)


# ------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("channels", [20, 72])  # below and above one block, no multiple of it
def test_bn_prior_matches_reference(relu, residual, segments, channels):
    shape = (6, channels, 5, 7)
    assert_both_agree(
        randn(*shape, seed=1), stored(channels), segments=segments, relu=relu,
        residual=randn(*shape, seed=2) if residual else None,
    )  # fmt: skip


@pytest.mark.parametrize("residual", [False, True])
def test_bn_prior_matches_reference_in_float16(residual):
    shape = (4, 64, 5, 7)
    skip = randn(*shape, seed=2, dtype=torch.float16) if residual else None
    x = randn(*shape, seed=1, dtype=torch.float16)
    assert_both_agree(x, stored(64), segments=2, residual=skip, tolerance=F16)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 64, 1, 197), (3, 64, 14, 14), (2, 1, 3, 3)])
@pytest.mark.parametrize("programs", [1, 4, 1056])
def test_bn_prior_matches_reference_however_rows_are_cut(shape, programs, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    plan = kernels.launch(shape[0] * shape[2] * shape[3], shape[1], 1)
    assert plan.chunks <= max(1, programs)
    assert plan.chunks * plan.chunk_rows >= shape[0] * shape[2] * shape[3]
    assert_both_agree(randn(*shape, seed=1), stored(shape[1]), residual=randn(*shape, seed=2))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2), (0, 2)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_bn_prior_gradient_of_some_outputs_matches_reference(which, relu, residual):
    """An output that nobody uses has no gradient, and none is made up for it."""
    shape = (2, 16, 5, 7)
    skip = randn(*shape, seed=2) if residual else None
    assert_both_agree(randn(*shape, seed=1), stored(16), which, relu=relu, residual=skip)


def test_bn_prior_gradient_of_the_residual_alone():
    x, skip = randn(2, 16, 5, 7, seed=1), randn(2, 16, 5, 7, seed=2).requires_grad_()
    ours, expected = both(x, stored(16), residual=skip)
    (got,), (want,) = gradients(ours, [skip]), gradients(expected, [skip])
    assert torch.equal(got, want)
    skip.requires_grad_(False)
    ours, expected = both(x.requires_grad_(), stored(16), residual=skip)
    torch.testing.assert_close(gradients(ours, [x])[0], gradients(expected, [x])[0], **F32)


def test_bn_prior_of_no_image():
    x = randn(0, 16, 5, 7).requires_grad_()
    y, mu, sigma2 = kernels.bn_prior(x, *stored(16), 1e-5, 1, True, x.detach())
    assert y.shape == x.shape
    assert mu.isnan().all()
    assert sigma2.isnan().all()
    assert torch.autograd.grad(y.sum() + mu.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("kind", ["nchw", "every second channel", "expanded"])
def test_bn_prior_takes_any_memory(kind):
    if kind == "nchw":
        x, skip = (randn(4, 16, 5, 7, seed=s, nhwc=False) for s in (1, 2))
    elif kind == "expanded":
        x, skip = (randn(4, 16, 1, 7, seed=s).expand(4, 16, 5, 7) for s in (1, 2))
    else:
        x, skip = (randn(4, 32, 5, 7, seed=s)[:, ::2] for s in (1, 2))
    y, _, _ = kernels.bn_prior(x, *stored(16), 1e-5, 1, True, skip)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_both_agree(x.detach(), stored(16), segments=2, residual=skip.detach())


def test_bn_prior_takes_gradients_in_any_memory():
    x = randn(4, 16, 5, 7, seed=1).requires_grad_()
    for outputs in zip(*both(x, stored(16), segments=2)):
        got, want = (torch.autograd.grad(o.sum(), x, retain_graph=True)[0] for o in outputs)
        torch.testing.assert_close(got, want, **F32)
    wide = randn(2, 40, seed=3)  # moments of several layers in one row
    results = []
    for _, mu, sigma2 in both(x, stored(16), segments=2):
        total = (torch.cat([mu, sigma2], 1) * wide[:, 4:36]).sum()
        results.append(torch.autograd.grad(total, x)[0])
    torch.testing.assert_close(*results, **F32)


# ------------------------------------------------------------------ numbers at the edge


def test_bn_prior_moments_far_from_0_keep_their_digits():
    x = (100 + randn(8, 16, 16, 16, seed=1)).to(torch.float16)
    (_, mu, sigma2), _ = both(x, stored(16))
    exact = x.double()
    torch.testing.assert_close(mu[0].double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        sigma2[0].double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=0
    )


def test_bn_prior_guards_a_stored_variance_of_zero():
    mean, var, weight, bias = stored(16)
    var[3] = 0
    x = randn(2, 16, 5, 7, seed=1)
    (y, _, _), _ = both(x, (mean, var, weight, bias), relu=False)
    assert torch.equal(y[:, 3], bias[3].expand(2, 5, 7))
    assert_both_agree(x, (mean, var, weight, bias))


def test_bn_prior_variance_of_a_constant_is_0():
    x = torch.full((4, 16, 5, 7), 3.7, device=DEVICE).requires_grad_()
    (_, mu, sigma2), _ = both(x, stored(16))
    torch.testing.assert_close(mu, torch.full_like(mu, 3.7), rtol=1e-6, atol=0)
    assert not sigma2.any()


def test_bn_prior_passes_on_nan():
    """A kernel that hid one would let a broken image look natural."""
    x = randn(2, 16, 5, 7, seed=1)
    x[1, 3, 2, 2] = float("nan")
    for residual in (None, randn(2, 16, 5, 7, seed=2)):
        ours, expected = both(x.requires_grad_(), stored(16), residual=residual)
        ours, expected = ((*o, *gradients(o, [x])) for o in (ours, expected))
        for got, want in zip(ours, expected, strict=True):
            assert torch.equal(got.isnan(), want.isnan())


def test_bn_prior_is_the_same_each_time():
    x = randn(6, 72, 9, 9, seed=1).requires_grad_()
    runs = []
    for _ in range(2):
        outputs = kernels.bn_prior(x, *stored(72), 1e-5, 2, True, x)
        runs.append([*outputs, *gradients(outputs, [x])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ------------------------------------------------------------------ chunks and twins


def explicit_chunks(x, segments, chunk_rows):
    """Mean and biased variance of each chunk, (2, G, P, C), in plain PyTorch."""
    rows = x.permute(0, 2, 3, 1).reshape(segments, -1, x.shape[1])
    parts = rows.split(chunk_rows, dim=1)
    mu = torch.stack([p.mean(1) for p in parts], 1)
    return torch.stack([mu, torch.stack([p.var(1, correction=0) for p in parts], 1)])


def test_chunks_match_explicit_ones(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 12)
    x = randn(6, 72, 9, 11, seed=1).requires_grad_()
    y, _, chunks = kernels.bn_prior_chunks(x, *stored(72), 1e-3, 2, True, None)
    expected = explicit_chunks(x, 2, chunks.chunk_rows)
    assert chunks.moments.shape[2] > 1
    torch.testing.assert_close(chunks.moments, expected, **F32)
    weights = randn(*expected.shape, seed=7)  # another for each chunk
    plain = reference.bn_prior(x, *stored(72), 1e-3, 2, True, None)[0]
    flow = randn(*x.shape, seed=8)
    (got,) = torch.autograd.grad((chunks.moments * weights).sum() + (y * flow).sum(), x)
    (want,) = torch.autograd.grad((expected * weights).sum() + (plain * flow).sum(), x)
    torch.testing.assert_close(got, want, **F32)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("used", ["both", "first", "second"])
def test_twin_takes_over_the_second_use(relu, used):
    """As in a residual block: y goes into a product, and past it into the next sum."""
    x, skip = randn(4, 16, 5, 7, seed=1), randn(4, 16, 5, 7, seed=2)
    leaves = [x.requires_grad_(), skip.requires_grad_()]
    mix = randn(16, 16, 1, 1, seed=3, nhwc=False)

    def block(bn, twins):
        y, twin = bn(x, stored(16), skip, None)
        z = torch.nn.functional.conv2d(y if used != "second" else y.detach(), mix)
        past = y if used != "first" else y.detach()
        out, _ = bn(z, stored(16, 9), past, twin if twins and used != "first" else None)
        return torch.autograd.grad((out * randn(*out.shape, seed=4)).sum(), leaves)

    def ours(x, statistics, residual, twin):
        return kernels.bn_prior_chunks(x, *statistics, 1e-3, 1, relu, residual, twin)[:2]

    def plain(x, statistics, residual, _):
        return reference.bn_prior(x, *statistics, 1e-3, 1, relu, residual)[0], None

    want = block(plain, twins=False)
    for twins in (False, True):
        for got, expected in zip(block(ours, twins), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_chunks_without_output_are_the_same():
    x, skip = randn(4, 16, 5, 7, seed=1).requires_grad_(), randn(4, 16, 5, 7, seed=2)
    results = []
    for output in (True, False):
        y, twin, chunks = kernels.bn_prior_chunks(
            x, *stored(16), 1e-3, 2, True, skip.requires_grad_(), output=output
        )
        assert y.numel() == twin.numel() == (x.numel() if output else 0)
        total = (chunks.moments * randn(*chunks.moments.shape, seed=3)).sum()
        dx, dskip = torch.autograd.grad(total, [x, skip], allow_unused=True)
        assert dskip is None
        results.append((chunks.moments, dx))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------ as an operator


def test_rejects_what_the_kernels_cannot_do():
    x, statistics = randn(2, 16, 5, 7), stored(16)
    with pytest.raises(ValueError, match=r"bn_prior: expected x in .* got torch.float64"):
        kernels.bn_prior(x.double(), *statistics, 1e-5, 1, True, None)
    statistics[2].requires_grad_()
    with pytest.raises(ValueError, match="stored statistics are constants"):
        kernels.bn_prior(x, *statistics, 1e-5, 1, True, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_bn_prior_is_a_proper_operator(relu, residual):
    x = randn(4, 24, 3, 5, seed=1).requires_grad_()
    skip = randn(4, 24, 3, 5, seed=2).requires_grad_() if residual else None
    rest = (*stored(24), 1e-5, 2, relu)
    ops = torch.ops.fastrecycle
    torch.library.opcheck(ops.bn_prior.default, (x, *rest, skip))
    for output in (True, False):
        arguments = (x, *rest, skip, None, output)
        torch.library.opcheck(ops.bn_prior_chunks.default, arguments)
    y, mu, _, bits = (t.detach() for t in ops.bn_prior(x, *rest, skip))
    torch.library.opcheck(
        ops.bn_prior_backward.default,
        (y, None, mu, mu, x.detach(), bits, mu, *rest[:4], 1e-5, relu, residual and relu),
    )


@pytest.mark.filterwarnings("ignore")
def test_bn_prior_traces_as_one_graph():
    x, skip = randn(4, 24, 3, 5, seed=1).requires_grad_(), randn(4, 24, 3, 5, seed=2)

    def run(x):
        y, mu, sigma2 = kernels.bn_prior(x, *stored_, 1e-5, 2, True, skip)
        return y.square().sum() + (mu * sigma2).sum()

    stored_ = stored(24)
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(x), run(x))
    assert torch.equal(*(torch.autograd.grad(f(x), x)[0] for f in (traced, run)))


# ------------------------------------------------------------------ built for GPUs

FLOATS = ("mean", "var", "weight", "bias", "chunk_mean", "chunk_var", "mu", "sigma2", "dmu",
          "dsigma2")  # fmt: skip
STRIDES = ("dmu_task", "dmu_chunk", "dsigma2_task", "dsigma2_chunk", "mu_task", "mu_chunk")
SIZES = ("rows", "channels", "blocks", "chunks", "tiles", "chunk_rows")


def case(kernel, arch, dtype, plan, **constants):
    tensors = ("x", "residual", "y", "twin", "dy", "dtwin", "dx", "dresidual")
    types = dict.fromkeys(tensors, aot.POINTERS[dtype]) | dict.fromkeys(FLOATS, "*fp32")
    types |= dict.fromkeys((*STRIDES, *SIZES), "i32") | {"bits": "*u8", "eps": "fp32"}
    constants |= {"BLOCK_R": plan.block_r, "BLOCK_C": plan.block_c}
    return aot.Case(
        f"bn_prior:{kernel}", arch, types, constants, plan.warps, aligned=("channels", *STRIDES)
    )


def cases():
    for arch, dtype in product((80, 90, 100), ("bfloat16", "float32")):
        plan = kernels.launch(25 * 56 * 56, 256, 1, getattr(torch, dtype).itemsize)
        for residual in (False, True):
            yield case("_forward", arch, dtype, plan, RELU=True, RESIDUAL=residual, BITS=residual,
                       WRITE=True, FOLD=plan.fold)  # fmt: skip
            yield case("_backward", arch, dtype, plan, DY=True, DTWIN=residual, DMU=True,
                       DSIGMA2=True, RELU=True, BITS=residual, DRESIDUAL=residual,
                       BY_CHUNK=residual)  # fmt: skip
        merge = case("_merge", arch, dtype, plan, BLOCK_P=128)
        yield aot.Case(**vars(merge) | {"constants": {"BLOCK_P": 128, "BLOCK_C": 16}})
    for rows, channels in ((25 * 56 * 56, 256), (25 * 7 * 7, 512)):
        plan = kernels.launch(rows, channels, 1)
        yield case("_forward", 90, "bfloat16", plan, RELU=False, RESIDUAL=False, BITS=False,
                   WRITE=False, FOLD=plan.fold)  # fmt: skip
        yield case("_backward", 90, "bfloat16", plan, DY=False, DTWIN=False, DMU=True, DSIGMA2=True,
                   RELU=True, BITS=False, DRESIDUAL=False, BY_CHUNK=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_bn_prior_builds_for_every_gpu():
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
    [(25, 1, 64, 112), (25, 1, 256, 56), (25, 1, 2048, 7), (80, 8, 512, 28), (50, 2, 1024, 14)],
)
@pytest.mark.parametrize("residual", [False, True])
class TestGPU:
    pytestmark = gpu

    def test_bf16_errs_no_more_than_twice_eager(self, batch, segments, channels, side, residual):
        shape = (batch, channels, side, side)
        x, statistics = 2 * randn(*shape, seed=1) + 1, stored(channels)
        skip = randn(*shape, seed=2) if residual else None
        x, skip = (None if t is None else t.bfloat16() for t in (x, skip))
        flow = randn(*shape, seed=3).bfloat16()
        dmu, dsigma2 = (100 * randn(segments, channels, seed=s) for s in (4, 5))

        def run(bn, dtype):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, skip) if t is not None]
            rest = leaves[1] if residual else None
            y, mu, sigma2 = bn(leaves[0], *statistics, 1e-5, segments, True, rest)
            cotangents = [flow.to(dtype), dmu.to(mu.dtype), dsigma2.to(mu.dtype)]
            return [y, mu, sigma2, *torch.autograd.grad([y, mu, sigma2], leaves, cotangents)]

        def eager(x, mean, var, weight, bias, eps, segments, relu, residual):
            y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=eps)
            y = (y if residual is None else y + residual).relu()
            parts = x.float().unflatten(0, (segments, -1))
            return y, parts.mean((1, 3, 4)), parts.var((1, 3, 4), correction=0)

        exact = run(reference.bn_prior, torch.float64)
        own, ours = run(eager, torch.bfloat16), run(kernels.bn_prior, torch.bfloat16)
        for name, a, b, c in zip(("y", "mu", "sigma2", "dx", "dres"), ours, own, exact):
            if name in ("mu", "sigma2"):
                torch.testing.assert_close(a.double(), c.double(), rtol=1e-5, atol=1e-6)
            else:
                assert error(a, c) <= 2 * error(b, c) + 1e-6, name

    def test_graph_replays_what_eager_gives(self, batch, segments, channels, side, residual):
        shape = (batch, channels, side, side)
        x = randn(*shape, seed=1, dtype=torch.bfloat16).requires_grad_()
        skip = randn(*shape, seed=2, dtype=torch.bfloat16) if residual else None
        statistics = stored(channels)
        flow = randn(*shape, seed=3, dtype=torch.bfloat16)

        def step():
            y, mu, sigma2 = kernels.bn_prior(x, *statistics, 1e-5, segments, True, skip)
            (dx,) = torch.autograd.grad([y, mu, sigma2], x, [flow, mu.detach(), sigma2.detach()])
            return y, mu, sigma2, dx

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
        y, mu, sigma2 = kernels.bn_prior(x, *statistics, 1e-5, 43, True, None)
        (dx,) = torch.autograd.grad(y.sum() + (mu * 1e6).sum(), x)
        for task in (0, 42):
            part = x[4 * task : 4 * task + 4].detach().requires_grad_()
            want = kernels.bn_prior(part, *statistics, 1e-5, 1, True, None)
            (dpart,) = torch.autograd.grad(want[0].sum() + (want[1] * 1e6).sum(), part)
            assert torch.equal(y[4 * task : 4 * task + 4], want[0])
            assert torch.equal(dx[4 * task : 4 * task + 4], dpart)
            for a, b in ((mu, want[1]), (sigma2, want[2])):  # cut into other chunks
                torch.testing.assert_close(a[task], b[0], rtol=1e-5, atol=1e-6)

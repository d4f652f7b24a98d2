"""residual_norm: the kernels against their reference; in Triton's interpreter where no GPU is.

In float32 both round the same sums in another order: a few roundings of 6e-8 of numbers below 10.
"""

import pytest
import torch

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import reference
from fastrecycle_kernels import residual_norm as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
EPS = 1e-5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HALF = {"rtol": 2e-3, "atol": 2e-3}  # one rounding to float16 and what it moves


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm(width):
    return 1 + 0.3 * randn(width, seed=11), 0.3 * randn(width, seed=12)


def run(op, x, branch, weights, scale=1.0, dtype=None, through="both", seed=5):
    """Stream and y, and the gradients of x and branch, from flows into s, y or both."""
    leaves = [t.detach().requires_grad_() for t in (x, branch) if t is not None]
    inputs = leaves if branch is not None else [leaves[0], None]
    outputs = op(*inputs, *weights, EPS, scale, dtype)
    flows = [randn(*o.shape, seed=seed + i).to(o.dtype) for i, o in enumerate(outputs)]
    used = [i for i, name in enumerate(("stream", "y")) if through in ("both", name)]
    gradients = torch.autograd.grad([outputs[i] for i in used], leaves, [flows[i] for i in used])
    return *(o.detach() for o in outputs), *gradients


def assert_matches(x, branch, tolerance=CLOSE, **options):
    weights = norm(x.shape[-1])
    got = run(kernels.residual_norm, x, branch, weights, **options)
    want = run(reference.residual_norm, x, branch, weights, **options)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


# ------------------------------------------------------------------ against the reference


@pytest.mark.parametrize(
    "shape",
    [
        (2, 197, 192),  # 394 rows: no multiple of a program's
        (1, 1, 768),
        (3, 512),
        (2, 3, 5, 24),
        (5, 100),  # no power of two divides it
        (2, 4096),  # the widest
        (3, 8),
    ],
)
def test_residual_norm_matches_reference(shape):
    assert_matches(randn(*shape), randn(*shape, seed=1))


@pytest.mark.parametrize("through", ["both", "stream", "y"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_residual_norm_backward_takes_what_flows(through, scale):
    assert_matches(randn(7, 48), randn(7, 48, seed=1), through=through, scale=scale)


@pytest.mark.parametrize("through", ["both", "y"])
def test_residual_norm_without_a_branch(through):
    x, weights = randn(7, 48), norm(48)
    assert kernels.residual_norm(x, None, *weights, EPS)[0] is x
    assert_matches(x, None, through=through)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float16")])
def test_residual_norm_in_other_dtypes(dtypes, scale):
    x, branch = (randn(7, 48, seed=i, dtype=getattr(torch, d)) for i, d in enumerate(dtypes))
    assert_matches(x, branch, HALF, scale=scale)
    assert_matches(x, branch, HALF, scale=scale, dtype=torch.float32)


def test_residual_norm_hands_one_tensor_to_both():
    x, branch = randn(4, 16).requires_grad_(), randn(4, 16, seed=1).requires_grad_()
    stream, y = kernels.residual_norm(x, branch, *norm(16), EPS)
    dx, dbranch = torch.autograd.grad((stream.sum(), y.square().sum()), (x, branch))
    assert dx.data_ptr() == dbranch.data_ptr()
    x, branch = randn(4, 16).requires_grad_(), randn(4, 16, seed=1).requires_grad_()
    stream, y = kernels.residual_norm(x, branch, *norm(16), EPS)
    (stream.sum() + y.square().sum()).backward()
    first = x.grad.clone()
    branch.grad.zero_()  # one leaf's gradient is not the other's memory
    assert torch.equal(x.grad, first)


@pytest.mark.parametrize("which", ["x", "branch"])
def test_residual_norm_gives_only_what_is_asked_for(which):
    x, branch, weights = randn(5, 32), randn(5, 32, seed=1), norm(32)
    leaf = {"x": x, "branch": branch}[which].requires_grad_()
    got, want = (
        torch.autograd.grad(sum(o.square().sum() for o in op(x, branch, *weights, EPS, 0.5)), leaf)
        for op in (kernels.residual_norm, reference.residual_norm)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_residual_norm_takes_any_memory():
    wide = randn(6, 9, 96)
    branch = randn(6, 9, 96, seed=1)
    assert_matches(wide[:, :1], branch[:, :1])  # the first tokens, read where they are
    assert_matches(wide[..., ::2], branch[..., 48:])
    assert_matches(wide.transpose(0, 2), branch.transpose(0, 2))
    assert_matches(randn(1, 1, 96).expand(6, 9, 96), branch)
    x, weights = wide.clone().requires_grad_(), norm(96)
    gradients = []
    for op in (kernels.residual_norm, reference.residual_norm):  # flows that are views
        stream, y = op(x, branch, *weights, EPS)
        flows = randn(1, 1, 1, seed=2).expand_as(stream), wide[:, ::2].mT
        gradients += torch.autograd.grad((stream, y[:, ::2].mT), x, flows)
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)])
def test_residual_norm_of_nothing(shape):
    assert_matches(randn(*shape), randn(*shape))
    assert_matches(randn(*shape), None)


def test_residual_norm_far_from_zero_keeps_its_digits():
    x = 1000 + randn(3, 192)
    y = kernels.residual_norm(x, torch.zeros_like(x), *norm(192), EPS)[1]
    want = reference.residual_norm(x.double(), None, *norm(192), EPS)[1]
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-3)


def test_residual_norm_is_the_same_each_time():
    x, branch, weights = randn(9, 192), randn(9, 192, seed=1), norm(192)
    runs = [run(kernels.residual_norm, x, branch, weights, 0.5) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_residual_norm_says_what_it_cannot_do():
    x, (weight, bias) = randn(2, 16), norm(16)
    with pytest.raises(ValueError, match="frozen"):
        kernels.residual_norm(x, x, weight.requires_grad_(), bias, EPS)
    with torch.no_grad():
        kernels.residual_norm(x, x, weight, bias, EPS)
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match="4096"):
        kernels.residual_norm(randn(1, 4097), None, *norm(4097), EPS)
    with pytest.raises(ValueError, match="shape"):
        kernels.residual_norm(x, x[:1], weight, bias, EPS)
    with pytest.raises(ValueError, match="float64"):
        kernels.residual_norm(x.double(), None, weight, bias, EPS)


# ------------------------------------------------------------------ as operators


@pytest.mark.filterwarnings("ignore")  # opcheck looks at .grad of what is no leaf
def test_residual_norm_is_a_proper_operator():
    x, branch = randn(2, 3, 16).requires_grad_(), randn(2, 3, 16, seed=1).requires_grad_()
    weight, bias = norm(16)
    for scale, dtype in ((1.0, torch.float32), (0.5, torch.float16)):
        torch.library.opcheck(kernels._residual_norm, (x, branch, weight, bias, EPS, scale, dtype))
    torch.library.opcheck(kernels._row_norm, (x, weight, bias, EPS, torch.float32))
    stats = randn(6), randn(6)
    for dtypes in ((torch.float32, None), (None, torch.float16), (torch.float16, torch.float32)):
        torch.library.opcheck(
            kernels._residual_norm_backward,
            (x.detach(), branch.detach(), x.detach(), weight, *stats, 0.5, *dtypes),
        )


@pytest.mark.filterwarnings("ignore")
def test_residual_norm_traces_as_one_graph():
    weights = norm(16)

    def both(x, branch):
        x, y = kernels.residual_norm(x, None, *weights, EPS)
        x, y = kernels.residual_norm(x, branch * y, *weights, EPS)
        return x.sum() + y.square().sum()

    x, branch = randn(2, 3, 16).requires_grad_(), randn(2, 3, 16, seed=1).requires_grad_()
    traced = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(traced(x, branch), (x, branch)),
        torch.autograd.grad(both(x, branch), (x, branch)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, **CLOSE)


# ------------------------------------------------------------------ other GPUs


def launches(arch):
    for stream in (torch.bfloat16, torch.float32):
        for shape in ((4, 192), (4, 512), (4, 768), (4, 4096)):
            x, branch = torch.randn(shape).to(stream), torch.randn(shape).bfloat16()
            weight = torch.randn(shape[1])
            stats = torch.randn(4), torch.randn(4)
            kernels._residual_norm(x, branch, weight, weight, EPS, 1.0, torch.bfloat16)
            kernels._row_norm(x, weight, weight, EPS, stream)
            for ds in (x, None):
                kernels._residual_norm_backward(
                    branch, ds, x, weight, *stats, 0.5, stream, torch.bfloat16
                )


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_residual_norm_builds_for_every_gpu(arch):
    found = aot_launches.compiled_launches("test_ops_residual_norm:launches", arch)
    aot_launches.assert_fit(found)
    assert {x.kernel for x in found} == {"_forward", "_backward"}
    assert all((x.stack_bytes or 0) <= 8 for x in found)  # one register at 4096 columns


# ------------------------------------------------------------------ on a GPU


def assert_within_eager(x, branch, weights, scale):
    """No further from float32 than twice PyTorch's own arithmetic in these dtypes."""

    def eager(x, branch, weight, bias, eps, scale, dtype):
        stream = x + scale * branch
        with torch.autocast("cuda", branch.dtype, enabled=branch.dtype != torch.float32):
            y = torch.nn.functional.layer_norm(stream.float(), x.shape[-1:], weight, bias, eps)
        return stream, y.to(dtype or branch.dtype)

    want = run(reference.residual_norm, x.float(), branch.float(), weights, scale)
    peer = run(eager, x, branch, weights, scale)
    got = run(kernels.residual_norm, x, branch, weights, scale)
    for name, g, p, w in zip(("stream", "y", "dx", "dbranch"), got, peer, want, strict=True):
        error, allowed = (torch.linalg.vector_norm(t.float() - w) for t in (g, p))
        assert error <= 2 * allowed + 1e-6 * torch.linalg.vector_norm(w), name


@pytest.mark.gpu
@on_gpu
class TestOnGPU:
    @pytest.mark.parametrize("scale", [1.0, 0.5])
    @pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("shape", [(25, 197, 768), (1, 1, 768), (7, 50, 192), (9, 512)])
    def test_residual_norm_matches_reference(self, shape, stream, scale):
        x, branch = randn(*shape, dtype=stream), randn(*shape, seed=1, dtype=torch.bfloat16)
        assert_within_eager(x, branch, norm(shape[-1]), scale)
        assert_within_eager(x.float(), branch.float(), norm(shape[-1]), scale)

    def test_residual_norm_reaches_beyond_2_31_numbers(self):
        rows = 2**31 // 1024 + 7
        x = torch.zeros(rows, 1024, device="cuda", dtype=torch.bfloat16)
        branch = torch.zeros_like(x)
        branch[-1, ::2] = 1
        one = torch.ones(1024, device="cuda")
        stream, y, mean, rstd = kernels._residual_norm(
            x, branch, one, 0 * one, EPS, 1.0, torch.bfloat16
        )
        assert stream[-1, ::2].eq(1).all()
        torch.testing.assert_close(y[-1].float(), 2 * branch[-1].float() - 1, rtol=0, atol=0.01)
        assert not y[:-1].any()
        del y
        dx, _ = kernels._residual_norm_backward(
            branch, branch, stream, one, mean, rstd, 1.0, torch.bfloat16, None
        )
        torch.testing.assert_close(dx[-1].float(), branch[-1].float(), rtol=0, atol=0.05)
        assert not dx[:-1].any()

    def test_residual_norm_is_captured_in_a_graph(self):
        x, branch, weights = randn(40, 768), randn(40, 768, seed=1), norm(768)
        run(kernels.residual_norm, x, branch, weights)  # compiled before the capture
        dy = randn(40, 768, seed=2)
        x.requires_grad_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stream, y = kernels.residual_norm(x, branch, *weights, EPS)
            (dx,) = torch.autograd.grad((stream, y), x, (dy, dy))
        with torch.no_grad():
            x.normal_(), branch.normal_(), dy.normal_()
        graph.replay()
        x = x.detach().requires_grad_()  # autograd remembers the stream that recorded
        want = reference.residual_norm(x, branch, *weights, EPS)
        torch.testing.assert_close((stream, y), want, **CLOSE)
        torch.testing.assert_close(dx, torch.autograd.grad(want, x, (dy, dy))[0], **CLOSE)

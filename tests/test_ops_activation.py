"""activation: the kernels against their reference; in Triton's interpreter where no GPU is.

float32: error function, exponential and sigmoid each have errors of some 1e-7 of numbers below 10.
"""

import pytest
import torch

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import activation as kernels
from fastrecycle_kernels import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "poison_empty"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # the interpreter's sigmoid
]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
KINDS = pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "quick_gelu"])


def randn(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (3 * x).to(DEVICE, dtype)


def run(op, u, kind, dg):
    u = u.detach().requires_grad_()
    g = op(u, kind)
    return g.detach(), torch.autograd.grad(g, u, dg)[0]


def assert_matches(u, kind, tolerance=CLOSE, dg=None):
    dg = randn(*u.shape, seed=3, dtype=u.dtype) if dg is None else dg
    got = run(kernels.activation, u, kind, dg)
    # in float64: PyTorch's gradient of gelu_tanh is off by 5e-6 in float32, where 1 + tanh cancels
    want = run(reference.activation, u.double(), kind, dg.double())
    for one, other in zip(got, want, strict=True):
        assert one.dtype == u.dtype
        torch.testing.assert_close(one, other.to(u.dtype), **tolerance)


# ------------------------------------------------------------------ against the reference


@KINDS
@pytest.mark.parametrize("shape", [(2, 197, 24), (1,), (), (2048,), (3, 7, 5, 41), (0, 8)])
def test_activation_matches_reference(kind, shape):
    assert_matches(randn(*shape), kind)


@KINDS
def test_activation_in_float16(kind):
    assert_matches(randn(4, 100, dtype=torch.float16), kind, {"rtol": 2e-3, "atol": 1e-4})


@KINDS
def test_activation_takes_any_memory(kind):
    wide = randn(6, 9, 16)
    for u in (wide[:, ::2], wide.mT, wide[..., 3:], randn(1, 16).expand(5, 16)):
        assert_matches(u, kind)
    assert_matches(wide, kind, dg=randn(16, 9, 6, seed=2).permute(2, 1, 0))


@KINDS
def test_activation_at_extremes(kind):
    u = torch.tensor([-1e4, -100.0, -12, -6, -0.0, 0.0, 6, 12, 100, 1e4, float("nan")])
    u = u.to(DEVICE)
    got, want = (run(m.activation, u, kind, torch.ones_like(u)) for m in (kernels, reference))
    torch.testing.assert_close(got, want, equal_nan=True, **CLOSE)


@KINDS
def test_activation_has_the_gradient_of_its_output(kind):
    u, step = torch.linspace(-5, 5, 101).to(DEVICE), 1e-2
    slope = (kernels.activation(u + step, kind) - kernels.activation(u - step, kind)) / (2 * step)
    (du,) = run(kernels.activation, u, kind, torch.ones_like(u))[1:]
    torch.testing.assert_close(du, slope, rtol=0, atol=2e-4)


def test_activation_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="kind"):
        kernels.activation(randn(3), "relu")
    with pytest.raises(ValueError, match="float64"):
        kernels.activation(randn(3).double(), "gelu")


# ------------------------------------------------------------------ as operators


@KINDS
@pytest.mark.filterwarnings("ignore")  # opcheck looks at .grad of what is no leaf
def test_activation_is_a_proper_operator(kind):
    u = randn(2, 6).requires_grad_()
    torch.library.opcheck(kernels._activation, (u, kind))
    torch.library.opcheck(kernels._activation, (randn(6, 2).mT.requires_grad_(), kind))
    torch.library.opcheck(kernels._activation_backward, (randn(2, 6), u.detach(), kind))


@pytest.mark.filterwarnings("ignore")
def test_activation_traces_as_one_graph():
    def both(u):
        return kernels.activation(kernels.activation(u, "gelu").mT, "quick_gelu").sum()

    u = randn(2, 6).requires_grad_()
    traced = torch.compile(both, fullgraph=True, backend="aot_eager")
    (got,), (want,) = (torch.autograd.grad(f(u), u) for f in (traced, both))
    torch.testing.assert_close(got, want, **CLOSE)


# ------------------------------------------------------------------ other GPUs


def launches(arch):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        u = torch.randn(2, 3072).to(dtype)
        for kind in kernels.KINDS:
            kernels._activation(u, kind)
            kernels._activation_backward(u, u, kind)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_activation_builds_for_every_gpu(arch):
    found = aot_launches.compiled_launches("test_ops_activation:launches", arch)
    aot_launches.assert_fit(found)
    assert {x.kernel for x in found} == {"_forward", "_backward"}
    assert not any(x.stack_bytes for x in found)


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@on_gpu
class TestOnGPU:
    @KINDS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_activation_matches_reference(self, kind, dtype):
        u = randn(25, 197, 3072, dtype=dtype)
        dg = randn(*u.shape, seed=1, dtype=dtype)

        def eager(u, kind):
            if kind == "quick_gelu":
                return u * torch.sigmoid(1.702 * u)
            approximate = "tanh" if kind == "gelu_tanh" else "none"
            return torch.nn.functional.gelu(u, approximate=approximate)

        want = run(reference.activation, u.float(), kind, dg.float())
        peer, got = run(eager, u, kind, dg), run(kernels.activation, u, kind, dg)
        for g, p, w in zip(got, peer, want, strict=True):
            error, allowed = (torch.linalg.vector_norm(t.float() - w) for t in (g, p))
            assert error <= 2 * allowed + 1e-6 * torch.linalg.vector_norm(w)

    def test_activation_reaches_beyond_2_31_numbers(self):
        u = torch.zeros(2**31 + 4096, device="cuda", dtype=torch.bfloat16)
        u[-1] = 8
        g = kernels.activation(u, "gelu")
        assert g[-1] == 8
        assert not g[:-1].any()
        du = kernels._activation_backward(u, u, "gelu")
        assert du[-1] == 8
        assert not du[:-1].any()

    def test_activation_is_captured_in_a_graph(self):
        u, dg = randn(40, 3072), randn(40, 3072, seed=1)
        run(kernels.activation, u, "gelu", dg)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(kernels.activation, u, "gelu", dg)
        u.normal_(), dg.normal_()
        graph.replay()
        torch.testing.assert_close(got, run(reference.activation, u, "gelu", dg), **CLOSE)

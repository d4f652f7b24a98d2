"""packed_attention: every cut against the reference; in the interpreter where no GPU is.

Errors are |got - want| / |want| over a whole tensor, want in float64 from the same numbers. In
float32, sums of some hundred products agree to ten roundings, 1e-6. In half precision no cut may be
more than twice as far off as eager PyTorch in that precision is.
"""

import pytest
import torch

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import attention as kernels
from fastrecycle_kernels import reference
from fastrecycle_kernels.attention import Cut

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "poison_empty", "no_tf32"),
    # of the library's own gradient, where memory is poisoned
    pytest.mark.filterwarnings("ignore:.*non-deterministic algorithm"),
]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
METHODS = ("rows", "columns", "columns in turn", "both", "tiles")
F32 = 1e-6


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def explicit(qkv, queries=None):
    """Attention in the tensor's own precision, product by product."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q[:, :, :queries] @ k.mT * qkv.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def library(qkv, queries=None):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    y = torch.nn.functional.scaled_dot_product_attention(q[:, :, :queries], k, v)
    return y.transpose(1, 2).flatten(2)


def results(function, qkv, dy, dtype=None):
    """y and dqkv; computed in `dtype` where one is given."""
    qkv = qkv.detach().to(dtype or qkv.dtype).requires_grad_()
    y = function(qkv)
    return y.detach(), torch.autograd.grad(y, qkv, dy.to(y.dtype))[0]


def exact(qkv, dy, queries):
    return results(
        lambda x: reference.packed_attention(x, queries=queries)[0], qkv, dy, torch.float64
    )


def cuts(method, tokens, queries, bulk):
    """A forward cut and one of the gradient with tiles smaller than an image where they may be."""
    rows = {"rows": kernels._tile(queries), "columns": kernels._tile(tokens)}.get(method, 32)
    return {
        "forward": Cut(32, 64, bulk=bulk),
        "backward": (method.split()[0], Cut(rows, 16 if tokens < 100 else 32, bulk=bulk)),
    }


# ------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("bulk", [0, 1], ids=["loads", "bulk"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("images", "tokens", "heads", "width", "queries"),
    [
        (2, 1, 2, 16, None),
        (1, 2, 1, 32, None),
        (2, 5, 3, 64, 2),
        (2, 50, 2, 16, None),
        (1, 50, 1, 128, 1),
        (1, 70, 2, 32, 33),
        (1, 197, 1, 64, None),
        (1, 197, 1, 64, 1),
    ],
)
def test_attention_matches_reference(images, tokens, heads, width, queries, method, bulk):
    qkv = randn(images, tokens, 3, heads, width)
    rows = queries or tokens
    dy = randn(images, rows, heads * width, seed=1)
    cut = cuts(method, tokens, rows, bulk)
    if DEVICE.type == "cuda" and cut["backward"][1].rows > 128:
        pytest.skip("float32 tiles of so many rows outgrow a multiprocessor")
    got = results(lambda x: kernels.packed_attention(x, queries=queries, **cut)[0], qkv, dy)
    for have, want in zip(got, exact(qkv, dy, queries)):
        assert have.shape == want.shape
        assert error(have, want) < F32
    assert (got[1][:, rows:, 0] == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("tokens", "queries"), [(1, None), (50, None), (70, 2), (197, None)])
def test_half_precision_is_as_exact_as_eager(tokens, queries, method):
    qkv = randn(1, tokens, 3, 2, 32, dtype=torch.float16)
    rows = queries or tokens
    dy = randn(1, rows, 64, seed=1, dtype=torch.float16)
    cut = cuts(method, tokens, rows, bulk=0)
    got = results(lambda x: kernels.packed_attention(x, queries=queries, **cut)[0], qkv, dy)
    eager = results(lambda x: explicit(x, queries), qkv, dy)
    for have, other, want in zip(got, eager, exact(qkv, dy, queries)):
        assert have.dtype == torch.float16
        assert error(have, want) <= 2 * error(other, want) + F32


@pytest.mark.parametrize("tokens", [1, 5, 50, 99, 197, 300])
@pytest.mark.parametrize("queries", [None, 1])
def test_launch_table_matches_reference(tokens, queries):
    qkv = randn(1, tokens, 3, 1, 16)
    dy = randn(1, queries or tokens, 16, seed=1)
    for dtype, most in ((torch.float32, F32), (torch.float16, 2e-3)):  # two roundings of P, dS
        x = qkv.to(dtype)
        got = results(lambda x: kernels.packed_attention(x, queries=queries)[0], x, dy.to(dtype))
        for have, want in zip(got, exact(x, dy.to(dtype), queries)):
            assert error(have, want) < most


@pytest.mark.parametrize("width", [4, 24])
def test_other_widths_are_padded(width):
    qkv, dy = randn(2, 9, 3, 2, width), randn(2, 9, 2 * width, seed=1)
    got = results(lambda x: kernels.packed_attention(x)[0], qkv, dy)
    for have, want in zip(got, exact(qkv, dy, None)):
        assert error(have, want) < F32


def test_attention_takes_any_memory():
    buffer, dy = randn(2, 9, 3, 2, 32), randn(2, 18, 32, seed=1)[:, ::2]
    want = exact(buffer[..., :16], dy, None)
    aside = torch.cat((buffer.new_zeros(1), buffer[..., :16].flatten()))[1:]
    for qkv in (
        buffer[..., :16],
        buffer[..., :16].transpose(1, 2).contiguous().transpose(1, 2),
        aside.view(2, 9, 3, 2, 16),  # not aligned: the tensor copy engine cannot take it
    ):
        for bulk in (0, 1):
            cut = cuts("tiles", 9, 9, bulk)
            got = results(lambda x, cut=cut: kernels.packed_attention(x, **cut)[0], qkv, dy)
            for have, exactly in zip(got, want):
                assert error(have, exactly) < F32


def test_attention_of_extreme_logits_is_finite():
    """Rows whose logits are all far below 0 would overflow at the zeros past the last key."""
    qkv = randn(1, 9, 3, 1, 16)
    qkv[:, :, 0], qkv[:, :, 1] = 300, -qkv[:, :, 1].abs()
    dy = randn(1, 9, 16, seed=1)
    for method in METHODS:
        cut = cuts(method, 9, 9, bulk=0)
        y, gradient = results(lambda x, cut=cut: kernels.packed_attention(x, **cut)[0], qkv, dy)
        assert error(y, exact(qkv, dy, None)[0]) < 1e-4  # of logits in the thousands
        assert gradient.isfinite().all()


@pytest.mark.parametrize("queries", [None, 1])
def test_scores_match_reference_and_carry_no_gradient(queries):
    qkv = randn(2, 50, 3, 3, 16).requires_grad_()
    y, scores = kernels.packed_attention(qkv, queries=queries, with_scores=True)
    _, want = reference.packed_attention(qkv, queries=queries, with_scores=True)
    assert scores.dtype == torch.float32
    assert y.requires_grad
    assert not scores.requires_grad
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-7)
    assert kernels.packed_attention(qkv)[1] is None


def test_gradient_alone_takes_a_library_forward():
    qkv, dy = randn(2, 9, 3, 2, 16), randn(2, 2, 32, seed=1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    lse = torch.logsumexp(q[:, :, :2] @ k.mT / 4, -1)
    want = exact(qkv, dy, 2)
    got = kernels.attention_backward(qkv, explicit(qkv, 2), dy, lse)
    assert error(got, want[1]) < F32


def test_results_repeat_exactly():
    qkv, dy = randn(2, 70, 3, 2, 16), randn(2, 70, 32, seed=1)
    first, second = (results(lambda x: kernels.packed_attention(x)[0], qkv, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_attention_of_no_image():
    qkv = randn(0, 5, 3, 2, 16).requires_grad_()
    y, scores = kernels.packed_attention(qkv, queries=2, with_scores=True)
    assert y.shape == (0, 2, 32)
    assert scores.shape == (0, 5)
    assert torch.autograd.grad(y.sum(), qkv)[0].shape == qkv.shape


def test_rejects_other_shapes():
    qkv = randn(1, 5, 3, 2, 16)
    with pytest.raises(ValueError, match=r"expected qkv \(B, N, 3, H, d\), got \(1, 5, 2, 2, 16\)"):
        kernels.packed_attention(qkv[:, :, :2])
    for queries in (0, 6):
        with pytest.raises(ValueError, match=rf"must be in \[1, 5\], got {queries}"):
            kernels.packed_attention(qkv, queries=queries)
    with pytest.raises(ValueError, match="d must be at most 128, got 160"):
        kernels.packed_attention(randn(1, 5, 3, 1, 160))
    with pytest.raises(ValueError, match=r"expected one of .*, got torch.float64"):
        kernels.packed_attention(qkv.double())
    qkv = randn(1, 20, 3, 1, 16)
    arguments = (qkv, qkv[:, :, 0, 0], qkv[:, :, 0, 0], randn(1, 1, 20))
    with pytest.raises(ValueError, match="rows needs a tile of 20 queries, got 16"):
        kernels.attention_backward(*arguments, method="rows", cut=Cut(16, 16))


# ------------------------------------------------------------------ as operators


@pytest.mark.filterwarnings("ignore")
def test_attention_is_a_proper_operator():
    qkv = randn(2, 9, 3, 2, 16).requires_grad_()
    for queries in (9, 2):
        torch.library.opcheck(kernels._attention, (qkv, queries, 0.25, [], "", []))
        y, lse = (x.detach() for x in kernels._attention(qkv, queries, 0.25, [], "", []))
        arguments = (qkv.detach(), y, randn(*y.shape, seed=1), lse, 0.25)
        torch.library.opcheck(kernels._attention_backward, (*arguments, "", []))
        torch.library.opcheck(kernels._attention_backward, (*arguments, "tiles", [16, 16]))


@pytest.mark.filterwarnings("ignore")
def test_attention_traces_as_one_graph():
    qkv = randn(2, 9, 3, 2, 8).requires_grad_()

    def run(qkv):
        y, scores = kernels.packed_attention(qkv, with_scores=True)
        last, _ = kernels.packed_attention(qkv, queries=1)
        return y + last, scores

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = traced(qkv), run(qkv)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    found, wanted = (torch.autograd.grad(y.square().sum(), qkv)[0] for y in (got[0], want[0]))
    assert torch.equal(found, wanted)


# ------------------------------------------------------------------ other GPUs


def attend(dtype, tokens, queries, width, **cut):
    qkv = torch.randn(2, tokens, 3, 12, width, dtype=dtype)
    y, lse = kernels._launch_forward(
        qkv, queries, width**-0.5, cut.get("forward") or kernels.forward_cut(tokens, queries, dtype)
    )
    method, chosen = cut.get("backward") or kernels.backward_cut(tokens, queries, width, dtype)
    kernels._launch_backward(qkv, y, y, lse, width**-0.5, method, chosen)


def launches(arch):
    """What the launch table has for common images, and each way to the gradient."""
    for tokens, queries in ((50, 50), (99, 99), (197, 197), (197, 1)):
        attend(torch.bfloat16, tokens, queries, 64)
    for width in (16, 128):
        attend(torch.bfloat16, 197, 197, width)
        attend(torch.float32, 197, 197, width)
    for method in ("columns", "both", "tiles"):
        attend(
            torch.bfloat16, 50, 50, 64, forward=Cut(64, 64),
            backward=(method, Cut(64, 32, bulk=method == "columns")),
        )  # fmt: skip
    attend(torch.bfloat16, 197, 197, 64, backward=("columns", Cut(128, 32, 4, 3, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_attention_builds_for_every_gpu(arch):
    found = aot_launches.compiled_launches("test_ops_attention:launches", arch)
    aot_launches.assert_fit(found)
    assert {x.kernel for x in found} == {
        "_forward", "_backward_rows", "_backward_columns", "_backward_tiles"
    }  # fmt: skip
    if arch == 90:  # with the tensor cores' own instructions
        assert any(x.kernel == "_backward_tiles" and x.warpgroup_products for x in found)


# ------------------------------------------------------------------ on a GPU


def assert_as_exact_as_library(images, tokens, width, queries, **cut):
    qkv = randn(images, tokens, 3, 768 // width, width, dtype=torch.bfloat16)
    dy = randn(images, queries or tokens, 768, seed=1, dtype=torch.bfloat16)
    got = results(lambda x: kernels.packed_attention(x, queries=queries, **cut)[0], qkv, dy)
    eager = results(lambda x: library(x, queries), qkv, dy)
    for have, other, want in zip(got, eager, exact(qkv, dy, queries)):
        for i in range(3 if have.ndim == 5 else 1):  # q, k and v apart
            part = (slice(None), slice(None), i) if have.ndim == 5 else ()
            assert error(have[part], want[part]) <= 2 * error(other[part], want[part])


@pytest.mark.gpu
@on_gpu
class TestOnGPU:
    @pytest.mark.parametrize("queries", [None, 1, 2])
    @pytest.mark.parametrize("tokens", [2, 50, 65, 88, 99, 148, 197, 600])
    def test_bf16_is_as_exact_as_the_library(self, tokens, queries):
        assert_as_exact_as_library(5, tokens, 64, queries)

    @pytest.mark.parametrize("width", [16, 32, 128])
    def test_bf16_of_other_widths_is_as_exact_as_the_library(self, width):
        assert_as_exact_as_library(5, 197, width, None)

    @pytest.mark.parametrize("bulk", [0, 1], ids=["loads", "bulk"])
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("tokens", [50, 148, 197])
    def test_bf16_of_every_cut_is_as_exact_as_the_library(self, tokens, method, bulk):
        whole = method in ("rows", "columns")
        tile = kernels._tile(tokens) if whole else 128 if method == "columns in turn" else 64
        chunk = 64 if whole and tile == 64 else 32  # smaller ones are refused
        for cut in (
            Cut(tile, chunk, 8 if tile > 64 else 4, 1, bulk),
            Cut(tile, 64 if tile <= 64 else 32, 16 if tile > 64 else 4, 2, bulk),
        ):
            assert_as_exact_as_library(
                5,
                tokens,
                64,
                None,
                forward=Cut(64, 64, 4, 2, bulk),
                backward=(method.split()[0], cut),
            )

    @pytest.mark.parametrize("method", ["rows", "columns"])
    def test_cuts_that_were_seen_to_go_wrong_are_refused(self, method):
        qkv = randn(2, 50, 3, 12, 64, dtype=torch.bfloat16).requires_grad_()
        y, _ = kernels.packed_attention(qkv, backward=(method, Cut(64, 32)))
        with pytest.raises(ValueError, match="a tile of 64 rows needs chunks of 64, got 32"):
            y.sum().backward()

    def test_fp32_matches_reference(self):
        qkv, dy = randn(2, 197, 3, 12, 64), randn(2, 197, 768, seed=1)
        got = results(lambda x: kernels.packed_attention(x)[0], qkv, dy)
        for have, want in zip(got, exact(qkv, dy, None)):
            assert error(have, want) < F32

    def test_step_is_captured_in_a_graph(self):
        qkv = randn(25, 197, 3, 12, 64, dtype=torch.bfloat16)
        dy = randn(25, 197, 768, seed=1, dtype=torch.bfloat16)

        def step():
            x = qkv.detach().requires_grad_()
            y, scores = kernels.packed_attention(x, with_scores=True)
            return y, scores, torch.autograd.grad(y, x, dy)[0]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiled before the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        qkv.normal_()
        graph.replay()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)

"""cls_scores and top_patches: the kernels against their references; in the interpreter where no GPU
is.

Scores are softmaxes averaged over heads, computed in float32 from the same numbers: another order
of some hundred additions moves them by less than 1e-5 of their size. What is kept is compared for
equality, on the same scores.
"""

import pytest
import torch

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import cls_scores as kernels
from fastrecycle_kernels import reference

from fastrecycle.pruning import top_patches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
F32 = {"rtol": 1e-5, "atol": 1e-7}


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def queries_and_keys(images, tokens, heads, width, seed=0, dtype=torch.float32):
    """Views of one (B, N, 3, H, d) buffer, as the QKV product leaves them."""
    q, k, _ = randn(images, tokens, 3, heads, width, seed=seed, dtype=dtype).permute(2, 0, 3, 1, 4)
    return q[:, :, 0], k


# ------------------------------------------------------------------ scores


# 0: all heads at once; 3: the last group is smaller
@pytest.mark.parametrize("group", [None, 0, 1, 2, 3])
@pytest.mark.parametrize(
    ("images", "tokens", "heads", "width"),
    [(2, 197, 2, 64), (3, 5, 4, 8), (1, 1, 3, 16), (2, 70, 5, 24), (1, 600, 2, 16)],
)
def test_cls_scores_match_reference(images, tokens, heads, width, group):
    q, k = queries_and_keys(images, tokens, heads, width)
    got = kernels.cls_scores(q, k, group=group)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, reference.cls_scores(q, k), **F32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cls_scores_match_reference_in_every_dtype(dtype):
    q, k = queries_and_keys(2, 30, 2, 16, dtype=dtype)
    got, want = kernels.cls_scores(q, k), reference.cls_scores(q, k)
    tolerance = F32 if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("group", [0, 1])
def test_cls_scores_take_any_memory(group):
    q, k = randn(2, 3, 16), randn(2, 3, 20, 16, seed=1)
    want = reference.cls_scores(q, k)
    for keys in (k, k.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT):
        torch.testing.assert_close(kernels.cls_scores(q, keys, group=group), want, **F32)
    apart = q.mT.contiguous().mT
    torch.testing.assert_close(kernels.cls_scores(apart, k, group=group), want, **F32)


@pytest.mark.parametrize("group", [0, 1])
def test_cls_scores_of_extreme_logits_are_finite(group):
    scores = kernels.cls_scores(1e4 * randn(1, 2, 16), randn(1, 2, 9, 16, seed=1), group=group)
    assert scores.isfinite().all()
    assert scores.sum().item() == pytest.approx(1, abs=1e-6)


def test_cls_scores_of_no_image():
    q, k = queries_and_keys(0, 5, 2, 8)
    assert kernels.cls_scores(q, k).shape == (0, 5)
    assert kernels.cls_top_patches(q, k, 3)[1].shape == (0, 3)


def test_cls_scores_carry_no_gradient():
    q, k = queries_and_keys(1, 5, 2, 8)
    assert not kernels.cls_scores(q.requires_grad_(), k.requires_grad_()).requires_grad


# ------------------------------------------------------------------ packed


LENGTHS = (5, 1, 37, 2)


@pytest.mark.parametrize("group", [None, 0, 1, 2, 3])
def test_cls_scores_packed_match_each_image_alone(group):
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=DEVICE)
    _, k, _ = randn(sum(LENGTHS), 3, 3, 16).unbind(1)  # a view of packed (T, 3, H, d)
    q = randn(len(LENGTHS), 3, 16, seed=1)
    got = kernels.cls_scores_packed(q, k, starts, 50, group=group)
    at = 0
    for i, length in enumerate(LENGTHS):
        alone = k[at : at + length].transpose(0, 1)[None]
        want = reference.cls_scores(q[i : i + 1], alone)[0]
        torch.testing.assert_close(got[at : at + length], want, **F32)
        at += length


# ------------------------------------------------------------------ the patches that stay


@pytest.mark.parametrize("count", [1, 7, 69, 70])
def test_top_patches_match_sorting(count):
    scores = randn(3, 70).softmax(1)
    assert torch.equal(kernels.top_patches(scores, count), top_patches(scores, count))
    inner = randn(3, 140).softmax(1)[:, ::2]  # any strides
    assert torch.equal(kernels.top_patches(inner, count), top_patches(inner, count))


@pytest.mark.parametrize("n", [2, 196, 600])
def test_top_patches_break_ties_by_position(n):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(4, (3, n), generator=generator).float().to(DEVICE)
    scores[0] = 1
    for count in (1, n // 2, n):
        assert torch.equal(kernels.top_patches(scores, count), top_patches(scores, count))


def test_top_patches_order_all_numbers():
    """Exactly `count` are kept whatever the scores, so none of the result is left unwritten."""
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor(
        [[nan, 1, nan, -inf, inf, 0, -0.0, -1], [-0.0, 0, -0.0, 0, 0, -2, -inf, -3]], device=DEVICE
    )
    for count in range(1, 9):
        assert torch.equal(kernels.top_patches(scores, count), top_patches(scores, count))


@pytest.mark.parametrize("group", [0, 1, 2, 4])  # 0, 4: scores and choice in one kernel
@pytest.mark.parametrize("prefix", [1, 2])
def test_cls_top_patches_match_scores_and_choice(group, prefix):
    q, k = queries_and_keys(3, 37, 4, 16)
    scores, kept = kernels.cls_top_patches(q, k, 9, prefix, group=group)
    assert torch.equal(scores, kernels.cls_scores(q, k, group=group))
    assert torch.equal(kept, top_patches(scores[:, prefix:], 9))


def test_rejects_counts_and_lengths():
    q, k = queries_and_keys(1, 5, 2, 8)
    for count in (0, 5):
        with pytest.raises(ValueError, match=rf"count must be in \[1, 4\], got {count}"):
            kernels.cls_top_patches(q, k, count)
    with pytest.raises(ValueError, match=r"count must be in \[1, 4\], got 5"):
        kernels.top_patches(randn(2, 4), 5)
    with pytest.raises(ValueError, match="at most 4096 tokens an image, got 4097"):
        kernels.cls_scores(q, k[:, :, :1].expand(-1, -1, 4097, -1))


# ------------------------------------------------------------------ as operators


@pytest.mark.filterwarnings("ignore")
def test_cls_scores_are_proper_operators():
    q, k = queries_and_keys(2, 9, 2, 8)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    packed = randn(9, 2, 8)
    for group in (0, 1, 2):
        torch.library.opcheck(kernels._cls_scores, (q, k, group))
        torch.library.opcheck(kernels._cls_scores_packed, (q, packed, starts, 9, group))
        torch.library.opcheck(kernels._cls_top_patches, (q, k, 3, 1, group))
    torch.library.opcheck(kernels._top_patches, (randn(2, 9), 4))


@pytest.mark.filterwarnings("ignore")
def test_cls_scores_trace_as_one_graph():
    q, k = queries_and_keys(2, 9, 2, 8)

    def run(q, k):
        scores, kept = kernels.cls_top_patches(q, k, 3)
        return kernels.cls_scores(q, k) + scores, kept + kernels.top_patches(scores[:, 1:], 3)

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(traced(q, k), run(q, k)):
        assert torch.equal(got, want)


# ------------------------------------------------------------------ other GPUs


def launches(arch):
    starts = torch.zeros(3, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (50, 197, 1000):
            q, k, _ = torch.randn(2, tokens, 3, 12, 64, dtype=dtype).permute(2, 0, 3, 1, 4)
            kernels.cls_scores(q[:, :, 0], k)
            kernels.cls_top_patches(q[:, :, 0], k, 20)
            kernels.cls_top_patches(q[:, :, 0], k, 20, group=12)
            if dtype == torch.bfloat16:  # what the launch table takes on a GPU
                kernels.cls_scores(q[:, :, 0], k, group=0)
                kernels.cls_top_patches(q[:, :, 0], k, 20, group=0)
                kernels.cls_scores_packed(q[:, :, 0], k[0].transpose(0, 1), starts, 197, group=0)
        kernels.cls_scores_packed(q[:, :, 0], k[0].transpose(0, 1), starts, 197)
    kernels.top_patches(torch.randn(2, 196), 49)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cls_scores_build_for_every_gpu(arch):
    found = aot_launches.compiled_launches("test_ops_cls_scores:launches", arch)
    aot_launches.assert_fit(found)
    assert {x.kernel for x in found} == {"_scores", "_scores_all", "_add_groups"}
    # fp32 keys of 197 tokens do not all fit into registers; nothing else is spilled
    assert max(x.stack_bytes or 0 for x in found) <= 128


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@on_gpu
class TestOnGPU:
    @pytest.mark.parametrize("images", [25, 100, 300])
    @pytest.mark.parametrize("tokens", [50, 197, 577])
    def test_bf16_scores_match_reference(self, images, tokens):
        q, k = queries_and_keys(images, tokens, 12, 64, dtype=torch.bfloat16)
        scores, kept = kernels.cls_top_patches(q, k, tokens // 4)
        # products of bf16 numbers are exact in float32, as in the reference
        torch.testing.assert_close(scores, reference.cls_scores(q, k), **F32)
        assert torch.equal(kept, top_patches(scores[:, 1:], tokens // 4))

    def test_bf16_packed_scores_match_reference(self):
        lengths = torch.randint(1, 198, (40,), generator=torch.Generator().manual_seed(0))
        starts = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32, device="cuda")
        k = randn(int(lengths.sum()), 12, 64, dtype=torch.bfloat16)
        q = randn(40, 12, 64, seed=1, dtype=torch.bfloat16)
        got = kernels.cls_scores_packed(q, k, starts, 197)
        for i, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist())):
            want = reference.cls_scores(q[i : i + 1], k[start:end].transpose(0, 1)[None])[0]
            torch.testing.assert_close(got[start:end], want, **F32)

    def test_cls_top_patches_is_captured_in_a_graph(self):
        q, k = queries_and_keys(25, 197, 12, 64, dtype=torch.bfloat16)
        kernels.cls_top_patches(q, k, 49)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scores, kept = kernels.cls_top_patches(q, k, 49)
        k.normal_()
        graph.replay()
        torch.testing.assert_close(scores, reference.cls_scores(q, k), **F32)
        assert torch.equal(kept, top_patches(scores[:, 1:], 49))

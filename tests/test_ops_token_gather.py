"""token_gather: the kernels against their reference; in Triton's interpreter where no GPU is.

A gather copies, so results are equal to the last bit; so are gradients of distinct indices.
Repeated ones are summed in float32: a few roundings of 6e-8 each.
"""

import pytest
import torch

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import reference
from fastrecycle_kernels import token_gather as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SUMS = {"rtol": 1e-5, "atol": 1e-5}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed)).to(DEVICE, dtype)


def distinct(images, tokens, kept, seed=0):
    """Kept tokens of each image, ascending, as pruning leaves them."""
    order = torch.rand(images, tokens, generator=generator(seed)).argsort(1)
    return order[:, :kept].sort(1).values.to(DEVICE)


def anything(*shape, below, seed=0):
    return torch.randint(below, shape, generator=generator(seed)).to(DEVICE)


def assert_matches(x, index, tolerance=None):
    """Output and gradient are the reference's."""
    x = x.detach().requires_grad_()
    got, want = kernels.token_gather(x, index), reference.token_gather(x, index)
    assert got.dtype == x.dtype
    assert torch.equal(got, want)
    dy = randn(*got.shape, seed=9, dtype=x.dtype)
    (got,), (want,) = (torch.autograd.grad(y, x, dy) for y in (got, want))
    if tolerance is None:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, **tolerance)


# ------------------------------------------------------------------ against the reference


@pytest.mark.parametrize(
    ("images", "tokens", "kept", "width"),
    [
        (2, 197, 50, 192),
        (1, 1, 1, 8),  # one token
        (3, 17, 17, 24),  # all of them; one above a block of rows
        (2, 16, 5, 300),  # no power of two divides the width
        (2, 5, 1, 6),
        (1, 300, 290, 16),  # an index longer than one scan
    ],
)
def test_token_gather_matches_reference(images, tokens, kept, width):
    assert_matches(randn(images, tokens, width), distinct(images, tokens, kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_token_gather_matches_reference_in_every_dtype(dtype):
    assert_matches(randn(2, 20, 24, dtype=dtype), distinct(2, 20, 7))
    assert_matches(randn(2, 20, 24, dtype=dtype), distinct(1, 40, 9)[0])


def test_token_gather_sums_repeated_indices():
    assert_matches(randn(3, 20, 24), anything(3, 30, below=20), SUMS)
    assert_matches(randn(3, 20, 24), torch.full((3, 40), 7, device=DEVICE), SUMS)


@pytest.mark.parametrize("kept", [1, 31, 60])
def test_token_gather_of_a_flat_index_matches_reference(kept):
    assert_matches(randn(3, 20, 24), distinct(1, 60, kept)[0])
    assert_matches(randn(3, 20, 24), distinct(1, 60, kept)[0].flip(0))  # in any order
    assert_matches(randn(3, 20, 24), anything(kept, below=60), SUMS)


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 5, 8)])
def test_token_gather_of_nothing(shape):
    x = randn(*shape).requires_grad_()
    for index in (torch.zeros(shape[0], 0), torch.zeros(0)):
        y = kernels.token_gather(x, index.to(DEVICE, torch.int64))
        assert y.shape == (*index.shape, 8)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.shape == shape
        assert not dx.any()


def test_token_gather_takes_any_memory():
    wide = randn(4, 21, 48)
    for x in (wide[:, 1:], wide[::2], wide[..., ::2], wide.transpose(1, 2)):
        assert_matches(x, distinct(*x.shape[:2], 7))
        assert_matches(x, distinct(1, x.shape[0] * x.shape[1], 7)[0])
    assert_matches(wide, distinct(4, 21, 8)[:, ::2])  # of the index too
    assert_matches(wide, distinct(4, 21, 8)[:, 3])
    x = randn(2, 6, 8).requires_grad_()  # and so does its backward
    dy = randn(8, 2, 3).permute(1, 2, 0)
    (dx,) = torch.autograd.grad(kernels.token_gather(x, distinct(2, 6, 3)), x, dy)
    assert torch.equal(
        dx, torch.autograd.grad(reference.token_gather(x, distinct(2, 6, 3)), x, dy)[0]
    )


def test_token_gather_can_be_differentiated_twice():
    x, index = randn(1, 4, 3, dtype=torch.float64).requires_grad_(), distinct(1, 4, 2)
    assert torch.autograd.gradgradcheck(lambda x: kernels.token_gather(x, index) ** 2, x)


def test_token_gather_is_the_same_each_time():
    x, index = randn(2, 40, 24).requires_grad_(), anything(2, 60, below=40)
    dy = randn(2, 60, 24, seed=3)
    runs = [torch.autograd.grad(kernels.token_gather(x, index), x, dy)[0] for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


# ------------------------------------------------------------------ patches


def unfolded(images, patch):
    """All patches, (B, n, C P P)."""
    grid = images.shape[-1] // patch
    parts = images.unflatten(3, (grid, patch)).unflatten(2, (grid, patch))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@pytest.mark.parametrize("patch", [4, 6])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_gather_patches_matches_unfolding(patch, memory):
    images = randn(3, 3, 24, 24).contiguous(memory_format=memory).requires_grad_()
    patches = (24 // patch) ** 2
    for index in (distinct(3, patches, 9), distinct(1, 3 * patches, 20)[0]):
        got = kernels.gather_patches(images, index, patch)
        want = reference.token_gather(unfolded(images, patch), index)
        assert torch.equal(got, want)
        dy = randn(*got.shape, seed=4)
        (got,), (want,) = (torch.autograd.grad(y, images, dy) for y in (got, want))
        assert torch.equal(got, want)


def test_gather_patches_casts_on_the_way():
    images, index = randn(2, 3, 16, 16).requires_grad_(), distinct(2, 16, 5)
    got = kernels.gather_patches(images, index, 4, torch.float16)
    assert torch.equal(got, reference.token_gather(unfolded(images, 4), index).half())
    (dx,) = torch.autograd.grad(got.float().sum(), images)
    assert dx.dtype == torch.float32
    assert dx.sum() == 2 * 5 * 48


def test_gather_patches_embed_matches_convolution():
    images, weight, bias = randn(2, 3, 16, 16), randn(8, 3, 4, 4, seed=1), randn(8, seed=2)
    index = distinct(2, 16, 5)
    got = kernels.gather_patches_embed(images, index, weight, bias)
    every = torch.nn.functional.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, reference.token_gather(every, index), **SUMS)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert kernels.gather_patches_embed(images, index, weight, bias).dtype == torch.bfloat16


# ------------------------------------------------------------------ as operators


@pytest.mark.filterwarnings("ignore")  # opcheck looks at .grad of what is no leaf
@pytest.mark.parametrize("flat", [False, True])
def test_token_gather_is_a_proper_operator(flat):
    x, index = randn(2, 6, 8).requires_grad_(), distinct(2, 6, 3)
    if flat:
        index = distinct(1, 12, 5)[0]
    torch.library.opcheck(kernels._token_gather, (x, index))
    dy = randn(*index.shape, 8).requires_grad_()
    torch.library.opcheck(kernels._token_scatter, (dy, index, 2, 6))
    images, index = randn(2, 3, 8, 8).requires_grad_(), index % 4
    torch.library.opcheck(kernels._gather_patches, (images, index, 4, torch.float32))


@pytest.mark.filterwarnings("ignore")
def test_token_gather_traces_as_one_graph():
    index = distinct(2, 6, 3)

    def run(x, images):
        y = kernels.token_gather(x, index).sum()
        return y + kernels.gather_patches(images, index % 4, 4).square().sum()

    x, images = randn(2, 6, 8).requires_grad_(), randn(2, 3, 8, 8).requires_grad_()
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(traced(x, images), (x, images)),
        torch.autograd.grad(run(x, images), (x, images)),
    ):
        assert torch.equal(got, want)


# ------------------------------------------------------------------ other GPUs


def launches(arch):
    for dtype in (torch.bfloat16, torch.float32):
        x, index = torch.randn(2, 197, 768, dtype=dtype), torch.zeros(2, 50, dtype=torch.int64)
        images = torch.randn(2, 3, 224, 224)
        for kept in (index, index.flatten()):
            dy = torch.randn(*kept.shape, 768, dtype=dtype)
            kernels._token_gather(x, kept)
            kernels._token_scatter(dy, kept, 2, 197)
            kernels._gather_patches(images, kept, 16, dtype)
            kernels._scatter_patches(dy, kept, 16, list(images.shape), torch.float32)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_token_gather_builds_for_every_gpu(arch):
    found = aot_launches.compiled_launches("test_ops_token_gather:launches", arch)
    aot_launches.assert_fit(found)
    assert {x.kernel for x in found} == {"_gather", "_scatter", "_scatter_ordered"}
    assert not any(x.stack_bytes for x in found)


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@on_gpu
class TestOnGPU:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("kept", [49, 147, 196])
    def test_token_gather_matches_reference(self, dtype, kept):
        assert_matches(randn(25, 196, 768, dtype=dtype), distinct(25, 196, kept))
        assert_matches(randn(25, 196, 768, dtype=dtype), distinct(1, 25 * 196, 25 * kept)[0])

    def test_token_gather_reaches_beyond_2_gib(self):
        x = torch.zeros(3000, 197, 1024, device="cuda", dtype=torch.float32).requires_grad_()
        with torch.no_grad():
            x[-1, -1] = 1
        index = torch.arange(150, 197, device="cuda").expand(3000, -1)
        y = kernels.token_gather(x, index)
        assert y[-1, -1].eq(1).all()
        assert y.sum() == 1024
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert dx[:, 150:].eq(1).all()
        assert not dx[:, :150].any()

    def test_token_gather_is_captured_in_a_graph(self):
        x, index = randn(4, 197, 768), distinct(4, 197, 50)
        dy = randn(4, 50, 768, seed=1)
        kernels.token_gather(x, index)  # compiled before the capture
        kernels._token_scatter(dy, index, 4, 197)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, dx = kernels.token_gather(x, index), kernels._token_scatter(dy, index, 4, 197)
        x.normal_(), index.copy_(distinct(4, 197, 50, seed=7))
        graph.replay()
        assert torch.equal(y, reference.token_gather(x, index))
        assert torch.equal(reference.token_gather(dx, index), dy)

"""stem_conv: a prior network's first convolution against PyTorch's, from pixels and back to them.

In Triton's interpreter where no GPU is. fp32 tolerance: sums of up to 1000 products of numbers near
1 in another order agree to 1e-5 of the largest result.
"""

import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import stem_conv as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty", "no_tf32")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MEAN, STD = (0.4, 0.5, 0.6, 0.3), (0.2, 0.25, 0.3, 0.5)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def explicit(pixels, weight, stride, padding):
    """As PyTorch has it, in the weight's dtype behind the normalisation."""
    c = weight.shape[1]
    mean, std = (torch.tensor(v[:c], device=DEVICE)[:, None, None] for v in (MEAN, STD))
    x = ((pixels - mean) / std).to(weight.dtype)
    return torch.nn.functional.conv2d(x, weight, None, stride, padding)


def ours(pixels, weight, stride, padding, cudnn=False):
    c = weight.shape[1]
    return kernels.stem_conv(pixels, weight, stride, padding, MEAN[:c], STD[:c], cudnn=cudnn)


def both(pixels, weight, stride, padding, cudnn=False, dtype=torch.float32):
    """(y, gradient of the pixels) of the kernels and of PyTorch in another dtype."""
    pixels.requires_grad_()
    got = ours(pixels, weight, stride, padding, cudnn)
    flow = randn(*got.shape, seed=9, dtype=got.dtype)
    full = pixels.detach().to(dtype).requires_grad_()
    want = explicit(full, weight.to(dtype), stride, padding)
    return (
        (got, torch.autograd.grad(got, pixels, flow)[0]),
        (want, torch.autograd.grad(want, full, flow.to(dtype))[0]),
    )


def assert_both_agree(*arguments, share=1e-5, **options):
    for got, want in zip(*both(*arguments, **options), strict=True):
        assert got.shape == want.shape
        limit = share * max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=limit)


# ------------------------------------------------------------------ against PyTorch

SHAPES = [
    # B, C, H, W, K, R, stride
    (2, 3, 16, 12, 8, 7, 2),
    (2, 3, 13, 11, 20, 7, 2),  # odd sides
    (1, 3, 7, 30, 72, 7, 2),  # more filters than one tile
    (3, 1, 9, 9, 16, 3, 1),
    (2, 4, 10, 9, 24, 5, 2),
    (1, 3, 8, 8, 64, 5, 1),
    (2, 2, 8, 9, 16, 3, 2),
    (1, 3, 17, 6, 16, 7, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cudnn", [False, True])
def test_stem_conv_matches_pytorch(shape, cudnn):
    b, c, h, w, filters, kernel, stride = shape
    pixels = randn(b, c, h, w, seed=1)
    weight = randn(filters, c, kernel, kernel, seed=2)
    assert_both_agree(pixels, weight, stride, kernel // 2, cudnn=cudnn)


@pytest.mark.parametrize("padding", [0, 1, 6])
def test_stem_conv_matches_pytorch_with_other_padding(padding):
    assert_both_agree(randn(2, 3, 12, 15, seed=1), randn(16, 3, 7, 7, seed=2), 2, padding)


def test_stem_conv_matches_pytorch_in_float16():
    """x, y and dy are rounded to 11 bits, sums are not."""
    pixels, weight = randn(2, 3, 16, 12, seed=1), randn(16, 3, 7, 7, seed=2, dtype=torch.float16)
    assert_both_agree(pixels, weight, 2, 3, share=2e-3)


@pytest.mark.parametrize("sides", [(2, 2), (2, 4), (4, 8), (8, 4)])
@pytest.mark.parametrize("block_m", [16, 64])
def test_stem_conv_matches_pytorch_however_pixels_are_cut(sides, block_m, monkeypatch):
    plan = replace(kernels.BACKWARD, block_m=block_m, side_h=sides[0], side_w=sides[1])
    monkeypatch.setattr(kernels, "BACKWARD", plan)
    monkeypatch.setattr(kernels, "FORWARD", replace(kernels.FORWARD, block_m=block_m))
    assert_both_agree(randn(2, 3, 14, 19, seed=1), randn(16, 3, 7, 7, seed=2), 2, 3)


@pytest.mark.parametrize("cudnn", [False, True])
def test_stem_conv_of_no_image(cudnn):
    pixels = randn(0, 3, 16, 12).requires_grad_()
    y = ours(pixels, randn(8, 3, 7, 7), 2, 3, cudnn)
    assert y.shape == (0, 8, 8, 6)
    assert torch.autograd.grad(y.sum(), pixels)[0].shape == pixels.shape


def test_stem_conv_takes_any_memory():
    pixels = randn(2, 3, 24, 16, seed=1)[:, :, ::2].contiguous(memory_format=torch.channels_last)
    weight = randn(16, 6, 7, 7, seed=2)[:, ::2]
    y, gradient = both(pixels, weight, 2, 3)[0]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous()
    assert_both_agree(pixels.detach(), weight.contiguous(memory_format=torch.channels_last), 2, 3)
    pixels = randn(2, 3, 12, 16, seed=1).requires_grad_()
    gradients = [
        torch.autograd.grad(f(pixels, weight, 2, 3).sum(), pixels)[0] for f in (ours, explicit)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_stem_conv_is_the_same_each_time():
    runs = [both(randn(2, 3, 16, 12, seed=1), randn(16, 3, 7, 7, seed=2), 2, 3)[0] for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_stem_conv_passes_on_nan():
    """To every position that depends on it, and to no other image."""
    pixels = randn(2, 3, 16, 12, seed=1)
    pixels[1, 2, 8, 8] = float("nan")
    got, want = (f(pixels, randn(16, 3, 7, 7, seed=2), 2, 3) for f in (ours, explicit))
    assert got.isnan()[want.isnan()].all()
    assert want[1].isnan().any()
    assert not got[0].isnan().any()


# ------------------------------------------------------------------ as an operator


def test_rejects_what_the_kernels_cannot_do():
    pixels, weight = randn(2, 3, 16, 12), randn(8, 3, 7, 7)
    with pytest.raises(ValueError, match=r"got pixels in torch\.float64"):
        ours(pixels.double(), weight, 2, 3)
    with pytest.raises(ValueError, match=r"expected weight .* stride 3"):
        ours(pixels, weight, 3, 3)
    with pytest.raises(ValueError, match=r"expected pixels \(B, 3, H, W\)"):
        ours(pixels[:, :2], weight, 2, 3)
    with pytest.raises(ValueError, match="the weight is a constant"):
        ours(pixels, weight.requires_grad_(), 2, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cudnn", [False, True])
def test_stem_conv_is_a_proper_operator(cudnn):
    pixels, weight = randn(2, 3, 13, 10, seed=1).requires_grad_(), randn(16, 3, 7, 7, seed=2)
    mean, std = list(MEAN[:3]), list(STD[:3])
    ops = torch.ops.fastrecycle
    torch.library.opcheck(ops.stem_conv.default, (pixels, weight, 2, 3, mean, std, cudnn))
    dy = ops.stem_conv(pixels, weight, 2, 3, mean, std, cudnn).detach()
    arguments = (dy, weight, pixels.detach(), list(pixels.shape), 2, 3, std)
    torch.library.opcheck(ops.stem_conv_backward.default, arguments)


@pytest.mark.filterwarnings("ignore")
def test_stem_conv_traces_as_one_graph():
    pixels, weight = randn(2, 3, 13, 10, seed=1).requires_grad_(), randn(16, 3, 7, 7, seed=2)

    def run(pixels):
        return ours(pixels, weight, 2, 3).square().sum()

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(pixels), run(pixels))
    assert torch.equal(*(torch.autograd.grad(f(pixels), pixels)[0] for f in (traced, run)))


# ------------------------------------------------------------------ built for GPUs


def launch_all(arch):
    """Every kernel as ResNets' and CIFAR's stems launch it."""
    del arch
    for dtype in (torch.bfloat16, torch.float32):
        for side, kernel, stride in ((224, 7, 2), (32, 3, 1)):
            pixels = torch.empty(25, 3, side, side)
            weight = torch.empty(64, 3, kernel, kernel, dtype=dtype)
            mean, std = list(MEAN[:3]), list(STD[:3])
            y = kernels._run_forward(pixels, weight, stride, kernel // 2, mean, std)
            kernels._run_backward(
                y, weight, list(pixels.shape), stride, kernel // 2, std, pixels.dtype
            )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_stem_conv_builds_for_every_gpu(arch):
    launches = aot_launches.compiled_launches("test_ops_stem_conv:launch_all", arch)
    aot_launches.assert_fit(launches)
    # float32 products without tensor cores: a few registers too many on some chips
    assert all((launch.stack_bytes or 0) <= 32 for launch in launches), launches
    if arch == 90:  # whole warpgroups multiply
        products = [x for x in launches if x.kernel in ("_convolve", "_gradient")]
        assert sum(x.warpgroup_products > 0 for x in products) >= 4, products


# ------------------------------------------------------------------ on a GPU


def error(got, exact):
    return (got.double() - exact.double()).abs().max().item()


@pytest.mark.parametrize(
    ("batch", "side", "filters", "kernel", "stride"),
    [(25, 224, 64, 7, 2), (3, 225, 64, 7, 2), (25, 32, 64, 3, 1), (4, 112, 32, 5, 2)],
)
@pytest.mark.parametrize("cudnn", [False, True])
class TestGPU:
    pytestmark = gpu

    def test_bf16_errs_no_more_than_twice_eager(self, batch, side, filters, kernel, stride, cudnn):
        pixels = randn(batch, 3, side, side, seed=1)
        weight = randn(filters, 3, kernel, kernel, seed=2).bfloat16()
        got, exact = both(pixels, weight, stride, kernel // 2, cudnn, torch.float64)
        leaf = pixels.detach().requires_grad_()
        y = explicit(leaf, weight, stride, kernel // 2)
        flow = randn(*y.shape, seed=9, dtype=torch.bfloat16)
        own = y, torch.autograd.grad(y, leaf, flow)[0]
        for name, a, b, c in zip(("y", "gradient"), got, own, exact, strict=True):
            assert error(a, c) <= 2 * error(b, c) + 1e-6, name

    def test_fp32_matches_pytorch(self, batch, side, filters, kernel, stride, cudnn):
        pixels = randn(batch, 3, side, side, seed=1)
        weight = randn(filters, 3, kernel, kernel, seed=2)
        assert_both_agree(pixels, weight, stride, kernel // 2, cudnn=cudnn, dtype=torch.float64)

    def test_graph_replays_what_eager_gives(self, batch, side, filters, kernel, stride, cudnn):
        pixels = randn(batch, 3, side, side, seed=1).requires_grad_()
        weight = randn(filters, 3, kernel, kernel, seed=2).bfloat16()

        def step():
            y = ours(pixels, weight, stride, kernel // 2, cudnn)
            return y, torch.autograd.grad(y, pixels, y.detach())[0]

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
        b = 680  # y has 2.2e9 numbers
        weight = randn(64, 3, 7, 7, seed=2).bfloat16()
        pixels = torch.rand(b, 3, 448, 448, device=DEVICE).requires_grad_()
        y = ours(pixels, weight, 2, 3)
        (gradient,) = torch.autograd.grad(y, pixels, y.detach())
        for image in (0, b - 1):
            part = pixels[image : image + 1].detach().requires_grad_()
            want = ours(part, weight, 2, 3)
            assert torch.equal(y[image], want[0])
            assert torch.equal(
                gradient[image], torch.autograd.grad(want, part, want.detach())[0][0]
            )

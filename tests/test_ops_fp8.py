"""fp8: the kernels against their reference; in Triton's interpreter where no GPU is.

e4m3 keeps 4 bits, so a number errs by 2^-4 of itself at most, or by half the smallest number 2^-9
below 2^-6 of the row's unit. Errors of a product's terms are independent: against its norm a
product of two such factors errs by sqrt(2) 2^-4 at most, and by some 0.04 as rounding goes.
"""

import math

import numpy as np
import pytest
import torch
import toys

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import fp8 as kernels
from fastrecycle_kernels import reference, residual_norm

from fastrecycle import ops
from fastrecycle.block import FP8_PRODUCTS, Fp8Linear
from fastrecycle.classifier import Embedder
from fastrecycle.cli import main
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.inversion import InversionGroup
from fastrecycle.lora import LoRAStack
from fastrecycle.metatrain import MetaTrainer
from fastrecycle.recycler import MetaLoRARecycler

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MISSING = not ON_GPU or torch.cuda.get_device_capability() < (8, 9)
pytestmark = [
    pytest.mark.usefixtures("one_thread", "poison_empty", "rounding"),
    pytest.mark.skipif(ON_GPU and MISSING, reason="this GPU has no float8"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # the interpreter's sigmoid
]
on_gpu = pytest.mark.skipif(MISSING, reason="no GPU with float8")
KINDS = pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "quick_gelu"])
BOUND = math.sqrt(2) * 2**-4


@pytest.fixture
def rounding(monkeypatch):
    """The interpreter's cast to e4m3 loses a carry out of the mantissa; PyTorch's does not."""
    if ON_GPU:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter._convert_float

    def convert(data, source, target, mode):
        if target != tl.float8e4nv:
            return cast(data, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def randn(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


def error(got, want):
    """Against the norm of all of it."""
    want = want.float()
    return float((got.float() - want).norm() / want.norm())


def linear(n, k, seed=0):
    """A weight (N, K), as such and in float8, and a bias."""
    weight = randn(n, k, seed=seed) / k**0.5
    return weight, reference.fp8_weight(weight), randn(n, seed=seed + 1, dtype=torch.bfloat16)


def run(op, x, *arguments, seed=7):
    """Results of bf16, and the gradient of those of x that want one."""
    leaves = [v.detach().requires_grad_() for v in (x if isinstance(x, tuple) else (x,))]
    results = op(*leaves, *arguments)
    results = results if isinstance(results, tuple) else (results,)
    flows = [randn(*y.shape, seed=seed + i, dtype=y.dtype) for i, y in enumerate(results)]
    gradients = torch.autograd.grad(results, leaves, flows)
    return [y.detach() for y in results], gradients


# ------------------------------------------------------------------ rows


def assert_rounded(x, x8, scale):
    rows = x.reshape(-1, x.shape[-1]).float()
    assert x8.dtype == torch.float8_e4m3fn
    assert x8.shape == rows.shape
    assert scale.shape == (len(rows), 1)
    most = rows.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale, (most / 448).clamp(min=1e-30 / 448), rtol=1e-6, atol=0)
    bound = (2**-4 * rows.abs()).maximum(2**-10 * scale) * (1 + 1e-5)
    assert bool(((reference.dequantise(x8, scale) - rows).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 48), (3, 768), (2, 7, 192), (2, 2304), (1, 3072), (0, 16)])
def test_quantised_rows_match_reference(dtype, shape):
    x = 3 * randn(*shape, dtype=dtype)
    x8, scale = kernels.quantise_rows(x)
    want8, want = reference.quantise_rows(x) if x.numel() else (x8, scale)
    assert_rounded(x, x8, scale)
    torch.testing.assert_close(scale, want, rtol=1e-6, atol=0)
    # the quotient may round otherwise where it is half-way
    assert (x8.float() != want8.float()).float().mean() < 1e-2 or not x.numel()


def test_quantised_rows_of_any_size():
    x = randn(6, 32) * torch.tensor([1.0, 0, 1e30, 1e-25, 1e-38, 1e4], device=DEVICE)[:, None]
    x8, scale = kernels.quantise_rows(x)
    assert_rounded(x[[0, 2, 3, 5]], x8[[0, 2, 3, 5]], scale[[0, 2, 3, 5]])
    assert bool((x8[1].float() == 0).all())
    assert bool(scale.isfinite().all())
    assert float(reference.dequantise(x8, scale)[4].abs().max()) < 1e-30


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_rows_that_are_no_numbers_stay_so():
    x = randn(3, 32)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    back = reference.dequantise(*kernels.quantise_rows(x))
    assert not back[0].isfinite().all()
    assert not back[1].isfinite().all()
    assert back[2].isfinite().all()


def test_quantised_rows_take_any_memory():
    wide = randn(6, 9, 32)
    for x in (wide[:, ::2], wide.mT, wide[..., 5:], randn(1, 16).expand(5, 16)):
        assert_rounded(x, *kernels.quantise_rows(x))


def test_rows_are_cut_with_few_idle_columns():
    for width in (16, 48, 192, 512, 768, 1024, 1536, 2304, 3072, 4096, 9216):
        rows, chunks, chunk, _ = kernels.cut(width)
        assert width <= chunks * chunk <= 1.1 * width or chunk == 16
        assert rows == 1 or rows * chunk <= 1024


@KINDS
def test_rows_are_activated_as_they_are_quantised(kind):
    u, dg = 2 * randn(4, 48), randn(4, 48, seed=1)
    assert_rounded(reference.activation(u, kind), *kernels._launch(u, kind=kind))
    v = u.clone().requires_grad_()
    (du,) = torch.autograd.grad(reference.activation(v, kind), v, dg)
    assert_rounded(du, *kernels._launch(dg, u, kind, forward=False))


# ------------------------------------------------------------------ products


def test_weight_is_scaled_by_rows_and_by_columns():
    weight, eight, _ = linear(32, 48)
    weight[3] *= 100
    weight[:, 5] *= 100
    eight = reference.fp8_weight(weight)
    assert_rounded(weight, eight.w8, eight.w_scale.mT)
    assert_rounded(weight.T, eight.wt8, eight.wt_scale.mT)


@pytest.mark.parametrize("shape", [(2, 9, 48), (1, 48), (3, 1, 48), (0, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_linear_matches_reference(shape, dtype):
    _, weight, bias = linear(32, 48)
    x = randn(*shape, dtype=dtype)
    if not len(x):
        y = kernels.fp8_linear(x, weight, bias)
        assert (y.shape, y.dtype) == ((0, 32), torch.bfloat16)
        return
    for b in (bias, None):
        (y,), (dx,) = run(kernels.fp8_linear, x, weight, b)
        (want_y,), (want_dx,) = run(reference.fp8_linear, x, weight, b)
        assert (y.dtype, dx.dtype) == (torch.bfloat16, dtype)
        assert y.shape == want_y.shape
        assert error(y, want_y) < 2e-2
        assert error(dx, want_dx) < 2e-2


def test_fp8_linear_errs_as_e4m3_does():
    plain, weight, _ = linear(64, 256)
    x = randn(100, 256)
    (y,), (dx,) = run(kernels.fp8_linear, x, weight, None)
    (want_y,), (want_dx,) = run(lambda v: v @ plain.T, x)
    for got, want in ((y, want_y), (dx, want_dx)):
        assert 0.01 < error(got, want) < BOUND


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_mlp_matches_reference(kind, dtype):
    (_, first, b1), (_, second, b2) = linear(96, 32), linear(32, 96, seed=3)
    norm = (1 + 0.1 * randn(32, seed=5), randn(32, seed=6))
    pair = (randn(2, 7, 32, dtype=dtype), randn(2, 7, 32, seed=1, dtype=dtype))
    arguments = (norm, 1e-6, 0.5, first, b1, second, b2, kind)
    got, want = (run(m.residual_mlp, pair, *arguments) for m in (kernels, reference))
    for one, other in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert error(one, other) < 3e-2  # a bf16 rounded otherwise moves some numbers of 4 bits


def test_residual_mlp_errs_as_e4m3_does():
    (w1, first, b1), (w2, second, b2) = linear(256, 64), linear(64, 256, seed=3)
    norm = (1 + 0.1 * randn(64, seed=5), randn(64, seed=6))
    pair = (randn(50, 64), randn(50, 64, seed=1))

    def exact(x, branch):
        s, y = reference.residual_norm(x, branch, *norm, 1e-6)
        u = torch.nn.functional.linear(y, w1, b1.float())
        y = torch.nn.functional.linear(reference.activation(u, "gelu"), w2, b2.float())
        return s, y

    got = run(kernels.residual_mlp, pair, norm, 1e-6, 1.0, first, b1, second, b2, "gelu")
    want = run(exact, pair)
    assert error(got[0][0], want[0][0]) < 1e-6
    assert 0.01 < error(got[0][1], want[0][1]) < 2 * BOUND
    for one, other in zip(got[1], want[1], strict=True):
        assert error(one, other) < 2 * BOUND


def test_residual_mlp_passes_on_the_gradient_of_either_result():
    (_, first, b1), (_, second, b2) = linear(48, 32), linear(32, 48, seed=3)
    norm = (torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE))
    x, branch = (randn(4, 32, seed=i).requires_grad_() for i in range(2))
    s, y = kernels.residual_mlp(x, branch, norm, 1e-6, 2.0, first, b1, second, b2, "gelu")
    dx, dbranch = torch.autograd.grad(s.sum(), (x, branch), retain_graph=True)
    torch.testing.assert_close(dx, torch.ones_like(dx))
    torch.testing.assert_close(dbranch, 2 * dx)
    (alone,) = torch.autograd.grad(y.float().square().sum(), branch)
    assert alone.abs().max() > 0.1


# ------------------------------------------------------------------ as operators


@pytest.mark.filterwarnings("ignore")  # opcheck looks at .grad of what is no leaf
def test_fp8_operators_are_proper():
    (_, first, b1), (_, second, b2) = linear(48, 32), linear(32, 48, seed=3)
    x, u = randn(2, 3, 32), randn(6, 48, dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()
    # that of the schema multiplies what it is given, which float8 cannot be
    tests = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._quantise_rows, (x,))
    torch.library.opcheck(kernels._linear, (leaf, *first, b1), test_utils=tests)
    norm = (torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE))
    arguments = (*norm, 1e-6, 1.0, list(first), b1, list(second), b2, "gelu")
    torch.library.opcheck(kernels._residual_mlp, (leaf, x, *arguments), test_utils=tests)
    flow = x.to(torch.bfloat16)
    torch.library.opcheck(
        kernels._mlp_backward, (flow, u, list(first), list(second), "gelu"), test_utils=tests
    )


@pytest.mark.filterwarnings("ignore")
def test_fp8_traces_as_one_graph():
    (_, first, b1), (_, second, b2) = linear(48, 32), linear(32, 48, seed=3)
    norm = (torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE))

    def both(x):
        y = kernels.fp8_linear(kernels.fp8_linear(x, first, b1), second, None)
        s, y = kernels.residual_mlp(x, y, norm, 1e-6, 1.0, first, b1, second, b2, "gelu")
        return s + y

    x = randn(2, 5, 32)
    traced = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(traced, x), run(both, x))


def test_fp8_says_what_it_cannot_do():
    _, weight, bias = linear(32, 48)
    with pytest.raises(ValueError, match="48 columns meet this weight, got 32"):
        kernels.fp8_linear(randn(2, 32), weight, bias)
    with pytest.raises(ValueError, match="float64"):
        kernels.fp8_linear(randn(2, 48).double(), weight, bias)
    with pytest.raises(ValueError, match=r"bias must be \(32,\) bfloat16"):
        kernels.fp8_linear(randn(2, 48), weight, bias.float())
    with pytest.raises(ValueError, match="bias is frozen"):
        kernels.fp8_linear(randn(2, 48), weight, bias.clone().requires_grad_())
    with pytest.raises(ValueError, match="multiples of 16"):
        kernels.fp8_linear(randn(2, 24), reference.fp8_weight(randn(32, 24)), bias)
    with pytest.raises(ValueError, match="multiples of 16"):
        ops.fp8_weight(randn(32, 24))
    with pytest.raises(ValueError, match="at most 9216"):
        kernels.quantise_rows(randn(1, 9232))
    norm = (torch.ones(48, device=DEVICE), torch.zeros(48, device=DEVICE))
    rest = (1e-6, 1.0, weight, bias, *linear(48, 32)[1:])
    x = randn(2, 48)
    with pytest.raises(ValueError, match="kind"):
        kernels.residual_mlp(x, x, norm, *rest, "relu")
    with pytest.raises(ValueError, match="weight and bias are frozen"):
        kernels.residual_mlp(x, x, (norm[0].clone().requires_grad_(), norm[1]), *rest, "gelu")
    with pytest.raises(ValueError, match="branch must have shape"):
        ops.residual_mlp(x, x[:1], norm, *rest, "gelu")


# ------------------------------------------------------------------ the backbone


def features(vit, images, lora, impl="reference", half=True):
    """Features and the pixels' gradient of some direction."""
    x = images.detach().requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
        y = vit(x, lora, impl=impl).float()
    return y.detach(), torch.autograd.grad((y * randn(*y.shape, seed=5)).sum(), x)[0]


def test_prepared_backbone_holds_float8():
    vit = toys.vit().to(DEVICE)
    ready = vit.prepared(torch.float8_e4m3fn)
    assert ready.stream_dtype == torch.bfloat16
    for name, module in ready.blocks[0].named_children():
        eight = isinstance(module, Fp8Linear)
        assert eight == (name in FP8_PRODUCTS)
        if eight:
            plain = getattr(vit.blocks[0], name)
            assert module.weight.dtype == torch.bfloat16
            assert not module.weight.requires_grad
            assert_rounded(plain.weight, module.w8, module.w_scale.mT)
            assert plain.weight.dtype == torch.float32
    assert set(ready.state_dict()) == set(vit.state_dict())
    config = toys.replace(toys.CONFIG, mlp_dim=40)
    with pytest.raises(ValueError, match="multiples of 16"):
        toys.vit(config).prepared(torch.float8_e4m3fn)


@pytest.mark.parametrize("targets", [None, ("q", "v"), ("q", "fc1"), ("fc2", "proj")])
def test_fp8_backbone_is_within_16_of_bf16(targets):
    """4 bits against 8."""
    vit, images = toys.vit().to(DEVICE), randn(4, 3, 16, 16, seed=1)
    lora = None if targets is None else toys.lora(targets=targets).to(DEVICE)
    want = features(vit, images, lora, half=False)
    bf16 = features(vit.prepared(torch.bfloat16), images, lora)
    ready = vit.prepared(torch.float8_e4m3fn)
    impls = ["reference", "triton"] if ON_GPU else ["reference"]
    for impl in impls:
        fp8 = features(ready, images, lora, impl)
        for got, half, exact in zip(fp8, bf16, want, strict=True):
            assert error(got, exact) < 16 * error(half, exact)
            assert error(got, exact) < 0.2


@pytest.mark.skipif(ON_GPU, reason="of the interpreter, which has no bf16 dots")
def test_fp8_block_matches_reference():
    """Without bf16 products in our own kernels: the second half of a block."""
    vit = toys.vit().prepared(torch.float8_e4m3fn)
    pair = (randn(2, 5, 16), randn(2, 5, 16, seed=1))
    for lora in ({}, toys.lora(targets=("q", "v")).stack().blocks()[0]):
        got, want = (
            run(vit.blocks[0].transform, pair, lora, None, impl) for impl in ("triton", "reference")
        )
        for one, other in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            assert error(one, other) < 3e-2


# ------------------------------------------------------------------ precision


def test_precision_is_refused_where_it_cannot_be(monkeypatch, tmp_path, capsys):
    vit, cpu, cuda = toys.vit(), torch.device("cpu"), torch.device("cuda")
    wanted = 'precision: "fp8" needs backend "triton", got "reference" on cpu; use "bf16"'
    with pytest.raises(ValueError, match=wanted):
        Embedder(vit, precision="fp8")
    with pytest.raises(ValueError, match=wanted):
        Embedder(vit, precision="fp8", backend="auto")
    with pytest.raises(ValueError, match=wanted):
        MetaTrainer(vit, toys.pool(), MetaConfig(ways=3, queries=2), precision="fp8")
    with pytest.raises(ValueError, match=wanted):
        InversionGroup(
            vit, [toys.lora()], [0], None,
            InversionConfig(images_per_class=1, iterations=1, prune={}), precision="fp8",
        )  # fmt: skip
    with pytest.raises(ValueError, match=wanted):
        MetaLoRARecycler(vit, toys.bank(), None, device="cpu", precision="fp8")
    with pytest.raises(ValueError, match='expected "fp32", "bf16" or "fp8", got \'fp16'):
        ops.check_precision("fp16", "triton", cuda)
    with pytest.raises(ValueError, match='got "compile" on cuda'):
        ops.check_precision("fp8", "compile", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8\.9 .* or above, got 8\.0; use \"bf16\""):
        ops.check_precision("fp8", "triton", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    ops.check_precision("fp8", "triton", cuda)
    for precision in ("fp32", "bf16"):
        ops.check_precision(precision, "reference", cpu)


def test_command_line_refuses_fp8_on_the_cpu(tmp_path, capsys):
    code = main(["demo", "--out", str(tmp_path / "d"), "--device", "cpu", "--precision", "fp8"])
    assert code != 0
    assert '"fp8" needs backend "triton", got "reference" on cpu' in capsys.readouterr().err


# ------------------------------------------------------------------ other GPUs


def launches(arch):
    for dtype in (torch.bfloat16, torch.float32):
        for width in (192, 768, 1536, 2304, 3072):
            x = torch.randn(3, width).to(dtype)
            kernels._launch(x)
            for kind in ("gelu", "quick_gelu"):
                kernels._launch(x, kind=kind)
                kernels._launch(x, x, kind, forward=False)
        x, scale = torch.randn(3, 768).to(dtype), torch.empty(3, 1)
        weight = torch.randn(768)
        residual_norm._launch_forward(x, x, weight, weight, 1e-6, 1.0, kernels.E4M3, scale)


@pytest.mark.parametrize("arch", [90, 100])
def test_fp8_builds_for_every_gpu(arch):
    found = aot_launches.compiled_launches("test_ops_fp8:launches", arch)
    aot_launches.assert_fit(found)
    assert {x.kernel for x in found} == {"_quantise", "_forward"}
    assert not any(x.stack_bytes for x in found)


# ------------------------------------------------------------------ on a GPU


SHAPES = pytest.mark.parametrize(("k", "n"), [(768, 3072), (3072, 768), (768, 768), (768, 2304)])


@pytest.mark.gpu
@on_gpu
class TestOnGPU:
    @SHAPES
    @pytest.mark.parametrize("rows", [1, 17, 100, 4925, 5000, 19700])
    def test_product_takes_any_number_of_rows(self, rows, k, n):
        _, weight, bias = linear(n, k)
        x8, scale = kernels.quantise_rows(randn(rows, k, dtype=torch.bfloat16))
        y = kernels._product(x8, scale, weight.w8, weight.w_scale, bias)
        want = (
            reference.dequantise(x8, scale) @ reference.dequantise(weight.w8, weight.w_scale.mT).T
        )
        bound = 2**-8  # bf16 of the result
        assert error(y, want + bias.float()) < bound
        other = kernels._product(x8, scale, weight.w8, weight.w_scale, None)
        assert error(other, want) < bound

    @SHAPES
    @pytest.mark.parametrize("rows", [4925, 19700])
    def test_linear_errs_as_e4m3_does(self, rows, k, n):
        plain, weight, bias = linear(n, k)
        x = randn(rows, k, dtype=torch.bfloat16)
        (y,), (dx,) = run(kernels.fp8_linear, x, weight, bias)
        wanted = run(lambda v: torch.nn.functional.linear(v, plain, bias.float()), x.float())
        (want_y,), (want_dx,) = wanted
        assert 0.01 < error(y, want_y) < BOUND
        assert 0.01 < error(dx, want_dx) < BOUND

    @KINDS
    def test_residual_mlp_matches_reference(self, kind):
        (_, first, b1), (_, second, b2) = linear(3072, 768), linear(768, 3072, seed=3)
        norm = (1 + 0.1 * randn(768, seed=5), randn(768, seed=6))
        pair = tuple(randn(25, 197, 768, seed=i, dtype=torch.bfloat16) for i in range(2))
        arguments = (norm, 1e-6, 1.0, first, b1, second, b2, kind)
        got, want = (run(m.residual_mlp, pair, *arguments) for m in (kernels, reference))
        for one, other in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            assert error(one, other) < 3e-2

    def test_fp8_is_captured_in_a_graph(self):
        (_, first, b1), (_, second, b2) = linear(3072, 768), linear(768, 3072, seed=3)
        norm = (1 + 0.1 * randn(768, seed=5), randn(768, seed=6))
        arguments = (norm, 1e-6, 1.0, first, b1, second, b2, "gelu")
        flow = randn(40, 768, seed=9, dtype=torch.bfloat16)

        def step(x, branch):
            x, branch = x.detach().requires_grad_(), branch.detach().requires_grad_()
            s, y = kernels.residual_mlp(x, branch, *arguments)
            return s, y, *torch.autograd.grad((s, y), (x, branch), (flow, flow))

        pair = [randn(40, 768, seed=i, dtype=torch.bfloat16) for i in range(2)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step(*pair)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step(*pair)
        for x in pair:
            x.normal_()
        graph.replay()
        torch.testing.assert_close(got, step(*pair))

    @pytest.mark.parametrize("sparsity", [0.0, 0.5])
    def test_meta_training_step_is_within_16_of_bf16(self, sparsity):
        config = MetaConfig(
            steps=4, ways=3, queries=2, tasks=4, sparsity=sparsity, start="zero",
            resolution=(0, 0), masked_resolution=(0, 0),
        )  # fmt: skip
        vit, pool = toys.vit().to(DEVICE), toys.pool()
        losses = {}
        for precision, backend in (("fp32", "reference"), ("bf16", "triton"), ("fp8", "triton")):
            trainer = MetaTrainer(vit, pool, config, precision=precision, backend=backend)
            losses[precision] = torch.stack([trainer.step()["loss"].float() for _ in range(4)])
        assert losses["fp8"].isfinite().all()
        apart = {k: float((v - losses["fp32"]).norm()) for k, v in losses.items()}
        assert apart["fp8"] <= 16 * apart["bf16"] + 2e-2 * float(losses["fp32"].norm())

    def test_inversion_and_embedding_run_in_fp8(self):
        vit = toys.vit().to(DEVICE)
        config = InversionConfig(images_per_class=1, iterations=2)
        stack = [toys.lora(i) for i in range(2)]
        prior = toys.prior().to(DEVICE)
        losses = [
            InversionGroup(
                vit, stack, [0, 1], prior, config, precision=precision, backend="triton"
            ).step()["loss"].float()
            for precision in ("bf16", "fp8")
        ]  # fmt: skip
        torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.1)
        images = randn(4, 3, 16, 16, seed=1)
        for lora in (None, toys.lora()):
            embed = [
                Embedder(vit, lora, precision=p, backend="triton")(images) for p in ("bf16", "fp8")
            ]
            assert error(embed[1], embed[0]) < 0.2

    def test_lora_is_never_rounded_to_float8(self):
        """A stack on q and v trains: its gradients are near those of bf16."""
        vit, images = toys.vit().to(DEVICE), randn(4, 3, 16, 16, seed=1)
        gradients = []
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            stack = LoRAStack.of([toys.lora()]).to(device=DEVICE)
            leaves = [x.requires_grad_() for x in (*stack.a.values(), *stack.b.values())]
            with torch.autocast("cuda", torch.bfloat16):
                y = vit.prepared(dtype)(images, stack, impl="triton").float()
            gradients.append(torch.autograd.grad((y * randn(*y.shape, seed=5)).sum(), leaves))
        for half, eight in zip(*gradients, strict=True):
            assert error(eight, half) < 0.3

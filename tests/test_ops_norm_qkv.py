"""norm_qkv: against `residual_norm` and `lora_qkv` of the reference, one after the other."""

import pytest
import torch

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import lora_qkv, reference, residual_norm
from fastrecycle_kernels import norm_qkv as kernels
from test_ops_lora_qkv import F32, error, inputs, randn

from fastrecycle import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
EPS = 1e-5
RANKS = {"q": 4, "v": 4}


def one_by_one(x, branch, norm, eps, scale, weight, bias, lora, index):
    s, n = reference.residual_norm(x, branch, *norm, eps, scale)
    return s, reference.lora_qkv(n, weight, bias, lora, index)


def case(images, tokens, width, ranks=RANKS, g=1, bias=True, branch=True, dtype=torch.float32):
    x, weight, bias, lora = inputs(images, tokens, width, ranks, g, bias, dtype=dtype)
    norm = (1 + 0.3 * randn(width, seed=31), 0.3 * randn(width, seed=32))
    return x, randn(*x.shape, seed=33, dtype=dtype) if branch else None, norm, weight, bias, lora


def results(function, x, branch, norm, weight, bias, lora, scale=1.0, to=None, through="both"):
    """s, y and the gradients of x, branch, a and b; computed in `to` where a dtype is given."""
    cast = lambda t: None if t is None else t.to(to or t.dtype)  # noqa: E731
    x, branch, weight, bias = (cast(t) for t in (x, branch, weight, bias))
    norm = tuple(cast(t) if to == torch.float64 else t for t in norm)
    lora = {t: tuple(map(cast, f)) for t, f in lora.items()}
    leaves = [t.detach().requires_grad_() for t in (x, branch) if t is not None]
    factors = {t: (*(v.detach().requires_grad_() for v in f[:2]), f[2]) for t, f in lora.items()}
    leaves += [v for f in factors.values() for v in f[:2]]
    second = leaves[1] if branch is not None else None
    outputs = function(leaves[0], second, norm, EPS, scale, weight, bias, factors, None)
    flows = [randn(*o.shape, seed=40 + i, dtype=o.dtype) for i, o in enumerate(outputs)]
    used = [i for i, name in enumerate(("stream", "y")) if through in ("both", name)]
    gradients = torch.autograd.grad(
        [outputs[i] for i in used], leaves, [flows[i] for i in used], allow_unused=True
    )
    return [*(o.detach() for o in outputs), *gradients]


def assert_matches(arguments, **options):
    got, want = (results(f, *arguments, **options) for f in (kernels.norm_qkv, one_by_one))
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            assert error(one, other) <= 2 * F32


def assert_as_exact_as_eager(arguments):
    dtype = arguments[0].dtype
    got = results(kernels.norm_qkv, *arguments)
    rough = results(one_by_one, *arguments, to=dtype)
    exact = results(one_by_one, *arguments, to=torch.float64)
    for i, (one, eager, want) in enumerate(zip(got, rough, exact, strict=True)):
        assert error(one, want) <= 2 * error(eager, want), i


# ------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(
    ("images", "tokens", "width", "ranks", "g"),
    [
        (2, 5, 32, RANKS, 1),
        (1, 1, 48, {"k": 1}, 1),
        (3, 17, 64, {"q": 16, "k": 2, "v": 3}, 3),
        (1, 197, 32, {"q": 1, "v": 1}, 1),
        (4, 9, 32, {"q": 40, "v": 40}, 2),  # above what one sweep takes
    ],
)
def test_norm_qkv_matches_reference(images, tokens, width, ranks, g, branch):
    assert_matches(case(images, tokens, width, ranks, g, branch=branch))


@pytest.mark.parametrize("options", [{"scale": 0.5}, {"through": "y"}, {"through": "stream"}])
def test_norm_qkv_matches_reference_with(options):
    assert_matches(case(2, 7, 32), **options)
    assert_matches(case(2, 7, 32, bias=False), **options)


def test_half_precision_is_as_exact_as_eager():
    assert_as_exact_as_eager(case(2, 37, 64, g=2, dtype=torch.float16))


def test_normalised_rows_are_not_kept():
    """Nothing of x's size is saved but the stream; the two operations save two such tensors."""

    def kept(function):
        x, branch, norm, weight, bias, lora = case(2, 37, 32)
        lora = {t: (f[0].requires_grad_(), f[1].requires_grad_(), f[2]) for t, f in lora.items()}
        found = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (found.append(t.numel()), t)[1], lambda t: t
        ):
            function(x, branch, norm, EPS, 1.0, weight, bias, lora, None)
        return sum(n == x.numel() for n in found)

    def apart(x, branch, norm, eps, scale, weight, bias, lora, index):
        s, n = residual_norm.residual_norm(x.requires_grad_(), branch, *norm, eps, scale)
        return s, lora_qkv.lora_qkv(n, weight, bias, lora, index)

    assert kept(kernels.norm_qkv) == 1
    assert kept(apart) == 2


def test_without_training_factors_or_shares_it_is_the_two_operations():
    x, branch, norm, weight, bias, lora = case(3, 5, 32, g=2)
    index = torch.tensor([1, 0, 1], device=DEVICE)
    got = kernels.norm_qkv(x, branch, norm, EPS, 1.0, weight, bias, lora, index)
    want = one_by_one(x, branch, norm, EPS, 1.0, weight, bias, lora, index)
    for one, other in zip(got, want, strict=True):
        assert error(one, other) <= 2 * F32


# ------------------------------------------------------------------ errors


def test_rejects_what_the_parts_reject():
    x, branch, norm, weight, bias, lora = case(3, 5, 32, g=2)
    lora = {t: (f[0].requires_grad_(), f[1], f[2]) for t, f in lora.items()}

    def call(x=x, branch=branch, weight=weight):
        kernels.norm_qkv(x, branch, norm, EPS, 1.0, weight, bias, lora, None)

    with pytest.raises(ValueError, match="3 images are no equal shares for 2 LoRAs"):
        call()
    with pytest.raises(ValueError, match="weight is frozen"):
        call(weight=weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="branch must have shape"):
        call(branch=branch[:2])
    gate = (torch.ones(3, 1, 32, device=DEVICE), torch.ones(3, 1, device=DEVICE))
    gated = {"q": ops.GatedLowRank(*(v[:1] for v in lora["q"]), *gate)}
    with pytest.raises(ValueError, match="gated LoRAs have no kernel"):
        ops.norm_qkv(x, branch, norm, weight, bias, gated, eps=EPS, impl="triton")


# ------------------------------------------------------------------ as operators


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("branch", [True, False])
def test_norm_qkv_is_a_proper_operator(branch):
    x, more, norm, weight, bias, lora = case(2, 5, 32, branch=branch)
    a, b, scale = ([f[i] for f in lora.values()] for i in range(3))
    leaves = [t.requires_grad_() if t is not None else None for t in (x, more)]
    arguments = (*leaves, *norm, EPS, 1.0, weight, bias)
    for factor in (*a, *b):
        factor.requires_grad_()
    torch.library.opcheck(kernels._norm_qkv, (*arguments, a, b, scale, [0, 2]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_norm_qkv_traces_whole():
    arguments = case(2, 5, 32)
    traced = torch.compile(kernels.norm_qkv, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        results(traced, *arguments), results(kernels.norm_qkv, *arguments), strict=True
    ):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------ other GPUs


def launches(arch):
    for width in (192, 768):
        x, branch, norm, weight, bias, lora = case(2, 5, width, dtype=torch.bfloat16)
        a, b, scale = ([f[i] for f in lora.values()] for i in range(3))
        s, y, mean, rstd, merged = kernels._norm_qkv(
            x, branch, *norm, EPS, 1.0, weight, bias, a, b, scale, [0, 2]
        )
        kernels._norm_qkv_backward(
            y, s, s, *norm, mean, rstd, 1.0, merged, a, b, scale, [0, 2], x.dtype, None
        )


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_norm_qkv_builds_for_every_gpu(arch):
    found = aot_launches.compiled_launches("test_ops_norm_qkv:launches", arch)
    aot_launches.assert_fit(found)
    assert {"_forward", "_backward", "_merge", "_sweep"} <= {x.kernel for x in found}


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@on_gpu
class TestOnGPU:
    @pytest.mark.parametrize("g", [1, 4])
    @pytest.mark.parametrize("branch", [True, False])
    @pytest.mark.parametrize("width", [192, 768])
    def test_bf16_is_as_exact_as_eager(self, width, branch, g):
        assert_as_exact_as_eager(case(4, 197, width, g=g, branch=branch, dtype=torch.bfloat16))

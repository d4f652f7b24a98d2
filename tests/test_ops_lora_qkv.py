"""lora_qkv: its three methods against the reference; in Triton's interpreter where no GPU is.

Errors are |got - want| / |want| over a whole tensor. In float32, sums of some hundred products in
another order agree to ten roundings, 1e-6. In half precision the reference in float64 is the truth,
and no method may be more than twice as far from it as eager PyTorch in that precision is.
"""

import pytest
import torch

pytest.importorskip("triton")
import aot
import aot_launches
from fastrecycle_kernels import lora_qkv as kernels
from fastrecycle_kernels import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
METHODS = ("loop", "pass", "merge")
F32 = 1e-6


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def inputs(images, tokens, width, ranks, g=1, bias=True, seed=0, dtype=torch.float32):
    """x, W and bias in a dtype, and float32 LoRAs that change the output as much as W does."""
    lora = {}
    for i, (target, rank) in enumerate(ranks.items()):
        a = randn(g, rank, width, seed=seed + 10 + i) / width**0.5
        b = randn(g, width, rank, seed=seed + 20 + i) / rank**0.5
        lora[target] = (a, b, torch.linspace(0.5, 2, g, device=DEVICE))
    return (
        randn(images, tokens, width, seed=seed + 1, dtype=dtype),
        randn(3 * width, width, seed=seed + 2, dtype=dtype) / width**0.5,
        randn(3 * width, seed=seed + 3, dtype=dtype) if bias else None,
        lora,
    )


def results(function, x, weight, bias, lora, index, dy, dtype=None):
    """Output and gradients of x, a and b; computed in `dtype` where one is given."""
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    leaves = {t: [v.detach().requires_grad_() for v in f[:2]] for t, f in lora.items()}
    cast = {
        t: tuple(v if dtype is None else v.to(dtype) for v in (*leaves[t], lora[t][2]))
        for t in lora
    }
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    y = function(x, weight, bias, cast, index)
    flat = [x, *(v for f in leaves.values() for v in f)]
    return [y.detach(), *torch.autograd.grad(y, flat, dy.to(y.dtype))]


def error(got, want):
    want = want.double()
    return ((got.double() - want).norm() / want.norm()).item()


def assert_matches(method, case, index=None, seed=7):
    """In float32."""
    x = case[0]
    dy = randn(*x.shape[:2], 3, x.shape[2], seed=seed)
    ours = results(lambda *args: kernels.lora_qkv(*args, method=method), *case, index, dy)
    want = results(reference.lora_qkv, *case, index, dy)
    for got, exact in zip(ours, want, strict=True):
        assert got.shape == exact.shape
        assert got.dtype == exact.dtype
        assert error(got, exact) <= F32


def assert_as_exact_as_eager(method, case, index=None):
    x = case[0]
    dy = randn(*x.shape[:2], 3, x.shape[2], seed=7, dtype=x.dtype)
    ours = results(lambda *args: kernels.lora_qkv(*args, method=method), *case, index, dy)
    eager = results(reference.lora_qkv, *case, index, dy, x.dtype)
    want = results(reference.lora_qkv, *case, index, dy, torch.float64)
    assert ours[0].dtype == x.dtype
    for i, (got, rough, exact) in enumerate(zip(ours, eager, want, strict=True)):
        assert error(got, exact) <= 2 * error(rough, exact), i


# ------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "ranks",
    [{"q": 4, "v": 4}, {"k": 1}, {"q": 16, "k": 1, "v": 17}, {"v": 64}],
    ids=lambda r: "_".join(f"{t}{n}" for t, n in r.items()),
)
def test_lora_qkv_matches_reference(method, ranks):
    assert_matches(method, inputs(2, 37, 64, ranks))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("images", "tokens", "width"),
    [(1, 1, 16), (1, 197, 64), (3, 70, 48), (1, 300, 32)],  # 300: in more than one part
)
def test_lora_qkv_matches_reference_at_any_size(method, images, tokens, width):
    assert_matches(method, inputs(images, tokens, width, {"q": 4, "v": 2}, bias=False))


@pytest.mark.parametrize(
    ("tokens", "index"),
    [
        (7, [2, 0, 1, 1, 2]),  # a tile spans all images
        (37, [0, 0, 1, 1, 2]),
        (97, [3, 0]),  # LoRAs 1 and 2 go unused: no gradient
        (1, [0, 1, 1, 0, 2, 2, 2]),
        (70, [1, 1]),
    ],
)
def test_lora_qkv_of_many_loras_matches_reference(tokens, index):
    ranks = {"q": 4, "k": 3, "v": 16}
    case = inputs(len(index), tokens, 32, ranks, g=4)
    assert_matches("pass", case, torch.tensor(index, device=DEVICE))


SHARES = [
    (6, 37, 32, {"q": 4, "v": 4}, 3),
    (4, 1, 16, {"q": 1, "k": 3, "v": 2}, 4),
    (2, 150, 48, {"v": 17}, 2),  # a share in more than one block of rows
    (4, 20, 32, {"q": 16, "k": 3, "v": 16}, 2),  # more ranks than one sweep takes
]


@pytest.mark.parametrize("method", ["merge", "pass"])
@pytest.mark.parametrize(("images", "tokens", "width", "ranks", "g"), SHARES)
def test_lora_qkv_of_equal_shares_matches_reference(method, images, tokens, width, ranks, g):
    case = inputs(images, tokens, width, ranks, g, bias=g != 3)
    assert_matches(method, case)
    index = torch.arange(g, device=DEVICE).repeat_interleave(images // g)
    want = reference.lora_qkv(*case, index)
    assert error(kernels.lora_qkv(*case, None, method=method), want) <= F32


def test_lora_qkv_of_equal_shares_in_float16_is_as_exact_as_eager():
    assert_as_exact_as_eager("merge", inputs(4, 37, 64, {"q": 4, "v": 4}, 2, dtype=torch.float16))


@pytest.mark.parametrize(
    "sweep", [(16, 16, 4, 2), (32, 64, 4, 3), (256, 32, 8, 2), (16, 16, 4, 2, True)]
)
@pytest.mark.parametrize("g", [1, 3])
def test_gradient_of_factors_is_the_same_however_it_is_cut(sweep, g, monkeypatch):
    monkeypatch.setattr(kernels, "SWEEP", kernels.Sweep(*sweep))
    monkeypatch.setattr(kernels, "SUM_PARTS", 4)
    case = inputs(3, 37, 64, {"q": 4, "k": 1, "v": 4}, g, dtype=torch.float16)
    assert_as_exact_as_eager("merge", case)


def test_lora_qkv_ignores_the_index_of_one_lora():
    case = inputs(2, 5, 16, {"q": 4})
    assert_matches("merge", case, torch.zeros(2, dtype=torch.int64, device=DEVICE))


@pytest.mark.parametrize("method", METHODS)
def test_lora_qkv_in_float16_is_as_exact_as_eager(method):
    assert_as_exact_as_eager(method, inputs(2, 37, 64, {"q": 4, "v": 4}, dtype=torch.float16))


def test_lora_qkv_of_many_loras_in_float16_is_as_exact_as_eager():
    case = inputs(3, 37, 64, {"q": 4, "v": 4}, g=3, dtype=torch.float16)
    assert_as_exact_as_eager("pass", case, torch.tensor([2, 0, 0], device=DEVICE))


@pytest.mark.parametrize("tile", [{"flatten": True}, {"halves": False}, {"persistent": False}])
@pytest.mark.parametrize("g", [1, 3])
def test_lora_qkv_is_the_same_however_it_is_cut(tile, g, monkeypatch):
    for name in ("FORWARD", "INPUT_GRAD"):
        monkeypatch.setattr(kernels, name, kernels.Tile(32, 64, 16, 4)._replace(**tile))
    case = inputs(3, 37, 64, {"q": 4, "v": 4}, g=g, dtype=torch.float16)
    index = None if g == 1 else torch.tensor([2, 0, 0], device=DEVICE)
    for method in ("pass", "loop") if g == 1 else ("pass",):
        assert_as_exact_as_eager(method, case, index)


@pytest.mark.parametrize("method", METHODS)
def test_lora_qkv_padding_gets_no_gradient(method):
    """What keeps a LoRA of rank 1 at rank 1 beside one of rank 3."""
    x, weight, bias, lora = inputs(2, 5, 16, {"q": 3})
    a, b, scale = lora["q"]
    a[:, 1:], b[:, :, 1:] = 0, 0
    a.requires_grad_(), b.requires_grad_()
    y = kernels.lora_qkv(x, weight, bias, {"q": (a, b, scale)}, None, method=method)
    y.square().sum().backward()
    assert not a.grad[:, 1:].any()
    assert not b.grad[:, :, 1:].any()
    assert a.grad[:, 0].any()
    assert b.grad[:, :, 0].any()


@pytest.mark.parametrize(("method", "g"), [*((m, 1) for m in METHODS), ("merge", 2)])
@pytest.mark.parametrize("trained", ["x", "factors", "a", "nothing"])
def test_lora_qkv_gradient_of_some_inputs(method, g, trained):
    x, weight, bias, lora = inputs(2, 5, 16, {"q": 3, "v": 2}, g)
    leaves = []
    if trained == "x":
        leaves = [x]
    elif trained != "nothing":
        leaves = [v for f in lora.values() for v in (f[:2] if trained == "factors" else f[:1])]
    for leaf in leaves:
        leaf.requires_grad_()
    y = kernels.lora_qkv(x, weight, bias, lora, None, method=method)
    assert y.requires_grad == bool(leaves)
    want = reference.lora_qkv(x, weight, bias, lora, None)
    if leaves:
        dy = randn(*y.shape, seed=3)
        for got, exact in zip(*(torch.autograd.grad(v, leaves, dy) for v in (y, want))):
            assert error(got, exact) <= F32


@pytest.mark.parametrize(("method", "g"), [*((m, 1) for m in METHODS), ("merge", 2), ("pass", 2)])
def test_lora_qkv_of_no_image(method, g):
    x, weight, bias, lora = inputs(0, 5, 16, {"q": 3, "v": 2}, g)
    leaves = [x, *(v for f in lora.values() for v in f[:2])]
    for leaf in leaves:
        leaf.requires_grad_()
    y = kernels.lora_qkv(x, weight, bias, lora, None, method=method)
    assert y.shape == (0, 5, 3, 16)
    dx, *factors = torch.autograd.grad(y.sum(), leaves)
    assert dx.shape == x.shape
    assert not any(v.any() for v in factors)


@pytest.mark.parametrize("method", METHODS)
def test_lora_qkv_takes_any_memory(method):
    x, weight, bias, lora = inputs(2, 6, 32, {"q": 4})
    a, b, scale = lora["q"]
    other = {"q": (a.mT.contiguous().mT, torch.stack((b, b), 1)[:, 0], scale)}
    wide = torch.stack((x, x), 2)
    assert_matches(method, (wide[:, :, 0], weight.mT.contiguous().mT, bias, other))
    leaf = x.clone().requires_grad_()  # and so does its backward
    dy = randn(32, 3, 6, 2, seed=5).permute(3, 2, 1, 0)
    y = kernels.lora_qkv(leaf, weight, bias, lora, None, method=method)
    want = reference.lora_qkv(leaf, weight, bias, lora, None)
    got, exact = (torch.autograd.grad(v, leaf, dy)[0] for v in (y, want))
    assert error(got, exact) <= F32


def test_lora_qkv_of_many_loras_takes_any_memory():
    x, weight, bias, lora = inputs(3, 5, 16, {"q": 4, "v": 2}, g=3)
    stacked = {}  # (G, L, R, D), as a bank stands in memory: a block's LoRAs are not contiguous
    for target, factors in lora.items():
        stacked[target] = tuple(torch.stack((v, v), 1)[:, 1] for v in factors)
    index = torch.tensor([2, 9, 0, 9, 1], device=DEVICE)[::2]
    spread = torch.stack((bias, bias), 1)[:, 0]
    shifted = torch.cat((weight.new_zeros(1), weight.flatten()))[1:].view(weight.shape)
    assert_matches("pass", (x, shifted, spread, stacked), index)
    assert_matches("merge", (x.mT.contiguous().mT, shifted, spread, stacked))


def test_lora_qkv_without_loras_is_the_plain_product():
    x, weight, bias, _ = inputs(2, 5, 16, {})
    got = kernels.lora_qkv(x, weight, bias, {}, None)
    assert torch.equal(got, reference.lora_qkv(x, weight, bias, {}, None))


def test_merged_weight_is_weight_and_change():
    _, weight, _, lora = inputs(1, 1, 48, {"q": 4, "v": 20})
    want = weight.clone()
    for place, target in ((0, "q"), (96, "v")):
        a, b, scale = lora[target]
        want[place : place + 48] += scale[0] * b[0] @ a[0]
    got = kernels.merged_weight(weight, lora)
    assert error(got, want) <= F32
    assert torch.equal(got[48:96], weight[48:96])
    assert kernels.merged_weight(weight, {}) is weight


@pytest.mark.parametrize("method", METHODS)
def test_lora_qkv_under_autocast_keeps_gradients_of_factors_in_float32(method):
    x, weight, bias, lora = inputs(2, 5, 16, {"q": 4})
    leaves = [x.requires_grad_(), *(v.requires_grad_() for v in lora["q"][:2])]
    with torch.autocast(DEVICE.type, torch.float16):
        y = kernels.lora_qkv(x, weight, bias, lora, None, method=method)
    assert y.dtype == torch.float16
    want = reference.lora_qkv(x, weight, bias, lora, None)
    assert error(y, want) < 2e-3  # 11 bits
    for got, exact in zip(*(torch.autograd.grad(v.float().sum(), leaves) for v in (y, want))):
        assert got.dtype == torch.float32
        assert error(got, exact) < 2e-3


@pytest.mark.parametrize(("method", "g"), [*((m, 1) for m in METHODS), ("merge", 2)])
def test_lora_qkv_is_the_same_each_time(method, g):
    case = inputs(2, 150, 32, {"q": 4, "v": 4}, g)
    dy = randn(2, 150, 3, 32, seed=3)
    runs = [
        results(lambda *args: kernels.lora_qkv(*args, method=method), *case, None, dy)
        for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs))


def test_rejects_what_the_kernels_cannot_do():
    x, weight, bias, lora = inputs(2, 5, 16, {"q": 4})
    index = torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(ValueError, match="weight is frozen here, but its gradient is asked for"):
        kernels.lora_qkv(x, weight.clone().requires_grad_(), bias, lora, None)
    with pytest.raises(ValueError, match="bias is frozen here"):
        kernels.lora_qkv(x, weight, bias.clone().requires_grad_(), lora, None)
    a, b, scale = lora["q"]
    with pytest.raises(ValueError, match="scale is frozen here"):
        kernels.lora_qkv(x, weight, bias, {"q": (a, b, scale.clone().requires_grad_())}, None)
    with torch.no_grad():  # nothing is asked for
        kernels.lora_qkv(x, weight.clone().requires_grad_(), bias, lora, None)
    many = inputs(2, 5, 16, {"q": 4}, g=2)
    with pytest.raises(ValueError, match='"merge" takes no index; use "pass"'):
        kernels.lora_qkv(*many, index, method="merge")
    with pytest.raises(ValueError, match='"loop" takes one LoRA, got 2; use "pass"'):
        kernels.lora_qkv(*many, None, method="loop")
    with pytest.raises(ValueError, match="2 images are no equal shares for 3 LoRAs"):
        kernels.lora_qkv(*inputs(2, 5, 16, {"q": 4}, g=3), None)
    with pytest.raises(ValueError, match="ranks up to 64 are supported, got 65"):
        kernels.lora_qkv(*inputs(1, 2, 16, {"q": 65}), None)
    with pytest.raises(ValueError, match="width must be a multiple of 16, got 24"):
        kernels.lora_qkv(*inputs(1, 2, 24, {"q": 4}), None)


# ------------------------------------------------------------------ as operators


@pytest.mark.filterwarnings("ignore")  # opcheck looks at .grad of what is no leaf
@pytest.mark.parametrize(("method", "g"), [*((m, 1) for m in METHODS), ("merge", 2)])
def test_lora_qkv_is_a_proper_operator(method, g):
    x, weight, bias, lora = inputs(2, 5, 16, {"q": 3, "v": 2}, g)
    a, b, scale = ([f[i] for f in lora.values()] for i in range(3))
    x.requires_grad_()
    for leaf in (*a, *b):
        leaf.requires_grad_()
    torch.library.opcheck(kernels._lora_qkv, (x, weight, bias, a, b, scale, None, [0, 2], method))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("many", [False, True])
def test_lora_qkv_gradients_are_proper_operators(many):
    x, weight, _, lora = inputs(2, 5, 16, {"q": 3, "v": 2}, g=2 if many else 1)
    index = torch.tensor([1, 0], device=DEVICE) if many else None
    dy = randn(2, 5, 48)
    factors = (*([f[i] for f in lora.values()] for i in range(3)), index, [0, 2])
    torch.library.opcheck(kernels._lora_qkv_input_grad, (dy, weight, *factors, not many))
    torch.library.opcheck(kernels._lora_qkv_project, (x, *factors, False))
    torch.library.opcheck(kernels._lora_qkv_project, (dy, *factors, True))
    low_x = kernels._lora_qkv_project(x, *factors, False)
    low_dy = kernels._lora_qkv_project(dy, *factors, True)
    torch.library.opcheck(kernels._lora_qkv_factor_grad, (dy, x, low_x, low_dy, *factors))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("rank", [3, 40])
def test_fused_gradient_of_factors_is_a_proper_operator(g, rank):
    x, _, _, lora = inputs(2, 5, 16, {"q": rank, "v": 2}, g)
    factors = ([f[i] for f in lora.values()] for i in range(3))
    dy = randn(2, 5, 48)
    torch.library.opcheck(kernels._lora_qkv_fused_factor_grad, (dy, x, *factors, [0, 2]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "g"), [*((m, 1) for m in METHODS), ("merge", 2)])
@pytest.mark.parametrize("trained", ["x", "factors", "both"])
def test_lora_qkv_traces_as_one_graph(method, g, trained):
    x, weight, bias, lora = inputs(2, 5, 16, {"q": 3, "v": 2}, g)
    factors = [v for f in lora.values() for v in f[:2]]
    leaves = {"x": [x], "factors": factors, "both": [x, *factors]}[trained]
    for leaf in leaves:
        leaf.requires_grad_()

    def run(x):
        with torch.autocast(DEVICE.type, torch.float16):
            y = kernels.lora_qkv(x, weight, bias, lora, None, method=method)
        return y.float().square().sum()

    torch._dynamo.reset()
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(*(torch.autograd.grad(f(x), leaves) for f in (traced, run))):
        assert torch.equal(got, want)


# ------------------------------------------------------------------ other GPUs


def launches(arch):
    """ViT-B's width with rank 4, and ViT-Ti's with the largest."""
    chip = kernels.Chip(arch // 10, 132, aot.SHARED_BYTES[arch])
    kernels._chip = lambda device: chip
    for dtype, width, rank in (
        (torch.bfloat16, 768, 4),
        (torch.bfloat16, 192, 64),
        (torch.float32, 768, 4),
    ):
        for g in (1, 3):
            x, weight, bias, lora = inputs(2, 197, width, {"q": rank, "v": rank}, g, dtype=dtype)
            index = None if g == 1 else torch.zeros(2, dtype=torch.int64)
            factors = (*([f[i] for f in lora.values()] for i in range(3)), index, [0, 2])
            dy = torch.empty(2, 197, 3 * width, dtype=dtype)
            for method in METHODS if g == 1 else ("pass",):
                kernels._lora_qkv(x, weight, bias, *factors, method)
                if method != "merge":
                    kernels._lora_qkv_input_grad(dy, weight, *factors, method == "loop")
            low = kernels._lora_qkv_project(x, *factors, False)
            kernels._lora_qkv_factor_grad(dy, x, low, low, *factors)
            if g == 1:
                kernels._lora_qkv_fused_factor_grad(dy, x, *factors[:3], [0, 2])
    for images, tokens in ((2, 5), (100, 197)):
        for ranks in ({"q": 4, "v": 4}, {"q": 8, "k": 8, "v": 16}):
            x, weight, _, lora = inputs(images, tokens, 768, ranks, 2, dtype=torch.bfloat16)
            f = kernels._factors(
                *([f[i] for f in lora.values()] for i in range(3)), ["qkv".index(t) for t in ranks]
            )
            kernels.launch_merge(weight, f)
            rows = x.view(-1, 768)
            dy = rows.new_empty(len(rows), 2304)
            kernels.launch_fused_factor_grad(dy, rows, f)
    if arch == 90:  # elsewhere shared memory may not hold x
        packed = kernels.launch_pack_all(f, 768, torch.bfloat16)
        kernels.launch_sweep(dy, rows, packed, f, kernels.Sweep(64, 128, 8, 2, keep=True))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_lora_qkv_builds_for_every_gpu(arch):
    found = aot_launches.compiled_launches("test_ops_lora_qkv:launches", arch)
    aot_launches.assert_fit(found)
    products = [x for x in found if x.kernel in ("_forward", "_input_grad")]
    assert len(products) == 18  # three methods (merge has none of its own), forward and backward
    if arch == 90:
        assert sum(x.warpgroup_products > 0 for x in products) == 12  # all but float32's
        assert not any(x.stack_bytes for x in products if x.warpgroup_products)
        assert all(x.bulk_copies for x in products)
    sweeps = [x for x in found if x.kernel == "_sweep"]
    assert len(sweeps) == 3 + (arch == 90)
    if arch == 90:
        fast = [x for x in sweeps if x.warpgroup_products]
        assert len(fast) == len(sweeps) - 1  # all but float32's
        assert not any(x.stack_bytes for x in fast)


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@on_gpu
class TestOnGPU:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("images_tokens", [(25, 197), (100, 50)])
    @pytest.mark.parametrize("rank", [4, 16, 64])
    def test_bf16_is_as_exact_as_eager(self, method, images_tokens, rank):
        ranks = {"q": rank, "v": rank}
        case = inputs(*images_tokens, 768, ranks, dtype=torch.bfloat16)
        assert_as_exact_as_eager(method, case)

    @pytest.mark.parametrize("width", [192, 512, 768])
    def test_bf16_of_many_loras_is_as_exact_as_eager(self, width):
        ranks = {"q": 4, "k": 8, "v": 1}
        case = inputs(24, 197, width, ranks, g=8, dtype=torch.bfloat16)
        for index in (
            torch.arange(8).repeat_interleave(3),
            torch.randint(8, (24,), generator=torch.Generator().manual_seed(0)),
        ):
            assert_as_exact_as_eager("pass", case, index.cuda())

    @pytest.mark.parametrize("width", [192, 768])
    @pytest.mark.parametrize("ranks", [{"q": 4, "v": 4}, {"q": 16, "k": 1, "v": 15}, {"v": 64}])
    def test_bf16_of_equal_shares_is_as_exact_as_eager(self, width, ranks):
        case = inputs(24, 197, width, ranks, g=4, dtype=torch.bfloat16)
        assert_as_exact_as_eager("merge", case)

    @pytest.mark.parametrize("images_tokens", [(1, 5), (25, 197), (100, 197)])
    @pytest.mark.parametrize("sweep", [(128, 64, 8, 4), (64, 128, 4, 4), (64, 128, 8, 3, True)])
    def test_bf16_gradient_of_factors_by_any_sweep(self, images_tokens, sweep, monkeypatch):
        monkeypatch.setattr(kernels, "SWEEP", kernels.Sweep(*sweep))
        case = inputs(*images_tokens, 768, {"q": 4, "k": 2, "v": 4}, dtype=torch.bfloat16)
        assert_as_exact_as_eager("merge", case)

    @pytest.mark.parametrize("g", [1, 3])
    def test_merge_is_captured_in_a_graph(self, g):
        x, weight, bias, lora = inputs(6, 197, 768, {"q": 4, "v": 4}, g, dtype=torch.bfloat16)
        dy = randn(6, 197, 3, 768, seed=5, dtype=torch.bfloat16)
        leaves = [x.requires_grad_(), *(v.requires_grad_() for f in lora.values() for v in f[:2])]

        def step():
            y = kernels.lora_qkv(x, weight, bias, lora, None)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiled before the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(0.5)
        graph.replay()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)

    @pytest.mark.parametrize("method", METHODS)
    def test_float32_matches_reference(self, method):
        assert_matches(method, inputs(3, 197, 768, {"q": 4, "k": 16, "v": 1}))

    def test_many_loras_are_captured_in_a_graph(self):
        """The index is read on the device: another one may stand there at each replay."""
        x, weight, bias, lora = inputs(6, 197, 768, {"q": 4, "v": 4}, 3, dtype=torch.bfloat16)
        a, b, scale = ([f[i] for f in lora.values()] for i in range(3))
        index = torch.tensor([0, 0, 1, 1, 2, 2], device="cuda")
        dy = randn(6, 197, 2304, seed=5, dtype=torch.bfloat16)
        arguments = (a, b, scale, index, [0, 2])

        def step():
            y, low, _ = kernels._lora_qkv(x, weight, bias, *arguments, "pass")
            dx, low_dy = kernels._lora_qkv_input_grad(dy, weight, *arguments, False)
            da, db = kernels._lora_qkv_factor_grad(dy, x, low, low_dy, *arguments)
            return [y, dx, *da, *db]

        step()  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        index.copy_(torch.tensor([2, 1, 1, 0, 2, 0]))
        graph.replay()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)

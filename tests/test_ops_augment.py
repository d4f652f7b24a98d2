"""augment: the kernels against their reference; in Triton's interpreter where no GPU is.

A float32 result is the reference's to a few roundings. Others stand within the bound that the
kernel's file states, from rounding the maps and the rows' product to float16, and within one
rounding to their own dtype.
"""

import pytest
import torch

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import augment as kernels
from fastrecycle_kernels import reference

from fastrecycle.augment import crop_maps, shrink_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty", "no_tf32")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
LEVEL = 1 / 255  # of grey
DTYPES = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # one rounding, relative


def generator(seed):
    return torch.Generator().manual_seed(seed)


def pool(side, count=4, seed=0):
    shape = (count, 3, side, side)
    return torch.randint(256, shape, generator=generator(seed), dtype=torch.uint8).to(DEVICE)


def drawn(batch, below, seed=1):
    return torch.randint(below, (batch,), generator=generator(seed)).to(DEVICE)


def mirror(batch):
    return (torch.arange(batch) % 2 == 0).to(DEVICE)


def shrinks(side):
    return shrink_table(side, max(2, side // 9), side // 2).to(DEVICE)


def crops(side, batch, seed=3):
    scale = 0.4 + 0.6 * torch.rand(batch, generator=generator(seed))
    start = torch.rand(2, batch, generator=generator(seed + 1)) * (1 - scale)
    return [crop_maps(scale, offset, side).to(DEVICE) for offset in start]


def arguments(side, batch=3, kind="shrink"):
    images, rows, flip = pool(side), drawn(batch, 4), mirror(batch)
    if kind == "plain":
        return images, rows, None, None, None, flip, MEAN, STD
    if kind == "crop":
        return images, rows, *crops(side, batch), None, flip, MEAN, STD
    table = shrinks(side)
    return images, rows, table, table, drawn(batch, len(table), seed=2), flip, MEAN, STD


def bound(args, dtype):
    """How far from the reference a result may lie, number by number, and the reference."""
    want = reference.augment(*args, torch.float32)
    allowed = DTYPES[str(dtype)[6:]] * want.abs() + 2e-5
    if args[2] is not None and dtype != torch.float32:
        rho = [m.abs().sum(2).max() for m in args[2:4]]
        allowed = allowed + ((1 + 2.0**-11) ** 3 - 1) * rho[0] * rho[1] / min(STD)
    return allowed, want


def assert_matches(args, dtype):
    got = kernels.augment(*args, dtype)
    allowed, want = bound(args, dtype)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert ((got.float() - want).abs() <= allowed).all()


# ------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("kind", ["shrink", "crop"])
@pytest.mark.parametrize("side", [16, 24, 32, 72])
def test_augment_matches_reference(side, kind):
    args = arguments(side, kind=kind)
    got, want = (m.augment(*args, torch.float32) for m in (kernels, reference))
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("kind", ["shrink", "crop"])
@pytest.mark.parametrize("side", [16, 24, 72])
def test_augment_in_float16_stays_within_its_bound(side, kind):
    assert_matches(arguments(side, kind=kind), torch.float16)


def test_augment_in_float16_errs_by_less_than_a_fifth_of_a_grey_level():
    args = list(arguments(72))
    args[6:] = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    got, want = kernels.augment(*args, torch.float16), reference.augment(*args, torch.float32)
    error = (got.float() - want).abs() - 2.0**-11 * want  # the result's own rounding aside
    assert error.max() < 0.2 * LEVEL
    assert error.clamp_min(0).square().mean().sqrt() < 0.03 * LEVEL


@pytest.mark.parametrize("side", [5, 16, 24])
def test_augment_without_maps_is_the_reference(side):
    args = arguments(side, batch=7, kind="plain")
    got, want = (m.augment(*args, torch.float32) for m in (kernels, reference))
    assert torch.equal(got, want)
    got, want = (m.augment(*args, torch.float16) for m in (kernels, reference))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_augment_with_the_identity_changes_nothing(dtype):
    images, rows, *_, flip, mean, std = arguments(24, kind="plain")
    eye = torch.eye(24, device=DEVICE).expand(3, -1, -1)
    got = kernels.augment(images, rows, eye, eye, None, flip, mean, std, dtype)
    want = kernels.augment(images, rows, None, None, None, flip, mean, std, dtype)
    # the one divides by 255 and std, the other multiplies by their inverses
    step = 2.0**-10 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(got, want, rtol=step, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_augment_clamps_only_what_is_mapped(dtype):
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8, device=DEVICE)
    images[..., 8:] = 255
    rows, flip = drawn(1, 1), mirror(1)
    table = 2 * torch.eye(16, device=DEVICE)[None] - 0.25
    unit = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    got = kernels.augment(images, rows, table, table, None, flip, *unit, dtype)
    assert got.min() == 0
    assert got.max() == 1


def test_augment_takes_a_float16_table():
    args = list(arguments(24))
    want = kernels.augment(*args, torch.float16)
    args[2:4] = (m.half() for m in args[2:4])
    assert torch.equal(kernels.augment(*args, torch.float16), want)


def test_augment_takes_any_memory():
    images, rows, table, _, which, flip, *rest = arguments(16, batch=6)
    spread = [torch.stack((t, t), 1)[:, 0] for t in (rows, which, flip)]
    got = kernels.augment(images, spread[0], table, table, *spread[1:], *rest, torch.float32)
    assert torch.equal(
        got, kernels.augment(images, rows, table, table, which, flip, *rest, torch.float32)
    )
    turned = table.mT
    got, want = (
        m.augment(images, rows, turned, table, which, flip, *rest, torch.float32)
        for m in (kernels, reference)
    )
    torch.testing.assert_close(got, want, **CLOSE)
    wide = pool(32)[..., ::2, 16:]
    got, want = (
        m.augment(wide, rows, None, None, None, flip, *rest, torch.float32)
        for m in (kernels, reference)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["shrink", "crop", "plain"])
def test_augment_of_nothing(kind):
    images, rows, r, c, which, flip, *rest = arguments(16, kind=kind)
    which = None if which is None else which[:0]
    if kind == "crop":
        r, c = r[:0], c[:0]
    y = kernels.augment(images, rows[:0], r, c, which, flip[:0], *rest, torch.float32)
    assert y.shape == (0, 3, 16, 16)


def test_augment_is_the_same_each_time():
    args = arguments(24)
    runs = [kernels.augment(*args, torch.float16) for _ in range(2)]
    assert torch.equal(*runs)


def test_augment_says_what_is_wrong():
    images, rows, table, _, which, flip, *rest = arguments(16)
    dtype = torch.float32
    with pytest.raises(ValueError, match="uint8"):
        kernels.augment(images.float(), rows, table, table, which, flip, *rest, dtype)
    with pytest.raises(ValueError, match="neither"):
        kernels.augment(images, rows, table, None, which, flip, *rest, dtype)
    with pytest.raises(ValueError, match="which"):
        kernels.augment(images, rows, table, table, None, flip, *rest, dtype)
    with pytest.raises(ValueError, match="which"):
        kernels.augment(images, rows, table, table, which[:1], flip, *rest, dtype)
    with pytest.raises(ValueError, match="16, 16"):
        kernels.augment(images, rows, table[:, :8], table, which, flip, *rest, dtype)
    with pytest.raises(ValueError, match="flip"):
        kernels.augment(images, rows, table, table, which, flip[:1], *rest, dtype)
    with pytest.raises(ValueError, match="float64"):
        kernels.augment(images, rows, table, table, which, flip, *rest, torch.float64)
    with pytest.raises(ValueError, match="channels"):
        kernels.augment(images, rows, table, table, which, flip, (0.5,), STD, dtype)


# ------------------------------------------------------------------ as an operator


@pytest.mark.parametrize("kind", ["shrink", "crop", "plain"])
def test_augment_is_a_proper_operator(kind):
    args = [list(a) if isinstance(a, tuple) else a for a in arguments(16, kind=kind)]
    torch.library.opcheck(kernels._augment, (*args, torch.float16))


@pytest.mark.filterwarnings("ignore")
def test_augment_traces_as_one_graph():
    images, *rest = arguments(16)

    def call(images):
        return kernels.augment(images, *rest, torch.float32) + 1

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(images), call(images))


# ------------------------------------------------------------------ other GPUs


def launches(arch):
    for side in (64, 224, 384):
        images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
        rows, flip = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
        table = torch.zeros(2, side, side)
        for dtype in (torch.bfloat16, torch.float32):
            kernels._augment(images, rows, None, None, None, flip, MEAN, STD, dtype)
            kernels._augment(images, rows, table, table, rows, flip, MEAN, STD, dtype)
        half = table.half()
        kernels._augment(images, rows, half, half, None, flip, MEAN, STD, torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_augment_builds_for_every_gpu(arch):
    found = aot_launches.compiled_launches("test_ops_augment:launches", arch)
    aot_launches.assert_fit(found)
    assert {x.kernel for x in found} == {"_mapped", "_plain"}
    if arch == 90:
        assert any(x.warpgroup_products for x in found)
    # its products are of an older kind, their operands registers: a few too many
    allowed = 160 if arch == 80 else 0
    assert all((x.stack_bytes or 0) <= allowed for x in found)


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@on_gpu
class TestOnGPU:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("kind", ["shrink", "crop", "plain"])
    @pytest.mark.parametrize("side", [64, 224, 384])
    def test_augment_matches_reference(self, side, kind, dtype):
        assert_matches(arguments(side, batch=10, kind=kind), dtype)

    def test_augment_reaches_beyond_2_31_bytes(self):
        side, count = 224, 2**31 // (3 * 224 * 224) + 9
        images = torch.zeros(count, 3, side, side, dtype=torch.uint8, device="cuda")
        images[-1, :, -1] = 255
        rows = torch.arange(count, device="cuda")
        flip = torch.ones(count, dtype=torch.bool, device="cuda")
        table = torch.eye(side, device="cuda")[None]
        which = torch.zeros_like(rows)
        unit = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        for maps in ((table, table, which), (None, None, None)):
            y = kernels.augment(images, rows, *maps, flip, *unit, torch.bfloat16)
            assert y[-1, :, -1].eq(1).all()
            assert not y[-1, :, :-1].any()
            assert not y[:-1].any()
            del y

    def test_augment_is_captured_in_a_graph(self):
        images, rows, table, _, which, flip, *rest = arguments(224, batch=20)
        args = images, rows, table, table, which, flip, *rest, torch.bfloat16
        kernels.augment(*args)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernels.augment(*args)
        rows.copy_(drawn(20, 4, seed=8)), flip.logical_not_()
        graph.replay()
        assert torch.equal(y, kernels.augment(*args))
        allowed, want = bound(args[:-1], torch.bfloat16)
        assert ((y.float() - want).abs() <= allowed).all()

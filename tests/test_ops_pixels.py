"""jitter_pixels and pixel_step: against rolls, flips and torch.optim.Adam, and their reference.

In Triton's interpreter where no GPU is. Pixels are moved, so `seen` is exact; the prior's
normalisation is one multiply-add where PyTorch has four operations, some roundings of 2^-24 apart.
"""

import sys

import pytest
import torch

pytest.importorskip("triton")
import aot_launches
from fastrecycle_kernels import pixels as kernels
from fastrecycle_kernels import reference

from fastrecycle.jitter import Jitter, gather_pixels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PRIOR_MEAN, PRIOR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMS = (MEAN, STD, PRIOR_MEAN, PRIOR_STD)
LOW, HIGH = (
    tuple((torch.tensor(v) - torch.tensor(MEAN)).div(torch.tensor(STD)).tolist())
    for v in (0.0, 1.0)
)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
# beyond the side, both signs; whole turns; none
SHIFTS = [(2, -3), (-5, 4), (0, 0), (23, -40), (-1, 0), (1000, 14)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed)).to(DEVICE, dtype)


def jitter(tasks, offset=0):
    drawn = [SHIFTS[(i + offset) % len(SHIFTS)] for i in range(tasks)]
    shift = torch.tensor(drawn, dtype=torch.int64)
    flip = torch.arange(tasks) % 2 == offset % 2
    return shift.view(tasks, 2).to(DEVICE), flip.to(DEVICE)


def turned(images, shift, flip):
    """By PyTorch's own roll and flip, task by task."""
    rolled = [
        torch.roll(x, tuple(s.tolist()), (-2, -1)) for x, s in zip(images, shift, strict=True)
    ]
    return torch.stack([x.flip(-1) if f else x for x, f in zip(rolled, flip, strict=True)])


SHAPES = [(1, 2, 16), (3, 2, 13), (4, 1, 7), (2, 3, 33), (1, 1, 1)]  # G, m, S


# ------------------------------------------------------------------ jitter


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_jitter_pixels_rolls_flips_and_normalises(shape, offset):
    tasks, m, side = shape
    images, (shift, flip) = randn(tasks, m, 3, side, side), jitter(tasks, offset)
    seen, natural = kernels.jitter_pixels(images, shift, flip, *NORMS, torch.float32)
    expected = turned(images, shift, flip)
    assert torch.equal(seen, expected)
    mean, std, to_mean, to_std = (torch.tensor(v, device=DEVICE)[:, None, None] for v in NORMS)
    expected = ((expected * std + mean - to_mean) / to_std).flatten(0, 1)
    torch.testing.assert_close(natural, expected, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_jitter_pixels_matches_reference(shape):
    tasks, m, side = shape
    arguments = randn(tasks, m, 3, side, side), *jitter(tasks), *NORMS, torch.float32
    for got, want in zip(*(f.jitter_pixels(*arguments) for f in (kernels, reference)), strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, want, **CLOSE)


def test_jitter_pixels_is_the_jitter_of_inversion():
    images, (shift, flip) = randn(4, 2, 3, 13, 13), jitter(4)
    drawn = Jitter(shift[None], flip[None], torch.zeros(1, 4, dtype=torch.int64, device=DEVICE))
    expected = gather_pixels(images, *drawn.index(torch.zeros(1, dtype=torch.int64).to(DEVICE), 13))
    for code in (kernels, reference):
        assert torch.equal(
            code.jitter_pixels(images, shift, flip, *NORMS, torch.float32)[0], expected
        )


def test_jitter_pixels_without_a_prior():
    images, (shift, flip) = randn(2, 2, 3, 9, 9), jitter(2)
    seen, natural = kernels.jitter_pixels(images, shift, flip, MEAN, STD, None, None, torch.float32)
    assert natural is None
    assert torch.equal(seen, turned(images, shift, flip))


def test_jitter_pixels_in_float16_is_one_rounding():
    images, (shift, flip) = randn(2, 2, 3, 9, 9), jitter(2)
    seen, natural = kernels.jitter_pixels(images, shift, flip, *NORMS, torch.float16)
    exact = kernels.jitter_pixels(images, shift, flip, *NORMS, torch.float32)
    assert torch.equal(seen, exact[0].half())
    assert torch.equal(natural, exact[1].half())


@pytest.mark.parametrize("use", ["both", "seen", "natural"])
@pytest.mark.parametrize("side", [8, 13])
def test_jitter_pixels_gradient_matches_autograd(use, side):
    images, (shift, flip) = randn(3, 2, 3, side, side), jitter(3)
    flow = randn(3, 2, 3, side, side, seed=1), randn(6, 3, side, side, seed=2)
    picked = {"both": (0, 1), "seen": (0,), "natural": (1,)}[use]
    gradients = []
    for code in (kernels, reference):
        leaf = images.clone().requires_grad_()
        outputs = code.jitter_pixels(leaf, shift, flip, *NORMS, torch.float32)
        total = sum((outputs[i] * flow[i]).sum() for i in picked)
        gradients.append(torch.autograd.grad(total, leaf)[0])
    torch.testing.assert_close(*gradients, **CLOSE)
    assert gradients[0].all()


# ------------------------------------------------------------------ step


def state_of(tasks, m, side, scale=0.2):
    images = (scale * randn(tasks, m, 3, side, side)).contiguous()
    return (
        images,
        torch.zeros_like(images),
        torch.zeros_like(images),
        torch.zeros((), device=DEVICE),
    )


def rate(lr):
    return torch.tensor(lr, device=DEVICE)


def step_with(code, state, flows, turn, lr=0.01, prior=True, betas=(0.5, 0.99)):
    code.pixel_step(
        *state, flows[0], flows[1] if prior else None, *turn, rate(lr), betas, 1e-8, LOW, HIGH, STD,
        PRIOR_STD if prior else None,
    )  # fmt: skip


def flows_of(tasks, m, side, i=0, dtype=torch.float32):
    return (
        randn(tasks, m, 3, side, side, seed=10 + i, dtype=dtype),
        randn(tasks * m, 3, side, side, seed=20 + i, dtype=dtype),
    )


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("betas", [(0.5, 0.99), (0.9, 0.999)])
@pytest.mark.parametrize("shape", [(3, 2, 13), (1, 2, 16)], ids=str)
def test_pixel_step_is_adam(shape, betas, prior):
    """Five steps of torch.optim.Adam on the gradient that autograd gives, each with a clamp."""
    state = state_of(*shape)
    images = state[0].clone().requires_grad_()
    adam = torch.optim.Adam([images], lr=0.05, betas=betas, eps=1e-8)
    low, high = (torch.tensor(v, device=DEVICE)[:, None, None] for v in (LOW, HIGH))
    factor = torch.tensor(STD, device=DEVICE) / torch.tensor(PRIOR_STD, device=DEVICE)
    for i in range(5):
        turn, flows = jitter(shape[0], i), flows_of(*shape, i)
        seen = turned(images, *turn)
        total = (seen * flows[0]).sum()
        if prior:
            total = total + (factor[:, None, None] * seen * flows[1].view_as(seen)).sum()
        images.grad = torch.autograd.grad(total, images)[0]
        adam.step()
        with torch.no_grad():
            images.clamp_(low, high)
        step_with(kernels, state, flows, turn, 0.05, prior, betas)
        torch.testing.assert_close(state[0], images.detach(), rtol=0, atol=1e-6)
    expected = adam.state[images]
    torch.testing.assert_close(state[1], expected["exp_avg"], **CLOSE)
    torch.testing.assert_close(state[2], expected["exp_avg_sq"], **CLOSE)
    assert state[3].item() == 5


@pytest.mark.parametrize("prior", [True, False])
def test_pixel_step_matches_reference(prior):
    states = [state_of(3, 2, 13) for _ in range(2)]
    for i in range(3):
        for code, state in zip((kernels, reference), states, strict=True):
            step_with(code, state, flows_of(3, 2, 13, i), jitter(3, i), prior=prior)
    for got, want in zip(*states, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_pixel_step_undoes_the_jitter():
    """The first step goes by lr against the sign of each pixel's own gradient."""
    state, turn = state_of(4, 2, 13), jitter(4)
    before, flow = state[0].clone(), randn(4, 2, 3, 13, 13, seed=5).sign()
    moved = kernels.jitter_pixels(flow, *turn, *NORMS, torch.float32)[0]
    step_with(kernels, state, (moved, None), turn, prior=False)
    torch.testing.assert_close(state[0], before - 0.01 * flow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 100, 1999, 100_000])
def test_pixel_step_corrects_bias_at_any_step(steps):
    states = [state_of(1, 1, 4) for _ in range(2)]
    for state in states:
        state[1].add_(0.3), state[2].add_(0.2), state[3].add_(steps)
    for code, state in zip((kernels, reference), states, strict=True):
        step_with(code, state, flows_of(1, 1, 4), jitter(1), betas=(0.9, 0.999))
    torch.testing.assert_close(states[0][0], states[1][0], rtol=0, atol=1e-7)
    assert states[0][3].item() == steps + 1


def test_pixel_step_clamps_to_each_channel():
    state = state_of(2, 2, 9, scale=1.5)
    step_with(kernels, state, flows_of(2, 2, 9), jitter(2), lr=5.0)
    for c in range(3):
        assert state[0][:, :, c].min().item() == pytest.approx(LOW[c])
        assert state[0][:, :, c].max().item() == pytest.approx(HIGH[c])


def test_pixel_step_passes_on_nan():
    state, (d_seen, d_natural) = state_of(1, 2, 9), flows_of(1, 2, 9)
    d_seen[0, 1, 2, 3, 4] = float("nan")
    step_with(kernels, state, (d_seen, d_natural), jitter(1))
    assert state[0].isnan().sum() == 1


def test_pixel_step_takes_gradients_in_any_memory():
    turn, flows = jitter(2), flows_of(2, 3, 10)
    last = flows[1].contiguous(memory_format=torch.channels_last)
    odd = flows[1].permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    seen = (
        flows[0].flatten(0, 1).contiguous(memory_format=torch.channels_last).view(2, 3, 3, 10, 10)
    )
    assert not seen.is_contiguous()
    states = [state_of(2, 3, 10) for _ in range(3)]
    for state, given in zip(states, (flows, (seen, last), (flows[0], odd)), strict=True):
        step_with(kernels, state, given, turn)
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))


def test_pixel_step_takes_half_precision_gradients():
    turn, flows = jitter(2), flows_of(2, 3, 10, dtype=torch.float16)
    states = [state_of(2, 3, 10) for _ in range(2)]
    step_with(kernels, states[0], flows, turn)
    step_with(kernels, states[1], [f.float() for f in flows], turn)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("count", [(0, 2), (2, 0)])
def test_no_image(count):
    images = randn(*count, 3, 8, 8).requires_grad_()
    turn = jitter(count[0])
    seen, natural = kernels.jitter_pixels(images, *turn, *NORMS, torch.float32)
    assert seen.shape == images.shape
    assert natural.shape == (0, 3, 8, 8)
    assert torch.autograd.grad(seen.sum() + natural.sum(), images)[0].shape == images.shape
    state = state_of(*count, 8)
    step_with(kernels, state, flows_of(*count, 8), turn)
    assert state[3].item() == 1


# ------------------------------------------------------------------ as operators


def test_rejects_what_does_not_fit():
    images, (shift, flip) = randn(2, 3, 3, 8, 8), jitter(2)
    with pytest.raises(ValueError, match=r"images must be float32 of shape \(G, m, 3, S, S\)"):
        kernels.jitter_pixels(images.double(), shift, flip, *NORMS, torch.float32)
    with pytest.raises(ValueError, match=r"shift must be \(2, 2\) int64"):
        kernels.jitter_pixels(images, shift.int(), flip, *NORMS, torch.float32)
    with pytest.raises(ValueError, match=r"flip must be \(2,\) bool"):
        kernels.jitter_pixels(images, shift, flip[:1], *NORMS, torch.float32)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        kernels.jitter_pixels(images, shift, flip, *NORMS, torch.float64)
    state, (d_seen, d_natural) = state_of(2, 3, 8), flows_of(2, 3, 8)
    with pytest.raises(ValueError, match="exp_avg must be contiguous float32"):
        step_with(kernels, (state[0], state[1].mT, *state[2:]), (d_seen, d_natural), jitter(2))
    with pytest.raises(ValueError, match="d_seen must have shape"):
        step_with(kernels, state, (d_seen[:1], d_natural), jitter(2))
    with pytest.raises(ValueError, match="d_natural must have shape"):
        step_with(kernels, state, (d_seen, d_natural[:1]), jitter(2))


@pytest.mark.filterwarnings("ignore")
def test_proper_operators():
    images, (shift, flip) = randn(2, 2, 3, 7, 7).requires_grad_(), jitter(2)
    factor, offset = [1.2, 1.1, 1.3], [0.01, 0.02, 0.03]
    ops = torch.ops.fastrecycle
    for scale in (factor, []):
        arguments = (images, shift, flip, scale, offset, torch.float32)
        torch.library.opcheck(ops.jitter_pixels.default, arguments)
    d_seen, d_natural = flows_of(2, 2, 7)
    arguments = (d_seen, d_natural, shift, flip, factor, list(images.shape))
    torch.library.opcheck(ops.jitter_pixels_backward.default, arguments)
    arguments = (
        *state_of(2, 2, 7), d_seen, d_natural, shift, flip, rate(0.1), [0.5, 0.99], 1e-8,
        list(LOW), list(HIGH), factor,
    )  # fmt: skip
    torch.library.opcheck(ops.pixel_step.default, arguments)


@pytest.mark.filterwarnings("ignore")
def test_traces_as_one_graph():
    turn = jitter(2)

    def run(images, exp_avg, exp_avg_sq, step):
        seen, natural = kernels.jitter_pixels(images, *turn, *NORMS, torch.float32)
        step_with(kernels, (images, exp_avg, exp_avg_sq, step), (seen, natural), turn)
        return natural.sum()

    states = [state_of(2, 2, 7) for _ in range(2)]
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(*states[0]), traced(*states[1]))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# ------------------------------------------------------------------ built for GPUs


def launch_all(arch):
    """Every kernel, as an inversion launches it."""
    del arch
    factor, offset, turn = [1.2, 1.1, 1.3], [0.01, 0.02, 0.03], jitter(4)
    for side in (224, 33):
        images = torch.zeros(4, 25, 3, side, side)
        for dtype in (torch.bfloat16, torch.float32):
            for scale in (factor, []):
                seen, natural = kernels._run_jitter(images, *turn, scale, offset, dtype)
                given = natural if scale else None
                kernels._run_backward(seen, given, *turn, scale, images)
                arguments = (*turn, rate(0.1), [0.5, 0.99], 1e-8, LOW, HIGH, factor)
                state = (images, images, images, torch.zeros(()))
                kernels._run_step(*state, seen, given, *arguments)
            last = natural.new_zeros(100, 3, side, side).to(memory_format=torch.channels_last)
            kernels._run_step(*state, seen, last, *arguments)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_builds_for_every_gpu(arch):
    launches = aot_launches.compiled_launches("test_ops_pixels:launch_all", arch)
    aot_launches.assert_fit(launches)
    assert {x.kernel for x in launches} == {"_jitter", "_jitter_backward", "_advance", "_step"}
    assert not any(x.stack_bytes for x in launches), launches


# ------------------------------------------------------------------ on a GPU


@pytest.mark.parametrize("shape", [(1, 25, 224), (4, 25, 224), (3, 5, 99)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
class TestGPU:
    pytestmark = gpu

    def test_jitter_is_one_rounding_from_exact(self, shape, dtype):
        tasks, m, side = shape
        images, turn = randn(tasks, m, 3, side, side), jitter(tasks)
        got = kernels.jitter_pixels(images, *turn, *NORMS, dtype)
        exact = reference.jitter_pixels(images.double(), *turn, *NORMS, torch.float64)
        assert torch.equal(got[0], exact[0].to(dtype))
        allowed = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}[dtype]
        assert ((got[1].double() - exact[1]).abs() <= allowed * (1 + exact[1].abs())).all()

    def test_five_steps_are_fused_adam(self, shape, dtype):
        state = state_of(*shape)
        images = state[0].clone()
        adam = torch.optim.Adam(
            [images], lr=rate(0.05), betas=(0.5, 0.99), capturable=True, fused=True
        )
        low, high = (torch.tensor(v, device=DEVICE)[:, None, None] for v in (LOW, HIGH))
        factor = [a / b for a, b in zip(STD, PRIOR_STD, strict=True)]
        factor = torch.tensor(factor, device=DEVICE)[:, None, None].double()
        for i in range(5):
            turn, flows = jitter(shape[0], i), flows_of(*shape, i, dtype)
            # One rounding, as a multiply-add: where both flows cancel, two leave another sign, and
            # Adam's first steps are the gradient's sign.
            both = (flows[0] + factor * flows[1].view_as(flows[0])).float()
            both = torch.where(turn[1][:, None, None, None, None], both.flip(-1), both)
            images.grad = turned(both, -turn[0], torch.zeros_like(turn[1]))
            adam.step()
            images.clamp_(low, high)
            step_with(kernels, state, flows, turn, 0.05)
        torch.testing.assert_close(state[0], images, rtol=0, atol=2e-6)
        assert state[3].item() == adam.state[images]["step"].item() == 5

    def test_graph_replays_what_eager_gives(self, shape, dtype):
        tasks = shape[0]
        states = [state_of(*shape) for _ in range(2)]
        turn, lr = jitter(tasks), rate(0.05)

        def once(state):
            seen, natural = kernels.jitter_pixels(state[0], *turn, *NORMS, dtype)
            kernels.pixel_step(
                *state, seen, natural, *turn, lr, (0.5, 0.99), 1e-8, LOW, HIGH, STD, PRIOR_STD
            )

        first = [t.clone() for t in states[1]]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            once(states[1])
        torch.cuda.synchronize()
        for tensor, value in zip(states[1], first, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            once(states[1])
        for i in range(3):
            new = jitter(tasks, i)
            turn[0].copy_(new[0]), turn[1].copy_(new[1]), lr.fill_(0.05 / (i + 1))
            once(states[0])
            graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


class TestLarge:
    pytestmark = gpu

    def test_offsets_beyond_two_to_the_31(self):
        turn = jitter(2)
        images = torch.rand(2, 1800, 3, 448, 448, device=DEVICE)  # 2.2e9 numbers
        seen, natural = kernels.jitter_pixels(images, *turn, *NORMS, torch.bfloat16)
        want = kernels.jitter_pixels(images[1:, -1:], turn[0][1:], turn[1][1:], *NORMS, seen.dtype)
        assert torch.equal(seen[1, -1], want[0][0, 0])
        assert torch.equal(natural[-1], want[1][0])
        state = (images, torch.zeros_like(images), torch.zeros_like(images), rate(0.0))
        few = tuple(x[1:, -1:].clone() if x.ndim else x.clone() for x in state)
        step_with(kernels, state, (seen, natural), turn)
        step_with(kernels, few, (seen[1:, -1:], natural[-1:]), (turn[0][1:], turn[1][1:]))
        assert torch.equal(images[1, -1], few[0][0, 0])

"""moment_distance: R_BN of all layers at once, against its reference and the layers one by one.

fp32 tolerance: a norm of some hundred numbers near 1, and moments of a few hundred: 1e-5.
"""

import sys
from itertools import product

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
import aot
from fastrecycle_kernels import bn_prior, reference
from fastrecycle_kernels import moment_distance as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
F32 = {"rtol": 1e-5, "atol": 1e-5}
WIDTHS = (20, 72, 16, 7)


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def statistics(channels, seed):
    mean, var, weight, bias = (randn(channels, seed=seed + i) for i in range(4))
    return mean, var.square() + 0.1, weight, bias


def network(widths=WIDTHS, batch=6, side=9, factor=1.0):
    """An input and stored statistics for each layer."""
    inputs = [factor * randn(batch, c, side + i, 7, seed=i) + 0.5 for i, c in enumerate(widths)]
    inputs = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in inputs]
    return inputs, [statistics(c, 10 * i + 50) for i, c in enumerate(widths)]


def ours(inputs, stored, segments, first_bn=1.0):
    layers = [
        bn_prior.bn_prior_chunks(x, *s, 1e-5, segments, True, None)[2]
        for x, s in zip(inputs, stored, strict=True)
    ]
    mean, var = (torch.cat([s[i] for s in stored]) for i in range(2))
    return kernels.moment_distance(layers, mean, var, first_bn)


def plain(inputs, stored, segments, first_bn=1.0):
    moments = [
        reference.bn_prior(x, *s, 1e-5, segments, True, None)[1:]
        for x, s in zip(inputs, stored, strict=True)
    ]
    mean, var = (torch.cat([s[i] for s in stored]) for i in range(2))
    return reference.moment_distance(moments, mean, var, first_bn)


@pytest.mark.parametrize("widths", [WIDTHS, (20,), (3, 130)])
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("programs", [1, 24, 1056])
def test_moment_distance_matches_reference(widths, segments, programs, monkeypatch):
    monkeypatch.setattr(bn_prior, "PROGRAMS", programs)
    inputs, stored = network(widths)
    weights = randn(segments, seed=99)
    got, want = (f(inputs, stored, segments, 0.3) for f in (ours, plain))
    assert got.shape == (segments,)
    torch.testing.assert_close(got, want, **F32)
    gradients = (torch.autograd.grad((t * weights).sum(), inputs) for t in (got, want))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)  # numbers near 1e-3


def test_moment_distance_reads_many_chunks(monkeypatch):
    """More of them than a program reads at once, the last one shorter."""
    monkeypatch.setattr(bn_prior, "PROGRAMS", 10**6)
    monkeypatch.setattr(kernels, "BLOCK_P", 4)
    inputs, stored = network(batch=3, side=12)
    plans = [bn_prior._plan(x, 1) for x in inputs]
    assert min(plan.chunks for plan in plans) > 4
    got, want = (f(inputs, stored, 1) for f in (ours, plain))
    torch.testing.assert_close(got, want, **F32)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_moment_distance_gradient_at_0_is_0():
    inputs = [torch.full((2, 16, 3, 3), 0.5, device=DEVICE).requires_grad_()]
    stored = [(torch.full((16,), 0.5, device=DEVICE), *(torch.zeros(16, device=DEVICE),) * 3)]
    distance = ours(inputs, stored, 1)
    assert distance.item() == 0
    assert not torch.autograd.grad(distance.sum(), inputs)[0].any()


def test_moment_distance_passes_on_nan():
    inputs, stored = network()
    with torch.no_grad():
        inputs[1][0, 3, 0, 0] = float("nan")
    distance = ours(inputs, stored, 3)
    assert distance.isnan().tolist() == [True, False, False]


def test_moment_distance_gradient_of_an_expanded_sum():
    inputs, stored = network()
    gradients = (torch.autograd.grad(f(inputs, stored, 3).sum(), inputs) for f in (ours, plain))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_rejects_statistics_of_another_length():
    inputs, stored = network((16,))
    layer = bn_prior.bn_prior_chunks(inputs[0], *stored[0], 1e-5, 1, True, None)[2]
    with pytest.raises(ValueError, match=r"mean and var must have shape \(16,\), got \(15,\)"):
        kernels.moment_distance([layer], stored[0][0][:15], stored[0][1])


# ------------------------------------------------------------------ a network


class Residual(nn.Module):
    """Stem, two residual blocks: everything that a ResNet asks of the operations."""

    def __init__(self, fast, channels=16):
        super().__init__()
        self.fast = fast
        shapes = [(channels, 3), *[(channels, channels)] * 4]
        self.weights = [0.3 * randn(*s, 3, 3, seed=i) for i, s in enumerate(shapes)]
        self.stored = [statistics(channels, 30 + 4 * i) for i in range(5)]
        self.mean, self.var = (torch.cat([s[i] for s in self.stored]) for i in range(2))

    def forward(self, x):
        layers = []

        def bn(x, residual=None, twin=None, output=True):
            i = len(layers)
            x = nn.functional.conv2d(x, self.weights[i], padding=1)
            rest = (*self.stored[i], 1e-3, 2, True, residual)
            if self.fast:
                y, twin, moments = bn_prior.bn_prior_chunks(x, *rest, twin, output)
            else:
                y, *moments = reference.bn_prior(x, *rest)
            layers.append(moments)
            return y, twin

        x, twin = bn(x)
        for block in range(2):
            y, _ = bn(x)
            x, twin = bn(y, x, twin, output=block == 0)
        distance = kernels.moment_distance if self.fast else reference.moment_distance
        return distance(layers, self.mean, self.var, 0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_network_matches_reference(compiled):
    x = randn(4, 3, 6, 5, seed=70).contiguous(memory_format=torch.channels_last).requires_grad_()
    fast, slow = Residual(True), Residual(False)
    if compiled:
        fast = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got, want = fast(x), slow(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (dgot,), (dwant,) = (torch.autograd.grad(t.sum(), x) for t in (got, want))
    torch.testing.assert_close(dgot, dwant, rtol=1e-3, atol=1e-3 * dwant.abs().max().item())


@pytest.mark.filterwarnings("ignore")
def test_moment_distance_is_a_proper_operator():
    widths = (20, 16)
    chunks = [randn(2, 2, 3, c, seed=c).abs().requires_grad_() for c in widths]
    shapes = [20, 3, 8, 22, 16, 3, 8, 22]
    mean, var = randn(36, seed=1), randn(36, seed=2).abs()
    arguments = (chunks, shapes, mean, var, 0.5)
    torch.library.opcheck(torch.ops.fastrecycle.moment_distance.default, arguments)
    _, *saved = (t.detach() for t in torch.ops.fastrecycle.moment_distance(*arguments))
    moments, mu, sigma2, norms = saved
    torch.library.opcheck(
        torch.ops.fastrecycle.moment_distance_backward.default,
        (randn(2, seed=4), moments, shapes, mean, var, mu, sigma2, norms, 0.5),
    )


# ------------------------------------------------------------------ built for GPUs

FLOATS = ("moments", "mean", "var", "mu", "sigma2", "squares", "norms", "distance", "dmoments",
          "ddistance")  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_moment_distance_builds_for_every_gpu():
    shapes = []
    for channels, side in [(64, 112), *[(64, 56), (256, 56)] * 16, *[(512, 7), (2048, 7)] * 10]:
        plan = bn_prior.launch(25 * side**2, channels, 1)
        shapes += [channels, plan.chunks, plan.chunk_rows, 25 * side**2]
    layers, _, _ = kernels._layers(shapes, 1)
    assert len(layers) == 53
    constants = {"LAYERS": layers, "BLOCK_C": kernels.BLOCK_C}
    most = {"MOST": kernels._blocks(layers)}
    chunks = {"BLOCK_P": kernels.BLOCK_P}
    types = dict.fromkeys(FLOATS, "*fp32") | {
        "first_bn": "fp32", "width": "i32", "ddistance_task": "i32",
    }  # fmt: skip
    asked = [
        aot.Case(f"moment_distance:{name}", arch, types, constants | more, warps)
        for arch, (name, more, warps) in product((80, 90, 100), (
            ("_merge", most | chunks, 4), ("_norms", most | {"BLOCK_L": 64, "BLOCK_B": 128}, 8),
            ("_spread", chunks, 4),
        ))
    ]  # fmt: skip
    for want, built in zip(asked, aot.compiled(asked), strict=True):
        assert built.shared_bytes <= aot.SHARED_BYTES[want.arch]
        assert not built.stack_bytes, f"{want.kernel} spills"

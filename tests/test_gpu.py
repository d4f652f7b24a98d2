"""CUDA against the CPU, bf16 against fp32, and the compiled step against the eager one.

Tolerances. fp32 on CUDA (TF32 off) and on the CPU differ in the order of summation alone: sums of a
few hundred terms near 1 are right to 1e-5, and a loss over 3 blocks and 9 convolutions to 1e-4 of
itself. Curves of an optimiser that divides by the gradient's size part slowly: 1e-3 after some ten
steps. bf16 keeps 8 bits: an operation may err as much as twice PyTorch's own in that dtype.
"""

from dataclasses import replace

import pytest
import torch
import toys

from fastrecycle import ops
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.inversion import InversionGroup, invert
from fastrecycle.lora import LoRAStack
from fastrecycle.metatrain import MetaTrainer, meta_train
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.vit import RaggedKeep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("no_tf32"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
INVERSION = InversionConfig(
    images_per_class=4, iterations=10, prune={1: 0.5}, prune_from=0.4, group=2
)
META = MetaConfig(
    start="zero",
    steps=10,
    ways=3,
    shots=2,
    queries=3,
    rank=2,
    lr=3e-3,
    resolution=(8, 16),
    schedule="constant",
)


def group(device, count=2, config=INVERSION, dtype=torch.float32, **arguments):
    vit, prior = toys.vit().to(device, dtype), toys.prior().to(device, dtype)
    loras = [toys.lora(i).to(dtype) for i in range(count)]
    return InversionGroup(vit, loras, range(count), prior, config, dtype=dtype, **arguments)


def curve(stepper):
    values = []
    while not stepper.done:
        values.append(stepper.step()["loss"].cpu())
    return torch.stack(values)


# ------------------------------------------------------------------ fp32, CPU and CUDA


@pytest.mark.parametrize("prune", [None, {1: 0.5}])
def test_vit_matches_cpu(prune):
    vit, images = toys.vit(), torch.randn(6, 3, 16, 16, generator=toys.generator(0))
    stack = LoRAStack.of([toys.lora(i) for i in range(3)])
    index = torch.tensor([2, 0, 1, 1, 0, 2])
    expected = vit.encode(images, stack, lora_index=index, prune=prune)
    on = vit.to(DEVICE)
    got = on.encode(images.to(DEVICE), stack.to(DEVICE), lora_index=index.to(DEVICE), prune=prune)
    torch.testing.assert_close(got.features.cpu(), expected.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.cls_scores.cpu(), expected.cls_scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(got.kept.cpu(), expected.kept)


def test_ragged_forward_matches_cpu():
    vit, lora = toys.vit(), toys.lora()
    images = torch.randn(4, 3, 16, 16, generator=toys.generator(0))
    order = torch.stack([torch.randperm(16, generator=toys.generator(i)) for i in range(4)])
    counts = torch.tensor([16, 1, 5, 9])
    expected = vit(images, lora, keep=RaggedKeep.of_orders(order, counts))
    keep = RaggedKeep.of_orders(order.to(DEVICE), counts.to(DEVICE))
    got = vit.to(DEVICE)(images.to(DEVICE), lora.to(DEVICE), keep=keep)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_inversion_matches_cpu():
    cpu, cuda = group(torch.device("cpu")), group(DEVICE)
    assert torch.equal(cpu.images, cuda.images.cpu())  # noise is the same everywhere
    one, other = cpu.step(), cuda.step()
    for name in ("loss", "ce", "r_bn"):
        torch.testing.assert_close(other[name].cpu(), one[name], rtol=1e-4, atol=1e-5)
    gap = (cuda.images.grad.cpu() - cpu.images.grad).norm() / cpu.images.grad.norm()
    assert gap < 1e-3
    torch.testing.assert_close(curve(cuda), curve(cpu), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_meta_training_matches_cpu(sparsity):
    config = replace(META, sparsity=sparsity)
    cpu = MetaTrainer(toys.vit(), toys.pool(), config)
    cuda = MetaTrainer(toys.vit().to(DEVICE), toys.pool(), config)
    torch.testing.assert_close(curve(cuda), curve(cpu), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ bf16


LENGTHS = [65, 1, 17, 130, 4]


def packed(dtype):
    g = toys.generator(0)
    q, k, v = (torch.randn(sum(LENGTHS), 4, 64, generator=g).to(DEVICE, dtype) for _ in range(3))
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=DEVICE)
    return q, k, v, starts


def each_alone(q, k, v):
    parts, start = [], 0
    for length in LENGTHS:
        one = [x[start : start + length].transpose(0, 1)[None] for x in (q, k, v)]
        y = torch.nn.functional.scaled_dot_product_attention(*one)
        parts.append(y[0].transpose(0, 1))
        start += length
    return torch.cat(parts)


def test_packed_bf16_attention_matches_masked_reference():
    q, k, v, starts = packed(torch.bfloat16)
    weights = torch.randn(q.shape, generator=toys.generator(1)).to(DEVICE)

    def run(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = attend(*leaves)
        return [y.detach().float(), *torch.autograd.grad((weights * y.float()).sum(), leaves)]

    def masked(*x):  # float32: the oracle
        return ops.varlen_attention(*x, cu_seqlens=starts, longest=130)

    exact = run(masked, torch.float32)
    torch_own = run(each_alone, torch.bfloat16)
    ours = run(masked, torch.bfloat16)
    for name, a, b, c in zip(("y", "dq", "dk", "dv"), ours, torch_own, exact, strict=True):
        error, allowed = (a.float() - c).abs().max(), (b.float() - c).abs().max()
        assert error <= 2 * allowed + 1e-3, (name, error, allowed)


@pytest.mark.skipif(ops.xformers_attention() is None, reason="xformers' operators: not available")
def test_packed_fp32_attention_of_xformers_matches_each_image_alone():
    q, k, v, starts = packed(torch.float32)
    y = ops.varlen_attention(q, k, v, cu_seqlens=starts, longest=130)
    torch.testing.assert_close(y, each_alone(q, k, v), rtol=1e-4, atol=1e-5)


def test_packed_bf16_needs_the_longest():
    q, k, v, starts = packed(torch.bfloat16)
    with pytest.raises(ValueError, match="packed tokens on CUDA need longest"):
        ops.varlen_attention(q, k, v, cu_seqlens=starts)


# head width 64, as in every real backbone
WIDE = replace(
    toys.CONFIG, image_size=32, patch_size=4, width=128, depth=3, heads=2, mlp_dim=256
)  # fmt: skip


def wide_images():
    return torch.randn(8, 3, 32, 32, generator=toys.generator(0)).to(DEVICE)


def relative(got, expected):
    """Largest error over the largest number: roundings scale with the terms of a sum."""
    return ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()


def ragged_and_masked(vit, lora, x, counts):
    """Features of images with `counts` patches: packed in bf16, and one at a time in fp32."""
    order = torch.stack(
        [torch.randperm(vit.config.patches, generator=toys.generator(i)) for i in range(len(x))]
    ).to(DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        packed = vit(x, lora, keep=RaggedKeep.of_orders(order, torch.tensor(counts, device=DEVICE)))

    def alone(precise):
        rows = []
        for i, count in enumerate(counts):
            keep = order[i : i + 1, :count].sort(dim=1).values
            with torch.autocast("cuda", torch.bfloat16, enabled=not precise):
                rows.append(vit(x[i : i + 1], lora, keep=keep)[0].float())
        return torch.stack(rows)

    return packed.float(), alone(precise=False), alone(precise=True)


def test_packed_half_precision_matches_each_image_alone():
    vit, lora = toys.vit(WIDE).to(DEVICE), toys.lora(config=WIDE).to(DEVICE)
    counts = [64, 1, 17, 32, 4, 64, 63, 8]
    packed, half, single = ragged_and_masked(vit, lora, wide_images(), counts)
    # no worse than twice the same network in bf16 without packing
    assert relative(packed, single) < 2 * relative(half, single) + 1e-3
    assert relative(half, single) < 0.1  # 8 bits: the comparison means something
    other = torch.roll(single, 1, 0)
    assert relative(packed, other) > 0.3  # and images are not alike


def test_packed_half_precision_gradient_matches_each_image_alone():
    vit, x = toys.vit(WIDE).to(DEVICE), wide_images()
    lora = toys.lora(config=WIDE).to(DEVICE).clone()
    learnt = [tensor.requires_grad_() for tensor in lora.tensors()]
    weight = torch.randn(8, 128, generator=toys.generator(5)).to(DEVICE)
    results = ragged_and_masked(vit, lora, x, [64, 1, 17, 32, 4, 64, 63, 8])
    packed, half, single = (torch.autograd.grad((f * weight).sum(), learnt) for f in results)
    for got, plain, expected in zip(packed, half, single, strict=True):
        assert relative(got, expected) < 2 * relative(plain, expected) + 1e-2


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_bf16_losses_are_near_fp32(sparsity):
    config = replace(META, sparsity=sparsity, tasks=4)
    vit, pool = toys.vit().to(DEVICE), toys.pool()
    full, half = (MetaTrainer(vit, pool, config, precision=p) for p in ("fp32", "bf16"))
    one, other = full.step()["loss"], half.step()["loss"]
    # features err by some 3 of 2^-8; a mean over 36 queries of distances near 4
    torch.testing.assert_close(other, one, rtol=3e-2, atol=3e-2)
    one, other = (group(DEVICE, precision=p).step() for p in ("fp32", "bf16"))
    torch.testing.assert_close(other["loss"], one["loss"], rtol=3e-2, atol=3e-2)
    assert other["loss"].dtype == other["r_bn"].dtype == torch.float32


# ------------------------------------------------------------------ compiled


FAST = pytest.mark.parametrize("backend", ["compile", "triton"])


def assert_as_near(fast, eager, exact):
    """All losses together: of one alone eager bf16's error may be small by chance."""
    assert (fast - exact).norm() <= 2 * (eager - exact).norm() + 2e-3 * exact.norm()


@FAST
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"prune": {}}, {"resolution": (8, 20)}, {"tv": 0.1}, {"schedule": "cosine"},
        {"alpha": 0.0}, {"alpha": 0.0, "tv": 0.1},
    ],
)  # fmt: skip
def test_recorded_inversion_matches_reference(backend, changes):
    config = replace(INVERSION, iterations=20, **changes)
    eager = curve(group(DEVICE, config=config))
    fast = curve(group(DEVICE, config=config, backend=backend))
    # Adam's first steps are rate / |gradient| long, so rounding of gradients near 0 grows from
    # step to step: as much as eager float32 is off float64 is allowed twice
    exact = curve(group(DEVICE, config=config, dtype=torch.float64))
    off = float((eager.double() - exact).abs().max())
    torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4 + 2 * off)


@FAST
def test_recorded_bf16_inversion_is_as_near_fp32_as_eager_bf16(backend):
    config = replace(INVERSION, iterations=20)
    exact, eager, fast = (
        curve(group(DEVICE, config=config, precision=precision, backend=b))
        for precision, b in (("fp32", "reference"), ("bf16", "reference"), ("bf16", backend))
    )
    assert_as_near(fast, eager, exact)


@FAST
@pytest.mark.parametrize("changes", [{}, {"tv": 0.1}])
def test_recorded_inversion_goes_on_from_a_saved_state(backend, changes, tmp_path):
    config = replace(INVERSION, **changes)
    whole, half, rest = (group(DEVICE, config=config, backend=backend) for _ in range(3))
    expected = curve(whole)
    for _ in range(5):
        half.step()
    half.save(tmp_path / "state")
    rest.step()  # recorded with a state that is given up
    assert rest.restore(tmp_path / "state")
    torch.testing.assert_close(curve(rest), expected[5:], rtol=1e-3, atol=1e-3)


@FAST
def test_inversion_without_a_prior_is_recorded(backend):
    vit, loras = toys.vit().to(DEVICE), [toys.lora(0)]
    config = replace(INVERSION, iterations=4)
    curves = [
        curve(InversionGroup(vit, loras, [0], None, config, backend=b))
        for b in ("reference", backend)
    ]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"sparsity": 0.5}, {"sparsity": 0.5, "sparsity_per": "image"}, {"learn": "backbone"}],
)
@FAST
def test_recorded_meta_training_matches_reference(changes, backend):
    config = replace(META, **changes)
    vit, pool = toys.vit().to(DEVICE), toys.pool()
    eager, fast = (curve(MetaTrainer(vit, pool, config, backend=b)) for b in ("reference", backend))
    torch.testing.assert_close(fast, eager, rtol=1e-3, atol=1e-3)


@FAST
@pytest.mark.parametrize("changes", [{}, {"sparsity": 0.5}])
def test_recorded_bf16_meta_training_is_as_near_fp32_as_eager_bf16(changes, backend):
    config = replace(META, **changes)
    vit, pool = toys.vit().to(DEVICE), toys.pool()
    exact, eager, fast = (
        curve(MetaTrainer(vit, pool, config, precision=precision, backend=b))
        for precision, b in (("fp32", "reference"), ("bf16", "reference"), ("bf16", backend))
    )
    assert_as_near(fast, eager, exact)


# the break that this prior makes in the graph has Dynamo look at a tensor within it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_module_prior_matches_reference():
    """Any network's BatchNorms are read by hooks: eager, beside a compiled backbone."""
    import torchvision

    from fastrecycle.prior import ModulePrior

    torch.manual_seed(0)
    network = torchvision.models.resnet18().to(DEVICE)
    curves = []
    for backend in ("reference", "compile"):
        prior, vit = ModulePrior(network), toys.vit().to(DEVICE)
        config = replace(INVERSION, iterations=3)
        curves.append(curve(
            InversionGroup(vit, [toys.lora(0)], [0], prior, config, backend=backend)
        ))  # fmt: skip
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------ whole runs


def test_resumed_runs_agree_within_tolerance(tmp_path):
    """Sums on CUDA have no fixed order: the same to 1e-3 of the largest number, not to the bit."""

    def stop_at(number):
        calls = []
        return lambda: calls.append(1) or len(calls) == number

    vit, bank, prior = toys.vit().to(DEVICE), toys.bank(2), toys.prior().to(DEVICE)
    whole = invert(vit, bank, prior, INVERSION)
    with pytest.raises(KeyboardInterrupt):
        invert(vit, bank, prior, INVERSION, folder=tmp_path, stop=stop_at(4))
    for a, b in zip(whole, invert(vit, bank, prior, INVERSION, folder=tmp_path), strict=True):
        # one step of 255 where a pixel was rounded to the other side; Adam doubles small gaps
        far = (a.images.int() - b.images.int()).abs() > 2
        assert far.float().mean() < 0.02
    done = meta_train(vit, toys.pool(), META).lora
    with pytest.raises(KeyboardInterrupt):
        meta_train(vit, toys.pool(), META, folder=tmp_path, stop=stop_at(6))
    resumed = meta_train(vit, toys.pool(), META, folder=tmp_path).lora
    for a, b in zip(done.tensors(), resumed.tensors(), strict=True):
        assert (a - b).abs().max() < 1e-3 * a.abs().max() + 1e-4


def test_defaults_on_cuda_run_to_the_end(tmp_path):
    rec = MetaLoRARecycler(
        toys.vit(), toys.bank(2), toys.prior(), quiet=True,
        inversion=replace(INVERSION, images_per_class=5),
        meta=replace(META, sparsity=0.5, sparsity_per="image"),
    )  # fmt: skip
    assert (rec.device.type, rec.backend, rec.precision) == ("cuda", "triton", "bf16")
    lora = rec.run(tmp_path)
    assert all(x.isfinite().all() for x in lora.tensors())
    assert any(x.any() for x in lora.b.values())

"""Whole networks through the kernels against the same networks through the reference.

On a machine without CUDA in Triton's interpreter, so on toy networks. Tolerances: float32 sums of
some hundred terms near 1, in another order.
"""

from dataclasses import replace

import pytest
import torch
import toys

from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.inversion import InversionGroup
from fastrecycle.lora import LoRAStack
from fastrecycle.metatrain import MetaTrainer
from fastrecycle.prior import ResNetPrior, ResNetSpec
from fastrecycle.vit_config import IMAGENET_MEAN, IMAGENET_STD

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread", "no_tf32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_prior_matches_reference(kind):
    state = toys.resnet_state(kind, (2, 2), width=16)
    prior = ResNetPrior(state).to(DEVICE)
    pixels = torch.rand(4, 3, 32, 32, generator=toys.generator(0)).to(DEVICE).requires_grad_()
    totals = [prior(pixels, 2, 3.0, impl=impl) for impl in ("reference", "triton")]
    same(totals[1], totals[0])
    gradients = [torch.autograd.grad(total.sum(), pixels)[0] for total in totals]
    same(gradients[1], gradients[0])
    assert gradients[0].abs().max() > 0.1


@pytest.mark.parametrize(
    ("kernel", "stride", "maxpool", "side"),
    [(3, 1, False, 10), (5, 2, True, 26), (4, 2, True, 20)],  # CIFAR's; odd sides; none of ours
)
def test_prior_of_other_stems_matches_reference(kernel, stride, maxpool, side):
    state = toys.resnet_state(width=16)
    shape = (16, 3, kernel, kernel)
    state["conv1.weight"] = torch.randn(shape, generator=toys.generator(1)) / kernel
    prior = ResNetPrior(state, ResNetSpec(stem_stride=stride, maxpool=maxpool)).to(DEVICE)
    pixels = torch.rand(4, 3, side, side, generator=toys.generator(0)).to(DEVICE).requires_grad_()
    totals = [prior(pixels, 2, 3.0, impl=impl) for impl in ("reference", "triton")]
    same(totals[1], totals[0])
    gradients = [torch.autograd.grad(total.sum(), pixels)[0] for total in totals]
    same(gradients[1], gradients[0])


def test_prepared_prior_computes_the_same():
    prior = toys.prior().to(DEVICE)
    pixels = torch.rand(4, 3, 16, 16, generator=toys.generator(0)).to(DEVICE)
    ready = prior.prepared(torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(ready(pixels), prior(pixels))
    weight = next(w for w in ready.buffers() if w.ndim == 4)
    assert weight.dtype == torch.bfloat16
    assert next(w for w in prior.buffers() if w.ndim == 4).dtype == torch.float32


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prune": {0: 0.25, 2: 0.5}},
        {"keep": torch.tensor([[0, 3, 5], [1, 2, 9], [4, 7, 8], [2, 5, 15]])},
        {"lora_index": torch.tensor([0, 0, 1, 2])},
        {"lora_index": torch.tensor([2, 0, 2, 1]), "prune": {1: 0.5}},
    ],
)
def test_vit_matches_reference(arguments):
    vit = toys.vit().to(DEVICE)
    images = torch.randn(4, 3, 16, 16, generator=toys.generator(1)).to(DEVICE).requires_grad_()
    arguments = {k: v.to(DEVICE) if k != "prune" else v for k, v in arguments.items()}
    many = "lora_index" in arguments
    stack = LoRAStack.of([toys.lora(i) for i in range(3 if many else 1)]).to(device=DEVICE)
    features = [vit(images, stack, impl=impl, **arguments) for impl in ("reference", "triton")]
    same(features[1], features[0])
    gradients = [torch.autograd.grad(f.square().sum(), images)[0] for f in features]
    same(gradients[1], gradients[0])
    assert gradients[0].abs().max() > 0.1


OTHERS = {
    "siglip": replace(toys.CONFIG, prefix_tokens=0, pool="map", activation="gelu_tanh"),
    "dinov2": replace(
        toys.CONFIG, image_size=18, patch_size=6, prefix_tokens=4, registers=3, layer_scale=True
    ),
    "dinov3": replace(
        toys.CONFIG, prefix_tokens=3, registers=2, layer_scale=True, rope="dinov3",
        pool="norm_mean",
    ),
    "normalised": replace(
        toys.CONFIG, prefix_tokens=2, registers=2, qk_norm=True, pool="mean_norm"
    ),
}  # fmt: skip


@pytest.mark.parametrize("arguments", [{"prune": {0: 0.25, 1: 0.5}}, {"keep": True}])
@pytest.mark.parametrize("name", OTHERS)
def test_other_backbones_match_reference(name, arguments):
    config = replace(OTHERS[name], depth=2)  # the interpreter takes seconds a block
    side = config.image_size
    vit, stack = toys.vit(config).to(DEVICE), toys.lora(config=config).stack().to(DEVICE)
    images = torch.randn(2, 3, side, side, generator=toys.generator(1)).to(DEVICE).requires_grad_()
    if "keep" in arguments:
        arguments = {"keep": torch.tensor([[0, 3, 5, 7], [1, 2, 6, 8]]).to(DEVICE)}
    outputs = [vit.encode(images, stack, impl=x, **arguments) for x in ("reference", "triton")]
    same(outputs[1].features, outputs[0].features)
    same(outputs[1].cls_scores, outputs[0].cls_scores)
    assert torch.equal(outputs[1].kept, outputs[0].kept)
    gradients = [torch.autograd.grad(x.features.square().sum(), images)[0] for x in outputs]
    same(gradients[1], gradients[0])
    assert gradients[0].abs().max() > 0.1


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_prior_takes_normalised_images(kind, impl):
    prior = ResNetPrior(toys.resnet_state(kind, (1, 1), width=16)).to(DEVICE)
    pixels = torch.rand(4, 3, 32, 32, generator=toys.generator(0)).to(DEVICE)
    mean, std = (torch.tensor(v)[:, None, None].to(DEVICE) for v in (IMAGENET_MEAN, IMAGENET_STD))
    natural = ((pixels - mean) / std).requires_grad_()
    pixels.requires_grad_()
    totals = prior(pixels, 2, impl=impl), prior(natural, 2, impl=impl, normalised=True)
    same(totals[1], totals[0])
    gradients = [
        torch.autograd.grad(total.sum(), leaf)[0]
        for total, leaf in zip(totals, (pixels, natural), strict=True)
    ]
    same(gradients[1] / std, gradients[0])


def inversions(config, steps, prior=True):
    """Groups of one seed through either code after so many steps, and their loss curves."""
    groups, curves = [], []
    for impl in ("reference", "triton"):
        network = toys.prior().to(DEVICE) if prior else None
        loras = [toys.lora(i) for i in range(2)]
        group = InversionGroup(toys.vit().to(DEVICE), loras, [0, 1], network, config)
        group.impl = impl
        curves.append(torch.stack([group.step()["loss"] for _ in range(steps)]))
        groups.append(group)
    return groups, curves


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution": (8, 20)},
        {"resolution": (8, 20), "prune": {0: 0.25, 1: 0.5}, "prune_from": 0.5},
        {"tv": 0.3, "l2": 0.1},
    ],
)
def test_inversion_step_matches_reference(changes):
    """From one seed, the same loss curve; the step itself is eager in both."""
    config = InversionConfig(images_per_class=1, iterations=3, **changes)
    groups, curves = inversions(config, 2)
    assert not groups[1]._fuses()
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-4)
    assert (curves[0][0] - curves[0][1]).abs().min() > 1e-2


@pytest.mark.parametrize(
    ("changes", "prior"),
    [
        ({"schedule": "cosine"}, True),
        ({"prune": {0: 0.25, 1: 0.5}, "prune_from": 0.25}, True),
        ({"alpha": 0.0}, True),
        ({}, False),
    ],
)
def test_fused_inversion_step_matches_reference(changes, prior):
    """Pixels through `ops.jitter_pixels` and `ops.pixel_step`, two iterations."""
    config = InversionConfig(images_per_class=1, iterations=4, lr=0.05, **changes)
    (plain, fused), curves = inversions(config, 2, prior)
    assert fused._fuses()
    assert not plain._fuses()
    assert plain.jitter.shift[:2].any()
    assert plain.jitter.flip[:2].any()
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-3)
    # Adam's first steps are rate / |gradient| long: rounding of a gradient near 0 shows
    far = (fused.images - plain.images).abs() > 0.02 * config.lr
    assert far.float().mean() < 0.01
    one, other = (g.optimiser.state[g.images] for g in (plain, fused))
    assert one.keys() == other.keys()
    assert one["step"].item() == other["step"].item() == 2
    for name in ("exp_avg", "exp_avg_sq"):
        gap = (one[name] - other[name]).norm() / one[name].norm()
        assert gap < 1e-2, name


def test_fused_inversion_goes_on_from_a_saved_state(tmp_path):
    """Saved after the first iteration and restored into a group of its own."""
    config = InversionConfig(images_per_class=1, iterations=2, lr=0.05)
    shallow = replace(toys.CONFIG, depth=1)

    def start():
        loras = [toys.lora(i, config=shallow) for i in range(2)]
        group = InversionGroup(toys.vit(shallow).to(DEVICE), loras, [0, 1], None, config)
        group.impl = "triton"
        return group

    whole, halves = start(), start()
    whole.step(), whole.step()
    halves.step()
    halves.save(tmp_path / "state")
    rest = start()
    assert rest.restore(tmp_path / "state")
    rest.step()
    torch.testing.assert_close(rest.images, whole.images)


@pytest.mark.parametrize("changes", [{}, {"sparsity": 0.75}])
def test_meta_training_step_matches_reference(changes):
    config = MetaConfig(
        steps=3,
        ways=3,
        shots=1,
        queries=2,
        rank=2,
        lr=3e-3,
        start="zero",
        resolution=(8, 16),
        **changes,
    )
    losses, loras = [], []
    for impl in ("reference", "triton"):
        trainer = MetaTrainer(toys.vit().to(DEVICE), toys.pool(), config)
        trainer.impl = impl
        losses.append(torch.stack([trainer.step()["loss"] for _ in range(2)]))
        loras.append(trainer.meta_lora())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(loras[0].tensors(), loras[1].tensors(), strict=True):
        # Adam's first steps are rate / |gradient| long: rounding of a gradient near 0 shows
        assert (one - other).abs().max() < 0.2 * config.lr

"""Networks, LoRAs and pools small enough for every test to run on them in milliseconds."""

import math
from dataclasses import replace

import torch

from fastrecycle.lora import Head, LoRA, LoRABank
from fastrecycle.pool import SyntheticPool, TaskImages
from fastrecycle.prior import ResNetPrior, ResNetSpec
from fastrecycle.vit import ViT
from fastrecycle.vit_config import HALF, ViTConfig

# 16 patches of 4x4 pixels
CONFIG = ViTConfig(
    image_size=16, patch_size=4, width=16, depth=3, heads=2, mlp_dim=32, mean=HALF, std=HALF
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def vit(config=CONFIG, seed=0):
    """Weights large enough that images differ in their features and no term is negligible."""
    model = ViT.random(config, seed)
    for i, p in enumerate(model.parameters()):
        if not p.numel():  # no prefix tokens
            continue
        draw = torch.randn(p.shape, generator=generator(1000 * seed + i))
        p.data += draw / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1 * draw
    return model


def lora(number=0, ways=3, rank=2, config=CONFIG, names=None, targets=("q", "v"), bias=True):
    """A LoRA that changes the features, with a head; classes c0, c1, ... unless named."""
    made = LoRA.init(config, rank, targets=targets, seed=number)
    for i, target in enumerate(made.b):
        made.b[target].normal_(0, 0.3, generator=generator(100 * number + i))
    g = generator(7 + number)
    head = Head(
        torch.randn(ways, config.features, generator=g),
        torch.randn(ways, generator=g) if bias else None,
    )
    if names is None:
        names = tuple(f"c{(2 * number + j) % 7}" for j in range(ways))
    return replace(made, head=head, class_names=names, name=f"{number:04d}")


def bank(count=3, ways=3, **arguments):
    return LoRABank([lora(i, ways, **arguments) for i in range(count)])


def resnet_state(kind="basic", layers=(1, 1), width=4, seed=0, dtype=torch.float32):
    """State dict of a small ResNet in torchvision's names, without a classifier."""
    g = generator(seed)
    state = {}

    def conv(name, out, into, kernel):
        shape = (out, into, kernel, kernel)
        state[f"{name}.weight"] = torch.randn(shape, generator=g) / math.sqrt(into * kernel**2)

    def bn(name, channels):
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(channels, generator=g)
        state[f"{name}.bias"] = 0.2 * torch.randn(channels, generator=g)
        state[f"{name}.running_mean"] = 0.2 * torch.randn(channels, generator=g)
        state[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=g)

    conv("conv1", width, 3, 7)
    bn("bn1", width)
    into = width
    for layer, blocks in enumerate(layers, 1):
        for block in range(blocks):
            name, inner = f"layer{layer}.{block}", width * 2 ** (layer - 1)
            out = inner * (4 if kind == "bottleneck" else 1)
            if block == 0 and (layer > 1 or into != out):
                conv(f"{name}.downsample.0", out, into, 1)
                bn(f"{name}.downsample.1", out)
            sizes = ((inner, into, 3), (out, inner, 3))
            if kind == "bottleneck":
                sizes = ((inner, into, 1), (inner, inner, 3), (out, inner, 1))
            for i, (to, of, kernel) in enumerate(sizes, 1):
                conv(f"{name}.conv{i}", to, of, kernel)
                bn(f"{name}.bn{i}", to)
            into = out
    return {name: x.to(dtype) for name, x in state.items()}


def prior(**arguments):
    return ResNetPrior(resnet_state(**arguments), ResNetSpec())


def task_images(task=0, ways=3, per_class=6, names=None, survivors=None, config=CONFIG, seed=0):
    """What inversion returns, made up: every class has a colour of its own, so it can be learnt."""
    g = generator(1000 * seed + task)
    m, side, n = ways * per_class, config.image_size, config.patches
    labels = torch.arange(ways).repeat_interleave(per_class)
    colour = torch.randint(60, 196, (ways, 3, 1, 1), generator=g)[labels]
    noise = torch.randint(-40, 41, (m, 3, side, side), generator=g)
    logits = 2 * torch.randn(m, ways, generator=g) + 4 * torch.eye(ways)[labels]
    order = torch.stack([torch.randperm(n, generator=g) for _ in range(m)])
    if names is None:
        names = tuple(f"c{(2 * task + j) % 7}" for j in range(ways))
    return TaskImages(
        task=task,
        images=(colour + noise).to(torch.uint8),
        labels=labels,
        order=order,
        survivors=survivors or n,
        teacher_logits=logits,
        class_names=names or None,
        name=f"{task:04d}",
    )


def pool(count=3, ways=3, **arguments):
    return SyntheticPool([task_images(i, ways, **arguments) for i in range(count)])

"""Pre-tuning: a bank of LoRAs with heads, each on its own few-way task of a labelled data set.

G LoRAs side by side, b images of each, W ways, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fastrecycle.config import PretuneConfig
from fastrecycle.eval import Pixels
from fastrecycle.inversion import OnStep
from fastrecycle.lora import Head, LoRA, LoRABank, LoRAStack
from fastrecycle.ops import autocast, check_precision
from fastrecycle.text import TextTower, check_width
from fastrecycle.vit import ViT


def pretune(
    vit: ViT,
    data: Pixels | Sequence[Pixels],
    config: PretuneConfig | None = None,
    *,
    seed: int = 0,
    precision: str = "fp32",
    on_step: OnStep | None = None,
    on_lora: Callable[[int, LoRA], None] | None = None,
    done: frozenset[int] = frozenset(),
    text: TextTower | None = None,
) -> LoRABank:
    """Train `config.num` LoRAs on random `config.ways`-way tasks of a labelled split.

    Several run side by side in one batch, each image under its own LoRA; their losses are summed,
    so each trains as it would alone. A LoRA's classes, start and batches depend on the seed, its
    number and its data set only.

    Several data sets (a bank for cross-domain tasks) take turns: LoRA i is of set i modulo their
    number, ranks are dealt out within each set, and class names become SET/CLASS, so that equal
    names of two sets are not taken for one class.

    With a text tower the heads are the texts of the class names, frozen, and the loss is CLIP's
    contrastive loss from images to texts: cross-entropy over scale cos(image, text). Its other
    half, from texts to images, is left out: a text here has many images.

    Args:
        vit: the frozen backbone, on the device to use.
        data: decoded images, see `fastrecycle.eval.decode`; or several of different names.
        config: see `PretuneConfig`.
        seed: of everything drawn.
        precision: "fp32" or "bf16".
        on_step: called with the steps done in all (LoRAs times steps), loss and accuracy.
        on_lora: called with each finished LoRA and its number.
        done: numbers to leave out, because they were finished before.
        text: the text tower of the two-tower model whose image tower is `vit`; None: linear heads.

    Returns:
        The bank without those in `done`.

    Raises:
        ValueError: fewer classes than ways, two data sets of one name, or class names that the
            text tower cannot take.
    """
    config = config or PretuneConfig()
    check_precision(precision, "reference", vit.pos_embed.device)
    sources = _sources([data] if isinstance(data, Pixels) else data, config.ways, text)
    for source in sources:
        check_width(source.texts, vit.config.features)
    ranks = [config.rank[i // len(sources) % len(config.rank)] for i in range(config.num)]
    todo = [i for i in range(config.num) if i not in done]
    finished: list[LoRA] = []
    steps_done = len(done) * config.steps
    for start in range(0, len(todo), config.group):
        group = todo[start : start + config.group]
        report = None
        if on_step is not None:
            base, count = steps_done, len(group)

            def report(step: int, values: dict[str, float], base=base, count=count) -> None:
                on_step(base + step * count, values)

        loras = _train_group(
            vit, sources, group, ranks, config, seed=seed, precision=precision, on_step=report
        )
        for number, lora in zip(group, loras, strict=True):
            finished.append(lora)
            if on_lora is not None:
                on_lora(number, lora)
        steps_done += len(group) * config.steps
    return LoRABank(finished)


@dataclass(frozen=True, eq=False)
class _Source:
    pixels: Tensor  # (N, 3, S, S) uint8
    members: dict[int, np.ndarray]  # label -> its images
    class_names: tuple[str, ...]
    texts: Tensor | None  # (classes, F), scale included


def _sources(data: Sequence[Pixels], ways: int, text: TextTower | None) -> list[_Source]:
    names = [each.name for each in data]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"data: expected at least one data set, of different names, got {names}; "
            "dataclasses.replace(pixels, name=...) gives another name"
        )
    sources = []
    for each in data:
        classes = np.unique(each.labels)
        if len(classes) < ways:
            raise ValueError(f"ways: {each.name} has {len(classes)} classes, fewer than {ways}")
        members = {int(c): np.flatnonzero(each.labels == c) for c in classes}
        class_names = each.class_names
        if len(data) > 1:
            class_names = tuple(f"{each.name}/{name}" for name in class_names)
        texts = None if text is None else text.classes(each.class_names).head().weight
        sources.append(_Source(each.pixels, members, class_names, texts))
    return sources


def _train_group(
    vit: ViT,
    sources: list[_Source],
    group: list[int],
    ranks: list[int],
    config: PretuneConfig,
    *,
    seed: int,
    precision: str,
    on_step: OnStep | None,
) -> list[LoRA]:
    device = vit.pos_embed.device
    rngs = [np.random.Generator(np.random.Philox(key=[seed, number])) for number in group]
    of = [sources[number % len(sources)] for number in group]
    tasks = [
        rng.choice(np.array(list(source.members)), config.ways, replace=False)
        for rng, source in zip(rngs, of)
    ]
    starts = [
        LoRA.init(
            vit.config, ranks[number], config.alpha, config.targets, seed=seed * 100_003 + number
        )
        for number in group
    ]
    stack = LoRAStack.of(starts).to(device)
    weight = torch.zeros(len(group), config.ways, vit.config.features, device=device)
    bias = torch.zeros(len(group), config.ways, device=device)
    trained = [*stack.a.values(), *stack.b.values()]
    texts = [x.texts[torch.from_numpy(t)] for x, t in zip(of, tasks) if x.texts is not None]
    if texts:
        weight = torch.stack(texts).to(weight)
    else:
        trained += [weight, bias]
    for tensor in trained:
        tensor.requires_grad_()
    optimiser = torch.optim.Adam(trained, lr=config.lr)
    index = torch.arange(len(group), device=device).repeat_interleave(config.batch_size)
    images_of = [[source.members[int(c)] for c in task] for source, task in zip(of, tasks)]
    pools = [np.concatenate(classes) for classes in images_of]
    ways = [np.repeat(np.arange(config.ways), list(map(len, classes))) for classes in images_of]
    for step in range(config.steps):
        chosen = [rng.integers(len(rows), size=config.batch_size) for rng, rows in zip(rngs, pools)]
        rows = [torch.from_numpy(r[c]) for r, c in zip(pools, chosen)]
        pixels = torch.cat([x.pixels[r.to(x.pixels.device)].to(device) for x, r in zip(of, rows)])
        target = torch.from_numpy(np.concatenate([w[c] for w, c in zip(ways, chosen)])).to(device)
        flips = torch.from_numpy(
            np.concatenate([rng.random(config.batch_size) < config.flip for rng in rngs])
        )
        images = vit.normalise(pixels.float() / 255)
        images = torch.where(flips.to(device)[:, None, None, None], images.flip(-1), images)
        with autocast(device, precision):
            features = vit(images, stack, lora_index=index)
        features = features.float().unflatten(0, (len(group), -1))
        if texts:
            features = nn.functional.normalize(features, dim=-1)
        logits = features @ weight.transpose(1, 2) + bias[:, None]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), target, reduction="none"
        ).unflatten(0, (len(group), -1))
        gradients = torch.autograd.grad(losses.mean(1).sum(), trained)
        for tensor, gradient in zip(trained, gradients, strict=True):
            tensor.grad = gradient
        optimiser.step()
        if on_step is not None:
            values = {}
            if step % 20 == 19 or step == config.steps - 1:
                right = (logits.flatten(0, 1).argmax(-1) == target).float().mean()
                values = {"loss": losses.mean().item(), "accuracy": right.item()}
            on_step(step + 1, values)
    heads = [
        Head(w, normalised=True) if texts else Head(w, b)
        for w, b in zip(weight.detach().cpu(), bias.detach().cpu())
    ]
    return [
        _unstack(stack, i, start, heads[i],
                 tuple(of[i].class_names[int(c)] for c in tasks[i]), f"{number:04d}")
        for i, (number, start) in enumerate(zip(group, starts, strict=True))
    ]  # fmt: skip


def _unstack(
    stack: LoRAStack, i: int, start: LoRA, head: Head, names: tuple[str, ...], name: str
) -> LoRA:
    """LoRA i of a stack, cut back to its own rank."""

    def cut(tensors: dict[str, Tensor], rank_dim: int) -> dict[str, Tensor]:
        return {
            t: x[i].detach().cpu().narrow(rank_dim, 0, start.a[t].shape[1]).clone()
            for t, x in tensors.items()
        }

    return replace(
        start, a=cut(stack.a, 1), b=cut(stack.b, 2), head=head, class_names=names, name=name
    )

"""A toy market: LoRAs that have learnt alike, as those of one domain do, and poison."""

from dataclasses import replace

import torch
import toys

from fastrecycle.lora import Head, LoRA

WAYS = 4
NAMES = tuple(f"c{i}" for i in range(9))


def normal(*shape, seed):
    return torch.randn(*shape, generator=toys.generator(seed))


def honest(number):
    """What all share, and a part of its own; heads know a class by one direction."""
    shared = toys.lora(500, WAYS)
    a = {t: x + 0.1 * normal(*x.shape, seed=number) for t, x in shared.a.items()}
    b = {t: x + 0.1 * normal(*x.shape, seed=40 + number) for t, x in shared.b.items()}
    chosen = [(number + 2 * i) % len(NAMES) for i in range(WAYS)]
    codes = normal(len(NAMES), toys.CONFIG.features, seed=7)
    weight = codes[chosen] + 0.1 * normal(WAYS, toys.CONFIG.features, seed=80 + number)
    names = tuple(NAMES[c] for c in chosen)
    return replace(shared, a=a, b=b, head=Head(weight), class_names=names, name=f"lora{number:02d}")


def shuffled_head(lora, seed=0):
    """Each class under the row of another."""
    return replace(lora, head=Head(lora.head.weight.roll(1, 0)))


def noise_weights(lora, seed=0):
    """As many numbers, none of them learnt."""
    a = {t: normal(*x.shape, seed=seed + i) for i, (t, x) in enumerate(lora.a.items())}
    b = {t: normal(*x.shape, seed=seed + 9 + i) for i, (t, x) in enumerate(lora.b.items())}
    return replace(lora, a=a, b=b)


def other_base(lora, seed=0):
    """Of a backbone of the same shape, whose features stand in another order."""
    order = torch.randperm(toys.CONFIG.width, generator=toys.generator(seed))
    a = {t: x[..., order] for t, x in lora.a.items()}
    b = {t: x[:, order] for t, x in lora.b.items()}
    return replace(lora, a=a, b=b, head=Head(lora.head.weight[:, order]))


POISON = {"shuffled head": shuffled_head, "noise weights": noise_weights, "other base": other_base}


def market(count=15, poisoned=("shuffled head", "noise weights", "other base")) -> list[LoRA]:
    """20 % poisoned: places 1, 5, 9, ..."""
    bank = [honest(i) for i in range(count)]
    for place, kind in zip(range(1, count, 4), poisoned):
        bank[place] = POISON[kind](bank[place], seed=place)
    return bank

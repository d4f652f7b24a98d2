"""A tiny two-tower model whose texts are known, for tests of zero-shot classification."""

import math

import torch
import toys
from torch import nn

from fastrecycle.eval import Pixels
from fastrecycle.text import TextTower

WORDS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


class Words(nn.Module):
    """Texts are looked up: the vector of the one known word in them."""

    def __init__(self, vectors, scale=20.0):
        super().__init__()
        self.vectors = nn.Parameter(vectors)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def encode_text(self, tokens, normalize=False):
        found = self.vectors[tokens[:, 0]]
        return nn.functional.normalize(found, dim=-1) if normalize else found


def tokenizer(texts):
    """(B, 1) int64, which of WORDS each text has."""
    return torch.tensor([[next(i for i, w in enumerate(WORDS) if w in text)] for text in texts])


def tower(vectors=None, scale=20.0, width=toys.CONFIG.features):
    """Random vectors unless given, (words, width)."""
    if vectors is None:
        vectors = torch.randn(len(WORDS), width, generator=toys.generator(11))
    return TextTower(Words(vectors, scale), tokenizer)


def coloured(classes=5, per_class=20, noise=50, seed=0):
    """Images of the first words, every class in a colour of its own, in noise."""
    g = toys.generator(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    colour = torch.randint(60, 196, (classes, 3, 1, 1), generator=toys.generator(5))[labels]
    pixels = colour + torch.randint(-noise, noise + 1, (len(labels), 3, 16, 16), generator=g)
    return Pixels(pixels.to(torch.uint8), labels.numpy(), WORDS[:classes], "coloured")


def aligned(vit, scale=20.0, classes=7):
    """A tower whose texts are the mean features of their classes' images: it can classify."""
    data = coloured(classes, per_class=40, seed=9)
    with torch.no_grad():
        features = vit(vit.normalise(data.pixels.float() / 255))
    means = features.unflatten(0, (classes, -1)).mean(1)
    vectors = torch.randn(len(WORDS), features.shape[1], generator=toys.generator(11))
    vectors[:classes] = means - means.mean(0)
    return tower(vectors, scale)

"""Models of other libraries with random weights that leave nothing untested."""

import functools
import re

import torch
from torch import nn


def bare(build, *arguments, **keywords) -> nn.Module:
    """A model whose own initialisation is skipped: at true shapes it takes most of the time."""
    with torch.device("meta"):
        model = build(*arguments, **keywords)
    return model.to_empty(device="cpu")


@functools.cache
def noise() -> torch.Tensor:
    return torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights with outputs of order 1 in which no bias, token or norm is idle."""

    def draw(x: torch.Tensor, std: float, mean: float = 0.0) -> None:
        nonlocal seed
        seed += 1
        start = seed * 99_991 % (len(noise()) - x.numel())  # a window: cheaper than fresh noise
        x.copy_(noise()[start : start + x.numel()].view_as(x) * std + mean)

    with torch.no_grad():
        for name, x in module.named_parameters():
            if x.numel() == 0:
                continue
            if x.ndim >= 2 and not re.search("pos|cls|class_emb|dist|prefix", name):
                draw(x, (x.shape[0] if name.endswith("proj") else x[0].numel()) ** -0.5)
            elif x.ndim == 1 and re.search(r"(norm|ln_|bn).*weight", name):
                draw(x, 0.2, 1.0)
            else:
                draw(x, 0.3)
        for name, x in module.named_buffers():
            if name.endswith("running_mean"):
                draw(x, 0.3)
            elif name.endswith("running_var"):
                draw(x, 0.1, 1.0)
            elif name.endswith("num_batches_tracked"):
                x.zero_()
            elif name.endswith("position_ids"):
                x.copy_(torch.arange(x.shape[-1]))
    return module.eval().requires_grad_(False)

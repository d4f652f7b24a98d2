"""The demo prior: a small BatchNorm ResNet, and exact statistics for its BatchNorms.

Part of `train_demo_backbone.py`. B images, C channels or classes.
"""

from __future__ import annotations

import json

import torch
from demo_views import SIDE, normalise
from torch import Tensor, nn

from fastrecycle.vit_config import HALF


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; torchvision's names."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class PriorNet(nn.Module):
    """A small ResNet for 64 px: stem 3x3 of stride 2, no pooling; torchvision's names."""

    def __init__(self, blocks: tuple[int, int, int], classes: int):
        super().__init__()
        widths = (32, 64, 128)
        self.conv1 = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for layer, (width, depth) in enumerate(zip(widths, blocks, strict=True), start=1):
            stage = []
            for index in range(depth):
                stride = 2 if index == 0 and layer > 1 else 1
                stage.append(BasicBlock(inputs, width, stride))
                inputs = width
            setattr(self, f"layer{layer}", nn.Sequential(*stage))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of normalised images."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


@torch.no_grad()
def estimate_statistics(net: nn.Module, pixels: Tensor, batch: int = 1024) -> None:
    """Set each BatchNorm's mean and biased variance to those of its input over all images.

    One layer after the other, each with the statistics of those before it already in place, so
    they are exactly the moments that the network in inference mode sees.

    Args:
        net: put in eval mode.
        pixels: (N, 3, S, S) uint8.

    """
    net.eval()
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:  # in the order of execution, up to branches that do not feed each other
        seen: list[tuple[int, Tensor, Tensor]] = []

        def record(_: nn.Module, inputs: tuple[Tensor], seen: list = seen) -> None:
            var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
            seen.append((len(inputs[0]), mean.double(), var.double()))

        hook = layer.register_forward_pre_hook(record)
        for part in pixels.split(batch):
            net(normalise(part.float()))
        hook.remove()
        total = sum(n for n, _, _ in seen)
        mean = sum(n * m for n, m, _ in seen) / total
        square = sum(n * (v + m * m) for n, m, v in seen) / total
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(square - mean * mean)


def exported(net: PriorNet) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) that `fastrecycle.prior.load_prior` reads; the classifier stays behind.

    Weights are fp16; statistics fp32, since the inversion is measured against them.
    """
    tensors = {
        name: tensor.float() if "running" in name else tensor.half()
        for name, tensor in net.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    spec = {"block": "basic", "stem_stride": 2, "maxpool": False, "stride_in": "conv1",
            "eps": 1e-5, "mean": HALF, "std": HALF, "image_size": SIDE}  # fmt: skip
    return tensors, {"fastrecycle.prior": json.dumps(spec)}

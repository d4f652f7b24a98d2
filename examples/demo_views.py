"""Images on the device, their augmented views, and what the teacher makes of these.

Part of `train_demo_backbone.py`. B images, V views, F features, S side (64 px).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fastrecycle.block import Block
from fastrecycle.data import load_dataset
from fastrecycle.files import load_safetensors
from fastrecycle.vit import ViT
from fastrecycle.vit_config import PRESETS, ViTConfig

SIDE = 64  # pixels, of the student and of the stored views
TEACHER_SIDE = 224  # pixels


# ---------------------------------------------------------------------- images


@dataclass(frozen=True)
class Images:
    """Decoded images: uint8 (N, 3, S, S) and int64 labels (N,), on the CPU or the device."""

    pixels: Tensor
    labels: Tensor
    classes: int

    def take(self, index: np.ndarray) -> Images:
        """The images at `index`."""
        where = torch.from_numpy(index)
        return Images(self.pixels[where], self.labels[where], self.classes)

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)


def read_images(path: Path, split: str, per_class: int | None = None) -> Images:
    """Decode one split at 64 px (bicubic), up to `per_class` images of each class."""
    dataset = load_dataset(path, split)
    index = np.arange(len(dataset))
    if per_class is not None:
        index = np.concatenate(
            [np.flatnonzero(dataset.labels == c)[:per_class] for c in np.unique(dataset.labels)]
        )

    def decode(image: Image.Image) -> Tensor:
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    batches = dataset.images(index, decode, batch_size=512)
    pixels = torch.cat(list(tqdm(batches, desc=path.name, total=math.ceil(len(index) / 512))))
    return Images(pixels, torch.from_numpy(dataset.labels[index]), len(dataset.class_names))


def split_held_out(images: Images, seed: int, share: float = 0.02) -> tuple[Images, Images]:
    """(training, held out): the same share of each class, at least one image, is held out."""
    rng, labels = np.random.default_rng(seed), images.labels.numpy()
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        held[own[: max(1, round(share * len(own)))]] = True
    return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))


def resample_matrix(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """Bicubic resampling (a = -1/2, antialiased when shrinking, as Pillow's) as a matrix.

    Args:
        start, length: (B,) in pixels: the stretch of the input that the output covers.
        inputs, outputs: sides in pixels.

    Returns:
        (B, outputs, inputs); M_y @ x @ M_x^T resamples x.

    """
    at = torch.arange(max(inputs, outputs), device=start.device) + 0.5
    scale = (length / outputs)[:, None, None]
    centre = start[:, None, None] + at[None, :outputs, None] * scale
    t = (at[:inputs] - centre).abs() / scale.clamp_min(1)
    far = torch.where(t < 2, ((-0.5 * t + 2.5) * t - 4) * t + 2, 0)
    weight = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, far)
    return weight / weight.sum(-1, keepdim=True)


def shrink_matrix(side: int, device: torch.device) -> Tensor:
    """Shrink 64 px to `side` px and enlarge to 64 px again: (S, S)."""
    zero = torch.zeros(1, device=device)
    down = resample_matrix(zero, zero + SIDE, SIDE, side)
    return (resample_matrix(zero, zero + side, side, SIDE) @ down)[0]


def normalise(pixels: Tensor) -> Tensor:
    """[0, 255] to the input space of teacher, student and prior alike (mean = std = 1/2)."""
    return pixels * (2 / 255) - 1


# ---------------------------------------------------------------------- forward passes


def block_forward(block: Block, x: Tensor, branch: Tensor | None = None) -> Tensor:
    """One transformer block as `Block` computes it; branch (2, B, 1, 1) scales its branches."""
    qkv = nn.functional.linear(block.norm1(x), block.qkv.weight, block.qkv.bias)
    q, k, v = qkv.unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = block.proj(y)
    x = x + (y if branch is None else branch[0] * y)
    y = block.fc2(nn.functional.gelu(block.fc1(block.norm2(x))))
    return x + (y if branch is None else branch[1] * y)


BlockForward = Callable[[Block, Tensor, Tensor | None], Tensor]


def compiled_block(device: torch.device) -> BlockForward:
    """`block_forward`, compiled on CUDA: one block's code serves all, so it builds in seconds."""
    return torch.compile(block_forward, dynamic=False) if device.type == "cuda" else block_forward


def forward(
    vit: ViT, images: Tensor, run_block: BlockForward, branches: Tensor | None = None
) -> Tensor:
    """Features (B, F) in float32; bf16 products on CUDA. branches: (depth, 2, B, 1, 1) or None."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        x = vit.embed(images)
        for i, block in enumerate(vit.blocks):
            x = run_block(block, x, None if branches is None else branches[i])
        return vit.norm(x[:, 0]).float()


def load_teacher(path: Path) -> tuple[ViT, Tensor, Tensor]:
    """ViT-Ti/16 and its ImageNet head: weight (1000, F), bias (1000,)."""
    tensors, _ = load_safetensors(path)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    vit = ViT.from_state_dict(tensors, PRESETS["vit_ti_16"])
    return vit, tensors["head.weight"], tensors["head.bias"]


def resampled(teacher: ViT, config: ViTConfig) -> ViT:
    """The teacher's weights at the student's patches and positions.

    A patch of 8 px then gives what the teacher computes from it enlarged to 16 px.
    """
    state = teacher.state_dict()
    side, big = config.patch_size, teacher.config.patch_size
    zero = torch.zeros(1)
    enlarge = resample_matrix(zero, zero + side, side, big)[0]
    weight = state["patch_embed.weight"]
    state["patch_embed.weight"] = enlarge.T @ weight @ enlarge
    grid = teacher.config.grid
    prefix, positions = state["pos_embed"].split((config.prefix_tokens, teacher.config.patches))
    move = resample_matrix(zero, zero + grid, grid, config.grid)[0]
    positions = positions.T.unflatten(1, (grid, grid))
    positions = (move @ positions @ move.T).flatten(1).T
    state["pos_embed"] = torch.cat((prefix, positions))
    vit = ViT(config)
    vit.load_state_dict(state)
    return vit


# ---------------------------------------------------------------------- views


@dataclass(frozen=True)
class Views:
    """Augmented images with what the teacher makes of them; the first `plain` are not mixed."""

    images: Tensor  # (V, S, S, 3) uint8
    features: Tensor  # (V, F) float16, the teacher's
    label: Tensor  # (V,) int64
    other: Tensor  # (V,) int64, label of the image mixed in
    share: Tensor  # (V,) float32, of `label`
    plain: int
    variance: Tensor  # () of the teacher's feature, mean over its dimensions


def uniform(
    generator: torch.Generator, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def crops(pixels: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Random resized crops, flips and colour jitter: (B, 3, S, S) in [0, 255], float32."""
    b = (len(pixels),)
    area = uniform(generator, b, smallest)
    aspect = uniform(generator, b, -math.log(4 / 3), math.log(4 / 3)).exp()
    matrices = []
    for length in (area * aspect).sqrt(), (area / aspect).sqrt():
        length = SIDE * length.clamp_max(1)
        matrices.append(
            resample_matrix(uniform(generator, b) * (SIDE - length), length, SIDE, SIDE)
        )
    vertical, horizontal = matrices
    mirrored = uniform(generator, b)[:, None, None] < 0.5
    horizontal = torch.where(mirrored, horizontal.flip(1), horizontal)
    x = vertical[:, None] @ pixels.float() @ horizontal.transpose(1, 2)[:, None]
    brightness, contrast, saturation = uniform(generator, (3, *b, 1, 1, 1), 0.6, 1.4)
    x = x * brightness
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * contrast + mean
    saturation = torch.where(uniform(generator, (*b, 1, 1, 1)) < 0.1, 0.0, saturation)
    gray = x.mean(1, keepdim=True)
    return ((x - gray) * saturation + gray).clamp(0, 255)


def mix(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix (evenly, shares uniform) of each image with the one before it in the batch.

    Returns the images and the share of each that is its own, (B,).
    """
    b = (len(x),)
    share = uniform(generator, b)
    at = torch.arange(SIDE, device=x.device) + 0.5
    half = 0.5 * SIDE * (1 - share).sqrt()
    inside = [(at - SIDE * uniform(generator, b)[:, None]).abs() < half[:, None] for _ in range(2)]
    box = (inside[0][:, :, None] & inside[1][:, None, :]).float()[:, None]  # (B, 1, S, S)
    cut = uniform(generator, b) < 0.5
    own = torch.where(cut[:, None, None, None], 1 - box, share[:, None, None, None])
    mixed = own * x + (1 - own) * x.roll(1, 0)
    return mixed, torch.where(cut, 1 - box.mean((1, 2, 3)), share)


@torch.no_grad()
def make_views(
    images: Images,
    teacher: ViT,
    run_block: BlockForward,
    *,
    views: int,
    smallest: float,
    seed: int,
    chunk: int = 2048,
) -> Views:
    """Augment each image `views` times and let the teacher see each result at 224 px.

    Args:
        images, teacher: on the same device.
        run_block: see `compiled_block`.
        views: of each image, half of them mixed.
        smallest: share of the image's area in a view.
        seed: of crops, jitter and mixing.
        chunk: views at a time.

    """
    device = images.pixels.device
    generator = torch.Generator(device).manual_seed(seed)
    n = len(images.pixels)
    order = torch.cat([torch.randperm(n, generator=generator, device=device) for _ in range(views)])
    count, plain, chunk = len(order), len(order) // 2, min(chunk, len(order))
    stored = torch.empty(count, SIDE, SIDE, 3, dtype=torch.uint8, device=device)
    features = torch.empty(count, teacher.config.width, dtype=torch.float16, device=device)
    share = torch.ones(count, device=device)
    other = images.labels[order]
    zero = torch.zeros(1, device=device)
    enlarge = resample_matrix(zero, zero + SIDE, SIDE, TEACHER_SIDE)[0]
    progress = tqdm(total=count, desc="views", unit="image", unit_scale=True)
    for start in range(0, count, chunk):
        start = min(start, count - chunk)  # the last chunk overlaps: one shape, one compilation
        part = slice(start, start + chunk)
        x = crops(images.pixels[order[part]], smallest, generator)
        mixed, own = mix(x, generator)
        is_mixed = torch.arange(start, start + chunk, device=device) >= plain
        x = torch.where(is_mixed[:, None, None, None], mixed, x).round()
        share[part] = torch.where(is_mixed, own, 1.0)
        other[part] = images.labels[order[part]].roll(1)
        stored[part] = x.to(torch.uint8).permute(0, 2, 3, 1)
        large = (enlarge @ x @ enlarge.T).clamp(0, 255)
        features[part] = forward(teacher, normalise(large), run_block).half()
        progress.update(chunk)
    progress.close()
    if not features.isfinite().all():
        raise RuntimeError("make_views: the teacher's features hold NaN or infinity")
    variance = features[:plain].float().var(0).mean()
    return Views(stored, features, images.labels[order], other, share, plain, variance)


def view_batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices (batch,) below `count`, without end; each pass in another order."""
    while True:
        order = torch.randperm(count, generator=generator, device=generator.device)
        yield from order.split(batch)[: max(1, count // batch)]


def shifted(views: Views, index: Tensor, generator: torch.Generator, reach: int = 4) -> Tensor:
    """Views moved by up to `reach` px (edges reflected), flipped, relit: (B, 3, S, S) float32."""
    b, at = len(index), torch.arange(SIDE, device=index.device)
    mirrored = torch.rand((b, 1), generator=generator, device=index.device) < 0.5
    move = torch.randint(-reach, reach + 1, (2, b, 1), generator=generator, device=index.device)
    rows, columns = at + move[0], torch.where(mirrored, SIDE - 1 - at, at) + move[1]
    rows, columns = ((SIDE - 1) - ((SIDE - 1) - i.abs()).abs() for i in (rows, columns))
    x = views.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    x = x.permute(0, 3, 1, 2).float()
    light, contrast = uniform(generator, (2, b, 1, 1, 1), 0.85, 1.15)
    return ((x - 127.5) * contrast + 127.5 * light).clamp(0, 255)


def label_loss(logits: Tensor, views: Views, index: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with both labels of each view, by their shares."""
    log_p = logits.log_softmax(-1)
    share = views.share[index]
    own = log_p.gather(1, views.label[index][:, None]).squeeze(1)
    other = log_p.gather(1, views.other[index][:, None]).squeeze(1)
    target = share * own + (1 - share) * other
    return -((1 - smoothing) * target + smoothing * log_p.mean(-1)).mean()

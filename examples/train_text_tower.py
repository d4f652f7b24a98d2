"""A small text tower for ViT-Ti/16: a two-tower model on which zero-shot recycling can be tried.

    python examples/train_text_tower.py --data-root data --out runs/two_tower
    fastrecycle eval --dataset cifar_fs --backbone runs/two_tower/vit.safetensors --lora none \
        --shots 0 --text runs/two_tower/text

This is no CLIP. The image tower is frozen, and was itself trained on ImageNet with labels; it gains
a linear projection. The text tower, a small transformer over byte pairs, starts from nothing and
sees two things: images of training classes with their names, under CLIP's contrastive loss, and
pairs of name and definition of ImageNet-21k's WordNet classes (timm has them), under the same loss
between texts. Definitions are all that it can know of a class whose images it has not seen.

Accuracy at 0 shots is printed for classes whose images were not trained on, beside a control with
their names exchanged, which must be about chance.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fastrecycle import ViT
from fastrecycle.data import load_dataset
from fastrecycle.eval import Result, decode, embed, embed_episodes, score_zero_shot
from fastrecycle.text import TextConfig, TextNetwork, TextTower, spoken, text_tokenizer

HALF = (0.5, 0.5, 0.5)
TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "{}")
EXCHANGES = 20  # of names, in the control
CUDA = torch.cuda.is_available()
DATA = Path(os.environ.get("FASTRECYCLE_DATA", "data"))


@dataclass(frozen=True)
class Training:
    """The text tower, and how both towers are brought together."""

    # Adam steps.
    steps: int = 3000
    # Peak learning rate.
    lr: float = 1e-3
    # Images of each class in a step, each class once beside all others.
    images: int = 4
    # Pairs of name and definition in a step; 0 trains on names of images alone.
    pairs: int = 512
    # Share of the steps in which images meet the definitions of their classes, where known.
    definitions: float = 0.5
    # AdamW's weight decay.
    weight_decay: float = 0.1
    # Width, layers and heads of the text transformer, and tokens of a text.
    width: int = 128
    layers: int = 2
    heads: int = 4
    context_length: int = 32
    # Width of the shared space.
    output_dim: int = 128


TRAINING = Training()


def wordnet() -> list[tuple[list[str], str]]:
    """(names, definition) of ImageNet-21k's classes."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-21k")
    told = (info.index_to_description(i, detailed=True) for i in range(info.num_classes()))
    split = (text.partition(": ") for text in told)
    return [(names.split(", "), definition) for names, _, definition in split if definition]


def clip_loss(one: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss: cross-entropy of each row's partner, both ways, of (..., n, D) of norm 1."""
    logits = scale * one @ other.transpose(-1, -2)
    truth = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape[:-1])
    both = (logits, logits.transpose(-1, -2))
    return sum(cross_entropy(x.flatten(0, -2), truth.flatten()) for x in both) / 2


def train_towers(
    features: Tensor,
    labels: np.ndarray,
    names: Sequence[str],
    config: Training = TRAINING,
    lexicon: Sequence[tuple[list[str], str]] = (),
    seed: int = 0,
) -> tuple[Tensor, TextTower]:
    """The image tower's projection (output_dim, F), and the text tower.

    Args:
        features: (N, F) of training images, on the device to use.
        labels: (N,) classes.
        names: of the classes.
        config: see `Training`.
        lexicon: (names, definition) of classes, seen or not.
        seed: of the start and of everything drawn.

    """
    device = features.device
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shape = TextConfig(
        config.output_dim, config.width, config.heads, config.layers, config.context_length
    )
    network, tokenizer = TextNetwork(shape).to(device), text_tokenizer(shape)
    projection = nn.Linear(features.shape[1], config.output_dim, bias=False).to(device)
    names = [spoken(name) for name in names]
    meaning = {name.lower(): text for own, text in reversed(lexicon) for name in own}
    described = [meaning.get(name.lower()) for name in names]
    members = [np.flatnonzero(labels == c) for c in range(len(names))]

    def encode(texts: Sequence[str]) -> Tensor:
        return network.encode_text(tokenizer(list(texts)).to(device), normalize=True)

    def prompts(given: Sequence[str]) -> list[str]:
        return [TEMPLATES[rng.integers(len(TEMPLATES))].format(name) for name in given]

    parameters = [*projection.parameters(), *network.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, config.steps)
    began = time.perf_counter()
    for step in range(config.steps):
        rows = np.stack([rng.choice(m, config.images) for m in members], 1)  # (images, classes)
        image = normalize(projection(features[torch.from_numpy(rows).to(device)]), dim=-1)
        told = prompts(names)
        if rng.random() < config.definitions:
            told = [text or name for text, name in zip(described, told)]
        count = config.pairs if lexicon else 0
        pairs = [lexicon[i] for i in rng.integers(len(lexicon), size=count)] if count else []
        named = prompts([own[rng.integers(len(own))] for own, _ in pairs])
        texts = encode([*told, *named, *(definition for _, definition in pairs)])
        classes, left, right = texts.split((len(names), count, count))
        scale = network.logit_scale.exp().clamp_max(100)
        loss = clip_loss(image, classes.expand(config.images, -1, -1), scale)
        if count:
            loss = loss + clip_loss(left, right, scale)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 200 == 0 or step == config.steps - 1:
            spent = time.perf_counter() - began
            print(f"step {step + 1:5d}  loss {loss.item():.3f}  {spent:.0f} s", flush=True)
    return projection.weight.detach(), TextTower(network, tokenizer, TEMPLATES)


def with_projection(vit: ViT, weight: Tensor) -> ViT:
    """The same backbone with a linear projection of its feature."""
    made = ViT(replace(vit.config, out_dim=len(weight))).to(weight.device)
    made.load_state_dict({**vit.state_dict(), "head_proj.weight": weight})
    return made.requires_grad_(False)


def main(
    data_root: Path = DATA,
    out: Path = Path("runs/two_tower"),
    backbone: Path | None = None,
    train: tuple[str, ...] = ("cifar_fs", "tiny_imagenet"),
    unseen: tuple[str, ...] = ("cifar_fs",),
    split: str = "val",
    per_class: int = 120,
    training: Training = TRAINING,
    tasks: int = 600,
    ways: int = 5,
    queries: int = 15,
    seed: int = 0,
    device: str = "cuda" if CUDA else "cpu",
) -> dict[str, tuple[Result, Result]]:
    """Train the text tower, save the two-tower model and score it on classes not seen.

    Args:
        data_root: folder of the data sets and of weights/.
        out: vit.safetensors and text/ go there.
        backbone: the image tower; unset: ViT-Ti/16 of data_root/weights.
        train: data sets whose training classes are seen.
        unseen: data sets whose `split` is scored.
        split: "val"; "test" once everything is chosen.
        per_class: images of each class that are embedded.
        training: see `Training`.
        tasks: 0-shot tasks.
        ways: classes of a task.
        queries: images of each class in a task.
        seed: of everything drawn.
        device: cuda or cpu.

    Returns:
        {data set: (accuracy, accuracy with names exchanged)}.

    """
    told = {"mean": HALF, "std": HALF} if backbone is None else None
    path = data_root / "weights/vit_tiny_patch16_224_augreg.safetensors"
    vit = ViT.from_pretrained(backbone or path, config=told).to(device)
    precision = "bf16" if device.startswith("cuda") else "fp32"
    features, labels, names = [], [], []
    for name in train:
        data = load_dataset(name, "train", data_root)
        classes = np.unique(data.labels)
        rows = np.concatenate([np.flatnonzero(data.labels == c)[:per_class] for c in classes])
        features.append(embed(vit, None, data, rows, precision=precision))
        # a class of two sets is one class
        names += [n for n in map(spoken, data.class_names) if n not in names]
        labels.append([names.index(spoken(data.class_names[c])) for c in data.labels[rows]])
        print(f"{name}: {len(rows)} images of {len(data.class_names)} classes", flush=True)
    weight, tower = train_towers(
        torch.cat(features), np.concatenate(labels), names, training,
        wordnet() if training.pairs else (), seed,
    )  # fmt: skip
    both = with_projection(vit, weight)
    both.save(out / "vit.safetensors")
    tower.save(out / "text")
    results, rng = {}, np.random.default_rng(seed)
    for name in unseen:
        pixels = decode(both, name, split, data_root)
        features, drawn = embed_episodes(
            both, None, pixels, shots=(1,), ways=ways, queries=queries, tasks=tasks, seed=seed,
            precision=precision,
        )  # fmt: skip
        result = score_zero_shot(features, tower.classes(pixels.class_names), drawn[1])
        # one exchange may fall among related classes, so the control is the mean of many
        deals = [rng.permutation(pixels.class_names).tolist() for _ in range(EXCHANGES)]
        control = Result.of(
            np.array(
                [score_zero_shot(features, tower.classes(d), drawn[1]).accuracy for d in deals]
            )
        )
        results[name] = (result, control)
        print(f"{name} {split}, {ways}-way 0-shot: {result}; names exchanged: {control}")
    return results


if __name__ == "__main__":
    tyro.cli(main)

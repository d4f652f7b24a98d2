"""Fine-tuning-free evaluation: 600 frozen few-shot tasks, each image embedded once (Sec. 3, 5).

N images, F features, T tasks, W ways, K shots, Q queries a class. Run as a command:
`python -m fastrecycle.eval --dataset cub`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrecycle.classifier import Distance, Embedder, class_means, prototype_logits
from fastrecycle.data import (
    Episodes,
    Groups,
    ImageDataset,
    RaggedEpisodes,
    TaskSizes,
    episodes,
    load_dataset,
    meta_dataset_episodes,
)
from fastrecycle.embedding_cache import EmbeddingCache
from fastrecycle.lora import LoRA
from fastrecycle.ops import Backend
from fastrecycle.text import ClassEmbeddings, TextTower, check_width
from fastrecycle.vit import ViT

Progress = Callable[[int, int], None]
Predict = Callable[[Tensor, Tensor], Tensor]

# images of one file of an embedding cache: what a kill may cost
_CACHE_FILE_IMAGES = 4096


@dataclass(frozen=True, eq=False)
class Result:
    """Accuracy on a task list, in percent."""

    accuracy: float  # mean over tasks
    ci95: float  # half width of its 95 % interval, 1.96 sigma / sqrt(T)
    per_task: np.ndarray  # (T,)

    @staticmethod
    def of(per_task: np.ndarray) -> Result:
        """From the accuracy of each task, in percent."""
        spread = per_task.std(ddof=1) if len(per_task) > 1 else float("nan")
        half = 1.96 * spread / len(per_task) ** 0.5
        return Result(float(per_task.mean()), float(half), per_task)

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} ± {self.ci95:.2f} %"

    def minus(self, other: Result) -> Result:
        """Paired difference on the same tasks, in points, with its own interval.

        Raises:
            ValueError: the task lists have different lengths.
        """
        if len(self.per_task) != len(other.per_task):
            raise ValueError(
                f"minus: results on the same tasks expected, got {len(self.per_task)} and"
                f" {len(other.per_task)} tasks"
            )
        return Result.of(self.per_task - other.per_task)


@dataclass(frozen=True, eq=False)
class Pixels:
    """A decoded and resized split, kept as 8-bit pixels to be embedded again and again."""

    pixels: Tensor  # (N, 3, S, S) uint8
    labels: np.ndarray  # (N,) int64
    class_names: tuple[str, ...]
    name: str
    groups: Groups | None = None  # see ImageDataset

    def to(self, device: torch.device | str) -> Pixels:
        """The same with its pixels on another device."""
        return replace(self, pixels=self.pixels.to(device))

    def digests(self, indices: np.ndarray) -> np.ndarray:
        """SHA-256 of each image's resized pixels, (n, 32) uint8."""
        rows = (self.pixels[int(index)].cpu().numpy().tobytes() for index in indices)
        joined = b"".join(hashlib.sha256(b"resized\0" + row).digest() for row in rows)
        return np.frombuffer(joined, np.uint8).reshape(-1, 32)


# As `batch_features`, wherever the forward passes are done; a batch may be of any length.
FeaturesOf = Callable[[Embedder, ImageDataset | Pixels, np.ndarray, int], Iterator[Tensor]]


def decode(
    vit: ViT,
    dataset: Any,
    split: str = "test",
    data_root: str | Path | None = None,
    progress: Progress | None = None,
) -> Pixels:
    """Decode and resize a whole split for a backbone.

    Args:
        vit: decides the size.
        dataset: what `load_dataset` takes.
        split: "train", "val" or "test".
        data_root: where registered data sets are.
        progress: called with (images done, images in all).
    """
    source = load_dataset(dataset, split, data_root)
    batches = []
    for batch in source.images(np.arange(len(source)), vit.resize):
        batches.append(batch)
        if progress is not None:
            progress(sum(map(len, batches)), len(source))
    pixels = torch.cat(batches)
    return Pixels(pixels, source.labels, source.class_names, source.name, source.groups)


@torch.no_grad()
def embed(
    vit: ViT,
    lora: LoRA | None,
    images: ImageDataset | Pixels,
    indices: np.ndarray | None = None,
    *,
    prune: dict[int, float] | None = None,
    batch_size: int = 128,
    precision: str = "fp32",
    backend: Backend = "reference",
    progress: Progress | None = None,
    embedding_cache: str | Path | None = None,
    features_of: FeaturesOf | None = None,
) -> Tensor:
    """Features of the images at `indices` (all by default), in their order: (n, F) float32.

    Args:
        vit, lora, prune, precision, backend: see `Embedder`.
        images: of a split.
        indices: (n,) integers.
        batch_size: images a forward pass.
        progress: called with (images done, images in all).
        embedding_cache: folder of features that earlier calls left; those of other weights, LoRAs,
            files or settings are not taken. What is new is added.
        features_of: where forward passes are done; None: in this process (`batch_features`).

    """
    forward = Embedder(vit, lora, prune=prune, precision=precision, backend=backend)
    features_of = features_of or batch_features
    indices = np.arange(len(images.labels)) if indices is None else indices
    if embedding_cache is None:
        batches = features_of(forward, images, indices, batch_size)
        return torch.cat(list(_told(batches, progress, 0, len(indices))))
    cache = EmbeddingCache(embedding_cache, forward)
    digests = images.digests(indices)
    known, features = cache.find(digests)
    new = np.flatnonzero(~known)
    start = written = 0
    batches = features_of(forward, images, indices[new], batch_size)
    for batch in _told(batches, progress, int(known.sum()), len(indices)):
        features[torch.from_numpy(new[start : start + len(batch)])] = batch.cpu()
        start += len(batch)
        if start - written >= _CACHE_FILE_IMAGES or start == len(new):
            rows = new[written:start]
            cache.add(digests[rows], features[torch.from_numpy(rows)])
            written = start
    return features.to(forward.device)


def _told(
    batches: Iterator[Tensor], progress: Progress | None, done: int, total: int
) -> Iterator[Tensor]:
    """The same batches, each reported; `done` images were known before."""
    if progress is not None and done:
        progress(done, total)
    for batch in batches:
        yield batch
        done += len(batch)
        if progress is not None:
            progress(done, total)


def batch_features(
    forward: Embedder, images: ImageDataset | Pixels, indices: np.ndarray, batch_size: int
) -> Iterator[Tensor]:
    """Features of the images at `indices`, in their order, batch by batch: (B, F) float32.

    Args:
        forward: the network.
        images: of a split.
        indices: (n,) integers.
        batch_size: images a forward pass; the last has what is left.

    """
    vit = forward.source
    batches: Iterator[Tensor]
    if isinstance(images, Pixels):
        rows = torch.from_numpy(indices).to(images.pixels.device)
        batches = (images.pixels[part] for part in rows.split(batch_size) if len(part))
    else:
        batches = images.images(indices, vit.resize, batch_size)
    for batch in batches:
        pixels = batch.to(forward.device).float() / 255
        yield forward(vit.normalise(pixels), batch_size)


def score_episodes(
    features: Tensor, tasks: Episodes, distance: Distance = "euclidean", batch: int | None = None
) -> Result:
    """Accuracy of nearest prototypes on each task, from the features of all images (Eq. 3b).

    Args:
        features: (N, F).
        tasks: of image indices.
        distance: see `prototype_logits`.
        batch: tasks at once; None: all on a GPU, as many as a cache holds on the CPU.

    """

    def nearest(support: Tensor, query: Tensor) -> Tensor:
        return prototype_logits(class_means(support, tasks.ways), query, distance).argmax(-1)

    return score_predictions(nearest, features, tasks, batch)


def score_predictions(
    predict: Predict, features: Tensor, tasks: Episodes, batch: int | None = None
) -> Result:
    """Accuracy of any rule on each task, from the features of all images.

    Args:
        predict: support (E, W K, F), class-major, and query (E, Q, F) -> the way of each (E, Q).
        features: (N, F).
        tasks: of image indices.
        batch: tasks at once, E; see `score_episodes`.

    """
    batch = batch or (len(tasks) if features.is_cuda else 50)
    truth = torch.from_numpy(tasks.query_ways).to(features.device)
    per_task = []
    for start in range(0, len(tasks), batch):
        support = torch.from_numpy(tasks.support[start : start + batch]).to(features.device)
        query = torch.from_numpy(tasks.query[start : start + batch]).to(features.device)
        guess = predict(features[support], features[query])
        per_task.append((guess == truth).float().mean(1))
    return Result.of(100 * torch.cat(per_task).double().cpu().numpy())


def score_zero_shot(
    features: Tensor, classes: ClassEmbeddings, tasks: Episodes, batch: int | None = None
) -> Result:
    """Accuracy on each task's queries of the classes' texts alone, its support left out.

    Args:
        features: (N, F).
        classes: texts of all classes of the data set, in the order of its labels.
        tasks: of image indices.
        batch: tasks at once; see `score_episodes`.

    """
    batch = batch or (len(tasks) if features.is_cuda else 50)
    truth = torch.from_numpy(tasks.query_ways).to(features.device)
    texts = classes.embeddings.to(features)
    per_task = []
    for start in range(0, len(tasks), batch):
        query = torch.from_numpy(tasks.query[start : start + batch]).to(features.device)
        ways = torch.from_numpy(tasks.classes[start : start + batch]).to(features.device)
        # neither the scale nor the image's norm changes which class is nearest
        guess = (features[query] @ texts[ways].transpose(1, 2)).argmax(-1)
        per_task.append((guess == truth).float().mean(1))
    return Result.of(100 * torch.cat(per_task).double().cpu().numpy())


def score_ragged(
    features: Tensor, tasks: RaggedEpisodes, distance: Distance = "euclidean"
) -> Result:
    """Accuracy of nearest prototypes on each task of Meta-Dataset's protocol (Eq. 3b).

    Args:
        features: (n, F) of `tasks.images`, in their order.
        tasks: of image indices.
        distance: see `prototype_logits`.

    """
    used = tasks.images
    accuracy = np.empty(len(tasks))
    for number in range(len(tasks)):
        task = tasks.task(number)
        rows, ways, query, truth = (
            torch.from_numpy(array).to(features.device)
            for array in (
                np.searchsorted(used, task.support),
                task.support_ways,
                np.searchsorted(used, task.query),
                task.query_ways,
            )
        )
        sums = features.new_zeros(len(task.classes), features.shape[1])
        sums.index_add_(0, ways, features[rows])
        prototypes = sums / torch.bincount(ways)[:, None]
        guess = prototype_logits(prototypes, features[query], distance).argmax(-1)
        accuracy[number] = 100 * (guess == truth).double().mean().item()
    return Result.of(accuracy)


def used_episodes(
    source: ImageDataset | Pixels,
    *,
    shots: Sequence[int],
    ways: int = 5,
    queries: int = 15,
    tasks: int = 600,
    seed: int = 0,
) -> tuple[dict[int, Episodes], np.ndarray]:
    """The frozen task lists of each of `shots`, and the images they use, ascending."""
    drawn = {
        count: episodes(
            source.labels, ways, count, queries, tasks, seed, class_names=source.class_names
        )
        for count in shots
    }
    return drawn, np.unique(np.concatenate([lists.images for lists in drawn.values()]))


def embed_episodes(
    vit: ViT,
    lora: LoRA | None,
    source: ImageDataset | Pixels,
    *,
    shots: Sequence[int],
    ways: int = 5,
    queries: int = 15,
    tasks: int = 600,
    seed: int = 0,
    **embedding: Any,
) -> tuple[Tensor, dict[int, Episodes]]:
    """The frozen task lists of each of `shots`, and the features of the images they use.

    Args:
        vit, lora: see `embed`.
        source: a split of a data set.
        shots, ways, queries, tasks, seed: see `evaluate`.
        embedding: named arguments of `embed`.

    Returns:
        (N, F), zero where no task uses an image, and {shots: tasks}.

    """
    drawn, used = used_episodes(
        source, shots=shots, ways=ways, queries=queries, tasks=tasks, seed=seed
    )
    features = embed(vit, lora, source, used, **embedding)
    everywhere = features.new_zeros(len(source.labels), features.shape[1])
    everywhere[torch.from_numpy(used).to(features.device)] = features
    return everywhere, drawn


def evaluate(
    vit: ViT,
    lora: LoRA | None,
    dataset: Any,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    tasks: int = 600,
    split: str = "test",
    seed: int = 0,
    distance: Distance = "euclidean",
    prune: dict[int, float] | None = None,
    data_root: str | Path | None = None,
    batch_size: int = 128,
    precision: str = "fp32",
    backend: Backend = "auto",
    progress: Progress | None = None,
    embedding_cache: str | Path | None = None,
    text: TextTower | None = None,
) -> Result:
    """Accuracy of a meta-LoRA (None: plain nearest class centre) without fine-tuning.

    The task list depends on the labels, the task's shape and the seed alone, so results of several
    LoRAs are paired: `a.minus(b)` has the interval of their difference. Each image is embedded
    once, on the device of the backbone.

    Args:
        vit: the backbone.
        lora: see above.
        dataset: a registered name, a folder, zip or tar of class folders, `(images, labels)`, or
            what `decode` returned.
        ways, shots, queries, tasks: shape and number of the tasks. At 0 shots, which `text` is for,
            the tasks are the 1-shot ones without their support, so that both can be paired.
        split: "train", "val" or "test".
        seed: of the task list.
        distance: "euclidean", "squared" or "cosine".
        prune: prune test images too (another protocol than the paper's; say so).
        data_root: where registered data sets are; None: the environment's FASTRECYCLE_DATA.
        batch_size: images a forward pass.
        precision: "fp32", "bf16" or "fp8", which needs the backend "triton".
        backend: "auto", "triton", "compile" or "reference": see `fastrecycle.ops`.
        progress: called with (images embedded, images in all).
        embedding_cache: folder of features from earlier calls; see `embed`.
        text: the text tower of the two-tower model whose image tower is `vit`, for 0 shots.

    Raises:
        FileNotFoundError: no such data set; the text says what to put where.
        ValueError: a LoRA or text tower of another backbone, fewer classes or images than a task
            needs, or, at 0 shots, no text tower or classes without names.
    """
    results = evaluate_shots(
        vit, lora, dataset, shots=(shots,), ways=ways, queries=queries, tasks=tasks, split=split,
        seed=seed, distance=distance, prune=prune, data_root=data_root, batch_size=batch_size,
        precision=precision, backend=backend, progress=progress, embedding_cache=embedding_cache,
        text=text,
    )  # fmt: skip
    return results[shots]


def evaluate_zero_shot(
    vit: ViT, lora: LoRA | None, text: TextTower, dataset: Any, **settings: Any
) -> Result:
    """`evaluate` at 0 shots (Table 12): images against the texts of their task's class names.

    Args:
        vit, lora: the image tower and its meta-LoRA; None: the plain two-tower model.
        text: the text tower of the same model, with its prompt templates.
        dataset: see `evaluate`; its classes need names made of words.
        settings: further named arguments of `evaluate`.

    Raises:
        FileNotFoundError, ValueError: see `evaluate`.

    """
    return evaluate(vit, lora, dataset, shots=0, text=text, **settings)


def evaluate_shots(
    vit: ViT,
    lora: LoRA | None,
    dataset: Any,
    *,
    shots: Sequence[int],
    ways: int = 5,
    queries: int = 15,
    tasks: int = 600,
    split: str = "test",
    seed: int = 0,
    distance: Distance = "euclidean",
    prune: dict[int, float] | None = None,
    data_root: str | Path | None = None,
    batch_size: int = 128,
    precision: str = "fp32",
    backend: Backend = "auto",
    progress: Progress | None = None,
    embedding_cache: str | Path | None = None,
    text: TextTower | None = None,
    features_of: FeaturesOf | None = None,
) -> dict[int, Result]:
    """`evaluate` at several shots, each image embedded once for all of them: {shots: Result}.

    Args:
        vit, lora, dataset, ways, queries, tasks, split, seed, distance, prune: see `evaluate`.
        data_root, batch_size, precision, backend, progress, embedding_cache, text: likewise.
        shots: of each result.
        features_of: see `embed`.

    Raises:
        FileNotFoundError, ValueError: see `evaluate`.

    """
    if 0 in shots and text is None:
        raise ValueError(
            "text: 0 shots need the text tower of the backbone's model, got none; give"
            ' text=TextTower.from_pretrained("open_clip:MODEL/PRETRAINED" or a folder), --text'
        )
    if lora is not None:
        lora = lora.fit(vit.config)
    source = dataset
    if not isinstance(dataset, Pixels):
        source = load_dataset(dataset, split, data_root)
    classes = None
    if 0 in shots and text is not None:
        classes = text.classes(source.class_names)  # raises before images are embedded
        check_width(classes.embeddings, vit.config.features)
    features, drawn = embed_episodes(
        vit, lora, source, shots=[k or 1 for k in shots], ways=ways, queries=queries, tasks=tasks,
        seed=seed, prune=prune, batch_size=batch_size, precision=precision, backend=backend,
        progress=progress, embedding_cache=embedding_cache, features_of=features_of,
    )  # fmt: skip
    return {
        k: score_episodes(features, drawn[k], distance)
        if k or classes is None
        else score_zero_shot(features, classes, drawn[1])
        for k in shots
    }


def evaluate_meta_dataset(
    vit: ViT,
    lora: LoRA | None,
    dataset: Any,
    *,
    tasks: int = 600,
    split: str = "test",
    seed: int = 0,
    sizes: TaskSizes | None = None,
    min_images: int | None = None,
    distance: Distance = "euclidean",
    data_root: str | Path | None = None,
    backend: Backend = "auto",
    **embedding: Any,
) -> Result:
    """`evaluate` on tasks of varying ways and shots, drawn as Meta-Dataset draws them.

    Omniglot's tasks are of one alphabet; ImageNet's of one branch of WordNet, where the export has
    a dataset_spec.json; other sets' of all classes.

    Args:
        vit, lora, dataset, split, seed, distance, data_root, backend: see `evaluate`.
        tasks: number of tasks.
        sizes: bounds of ways, shots and queries; None: the published ones.
        min_images: leave out classes with fewer images; None: one with a single image is an error.
        embedding: further named arguments of `embed`: prune, batch_size, precision, progress,
            embedding_cache, features_of.

    Raises:
        FileNotFoundError: no such data set; the text says what to put where.
        ValueError: a LoRA of another backbone, or fewer classes or images than a task needs.

    """
    if lora is not None:
        lora = lora.fit(vit.config)
    source = dataset if isinstance(dataset, Pixels) else load_dataset(dataset, split, data_root)
    drawn = meta_dataset_episodes(
        source.labels, tasks, seed, groups=source.groups, sizes=sizes, min_images=min_images,
        class_names=source.class_names,
    )  # fmt: skip
    features = embed(vit, lora, source, drawn.images, backend=backend, **embedding)
    return score_ragged(features, drawn, distance)


def main(arguments: list[str] | None = None) -> int:
    """`python -m fastrecycle.eval`: returns the exit status."""
    from fastrecycle.cli import run_eval

    return run_eval(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())

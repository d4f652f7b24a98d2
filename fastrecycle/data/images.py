"""A labelled image set and how its images are decoded."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastrecycle.data.groups import Groups
from fastrecycle.data.stores import Store

# What Pillow may try on a file of any content. Left out on purpose: EPS runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images of one split, decoded when asked for.

    Attributes:
        name: of the set.
        split: train, val or test.
        class_names: name of label 0, 1, ...; sorted by folder name or label.
        labels: (N,) int64.
        files: where each image lies, for messages.
        pixels: images by index, of any mode.
        groups: of classes, where Meta-Dataset draws the classes of a task from one of them.

    """

    name: str
    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    files: Sequence[str]
    pixels: Sequence[Image.Image]
    groups: Groups | None = None

    def __len__(self) -> int:
        """Number of images, N."""
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Image `index` as RGB.

        Raises:
            IndexError: index not in [0, N).
            ValueError: the file is broken, too large, or no image.

        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: index must be in [0, {len(self)}), got {index}")
        return to_rgb(self.pixels[index])

    def sha256(self) -> str:
        """Hex SHA-256 of every image's name, class and bytes (pixels, where it lies in memory)."""
        digest = hashlib.sha256()
        stored = self.pixels if isinstance(self.pixels, FileImages) else None
        for index, (file, label) in enumerate(zip(self.files, self.labels.tolist(), strict=True)):
            digest.update(f"{file}\0{self.class_names[label]}\0".encode())
            digest.update(stored.read(index) if stored else self.open(index).tobytes())
        return digest.hexdigest()

    def digests(self, indices: Any, workers: int | None = None) -> np.ndarray:
        """SHA-256 of each image's file, or of its size and RGB pixels where it has none.

        Args:
            indices: (n,) integers in [0, N).
            workers: see `images`.

        Returns:
            (n, 32) uint8.

        Raises:
            IndexError, ValueError: see `images`.

        """
        stored = self.pixels if isinstance(self.pixels, FileImages) else None

        def digest(index: int) -> Tensor:
            if stored is not None:
                content = b"file\0" + stored.read(index)
            else:
                image = self.open(index)
                content = f"pixels {image.size}\0".encode() + image.tobytes()
            return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)

        order, workers = self._checked(indices, workers)
        with contextlib.closing(_ahead(digest, order, workers, 4 * (workers + 1))) as found:
            rows = list(found)
        return torch.stack(rows).numpy() if rows else np.empty((0, 32), np.uint8)

    def images(
        self,
        indices: Any,
        transform: Callable[[Image.Image], Tensor],
        batch_size: int = 64,
        workers: int | None = None,
    ) -> Iterator[Tensor]:
        """Transformed images in the order of `indices`, as batches (B, ...), B <= batch_size.

        Threads decode ahead, at most one batch and one image a worker. Stopping early is safe.

        Args:
            indices: (n,) integers in [0, N); repeats are allowed.
            transform: PIL RGB -> tensor, of the same shape for every image.
            batch_size: images a batch, at least 1.
            workers: threads; 0 decodes in the caller's; None: one a CPU core, at most 8.

        Raises:
            IndexError: an index out of range.
            ValueError: a broken file, or a transform that fails or changes shape; names the file.

        """
        order, workers = self._checked(indices, workers)
        if batch_size < 1:
            raise ValueError(f"{self.name}: batch_size must be at least 1, got {batch_size}")
        return self._batches(order, transform, batch_size, workers)

    def _checked(self, indices: Any, workers: int | None) -> tuple[list[int], int]:
        """Indices as a list, and the number of threads."""
        order = np.asarray(indices)
        if order.size == 0:
            order = order.astype(np.int64)
        if order.ndim != 1 or order.dtype.kind not in "iu":
            raise ValueError(
                f"{self.name}: indices must be a (n,) integer array, got shape {order.shape}, "
                f"{order.dtype}; flatten tasks with .ravel()"
            )
        if order.size and (order.min() < 0 or order.max() >= len(self)):
            wrong = order.max() if order.max() >= len(self) else order.min()
            raise IndexError(f"{self.name}: index must be in [0, {len(self)}), got {wrong}")
        if workers is None:
            workers = min(8, os.cpu_count() or 1)
        if workers < 0:
            raise ValueError(f"{self.name}: workers must be at least 0, got {workers}")
        return [int(i) for i in order], workers

    def _batches(
        self,
        order: list[int],
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        workers: int,
    ) -> Iterator[Tensor]:
        def load(index: int) -> Tensor:
            image = self.open(index)
            try:
                tensor = transform(image)
            except Exception as error:
                raise ValueError(
                    f"{self.name}: transform failed on {self.files[index]}: {error}"
                ) from error
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{self.name}: transform must return a tensor, got {type(tensor).__name__} "
                    f"for {self.files[index]}"
                )
            return tensor

        with contextlib.closing(_ahead(load, order, workers, batch_size + workers)) as loaded:
            batch: list[Tensor] = []
            for index, tensor in zip(order, loaded, strict=True):
                if batch and tensor.shape != batch[0].shape:
                    raise ValueError(
                        f"{self.name}: transform must give one shape, got {tuple(tensor.shape)} "
                        f"for {self.files[index]} after {tuple(batch[0].shape)}; crop or resize "
                        "to a fixed size"
                    )
                batch.append(tensor)
                if len(batch) == batch_size:
                    yield torch.stack(batch)
                    batch = []
            if batch:
                yield torch.stack(batch)


class FileImages(Sequence[Image.Image]):
    """Images decoded from the files of a store."""

    def __init__(self, store: Store, files: list[str]) -> None:
        self._store, self._files = store, files

    def __len__(self) -> int:
        """Number of files."""
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        """Image `index`, loaded."""
        return decode(self.read(index), f"{self._files[index]} in {self._store.path}")

    def read(self, index: int) -> bytes:
        """The file of image `index` as it is."""
        return self._store.read(self._files[index])


class ArrayImages(Sequence[Image.Image]):
    """Images of a uint8 array (N, H, W) or (N, H, W, 3), not copied."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __len__(self) -> int:
        """Number of images."""
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        """Image `index`, gray or RGB."""
        return Image.fromarray(np.ascontiguousarray(self._array[index]))


def decode(
    data: bytes, where: str, max_pixels: int | None = None, who: str = "load_dataset"
) -> Image.Image:
    """Decode one image file, loaded whole.

    Args:
        data: the file.
        where: it lies, for messages.
        max_pixels: bound below PIL.Image.MAX_IMAGE_PIXELS.
        who: asks, for messages.

    Raises:
        ValueError: broken, cut short, of an unknown format, or with more pixels than
            `max_pixels` or PIL.Image.MAX_IMAGE_PIXELS (which Pillow itself only warns about).

    """
    bounds = [n for n in (max_pixels, Image.MAX_IMAGE_PIXELS) if n is not None]
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if bounds and image.width * image.height > min(bounds):
            raise Image.DecompressionBombError(f"{image.width} x {image.height}")
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        remedy = "; raise PIL.Image.MAX_IMAGE_PIXELS if you trust it" if max_pixels is None else ""
        raise ValueError(
            f"{who}: {where} has more than {min(bounds, default=0):,} pixels ({error}); "
            f"not decoded{remedy}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"{who}: {where} is not a whole image ({error}); copy or download it again"
        ) from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit gray keeps its upper byte, transparency is dropped."""
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert("RGB")


def _ahead(
    work: Callable[[int], Tensor], items: Iterable[int], workers: int, ahead: int
) -> Generator[Tensor, None, None]:
    """`map(work, items)` on threads, in order, with at most `ahead` results under way."""
    if workers == 0:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        pending: deque[Future[Tensor]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

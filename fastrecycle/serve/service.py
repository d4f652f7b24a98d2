"""What the page does, without the page: pictures in, answers and times out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastrecycle.classifier import FewShotClassifier
from fastrecycle.data.images import decode, to_rgb
from fastrecycle.lora import LoRA
from fastrecycle.ops import Backend
from fastrecycle.vit import ViT


@dataclass(frozen=True)
class Limits:
    """What a visitor may hand in."""

    file_bytes: int = 10_000_000  # of one file
    pixels: int = 40_000_000  # of one picture; a larger one is not decoded
    pictures: int = 50  # labelled at a time, and to classify at a time
    name: int = 60  # characters of a class name

    def __post_init__(self) -> None:
        for name in ("file_bytes", "pixels", "pictures", "name"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Example:
    """A labelled picture, already at the backbone's size."""

    label: str
    picture: Image.Image


@dataclass(frozen=True)
class Answer:
    """What was made of pictures."""

    pictures: tuple[Image.Image, ...]  # as the backbone saw them
    labels: tuple[str, ...]  # of each
    probabilities: np.ndarray  # (pictures, classes)
    classes: tuple[str, ...]
    examples: int
    adapting_ms: float  # one forward pass over the examples, their class means
    classifying_ms: float  # one over the pictures


def read_picture(path: str | Path, limits: Limits) -> Image.Image:
    """A picture file as RGB, of whatever its content says it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too large a file, too many pixels (not decoded then), broken, or no picture.

    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path.name}: no such file")
    size = path.stat().st_size
    if size > limits.file_bytes:
        raise ValueError(
            f"{path.name}: {size / 1e6:.1f} MB, at most {limits.file_bytes / 1e6:g} MB a picture"
        )
    return to_rgb(decode(path.read_bytes(), path.name, max_pixels=limits.pixels, who="picture"))


class Service:
    """A frozen backbone under a meta-LoRA that adapts to a visitor's pictures, one at a time.

    It remembers no visitor: examples come in with every call.

    Args:
        vit: the backbone, on the device to use.
        lora: a meta-LoRA; None: plain nearest class mean.
        limits: of what is taken.
        precision, backend: see `FewShotClassifier`.

    Raises:
        ValueError: a LoRA of another backbone.

    """

    def __init__(
        self,
        vit: ViT,
        lora: LoRA | None,
        limits: Limits | None = None,
        *,
        precision: str = "fp32",
        backend: Backend = "auto",
    ):
        self.limits = limits or Limits()
        self.vit = vit
        # all examples are one batch: adaptation is one forward pass
        self._classifier = FewShotClassifier(
            vit, None if lora is None else lora.fit(vit.config), batch_size=self.limits.pictures,
            precision=precision, backend=backend,
        )  # fmt: skip
        self._turn = threading.Lock()

    def add(
        self, examples: Sequence[Example], label: str, paths: Sequence[str | Path]
    ) -> tuple[Example, ...]:
        """The examples and new ones of one class; the same as before if any of them is refused.

        Args:
            examples: those already there.
            label: the new ones' class.
            paths: their files.

        Raises:
            FileNotFoundError, ValueError: see `read_picture`; no or too long a name, no pictures
                or too many.

        """
        label = " ".join(label.split())
        if not label:
            raise ValueError("class: needs a name")
        if len(label) > self.limits.name:
            raise ValueError(f"class: name of at most {self.limits.name} characters expected")
        if not paths:
            raise ValueError(f"pictures of {label}: none were given")
        if len(examples) + len(paths) > self.limits.pictures:
            raise ValueError(
                f"pictures: at most {self.limits.pictures} examples, got"
                f" {len(examples) + len(paths)}; clear some"
            )
        new = [Example(label, self._small(read_picture(path, self.limits))) for path in paths]
        return (*examples, *new)

    def classify(self, examples: Sequence[Example], paths: Sequence[str | Path]) -> Answer:
        """Adapt to the examples and classify pictures.

        Raises:
            FileNotFoundError, ValueError: see `read_picture`; no pictures or too many, or examples
                of fewer than two classes.

        """
        classes = {example.label for example in examples}
        if len(classes) < 2:
            raise ValueError(
                f"examples: pictures of at least two classes are needed, got {len(classes)}"
            )
        if not paths:
            raise ValueError("pictures: none to classify were given")
        if len(paths) > self.limits.pictures:
            raise ValueError(
                f"pictures: at most {self.limits.pictures} at a time, got {len(paths)}"
            )
        queries = [self._small(read_picture(path, self.limits)) for path in paths]
        support = self.vit.transform([example.picture for example in examples])
        pixels = self.vit.transform(queries)
        with self._turn:  # prototypes are the classifier's own, so one visitor at a time
            start = self._now()
            self._classifier.fit(support, [example.label for example in examples])
            adapted = self._now()
            probabilities = self._classifier.predict_proba(pixels)
            done = self._now()
            known = tuple(str(name) for name in self._classifier.classes_)
        return Answer(
            pictures=tuple(queries),
            labels=tuple(known[i] for i in probabilities.argmax(1)),
            probabilities=probabilities,
            classes=known,
            examples=len(examples),
            adapting_ms=1000 * (adapted - start),
            classifying_ms=1000 * (done - adapted),
        )

    def _small(self, picture: Image.Image) -> Image.Image:
        """A picture as the backbone sees it, so that a visitor's examples stay small in memory."""
        return Image.fromarray(self.vit.resize(picture).permute(1, 2, 0).numpy())

    def _now(self) -> float:
        """Seconds, when all work so far is done."""
        if self.vit.pos_embed.is_cuda:
            torch.cuda.synchronize(self.vit.pos_embed.device)
        return time.perf_counter()

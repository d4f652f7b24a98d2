"""Which LoRAs are inverted together: batches of a bank, and how many tasks memory takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from fastrecycle.config import InversionConfig
from fastrecycle.lora import LoRA
from fastrecycle.pruning import patches_after_blocks
from fastrecycle.vit import ViT

ON_CPU = 4  # tasks of a group where there is no device memory to ask for
# Tasks of a group at most. At ViT-B/16 a task is 25 to 100 images, so by then products have long
# filled the chip, and a larger group only loses more to a kill and to stragglers.
MOST = 32
_SPARE = 0.1  # of the free memory, for what fragments and what other processes take


class Batch(NamedTuple):
    """LoRAs inverted together."""

    tasks: tuple[int, ...]  # indices in the bank
    warm: bool  # whether their images start from those of earlier tasks

    def config(self, whole: InversionConfig) -> InversionConfig:
        """The settings of this batch, given those of the bank."""
        if not self.warm:
            return whole
        return replace(whole, iterations=whole.warm_iterations, coarse=0.0)


def groups(bank: Sequence[LoRA], size: int) -> Iterator[list[int]]:
    """Indices of LoRAs to invert together: consecutive ones with heads of one size and kind.

    Ranks and targets may differ within a group: they are padded with zeros. Heads may not, since
    R_BN takes its moments over equal shares of the batch. Of the sizes from `size` down to its
    half, the largest that leaves no smaller rest is taken: a group of another shape costs more to
    compile than it saves.
    """
    by_head: dict[tuple[int, bool], list[int]] = {}
    for i, lora in enumerate(bank):
        head = lora.head
        kind = (0, False) if head is None else (head.classes, head.normalised)
        by_head.setdefault(kind, []).append(i)
    for indices in by_head.values():
        even = [n for n in range(size, (size - 1) // 2, -1) if len(indices) % n == 0]
        step = even[0] if even else size
        for start in range(0, len(indices), step):
            yield indices[start : start + step]


def batches(bank: Sequence[LoRA], config: InversionConfig, size: int) -> list[Batch]:
    """The bank in batches of at most `size`: those that others start from, then those that do."""
    loras = list(bank)
    first = min(config.warm, len(loras)) or len(loras)
    cold = [Batch(tuple(indices), False) for indices in groups(loras[:first], size)]
    rest = [Batch(tuple(first + i for i in g), True) for g in groups(loras[first:], size)]
    return cold + rest


def halves(batch: Batch) -> list[Batch]:
    """Two batches in place of one of several LoRAs."""
    middle = (len(batch.tasks) + 1) // 2
    return [batch._replace(tasks=batch.tasks[:middle]), batch._replace(tasks=batch.tasks[middle:])]


def fitting_size(peak: Callable[[int], int], free_bytes: int, most: int = MOST) -> int:
    """Tasks of a group that fit into memory.

    Args:
        peak: memory of an iteration with so many tasks, in bytes; asked at 1 and 2, between which
            the rest is taken to go on in a line.
        free_bytes: memory to fill, of which a tenth is left.
        most: upper bound.

    """
    if most == 1:
        return 1
    one, two = peak(1), peak(2)
    each = max(1, two - one)
    room = (1 - _SPARE) * free_bytes - one
    return max(1, min(most, 1 + int(room // each)))


def check_inversion(vit: ViT, loras: Sequence[LoRA], config: InversionConfig) -> None:
    """Raise unless these LoRAs can be inverted, together, with this backbone.

    Raises:
        ValueError: a LoRA that does not fit, lacks a head, or has another number of classes than
            the others; a pruning schedule out of range.

    """
    patches_after_blocks(vit.config.patches, vit.config.depth, config.prune)
    for i, lora in enumerate(loras):
        lora.check(vit.config, who=f"LoRA {i}")
        if lora.head is None:
            raise ValueError(
                f"{lora.name or f'LoRA {i}'}: inversion needs the LoRA's classification head"
                " (Eq. 1), got none; add head.safetensors (weight (classes, features), bias) to its"
                " folder or save it with modules_to_save"
            )
        if lora.head.normalised and lora.head.bias is not None:
            raise ValueError(
                f"{lora.name or f'LoRA {i}'}: a head of class texts (normalised) has no bias, got"
                f" one of shape {tuple(lora.head.bias.shape)}"
            )
    ways = {lora.head.classes for lora in loras if lora.head is not None}
    if len(ways) > 1:
        raise ValueError(f"inversion group: heads of one size expected, got {sorted(ways)} classes")
    if len({lora.head.normalised for lora in loras if lora.head is not None}) > 1:
        raise ValueError(
            "inversion group: heads of one kind expected, got linear ones beside class texts"
            " (normalised)"
        )

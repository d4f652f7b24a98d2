"""Meta-training on many processes: each has a share of a step's tasks, and gradients are summed.

    torchrun --nproc-per-node 4 -m fastrecycle.cli meta-train --pool runs/pool ...

Every process draws all tasks and computes its own, so that seed and tasks of a step decide the
meta-LoRA (to rounding), not the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_ASKED_EVERY = 10  # steps between the questions whether any process is to stop


@dataclass(frozen=True)
class Ranks:
    """One process among those that train together; `ALONE` is one on its own."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and reports."""
        return self.rank == 0

    def share(self, count: int, what: str = "tasks") -> slice:
        """Own part of so many tasks, or of images in their order.

        Raises:
            ValueError: they do not divide evenly.

        """
        if count % self.size:
            raise ValueError(
                f"tasks: a step's {count} {what} cannot be shared evenly by {self.size} processes;"
                f" use a multiple of {self.size}"
            )
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(
        self, gradients: Sequence[Tensor], numbers: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Sums over all processes, of gradients and of scalars beside them, in one all-reduce."""
        if self.size == 1:
            return gradients, numbers
        parts = [*gradients, *numbers]
        flat = torch.cat([x.detach().float().flatten() for x in parts])
        dist.all_reduce(flat)
        summed = [
            x.view_as(like).to(like.dtype)
            for x, like in zip(flat.split([x.numel() for x in parts]), parts, strict=True)
        ]
        return summed[: len(gradients)], summed[len(gradients) :]

    def told(self, compute: Callable[[], float]) -> float:
        """What the first process computes, in all of them; the others wait."""
        if self.size == 1:
            return compute()
        value = [compute() if self.first else None]
        dist.broadcast_object_list(value, src=0)
        assert value[0] is not None
        return value[0]

    def agree(self, stop: Callable[[], bool], step: int) -> bool:
        """Whether any process was asked to stop; all hear of it at the same step."""
        if self.size == 1:
            return stop()
        if step % _ASKED_EVERY:
            return False
        asked = torch.tensor(float(stop()), device=_device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


ALONE = Ranks()


def _device() -> torch.device:
    """Where this process's collectives take their tensors from."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def joined() -> Ranks:
    """The processes of the process group that is already there (torchrun's, Ray Train's, yours)."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def torchrun_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that `torchrun` started, for as long as the context lasts.

    NCCL on CUDA, each process with the device of its local rank, and gloo elsewhere; outside
    torchrun this is one process on its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield joined(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield joined(), device
    finally:
        dist.destroy_process_group()

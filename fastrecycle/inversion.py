"""LoRA Inversion: images from LoRAs by gradient descent on pixels (LoRA Recycle, Sec. 4.1, 4.3).

A bank goes through in batches; one batch's iterations are in `fastrecycle.inversion_group`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrecycle.config import InversionConfig
from fastrecycle.files import is_url
from fastrecycle.grouping import ON_CPU, Batch, batches, check_inversion, fitting_size, halves
from fastrecycle.inversion_group import InversionGroup
from fastrecycle.inversion_loss import data_loss
from fastrecycle.lora import LoRA
from fastrecycle.ops import Resolved
from fastrecycle.pool_files import PoolFiles, TaskImages
from fastrecycle.vit import ViT

__all__ = ["InversionGroup", "Inverter", "OnStep", "check_inversion", "data_loss", "invert"]

log = logging.getLogger(__name__)

OnStep = Callable[[int, dict[str, float]], None]


class Inverter:
    """Inverts batches of a bank, in halves where the device's memory does not do.

    Args:
        vit, bank, prior, config, seed, precision, backend: see `invert`.

    """

    def __init__(
        self,
        vit: ViT,
        bank: Sequence[LoRA],
        prior: nn.Module | None,
        config: InversionConfig,
        *,
        seed: int = 0,
        precision: str = "fp32",
        backend: Resolved = "reference",
    ):
        self.vit, self.bank, self.prior, self.config = vit, bank, prior, config
        self.settings: dict[str, Any] = {"seed": seed, "precision": precision, "backend": backend}
        self.most: int | None = None  # tasks that memory was seen not to exceed

    def size(self) -> int:
        """Tasks of a group: what the settings say, else what free memory takes."""
        device = self.vit.pos_embed.device
        if self.config.group is not None:
            return self.config.group
        if device.type != "cuda":
            return ON_CPU
        widest = max(self.bank, key=lambda lora: (lora.require_head().classes, lora.rank))
        size = fitting_size(partial(self._peak_bytes, widest), _free_bytes(device))
        log.info("%d LoRAs in one batch: what the free memory takes", size)
        return size

    def _peak_bytes(self, lora: LoRA, count: int) -> int:
        """Memory that an iteration of so many tasks reserves."""
        device = self.vit.pos_embed.device
        before = torch.cuda.mem_get_info(device)[0]
        group = InversionGroup(
            self.vit, [lora] * count, range(count), self.prior,
            replace(self.config, coarse=0.0, drop=(), drop_at=()), **self.settings,
        )  # fmt: skip
        group.step()
        torch.cuda.synchronize(device)
        used = before - torch.cuda.mem_get_info(device)[0]
        del group
        _free_bytes(device)
        return used

    def __call__(
        self,
        batch: Batch,
        earlier: Sequence[TaskImages] = (),
        state: Path | None = None,
        on_step: OnStep | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[TaskImages]:
        """The images of a batch's LoRAs.

        Args:
            batch: of the bank.
            earlier: finished tasks, where the batch starts from those.
            state: file of the state of the group under way; gone on from where it is there.
            on_step: called with iterations done, summed over the batch's tasks; see `invert`.
            stop: see `invert`.

        Raises:
            torch.OutOfMemoryError: a single LoRA is too much for the device.
            KeyboardInterrupt: `stop` said so.

        """
        todo = [batch]
        parts: list[TaskImages] = []
        while todo:
            now = todo.pop(0)
            if self.most is not None and len(now.tasks) > self.most:
                todo = halves(now) + todo
                continue
            try:
                offset = len(parts) * now.config(self.config).iterations
                parts += self._group(now, earlier, state, offset, on_step, stop)
                continue
            except torch.OutOfMemoryError as error:
                if len(now.tasks) == 1:
                    raise torch.OutOfMemoryError(
                        f"one LoRA at a time does not fit into memory either ({error}); use fewer"
                        " images_per_class"
                    ) from None
            # here the failed group's tensors are gone, which the exception held
            self.most = (len(now.tasks) + 1) // 2
            log.warning(
                "out of memory with %d LoRAs in one batch; going on with %d",
                len(now.tasks), self.most,
            )  # fmt: skip
            _free_bytes(self.vit.pos_embed.device)
            todo.insert(0, now)
        return parts

    def _group(
        self,
        batch: Batch,
        earlier: Sequence[TaskImages],
        state: Path | None,
        offset: int,
        on_step: OnStep | None,
        stop: Callable[[], bool],
    ) -> list[TaskImages]:
        config = batch.config(self.config)
        group = InversionGroup(
            self.vit, [self.bank[i] for i in batch.tasks], batch.tasks, self.prior, config,
            earlier=earlier if batch.warm else (), **self.settings,
        )  # fmt: skip
        if state is not None and state.exists():
            group.restore(state)
        while not group.done:
            losses = group.step()
            log_now = group.iteration % 20 == 0 or group.done
            if on_step is not None:
                # reading a loss waits for the device, so only now and then
                values = {k: v.mean().item() for k, v in losses.items()} if log_now else {}
                iterations = config.iterations if group.done else group.iteration
                on_step(offset + iterations * len(batch.tasks), values)
            halt = stop()
            due = group.iteration % config.checkpoint_every == 0 and not group.done
            if state is not None and (halt or due):
                group.save(state)
            if halt:
                raise KeyboardInterrupt
        return group.finish()


def _free_bytes(device: torch.device) -> int:
    """Memory that a device has left, after giving back what nothing uses."""
    gc.collect()  # a group and its recorded steps know each other
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def invert(
    vit: ViT,
    bank: Sequence[LoRA],
    prior: nn.Module | None,
    config: InversionConfig | None = None,
    *,
    seed: int = 0,
    precision: str = "fp32",
    backend: Resolved = "reference",
    folder: str | Path | None = None,
    on_step: OnStep | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Sequence[TaskImages]:
    """Invert every LoRA of a bank.

    Args:
        vit: the frozen backbone, on the device to use.
        bank: LoRAs with heads.
        prior: the naturalness prior, on the same device; None for none.
        config: see `InversionConfig`.
        seed: of noise and jitter.
        precision: "fp32", "bf16" or "fp8", which needs the backend "triton".
        backend: "reference" (eager), "compile" or "triton": see `fastrecycle.ops`.
        folder: where finished tasks and the state of the group under way are kept; a second call
            goes on from there, to the same result. A URL of a file system that `fsspec` knows keeps
            finished tasks alone.
        on_step: called after each iteration with the iterations done in all and, from time to
            time, the mean loss, CE and R_BN.
        stop: asked after each iteration; True saves the state and raises KeyboardInterrupt.

    Returns:
        The images of each LoRA, in the order of the bank; with a folder, read from there when used.

    Raises:
        ValueError: see `check_inversion`.
        KeyboardInterrupt: `stop` said so.
        torch.OutOfMemoryError: a single LoRA is too much for the device.

    """
    config = config or InversionConfig()
    for lora in bank:
        check_inversion(vit, [lora], config)
    inverter = Inverter(vit, bank, prior, config, seed=seed, precision=precision, backend=backend)
    stored = None if folder is None else PoolFiles(folder)
    state = None
    if folder is not None and not is_url(folder):
        state = Path(folder) / "group.state.safetensors"
    results: dict[int, TaskImages] = {}
    unfinished = stored is None or not stored.has(range(len(bank)))
    done = 0
    for batch in batches(bank, config, inverter.size()) if unfinished else ():
        weight = len(batch.tasks) * batch.config(config).iterations
        if stored is None or not stored.has(batch.tasks):
            earlier: Sequence[TaskImages] = ()
            if batch.warm:
                first = range(config.warm)
                earlier = [results[i] if stored is None else stored.task(i) for i in first]
            shift = done

            def report(step: int, values: dict[str, float], shift: int = shift) -> None:
                if on_step is not None:
                    on_step(shift + step, values)

            parts = inverter(batch, earlier, state, report, stop)
            if stored is not None:
                stored.write(parts)
            else:
                results |= {part.task: part for part in parts}
            if state is not None:
                state.unlink(missing_ok=True)
        done += weight
    if state is not None:
        state.unlink(missing_ok=True)  # of a run killed between its last file and this line
    if stored is None:
        return [results[i] for i in sorted(results)]
    stored.write_index()
    return stored.only(range(len(bank)))

"""One batch of LoRAs under inversion: its pixels and optimiser, iterations, shortcuts, checkpoint.

G tasks in one batch, m images of each, C classes, S side, k kept patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrecycle import ops
from fastrecycle.augment import shrink_table
from fastrecycle.capture import Captured, adam_state, capture, optimiser_state, set_rate
from fastrecycle.config import InversionConfig
from fastrecycle.files import load_checkpoint, save_checkpoint
from fastrecycle.grouping import check_inversion
from fastrecycle.inversion_loss import data_loss
from fastrecycle.inversion_result import task_images
from fastrecycle.jitter import Jitter, gather_pixels, inverse, row_at, task_generator
from fastrecycle.lora import LoRA, LoRAStack
from fastrecycle.ops import Resolved, check_precision, impl_of, weight_dtype
from fastrecycle.pool_files import TaskImages
from fastrecycle.prior import ResNetPrior
from fastrecycle.shortcuts import (
    best_patches,
    converged,
    enlarged,
    kept_at,
    moved_patches,
    side_at,
    warm_images,
)
from fastrecycle.vit import ViT


class InversionGroup:
    """Pixels and optimiser of G tasks with equally many classes, one iteration at a time.

    Each task's noise, jitter and labels come from its own generator, keyed by seed and task; a
    task's images therefore do not depend (to rounding) on the tasks beside it.

    Args:
        vit, loras, prior, config, seed, precision, backend: see `invert`.
        tasks: number of each LoRA in its bank.
        dtype: of pixels, LoRAs and heads.
        earlier: finished tasks whose images these start from; none: from noise.

    """

    def __init__(
        self,
        vit: ViT,
        loras: Sequence[LoRA],
        tasks: Sequence[int],
        prior: nn.Module | None,
        config: InversionConfig,
        *,
        seed: int = 0,
        precision: str = "fp32",
        backend: Resolved = "reference",
        dtype: torch.dtype = torch.float32,
        earlier: Sequence[TaskImages] = (),
    ):
        check_inversion(vit, loras, config)
        check_precision(precision, backend, vit.pos_embed.device)
        self.backbone = vit
        if backend != "reference" and precision != "fp32":
            self.backbone = vit.prepared(weight_dtype(precision))
            if isinstance(prior, ResNetPrior):
                prior = prior.prepared(torch.bfloat16)
        self.vit, self.prior, self.config, self.precision = vit, prior, config, precision
        self.loras, self.tasks = tuple(loras), tuple(tasks)
        self.device, self.dtype = vit.pos_embed.device, dtype
        device, side = self.device, vit.config.image_size
        self.side = side_at(0, config, vit.config)  # of the images as they are now
        # float8 would round a LoRA's small changes away with the weights
        self.merges = backend != "reference" and precision != "fp8"
        generators = [task_generator(seed, task) for task in tasks]
        heads = [lora.require_head() for lora in loras]
        self.normalised = heads[0].normalised
        images = self._start(generators, earlier, heads[0].classes)
        self.jitter = Jitter.draw(generators, config, side).to(device)
        self.shrink = None  # (sides, S, S)
        if 0 < config.resolution[0] < side:
            self.shrink = shrink_table(side, *config.resolution).to(device=device, dtype=dtype)
        classes = torch.arange(heads[0].classes, device=device)
        self.labels = classes.repeat_interleave(config.images_per_class)
        bounds = vit.normalise(torch.tensor([0.0, 1.0], dtype=dtype).view(2, 1, 1, 1))
        self.low, self.high = (b.to(device) for b in bounds)
        self.bounds = bounds[0].flatten().tolist(), bounds[1].flatten().tolist()
        # A recorded step cannot read a number of the host: its rate and clock are on the device.
        self.recorded = backend != "reference" and device.type == "cuda"
        self.iteration = 0
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)
        self.impl = impl_of(backend)
        self._loss = torch.compile(data_loss, dynamic=False) if backend == "compile" else data_loss
        # eager steps take the stream that PyTorch is on; a graph keeps what runs beside what
        self.beside = torch.cuda.Stream(device) if backend == "triton" and self.recorded else None
        self._graphs: dict[bool, Captured] = {}  # without and with pruning
        self.active = list(range(len(self.tasks)))  # places of the tasks still at work
        self.left: dict[int, tuple[Tensor, Tensor | None]] = {}  # of the others: images, patches
        self.keep: Tensor | None = None  # (G, m, k) patches of the images as they lie; None: all
        self._gather_tasks()
        self._take(images.clamp(self.low, self.high))

    def _start(
        self, generators: Sequence[torch.Generator], earlier: Sequence[TaskImages], classes: int
    ) -> Tensor:
        """Noise, or earlier tasks' images: (G, m, 3, S, S)."""
        config, side = self.config, self.side
        if earlier:
            drawn = [
                warm_images(earlier, x.class_names, classes, config.images_per_class, g)
                for x, g in zip(self.loras, generators, strict=True)
            ]
            images = self.vit.normalise(torch.stack(drawn).to(self.device, self.dtype) / 255)
        else:
            shape = (classes * config.images_per_class, 3, side, side)
            images = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return images.to(device=self.device, dtype=self.dtype)

    def _gather_tasks(self) -> None:
        """LoRAs, heads and jitter of the tasks at work."""
        loras = [self.loras[i] for i in self.active]
        heads = [lora.require_head() for lora in loras]
        place: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self.stack = LoRAStack.of(loras).to(**place)
        self.heads = torch.stack([h.weight for h in heads]).to(**place)
        self.biases = torch.stack(
            [h.weight.new_zeros(h.classes) if h.bias is None else h.bias for h in heads]
        ).to(**place)
        self.moves = self.jitter.of(self.active, self.side / self.vit.config.image_size)
        # sum over the window of iterations under way, and mean of the one before
        self.total = torch.zeros(len(loras), device=self.device, dtype=self.dtype)
        self.before: Tensor | None = None
        self._sized, self._given = self._networks()

    def _take(self, images: Tensor) -> None:
        """Go on from these pixels with a fresh optimiser."""
        self.images = images
        self.began = self.iteration  # of the optimiser
        rate = self.config.lr
        self.optimiser = torch.optim.Adam(
            [images], lr=torch.tensor(rate, device=self.device) if self.recorded else rate,
            betas=self.config.betas, capturable=self.recorded, fused=self.recorded,
        )  # fmt: skip
        self._graphs.clear()  # they know the old pixels

    def _networks(self) -> tuple[ViT, LoRAStack | None]:
        """The backbone at the images' side, and the LoRAs that it is to be given.

        A LoRA that is alone never changes, so it becomes part of the weights: its steps have plain
        products.
        """
        full = self.side == self.vit.config.image_size
        vit = self.backbone if full else self.backbone.resized(self.side)
        if not self.merges or len(self.active) > 1:
            return vit, self.stack
        return vit.merged(self.loras[self.active[0]].to(dtype=self.dtype)), None

    # ------------------------------------------------------------------ one iteration

    def _iterate(self, pruned: bool) -> dict[str, Tensor]:
        """The iteration that the clock shows; everything happens on the device."""
        loss, ce, r_bn = self._fused(pruned) if self._fuses() else self._plain(pruned)
        if self.config.plateau > 0:
            self.total += loss.detach()
        self.clock += 1
        return {"loss": loss.detach(), "ce": ce.detach(), "r_bn": r_bn.detach()}

    def _fuses(self) -> bool:
        """Whether pixels go to the networks and back by `ops.jitter_pixels` and `pixel_step`.

        Those know the jitter and two normalisations, not terms in the pixels themselves.
        """
        config = self.config
        return (
            self.impl == "triton"
            and self.images.dtype == torch.float32
            and self.shrink is None
            and config.tv == config.l2 == 0
            and (self.prior is None or isinstance(self.prior, ResNetPrior))
        )

    def _fused(self, pruned: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One iteration in which pixels are read once on their way to the networks, once back."""
        config, norm = self.config, self.vit.config
        spec = None
        if isinstance(self.prior, ResNetPrior) and config.alpha > 0:
            spec = self.prior.spec
        shift, flip = self.moves.at(self.clock)
        seen, natural = ops.jitter_pixels(
            self.images, shift, flip, (norm.mean, norm.std),
            None if spec is None else (spec.mean, spec.std),
            torch.float32 if self.precision == "fp32" else torch.bfloat16,
        )  # fmt: skip
        leaves = [seen] if natural is None else [seen, natural]
        for leaf in leaves:
            leaf.requires_grad_()
        losses = self._loss(
            self._sized, self.prior, seen, self._given, self.heads, self.biases, self.labels,
            config, pruned, self.precision, None, self.impl, self.beside, natural,
            self.normalised, self._seen_patches(),
        )  # fmt: skip
        d_seen, *d_natural = torch.autograd.grad(losses[0].sum(), leaves)
        settings = self.optimiser.param_groups[0]
        lr = torch.as_tensor(settings["lr"], device=self.images.device)
        ops.pixel_step(
            self.images, adam_state(self.optimiser, self.images),
            (d_seen, d_natural[0] if d_natural else None), shift, flip, lr,
            settings["betas"], settings["eps"], self.bounds,
            norm.std, None if spec is None else spec.std,
        )  # fmt: skip
        return losses

    def _plain(self, pruned: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One iteration of any configuration."""
        rows, columns = self.moves.index(self.clock, self.side)
        # The jitter permutes pixels, so its backward is the inverse permutation: no graph needed.
        seen = gather_pixels(self.images, rows, columns).requires_grad_()
        shrink = None
        if self.shrink is not None:
            shrink = self.shrink.index_select(0, row_at(self.moves.resolution, self.clock))
        losses = self._loss(
            self._sized, self.prior, seen, self._given, self.heads, self.biases, self.labels,
            self.config, pruned, self.precision, shrink, self.impl, self.beside, None,
            self.normalised, self._seen_patches(),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(losses[0].sum(), seen)
        self.images.grad = gather_pixels(gradient, inverse(rows), inverse(columns))
        self.optimiser.step()
        self.images.clamp_(self.low, self.high)
        return losses

    def _seen_patches(self) -> Tensor | None:
        """Of the images as this iteration moves them, the patches that the backbone sees."""
        if self.keep is None:
            return None
        return moved_patches(self.keep, *self.moves.at(self.clock), self.vit.config)

    def step(self) -> dict[str, Tensor]:
        """One iteration of Eq. 1; returns its loss, CE and R_BN, each (G,), still on the device.

        G are the tasks at work before it. Where the step is recorded, the next one overwrites them.
        """
        config = self.config
        pruned = bool(config.prune) and self.iteration >= config.prune_from * config.iterations
        if config.schedule == "cosine":
            progress = self.iteration / config.iterations
            set_rate(self.optimiser, config.lr * 0.5 * (1 + math.cos(math.pi * progress)))
        self.iteration += 1
        losses = self._run(pruned)
        self._change()
        return losses

    def _run(self, pruned: bool) -> dict[str, Tensor]:
        if not self.recorded:
            return self._iterate(pruned)
        if pruned not in self._graphs:
            changed = [self.images, self.clock, self.total, *optimiser_state(self.optimiser)]
            shared = next((g.graph.pool() for g in self._graphs.values()), None)
            self._graphs[pruned] = capture(
                partial(self._iterate, pruned), state=changed, pool=shared
            )
        return self._graphs[pruned]()

    # ------------------------------------------------------------------ between iterations

    @torch.no_grad()
    def _change(self) -> None:
        """Whatever a shortcut changes before the next iteration; shapes change nowhere else."""
        config, norm = self.config, self.vit.config
        if self.done:
            return
        side = side_at(self.iteration, config, norm)
        if side != self.side:
            self.side = side
            self._gather_tasks()
            self._take(enlarged(self.images, side).clamp(self.low, self.high))
        elif config.plateau > 0 and self.iteration % config.plateau_window == 0:
            self._let_go()
        count = kept_at(self.iteration, config, norm.patches)
        current = norm.patches if self.keep is None else self.keep.shape[2]
        if self.active and count < current:
            self.keep = torch.stack(
                [self._best(place, count, *self._own(place)) for place in self.active]
            )
            self._graphs.clear()

    def _let_go(self) -> None:
        """Tasks whose loss fell no further leave the group as they are."""
        mean = self.total / self.config.plateau_window
        over = converged(mean, self.before, self.config.plateau)
        if self.side != self.vit.config.image_size or not bool(over.any()):
            self.before = mean
            self.total.zero_()
            return
        for row, place in enumerate(self.active):
            if over[row]:
                images, keep = self._own(place)
                self.left[place] = images.clone(), None if keep is None else keep.clone()
        stays = torch.nonzero(~over).flatten()
        state, began = adam_state(self.optimiser, self.images), self.began
        self.active = [self.active[i] for i in stays.tolist()]
        if not self.active:
            return
        self._gather_tasks()
        self.before = mean[stays]
        self.keep = None if self.keep is None else self.keep[stays]
        self._take(self.images[stays].clone())
        self.began = began
        self.optimiser.state[self.images] = {
            name: x if name == "step" else x[stays].clone() for name, x in state.items()
        }

    def _own(self, place: int) -> tuple[Tensor, Tensor | None]:
        """Images and kept patches of one task, wherever they are."""
        if place in self.left:
            return self.left[place]
        row = self.active.index(place)
        return self.images[row], None if self.keep is None else self.keep[row]

    def _best(self, place: int, count: int, images: Tensor, keep: Tensor | None) -> Tensor:
        lora = self.loras[place].to(device=self.device, dtype=self.dtype)
        return best_patches(self.vit, images, lora, keep, count)

    # ------------------------------------------------------------------ results

    @property
    def done(self) -> bool:
        """Whether all iterations are over, or all tasks."""
        return self.iteration >= self.config.iterations or not self.active

    @torch.no_grad()
    def finish(self, batch_size: int = 100) -> list[TaskImages]:
        """Round the last iterate to 8-bit pixels; its survivors and teacher logits, per task.

        Survivors are those of the final, un-jittered image, ordered by the last block's CLS
        attention, so that a pool made once serves every sparsity up to the pruning.
        """
        return [self._finished(place, batch_size) for place in range(len(self.tasks))]

    def _finished(self, place: int, batch_size: int) -> TaskImages:
        last, keep = self._own(place)
        count = kept_at(self.config.iterations, self.config, self.vit.config.patches)
        if count < self.vit.config.patches:  # also of tasks that left before patches did
            keep = self._best(place, count, last, keep)
        return task_images(
            self.vit, self.loras[place], last, keep, self.config.prune,
            task=self.tasks[place], labels=self.labels, batch_size=batch_size,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write all that later iterations need, atomically."""
        state = self.optimiser.state[self.images]
        tensors = {"images": self.images, "total": self.total}
        for name, value in (("keep", self.keep), ("before", self.before)):
            if value is not None:
                tensors[name] = value
        for place, (images, keep) in self.left.items():
            tensors[f"left.{place}"] = images
            if keep is not None:
                tensors[f"left.{place}.keep"] = keep
        if state:
            tensors |= {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        metadata = {"iteration": self.iteration, "began": self.began, "tasks": self.tasks}
        save_checkpoint(path, tensors, {name: str(value) for name, value in metadata.items()})

    def restore(self, path: Path) -> bool:
        """Go on from a saved state; False if it is of another group.

        Raises:
            ValueError: damaged, or of another configuration.

        """
        tensors, metadata = load_checkpoint(path)
        if metadata.get("tasks") != str(self.tasks):
            return False
        if not self._holds_state(tensors, metadata):
            raise ValueError(f"{path}: a checkpoint of another configuration; remove it to restart")
        tensors = {name: x.to(self.device) for name, x in tensors.items()}
        self.iteration = int(metadata["iteration"])
        self.clock.fill_(self.iteration)
        self.left = {
            place: (tensors[f"left.{place}"], tensors.get(f"left.{place}.keep"))
            for place in range(len(self.tasks))
            if f"left.{place}" in tensors
        }
        self.active = [i for i in range(len(self.tasks)) if i not in self.left]
        self.side = tensors["images"].shape[-1]
        if self.active:
            self._gather_tasks()
        self.total, self.before = tensors["total"], tensors.get("before")
        self.keep = tensors.get("keep")
        self._take(tensors["images"].clone())  # the file's own memory is another's to write
        self.began = int(metadata["began"])
        if "exp_avg" in tensors:
            count = float(self.iteration - self.began)
            self.optimiser.state[self.images] = {
                "step": torch.tensor(count, device=self.device if self.recorded else None),
                "exp_avg": tensors["exp_avg"].clone(),
                "exp_avg_sq": tensors["exp_avg_sq"].clone(),
            }
        return True

    def _holds_state(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> bool:
        """Whether a checkpoint has this group's images, once each, and Adam's moments of them."""
        images = tensors.get("images")
        counts = [metadata.get(name, "") for name in ("began", "iteration")]
        if images is None or not all(re.fullmatch("[0-9]{1,9}", x) for x in counts):
            return False
        left = [x for name, x in tensors.items() if re.fullmatch(r"left\.\d+", name)]
        moments = [tensors[name] for name in ("exp_avg", "exp_avg_sq") if name in tensors]
        own, total = self.images, tensors.get("total")  # own: (G, m, 3, S, S), of all tasks
        return (
            int(counts[0]) <= int(counts[1]) <= self.config.iterations
            and images.ndim == 5
            and images.shape[1:3] == own.shape[1:3]
            and images.shape[3] == images.shape[4]
            and all(x.dtype == own.dtype for x in (images, *left))
            and all(x.ndim == 4 and x.shape[:2] == own.shape[1:3] for x in left)
            # the last to leave stay in the batch as well
            and len(self.tasks) in (len(images) + len(left), len(left))
            and len(moments) in (0, 2)
            and all(x.shape == images.shape for x in moments)
            and total is not None
            and total.shape == images.shape[:1]
        )

"""LoRA Inversion: images from LoRAs by gradient descent on pixels (LoRA Recycle, Sec. 4.1, 4.3).

G tasks in one batch, m images of each, C classes, S side.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrecycle import ops
from fastrecycle.augment import apply_maps, shrink_table
from fastrecycle.capture import Captured, adam_state, capture, optimiser_state, set_rate
from fastrecycle.config import InversionConfig
from fastrecycle.files import load_safetensors, save_safetensors
from fastrecycle.lora import LoRA, LoRAStack
from fastrecycle.ops import Impl, Resolved, autocast, check_precision, impl_of, weight_dtype
from fastrecycle.pool import TaskImages, task_file
from fastrecycle.prior import ResNetPrior
from fastrecycle.pruning import patches_after_blocks, top_patches
from fastrecycle.vit import ViT

log = logging.getLogger(__name__)

OnStep = Callable[[int, dict[str, float]], None]


def task_generator(seed: int, task: int) -> torch.Generator:
    """Random numbers of one task, whatever else is computed beside it."""
    # A 64-bit mix (SplitMix64) keeps the streams of neighbouring seeds and tasks apart.
    x = (seed * 0x9E3779B97F4A7C15 + task * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    return torch.Generator().manual_seed((x ^ (x >> 31)) % 2**63)


def data_loss(
    vit: ViT,
    prior: nn.Module | None,
    images: Tensor,
    stack: LoRAStack,
    heads: Tensor,
    biases: Tensor,
    labels: Tensor,
    config: InversionConfig,
    pruned: bool,
    precision: str = "fp32",
    shrink: Tensor | None = None,
    impl: Impl = "reference",
    side: torch.cuda.Stream | None = None,
    natural: Tensor | None = None,
    normalised: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_data of each task, LoRA Recycle, Eq. 1: CE(h(f(X)), Y) + alpha R_BN(X) (+ TV, L2).

    Under heads of class texts the cross-entropy is the contrastive loss (Sec. 5, zero-shot).

    Args:
        vit: the frozen backbone.
        prior: see `fastrecycle.prior`; None drops R_BN.
        images: (G, m, 3, S, S), in the backbone's input space.
        stack: G LoRAs.
        heads: (G, C, features), biases (G, C).
        labels: (m,) int64, the same for each task.
        config: weights of the terms, pruning schedule.
        pruned: whether the schedule is in force yet.
        precision: "fp32", "bf16" or "fp8", which needs the backend "triton".
        shrink: (G, S, S), maps of `shrink_table` through which the backbone sees each task.
        impl: code of the operations.
        side: where the prior runs beside the backbone, forward and backward; None: after it.
        natural: (G m, 3, S, S), the images in the normalisation of a `ResNetPrior`, as
            `ops.jitter_pixels` makes them; None: they are made of `images` here.
        normalised: see `Head`.

    Returns:
        loss, CE and R_BN of each task, each (G,) float32. A task's loss depends on its own images
        alone, so the gradient of the sum is each task's gradient.

    """
    tasks, per_task = images.shape[:2]
    flat = images.flatten(0, 1)
    r_bn = None
    if prior is not None and config.alpha > 0:
        # One is bound by memory, the other by arithmetic. Autograd goes back on the same streams.
        with _beside(side), autocast(images.device, precision):
            # another network's BatchNorms are read by hooks, whatever computes them
            options: dict[str, Any] = {"impl": impl} if isinstance(prior, ResNetPrior) else {}
            if natural is not None:
                options["normalised"] = True
            pixels = vit.pixels(flat) if natural is None else natural
            r_bn = prior(pixels, segments=tasks, first_bn=config.first_bn, **options)
    seen = flat if shrink is None else apply_maps(images, shrink).flatten(0, 1)
    with autocast(images.device, precision):
        # without an index each LoRA has an equal share of the batch: its own task
        features = vit(seen, stack, prune=config.prune if pruned else None, impl=impl)
    # The head is tiny and its logits feed the loss: full precision.
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if normalised:
        features = nn.functional.normalize(features, dim=-1)
    logits = features.unflatten(0, (tasks, per_task)) @ heads.transpose(1, 2) + biases[:, None]
    target = labels.expand(tasks, -1)
    ce = nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)
    loss = config.ce * ce
    if r_bn is None:
        r_bn = torch.zeros_like(ce)
    else:
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
        loss = loss + config.alpha * r_bn
    if config.tv > 0:
        rows = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3, 4))
        columns = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3, 4))
        loss = loss + config.tv * (rows + columns)
    if config.l2 > 0:
        loss = loss + config.l2 * images.square().mean((1, 2, 3, 4))
    return loss, ce, r_bn


@contextmanager
def _beside(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on another stream, from where the current one stands."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield


@dataclass(frozen=True)
class Jitter:
    """A roll, a flip and a resolution of each task's images, drawn for all iterations at once."""

    shift: Tensor  # (iterations, G, 2) int64, rows and columns
    flip: Tensor  # (iterations, G) bool
    resolution: Tensor  # (iterations, G) int64, row of `shrink_table`; zeros where it is off

    @staticmethod
    def draw(generators: Sequence[torch.Generator], config: InversionConfig, side: int) -> Jitter:
        """From each task's own generator."""
        reach = int(config.jitter * side)
        shape = (config.iterations,)
        shifts = [torch.randint(-reach, reach + 1, (*shape, 2), generator=g) for g in generators]
        flips = [torch.rand(shape, generator=g) < config.flip for g in generators]
        low, high = config.resolution
        sides = torch.zeros(config.iterations, len(generators), dtype=torch.int64)
        if high > 0:
            drawn = [torch.randint(low, high + 1, shape, generator=g) for g in generators]
            sides = torch.stack(drawn, 1).clamp_max(side) - min(low, side)
        return Jitter(torch.stack(shifts, 1), torch.stack(flips, 1), sides)

    def to(self, device: torch.device) -> Jitter:
        """The same tables on a device."""
        return Jitter(*(x.to(device) for x in (self.shift, self.flip, self.resolution)))

    def at(self, clock: Tensor) -> tuple[Tensor, Tensor]:
        """Shift (G, 2) and flip (G,) of the iteration that the clock shows; see `index`."""
        return _at(self.shift, clock), _at(self.flip, clock)

    def index(self, clock: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Source rows and columns of each output pixel, (G, S) each.

        Args:
            clock: (1,) int64 iteration, on the tables' device: read there, never by the host.
            side: S.

        """
        line = torch.arange(side, device=self.shift.device)
        shift, flip = self.at(clock)
        rows = (line - shift[:, :1]) % side
        columns = (line - shift[:, 1:]) % side
        return rows, torch.where(flip[:, None], columns.flip(1), columns)


def _at(table: Tensor, clock: Tensor) -> Tensor:
    """Row of a table, (1,) int64 and maybe past the end, as in the warm-up of a recording."""
    return table.index_select(0, clock.clamp_max(len(table) - 1))[0]


def gather_pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[g, :, :, rows[g], columns[g]]: (G, m, 3, S, S), (G, S), (G, S) -> the same shape."""
    tasks, side = rows.shape
    rows = rows.view(tasks, 1, 1, side, 1).expand(images.shape)
    images = images.gather(3, rows)
    return images.gather(4, columns.view(tasks, 1, 1, 1, side).expand(images.shape))


def inverse(index: Tensor) -> Tensor:
    """The inverse of each row's permutation, (G, S)."""
    line = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return torch.zeros_like(index).scatter(1, index, line)


class InversionGroup:
    """Pixels and optimiser of G tasks with equally many classes, one iteration at a time.

    Each task's noise, jitter and labels come from its own generator, keyed by seed and task; a
    task's images therefore do not depend (to rounding) on the tasks beside it.
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
        device = vit.pos_embed.device
        side = vit.config.image_size
        generators = [task_generator(seed, task) for task in tasks]
        heads = [lora.require_head() for lora in loras]
        count = heads[0].classes * config.images_per_class
        noise = [torch.randn(count, 3, side, side, generator=g) for g in generators]
        self.jitter = Jitter.draw(generators, config, side).to(device)
        self.shrink = None  # (sides, S, S)
        if 0 < config.resolution[0] < side:
            self.shrink = shrink_table(side, *config.resolution).to(device=device, dtype=dtype)
        self.stack = LoRAStack.of(loras).to(device=device, dtype=dtype)
        self.normalised = heads[0].normalised
        self.heads = torch.stack([h.weight for h in heads]).to(device=device, dtype=dtype)
        self.biases = torch.stack(
            [h.weight.new_zeros(h.classes) if h.bias is None else h.bias for h in heads]
        ).to(device=device, dtype=dtype)
        classes = torch.arange(heads[0].classes, device=device)
        self.labels = classes.repeat_interleave(config.images_per_class)
        bounds = vit.normalise(torch.tensor([0.0, 1.0], dtype=dtype).view(2, 1, 1, 1))
        self.low, self.high = (b.to(device) for b in bounds)
        self.bounds = bounds[0].flatten().tolist(), bounds[1].flatten().tolist()
        images = torch.stack(noise).to(device=device, dtype=dtype)
        self.images = images.clamp(self.low, self.high)
        # A recorded step cannot read a number of the host: its rate and clock are on the device.
        self.recorded = backend != "reference" and device.type == "cuda"
        lr = torch.tensor(config.lr, device=device) if self.recorded else config.lr
        self.optimiser = torch.optim.Adam(
            [self.images], lr=lr, betas=config.betas, capturable=self.recorded, fused=self.recorded
        )
        self.iteration = 0
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)
        self.impl = impl_of(backend)
        self._loss = torch.compile(data_loss, dynamic=False) if backend == "compile" else data_loss
        # eager steps take the stream that PyTorch is on; a graph keeps what runs beside what
        self.side = torch.cuda.Stream(device) if backend == "triton" and self.recorded else None
        self._graphs: dict[bool, Captured] = {}  # without and with pruning

    def _iterate(self, pruned: bool) -> dict[str, Tensor]:
        """The iteration that the clock shows; everything happens on the device."""
        loss, ce, r_bn = self._fused(pruned) if self._fuses() else self._plain(pruned)
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
        shift, flip = self.jitter.at(self.clock)
        seen, natural = ops.jitter_pixels(
            self.images, shift, flip, (norm.mean, norm.std),
            None if spec is None else (spec.mean, spec.std),
            torch.float32 if self.precision == "fp32" else torch.bfloat16,
        )  # fmt: skip
        leaves = [seen] if natural is None else [seen, natural]
        for leaf in leaves:
            leaf.requires_grad_()
        losses = self._loss(
            self.backbone, self.prior, seen, self.stack, self.heads, self.biases, self.labels,
            config, pruned, self.precision, None, self.impl, self.side, natural, self.normalised,
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
        rows, columns = self.jitter.index(self.clock, self.vit.config.image_size)
        # The jitter permutes pixels, so its backward is the inverse permutation: no graph needed.
        seen = gather_pixels(self.images, rows, columns).requires_grad_()
        shrink = None
        if self.shrink is not None:
            shrink = self.shrink.index_select(0, _at(self.jitter.resolution, self.clock))
        losses = self._loss(
            self.backbone, self.prior, seen, self.stack, self.heads, self.biases, self.labels,
            self.config, pruned, self.precision, shrink, self.impl, self.side, None,
            self.normalised,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(losses[0].sum(), seen)
        self.images.grad = gather_pixels(gradient, inverse(rows), inverse(columns))
        self.optimiser.step()
        self.images.clamp_(self.low, self.high)
        return losses

    def step(self) -> dict[str, Tensor]:
        """One iteration of Eq. 1; returns its loss, CE and R_BN, each (G,), still on the device.

        Where the step is recorded, the next one overwrites them.
        """
        config = self.config
        pruned = bool(config.prune) and self.iteration >= config.prune_from * config.iterations
        if config.schedule == "cosine":
            progress = self.iteration / config.iterations
            set_rate(self.optimiser, config.lr * 0.5 * (1 + math.cos(math.pi * progress)))
        self.iteration += 1
        if not self.recorded:
            return self._iterate(pruned)
        if pruned not in self._graphs:
            changed = [self.images, self.clock, *optimiser_state(self.optimiser)]
            shared = next((g.graph.pool() for g in self._graphs.values()), None)
            self._graphs[pruned] = capture(
                partial(self._iterate, pruned), state=changed, pool=shared
            )
        return self._graphs[pruned]()

    @property
    def done(self) -> bool:
        """Whether all iterations are over."""
        return self.iteration >= self.config.iterations

    @torch.no_grad()
    def finish(self, batch_size: int = 100) -> list[TaskImages]:
        """Round the last iterate to 8-bit pixels; its survivors and teacher logits, per task.

        Survivors are those of the final, un-jittered image, ordered by the last block's CLS
        attention, so that a pool made once serves every sparsity up to the pruning.
        """
        results = []
        prune = self.config.prune or None
        for g, (lora, task) in enumerate(zip(self.loras, self.tasks, strict=True)):
            pixels = (self.vit.pixels(self.images[g]) * 255).round().clamp(0, 255).byte()
            own = lora.to(self.images.device)
            head = own.require_head()
            order, logits, survivors = [], [], self.vit.config.patches
            for batch in pixels.split(batch_size):
                images = self.vit.normalise(batch.float() / 255)
                # The teacher is the LoRA's whole network: it sees all patches.
                whole = self.vit.encode(images, own)
                importance = whole.cls_scores
                if prune:
                    pruned = self.vit.encode(images, own, prune=prune)
                    survivors = pruned.kept.shape[1]
                    importance = _survivors_first(importance, pruned.kept, pruned.cls_scores)
                order.append(importance.sort(dim=1, descending=True, stable=True).indices)
                logits.append(head(whole.features.float()))
            results.append(
                TaskImages(
                    task=task,
                    images=pixels.cpu(),
                    labels=self.labels.cpu(),
                    order=torch.cat(order).cpu(),
                    survivors=survivors,
                    teacher_logits=torch.cat(logits).cpu(),
                    class_names=lora.class_names,
                    name=lora.name,
                    text=head.weight.float().cpu() if head.normalised else None,
                )
            )
        return results

    def save(self, path: Path) -> None:
        """Write all that later iterations need, atomically."""
        state = self.optimiser.state[self.images]
        tensors = {"images": self.images}
        if state:
            tensors |= {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        save_safetensors(
            path, tensors, {"iteration": str(self.iteration), "tasks": str(self.tasks)}
        )

    def restore(self, path: Path) -> bool:
        """Go on from a saved state; False if it is of another group."""
        tensors, metadata = load_safetensors(path)
        if metadata.get("tasks") != str(self.tasks):
            return False
        self.images.copy_(tensors["images"])
        self.iteration = int(metadata["iteration"])
        self.clock.fill_(self.iteration)
        if "exp_avg" in tensors:
            device = self.images.device
            self.optimiser.state[self.images] = {
                "step": torch.tensor(
                    float(self.iteration), device=device if self.recorded else None
                ),
                "exp_avg": tensors["exp_avg"].to(device),
                "exp_avg_sq": tensors["exp_avg_sq"].to(device),
            }
            self._graphs.clear()  # they know the old state
        return True


def _survivors_first(whole: Tensor, kept: Tensor, scores: Tensor) -> Tensor:
    """Importance of all patches in which every survivor of pruning beats every other patch.

    Args:
        whole: (B, n), last block's CLS attention of the unpruned network.
        kept: (B, k), survivors, ascending.
        scores: (B, k') of the pruned network's last block; where that block prunes too, k' > k:
            the survivors are then its k best, so their own scores are the k highest.
    """
    if scores.shape[1] > kept.shape[1]:
        scores = scores.gather(1, top_patches(scores, kept.shape[1]))
    # attention weights are at most 1
    return whole.scatter(1, kept, scores + 1)


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


def groups(bank: Sequence[LoRA], size: int) -> Iterator[list[int]]:
    """Indices of LoRAs to invert together: consecutive ones with heads of one size and kind.

    Of the sizes from `size` down to its half, the largest that leaves no smaller rest is taken: a
    group of another shape costs more to compile than it saves.
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
) -> list[TaskImages]:
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
            goes on from there, to the same result.
        on_step: called after each iteration with the iterations done in all and, from time to
            time, the mean loss, CE and R_BN.
        stop: asked after each iteration; True saves the state and raises KeyboardInterrupt.

    Raises:
        ValueError: see `check_inversion`.
        KeyboardInterrupt: `stop` said so.

    """
    config = config or InversionConfig()
    for indices in groups(bank, config.group):
        check_inversion(vit, [bank[i] for i in indices], config)
    folder = None if folder is None else Path(folder)
    state = None if folder is None else folder / "group.state.safetensors"
    results: dict[int, TaskImages] = {}
    done = 0
    for indices in groups(bank, config.group):
        weight = len(indices) * config.iterations
        if folder is not None and all(task_file(folder, i).exists() for i in indices):
            for i in indices:
                results[i] = TaskImages.load(task_file(folder, i))
            done += weight
            continue
        loras = [bank[i] for i in indices]
        group = InversionGroup(
            vit, loras, indices, prior, config, seed=seed, precision=precision, backend=backend
        )
        if state is not None and state.exists():
            group.restore(state)
        while not group.done:
            losses = group.step()
            log_now = group.iteration % 20 == 0 or group.done
            if on_step is not None:
                # reading a loss waits for the device, so only now and then
                values = {k: v.mean().item() for k, v in losses.items()} if log_now else {}
                on_step(done + group.iteration * len(indices), values)
            halt = stop()
            due = group.iteration % config.checkpoint_every == 0 and not group.done
            if state is not None and (halt or due):
                group.save(state)
            if halt:
                raise KeyboardInterrupt
        for part in group.finish():
            results[part.task] = part
            if folder is not None:
                part.save(task_file(folder, part.task))
        if state is not None:
            state.unlink(missing_ok=True)
        done += weight
    if state is not None:
        state.unlink(missing_ok=True)  # of a run killed between its last file and this line
    return [results[i] for i in sorted(results)]

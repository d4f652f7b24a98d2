"""Train the packaged demo backbone and prior from Tiny-ImageNet on one GPU, in minutes.

    python examples/train_demo_backbone.py --data-root DATA --out runs/demo \
        --reduced-resolution 0 0.333 --minutes 3.5

The backbone (`ViT.preset("demo")`: 64 px, 5.4 M parameters) learns from the labels and from a
ViT-Ti/16 that was trained on ImageNet with labels. The teacher is not asked anew for each step:
it sees `--views` augmented copies of each image once, half of them mixed by mixup or cutmix, and
the copies and its features stay in GPU memory. The student then trains on those copies, shifted
and flipped, as fast as it alone can.

The prior is a small BatchNorm ResNet trained on the same copies. Its BatchNorm statistics are
then measured anew on the plain images, layer by layer and with the weights as stored.

Choices are made on CIFAR-FS's validation classes. Test classes are read only with `--test`.

B images, V views, C classes, F features, S side (64 px).
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from demo_cards import backbone_card, prior_card
from demo_prior import PriorNet, estimate_statistics, exported
from demo_views import (
    BlockForward,
    Images,
    Views,
    compiled_block,
    forward,
    label_loss,
    load_teacher,
    make_views,
    normalise,
    read_images,
    resampled,
    shifted,
    shrink_matrix,
    split_held_out,
    view_batches,
)
from torch import Tensor, nn
from tqdm import tqdm

from fastrecycle.data import episodes
from fastrecycle.eval import score_episodes
from fastrecycle.files import atomic_write, save_safetensors
from fastrecycle.vit import ViT
from fastrecycle.vit_config import PRESETS
from fastrecycle.weights import save_vit

TEACHER_FILE = "weights/vit_tiny_patch16_224_augreg.safetensors"
CIFAR = {"val": "cifar_fs_val.zip", "test": "cifar_fs_test.zip"}


@dataclass(frozen=True)
class Options:
    """Settings of a training run."""

    # Folder with tiny_imagenet.zip, cifar_fs_val.zip and weights/ (cifar_fs_test.zip for --test).
    data_root: Path = Path("data")
    # Folder for weights, model cards and log.jsonl.
    out: Path = Path("runs/demo_backbone")
    # Only measure these backbones (files written by this script), on validation and with --test.
    evaluate: tuple[Path, ...] = ()
    # Also measure the backbone that is best on validation on CIFAR-FS's test classes.
    test: bool = False
    # Shares of each batch shrunk to 16 to 48 px and enlarged again; one backbone for each.
    reduced_resolution: tuple[float, ...] = (0.0,)
    # Wall-clock minutes of training for each backbone; turned into steps by a timed start.
    minutes: float = 4.0
    # Steps for each backbone instead of minutes, to repeat a run exactly.
    steps: int | None = None
    # Shorten the training so that the whole run ends by then, in minutes from its start.
    deadline_minutes: float | None = None
    # Seconds of training for the prior; 0 trains none.
    prior_seconds: float = 40.0
    # Steps for the prior instead of seconds.
    prior_steps: int | None = None
    # Augmented copies of each image that the teacher sees, half of them mixed; 290 MB each.
    views: int = 40
    # Smallest share of the image's area in a view.
    crop: float = 0.25
    # Start from random weights, or from the teacher's, its patches and positions resampled.
    init: Literal["random", "teacher"] = "random"
    # Images a step.
    batch: int = 1024
    # AdamW's highest learning rate; warm-up, then cosine.
    learning_rate: float = 2e-3
    # AdamW's weight decay, on matrices only.
    weight_decay: float = 0.05
    # Share of the steps for warm-up.
    warmup: float = 0.05
    # Highest probability of skipping a residual branch, in the last block.
    drop_path: float = 0.05
    # Decay of the weights' running average, which is what is saved.
    ema: float = 0.999
    # Weight of the squared distance to the teacher's feature, relative to that feature's variance.
    feature_weight: float = 2.0
    # Weight of KL(teacher, student) over ImageNet's 1000 classes, through the teacher's head.
    kl_weight: float = 1.0
    # Weight of the cross-entropy with the labels.
    label_weight: float = 0.25
    # Label smoothing of that cross-entropy.
    label_smoothing: float = 0.1
    # Residual blocks of the prior's three stages (32, 64, 128 channels).
    prior_blocks: tuple[int, int, int] = (2, 1, 1)
    # Seed of everything random.
    seed: int = 0
    # Device, such as cuda or cpu.
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    # A few images and steps, to see that everything works.
    dry_run: bool = False

    def __post_init__(self) -> None:
        for share in self.reduced_resolution:
            if not 0 <= share <= 1:
                raise ValueError(f"reduced_resolution: must be in [0, 1], got {share}")
        if self.views < 2 or self.views % 2:
            raise ValueError(f"views: must be an even number >= 2, got {self.views}")

    def shortened(self) -> Options:
        """The same run with a few images and steps."""
        return replace(
            self, views=2, batch=16, steps=self.steps or 4, prior_steps=self.prior_steps or 4
        )


# ---------------------------------------------------------------------- training


class Student(nn.Module):
    """The backbone and a classifier of the training classes."""

    def __init__(self, vit: ViT, classes: int):
        super().__init__()
        self.vit = vit.requires_grad_(True)
        self.head = nn.Linear(vit.config.features, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
    return peak * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def adamw(module: nn.Module, options: Options, device: torch.device) -> torch.optim.AdamW:
    """AdamW whose weight decay spares vectors and positions."""
    decay, plain = [], []
    for name, parameter in module.named_parameters():
        spared = parameter.ndim < 2 or name.endswith(("pos_embed", "prefix"))
        (plain if spared else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=device.type == "cuda"
    )


class Distillation:
    """A student in training; `step(lr)` is one update, all on the device."""

    def __init__(
        self,
        views: Views,
        classes: int,
        teacher: ViT,
        head: tuple[Tensor, Tensor],
        run_block: BlockForward,
        options: Options,
        reduced: float,
    ):
        device = views.images.device
        config = PRESETS["demo"]
        if options.init == "teacher":
            vit = resampled(teacher.cpu(), config)
            teacher.to(device)
        else:
            vit = ViT.random(config, options.seed)
        self.views, self.head, self.run_block, self.options = views, head, run_block, options
        self.student = Student(vit, classes).to(device)
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = adamw(self.student, options, device)
        self.generator = torch.Generator(device).manual_seed(options.seed + 2)
        self.batches = view_batches(len(views.images), options.batch, self.generator)
        self.reduced = round(reduced * options.batch)  # images of each batch
        sides = range(16, 49)
        self.shrink = torch.stack([shrink_matrix(side, device) for side in sides])
        rates = torch.linspace(0, options.drop_path, config.depth, device=device)
        self.keep = (1 - rates)[:, None, None, None, None]
        weights = (options.feature_weight, options.kl_weight, options.label_weight)
        self.weights = torch.tensor(weights, device=device)  # made here: each copy is a wait
        self.updates = 0

    def images(self, index: Tensor) -> Tensor:
        """The student's input: some of it at reduced resolution, (B, 3, S, S) normalised."""
        x = shifted(self.views, index, self.generator)
        if self.reduced:
            which = torch.randint(
                len(self.shrink), (self.reduced,), generator=self.generator, device=x.device
            )
            matrix = self.shrink[which][:, None]
            small = matrix @ x[: self.reduced] @ matrix.transpose(2, 3)
            x = torch.cat((small.clamp(0, 255), x[self.reduced :]))
        return normalise(x)

    def losses(self, index: Tensor) -> Tensor:
        """(feature, KL, label) losses of one batch."""
        views, options = self.views, self.options
        shape = (len(self.keep), 2, len(index), 1, 1)
        kept = torch.rand(shape, generator=self.generator, device=index.device) < self.keep
        feature = forward(self.student.vit, self.images(index), self.run_block, kept / self.keep)
        target = views.features[index].float()
        distance = (feature - target).square().mean() / views.variance
        weight, bias = self.head
        log_p = (feature @ weight.T + bias).log_softmax(-1)
        log_t = (target @ weight.T + bias).log_softmax(-1)
        kl = (log_t.exp() * (log_t - log_p)).sum(-1).mean()
        logits = self.student.head(feature)
        return torch.stack(
            (distance, kl, label_loss(logits, views, index, options.label_smoothing))
        )

    def step(self, lr: float) -> Tensor:
        """One update; returns the three losses without waiting for the device."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = self.losses(next(self.batches))
        (losses @ self.weights).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(options.ema, (1 + self.updates) / (10 + self.updates))
        pairs = zip(self.average.parameters(), self.student.parameters(), strict=True)
        kept, new = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(kept, [p.detach() for p in new], 1 - decay)
        self.updates += 1
        return losses.detach()


def wait(device: torch.device) -> float:
    """The time once the device is idle, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def steps_per_second(step: Callable[[float], Tensor], device: torch.device) -> float:
    """Rate of `step` after its compilation; the caller throws the trained copy away."""
    for _ in range(8):
        step(0.0)
    start = wait(device)
    for _ in range(40):
        step(0.0)
    return 40 / (wait(device) - start)


class Log:
    """JSON lines, one an event, with seconds since the start; also shown on the terminal."""

    def __init__(self, path: Path, start: float):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stream, self.start = path.open("a", encoding="utf-8"), start

    def seconds(self) -> float:
        """Since the start of the run."""
        return time.perf_counter() - self.start

    def __call__(self, event: str, **values: Any) -> None:
        """Write one event."""
        line = {"event": event, "at_s": round(self.seconds(), 1), **values}
        self.stream.write(json.dumps(line, default=str) + "\n")
        self.stream.flush()
        text = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in
                        line.items() if k != "options")  # fmt: skip
        tqdm.write(text)


def train_backbone(
    run: Distillation, steps: int, checks: Callable[[ViT], dict[str, float]], log: Log
) -> float:
    """Train to the end of the schedule; returns images a second."""
    options, device = run.options, run.views.images.device
    every = max(1, steps // 100)
    progress = tqdm(total=steps, desc="backbone", unit="step", smoothing=0.05)
    waiting, start = 0.0, wait(device)
    for step in range(steps):
        losses = run.step(learning_rate(step, steps, options.learning_rate, options.warmup))
        if (step + 1) % every == 0:
            feature, kl, label = losses.tolist()
            if not math.isfinite(feature + kl + label):
                raise RuntimeError(
                    f"train_backbone: loss is not finite at step {step}; lower --learning-rate"
                )
            progress.update(every)
            progress.set_postfix(feature=f"{feature:.3f}", kl=f"{kl:.3f}", label=f"{label:.3f}")
        if (step + 1) % max(50, steps // 5) == 0 and step + 1 < steps:
            paused = wait(device)
            log("check", step=step + 1, feature=feature, kl=kl, label=label,
                **checks(run.average.vit))  # fmt: skip
            waiting += wait(device) - paused
    seconds = wait(device) - start - waiting
    progress.close()
    return steps * options.batch / seconds


# ---------------------------------------------------------------------- evaluation


@torch.no_grad()
def embed(vit: ViT, images: Images, side: int | None = None) -> Tensor:
    """Features (N, F), float32 throughout; `side`: images shrunk to it first, in pixels."""
    device = vit.pos_embed.device
    matrix = None if side is None else shrink_matrix(side, device)
    parts = []
    for batch in images.pixels.split(512):
        x = batch.to(device).float()
        if matrix is not None:
            x = (matrix @ x @ matrix.T).clamp(0, 255)
        parts.append(vit(normalise(x)))
    return torch.cat(parts)


def nearest_centre(
    vit: ViT, images: Images, shots: int, tasks: int, side: int | None = None
) -> tuple[float, float]:
    """5-way accuracy by the nearest class centre and its 95 % interval, in percent."""
    drawn = episodes(images.labels.numpy(), 5, shots, 15, tasks, seed=0)
    result = score_episodes(embed(vit, images, side), drawn)
    return result.accuracy, result.ci95


def measure(vit: ViT, images: Images, split: str, tasks: int) -> dict[str, float]:
    """NN at 1 and 5 shots, and at 16 px; each with its interval."""
    result: dict[str, float] = {}
    for name, shots, side in (("nn1", 1, None), ("nn5", 5, None), ("nn1_16px", 1, 16)):
        accuracy, ci95 = nearest_centre(vit, images, shots, tasks, side)
        result |= {f"{split}_{name}": accuracy, f"{split}_{name}_ci95": ci95}
    return result


def linear_accuracy(student: Student, images: Images, side: int | None = None) -> float:
    """Of the classifier trained along, in percent."""
    logits = student.head(embed(student.vit, images, side))
    return 100 * (logits.argmax(-1).cpu() == images.labels).float().mean().item()


# ---------------------------------------------------------------------- prior


class PriorTraining:
    """A prior in training, on the views that are not mixed."""

    def __init__(self, views: Views, classes: int, options: Options):
        device = views.images.device
        torch.manual_seed(options.seed + 3)  # the network's initial weights
        net = PriorNet(options.prior_blocks, classes).to(device)
        self.net = net.to(memory_format=torch.channels_last)
        self.views, self.options = views, options
        self.optimizer = adamw(self.net, options, device)
        self.generator = torch.Generator(device).manual_seed(options.seed + 4)
        self.batches = view_batches(views.plain, min(512, options.batch), self.generator)

    def step(self, lr: float) -> Tensor:
        """One update; returns the loss without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        index = next(self.batches)
        x = normalise(shifted(self.views, index, self.generator))
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            logits = self.net(x)
        loss = label_loss(logits.float(), self.views, index, self.options.label_smoothing)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train_prior(
    views: Views, train: Images, held_out: Images, seconds: float, options: Options, log: Log
) -> dict[str, Any]:
    """Train, round to fp16, measure the statistics, write prior.safetensors and prior.md."""
    device = views.images.device
    steps = options.prior_steps
    if steps is None:
        rate = steps_per_second(PriorTraining(views, train.classes, options).step, device)
        steps = max(1, int(seconds * rate))
    run = PriorTraining(views, train.classes, options)
    start = wait(device)
    for step in tqdm(range(steps), desc="prior", unit="step"):
        loss = run.step(learning_rate(step, steps, 4e-3, 0.1))
    spent = wait(device) - start
    net = run.net
    for parameter in net.parameters():
        parameter.data = parameter.data.half().float()  # the statistics belong to what is stored
    estimate_statistics(net, train.pixels)
    with torch.no_grad():
        logits = net(normalise(held_out.pixels.to(device).float()))
    accuracy = 100 * (logits.argmax(-1).cpu() == held_out.labels).float().mean().item()
    tensors, metadata = exported(net)
    save_safetensors(options.out / "prior.safetensors", tensors, metadata)
    result = {
        "steps": steps,
        "seconds": spent,
        "loss": loss.item(),
        "accuracy": accuracy,
        "parameters": sum(t.numel() for n, t in tensors.items() if "running" not in n),
        "images": len(train.pixels),
    }
    atomic_write(options.out / "prior.md", prior_card(result, options))
    log("prior", **result)
    return result


# ---------------------------------------------------------------------- runs


def save_backbone(path: Path, vit: ViT, training: dict[str, Any]) -> None:
    """Write fp16 weights with the config and the training record in the metadata."""
    places = ("data_root", "out", "evaluate", "device", "test", "deadline_minutes")
    recipe = {k: v for k, v in training["options"].items() if k not in places}
    card = {
        "data": "Tiny-ImageNet, 178 classes; teacher: AugReg ViT-Ti/16 (ImageNet with labels)",
        "licence": "research use (ImageNet-derived); teacher's weights Apache-2.0",
        **training,
        "options": recipe,
    }
    save_vit(vit, path, torch.float16, card)


def table(results: list[dict[str, Any]]) -> str:
    """Results side by side; what was not measured is a dash."""
    columns = ("variant", "steps", "images_s", "seconds", "linear", "linear_32px", "val_nn1",
               "val_nn5", "val_nn1_16px", "test_nn1", "test_nn5", "test_nn1_16px")  # fmt: skip

    def cell(result: dict[str, Any], name: str) -> str:
        value = result.get(name, "-")
        if not isinstance(value, float):
            return str(value)
        ci95 = result.get(name + "_ci95")
        return f"{value:.1f}" + (f"+-{ci95:.1f}" if ci95 is not None else "")

    rows = [list(columns)] + [[cell(result, name) for name in columns] for result in results]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(row, widths)) for row in rows)


def evaluate_files(options: Options) -> None:
    """Measure saved backbones."""
    device, tasks = torch.device(options.device), 20 if options.dry_run else 600
    per_class = 20 if options.dry_run else None
    results: list[dict[str, Any]] = [{"variant": str(path)} for path in options.evaluate]
    for split in ("val", "test") if options.test else ("val",):
        images = read_images(options.data_root / CIFAR[split], split, per_class)
        for path, result in zip(options.evaluate, results, strict=True):
            result |= measure(ViT.from_pretrained(path).to(device), images, split, tasks)
    log = Log(options.out / "evaluate.jsonl", time.perf_counter())
    for result in results:
        log("evaluate", **result)
    print(table(results))


def train_variant(
    run_of: Callable[[], Distillation],
    reduced: float,
    seconds: float,
    held_out: Images,
    val: Images,
    tasks: int,
    log: Log,
) -> tuple[dict[str, Any], ViT]:
    """Train one backbone, round it to fp16 and measure it."""
    run = run_of()
    options, device = run.options, run.views.images.device
    steps = options.steps
    if steps is None:
        start = wait(device)
        rate = steps_per_second(run.step, device)
        log("rate", steps_per_second=rate, images_per_second=rate * options.batch,
            spent_s=wait(device) - start)  # fmt: skip
        steps, run = max(1, int(seconds * rate)), run_of()

    def checks(vit: ViT) -> dict[str, float]:
        return {f"val_nn{k}": nearest_centre(vit, val, k, tasks)[0] for k in (1, 5)}

    start = wait(device)
    images_s = train_backbone(run, steps, checks, log)
    seconds = wait(device) - start
    student = run.average
    for parameter in student.parameters():
        parameter.data = parameter.data.half().float()  # what is measured is what is stored
    result = {
        "variant": f"{options.init}, {100 * reduced:.0f} % reduced",
        "reduced_resolution": reduced,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "steps": steps,
        "images_s": images_s,
        "seconds": seconds,
        "linear": linear_accuracy(student, held_out),
        "linear_32px": linear_accuracy(student, held_out, 32),
        **measure(student.vit, val, "val", tasks),
    }
    return result, student.vit


def seconds_for(options: Options, log: Log, variants_left: int) -> float:
    """Training time of the next backbone, in seconds, so that all ends before the deadline."""
    wanted = 60 * options.minutes
    if options.deadline_minutes is None:
        return wanted
    reserve = 12.0 * variants_left + (options.prior_seconds + 15) + (15 if options.test else 0)
    left = (60 * options.deadline_minutes - log.seconds() - reserve) / variants_left
    return max(1.0, min(wanted, left))


def train(options: Options) -> list[dict[str, Any]]:
    """All that is asked for: views, one backbone for each variant, the prior, test accuracy."""
    log = Log(options.out / "log.jsonl", time.perf_counter())
    device, dry = torch.device(options.device), options.dry_run
    log("start", options=asdict(options), torch=torch.__version__, device=options.device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = device.type == "cuda"
    tasks = 20 if dry else 600
    everything = read_images(options.data_root / "tiny_imagenet.zip", "train", 2 if dry else None)
    train_set, held_out = split_held_out(everything, options.seed)
    if dry:
        train_set = train_set.take(np.arange(64))
    val = read_images(options.data_root / CIFAR["val"], "val", 20 if dry else None)
    train_set = train_set.to(device)
    log("images", train=len(train_set.pixels), held_out=len(held_out.pixels), val=len(val.pixels))

    teacher, *head = load_teacher(options.data_root / TEACHER_FILE)
    teacher, head = teacher.to(device), tuple(t.to(device) for t in head)
    run_block = compiled_block(device)
    if dry:
        sample = normalise(val.pixels[:4].to(device).float())
        vit = ViT.preset("demo").to(device)
        torch.testing.assert_close(forward(vit, sample, run_block), vit(sample), rtol=0, atol=0.05)
    start = wait(device)
    views = make_views(
        train_set, teacher, run_block, views=options.views, smallest=options.crop,
        seed=options.seed + 1,
    )  # fmt: skip
    spent = wait(device) - start
    log("views", count=len(views.images), spent_s=spent,
        images_per_second=len(views.images) / spent, variance=views.variance.item())  # fmt: skip
    if not torch.equal(views.images[torch.tensor([-1], device=device)][0], views.images[-1]):
        raise RuntimeError("train: indexing the views fails at this size; use fewer --views")

    results: list[dict[str, Any]] = []
    folders: list[Path] = []
    for number, reduced in enumerate(options.reduced_resolution):
        seconds = seconds_for(options, log, len(options.reduced_resolution) - number)

        def run_of(reduced: float = reduced) -> Distillation:
            return Distillation(
                views, train_set.classes, teacher, head, run_block, options, reduced
            )

        result, vit = train_variant(run_of, reduced, seconds, held_out, val, tasks, log)
        results.append(result)
        folders.append(options.out / f"{options.init}-reduced-{100 * reduced:.0f}")
        training = {"options": asdict(options), **result}
        save_backbone(folders[-1] / "vit.safetensors", vit, training)
        atomic_write(folders[-1] / "vit.md", backbone_card(result, options))
        log("backbone", **result)
    if options.prior_seconds > 0:
        train_prior(views, train_set, held_out, options.prior_seconds, options, log)
    if options.test:
        best = max(range(len(results)), key=lambda i: results[i]["val_nn1"])
        test = read_images(options.data_root / CIFAR["test"], "test", 20 if dry else None)
        vit = ViT.from_pretrained(folders[best] / "vit.safetensors").to(device)
        results[best] |= measure(vit, test, "test", tasks)
        atomic_write(folders[best] / "vit.md", backbone_card(results[best], options))
        log("test", **results[best])
    if device.type == "cuda":
        log("memory", peak_gib=torch.cuda.max_memory_allocated() / 2**30)
    log("end")
    return results


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.evaluate:
        evaluate_files(options)
        return
    print(table(train(options.shortened() if options.dry_run else options)))


if __name__ == "__main__":
    main()

"""Adapting to one 5-way 1-shot task, the paper's Table 1: tasks a second and peak memory.

`python benchmarks/bench_adaptation.py` prints a table; --record keeps it under results/. A task has
5 support images and 75 queries. Fine-tuning takes 50 or 5 steps of SGD on the support images, of
the whole backbone or of a rank-4 LoRA, with a linear head, and then classifies the queries; the
fine-tuning-free way embeds support and queries once under a meta-LoRA, or finds them embedded.
All ways run on both backends: eager fp32, and bf16 with the step or the forward pass in one CUDA
graph. ViT-B/16 with random weights; on the CPU a toy, which says nothing of speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from bench_steps import PRESET
from timing import device, measure, on_gpu, record, table
from torch import Tensor, nn

from fastrecycle import LoRA
from fastrecycle.capture import capture
from fastrecycle.classifier import Embedder, class_means, prototype_logits
from fastrecycle.ops import autocast
from fastrecycle.vit import ViT

WAYS, QUERIES = 5, 75
PAPER_GAIN = 63  # of fine-tuning-free adaptation over 50 steps of LoRA fine-tuning, in the paper


@dataclass(frozen=True)
class Backend:
    precision: str
    recorded: bool  # in CUDA graphs


BACKENDS = {"reference": Backend("fp32", False), "bf16, graph": Backend("bf16", True)}


class Task:
    """Random pixels: speed does not depend on what images show."""

    def __init__(self, vit: ViT):
        side = vit.config.image_size
        self.support = torch.randn(WAYS, 3, side, side, device=device())
        self.query = torch.randn(QUERIES, 3, side, side, device=device())
        self.labels = torch.arange(WAYS, device=device())


class FineTuning:
    """SGD on the support images; every task starts anew from the same weights."""

    def __init__(self, learn: str, backend: Backend):
        self.precision = backend.precision
        self.vit = ViT.preset(PRESET).to(device())
        self.task = Task(self.vit)
        self.head = nn.Linear(self.vit.config.features, WAYS).to(device())
        self.lora = None
        if learn == "LoRA":
            self.lora = LoRA.init(self.vit.config, 4).to(device()).clone()
            learnt = [x.requires_grad_() for x in self.lora.tensors()]
        else:
            learnt = list(self.vit.requires_grad_(True).parameters())
        self.learnt = [*learnt, *self.head.parameters()]
        self.start = [x.detach().clone() for x in self.learnt]
        self.optimiser = torch.optim.SGD(self.learnt, lr=0.01)
        recorded = backend.recorded and on_gpu()
        self.step: Callable = capture(self.update, state=self.learnt) if recorded else self.update
        self.classify: Callable = capture(self.predict) if recorded else self.predict

    def logits(self, images: Tensor) -> Tensor:
        with autocast(device(), self.precision):
            return self.head(self.vit(images, self.lora)).float()

    def update(self) -> Tensor:
        loss = nn.functional.cross_entropy(self.logits(self.task.support), self.task.labels)
        for x, gradient in zip(self.learnt, torch.autograd.grad(loss, self.learnt), strict=True):
            x.grad = gradient
        self.optimiser.step()
        return loss.detach()

    @torch.no_grad()
    def predict(self) -> Tensor:
        return self.logits(self.task.query).argmax(1)

    def adapt(self, steps: int) -> Tensor:
        """Predictions of one task's queries."""
        with torch.no_grad():
            for x, start in zip(self.learnt, self.start, strict=True):
                x.copy_(start)
        for _ in range(steps):
            self.step()
        return self.classify()


class Free:
    """Nearest prototypes under a meta-LoRA."""

    def __init__(self, backend: Backend):
        vit = ViT.preset(PRESET).to(device())
        self.task = Task(vit)
        lora = LoRA.init(vit.config, 4).to(device())
        name = "compile" if backend.recorded else "reference"
        self.embed = Embedder(vit, lora, precision=backend.precision, backend=name)
        self.known = self.features()

    def features(self) -> Tensor:
        return self.embed(torch.cat((self.task.support, self.task.query)))

    def adapt(self, cached: bool) -> Tensor:
        features = self.known if cached else self.features()
        prototypes = class_means(features[:WAYS], WAYS)
        return prototype_logits(prototypes, features[WAYS:]).argmax(1)


def ways(backend: Backend) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Makers of a call that adapts to a task, by name."""
    few, many = (5, 50) if on_gpu() else (1, 2)

    def tuning(learn: str, steps: int) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Callable[[], Tensor]:
            made = FineTuning(learn, backend)
            return lambda: made.adapt(steps)

        return make

    def free(cached: bool) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Callable[[], Tensor]:
            made = Free(backend)
            return lambda: made.adapt(cached)

        return make

    return {
        f"full fine-tuning, {many} steps": tuning("backbone", many),
        f"full fine-tuning, {few} steps": tuning("backbone", few),
        f"LoRA fine-tuning, {many} steps": tuning("LoRA", many),
        f"LoRA fine-tuning, {few} steps": tuning("LoRA", few),
        "fine-tuning-free": free(False),
        "fine-tuning-free, images embedded before": free(True),
    }


def rows(repeats: int) -> list[dict]:
    """One row a backend and way; ratios are against the many steps of LoRA fine-tuning."""
    found: list[dict] = []
    for backend_name, backend in BACKENDS.items():
        of_backend = []
        for name, make in ways(backend).items():
            before = 0
            if on_gpu():
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            call = make()
            guess = call()
            assert guess.shape == (QUERIES,)
            assert guess.max() < WAYS
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu() else 0.0
            # one at a time: together they would not share the memory that is measured
            time = measure({name: call}, repeats, graph=False)[name]
            of_backend.append({
                "backend": backend_name, "way": name, "ms": time.median_ms,
                "p20_ms": time.p20_ms, "p80_ms": time.p80_ms,
                "tasks/s": 1000 / time.median_ms, "GiB": peak,
            })  # fmt: skip
            del call
        base = of_backend[2]
        found += [
            {**row, "x LoRA": base["ms"] / row["ms"], "of its memory": row["GiB"] / base["GiB"]}
            if base["GiB"]
            else row
            for row in of_backend
        ]
        print(table(found[-len(of_backend) :]), flush=True)
    return found


@pytest.mark.parametrize("cached", [False, True])
def test_adaptation(benchmark, cached):
    call = Free(BACKENDS["reference"])
    benchmark.pedantic(call.adapt, args=(cached,), rounds=5 if on_gpu() else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7 if on_gpu() else 1)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    found = rows(options.repeats)
    print(f"the paper: fine-tuning-free {PAPER_GAIN}x as fast as LoRA fine-tuning of 50 steps")
    if options.record:
        record("adaptation", found)


if __name__ == "__main__":
    main()

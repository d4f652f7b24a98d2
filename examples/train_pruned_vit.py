"""The pruned ViT in a training loop of your own: a LoRA and a head on scikit-learn's digits.

    python examples/train_pruned_vit.py --steps 100

The backbone is frozen and takes the LoRA as an argument; tokens are dropped on the way. On CUDA the
step runs in bf16 and is recorded once as a CUDA graph, then replayed without Python; on the CPU the
same function is called as it is.
"""

from __future__ import annotations

import time

import torch
import tyro
from torch import Tensor

from fastrecycle import LoRA, ViT
from fastrecycle.capture import capture, optimiser_state
from fastrecycle.eval import decode


def main(
    steps: int = 100,
    batch: int = 64,
    prune: tuple[int, float] = (6, 0.5),
    lr: float = 1e-3,
    seed: int = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> float:
    """Train and print the accuracy on held-out digits.

    Args:
        steps: of Adam.
        batch: images a step.
        prune: block after whose attention tokens are dropped, and the share dropped.
        lr: Adam's rate.
        seed: of the start and the batches.
        device: cuda or cpu.

    Returns:
        Accuracy on the held-out fifth, in percent.

    """
    torch.manual_seed(seed)
    vit = ViT.from_pretrained("demo").to(device)
    data = decode(vit, "digits")
    pixels, labels = data.pixels.to(device), torch.from_numpy(data.labels).to(device)
    order = torch.randperm(len(labels), device=device)
    held_out, train = order.split((len(order) // 5, len(order) - len(order) // 5))

    lora = LoRA.init(vit.config, rank=4, seed=seed).to(device)
    head = torch.nn.Linear(vit.config.features, len(data.class_names), device=device)
    parameters = [*(x.requires_grad_() for x in lora.tensors()), *head.parameters()]
    recorded = device.startswith("cuda")
    optimiser = torch.optim.Adam(parameters, lr=lr, capturable=recorded)

    def logits(rows: Tensor) -> Tensor:
        with torch.autocast(vit.pos_embed.device.type, torch.bfloat16, enabled=recorded):
            features = vit(vit.normalise(pixels[rows].float() / 255), lora, prune=dict([prune]))
        return head(features.float())

    def step(rows: Tensor) -> Tensor:
        loss = torch.nn.functional.cross_entropy(logits(rows), labels[rows])
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        return loss.detach()

    run = step
    if recorded:
        run = capture(step, train[:batch], state=[*parameters, *optimiser_state(optimiser)])
    began = time.perf_counter()
    for i in range(steps):
        loss = run(train[torch.randint(len(train), (batch,), device=device)])
        if i % 20 == 0 or i == steps - 1:
            print(f"step {i + 1:4d}  loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        right = torch.cat([logits(r).argmax(1) == labels[r] for r in held_out.split(batch)])
    accuracy = 100 * right.float().mean().item()
    print(
        f"{accuracy:.1f} % of {len(held_out)} held-out digits, {steps / seconds:.1f} steps a second"
    )
    return accuracy


if __name__ == "__main__":
    tyro.cli(main)

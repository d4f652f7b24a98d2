"""MOLE: a learned gate over the outputs of the bank's LoRAs, and a linear head (App. D).

E tasks, n images, L blocks, G LoRAs, R rank, S side, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastrecycle.baselines.lora_linear import stacked_features
from fastrecycle.baselines.network import OnBank
from fastrecycle.baselines.tuning import TunedNetwork
from fastrecycle.lora import LoRA, LoRAStack
from fastrecycle.ops import GatedLowRank, LowRank
from fastrecycle.vit import ViT


@dataclass(frozen=True)
class GatedStack(LoRAStack):
    """G LoRAs whose outputs are weighed by gates, so that each task can run under its own gate.

    y = x W^T + sum_g gate_g(x) scale_g (x a_g^T) b_g^T, gate(x) = softmax(x weight^T + bias) of
    each token, at each product that a LoRA of the bank changes.
    """

    weight: dict[str, Tensor]  # target -> (E, L, G, d_in)
    bias: dict[str, Tensor]  # target -> (E, L, G)

    def to(self, *args, **kwargs) -> GatedStack:
        """LoRAs and gates on another device or in another dtype."""
        plain = super().to(*args, **kwargs)
        gates = [{t: x.to(*args, **kwargs) for t, x in d.items()} for d in (self.weight, self.bias)]
        return GatedStack(plain.a, plain.b, plain.scale, *gates)

    def blocks(self) -> list[dict[str, LowRank | GatedLowRank]]:
        """The factors and gates of each block."""
        gates = {t: (self.weight[t].unbind(1), self.bias[t].unbind(1)) for t in self.weight}
        return [
            {
                t: GatedLowRank(*factors, gates[t][0][i], gates[t][1][i])
                for t, factors in each.items()
            }
            for i, each in enumerate(super().blocks())
        ]


class MOLE(OnBank, TunedNetwork):
    """Train gates over the outputs of frozen LoRAs, and a linear head, on the support set.

    Each product that a LoRA of the bank changes has a linear gate on its own input, with a softmax
    over the bank; LoRAs of different ranks and targets go together. Gates start at zero: every LoRA
    alike, which is the average of the products. The paper names LLaVA-MoLE, whose experts are new,
    but describes a gate over pre-tuned LoRAs; that is what this is.

    Args:
        vit, optimizer, lr, steps, batch_size, precision: see `TunedNetwork`.
        bank: the LoRAs.

    """

    def __init__(
        self,
        vit: ViT,
        bank: Sequence[LoRA],
        optimizer: Literal["sgd", "adam"] = "sgd",
        lr: float = 0.01,
        steps: int = 50,
        batch_size: int = 64,
        precision: str = "fp32",
    ):
        self.vit = vit
        self.bank = bank
        self.optimizer = optimizer
        self.lr = lr
        self.steps = steps
        self.batch_size = batch_size
        self.precision = precision

    def check(self) -> None:
        """See `AdaptedNetwork.check`."""
        super().check()
        self._bank()  # raises where LoRAs do not fit

    def parameters(self, ways: int) -> int:
        """The gates' and the head's."""
        config = self.vit.config
        gates = sum(a.shape[0] * a.shape[1] * (a.shape[3] + 1) for a in self._bank().a.values())
        return gates + self.rule.parameters(ways, config.features)

    def _start(self, tasks: int) -> dict[str, Tensor]:
        gates = {}
        for target, a in self._bank().a.items():
            count, depth, _, d_in = a.shape
            gates[f"weight.{target}"] = a.new_zeros(tasks, depth, count, d_in)
            gates[f"bias.{target}"] = a.new_zeros(tasks, depth, count)
        return gates

    def _features(self, network: dict[str, Tensor], images: Tensor) -> Tensor:
        bank = self._bank()
        gates = [{t: network[f"{part}.{t}"] for t in bank.a} for part in ("weight", "bias")]
        stack = GatedStack(bank.a, bank.b, bank.scale, *gates)
        return stacked_features(self.vit, stack, images, self.precision)

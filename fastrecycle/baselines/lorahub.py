"""LoRAHub: one LoRA as a weighted sum of the bank's, its weights searched without gradients.

Huang et al., 2023. E tasks, W ways, n support images, G LoRAs, L blocks, R rank, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastrecycle.baselines.lora_linear import stacked_features, unpacked
from fastrecycle.baselines.network import Adapted, AdaptedNetwork, OnBank, PrototypeRule
from fastrecycle.classifier import Distance, prototype_logits
from fastrecycle.lora import LoRA, LoRABank, LoRAStack
from fastrecycle.vit import ViT


class LoRAHub(OnBank, AdaptedNetwork):
    """Weigh the bank's LoRAs by a gradient-free search, and classify by the nearest class centre.

    As LoRAHub's authors have it: nevergrad's NGOpt, which starts from weights of 0, takes 40 steps
    within [-1.5, 1.5] to minimise a loss on the support set + l1 mean |w|. The paper names no head
    ("the weight values are fine-tuned on the target task", Sec. 5), but calls the method "LoRAHub +
    NN" in Table 10; so class centres of the support stand on top. Against the centres of all, a
    support image would measure its distance to itself; so the loss is the cross-entropy of each
    support image against the class centres *without it*. In a class of one image (1-shot), the
    image's mirror image stands in for its centre, as the paper's augmentation is the flip. Logits
    of the loss are 10 times the cosine similarity, whatever `distance` classifies by: distances
    between features as they come are so large that at 1-shot the loss is 0 before any step.

    At these settings NGOpt is COBYLA, which tries one LoRA after another first: with more LoRAs
    than steps the last ones keep a weight of 0. The authors draw 20 at random.

    Args:
        vit, batch_size, precision: see `AdaptedNetwork`.
        bank: the LoRAs.
        of: "factors": sum_g w_g a_g and sum_g w_g scale_g b_g, as the authors combine them, for
            LoRAs of one rank on the same targets; "products": sum_g w_g scale_g b_g a_g, for any.
        distance: see `prototype_logits`.
        steps: evaluations of the loss.
        bound: largest absolute weight.
        l1: factor of the mean absolute weight.
        seed: of the search, the same for every task.

    After `fit`, `weights_` (G,) holds the weights.

    """

    def __init__(
        self,
        vit: ViT,
        bank: Sequence[LoRA],
        of: Literal["factors", "products"] = "factors",
        distance: Distance = "euclidean",
        steps: int = 40,
        bound: float = 1.5,
        l1: float = 0.05,
        seed: int = 0,
        batch_size: int = 64,
        precision: str = "fp32",
    ):
        self.vit = vit
        self.bank = bank
        self.of = of
        self.distance = distance
        self.steps = steps
        self.bound = bound
        self.l1 = l1
        self.seed = seed
        self.batch_size = batch_size
        self.precision = precision

    @property
    def rule(self) -> PrototypeRule:  # type: ignore[override]
        """Nearest class centres."""
        return PrototypeRule(self.distance)

    def check(self) -> None:
        """See `AdaptedNetwork.check`."""
        super().check()
        if self.distance not in ("euclidean", "squared", "cosine"):
            raise ValueError(
                f'distance: expected "euclidean", "squared" or "cosine", got {self.distance!r}'
            )
        if self.steps < 1:
            raise ValueError(f"steps: must be at least 1, got {self.steps}")
        if not 0 < self.bound < float("inf"):
            raise ValueError(f"bound: must be positive and finite, got {self.bound}")
        if not 0 <= self.l1 < float("inf"):
            raise ValueError(f"l1: must be at least 0 and finite, got {self.l1}")
        if self.of not in ("factors", "products"):
            raise ValueError(f'of: expected "factors" or "products", got {self.of!r}')
        self._bank()  # raises where LoRAs do not fit
        if self.of == "factors":
            ranks = [lora.ranks for lora in LoRABank(self.bank).fit(self.vit.config)]
            for other in ranks:
                if other != ranks[0]:
                    raise ValueError(
                        "bank: summing factors needs LoRAs of one rank on the same targets, got"
                        f' ranks {ranks[0]} and {other}; of="products" takes any'
                    )

    def parameters(self, ways: int) -> int:
        """A weight for each LoRA, G."""
        return len(self.bank)

    def fit(self, images: Any, labels: Any) -> LoRAHub:
        """Adapt to one task; see `Baseline.fit`."""
        super().fit(images, labels)
        self.weights_ = self.adapted_.rule["weights"][0].cpu().numpy()
        return self

    def _adapt(self, images: Tensor, way: Tensor, ways: int) -> Adapted:
        counts = torch.bincount(way, minlength=ways)
        if bool((counts == 1).any()):
            images = torch.cat((images, images.flip(-1)), 1)

        def features(weights: Tensor) -> tuple[Tensor, Tensor]:
            """Of the support and, where there are classes of one image, of its mirror images."""
            seen = self._features(mix(self._bank(), weights, self.of), images)
            return seen[:, : len(way)], seen[:, -len(way) :]

        with torch.no_grad(), searches(len(images), len(self.bank), self) as search:
            for _ in range(self.steps):
                weights = search.ask().to(images)
                losses = support_loss(*features(weights), way, ways)
                # the search runs on the host, so each step waits for the device
                search.tell(losses + self.l1 * weights.abs().mean(1))
            weights = search.best().to(images)
            rule = self.rule.fitted({}, features(weights)[0], way, ways)
            network = mix(self._bank(), weights, self.of)
        return Adapted(network, {**rule, "weights": weights})

    def _features(self, network: dict[str, Tensor], images: Tensor) -> Tensor:
        return stacked_features(self.vit, unpacked(network), images, self.precision)


def mix(bank: LoRAStack, weights: Tensor, of: Literal["factors", "products"]) -> dict[str, Tensor]:
    """LoRAs of scale 1 that are weighted sums of a bank's, for `unpacked`.

    Args:
        bank: of G LoRAs.
        weights: (E, G).
        of: see `LoRAHub`.

    Returns:
        "a.TARGET" (E, L, R', d_in) and "b.TARGET" (E, L, d_out, R'). R' is R for factors; for
        products G R, or d_in where that is less.

    """
    mixed = {}
    for target, a in bank.a.items():
        b = bank.b[target] * bank.scale[target][:, :, None, None]
        if of == "factors":
            a = torch.einsum("eg,glri->elri", weights, a)
            b = torch.einsum("eg,glor->elor", weights, b)
        else:
            b = weights[:, :, None, None, None] * b  # (E, G, L, d_out, R)
            b = b.permute(0, 2, 3, 1, 4).flatten(3)  # (E, L, d_out, G R)
            a = a.transpose(0, 1).flatten(1, 2)  # (L, G R, d_in)
            if a.shape[1] > a.shape[2]:  # then the product is smaller
                b = b @ a
                a = torch.eye(a.shape[2], dtype=a.dtype, device=a.device).expand(len(a), -1, -1)
            a = a.expand(len(b), *a.shape)
        mixed[f"a.{target}"], mixed[f"b.{target}"] = a, b
    return mixed


def support_loss(features: Tensor, mirrored: Tensor, way: Tensor, ways: int) -> Tensor:
    """Mean cross-entropy of support images against the class centres without them, (E,).

    Args:
        features: (E, n, F).
        mirrored: (E, n, F), of the mirror images, in place of the centre of a class of one.
        way: (n,).
        ways: W.

    """
    wide = torch.promote_types(features.dtype, torch.float32)
    features, mirrored = features.to(wide), mirrored.to(wide)
    member = way[:, None] == torch.arange(ways, device=way.device)  # (n, W)
    counts = member.sum(0)
    sums = member.T.to(wide) @ features  # (E, W, F)
    others = (counts - 1)[way][:, None]
    own = torch.where(others > 0, (sums[:, way] - features) / others.clamp_min(1), mirrored)
    means = sums / counts[:, None]
    centres = torch.where(member[..., None], own[:, :, None], means[:, None])  # (E, n, W, F)
    logits = prototype_logits(centres, features[:, :, None], "cosine")[:, :, 0]
    truth = way.expand(len(features), -1)
    cross_entropy = torch.nn.functional.cross_entropy
    return cross_entropy(logits.transpose(1, 2), truth, reduction="none").mean(1)


class Searches:
    """One NGOpt for each of E tasks, over G weights, in step."""

    def __init__(self, optimizers: list[Any]):
        self.optimizers = optimizers

    def ask(self) -> Tensor:
        """The next weights, (E, G) float64."""
        self.asked = [each.ask() for each in self.optimizers]
        return torch.from_numpy(np.stack([each.value for each in self.asked]))

    def tell(self, losses: Tensor) -> None:
        """The losses (E,) of the weights asked last."""
        for each, candidate, loss in zip(self.optimizers, self.asked, losses.tolist(), strict=True):
            each.tell(candidate, loss)

    def best(self) -> Tensor:
        """What NGOpt recommends, (E, G) float64."""
        return torch.from_numpy(
            np.stack([each.provide_recommendation().value for each in self.optimizers])
        )


@contextmanager
def searches(tasks: int, loras: int, settings: LoRAHub) -> Iterator[Searches]:
    """Searches whose threads are told to end when the block is left, however it is left."""
    try:
        import nevergrad
    except ImportError as error:
        raise ImportError(
            f'LoRAHub: needs nevergrad ({error}); pip install "fastrecycle[baselines]"'
        ) from None
    optimizers = []
    for _ in range(tasks):
        weights = nevergrad.p.Array(
            init=np.zeros(loras), lower=-settings.bound, upper=settings.bound
        )
        weights.random_state.seed(settings.seed)
        optimizers.append(nevergrad.optimizers.NGOpt(weights, budget=settings.steps))
    search = Searches(optimizers)
    with warnings.catch_warnings():
        # of SciPy about settings that nevergrad makes for its COBYLA, and of a search that is done
        # before its last step
        warnings.filterwarnings("ignore", "COBYLA: Invalid", UserWarning)
        warnings.filterwarnings("ignore", "Underlying optimizer has already converged")
        try:
            yield search
        finally:
            # nevergrad runs SciPy in a thread each, which ends when its optimizer goes
            optimizers.clear()
            search.asked = []

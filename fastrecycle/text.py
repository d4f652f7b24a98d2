"""Text towers of two-tower models: class names and prompt templates to class embeddings.

B images, C classes, D width of the shared space. Towers and tokenizers are open_clip's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastrecycle.sources import open_clip_model

PROMPTS = ("a photo of a {}.",)
_TOGETHER = 256  # texts of one forward pass


class ClassEmbeddings(Protocol):
    """What zero-shot classification reads of a text tower; `TextClasses`, or anything alike."""

    @property
    def embeddings(self) -> Tensor:
        """(C, D), rows of norm 1."""
        ...

    @property
    def scale(self) -> float:
        """Factor of the cosines, 1 / temperature."""
        ...


@dataclass(frozen=True)
class TextClasses:
    """Classes as a text tower sees them."""

    embeddings: Tensor  # (C, D), rows of norm 1
    scale: float  # of the cosines
    class_names: tuple[str, ...]


class TextTower(nn.Module):
    """A frozen text tower of open_clip with its tokenizer.

    >>> tower = TextTower.from_open_clip("ViT-B-16-quickgelu", "openai")
    >>> classes = tower.classes(["cat", "dog"], ["a photo of a {}.", "a drawing of a {}."])
    >>> logits = zero_shot_logits(vit(images), classes.embeddings, classes.scale)
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor]):
        """Keep the text half of a model.

        Args:
            model: with `encode_text(tokens, normalize=True)` and `logit_scale`, a logarithm, as
                open_clip's CLIP and CustomTextCLIP; its image tower is not needed.
            tokenizer: texts to (B, length) int64.

        Raises:
            TypeError: not such a model.

        """
        super().__init__()
        if not callable(getattr(model, "encode_text", None)) or not hasattr(model, "logit_scale"):
            raise TypeError(
                "TextTower: expected a model with encode_text and logit_scale, got"
                f" {type(model).__name__}"
            )
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    @staticmethod
    def from_open_clip(name: str, pretrained: str | None = None) -> TextTower:
        """From open_clip, the weights of `ViT.from_pretrained("open_clip:NAME/PRETRAINED")`.

        Args:
            name: of the model; "hf-hub:OWNER/REPO" and "local-dir:PATH" name their weights too.
            pretrained: a tag or a file.

        Raises:
            FileNotFoundError: no such file or tag.
            OSError: a download failed.
            ValueError: no such model, or weights of another one.

        """
        import open_clip

        model = open_clip_model(name if pretrained is None else f"{name}/{pretrained}")
        model.visual = nn.Identity()  # mostly the larger half
        return TextTower(model, open_clip.get_tokenizer(name))

    @property
    def scale(self) -> float:
        """Factor of the cosines that the model was trained with."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def encode(self, class_names: Sequence[str], templates: Sequence[str] = PROMPTS) -> Tensor:
        """One embedding a class: the mean over templates of unit vectors, made a unit vector again.

        Args:
            class_names: in the order of the classes; underscores are spaces.
            templates: prompts with one {} for the class name.

        Returns:
            (C, D) float32 on the tower's device, rows of norm 1.

        Raises:
            TypeError: one string in the place of several.
            ValueError: no class, no template, or a template without {}.

        """
        for what, given in (("class_names", class_names), ("templates", templates)):
            if isinstance(given, str):
                raise TypeError(f"{what}: expected a sequence of strings, got the string {given!r}")
            if not given:
                raise ValueError(f"{what}: expected at least one, got none")
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates: each needs one {{}}, got {template!r}")
        texts = [
            template.replace("{}", name.replace("_", " "))
            for name in class_names
            for template in templates
        ]
        device = self.model.logit_scale.device
        found = [
            self.model.encode_text(
                self.tokenizer(texts[i : i + _TOGETHER]).to(device), normalize=True
            )
            for i in range(0, len(texts), _TOGETHER)
        ]
        each = torch.cat(found).float().unflatten(0, (len(class_names), len(templates)))
        return nn.functional.normalize(each.mean(1), dim=-1)

    def classes(
        self, class_names: Sequence[str], templates: Sequence[str] = PROMPTS
    ) -> TextClasses:
        """`encode` with the model's scale and the names."""
        return TextClasses(self.encode(class_names, templates), self.scale, tuple(class_names))


def zero_shot_logits(
    image_features: Tensor, text_embeddings: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """Logits scale cos(image, class); differentiable.

    Args:
        image_features: (B, D), of any norm, as `ViT` returns them.
        text_embeddings: (C, D), rows of norm 1, of the same two-tower model.
        logit_scale: factor of the cosines.

    Returns:
        (B, C).

    Raises:
        ValueError: widths that differ.

    """
    if (
        image_features.ndim != 2
        or text_embeddings.ndim != 2
        or image_features.shape[1] != text_embeddings.shape[1]
    ):
        raise ValueError(
            "zero_shot_logits: expected features (B, D) and embeddings (C, D), got"
            f" {tuple(image_features.shape)} and {tuple(text_embeddings.shape)}; both towers must"
            " belong to one model"
        )
    return logit_scale * nn.functional.normalize(image_features, dim=-1) @ text_embeddings.T

"""Text towers of two-tower models: class names and prompt templates to class embeddings.

B images, C classes, D width of the shared space. Networks and tokenizers are open_clip's; a tower
of one's own is a folder with text.json and text.safetensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastrecycle.files import load_safetensors, read_json, save_safetensors, write_json
from fastrecycle.lora import Head, LoRA, LoRABank
from fastrecycle.sources import open_clip_model

PROMPTS = ("a photo of a {}.",)
_TOGETHER = 256  # texts of one forward pass
_LONGEST = 16_384  # tokens of a text; its attention mask is the square of that


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

    def head(self) -> Head:
        """The head whose logits are `zero_shot_logits`: scale times the embeddings, normalised."""
        return Head(self.scale * self.embeddings, normalised=True)


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a `TextNetwork`.

    Raises:
        ValueError: a size that is no positive integer, heads that do not divide the width, or a
            context whose mask alone would take more than a gigabyte.

    """

    output_dim: int  # D
    width: int = 128
    heads: int = 4
    layers: int = 2
    context_length: int = 32  # tokens of a text
    vocab_size: int = 49408  # of open_clip's byte pair encoding

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: must be a positive integer, got {size!r:.40}")
        if self.width % self.heads:
            raise ValueError(f"heads: must divide the width {self.width}, got {self.heads}")
        if self.context_length > _LONGEST:
            raise ValueError(
                f"context_length: must be at most {_LONGEST}, got {self.context_length}"
            )


class TextNetwork(nn.Module):
    """open_clip's text transformer with a scale of cosines, without an image tower."""

    def __init__(self, config: TextConfig):
        from open_clip.transformer import TextTransformer

        super().__init__()
        self.config = config
        self.transformer = TextTransformer(**dataclasses.asdict(config))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's start

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Tokens (B, context_length) int64 -> (B, D), of norm 1 where asked for."""
        found = self.transformer(tokens)
        return nn.functional.normalize(found, dim=-1) if normalize else found


def text_tokenizer(config: TextConfig) -> Callable[[list[str]], Tensor]:
    """open_clip's byte pair encoding at a network's context length."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=config.context_length)


class TextTower(nn.Module):
    """A frozen text tower of open_clip with its tokenizer.

    >>> tower = TextTower.from_open_clip("ViT-B-16-quickgelu", "openai")
    >>> classes = tower.classes(["cat", "dog"], ["a photo of a {}.", "a drawing of a {}."])
    >>> logits = zero_shot_logits(vit(images), classes.embeddings, classes.scale)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        templates: Sequence[str] = PROMPTS,
    ):
        """Keep the text half of a model.

        Args:
            model: with `encode_text(tokens, normalize=True)` and `logit_scale`, a logarithm, as
                open_clip's CLIP and CustomTextCLIP; its image tower is not needed.
            tokenizer: texts to (B, length) int64.
            templates: prompts that it takes where none are given.

        Raises:
            TypeError: not such a model, or one string in the place of several templates.
            ValueError: no template, or one without {}.

        """
        super().__init__()
        if not callable(getattr(model, "encode_text", None)) or not hasattr(model, "logit_scale"):
            raise TypeError(
                "TextTower: expected a model with encode_text and logit_scale, got"
                f" {type(model).__name__}"
            )
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.templates = _templates(templates)

    @staticmethod
    def from_pretrained(source: str | Path, templates: Sequence[str] = ()) -> TextTower:
        """From "open_clip:MODEL/PRETRAINED", or a folder that `save` wrote.

        Args:
            source: as above.
            templates: prompts in the place of the tower's own; none: its own.

        Raises:
            FileNotFoundError: no such folder, file or tag.
            OSError: a download failed.
            ValueError: a damaged folder, no such model, or weights of another one.

        """
        scheme, _, name = str(source).partition(":")
        if scheme == "open_clip":
            # hf-hub:OWNER/REPO and local-dir:PATH name their weights themselves
            whole = name.startswith(("hf-hub:", "local-dir:"))
            model, _, pretrained = (name, "", "") if whole else name.partition("/")
            tower = TextTower.from_open_clip(model, pretrained or None)
        else:
            tower = _read(Path(source))
        if templates:
            tower.templates = _templates(templates)
        return tower

    def save(self, folder: str | Path) -> None:
        """Write text.json (sizes, templates) and text.safetensors (float32).

        Raises:
            TypeError: not a `TextNetwork`; models of open_clip are loaded by their names.
            OSError: it cannot be written.

        """
        if not isinstance(self.model, TextNetwork):
            raise TypeError(
                "TextTower.save: writes towers over a TextNetwork, got"
                f" {type(self.model).__name__}; load it by open_clip:MODEL/PRETRAINED"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.float() for name, x in self.model.state_dict().items()}
        save_safetensors(folder / "text.safetensors", tensors)
        network = dataclasses.asdict(self.model.config)
        write_json(folder / "text.json", {"network": network, "templates": self.templates})

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
    def encode(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """One embedding a class: the mean over templates of unit vectors, made a unit vector again.

        Args:
            class_names: in the order of the classes; see `spoken`.
            templates: prompts with one {} for the class name; None: the tower's own.

        Returns:
            (C, D) float32 on the tower's device, rows of norm 1.

        Raises:
            TypeError: one string in the place of several.
            ValueError: no class, a name without words, no template, or a template without {}.

        """
        _check_several("class_names", class_names)
        templates = self.templates if templates is None else _templates(templates)
        names = [spoken(name) for name in class_names]
        texts = [template.replace("{}", name) for name in names for template in templates]
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
        self, class_names: Sequence[str], templates: Sequence[str] | None = None
    ) -> TextClasses:
        """`encode` with the model's scale and the names."""
        return TextClasses(self.encode(class_names, templates), self.scale, tuple(class_names))


def spoken(class_name: str) -> str:
    """A class name as a prompt has it: underscores are spaces, CUB's leading number is dropped.

    Raises:
        ValueError: a number, a WordNet id or another name without a word, of which no text tower
            knows anything.

    """
    words = re.sub(r"^\d+\.", "", class_name).replace("_", " ").strip()
    if not re.search(r"[^\W\d_]", words) or re.fullmatch(r"n\d{8}", words):
        raise ValueError(
            f"class_names: 0 shots need names made of words, got {class_name!r}; put a"
            " class_names.json {folder: name} beside the class folders, or give labels that are"
            " names"
        )
    return words


def text_heads(bank: Sequence[LoRA], text: TextTower) -> LoRABank:
    """A bank whose heads are the texts of its class names: what Eq. 1 takes of a two-tower model.

    Args:
        bank: LoRAs with class names, such as those trained by CLIP's loss, which have no heads; a
            set's name in front ("SET/CLASS") is no part of a class's text.
        text: the tower of the same model.

    Raises:
        ValueError: a LoRA without class names, or a name without words.

    """
    made = []
    for i, lora in enumerate(bank):
        if lora.class_names is None:
            raise ValueError(
                f"{lora.name or f'LoRA {i}'}: has no class names, so no texts; put"
                " class_names.json, a list of names, into its folder"
            )
        names = [name.rpartition("/")[2] for name in lora.class_names]
        made.append(replace(lora, head=text.classes(names).head().to("cpu"), head_module=None))
    return LoRABank(made)


def check_width(embeddings: Tensor | None, features: int) -> None:
    """Raise unless texts (C, D) lie in the space of a backbone's features.

    Raises:
        ValueError: D is another width.

    """
    if embeddings is not None and embeddings.shape[1] != features:
        raise ValueError(
            f"text: embeddings of {embeddings.shape[1]} numbers, the backbone's features have"
            f" {features}; both towers must belong to one model"
        )


def _check_several(what: str, given: Sequence[str]) -> None:
    if isinstance(given, str):
        raise TypeError(f"{what}: expected a sequence of strings, got the string {given!r}")
    if not given:
        raise ValueError(f"{what}: expected at least one, got none")


def _templates(given: Sequence[str]) -> tuple[str, ...]:
    _check_several("templates", given)
    for template in given:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"templates: each needs one {{}}, got {template!r}")
    return tuple(given)


def _read(folder: Path) -> TextTower:
    for name in ("text.json", "text.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no text tower (text.json, text.safetensors) there; besides folders,"
                " a source is open_clip:MODEL/PRETRAINED"
            )
    content = read_json(folder / "text.json")
    tensors, _ = load_safetensors(folder / "text.safetensors")
    try:
        templates = content["templates"]
        if not isinstance(templates, list):
            raise ValueError(f"templates: expected a list of prompts, got {templates!r:.40}")
        config = TextConfig(**content["network"])
        _check_tensors(config, tensors)
        network = TextNetwork(config)
        network.load_state_dict(tensors)
        return TextTower(network, text_tokenizer(config), templates)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: a damaged text tower ({error})") from None


def _check_tensors(config: TextConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise where sizes are not the file's own, before a network is built by them."""
    from open_clip.tokenizer import SimpleTokenizer

    for name, shape in (
        ("token_embedding.weight", (config.vocab_size, config.width)),
        ("positional_embedding", (config.context_length, config.width)),
        ("text_projection", (config.width, config.output_dim)),
    ):
        if (own := tuple(tensors[f"transformer.{name}"].shape)) != shape:
            raise ValueError(f"{name}: size mismatch, {shape} by text.json, {own} in the file")
    blocks = {found[1] for name in tensors if (found := re.search(r"resblocks\.(\d+)\.", name))}
    if len(blocks) != config.layers:
        raise ValueError(f"layers: text.json has {config.layers}, text.safetensors {len(blocks)}")
    if config.vocab_size < (words := SimpleTokenizer().vocab_size):
        raise ValueError(f"vocab_size: the tokenizer has {words} tokens, got {config.vocab_size}")
    for name, x in tensors.items():
        if not x.is_floating_point() or not torch.isfinite(x).all():
            raise ValueError(f"{name}: expected finite floating-point numbers, got {x.dtype}")


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

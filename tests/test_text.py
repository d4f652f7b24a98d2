"""Text towers against open_clip itself, on a tiny model with random weights."""

import pytest
import torch
from filled import fill

from fastrecycle import text
from fastrecycle.files import write_json
from fastrecycle.sources import open_clip_facts
from fastrecycle.text import TextClasses, TextTower, zero_shot_logits
from fastrecycle.vit import ViT
from fastrecycle.vit_config import CLIP_MEAN, CLIP_STD
from fastrecycle.weights import convert

open_clip = pytest.importorskip("open_clip", reason="the text towers are its")

NAMES = ["tabby cat", "ice cream", "dog"]
TEMPLATES = ["a photo of a {}.", "a blurry drawing of the {}"]


@pytest.fixture(scope="module")
def model():
    vision = {"image_size": 32, "patch_size": 16, "width": 128, "layers": 2, "head_width": 64}
    words = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(24, vision, words, quick_gelu=True)
    model.visual.image_mean, model.visual.image_std = CLIP_MEAN, CLIP_STD
    model = fill(model)
    model.logit_scale.fill_(3.0)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.tokenizer.SimpleTokenizer(context_length=16)


@pytest.fixture
def tower(model, tokenizer):
    return TextTower(model, tokenizer)


def test_encode_matches_open_clips_own(tower, model, tokenizer):
    got = tower.encode(NAMES, TEMPLATES)
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES).T
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    one = model.encode_text(tokenizer(["a photo of a dog."]), normalize=True)[0]
    torch.testing.assert_close(tower.encode(["dog"])[0], one, rtol=0, atol=1e-6)
    assert (got[0] - got[1]).norm() > 0.05


def test_texts_are_encoded_in_parts(tower, monkeypatch):
    whole = tower.encode(NAMES, TEMPLATES)
    monkeypatch.setattr(text, "_TOGETHER", 4)
    torch.testing.assert_close(tower.encode(NAMES, TEMPLATES), whole, rtol=0, atol=1e-6)


def test_underscores_are_spaces(tower):
    assert torch.equal(tower.encode(["ice_cream"]), tower.encode(["ice cream"]))


def test_zero_shot_logits_match_open_clips_own(tower, model, tokenizer):
    vit = ViT._load(*convert(model.visual.state_dict(), None, open_clip_facts(model.visual)))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = tokenizer([TEMPLATES[0].format(name) for name in NAMES])
    expected, _ = model.get_logits(images, tokens)
    classes = tower.classes(NAMES, TEMPLATES[:1])
    assert isinstance(classes, TextClasses)
    assert classes.class_names == tuple(NAMES)
    got = zero_shot_logits(vit(images), classes.embeddings, classes.scale)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_gradients_reach_the_image_features(tower):
    features = torch.randn(4, 24, requires_grad=True)
    classes = tower.classes(NAMES)
    zero_shot_logits(features, classes.embeddings, classes.scale).logsumexp(1).sum().backward()
    assert features.grad.abs().min() > 0
    assert not any(p.requires_grad for p in tower.parameters())


def test_from_open_clip_keeps_the_text_tower_alone(model, tokenizer, monkeypatch):
    asked = []

    def create_model(name, pretrained=None):
        asked.append((name, pretrained))
        import copy

        return copy.deepcopy(model)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: tokenizer)
    tower = TextTower.from_open_clip("ViT-B-16-quickgelu", "openai")
    assert asked == [("ViT-B-16-quickgelu", "openai")]
    assert not any("visual" in name for name, _ in tower.named_parameters())
    assert tower.scale == pytest.approx(20.0855, rel=1e-5)
    torch.testing.assert_close(tower.encode(NAMES), TextTower(model, tokenizer).encode(NAMES))
    with pytest.raises(ValueError, match="no such model"):
        TextTower.from_open_clip("ViT-B-61", "openai")
    with pytest.raises(ValueError, match="take open_clip:ViT-B-16-quickgelu/openai"):
        TextTower.from_open_clip("ViT-B-16", "openai")


@pytest.mark.parametrize(
    ("names", "templates", "error", "message"),
    [
        ("cat", TEMPLATES, TypeError, "class_names: expected a sequence of strings"),
        (["cat"], "a {}", TypeError, "templates: expected a sequence"),
        ([], TEMPLATES, ValueError, "class_names: expected at least one"),
        (["cat"], [], ValueError, "templates: expected at least one"),
        (["cat"], ["a photo"], ValueError, r"each needs one \{\}, got 'a photo'"),
    ],
)
def test_encode_says_what_is_wrong(tower, names, templates, error, message):
    with pytest.raises(error, match=message):
        tower.encode(names, templates)


def test_other_things_are_no_text_towers(tokenizer):
    with pytest.raises(TypeError, match="encode_text and logit_scale, got Linear"):
        TextTower(torch.nn.Linear(1, 1), tokenizer)
    with pytest.raises(ValueError, match="both towers must belong to one model"):
        zero_shot_logits(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)


# ---------------------------------------------------------------------- towers of one's own


def small(templates=("a {}.", "the {}")):
    torch.manual_seed(0)
    config = text.TextConfig(output_dim=24, width=32, heads=2, layers=1, context_length=12)
    return TextTower(fill(text.TextNetwork(config)), text.text_tokenizer(config), templates)


def test_a_tower_of_ones_own_is_saved_and_read(tmp_path):
    tower = small()
    tower.model.logit_scale.fill_(2.0)
    tower.save(tmp_path / "tower")
    again = TextTower.from_pretrained(tmp_path / "tower")
    assert again.templates == ("a {}.", "the {}")
    assert again.scale == pytest.approx(7.389, rel=1e-3)
    torch.testing.assert_close(again.encode(NAMES), tower.encode(NAMES), rtol=0, atol=0)
    assert not any(p.requires_grad for p in again.parameters())
    other = TextTower.from_pretrained(tmp_path / "tower", ["{}"])
    torch.testing.assert_close(other.encode(NAMES), tower.encode(NAMES, ["{}"]), rtol=0, atol=0)
    assert (other.encode(NAMES) - tower.encode(NAMES)).norm() > 1e-3


def test_from_pretrained_names_open_clips_models(model, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(
        TextTower, "from_open_clip",
        lambda *names: asked.append(names) or TextTower(model, tokenizer),
    )  # fmt: skip
    for source in ("open_clip:ViT-B-16/openai", "open_clip:hf-hub:owner/repo"):
        assert TextTower.from_pretrained(source).templates == text.PROMPTS
    assert asked == [("ViT-B-16", "openai"), ("hf-hub:owner/repo", None)]


def test_damaged_towers_are_refused(tmp_path, tower):
    with pytest.raises(FileNotFoundError, match=r"no text tower \(text.json, text.safetensors\)"):
        TextTower.from_pretrained(tmp_path)
    small().save(tmp_path)
    for content, message in (
        ({"templates": ["{}"]}, "a damaged text tower .*network"),
        ({"network": {"output_dim": 24, "depth": 3}, "templates": ["{}"]}, "damaged.*depth"),
        ({"network": {"output_dim": 24}, "templates": ["{}"]}, "damaged.*size mismatch"),
    ):
        write_json(tmp_path / "text.json", content)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            TextTower.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="load it by open_clip:MODEL/PRETRAINED"):
        tower.save(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aquarium_fish", "aquarium fish"),
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("7 spot ladybird", "7 spot ladybird"),
    ],
)
def test_names_as_prompts_have_them(name, said):
    assert text.spoken(name) == said


@pytest.mark.parametrize("name", ["3", "n01443537", "__", "12.5"])
def test_names_without_words_are_refused(tower, name):
    with pytest.raises(ValueError, match="need names made of words, got"):
        tower.encode(["dog", name])

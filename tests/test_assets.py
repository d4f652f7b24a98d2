"""The packaged weights: whole, small enough, and as good as their cards say."""

import numpy as np
import pytest
import torch

from fastrecycle.assets import asset
from fastrecycle.data import episodes
from fastrecycle.eval import decode, embed, score_episodes
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.prior import load_prior
from fastrecycle.vit import ViT
from fastrecycle.vit_config import PRESETS


@pytest.fixture(scope="module")
def vit():
    return ViT.from_pretrained("demo")


def test_backbone_bank_and_meta_lora_fit(vit):
    assert vit.config == PRESETS["demo"]
    bank = LoRABank.load("demo")
    assert len(bank) == 40
    bank.check(vit.config)
    for lora in bank:
        assert lora.rank == 4
        assert lora.head.classes == len(set(lora.class_names)) == 5
    LoRA.load("demo").check(vit.config)


def test_every_weight_has_a_card_with_its_licence():
    for name in ("vit", "prior", "bank", "meta_lora"):
        assert "Licence" in asset(f"{name}.md").read_text(encoding="utf-8")


def test_prior_finds_photographs_more_natural_than_noise():
    """scikit-learn ships two photographs: few for moments of a data set, but photographs."""
    from sklearn.datasets import load_sample_images

    crops = []
    for photo in load_sample_images().images:
        whole = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255
        small = torch.nn.functional.interpolate(whole, (128, 192), mode="bilinear", antialias=True)
        crops += [small[..., y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64, 128)]
    photos = torch.cat(crops)
    noise = torch.rand(photos.shape, generator=torch.Generator().manual_seed(0))
    prior = load_prior("demo")
    assert prior(photos).item() < prior(noise).item()


@pytest.mark.slow
def test_accuracy_on_cifar_fs_is_that_of_the_card(vit, data_root):
    """A quarter of the test images, so the card's figures within two points."""
    data = decode(vit, "cifar_fs", "test", data_root)
    rows = np.concatenate([np.flatnonzero(data.labels == c)[:75] for c in range(20)])
    drawn = episodes(data.labels[rows], 5, 1, 15, 600, 0)
    plain = score_episodes(embed(vit, None, data, rows), drawn)
    meta = score_episodes(embed(vit, LoRA.load("demo"), data, rows), drawn)
    assert abs(plain.accuracy - 77.2) < 2
    assert abs(meta.accuracy - 87.3) < 2
    gain = meta.minus(plain)
    assert gain.accuracy - gain.ci95 > 8

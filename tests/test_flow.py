"""The public interface, as the README shows it: every name, its arguments, and one whole flow."""

import inspect
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from sklearn.base import clone

import fastrecycle
from fastrecycle import (
    FewShotClassifier,
    InversionConfig,
    LoRA,
    LoRABank,
    MetaConfig,
    MetaLoRARecycler,
    ViT,
    evaluate,
    flops,
)
from fastrecycle.pool import SyntheticPool

pytestmark = pytest.mark.usefixtures("one_thread")


def test_public_names_resolve_and_are_listed():
    assert set(fastrecycle.__all__) <= set(dir(fastrecycle))
    for name in fastrecycle.__all__:
        assert getattr(fastrecycle, name).__module__.startswith("fastrecycle.")
    namespace = {}
    exec("from fastrecycle import *", namespace)
    assert set(fastrecycle.__all__) <= set(namespace)
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        _ = fastrecycle.evalute


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            evaluate,
            {"ways": 5, "shots": 1, "queries": 15, "tasks": 600, "split": "test", "seed": 0},
        ),
        (MetaLoRARecycler, {"prior": "demo", "device": None, "backend": "auto", "seed": 0}),
        (ViT.forward, {"lora": None, "prune": None, "keep": None}),
        (ViT.encode, {"lora": None, "prune": None, "keep": None}),
        (flops, {"prune": None, "sparsity": 0.0}),
    ],
)
def test_defaults_are_the_contract(function, expected):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in expected} == expected


@pytest.mark.parametrize("config", [InversionConfig, MetaConfig])
def test_settings_are_frozen(config):
    assert is_dataclass(config)
    made = config()
    with pytest.raises(AttributeError, match="cannot assign"):
        setattr(made, fields(config)[0].name, 3)


def test_the_whole_flow(tmp_path):
    vit, bank = toys.vit(), toys.bank(3)
    bank.save(tmp_path / "bank")
    bank = LoRABank.load(tmp_path / "bank").fit(vit.config)
    rec = MetaLoRARecycler(
        vit, bank, toys.prior(), device="cpu", quiet=True,
        inversion=InversionConfig(images_per_class=5, iterations=3, prune={1: 0.5}),
        meta=MetaConfig(steps=3, ways=3, queries=4, resolution=(8, 16)),
    )  # fmt: skip
    pool = rec.invert()
    assert (len(pool), pool.images.shape[1:]) == (45, (3, 16, 16))
    pool.save(tmp_path / "pool")
    assert torch.equal(SyntheticPool.load(tmp_path / "pool").kept, pool.kept)
    meta_lora = rec.meta_train()
    meta_lora.save(tmp_path / "meta_lora")
    loaded = LoRA.load(tmp_path / "meta_lora").fit(vit.config)

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(18)]
    labels = ["ant", "bee", "cat"] * 6
    classifier = clone(FewShotClassifier(vit, loaded)).fit(pictures, labels)
    assert classifier.predict(pictures).shape == (18,)
    assert classifier.predict_proba(pictures).shape == (18, 3)
    assert 0 <= classifier.score(pictures, labels) <= 1

    result = evaluate(vit, loaded, (pictures, labels), ways=3, shots=1, queries=3, tasks=5)
    assert result.per_task.shape == (5,)
    assert 0 <= result.accuracy <= 100
    images = vit.transform(pictures)
    out = vit.encode(images, loaded, prune={1: 0.5})
    assert out.features.shape == (18, 16)
    assert out.kept.shape == out.cls_scores.shape == (18, 8)
    torch.testing.assert_close(vit(images, loaded, prune={1: 0.5}), out.features)
    assert vit(images, keep=out.kept).shape == (18, 16)
    assert flops(vit) > flops(vit, prune={1: 0.75}) > 0
    assert flops(vit, sparsity=0.5) < flops(vit)

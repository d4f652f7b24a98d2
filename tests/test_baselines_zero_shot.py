"""Table 12's methods: MOLE and LoRAHub tuned on the pool, against loops written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
import two_tower
from torch.nn.functional import cross_entropy

from fastrecycle.baselines import BASELINES, lorahub, zero_shot_rows
from fastrecycle.baselines.protocol import decode_tasks
from fastrecycle.baselines.zero_shot import (
    POOL_TASKS,
    PoolTasks,
    score_tuned,
    search_lorahub,
    tune_mole,
)
from fastrecycle.eval import evaluate_zero_shot
from fastrecycle.lora import LoRA
from fastrecycle.pool import SyntheticPool
from fastrecycle.text import text_heads, zero_shot_logits

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
CONFIG = replace(POOL_TASKS, ways=3, queries=4, tasks=2, resolution=(0, 0), flip=0.0)
SHAPE = {"ways": 3, "queries": 4, "tasks": 10}


def loras(count=3, **changes):
    made = [
        toys.lora(i, names=tuple(two_tower.WORDS[(2 * i + j) % 7] for j in range(3)), **changes)
        for i in range(count)
    ]
    return text_heads(made, two_tower.tower())


def pool(bank):
    return SyntheticPool(
        [
            replace(toys.task_images(i, names=x.class_names), text=x.head.weight)
            for i, x in enumerate(bank)
        ]
    )


def test_tasks_of_the_pool_bring_the_texts_of_their_classes():
    bank = loras()
    images = pool(bank)
    tasks = PoolTasks(toys.vit(), images, replace(CONFIG, interpolation=1.0), seed=1)
    seen, text = tasks.batch(2)
    rows = tasks.sampler.draw(2).rows
    shown = toys.vit().normalise(images.images[torch.from_numpy(rows).flatten()].float() / 255)
    torch.testing.assert_close(seen, shown)
    for e in range(2):
        names = [images.class_names[images.classes[way[0]]] for way in rows[e]]
        torch.testing.assert_close(text[e], 20 * two_tower.tower().encode(names))
    again = PoolTasks(toys.vit(), images, replace(CONFIG, interpolation=1.0), seed=1).batch(2)
    assert torch.equal(again[0], seen)
    shrunk = PoolTasks(toys.vit(), images, replace(CONFIG, resolution=(4, 8)), seed=1).batch(2)[0]
    assert shrunk.diff(dim=-1).std() < 0.5 * seen.diff(dim=-1).std()


def test_the_loss_is_the_mean_contrastive_loss():
    tasks = PoolTasks(toys.vit(), pool(loras()), CONFIG)
    images, text = tasks.batch(0)
    features = toys.vit()(images)
    expected = sum(
        cross_entropy(
            zero_shot_logits(features[12 * e : 12 * e + 12], text[e] / 20, 20.0),
            torch.arange(3).repeat_interleave(4),
        )
        for e in range(2)
    )
    torch.testing.assert_close(tasks.loss(features, text), expected / 2)


def test_an_untrained_gate_is_the_average_of_products():
    """Gates start at zero; a rate that changes nothing leaves them there."""
    vit, bank = toys.vit(), loras()
    found = tune_mole(vit, bank, pool(bank), CONFIG, lr=1e-12, steps=1)
    images = torch.randn(5, 3, 16, 16, generator=toys.generator(3))
    torch.testing.assert_close(
        found.features(images), vit(images, LoRA.average(bank)), rtol=1e-4, atol=1e-4
    )
    assert found.cost.parameters == 3 * 2 * 3 * 17  # blocks, targets, LoRAs, width and bias


def test_training_the_gate_lowers_the_loss_on_the_pool():
    vit, bank = toys.vit(), loras()
    images = pool(bank)
    tasks = PoolTasks(vit, images, CONFIG)

    def loss(found):
        batches = [tasks.batch(step) for step in range(100, 106)]
        return sum(tasks.loss(found.features(x), text).item() for x, text in batches)

    start = tune_mole(vit, bank, images, CONFIG, lr=1e-12, steps=1)
    found = tune_mole(vit, bank, images, CONFIG, optimizer="adam", lr=0.05, steps=25)
    assert loss(found) < 0.95 * loss(start)
    assert not any(x.requires_grad for x in found.network.values())


def test_one_lora_of_weight_one_is_that_lora(monkeypatch):
    vit, bank = toys.vit(), loras(2)
    fixed = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    told = []
    monkeypatch.setattr(lorahub.Searches, "ask", lambda self: fixed)
    monkeypatch.setattr(lorahub.Searches, "tell", lambda self, losses: told.append(losses))
    monkeypatch.setattr(lorahub.Searches, "best", lambda self: fixed)
    found = search_lorahub(vit, bank, pool(bank), CONFIG, steps=1, batch_size=7)
    images = torch.randn(5, 3, 16, 16, generator=toys.generator(3))
    torch.testing.assert_close(found.features(images), vit(images, bank[1]), rtol=1e-4, atol=1e-4)
    tasks = PoolTasks(vit, pool(bank), CONFIG)
    seen, text = tasks.batch(0)
    expected = tasks.loss(vit(seen, bank[1]), text) + 0.05 * 0.5
    torch.testing.assert_close(told[0], expected[None], rtol=1e-5, atol=1e-5)


def test_the_search_finds_weights_no_worse_than_none():
    pytest.importorskip("nevergrad")
    vit, bank = toys.vit(), loras()
    images = pool(bank)
    found = search_lorahub(vit, bank, images, CONFIG, of="products", steps=15)
    tasks = PoolTasks(vit, images, CONFIG)
    seen, text = tasks.batch(0)
    assert tasks.loss(found.features(seen), text) <= tasks.loss(vit(seen), text) + 1e-5
    assert found.cost.parameters == 3


def test_a_tuned_method_is_scored_on_the_tasks_of_evaluation(monkeypatch):
    vit, bank, data = toys.vit(), loras(2), two_tower.coloured(noise=90)
    fixed = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    for name, value in (("ask", lambda self: fixed), ("best", lambda self: fixed)):
        monkeypatch.setattr(lorahub.Searches, name, value)
    monkeypatch.setattr(lorahub.Searches, "tell", lambda self, losses: None)
    found = search_lorahub(vit, bank, pool(bank), CONFIG, steps=1)
    text = two_tower.aligned(vit)
    on = decode_tasks(vit, data, shots=(1,), **SHAPE)[1]
    got = score_tuned(found, text, on, batch_size=9)
    expected = evaluate_zero_shot(vit, bank[1], text, data, **SHAPE)
    assert np.abs(got.per_task - expected.per_task).mean() < 1  # rounding may tip a query


def test_rows_of_the_table_pair_and_say_their_settings():
    pytest.importorskip("nevergrad")
    vit, bank, data = toys.vit(), loras(), two_tower.coloured(noise=90)
    text = two_tower.aligned(vit)
    rows = zero_shot_rows(
        vit, text, data, bank=bank, pool=pool(bank), meta_lora=bank[0], config=CONFIG,
        validation=two_tower.coloured(seed=4), grid={"lr": (0.1, 0.01), "steps": (2,)}, **SHAPE,
    )  # fmt: skip
    assert list(rows) == ["Two-tower model", "LoRAs Avg", "MOLE", "LoRAHub", "LoRA Recycle"]
    assert {name for name, row in rows.items() if row.tunes} == {"MOLE", "LoRAHub"}
    assert rows["MOLE"].settings["lr"] in (0.1, 0.01)
    assert rows["MOLE"].settings["steps"] == 2
    assert rows["MOLE"].cost.seconds > 0
    plain = evaluate_zero_shot(vit, None, text, data, **SHAPE)
    average = evaluate_zero_shot(vit, LoRA.average(bank, of="factors"), text, data, **SHAPE)
    ours = evaluate_zero_shot(vit, bank[0], text, data, **SHAPE)
    for name, expected in (
        ("Two-tower model", plain), ("LoRAs Avg", average), ("LoRA Recycle", ours),
    ):  # fmt: skip
        assert rows[name].result.per_task == pytest.approx(expected.per_task)
    assert len(rows["LoRA Recycle"].result.minus(rows["MOLE"].result).per_task) == 10
    assert "MOLE" in BASELINES  # the few-shot tables' is another


def test_what_does_not_fit_is_refused():
    vit, bank = toys.vit(), loras()
    with pytest.raises(ValueError, match='expected 0 shots, target "label" and no sparsity'):
        PoolTasks(vit, pool(bank), replace(CONFIG, shots=1))
    with pytest.raises(ValueError, match="0-shot tasks need the class texts"):
        tune_mole(vit, bank, toys.pool(), CONFIG)
    with pytest.raises(ValueError, match="lr: must be positive"):
        tune_mole(vit, bank, pool(bank), CONFIG, lr=0.0)
    mixed = [*bank[:1], *loras(1, rank=3)]
    with pytest.raises(ValueError, match="summing factors needs LoRAs of one rank"):
        search_lorahub(vit, mixed, pool(bank), CONFIG)

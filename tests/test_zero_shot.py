"""Zero-shot recycling (Table 12): against plain PyTorch and open_clip's own contrastive loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
import two_tower
from torch.nn.functional import cross_entropy, normalize

from fastrecycle.config import InversionConfig, MetaConfig, PretuneConfig
from fastrecycle.data import episodes
from fastrecycle.eval import evaluate, evaluate_shots, evaluate_zero_shot
from fastrecycle.grouping import groups
from fastrecycle.inputs import loras_input, pool_input
from fastrecycle.inversion import InversionGroup, data_loss, invert
from fastrecycle.lora import Head, LoRA, LoRABank, LoRAStack
from fastrecycle.metatrain import MetaTrainer, meta_loss, meta_train
from fastrecycle.pool import SyntheticPool, TaskImages
from fastrecycle.pretune import pretune
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.text import text_heads, zero_shot_logits

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
INVERSION = InversionConfig(images_per_class=5, iterations=30, group=2, lr=0.1, alpha=0.0)
META = MetaConfig(
    steps=12, ways=3, shots=0, queries=4, rank=2, resolution=(8, 16), interpolation=0.5,
    start="zero", lr=1e-2,
)  # fmt: skip


def bank(count=3, ways=3, text=None):
    """LoRAs whose heads are the texts of their classes."""
    named = [
        toys.lora(i, ways, names=tuple(two_tower.WORDS[(2 * i + j) % 7] for j in range(ways)))
        for i in range(count)
    ]
    return text_heads(named, text or two_tower.tower())


def images(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=toys.generator(seed))


def text_pool(count=3, text=None):
    """A pool of made-up images with the class texts of a bank."""
    loras = bank(count, text=text)
    return SyntheticPool(
        [
            replace(toys.task_images(i, names=lora.class_names), text=lora.head.weight)
            for i, lora in enumerate(loras)
        ]
    )


# ---------------------------------------------------------------------- heads of texts


def test_a_head_of_texts_gives_the_zero_shot_logits():
    classes = two_tower.tower().classes(["bee", "cat", "dog"])
    features = torch.randn(4, 16, generator=toys.generator(0))
    expected = zero_shot_logits(features, classes.embeddings, classes.scale)
    torch.testing.assert_close(classes.head()(features), expected)
    torch.testing.assert_close(classes.head()(5 * features), expected)
    assert not Head(classes.embeddings).normalised
    moved = classes.head().to(torch.float64)
    assert moved.normalised
    assert moved.weight.dtype == torch.float64


def test_text_heads_read_class_names_without_their_set(tmp_path):
    text = two_tower.tower()
    lora = replace(toys.lora(), class_names=("zoo/ant", "zoo/bee", "zoo/cat"), head=None)
    (made,) = text_heads([lora], text)
    torch.testing.assert_close(made.head.weight, 20 * text.encode(["ant", "bee", "cat"]))
    assert made.class_names == lora.class_names
    with pytest.raises(ValueError, match="has no class names, so no texts"):
        text_heads([replace(lora, class_names=None)], text)


def test_heads_of_texts_are_saved_and_told_apart(tmp_path):
    made = bank(2)
    made.save(tmp_path / "bank")
    again = LoRABank.load(tmp_path / "bank")
    for a, b in zip(made, again, strict=True):
        assert b.head.normalised
        assert b.head.bias is None
        torch.testing.assert_close(a.head.weight, b.head.weight)
        assert b.class_names == a.class_names
        assert b.clone().head.normalised
    linear = [replace(x, head=replace(x.head, normalised=False)) for x in made]
    assert loras_input("x", made)["sha256"] != loras_input("x", linear)["sha256"]


def test_linear_heads_and_texts_are_inverted_apart():
    mixed = [*bank(2), *toys.bank(2)]
    assert list(groups(mixed, 4)) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="heads of one kind expected"):
        InversionGroup(toys.vit(), mixed, range(4), None, INVERSION)
    head = replace(mixed[0].head, bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"normalised\) has no bias"):
        invert(toys.vit(), [replace(mixed[0], head=head)], None, INVERSION)


# ---------------------------------------------------------------------- Eq. 1


def test_inversion_loss_is_the_image_half_of_open_clips():
    open_clip = pytest.importorskip("open_clip", reason="whose loss this is")
    vit, loras = toys.vit(), bank(2)
    stack = LoRAStack.of(loras)
    heads = torch.stack([x.head.weight for x in loras])
    seen = images(6).unflatten(0, (2, 3))
    labels = torch.arange(3)
    _, ce, _ = data_loss(
        vit, None, seen, stack, heads, torch.zeros(2, 3), labels, INVERSION, False, normalised=True
    )
    for g, lora in enumerate(loras):
        unit = normalize(vit(seen[g], lora), dim=-1)
        own = open_clip.ClipLoss()
        texts = normalize(lora.head.weight, dim=-1)
        by_image, by_text = own.get_logits(unit, texts, torch.tensor(20.0))
        expected = cross_entropy(by_image, labels)
        torch.testing.assert_close(ce[g], expected)
        whole = own(unit, texts, torch.tensor(20.0))
        torch.testing.assert_close(2 * whole - cross_entropy(by_text, labels), ce[g])


def test_inversion_under_texts_lowers_the_loss_and_its_images_show_their_class():
    vit, loras = toys.vit(), bank(2)
    seen = []
    parts = invert(
        vit, loras, None, replace(INVERSION, iterations=150, jitter=0.0),
        on_step=lambda step, values: seen.append(values) if values else None,
    )  # fmt: skip
    assert seen[-1]["ce"] < 0.5 * seen[0]["ce"]
    for part, lora in zip(parts, loras, strict=True):
        shown = vit.normalise(part.images.float() / 255)
        logits = zero_shot_logits(vit(shown, lora), lora.head.weight / 20, 20.0)
        torch.testing.assert_close(part.teacher_logits, logits.detach(), rtol=1e-4, atol=1e-4)
        assert (part.teacher_logits.argmax(1) == part.labels).float().mean() > 0.7  # chance 1/3
        assert torch.equal(part.text, lora.head.weight)


def test_a_pool_keeps_its_texts(tmp_path):
    pool = text_pool()
    pool.save(tmp_path / "pool")
    again = SyntheticPool.load(tmp_path / "pool")
    assert torch.equal(again.text, pool.text)
    for row in (0, 20, 53):
        part = pool.parts[pool.tasks[row]]
        assert torch.equal(pool.text[pool.text_rows[row]], part.text[pool.labels[row]])
    without = SyntheticPool([replace(p, text=None) for p in pool.parts])
    assert without.text is None
    assert SyntheticPool([*without.parts[:1], *pool.parts[1:]]).text is None
    assert pool_input("x", pool)["sha256"] != pool_input("x", without)["sha256"]
    assert TaskImages.load(next((tmp_path / "pool").glob("*"))).text is not None


# ---------------------------------------------------------------------- Eq. 3, 4


def test_meta_loss_without_shots_is_the_contrastive_loss():
    features = torch.randn(2, 3, 4, 16, generator=toys.generator(0))
    classes = [two_tower.tower().classes(two_tower.WORDS[i : i + 3]) for i in (0, 2)]
    text = torch.stack([c.head().weight for c in classes])
    target = torch.eye(3).repeat_interleave(4, 0).expand(2, -1, -1)
    loss, accuracy = meta_loss(features, target, META, text)
    truth = torch.arange(3).repeat_interleave(4)
    logits = [
        zero_shot_logits(features[e].flatten(0, 1), c.embeddings, c.scale)
        for e, c in enumerate(classes)
    ]
    expected = sum(cross_entropy(x, truth) for x in logits) / 2
    torch.testing.assert_close(loss, expected)
    right = [(x.argmax(1) == truth).float().mean() for x in logits]
    torch.testing.assert_close(accuracy, sum(right) / 2)


@pytest.mark.parametrize("interpolation", [0.0, 1.0])
def test_each_way_of_a_task_has_the_text_of_its_class(interpolation):
    pool = text_pool()
    trainer = MetaTrainer(
        toys.vit(), pool, replace(META, interpolation=interpolation, tasks=2), seed=1
    )
    text = two_tower.tower()
    for step in range(4):
        rows = trainer.sampler.draw(step).rows
        (batch,) = trainer._batches(step)
        assert batch.images.shape[0] == 2 * 3 * 4  # queries alone
        for e in range(2):
            shown = [{int(pool.classes[i]) for i in way} for way in rows[e]]
            assert all(len(classes) == 1 for classes in shown)
            names = [pool.class_names[classes.pop()] for classes in shown]
            torch.testing.assert_close(batch.text[e], 20 * text.encode(names))


def test_meta_training_moves_the_lora_and_nothing_else():
    vit, pool = toys.vit(), text_pool()
    before = {k: x.clone() for k, x in vit.state_dict().items()}
    logits, texts = pool.teacher_logits.clone(), pool.text.clone()
    seen = []
    result = meta_train(
        vit, pool, replace(META, steps=60, tasks=2),
        on_step=lambda step, values: seen.append(values) if values else None,
    )  # fmt: skip
    assert all(b.abs().sum() > 0 for b in result.lora.b.values())
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]
    assert all(torch.equal(x, before[k]) for k, x in vit.state_dict().items())
    assert torch.equal(pool.teacher_logits, logits)
    assert torch.equal(pool.text, texts)


def test_meta_training_without_shots_needs_texts():
    with pytest.raises(ValueError, match=r"0-shot tasks need the class texts .* text_heads"):
        meta_train(toys.vit(), toys.pool(), META)
    narrow = [replace(p, text=torch.randn(3, 8)) for p in toys.pool().parts]
    with pytest.raises(ValueError, match="embeddings of 8 numbers, the backbone's features have"):
        meta_train(toys.vit(), SyntheticPool(narrow), META)
    with pytest.raises(ValueError, match="shots: must be >= 0"):
        MetaConfig(shots=-1)


# ---------------------------------------------------------------------- pre-tuning


def test_pretuning_against_texts_is_adam_on_the_contrastive_loss():
    """One LoRA, two steps, with torch's own optimiser on an image at a time."""
    vit, data, text = toys.vit(), two_tower.coloured(6, 12), two_tower.tower()
    config = PretuneConfig(num=1, ways=3, rank=(2,), steps=2, batch_size=8)
    (got,) = pretune(vit, data, config, seed=5, text=text)
    rng = np.random.Generator(np.random.Philox(key=[5, 0]))
    classes = rng.choice(np.arange(6), 3, replace=False)
    rows = np.concatenate([np.flatnonzero(data.labels == c) for c in classes])
    known = text.classes([two_tower.WORDS[c] for c in classes])
    lora = LoRA.init(vit.config, 2, seed=5 * 100_003)
    learnt = [x.requires_grad_() for x in lora.tensors()]
    optimiser = torch.optim.Adam(learnt, lr=1e-3)
    for _ in range(2):
        chosen, flips = rng.integers(36, size=8), rng.random(8) < 0.5
        loss = 0
        for row, flip in zip(rows[chosen], flips):
            image = data.pixels[row].float() / 255 * 2 - 1
            image = image.flip(-1) if flip else image
            way = torch.tensor([list(classes).index(data.labels[row])])
            logits = zero_shot_logits(vit(image[None], lora), known.embeddings, known.scale)
            loss = loss + cross_entropy(logits, way) / 8
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for a, b in zip(got.tensors(), learnt, strict=True):
        # a step of Adam is 1e-3, whatever the gradient, which may be about its own rounding
        assert ((a - b).abs() < 1e-5).float().mean() > 0.97
        assert (a - b).abs().max() < 4.1e-3
    torch.testing.assert_close(got.head.weight, known.scale * known.embeddings)
    assert got.head.normalised
    assert got.class_names == known.class_names


def test_pretuning_learns_to_meet_the_texts():
    seen = []
    config = PretuneConfig(num=2, ways=3, rank=(4,), steps=80, batch_size=16, lr=1e-2)
    pretune(
        toys.vit(), two_tower.coloured(6), config, text=two_tower.tower(),
        on_step=lambda step, values: seen.append(values) if values else None,
    )  # fmt: skip
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]


def test_pretuning_refuses_a_tower_of_another_model():
    with pytest.raises(ValueError, match="both towers must belong to one model"):
        pretune(
            toys.vit(), two_tower.coloured(), PretuneConfig(num=1, ways=3),
            text=two_tower.tower(width=8),
        )  # fmt: skip


# ---------------------------------------------------------------------- evaluation


def test_zero_shot_accuracy_matches_a_loop_over_tasks():
    vit, lora, data = toys.vit(), toys.lora(), two_tower.coloured(noise=90)
    text = two_tower.aligned(vit)
    result = evaluate_zero_shot(vit, lora, text, data, ways=3, queries=4, tasks=20, seed=3)
    tasks = episodes(data.labels, 3, 1, 4, 20, 3)
    with torch.no_grad():
        features = vit(vit.normalise(data.pixels.float() / 255), lora)
    expected = []
    for t in range(20):
        classes = text.classes([data.class_names[c] for c in tasks.classes[t]])
        logits = zero_shot_logits(features[tasks.query[t]], classes.embeddings, classes.scale)
        expected.append(100 * (logits.argmax(1).numpy() == tasks.query_ways).mean())
    assert result.per_task == pytest.approx(np.array(expected))
    assert 33 < result.accuracy < 100


def test_zero_and_one_shot_share_their_tasks_and_images_are_embedded_once():
    vit, data = toys.vit(), two_tower.coloured(noise=90)
    text, shape = two_tower.aligned(vit), {"ways": 3, "queries": 4, "tasks": 20}
    seen = []
    both = evaluate_shots(
        vit, None, data, shots=(0, 1), text=text,
        progress=lambda done, total: seen.append((done, total)), **shape,
    )  # fmt: skip
    assert list(both) == [0, 1]
    assert both[0].per_task == pytest.approx(
        evaluate_zero_shot(vit, None, text, data, **shape).per_task
    )
    assert both[1].per_task == pytest.approx(evaluate(vit, None, data, **shape).per_task)
    assert seen[-1][1] <= len(data.labels)


def test_names_that_tell_nothing_leave_chance():
    """Names dealt to classes anew for each of many data sets."""
    vit, rng = toys.vit(), np.random.default_rng(0)
    data = two_tower.coloured(noise=20)
    text = two_tower.aligned(vit)
    shape = {"ways": 5, "queries": 15, "tasks": 1}
    assert evaluate_zero_shot(vit, None, text, data, **shape).accuracy > 60
    scores = []
    for _ in range(400):
        names = tuple(rng.permutation(data.class_names).tolist())
        scores.append(
            evaluate_zero_shot(vit, None, text, replace(data, class_names=names), **shape).accuracy
        )
    # a permutation of 5 has one fixed point in the mean, deviation 1: 20 % and 20 % a data set
    assert abs(np.mean(scores) - 20) < 4 * 20 / np.sqrt(len(scores))


def test_evaluation_says_what_is_missing():
    vit, data, text = toys.vit(), two_tower.coloured(), two_tower.tower()
    with pytest.raises(ValueError, match="0 shots need the text tower"):
        evaluate(vit, None, data, shots=0)
    numbers = replace(data, class_names=tuple("01234"))
    with pytest.raises(ValueError, match="need names made of words, got '0'"):
        evaluate_zero_shot(vit, None, text, numbers)
    wordnet = replace(data, class_names=tuple(f"n0000000{i}" for i in range(5)))
    with pytest.raises(ValueError, match="got 'n00000000'; put a class_names"):
        evaluate_zero_shot(vit, None, text, wordnet)
    with pytest.raises(ValueError, match="both towers must belong to one model"):
        evaluate_zero_shot(vit, None, two_tower.tower(width=8), data)


# ---------------------------------------------------------------------- all of it


def test_recycling_helps_a_two_tower_model_whose_towers_do_not_meet(tmp_path):
    """Texts at random: only what LoRAs learnt from images brings features to them."""
    vit, text = toys.vit(), two_tower.tower()
    train = two_tower.coloured(7, noise=40)
    config = PretuneConfig(num=6, ways=3, rank=(4,), steps=80, batch_size=16, lr=1e-2)
    loras = pretune(vit, train, config, text=text)
    meta = replace(META, steps=150, tasks=2, rank=4, queries=8)
    recycler = MetaLoRARecycler(
        vit, loras, None, replace(INVERSION, images_per_class=8, iterations=60), meta,
        text=text, validation=replace(train, name="val"), device="cpu", quiet=True,
    )  # fmt: skip
    lora = recycler.run(tmp_path / "run")
    assert "text" in recycler.manifest()["inputs"]
    test = two_tower.coloured(7, noise=40, seed=2)
    shape = {"ways": 3, "queries": 10, "tasks": 60}
    plain = evaluate_zero_shot(vit, None, text, test, **shape)
    ours = evaluate_zero_shot(vit, lora, text, test, **shape)
    gain = ours.minus(plain)
    assert gain.accuracy - gain.ci95 > 10
    assert recycler.result.validation


def test_the_recycler_makes_heads_of_texts_and_wants_a_tower_to_validate():
    vit, text = toys.vit(), two_tower.tower()
    named = [replace(x, head=None) for x in bank(2)]
    made = MetaLoRARecycler(vit, named, None, INVERSION, META, text=text, device="cpu", quiet=True)
    assert all(x.head.normalised for x in made.bank)
    with pytest.raises(ValueError, match="0-shot validation needs a text tower"):
        MetaLoRARecycler(vit, bank(2), None, INVERSION, META, validation="digits", device="cpu")

"""Pre-tuning: LoRAs side by side train as each would alone, and learn their task."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys

from fastrecycle.config import PretuneConfig
from fastrecycle.eval import Pixels
from fastrecycle.lora import LoRA
from fastrecycle.pretune import pretune

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")


def coloured(classes=6, per_class=12, noise=50):
    """Every class has a colour, in noise: easy, but not at once."""
    g = toys.generator(0)
    labels = torch.arange(classes).repeat_interleave(per_class)
    colour = torch.randint(60, 196, (classes, 3, 1, 1), generator=g)[labels]
    pixels = colour + torch.randint(-noise, noise + 1, (len(labels), 3, 16, 16), generator=g)
    names = tuple(f"class {i}" for i in range(classes))
    return Pixels(pixels.to(torch.uint8), labels.numpy(), names, "coloured")


def config(**changes):
    base = {"num": 3, "ways": 3, "rank": (2,), "steps": 6, "batch_size": 8, "group": 3}
    return PretuneConfig(**{**base, **changes})


def assert_close(one, other, atol):
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    torch.testing.assert_close(one.head.weight, other.head.weight, rtol=0, atol=atol)
    torch.testing.assert_close(one.head.bias, other.head.bias, rtol=0, atol=atol)


@pytest.mark.parametrize("rank", [(2,), (1, 3)])
def test_side_by_side_equals_alone(rank):
    vit, data = toys.vit(), coloured()
    together = pretune(vit, data, config(rank=rank))
    alone = pretune(vit, data, config(rank=rank, group=1))
    for a, b in zip(together, alone, strict=True):
        # Adam's step is lr = 1e-3 whatever the gradient; where a float32 gradient is about its
        # own rounding, steps may differ, by a part of 6 x 1e-3
        assert_close(a, b, atol=1e-4)
        assert a.class_names == b.class_names
    assert not torch.equal(together[0].head.weight, together[1].head.weight)


def test_mixed_ranks_are_dealt_out_in_turn_and_cut_to_size():
    bank = pretune(toys.vit(), coloured(), config(num=4, rank=(1, 3), group=4, steps=2))
    assert [lora.rank for lora in bank] == [1, 3, 1, 3]
    for lora, rank in zip(bank, (1, 3, 1, 3)):
        for target in ("q", "v"):
            assert lora.a[target].shape == (3, rank, 16)
            assert lora.b[target].shape == (3, 16, rank)
            assert lora.scale[target].tolist() == [1.0] * 3
            assert lora.b[target].abs().sum((0, 1)).gt(0).all()  # every column learnt
        lora.check(toys.CONFIG)


def test_a_step_is_adam_on_the_cross_entropy_of_the_own_images():
    """One LoRA, two steps, with torch's own module and optimiser on an image at a time."""
    vit, data, cfg = toys.vit(), coloured(), config(num=1, steps=2)
    (got,) = pretune(vit, data, cfg, seed=5)
    rng = np.random.Generator(np.random.Philox(key=[5, 0]))
    classes = rng.choice(np.arange(6), 3, replace=False)
    rows = np.concatenate([np.flatnonzero(data.labels == c) for c in classes])
    lora = LoRA.init(vit.config, 2, seed=5 * 100_003)
    head = torch.nn.Linear(16, 3)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    learnt = [x.requires_grad_() for x in lora.tensors()]
    optimiser = torch.optim.Adam([*learnt, *head.parameters()], lr=1e-3)
    for _ in range(2):
        chosen, flips = rng.integers(36, size=8), rng.random(8) < 0.5
        loss = 0
        for row, flip in zip(rows[chosen], flips):
            image = data.pixels[row].float() / 255 * 2 - 1
            image = image.flip(-1) if flip else image
            way = list(classes).index(data.labels[row])
            logits = head(vit(image[None], lora))
            loss = loss - logits.log_softmax(1)[0, way] / 8
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for a, b in zip(
        [*got.tensors(), got.head.weight, got.head.bias], [*learnt, *head.parameters()]
    ):
        # a step of Adam is 1e-3 each; see above
        assert ((a - b).abs() < 1e-5).float().mean() > 0.97
        assert (a - b).abs().max() < 4.1e-3
    assert got.class_names == tuple(f"class {c}" for c in classes)


def test_learns_an_easy_data_set():
    seen = {}
    bank = pretune(
        toys.vit(), coloured(), config(steps=60, batch_size=16),
        on_step=lambda step, values: seen.update({step: values}),
    )  # fmt: skip
    reports = [v for v in seen.values() if v]
    # chance is 1/3; 48 images: a lucky batch at chance stays under .33 + 5 x .07
    assert reports[-1]["accuracy"] > 0.7
    assert reports[-1]["loss"] < 0.8 * np.log(3)
    assert list(seen) == [3 * (i + 1) for i in range(60)]  # steps of all LoRAs
    assert [s for s, v in seen.items() if v] == [60, 120, 180]
    assert [lora.name for lora in bank] == ["0000", "0001", "0002"]


def test_same_seed_same_bank_and_finished_ones_are_left_out():
    vit, data = toys.vit(), coloured()
    whole = pretune(vit, data, config(num=5, group=2), seed=1)
    again = pretune(vit, data, config(num=5, group=2), seed=1)
    for a, b in zip(whole, again, strict=True):
        assert all(map(torch.equal, a.tensors(), b.tensors()))
    other = pretune(vit, data, config(num=1), seed=2)[0]
    assert not torch.equal(other.a["q"], whole[0].a["q"])
    numbers = []
    rest = pretune(
        vit, data, config(num=5, group=2), seed=1, done=frozenset({0, 3}),
        on_lora=lambda number, lora: numbers.append((number, lora.name)),
    )  # fmt: skip
    assert numbers == [(1, "0001"), (2, "0002"), (4, "0004")]
    for lora, number in zip(rest, (1, 2, 4), strict=True):
        assert_close(lora, whole[number], atol=1e-4)  # other companions: see above


def test_the_backbone_and_the_images_stay_as_they_were():
    vit, data = toys.vit(), coloured()
    before = {k: x.clone() for k, x in vit.state_dict().items()}
    pixels = data.pixels.clone()
    bank = pretune(vit, data, config(num=1, steps=2))
    assert all(torch.equal(x, before[k]) for k, x in vit.state_dict().items())
    assert torch.equal(data.pixels, pixels)
    assert not any(x.requires_grad for x in (*bank[0].tensors(), bank[0].head.weight))


def test_rejects_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="coloured has 6 classes, fewer than 7"):
        pretune(toys.vit(), coloured(), config(ways=7))
    for changes, message in (
        ({"num": 0}, "num: must be >= 1"),
        ({"ways": 1}, "ways: must be at least 2"),
        ({"rank": ()}, "rank: expected at least one"),
        ({"rank": (4, 0)}, "rank: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)
    with pytest.raises(ValueError, match="targets: expected some of q, k, v"):
        pretune(toys.vit(), coloured(), config(targets=("w",)))


def two_sets():
    one = coloured()
    other = replace(coloured(classes=4, per_class=20), name="other")
    return one, replace(other, pixels=255 - other.pixels)


def test_several_sets_take_turns_and_their_classes_are_told_apart():
    bank = pretune(toys.vit(), two_sets(), config(num=4, steps=2))
    of = [{name.split("/")[0] for name in lora.class_names} for lora in bank]
    assert of == [{"coloured"}, {"other"}, {"coloured"}, {"other"}]
    assert all(name.split("/")[1].startswith("class ") for name in bank[1].class_names)
    # one set keeps its class names
    (alone,) = pretune(toys.vit(), [coloured()], config(num=1, steps=2))
    assert all("/" not in name for name in alone.class_names)


def test_a_lora_of_several_sets_is_the_one_of_its_set_alone():
    vit, (one, other) = toys.vit(), two_sets()
    mixed = pretune(vit, [one, other], config(num=4, group=4))
    for number, alone in ((0, one), (2, one), (1, other), (3, other)):
        skipped = frozenset(range(4)) - {number}
        (lora,) = pretune(vit, alone, config(num=4, group=1), done=skipped)
        assert_close(mixed[number], lora, atol=1e-4)  # see side by side
        names = tuple(f"{alone.name}/{name}" for name in lora.class_names)
        assert mixed[number].class_names == names


def test_ranks_are_dealt_out_within_each_set():
    bank = pretune(toys.vit(), two_sets(), config(num=8, rank=(1, 3), steps=1, group=8))
    assert [lora.rank for lora in bank] == [1, 1, 3, 3] * 2


def test_sets_that_do_not_fit_are_rejected():
    one, other = two_sets()
    with pytest.raises(ValueError, match=r"different names, got \['coloured', 'coloured'\]"):
        pretune(toys.vit(), [one, coloured()], config())
    with pytest.raises(ValueError, match="expected at least one data set"):
        pretune(toys.vit(), [], config())
    with pytest.raises(ValueError, match="other has 4 classes, fewer than 5"):
        pretune(toys.vit(), [one, other], config(ways=5))


def test_classes_of_two_sets_with_one_name_make_one_task():
    """Cross-task interpolation may put both in a task, as the classes that they are."""
    from fastrecycle.pool import SyntheticPool

    bank = pretune(toys.vit(), two_sets(), config(num=2, steps=1))
    parts = [toys.task_images(i, names=lora.class_names) for i, lora in enumerate(bank)]
    assert len(SyntheticPool(parts).class_names) == 6

"""Poisoned LoRAs are found by their images and by each other; honest ones stay."""

import math
from dataclasses import replace

import markets
import numpy as np
import pytest
import torch
import toys
from sklearn.neighbors import NearestCentroid

from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.files import read_json
from fastrecycle.inversion import invert
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.pool import SyntheticPool
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.screening import (
    SCORES,
    Score,
    _Changes,
    _namesakes,
    _reasons,
    _trusted_names,
    at_chance,
    leave_one_out,
    outliers,
    screen,
    table,
)

INVERSION = InversionConfig(
    images_per_class=4, iterations=60, lr=0.03, group=5, jitter=0.0, flip=0.0, alpha=0.001
)


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def market():
    bank = markets.market()
    return bank, invert(toys.vit(), bank, toys.prior(), INVERSION)


def test_a_fifth_poisoned_is_found_and_nobody_else(market):
    bank, parts = market
    scores = screen(toys.vit(), bank, parts)
    left = {s.name for s in scores if s.reasons}
    assert left == {"lora01", "lora05", "lora09"}
    by_name = {s.name: " ".join(s.reasons) for s in scores}
    assert "names" in by_name["lora01"]  # a shuffled head
    assert "size" in by_name["lora05"]  # noise
    for name in ("lora05", "lora09"):  # noise, and another base
        assert "agreement" in by_name[name]
    rows = table(scores)
    assert [row[0] for row in rows[:3]] == ["lora01", "lora05", "lora09"]
    assert all(row[-1] == "stays" for row in rows[3:])
    assert all(len(row) == 2 + len(SCORES) for row in rows)


def test_an_honest_bank_keeps_all_its_members():
    bank = [markets.honest(i) for i in range(10)]
    parts = invert(toys.vit(), bank, toys.prior(), INVERSION)
    assert [s.reasons for s in screen(toys.vit(), bank, parts)] == [()] * 10


def test_leave_one_out_matches_scikit_learn():
    g = toys.generator(0)
    labels = torch.tensor([0, 0, 0, 2, 2, 2, 2, 3, 3])
    features = torch.randn(9, 5, generator=g) + labels[:, None] * 0.7
    right = []
    for i in range(9):
        rest = np.arange(9) != i
        model = NearestCentroid().fit(features[rest], labels[rest])
        right.append(model.predict(features[i : i + 1])[0] == labels[i])
    assert 0 < sum(right) < 9
    assert leave_one_out(features, labels) == pytest.approx(sum(right) / 9)


def test_changes_compare_with_all_others():
    loras = [toys.lora(i, targets=t) for i, t in enumerate([("q", "v"), ("q",), ("q", "v", "k")])]
    changes = _Changes(loras)

    def flat(lora):
        zero = torch.zeros(3, 16, 16)
        return torch.cat([lora.delta(t) if t in lora.a else zero for t in "qkv"]).flatten()

    norms = [flat(x).norm() for x in loras]
    middle = sorted(norms)[1]
    for i in range(3):
        units = sum(flat(x) / n for j, (x, n) in enumerate(zip(loras, norms)) if j != i)
        expected = flat(loras[i]) @ units / norms[i] / units.norm()
        assert changes.agreement(i) == pytest.approx(expected.item(), abs=1e-5)
        assert changes.size(i) == pytest.approx(math.log(norms[i]))
        mean = (
            sum(
                flat(x) * min(1, middle / n) for j, (x, n) in enumerate(zip(loras, norms)) if j != i
            )
            / 2
        )
        torch.testing.assert_close(flat(changes.mean_of_others(i)), mean, rtol=1e-4, atol=1e-5)
    alone = _Changes(loras[:1])
    assert math.isnan(alone.agreement(0))


def test_outliers_are_far_below_the_median_in_robust_deviations():
    values = torch.tensor([0.9, 0.92, 0.88, 0.91, 0.9, 0.2, 0.93])
    assert outliers(values, 0.01) == [5]
    assert outliers(values, 0.3) == []  # a floor: they are near enough
    assert outliers(1 - values, 0.01) == []
    assert outliers(1 - values, 0.01, both=True) == [5]
    assert outliers(torch.full((9,), 0.5), 0.01) == []
    few = torch.tensor([0.9, 0.9, 0.9, 0.1])
    assert outliers(few, 0.01) == []  # of 4 no median can be trusted
    some = torch.tensor([math.nan, 0.9, 0.9, 0.9, 0.9, math.nan, 0.1])
    assert outliers(some, 0.01) == [6]


def test_chance_level_is_named_whatever_the_others_do():
    part = toys.task_images(0)
    assert not at_chance(part)
    guess = replace(part, teacher_logits=part.teacher_logits.roll(6, 0))
    assert at_chance(guess)
    score = Score(0, "x", 0.1, 1.0, 1.0, 1.0, 1.0, 0.0)
    assert _reasons([score], [guess]) == [["its own network is at chance on its own images (10%)"]]


def test_names_are_scored_without_those_that_are_wrong():
    """Two tasks share their names with a swapped one; alone of the two kinds it is found."""
    g = toys.generator(3)
    codes = torch.randn(8, 16, generator=g)
    parts, means = [], []
    for i in range(8):
        chosen = [(i + j) % 8 for j in range(4)]
        parts.append(toys.task_images(i, ways=4, names=tuple(f"n{c}" for c in chosen)))
        means.append(codes[chosen] + 0.2 * torch.randn(4, 16, generator=g))
    means[2] = means[2].roll(1, 0)
    reasons = [[] for _ in parts]
    before = _namesakes(parts, means, ())
    names = _trusted_names(parts, means, reasons)
    assert [i for i, found in enumerate(reasons) if found] == [2]
    assert names[2] < 0
    assert all(names[i] >= before[i] - 1e-6 for i in (1, 3))  # they no longer answer for it
    expected = []
    for j in range(4):
        others = [
            means[k][parts[k].class_names.index(parts[0].class_names[j])]
            for k in range(8)
            if k not in (0, 2) and parts[0].class_names[j] in parts[k].class_names
        ]
        expected.append(torch.stack(others).mean(0))
    one, other = (x - x.mean(0) for x in (means[0], torch.stack(expected)))
    cosine = (one * other).sum(1) / one.norm(dim=1) / other.norm(dim=1)
    assert names[0] == pytest.approx(cosine.mean().item(), abs=1e-5)


def test_names_that_tell_nothing_leave_nobody_out():
    g = toys.generator(4)
    parts = [toys.task_images(i, ways=4, names=("a", "b", "c", "d")) for i in range(8)]
    reasons = [[] for _ in parts]
    names = _trusted_names(parts, [torch.randn(4, 16, generator=g) for _ in parts], reasons)
    assert min(names) < 0
    assert not any(reasons)


def test_screen_wants_the_bank_that_was_inverted(market):
    bank, parts = market
    for other in (bank[:3], bank[1:]):
        with pytest.raises(ValueError, match="were not made from this bank"):
            screen(toys.vit(), other, parts)


# ------------------------------------------------------------------ in a run


def recycler(bank, **arguments):
    meta = MetaConfig(steps=3, ways=3, queries=2, tasks=1, rank=2, resolution=(8, 16))
    return MetaLoRARecycler(
        toys.vit(), bank, toys.prior(), INVERSION, meta, device="cpu", quiet=True, **arguments
    )


def test_recycling_leaves_poison_out_and_says_so(market, tmp_path, caplog):
    bank, parts = market
    pool = SyntheticPool(parts)
    pool.save(tmp_path / "pool")
    rec = recycler(LoRABank(bank), screening=True)
    with caplog.at_level("WARNING"):
        lora = rec.meta_train(SyntheticPool.load(tmp_path / "pool"), tmp_path / "meta")
    said = " ".join(r.getMessage() for r in caplog.records)
    assert all(f"left out {name}" in said for name in ("lora01", "lora05", "lora09"))
    kept = read_json(tmp_path / "meta" / "screen.json")
    assert [t["name"] for t in kept["tasks"] if t["reasons"]] == ["lora01", "lora05", "lora09"]
    assert kept["limit"] == 3.5
    # as if they had never been there
    honest = [i for i in range(15) if i not in (1, 5, 9)]
    expected = recycler(LoRABank([bank[i] for i in honest])).meta_train(
        SyntheticPool([parts[i] for i in honest])
    )
    assert all(map(torch.equal, lora.tensors(), expected.tensors()))
    start = LoRA.average(bank)  # and it is the poison that a plain run starts from
    assert start.rank > 0


def test_poisoned_loras_take_no_run_down():
    bank = markets.market(10, ("noise weights", "other base", "shuffled head"))
    wild = bank[2]
    bank[2] = replace(wild, b={t: 1e30 * x for t, x in wild.b.items()})  # features overflow
    rec = recycler(LoRABank(bank), screening=True)
    rec.invert()
    lora = rec.meta_train()
    assert all(x.isfinite().all() for x in lora.tensors())

"""Which LoRAs share a batch: by free memory, halved where it runs out, without effect on any."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toys

from fastrecycle import inversion
from fastrecycle.config import InversionConfig
from fastrecycle.grouping import MOST, ON_CPU, Batch, batches, fitting_size, halves
from fastrecycle.inversion import InversionGroup, Inverter, invert

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
GIB = 2**30


def config(**changes):
    base = {"images_per_class": 2, "iterations": 8, "prune": {1: 0.5}}
    return InversionConfig(**{**base, **changes})


# ------------------------------------------------------------------ size by memory


@pytest.mark.parametrize(
    ("base", "each", "free", "expected"),
    [
        (2, 1, 100, 32),  # more would fit
        (2, 1, 20, 16),  # 2 + 16 of 18 GiB
        (2, 3, 20, 5),
        (50, 10, 20, 1),  # one must be tried
        (2, 0, 20, 32),
    ],
)
def test_size_is_what_fits_into_nine_tenths(base, each, free, expected):
    asked = []

    def peak(count):
        asked.append(count)
        return (base + each * count) * GIB

    assert MOST == 32
    assert fitting_size(peak, free * GIB) == expected
    assert asked == [1, 2]
    if expected not in (1, MOST):
        assert peak(expected) <= 0.9 * free * GIB < peak(expected + 1)


def inverter(bank=None, device="cuda", **changes):
    vit = SimpleNamespace(pos_embed=SimpleNamespace(device=torch.device(device)))
    return Inverter(vit, bank or toys.bank(2), None, config(**changes))


def test_size_asks_the_device_where_the_settings_say_nothing(monkeypatch):
    measured = []

    def peak(self, lora, count):
        measured.append((lora.head.classes, count))
        return (1 + 2 * count) * GIB

    monkeypatch.setattr(inversion, "_free_bytes", lambda device: 20 * GIB)
    monkeypatch.setattr(Inverter, "_peak_bytes", peak)
    bank = [toys.lora(0, 2), toys.lora(1, 4), toys.lora(2, 3)]
    assert inverter(bank).size() == 8
    assert measured == [(4, 1), (4, 2)]  # the largest head makes the most images
    assert inverter(bank, group=3).size() == 3  # what is said goes before
    assert inverter(bank, device="cpu").size() == ON_CPU
    assert len(measured) == 2


@pytest.mark.gpu
def test_size_chosen_on_the_device_fits():
    vit, prior = toys.vit().cuda(), toys.prior().cuda()
    chosen = Inverter(vit, toys.bank(2), prior, config())
    size = chosen.size()
    assert 1 <= size <= MOST
    InversionGroup(vit, [toys.lora(0)] * size, range(size), prior, config()).step()


# ------------------------------------------------------------------ out of memory


def small_memory(monkeypatch, most):
    """No group of more tasks gets through its third iteration; returns the sizes tried."""
    real, tried = InversionGroup.step, []

    def step(group):
        if group.iteration == 0:
            tried.append(len(group.tasks))
        if len(group.tasks) > most and group.iteration == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(group)

    monkeypatch.setattr(InversionGroup, "step", step)
    return tried


def test_out_of_memory_halves_the_group_with_a_warning(monkeypatch, caplog, tmp_path):
    vit, bank, prior = toys.vit(), toys.bank(7), toys.prior()
    whole = invert(vit, bank, prior, config(group=2))
    tried = small_memory(monkeypatch, most=2)
    done = []
    with caplog.at_level(logging.WARNING):
        parts = invert(
            vit, bank, prior, config(group=7), folder=tmp_path,
            on_step=lambda step, _: done.append(step),
        )  # fmt: skip
    assert tried == [7, 4, 2, 2, 2, 1]
    assert [r.getMessage() for r in caplog.records] == [
        "out of memory with 7 LoRAs in one batch; going on with 4",
        "out of memory with 4 LoRAs in one batch; going on with 2",
    ]
    assert done[-1] == 7 * 8
    for one, other in zip(whole, parts, strict=True):
        assert one.task == other.task
        # another company changes roundings, of which an 8-bit pixel hides nearly all
        assert (one.images.int() - other.images.int()).abs().float().mean() < 0.05


def test_later_groups_begin_at_the_size_that_fitted(monkeypatch):
    tried = small_memory(monkeypatch, most=2)
    invert(toys.vit(), toys.bank(8), toys.prior(), config(group=4))
    assert tried == [4, 2, 2, 2, 2]


def test_a_single_lora_that_does_not_fit_is_an_error(monkeypatch):
    small_memory(monkeypatch, most=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"does not fit into memory either.*fewer"):
        invert(toys.vit(), toys.bank(2), toys.prior(), config(group=2))


def test_halves_are_the_whole():
    for count in range(2, 9):
        one, other = halves(Batch(tuple(range(count)), True))
        assert one.tasks + other.tasks == tuple(range(count))
        assert 0 <= len(one.tasks) - len(other.tasks) <= 1
        assert one.warm
        assert other.warm


# ------------------------------------------------------------------ company


def mixed_bank():
    """Ranks 1 to 4, targets q v, k proj, fc1 fc2 and q alone, heads of 3 and of 2 classes."""
    targets = (("q", "v"), ("k", "proj"), ("fc1", "fc2"), ("q",))
    return [
        toys.lora(
            i, ways=3 - (i >= 8), rank=1 + i % 4, targets=targets[(i // 2) % 4], bias=i % 3 > 0
        )
        for i in range(10)
    ]


def curve(bank, tasks, dtype=torch.float32):
    group = InversionGroup(
        toys.vit().to(dtype), [bank[i] for i in tasks], tasks, toys.prior().to(dtype),
        config(iterations=12), dtype=dtype,
    )  # fmt: skip
    rows = []
    while not group.done:
        rows.append(group.step()["loss"])
    return torch.stack(rows, 1)


def test_alone_and_in_a_batch_of_eight_follow_the_same_curve():
    bank = mixed_bank()
    drawn = batches(bank, config(), 8)
    assert [b.tasks for b in drawn] == [tuple(range(8)), (8, 9)]  # heads of one size share a batch
    for batch in drawn:
        together = curve(bank, batch.tasks)
        for row, task in enumerate(batch.tasks):
            torch.testing.assert_close(together[row], curve(bank, [task])[0], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().min() > 1e-2


def test_nan_in_one_task_stays_there():
    """A poisoned LoRA that blows up takes none of its batch along."""
    bank = mixed_bank()[:3]
    wild = replace(bank[1], head=replace(bank[1].head, weight=bank[1].head.weight * 1e38))
    losses = curve([bank[0], wild, bank[2]], [0, 1, 2])
    assert not losses[1].isfinite().all()
    for task in (0, 2):
        torch.testing.assert_close(losses[task], curve(bank, [task])[0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ warm batches


def test_batches_of_a_warm_start_come_after_those_that_they_start_from():
    bank = [toys.lora(i, ways=2 + i % 2) for i in range(9)]
    drawn = batches(bank, config(warm=4, warm_iterations=3, coarse=0.2), 2)
    assert [b.warm for b in drawn] == sorted(b.warm for b in drawn)
    assert sorted(i for b in drawn if not b.warm for i in b.tasks) == [0, 1, 2, 3]
    assert sorted(i for b in drawn for i in b.tasks) == list(range(9))
    whole = config(warm=4, warm_iterations=3, coarse=0.2)
    assert drawn[0].config(whole) is whole
    assert (drawn[-1].config(whole).iterations, drawn[-1].config(whole).coarse) == (3, 0.0)
    assert not any(b.warm for b in batches(bank[:3], config(warm=4), 2))

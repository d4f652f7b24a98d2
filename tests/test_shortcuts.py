"""Shortcuts of inversion: what they change, when, that results stay each task's own and resume."""

import math
from dataclasses import replace

import pytest
import torch
import toys

from fastrecycle.config import InversionConfig
from fastrecycle.inversion import InversionGroup, data_loss, invert
from fastrecycle.jitter import Jitter, gather_pixels, task_generator
from fastrecycle.shortcuts import (
    best_patches,
    converged,
    enlarged,
    kept_at,
    moved_patches,
    side_at,
    warm_images,
)

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
NORM = toys.CONFIG  # 16 pixels, 4 x 4 patches
DROP = {"drop": (0.25, 0.75), "drop_at": (0.25, 0.5)}
PLATEAU = {"plateau": 0.9, "plateau_window": 3}
COARSE = {"coarse": 0.4}


def config(**changes):
    base = {"images_per_class": 2, "iterations": 12, "group": 2, "checkpoint_every": 5}
    return InversionConfig(**{**base, **changes})


def make(tasks=(0,), dtype=torch.float32, **changes):
    return InversionGroup(
        toys.vit().to(dtype), [toys.lora(i) for i in tasks], tasks, toys.prior().to(dtype),
        config(**changes), dtype=dtype,
    )  # fmt: skip


def run(group):
    while not group.done:
        group.step()
    return group


# ------------------------------------------------------------------ early stopping


def test_converged_compares_with_the_window_before():
    before, mean = torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.tensor([0.98, 1.2, 0.5, -1.02])
    assert converged(mean, before, 0.1).tolist() == [True, True, False, True]
    assert not converged(mean, None, 0.1).any()


STILL = {"iterations": 36, "lr": 0.02, "jitter": 0.0, "flip": 0.0}  # so that losses fall evenly


def test_tasks_stop_at_the_first_window_that_brings_too_little():
    """Against the curve of a run without stopping."""
    losses = []
    group = make(tasks=(0, 1, 2), **STILL)
    while not group.done:
        losses.append(group.step()["loss"])
    means = torch.stack(losses, 1).unflatten(1, (9, 4)).mean(2)
    gain = (means[:, :-1] - means[:, 1:]) / means[:, :-1].abs()
    expected = [4 * ((row < 0.1).nonzero()[0].item() + 2) for row in gain]
    assert len(set(expected)) > 1, expected  # not all at once
    left = {}
    group = make(tasks=(0, 1, 2), **STILL, plateau=0.1, plateau_window=4)
    while not group.done:
        rows = len(group.active)
        assert group.step()["loss"].shape == (rows,)
        for place in group.left:
            left.setdefault(place, group.iteration)
    assert left == dict(enumerate(expected))


def test_a_stopped_task_keeps_its_pixels_and_the_others_go_on_as_alone():
    together = run(make(tasks=(0, 1, 2), **STILL, plateau=0.1, plateau_window=4))
    assert not together.active
    stopped = set()
    for place in range(3):
        alone = run(make((place,), **STILL, plateau=0.1, plateau_window=4))
        stopped.add(alone.iteration)
        one, other = together.finish()[place], alone.finish()[0]
        assert (one.images.int() - other.images.int()).abs().float().mean() < 0.05
    assert len(stopped) > 1


def test_plateau_of_zero_stops_nobody():
    group = make(tasks=(0, 1), iterations=24, plateau_window=2)
    assert run(group).iteration == 24
    assert not group.left


# ------------------------------------------------------------------ progressive pruning


def test_patches_kept_fall_at_the_named_iterations():
    cfg = config(**DROP)
    assert [kept_at(i, cfg, 16) for i in range(12)] == [16] * 3 + [12] * 3 + [4] * 6
    group, seen = make(**DROP), []
    loss = group._loss

    def record(*arguments):
        keep = arguments[15]
        seen.append(None if keep is None else tuple(keep.shape))
        return loss(*arguments)

    group._loss = record
    run(group)
    assert seen == [None] * 3 + [(6, 12)] * 3 + [(6, 4)] * 6


def test_patches_dropped_are_those_with_the_least_attention_and_never_return():
    group = make(dtype=torch.float64, **DROP)
    while group.iteration < 3:
        group.step()
    own = group.loras[0].to(dtype=torch.float64)
    scores = group.vit.encode(group.images[0], own).cls_scores
    first = group.keep[0].clone()
    for row, kept in zip(scores, first.tolist()):
        assert sorted(kept) == sorted(row.sort(descending=True).indices[:12].tolist())
    while group.iteration < 6:
        group.step()
    assert torch.equal(
        group.keep[0], best_patches(group.vit, group.images[0], own, first, 4, batch_size=2)
    )
    for before, after in zip(first.tolist(), group.keep[0].tolist()):
        assert set(after) < set(before)


@pytest.mark.parametrize("flip", [False, True])
def test_moved_patches_follow_the_pixels(flip):
    """Rolls by whole patches: the patch that was marked is marked after roll and flip."""
    keep = torch.tensor([[[0, 5, 11], [3, 12, 15]]])  # one task, two images
    shift, flipped = torch.tensor([[8, -4]]), torch.tensor([flip])
    images = torch.zeros(1, 2, 3, 16, 16)
    for image, patches in zip(images[0], keep[0].tolist()):
        for p in patches:
            image[:, 4 * (p // 4) : 4 * (p // 4) + 4, 4 * (p % 4) : 4 * (p % 4) + 4] = 1
    jitter = Jitter(shift[None], flipped[None], torch.zeros(1, 1, dtype=torch.int64))
    seen = gather_pixels(images, *jitter.index(torch.zeros(1, dtype=torch.int64), 16))
    moved = moved_patches(keep, shift, flipped, NORM)
    for image, patches in zip(seen[0], moved.tolist()):
        marked = image[0].unflatten(1, (4, 4)).unflatten(0, (4, 4)).amin((1, 3)).flatten()
        assert sorted(patches) == marked.nonzero().flatten().tolist()


def test_moved_patches_round_to_the_nearest():
    keep, flip = torch.tensor([[[5]]]), torch.tensor([False])
    for pixels, patch in ((1, 5), (-1, 5), (3, 10), (-3, 0)):
        shift = torch.tensor([[pixels, pixels]])
        assert moved_patches(keep, shift, flip, NORM).tolist() == [[patch]]


@pytest.mark.parametrize("prune", [{}, {1: 0.5}, {2: 0.5}])
def test_survivors_are_among_the_patches_kept(prune):
    group = run(make(**DROP, prune=prune))
    (part,) = group.finish(batch_size=4)
    assert part.survivors == (2 if prune else 4)
    for order, kept in zip(part.order.tolist(), group.keep[0].tolist()):
        assert sorted(order) == list(range(16))
        assert set(order[: part.survivors]) <= set(kept)


def test_dropping_takes_the_gradient_of_the_backbone_alone():
    group = make(**DROP, alpha=0.0, jitter=0.0, flip=0.0)
    while group.iteration < 6:
        group.step()
    before = group.images.clone()
    state = group.optimiser.state[group.images]
    state["exp_avg"].zero_()  # momentum of earlier iterations aside
    group.step()
    changed = (group.images != before)[0].any(1)  # (6, 16, 16)
    for image, kept in zip(changed, group.keep[0].tolist()):
        patches = image.unflatten(1, (4, 4)).unflatten(0, (4, 4)).amax((1, 3)).flatten()
        assert set(patches.nonzero().flatten().tolist()) <= set(kept)
        assert patches.any()


# ------------------------------------------------------------------ coarse to fine


def test_coarse_start_then_full_size_with_a_fresh_optimiser():
    cfg = config(**COARSE)
    assert [side_at(i, cfg, NORM) for i in range(12)] == [8] * 5 + [16] * 7
    assert side_at(0, config(coarse=0.4, coarse_scale=0.1), NORM) == 4
    group = make(**COARSE)
    for i in range(12):
        assert group.images.shape[-1] == (8 if i < 5 else 16)
        before = group.images.clone()
        group.step()
        if i == 4:
            assert (group.images != enlarged(before, 16)).any()
            assert not group.optimiser.state[group.images]
    assert group.optimiser.state[group.images]["step"] == 7
    assert group.finish()[0].images.shape == (6, 3, 16, 16)


def test_small_images_roll_by_as_much_of_their_side():
    group = make(**COARSE, jitter=0.5)
    assert group.moves.shift.abs().max() <= 4 < group.jitter.shift.abs().max()
    assert torch.equal(group.moves.shift, (group.jitter.shift / 2).round().long())


def test_coarse_start_lowers_the_loss_before_it_grows():
    group = make(tasks=(0, 1), coarse=0.5, iterations=60, lr=0.02, jitter=0.0, flip=0.0)
    losses = []
    while not group.done:
        losses.append(group.step()["ce"].mean().item())
    assert losses[29] < 0.3 * losses[0]
    assert losses[30] < losses[0]  # some of it carries over to the full size
    assert losses[-1] < 0.1 * losses[30]


# ------------------------------------------------------------------ warm start


def test_warm_images_are_of_the_same_class_where_names_tell():
    named = (("a", "b", "c"), ("b", "d", "e"))
    parts = [toys.task_images(i, names=names) for i, names in enumerate(named)]
    images = warm_images(parts, ("b", "zebra"), 2, 4, task_generator(0, 7))
    shows_b = torch.cat([parts[0].images[6:12], parts[1].images[:6]])
    everything = torch.cat([p.images for p in parts])
    for image in images[:4]:
        assert (shows_b == image).flatten(1).all(1).any()
    for image in images[4:]:
        assert (everything == image).flatten(1).all(1).any()
    again = warm_images(parts, ("b", "zebra"), 2, 4, task_generator(0, 7))
    assert torch.equal(images, again)
    more = warm_images(parts[:1], ("a",), 1, 15, task_generator(0, 7))
    assert more.shape[0] == 15  # a class of 6 images gives each twice or three times
    parts = [replace(p, class_names=None) for p in parts]
    nameless = warm_images(parts, None, 2, 3, task_generator(0, 7))
    assert nameless.shape == (6, 3, 16, 16)


def test_warm_tasks_start_from_the_first_ones(tmp_path):
    cfg = config(warm=2, warm_iterations=3)
    bank = toys.bank(5)
    parts = invert(toys.vit(), bank, toys.prior(), cfg, folder=tmp_path)
    cold = invert(toys.vit(), bank[:2], toys.prior(), config())
    for one, other in zip(cold, parts):
        assert torch.equal(one.images, other.images)
    group = InversionGroup(
        toys.vit(), bank[2:4], (2, 3), toys.prior(), config(iterations=3), earlier=cold
    )
    drawn = warm_images(cold, bank[2].class_names, 3, 2, task_generator(0, 2))
    torch.testing.assert_close((group.images[0] * 0.5 + 0.5) * 255, drawn.float())
    for part, own in zip(run(group).finish(), list(parts)[2:4]):
        assert torch.equal(part.images, own.images)
    memory = invert(toys.vit(), bank, toys.prior(), cfg)
    assert all(torch.equal(a.images, b.images) for a, b in zip(memory, parts, strict=True))


# ------------------------------------------------------------------ together, and resumed


class Stop:
    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self):
        self.calls += 1
        return self.calls == self.at


@pytest.mark.parametrize("at", [2, 4, 5, 6, 7, 9, 11, 13, 14])
def test_all_shortcuts_together_stop_and_resume_bit_equal(tmp_path, at):
    """Interrupted in the coarse phase, at its end, where patches go and where tasks leave."""
    cfg = config(
        **COARSE, **PLATEAU, drop=(0.25, 0.5), drop_at=(0.5, 0.75), schedule="cosine", warm=2,
        warm_iterations=6, prune={1: 0.5},
    )  # fmt: skip
    vit, bank, prior = toys.vit(), toys.bank(4), toys.prior()
    whole = invert(vit, bank, prior, cfg)
    stop = Stop(at)
    try:
        invert(vit, bank, prior, cfg, folder=tmp_path, stop=stop)
    except KeyboardInterrupt:
        assert stop.calls == at
        parts = invert(vit, bank, prior, cfg, folder=tmp_path)
    else:
        pytest.fail(f"over after {stop.calls} iterations")
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.order, other.order)
        assert one.survivors == other.survivors == 4
    assert not (tmp_path / "group.state.safetensors").exists()


def test_steps_between_changes_see_one_shape():
    """What a recorded step may rely on: shapes change only where the group says so."""
    group = make(tasks=(0, 1, 2), **COARSE, **PLATEAU, drop=(0.5,), drop_at=(0.75,), lr=0.05)
    shapes, changes = None, []
    loss, seen = data_loss, []

    def record(*arguments):
        seen.append(tuple(x.shape for x in arguments if isinstance(x, torch.Tensor)))
        return loss(*arguments)

    group._loss = record
    while not group.done:
        group.step()
        if seen[-1] != shapes:
            shapes = seen[-1]
            changes.append(group.iteration - 1)
    assert changes[0] == 0
    assert set(changes[1:]) <= {5, 9, *range(6, 12, 3)}
    assert 5 in changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plateau": 1.0}, r"plateau: must be in \[0, 1\)"),
        ({"drop": (0.5,)}, r"drop_at: one share .* for each of drop \(0.5,\) expected, got \(\)"),
        ({"drop": (0.5, 0.25), "drop_at": (0.1, 0.2)}, "drop: expected growing shares"),
        ({"drop": (0.5,), "drop_at": (1.0,)}, "drop_at: expected growing shares between 0 and 1"),
        ({"drop": (0.5,), "drop_at": (0.1,), "coarse": 0.2}, "after the coarse start"),
        ({"coarse": 0.1, "resolution": (8, 16)}, "coarse: does not go with resolution"),
        ({"coarse_scale": 0.0}, "coarse_scale: must be in"),
        ({"warm": -1}, "warm: must not be negative"),
        ({"warm_iterations": 0}, "warm_iterations: must be >= 1"),
        ({"group": 0}, "group: must be >= 1, got 0"),
        ({"plateau": math.nan}, "plateau: must be in"),
    ],
)
def test_rejects_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        InversionConfig(**changes)

"""Meta-training against loops: sampling, targets, the loss, augmentation, one step, resuming.

Float32 tolerance of losses, 1e-5: sums of some 30 squares, 15 queries and 5 ways, each rounded by
6e-8 of numbers near 10.
"""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrecycle.augment import apply_maps
from fastrecycle.classifier import prototype_logits
from fastrecycle.config import MetaConfig
from fastrecycle.lora import LoRA
from fastrecycle.meta_trainer import _mirror
from fastrecycle.metatrain import (
    Episodes,
    EpisodeSampler,
    MetaTrainer,
    keep_ladder,
    meta_loss,
    meta_train,
    targets,
)
from fastrecycle.pruning import kept_count, masked_images
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.vit import RaggedKeep

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")


def config(**changes):
    base = {
        "steps": 12, "ways": 3, "shots": 2, "queries": 3, "rank": 2, "checkpoint_every": 5,
        "lr": 3e-3, "start": "zero",
    }  # fmt: skip
    return MetaConfig(**{**base, **changes})


def trainer(pool=None, vit=None, seed=0, **changes):
    return MetaTrainer(vit or toys.vit(), pool or toys.pool(), config(**changes), seed=seed)


# ------------------------------------------------------------------ sampling


def test_tasks_have_distinct_classes_and_disjoint_images():
    pool = toys.pool(4)
    sampler = EpisodeSampler(pool, config(tasks=2), seed=3)
    kinds = Counter()
    for step in range(150):
        drawn = sampler.draw(step)
        assert drawn.rows.shape == (2, 3, 5)
        for rows, labels in zip(drawn.rows, drawn.labels):
            names = [{pool.class_names[c] for c in pool.classes[torch.tensor(r)]} for r in rows]
            assert all(len(n) == 1 for n in names)  # class-major
            assert len(set.union(*names)) == 3  # told apart by name
            assert len(set(rows.ravel().tolist())) == 15  # support and query are disjoint
            owners = set(pool.tasks[torch.tensor(rows.ravel())].tolist())
            if labels[0] >= 0:
                assert len(owners) == 1
                assert (pool.labels[torch.tensor(rows)] == torch.tensor(labels)[:, None]).all()
            else:
                assert (labels == -1).all()
            kinds[(labels[0] >= 0, len(owners) > 1)] += 1
    assert kinds[(True, False)] > 100  # of 300, p = 1/2: five deviations are 43
    assert kinds[(False, True)] > 80
    assert kinds[(True, True)] == 0


@pytest.mark.parametrize(("interpolation", "own"), [(0.0, True), (1.0, False)])
def test_interpolation_switches_between_the_two_kinds(interpolation, own):
    sampler = EpisodeSampler(toys.pool(3), config(interpolation=interpolation))
    for step in range(40):
        assert ((sampler.draw(step).labels >= 0) == own).all()


def test_every_lora_that_shows_a_class_is_drawn_from():
    pool = toys.pool(2, names=("a", "b", "c"))
    sampler = EpisodeSampler(pool, config(interpolation=1.0))
    rows = np.concatenate([sampler.draw(step).rows.ravel() for step in range(120)])
    assert set(rows.tolist()) == set(range(len(pool)))


@pytest.mark.parametrize("holders", ["one", "all"])
def test_images_of_a_class_come_from_one_lora_or_from_all(holders):
    pool = toys.pool(3, names=("a", "b", "c"))
    sampler = EpisodeSampler(pool, config(interpolation=1.0, holders=holders))
    owners = Counter()
    for step in range(40):
        for rows in sampler.draw(step).rows[0]:
            assert len({pool.class_names[c] for c in pool.classes[torch.tensor(rows)]}) == 1
            assert len(set(rows.tolist())) == 5
            owners[len(set(pool.tasks[torch.tensor(rows)].tolist()))] += 1
    if holders == "one":
        assert set(owners) == {1}
    else:
        assert owners[2] + owners[3] > 100  # of 120; five of 18 images from one LoRA are rare


def test_tasks_depend_on_seed_and_step_alone():
    pool = toys.pool()
    one, other = EpisodeSampler(pool, config(), 1), EpisodeSampler(pool, config(), 1)
    for step in range(7):
        one.draw(step)
    a, b = one.draw(7), other.draw(7)
    assert np.array_equal(a.rows, b.rows)
    assert np.array_equal(a.labels, b.labels)
    assert not np.array_equal(a.rows, one.draw(8).rows)
    assert not np.array_equal(a.rows, EpisodeSampler(pool, config(), 2).draw(7).rows)
    packed = EpisodeSampler(pool, config(tasks=3), 1).draw(7)
    assert np.array_equal(packed.rows[0], a.rows[0])  # others beside it change nothing


def test_narrow_heads_only_serve_interpolated_tasks():
    parts = [toys.task_images(0, 3), toys.task_images(1, 2)]
    pool = type(toys.pool())(parts)
    sampler = EpisodeSampler(pool, config(interpolation=0.5))
    for step in range(60):
        drawn = sampler.draw(step)
        if drawn.labels[0, 0] >= 0:
            assert drawn.rows.max() < 18  # of the first LoRA


def test_rejects_pools_too_small_for_the_task():
    with pytest.raises(ValueError, match=r"2-shot task with 5 queries needs 7 images.*has 6"):
        EpisodeSampler(toys.pool(), config(queries=5))
    with pytest.raises(ValueError, match=r"4-way task of one LoRA.*largest has 3"):
        EpisodeSampler(toys.pool(), config(ways=4))
    with pytest.raises(ValueError, match="shows 3 classes, fewer than 4"):
        EpisodeSampler(toys.pool(1), config(ways=4, interpolation=1.0))
    EpisodeSampler(toys.pool(3), config(ways=4, interpolation=1.0))


def test_rejects_a_pool_of_another_backbone():
    with pytest.raises(ValueError, match="images of side 16, the backbone takes 20"):
        trainer(vit=toys.vit(replace(toys.CONFIG, image_size=20)))
    with pytest.raises(ValueError, match="images of 16 patches, the backbone makes 4"):
        trainer(vit=toys.vit(replace(toys.CONFIG, patch_size=8)))


# ------------------------------------------------------------------ targets and loss


@pytest.mark.parametrize(
    ("temperature", "target"), [(1.0, "teacher"), (2.5, "teacher"), (1.0, "label")]
)
def test_targets_match_loops(temperature, target):
    parts = [toys.task_images(0, 3), toys.task_images(1, 4)]
    pool = type(toys.pool())(parts)  # heads of two sizes: padded with -inf
    cfg = config(tasks=3, temperature=temperature, target=target)
    sampler = EpisodeSampler(pool, cfg, 0)
    kinds = set()
    for step in range(12):
        drawn = sampler.draw(step)
        got = targets(pool.teacher_logits, drawn, cfg)
        assert got.shape == (3, 9, 3)
        for e in range(3):
            for way in range(3):
                for q in range(3):
                    row = drawn.rows[e, way, cfg.shots + q]
                    expected = [float(way == w) for w in range(3)]
                    if drawn.labels[e, 0] >= 0 and target == "teacher":
                        logits = pool.teacher_logits[row][torch.tensor(drawn.labels[e])]
                        powers = [math.exp(v / temperature) for v in logits.tolist()]
                        expected = [p / sum(powers) for p in powers]
                    kinds.add(drawn.labels[e, 0] >= 0)
                    assert got[e, 3 * way + q].tolist() == pytest.approx(expected, abs=1e-6)
    assert kinds == {True, False}


def naive_loss(features, target, cfg):
    """Eq. 3 and 4 with lists: mean over episodes and queries of KL, or CE for labels."""
    losses, right = [], []
    for episode, rows in zip(features.tolist(), target.tolist()):
        centres = [[sum(x) / cfg.shots for x in zip(*images[: cfg.shots])] for images in episode]
        queries = [image for images in episode for image in images[cfg.shots :]]
        for query, t in zip(queries, rows):
            if cfg.distance == "cosine":
                logits = [
                    10
                    * sum(a * b for a, b in zip(query, c))
                    / (math.hypot(*query) * math.hypot(*c))
                    for c in centres
                ]
            else:
                logits = [-math.dist(query, c) for c in centres]
                if cfg.distance == "squared":
                    logits = [-(v**2) for v in logits]
            powers = [math.exp((v - max(logits)) / cfg.temperature) for v in logits]
            student = [p / sum(powers) for p in powers]
            log = lambda p: math.log(max(p, 1e-12))  # noqa: E731
            if max(t) == 1:
                loss = -log(student[t.index(1)])
            elif cfg.kl == "teacher_student":
                loss = sum(p * (log(p) - log(s)) for p, s in zip(t, student))
            else:
                loss = sum(s * (log(s) - log(p)) for p, s in zip(t, student))
            losses.append(loss * cfg.temperature**2)
            right.append(logits.index(max(logits)) == t.index(max(t)))
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
@pytest.mark.parametrize("kl", ["teacher_student", "student_teacher"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_meta_loss_matches_loops(distance, kl, temperature):
    cfg = config(tasks=2, distance=distance, kl=kl, temperature=temperature)
    g = toys.generator(0)
    features = torch.randn(2, 3, 5, 8, generator=g, dtype=torch.float64)
    teacher = torch.randn(1, 9, 3, generator=g, dtype=torch.float64).mul(2).softmax(-1)
    labels = torch.eye(3, dtype=torch.float64).repeat_interleave(3, 0)[None]
    target = torch.cat((teacher, labels))  # an own task and an interpolated one
    loss, accuracy = meta_loss(features, target, cfg)
    expected = naive_loss(features, target, cfg)
    assert loss.item() == pytest.approx(expected[0], rel=1e-9)
    assert accuracy.item() == pytest.approx(expected[1])


def test_a_teacher_that_is_sure_is_no_label():
    """In the reversed KL a label takes the cross-entropy; a saturated softmax must not."""
    cfg = config(kl="student_teacher", ways=2, shots=1, queries=1)
    drawn = Episodes(np.array([[[0, 1], [2, 3]]]), np.array([[0, 1]]))
    logits = torch.tensor([[40.0, 0.0]] * 2 + [[0.0, 40.0]] * 2)
    target = targets(logits, drawn, cfg)
    features = torch.randn(1, 2, 2, 4, generator=toys.generator(0))
    loss, _ = meta_loss(features, target, cfg)
    student = prototype_logits(features[0, :, 0], features[0, :, 1]).softmax(-1)
    # p log(p / 1e-12) of the class that the teacher rules out, plus p log p of the other
    expected = 0
    for way in range(2):
        s, other = student[way, way].item(), student[way, 1 - way].item()
        expected += (s * math.log(s) + other * (math.log(other) + 12 * math.log(10))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_loss_is_smallest_where_the_student_is_the_teacher():
    cfg = config(ways=3, shots=1, queries=1)
    features = torch.randn(1, 3, 2, 4, generator=toys.generator(0), dtype=torch.float64)
    same = prototype_logits(features[0, :, 0], features[0, :, 1]).softmax(-1)[None]
    for kl in ("teacher_student", "student_teacher"):
        loss, _ = meta_loss(features, same, replace(cfg, kl=kl))
        assert abs(loss.item()) < 1e-12
        moved, _ = meta_loss(features, same.roll(1, -1), replace(cfg, kl=kl))
        assert moved > 1e-3


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_one_shot_query_on_its_prototype_has_a_finite_gradient(distance):
    features = torch.randn(2, 3, 2, 4, generator=toys.generator(0))
    features[:, :, 1] = features[:, :, 0]  # queries are copies of the support images
    features[0, 0] = 0  # and a feature of zeros
    features.requires_grad_()
    cfg = config(shots=1, queries=1, distance=distance)
    loss, _ = meta_loss(features, torch.eye(3).expand(2, 3, 3), cfg)
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()
    assert features.grad.any()


@pytest.mark.parametrize("changes", [{}, {"sparsity": 0.5, "sparsity_per": "batch"}])
def test_packed_tasks_have_the_mean_of_their_losses(changes):
    both, one = trainer(tasks=2, **changes), trainer(tasks=1, **changes)
    for step in range(3):
        images, keep, target, _ = both._batches(step)[0]
        loss, accuracy = both._forward(images, keep, target)
        alone = []
        for e in range(2):
            rows = slice(15 * e, 15 * (e + 1))
            part = None if keep is None else keep[rows]
            alone.append(one._forward(images[rows], part, target[e : e + 1]))
        mean = torch.stack([x[0] for x in alone]).mean()
        torch.testing.assert_close(loss, mean, rtol=1e-5, atol=1e-5)
        assert accuracy.item() == pytest.approx(sum(x[1].item() for x in alone) / 2, abs=1e-6)


# ------------------------------------------------------------------ schedule


def test_cyclic_schedule_is_the_papers():
    cfg = MetaConfig(lr=1e-3)
    rates = [cfg.lr_at(step) for step in range(300)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[25] == pytest.approx(1e-3)
    assert max(rates) == rates[25]
    assert np.diff(rates[:26]) == pytest.approx(np.full(25, 0.99e-3 / 25))  # a line up
    for k in range(75):  # then half a cosine down
        expected = 1e-5 + 0.99e-3 * (1 + math.cos(math.pi * k / 75)) / 2
        assert rates[25 + k] == pytest.approx(expected)
    assert rates[:100] == rates[100:200] == rates[200:]


def test_other_schedules():
    assert {MetaConfig(schedule="constant", lr=0.5).lr_at(s) for s in range(50)} == {0.5}
    cfg = MetaConfig(schedule="cosine", steps=100, lr=1.0)
    rates = [cfg.lr_at(s) for s in range(100)]
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-2
    assert MetaConfig(schedule="cosine", steps=1, lr=3e-4).lr_at(0) == pytest.approx(3e-4)


# ------------------------------------------------------------------ augmentation


def raw(t, step):
    """The step's images as they lie in the pool, normalised."""
    rows = torch.from_numpy(t.sampler.draw(step).rows.reshape(-1))
    return t.vit.normalise(t.images[rows].float() / 255), rows


def test_without_augmentation_images_are_the_pools():
    t = trainer(resolution=(0, 0), flip=0.0)
    for step in range(3):
        assert torch.equal(t._batches(step)[0][0], raw(t, step)[0])


def test_flip_mirrors_images_and_patches_together():
    for extra in (
        {},
        {"sparsity": 0.5, "sparsity_per": "batch"},
        {"sparsity": 0.6, "sparsity_per": "image"},
    ):
        on = trainer(resolution=(0, 0), flip=1.0, **extra)
        off = trainer(resolution=(0, 0), flip=0.0, **extra)
        mirrored, plain = on._batches(0)[0], off._batches(0)[0]
        assert torch.equal(mirrored[0], plain[0].flip(-1))
        assert torch.equal(mirrored[2], plain[2])
        if extra:
            assert torch.equal(shown(*mirrored[:2]), shown(*plain[:2]).flip(-1))
    half = trainer(resolution=(0, 0), flip=0.5)
    flips = [not torch.equal(half._batches(s)[0][0], raw(half, s)[0]) for s in range(60)]
    assert 11 < sum(flips) < 49  # 30 +- 5 deviations


def shown(images, keep):
    """Images in which only the kept patches are seen."""
    if isinstance(keep, RaggedKeep):
        parts = [
            masked_images(images[i : i + 1], keep.patches[keep.image == i][None], 4)
            for i in range(len(images))
        ]
        return torch.cat(parts)
    return masked_images(images, keep, 4)


def test_mirror_of_patch_indices():
    keep = torch.tensor([[0, 1, 7], [12, 14, 3]])
    both = torch.tensor([True, True])
    assert _mirror(keep, 4, both).tolist() == [[3, 2, 4], [15, 13, 0]]
    assert torch.equal(_mirror(_mirror(keep, 4, both), 4, both), keep)
    assert _mirror(keep, 4, torch.tensor([False, True])).tolist() == [[0, 1, 7], [15, 13, 0]]


def test_resolution_augmentation_shrinks_to_a_side_in_range_and_back():
    t = trainer(resolution=(4, 8), flip=0.0)
    found = Counter()
    for step in range(25):
        got, (images, _) = t._batches(step)[0][0], raw(t, step)
        pixels = t.vit.pixels(images)
        for side in range(1, 17):
            resize = torch.nn.functional.interpolate
            small = resize(pixels, (side, side), mode="bilinear", antialias=True)
            back = resize(small, (16, 16), mode="bicubic").clamp(0, 1)
            if torch.allclose(t.vit.normalise(back), got, atol=1e-5):
                found[side] += 1
    assert sum(found.values()) == 25  # one side for a whole task
    assert set(found) == {4, 5, 6, 7, 8}


def test_each_task_of_a_step_has_its_own_resolution_and_flip():
    """As many tasks as there are, each is augmented as it would be with fewer beside it."""
    both = trainer(tasks=2, resolution=(4, 15))
    one = trainer(tasks=1, resolution=(4, 15))
    differ = 0
    for step in range(20):
        images = both._batches(step)[0].images.unflatten(0, (2, 15))
        plain = both.vit.pixels(raw(both, step)[0]).unflatten(0, (2, 15))
        own = []
        for task in range(2):
            for flipped in (False, True):
                for row in range(12):
                    seen = apply_maps(plain[task : task + 1], both.shrink[row : row + 1])
                    seen = seen.clamp(0, 1)[0].flip(-1) if flipped else seen.clamp(0, 1)[0]
                    if torch.allclose(both.vit.normalise(seen), images[task], atol=1e-5):
                        own.append((row, flipped))
        assert len(own) == 2
        differ += own[0] != own[1]
        assert len(one._batches(step)[0].images) == 15
    assert differ > 10


def test_crop_enlarges_a_window_of_each_image():
    t = trainer(resolution=(0, 0), flip=0.0, crop=0.5)
    ramp = torch.linspace(0, 255, 16).round().to(torch.uint8)
    t.images[:] = ramp  # brightness is the column: a window shows its bounds
    sizes = set()
    for step in range(5):
        seen = t.vit.pixels(t._batches(step)[0].images)
        width = (seen[..., -2] - seen[..., 1]) / 13 * 15  # of the window, as a share of the side
        assert (width > 0.45).all()
        assert (width < 1.01).all()
        assert torch.allclose(width[:, :, :1], width, atol=0.02)  # one window for an image
        sizes |= {round(w, 2) for w in width[:, 0, 0].tolist()}
    assert len(sizes) > 10


def test_resolution_of_the_whole_side_changes_nothing_and_one_pixel_is_flat():
    t = trainer(resolution=(16, 16), flip=0.0)
    assert torch.equal(t._batches(0)[0][0], raw(t, 0)[0])
    flat = trainer(resolution=(1, 1), flip=0.0)._batches(0)[0][0]
    torch.testing.assert_close(flat, flat[..., :1, :1].expand_as(flat), rtol=0, atol=1e-5)


def test_augmentation_draws_from_the_seeds_own_stream(monkeypatch):
    """A key shared with another seed's sampler would tie neighbouring runs together."""
    made, philox = [], np.random.Philox

    def record(key, counter=(0, 0, 0, 0)):
        made.append((tuple(key), tuple(counter)))
        return philox(key=list(key), counter=list(counter))

    t = trainer(seed=6)
    monkeypatch.setattr(np.random, "Philox", record)
    t._batches(4)
    assert ((6, 4), (0, 0, 0, 1)) in made
    # the sampler's own, where it is drawn in Python, starts at 0
    assert {stream for stream in made} <= {((6, 4), (0, 0, 0, 0)), ((6, 4), (0, 0, 0, 1))}
    assert len(made) == len(set(made))


# ------------------------------------------------------------------ sparsity


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 150), st.integers(1, 260), st.floats(0, 1, exclude_max=True))
def test_keep_ladder_meets_its_mean_within_bounds(count, patches, sparsity):
    counts = keep_ladder(count, patches, sparsity)
    assert len(counts) == count
    assert all(isinstance(k, int) and 1 <= k <= patches for k in counts)
    assert sum(counts) == kept_count(patches, sparsity) * count


def test_keep_ladder_spreads_over_the_levels():
    counts = keep_ladder(80, 196, 0.75)
    assert sum(counts) == 80 * 49
    assert counts.count(196) >= 5  # whole images are among them
    assert min(counts) == 12
    assert keep_ladder(5, 196, 0.0) == (196,) * 5
    assert keep_ladder(4, 196, 0.99) == (2,) * 4


def test_batch_sparsity_keeps_the_best_of_every_image():
    t = trainer(sparsity=0.75, sparsity_per="batch", flip=0.0)
    keep = t._batches(0)[0].keep
    _, rows = raw(t, 0)
    assert torch.equal(keep, t.order[rows][:, :4].sort(1).values)
    with pytest.raises(ValueError, match="asks for 12 of 16 patches"):
        trainer(toys.pool(survivors=8), sparsity=0.25, sparsity_per="batch")


def test_whole_tasks_and_masked_ones_meet_the_mean_together():
    changes = {"tasks": 8, "whole": 0.125, "sparsity": 0.75, "resolution": (4, 8)}
    t = trainer(flip=0.0, **changes)
    whole, masked = t._batches(0)
    assert whole.keep is None
    assert [len(whole.target), len(masked.target)] == [1, 7]
    assert masked.keep.shape == (7 * 15, 2)  # (8 * 4 - 16) / 7 patches, rounded down
    plain, rows = raw(t, 0)
    assert torch.equal(masked.images, plain[15:])  # not shrunk: masked_resolution is off
    assert not torch.equal(whole.images, plain[:15])
    assert torch.equal(masked.keep, t.order[rows[15:]][:, :2].sort(1).values)
    losses = [t._forward(*batch)[0] for batch in (whole, masked)]
    mean = (losses[0] + 7 * losses[1]) / 8
    torch.testing.assert_close(t.step()["loss"], mean.detach(), rtol=1e-5, atol=1e-5)
    shrunk = trainer(flip=0.0, masked_resolution=(4, 8), **changes)._batches(0)[1]
    assert not torch.equal(shrunk.images, masked.images)


def test_image_sparsity_keeps_the_best_of_each_image():
    t = trainer(sparsity=0.75, sparsity_per="image", flip=0.0)
    seen = set()
    for step in range(3):
        keep = t._batches(step)[0].keep
        _, rows = raw(t, step)
        assert len(keep.patches) == 15 * 4
        counts = keep.cu_seqlens.diff().tolist()
        assert sorted(counts) == sorted(keep_ladder(15, 16, 0.75))
        for i, k in enumerate(counts):
            own = keep.patches[keep.image == i].tolist()
            assert own == sorted(t.order[rows[i], :k].tolist())
        seen.add(tuple(counts))
    assert len(seen) == 3  # who keeps how many is drawn anew


@pytest.mark.parametrize(
    "changes", [{}, {"prefix_tokens": 2}, {"pre_norm": True, "out_dim": 8, "patch_bias": False}]
)
def test_ragged_packed_forward_equals_each_image_alone(changes):
    shape = replace(toys.CONFIG, **changes)
    vit, lora = toys.vit(shape).double(), toys.lora(config=shape).to(torch.float64)
    images = torch.randn(5, 3, 16, 16, generator=toys.generator(0), dtype=torch.float64)
    order = torch.stack([torch.randperm(16, generator=toys.generator(i)) for i in range(5)])
    counts = torch.tensor([16, 3, 1, 7, 2])
    packed = vit(images, lora, keep=RaggedKeep.of_orders(order, counts))
    for i, k in enumerate(counts.tolist()):
        alone = vit(images[i : i + 1], lora, keep=order[i : i + 1, :k])
        torch.testing.assert_close(packed[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_ragged_gradient_equals_each_image_alone():
    vit, lora = toys.vit().double(), toys.lora().to(torch.float64)
    images = torch.randn(3, 3, 16, 16, generator=toys.generator(0), dtype=torch.float64)
    order = torch.stack([torch.randperm(16, generator=toys.generator(i)) for i in range(3)])
    counts = torch.tensor([9, 1, 4])
    leaves = [x.requires_grad_() for x in lora.tensors()]
    packed = vit(images, lora, keep=RaggedKeep.of_orders(order, counts)).square().sum()
    alone = sum(
        vit(images[i : i + 1], lora, keep=order[i : i + 1, :k]).square().sum()
        for i, k in enumerate(counts.tolist())
    )
    for a, b in zip(torch.autograd.grad(packed, leaves), torch.autograd.grad(alone, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ what learns


def snapshot(vit, pool):
    tensors = dict(vit.state_dict())
    for name in ("images", "labels", "tasks", "order", "teacher_logits", "classes"):
        tensors[f"pool.{name}"] = getattr(pool, name)
    return {name: x.clone() for name, x in tensors.items()}


@pytest.mark.parametrize("targets_", [("q", "v"), ("q", "k", "v", "proj", "fc1", "fc2")])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_teacher_and_backbone_stay_and_every_meta_lora_tensor_changes(targets_, sparsity):
    vit, pool = toys.vit(), toys.pool()
    before = snapshot(vit, pool)
    start = LoRA.init(vit.config, 2, targets=targets_, seed=0)
    result = meta_train(vit, pool, config(steps=4, targets=targets_, sparsity=sparsity))
    after = snapshot(vit, pool)
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert result.vit is vit
    assert result.lora.ranks == start.ranks
    assert set(result.lora.a) == set(targets_)
    for target in targets_:
        for one, other in ((result.lora.a, start.a), (result.lora.b, start.b)):
            for block in range(3):
                assert not torch.equal(one[target][block], other[target][block])
        assert torch.equal(result.lora.scale[target], start.scale[target])
    assert not any(x.requires_grad for x in result.lora.tensors())


@pytest.mark.parametrize(
    ("learn", "blocks"), [("first:1", {0}), ("last:2", {1, 2}), ("first:9", {0, 1, 2})]
)
def test_only_the_chosen_blocks_learn(learn, blocks):
    lora = meta_train(toys.vit(), toys.pool(), config(steps=3, learn=learn)).lora
    for block in range(3):
        for target in ("q", "v"):
            changed = bool(lora.delta(target)[block].any())
            assert changed == (block in blocks)
            assert lora.ranks[target][block] == (2 if block in blocks else 0)
            if block not in blocks:
                assert not lora.a[target][block].any()


def test_the_whole_backbone_learns_on_a_copy():
    vit, pool = toys.vit(), toys.pool()
    before = snapshot(vit, pool)
    result = meta_train(vit, pool, config(steps=3, learn="backbone"))
    after = snapshot(vit, pool)
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert result.vit is not vit
    still = [n for n, p in result.vit.named_parameters() if torch.equal(p, before[n])]
    assert still == []
    assert not any(p.requires_grad for p in result.vit.parameters())
    assert not any(b.any() for b in result.lora.b.values())  # the LoRA changes nothing


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_step_is_adam_on_the_naive_loss(tasks):
    """Two steps by hand: features image by image, the loss in lists' order, Adam written out."""
    changes = {"tasks": tasks, "schedule": "constant", "resolution": (0, 0), "flip": 0.0}
    vit, pool = toys.vit().double(), toys.pool()
    t = trainer(pool, toys.vit(), **changes)
    lora = t.lora.clone().to(torch.float64)
    moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in lora.tensors()]
    for step in range(2):
        images, _, target, _ = t._batches(step)[0]
        for x in lora.tensors():
            x.requires_grad_()
        features = torch.cat([vit(image[None].double(), lora) for image in images])
        total = 0
        for e in range(tasks):
            own = features[15 * e : 15 * (e + 1)].reshape(3, 5, -1)
            centres = own[:, :2].mean(1)
            for way in range(3):
                for q in range(3):
                    d = (own[way, 2 + q] - centres).square().sum(1).sqrt()
                    log_p = (-d).log_softmax(0)
                    goal = target[e, 3 * way + q].double()
                    entropy = torch.special.entr(goal).sum()
                    total = total - (entropy + (goal * log_p).sum()) / (9 * tasks)
        gradients = torch.autograd.grad(total, lora.tensors())
        assert t.step()["loss"].item() == pytest.approx(total.item(), rel=1e-4, abs=1e-5)
        with torch.no_grad():
            for x, g, (m, v) in zip(lora.tensors(), gradients, moments):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                bias = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
                x -= 3e-3 * (m / bias[0]) / ((v / bias[1]).sqrt() + 1e-8)
    for ours, theirs in zip(t.lora.tensors(), lora.tensors()):
        # a step moves a number by 3e-3; float32 gradients are right to about 1e-4 of the largest
        close = (ours.double() - theirs).abs() < 1e-4
        assert close.double().mean() > 0.99
        assert (ours.double() - theirs).abs().max() < 1.3e-2  # two steps each way


def test_learning_rate_of_each_step_is_the_schedules():
    t = trainer()
    for step in range(4):
        t.step()
        assert t.optimiser.param_groups[0]["lr"] == t.config.lr_at(step)


def test_loss_falls_on_a_pool_that_can_be_learnt():
    t = trainer(tasks=2, schedule="constant", interpolation=1.0)

    @torch.no_grad()
    def loss():  # on tasks that the 60 steps do not see
        return sum(t._forward(*t._batches(step)[0])[0].item() for step in range(100, 106)) / 6

    before = loss()
    for _ in range(60):
        t.step()
    assert loss() < 0.8 * before


def test_values_are_reported_now_and_then():
    seen = {}
    meta_train(toys.vit(), toys.pool(), config(steps=45), on_step=lambda s, v: seen.update({s: v}))
    assert list(seen) == list(range(1, 46))
    assert [s for s, values in seen.items() if values] == [20, 40, 45]
    assert set(seen[45]) == {"loss", "accuracy", "lr"}
    assert seen[40]["lr"] == config().lr_at(39)


def test_moving_average_of_the_steps():
    t = trainer(ema=0.9)
    mean = [x.detach().clone() for x in t.lora.tensors()]
    for step in range(4):
        t.step()
        decay = min(0.9, (1 + step) / (10 + step))
        mean = [decay * m + (1 - decay) * x.detach() for m, x in zip(mean, t.lora.tensors())]
    for got, expected, last in zip(t.meta_lora().tensors(), mean, t.lora.tensors()):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(got, last)
    plain = trainer()
    plain.step()
    assert torch.equal(plain.meta_lora().tensors()[0], plain.lora.tensors()[0])


# ------------------------------------------------------------------ randomness, resuming


def equal(one, other):
    return all(map(torch.equal, one.tensors(), other.tensors()))


def test_same_seed_same_result_and_other_seed_another():
    vit, pool = toys.vit(), toys.pool()
    one = meta_train(vit, pool, config(), seed=4).lora
    assert equal(one, meta_train(vit, pool, config(), seed=4).lora)
    assert not equal(one, meta_train(vit, pool, config(), seed=5).lora)


class Stop:
    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self):
        self.calls += 1
        return self.calls == self.at


@pytest.mark.parametrize("at", [1, 5, 11])
@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.5, "sparsity": 0.5, "sparsity_per": "image"}, {"learn": "backbone"}]
)
def test_stopped_and_resumed_is_bit_equal(tmp_path, at, changes):
    vit, pool, cfg = toys.vit(), toys.pool(), config(validate_every=4, **changes)

    @torch.no_grad()
    def score(model, lora):  # any number that goes up and down
        numbers = [*model.parameters(), *lora.tensors()]
        return math.sin(50 * sum(x.double().sum().item() for x in numbers))

    whole = meta_train(vit, pool, cfg, validate=score)
    assert set(whole.validation) == {4, 8, 12}
    with pytest.raises(KeyboardInterrupt):
        meta_train(vit, pool, cfg, folder=tmp_path, validate=score, stop=Stop(at))
    steps = []
    resumed = meta_train(
        vit, pool, cfg, folder=tmp_path, validate=score, on_step=lambda s, _: steps.append(s)
    )
    assert steps == list(range(at + 1, 13))
    assert equal(whole.lora, resumed.lora)
    assert resumed.best_step == whole.best_step
    assert resumed.validation == whole.validation
    for a, b in zip(whole.vit.parameters(), resumed.vit.parameters(), strict=True):
        assert torch.equal(a, b)
    again = meta_train(vit, pool, cfg, folder=tmp_path, stop=lambda: pytest.fail("no work left"))
    assert equal(whole.lora, again.lora)


def test_best_step_on_validation_is_returned():
    vit, pool, cfg = toys.vit(), toys.pool(), config(validate_every=3)
    seen = []

    def score(_, lora):
        seen.append(lora.clone())
        return [1.0, 7.0, 7.0, 2.0][len(seen) - 1]

    result = meta_train(vit, pool, cfg, validate=score)
    assert result.best_step == 6  # the first of the two
    assert equal(result.lora, seen[1])
    assert result.validation == {3: 1.0, 6: 7.0, 9: 7.0, 12: 2.0}
    last = meta_train(vit, pool, cfg)
    assert last.best_step == 12
    assert equal(last.lora, seen[3])


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    vit, pool = toys.vit(), toys.pool()
    meta_train(vit, pool, config(steps=1), folder=tmp_path)
    with pytest.raises(ValueError, match="a checkpoint of another configuration"):
        meta_train(vit, pool, config(steps=2, targets=("q",)), folder=tmp_path)


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: must be >= 1, got 0"),
        ({"ways": 1}, "ways: must be at least 2, got 1"),
        ({"lr": 0}, "lr: must be positive"),
        ({"temperature": -1.0}, "temperature: must be positive"),
        ({"interpolation": 1.1}, r"interpolation: must be in \[0, 1\], got 1.1"),
        ({"sparsity": 1.0}, r"sparsity: must be in \[0, 1\), got 1.0"),
        ({"crop": 0.0}, r"crop: must be in \(0, 1\]"),
        ({"masked_resolution": (5, 4)}, "masked_resolution: expected 1 <= low <= high"),
        ({"whole": 0.5}, r"whole: must be in \[0, 1 - sparsity\)"),
        ({"whole": 0.5, "sparsity": 0.6, "tasks": 2}, r"whole: must be in \[0, 1 - sparsity\)"),
        ({"whole": 0.3, "sparsity": 0.5, "tasks": 4}, "whole number of the 4 tasks"),
        ({"resolution": (5, 4)}, "resolution: expected 1 <= low <= high"),
        ({"resolution": (0, 4)}, "resolution: expected"),
        ({"target": "student"}, 'target: expected "teacher" or "label", got .student'),
        ({"learn": "middle:3"}, 'learn: expected "all", "backbone", "first:N" or "last:N"'),
        ({"learn": "first:0"}, "learn: expected"),
        ({"learn": "backbone", "ema": 0.9}, "ema: averages the meta-LoRA"),
    ],
)
def test_rejects_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        MetaConfig(**changes)


# ------------------------------------------------------------------ where the meta-LoRA starts


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_start_from_a_lora_is_its_change_at_the_rank_asked_for(alpha):
    average = LoRA.average(toys.bank(3))
    t = MetaTrainer(toys.vit(), toys.pool(), config(rank=3, alpha=alpha), start=average)
    near = average.compress(3)
    for target in ("q", "v"):
        torch.testing.assert_close(
            t.meta_lora().delta(target), near.delta(target), rtol=1e-4, atol=1e-6
        )
    assert all(x.is_contiguous() for x in t.parameters)  # a fused optimiser takes no others
    before = t.meta_lora()
    t.step()
    assert not torch.equal(t.meta_lora().a["q"], before.a["q"])


def test_start_reaches_only_the_blocks_that_learn():
    average = LoRA.average(toys.bank(2))
    t = MetaTrainer(toys.vit(), toys.pool(), config(rank=3, learn="last:1"), start=average)
    change = t.meta_lora().delta("q")
    assert change[:-1].abs().max() == 0
    assert change[-1].abs().max() > 0


def test_recycler_starts_from_the_average_of_its_bank():
    pool, bank = toys.pool(3), toys.bank(3)
    made = [
        MetaLoRARecycler(
            toys.vit(), bank, None, meta=config(steps=1, lr=1e-12, start=start), quiet=True
        ).meta_train(pool)
        for start in ("zero", "average")
    ]
    assert made[0].delta("v").abs().max() < 1e-8
    near = LoRA.average(bank).compress(made[1].rank)
    torch.testing.assert_close(made[1].delta("v"), near.delta("v"), rtol=1e-3, atol=1e-5)

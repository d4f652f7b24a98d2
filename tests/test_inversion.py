"""LoRA Inversion against a plain loop: rolled and flipped images, merged weights, Adam by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrecycle.augment import shrink_table
from fastrecycle.config import InversionConfig
from fastrecycle.grouping import groups
from fastrecycle.inversion import InversionGroup, data_loss, invert
from fastrecycle.jitter import Jitter, gather_pixels, inverse, task_generator
from fastrecycle.lora import LoRABank, LoRAStack
from fastrecycle.pool import TaskImages, task_file

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
SIDE = toys.CONFIG.image_size


def config(**changes):
    base = {"images_per_class": 2, "iterations": 8, "prune": {1: 0.5}, "group": 2}
    return InversionConfig(**{**base, **changes})


def make(count=1, tasks=None, seed=0, dtype=torch.float32, prior=True, **changes):
    vit, network = toys.vit().to(dtype), toys.prior().to(dtype) if prior else None
    loras = [toys.lora(i) for i in (tasks or range(count))]
    return InversionGroup(
        vit, loras, tasks or range(count), network, config(**changes), seed=seed, dtype=dtype
    )


# ------------------------------------------------------------------ jitter


def test_jitter_is_a_roll_and_a_flip():
    images = torch.randn(4, 2, 3, SIDE, SIDE)
    jitter = Jitter.draw([task_generator(0, t) for t in range(4)], config(iterations=20), SIDE)
    seen = set()
    for i in range(20):
        got = gather_pixels(images, *jitter.index(torch.tensor([i]), SIDE))
        for g in range(4):
            down, right = jitter.shift[i, g].tolist()
            flip = bool(jitter.flip[i, g])
            expected = torch.roll(images[g], (down, right), (-2, -1))
            assert torch.equal(got[g], expected.flip(-1) if flip else expected)
            seen.add((flip, down != 0, right != 0))
    assert len(seen) == 8  # every case came up


def test_jitter_inverse_undoes_it():
    images = torch.randn(3, 2, 3, SIDE, SIDE)
    jitter = Jitter.draw([task_generator(1, t) for t in range(3)], config(iterations=12), SIDE)
    for i in range(12):
        rows, columns = jitter.index(torch.tensor([i]), SIDE)
        moved = gather_pixels(images, rows, columns)
        assert torch.equal(gather_pixels(moved, inverse(rows), inverse(columns)), images)


def test_jitter_reaches_an_eighth_of_the_side_both_ways_and_flips_half():
    drawn = Jitter.draw([task_generator(0, 0)], config(iterations=400), 32)
    for axis in range(2):
        assert drawn.shift[:, 0, axis].unique().tolist() == list(range(-4, 5))
    # 400 fair flips: five standard deviations of 1/40
    assert abs(drawn.flip.float().mean().item() - 0.5) < 0.125
    still = Jitter.draw([task_generator(0, 0)], config(iterations=9, jitter=0.0, flip=0.0), 32)
    assert not still.shift.any()
    assert not still.flip.any()
    assert Jitter.draw([task_generator(0, 0)], config(flip=1.0), 32).flip.all()


def test_resolutions_cover_their_range_and_leave_other_draws_alone():
    generators = lambda: [task_generator(0, t) for t in range(2)]  # noqa: E731
    off = Jitter.draw(generators(), config(iterations=300), 32)
    on = Jitter.draw(generators(), config(iterations=300, resolution=(20, 40)), 32)
    assert torch.equal(on.shift, off.shift)
    assert torch.equal(on.flip, off.flip)
    assert not off.resolution.any()
    assert on.resolution.unique().tolist() == list(range(13))  # 20 to 32 pixels, 32 being whole
    assert 0.25 < (on.resolution == 12).float().mean() < 0.6  # 9 of 21, five deviations
    assert not torch.equal(on.resolution[:, 0], on.resolution[:, 1])


# ------------------------------------------------------------------ the loss


def merged(vit, lora):
    """The backbone with a LoRA's products added into its weights."""
    other = type(vit)(vit.config).to(vit.pos_embed.dtype)
    other.load_state_dict(vit.state_dict())
    lora = lora.to(vit.pos_embed.dtype)
    for target in lora.a:
        row = "qkv".index(target) * vit.config.width
        for block, delta in zip(other.blocks, lora.delta(target)):
            block.qkv.weight.data[row : row + vit.config.width] += delta
    return other


def plain_loss(vit, prior, lora, images, cfg, pruned):
    """Eq. 1 of one task, term by term: (m, 3, S, S) in the backbone's space -> scalar."""
    features = merged(vit, lora)(images, prune=cfg.prune if pruned else None)
    logits = features @ lora.head.weight.to(features).T + lora.head.bias.to(features)
    ce = 0
    for i, row in enumerate(logits):
        ce = ce - (row[i // cfg.images_per_class] - torch.logsumexp(row, 0)) / len(logits)
    loss = cfg.ce * ce
    if prior is not None:
        loss = loss + cfg.alpha * prior(images * 0.5 + 0.5, first_bn=cfg.first_bn)[0]
    m, _, side, _ = images.shape
    for x in (images[:, :, 1:] - images[:, :, :-1], images[..., 1:] - images[..., :-1]):
        loss = loss + cfg.tv * x.abs().sum() / (m * 3 * side * (side - 1))
    return loss + cfg.l2 * (images**2).sum() / images.numel(), ce


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"ce": 0.0}, {"alpha": 0.0}, {"alpha": 0.3, "first_bn": 5.0}, {"tv": 0.7},
        {"l2": 0.4}, {"prune": {0: 0.25, 2: 0.5}, "ce": 2.0, "tv": 0.1, "l2": 0.1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("pruned", [False, True])
def test_data_loss_matches_plain_terms(changes, pruned):
    cfg, vit, prior = config(**changes), toys.vit().double(), toys.prior().double()
    loras = [toys.lora(i).to(torch.float64) for i in range(2)]
    images = torch.randn(2, 6, 3, SIDE, SIDE, generator=toys.generator(3), dtype=torch.float64)
    loss, ce, _ = data_loss(
        vit, prior, images, LoRAStack.of(loras), torch.stack([x.head.weight for x in loras]),
        torch.stack([x.head.bias for x in loras]), torch.arange(3).repeat_interleave(2), cfg,
        pruned,
    )  # fmt: skip
    for g in range(2):
        expected, expected_ce = plain_loss(vit, prior, loras[g], images[g], cfg, pruned)
        # the prior keeps float32 statistics; both sides read the same ones
        torch.testing.assert_close(loss[g], expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(ce[g], expected_ce, rtol=1e-10, atol=0)


def test_the_backbone_sees_shrunk_images_and_the_prior_whole_ones():
    cfg, vit, prior = config(alpha=0.5), toys.vit().double(), toys.prior().double()
    loras = [toys.lora(i).to(torch.float64) for i in range(2)]
    images = torch.randn(2, 6, 3, SIDE, SIDE, generator=toys.generator(3), dtype=torch.float64)
    maps = shrink_table(SIDE, 4, 9).double()[[0, 5]]
    heads = [torch.stack([getattr(x.head, n) for x in loras]) for n in ("weight", "bias")]
    labels = torch.arange(3).repeat_interleave(2)
    _, ce, r_bn = data_loss(
        vit, prior, images, LoRAStack.of(loras), *heads, labels, cfg, False, shrink=maps
    )
    for g, side in enumerate((4, 9)):
        small = torch.nn.functional.interpolate(
            images[g], (side, side), mode="bilinear", antialias=True
        )
        seen = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bicubic")
        expected = plain_loss(vit, None, loras[g], seen, cfg, False)[1]
        torch.testing.assert_close(ce[g], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(r_bn[g], prior(images[g] * 0.5 + 0.5)[0])


def test_gradient_through_jitter_pruning_and_prior_matches_finite_differences():
    group = make(2, dtype=torch.float64, prune_from=0.0)
    before = group.images.clone()
    rows, columns = group.jitter.index(torch.tensor([0]), SIDE)
    assert not torch.equal(gather_pixels(before, rows, columns), before)  # there is jitter
    group.step()
    gradient = group.images.grad

    def total(images):
        losses = []
        for g, lora in enumerate(group.loras):
            seen = torch.roll(images[g], tuple(group.jitter.shift[0, g].tolist()), (-2, -1))
            seen = seen.flip(-1) if group.jitter.flip[0, g] else seen
            losses.append(plain_loss(group.vit, group.prior, lora, seen, group.config, True)[0])
        return sum(losses)

    with torch.no_grad():
        places = torch.randperm(before.numel(), generator=toys.generator(0))[:25].tolist()
        for place in places:
            step = torch.zeros_like(before)
            step.view(-1)[place] = 1e-5
            slope = (total(before + step) - total(before - step)) / 2e-5
            # central differences: 1e-5^2 of curvature and 1e-16 / 1e-5 of rounding
            assert gradient.view(-1)[place].item() == pytest.approx(
                slope.item(), rel=1e-5, abs=1e-8
            )
    assert gradient.view(-1)[places].abs().max() > 1e-4


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_inversion_matches_a_plain_loop(schedule):
    """Noise, roll, flip, pruning, Adam and clipping, written out for one task."""
    cfg = config(iterations=6, schedule=schedule, prune_from=0.5)
    group = make(1, dtype=torch.float64, iterations=6, schedule=schedule, prune_from=0.5, tasks=[4])
    lora = group.loras[0]
    g = task_generator(0, 4)
    x = torch.randn(6, 3, SIDE, SIDE, generator=g).double().clamp(-1, 1)  # mean and std are 1/2
    shifts = torch.randint(-2, 3, (6, 2), generator=g)
    flips = torch.rand(6, generator=g) < 0.5
    m = v = torch.zeros_like(x)
    for t in range(6):
        leaf = x.clone().requires_grad_()
        seen = torch.roll(leaf, tuple(shifts[t].tolist()), (-2, -1))
        seen = seen.flip(-1) if flips[t] else seen
        loss, _ = plain_loss(group.vit, group.prior, lora, seen, cfg, pruned=t >= 3)
        (gradient,) = torch.autograd.grad(loss, leaf)
        m = 0.5 * m + 0.5 * gradient
        v = 0.99 * v + 0.01 * gradient**2
        lr = 0.25 * ((1 + math.cos(math.pi * t / 6)) / 2 if schedule == "cosine" else 1)
        unbiased = m / (1 - 0.5 ** (t + 1)), v / (1 - 0.99 ** (t + 1))
        x = (x - lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)).clamp(-1, 1)
        got = group.step()["loss"].item()
        assert got == pytest.approx(loss.item(), rel=1e-8)
    # where a gradient is near Adam's 1e-8, roundings of 1e-16 grow by 1e8 a step
    torch.testing.assert_close(group.images[0], x, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ tasks side by side


def curves(group):
    rows = []
    while not group.done:
        rows.append(group.step()["loss"])
    return torch.stack(rows, 1)  # (G, iterations)


def test_tasks_in_one_batch_give_the_loss_of_each_alone():
    together = curves(make(3, iterations=10))
    for i in range(3):
        torch.testing.assert_close(
            together[i], curves(make(tasks=[i], iterations=10))[0], rtol=1e-4, atol=1e-4
        )
    assert (together[0] - together[1]).abs().min() > 1e-2  # they are different tasks


def test_no_loss_depends_on_the_company():
    base = curves(make(tasks=[0, 1], iterations=6))
    other = curves(make(tasks=[0, 2], iterations=6))
    torch.testing.assert_close(base[0], other[0], rtol=1e-4, atol=1e-4)
    assert (base[1] - other[1]).abs().min() > 1e-2


def test_a_lora_alone_is_merged_and_changes_nothing():
    """As the backends but the reference have it; in a group of two none is."""
    plain = make(tasks=[1], iterations=6, dtype=torch.float64)
    merged = make(tasks=[1], iterations=6, dtype=torch.float64)
    merged.merges = True
    merged._gather_tasks()
    assert merged._given is None
    qkv = [group._sized.blocks[0].qkv.weight for group in (plain, merged)]
    assert not torch.equal(*qkv)
    torch.testing.assert_close(curves(merged), curves(plain), rtol=1e-6, atol=1e-6)
    two = make(tasks=[0, 1], iterations=6)
    two.merges = True
    two._gather_tasks()
    assert two._given is two.stack


def test_gradient_of_a_task_reaches_no_other_image():
    group = make(2, dtype=torch.float64)
    images = group.images.clone().requires_grad_()
    loss, _, _ = data_loss(
        group.vit, group.prior, images, group.stack, group.heads, group.biases, group.labels,
        group.config, True,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss[0], images)
    assert gradient[0].any()
    assert not gradient[1].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 3), min_size=1, max_size=14), st.integers(1, 6))
def test_groups_cover_the_bank_with_heads_of_one_size(ways, size):
    bank = [SimpleNamespace(head=SimpleNamespace(classes=w, normalised=False)) for w in ways]
    drawn = list(groups(bank, size))
    assert sorted(i for group in drawn for i in group) == list(range(len(ways)))
    for group in drawn:
        assert 1 <= len(group) <= size
        assert group == sorted(group)
        assert len({ways[i] for i in group}) == 1


def test_groups_are_of_one_shape_where_that_costs_little():
    shapes = {(count, size): [len(g) for g in groups([toys.lora(0)] * count, size)]
              for count, size in ((8, 4), (9, 4), (7, 4), (5, 4), (3, 8))}  # fmt: skip
    assert shapes[8, 4] == [4, 4]
    assert shapes[9, 4] == [3, 3, 3]
    assert shapes[7, 4] == [4, 3]  # 7 is prime
    assert shapes[5, 4] == [4, 1]
    assert shapes[3, 8] == [3]


# ------------------------------------------------------------------ what comes out


def test_cross_entropy_falls_and_images_stay_in_range():
    group = make(2, iterations=40, prune={}, lr=0.05)
    first = group.step()["ce"]
    while not group.done:
        last = group.step()["ce"]
        assert group.images.min() >= -1
        assert group.images.max() <= 1
    assert (last < 0.2 * first).all()


def test_r_bn_falls_without_cross_entropy():
    group = make(1, iterations=40, ce=0.0, alpha=1.0, lr=0.05)
    first = group.step()["r_bn"]
    while not group.done:
        last = group.step()["r_bn"]
    assert (last < 0.8 * first).all()


def test_pruning_starts_after_its_share_of_the_iterations():
    for prune_from, expected in ((0.5, "0011"), (0.0, "1111"), (1.0, "0000"), (0.3, "0011")):
        group, seen = make(1, iterations=4, prune_from=prune_from), []
        loss = group._loss

        def record(*arguments, seen=seen, loss=loss):
            seen.append(str(int(arguments[8])))
            return loss(*arguments)

        group._loss = record
        curves(group)
        assert "".join(seen) == expected


def test_last_iterate_is_returned_as_rounded_pixels():
    """Not the best one: with this rate the loss goes up and down."""
    group = make(2, iterations=12, lr=0.5)
    losses = curves(group)
    assert (losses[:, -1] > losses.min(1).values).any()
    parts = group.finish()
    for g, part in enumerate(parts):
        expected = ((group.images[g].double() * 0.5 + 0.5) * 255).round()
        assert part.images.dtype == torch.uint8
        assert torch.equal(part.images.double(), expected)
        assert part.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert part.task == g
        assert part.class_names == group.loras[g].class_names


def test_teacher_logits_are_the_whole_network_on_the_rounded_images():
    group = make(2)
    curves(group)
    for part, lora in zip(group.finish(batch_size=4), group.loras):
        images = (part.images.float() / 255 - 0.5) / 0.5
        features = merged(group.vit, lora)(images)  # no pruning: the teacher sees all patches
        expected = features @ lora.head.weight.T + lora.head.bias
        torch.testing.assert_close(part.teacher_logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prune", [{}, {1: 0.5}, {0: 0.25, 2: 0.5}, {2: 0.75}])
def test_order_of_patches_has_the_survivors_first(prune):
    group = make(1, prune=prune, iterations=3)
    curves(group)
    (part,) = group.finish(batch_size=4)
    net = merged(group.vit, group.loras[0])
    images = (part.images.float() / 255 - 0.5) / 0.5
    whole = net.encode(images).cls_scores
    pruned = net.encode(images, prune=prune or None)
    assert part.survivors == pruned.kept.shape[1]
    for b in range(6):
        order = part.order[b].tolist()
        assert sorted(order) == list(range(16))
        kept, rest = order[: part.survivors], order[part.survivors :]
        assert sorted(kept) == pruned.kept[b].tolist()
        assert rest == sorted(rest, key=lambda i, b=b: -whole[b, i])
        if not prune:
            assert kept == sorted(kept, key=lambda i, b=b: -whole[b, i])
        elif pruned.cls_scores.shape[1] == part.survivors:  # the last block does not prune
            score = dict(zip(pruned.kept[b].tolist(), pruned.cls_scores[b].tolist()))
            assert kept == sorted(kept, key=lambda i, score=score: -score[i])


def test_heads_without_bias():
    vit = toys.vit()
    bare, zero = toys.lora(0, bias=False), toys.lora(0)
    zero = replace(zero, head=replace(bare.head, bias=torch.zeros(3)))
    parts = [invert(vit, [x], None, config(iterations=2))[0] for x in (bare, zero)]
    assert torch.equal(parts[0].images, parts[1].images)
    assert torch.equal(parts[0].teacher_logits, parts[1].teacher_logits)


# ------------------------------------------------------------------ randomness, resuming


def same(one, other):
    return all(
        torch.equal(a.images, b.images)
        and torch.equal(a.order, b.order)
        and torch.equal(a.teacher_logits, b.teacher_logits)
        for a, b in zip(one, other, strict=True)
    )


def test_same_seed_same_result_and_other_seed_another():
    vit, bank, prior = toys.vit(), toys.bank(3), toys.prior()
    one = invert(vit, bank, prior, config(), seed=5)
    assert same(one, invert(vit, bank, prior, config(), seed=5))
    other = invert(vit, bank, prior, config(), seed=6)
    assert not any(torch.equal(a.images, b.images) for a, b in zip(one, other))


def test_streams_of_neighbouring_seeds_and_tasks_differ():
    first = {
        (s, t): torch.rand(1, generator=task_generator(s, t)).item()
        for s in range(30)
        for t in range(30)
    }
    assert len(set(first.values())) == len(first)


def test_networks_are_left_as_they_were():
    vit, bank, prior = toys.vit(), toys.bank(2), toys.prior()
    before = {k: x.clone() for k, x in (vit.state_dict() | prior.state_dict()).items()}
    factors = [x.clone() for lora in bank for x in lora.tensors()]
    invert(vit, bank, prior, config())
    after = vit.state_dict() | prior.state_dict()
    assert all(torch.equal(x, after[k]) for k, x in before.items())
    assert all(map(torch.equal, factors, [x for lora in bank for x in lora.tensors()]))


class Stop:
    """Asks to stop once, when called for the n-th time."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self):
        self.calls += 1
        return self.calls == self.at


@pytest.mark.parametrize("at", [1, 5, 8, 9, 12])  # 8 is a group's last iteration
def test_stopped_and_resumed_is_bit_equal(tmp_path, at):
    vit, bank, prior = toys.vit(), toys.bank(4), toys.prior()
    cfg = config(checkpoint_every=3)
    whole = invert(vit, bank, prior, cfg)
    with pytest.raises(KeyboardInterrupt):
        invert(vit, bank, prior, cfg, folder=tmp_path, stop=Stop(at))
    steps = []
    resumed = invert(
        vit, bank, prior, cfg, folder=tmp_path, on_step=lambda done, _: steps.append(done)
    )
    assert same(whole, resumed)
    assert len(steps) == 16 - at  # nothing is done twice: 2 groups of 8 iterations
    assert steps[-1] == 32
    assert same(whole, [TaskImages.load(task_file(tmp_path, i)) for i in range(4)])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "pool.json",
        *(f"task-00000{i}.safetensors" for i in range(4)),
    ]
    again = invert(vit, bank, prior, cfg, folder=tmp_path, stop=lambda: pytest.fail("no work left"))
    assert same(whole, again)


def test_checkpoint_of_another_group_is_not_taken(tmp_path):
    path = tmp_path / "x.safetensors"
    group = make(tasks=[0, 1])
    group.step()
    group.save(path)
    other = make(tasks=[2, 3])
    before = other.images.clone()
    assert not other.restore(path)
    assert other.iteration == 0
    assert torch.equal(other.images, before)


def test_losses_are_reported_now_and_then():
    seen = {}
    invert(
        toys.vit(), toys.bank(1), toys.prior(), config(iterations=25),
        on_step=lambda done, values: seen.update({done: values}),
    )  # fmt: skip
    assert list(seen) == list(range(1, 26))
    assert [done for done, values in seen.items() if values] == [20, 25]
    assert set(seen[25]) == {"loss", "ce", "r_bn"}


# ------------------------------------------------------------------ bad input


def refused(match, bank, vit=None, **changes):
    with pytest.raises(ValueError, match=match):
        invert(vit or toys.vit(), bank, None, config(**changes))


def test_rejects_loras_without_heads_and_of_other_models():
    headless = replace(toys.lora(1), head=None)
    refused("0001: inversion needs the LoRA's classification head.*head.safetensors", [headless])
    wide = replace(toys.CONFIG, width=32)
    refused("belongs to another model", [toys.lora(0, config=wide)])
    deep = replace(toys.CONFIG, depth=4)
    refused("made for 4 blocks, the backbone has 3", [toys.lora(0, config=deep)])
    bad = toys.lora(0)
    bad.a["q"][0, 0, 0] = float("nan")
    refused("weights on q hold NaN", [bad])
    bad = toys.lora(0)
    bad.head.weight[0, 0] = float("inf")
    refused("the head holds NaN or infinity", [bad])
    refused("3 classes, but 2 class names", [replace(toys.lora(0), class_names=("a", "b"))])
    mixed = [toys.lora(0, 2), toys.lora(1, 3)]
    with pytest.raises(ValueError, match=r"heads of one size expected, got \[2, 3\]"):
        InversionGroup(toys.vit(), mixed, [0, 1], None, config())
    refused(r"prune: blocks are integers in \[0, 2\], got 3", toys.bank(1), prune={3: 0.5})
    refused("ratio of block 1", toys.bank(1), prune={1: 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations: must be >= 1, got 0"),
        ({"images_per_class": 0}, "images_per_class: must be >= 1"),
        ({"lr": 0.0}, "lr: must be positive"),
        ({"alpha": -1.0}, "alpha: must not be negative, got -1.0"),
        ({"prune_from": 1.5}, r"prune_from: must be in \[0, 1\]"),
        ({"jitter": 0.6}, r"jitter: must be in \[0, 0.5\]"),
        ({"lr": float("nan")}, "lr: must be positive"),
    ],
)
def test_rejects_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        InversionConfig(**changes)


def test_mixed_heads_are_inverted_in_groups_and_come_back_in_order():
    bank = LoRABank([toys.lora(i, ways) for i, ways in enumerate((3, 2, 3))])
    parts = invert(toys.vit(), bank, toys.prior(), config(iterations=2))
    assert [p.task for p in parts] == [0, 1, 2]
    assert [p.teacher_logits.shape[1] for p in parts] == [3, 2, 3]

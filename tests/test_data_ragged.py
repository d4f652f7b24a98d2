"""Meta-Dataset's tasks: the published rules, on random label sets, and that a seed freezes them."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest

from fastrecycle.data import Groups, TaskSizes, meta_dataset_episodes
from fastrecycle.data.ragged import support_shots


def label_set(seed, classes=30, least=2, most=200):
    rng = np.random.default_rng(seed)
    counts = rng.integers(least, most + 1, classes)
    return rng.permutation(np.repeat(np.arange(classes), counts)), counts


def in_turn(tasks):
    return [tasks.task(number) for number in range(len(tasks))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", [5, 30, 80])
def test_every_task_obeys_the_published_bounds(seed, classes):
    labels, counts = label_set(seed, classes)
    for task in in_turn(meta_dataset_episodes(labels, 100, seed)):
        ways = len(task.classes)
        assert 5 <= ways <= min(50, classes)
        assert len(set(task.classes)) == ways
        of_task = counts[task.classes]
        queries = np.bincount(task.query_ways, minlength=ways)
        assert set(queries) == {min(10, of_task.min() // 2)}
        assert task.shots.min() >= 1
        assert (task.shots + queries <= of_task).all()
        assert len(task.support) <= 500
        # images are of their class, and none is used twice
        assert (labels[task.support] == task.classes[task.support_ways]).all()
        assert (labels[task.query] == task.classes[task.query_ways]).all()
        assert len({*task.support, *task.query}) == len(task.support) + len(task.query)
        assert (np.diff(task.support_ways) >= 0).all()


def paper_shots(counts, queries, beta, alphas):
    """App. B as it stands there, class by class; beta in (0, 1]."""
    left = [n - queries for n in counts]
    size = min(500, sum(math.ceil(beta * min(100, n)) for n in left))
    weights = [math.exp(a) * n for a, n in zip(alphas, counts, strict=True)]
    return [
        min(math.floor(w / sum(weights) * (size - len(counts))) + 1, n)
        for w, n in zip(weights, left, strict=True)
    ]


@pytest.mark.parametrize("seed", range(50))
def test_shots_are_the_paper_s_formula(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 1000, rng.integers(5, 51))
    queries = min(10, counts.min() // 2)
    beta, noise = rng.random(), rng.random(len(counts))
    alphas = [math.log(0.5) + u * (math.log(2) - math.log(0.5)) for u in noise]
    got = support_shots(counts, queries, beta, noise, TaskSizes())
    # 1 + floor(x) is ceil(x) but at whole numbers, which a random beta does not meet
    assert got.tolist() == paper_shots(counts.tolist(), queries, beta, alphas)


def test_shots_at_the_ends_of_beta():
    counts = np.array([30, 200, 1000, 1000, 1000])
    noise = np.full(5, 0.5)  # a_c = 0: classes weigh as their sizes
    assert support_shots(counts, 10, 0.0, noise, TaskSizes()).tolist() == [1] * 5
    most = support_shots(counts, 10, 1 - 1e-9, noise, TaskSizes())
    # 20 + 4 x 100 images, of which 415 are shared out by size
    assert most.tolist() == [1 + int(415 * n / 3230) for n in counts]


def test_ways_are_uniform():
    labels, _ = label_set(0, classes=12, least=4, most=9)
    ways = Counter(len(t.classes) for t in in_turn(meta_dataset_episodes(labels, 4000, 0)))
    assert sorted(ways) == list(range(5, 13))
    # 500 each; the bound is over four standard deviations (21) away
    assert all(410 < n < 590 for n in ways.values())


def test_classes_and_images_are_uniform():
    labels = np.repeat(np.arange(10), 20)
    tasks = meta_dataset_episodes(labels, 2000, 1)
    classes = np.bincount(tasks.classes)
    assert classes.max() / classes.min() < 1.1
    first = np.array([t.classes[0] for t in in_turn(tasks)])
    assert np.bincount(first, minlength=10).min() > 140  # 200 expected: no order of classes
    query = np.bincount(tasks.query, minlength=200)  # 10 of the 20 images of each class
    assert query.max() / query.min() < 1.25


def test_support_sizes_follow_a_simulation_by_numpy():
    labels, counts = label_set(3, classes=20, least=10, most=300)
    got = np.array([len(t.support) for t in in_turn(meta_dataset_episodes(labels, 3000, 0))])
    rng = np.random.default_rng(0)
    simulated = []
    for _ in range(3000):
        chosen = rng.choice(counts, rng.integers(5, 21), replace=False)
        queries = min(10, chosen.min() // 2)
        alphas = rng.uniform(-math.log(2), math.log(2), len(chosen))
        simulated.append(sum(paper_shots(chosen.tolist(), queries, 1 - rng.random(), alphas)))
    from scipy.stats import ks_2samp

    assert ks_2samp(got, simulated).pvalue > 0.01


def test_few_of_many_images_are_drawn_uniformly():
    # more than eight times the draw: the other way of drawing
    labels = np.repeat(np.arange(5), 1000)
    tasks = meta_dataset_episodes(labels, 400, 0)
    assert max(len(t.support) for t in in_turn(tasks)) <= 500
    tenths = np.bincount(tasks.query % 1000 // 100)
    assert tasks.query_starts[-1] == 400 * 50
    assert 1830 < tenths.min() <= tenths.max() < 2170  # 2000, standard deviation 42
    for task in in_turn(tasks):
        assert len({*task.support, *task.query}) == len(task.support) + len(task.query)


def test_tasks_of_groups_stay_in_one_group():
    labels = np.repeat(np.arange(20), 20)
    groups = Groups((tuple(range(4)), tuple(range(4, 12)), tuple(range(12, 20))), "uniform")
    tasks = in_turn(meta_dataset_episodes(labels, 600, 0, groups=groups))
    halves = Counter(min(t.classes) >= 12 for t in tasks)
    assert all(set(t.classes) <= set(range(4, 12)) or min(t.classes) >= 12 for t in tasks)
    assert 230 < halves[True] < 370  # 300, standard deviation 12: the first is too small
    assert {len(t.classes) for t in tasks} == set(range(5, 9))


def test_branches_give_all_of_their_classes():
    labels = np.repeat(np.arange(80), 4)
    groups = Groups((tuple(range(7)), tuple(range(80))), "all")
    tasks = in_turn(meta_dataset_episodes(labels, 60, 0, groups=groups))
    assert {len(t.classes) for t in tasks} == {7, 50}
    few = next(t for t in tasks if len(t.classes) == 7)
    assert sorted(few.classes) == list(range(7))


def test_tasks_are_frozen_by_seed():
    # Reported accuracies rest on this list: a change of it is a change of protocol.
    labels = np.repeat(np.arange(30), np.arange(30, 60))
    tasks = meta_dataset_episodes(labels, 600, 0)
    joined = b"".join(
        a.astype("<i8").tobytes()
        for a in (tasks.support, tasks.support_ways, tasks.query, tasks.query_ways, tasks.classes)
    )
    assert (
        hashlib.sha256(joined).hexdigest()
        == "2105b7333cf0547d45f5f27903503882bfbd6286a61e7450f2852081c4a13360"
    )


def test_longer_lists_begin_with_shorter_ones_and_seeds_differ():
    labels, _ = label_set(5)
    short, long = (meta_dataset_episodes(labels, n, 7) for n in (3, 30))
    for number in range(3):
        assert np.array_equal(short.task(number).support, long.task(number).support)
        assert np.array_equal(short.task(number).query, long.task(number).query)
    other = meta_dataset_episodes(labels, 3, 8)
    assert not np.array_equal(other.support, short.support)


def test_images_are_each_listed_once():
    labels, _ = label_set(6)
    tasks = meta_dataset_episodes(labels, 10, 0)
    assert np.array_equal(tasks.images, np.unique(np.hstack([tasks.support, tasks.query])))
    assert len(tasks) == 10


def test_small_classes_and_few_classes_are_rejected():
    with pytest.raises(ValueError, match=r"class 'fox' has 1 image, .*min_images=2"):
        meta_dataset_episodes([0, 0, 1], 1, 0, class_names=["cat", "fox"])
    labels = np.repeat(np.arange(6), [4, 4, 4, 4, 1, 1])
    with pytest.raises(ValueError, match="at least 5 classes, the data set has 4; lower min_ways"):
        meta_dataset_episodes(labels, 1, 0, min_images=2)
    tasks = meta_dataset_episodes(labels, 9, 0, min_images=2, sizes=TaskSizes(min_ways=2))
    assert max(tasks.classes) == 3
    with pytest.raises(ValueError, match="in one group"):
        meta_dataset_episodes(labels, 1, 0, min_images=2, groups=Groups(((0, 1),), "all"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"tasks": 1.5}, "tasks must be an integer, got 1.5"),
        ({"seed": 2**64}, "seed must be below"),
        ({"min_images": -1}, "min_images must be at least 0"),
    ],
)
def test_counts_out_of_range_are_rejected(options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        meta_dataset_episodes(np.repeat(np.arange(5), 4), **{"tasks": 1, "seed": 0, **options})


def test_sizes_that_contradict_are_rejected():
    with pytest.raises(ValueError, match="min_ways <= max_ways <= max_support, got 5, 50, 20"):
        TaskSizes(max_support=20)
    with pytest.raises(ValueError, match="max_queries must be at least 1, got 0"):
        TaskSizes(max_queries=0)

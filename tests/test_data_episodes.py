"""Tasks: counts, disjointness, uniformity, and that a seed freezes them."""

import hashlib

import numpy as np
import pytest
import torch

from fastrecycle.data import episodes

LABELS = np.repeat(np.arange(10), 30)


def digest(tasks):
    joined = b"".join(
        a.astype("<i8").tobytes() for a in (tasks.support, tasks.query, tasks.classes)
    )
    return hashlib.sha256(joined).hexdigest()


def test_episodes_have_the_shapes_asked_for():
    tasks = episodes(LABELS, ways=5, shots=2, queries=7, tasks=20, seed=0)
    assert len(tasks) == 20
    assert tasks.support.shape == (20, 10)
    assert tasks.query.shape == (20, 35)
    assert tasks.classes.shape == (20, 5)
    assert {a.dtype for a in (tasks.support, tasks.query, tasks.classes)} == {np.dtype(np.int64)}


def test_episodes_rows_are_class_major():
    shuffled = np.random.default_rng(0).permutation(LABELS)
    tasks = episodes(shuffled, ways=5, shots=2, queries=7, tasks=20, seed=0)
    np.testing.assert_array_equal(shuffled[tasks.support], tasks.classes[:, tasks.support_ways])
    np.testing.assert_array_equal(shuffled[tasks.query], tasks.classes[:, tasks.query_ways])


def test_episodes_never_repeat_an_image_or_class_within_a_task():
    # Classes of exactly shots + queries images: each task uses all of them.
    tasks = episodes(np.repeat(np.arange(5), 6), ways=5, shots=1, queries=5, tasks=50, seed=3)
    for support, query, classes in zip(tasks.support, tasks.query, tasks.classes, strict=True):
        assert sorted([*support, *query]) == list(range(30))
        assert sorted(classes) == list(range(5))


def test_episodes_draw_classes_and_images_uniformly():
    tasks = episodes(LABELS, ways=5, shots=1, queries=2, tasks=2000, seed=1)
    # 1000 and 100 expected; the bounds are over four standard deviations away (22.4, 9.5).
    classes = np.bincount(tasks.classes.ravel(), minlength=10)
    assert 900 < classes.min() <= classes.max() < 1100
    images = np.bincount(np.concatenate([tasks.support, tasks.query], 1).ravel(), minlength=300)
    assert 60 < images.min() <= images.max() < 140
    assert np.bincount(tasks.classes[:, 0], minlength=10).min() > 140  # no order of classes: 200


def test_episodes_are_frozen_by_seed():
    # Reported accuracies rest on this list: a change of it is a change of protocol.
    tasks = episodes(LABELS, ways=5, shots=1, queries=15, tasks=600, seed=0)
    assert digest(tasks) == "dc6e0a26295c9919eb8eb46525919cdbc02a0bc09dc55b2fe6d40ef7609b1afb"


def test_episodes_differ_between_seeds():
    first, second = (episodes(LABELS, 5, 1, 5, tasks=10, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first.support, second.support)


def test_episodes_task_does_not_depend_on_the_number_of_tasks():
    short, long = (episodes(LABELS, 5, 1, 5, tasks=tasks, seed=7) for tasks in (3, 30))
    np.testing.assert_array_equal(short.support, long.support[:3])
    np.testing.assert_array_equal(short.query, long.query[:3])


def test_episodes_images_are_each_listed_once():
    tasks = episodes(LABELS, 5, 1, 15, tasks=100, seed=0)
    assert np.array_equal(tasks.images, np.unique(np.hstack([tasks.support, tasks.query])))


def test_episodes_take_tensors_and_no_queries():
    tasks = episodes(torch.from_numpy(LABELS), 5, 1, 0, tasks=2, seed=2**64 - 1)
    assert tasks.query.shape == (2, 0)


def test_episodes_min_images_leaves_small_classes_out():
    labels = np.concatenate([LABELS, [10, 10]])
    with pytest.raises(ValueError, match=r"class 10 has 2 images.*= 6.*min_images=6"):
        episodes(labels, 5, 1, 5, tasks=50, seed=0)
    tasks = episodes(labels, 5, 1, 5, tasks=50, seed=0, min_images=6)
    np.testing.assert_array_equal(tasks.support, episodes(LABELS, 5, 1, 5, 50, 0).support)


def test_episodes_names_the_class_that_is_too_small():
    with pytest.raises(ValueError, match="class 'fox' has 1 images, a task takes 1 shots"):
        episodes([0, 0, 1], 2, 1, 1, tasks=1, seed=0, class_names=["cat", "fox"])


def test_episodes_rejects_more_ways_than_classes():
    with pytest.raises(ValueError, match="11 ways need at least 11 classes, the data set has 10"):
        episodes(LABELS, 11, 1, 5, tasks=1, seed=0)
    with pytest.raises(ValueError, match="has 0 with at least 31 images"):
        episodes(LABELS, 5, 1, 5, tasks=1, seed=0, min_images=31)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("ways", 0, "ways must be at least 1, got 0"),
        ("shots", 0, "shots must be at least 1"),
        ("queries", -1, "queries must be at least 0"),
        ("tasks", 0, "tasks must be at least 1"),
        ("seed", -1, "seed must be at least 0"),
        ("seed", 2**64, "seed must be below"),
        ("shots", 1.5, "shots must be an integer, got 1.5"),
        ("ways", True, "ways must be an integer"),
    ],
)
def test_episodes_rejects_counts_out_of_range(option, value, error):
    options = {"ways": 5, "shots": 1, "queries": 5, "tasks": 1, "seed": 0} | {option: value}
    with pytest.raises((ValueError, TypeError), match=error):
        episodes(LABELS, **options)


@pytest.mark.parametrize("labels", [[], ["cat", "dog"], np.zeros((3, 2), int), [0.0, 1.0]])
def test_episodes_rejects_labels_that_are_no_integers(labels):
    with pytest.raises(ValueError, match="labels must be a non-empty"):
        episodes(labels, 1, 1, 1, tasks=1, seed=0)

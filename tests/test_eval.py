"""Fine-tuning-free evaluation against scikit-learn's nearest centroid on the same features."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from sklearn.neighbors import NearestCentroid

from fastrecycle.data import Groups, episodes, load_dataset, meta_dataset_episodes
from fastrecycle.eval import (
    Pixels,
    Result,
    decode,
    embed,
    evaluate,
    evaluate_meta_dataset,
    score_episodes,
)

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
SHAPE = {"ways": 3, "shots": 2, "queries": 4, "tasks": 20}


def pictures(classes=5, per_class=10, noise=60, side=16, seed=0):
    """Noisy images around one colour a class: (images, labels)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    colour = rng.integers(90, 166, (classes, 1, 1, 3))[labels]
    noisy = colour + rng.integers(-noise, noise + 1, (len(labels), side, side, 3))
    return noisy.astype(np.uint8), labels


def write_folder(root, images, labels, split="test"):
    for i, (image, label) in enumerate(zip(images, labels)):
        folder = root / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:04d}.png")


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("with_lora", [False, True])
def test_every_task_matches_scikit_learn(shots, with_lora):
    vit, lora = toys.vit(), toys.lora() if with_lora else None
    images, labels = pictures()
    shape = {**SHAPE, "shots": shots}
    result = evaluate(vit, lora, (images, labels), seed=3, **shape)
    tasks = episodes(labels, *shape.values(), 3)
    with torch.no_grad():
        features = vit(vit.transform([Image.fromarray(i) for i in images]), lora).numpy()
    scores = []
    for t in range(20):
        with np.errstate(invalid="ignore"):  # one image a class has no spread, as it remarks
            centroids = NearestCentroid().fit(features[tasks.support[t]], tasks.support_ways)
        scores.append(100 * centroids.score(features[tasks.query[t]], tasks.query_ways))
    assert result.per_task == pytest.approx(np.array(scores))
    assert result.accuracy == pytest.approx(np.mean(scores))
    assert 45 < result.accuracy < 100  # neither chance (33) nor trivial: the test can tell


def test_lora_changes_the_result_and_pairing_uses_the_same_tasks():
    vit, data = toys.vit(), pictures()
    plain, other = (evaluate(vit, lora, data, **SHAPE) for lora in (None, toys.lora()))
    gap = other.minus(plain)
    assert gap.per_task == pytest.approx(other.per_task - plain.per_task)
    assert gap.accuracy == pytest.approx(other.accuracy - plain.accuracy)
    spread = np.std(other.per_task - plain.per_task, ddof=1)
    assert gap.ci95 == pytest.approx(1.96 * spread / math.sqrt(20))
    assert gap.per_task.any()


def test_pairing_narrows_the_interval():
    """Two LoRAs that differ little are right and wrong on the same tasks."""
    vit, data, lora = toys.vit(), pictures(), toys.lora()
    near = replace(lora, b={t: 1.1 * x for t, x in lora.b.items()})
    one, other = (evaluate(vit, x, data, **{**SHAPE, "tasks": 60}) for x in (lora, near))
    gap = other.minus(one)
    assert gap.per_task.any()
    # independent task lists would give the root of the summed squares
    assert gap.ci95 < 0.7 * math.hypot(one.ci95, other.ci95)


def test_random_labels_give_chance_within_the_interval():
    images, labels = pictures(classes=4, per_class=60, noise=60)
    labels = np.random.default_rng(5).permutation(labels)
    result = evaluate(toys.vit(), None, (images, labels), ways=4, shots=1, queries=10, tasks=300)
    # tasks share 240 images, so they vary together by more than the interval says: three of them
    assert abs(result.accuracy - 25) < 3 * result.ci95
    assert result.ci95 < 1.5
    # the right labels are far above
    right = evaluate(toys.vit(), None, pictures(4, 60), ways=4, shots=1, queries=10, tasks=300)
    assert right.accuracy > 25 + 10 * right.ci95


def test_interval_is_its_formula():
    scores = np.array([50.0, 70.0, 90.0, 40.0])
    result = Result.of(scores)
    assert result.accuracy == 62.5
    deviation = math.sqrt(sum((s - 62.5) ** 2 for s in scores) / 3)
    assert result.ci95 == pytest.approx(1.96 * deviation / 2)
    assert str(result) == f"62.50 ± {result.ci95:.2f} %"
    assert math.isnan(Result.of(scores[:1]).ci95)  # one task has no spread
    with pytest.raises(ValueError, match="same tasks expected, got 4 and 3"):
        result.minus(Result.of(scores[:3]))


def test_same_seed_same_result_and_other_seed_other_tasks():
    vit, data = toys.vit(), pictures()
    one = evaluate(vit, None, data, **SHAPE)
    assert np.array_equal(one.per_task, evaluate(vit, None, data, **SHAPE).per_task)
    other = evaluate(vit, None, data, seed=1, **SHAPE)
    assert not np.array_equal(one.per_task, other.per_task)
    short = evaluate(vit, None, data, **{**SHAPE, "tasks": 7})
    assert np.array_equal(one.per_task[:7], short.per_task)  # longer lists begin with shorter ones


def test_pixels_folder_zip_and_arrays_agree(tmp_path):
    vit, (images, labels) = toys.vit(), pictures(side=20)  # resized on the way
    write_folder(tmp_path / "set", images, labels)
    folder = tmp_path / "set"
    expected = evaluate(vit, None, (images, labels), **SHAPE)
    pixels = decode(vit, folder)
    assert isinstance(pixels, Pixels)
    assert pixels.pixels.dtype == torch.uint8
    assert pixels.pixels.shape == (50, 3, 16, 16)
    for source in (folder, str(folder), pixels, pixels.to("cpu"), load_dataset(folder)):
        got = evaluate(vit, None, source, batch_size=7, **SHAPE)
        # float32 features differ by the batch's shape: a query between two prototypes may turn
        assert np.abs(got.per_task - expected.per_task).sum() <= 100 / 12


def test_embed_keeps_the_order_of_indices_and_reports():
    vit, (images, labels) = toys.vit(), pictures()
    pixels = decode(vit, (images, labels))
    indices = np.array([31, 2, 2, 49, 0])
    seen = []
    features = embed(
        vit, None, pixels, indices, batch_size=2, progress=lambda *done: seen.append(done)
    )
    whole = embed(vit, None, load_dataset((images, labels)))
    # another shape of batch: another order of summation over some hundred terms near 1
    torch.testing.assert_close(features, whole[torch.from_numpy(indices)], rtol=1e-5, atol=1e-5)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert not features.requires_grad


def test_images_are_embedded_once_and_only_those_that_tasks_use(monkeypatch):
    vit, data = toys.vit(), pictures()
    counts, forward = [], vit.forward
    monkeypatch.setattr(
        vit, "forward", lambda x, *a, **k: counts.append(len(x)) or forward(x, *a, **k)
    )
    evaluate(vit, None, data, ways=2, shots=1, queries=1, tasks=3)
    used = episodes(data[1], 2, 1, 1, 3, 0).images
    assert sum(counts) == len(used) < 50


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_distances_of_prototypes(distance):
    features = torch.randn(50, 6, generator=toys.generator(0))
    labels = np.repeat(np.arange(5), 10)
    tasks = episodes(labels, 3, 2, 4, 10, 0)
    result = score_episodes(features, tasks, distance, batch=3)
    for t in range(10):
        centres = features[tasks.support[t]].reshape(3, 2, 6).mean(1)
        query = features[tasks.query[t]]
        if distance == "cosine":
            guess = torch.nn.functional.cosine_similarity(query[:, None], centres[None], dim=2)
        else:
            guess = -torch.cdist(query, centres)
        right = guess.argmax(1).numpy() == tasks.query_ways
        assert result.per_task[t] == pytest.approx(100 * right.mean())


def test_pruned_test_images_are_another_protocol():
    vit, data = toys.vit(), pictures()
    pixels = decode(vit, data)
    plain, pruned = (embed(vit, None, pixels, prune=p) for p in (None, {0: 0.75}))
    images = vit.normalise(pixels.pixels.float() / 255)
    torch.testing.assert_close(pruned, vit(images, prune={0: 0.75}), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, pruned, atol=1e-2)


def test_rejects_what_does_not_fit(tmp_path):
    vit, data = toys.vit(), pictures()
    with pytest.raises(ValueError, match="belongs to another model"):
        evaluate(vit, toys.lora(config=replace(toys.CONFIG, width=32)), data, **SHAPE)
    with pytest.raises(ValueError, match="6 ways need at least 6 classes, the data set has 5"):
        evaluate(vit, None, data, **{**SHAPE, "ways": 6})
    with pytest.raises(ValueError, match=r"has 10 images, a task takes 2 shots \+ 9 queries"):
        evaluate(vit, None, data, **{**SHAPE, "queries": 9})
    with pytest.raises(FileNotFoundError, match="neither a file or folder nor one of"):
        evaluate(vit, None, tmp_path / "absent", **SHAPE)
    small = decode(toys.vit(replace(toys.CONFIG, image_size=8)), data)
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 16, 16\)"):
        evaluate(vit, None, small, **SHAPE)
    nan = toys.lora()
    nan.b["v"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        evaluate(vit, nan, data, **SHAPE)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_varying_tasks_match_scikit_learn(distance):
    vit, (images, labels) = toys.vit(), pictures(classes=8, per_class=12)
    keep = np.concatenate([np.flatnonzero(labels == c)[: 4 + c] for c in range(8)])
    images, labels = images[keep], labels[keep]
    result = evaluate_meta_dataset(vit, None, (images, labels), tasks=20, distance=distance)
    tasks = meta_dataset_episodes(labels, 20, 0)
    with torch.no_grad():
        features = vit(vit.transform([Image.fromarray(i) for i in images])).numpy()
    for number in range(20):
        task = tasks.task(number)
        with np.errstate(invalid="ignore"):
            known = NearestCentroid().fit(features[task.support], task.support_ways)
        query = features[task.query]
        if distance == "cosine":
            unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, known.centroids_)]
            guess = (unit[0] @ unit[1].T).argmax(1)
        else:
            guess = known.predict(query)
        assert result.per_task[number] == pytest.approx(100 * (guess == task.query_ways).mean())
    assert 20 < result.accuracy < 100


def test_varying_tasks_take_decoded_images_and_groups():
    vit, data = toys.vit(), pictures(classes=12, per_class=6)
    pixels = decode(vit, data)
    plain = evaluate_meta_dataset(vit, None, data, tasks=15)
    assert plain.per_task == pytest.approx(
        evaluate_meta_dataset(vit, None, pixels, tasks=15).per_task, abs=100 / 15
    )
    grouped = replace(pixels, groups=Groups((tuple(range(5)), tuple(range(5, 12))), "all"))
    assert grouped.to("cpu").groups is grouped.groups
    other = evaluate_meta_dataset(vit, None, grouped, tasks=15)
    assert not np.array_equal(other.per_task, plain.per_task)

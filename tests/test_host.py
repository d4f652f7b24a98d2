"""Host work in C++ and in Python: both against the library's own code, to the last bit."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastrecycle_kernels import host
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrecycle.config import MetaConfig
from fastrecycle.data import episodes
from fastrecycle.metatrain import EpisodeSampler, keep_ladder
from fastrecycle.pruning import top_patches
from fastrecycle.vit import RaggedKeep

ROOT = Path(__file__).parents[1]
needs_extension = pytest.mark.skipif(
    not host.HAVE_EXTENSION, reason="the C++ extension is not built or turned off"
)
CODES = [pytest.param(True, marks=needs_extension, id="c++"), pytest.param(False, id="python")]
# A thread is only started for a millisecond of work: tests with THREADS are large enough for two.
THREADS = [1, 2, 7]


@pytest.fixture(params=CODES)
def code(request, monkeypatch):
    """Runs a test once with the extension and once without."""
    monkeypatch.setattr(host, "HAVE_EXTENSION", request.param)


def assert_equal(ours, expected):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(ours, expected)


# ------------------------------------------------------------------ top_k


def scores(kind, images=5, patches=67):
    rng = np.random.default_rng(len(kind))
    x = rng.standard_normal((images, patches)).astype(np.float32)
    match kind:
        case "softmax":
            x = np.exp(4 * x) / np.exp(4 * x).sum(1, keepdims=True)
        case "few values":
            x = x.round()
        case "constant":
            x[:] = 0.25
        case "zeros of both signs":
            x = np.where(x > 0, np.float32(0.0), np.float32(-0.0))
        case "denormal":
            x = x * np.float32(1e-44)
        case "neighbours":
            x = (np.float32(1).view(np.int32) + x.round().astype(np.int32)).view(np.float32)
        case "extremes":
            limits = np.finfo(np.float32)
            pool = [np.inf, -np.inf, np.nan, -np.nan, limits.max, limits.min, limits.tiny, 0, -0.0]
            x = rng.choice(np.array(pool, np.float32), x.shape)
    return x


KINDS = [
    "normal", "softmax", "few values", "constant", "zeros of both signs", "denormal", "neighbours",
    "extremes",
]  # fmt: skip


@pytest.mark.parametrize("k", [1, 2, 17, 66, 67])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("code")
def test_top_k_matches_top_patches(kind, k):
    x = scores(kind)
    assert_equal(host.top_k(x, k), top_patches(torch.from_numpy(x), k))


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=30), st.integers(0, 30), st.integers(1, 3)
)
@settings(max_examples=200, deadline=None)
def test_top_k_matches_top_patches_on_anything(values, k, rows):
    x = np.array([values] * rows, np.float32)
    k = min(max(k, 1), len(values))
    expected = top_patches(torch.from_numpy(x), k)
    with pytest.MonkeyPatch.context() as patch:
        for built in {host.HAVE_EXTENSION, False}:
            patch.setattr(host, "HAVE_EXTENSION", built)
            assert_equal(host.top_k(x, k), expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 5), (1, 1)])
@pytest.mark.usefixtures("code")
def test_top_k_takes_nothing_of_anything(shape):
    assert_equal(host.top_k(np.zeros(shape, np.float32), 0), np.empty((shape[0], 0), np.int64))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("shape", "k"), [((4000, 196), 49), ((3, 300_000), 1000)])
@pytest.mark.usefixtures("code")
def test_top_k_does_not_depend_on_threads(shape, k, threads):
    x = np.random.default_rng(0).integers(0, 1000, shape).astype(np.float32)
    assert_equal(host.top_k(x, k, threads=threads), top_patches(torch.from_numpy(x), k))


@pytest.mark.usefixtures("code")
def test_top_k_takes_tensors_and_strided_arrays():
    x = torch.from_numpy(scores("normal")).requires_grad_()
    assert_equal(host.top_k(x, 9), top_patches(x.detach(), 9))
    assert_equal(host.top_k(x[:, ::2], 9), top_patches(x[:, ::2].detach(), 9))
    assert_equal(host.top_k(x.detach().numpy().T, 3), top_patches(x.T.detach(), 3))


def test_top_patches_operator_is_sound():
    x = torch.from_numpy(scores("few values"))
    torch.library.opcheck(host.top_patches, (x, 9))
    torch.library.opcheck(host.top_patches, (x, 0))


def test_top_patches_operator_matches_top_patches():
    x = torch.from_numpy(scores("few values"))
    torch.testing.assert_close(host.top_patches(x, 9), top_patches(x, 9))


def test_top_patches_operator_traces_maps_and_passes_gradients_by():
    x = torch.from_numpy(scores("few values"))

    def best(x):
        return x.gather(1, host.top_patches(x.detach(), 9)).square().sum()

    traced = torch.compile(best, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(x), best(x))
    expected = torch.zeros_like(x).scatter(1, top_patches(x, 9), 1) * 2 * x
    torch.testing.assert_close(torch.func.grad(best)(x), expected)
    stacked = torch.stack((x, -x), dim=1)  # (B, 2, n)
    mapped = torch.vmap(lambda x: host.top_patches(x, 9), in_dims=1)(stacked)
    torch.testing.assert_close(mapped, torch.stack([top_patches(y, 9) for y in (x, -x)]))


# ------------------------------------------------------------------ packed batches


def packing_by_hand(kept, patches, prefix):
    """From lists of kept patches, token by token."""
    gather, merge, starts = [], [], [0]
    for i, own in enumerate(kept):
        tokens = [*range(prefix), *(prefix + p for p in sorted(own))]
        for j, token in enumerate(tokens):
            merge.append(i * prefix + j if j < prefix
                         else len(kept) * prefix + len(gather) - (i + 1) * prefix)  # fmt: skip
            gather.append(i * (prefix + patches) + token)
        starts.append(len(gather))
    scatter = [-1] * (len(kept) * (prefix + patches))
    for packed, full in enumerate(gather):
        scatter[full] = packed
    return host.Packing(
        np.array(starts, np.int32),
        *(np.array(x, np.int64) for x in (gather, scatter, merge)),
        np.array([p for own in kept for p in sorted(own)], np.int64),
        np.array([i for i, own in enumerate(kept) for _ in own], np.int64),
        max((prefix + len(own) for own in kept), default=0),
    )


def assert_plans_equal(ours, expected):
    for name in ("cu_seqlens", "gather", "scatter", "merge", "patches", "image"):
        assert_equal(getattr(ours, name), getattr(expected, name))
    assert type(ours.longest) is int
    assert ours.longest == expected.longest


MASKS = {
    "random": np.random.default_rng(0).random((9, 67)) < 0.3,
    "all": np.ones((4, 5), np.bool_),
    "none": np.zeros((4, 5), np.bool_),
    "one image keeps none": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], np.bool_),
    "first and last empty": np.array([[0, 0], [1, 0], [0, 0]], np.bool_),
    "one row": np.array([[0, 1, 0, 1]], np.bool_),
    "one patch": np.array([[1], [0], [1]], np.bool_),
    "no patches": np.zeros((3, 0), np.bool_),
    "no images": np.zeros((0, 7), np.bool_),
}


def kept_of(mask):
    return [row.nonzero()[0].tolist() for row in mask]


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("code")
def test_plan_packed_matches_a_plan_by_hand(name, prefix):
    mask = MASKS[name]
    expected = packing_by_hand(kept_of(mask), mask.shape[1], prefix)
    assert_plans_equal(host.plan_packed(mask, prefix), expected)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("code")
def test_plan_packed_orders_matches_a_plan_by_hand(name, prefix):
    mask = MASKS[name]
    counts = mask.sum(1)
    # kept patches first, in no order; what follows is not read and may be anything
    rng = np.random.default_rng(1)
    order = np.full((len(mask), mask.shape[1] + 2), 10**12)
    for row, own in zip(order, kept_of(mask), strict=True):
        row[: len(own)] = rng.permutation(np.array(own, np.int64))
    expected = packing_by_hand(kept_of(mask), mask.shape[1], prefix)
    assert_plans_equal(host.plan_packed_orders(order, counts, mask.shape[1], prefix), expected)


@pytest.mark.usefixtures("code")
def test_plan_packed_orders_holds_what_ragged_keep_holds():
    patches, images = 196, 20
    order = torch.rand(images, patches, generator=torch.Generator().manual_seed(0)).argsort(1)
    counts = torch.tensor(keep_ladder(images, patches, 0.75))
    keep = RaggedKeep.of_orders(order, counts)
    plan = host.plan_packed_orders(order, counts, patches, prefix=0)
    assert_equal(plan.patches, keep.patches)
    assert_equal(plan.image, keep.image)
    assert_equal(plan.cu_seqlens, keep.cu_seqlens)
    assert_equal(plan.gather, keep.image * patches + keep.patches)
    assert plan.longest == counts.max()


@pytest.mark.usefixtures("code")
def test_plan_packed_gathers_merges_and_scatters_tokens():
    mask, prefix = MASKS["random"], 2
    images, patches = mask.shape
    tokens = np.arange(images * (prefix + patches)).reshape(images, -1) + 1000
    plan = host.plan_packed(mask, prefix)
    packed = tokens.reshape(-1)[plan.gather]
    parts = np.concatenate((tokens[:, :prefix].ravel(), tokens[:, prefix:][mask]))
    assert_equal(parts[plan.merge], packed)
    back = np.where(plan.scatter >= 0, packed[plan.scatter], 0).reshape(images, -1)
    kept = np.concatenate((np.ones((images, prefix), np.bool_), mask), axis=1)
    assert_equal(back, tokens * kept)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.usefixtures("code")
def test_plan_packed_does_not_depend_on_threads(threads):
    rng = np.random.default_rng(2)
    mask = rng.random((20_000, 196)) < rng.random((20_000, 1))
    counts = mask.sum(1)
    order = (~mask).argsort(1, kind="stable")[:, ::1].copy()
    plan = host.plan_packed(mask, threads=threads)
    image, patch = mask.nonzero()
    assert_equal(plan.image, image)
    assert_equal(plan.patches, patch)
    assert_equal(plan.scatter[plan.gather], np.arange(len(plan.gather)))
    assert (plan.scatter >= 0).sum() == len(plan.gather) == counts.sum() + len(mask)
    assert_plans_equal(host.plan_packed_orders(order, counts, 196, threads=threads), plan)


@needs_extension
def test_plan_packed_reads_any_nonzero_byte_as_true():
    mask = np.array([[0, 2, 255, 0]], np.uint8).view(np.bool_)
    assert_equal(host.plan_packed(mask).patches, np.array([1, 2]))


# ------------------------------------------------------------------ tasks for evaluation


def classes_of(labels):
    names = np.unique(labels)
    return names, [np.flatnonzero(labels == name) for name in names]


CASES = {
    "usual": (np.repeat(np.arange(10), 30), 5, 1, 15),
    "every image": (np.repeat(np.arange(5), 6), 5, 1, 5),
    "nearly every image": (np.repeat(np.arange(6), 40), 4, 10, 27),
    "uneven and shuffled": (
        np.random.default_rng(0).permutation(np.repeat(np.arange(-2, 6), np.arange(8) + 6)),
        3, 2, 4,
    ),
    "one of one": (np.array([7]), 1, 1, 0),
    "large classes": (np.repeat(np.arange(3), 4000), 3, 5, 15),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 11, 2**64 - 1])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("code")
def test_draw_episodes_matches_episodes(name, seed):
    labels, ways, shots, queries = CASES[name]
    expected = episodes(labels, ways, shots, queries, tasks=30, seed=seed)
    names, members = classes_of(labels)
    classes, support, query = host.draw_episodes(names, members, ways, shots, queries, 30, seed)
    assert_equal(classes, expected.classes)
    assert_equal(support, expected.support)
    assert_equal(query, expected.query)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.usefixtures("code")
def test_draw_episodes_keeps_the_frozen_list(threads):
    # the digest that tests/test_data_episodes.py freezes
    names, members = classes_of(np.repeat(np.arange(10), 30))
    classes, support, query = host.draw_episodes(names, members, 5, 1, 15, 600, 0, threads=threads)
    joined = b"".join(a.astype("<i8").tobytes() for a in (support, query, classes))
    digest = "dc6e0a26295c9919eb8eb46525919cdbc02a0bc09dc55b2fe6d40ef7609b1afb"
    assert hashlib.sha256(joined).hexdigest() == digest


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.usefixtures("code")
def test_draw_episodes_does_not_depend_on_threads(threads):
    labels, ways, shots, queries = CASES["large classes"]
    expected = episodes(labels, ways, shots, queries, tasks=60, seed=5)
    names, members = classes_of(labels)
    drawn = host.draw_episodes(names, members, ways, shots, queries, 60, 5, threads=threads)
    for ours, theirs in zip(
        drawn, (expected.classes, expected.support, expected.query), strict=True
    ):
        assert_equal(ours, theirs)


@pytest.mark.usefixtures("code")
def test_draw_episodes_draws_no_task_and_no_image():
    names, members = classes_of(np.repeat(np.arange(3), 4))
    drawn = host.draw_episodes(names, members, 2, 1, 1, 0, 0)
    assert [x.shape for x in drawn] == [(0, 2), (0, 2), (0, 2)]
    classes, support, query = host.draw_episodes(names, members, 2, 0, 0, 3, 0)
    assert (classes.shape, support.shape, query.shape) == ((3, 2), (3, 0), (3, 0))


# ------------------------------------------------------------------ tasks for meta-training


def pool(loras=6, per_class=12, seed=0):
    """LoRAs of 2 to 5 classes, some shared among them; a pool's columns."""
    rng = np.random.default_rng(seed)
    tasks, labels, classes = [], [], []
    for lora in range(loras):
        own = rng.permutation(12)[: 2 + lora % 4]
        for label, c in enumerate(own):
            count = per_class + int(rng.integers(4))
            tasks += [lora] * count
            labels += [2 * label] * count  # some labels may have no images
            classes += [int(c)] * count
    columns = (torch.tensor(x) for x in (tasks, labels, classes))
    return SimpleNamespace(
        **dict(zip(("tasks", "labels", "classes"), columns, strict=True)), parts=range(loras)
    )


def drawn(source, config, seed, first, steps, **options):
    tables = host.TaskTables.of_pool(source.tasks, source.labels, source.classes, config.ways)
    return host.draw_steps(
        tables, config.ways, config.shots + config.queries, config.tasks, config.interpolation,
        seed, first, steps, holders=config.holders, **options,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 12345, 2**62])
@pytest.mark.parametrize(
    ("interpolation", "holders"), [(0.0, "one"), (0.5, "one"), (1.0, "one"), (0.7, "all")]
)
@pytest.mark.parametrize(("ways", "tasks"), [(2, 1), (3, 2), (5, 1)])
@pytest.mark.usefixtures("code")
def test_draw_steps_matches_episode_sampler(ways, tasks, interpolation, holders, seed):
    source = pool()
    config = MetaConfig(
        ways=ways, tasks=tasks, shots=2, queries=9, interpolation=interpolation, holders=holders
    )
    sampler = EpisodeSampler(source, config, seed)
    rows, labels = drawn(source, config, seed, first=70, steps=20)
    for i in range(20):
        expected = sampler.draw(70 + i)
        assert_equal(rows[i], expected.rows)
        assert_equal(labels[i], expected.labels)


@pytest.mark.usefixtures("code")
def test_draw_steps_matches_episode_sampler_on_large_classes():
    # above 10000 candidates NumPy's choice shuffles a range instead, for draws of over 2 %
    count = 10_300
    columns = {"tasks": torch.zeros(2 * count, dtype=torch.int64),
               "labels": torch.arange(2).repeat_interleave(count)}  # fmt: skip
    source = SimpleNamespace(**columns, classes=columns["labels"], parts=range(1))
    for need in (20, 205, 207):
        config = MetaConfig(ways=2, shots=1, queries=need - 1, interpolation=0.5)
        rows, _ = drawn(source, config, 3, first=0, steps=4)
        sampler = EpisodeSampler(source, config, 3)
        for i in range(4):
            assert_equal(rows[i], sampler.draw(i).rows)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.usefixtures("code")
def test_draw_steps_depends_on_neither_threads_nor_chunks(threads):
    source, config = pool(per_class=31), MetaConfig(ways=5, tasks=8, shots=1, queries=29)
    steps = 300  # some 4 ms in C++
    rows, labels = drawn(source, config, 1, first=0, steps=steps, threads=threads)
    parts = [drawn(source, config, 1, first=i, steps=100) for i in range(0, steps, 100)]
    assert_equal(rows, np.concatenate([p[0] for p in parts]))
    assert_equal(labels, np.concatenate([p[1] for p in parts]))
    assert [x.shape[0] for x in drawn(source, config, 1, first=5, steps=0)] == [0, 0]


@needs_extension
def test_draw_steps_knows_this_numpy(monkeypatch, caplog):
    known = host._generator_is_known
    assert known()
    known.cache_clear()
    draw = host._draw_steps
    monkeypatch.setattr(host, "_draw_steps", lambda *a: tuple(x + 1 for x in draw(*a)))
    assert not known()
    assert "draws otherwise" in caplog.text
    monkeypatch.undo()
    known.cache_clear()
    assert known()


# ------------------------------------------------------------------ arguments


ORDER = np.array([[0, 1, 2], [2, 1, 0]])
NAMES, MEMBERS = np.arange(2), [np.arange(4), np.arange(4, 7)]


def tables(ways=2):
    source = pool()
    return host.TaskTables.of_pool(source.tasks, source.labels, source.classes, ways)


WRONG = [
    (lambda: host.top_k(np.zeros((2, 3)), 1),
     r"top_k: scores: expected \(B, n\) float32, got \(2, 3\) float64"),
    (lambda: host.top_k(np.zeros(3, np.float32), 1), r"expected \(B, n\) float32, got \(3,\)"),
    (lambda: host.top_k(np.zeros((2, 3), np.float32), 4), r"top_k: k must be in \[0, 3\], got 4"),
    (lambda: host.top_k(np.zeros((2, 3), np.float32), -1), r"k must be in \[0, 3\], got -1"),
    (lambda: host.top_k(np.zeros((2, 3), np.float32), 1, threads=0),
     "threads must be at least 1, got 0"),
    (lambda: host.plan_packed(np.zeros((2, 3), np.uint8)),
     r"plan_packed: mask: expected \(B, n\) bool, got \(2, 3\) uint8"),
    (lambda: host.plan_packed(np.zeros((2, 3), np.bool_), -1),
     "plan_packed: prefix must be at least 0, got -1"),
    (lambda: host.plan_packed(np.zeros((2**11, 1), np.bool_), prefix=2**20),
     r"counts to 2147483647 tokens, got 2048 images of 1048577; use a smaller batch"),
    (lambda: host.plan_packed_orders(ORDER, np.array([1]), 3),
     r"counts must be \(2,\), got \(1,\)"),
    (lambda: host.plan_packed_orders(ORDER, np.array([1, 1], np.int32), 3),
     r"plan_packed: counts: expected \(B,\) int64, got \(2,\) int32"),
    (lambda: host.plan_packed_orders(ORDER, np.array([1, 4]), 3),
     r"counts\[1\] must be in \[0, 3\], got 4"),
    (lambda: host.plan_packed_orders(ORDER, np.array([-1, 3]), 3),
     r"counts\[0\] must be in \[0, 3\], got -1"),
    (lambda: host.plan_packed_orders(ORDER, np.array([2, 1]), 2),
     r"order\[1\] names patch 2; expected patches 0 to 1"),
    (lambda: host.plan_packed_orders(ORDER - 1, np.array([3, 3]), 3),
     r"order\[0\] names patch -1; expected patches 0 to 2"),
    (lambda: host.plan_packed_orders(ORDER % 2, np.array([2, 3]), 3),
     r"order\[1\] names patch 0 twice; expected each patch at most once"),
    (lambda: host.draw_episodes(NAMES, MEMBERS[:1], 1, 1, 1, 1, 0),
     "draw_episodes: expected members of 2 classes, got 1"),
    (lambda: host.draw_episodes(NAMES, MEMBERS, 3, 1, 1, 1, 0),
     r"draw_episodes: ways must be in \[1, 2\], got 3"),
    (lambda: host.draw_episodes(NAMES, MEMBERS, 0, 1, 1, 1, 0), "ways must be at least 1, got 0"),
    (lambda: host.draw_episodes(NAMES, MEMBERS, 2, 1, 3, 1, 0),
     r"members\[1\] must hold at least 4 images, got 3"),
    (lambda: host.draw_episodes(NAMES, MEMBERS, 2, 1, 1, 1, 2**64),
     r"draw_episodes: seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
    (lambda: host.draw_episodes(NAMES, [MEMBERS[0], MEMBERS[1] * 1.0], 2, 1, 1, 1, 0),
     r"members\[1\]: expected \(n,\) int64, got \(3,\) float64"),
    (lambda: host.draw_steps(tables(), 2, 100, 1, 0.5, 0, 0, 1),
     "need must be at most the 12 images of the smallest class, got 100"),
    (lambda: host.draw_steps(tables(), 2, 1, 1, 0.5, 0, 0, 1, holders="some"),
     'holders must be "one" or "all", got \'some\''),
    (lambda: host.draw_steps(tables(), 100, 1, 1, 0.5, 0, 0, 1), "ways must be at most the"),
    (lambda: host.draw_steps(tables(6), 6, 1, 1, 0.5, 0, 0, 1), "tables must be made for 6 ways"),
    (lambda: host.draw_steps(tables(2), 5, 1, 1, 0.5, 0, 0, 1), "tables must be made for 5 ways"),
    (lambda: host.draw_steps(tables(), 2, 1, 1, 0.5, -1, 0, 1), r"seed must be in .*, got -1"),
    (lambda: host.draw_steps(tables(), 2, 1, 1, 0.5, 0, 0, -1), "steps must be at least 0, got -1"),
    (lambda: host.TaskTables.of_pool(np.arange(2), np.arange(2), np.arange(3), 2),
     "task_tables: expected columns of one length, at least 1, got 2, 2 and 3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=range(len(WRONG)))
@pytest.mark.usefixtures("code")
def test_host_rejects_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.usefixtures("code")
def test_plan_packed_names_the_first_bad_image(threads):
    order = np.tile(np.arange(196), (12_000, 1))
    order[[900, 11_000], 7], order[1700, 9] = 500, 8
    with pytest.raises(ValueError, match=r"order\[900\] names patch 500; expected"):
        host.plan_packed_orders(order, np.full(12_000, 50), 196, threads=threads)
    order[900, 7] = 7
    with pytest.raises(ValueError, match=r"order\[1700\] names patch 8 twice"):
        host.plan_packed_orders(order, np.full(12_000, 50), 196, threads=threads)


@needs_extension
def test_extension_refuses_tables_that_point_outside():
    good = tables()
    columns = {field.name: getattr(good, field.name) for field in dataclasses.fields(good)}
    for name, value in (
        ("groups", good.groups + 1), ("labels", good.labels[1:]), ("wide", good.wide + 100),
        ("holders", good.holders + 1), ("classes", good.classes[::-1].copy()),
        ("shown", good.shown[1:]), ("shown_starts", good.shown_starts[:-1]),
    ):  # fmt: skip
        bad = host.TaskTables(**columns | {name: value})
        with pytest.raises(ValueError, match="_host: "):
            host._draw_compiled(bad, 2, 1, 1, 0.5, False, 0, 0, 1, 1)


@needs_extension
def test_extension_takes_no_other_dtype_silently():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        host._host.top_k(np.zeros((2, 3)), 1, 1)


@needs_extension
def test_extension_runs_beside_other_threads():
    x = scores("softmax", 8000, 196)
    expected = host.top_k(x, 49)
    results = [None] * 8

    def work(i):
        results[i] = host.top_k(x, 49, threads=3)

    others = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    for result in results:
        assert_equal(result, expected)


# ------------------------------------------------------------------ without the extension


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | environment, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("value", "off"), [("1", True), ("0", False), ("", False)])
def test_environment_turns_the_extension_off(value, off, monkeypatch):
    monkeypatch.delenv("FASTRECYCLE_NO_EXTENSION", raising=False)
    code = "from fastrecycle_kernels import host; print(host.HAVE_EXTENSION)"
    done = python(code, FASTRECYCLE_NO_EXTENSION=value)
    built = host._load() is not None
    assert (done.stdout, done.stderr) == (f"{built and not off}\n", "")


def test_library_works_without_the_extension():
    code = (
        "import numpy as np, fastrecycle\n"
        "from fastrecycle.data import episodes\n"
        "from fastrecycle_kernels import host\n"
        "assert not host.HAVE_EXTENSION\n"
        "drawn = episodes(np.repeat(np.arange(5), 4), 5, 1, 2, tasks=3, seed=0)\n"
        "print(drawn.support.sum())\n"
    )
    done = python(code, FASTRECYCLE_NO_EXTENSION="1")
    expected = episodes(np.repeat(np.arange(5), 4), 5, 1, 2, tasks=3, seed=0).support.sum()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", "")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (ModuleNotFoundError("No module named 'fastrecycle_kernels._host'"), ""),
        (ImportError("undefined symbol"), "does not load: undefined symbol"),
        (types.SimpleNamespace(INTERFACE=-1), "of another version"),
    ],
)
def test_unusable_extensions_are_left_alone(found, message, monkeypatch, caplog):
    def load(name):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.delenv("FASTRECYCLE_NO_EXTENSION", raising=False)
    monkeypatch.setattr(host.importlib, "import_module", load)
    assert host._load() is None
    assert message in caplog.text
    assert bool(message) == bool(caplog.text)


# ------------------------------------------------------------------ installation


def wheel(folder, **environment):
    """Build a wheel; its path, its files and what the build said."""
    pytest.importorskip("pybind11")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    without = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "*.safetensors")
    for name in ("fastrecycle", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=without)
    done = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel", "-d", str(folder)], cwd=source, check=False,
        capture_output=True, text=True,
        env=os.environ | {"FASTRECYCLE_NO_EXTENSION": "0"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path.name, zipfile.ZipFile(path).namelist(), done.stderr


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FASTRECYCLE_NO_EXTENSION": "1"}, "FASTRECYCLE_NO_EXTENSION is set"),
        ({"CC": "/no/compiler", "CXX": "/no/compiler"}, "/no/compiler"),
        ({"CXX": "false", "CC": "false"}, "'false'"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="names a compiler as Unix does")
def test_wheel_without_a_compiler_is_pure(environment, reason, tmp_path):
    name, files, said = wheel(tmp_path, **environment)
    assert name.endswith("-py3-none-any.whl")
    assert "fastrecycle_kernels/host.py" in files
    assert not any("_host" in file or "csrc" in file for file in files)
    (line,) = [x for x in said.splitlines() if x.startswith("fastrecycle: ")]
    assert line.startswith("fastrecycle: building without the C++ extension: ")
    assert reason in line


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_wheel_with_a_compiler_has_the_extension(tmp_path):
    name, files, said = wheel(tmp_path)
    assert not name.endswith("-any.whl")
    assert any(file.startswith("fastrecycle_kernels/_host.") for file in files)
    assert not any("csrc" in file for file in files)
    assert "without the C++ extension" not in said


def test_source_distribution_has_the_sources():
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    assert "graft kernels/csrc" in manifest

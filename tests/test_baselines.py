"""Baselines against scikit-learn on the same features, and many tasks against one at a time."""

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.utils.validation import check_is_fitted

from fastrecycle.baselines import (
    BASELINES,
    GRID,
    FrozenFeatures,
    LinearProbe,
    NearestCentre,
    choose,
    embed_tasks,
    evaluate_baseline,
    make_baseline,
    score,
)
from fastrecycle.classifier import FewShotClassifier
from fastrecycle.data import episodes
from fastrecycle.eval import Result, decode, evaluate, evaluate_shots
from fastrecycle.lora import LoRA

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
SHAPE = {"ways": 3, "shots": 2, "queries": 4, "tasks": 20}
LABELS = np.array(["cat", "dog", "emu"] * 4)  # not class-major


def images(count=12, seed=0):
    return torch.randn(count, 3, 16, 16, generator=toys.generator(seed))


def pictures(classes=5, per_class=10, noise=60, seed=0):
    """Noisy images around one colour a class: (images, labels)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    colour = rng.integers(90, 166, (classes, 1, 1, 3))[labels]
    noisy = colour + rng.integers(-noise, noise + 1, (len(labels), 16, 16, 3))
    return noisy.astype(np.uint8), labels


def clusters(spread, count=60, features=8, ways=3, seed=0):
    """Features around one point a class, in no order: (features, labels)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % ways)
    centres = np.random.default_rng(99).normal(size=(ways, features))
    x = centres[labels] + spread * rng.normal(size=(count, features))
    return x.astype(np.float32), labels


def batch_of_tasks(tasks=7, ways=3, shots=2, queries=9, features=8):
    """Support (E, W K, F), class-major, and query (E, Q, F), hard enough to be wrong at times."""
    g = toys.generator(4)
    centres = torch.randn(tasks, ways, features, generator=g)
    support = centres.repeat_interleave(shots, 1)
    query = centres.repeat_interleave(queries // ways, 1)
    return tuple(x + torch.randn(x.shape, generator=g) for x in (support, query))


METHODS = [
    pytest.param(NearestCentre, {}, id="nearest"),
    pytest.param(NearestCentre, {"distance": "cosine"}, id="nearest-cosine"),
    pytest.param(LinearProbe, {"lr": 0.1, "steps": 20}, id="linear-sgd"),
    pytest.param(LinearProbe, {"optimizer": "adam", "lr": 0.01, "steps": 20}, id="linear-adam"),
]


def test_nearest_centre_is_that_of_scikit_learn():
    (x, y), (q, _) = clusters(1.0), clusters(1.0, 200, seed=1)
    y = np.where(np.arange(60) < 9, 0, y)  # unequal counts
    expected = NearestCentroid().fit(x, y).predict(q)
    clf = NearestCentre(toys.vit()).fit_features(x, y)
    assert (clf.predict_features(q) == expected).all()
    assert set(expected) == {0, 1, 2}
    assert clf.rule_[0][0].numpy() == pytest.approx(NearestCentroid().fit(x, y).centroids_)


@pytest.mark.parametrize(("distance", "kind"), [("euclidean", "prototypes"), ("cosine", "simple")])
def test_nearest_centre_is_that_of_easyfsl(distance, kind):
    methods = pytest.importorskip("easyfsl.methods")
    other = {"prototypes": methods.PrototypicalNetworks, "simple": methods.SimpleShot}[kind]()
    (x, y), (q, _) = clusters(1.0), clusters(1.0, 200, seed=1)
    other.process_support_set(torch.from_numpy(x), torch.from_numpy(y))
    expected = other(torch.from_numpy(q)) * (10 if distance == "cosine" else 1)
    got = NearestCentre(toys.vit(), distance=distance).fit_features(x, y).logits(q)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_episodes_have_the_statistics_of_easyfsl(monkeypatch):
    """Classes and images of both are drawn as often as chance has it: within 5 sigma each."""
    samplers = pytest.importorskip("easyfsl.samplers")
    labels, shape = np.repeat(np.arange(10), 20), {"ways": 4, "shots": 2, "queries": 3}
    ours = episodes(labels, **shape, tasks=1500, seed=0)
    drawn = [np.concatenate((s, q)) for s, q in zip(ours.support, ours.query, strict=True)]

    class Labelled:
        def get_labels(self):
            return labels.tolist()

    # easyfsl 1.5 hands on an argument that torch's Sampler took until 2.5
    monkeypatch.setattr(torch.utils.data.Sampler, "__init__", lambda self, data_source: None)
    random.seed(0)
    torch.manual_seed(0)
    theirs = samplers.TaskSampler(Labelled(), n_way=4, n_shot=2, n_query=3, n_tasks=1500)
    for tasks in (drawn, [np.array(rows) for rows in theirs]):
        assert all(len(np.unique(rows)) == 20 for rows in tasks)
        assert all((np.unique(labels[rows], return_counts=True)[1] == 5).all() for rows in tasks)
        for what, p in ((np.concatenate(tasks), 4 / 10 * 5 / 20), (None, 4 / 10)):
            if what is None:
                what = np.concatenate([np.unique(labels[rows]) for rows in tasks])
            counts = np.bincount(what) - 1500 * p
            assert abs(counts).max() < 5 * np.sqrt(1500 * p * (1 - p))
            assert counts.any()


def test_nearest_centre_of_images_is_the_few_shot_classifier():
    vit, bank = toys.vit(), toys.bank(3)
    for given, lora in ((None, None), (bank, LoRA.average(bank, of="factors"))):
        clf = NearestCentre(vit, given, batch_size=5).fit(images(), LABELS)
        expected = FewShotClassifier(vit, lora).fit(images(), LABELS)
        got, wanted = (c.decision_function(images(9, 1)) for c in (clf, expected))
        assert got == pytest.approx(wanted, abs=1e-5)
        assert (clf.predict(images(9, 1)) == expected.predict(images(9, 1))).all()
        assert clf.cost.parameters == 0


def test_long_linear_probe_predicts_as_logistic_regression_on_separable_features():
    (x, y), (q, truth) = clusters(0.3), clusters(0.3, 200, seed=1)
    reference = LogisticRegression(C=1e4, max_iter=5000).fit(x, y)
    assert reference.score(x, y) == 1
    clf = LinearProbe(toys.vit(), optimizer="adam", lr=0.1, steps=500).fit_features(x, y)
    assert (clf.predict_features(q) == reference.predict(q)).all()
    assert reference.score(q, truth) > 0.95


@pytest.mark.parametrize(("optimizer", "lr", "steps"), [("sgd", 0.3, 6000), ("adam", 0.03, 3000)])
def test_long_linear_probe_has_the_optimum_of_logistic_regression(optimizer, lr, steps):
    """Where classes overlap there is one best set of probabilities, and both find it."""
    (x, y), (q, _) = clusters(1.5, 120), clusters(1.5, 50, seed=1)
    reference = LogisticRegression(C=1e8, max_iter=5000, tol=1e-8).fit(x, y)
    assert reference.score(x, y) < 0.97
    clf = LinearProbe(toys.vit(), optimizer=optimizer, lr=lr, steps=steps).fit_features(x, y)
    got = clf.logits(q).softmax(-1).numpy()
    assert got == pytest.approx(reference.predict_proba(q), abs=5e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_linear_probe_trains_as_a_torch_module_does(optimizer):
    x, y = clusters(1.0, 15)
    head = torch.nn.Linear(8, 3).double()  # Adam scales up what is rounded; see LinearProbe
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    steps = kind(head.parameters(), lr=0.1)
    for _ in range(5):
        steps.zero_grad()
        logits = head(torch.from_numpy(x).double())
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)).backward()
        steps.step()
    clf = LinearProbe(toys.vit(), optimizer=optimizer, lr=0.1, steps=5).fit_features(x, y)
    torch.testing.assert_close(clf.logits(x), head(torch.from_numpy(x).double()).float().detach())
    assert clf.cost.parameters == sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_tasks_side_by_side_come_out_as_each_alone(method, options):
    support, query = batch_of_tasks()
    clf = method(toys.vit(), **options)
    guess = clf.tasks(support, 3, query)
    assert guess.shape == (7, 9)
    ways = np.repeat(["a", "b", "c"], 2)
    for t in range(7):
        alone = clf.fit_features(support[t], ways)
        assert (alone.predict_features(query[t]) == np.array(list("abc"))[guess[t]]).all()
    truth = torch.arange(3).repeat_interleave(3)
    assert 0.4 < (guess == truth).float().mean() < 1


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_order_of_the_support_does_not_matter(method, options):
    (x, y), (q, _) = clusters(1.0), clusters(1.0, 20, seed=1)
    order = np.random.default_rng(0).permutation(len(x))
    one, other = (method(toys.vit(), **options).fit_features(x[i], y[i]) for i in (..., order))
    torch.testing.assert_close(one.logits(q), other.logits(q), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("of", ["factors", "products"])
def test_average_of_identical_loras_is_that_lora(of):
    vit, lora = toys.vit(), toys.lora()
    clf = NearestCentre(vit, [lora] * 3, of=of).fit(images(), LABELS)
    single = FewShotClassifier(vit, lora).fit(images(), LABELS)
    got, wanted = (c.decision_function(images(9, 1)) for c in (clf, single))
    assert got == pytest.approx(wanted, abs=1e-4)
    plain = NearestCentre(vit).fit(images(), LABELS).decision_function(images(9, 1))
    assert abs(got - plain).max() > 0.01


def test_mixed_ranks_average_by_products_or_are_refused():
    vit, mixed = toys.vit(), [toys.lora(0), toys.lora(1, rank=3)]
    with pytest.raises(ValueError, match="average the products"):
        NearestCentre(vit, mixed).fit(images(), LABELS)
    clf = LinearProbe(vit, mixed, of="products").fit(images(), LABELS)
    delta = (mixed[0].delta("q") + mixed[1].delta("q")) / 2
    torch.testing.assert_close(clf.lora().delta("q"), delta)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_labels_that_say_nothing_give_chance_within_the_interval(method, options):
    """Independent tasks, each of clusters that have nothing to do with the classes."""
    g, (count, ways, shots, queries) = toys.generator(8), (600, 5, 5, 15)
    centres = torch.randn(count, ways, 8, generator=g)
    drawn = torch.randint(ways, (count, ways * (shots + queries)), generator=g)
    x = torch.gather(centres, 1, drawn[..., None].expand(-1, -1, 8))
    support, query = (x + 0.3 * torch.randn(x.shape, generator=g)).split(
        [ways * shots, ways * queries], 1
    )
    guess = method(toys.vit(), **options).tasks(support, ways, query)
    right = guess == torch.arange(ways).repeat_interleave(queries)
    result = Result.of(100 * right.float().mean(1).double().numpy())
    assert abs(result.accuracy - 20) < result.ci95 < 0.6


FROZEN = [
    name
    for name, row in BASELINES.items()
    if issubclass(row.method, FrozenFeatures) and row.model is None
]


@pytest.mark.parametrize("name", FROZEN)
def test_shuffled_labels_give_chance(name):
    pixels, labels = pictures(classes=4, per_class=60)
    method = make_baseline(name, toys.vit(), toys.bank())
    shape = {"ways": 4, "shots": 2, "queries": 10, "tasks": 60}
    shuffled = np.random.default_rng(5).permutation(labels)
    result = evaluate_baseline(method, (pixels, shuffled), **shape)
    # tasks share 240 images, so they vary together by more than the interval says: three of them
    assert abs(result.accuracy - 25) < 3 * result.ci95
    right = evaluate_baseline(method, (pixels, labels), **shape)
    assert right.accuracy > 25 + 5 * right.ci95


def test_results_pair_with_those_of_the_evaluation():
    vit, data, bank = toys.vit(), pictures(), toys.bank()
    ours = evaluate(vit, toys.lora(), data, seed=2, **SHAPE)
    for given, lora in ((None, None), (bank, LoRA.average(bank, of="factors"))):
        method = NearestCentre(vit, given)
        result = evaluate_baseline(method, data, seed=2, **SHAPE)
        expected = evaluate(vit, lora, data, seed=2, **SHAPE)
        assert result.per_task == pytest.approx(expected.per_task)
        assert ours.minus(result).per_task == pytest.approx(ours.minus(expected).per_task)
        assert method.cost.seconds > 0


def test_one_embedding_serves_several_shots_and_methods():
    vit, shape = toys.vit(), {k: v for k, v in SHAPE.items() if k != "shots"}
    data = decode(vit, pictures())
    nearest = NearestCentre(vit)
    embedded = embed_tasks(nearest, data, shots=(1, 2), **shape)
    expected = evaluate_shots(vit, None, data, shots=(1, 2), **shape)
    for shots in (1, 2):
        got = score(nearest, embedded[shots], batch=7)
        assert got.per_task == pytest.approx(expected[shots].per_task)
    probe = LinearProbe(vit, lr=0.1)
    alone = evaluate_baseline(probe, data, **SHAPE)
    assert score(probe, embedded[2]).per_task == pytest.approx(alone.per_task)


def test_every_task_of_the_probe_matches_images_one_by_one():
    """The batched form on frozen tasks agrees with `fit` and `predict` on each task's pictures."""
    vit, (pixels, labels) = toys.vit(), pictures()
    method = LinearProbe(vit, toys.bank(), lr=0.1, steps=10)
    embedded = embed_tasks(method, (pixels, labels), shots=(2,), ways=3, queries=4, tasks=5)[2]
    result = score(method, embedded)
    for t in range(5):
        support, query = (
            [Image.fromarray(pixels[i]) for i in rows[t]]
            for rows in (embedded.tasks.support, embedded.tasks.query)
        )
        clf = clone(method).fit(support, labels[embedded.tasks.support[t]])
        right = clf.score(query, labels[embedded.tasks.query[t]])
        assert 100 * right == pytest.approx(result.per_task[t])


def validation(method, **changes):
    shape = {"shots": (1,), "ways": 3, "queries": 4, "tasks": 20, "split": "val"}
    return embed_tasks(method, pictures(), **{**shape, **changes})[1]


def test_choose_takes_the_best_point_on_validation_tasks():
    probe = LinearProbe(toys.vit())
    tasks = validation(probe)
    choice = choose(probe, tasks)
    assert [settings for settings, _ in choice.results] == [
        {"lr": lr, "steps": steps} for lr in GRID["lr"] for steps in GRID["steps"]
    ]
    for settings, result in choice.results:
        expected = score(LinearProbe(probe.vit, **settings), tasks)
        assert (result.per_task == expected.per_task).all()
    best = max(result.accuracy for _, result in choice.results)
    assert dict(lr=choice.method.lr, steps=choice.method.steps) == choice.settings
    assert score(choice.method, tasks).accuracy == best
    assert min(result.accuracy for _, result in choice.results) < best
    assert (probe.lr, probe.steps) == (0.01, 50)
    with pytest.raises(NotFittedError):
        check_is_fitted(choice.method)


def test_choose_sees_the_images_of_validation_tasks_only():
    probe = LinearProbe(toys.vit())
    tasks = validation(probe, tasks=2)
    unused = np.setdiff1d(np.arange(50), tasks.tasks.images)
    assert len(unused)
    spoilt = tasks.features.clone()
    spoilt[unused] = float("nan")
    one, other = (choose(probe, replace(tasks, features=f)) for f in (tasks.features, spoilt))
    assert [r.accuracy for _, r in one.results] == [r.accuracy for _, r in other.results]
    with pytest.raises(ValueError, match='got the split "test"'):
        choose(probe, validation(probe, split="test"))


def test_choose_takes_the_first_of_equals_and_other_parameters():
    probe = LinearProbe(toys.vit())
    choice = choose(probe, validation(probe), {"optimizer": ("adam", "sgd"), "steps": (5, 5)})
    assert len(choice.results) == 4
    accuracies = [r.accuracy for _, r in choice.results]
    assert choice.settings is choice.results[accuracies.index(max(accuracies))][0]


@pytest.mark.parametrize(
    "grid", [{}, {"lr": ()}, {"momentum": (0.9,)}, {"of": ("products",)}, {"bank": (None,)}]
)
def test_choose_rejects_a_grid_that_is_none(grid):
    probe = LinearProbe(toys.vit())
    with pytest.raises(ValueError, match="grid: expected values of parameters of LinearProbe"):
        choose(probe, validation(probe), grid)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_clone_shares_backbone_and_bank_and_is_not_fitted(method, options):
    vit, bank = toys.vit(), toys.bank()
    clf = method(vit, bank, batch_size=3, **options).fit(images(), LABELS)
    copy = clone(clf)
    assert copy.vit is vit
    assert copy.bank is bank
    assert copy.get_params(deep=False) == clf.get_params(deep=False)
    with pytest.raises(NotFittedError):
        check_is_fitted(copy)
    with pytest.raises(NotFittedError, match="call fit"):
        _ = copy.cost
    check_is_fitted(clf)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_pickles_and_predicts_the_same(method, options):
    clf = method(toys.vit(), toys.bank(), **options).fit(images(), LABELS)
    other = pickle.loads(pickle.dumps(clf))
    assert (other.decision_function(images(5, 1)) == clf.decision_function(images(5, 1))).all()
    assert other.cost == clf.cost


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("names", [("cat", "dog", "emu"), (-2, 7, 40), (b"x", b"y", b"z")])
def test_labels_of_any_kind_and_probabilities(method, options, names):
    clf = method(toys.vit(), **options).fit(images(), [names[i % 3] for i in range(12)])
    assert list(clf.classes_) == sorted(names)
    p = clf.predict_proba(images(7, 1))
    assert p.sum(1) == pytest.approx(np.ones(7), abs=1e-6)
    assert (clf.classes_[p.argmax(1)] == clf.predict(images(7, 1))).all()
    plain = method(toys.vit(), **options).fit(images(), LABELS).predict(images(7, 1))
    index = {name: i for i, name in enumerate(("cat", "dog", "emu"))}
    assert list(clf.predict(images(7, 1))) == [names[index[each]] for each in plain]


def test_cost_of_a_task():
    clf = LinearProbe(toys.vit(), steps=5).fit(images(), LABELS)
    width = toys.CONFIG.features
    assert clf.cost.parameters == 3 * (width + 1)
    assert clf.cost.peak_memory_bytes is None
    assert clf.cost.seconds > 0
    clf.tasks(*(lambda s, q: (s, 3, q))(*batch_of_tasks()))
    assert clf.cost.parameters == 3 * 9


def test_a_bank_set_anew_takes_effect():
    vit = toys.vit()
    clf = NearestCentre(vit, [toys.lora(0)]).fit(images(), LABELS)
    before = clf.decision_function(images(9, 1))
    clf.set_params(bank=[toys.lora(1)]).fit(images(), LABELS)
    fresh = NearestCentre(vit, [toys.lora(1)]).fit(images(), LABELS)
    got = clf.decision_function(images(9, 1))
    assert (got == fresh.decision_function(images(9, 1))).all()
    assert (got != before).any()


def test_rejects_bad_input():
    vit = toys.vit()
    clf = LinearProbe(vit)
    x, y = clusters(1.0)
    with pytest.raises(NotFittedError, match="LinearProbe: call fit"):
        clf.predict(images())
    with pytest.raises(NotFittedError, match="LinearProbe: call fit"):
        clf.predict_features(x)
    with pytest.raises(TypeError, match="expected PIL images"):
        clf.fit(["a.png"], LABELS)
    with pytest.raises(ValueError, match="expected one for each of 12 images, got"):
        clf.fit(images(), LABELS[:5])
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        clf.fit_features(x, ["a"] * 60)
    with pytest.raises(ValueError, match=r"features: expected \(n, F\) floats, got \(60,\)"):
        clf.fit_features(x[:, 0], y)
    with pytest.raises(ValueError, match="features: hold NaN or infinity"):
        clf.fit_features(np.full_like(x, np.inf), y)
    with pytest.raises(ValueError, match=r"features: expected \(n, 8\), got \(60, 7\)"):
        clf.fit_features(x, y).logits(x[:, :7])
    support, query = batch_of_tasks()
    for ways in (1, 4):
        with pytest.raises(ValueError, match=r"support: expected \(E, W K, F\)"):
            clf.tasks(support, ways, query)
    with pytest.raises(ValueError, match=r"query: expected \(7, Q, 8\)"):
        clf.tasks(support, 3, query[:6])
    wider = replace(toys.CONFIG, width=24)
    with pytest.raises(ValueError, match="belongs to another model"):
        NearestCentre(vit, [toys.lora(config=wider)]).fit(images(), LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr: must be positive and finite, got 0"),
        ({"lr": float("nan")}, "lr: must be positive and finite, got nan"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"optimizer": "lbfgs"}, 'optimizer: expected "sgd" or "adam"'),
        ({"of": "sums"}, 'of: expected "factors" or "products"'),
    ],
)
def test_rejects_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(toys.vit(), **options).fit(images(), LABELS)


def test_rejects_an_unknown_distance_name_or_a_missing_bank():
    with pytest.raises(ValueError, match="distance: expected"):
        NearestCentre(toys.vit(), distance="manhattan").fit(images(), LABELS)
    with pytest.raises(ValueError, match="baseline: expected one of Full Finetuning"):
        make_baseline("linear", toys.vit())
    with pytest.raises(ValueError, match=r"LoRAs Avg \+ NN: needs a bank"):
        make_baseline("LoRAs Avg + NN", toys.vit())
    assert make_baseline("NN", toys.vit(), toys.bank()).bank is None


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_on_cuda_as_on_the_cpu(method, options, no_tf32):
    support, query = batch_of_tasks()
    expected = method(toys.vit(), **options).tasks(support, 3, query)
    clf = method(toys.vit().to("cuda"), toys.bank(), backend="compile", **options)
    assert (clf.tasks(support.cuda(), 3, query.cuda()).cpu() == expected).all()
    assert clf.cost.peak_memory_bytes >= support.nbytes
    on_cpu = method(toys.vit(), toys.bank(), **options).fit(images(), LABELS)
    got = clf.fit(images(), LABELS).decision_function(images(9, 1))
    assert got == pytest.approx(on_cpu.decision_function(images(9, 1)), abs=1e-3)
    assert clf.cost.peak_memory_bytes > 0

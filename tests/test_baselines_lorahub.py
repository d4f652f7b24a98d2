"""LoRAHub: its sums of LoRAs, its objective written out, and nevergrad's search."""

import builtins
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys

from fastrecycle.baselines import LoRAHub, NearestCentre
from fastrecycle.baselines import lorahub as module
from fastrecycle.baselines.lora_linear import unpacked
from fastrecycle.classifier import FewShotClassifier
from fastrecycle.lora import LoRAStack

nevergrad = pytest.importorskip("nevergrad")
pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
LABELS = np.array(["cat", "dog", "emu"] * 2)  # not class-major
WAY = torch.arange(3).repeat(2)


def images(count=6, seed=0):
    return torch.randn(count, 3, 16, 16, generator=toys.generator(seed))


def mixed(bank, weights, of):
    """The sums of a bank's LoRAs as a stack."""
    return unpacked(module.mix(LoRAStack.of(bank), torch.tensor(weights), of))


@pytest.fixture
def weights_are(monkeypatch):
    """Makes the search ask for, and end with, the weights that it is given."""

    def fix(*weights):
        fixed = torch.tensor([weights], dtype=torch.float64)
        monkeypatch.setattr(module.Searches, "ask", lambda self: fixed)
        monkeypatch.setattr(module.Searches, "tell", lambda self, losses: None)
        monkeypatch.setattr(module.Searches, "best", lambda self: fixed)

    return fix


@pytest.mark.parametrize("of", ["factors", "products"])
def test_one_lora_of_weight_one_is_that_lora(of, weights_are):
    vit, lora = (
        toys.vit(),
        replace(toys.lora(), scale={t: x * 2 for t, x in toys.lora().scale.items()}),
    )
    weights_are(1.0)
    clf = LoRAHub(vit, [lora], of=of, steps=1).fit(images(), LABELS)
    expected = FewShotClassifier(vit, lora).fit(images(), LABELS)
    got, wanted = (c.decision_function(images(9, 1)) for c in (clf, expected))
    assert got == pytest.approx(wanted, rel=1e-4)
    assert list(clf.weights_) == [1]
    assert clf.cost.parameters == 1


@pytest.mark.parametrize("of", ["factors", "products"])
def test_no_weight_is_plain_nearest_centre_and_even_ones_the_average(of, weights_are):
    vit, bank = toys.vit(), toys.bank(4)
    for weights, given in (((0.0,) * 4, None), ((0.25,) * 4, bank)):
        weights_are(*weights)
        clf = LoRAHub(vit, bank, of=of, steps=1).fit(images(), LABELS)
        expected = NearestCentre(vit, given, of=of).fit(images(), LABELS)
        got, wanted = (c.decision_function(images(9, 1)) for c in (clf, expected))
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("of", ["factors", "products"])
def test_even_weights_of_identical_loras_are_the_identity(of):
    vit, lora = toys.vit(), toys.lora()
    got = vit(images(), mixed([lora] * 4, [[0.25] * 4], of))
    torch.testing.assert_close(got, vit(images(), lora), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 12])  # of rank 2 and width 16: below and above the width
def test_products_are_weighted_sums_of_changes_across_ranks_and_targets(count):
    bank = [
        toys.lora(i, rank=1 + i % 3, targets=("q", "v", "fc1")[: 2 + i % 2]) for i in range(count)
    ]
    weights = torch.randn(3, count, generator=toys.generator(1))
    stack = unpacked(module.mix(LoRAStack.of(bank), weights, "products"))
    for target in ("q", "v", "fc1"):
        assert stack.a[target].shape[2] <= 16
        expected = torch.zeros(
            3, toys.CONFIG.depth, *bank[1].delta("fc1" if target == "fc1" else "q").shape[1:]
        )
        for g, lora in enumerate(bank):
            if target in lora.a:
                expected += weights[:, g, None, None, None] * lora.delta(target)
        torch.testing.assert_close(
            stack.b[target] @ stack.a[target], expected, rtol=1e-4, atol=1e-5
        )


def test_factors_are_summed_each_by_itself():
    bank = toys.bank(3)
    stack = mixed(bank, [[0.5, -1.0, 0.2]], "factors")
    for part in ("a", "b"):
        x, y, z = (getattr(lora, part)["v"] for lora in bank)
        torch.testing.assert_close(getattr(stack, part)["v"][0], 0.5 * x - y + 0.2 * z)


def test_mixed_ranks_go_by_products_or_are_refused():
    vit, bank = toys.vit(), [toys.lora(0), toys.lora(1, rank=3)]
    with pytest.raises(ValueError, match=r'one rank on the same targets, got.*of="products"'):
        LoRAHub(vit, bank).fit(images(), LABELS)
    clf = LoRAHub(vit, bank, of="products", steps=6).fit(images(), LABELS)
    assert clf.weights_.shape == (2,)


def test_loss_leaves_each_image_out_of_its_own_centre():
    """Of classes of 3, 2 and 1 images; in the last the mirror image stands in."""
    way = torch.tensor([0, 1, 0, 2, 1, 0])
    seen, mirrored = torch.randn(2, 1, 6, 8, generator=toys.generator(3)).unbind(0)
    losses = []
    for i in range(6):
        scores = []
        for c in range(3):
            rest = [j for j in range(6) if way[j] == c and j != i]
            centre = seen[0, rest].mean(0) if rest else mirrored[0, i]
            scores.append(10 * torch.cosine_similarity(seen[0, i], centre, 0))
        losses.append(-torch.stack(scores).log_softmax(0)[way[i]])
    got = module.support_loss(seen, mirrored, way, 3)
    torch.testing.assert_close(got, torch.stack(losses).mean()[None])


def test_search_is_told_the_loss_with_its_l1_term(monkeypatch):
    vit, bank, told = toys.vit(), toys.bank(2), []
    ask, tell = module.Searches.ask, module.Searches.tell
    asked = []
    monkeypatch.setattr(module.Searches, "ask", lambda self: asked.append(ask(self)) or asked[-1])
    monkeypatch.setattr(module.Searches, "tell", lambda self, x: told.append(x) or tell(self, x))
    LoRAHub(vit, bank, steps=5, l1=0.3).fit(images(), LABELS)
    assert len(told) == 5
    for weights, loss in zip(asked, told, strict=True):
        features = vit(images(), mixed(bank, weights.float().tolist(), "factors"))[None]
        expected = module.support_loss(features, features, WAY, 3)
        expected = expected + 0.3 * (weights.abs().sum() / 2)
        torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_search_is_that_of_nevergrads_own_loop():
    """The authors' call, on the loss of one task."""
    vit, bank = toys.vit(), toys.bank(3)

    def loss(weights):
        features = vit(images(), mixed(bank, [[float(w) for w in weights]], "factors"))[None]
        cross_entropy = module.support_loss(features, features, WAY, 3)
        return float(cross_entropy) + 0.05 * float(np.abs(weights).mean())

    weights = nevergrad.p.Array(init=[0] * 3, upper=[1.5] * 3, lower=[-1.5] * 3)
    weights.random_state.seed(0)
    with pytest.warns(UserWarning, match="COBYLA"):
        found = nevergrad.optimizers.NGOpt(weights, budget=40).minimize(loss)
    clf = LoRAHub(vit, bank).fit(images(), LABELS)
    assert clf.weights_ == pytest.approx(found.value, abs=1e-3)
    assert loss(clf.weights_) < loss(np.zeros(3))
    assert abs(clf.weights_).max() <= 1.5


def test_a_strong_l1_term_keeps_the_weights_at_zero():
    clf = LoRAHub(toys.vit(), toys.bank(2), l1=100.0).fit(images(), LABELS)
    assert clf.weights_ == pytest.approx(np.zeros(2), abs=1e-2)


def test_finds_the_lora_that_tells_the_classes_apart(monkeypatch):
    """One LoRA of three makes features of a class alike: its weight grows, and the loss falls."""
    useful = torch.randn(6, 8, generator=toys.generator(1)) * 0.3 + 2 * torch.eye(8)[WAY]
    noise = torch.randn(6, 8, generator=toys.generator(2))

    def features(self, network, x):
        return network["a.q"][:, 0, 0, :1, None] * useful + noise

    bank = [
        replace(lora, a={t: torch.full_like(x, float(i == 1)) for t, x in lora.a.items()})
        for i, lora in enumerate(toys.bank(3))
    ]
    monkeypatch.setattr(LoRAHub, "_features", features)
    clf = LoRAHub(toys.vit(), bank).fit(images(), LABELS)
    assert clf.weights_[1] > 1


def test_one_image_a_class_is_seen_mirrored(monkeypatch):
    vit, sizes = toys.vit(), []
    inner = LoRAHub._features

    def features(self, network, x):
        sizes.append(x.shape[1])
        return inner(self, network, x)

    monkeypatch.setattr(LoRAHub, "_features", features)
    clf = LoRAHub(vit, toys.bank(), steps=3).fit(images(3), LABELS[:3])
    assert sizes == [6] * 4
    assert clf.adapted_.rule["centres"].shape == (1, 3, 16)
    sizes.clear()
    LoRAHub(vit, toys.bank(), steps=3).fit(images(), LABELS)
    assert sizes == [6] * 4


def test_no_thread_outlives_the_search(monkeypatch):
    """nevergrad's run on until they are told to stop, and would keep Python from leaving."""
    before = set(threading.enumerate())

    def left():
        for thread in set(threading.enumerate()) - before:
            thread.join(timeout=5)
        return set(threading.enumerate()) - before

    LoRAHub(toys.vit(), toys.bank(), steps=3).fit(images(), LABELS)
    assert not left()

    def broken(self, losses):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(module.Searches, "tell", broken)
    with pytest.raises(RuntimeError, match="interrupted") as caught:
        LoRAHub(toys.vit(), toys.bank(), steps=3).fit(images(), LABELS)
    assert not left()
    assert caught.tb is not None  # whose frames still hold what they held


def test_without_nevergrad_says_what_to_install(monkeypatch):
    inner = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "nevergrad":
            raise ModuleNotFoundError("No module named 'nevergrad'")
        return inner(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "nevergrad")
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r'pip install "fastrecycle\[baselines\]"'):
        LoRAHub(toys.vit(), toys.bank()).fit(images(), LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "sums"}, 'of: expected "factors" or "products", got'),
        ({"distance": "manhattan"}, "distance: expected"),
        ({"bound": 0}, "bound: must be positive and finite, got 0"),
        ({"l1": -1}, "l1: must be at least 0 and finite, got -1"),
        ({"l1": float("nan")}, "l1: must be at least 0 and finite, got nan"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
    ],
)
def test_rejects_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAHub(toys.vit(), toys.bank(), **options).fit(images(), LABELS)

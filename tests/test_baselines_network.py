"""Baselines that adapt the network: against plain PyTorch loops, tasks alone and side by side."""

import copy
import pickle

import numpy as np
import pytest
import torch
import toys
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from fastrecycle.baselines import (
    BASELINES,
    MOLE,
    AdaptedNetwork,
    FullFineTuning,
    LinearProbe,
    LoRALinear,
    NearestCentre,
    choose,
    decode_tasks,
    embed_tasks,
    evaluate_baseline,
    make_baseline,
    score,
)
from fastrecycle.baselines.network import PrototypeRule
from fastrecycle.classifier import class_means, prototype_logits
from fastrecycle.eval import decode, evaluate
from fastrecycle.lora import LoRA
from fastrecycle.vit_config import ViTConfig

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
SHAPE = {"ways": 3, "queries": 4, "tasks": 3}
LABELS = np.array(["cat", "dog", "emu"] * 2)  # not class-major
WAY = torch.arange(3).repeat(2)
NAMES = [
    name
    for name, row in BASELINES.items()
    if issubclass(row.method, AdaptedNetwork) and row.model is None
]
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def images(count=6, seed=0):
    return torch.randn(count, 3, 16, 16, generator=toys.generator(seed))


def pictures(classes=5, per_class=10, noise=60, seed=0):
    """Noisy images around one colour a class: (images, labels)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    colour = rng.integers(90, 166, (classes, 1, 1, 3))[labels]
    noisy = colour + rng.integers(-noise, noise + 1, (len(labels), 16, 16, 3))
    return noisy.astype(np.uint8), labels


def double(vit=None):
    """In float64 what is rounded differently stays small enough for Adam, too."""
    return (vit or toys.vit()).double()


def method(name, vit=None, **options):
    """A baseline that has few steps unless told otherwise."""
    return make_baseline(name, vit or toys.vit(), toys.bank(), **{"steps": 4, **options})


def head_on(features, ways=3):
    """A linear head from zero, in float64."""
    head = torch.nn.Linear(features, ways).double()
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def trained_plainly(features_of, parameters, optimizer, lr, steps):
    """One task by the book: the head that was trained along with `parameters`."""
    head = head_on(toys.CONFIG.features)
    descent = OPTIMIZERS[optimizer]([*parameters, *head.parameters()], lr=lr)
    for _ in range(steps):
        descent.zero_grad()
        logits = head(features_of(images().double()).double())
        torch.nn.functional.cross_entropy(logits, WAY).backward()
        descent.step()
    return head


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adam", 0.01)])
def test_full_finetuning_is_a_plain_loop_over_the_whole_network(optimizer, lr):
    vit = double()
    before = {name: x.clone() for name, x in vit.state_dict().items()}
    plain = copy.deepcopy(vit).requires_grad_()
    head = trained_plainly(plain, list(plain.parameters()), optimizer, lr, steps=3)
    clf = FullFineTuning(vit, optimizer, lr, steps=3).fit(images(), LABELS)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(clf.adapted_.network[name][0], p.detach(), msg=name)
        assert (p != before[name]).any()
        assert (vit.state_dict()[name] == before[name]).all()
    with torch.no_grad():
        expected = head(plain(images(5, 1).double()))
    assert clf.decision_function(images(5, 1)) == pytest.approx(expected.numpy(), rel=1e-5)
    every = [*plain.parameters(), *head.parameters()]
    assert clf.cost.parameters == sum(p.numel() for p in every)


def test_full_finetuning_with_a_stem_of_convolutions_and_batchnorm():
    config = ViTConfig(
        image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32, stem="lvvit",
        qkv_bias=False, residual_scale=0.5,
    )  # fmt: skip
    vit = double(toys.vit(config))
    plain = copy.deepcopy(vit).requires_grad_()
    trained_plainly(plain, list(plain.parameters()), "sgd", 0.1, steps=2)
    clf = FullFineTuning(vit, "sgd", 0.1, steps=2).fit(images(), LABELS)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(clf.adapted_.network[name][0], p.detach(), msg=name)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adam", 0.01)])
def test_lora_linear_is_a_plain_loop_over_one_lora(optimizer, lr):
    vit = double()
    lora = LoRA.init(vit.config, 4, seed=5).to(torch.float64)
    for tensor in lora.tensors():
        tensor.requires_grad_()
    head = trained_plainly(lambda x: vit(x, lora), lora.tensors(), optimizer, lr, steps=3)
    clf = LoRALinear(vit, seed=5, optimizer=optimizer, lr=lr, steps=3).fit(images(), LABELS)
    fresh = LoRA.init(vit.config, 4, seed=5)
    for part, tensors, start in (("a", lora.a, fresh.a), ("b", lora.b, fresh.b)):
        for target in ("q", "v"):
            got = clf.adapted_.network[f"{part}.{target}"][0]
            torch.testing.assert_close(got, tensors[target].detach())
            assert (got != start[target]).any()
    with torch.no_grad():
        expected = head(vit(images(5, 1).double(), lora))
    assert clf.decision_function(images(5, 1)) == pytest.approx(expected.numpy(), rel=1e-5)
    assert clf.cost.parameters == lora.parameters + sum(p.numel() for p in head.parameters())


def test_mole_is_a_plain_loop_over_gates_written_out():
    """Outputs of LoRAs of several ranks, each computed by itself and weighed by a softmax."""
    vit = double()
    bank = [toys.lora(0), toys.lora(1, rank=3), toys.lora(2, targets=("q", "fc1"))]
    config, depth = toys.CONFIG, toys.CONFIG.depth
    gates = {t: torch.nn.ModuleList() for t in ("q", "v", "fc1")}
    for modules in gates.values():
        for _ in range(depth):
            modules.append(head_on(config.width, len(bank)))
    parameters = [p for modules in gates.values() for p in modules.parameters()]

    def extra(target, block, x):
        weights = gates[target][block](x).softmax(-1)
        deltas = [
            lora.delta(target)[block].double() if target in lora.a else torch.zeros(1).double()
            for lora in bank
        ]
        return sum(
            weights[..., [g]] * (x @ delta.mT) for g, delta in enumerate(deltas) if delta.any()
        )

    def features_of(x):
        x = vit.embed(x)
        for i, block in enumerate(vit.blocks):
            y = block.norm1(x)
            q, k, v = block.qkv(y).chunk(3, -1)
            q, v = q + extra("q", i, y), v + extra("v", i, y)
            heads = [t.unflatten(-1, (config.heads, -1)).transpose(1, 2) for t in (q, k, v)]
            scores = heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5
            x = x + block.proj((scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))
            y = block.norm2(x)
            y = torch.nn.functional.gelu(block.fc1(y) + extra("fc1", i, y))
            x = x + block.fc2(y)
        return vit.norm(x[:, 0])

    head = trained_plainly(features_of, parameters, "sgd", 0.5, steps=3)
    clf = MOLE(vit, bank, lr=0.5, steps=3).fit(images(), LABELS)
    for target, modules in gates.items():
        for block, gate in enumerate(modules):
            got = clf.adapted_.network
            torch.testing.assert_close(got[f"weight.{target}"][0, block], gate.weight.detach())
            torch.testing.assert_close(got[f"bias.{target}"][0, block], gate.bias.detach())
    with torch.no_grad():
        expected = head(features_of(images(5, 1).double()))
    assert clf.decision_function(images(5, 1)) == pytest.approx(expected.numpy(), rel=1e-5)
    assert clf.cost.parameters == sum(p.numel() for p in [*parameters, *head.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_tasks_side_by_side_come_out_as_each_alone(name):
    """A batch of 3, three batches of 1, and `fit` on each task's pictures."""
    vit, (pixels, labels) = double(), pictures()
    options = {} if name == "LoRAHub" else {"optimizer": "adam", "lr": 0.02}
    clf = method(name, vit, **options)
    on = decode_tasks(vit, (pixels, labels), shots=(2,), **SHAPE)[2]
    together = clf.tasks(on.pixels, on.tasks)
    assert clf.cost.peak_memory_bytes is None
    assert (clf.tasks(on.pixels, on.tasks, batch=1) == together).all()
    assert together.shape == (3, 12)
    normalised = vit.normalise(on.pixels.pixels.double() / 255)
    for t in range(3):
        support, query = on.tasks.support[t], on.tasks.query[t]
        alone = clf.fit(normalised[support], labels[support])
        classes = on.tasks.classes[t]
        assert (alone.predict(normalised[query]) == classes[together[t]]).all()
    assert 0.4 < (together.numpy() == on.tasks.query_ways).mean() < 1


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_a_batch_are_those_of_each_task_alone(name):
    vit = double()
    clf = method(name, vit)
    stacked = torch.stack([images(seed=s).double() for s in range(3)])
    together = clf._adapt(stacked, WAY, 3)
    for t in range(3):
        alone = clf._adapt(stacked[t : t + 1], WAY, 3)
        for part, expected in zip(alone, together, strict=True):
            for key, x in part.items():
                torch.testing.assert_close(x[0], expected[key][t], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_support_does_not_matter(name):
    order = np.random.default_rng(0).permutation(6)
    one, other = (
        method(name, double()).fit(images()[i], LABELS[i]).decision_function(images(4, 1))
        for i in (slice(None), order)
    )
    assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_learns_what_can_be_learnt_and_nothing_from_shuffled_labels(name):
    pixels, labels = pictures(classes=4, per_class=60, noise=40)
    data = decode(toys.vit(), (pixels, labels))
    clf = method(name, steps=8, **({} if name == "LoRAHub" else {"lr": 0.1}))
    shape = {"ways": 4, "shots": 2, "queries": 10, "tasks": 60, "batch": 60}
    right = evaluate_baseline(clf, data, **shape)
    assert right.accuracy > 25 + 5 * right.ci95
    data.labels[:] = np.random.default_rng(5).permutation(labels)
    result = evaluate_baseline(clf, data, **shape)
    # tasks share 240 images, so they vary together by more than the interval says: three of them
    assert abs(result.accuracy - 25) < 3 * result.ci95 < 8


@pytest.mark.parametrize("name", ["Full Finetuning", "LoRA + Linear", "MOLE"])
def test_fits_the_support_given_steps_enough(name):
    clf = method(name, optimizer="adam", lr=0.01, steps=60).fit(images(), LABELS)
    assert (clf.predict(images()) == LABELS).all()
    assert clf.predict_proba(images()).max(1).min() > 0.9


def test_a_task_that_diverges_guesses_the_first_way_and_leaves_others_alone():
    clf = FullFineTuning(toys.vit(), lr=0.1, steps=3)
    stacked = torch.stack((images(), images()))
    stacked[1] *= 1e30  # beyond what float32 can square
    got = clf._logits(clf._adapt(stacked, WAY, 3), stacked)
    alone = clf._logits(clf._adapt(stacked[:1], WAY, 3), stacked[:1])
    torch.testing.assert_close(got[:1], alone, rtol=1e-4, atol=1e-5)
    assert got[1].isnan().all()
    assert not got[1].argmax(-1).any()


def test_one_hot_gate_is_that_lora_and_an_even_one_the_average():
    vit, bank = toys.vit(), toys.bank(3)
    clf = MOLE(vit, bank)
    for chosen in range(3):
        gates = clf._start(2)
        for target in ("q", "v"):
            gates[f"bias.{target}"][0, :, chosen] = 1e4
        got = clf._features(gates, images(10).unflatten(0, (2, 5)))
        torch.testing.assert_close(got[0], vit(images(10)[:5], bank[chosen]), rtol=1e-4, atol=1e-5)
        average = vit(images(10)[5:], LoRA.average(bank, of="products"))
        torch.testing.assert_close(got[1], average, rtol=1e-4, atol=1e-5)
        assert (got[1] - vit(images(10)[5:], bank[chosen])).abs().max() > 0.01


def test_mole_over_products_that_only_some_loras_change():
    vit = toys.vit()
    bank = [toys.lora(0, targets=("k", "proj")), toys.lora(1, rank=1, targets=("fc1", "fc2"))]
    gates = MOLE(vit, bank)._start(1)
    assert {k.split(".")[1] for k in gates} == {"k", "proj", "fc1", "fc2"}
    for key, x in gates.items():
        if key.startswith("bias"):
            x[..., 1] = 1e4
    got = MOLE(vit, bank)._features(gates, images()[None])[0]
    torch.testing.assert_close(got, vit(images(), bank[1]), rtol=1e-4, atol=1e-5)


class PrototypesOnViews(FullFineTuning):
    """As P>M>F tunes: class centres of the support classify views of it."""

    rule = PrototypeRule("cosine")

    def _views(self, images, step):
        return torch.cat((images.flip(-1), images.roll(step + 1, -1)), 1)


def test_another_rule_and_views_of_the_support():
    vit = double()
    plain = copy.deepcopy(vit).requires_grad_()
    descent = torch.optim.SGD(plain.parameters(), lr=0.1)
    x = images().double()
    order = np.argsort(LABELS, kind="stable")
    for step in range(2):
        descent.zero_grad()
        views = torch.cat((x.flip(-1), x.roll(step + 1, -1)))
        logits = prototype_logits(class_means(plain(x)[order], 3), plain(views), "cosine")
        torch.nn.functional.cross_entropy(logits, WAY.repeat(2)).backward()
        descent.step()
    clf = PrototypesOnViews(vit, lr=0.1, steps=2).fit(images(), LABELS)
    with torch.no_grad():
        centres = class_means(plain(x)[order], 3)
        expected = prototype_logits(centres, plain(images(5, 1).double()), "cosine")
    assert clf.decision_function(images(5, 1)) == pytest.approx(expected.numpy(), rel=1e-5)
    assert clf.cost.parameters == sum(p.numel() for p in vit.parameters())


def test_results_pair_with_those_of_the_evaluation():
    """With weights that hardly move, prototypes are those of plain NN on the same tasks."""
    vit, data = toys.vit(), pictures()

    class Still(FullFineTuning):
        rule = PrototypeRule("euclidean")

    shape = {**SHAPE, "shots": 2, "tasks": 20, "seed": 2}
    expected = evaluate(vit, None, data, **shape)
    seen = []
    still = Still(vit, lr=1e-9, steps=1)
    result = evaluate_baseline(still, data, progress=lambda *x: seen.append(x), **shape)
    assert result.per_task == pytest.approx(expected.per_task)
    assert seen == [(done, 20) for done in (4, 8, 12, 16, 20)]
    assert still.cost.seconds > 0
    assert 50 < result.accuracy < 100


def test_decoded_tasks_are_those_of_embedded_ones():
    vit, data, seen = toys.vit(), pictures(), []
    decoded = decode_tasks(
        vit, data, shots=(1, 2), progress=lambda *x: seen.append(x), split="val", **SHAPE
    )
    embedded = embed_tasks(NearestCentre(vit), data, shots=(1, 2), **SHAPE)
    whole = decode(vit, data)
    for shots in (1, 2):
        assert (decoded[shots].tasks.query == embedded[shots].tasks.query).all()
        assert decoded[shots].split == "val"
    used = np.union1d(decoded[1].tasks.images, decoded[2].tasks.images)
    assert 0 < len(used) < 50
    assert (decoded[1].pixels.pixels[used] == whole.pixels[used]).all()
    assert not decoded[1].pixels.pixels[np.setdiff1d(np.arange(50), used)].any()
    assert seen[-1] == (len(used), len(used))
    kept = decode_tasks(vit, whole, shots=(1,), **SHAPE)[1]
    assert kept.pixels is whole


def test_choose_takes_the_best_point_on_validation_tasks():
    vit, seen = toys.vit(), []
    clf = LoRALinear(vit, steps=3)
    on = decode_tasks(vit, pictures(noise=90), shots=(1,), split="val", **SHAPE)[1]
    grid = {"lr": (1e-6, 0.3), "rank": (1, 2)}
    choice = choose(clf, on, grid, batch=3, progress=lambda *x: seen.append(x))
    for settings, result in choice.results:
        assert (result.per_task == score(clone(clf).set_params(**settings), on).per_task).all()
    accuracies = [result.accuracy for _, result in choice.results]
    assert choice.settings == choice.results[int(np.argmax(accuracies))][0]
    assert (choice.method.lr, clf.lr) == (choice.settings["lr"], 0.01)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_choose_refuses_test_tasks_other_backbones_and_features():
    vit = toys.vit()
    on = decode_tasks(vit, pictures(), shots=(1,), **SHAPE)[1]
    with pytest.raises(ValueError, match='got the split "test"'):
        choose(LoRALinear(vit), on)
    val = decode_tasks(vit, pictures(), shots=(1,), split="val", **SHAPE)[1]
    with pytest.raises(ValueError, match="LoRALinear that leave the backbone as they are"):
        choose(LoRALinear(vit), val, {"vit": (vit,)})
    with pytest.raises(TypeError, match="LinearProbe takes what embed_tasks returns, got TaskP"):
        score(LinearProbe(vit), val)
    embedded = embed_tasks(NearestCentre(vit), pictures(), shots=(1,), **SHAPE)[1]
    with pytest.raises(TypeError, match="MOLE takes what decode_tasks returns, got TaskF"):
        score(MOLE(vit, toys.bank()), embedded)


def test_batch_is_halved_when_memory_runs_out(monkeypatch):
    vit = toys.vit()
    clf = method("Full Finetuning", vit)
    on = decode_tasks(vit, pictures(), shots=(1,), **{**SHAPE, "tasks": 5})[1]
    expected = clf.tasks(on.pixels, on.tasks)
    sizes = []

    def tight(images, way, ways, adapt=clf._adapt):
        sizes.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("no memory left")
        return adapt(images, way, ways)

    monkeypatch.setattr(clf, "_adapt", tight)
    most = 2
    with pytest.warns(UserWarning, match="FullFineTuning: 5 tasks at once ran out of memory"):
        assert (clf.tasks(on.pixels, on.tasks, batch=5) == expected).all()
    assert sizes == [5, 2, 2, 1]
    most = 0
    with (
        pytest.warns(UserWarning, match="going on with 1"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        clf.tasks(on.pixels, on.tasks, batch=2)


@pytest.mark.parametrize("name", NAMES)
def test_clone_shares_the_backbone_and_is_not_fitted(name):
    clf = method(name).fit(images(), LABELS)
    other = clone(clf)
    assert other.vit is clf.vit
    assert getattr(other, "bank", None) is getattr(clf, "bank", None)
    assert other.get_params(deep=False) == clf.get_params(deep=False)
    with pytest.raises(NotFittedError):
        check_is_fitted(other)
    with pytest.raises(NotFittedError, match="call fit"):
        other.predict(images())
    with pytest.raises(NotFittedError, match="call fit"):
        _ = other.cost
    check_is_fitted(clf)


@pytest.mark.parametrize("name", NAMES)
def test_pickles_and_predicts_the_same(name):
    clf = method(name).fit(images(), LABELS)
    other = pickle.loads(pickle.dumps(clf))
    assert (other.decision_function(images(5, 1)) == clf.decision_function(images(5, 1))).all()
    assert other.cost == clf.cost


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("names", [("cat", "dog", "emu"), (-2, 7, 40)])
def test_labels_of_any_kind_and_probabilities(name, names):
    clf = method(name, batch_size=3).fit(images(), [names[i % 3] for i in range(6)])
    assert list(clf.classes_) == sorted(names)
    p = clf.predict_proba(images(7, 1))
    assert p.sum(1) == pytest.approx(np.ones(7), abs=1e-6)
    assert (clf.classes_[p.argmax(1)] == clf.predict(images(7, 1))).all()
    whole = clf.set_params(batch_size=64).decision_function(images(7, 1))
    assert whole == pytest.approx(np.log(p) - np.log(p[:, :1]) + whole[:, :1], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_near_fp32(name):
    clf = method(name).fit(images(), LABELS)
    full = clf.decision_function(images(5, 1))
    half = clf.set_params(precision="bf16").fit(images(), LABELS).decision_function(images(5, 1))
    assert half == pytest.approx(full, abs=0.1 * float(abs(full).max()))
    assert (half != full).any()
    assert all(x.dtype == torch.float32 for x in clf.adapted_.network.values())


def test_a_bank_set_anew_takes_effect():
    clf = method("MOLE").fit(images(), LABELS)
    before = clf.decision_function(images(4, 1))
    clf.set_params(bank=[toys.lora(7), toys.lora(8)]).fit(images(), LABELS)
    after = clf.decision_function(images(4, 1))
    fresh = make_baseline("MOLE", clf.vit, clf.bank, steps=4).fit(images(), LABELS)
    assert (after == fresh.decision_function(images(4, 1))).all()
    assert (after != before).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"precision": "fp16"}, 'precision: expected "fp32", "bf16"'),
        ({"precision": "fp8"}, 'precision: "fp8" needs backend "triton"'),
    ],
)
def test_rejects_settings_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        method(name, **options).fit(images(), LABELS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Full Finetuning", {"lr": 0}, "lr: must be positive and finite, got 0"),
        ("MOLE", {"optimizer": "lbfgs"}, 'optimizer: expected "sgd" or "adam"'),
        ("LoRA + Linear", {"rank": 0}, "rank: must be at least 1, got 0"),
        ("LoRA + Linear", {"targets": ("qkv",)}, "targets: expected some of q, k, v"),
    ],
)
def test_rejects_settings_of_one_method(name, options, message):
    with pytest.raises(ValueError, match=message):
        method(name, **options).fit(images(), LABELS)


def test_rejects_bad_input():
    clf = method("LoRA + Linear")
    with pytest.raises(TypeError, match="expected PIL images"):
        clf.fit(["a.png"], LABELS)
    with pytest.raises(ValueError, match="expected one for each of 6 images, got"):
        clf.fit(images(), LABELS[:5])
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        clf.fit(images(), ["a"] * 6)
    on = decode_tasks(clf.vit, pictures(), shots=(1,), **SHAPE)[1]
    with pytest.raises(ValueError, match="batch: must be at least 1, got 0"):
        clf.tasks(on.pixels, on.tasks, batch=0)
    larger = ViTConfig(**{**vars(toys.CONFIG), "image_size": 32})
    with pytest.raises(ValueError, match=r"data: expected pixels \(N, 3, 32, 32\), got \(50,"):
        LoRALinear(toys.vit(larger)).tasks(on.pixels, on.tasks)
    bare = decode_tasks(clf.vit, pictures(), shots=(1,), ways=3, queries=0, tasks=2)[1]
    with pytest.raises(ValueError, match="at least 2 ways and 1 query, got 3 and 0"):
        clf.tasks(bare.pixels, bare.tasks)
    wider = ViTConfig(**{**vars(toys.CONFIG), "width": 24})
    for name in ("MOLE", "LoRAHub"):
        with pytest.raises(ValueError, match="belongs to another model"):
            make_baseline(name, toys.vit(), [toys.lora(config=wider)]).fit(images(), LABELS)
        with pytest.raises(ValueError, match=f"{name}: needs a bank"):
            make_baseline(name, toys.vit())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_cuda_as_on_the_cpu(name, no_tf32):
    vit = toys.vit()
    on = decode_tasks(vit, pictures(), shots=(2,), **SHAPE)[2]
    clf = method(name, vit)
    expected = clf.fit(images(), LABELS).decision_function(images(9, 1))
    guess = clf.tasks(on.pixels, on.tasks)
    there = method(name, toys.vit().to("cuda"))
    got = there.fit(images(), LABELS).decision_function(images(9, 1))
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert (there.tasks(on.pixels, on.tasks) == guess).float().mean() > 0.95
    assert there.cost.peak_memory_bytes > 0
    assert there.tasks(on.pixels.to("cuda"), on.tasks).shape == guess.shape


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", ["Full Finetuning", "LoRA + Linear", "MOLE"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_cuda_waits_for_nothing(name, precision):
    vit = toys.vit().to("cuda")
    clf = method(name, vit, optimizer="adam", precision=precision)
    stacked, way = images(12).cuda().unflatten(0, (2, 6)), WAY.cuda()
    clf._adapt(stacked, way, 3)
    try:
        torch.cuda.set_sync_debug_mode("error")
        adapted = clf._adapt(stacked, way, 3)
        clf._logits(adapted, stacked)
    finally:
        torch.cuda.set_sync_debug_mode("default")

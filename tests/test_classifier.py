"""The few-shot classifier has scikit-learn's habits."""

import pickle

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestCentroid
from sklearn.utils.validation import check_is_fitted

from fastrecycle.classifier import Embedder, FewShotClassifier, class_means, prototype_logits

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")


def images(count=12, seed=0):
    return torch.randn(count, 3, 16, 16, generator=toys.generator(seed))


LABELS = np.array(["cat", "dog", "emu"] * 4)  # not class-major


def test_prediction_is_the_nearest_class_mean():
    vit, lora, x, y = toys.vit(), toys.lora(), images(), images(20, 1)
    clf = FewShotClassifier(vit, lora, batch_size=5).fit(x, LABELS)
    with torch.no_grad():
        centroids = NearestCentroid().fit(vit(x, lora).numpy(), LABELS)
        expected = centroids.predict(vit(y, lora).numpy())
    assert (clf.predict(y) == expected).all()
    assert len(set(expected)) > 1
    assert clf.score(y, expected) == 1.0
    assert not (FewShotClassifier(vit).fit(x, LABELS).prototypes_ == clf.prototypes_).any()


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_probabilities_sum_to_one_and_follow_the_distances(distance):
    clf = FewShotClassifier(toys.vit(), distance=distance).fit(images(), LABELS)
    p, scores = clf.predict_proba(images(7, 1)), clf.decision_function(images(7, 1))
    assert p.shape == (7, 3)
    assert p.sum(1) == pytest.approx(np.ones(7), abs=1e-6)
    powers = np.exp(scores - scores.max(1, keepdims=True))
    assert p == pytest.approx(powers / powers.sum(1, keepdims=True), abs=1e-6)
    assert (clf.classes_[p.argmax(1)] == clf.predict(images(7, 1))).all()


@pytest.mark.parametrize(
    "names", [("cat", "dog", "emu"), (7, -2, 40), (1.5, 0.5, 2.5), (b"x", b"y", b"z")]
)
def test_labels_of_any_kind(names):
    y = [names[i % 3] for i in range(12)]
    clf = FewShotClassifier(toys.vit()).fit(images(), y)
    assert list(clf.classes_) == sorted(names)
    guess = clf.predict(images())
    assert guess.dtype == np.asarray(y).dtype
    plain = FewShotClassifier(toys.vit()).fit(images(), LABELS).predict(images())
    index = {name: i for i, name in enumerate(("cat", "dog", "emu"))}
    assert list(guess) == [names[index[g]] for g in plain]


def test_labels_from_a_tensor_and_booleans():
    y = torch.tensor([0, 1] * 6)
    assert FewShotClassifier(toys.vit()).fit(images(), y).classes_.tolist() == [0, 1]
    assert FewShotClassifier(toys.vit()).fit(images(), y.bool()).classes_.tolist() == [False, True]


def test_clone_shares_the_backbone_and_is_not_fitted():
    vit, lora = toys.vit(), toys.lora()
    clf = FewShotClassifier(vit, lora, "cosine", 3).fit(images(), LABELS)
    copy = clone(clf)
    assert copy.vit is vit
    assert copy.lora is lora
    assert (copy.distance, copy.batch_size) == ("cosine", 3)
    with pytest.raises(NotFittedError):
        check_is_fitted(copy)
    check_is_fitted(clf)
    assert clf.set_params(distance="squared").get_params()["distance"] == "squared"


def test_cross_validation_of_scikit_learn_runs():
    x = images(12).numpy() + np.repeat(np.arange(3), 4)[:, None, None, None]
    y = np.repeat(["a", "b", "c"], 4)
    scores = cross_val_score(FewShotClassifier(toys.vit()), x, y, cv=2)
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()


def test_takes_pil_images_of_any_mode_and_arrays():
    vit = toys.vit()
    rng = np.random.default_rng(0)
    pixels = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)) for _ in range(6)]
    pixels[1], pixels[2] = pixels[1].convert("L"), pixels[2].convert("RGBA")
    y = ["a", "b"] * 3
    from_pil = FewShotClassifier(vit).fit(pixels, y)
    tensor = vit.transform(pixels)
    for other in (tensor, tensor.numpy(), tensor.double().numpy(), tuple(pixels)):
        again = FewShotClassifier(vit).fit(other, y)
        assert torch.equal(again.prototypes_, from_pil.prototypes_)
    assert from_pil.predict(pixels[0]).shape == (1,)
    assert from_pil.predict(pixels).tolist() == from_pil.predict(tensor).tolist()


def test_rejects_bad_input():
    clf = FewShotClassifier(toys.vit())
    with pytest.raises(NotFittedError, match="call fit"):
        clf.predict(images())
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        clf.fit(images(), ["cat"] * 12)
    with pytest.raises(ValueError, match="expected one for each of 12 images, got"):
        clf.fit(images(), LABELS[:5])
    with pytest.raises(ValueError, match="expected one for each of 12 images, got"):
        clf.fit(images(), np.eye(12))
    with pytest.raises(TypeError, match="expected PIL images or a normalised"):
        clf.fit(["cat.jpg"] * 12, LABELS)
    with pytest.raises(TypeError, match=r"expected normalised floats, got torch\.uint8"):
        clf.fit(images().byte(), LABELS)
    bad = images()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        clf.fit(bad, LABELS)
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 16, 16\)"):
        clf.fit(images()[..., :8], LABELS)


def test_logits_of_distances():
    prototypes, x = torch.tensor([[0.0, 3.0], [4.0, 0.0]]), torch.tensor([[0.0, 0.0], [4.0, 3.0]])
    near = prototype_logits(prototypes, x)
    # a distance of 0 is floored at the root of the smallest float: 1e-10
    torch.testing.assert_close(near, -torch.tensor([[3.0, 4.0], [4.0, 3.0]]))
    torch.testing.assert_close(
        prototype_logits(prototypes, x, "squared"), -torch.tensor([[9.0, 16.0], [16.0, 9.0]])
    )
    cosine = prototype_logits(prototypes, x[1:], "cosine")
    torch.testing.assert_close(cosine, torch.tensor([[6.0, 8.0]]))
    assert class_means(torch.arange(8.0).reshape(4, 2), 2).tolist() == [[1, 2], [5, 6]]


def test_near_neighbours_far_from_the_origin_do_not_cancel():
    """|a|^2 - 2ab + |b|^2 would lose these distances in float32."""
    prototypes = torch.full((1, 8), 1000.0)
    x = prototypes + 0.01
    got = prototype_logits(prototypes, x).item()
    assert got == pytest.approx(-0.01 * 8**0.5, rel=0.01)  # floats near 1000 step by 6e-5


def test_half_precision_features_are_compared_in_float32():
    x = torch.randn(4, 8, generator=toys.generator(0)).bfloat16()
    logits = prototype_logits(x[:2], x[2:])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, prototype_logits(x[:2].float(), x[2:].float()))


def test_a_parameter_set_anew_takes_effect():
    vit, x = toys.vit(), images()
    clf = FewShotClassifier(vit, toys.lora(0)).fit(x, LABELS)
    before = clf.decision_function(x)
    clf.set_params(lora=toys.lora(1)).fit(x, LABELS)
    fresh = FewShotClassifier(vit, toys.lora(1)).fit(x, LABELS)
    assert (clf.decision_function(x) == fresh.decision_function(x)).all()
    assert (clf.decision_function(x) != before).any()


def test_pickles_and_predicts_the_same():
    clf = FewShotClassifier(toys.vit(), toys.lora()).fit(images(), LABELS)
    other = pickle.loads(pickle.dumps(clf))
    assert (other.decision_function(images(5, 1)) == clf.decision_function(images(5, 1))).all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["compile", "triton"])
def test_recorded_features_are_the_eager_ones(precision, backend, no_tf32):
    vit, lora = toys.vit().to("cuda"), toys.lora()
    x = images(10).to("cuda")
    exact = Embedder(vit, lora)(x)
    plain = Embedder(vit, lora, precision=precision)(x)
    embed = Embedder(vit, lora, precision=precision, backend=backend)
    got = torch.cat([embed(part, 4) for part in x.split(4)])  # the last part is filled up
    assert got.shape == exact.shape
    allowed = 2 * (plain - exact).norm() + 1e-5 * exact.norm()
    assert (got - exact).norm() <= allowed
    assert len(embed.graphs) == 1


@pytest.mark.parametrize(("count", "full"), [(1, 1), (3, 4), (5, 8), (8, 8), (9, 8)])
def test_few_images_are_not_filled_up_to_a_whole_batch(monkeypatch, count, full):
    asked = []

    def embed(self, batch, batch_size=None):
        asked.append(batch_size)
        return torch.zeros(len(batch), 16)

    monkeypatch.setattr(Embedder, "__call__", embed)
    features = FewShotClassifier(toys.vit(), batch_size=8).features(images(count))
    assert len(features) == count
    assert set(asked) == {full}

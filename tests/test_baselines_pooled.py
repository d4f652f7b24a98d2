"""Baselines trained on the synthetic pool, against definitions and plain implementations."""

import copy
import itertools
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from sklearn.base import clone
from torch import nn

from fastrecycle.augment import shrink_table
from fastrecycle.baselines import (
    CAML,
    PMF,
    PMF_GRID,
    PMF_META,
    CAMLConfig,
    CAMLNetwork,
    NearestCentre,
    choose,
    decode_tasks,
    embed_tasks,
    evaluate_baseline,
    make_baseline,
    pool_views,
    train_caml,
)
from fastrecycle.baselines.caml import elmes
from fastrecycle.baselines.caml_training import CAMLTrainer
from fastrecycle.classifier import FewShotClassifier
from fastrecycle.eval import Result, decode
from fastrecycle.files import load_safetensors, save_safetensors
from fastrecycle.metatrain import MetaTrainer, meta_train

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
SMALL = {"code_dim": 16, "layers": 2, "heads": 2}
TASK = {"ways": 3, "shots": 2, "queries": 4, "tasks": 2}


def config(**changes):
    base = {"steps": 3, "resolution": (8, 16), "sides": 3, "max_ways": 4, **SMALL, **TASK}
    return CAMLConfig(**{**base, **changes})


def network(features=16, seed=0, **changes):
    """With weights large enough that every part of it tells in the logits."""
    model = CAMLNetwork(features, **{**SMALL, "max_ways": 4, **changes}, seed=seed)
    g = toys.generator(seed)
    for p in model.parameters():
        if p.ndim > 1:
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[1] ** 0.5)
    model.centre.normal_(generator=g)
    return model


@pytest.fixture(scope="module")
def trained():
    """A network that has learnt to read the support set: (backbone, network)."""
    torch.set_num_threads(1)
    pool = toys.pool(40)
    changes = {"steps": 400, "shots": 1, "tasks": 8, "lr": 2e-3}
    return toys.vit(), train_caml(toys.vit(), pool, config(**changes))


def tasks_of(vit, count=40, ways=3, shots=1, queries=5, seed=77):
    """Features of tasks from LoRAs that training never saw: support, query (E, ., F), truth."""
    support, query = [], []
    embed = FewShotClassifier(vit)
    for t in range(count):
        part = toys.task_images(t, ways, shots + queries, seed=seed)
        features = embed.features(vit.normalise(part.images.float() / 255))
        s, q = features.unflatten(0, (ways, -1)).split((shots, queries), 1)
        support.append(s.flatten(0, 1))
        query.append(q.flatten(0, 1))
    return torch.stack(support), torch.stack(query), torch.arange(ways).repeat_interleave(queries)


# ------------------------------------------------------------------ label codes


@pytest.mark.parametrize(("ways", "dim"), [(2, 2), (3, 8), (5, 256), (20, 20)])
def test_codes_are_unit_vectors_at_the_widest_equal_angle(ways, dim):
    codes = elmes(ways, dim, seed=3)
    assert codes.shape == (ways, dim)
    cosines = torch.full((ways, ways), -1 / (ways - 1)).fill_diagonal_(1)
    torch.testing.assert_close(codes @ codes.T, cosines)
    # Summing to 0 is what no set can undercut: 0 <= |sum u|^2 = W + W (W - 1) cosine.
    torch.testing.assert_close(codes.sum(0), torch.zeros(dim), atol=1e-5, rtol=0)
    assert (elmes(ways, dim, seed=3) == codes).all()
    assert (elmes(ways, dim, seed=4) != codes).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_ways": 1}, "ways: must be at least 2, got 1"),
        ({"max_ways": 5, "code_dim": 4}, "dim: must be at least the 5 ways, got 4"),
        ({"layers": 0}, "layers: must be at least 1, got 0"),
        ({"heads": 0}, "heads: must be at least 1, got 0"),
        ({"heads": 3}, r"heads: 3 do not divide the width 32 = 16 features \+ 16 of a code"),
    ],
)
def test_network_rejects_sizes_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        CAMLNetwork(16, **{**SMALL, **arguments})


# ------------------------------------------------------------------ network


def plain_attention(x, block):
    """Softmax attention of one sequence (T, D), written out."""
    attend = block.self_attn
    heads = attend.num_heads
    q, k, v = (x @ attend.in_proj_weight.T + attend.in_proj_bias).chunk(3, -1)
    out = []
    for a, b, c in zip(*(y.chunk(heads, -1) for y in (q, k, v)), strict=True):
        out.append((a @ b.T / a.shape[1] ** 0.5).softmax(-1) @ c)
    return attend.out_proj(torch.cat(out, -1))


def test_network_matches_a_sequence_written_out():
    model, g = network(), toys.generator(1)
    support, query = torch.randn(2, 6, 16, generator=g), torch.randn(2, 4, 16, generator=g)
    way, codes = torch.tensor([0, 2, 1, 1, 0, 2]), torch.tensor([[3, 0, 2], [1, 2, 0]])
    got = model(support, way, query, codes)
    unit = lambda x: (x - model.centre) / (x - model.centre).norm()  # noqa: E731
    for t, q in itertools.product(range(2), range(4)):
        tokens = [torch.cat((unit(query[t, q]), model.unknown))]
        for image, w in zip(support[t], way, strict=True):
            tokens.append(torch.cat((unit(image), model.codes[codes[t, w]])))
        x = torch.stack(tokens)
        for block in model.blocks:
            x = x + plain_attention(block.norm1(x), block)
            x = x + block.linear2(nn.functional.gelu(block.linear1(block.norm2(x))))
        answer = model.answer(model.norm(x[0]))
        expected = torch.stack([answer @ model.codes[c] for c in codes[t]])
        torch.testing.assert_close(got[t, q], expected, atol=1e-5, rtol=1e-5)


def test_order_of_the_support_does_not_matter():
    clf, g = CAML(toys.vit(), network()), toys.generator(2)
    x, y = torch.randn(9, 16, generator=g), np.arange(9) % 3
    query = torch.randn(7, 16, generator=g)
    order = torch.randperm(9, generator=g)
    one = clf.fit_features(x, y).logits(query)
    other = clf.fit_features(x[order], y[order.numpy()]).logits(query)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert one.std(0).min() > 0.01


def test_relabelling_ways_that_keep_their_codes_permutes_the_logits():
    model, g = network(), toys.generator(3)
    support, query = torch.randn(1, 6, 16, generator=g), torch.randn(1, 5, 16, generator=g)
    way, codes = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([[0, 1, 2]])
    to = torch.tensor([2, 0, 1])  # way w becomes way to[w]
    moved = torch.empty_like(codes)
    moved[:, to] = codes
    got = model(support, to[way], query, moved)[..., to]
    expected = model(support, way, query, codes)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    # with other codes the logits are others: the network alone is not equivariant
    assert (model(support, to[way], query, codes)[..., to] - expected).abs().max() > 0.01


def test_training_teaches_that_relabelling_changes_little(trained):
    support, query, _ = tasks_of(trained[0])
    clf, to = CAML(*trained), torch.tensor([2, 0, 1])
    guess = clf.tasks(support, 3, query)
    # way w's image moves to row to[w], and so do its answers
    moved = torch.empty_like(support)
    moved[:, to] = support
    assert (clf.tasks(moved, 3, query) == to[guess]).float().mean() > 0.9


def test_a_query_does_not_depend_on_the_other_queries():
    model, g = network(), toys.generator(4)
    support, query = torch.randn(1, 6, 16, generator=g), torch.randn(1, 5, 16, generator=g)
    way, codes = torch.arange(3).repeat_interleave(2), torch.arange(3)[None]
    together = model(support, way, query, codes)
    alone = [model(support, way, query[:, i : i + 1], codes) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_save_and_load_are_equal(tmp_path):
    model = network(seed=5)
    model.save(tmp_path / "caml.safetensors")
    other = CAMLNetwork.load(tmp_path / "caml.safetensors")
    assert other.shape == model.shape
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all((x == other.state_dict()[n]).all() for n, x in model.state_dict().items())
    assert not any(p.requires_grad for p in other.parameters())


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "caml.safetensors"
    with pytest.raises(FileNotFoundError):
        CAMLNetwork.load(path)
    save_safetensors(path, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a network of CAML"):
        CAMLNetwork.load(path)
    network().save(path)
    tensors, metadata = load_safetensors(path)
    tensors.pop("unknown")
    save_safetensors(path, tensors, metadata)
    with pytest.raises(ValueError, match="Missing key"):
        CAMLNetwork.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 10**6}, {"features": 10**9}, {"code_dim": 8.0}, {"heads": "2"}, {"heads": 0},
        {"heads": 7}, {"more": 1}, None,
    ],
)  # fmt: skip
def test_load_builds_nothing_that_the_tensors_do_not_hold(tmp_path, changes):
    path = tmp_path / "caml.safetensors"
    network().save(path)
    tensors, metadata = load_safetensors(path)
    (key,) = (k for k in metadata if "caml" in k)
    shape = json.loads(metadata[key]) if changes is not None else []
    text = json.dumps({**shape, **changes} if changes is not None else shape)
    save_safetensors(path, tensors, {**metadata, key: text})
    with pytest.raises(ValueError, match=r"caml\.safetensors: .*(description|heads)"):
        CAMLNetwork.load(path)
    if changes == {"features": 10**9}:  # told by the tensors, too, which hold no such blocks
        tensors["centre"] = torch.zeros(10**5)
        save_safetensors(path, tensors, {**metadata, key: text.replace("1" + "0" * 9, "100000")})
        with pytest.raises(ValueError, match="layers of width"):
            CAMLNetwork.load(path)


# ------------------------------------------------------------------ classifier


def test_tasks_side_by_side_come_out_as_each_alone(trained, monkeypatch):
    support, query, truth = tasks_of(trained[0], count=6, shots=2)
    clf = CAML(*trained)
    guess = clf.tasks(support, 3, query)
    monkeypatch.setattr("fastrecycle.baselines.caml.TOKENS", 30)  # four sequences of 7 at once
    assert (clf.tasks(support, 3, query) == guess).all()
    for t in range(6):
        alone = clf.fit_features(support[t], np.repeat(["a", "b", "c"], 2))
        assert (alone.predict_features(query[t]) == np.array(list("abc"))[guess[t]]).all()
    assert clf.cost.parameters == 0
    assert (guess == truth).float().mean() > 0.8


def test_learns_to_read_a_support_set_of_unseen_classes(trained):
    support, query, truth = tasks_of(trained[0])
    right = CAML(*trained).tasks(support, 3, query) == truth
    untrained = CAML(trained[0], CAMLNetwork(16, max_ways=4, **SMALL))
    start = untrained.tasks(support, 3, query) == truth
    result = Result.of(100 * right.float().mean(1).double().numpy())
    nearest = NearestCentre(trained[0]).tasks(support, 3, query) == truth
    assert result.accuracy > 100 * nearest.float().mean() - result.ci95
    assert result.accuracy - result.ci95 > 80
    assert start.float().mean() < 0.5
    # fewer ways than it trained with, and as many as it has codes for
    for ways in (2, 4):
        support, query, truth = tasks_of(trained[0], ways=ways)
        assert (CAML(*trained).tasks(support, ways, query) == truth).float().mean() > 1.5 / ways


def test_shuffled_labels_give_chance_within_the_interval(trained):
    """Independent tasks whose labels have nothing to do with their features."""
    g, (count, ways) = toys.generator(8), (600, 3)
    support, query, _ = tasks_of(trained[0])
    pick = torch.randint(len(support), (count,), generator=g)
    query, queries = query[pick], query.shape[1]
    order = torch.rand(count, queries, generator=g).argsort(1)
    query = query.gather(1, order[..., None].expand(-1, -1, 16))
    guess = CAML(*trained).tasks(support[pick], ways, query)
    right = guess == torch.arange(ways).repeat_interleave(queries // ways)
    result = Result.of(100 * right.float().mean(1).double().numpy())
    assert abs(result.accuracy - 100 / 3) < result.ci95 < 1.5


def pictures(classes=5, per_class=12):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), per_class)
    colour = rng.integers(60, 196, (classes, 1, 1, 3))[labels]
    noisy = colour + rng.integers(-40, 41, (len(labels), 16, 16, 3))
    return noisy.astype(np.uint8), labels


def test_evaluates_on_frozen_tasks_by_its_name_in_the_table(trained):
    vit, model = trained
    shape = {"ways": 3, "shots": 1, "queries": 4, "tasks": 30}
    result = evaluate_baseline(make_baseline("CAML", vit, model=model), pictures(), **shape)
    assert result.accuracy > 60
    with pytest.raises(ValueError, match="CAML: needs model="):
        make_baseline("CAML", vit)


def test_choose_takes_a_network_by_validation_tasks_and_refuses_test_tasks(trained):
    vit, model = trained
    clf = CAML(vit, CAMLNetwork(16, max_ways=4, **SMALL))
    shape = {"shots": (1,), "ways": 3, "queries": 4, "tasks": 30}
    grid = {"model": (clf.model, model)}
    tasks = embed_tasks(clf, pictures(), split="val", **shape)[1]
    assert choose(clf, tasks, grid).method.model is model
    with pytest.raises(ValueError, match='got the split "test"'):
        choose(clf, embed_tasks(clf, pictures(), split="test", **shape)[1], grid)


def test_clone_shares_and_pickle_keeps(trained):
    clf = CAML(*trained).fit_features(*(lambda s, q, t: (s[0], [0, 1, 2]))(*tasks_of(trained[0])))
    assert clone(clf).model is trained[1]
    query = torch.randn(4, 16, generator=toys.generator(0))
    other = pickle.loads(pickle.dumps(clf))
    assert (other.logits(query) == clf.logits(query)).all()


def test_classifier_rejects_what_does_not_fit():
    x = torch.randn(10, 16, generator=toys.generator(0))
    clf = CAML(toys.vit(), network())
    with pytest.raises(ValueError, match="ways: the model tells up to 4 apart, got 5"):
        clf.fit_features(x, np.arange(10) % 5)
    with pytest.raises(ValueError, match="the model was trained on 16 a picture, got 15"):
        clf.fit_features(x[:, 1:], np.arange(10) % 2)
    with pytest.raises(ValueError, match="model: expected a CAMLNetwork, got str"):
        CAML(toys.vit(), "caml.safetensors").fit_features(x, np.arange(10) % 2)


# ------------------------------------------------------------------ training


def test_views_are_the_features_of_augmented_images():
    vit, pool = toys.vit(), toys.pool(2, per_class=3)
    # 8, 12, 16, 20, 24 pixels; the last two are beyond the side
    settings = config(resolution=(8, 24), sides=5)
    views = pool_views(vit, pool, settings, batch_size=5)
    assert views.features.shape == (2, 3, 18, 16)
    assert views.drawn == (0, 1, 2, 2, 2)
    embed = FewShotClassifier(vit)
    for i, flip in enumerate((False, True)):
        for j, side in enumerate((8, 12, 16)):
            matrix = shrink_table(16, side, side)[0]
            pixels = (matrix @ (pool.images.float() / 255) @ matrix.T).clamp(0, 1)
            pixels = pixels.flip(-1) if flip else pixels
            expected = embed.features(vit.normalise(pixels))
            torch.testing.assert_close(views.features[i, j], expected, atol=1e-5, rtol=1e-5)


def test_views_without_augmentation_are_plain_features():
    vit, pool = toys.vit(), toys.pool(1)
    views = pool_views(vit, pool, config(resolution=(0, 0), flip=0))
    expected = FewShotClassifier(vit).features(vit.normalise(pool.images.float() / 255))
    torch.testing.assert_close(views.features, expected[None, None])


def test_draws_tasks_in_one_view_each_with_codes_at_random():
    pool, settings = toys.pool(4), config(tasks=3, resolution=(8, 24), sides=5)
    views = pool_views(toys.vit(), pool, settings)
    trainer = CAMLTrainer(views, pool, settings, seed=1, precision="fp32")
    draw = trainer._draw(0)
    view, image = draw.rows // len(pool), draw.rows % len(pool)
    assert (view == view[..., :1]).all()
    assert set(view.unique().tolist()) == set(range(6))
    # a third, of five sides three are beyond the image's
    assert (view % 3 == 2).float().mean() == pytest.approx(0.6, abs=0.12)
    expected = trainer.sampler.draw(0, len(image)).rows.reshape(image.shape)
    assert (image.numpy() == expected).all()
    assert all(len(set(c)) == 3 for c in draw.codes.flatten(0, 1).tolist())
    assert len(draw.codes.flatten(0, 1).unique(dim=0)) == 24  # all 4 x 3 x 2 ways to deal them


def test_one_step_is_adamw_on_the_cross_entropy():
    pool, settings = toys.pool(4), config(lr=1e-2, warmup=0, clip=0.05)
    views = pool_views(toys.vit(), pool, settings)
    trainer = CAMLTrainer(views, pool, settings, seed=1, precision="fp32")
    model = copy.deepcopy(trainer.model)
    draw = trainer._draw(0)
    features = trainer.table[draw.rows[0]].view(2, 3, 6, 16)
    losses = []
    for each, codes in zip(features, draw.codes[0], strict=True):
        support, query = each[:, :2].reshape(1, 6, 16), each[:, 2:].reshape(1, 12, 16)
        way, truth = (torch.arange(3).repeat_interleave(n) for n in (2, 4))
        logits = model(support, way, query, codes[None])[0]
        losses.append(nn.functional.cross_entropy(logits, truth))
    loss = torch.stack(losses).mean()
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr_at(0), weight_decay=0.01)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    got = trainer.step()
    torch.testing.assert_close(got["loss"], loss.detach())
    pairs = list(zip(trainer.model.parameters(), model.parameters(), strict=True))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
        theirs.grad = ours.grad  # Adam's first step scales what is rounded up to lr
    optimiser.step()
    assert all((ours == theirs).all() for ours, theirs in pairs)


def test_training_is_the_same_for_the_same_seed():
    pool = toys.pool(4)
    nets = [train_caml(toys.vit(), pool, config(), seed=s).state_dict() for s in (0, 0, 1)]
    assert all((x == nets[1][name]).all() for name, x in nets[0].items())
    assert all((x != nets[2][n]).any() for n, x in nets[0].items() if x.ndim > 1)


def test_training_moves_every_parameter_and_reports():
    pool, seen = toys.pool(4), []
    model = train_caml(
        toys.vit(), pool, config(), on_step=lambda step, values: seen.append((step, set(values)))
    )
    start = CAMLNetwork(16, max_ways=4, **SMALL)
    assert all((p != q).any() for p, q in zip(model.parameters(), start.parameters(), strict=True))
    assert not any(p.requires_grad for p in model.parameters())
    assert [s for s, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == {"loss", "accuracy", "lr"}


def test_half_precision_trains_close_to_full():
    pool = toys.pool(4)
    seen = {}
    for precision in ("fp32", "bf16"):
        on_step = lambda step, values, p=precision: seen.setdefault(p, []).append(values)  # noqa: E731
        train_caml(toys.vit(), pool, config(), precision=precision, on_step=on_step)
    losses = [seen[p][-1]["loss"] for p in ("fp32", "bf16")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bf16 keeps 8 bits: 0.4 %


def test_rate_rises_and_falls():
    settings = config(steps=100, lr=1.0, warmup=0.1)
    assert settings.lr_at(0) == pytest.approx(0.1)
    assert settings.lr_at(9) == settings.lr_at(10) == 1
    assert settings.lr_at(55) == pytest.approx(0.5)
    assert settings.lr_at(99) < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: must be >= 1"),
        ({"sides": 0}, "sides: must be >= 1"),
        ({"lr": 0}, "lr: must be positive and finite"),
        ({"weight_decay": -1}, "weight_decay: must be finite and not negative"),
        ({"warmup": 1}, r"warmup: must be in \[0, 1\)"),
        ({"clip": 0}, "clip: must be positive"),
        ({"ways": 5}, "ways: must be at most max_ways 4, got 5"),
        ({"shots": 0}, "shots: must be >= 1"),
        ({"flip": 2}, r"flip: must be in \[0, 1\]"),
        ({"resolution": (9, 8)}, "resolution: expected 1 <= low <= high"),
    ],
)
def test_training_rejects_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_training_rejects_a_pool_that_does_not_fit():
    pool = toys.pool(2)
    with pytest.raises(ValueError, match="needs 16 images a class"):
        train_caml(toys.vit(), pool, config(queries=14))
    wider = toys.CONFIG.__class__(**{**vars(toys.CONFIG), "image_size": 20})
    with pytest.raises(ValueError, match="images of side 16, the backbone takes 20"):
        train_caml(toys.vit(wider), pool, config())
    views = pool_views(toys.vit(), pool, config())
    for other, changes in ((toys.pool(3), {}), (pool, {"flip": 0.0}), (pool, {"sides": 2})):
        with pytest.raises(
            ValueError, match=r"views: expected \(images, flip, resolution, sides\)"
        ):
            train_caml(toys.vit(), other, config(**changes), views=views)


@pytest.mark.gpu
def test_recorded_training_on_cuda_is_that_on_the_cpu(no_tf32):
    pool, settings = toys.pool(4), config(steps=5)
    expected = train_caml(toys.vit(), pool, settings)
    got = train_caml(toys.vit().to("cuda"), pool, settings, backend="compile")
    for ours, theirs in zip(got.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=2e-4, rtol=1e-3)
    support, query, _ = tasks_of(toys.vit(), count=4)
    guess = CAML(toys.vit(), expected).tasks(support, 3, query)
    on_cuda = CAML(toys.vit().to("cuda"), expected.to("cuda"))
    assert (on_cuda.tasks(support.cuda(), 3, query.cuda()).cpu() == guess).all()
    with pytest.raises(ValueError, match="model: is on cpu, the features on cuda:0"):
        CAML(toys.vit().to("cuda"), network()).tasks(support.cuda(), 3, query.cuda())


# ------------------------------------------------------------------ P>M>F


def pmf_meta(**changes):
    base = {"steps": 3, "ways": 3, "shots": 2, "queries": 3, "tasks": 2, "resolution": (8, 16)}
    return replace(PMF_META, **{**base, **changes})


def test_meta_training_is_that_of_a_cosine_protonet():
    """The loss of a step and its gradients by every tensor, from images on, written out."""
    vit, pool = toys.vit(), toys.pool()
    trainer = MetaTrainer(vit, pool, pmf_meta(interpolation=0.5), seed=2)
    images = trainer._batches(0)[0].images.view(2, 3, 5, 3, 16, 16)
    model = copy.deepcopy(vit).requires_grad_(True)
    losses = []
    for task in images:
        centres = torch.stack([model(way[:2]).mean(0) for way in task])
        for way, own in enumerate(task):
            for query in own[2:]:
                cosines = nn.functional.cosine_similarity(model(query[None]), centres)
                losses.append(nn.functional.cross_entropy(10 * cosines, torch.tensor(way)))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert trainer.step()["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(trainer.parameters, model.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * scale, rtol=1e-3)


def test_meta_training_moves_every_tensor_of_the_backbone_and_leaves_the_one_given():
    vit = toys.vit()
    before = copy.deepcopy(vit.state_dict())
    learnt = meta_train(vit, toys.pool(), pmf_meta()).vit
    assert all((x == before[name]).all() for name, x in vit.state_dict().items())
    assert [n for n, p in learnt.named_parameters() if (p == before[n]).all()] == []


def support_images(count=6, seed=0):
    return torch.randn(count, 3, 16, 16, generator=toys.generator(seed))


WAY = np.arange(6) % 3


def test_prototypes_without_tuning_are_those_of_a_plain_protonet():
    vit = toys.vit()
    x, query = support_images(), support_images(5, 1)
    clf = PMF(vit, lr=0).fit(x, WAY)
    with torch.no_grad():
        support, features = vit(x), vit(query)
    for q, logits in zip(features, clf.decision_function(query), strict=True):
        for way in range(3):
            centre = support[way == WAY].mean(0)
            expected = 10 * (q @ centre) / (q.norm() * centre.norm())
            assert logits[way] == pytest.approx(expected.item(), abs=1e-5)
    assert clf.cost.parameters == 0


def test_prototypes_without_tuning_are_those_of_easyfsl():
    methods = pytest.importorskip("easyfsl.methods", reason="easyfsl is not installed")
    vit, x, query = toys.vit(), support_images(), support_images(5, 1)
    reference = methods.PrototypicalNetworks(copy.deepcopy(vit), use_softmax=False)
    reference.process_support_set(x, torch.from_numpy(WAY))
    with torch.no_grad():
        expected = 10 * reference.cosine_distance_to_prototypes(vit(query))
    got = PMF(vit, lr=0).fit(x, WAY).decision_function(query)
    assert got == pytest.approx(expected.numpy(), abs=1e-5)


def test_augmentation_is_that_of_its_authors_written_out():
    """Image by image and pixel by pixel, from the same draws."""
    clf, kinds = PMF(toys.vit(), seed=3), set()
    images = support_images(4).view(2, 2, 3, 16, 16)
    for step in range(20):
        rng = np.random.Generator(np.random.Philox(key=[3, step]))
        got = clf._views(images, step)
        if rng.random() >= 0.9:
            assert got is None
            kinds.add(None)
            continue
        flip = rng.random() < 0.5
        kinds.add(flip)
        brightness, saturation, contrast = rng.random((3, 2))
        down, right = rng.integers(0, 5, (2, 2)) - 2
        for t, i in itertools.product(range(2), range(2)):
            x = images[t, i].numpy().astype(np.float64)
            x = (x[:, :, ::-1] if flip else x) + brightness[i] - 0.5
            x = x.mean(0) + 2 * saturation[i] * (x - x.mean(0))
            x = x.mean() + (0.5 + contrast[i]) * (x - x.mean())
            expected = np.zeros_like(x)
            for row, column in itertools.product(range(16), range(16)):
                r, c = row + down[i], column + right[i]
                if 0 <= r < 16 and 0 <= c < 16:
                    expected[:, row, column] = x[:, r, c]
            assert got[t, i].numpy() == pytest.approx(expected, abs=1e-5)
    assert kinds == {None, True, False}


def test_fine_tuning_is_a_plain_loop_of_adam():
    # in float64 what is rounded differently stays small enough for Adam
    vit, x = toys.vit().double(), support_images().double()
    plain, way = copy.deepcopy(vit).requires_grad_(True), torch.from_numpy(WAY)
    clf = PMF(vit, lr=1e-3, steps=12, seed=1).fit(x, WAY)
    optimiser = torch.optim.Adam(plain.parameters(), lr=1e-3)

    def logits(images):
        support = plain(x)
        centres = torch.stack([support[way == w].mean(0) for w in range(3)])
        features = plain(images)
        return 10 * nn.functional.cosine_similarity(features[:, None], centres[None], dim=-1)

    for step in range(12):
        views = clf._views(x[None], step)
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits(x if views is None else views[0]), way).backward()
        optimiser.step()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(clf.adapted_.network[name][0], p.detach())
        assert (p != vit.state_dict()[name]).any()
    query = support_images(5, 1).double()
    with torch.no_grad():
        expected = logits(query).numpy()
    assert clf.decision_function(query) == pytest.approx(expected, rel=1e-5)
    assert clf.cost.parameters == sum(p.numel() for p in vit.parameters())


@pytest.mark.parametrize("lr", [0, 1e-2])
def test_tasks_of_pmf_side_by_side_come_out_as_each_alone(lr):
    vit, (pixels, labels) = toys.vit(), pictures()
    shape = {"shots": (2,), "ways": 3, "queries": 4, "tasks": 5, "split": "val"}
    on = decode_tasks(vit, decode(vit, (pixels, labels)), **shape)[2]
    clf = PMF(vit, lr=lr, steps=4)
    guess = clf.tasks(on.pixels, on.tasks, batch=3)
    for t in range(5):
        support, query = (
            vit.normalise(on.pixels.pixels[rows[t]].float() / 255)
            for rows in (on.tasks.support, on.tasks.query)
        )
        alone = clone(clf).fit(support, on.tasks.support_ways)
        assert (alone.predict(query) == guess[t].numpy()).all()


def test_fine_tuning_makes_its_own_queries_easier():
    x, losses = support_images(), []
    for lr in (0, 1e-3):
        clf = PMF(toys.vit(), lr=lr).fit(x, WAY)
        views = [clf._views(x[None], step) for step in range(100, 120)]  # not seen in training
        queries = torch.cat([v[0] for v in views if v is not None])
        p = clf.predict_proba(queries)[np.arange(len(queries)), np.resize(WAY, len(queries))]
        losses.append(-np.log(p).mean())
    assert losses[1] < 0.7 * losses[0]


def test_rate_of_pmf_is_chosen_on_validation_tasks_only():
    vit, data = toys.vit(), pictures()
    shape = {"shots": (1,), "ways": 3, "queries": 4, "tasks": 4}
    clf = make_baseline("P>M>F", vit, model=vit, steps=2)
    choice = choose(clf, decode_tasks(vit, data, split="val", **shape)[1], PMF_GRID)
    assert [settings["lr"] for settings, _ in choice.results] == [0, 1e-4, 1e-3, 1e-2]
    assert choice.method.lr == choice.settings["lr"]
    with pytest.raises(ValueError, match='got the split "test"'):
        choose(clf, decode_tasks(vit, data, split="test", **shape)[1], PMF_GRID)


def test_shuffled_labels_give_pmf_chance():
    pixels, labels = pictures(classes=4, per_class=60)
    clf, shape = PMF(toys.vit(), lr=1e-3, steps=3), {"ways": 4, "queries": 10, "tasks": 60}
    shuffled = np.random.default_rng(5).permutation(labels)
    result = evaluate_baseline(clf, (pixels, shuffled), **shape)
    # tasks share 240 images, so they vary together by more than the interval says: three of them
    assert abs(result.accuracy - 25) < 3 * result.ci95
    right = evaluate_baseline(clf, (pixels, labels), **shape)
    assert right.accuracy > 25 + 5 * right.ci95


def test_pmf_is_named_in_the_table_with_the_backbone_that_was_meta_trained():
    vit = toys.vit()
    learnt = meta_train(vit, toys.pool(), pmf_meta()).vit
    method = make_baseline("P>M>F", vit, model=learnt, lr=0.0)
    assert method.vit is learnt
    with pytest.raises(ValueError, match="P>M>F: needs model="):
        make_baseline("P>M>F", vit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-4}, "lr: must be positive and finite"),
        ({"lr": float("nan")}, "lr: must be positive and finite"),
        ({"steps": 0}, "steps: must be at least 1"),
        ({"batch_size": 0}, "batch_size: must be at least 1"),
    ],
)
def test_pmf_rejects_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PMF(toys.vit(), **options).fit(support_images(), WAY)


@pytest.mark.gpu
def test_pmf_on_cuda_as_on_the_cpu():
    x, query = support_images().double(), support_images(5, 1).double()
    vit = toys.vit().double()
    expected = PMF(vit, lr=1e-3, steps=6).fit(x, WAY).decision_function(query)
    got = PMF(copy.deepcopy(vit).to("cuda"), lr=1e-3, steps=6).fit(x, WAY).decision_function(query)
    assert got == pytest.approx(expected, abs=1e-5)

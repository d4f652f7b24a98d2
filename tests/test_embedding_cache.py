"""Features kept on disk: the same as without, and never those of another file, LoRA or setting."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from PIL import Image

from fastrecycle.data import episodes, load_dataset, meta_dataset_episodes
from fastrecycle.eval import decode, embed, evaluate, evaluate_meta_dataset
from fastrecycle.vit import ViT

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")


@pytest.fixture
def folder(tmp_path):
    """Five classes of eight images."""
    rng = np.random.default_rng(0)
    for label in range(5):
        (tmp_path / "set" / f"c{label}").mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / f"c{label}" / f"{i}.png")
    return tmp_path / "set"


@pytest.fixture
def count(monkeypatch):
    """Images that went through the backbone."""
    seen, forward = [], ViT.forward
    monkeypatch.setattr(
        ViT, "forward", lambda self, x, *a, **k: seen.append(len(x)) or forward(self, x, *a, **k)
    )
    return lambda: (sum(seen), seen.clear())[0]


def files(cache):
    return sorted(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize("lora", [None, toys.lora()])
def test_features_are_the_same_with_and_without(folder, tmp_path, count, lora):
    vit, cache, dataset = toys.vit(), tmp_path / "cache", load_dataset(folder)
    plain = embed(vit, lora, dataset, batch_size=7)
    assert count() == 40
    for expected in (40, 0):  # first filled, then read
        kept = embed(vit, lora, dataset, batch_size=7, embedding_cache=cache)
        assert torch.equal(kept, plain)
        assert count() == expected


def test_results_are_the_same_with_and_without(folder, tmp_path, count):
    vit, cache = toys.vit(), tmp_path / "cache"
    shape = {"ways": 3, "shots": 2, "queries": 4, "tasks": 20}
    plain = evaluate(vit, None, folder, **shape)
    for _ in range(2):
        kept = evaluate(vit, None, folder, embedding_cache=cache, **shape)
        assert np.array_equal(kept.per_task, plain.per_task)
    known = episodes(load_dataset(folder).labels, 3, 2, 4, 20, 0).images
    varied = meta_dataset_episodes(load_dataset(folder).labels, 5, 0).images
    count()
    # another protocol over the same images
    evaluate_meta_dataset(vit, None, folder, tasks=5, embedding_cache=cache)
    assert count() == len(set(varied) - set(known))


def test_order_and_repeats_of_indices_are_kept(folder, tmp_path):
    vit, cache, dataset = toys.vit(), tmp_path / "cache", load_dataset(folder)
    embed(vit, None, dataset, np.arange(0, 40, 2), embedding_cache=cache)
    indices = np.array([31, 2, 2, 39, 0, 31])
    got = embed(vit, None, dataset, indices, embedding_cache=cache)
    # another shape of batch: another order of summation over some hundred terms near 1
    torch.testing.assert_close(got, embed(vit, None, dataset, indices), rtol=1e-5, atol=1e-5)
    empty = embed(vit, None, dataset, np.arange(0), embedding_cache=cache)
    assert empty.shape == (0, got.shape[1])


def test_a_changed_file_is_embedded_again(folder, tmp_path, count):
    vit, cache = toys.vit(), tmp_path / "cache"
    embed(vit, None, load_dataset(folder), embedding_cache=cache)
    count()
    Image.new("RGB", (16, 16), (9, 200, 30)).save(folder / "c2" / "3.png")
    changed = load_dataset(folder)
    got = embed(vit, None, changed, embedding_cache=cache)
    assert count() == 1
    torch.testing.assert_close(got, embed(vit, None, changed), rtol=1e-5, atol=1e-5)


def test_a_moved_or_renamed_file_is_known(folder, tmp_path, count):
    vit, cache = toys.vit(), tmp_path / "cache"
    embed(vit, None, load_dataset(folder), embedding_cache=cache)
    count()
    folder.rename(tmp_path / "elsewhere")
    embed(vit, None, load_dataset(tmp_path / "elsewhere"), embedding_cache=cache)
    assert count() == 0


def other_backbone():
    vit = toys.vit()
    vit.pos_embed.data[0, 0] += 1e-3
    return vit


def nudged(part):
    lora = toys.lora()
    getattr(lora, part)["v"].view(-1)[0] += 1e-3
    return lora


@pytest.mark.parametrize(
    ("vit", "lora", "settings"),
    [
        (other_backbone(), toys.lora(), {}),
        (toys.vit(replace(toys.CONFIG, mean=(0.4, 0.5, 0.5))), toys.lora(), {}),
        (toys.vit(), None, {}),
        (toys.vit(), nudged("a"), {}),
        (toys.vit(), nudged("b"), {}),
        (toys.vit(), nudged("scale"), {}),
        (toys.vit(), toys.lora(), {"prune": {0: 0.75}}),
        (toys.vit(), toys.lora(), {"precision": "bf16"}),
    ],
)
def test_another_backbone_lora_or_setting_is_embedded_anew(
    folder, tmp_path, count, vit, lora, settings
):
    cache, dataset = tmp_path / "cache", load_dataset(folder)
    embed(toys.vit(), toys.lora(), dataset, embedding_cache=cache)
    assert count() == 40
    got = embed(vit, lora, dataset, embedding_cache=cache, **settings)
    assert count() == 40
    assert torch.equal(got, embed(vit, lora, dataset, **settings))


def test_a_lora_s_head_and_names_do_not_matter(folder, tmp_path, count):
    cache, dataset = tmp_path / "cache", load_dataset(folder)
    embed(toys.vit(), toys.lora(), dataset, embedding_cache=cache)
    count()
    other = replace(toys.lora(), head=None, class_names=None, name="other")
    embed(toys.vit(), other, dataset, embedding_cache=cache)
    assert count() == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_file_is_embedded_again_with_a_warning(folder, tmp_path, caplog, count, damage):
    vit, cache, dataset = toys.vit(), tmp_path / "cache", load_dataset(folder)
    plain = embed(vit, None, dataset, embedding_cache=cache)
    (file,) = files(cache)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # a feature's last bit or so: it still parses
    file.write_bytes(
        {"cut": content[:-9], "flip": content, "empty": b"", "text": b"no features"}[damage]
    )
    count()
    assert torch.equal(embed(vit, None, dataset, embedding_cache=cache), plain)
    assert count() == 40
    assert f"{file}: damaged; removed, its images are embedded again" in caplog.text
    assert torch.equal(embed(vit, None, dataset, embedding_cache=cache), plain)
    assert count() == 0


def test_files_are_written_in_pieces_and_none_is_left_unfinished(
    folder, tmp_path, monkeypatch, count
):
    vit, cache, dataset = toys.vit(), tmp_path / "cache", load_dataset(folder)
    monkeypatch.setattr("fastrecycle.eval._CACHE_FILE_IMAGES", 10)

    def stop(done, total):
        if done == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(vit, None, dataset, batch_size=8, progress=stop, embedding_cache=cache)
    assert len(files(cache)) == 1
    assert not list(cache.rglob("*.tmp"))
    count()
    seen = []
    embed(
        vit, None, dataset, progress=lambda *d: seen.append(d), batch_size=8, embedding_cache=cache
    )
    assert count() == 24
    assert (seen[0], seen[-1]) == ((16, 40), (40, 40))


def test_arrays_and_decoded_images_are_known_by_their_pixels(tmp_path, count):
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 255, (10, 16, 16, 3), dtype=np.uint8), [0, 1] * 5
    vit, cache = toys.vit(), tmp_path / "cache"
    dataset = load_dataset((images, labels))
    for source in (dataset, decode(vit, dataset)):
        plain = embed(vit, None, source)
        for _ in range(2):
            assert torch.equal(embed(vit, None, source, embedding_cache=cache), plain)
        assert count() == 20
    images[3, 0, 0] += 1
    embed(vit, None, load_dataset((images, labels)), embedding_cache=cache)
    assert count() == 1


def test_digests_tell_sizes_apart_and_take_threads(folder):
    tall, wide = (np.zeros((1, *size, 3), np.uint8) for size in ((4, 2), (2, 4)))
    one, other = (load_dataset((x, [0])).digests([0]) for x in (tall, wide))
    assert one.shape == (1, 32)
    assert not np.array_equal(one, other)
    dataset = load_dataset(folder)
    order = np.array([7, 7, 0, 39])
    alone, many = (dataset.digests(order, workers=w) for w in (0, 4))
    assert np.array_equal(alone, many)
    assert np.array_equal(alone[0], alone[1])
    with pytest.raises(IndexError, match=r"must be in \[0, 40\), got 40"):
        dataset.digests([40])


def test_the_setting_is_written_beside_its_features(folder, tmp_path):
    cache = tmp_path / "cache"
    embed(toys.vit(), None, load_dataset(folder), embedding_cache=cache)
    (file,) = cache.glob("*/setting.json")
    setting = json.loads(file.read_text())
    assert (setting["lora"], setting["precision"], setting["device"]) == (None, "fp32", "cpu")
    assert setting["config"]["image_size"] == toys.CONFIG.image_size


def test_a_folder_that_is_a_file_is_an_error(folder, tmp_path):
    (tmp_path / "cache").write_text("x")
    with pytest.raises(OSError, match="cache"):
        embed(toys.vit(), None, load_dataset(folder), embedding_cache=tmp_path / "cache")

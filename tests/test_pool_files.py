"""A pool on disk: whole files, an index that is only a help, maps instead of memory, URLs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from fastrecycle import pool_files
from fastrecycle.config import InversionConfig
from fastrecycle.files import Folder
from fastrecycle.inputs import pool_input
from fastrecycle.inversion import invert
from fastrecycle.pool import SyntheticPool, task_file
from fastrecycle.pool_files import INDEX, PoolFiles, TaskImages


def equal(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("images", "labels", "tasks", "order", "kept", "teacher_logits", "classes")
    )


def test_loaded_pool_is_the_saved_one_and_reads_files_when_asked(tmp_path, monkeypatch):
    pool = SyntheticPool([toys.task_images(i, ways=2 + i % 2) for i in range(5)])
    pool.save(tmp_path)
    opened = []
    load = TaskImages.load
    monkeypatch.setattr(
        TaskImages, "load", staticmethod(lambda p: opened.append(p.name) or load(p))
    )
    loaded = SyntheticPool.load(tmp_path)
    assert opened == []  # the index is enough
    assert (len(loaded), loaded.class_names) == (len(pool), pool.class_names)
    assert torch.equal(loaded.labels, pool.labels)
    rows = np.array([40, 3, 41, 3])
    images, order, logits = loaded.gather(rows)
    assert opened == ["task-000000.safetensors", "task-000002.safetensors"]
    for got, whole in ((images, pool.images), (order, pool.order), (logits, pool.teacher_logits)):
        assert torch.equal(got, whole[torch.from_numpy(rows)])
    assert equal(loaded, pool)
    assert all(torch.equal(a, b) for a, b in zip(pool.gather(rows), loaded.gather(rows)))


def test_at_most_so_many_files_are_open(tmp_path, monkeypatch):
    toys.pool(6).save(tmp_path)
    monkeypatch.setattr(pool_files, "_OPEN", 2)
    files = PoolFiles(tmp_path)
    assert [part.task for part in files] == list(range(6))
    assert len(files._open) == 2
    assert files[-1].task == 5
    assert [p.task for p in files[1:3]] == [1, 2]
    with pytest.raises(KeyError):
        files.task(9)


@pytest.mark.parametrize("damage", ["absent", "behind", "older version", "wrong size"])
def test_index_is_made_again_where_it_does_not_tell(tmp_path, damage):
    pool = toys.pool(4)
    pool.save(tmp_path)
    index = tmp_path / INDEX
    value = json.loads(index.read_text())
    if damage == "absent":
        index.unlink()
    elif damage == "behind":
        index.write_text(json.dumps({**value, "parts": value["parts"][:1]}))
    elif damage == "older version":
        index.write_text(json.dumps({**value, "version": 0}))
    else:
        value["parts"][2]["bytes"] += 1
        value["parts"][2]["survivors"] = 3
        index.write_text(json.dumps(value))
    assert equal(SyntheticPool.load(tmp_path), pool)
    assert PoolFiles(tmp_path).entries == PoolFiles(tmp_path).entries


def test_index_of_a_growing_pool_is_not_written_at_every_file(tmp_path, monkeypatch):
    writes = []
    write = Folder.write

    def count(folder, name, content):
        writes.append(name)
        write(folder, name, content)

    monkeypatch.setattr(Folder, "write", count)
    files = PoolFiles(tmp_path)
    for i in range(120):
        files.write([toys.task_images(i, ways=2, per_class=1)])
    assert writes.count(INDEX) < 90
    files.write_index()
    assert len(json.loads((tmp_path / INDEX).read_text())["parts"]) == 120


def test_pool_is_known_by_its_contents_in_memory_and_on_disk(tmp_path):
    pool = toys.pool(3)
    pool.save(tmp_path)
    same = pool_input("x", SyntheticPool.load(tmp_path))
    assert same == pool_input("x", pool)
    assert pool_input("x", SyntheticPool(pool.parts[:2])) != same
    (tmp_path / INDEX).unlink()
    assert pool_input("x", SyntheticPool.load(tmp_path)) == same


def test_shard_that_was_cut_is_refused_at_loading(tmp_path):
    toys.pool(2).save(tmp_path)
    file = task_file(tmp_path, 1)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"task-000001.*expected a complete safetensors file"):
        SyntheticPool.load(tmp_path)


@pytest.mark.parametrize("scheme", ["memory://fastrecycle-test/pool", "file://{}/pool"])
def test_pools_live_behind_urls(tmp_path, scheme):
    url = scheme.format(tmp_path)
    pool = toys.pool(3)
    pool.save(url)
    assert equal(SyntheticPool.load(url), pool)
    with pytest.raises(FileExistsError, match="already holds another pool"):
        toys.pool(2).save(url)
    with pytest.raises(FileNotFoundError, match="no synthetic pool"):
        SyntheticPool.load(url + "-absent")
    Folder(url).write("task-000001.safetensors", b"cut")
    with pytest.raises(ValueError, match="task-000001"):
        SyntheticPool.load(url)
    for name in list(Folder(url).sizes()):
        Folder(url).fs.rm(f"{Folder(url).root}/{name}")


def test_a_file_written_again_behind_a_url_is_read_again():
    url = "memory://fastrecycle-again/pool"
    files = PoolFiles(url)
    first, second = toys.task_images(0), toys.task_images(0, seed=1)
    files.write([first])
    assert torch.equal(PoolFiles(url).task(0).images, first.images)
    files.write([second])
    assert torch.equal(PoolFiles(url).task(0).images, second.images)
    Folder(url).fs.rm("/fastrecycle-again", recursive=True)


def test_a_task_written_again_is_never_indexed_as_it_was(tmp_path, monkeypatch):
    """Two files of one size: a stop between them and the index must not leave the old digest."""
    first, second = toys.pool(2), SyntheticPool([toys.task_images(i, seed=1) for i in range(2)])
    first.save(tmp_path)
    write = Folder.write

    def stop(folder, name, content):
        write(folder, name, content)
        if name.startswith("task-000001"):
            raise KeyboardInterrupt

    for again in (second.save, lambda folder: PoolFiles(folder).write(list(second.parts))):
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write", stop)
            with pytest.raises(KeyboardInterrupt):
                again(tmp_path)
        loaded = SyntheticPool.load(tmp_path)
        assert pool_input("x", loaded) == pool_input("x", second)
        assert equal(loaded, second)
        first.save(tmp_path)
        assert equal(SyntheticPool.load(tmp_path), first)


def test_inversion_writes_to_a_url_and_goes_on_from_it(one_thread):
    url = "memory://fastrecycle-inversion/pool"
    cfg = InversionConfig(images_per_class=2, iterations=4, group=2)
    vit, bank, prior = toys.vit(), toys.bank(4), toys.prior()
    calls = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        invert(vit, bank, prior, cfg, folder=url, stop=lambda: next(calls) == 5)
    assert [e.task for e in PoolFiles(url).entries] == [0, 1]
    steps = []
    parts = invert(vit, bank, prior, cfg, folder=url, on_step=lambda s, _: steps.append(s))
    assert len(steps) == 4  # the second group alone
    for one, other in zip(parts, invert(vit, bank, prior, cfg), strict=True):
        assert torch.equal(one.images, other.images)
    Folder(url).fs.rm("/fastrecycle-inversion", recursive=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_reading_a_pool_takes_less_memory_than_the_pool(tmp_path):
    """48 MB on disk; anonymous memory grows by what is gathered, not by what is mapped."""
    code = """
import sys, numpy as np, torch
from fastrecycle.pool import SyntheticPool
def anonymous():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) / 1024
pool = SyntheticPool.load(sys.argv[1])
rng = np.random.default_rng(0)
pool.gather(rng.integers(0, len(pool), 50))
before = anonymous()
for _ in range(100):
    pool.gather(rng.integers(0, len(pool), 50))
print(pool.image_bytes / 2**20, anonymous() - before)
"""
    config = type(toys.CONFIG)(**{**vars(toys.CONFIG), "image_size": 128, "patch_size": 32})
    SyntheticPool(
        [toys.task_images(i, ways=5, per_class=10, config=config) for i in range(20)]
    ).save(tmp_path)  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True,
    )  # fmt: skip
    size, grown = map(float, done.stdout.split())
    assert size > 45
    assert grown < 15

"""Both stages and evaluation on a Ray cluster of several nodes on this machine, one lost."""

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys

from fastrecycle import cluster
from fastrecycle.cluster import (
    cluster_evaluate_shots,
    cluster_invert,
    cluster_meta_train,
    connected,
    workers_for,
)
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.eval import Pixels, evaluate_shots
from fastrecycle.inversion import Inverter, invert
from fastrecycle.metatrain import meta_train
from fastrecycle.pool import SyntheticPool
from fastrecycle.recycler import MetaLoRARecycler

INVERSION = InversionConfig(images_per_class=5, iterations=8, group=2, checkpoint_every=4)
META = MetaConfig(
    steps=20, ways=3, queries=3, tasks=4, rank=2, resolution=(8, 16), start="zero", lr=1e-3
)


def test_workers_divide_the_tasks():
    assert [workers_for(12, slots) for slots in (0, 1, 4, 5, 11, 40)] == [1, 1, 4, 4, 6, 12]


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    wanted = pytest.raises(ImportError, match=r"pip install 'fastrecycle\[cluster\]'")
    with wanted, connected("auto"):
        pass


def test_group_that_is_there_already_is_not_done_again(tmp_path, monkeypatch):
    """A worker lost after its last file: the task comes again and finds its work done."""
    world = (toys.vit(), list(toys.bank(2)), toys.prior(), INVERSION, {"seed": 0}, "cpu")
    (batch,) = cluster.batches(world[1], INVERSION, 2)
    cluster._invert_group(world, batch, str(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    monkeypatch.setattr(Inverter, "__call__", lambda *_: pytest.fail("worked"))
    cluster._invert_group(world, batch, str(tmp_path))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    assert len(before) == 2  # no state is left


class FakeRay:
    """As much of Ray as inversion asks for, in this process; workers of some groups die."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})
        WorkerCrashedError = type("WorkerCrashedError", (RayError,), {})

    def __init__(self, deadly=(), wrong=()):
        self.deadly, self.wrong, self.ran, self.most = deadly, wrong, [], 0
        self.running, self.cancelled = {}, []

    def put(self, value):
        return value

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, **_):
        def decorate(function):
            return SimpleNamespace(remote=lambda *a: self.submit(function, a))

        return decorate

    def submit(self, function, arguments):
        key = len(self.ran) + len(self.running)
        self.running[key] = function, arguments
        self.most = max(self.most, len(self.running))
        return key

    def wait(self, keys, num_returns, timeout):
        return [keys[-1]], []

    def get(self, key):
        function, arguments = self.running.pop(key)
        first = arguments[1].tasks[0]
        self.ran.append(first)
        if first in self.deadly:
            raise self.exceptions.WorkerCrashedError
        if first in self.wrong:
            raise self.exceptions.RayTaskError("ValueError: what the code says")
        function(*arguments)

    def cancel(self, key, force):
        self.cancelled.append(key)


@pytest.fixture
def fake(monkeypatch):
    def make(**arguments):
        made = FakeRay(**arguments)
        monkeypatch.setattr(cluster, "connected", lambda address: nullcontext(made))
        return made

    return make


def fake_invert(folder, config=INVERSION, **arguments):
    return cluster_invert(
        toys.vit(), toys.bank(12), toys.prior(), config, folder=folder, seed=1, **arguments
    )


def test_deadly_groups_are_named_and_all_others_finished(fake, tmp_path, one_thread):
    ray, steps = fake(deadly=(4, 8)), []
    with pytest.raises(RuntimeError, match=r"2 groups were lost.*8 to 9 \(WorkerCrashed.*4 to 5"):
        fake_invert(tmp_path, on_step=lambda done, _: steps.append(done))
    assert steps == [16, 32, 48, 64]
    assert ray.most == 4  # twice the processors: a bank is not handed over as a whole
    assert sorted(ray.ran) == list(range(0, 12, 2))
    ray = fake()
    parts = fake_invert(tmp_path, on_step=lambda done, _: steps.append(done))
    assert sorted(ray.ran) == [4, 8]
    assert steps[-2:] == [80, 96]
    assert same(parts, invert(toys.vit(), toys.bank(12), toys.prior(), INVERSION, seed=1))


def test_errors_of_the_code_are_not_tried_again(fake, tmp_path, one_thread):
    fake(wrong=(6,))
    with pytest.raises(FakeRay.exceptions.RayTaskError, match="what the code says"):
        fake_invert(tmp_path)


def test_groups_that_others_start_from_come_first(fake, tmp_path, one_thread):
    ray, cfg = fake(), replace(INVERSION, warm=4, warm_iterations=3)
    parts = fake_invert(tmp_path, cfg)
    assert sorted(ray.ran[:2]) == [0, 2]
    assert same(parts, invert(toys.vit(), toys.bank(12), toys.prior(), cfg, seed=1))
    fake(deadly=(0,))
    with pytest.raises(RuntimeError, match="0 to 1"):  # and nobody starts from what is not there
        fake_invert(tmp_path / "other", cfg)


def test_stopping_gives_up_what_is_under_way(fake, tmp_path, one_thread):
    ray, calls = fake(), iter(range(9))
    with pytest.raises(KeyboardInterrupt):
        fake_invert(tmp_path, stop=lambda: next(calls) == 2)
    assert len(ray.ran) == 2
    assert len(ray.cancelled) == 4
    assert len(list(tmp_path.glob("task-*"))) == 4


def test_files_that_do_not_show_up_are_an_error(fake, tmp_path, monkeypatch):
    fake()
    monkeypatch.setattr(cluster, "_invert_group", lambda *_: None)
    with pytest.raises(OSError, match="every node must reach this folder"):
        fake_invert(tmp_path)


def same(one, other):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.teacher_logits, b.teacher_logits)
        for a, b in zip(one, other, strict=True)
    )


# ------------------------------------------------------------------ with Ray

ray_only = pytest.mark.slow


@pytest.fixture(scope="module")
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def nodes(single_thread):
    """A head without processors and two workers, as processes of this machine; may lose one."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here), str(here / "tests"), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    os.environ["PYTHONPATH"], before = path, os.environ.get("PYTHONPATH")
    os.environ["OMP_NUM_THREADS"] = "1"
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8},
    )
    for _ in range(2):
        made.add_node(num_cpus=2, object_store_memory=10**8)
    made.wait_for_nodes()
    yield made
    made.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@ray_only
@pytest.mark.timeout(600)
def test_meta_training_on_workers_is_that_of_one_process(nodes, tmp_path):
    toys.pool(5).save(tmp_path / "pool")
    lora = cluster_meta_train(
        toys.vit(), tmp_path / "pool", META, folder=tmp_path / "meta", workers=2,
        address=nodes.address, seed=3, tasks=[0, 1, 2, 4],
    )  # fmt: skip
    alone = meta_train(
        toys.vit(), SyntheticPool([toys.task_images(i) for i in (0, 1, 2, 4)]), META, seed=3
    ).lora
    for target in alone.a:
        torch.testing.assert_close(lora.delta(target), alone.delta(target), rtol=1e-3, atol=1e-6)


@ray_only
@pytest.mark.timeout(600)
def test_evaluation_shares_out_images(nodes):
    g = toys.generator(0)
    labels = np.repeat(np.arange(4), 12)
    pixels = torch.randint(0, 256, (48, 3, 16, 16), generator=g, dtype=torch.uint8)
    images = Pixels(pixels, labels, tuple("abcd"), "toys")
    settings = {"shots": (1, 3), "ways": 3, "queries": 4, "tasks": 30, "seed": 5}
    got = cluster_evaluate_shots(
        toys.vit(), toys.lora(0), images, address=nodes.address, **settings
    )
    expected = evaluate_shots(toys.vit(), toys.lora(0), images, backend="reference", **settings)
    for shots in (1, 3):
        np.testing.assert_array_equal(got[shots].per_task, expected[shots].per_task)


def slow_group(world, batch, folder):
    """Run by a worker in place of `_invert_group`: the same, with notes of when."""
    log = Path(folder).parent / "log.jsonl"

    def note(what):
        with log.open("a") as stream:
            line = {"what": what, "first": batch.tasks[0], "pid": os.getpid()}
            stream.write(json.dumps(line) + "\n")

    note("begin")
    time.sleep(4)
    _REAL(world, batch, folder)
    note("end")


_REAL = cluster._invert_group


@ray_only
@pytest.mark.timeout(600)
def test_lost_node_costs_only_its_unfinished_groups(nodes, tmp_path, monkeypatch):
    bank, pool, log = toys.bank(16), tmp_path / "pool", tmp_path / "log.jsonl"
    monkeypatch.setattr(cluster, "_invert_group", slow_group)
    removed = []

    def on_step(done, values):
        if not removed:  # after the first group, while others are under way
            removed.append(next(iter(nodes.worker_nodes)))
            nodes.remove_node(removed[0], allow_graceful=False)

    parts = cluster_invert(
        toys.vit(), bank, toys.prior(), INVERSION, folder=pool, address=nodes.address, seed=1,
        on_step=on_step,
    )  # fmt: skip
    assert removed
    assert same(parts, invert(toys.vit(), bank, toys.prior(), INVERSION, seed=1))
    notes = [json.loads(line) for line in log.read_text().splitlines()]
    ended = [n["first"] for n in notes if n["what"] == "end"]
    begun = [n["first"] for n in notes if n["what"] == "begin"]
    assert sorted(ended) == list(range(0, 16, 2))  # each group once
    assert 0 < len(begun) - len(ended) <= 2  # what the lost node's two processors were at
    assert sorted(p.name for p in pool.iterdir()) == [
        "pool.json", *(f"task-{i:06d}.safetensors" for i in range(16)),
    ]  # fmt: skip
    # a second call finds everything done
    monkeypatch.setattr(cluster, "_finished", lambda *_: pytest.fail("no work left") or [])
    again = cluster_invert(
        toys.vit(), bank, toys.prior(), INVERSION, folder=pool, address=nodes.address, seed=1
    )
    assert same(parts, again)


@ray_only
@pytest.mark.timeout(600)
def test_recycling_on_a_cluster_is_recycling(nodes, tmp_path):
    meta = replace(META, start="average")
    cfg = replace(INVERSION, warm=2, warm_iterations=4)
    rec = {}
    for where in (nodes.address, None):
        rec[where] = MetaLoRARecycler(
            toys.vit(), toys.bank(4), toys.prior(), cfg, meta, device="cpu", quiet=True,
            cluster=where,
        )  # fmt: skip
    one = rec[nodes.address].run(tmp_path / "cluster")
    other = rec[None].run(tmp_path / "alone")
    assert same(rec[nodes.address].pool.parts, rec[None].pool.parts)
    for target in one.a:
        torch.testing.assert_close(one.delta(target), other.delta(target), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="needs a folder that every node reaches"):
        rec[nodes.address].invert()

"""Both stages and evaluation on a Ray cluster of several nodes on this machine, one lost."""

import json
import os
import socket
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import toys

from fastrecycle import cluster
from fastrecycle.cli import COMMANDS, main
from fastrecycle.cluster import (
    cluster_evaluate_shots,
    cluster_invert,
    cluster_meta_train,
    connected,
    workers_for,
)
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.data import load_dataset
from fastrecycle.eval import Pixels, embed, evaluate_shots
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
    wanted = pytest.raises(ImportError, match=r'pip install "fastrecycle\[cluster\]"')
    with wanted, connected("auto"):
        pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_address_where_nothing_listens_is_refused_at_once(monkeypatch, scheme):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"nothing answers at {address} "):
            connected(address).__enter__()


def test_eval_command_without_ray_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    # before anything is read: there is no such data set
    assert main(["eval", "--dataset", "absent", "--cluster", "auto"]) == 2
    assert capsys.readouterr().err == (
        'fastrecycle: error: cluster: needs Ray; pip install "fastrecycle[cluster]", or leave out'
        " --cluster\n"
    )


@pytest.mark.parametrize("address", ["auto", "ray://head:10001"])
def test_eval_command_takes_an_address(monkeypatch, tmp_path, address):
    seen = []
    monkeypatch.setitem(
        COMMANDS, "eval", replace(COMMANDS["eval"], run=lambda options: seen.append(options) or 0)
    )
    (tmp_path / "run.yaml").write_text(f"cluster: {address}\n")
    assert main(["eval", "--dataset", "cub"]) == 0
    assert main(["eval", "--dataset", "cub", "--cluster", address]) == 0
    assert main(["eval", "--dataset", "cub", "--config", str(tmp_path / "run.yaml")]) == 0
    assert [options.cluster for options in seen] == [None, address, address]


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

    def cancel(self, key):
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


class LostShare:
    """Ray whose workers embed in this process, until one is lost or finds no file."""

    exceptions = FakeRay.exceptions

    def __init__(self, error):
        self.error, self.sizes = error, []

    def put(self, value):
        return value

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, **_):
        def submit(world, indices):
            self.sizes.append(len(indices))
            return len(self.sizes)

        return lambda function: SimpleNamespace(remote=submit)

    def get(self, key):
        if key == 2 and self.error is not None:
            raise self.error
        return torch.full((self.sizes[key - 1], 4), float(key))


def task_error(cause):
    error = FakeRay.exceptions.RayTaskError("a remote traceback")
    error.cause = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FakeRay.exceptions.WorkerCrashedError(), RuntimeError, "images 40 to 79 .* 4 times"),
        (task_error(FileNotFoundError("a.png")), OSError, "a.png; every node must reach"),
        (task_error(ValueError("a.png is broken")), ValueError, "^a.png is broken$"),
    ],
)
def test_embedding_says_why_a_share_failed(monkeypatch, error, kind, text):
    with pytest.raises(kind, match=text):
        embed_on(LostShare(error), monkeypatch)


def test_shares_are_whole_batches_in_their_order(monkeypatch):
    ray = LostShare(None)
    features = embed_on(ray, monkeypatch)
    assert ray.sizes == [40] * 8 + [5]
    assert features[:, 0].tolist() == sorted([*range(1, 9)] * 40 + [9] * 5)


def embed_on(ray, monkeypatch):
    monkeypatch.setattr(cluster, "connected", lambda address: nullcontext(ray))
    images = Pixels(torch.zeros(325, 3, 16, 16, dtype=torch.uint8), np.zeros(325), ("a",), "toys")
    with cluster.cluster_features("auto") as features_of:
        return embed(toys.vit(), None, images, batch_size=10, features_of=features_of)


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
    """A head and a node that may be lost, one worker each, as processes of this machine.

    What takes time is that each process imports PyTorch, so tests share workers and are few.
    """
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here), str(here / "tests"), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    os.environ["PYTHONPATH"], before = path, os.environ.get("PYTHONPATH")
    os.environ["OMP_NUM_THREADS"] = "1"
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8},
    )
    made.add_node(num_cpus=1, object_store_memory=10**8)
    made.wait_for_nodes()
    with connected(made.address):  # once for all tests: workers are of one connection
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
def test_evaluation_shares_out_images(nodes, tmp_path):
    g = toys.generator(0)
    labels = np.repeat(np.arange(4), 12)
    pixels = torch.randint(0, 256, (48, 3, 16, 16), generator=g, dtype=torch.uint8)
    images = Pixels(pixels, labels, tuple("abcd"), "toys")
    settings = {"tasks": 30, "seed": 5, "batch_size": 7}
    shape = {"shots": (1, 3), "ways": 3, "queries": 4}
    vit, lora = toys.vit(), toys.lora(0)
    got = cluster_evaluate_shots(vit, lora, images, address=nodes.address, **shape, **settings)
    expected = evaluate_shots(vit, lora, images, **shape, **settings)
    for shots in (1, 3):
        np.testing.assert_array_equal(got[shots].per_task, expected[shots].per_task)
    told, cache = [], tmp_path / "cache"
    with cluster.cluster_features(nodes.address) as features_of:
        features = [
            embed(
                vit, lora, images, batch_size=7, features_of=where, embedding_cache=folder,
                progress=lambda *count: told.append(count),
            )
            for where, folder in ((features_of, cache), (None, None), (None, cache))
        ]  # fmt: skip
    assert all(torch.equal(features[0], other) for other in features[1:])  # to the last bit
    assert told[-1] == (48, 48)  # of the cache alone
    assert told[6] == (48, 48)
    assert [done for done, _ in told[:7]] == [7, 14, 21, 28, 35, 42, 48]


@ray_only
@pytest.mark.timeout(600)
def test_eval_command_on_a_cluster_prints_what_one_process_does(
    nodes, tmp_path, monkeypatch, capsys
):
    tiny.make(tmp_path)
    monkeypatch.chdir(tmp_path)  # workers stand elsewhere: a relative path must reach them
    found = {}
    for where in ("cluster", "alone"):
        words = [
            "eval", "--dataset", "images", "--backbone", "vit.safetensors", "--lora",
            "bank/0000", "--ways", "3", "--queries", "3", "--tasks", "20", "--shots", "1", "3",
            "--device", "cpu", "--quiet", "--batch-size", "8", "--json", f"{where}.json",
        ]  # fmt: skip
        assert main([*words, *(["--cluster", "auto"] if where == "cluster" else [])]) == 0
        found[where] = json.loads(Path(f"{where}.json").read_text())
    assert ", Ray cluster auto" in capsys.readouterr().out
    assert found["cluster"]["results"] == found["alone"]["results"]
    assert found["cluster"]["settings"]["cluster"] == "auto"
    images = load_dataset("images", "test")
    (tmp_path / "images").rename(tmp_path / "gone")
    with pytest.raises(OSError, match="every node must reach the files of the images"):
        cluster_evaluate_shots(toys.vit(), None, images, shots=(1,), ways=3, queries=3, tasks=5)


class TrainerHere:
    """Ray Train's place in this process; its own processes have a test of their own, and 30 s."""

    def __init__(self, function, *, train_loop_config, scaling_config, run_config):
        assert scaling_config.num_workers == 2
        self.fit = lambda: function(train_loop_config)


@ray_only
@pytest.mark.timeout(600)
def test_recycling_on_a_cluster_is_recycling(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.train.torch.TorchTrainer", TrainerHere)
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


def noted_group(world, batch, folder):
    """Run by a worker in place of `_invert_group`: all but the first wait until a node is gone."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def note(what):
        with (Path(folder).parent / "log.jsonl").open("a") as stream:
            stream.write(json.dumps({"what": what, "first": batch.tasks[0], "node": node}) + "\n")

    removed = Path(folder).parent / "removed"
    note("begin")
    # a worker outlives its node for a moment, and must not end its group in it
    while batch.tasks[0] and (not removed.exists() or removed.read_text() in ("", node)):
        time.sleep(0.05)
    _REAL(world, batch, folder)
    note("end")


_REAL = cluster._invert_group


@ray_only
@pytest.mark.timeout(600)
def test_lost_node_costs_only_its_unfinished_groups(nodes, tmp_path, monkeypatch):
    bank, pool, log = toys.bank(8), tmp_path / "pool", tmp_path / "log.jsonl"
    monkeypatch.setattr(cluster, "_invert_group", noted_group)

    def notes(what):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [line for line in lines if line["what"] == what]

    def on_step(done, values):
        if not (tmp_path / "removed").exists():  # after the first group, others are under way
            (node,) = nodes.worker_nodes
            while not any(n["first"] and n["node"] == node.node_id for n in notes("begin")):
                time.sleep(0.05)
            nodes.remove_node(node, allow_graceful=False)
            (tmp_path / "removed").write_text(node.node_id)

    parts = cluster_invert(
        toys.vit(), bank, toys.prior(), INVERSION, folder=pool, address=nodes.address, seed=1,
        on_step=on_step,
    )  # fmt: skip
    assert same(parts, invert(toys.vit(), bank, toys.prior(), INVERSION, seed=1))
    assert sorted(n["first"] for n in notes("end")) == list(range(0, 8, 2))  # each group once
    assert len(notes("begin")) == len(notes("end")) + 1  # what the lost node was at
    assert sorted(p.name for p in pool.iterdir()) == [
        "pool.json", *(f"task-{i:06d}.safetensors" for i in range(8)),
    ]  # fmt: skip
    # a second call finds everything done
    monkeypatch.setattr(cluster, "_finished", lambda *_: pytest.fail("no work left") or [])
    again = cluster_invert(
        toys.vit(), bank, toys.prior(), INVERSION, folder=pool, address=nodes.address, seed=1
    )
    assert same(parts, again)

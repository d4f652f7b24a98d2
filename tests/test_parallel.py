"""Meta-training on 1, 2 and 4 processes ends in the same meta-LoRA; pools are read as drawn."""

import os
import socket
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import toys

from fastrecycle.config import MetaConfig
from fastrecycle.files import load_safetensors
from fastrecycle.lora import LoRA
from fastrecycle.metatrain import MetaTrainer, meta_train
from fastrecycle.parallel import ALONE, Ranks, joined, torchrun_ranks
from fastrecycle.pool import SyntheticPool


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CONFIG = MetaConfig(
    steps=20, ways=3, shots=1, queries=3, tasks=4, rank=2, lr=1e-3, resolution=(8, 16), ema=0.5,
    start="zero", checkpoint_every=6, validate_every=10,
)  # fmt: skip
CONFIGS = {
    "dense": CONFIG,
    "cropped": replace(CONFIG, crop=0.7),
    "masked": replace(CONFIG, sparsity=0.5),
    "by image": replace(CONFIG, sparsity=0.5, sparsity_per="image", resolution=(0, 0)),
}


def distance(vit, lora):
    """A score that grows with the steps, so that the last is returned."""
    return sum(x.square().sum().item() for x in lora.tensors())


def worker(rank, size, port, folder, names):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    try:
        reports = []
        for name in names:
            result = meta_train(
                toys.vit(), toys.pool(4), CONFIGS[name], seed=3, ranks=joined(),
                folder=folder / name, validate=distance, on_step=lambda s, v: reports.append(s),
            )  # fmt: skip
            result.lora.save(folder / f"{name}-{rank}")
        assert bool(reports) == (rank == 0)
    finally:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def alone():
    return {
        name: meta_train(toys.vit(), toys.pool(4), cfg, seed=3, validate=distance)
        for name, cfg in CONFIGS.items()
    }


# each process imports PyTorch anew
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_number_of_processes_changes_nothing(size, alone, tmp_path):
    mp.spawn(worker, (size, free_port(), tmp_path, list(CONFIGS)), nprocs=size)
    for name, expected in alone.items():
        assert expected.best_step == 20
        loras = [LoRA.load(tmp_path / f"{name}-{rank}") for rank in range(size)]
        for target in expected.lora.a:
            delta = expected.lora.delta(target)
            assert delta.abs().max() > 1e-4  # it learnt something
            for lora in loras:
                # Adam's first steps are lr * sign(gradient): a sum in another order turns few
                torch.testing.assert_close(lora.delta(target), delta, rtol=1e-3, atol=1e-6)
                assert torch.equal(lora.delta(target), loras[0].delta(target))
        saved = load_safetensors(tmp_path / name / "meta.state.safetensors")
        assert saved[1]["iteration"] == "20"
        assert expected.validation.keys() == {10, 20}


def test_share_of_the_tasks():
    four = [Ranks(r, 4) for r in range(4)]
    assert [x for r in four for x in range(8)[r.share(8)]] == list(range(8))
    assert [r.first for r in four] == [True, False, False, False]
    assert ALONE.share(7) == slice(0, 7)
    with pytest.raises(ValueError, match="6 tasks cannot be shared evenly by 4 processes"):
        four[0].share(6)
    with pytest.raises(ValueError, match="3 tasks of whole images cannot be shared evenly by 2"):
        MetaTrainer(
            toys.vit(), toys.pool(4), replace(CONFIG, sparsity=0.25, whole=0.5, tasks=6),
            ranks=Ranks(0, 2),
        )  # fmt: skip


def test_outside_torchrun_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with torchrun_ranks(torch.device("cpu")) as (ranks, device):
        assert (ranks, device.type) == (ALONE, "cpu")
    assert not dist.is_initialized()


# ------------------------------------------------------------------ staged pools


@pytest.mark.parametrize("name", CONFIGS)
def test_pool_read_as_drawn_gives_the_same_meta_lora(name, alone, tmp_path, monkeypatch):
    """In stretches of 6 steps, the last one beyond the end."""
    toys.pool(4).save(tmp_path)
    monkeypatch.setattr("fastrecycle.meta_trainer.STAGED", 6)
    pool = SyntheticPool.load(tmp_path)
    result = meta_train(toys.vit(), pool, CONFIGS[name], seed=3, validate=distance, staged=True)
    for one, other in zip(result.lora.tensors(), alone[name].lora.tensors(), strict=True):
        assert torch.equal(one, other)
    assert "images" not in pool.__dict__  # never read as a whole


def test_class_texts_of_a_pool_on_disk_are_found_by_every_image(tmp_path):
    g = toys.generator(1)
    parts = [
        replace(toys.task_images(i, ways=3 + i % 2), text=torch.randn(3 + i % 2, 16, generator=g))
        for i in range(4)
    ]
    pool, cfg = SyntheticPool(parts), replace(CONFIG, shots=0)
    pool.save(tmp_path)
    loaded = SyntheticPool.load(tmp_path)
    assert torch.equal(loaded.text, pool.text)
    assert torch.equal(loaded.text_rows, pool.text_rows)
    one = meta_train(toys.vit(), pool, cfg, seed=3).lora
    other = meta_train(toys.vit(), loaded, cfg, seed=3, staged=True).lora
    assert all(map(torch.equal, one.tensors(), other.tensors()))
    parts[1] = replace(parts[1], text=None)
    SyntheticPool(parts).save(tmp_path)
    assert SyntheticPool.load(tmp_path).text is None


def test_staged_training_resumes_in_the_middle_of_a_stretch(alone, tmp_path, monkeypatch):
    toys.pool(4).save(tmp_path / "pool")
    monkeypatch.setattr("fastrecycle.meta_trainer.STAGED", 8)
    pool, calls = SyntheticPool.load(tmp_path / "pool"), iter(range(100))
    settings = {"seed": 3, "validate": distance, "staged": True, "folder": tmp_path / "meta"}
    with pytest.raises(KeyboardInterrupt):
        meta_train(toys.vit(), pool, CONFIG, stop=lambda: next(calls) == 10, **settings)
    result = meta_train(toys.vit(), pool, CONFIG, **settings)
    for one, other in zip(result.lora.tensors(), alone["dense"].lora.tensors(), strict=True):
        assert torch.equal(one, other)


def test_only_large_pools_on_disk_are_staged(tmp_path, monkeypatch):
    toys.pool(4).save(tmp_path)
    pool = SyntheticPool.load(tmp_path)
    assert not MetaTrainer(toys.vit(), pool, CONFIG).staged
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # 10 kB of memory
    assert MetaTrainer(toys.vit(), pool, CONFIG).staged
    assert not MetaTrainer(toys.vit(), toys.pool(4), CONFIG).staged  # it is in memory already

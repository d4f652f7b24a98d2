"""The synthetic pool: what it derives from its parts, and its files."""

import logging
from dataclasses import replace

import pytest
import torch
import toys

from fastrecycle.files import save_safetensors
from fastrecycle.pool import SyntheticPool, TaskImages, task_file


def test_rows_classes_and_teacher_of_mixed_heads():
    parts = [
        toys.task_images(0, 3, names=("cat", "dog", "cow")),
        toys.task_images(1, 2, names=("dog", "emu")),
    ]
    pool = SyntheticPool(parts)
    assert len(pool) == 18 + 12
    assert pool.tasks.tolist() == [0] * 18 + [1] * 12
    assert pool.class_names == ("cat", "dog", "cow", "emu")
    expected = [0] * 6 + [1] * 6 + [2] * 6 + [1] * 6 + [3] * 6  # dog is one class
    assert pool.classes.tolist() == expected
    assert torch.equal(pool.teacher_logits[18:, :2], parts[1].teacher_logits)
    assert (pool.teacher_logits[18:, 2] == -torch.inf).all()
    assert pool.teacher_logits.softmax(1).isfinite().all()
    assert pool.has_names
    assert torch.equal(pool.images[18:], parts[1].images)


def test_without_names_each_lora_has_classes_of_its_own_and_a_warning(caplog):
    named, nameless = toys.task_images(0), toys.task_images(1, names=())
    with caplog.at_level(logging.WARNING, "fastrecycle"):
        assert SyntheticPool([named, toys.task_images(1)]).has_names
        assert not caplog.records
        pool = SyntheticPool([named, nameless])
    assert not pool.has_names
    assert len(pool.class_names) == 6
    assert pool.classes.tolist() == [c for c in range(6) for _ in range(6)]
    assert "no class names" in caplog.text
    caplog.clear()
    SyntheticPool([nameless])  # one LoRA alone can face nobody
    assert not caplog.records


def test_keep_is_the_best_patches_in_ascending_order():
    pool = toys.pool(2)
    for sparsity, count in ((0.0, 16), (0.25, 12), (0.5, 8), (0.9, 2), (0.99, 1)):
        keep = pool.keep(sparsity)
        assert keep.shape == (36, count)
        for row, order in zip(keep.tolist(), pool.order.tolist()):
            assert row == sorted(order[:count])


def test_keep_refuses_more_patches_than_inversion_left():
    pool = toys.pool(2, survivors=8)
    assert torch.equal(pool.kept, pool.keep(0.5))
    pool.keep(0.75)
    with pytest.raises(ValueError, match=r"0.25 asks for 12 of 16 patches.*down to 8.*least 0.50"):
        pool.keep(0.25)


def test_saved_and_loaded_is_equal(tmp_path):
    pool = SyntheticPool([
        toys.task_images(3, survivors=8), replace(toys.task_images(11, 2, survivors=8), name=None)
    ])  # fmt: skip
    pool.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "pool.json",
        "task-000003.safetensors",
        "task-000011.safetensors",
    ]
    loaded = SyntheticPool.load(tmp_path)
    for name in ("images", "labels", "tasks", "order", "kept", "teacher_logits", "classes"):
        one, other = getattr(pool, name), getattr(loaded, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert loaded.class_names == pool.class_names
    assert loaded.survivors == 8
    for one, other in zip(pool.parts, loaded.parts, strict=True):
        assert (one.task, one.name, one.class_names) == (other.task, other.name, other.class_names)


def test_nameless_parts_stay_nameless_on_disk(tmp_path):
    part = replace(toys.task_images(0), class_names=None)
    part.save(tmp_path / "x.safetensors")
    assert TaskImages.load(tmp_path / "x.safetensors").class_names is None


def test_rejects_parts_that_do_not_belong_together():
    with pytest.raises(ValueError, match="at least one LoRA, got none"):
        SyntheticPool([])
    one = toys.task_images(0)
    with pytest.raises(ValueError, match=r"sides \[8, 16\]"):
        SyntheticPool([one, replace(toys.task_images(1), images=torch.zeros(18, 3, 8, 8).byte())])
    with pytest.raises(ValueError, match=r"\[8, 16\] patches"):
        SyntheticPool([one, toys.task_images(1, survivors=8)])


def test_rejects_folders_and_files_that_are_no_pool(tmp_path):
    with pytest.raises(FileNotFoundError, match="no synthetic pool"):
        SyntheticPool.load(tmp_path)
    save_safetensors(task_file(tmp_path, 0), {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a file of a synthetic pool"):
        SyntheticPool.load(tmp_path)
    toys.pool(1).save(tmp_path)
    whole = task_file(tmp_path, 0).read_bytes()
    task_file(tmp_path, 0).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="expected a complete safetensors file"):
        SyntheticPool.load(tmp_path)


def test_refuses_to_mix_into_another_pool(tmp_path):
    toys.pool(3).save(tmp_path)
    toys.pool(3).save(tmp_path)  # the same files again
    with pytest.raises(FileExistsError, match="already holds"):
        toys.pool(2).save(tmp_path)

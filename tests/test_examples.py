"""Examples run as they stand."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import toys

from fastrecycle import InversionConfig, LoRABank, MetaConfig, SyntheticPool, ViT
from fastrecycle.baselines import CAML, PMF_META, CAMLConfig, CAMLNetwork, evaluate_baseline

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_a_loop_of_ones_own_learns_digits(monkeypatch, capsys):
    accuracy = load("train_pruned_vit", monkeypatch).main(steps=16, batch=24, device="cpu")
    # chance is 10 %, its deviation over 359 digits 1.6 %
    assert accuracy > 20
    assert "step   16  loss" in capsys.readouterr().out


def test_pooled_baselines_train_from_a_saved_pool(monkeypatch, capsys, tmp_path, one_thread):
    world = tiny.make(tmp_path)
    parts = [toys.task_images(i, config=tiny.CONFIG) for i in range(3)]
    SyntheticPool(parts).save(tmp_path / "pool")
    shape = {"ways": 3, "shots": 2, "queries": 3, "tasks": 2, "resolution": (8, 16)}
    results = load("train_pooled_baselines", monkeypatch).main(
        tmp_path / "pool", str(world.images), str(world.backbone), tmp_path / "out",
        caml=CAMLConfig(steps=20, sides=2, code_dim=16, layers=1, heads=2, **shape),
        pmf=replace(PMF_META, steps=20, **shape),
        rates=(0.0, 1e-3), steps=2, ways=3, shots=(1,), queries=4, tasks=20, device="cpu",
        precision="fp32", backend="reference",
    )  # fmt: skip
    assert set(results) == {"NN", "CAML", "P>M>F"}
    said = capsys.readouterr().out
    assert "CAML step 20  loss" in said
    assert "P>M>F step 20  loss" in said
    assert "P>M>F at 1-shot: the best rate of fine-tuning is 0" in said
    network = CAMLNetwork.load(tmp_path / "out/caml.safetensors")
    vit = ViT.from_pretrained(tmp_path / "out/pmf.safetensors")
    assert (vit.norm.weight != ViT.from_pretrained(world.backbone).norm.weight).all()
    again = evaluate_baseline(
        CAML(ViT.from_pretrained(world.backbone), network), str(world.images), ways=3, queries=4,
        tasks=20, split="val",
    )  # fmt: skip
    assert again.accuracy == results["CAML"][1].accuracy


def test_screening_is_measured_on_a_poisoned_bank(monkeypatch, capsys, tmp_path, one_thread):
    world = tiny.make(tmp_path)
    LoRABank([tiny.random_lora(tiny.CONFIG, i) for i in range(10)]).save(tmp_path / "ten")
    results = load("screen_bank", monkeypatch).main(
        tmp_path / "ten", str(world.images), str(world.backbone), str(world.prior),
        tmp_path / "out", loras=10, shots=(1,), ways=3, queries=4, tasks=20, device="cpu",
        inversion=InversionConfig(
            images_per_class=6, iterations=40, lr=0.03, jitter=0.0, flip=0.0, alpha=0.001, group=10
        ),
        meta=MetaConfig(steps=4, ways=3, queries=3, resolution=(8, 16)),
    )  # fmt: skip
    assert set(results) == {"clean", "poisoned", "screened"}
    said = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(said["poison"].values()) == {"shuffled_head", "noise_weights"}
    assert "screened minus clean, 1-shot" in said
    assert said["found"] or said["missed"]

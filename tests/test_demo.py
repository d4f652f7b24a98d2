"""The demo on stand-ins for the packaged assets, small enough to run it whole."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CONFIG, World, make, random_lora

from fastrecycle import demo
from fastrecycle.cli import main
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.data.arrays import from_arrays
from fastrecycle.demo import FULL, QUICK, Plan, choose_plan, first_of_each_class
from fastrecycle.eval import Result, evaluate
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.vit import ViT

ROWS = [
    "NN",
    "LoRAs-Avg + NN",
    "LoRAs-Avg of products + NN",
    "LoRA Recycle, run here",
    "LoRA Recycle, packaged",
]
PLAN = Plan(
    loras=2,
    inversion=InversionConfig(images_per_class=3, iterations=4, group=2),
    meta=MetaConfig(steps=4, ways=3, queries=2, resolution=(8, 16)),
    images=25,
    cifar_images=20,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    world = make(tmp_path_factory.mktemp("assets"))
    random_lora(CONFIG, 11).save(world.root / "meta_lora")
    return world


@pytest.fixture(autouse=True)
def packaged(world, monkeypatch):
    """The stand-ins in place of the packaged assets, no data root, the CPU."""
    monkeypatch.setattr("fastrecycle.assets.asset", lambda name: world.root / name)
    monkeypatch.setattr(demo, "QUICK", PLAN)
    monkeypatch.setattr(demo, "TASKS", 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("FASTRECYCLE_DATA", raising=False)


@pytest.fixture(scope="module")
def cifar_root(tmp_path_factory):
    """A data root with five classes in CIFAR-FS's layout."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(5):
        folder = root / "cifar_fs" / "test" / f"class{i}"
        folder.mkdir(parents=True)
        for k in range(22):
            pixels = rng.integers(0, 120, (32, 32, 3)) + 25 * i
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k:02d}.png")
    return root


def run(out, *more: str) -> int:
    return main(["demo", "--out", str(out), "--device", "cpu", "--quiet", *more])


def results(out) -> dict:
    return json.loads((out / "results.json").read_text())


def test_demo_tells_its_rows_apart(tmp_path, capsys):
    out = tmp_path / "demo"
    assert run(out) == 0
    text = capsys.readouterr().out
    table = text[text.index("digits: ") :].splitlines()
    assert table[0].startswith("digits: 250 images of 10 classes, 20 5-way tasks")
    assert [line.split("  ")[0] for line in table[3:8]] == ROWS
    assert table[3].count("±") == 2
    assert all(line.count("±") == 4 for line in table[4:8])
    assert "LoRA Recycle, run here: 2 of the 3 packaged LoRAs, 4 iterations, 4 steps" in text
    assert "LoRA Recycle, packaged: the packaged meta-LoRA of the full schedule" in text
    assert "CIFAR-FS was not evaluated" in text
    assert (out / "synthetic.png").read_bytes().startswith(b"\x89PNG")
    assert set(results(out)["rows"]) == set(ROWS)


def test_demo_evaluates_what_each_row_says(tmp_path, world):
    out = tmp_path / "demo"
    assert run(out) == 0
    found = {(r["row"], r["shots"]): r for r in results(out)["results"]}
    assert len(found) == 10
    vit, bank = ViT.from_pretrained(world.backbone), LoRABank.load(world.bank)
    pixels = first_of_each_class(vit, demo.load_dataset("digits"), PLAN.images)
    loras = {
        "NN": None,
        "LoRAs-Avg + NN": LoRA.average(list(bank)[:2], of="factors"),
        "LoRAs-Avg of products + NN": LoRA.average(list(bank)[:2]),
        "LoRA Recycle, run here": LoRA.load(out / "meta_lora"),
        "LoRA Recycle, packaged": LoRA.load(world.root / "meta_lora"),
    }
    for (row, shots), entry in found.items():
        expected = evaluate(vit, loras[row], pixels, shots=shots, tasks=20)
        np.testing.assert_allclose(entry["per_task"], expected.per_task, atol=1e-6)
        assert entry["ci95"] == pytest.approx(expected.ci95)


def test_demo_pairs_differences_on_the_same_tasks(tmp_path):
    out = tmp_path / "demo"
    assert run(out) == 0
    found = {(r["row"], r["shots"]): r for r in results(out)["results"]}
    for (_, shots), entry in found.items():
        for key, other in (
            ("minus_nn", "NN"),
            ("minus_average", "LoRAs-Avg + NN"),
            ("minus_average_of_products", "LoRAs-Avg of products + NN"),
        ):
            base = np.array(found[other, shots]["per_task"])
            paired = Result.of(np.array(entry["per_task"]) - base)
            assert entry[key] == pytest.approx(paired.accuracy)
            assert entry[f"{key}_ci95"] == pytest.approx(paired.ci95)


def test_demo_evaluates_cifar_fs_where_the_data_root_has_it(tmp_path, cifar_root, capsys):
    out = tmp_path / "demo"
    assert run(out, "--data-root", str(cifar_root)) == 0
    text = capsys.readouterr().out
    assert "cifar_fs: 100 images of 5 classes" in text
    assert "CIFAR-FS was not evaluated" not in text
    content = results(out)
    assert {r["dataset"] for r in content["results"]} == {"digits", "cifar_fs"}
    assert {"backbone", "bank", "prior", "digits", "cifar_fs"} == set(content["inputs"])
    assert all(len(entry["sha256"]) == 64 for entry in content["inputs"].values())


def test_demo_called_again_gives_the_same(tmp_path):
    out = tmp_path / "demo"
    assert run(out) == 0
    before = results(out)["results"]
    (out / "results.json").unlink()
    assert run(out) == 0
    assert results(out)["results"] == before


def test_demo_refuses_a_wrong_data_root_before_training(tmp_path, capsys):
    out = tmp_path / "demo"
    assert run(out, "--data-root", str(tmp_path / "absent")) == 2
    assert "must be a folder" in capsys.readouterr().err
    assert not out.exists()


def test_demo_names_a_missing_asset(tmp_path, monkeypatch, capsys):
    def absent(name):
        raise FileNotFoundError(f"{name}: missing from this installation; reinstall fastrecycle")

    monkeypatch.setattr("fastrecycle.assets.asset", absent)
    assert run(tmp_path / "demo") == 2
    assert "vit.safetensors: missing from this installation" in capsys.readouterr().err


def test_schedule_follows_the_device(monkeypatch):
    monkeypatch.setattr(demo, "QUICK", QUICK)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_plan("auto", cpu) is choose_plan("quick", cuda) is QUICK
    assert choose_plan("auto", cuda) is choose_plan("full", cpu) is FULL


@pytest.mark.parametrize("plan", [QUICK, FULL], ids=["quick", "full"])
def test_plans_make_tasks_of_what_they_invert(plan):
    assert plan.inversion.images_per_class >= plan.meta.shots + plan.meta.queries
    assert plan.images is None or plan.images >= max(demo.SHOTS) + 15
    assert plan.cifar_images is None or plan.cifar_images >= max(demo.SHOTS) + 15


def test_first_of_each_class_takes_them_in_order(world):
    vit = ViT.random(replace(CONFIG, image_size=8))
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    source = from_arrays(images, np.array([1, 0, 1, 0, 1, 0]), "test", name="x")
    some = first_of_each_class(vit, source, 2)
    assert some.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert some.labels.tolist() == [1, 0, 1, 0]
    assert len(first_of_each_class(vit, source, None).labels) == 6

"""Examples run as they stand."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import tiny
import torch
import toys
from filled import fill

from fastrecycle import (
    InversionConfig,
    LoRA,
    LoRABank,
    MetaConfig,
    PretuneConfig,
    SyntheticPool,
    ViT,
    text,
)
from fastrecycle.baselines import CAML, PMF_META, CAMLConfig, CAMLNetwork, evaluate_baseline
from fastrecycle.baselines.zero_shot import POOL_TASKS
from fastrecycle.eval import evaluate_zero_shot
from fastrecycle.files import read_json
from fastrecycle.text import TextTower

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


def check_lora_of_digits(folder):
    """Every factor has learned, and the head came along."""
    lora = LoRA.load(folder)
    assert (lora.rank, lora.head.classes) == (4, 10)
    start = LoRA.init(ViT.from_pretrained("demo").config, rank=4, seed=0)
    for now, before in zip(lora.tensors(), start.tensors(), strict=True):
        assert (now != before).flatten(1).any(1).all()  # in every block


# Lightning's advice on a frozen backbone in eval mode, and on workers where data is in memory
@pytest.mark.filterwarnings("ignore:Found \\d+ module:UserWarning")
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning")
def test_lightning_learns_digits(monkeypatch, tmp_path, one_thread):
    pytest.importorskip("lightning", reason="needs Lightning")
    main = load("train_lightning", monkeypatch).main
    assert main(tmp_path, steps=16, batch=24, accelerator="cpu") > 20  # chance as above
    check_lora_of_digits(tmp_path)


def test_trainer_of_transformers_learns_digits(monkeypatch, tmp_path, one_thread):
    for library in ("transformers", "accelerate"):
        pytest.importorskip(library, reason=f"needs {library}")
    main = load("train_hf_trainer", monkeypatch).main
    assert main(tmp_path, steps=16, batch=24, lr=3e-3, device="cpu") > 20
    check_lora_of_digits(tmp_path)


def test_a_lora_module_gives_what_the_functions_give(monkeypatch):
    module = load("lora_module", monkeypatch)
    vit, lora = ViT.random(tiny.CONFIG), tiny.random_lora(tiny.CONFIG, 0)
    model = module.LoRAClassifier(vit, lora, 3, {0: 0.5})
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    logits = model(pixels)
    features = vit(vit.normalise(pixels.float() / 255), lora, prune={0: 0.5})
    torch.testing.assert_close(logits, model.head(features), rtol=0, atol=0)
    logits.square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"a.q", "a.v", "b.q", "b.v", "head.weight", "head.bias"}
    assert model.double().lora.scale["q"].dtype == torch.float64  # buffers follow the module


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


def test_a_text_tower_learns_names_from_images_and_definitions(
    monkeypatch, capsys, tmp_path, one_thread
):
    world = tiny.make(tmp_path)
    example = load("train_text_tower", monkeypatch)
    lexicon = [(["ant", "emmet"], "small insect"), (["eel"], "long fish"), (["bee"], "insect")]
    monkeypatch.setattr(example, "wordnet", lambda: lexicon)
    sizes = {"width": 32, "heads": 2, "layers": 1, "context_length": 12, "output_dim": 16}
    results = example.main(
        tmp_path, tmp_path / "out", world.backbone, (str(world.images),), (str(world.images),),
        training=example.Training(steps=60, lr=1e-2, images=3, pairs=4, **sizes),
        tasks=40, ways=3, queries=4, device="cpu",
    )  # fmt: skip
    result, control = results[str(world.images)]
    assert result.accuracy > 75  # new images of classes it has seen; chance is 33
    assert abs(control.accuracy - 100 / 3) < 25  # 20 deals of 5 names
    assert "names exchanged" in capsys.readouterr().out
    vit = ViT.from_pretrained(tmp_path / "out/vit.safetensors")
    tower = TextTower.from_pretrained(tmp_path / "out/text")
    again = evaluate_zero_shot(
        vit, None, tower, str(world.images), split="val", ways=3, queries=4, tasks=40
    )
    assert again.accuracy == pytest.approx(result.accuracy, abs=1)


def test_the_text_towers_loss_is_open_clips(monkeypatch):
    one, other = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    scale = torch.tensor(10.0)
    got = load("train_text_tower", monkeypatch).clip_loss(one, other, scale)
    torch.testing.assert_close(got, open_clip.ClipLoss()(one, other, scale))


def test_the_lexicon_is_timms_wordnet(monkeypatch):
    found = load("train_text_tower", monkeypatch).wordnet()
    assert len(found) > 20_000
    animals = [text for names, text in found if names[0] == "beaver"]
    assert any(text.startswith("large semiaquatic rodent") for text in animals)


def test_zero_shot_recycling_prints_its_table(monkeypatch, capsys, tmp_path, one_thread):
    world = tiny.make(tmp_path)
    (tmp_path / "towers").mkdir()
    ViT.from_pretrained(world.backbone).save(tmp_path / "towers/vit.safetensors")
    shape = text.TextConfig(output_dim=32, width=16, heads=2, layers=1, context_length=12)
    tower = text.TextTower(fill(text.TextNetwork(shape)), text.text_tokenizer(shape))
    tower.save(tmp_path / "towers/text")
    small = {"ways": 3, "queries": 3, "resolution": (8, 16)}
    arguments = {
        "data_root": tmp_path, "towers": tmp_path / "towers", "out": tmp_path / "out",
        "data": str(world.images), "prior": str(world.prior), "choose": False, "device": "cpu",
        "pretuning": PretuneConfig(num=2, ways=3, steps=2, batch_size=6),
        "inversion": InversionConfig(images_per_class=3, iterations=3),
        "meta": MetaConfig(steps=3, shots=0, start="zero", **small),
        "pool_tasks": replace(POOL_TASKS, **small),
        "ways": 3, "queries": 3, "tasks": 5,
    }  # fmt: skip
    example = load("recycle_zero_shot", monkeypatch)
    rows = example.main(**arguments)
    said = capsys.readouterr().out
    for name in ("Two-tower model", "LoRAs Avg", "MOLE", "LoRAHub", "LoRA Recycle"):
        assert name in said
    written = read_json(tmp_path / "out/zero_shot_val.json")
    assert written["MOLE"]["settings"] == rows["MOLE"].settings
    assert written["LoRA Recycle"]["per_task"] == rows["LoRA Recycle"].result.per_task.tolist()
    again = example.main(**arguments)  # from what is on disk
    for name, row in rows.items():
        assert again[name].result.per_task == pytest.approx(row.result.per_task)

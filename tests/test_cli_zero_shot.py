"""The command line at 0 shots, from a bank to its evaluation, and what it says to mistakes."""

import json
import shutil

import pytest
import tiny
import torch
from filled import fill

from fastrecycle.cli import main
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.text import TextConfig, TextNetwork, TextTower, text_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def text(world):
    config = TextConfig(output_dim=32, width=16, heads=2, layers=1, context_length=12)
    torch.manual_seed(0)
    TextTower(fill(TextNetwork(config)), text_tokenizer(config), ["a {}."]).save(
        world.root / "text"
    )
    return str(world.root / "text")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("FASTRECYCLE_DATA", "FASTRECYCLE_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def common(world):
    return ["--backbone", str(world.backbone), "--quiet", "--device", "cpu"]


def recycle(world, bank, out, *more):
    return [
        "recycle", *common(world), "--bank", str(bank), "--prior", str(world.prior), "--out",
        str(out), "--inversion.images-per-class", "4", "--inversion.iterations", "4",
        "--meta.steps", "4", "--meta.ways", "3", "--meta.queries", "2", "--meta.shots", "0",
        "--meta.resolution", "8", "16", *more,
    ]  # fmt: skip


def evaluate(world, *more):
    return [
        "eval", *common(world), "--dataset", str(world.images), "--lora", "none", "--ways", "3",
        "--queries", "3", "--tasks", "10", *more,
    ]  # fmt: skip


def refused(capsys, arguments, *parts):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in parts:
        assert part in line


def test_from_a_bank_to_its_evaluation(world, text, tmp_path, capsys):
    bank, run, file = tmp_path / "bank", tmp_path / "run", tmp_path / "result.json"
    pretune = ["pretune", *common(world), "--dataset", str(world.images), "--num", "2", "--ways"]
    pretune += ["3", "--steps", "2", "--batch-size", "6", "--text", text, "--out", str(bank)]
    assert main(pretune) == 0
    assert "--meta.shots 0" in capsys.readouterr().out
    assert all(lora.head.normalised for lora in LoRABank.load(bank))
    assert json.loads((bank / "run.json").read_text())["inputs"]["text"]["source"] == text
    assert main(["info", str(bank / "0000")]) == 0
    assert "head: 3 class texts" in capsys.readouterr().out
    assert main(recycle(world, bank, run)) == 0
    LoRA.load(run / "meta_lora").check(tiny.CONFIG)
    assert "--shots 0 --text TOWER" in capsys.readouterr().out
    arguments = evaluate(world, "--shots", "0", "1", "--text", text, "--json", str(file))
    assert main(arguments) == 0
    assert "3-way 0-shot" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert [row["shots"] for row in written["results"]] == [0, 1]
    assert written["settings"]["templates"] == ["a {}."]
    assert len(written["inputs"]["text"]["sha256"]) == 64


def test_linear_heads_give_way_to_the_texts_of_a_tower(world, text, tmp_path, capsys):
    run = tmp_path / "run"
    refused(capsys, recycle(world, world.bank, run), "0-shot tasks need the class texts", "--text")
    other = tmp_path / "other"
    validation = ["--validation", str(world.images)]
    assert main(recycle(world, world.bank, other, "--text", text, *validation)) == 0
    assert f"--shots 0 --text {text}" in capsys.readouterr().out
    assert json.loads((other / "run.json").read_text())["inputs"]["text"]["source"] == text
    meta = ["meta-train", *common(world), "--pool", str(other / "pool"), "--bank", str(world.bank)]
    meta += ["--shots", "0", "--ways", "3", "--queries", "2", "--steps", "4", "--resolution"]
    meta += ["8", "16", "--out", str(tmp_path / "meta")]
    assert main(meta) == 0  # the pool holds the texts
    refused(capsys, [*meta, *validation], "0-shot validation needs a text tower")


def test_templates_change_the_result(world, text, tmp_path):
    files = [tmp_path / f"{i}.json" for i in range(2)]
    arguments = evaluate(world, "--shots", "0", "--text", text, "--json")
    assert main([*arguments, str(files[0])]) == 0
    assert main([*arguments, str(files[1]), "--templates", "one {} alone", "the {}!"]) == 0
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["per_task"] != second["per_task"]
    assert second["settings"]["templates"] == ["one {} alone", "the {}!"]
    assert first["inputs"]["text"]["sha256"] != second["inputs"]["text"]["sha256"]


def test_mistakes_are_one_line(world, text, tmp_path, capsys):
    refused(capsys, evaluate(world, "--shots", "0"), "0 shots need the text tower", "--text")
    refused(capsys, evaluate(world, "--text", text), "add --shots 0")
    refused(capsys, evaluate(world, "--templates", "a {}"), "give --text")
    told = ["--shots", "0", "--text"]
    refused(capsys, evaluate(world, *told, str(tmp_path)), "no text tower (text.json")
    refused(capsys, evaluate(world, *told, text, "--templates", "a"), "each needs one {}")
    refused(capsys, evaluate(world, *told, "open_clip:nothing/x"), "no such model")
    numbers = tmp_path / "numbers"
    for i, name in enumerate(tiny.CLASSES):
        shutil.copytree(world.images / "test" / name, numbers / "test" / str(i))
    arguments = [str(numbers) if x == str(world.images) else x for x in evaluate(world)]
    refused(capsys, [*arguments, *told, text], "need names made of words", "class_names.json")

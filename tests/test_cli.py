import errno
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import CONFIG, World, make, random_lora

import fastrecycle
from fastrecycle import cli, evaluate
from fastrecycle.cli import COMMANDS, main, run_eval
from fastrecycle.eval import evaluate_meta_dataset
from fastrecycle.files import load_safetensors, sha256
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.run import RunFolder
from fastrecycle.vit import ViT

SMALL_INVERSION = ["--images-per-class", "4", "--iterations", "6", "--group", "2"]
SMALL_META = ["--steps", "6", "--ways", "3", "--queries", "2", "--resolution", "8", "16"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """A wide terminal, no data root, tracebacks off, the CPU."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("FASTRECYCLE_DATA", "FASTRECYCLE_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def recycle(world: World, out, *more: str) -> list[str]:
    return [
        "recycle", "--backbone", str(world.backbone), "--bank", str(world.bank),
        "--prior", str(world.prior), "--out", str(out), "--quiet", "--device", "cpu",
        "--inversion.images-per-class", "4", "--inversion.iterations", "6",
        "--inversion.group", "2", "--inversion.checkpoint-every", "2",
        "--meta.steps", "6", "--meta.ways", "3", "--meta.queries", "2",
        "--meta.resolution", "8", "16", "--meta.checkpoint-every", "2", *more,
    ]  # fmt: skip


def evaluation(world: World, *more: str) -> list[str]:
    return [
        "--dataset", str(world.images), "--backbone", str(world.backbone), "--lora", "none",
        "--ways", "3", "--queries", "3", "--tasks", "20", "--device", "cpu", "--quiet", *more,
    ]  # fmt: skip


def refused(capsys, arguments: list[str], *parts: str) -> None:
    """The command exits with 2 and one line on stderr that holds every part."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fastrecycle: error: ")
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in captured.err


# ---------------------------------------------------------------------- help


def test_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.purpose in text


def test_no_command_shows_the_overview_and_fails(capsys):
    assert main([]) == 2
    assert "usage: fastrecycle COMMAND" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastrecycle {fastrecycle.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(capsys, name):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    command = COMMANDS[name]
    assert f"usage: fastrecycle {name}" in text
    assert command.purpose in text
    assert f"Example:\n  {command.example}" in text
    assert f"Results: {command.results}"[:100] in text
    assert "--device" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(monkeypatch, name):
    seen = []
    command = COMMANDS[name]
    monkeypatch.setitem(
        COMMANDS, name, replace(command, run=lambda options: seen.append(options) or 0)
    )
    assert main(command.example.split()[1:]) == 0
    assert isinstance(seen[0], command.options)


def test_help_shows_the_preset(capsys):
    assert main(["invert", "--preset", "paper", "--help"]) == 0
    words = capsys.readouterr().out.replace("│", " ").split()
    assert "(default: 11:0.75)" in " ".join(words)


# ---------------------------------------------------------------------- the stages


def test_recycle_writes_everything(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(recycle(world, out, "--validation", str(world.images), "--seed", "3")) == 0
    assert f"meta-LoRA: {out / 'meta_lora'}" in capsys.readouterr().out
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["seed"] == 3
    assert manifest["config"]["inversion"]["iterations"] == 6
    assert manifest["config"]["meta"]["ways"] == 3
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["inputs"]["backbone"]["sha256"] == sha256(world.backbone)
    assert manifest["inputs"]["prior"]["sha256"] == sha256(world.prior)
    assert len(manifest["inputs"]["bank"]["sha256"]) == 64
    assert len(manifest["inputs"]["validation"]["sha256"]) == 64
    lines = [json.loads(x) for x in (out / "meta" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in lines)
    assert any("validation" in line for line in lines)
    LoRA.load(out / "meta_lora").check(CONFIG)


def test_stages_one_by_one_equal_recycle(world, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert main(recycle(world, whole)) == 0
    common = ["--backbone", str(world.backbone), "--quiet", "--device", "cpu"]
    pool, meta = tmp_path / "pool", tmp_path / "meta"
    bank = ["--bank", str(world.bank), "--prior", str(world.prior), *SMALL_INVERSION]
    assert main(["invert", *common, *bank, "--out", str(pool)]) == 0
    train = ["meta-train", *common, *SMALL_META, "--pool", str(pool), "--out", str(meta)]
    assert main(train) == 2
    assert (
        "give --bank FOLDER (the one it was inverted from), or --start" in capsys.readouterr().err
    )
    assert main([*train, "--bank", str(world.bank)]) == 0
    assert same_lora(whole / "meta_lora", meta / "meta_lora")


def test_pretune_makes_a_bank_and_goes_on(world, tmp_path, capsys):
    out = tmp_path / "bank"
    arguments = [
        "pretune", "--dataset", str(world.images), "--backbone", str(world.backbone), "--num", "3",
        "--ways", "3", "--steps", "4", "--batch-size", "6", "--group", "2", "--rank", "2", "1",
        "--quiet", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    bank = LoRABank.load(out)
    assert [lora.rank for lora in bank] == [2, 1, 2]
    kept = tmp_path / "kept"
    shutil.copytree(out / "0002", kept)
    (out / "0002" / "adapter_config.json").unlink()  # as if the run had stopped before it
    assert main(arguments) == 0
    assert same_lora(out / "0002", kept)
    assert main(["info", str(out)]) == 0
    assert "bank of 3 LoRAs" in capsys.readouterr().out


def test_pretune_of_several_sets(world, tmp_path, capsys):
    out, other = tmp_path / "bank", tmp_path / "other"
    shutil.copytree(world.images, other)
    arguments = [
        "pretune", "--dataset", str(world.images), str(other), "--backbone", str(world.backbone),
        "--num", "2", "--ways", "3", "--steps", "2", "--batch-size", "6", "--quiet",
        "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    names = [lora.class_names[0].split("/")[0] for lora in LoRABank.load(out)]
    assert names == ["images", "other"]
    inputs = json.loads((out / "run.json").read_text())["inputs"]
    assert set(inputs) == {"backbone", "dataset images", "dataset other"}
    refused(capsys, [*arguments[:2], *arguments[4:]], "dataset: expected a name or path, got none")


def same_lora(one, other) -> bool:
    files = [folder / "adapter_model.safetensors" for folder in (one, other)]
    first, second = (load_safetensors(file)[0] for file in files)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("stage", ["invert", "meta-train"])
def test_interrupted_and_resumed_is_the_same_run(world, tmp_path, monkeypatch, capsys, stage):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(recycle(world, whole)) == 0
    metrics = RunFolder.metrics
    calls = []

    def interrupting(self, name, step, values):
        metrics(self, name, step, values)
        if name == stage:
            calls.append(step)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "metrics", interrupting)
    assert main(recycle(world, parts)) == 130
    text = capsys.readouterr().err
    assert "fastrecycle: interrupted; finished work is in" in text
    assert "go on with: fastrecycle recycle --backbone" in text
    assert not (parts / "meta_lora").exists()
    assert main(["info", str(parts)]) == 0
    assert "the same command goes on with it" in capsys.readouterr().out
    assert main(recycle(world, parts)) == 0
    assert same_lora(whole / "meta_lora", parts / "meta_lora")


def test_resuming_with_other_settings_is_refused(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(recycle(world, out)) == 0
    capsys.readouterr()
    refused(capsys, recycle(world, out, "--seed", "1"), "another seed")
    refused(capsys, recycle(world, out, "--meta.lr", "0.1"), "another config")
    other = replace(world, bank=tmp_path / "bank")
    LoRABank([random_lora(CONFIG, i + 5) for i in range(3)]).save(other.bank)
    refused(capsys, recycle(other, out), "another input")


def test_moved_inputs_are_the_same_run(world, tmp_path):
    out = tmp_path / "run"
    assert main(recycle(world, out)) == 0
    moved = replace(world, bank=tmp_path / "moved", backbone=tmp_path / "copy.safetensors")
    moved.backbone.write_bytes(world.backbone.read_bytes())
    LoRABank.load(world.bank).save(moved.bank)
    assert main(recycle(moved, out)) == 0


def test_full_disk_is_named(world, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastrecycle.inversion_group.save_checkpoint", full)
    monkeypatch.setattr("fastrecycle.files.Folder.write", full)
    out = tmp_path / "run"
    refused(capsys, recycle(world, out), str(out), "no space left", "finished work is kept")


# ---------------------------------------------------------------------- eval


def test_eval_json_holds_everything(world, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert main(["eval", *evaluation(world, "--shots", "2", "--json", str(file))]) == 0
    table = capsys.readouterr().out
    content = json.loads(file.read_text())
    expected = evaluate(
        ViT.from_pretrained(world.backbone), None, world.images, ways=3, shots=2, queries=3,
        tasks=20,
    )  # fmt: skip
    assert content["accuracy"] == pytest.approx(expected.accuracy)
    assert content["ci95"] == pytest.approx(expected.ci95)
    np.testing.assert_allclose(content["per_task"], expected.per_task)
    assert f"{expected.accuracy:.2f}" in table
    assert f"± {expected.ci95:.2f}" in table
    assert content["settings"]["ways"] == 3
    assert content["settings"]["lora"] == "none"
    assert content["versions"]["fastrecycle"] == fastrecycle.__version__
    assert content["inputs"]["backbone"]["sha256"] == sha256(world.backbone)
    assert len(content["inputs"]["dataset"]["sha256"]) == 64


def test_eval_of_several_shots_and_an_archive(world, tmp_path, capsys):
    archive, file = tmp_path / "images.zip", tmp_path / "result.json"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(world.images.rglob("*.png")):
            packed.write(path, path.relative_to(world.images))
    more = ["--shots", "1", "5", "--json", str(file), "--dataset", str(archive)]
    assert run_eval(evaluation(world, *more)) == 0
    assert "3-way 5-shot" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert [result["shots"] for result in content["results"]] == [1, 5]
    assert "accuracy" not in content
    assert content["inputs"]["dataset"]["sha256"] == sha256(archive)


def test_eval_on_varying_ways_and_shots(world, tmp_path, capsys):
    file = tmp_path / "result.json"
    words = ["eval", "--dataset", str(world.images), "--backbone", str(world.backbone), "--lora",
             "none", "--device", "cpu", "--quiet", "--tasks", "20", "--json", str(file),
             "--protocol", "meta_dataset"]  # fmt: skip
    assert main(words) == 0
    assert "varying ways and shots" in capsys.readouterr().out
    content = json.loads(file.read_text())
    vit = ViT.from_pretrained(world.backbone)
    expected = evaluate_meta_dataset(vit, None, world.images, tasks=20)
    np.testing.assert_allclose(content["per_task"], expected.per_task)
    assert (content["shots"], content["settings"]["protocol"]) == (None, "meta_dataset")
    assert main([*words, "--shots", "5"]) == 2
    assert "draws ways, shots and queries anew for each task" in capsys.readouterr().err


def test_eval_takes_features_from_a_cache(world, tmp_path, monkeypatch):
    cache, results = tmp_path / "cache", [tmp_path / "one.json", tmp_path / "two.json"]
    for file in results:
        words = evaluation(world, "--embedding-cache", str(cache), "--json", str(file))
        assert main(["eval", *words]) == 0
        monkeypatch.setattr(ViT, "forward", None)  # nothing is embedded again
    one, two = (json.loads(file.read_text()) for file in results)
    assert one["per_task"] == two["per_task"]


def test_eval_of_an_averaged_bank(world, tmp_path):
    file = tmp_path / "result.json"
    lora = ["--lora", f"average:{world.bank}", "--json", str(file), "--prune", "1:0.5"]
    assert main(["eval", *evaluation(world, *lora)]) == 0
    content = json.loads(file.read_text())
    expected = evaluate(
        ViT.from_pretrained(world.backbone), LoRA.average(list(LoRABank.load(world.bank))),
        world.images, ways=3, queries=3, tasks=20, prune={1: 0.5},
    )  # fmt: skip
    assert content["accuracy"] == pytest.approx(expected.accuracy, abs=1e-6)
    assert content["settings"]["prune"] == {"1": 0.5}


def test_eval_module_says_what_to_put_where():
    done = subprocess.run(
        [sys.executable, "-m", "fastrecycle.eval", "--dataset", "cub"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "fastrecycle: error: " in done.stderr
    assert "cub.zip" in done.stderr


# ---------------------------------------------------------------------- bad input


def test_refuses_an_unknown_command(capsys):
    refused(capsys, ["recycel"], "'recycel'", "did you mean recycle?")


def test_suggests_a_mistyped_option(world, capsys):
    assert main(recycle(world, "x", "--inversion.iteratons", "3")) == 2
    assert "--inversion.iterations" in capsys.readouterr().err


def test_refuses_missing_and_damaged_files(world, tmp_path, capsys):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(world.backbone.read_bytes()[:2000])
    for backbone, part in ((tmp_path / "absent.safetensors", "no such file"), (cut, "cut.safe")):
        refused(capsys, ["eval", *evaluation(world, "--backbone", str(backbone))], part)
    refused(capsys, ["eval", *evaluation(world, "--dataset", "cubs")], "did you mean cub?")
    refused(capsys, ["eval", *evaluation(world, "--lora", str(tmp_path))], "adapter_config.json")
    refused(capsys, ["meta-train", "--pool", str(tmp_path)], "no synthetic pool")
    refused(capsys, recycle(world, tmp_path / "x", "--bank", str(tmp_path)), "PEFT folder")
    refused(capsys, ["report", str(tmp_path)], "run.json")
    refused(capsys, ["info", str(tmp_path / "absent")], "no such file or folder")


def test_refuses_a_schedule_out_of_range(world, tmp_path, capsys):
    out = tmp_path / "x"
    refused(capsys, recycle(world, out, "--inversion.prune", "1:1.5"), "ratio of block 1", "1.5")
    refused(capsys, recycle(world, out, "--inversion.prune", "7:0.5"), "blocks are integers")
    assert main(recycle(world, out, "--inversion.prune", "x")) == 2
    assert "expected BLOCK:RATIO" in capsys.readouterr().err


def test_refuses_a_lora_of_another_width(world, tmp_path, capsys):
    wide = replace(CONFIG, width=64, heads=4)
    random_lora(wide, 0).save(tmp_path / "bank" / "wide")
    wide_lora = ["--lora", str(tmp_path / "bank" / "wide")]
    refused(capsys, ["eval", *evaluation(world, *wide_lora)], "belongs to another model")
    bank = ["--bank", str(tmp_path / "bank")]
    refused(capsys, recycle(world, tmp_path / "x", *bank), "belongs to another model")


def test_refuses_packaged_loras_on_another_backbone(world, tmp_path, capsys):
    lora = ["--lora", "demo"]
    refused(capsys, ["eval", *evaluation(world, *lora)], "packaged LoRAs belong to the packaged")
    refused(capsys, recycle(world, tmp_path / "x", "--bank", "demo"), "packaged LoRAs belong")


def test_refuses_too_few_images_and_no_gpu(world, tmp_path, capsys):
    refused(capsys, ["eval", *evaluation(world, "--queries", "30")], "8 images", "30")
    if not torch.cuda.is_available():
        refused(capsys, ["eval", *evaluation(world, "--device", "cuda")], "no CUDA device")
    refused(capsys, recycle(world, tmp_path / "x", "--meta.queries", "9"), "images_per_class")


def test_debug_shows_where(world, capsys):
    assert main(["eval", *evaluation(world, "--dataset", "cub", "--debug")]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "fastrecycle: error: " in text


# ---------------------------------------------------------------------- config files


def test_config_file_sets_and_the_command_line_overrides(world, tmp_path, monkeypatch):
    seen = []
    command = COMMANDS["recycle"]
    fake = replace(command, run=lambda options: seen.append(options) or 0)
    monkeypatch.setitem(COMMANDS, "recycle", fake)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"bank: {world.bank}\nseed: 7\npreset: quick\n"
        "inversion:\n  lr: 1e-3\n  prune: {6: 0.75}\n  betas: [0.4, 0.9]\n"
        "meta:\n  steps: 11\n  targets: [q]\n  learn: first:2\neval:\n  tasks: 5\n"
    )
    assert main(["recycle", "--config", str(file), "--meta.steps", "12"]) == 0
    (options,) = seen
    assert options.bank == str(world.bank)
    assert options.training.seed == 7
    assert options.inversion.lr == 1e-3
    assert options.inversion.prune == {6: 0.75}
    assert options.inversion.betas == (0.4, 0.9)
    assert options.inversion.iterations == 300  # of the preset
    assert options.meta.steps == 12
    assert options.meta.targets == ("q",)


def test_toml_config(tmp_path, monkeypatch):
    seen = []
    command = COMMANDS["invert"]
    fake = replace(command, run=lambda options: seen.append(options) or 0)
    monkeypatch.setitem(COMMANDS, "invert", fake)
    file = tmp_path / "run.toml"
    file.write_text('iterations = 5\nquiet = true\n[inversion]\nprune = {"6" = 0.5}\n')
    assert main(["invert", "--config", str(file)]) == 0
    assert seen[0].inversion.iterations == 5
    assert seen[0].inversion.prune == {6: 0.5}
    assert seen[0].common.quiet is True


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("iteratons: 5", ("unknown key iteratons", "did you mean iterations?")),
        ("inversion:\n  iteratons: 5", ("inversion.iteratons", "inversion.iterations?")),
        ("meta:\n  stepss: 5", ("unknown key meta.stepss",)),
        ("iterations: many", ("iterations", "expected a whole number", "'many'")),
        ("iterations: 0", ("iterations: must be >= 1",)),
        ("betas: [1]", ("betas", "expected a list of 2 values")),
        ("schedule: linear", ("schedule", "expected one of constant, cosine")),
        ("prune: [1]", ("prune", "expected a table {block: ratio}")),
        ("quiet: 3", ("quiet", "expected true or false")),
        ("- 1", ("expected a table of options",)),
        ("a: [", ("run.yaml",)),
    ],
)
def test_refuses_config(tmp_path, capsys, text, parts):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    refused(capsys, ["invert", "--config", str(file)], *parts)


def test_refuses_other_config_files(tmp_path, capsys):
    refused(capsys, ["invert", "--config", str(tmp_path / "no.yaml")], "no such file")
    (tmp_path / "run.ini").write_text("")
    refused(capsys, ["invert", "--config", str(tmp_path / "run.ini")], "expected a .yaml or .toml")


def test_backbone_config(world, tmp_path):
    from fastrecycle.options import backbone_config

    told = backbone_config(["activation=gelu", "mean=0.5,0.5,0.5", "heads=3"])
    assert told == {"activation": "gelu", "mean": [0.5, 0.5, 0.5], "heads": 3}
    assert backbone_config(["vit_b_16"]) == "vit_b_16"
    assert backbone_config([]) is None
    (tmp_path / "c.json").write_text('{"heads": 2}')
    assert backbone_config([str(tmp_path / "c.json")]) == {"heads": 2}
    with pytest.raises(ValueError, match="expected key=value"):
        backbone_config(["a=1", "b"])


# ---------------------------------------------------------------------- info and report


def test_info_describes_each_kind(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(recycle(world, out)) == 0
    for source, part in (
        (world.backbone, "width 32, 2 blocks"),
        (world.prior, "prior network, 3 BatchNorms"),
        (world.bank, "bank of 3 LoRAs"),
        (world.bank / "0000", "head: 3 classes (ant, bee, cat)"),
        (world.images, "test: 40 images, 5 classes of 8 to 8 images"),
        (out, "meta-training: 6 steps done"),
        (out / "pool", "36 images of 3 LoRAs"),
        (out / "pool" / "task-000000.safetensors", "12 images of 1 LoRAs"),
        ("digits", "1797 images, 10 classes"),
    ):
        capsys.readouterr()
        assert main(["info", str(source)]) == 0, source
        assert part in capsys.readouterr().out


def test_info_finds_what_is_broken(world, tmp_path, capsys):
    bank = tmp_path / "bank"
    LoRABank.load(world.bank).save(bank)
    file = bank / "0001" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(world.backbone.read_bytes()[:3000])
    images = tmp_path / "images" / "test"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        (images / name / "1.png").write_bytes(b"no image")
    for source, part in (
        (bank, "0001"),
        (bank / "0001", "adapter_model.safetensors"),
        (cut, "cut.safetensors"),
        (images.parent, "1.png"),
    ):
        assert main(["info", str(source)]) == 1, source
        text = capsys.readouterr().out
        assert "problem: " in text
        assert part in text


def test_report_draws_and_lists(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(recycle(world, out, "--inversion.prune", "1:0.5")) == 0
    assert main(["eval", *evaluation(world, "--json", str(out / "nn.json"))]) == 0
    with (out / "meta" / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "meta-tr')  # a line that a kill cut short
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    assert str(out / "report.md") in capsys.readouterr().out
    for name in ("curves.png", "synthetic.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    assert "50% most important" in text
    assert "nn.json" in text
    assert "config.inversion.iterations" in text
    assert "![synthetic images](synthetic.png)" in text


def test_reason_is_one_line():
    assert cli._reason(ValueError("a\n  b"), None) == "a b"
    assert cli._reason(RuntimeError(), None) == "RuntimeError"
    assert cli._reason(FileNotFoundError(errno.ENOENT, "No such file", "x"), None) == (
        "x: No such file"
    )

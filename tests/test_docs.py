"""The documentation: its code runs, its commands parse, what it names exists, the site builds."""

import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import fastrecycle
from fastrecycle import LoRA
from fastrecycle.cli import COMMANDS
from fastrecycle.options import parse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.usefixtures("one_thread")


def text_of(page):
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(text, language):
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_in_order(page, text, **given):
    """Execute a page's Python as one program; its names afterwards."""
    names = dict(given)
    for number, block in enumerate(blocks(text, "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


# ------------------------------------------------------------------ code


@pytest.mark.slow
def test_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_in_order("tutorial.md", text_of("tutorial.md"))
    pool, meta_lora = names["pool"], names["meta_lora"]
    assert pool.images.shape == (40, 3, 64, 64)
    assert pool.kept.shape == (40, 32)
    again = LoRA.load(tmp_path / "meta_lora")
    average = LoRA.average(names["loras"]).compress(4)
    for target in ("q", "v"):
        assert torch.equal(again.delta(target), meta_lora.delta(target))
        assert not torch.allclose(meta_lora.delta(target), average.delta(target), atol=1e-6)
    assert (tmp_path / "synthetic.png").exists()
    assert list(names["clf"].classes_) == list(range(10))
    # chance is 20 %, and five standard errors of 100 tasks are about 6
    assert names["plain"].accuracy > 40
    assert names["recycled"].accuracy > 40
    assert "packaged meta-LoRA" in capsys.readouterr().out


@pytest.fixture
def hf_backbone(tmp_path):
    """A small ViT without a head, as the Hub has them."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=3,
    )  # fmt: skip
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "backbone")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def test_loras_of_peft_are_recycled_as_the_page_says(tmp_path, monkeypatch, hf_backbone):
    pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(0)

    def train(model, task):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)

    monkeypatch.chdir(tmp_path)
    page = text_of("your-loras.md").replace('f"hf:{backbone}"', "backbone")
    page = page.replace("google/vit-base-patch16-224-in21k", hf_backbone.as_posix())
    names = run_in_order("your-loras.md", page, train=train)
    assert [lora.class_names for lora in names["bank"]] == [
        ("duck", "heron", "wren", "owl"), ("cat", "dog", "hamster"),
    ]  # fmt: skip
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 32, 32))).float()
    vit, meta_lora, adapted = (names[n] for n in ("vit", "meta_lora", "adapted"))
    with torch.no_grad():
        ours = vit(images, meta_lora)
        theirs = adapted.eval()(images).last_hidden_state[:, 0]
        assert not torch.allclose(ours, vit(images), atol=1e-2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert LoRA.load(tmp_path / "runs/mine/meta_lora").rank == meta_lora.rank


def test_operations_run_as_the_page_says():
    names = run_in_order("training-code.md", text_of("training-code.md"))
    assert names["qkv"].shape == (6, 65, 3, 192)
    assert names["y"].shape == (6, 65, 192)
    assert names["kept"].shape == (6, 32)


def test_programs_for_other_loops_are_shown_and_there():
    shown = re.findall(r'^--8<-- "(.*)"$', text_of("training-code.md"), re.MULTILINE)
    names = ("train_pruned_vit", "lora_module", "train_lightning", "train_hf_trainer")
    assert shown == [f"examples/{name}.py" for name in names]
    assert all((ROOT / file).is_file() for file in shown)


# ------------------------------------------------------------------ the paper's map


def rows():
    """(what of the paper, functions, commands) of each row."""
    for line in text_of("paper.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[0] not in ("in the paper", "---"):
            functions = re.findall(r"\[`([\w.]+)`\]\[([\w.]+)\]", cells[1])
            yield cells[0], functions, re.findall(r"`([^`]+)`", cells[2])


def resolve(path):
    """What a dotted path names."""
    parts = path.split(".")
    for cut in range(1, len(parts) + 1):  # data.episodes is a function, and a module below
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            for name in parts[cut:]:
                found = getattr(found, name)
        except AttributeError:
            continue
        return found
    raise AssertionError(f"{path} names nothing")


def test_every_equation_and_table_has_a_row():
    named = " ".join(title for title, _, _ in rows())
    wanted = ["Alg. 1", *(f"Eq. {n}" for n in ("1", "2", "3a", "3b", "4", "5", "6", "7", "8"))]
    wanted += [f"Table {n}," for n in range(1, 15)]
    assert [name for name in wanted if name not in named] == []
    assert all(functions for _, functions, _ in rows())


def test_functions_of_the_paper_can_be_imported():
    for _, functions, _ in rows():
        for shown, target in functions:
            assert resolve(f"fastrecycle.{shown}") is resolve(target), shown


def is_fastrecycle(command):
    return command.startswith("fastrecycle ")


PAPER_COMMANDS = sorted({command for _, _, commands in rows() for command in commands})


@pytest.mark.parametrize("command", filter(is_fastrecycle, PAPER_COMMANDS))
def test_command_of_the_paper_parses(command):
    parses(command)


def parses(command):
    _, name, *words = shlex.split(command, comments=True)
    parse(COMMANDS[name].options, words, prog=name, description="")


PROGRAMS = sorted({c.split()[1] for c in PAPER_COMMANDS if not is_fastrecycle(c)})


def test_commands_of_the_paper_have_help(capsys):
    for command in {c.split()[1] for c in PAPER_COMMANDS if is_fastrecycle(c)}:
        assert fastrecycle.cli.main([command, "--help"]) == 0
        assert f"usage: fastrecycle {command}" in capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_of_the_paper_has_help(program, monkeypatch, capsys):
    path = ROOT / program
    monkeypatch.syspath_prepend(str(path.parent))  # as for any script
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(path), run_name="__main__")
    assert done.value.code == 0
    assert "usage:" in capsys.readouterr().out


def shell_commands():
    """Every `fastrecycle` command in a shell block of the documentation, with its page."""
    for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for block in blocks(path.read_text(encoding="utf-8"), "(?:sh|console)?"):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.partition(" && ")[0]
                if re.match(r"fastrecycle [a-z]", line):
                    yield pytest.param(line, id=f"{path.name}: {' '.join(line.split())}")


@pytest.mark.parametrize("command", shell_commands())
def test_command_of_a_page_parses(command):
    parses(command)


# ------------------------------------------------------------------ the site


def documented():
    """Targets of the API reference."""
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("api/*.md")))
    return set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))


def exported(module):
    """Names of a package's exports; its submodules are not exports of their own."""
    return {n for n in module.__all__ if not isinstance(getattr(module, n), type(sys))}


def absent(module, documented):
    """Exports that no full name stands for, in whichever module it is defined."""
    home = re.compile(r"fastrecycle\w*(?:\.[a-z_0-9]+)*\.(\w+)")
    return exported(module) - {m[1] for name in documented if (m := home.fullmatch(name))}


def test_reference_documents_what_it_names():
    for target in documented():
        resolve(target)


def test_public_names_are_in_the_reference():
    assert not absent(fastrecycle, documented())
    assert {"fastrecycle.ops", "fastrecycle.capture"} <= documented()


def test_comments_of_fields_become_their_description():
    pytest.importorskip("griffe", reason="needs the extra docs")
    spec = importlib.util.spec_from_file_location("field_comments", DOCS / "field_comments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = [
        "    x: int",
        "    # Two lines",
        "    # above.",
        "    y: int = 3",
        "    z: int  # (N,)",
    ]
    assert [module.comment_of(lines, row, row) for row in (1, 4, 5)] == [
        "", "Two lines above.", "(N,)",
    ]  # fmt: skip


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason='needs the site\'s tools: pip install -e ".[docs]"')
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    inventory = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    for package in ("fastrecycle", "fastrecycle.ops", "fastrecycle.data", "fastrecycle.baselines"):
        assert not absent(importlib.import_module(package), entries)
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "images/demo.png" in home
    page = (tmp_path / "api/index.html").read_text(encoding="utf-8")
    assert "Images synthesised for each class" in page  # a comment above a field
    loops = (tmp_path / "training-code/index.html").read_text(encoding="utf-8")
    assert "DigitsModule" in loops  # the example itself

"""The shape of the source: which module may import which, and who calls the kernels."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastrecycle"

# Data flows down this list: at import, a module takes only from those above it.
ORDER = [
    "config", "files", "augment", "capture", "pruning", "positions", "ops", "vit_config",
    "block", "pooling", "lora", "lora_files", "dora", "peft_format", "vit", "layouts",
    "conventions", "weights", "sources", "text", "prior", "pool_files", "pool", "grouping",
    "jitter", "shortcuts", "inversion_loss", "inversion_result", "inversion_group", "inversion",
    "classifier", "screening", "vetting", "parallel", "meta_tasks", "meta_loss", "meta_trainer",
    "metatrain", "data", "embedding_cache", "eval", "baselines", "pretune", "inputs",
    "run", "live", "cluster", "recycler", "report", "bench_report", "serve", "info", "options",
    "tables", "demo", "cli",
]  # fmt: skip
# Imports within functions may look down, where a method or a command opens the door for users.
DOORS = {
    ("lora", "peft_format"), ("lora", "lora_files"),  # LoRA.load, LoRA.save
    ("vit", "weights"), ("vit", "sources"),  # ViT.from_state_dict, from_pretrained, save
    ("eval", "cli"),  # python -m fastrecycle.eval
    ("cli", "demo"),
}  # fmt: skip
STAGES = {
    "invert", "InversionGroup", "meta_train", "MetaTrainer", "pretune", "evaluate",
    "evaluate_shots", "evaluate_zero_shot", "MetaLoRARecycler",
}  # fmt: skip
WIRING = {"__init__", "recycler", "tables", "cli", "demo", "cluster"}
# One stage in several modules.
PARTS = {("inversion", "inversion_group"), ("metatrain", "meta_trainer")}


def modules():
    """{module: its syntax tree}; a subpackage counts as one module, by its folder's name."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield parts[0], file, ast.parse(file.read_text(encoding="utf-8"))


def imports(tree):
    """(module below fastrecycle, names, whether at import) of each import of our own."""
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            path = (node.module or "").split(".")
            assert node.level == 0, "relative import"
            if path[0] == "fastrecycle":
                found = [path[1]] if len(path) > 1 else names  # from fastrecycle import ops
                for module in found:
                    yield module, names, id(node) not in inner
        elif isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name.split(".")
                if path[0] == "fastrecycle" and len(path) > 1:
                    yield path[1], [], id(node) not in inner


def test_every_module_has_its_place():
    found = {name for name, _, _ in modules()} - {"__init__", "assets"}
    assert found == set(ORDER)


def test_imports_follow_the_flow_of_data():
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = []
    for name, file, tree in modules():
        if name not in place:
            continue
        for other, _, at_import in imports(tree):
            if other == name or other not in place:
                continue
            if place[other] > place[name] and (at_import or (name, other) not in DOORS):
                wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert wrong == []


def test_only_the_wiring_modules_call_stages():
    wrong = []
    for name, file, tree in modules():
        for other, names, _ in imports(tree):
            taken = STAGES & set(names)
            own = other == name or (name, other) in PARTS
            if taken and name not in WIRING and not own and other in ORDER:
                wrong.append(f"{file.relative_to(ROOT)} imports {taken}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["fastrecycle", "examples", "benchmarks"])
def test_only_ops_imports_the_kernels(folder):
    importing = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            if any(n.split(".")[0] in ("kernels", "fastrecycle_kernels") for n in found):
                importing.add(file.relative_to(ROOT).as_posix())
    assert importing == ({"fastrecycle/ops.py"} if folder == "fastrecycle" else set())


def test_kernels_know_nothing_of_the_library():
    for file in (ROOT / "kernels").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "import fastrecycle\n" not in text
        assert "from fastrecycle." not in text
        assert "from fastrecycle import" not in text


def test_importing_has_no_effects():
    """Neither compiler flags nor randomness nor threads change, and nothing is printed."""
    code = (
        "import torch, random, numpy as np\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32,\n"
        "            torch.backends.cudnn.benchmark, torch.get_num_threads(),\n"
        "            torch.initial_seed(), random.getstate(), str(np.random.get_state()),\n"
        "            torch.is_grad_enabled(), torch.get_float32_matmul_precision())\n"
        "before = state()\n"
        "import fastrecycle.cli, fastrecycle.recycler, fastrecycle.pretune\n"
        "assert state() == before\n"
        "assert 'kernels' not in __import__('sys').modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""What a fresh machine reads: set-up commands, versions, dependencies."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import fastrecycle

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN = {"fastrecycle", "fastrecycle_kernels"}
# import name -> distribution, where they differ
DISTRIBUTIONS = {
    "PIL": "pillow", "open_clip": "open_clip_torch", "sklearn": "scikit-learn", "yaml": "pyyaml",
    "umap": "umap-learn",
}  # fmt: skip


def setup_commands() -> list[str]:
    return re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)


def names(requirements) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", r, maxsplit=1)[0].lower() for r in requirements}


def imported() -> set[str]:
    """Distributions that the package imports anywhere, at the top or within functions."""
    found = set()
    for folder in ("fastrecycle", "kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    found.add(node.module.partition(".")[0])
                elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_lazily":
                    found.add(node.args[0].value)
    found -= OWN | set(sys.stdlib_module_names)
    return {DISTRIBUTIONS.get(name, name).lower() for name in found}


def test_readme_has_two_setup_commands():
    demo, tests = setup_commands()
    assert demo.endswith(".venv/bin/fastrecycle demo")
    assert tests.endswith(".venv/bin/python -m pytest -n 2")


def test_checks_run_the_second_command_as_it_stands():
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert setup_commands()[1] in checks
    assert "set -euo pipefail" in checks


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"] == fastrecycle.__version__


def test_every_import_is_declared():
    declared = names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    optional = names(r for name, extra in extras.items() if name != "test" for r in extra)
    missing = imported() - declared
    assert missing <= optional
    # an extra's import has to be one that the package can do without, and where the tests install
    # it they must show that themselves: those of nevergrad, h5py, gradio and ray do
    assert missing & names(extras["test"]) <= {"nevergrad", "h5py", "gradio", "ray"}


def test_every_required_dependency_is_imported():
    # triton serves torch.compile
    assert names(PROJECT["dependencies"]) - imported() <= {"triton"}


def test_packaged_weights_stay_small():
    assets = (ROOT / "fastrecycle" / "assets").rglob("*")
    assert sum(file.stat().st_size for file in assets if file.is_file()) <= 16e6


LINKS = sorted(set(re.findall(r"\]\(((?:docs/|LICENSE)[^)#]*)\)", README)))


@pytest.mark.parametrize("link", LINKS)
def test_readme_links_exist(link):
    if link in ("docs/results.md", "docs/images/demo.png") and not (ROOT / link).exists():
        pytest.skip(f"{link} is written by the runs that it reports")
    assert (ROOT / link).exists()

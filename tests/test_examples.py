"""Examples run as they stand."""

import importlib.util
import sys
from pathlib import Path

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

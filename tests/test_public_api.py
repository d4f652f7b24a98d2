"""Signatures that users rely on: order of positional arguments, names of the others."""

import inspect
import subprocess
import sys

from fastrecycle import FewShotClassifier, LoRA, LoRABank, MetaLoRARecycler, ViT, evaluate, flops
from fastrecycle.eval import Result
from fastrecycle.pool import SyntheticPool


def parameters(function):
    return {
        name: p.default
        for name, p in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
    }


def assert_begins(function, *names):
    """Positional names in this order."""
    kinds = inspect.signature(function).parameters.values()
    got = [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    assert got[: len(names)] == list(names)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, fastrecycle; print('torch' in sys.modules, 'sklearn' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_signatures_of_backbone_and_loras():
    assert_begins(ViT.from_pretrained, "source", "config")
    assert_begins(ViT.from_state_dict, "state_dict", "config")
    assert_begins(ViT.preset, "name")
    assert_begins(ViT.forward, "images", "lora")
    for method in (ViT.forward, ViT.encode):
        assert {"lora_index", "prune", "keep"} <= parameters(method).keys()
        assert parameters(method)["lora"] is None
    assert_begins(FewShotClassifier.fit, "images", "labels")
    assert_begins(LoRA.load, "path")
    assert_begins(LoRA.save, "path")
    assert_begins(LoRABank.load, "folder")
    assert_begins(LoRABank.save, "folder")
    assert_begins(SyntheticPool.load, "folder")
    assert_begins(SyntheticPool.save, "folder")
    assert parameters(flops).keys() == {"vit", "prune", "sparsity"}


def test_signature_of_the_recycler():
    assert_begins(MetaLoRARecycler, "vit", "bank", "prior", "inversion", "meta")
    defaults = parameters(MetaLoRARecycler)
    expected = {"prior": "demo", "device": None, "backend": "auto", "precision": "auto", "seed": 0}
    assert {name: defaults[name] for name in expected} == expected
    assert_begins(MetaLoRARecycler.run, "out_dir")
    # both stages run without arguments
    for stage in (MetaLoRARecycler.invert, MetaLoRARecycler.meta_train):
        assert inspect.Parameter.empty not in parameters(stage).values()


def test_signature_of_evaluate():
    assert_begins(evaluate, "vit", "lora", "dataset")
    defaults = parameters(evaluate)
    expected = {"ways": 5, "shots": 1, "queries": 15, "tasks": 600, "split": "test", "seed": 0}
    assert {name: defaults[name] for name in expected} == expected
    assert list(inspect.signature(Result).parameters) == ["accuracy", "ci95", "per_task"]

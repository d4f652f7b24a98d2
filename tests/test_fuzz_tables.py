"""Hostile stores of tables: records and plans of any content make pages, or one error."""

import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mangled import altered, attempt, damaged

from fastrecycle import tables
from fastrecycle.cli import FAILED, main
from fastrecycle.tables.recipes import plain

KEYS = [f"score-{i:020x}" for i in range(4)]
DATASETS, ROWS = ("cifar_fs", "tiny_imagenet"), ("NN", "best sparsity")


def record(offset=0):
    """What a score left, of the four tasks of the smallest scale."""
    per_task = [20.0 + offset, 40.0, 60.0, 40.0]
    return {
        "recipe": {"stage": "score", "on": {"count": 4}}, "inputs": {}, "seconds": 0.5, "work": 4,
        "like": "NN", "setting": {}, "versions": {"torch": "2.14", "platform": "Linux"},
        "accuracy": sum(per_task) / 4, "ci95": 16.0, "per_task": per_task,
        "chosen": {"lr": 0.1, "steps": 1},
        "cost": {"seconds": 0.01, "parameters": 9, "peak_memory_bytes": None},
    }  # fmt: skip


@cache
def plan():
    told = {"source": "x.safetensors", "sha256": "0" * 64}
    cells = [
        {"row": row, "dataset": dataset, "shots": 1}
        for row in ROWS for dataset in DATASETS
    ]  # fmt: skip
    return json.loads(json.dumps({
        "table": "gains", "scale": "smoke", "settings": plain(tables.SCALES["smoke"]),
        "command": "fastrecycle report gains", "date": "2026-11-24", "seed": 0,
        "setting": {"precision": "fp32", "backend": "reference"},
        "backbones": {"main": told}, "prior": told,
        "domains": [{"dataset": name, "sources": ["cifar_fs"]} for name in DATASETS],
        "absent": {"cub": "no data"},
        "rows": [{"label": "NN", "kind": "NN"}, {"label": "best sparsity", "kind": "best"}],
        "cells": [
            *({**cell, "key": key} for cell, key in zip(cells[:3], KEYS)),
            {**cells[3], "left": "a bank"},
        ],
    }))  # fmt: skip


def fill(folder, records=(), told=None, table="gains"):
    """A store with these files, and good ones for the others."""
    for key, content in {key: json.dumps(record(i)) for i, key in enumerate(KEYS[:3])}.items():
        path = Path(folder) / "done" / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dict(records).get(key, content.encode()))
    path = Path(folder) / "plans" / f"{table}-smoke.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(plan() | {"table": table}).encode() if told is None else told)
    return tables.Store(folder)


def pages(store, table="table2"):
    return tables.write(table, "smoke", store, store.root / "out")


def as_json(value):
    """JSON text of altered versions of a value, or damaged text."""
    good = altered(value).map(lambda x: json.dumps(x).encode())
    return st.one_of(good, good, good, damaged(json.dumps(value).encode()))


@given(as_json(record()))
def test_fuzz_record_of_a_score(content):
    with tempfile.TemporaryDirectory() as folder:
        store = fill(folder, {KEYS[0]: content}, table="table2")
        written = attempt(lambda: pages(store), names=[f"{KEYS[0]}.json"])
        assert written is None or all(path.stat().st_size for path in written)
        assert written or not (store.root / "out").exists()  # nothing half-written
        attempt(store.records, names=[f"{KEYS[0]}.json"])


@given(as_json(plan()))
def test_fuzz_plan(content):
    with tempfile.TemporaryDirectory() as folder:
        store = fill(folder, told=content, table="table2")
        written = attempt(lambda: pages(store), names=["table2-smoke.json", "done/score-"])
        assert written or not (store.root / "out").exists()


# ------------------------------------------------------------------ found by fuzzing


@pytest.mark.parametrize("table", ["gains", "table2"])
def test_a_good_store_is_rendered(table, tmp_path):
    written = pages(fill(tmp_path, table=table), table)
    assert "40.00 ± 16.00" in written[-3].read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_task": []}, "per_task must be a list of accuracies"),
        ({"per_task": [1, "x"]}, "per_task must be a number"),
        ({"per_task": [20, 40, 60, 41]}, "accuracy must be the mean of per_task, 40.25, got 40"),
        ({"per_task": [40.0]}, "a score of 1 tasks, its table has 4"),
        ({"per_task": [float("nan")] * 4}, "per_task must be a number"),
        ({"cost": {"seconds": 1, "parameters": "9"}}, "cost.parameters must be a number"),
        ({"cost": []}, "cost must be a table"),
        ({"versions": {"torch": "2"}}, "versions.platform must be text"),
        ({"chosen": {"lr": [0.1]}}, "chosen.lr must be a number"),
        ({"seconds": -1}, "seconds must be a number"),
        ({"like": 3}, "like must be text"),
        ({"recipe": None}, "recipe must be a table"),
        ({"recipe": {"stage": "bank"}}, "recipe.stage must be 'score', got 'bank'"),
    ],
    ids=str,
)
def test_damaged_record_is_one_error_with_its_file(changes, message, tmp_path, capsys):
    content = json.dumps(record() | changes).encode()
    fill(tmp_path, {KEYS[0]: content}, table="table2")
    words = ["report", "table2", "--smoke", "--render", "--store", str(tmp_path)]
    assert main(words) == FAILED
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path}/done/{KEYS[0]}.json" in said
    assert message in said
    assert "remove it, and" in said
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": [{"row": "NN", "dataset": "cifar_fs", "shots": 1, "key": "../../x"}]},
         "cells.key must be score- and 20 hex digits"),
        ({"cells": [{"row": "NN", "dataset": "cifar_fs", "shots": 1, "key": ["x"]}]}, "cells.key"),
        ({"cells": [{"row": "?", "dataset": "cifar_fs", "shots": 1}]}, "'[?]' is none of its rows"),
        ({"cells": [{"row": "NN", "dataset": "cifar_fs", "shots": []}]}, "cells.shots must be"),
        ({"rows": [{"label": 3, "kind": "NN"}]}, "rows.label must be text"),
        ({"domains": {}}, "domains must be a list"),
        ({"settings": {}}, "settings.tasks must be a number"),
        ({"prior": {}}, "prior.source must be text"),
        ({"date": None}, "date must be text"),
        ({"command": "\ud800"}, "surrogates not allowed"),
    ],
    ids=ascii,
)  # fmt: skip
def test_damaged_plan_is_one_error_with_its_file(changes, message, tmp_path):
    store = fill(tmp_path, told=json.dumps(plan() | changes).encode(), table="table2")
    with pytest.raises(ValueError, match=rf"table2-smoke\.json: expected .*{message}"):
        pages(store)

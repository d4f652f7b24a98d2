"""Hostile folders of runs: `fastrecycle report RUN` makes its pages, or says one error."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mangled import altered, attempt, bounded_memory, damaged

from fastrecycle.cli import FAILED, main
from fastrecycle.files import parse_json, read_json
from fastrecycle.report import PageOptions, figures, read_run, write_page, write_report
from fastrecycle.report.contents import sibling_without_prior
from fastrecycle.report.tables import flat

pytestmark = pytest.mark.usefixtures("one_thread")

MANIFEST = {
    "command": "recycle", "seed": 0, "versions": {"torch": "2", "platform": "Linux"},
    "config": {
        "inversion": {"alpha": 0.01, "iterations": 4, "images_per_class": 2, "prune": {"1": 0.5}},
        "meta": {"steps": 4, "sparsity": 0.5},
    },
    "inputs": {
        "backbone": {"source": "gone.safetensors", "sha256": "0", "config": ["mean=0.5"]},
        "bank": {"source": "gone", "sha256": "0"}, "prior": {"source": "none"}, "loras": ["a"],
    },
}  # fmt: skip
METRICS = [
    {"stage": stage, "step": step, "time": 10.0 + step, "loss": 2.0 / step, "accuracy": 0.5}
    for stage in ("inversion", "meta") for step in (1, 2)
]  # fmt: skip
EVALUATION = {
    "settings": {"dataset": "cub", "lora": "meta_lora", "seed": 0, "ways": 5, "tasks": 3},
    "results": [
        {"shots": shots, "accuracy": 50.0, "ci95": 1.0, "per_task": [40.0, 50.0, 60.0]}
        for shots in (1, 5)
    ],
}
PLAIN = {**EVALUATION, "settings": {**EVALUATION["settings"], "lora": "none"}}


def lines(values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def fill(folder, **files):
    """A run's folder with these contents in the place of good ones."""
    contents = {
        "manifest": json.dumps(MANIFEST).encode(), "metrics": lines(METRICS),
        "evaluation": json.dumps(EVALUATION).encode(), "plain": json.dumps(PLAIN).encode(),
    } | files  # fmt: skip
    names = {"manifest": "run.json", "metrics": "metrics.jsonl", "evaluation": "eval.json",
             "plain": "nn.json"}  # fmt: skip
    for key, content in contents.items():
        (Path(folder) / names[key]).write_bytes(content)
    return Path(folder)


def as_json(value):
    """JSON text of altered versions of a value, or damaged text."""
    good = altered(value).map(lambda x: json.dumps(x).encode())
    return st.one_of(good, good, good, damaged(json.dumps(value).encode()))


def report(folder, name):
    """Both reports of a folder; what was refused is refused before anything is written."""
    run = attempt(lambda: read_run(folder), names=[name])
    if run is not None:
        write_report(run)
        page = write_page(run, PageOptions()).read_text()
        assert "<script>alert" not in page
    sibling_without_prior(run) if run is not None else None


@pytest.fixture
def no_curves(monkeypatch):
    """Drawing takes most of the time; one test draws."""
    monkeypatch.setattr("fastrecycle.report.plain.plot_metrics", lambda metrics, path: None)
    monkeypatch.setattr(figures, "curve_svg", lambda name, points: "<svg></svg>")


@pytest.mark.usefixtures("no_curves")
@given(as_json(MANIFEST))
def test_fuzz_manifest_of_a_report(content):
    with tempfile.TemporaryDirectory() as folder:
        report(fill(folder, manifest=content), "run.json")


@pytest.mark.usefixtures("no_curves")
@given(as_json(EVALUATION), st.booleans())
def test_fuzz_evaluation(content, plain):
    with tempfile.TemporaryDirectory() as folder:
        report(fill(folder, **{"plain" if plain else "evaluation": content}), ".json")


@st.composite
def hostile_metrics(draw):
    if draw(st.booleans()):
        return draw(damaged(lines(METRICS)))
    changed = draw(altered(METRICS))
    return lines(changed) if isinstance(changed, list) else json.dumps(changed).encode()


@pytest.mark.usefixtures("no_curves")
@given(hostile_metrics())
def test_fuzz_metrics(content):
    with tempfile.TemporaryDirectory() as folder:
        report(fill(folder, metrics=content), "metrics.jsonl")


VALUES = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e-320, 0, 1])


@settings(max_examples=8)
@given(st.lists(VALUES, min_size=1, max_size=3))
def test_fuzz_curves(values):
    with tempfile.TemporaryDirectory() as folder:
        said = [{"stage": "meta", "step": i, "loss": value} for i, value in enumerate(values)]
        report(fill(folder, metrics=lines(said)), "metrics.jsonl")


# ------------------------------------------------------------------ found by fuzzing


def changed(value, **more):
    """JSON of a value with some keys, given as a__b, replaced."""
    value = json.loads(json.dumps(value))
    for path, new in more.items():
        *way, last = path.split("__")
        inner = value
        for key in way:
            inner = inner[int(key) if key.isdigit() else key]
        inner[last] = new
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("manifest", changed(MANIFEST, config=[]), "expected a run's manifest"),
        ("manifest", changed(MANIFEST, config__meta__steps="x"), "meta.steps must be a number"),
        ("manifest", changed(MANIFEST, config__meta__sparsity=[]), "meta.sparsity must be"),
        ("manifest", changed(MANIFEST, config__inversion__prune={"x": 1}), "inversion.prune must"),
        ("manifest", changed(MANIFEST, config__inversion__prune=[1]), "inversion.prune must"),
        ("manifest", changed(MANIFEST, inputs__bank__source=3), "inputs.bank.source must be text"),
        ("manifest", changed(MANIFEST, inputs__loras=5), "inputs.loras must be a list"),
        ("metrics", b"\xff\n", "expected lines of JSON"),
        ("metrics", lines([{"stage": [], "step": 1}]), "line 1: stage must be text"),
        ("metrics", lines([METRICS[0], {"stage": "a", "step": "1"}]), "line 2: step must be a num"),
        ("metrics", lines([{"stage": "a", "step": 1, "time": "x"}]), "line 1: time must be"),
        ("metrics", lines([{"stage": "a", "step": 1, "loss": 10**400}]), "one of 401 digits"),
        ("metrics", lines([{"stage": "a", "step": 1} | {f"{i}": i for i in range(10**4)}]),
         "expected at most 8 stages with 24 values"),
        ("metrics", lines([{"stage": f"{i}", "step": 1, "x": i} for i in range(10**4)]),
         "expected at most 8 stages with 24 values"),
        ("evaluation", changed(EVALUATION, settings=[]), "settings must be an object"),
        ("evaluation", changed(EVALUATION, results=[3]), "each of results must be an object"),
        ("evaluation", changed(EVALUATION, results__0__shots=[1]), "shots must be an integer"),
        ("evaluation", changed(EVALUATION, results__0__per_task=[]), "per_task must be a list"),
        ("evaluation", changed(EVALUATION, results__0__per_task=[[1]]), r"must be in [0, 100]"),
        ("evaluation", changed(EVALUATION, results__0__per_task=[10**400]), "must be in [0, 100]"),
        ("evaluation", changed(EVALUATION, settings__lora="\ud800"), "surrogates not allowed"),
        ("evaluation", b"[" * 10**5, "expected a JSON file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_damaged_run_is_one_error_with_its_file(file, content, message, tmp_path, capsys):
    fill(tmp_path, **{file: content})
    before = sorted(tmp_path.iterdir())
    with bounded_memory():
        assert main(["report", str(tmp_path)]) == FAILED
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    names = {"manifest": "run.json", "metrics": "metrics.jsonl", "evaluation": "eval.json"}
    assert names[file] in said
    assert sorted(tmp_path.iterdir()) == before


def test_lines_of_metrics_that_were_cut_are_left_out(tmp_path):
    fill(tmp_path, metrics=lines(METRICS[:1]) + b'{"stage": "in\n' + b"[" * 10**5 + b"\n3\n")
    assert list(read_run(tmp_path).metrics) == ["inversion"]


def test_deep_settings_are_shown(tmp_path):
    value = 1
    for _ in range(300):
        value = {"x": value}
    ((name, text),) = flat(value)
    assert name.count(".") == 20
    assert parse_json(text, "") is not None
    assert np.isfinite(len(text))


def test_half_a_character_is_refused_and_a_whole_one_read(tmp_path):
    (tmp_path / "x.json").write_text('"\\ud83d\\ude00"')
    assert read_json(tmp_path / "x.json") == "\U0001f600"
    (tmp_path / "x.json").write_text('{"\\ude00": 1}')
    with pytest.raises(ValueError, match=r"x\.json: expected a JSON file, .*surrogates"):
        read_json(tmp_path / "x.json")

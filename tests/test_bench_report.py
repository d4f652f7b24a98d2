"""Records of benchmarks as tables and plots."""

import json

import pytest

from fastrecycle import bench_report
from fastrecycle.cli import main


def step_row(setting, variant, ms, **more):
    return {"setting": setting, "variant": variant, "ms": ms, "it/s": 1000 / ms, "GiB": ms / 10,
            "GFLOPs": 50.5, "floor_ms": 10.0, "of floor": 10.0 / ms, "paper it/s": 1.76,
            **more}  # fmt: skip


def write(folder, name, *runs):
    folder.mkdir(exist_ok=True)
    machine = {"device": "a GPU", "torch": "2.11"}
    content = [{"machine": machine | extra, "rows": rows} for extra, rows in runs]
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    old = [step_row("0.75", "reference", 999.0)]
    part = [
        step_row("0.0", "reference", 200.0),
        step_row("0.0", "ours", 20.0, **{"x reference": 10.0}),
    ]
    new = [
        step_row("0.75", "reference", 50.0),
        step_row("0.75", "ours", 4.0, **{"x reference": 12.5, "x compile": 1.75}),
    ]
    runs = ({"commit": "a"}, old), ({"time": "1"}, part), ({"time": "2"}, new)
    write(folder, "steps_meta", *runs)
    curve = [{"curve": "rank", "x": x, "variant": "ours", "ms": 2.0 + x, "GiB": 1} for x in (1, 4)]
    write(folder, "curves", ({}, curve))
    write(folder, "host", ({}, [{"call": "draw", "ours_ms": 1.25}]))
    return folder


def test_benchmarks_lists_every_record_and_plots_steps(results, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["report", "benchmarks", "--results", str(results), "--out", str(out)]) == 0
    text = (out / "benchmarks.md").read_text()
    assert "a GPU, torch 2.11, time 2" in text
    assert "| draw | 1.25 |" in text
    assert "10.00x" in text
    assert "1.75x" in text
    assert "999" not in text  # an earlier run on the same device
    for name in ("steps_meta", "curves"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "benchmarks.md") in capsys.readouterr().out


def run_folder(path, sparsity, dataset="cifar_fs"):
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"config": {"meta": {"sparsity": sparsity}}}))
    results = [
        {"dataset": dataset, "shots": s, "accuracy": a, "ci95": 0.5} for s, a in ((1, 89), (5, 96))
    ]
    (path / "eval.json").write_text(json.dumps({"settings": {}, "results": results}))
    return path


def test_table5_joins_speed_and_accuracy(results, tmp_path):
    run = run_folder(tmp_path / "run", 0.75)
    assert main(["report", "table5", "--results", str(results), "--runs", str(run)]) == 0
    dense, sparse = (results / "table5.md").read_text().splitlines()[-2:]
    assert dense.startswith("| 0.0 |")
    assert dense.endswith("| not run | not run |")
    assert sparse.endswith("| 89.00 ± 0.50 | 96.00 ± 0.50 |")


def test_table4_reads_the_pruning_schedule():
    manifest = {"config": {"inversion": {"prune": {"6": 0.75}}}}
    assert bench_report._setting("table4", manifest) == str({6: 0.75})
    assert bench_report._setting("table4", {"config": {"meta": {}}}) is None


def test_says_what_is_missing(results, tmp_path, capsys):
    def refused(*arguments):
        assert main(["report", *map(str, arguments)]) != 0
        return capsys.readouterr().err

    assert "no records; make some with" in refused("benchmarks", "--results", tmp_path / "none")
    assert "steps_inversion.json: no such record" in refused("table4", "--results", results)
    elsewhere = run_folder(tmp_path / "other", 0.5, dataset="cub")
    assert "no evaluation on cifar_fs" in refused(
        "table5", "--results", results, "--runs", elsewhere
    )
    (results / "host.json").write_text("{}")
    assert "expected a benchmark's record" in refused("benchmarks", "--results", results)

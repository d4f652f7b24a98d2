"""Each table of the paper as one command: on toys, in seconds, from a store that is shared."""

import csv
import json
import shutil
import threading
import time

import pytest

from fastrecycle import tables
from fastrecycle.cli import main
from fastrecycle.tables import stages
from fastrecycle.tables.build import Builder
from fastrecycle.tables.layout import MAIN
from fastrecycle.tables.recipes import Method, Score, Tasks
from fastrecycle.tables.render import CSV_HEAD

pytest.importorskip("nevergrad")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def report(table, store, *more):
    return main(["report", table, "--smoke", "--quiet", "--store", str(store), *more])


def read_csv(folder, table):
    with (folder / f"{table}.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("table", tables.TABLES)
def test_smoke_writes_every_cell(table, store):
    assert report(table, store) == 0
    folder = store / "tables"
    lines = read_csv(folder, table)
    assert tuple(lines[0]) == CSV_HEAD
    done = [line for line in lines if line["status"] == "done"]
    there = [line for line in lines if not line["status"].startswith("absent")]
    assert done == there != []
    rows = {line["row"] for line in done}
    page = (folder / f"{table}.md").read_text()
    for row in rows:
        assert f"| {row} |" in page
    for word in ("SHA-256", "hardware", f"`fastrecycle report {table} --scale smoke`", "seed"):
        assert word in page
    tex = (folder / f"{table}.tex").read_text()
    columns = len({(line["dataset"], line["shots"]) for line in done})
    body = tex.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert len(body) == len(rows)
    for line in body:  # an unescaped & or % would change this
        assert line.replace("\\&", "").count("&") == columns
        assert line.endswith(" \\\\")
        assert "%" not in line.replace("\\%", "")


def test_a_second_run_makes_nothing(store):
    report("table9", store)
    said = []
    request = tables.Request("table9", "smoke", "", quiet=True)
    before = (store / "tables" / "table9.csv").read_text()
    tables.build(request, tables.toy_world(), tables.Store(store), say=said.append)
    assert said[-1] == "table9: 0 stages run, 0 left"
    tables.write("table9", "smoke", tables.Store(store), store / "tables")
    assert (store / "tables" / "table9.csv").read_text() == before


def test_another_seed_or_setting_is_made_anew(store):
    said = []
    report("table9", store)
    request = tables.Request("table9", "smoke", "", quiet=True)
    tables.build(request, tables.toy_world(seed=1), tables.Store(store), say=said.append)
    assert "0 stages run" not in said[-1]


class Cut(Exception):
    pass


@pytest.mark.parametrize("at", ["bank-", "pool-", "meta-", "score-"])
def test_an_interrupted_run_goes_on(at, tmp_path, store, monkeypatch):
    """Cut before a stage is noted as finished, it ends in the scores of a run in one go."""
    report("table9", store)
    finish = tables.Store.finish

    def cut(self, key, record):
        if key.startswith(at):
            raise Cut
        finish(self, key, record)

    world, request = tables.toy_world(), tables.Request("table9", "smoke", "", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(tables.Store, "finish", cut)
        with pytest.raises(Cut):
            tables.build(request, world, tables.Store(tmp_path), say=lambda line: None)
    plan = tables.build(request, tables.toy_world(), tables.Store(tmp_path), say=lambda line: None)
    whole = tables.Store(store)
    for cell in plan["cells"]:
        own = tables.Store(tmp_path).record(cell["key"])
        assert own["per_task"] == whole.record(cell["key"])["per_task"]


def test_renders_from_scores_alone(store, tmp_path, monkeypatch):
    report("table2", store)
    for name in ("done", "plans"):
        shutil.copytree(store / name, tmp_path / name)
    monkeypatch.setattr(tables, "build", None)
    assert report("table2", tmp_path, "--render") == 0
    for suffix in ("md", "csv", "tex"):
        name = f"tables/table2.{suffix}"
        assert (tmp_path / name).read_text() == (store / name).read_text()


def test_a_meta_lora_needs_its_pool_no_more(store, tmp_path):
    """Pools may stay behind; a new score of a meta-LoRA that is there makes none again."""
    report("table9", store)
    shutil.copytree(store, tmp_path / "store")
    for path in (tmp_path / "store" / "stages").glob("pool-*"):
        shutil.rmtree(path)
    for path in (tmp_path / "store" / "done").glob("score-*"):
        path.unlink()
    request = tables.Request("table9", "smoke", "", quiet=True)
    builder = Builder(request, tables.toy_world(), tables.Store(tmp_path / "store"), len)
    builder.run()
    assert {key.split("-")[0] for key in builder.stages.ran} == {"score"}


def test_two_tables_share_their_stages(store):
    report("table2", store)
    said = []
    request = tables.Request("table5", "smoke", "", quiet=True)
    tables.build(request, tables.toy_world(), tables.Store(store), say=said.append)
    assert said[-1] == "table5: 0 stages run, 0 left"


def test_data_sets_one_after_the_other_fill_one_page(tmp_path):
    assert report("table10", tmp_path, "--datasets", "cifar_fs") == 0
    assert report("table10", tmp_path, "--datasets", "tiny_imagenet") == 0
    found = {line["dataset"] for line in read_csv(tmp_path / "tables", "table10")}
    assert found == {"cifar_fs", "tiny_imagenet"}


def test_stops_before_a_stage_that_would_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(stages.Stages, "expected", lambda self, recipe: 60.0 * stages.work(recipe))
    assert report("table9", tmp_path, "--minutes", "1") == 0
    lines = read_csv(tmp_path / "tables", "table9")
    assert {line["status"] for line in lines} == {"not run"}
    page = (tmp_path / "tables" / "table9.md").read_text()
    assert "## Not run yet" in page
    assert "bank of 2 LoRAs from cifar_fs" in page
    assert "**Not measured**: LoRAs of mixed ranks are no worse" in page
    monkeypatch.undo()
    assert report("table9", tmp_path, "--minutes", "10") == 0
    assert {line["status"] for line in read_csv(tmp_path / "tables", "table9")} == {"done"}


def test_waits_for_the_process_that_makes_a_stage(tmp_path):
    shared = tables.Store(tmp_path)
    record = {
        "recipe": {"stage": "score"}, "seconds": 1.0, "work": 4, "accuracy": 50.0, "ci95": 9.8,
        "per_task": [45.0, 55.0], "chosen": {},
        "cost": {"seconds": 1.0, "parameters": 0, "peak_memory_bytes": None},
        "versions": {"torch": "2", "platform": "Linux"},
    }  # fmt: skip
    recipe = Score(Method("nn", MAIN), Tasks("cifar_fs", "test", 5, 1, 3, 4))
    here = stages.Stages(tables.toy_world(), shared)
    key, begun = here.key(recipe), threading.Event()

    def elsewhere():
        with shared.claim(key):
            begun.set()
            time.sleep(0.3)
            shared.finish(key, record)

    other = threading.Thread(target=elsewhere)
    other.start()
    begun.wait()
    assert here.recorded(recipe, lambda: pytest.fail("made twice")) == record
    other.join()
    assert here.ran == []


def test_does_not_wait_longer_than_its_time(tmp_path):
    shared = tables.Store(tmp_path)
    recipe = Score(Method("nn", MAIN), Tasks("cifar_fs", "test", 5, 1, 3, 4))
    here = stages.Stages(tables.toy_world(), shared, minutes=0.002)
    with shared.claim(here.key(recipe)), pytest.raises(stages.OutOfTime, match="nn at 1-shot"):
        here.recorded(recipe, dict)


def test_expects_what_stages_of_a_kind_took(store):
    report("table9", store)
    request = tables.Request("table9", "smoke", "", quiet=True)
    builder = Builder(request, tables.toy_world(), tables.Store(store), print)
    recipe = builder._score(builder.rows[0], "cifar_fs", "test", ("cifar_fs",), 1, 4)
    record = tables.Store(store).record(builder.stages.key(recipe))
    assert record["work"] == 4
    assert 0 < builder.stages.expected(recipe) < 60


def test_best_row_is_chosen_on_validation_tasks(store):
    report("table8", store)
    plan = tables.Store(store).plan("table8", "smoke")
    cells = {(c["row"], c["shots"]): c for c in plan["cells"]}
    for shots in (1, 5):
        best = cells["Entire VFM", shots]
        assert best["validation"][best["chosen"]] == max(best["validation"].values())
        assert best["key"] == cells[best["chosen"], shots]["key"]


def test_tuned_settings_are_chosen_on_validation_tasks(store):
    report("table2", store)
    plan = tables.Store(store).plan("table2", "smoke")
    (cell,) = (c for c in plan["cells"] if (c["row"], c["shots"]) == ("LoRA + Linear", 1))
    record = tables.Store(store).record(cell["key"])
    assert [on["split"] for on in record["recipe"]["choice"]["on"]] == ["val"]
    assert record["recipe"]["on"]["split"] == "test"
    assert set(record["chosen"]) == {"lr", "steps"}
    assert record["cost"]["parameters"] > 0


def test_benchmarks_stand_beside_the_accuracies(store, tmp_path):
    rows = [
        {"setting": s, "variant": "ours", "ms": 10.0, "it/s": 123.5, "GiB": 1.0, "GFLOPs": 50.5}
        for s in ("0.0", "0.75")
    ]
    (tmp_path / "steps_meta.json").write_text(
        json.dumps([{"machine": {"device": "a GPU"}, "rows": rows}])
    )
    assert report("table5", store, "--results", str(tmp_path)) == 0
    page = (store / "tables" / "table5.md").read_text()
    record = read_csv(store / "tables", "table5")
    (line,) = (
        x for x in record
        if (x["row"], x["dataset"], x["shots"]) == ("LoRA Recycle, 75 %", "cifar_fs", "1")
    )  # fmt: skip
    joined = next(text for text in page.splitlines() if text.startswith("| 0.75 |"))
    assert "123.5" in joined
    assert f"{float(line['ours']):.2f} ±" in joined


def test_mean_over_data_sets_is_task_by_task(store):
    report("table11", store)
    lines = read_csv(store / "tables", "table11")

    def ours(dataset):
        (line,) = (
            x for x in lines
            if (x["row"], x["dataset"], x["shots"]) == ("LoRA Recycle", dataset, "1")
        )  # fmt: skip
        return float(line["ours"])

    assert ours("mean") == pytest.approx((ours("omniglot") + ours("digits")) / 2, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["table99"], "table: expected one of table1, table2"),
        (["table12"], "table12: zero-shot classification has a script of its own"),
        (["table2", "--smoke", "--datasets", "cubs"], "datasets: table2 has cifar_fs"),
        (["table13", "--backbones", "DeiT-B"], "backbones: expected LABEL=SOURCE, each label once"),
        (["table7", "--precision", "fp8"], 'precision: tables run in "fp32" or "bf16"'),
        (["table7", "--render"], "no plan of table7 at scale small to render"),
    ],
)
def test_one_clear_error(words, told, tmp_path, capsys):
    assert main(["report", *words, "--store", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_absent_data_are_one_error(tmp_path, capsys):
    words = ["--store", str(tmp_path / "store"), "--data-root", str(tmp_path)]
    assert main(["report", "table2", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "table2: no data set of it is there (cifar_fs: split test is not under" in line

"""Metrics of a run go to TensorBoard and W&B too, or a clear error says why not."""

import importlib.util
import json
import sys
import types

import pytest
from tiny import make

from fastrecycle import cli
from fastrecycle.live import check_log, live_curves

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


def absent(monkeypatch, *names):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in names else find(name)
    )


def scalars(folder):
    """{tag: [(step, value), ...]} of the event files in a folder, as TensorBoard reads them."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason='needs tensorboard: pip install "fastrecycle[tensorboard]"',
    )
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def recycle(world, out, *more):
    return cli.main([
        "recycle", "--backbone", str(world.backbone), "--bank", str(world.bank), "--prior",
        str(world.prior), "--out", str(out), "--quiet", "--device", "cpu",
        "--inversion.images-per-class", "4", "--inversion.iterations", "4", "--meta.steps", "4",
        "--meta.ways", "3", "--meta.queries", "2", "--meta.resolution", "8", "16", *more,
    ])  # fmt: skip


def test_tensorboard_has_what_metrics_jsonl_has(world, tmp_path):
    pytest.importorskip("tensorboard", reason='needs pip install "fastrecycle[tensorboard]"')
    out = tmp_path / "run"
    assert recycle(world, out, "--log", "tensorboard") == 0
    for stage, folder in (("invert", "pool"), ("meta-train", "meta")):
        found = scalars(out / "tensorboard" / stage)
        lines = (out / folder / "metrics.jsonl").read_text().splitlines()
        wanted = {}
        for line in map(json.loads, lines):
            for name in line.keys() - {"stage", "step", "time"}:
                wanted.setdefault(f"{stage}/{name}", []).append((line["step"], line[name]))
        assert found.keys() == wanted.keys()
        for tag, points in wanted.items():
            assert [step for step, _ in found[tag]] == [step for step, _ in points]
            assert [v for _, v in found[tag]] == pytest.approx([v for _, v in points], rel=1e-6)


def test_steps_written_again_replace_those_of_a_killed_run(tmp_path):
    pytest.importorskip("tensorboard", reason='needs pip install "fastrecycle[tensorboard]"')
    for steps, value in (((20, 40, 60), 1.0), ((40, 60), 2.0)):
        with live_curves(("tensorboard",), tmp_path) as on_metrics:
            for step in steps:
                on_metrics("invert", step, {"loss": value})
    found = scalars(tmp_path / "tensorboard" / "invert")
    assert found == {"invert/loss": [(20, 1.0), (40, 2.0), (60, 2.0)]}


def test_nothing_is_written_unless_asked_for(world, tmp_path):
    assert recycle(world, tmp_path / "run") == 0
    assert not (tmp_path / "run" / "tensorboard").exists()
    with live_curves((), tmp_path) as on_metrics:
        assert on_metrics is None


@pytest.mark.parametrize("command", ["invert", "meta-train", "recycle"])
def test_absent_library_is_named_before_any_work(command, tmp_path, monkeypatch, capsys):
    absent(monkeypatch, "tensorboard")
    words = [command, "--out", str(tmp_path / "out"), "--log", "tensorboard"]
    words += ["--pool", "nowhere"] if command == "meta-train" else []
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert 'tensorboard is not installed; pip install "fastrecycle[tensorboard]"' in said
    assert not (tmp_path / "out").exists()


def test_unknown_destination_is_refused():
    with pytest.raises(ValueError, match="log: expected tensorboard or wandb, got 'mlflow'"):
        check_log(("mlflow",))


def test_wandb_gets_each_stage_with_its_own_steps(tmp_path, monkeypatch):
    """A stand-in for the library, whose runs need an account: what it is told."""
    told = []

    class Run:
        def define_metric(self, name, step_metric):
            told.append((name, step_metric))

        def log(self, values):
            told.append(values)

        def finish(self):
            told.append("finished")

    def init(**settings):
        told.append(settings)
        return Run()

    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = importlib.util.spec_from_loader("wandb", None)
    stand_in.init = init
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    ids = []
    for _ in range(2):  # the second goes on with the first's run
        told.clear()
        with live_curves(("wandb",), tmp_path / "run") as on_metrics:
            assert told == []
            on_metrics("invert", 20, {"loss": 1.0})
        settings, axis, values, end = told
        ids.append(settings["id"])
        assert (settings["resume"], settings["name"]) == ("allow", "run")
        assert axis == ("invert/*", "invert/step")
        assert values == {"invert/loss": 1.0, "invert/step": 20}
        assert end == "finished"
    assert ids[0] == ids[1]

"""Algorithm 1 from a bank to a meta-LoRA; stopped, killed or out of disk, it goes on the same."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from fastrecycle import files, recycler, run
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.files import load_safetensors, read_json, sha256
from fastrecycle.inversion import invert
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.metatrain import meta_train
from fastrecycle.pool import SyntheticPool, task_file
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.vit import ViT

# 4 LoRAs in 2 groups: 2 x 20 iterations, then 30 steps. Checkpoints meet neither stage's end.
ITERATIONS, STEPS = 20, 30
CALLS = 2 * ITERATIONS + STEPS  # of `stop`, in all
INVERSION = InversionConfig(
    images_per_class=5, iterations=ITERATIONS, group=2, checkpoint_every=8, prune={1: 0.5}
)
META = MetaConfig(
    steps=STEPS, ways=3, queries=4, rank=2, resolution=(8, 16), sparsity=0.5, checkpoint_every=8,
    validate_every=12, ema=0.5,
)  # fmt: skip


def validation_images():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 16)
    pixels = 60 * labels[:, None, None, None] + rng.integers(0, 120, (48, 16, 16, 3))
    return pixels.astype(np.uint8), labels


def make(inversion=INVERSION, meta=META, **changes):
    arguments = {"vit": toys.vit(), "bank": toys.bank(4), "prior": toys.prior(), "seed": 3}
    return MetaLoRARecycler(
        **{**arguments, **changes}, inversion=inversion, meta=meta, device="cpu", quiet=True,
        validation=validation_images(),
    )  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    make().run(out)
    return out


def results(out):
    """SHA-256 of every file that a run promises, by its path in the run's folder."""
    found = [*out.glob("pool/task-*.safetensors"), *out.glob("meta_lora/*"), *out.glob("vit.*")]
    return {str(p.relative_to(out)): sha256(p) for p in found}


def listing(out):
    return sorted(str(p.relative_to(out)) for p in out.rglob("*"))


def assert_whole_files(out):
    """Every file under a visible name parses to its end."""
    for path in out.rglob("*"):
        if path.suffix == ".safetensors":
            load_safetensors(path)
        elif path.suffix == ".json":
            read_json(path)


# ------------------------------------------------------------------ Algorithm 1


def test_run_is_inversion_then_meta_training(whole, tmp_path):
    rec = make()
    lora = rec.run(tmp_path)
    parts = invert(toys.vit(), toys.bank(4), toys.prior(), INVERSION, seed=3)
    by_hand = meta_train(
        toys.vit(), SyntheticPool(parts), META, seed=3, validate=rec._validate,
        start=LoRA.average(toys.bank(4)),
    )  # fmt: skip
    assert all(map(torch.equal, lora.tensors(), by_hand.lora.tensors()))
    assert rec.result.validation == by_hand.validation
    assert set(by_hand.validation) == {12, 24, 30}
    for saved, part in zip(SyntheticPool.load(tmp_path / "pool").parts, parts, strict=True):
        for name in ("images", "labels", "order", "teacher_logits"):
            assert torch.equal(getattr(saved, name), getattr(part, name))
    assert results(tmp_path) == results(whole)  # same seed, same result
    assert len(results(whole)) == 4 + 2


def test_stages_by_hand_equal_the_run(whole):
    rec = make()
    with pytest.raises(ValueError, match=r"pool: none yet; call invert\(\) first"):
        rec.meta_train()
    pool = rec.invert()
    assert rec.pool is pool
    lora = rec.meta_train()
    other = make(prior=None).meta_train(SyntheticPool.load(whole / "pool"))
    for a, b in zip(lora.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b)
    saved = LoRA.load(whole / "meta_lora")
    for target in lora.a:
        torch.testing.assert_close(saved.delta(target), lora.delta(target), rtol=1e-6, atol=1e-7)


def test_another_seed_is_another_result(whole, tmp_path):
    make(seed=4).run(tmp_path)
    one, other = results(whole), results(tmp_path)
    assert one.keys() == other.keys()
    changed = {name for name in one if one[name] != other[name]}
    assert changed == {name for name in one if name.endswith(".safetensors")}


def test_manifest_and_metrics_say_what_was_run(whole):
    manifest = read_json(whole / "run.json")
    assert manifest["seed"] == 3
    assert manifest["config"]["backend"] == "reference"
    assert manifest["config"]["precision"] == "fp32"
    assert manifest["config"]["inversion"]["prune"] == {"1": 0.5}
    assert manifest["config"]["meta"]["steps"] == STEPS
    assert manifest["versions"]["torch"] == torch.__version__
    for name in ("backbone", "bank", "prior"):
        assert len(manifest["inputs"][name]["sha256"]) == 64
    rows = [json.loads(x) for x in (whole / "pool" / "metrics.jsonl").read_text().splitlines()]
    # iterations of all LoRAs so far: two LoRAs a group
    assert [r["step"] for r in rows] == [40, 80]
    assert set(rows[0]) == {"stage", "step", "time", "loss", "ce", "r_bn"}
    rows = [json.loads(x) for x in (whole / "meta" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [20, 30]
    assert [r["step"] for r in rows if "validation" in r] == [12, 24, 30]


def test_finished_run_does_no_work_again(whole, tmp_path, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*.safetensors") if "task" in p.name}
    for name in ("InversionGroup", "MetaTrainer"):
        module = "inversion" if name == "InversionGroup" else "metatrain"
        monkeypatch.setattr(f"fastrecycle.{module}.{name}.step", lambda *_: pytest.fail("worked"))
    make().run(whole)
    assert {p: p.stat().st_mtime_ns for p in before} == before


# ------------------------------------------------------------------ stopped


def stop_at(monkeypatch, chosen):
    """Ask to stop at these calls, counted over both stages."""
    calls = [0]

    def stop():
        calls[0] += 1
        return chosen(calls[0])

    @contextmanager
    def on_interrupt():
        yield stop

    monkeypatch.setattr(run, "stop_on_interrupt", on_interrupt)
    return calls


@pytest.mark.parametrize(
    "at",
    [
        1,
        8,  # with a checkpoint
        ITERATIONS,  # the first group's last
        ITERATIONS + 1,
        2 * ITERATIONS,
        2 * ITERATIONS + 1,  # the first of meta-training
        2 * ITERATIONS + 15,  # between validations, off the checkpoints
        CALLS - 1,
    ],
)
def test_stopped_and_resumed_is_bit_equal(whole, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        calls = stop_at(patch, lambda call: call == at)
        with pytest.raises(KeyboardInterrupt):
            make().run(tmp_path)
        assert calls == [at]
        assert not (tmp_path / "meta_lora").exists()
        assert_whole_files(tmp_path)
    calls = stop_at(monkeypatch, lambda call: False)
    make().run(tmp_path)
    assert calls == [CALLS - at]  # no iteration is lost
    assert results(tmp_path) == results(whole)
    assert listing(tmp_path) == listing(whole)


def test_stop_after_the_last_step_is_no_stop(whole, tmp_path, monkeypatch):
    stop_at(monkeypatch, lambda call: call == CALLS)
    make().run(tmp_path)
    assert results(tmp_path) == results(whole)


def test_stopped_again_and_again_is_bit_equal(whole, tmp_path, monkeypatch):
    calls, tries = stop_at(monkeypatch, lambda call: call % 11 == 0), 0
    while not (tmp_path / "meta_lora").exists():
        tries += 1
        try:
            make().run(tmp_path)
        except KeyboardInterrupt:
            assert calls[0] % 11 == 0
    assert tries == CALLS // 11 + 1
    assert calls == [CALLS]
    assert results(tmp_path) == results(whole)


def test_stop_on_interrupt_takes_and_returns_the_signals():
    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM):
        with run.stop_on_interrupt() as stop:
            assert not stop()
            signal.raise_signal(number)
            assert stop()
            with pytest.raises(KeyboardInterrupt):  # the second is at once
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------ killed

# long enough to be killed before it ends; checkpoints often, so that some kill meets a write
LONG_INVERSION = replace(INVERSION, iterations=60, checkpoint_every=7)
LONG_META = replace(META, steps=80, checkpoint_every=7)
# as the above, without any checkpoint: what is there was saved by the stop itself
SILENT_INVERSION = replace(LONG_INVERSION, checkpoint_every=10_000)
SILENT_META = replace(LONG_META, checkpoint_every=10_000)


def child(out: Path, kind: str) -> None:
    """What the killed process does: a run of its own, nothing else."""
    torch.set_num_threads(1)
    if kind == "long":
        make(LONG_INVERSION, LONG_META).run(out)
    else:
        make(SILENT_INVERSION, SILENT_META).run(out)


@contextmanager
def process(out, kind="long"):
    code = "import sys, test_recycler; from pathlib import Path\n"
    code += "test_recycler.child(Path(sys.argv[1]), sys.argv[2])"
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(out), kind],
        env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        try:
            yield running
        finally:
            if running.poll() is None:
                running.kill()


def wait_until(running, reached, limit_s=120):
    """Poll until `reached()`; the process must still be at work then."""
    end = time.monotonic() + limit_s
    while not reached():
        if running.poll() is not None:
            pytest.fail(f"ended too early:\n{running.stderr.read()}")
        if time.monotonic() > end:
            pytest.fail(f"did not get there in {limit_s} s")
        time.sleep(0.001)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def long_whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("long")
    make(LONG_INVERSION, LONG_META).run(out)
    return out


def test_images_show_what_their_loras_were_asked_for(long_whole):
    pool = SyntheticPool.load(long_whole / "pool")
    right = (pool.teacher_logits.argmax(1) == pool.labels).float().mean().item()
    assert right > 0.6  # 60 images, chance 1/3: over four standard deviations of .06 above


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_three_times_and_resumed_is_bit_equal(long_whole, tmp_path):
    pool, meta = tmp_path / "pool", tmp_path / "meta"

    def writing():  # in the second group, an unfinished copy of a file is on disk
        first_group_done = (pool / "task-000001.safetensors").exists()
        return first_group_done and any(n.endswith(".tmp") for n in os.listdir(pool))

    for reached in (
        lambda: lines(pool / "metrics.jsonl") >= 1,
        writing,
        lambda: lines(meta / "metrics.jsonl") >= 2,
    ):
        with process(tmp_path) as running:
            wait_until(running, reached)
            running.send_signal(signal.SIGKILL)
            assert running.wait(60) == -signal.SIGKILL
        assert not (tmp_path / "meta_lora").exists()
        assert_whole_files(tmp_path)
    make(LONG_INVERSION, LONG_META).run(tmp_path)
    assert results(tmp_path) == results(long_whole)
    assert listing(tmp_path) == listing(long_whole)  # nothing unfinished is left behind
    for log in tmp_path.rglob("metrics.jsonl"):
        assert all(json.loads(line) for line in log.read_text().splitlines())


@pytest.mark.skipif(sys.platform == "win32", reason="signals of one process to another are POSIX's")
def test_interrupt_from_outside_saves_and_exits(long_whole, tmp_path):
    pool = tmp_path / "pool"
    state = pool / "group.state.safetensors"
    with process(tmp_path, "silent") as running:
        wait_until(running, lambda: lines(pool / "metrics.jsonl") >= 1)
        assert not state.exists()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == -signal.SIGINT  # as Python ends on an unhandled Ctrl-C
        error = running.stderr.read()
    assert "stopping after this step" in error
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert 20 <= int(load_safetensors(state)[1]["iteration"]) < 60  # the first line comes at 20
    make(SILENT_INVERSION, SILENT_META).run(tmp_path)
    assert results(tmp_path) == results(long_whole)


def test_cut_last_line_of_the_metrics_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')
    folder = run.RunFolder(tmp_path, {"seed": 0})
    folder.metrics("invert", 3, {"loss": 1.0})
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]


def test_copy_that_a_kill_left_in_a_folder_below_is_removed(tmp_path):
    (tmp_path / "meta_lora").mkdir()
    left = tmp_path / "meta_lora" / ".adapter_config.json.2v3cizi2.tmp"
    left.write_text("{")
    run.RunFolder(tmp_path, {"seed": 0})
    assert not left.exists()


@pytest.mark.parametrize("unfinished", [True, False])
def test_state_of_a_finished_group_is_not_taken_up(whole, tmp_path, monkeypatch, unfinished):
    """A kill after a group's last file and before its state is removed."""
    pool = tmp_path / "pool"
    state = pool / "group.state.safetensors"
    with monkeypatch.context() as patch:
        stop_at(patch, lambda call: call == ITERATIONS - 1)
        with pytest.raises(KeyboardInterrupt):
            make().invert(pool)
    left = state.read_bytes()
    make().invert(pool)
    assert not state.exists()
    state.write_bytes(left)
    if unfinished:  # the second group had not begun
        for number in (2, 3):
            task_file(pool, number).unlink()
    make().run(tmp_path)
    assert results(tmp_path) == results(whole)
    assert not state.exists()


# ------------------------------------------------------------------ a full disk


def full_disk(monkeypatch, how, after):
    """From the `after`-th file on, the disk is full: at its data, its fsync or its rename."""
    count = [0]

    def full(real):
        def function(*arguments, **keywords):
            count[0] += 1
            if count[0] > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **keywords)

        return function

    if how != "write":
        monkeypatch.setattr(files.os, how, full(getattr(os, how)))
        return
    real_open = os.fdopen

    def half(*arguments, **keywords):
        stream = real_open(*arguments, **keywords)
        write = stream.write

        def some(data):
            count[0] += 1
            if count[0] > after:
                write(data[: len(data) // 2])
                stream.flush()
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(data)

        class Stream:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                stream.close()

            def __getattr__(self, name):
                return some if name == "write" else getattr(stream, name)

        return Stream()

    monkeypatch.setattr(files.os, "fdopen", half)


@pytest.mark.parametrize(
    # files in order: 2 manifests, 2 states, 2 tasks and the index of each group, a manifest, 4
    # states, 2 of the meta-LoRA
    ("how", "after", "tasks"),
    [
        ("write", 3, 0),  # a state of the first group that replaces one
        ("write", 5, 1),  # its second task
        ("fsync", 8, 2),
        ("replace", 10, 3),
        ("replace", 14, 4),  # meta-training's second state
        ("write", 17, 4),  # the meta-LoRA itself
    ],
)
def test_full_disk_keeps_old_files_whole_and_finished_work(
    whole, tmp_path, monkeypatch, how, after, tasks
):
    with monkeypatch.context() as patch:
        full_disk(patch, how, after)
        with pytest.raises(OSError, match="No space left"):
            make().run(tmp_path)
    assert_whole_files(tmp_path)
    assert not [p for p in listing(tmp_path) if p.endswith(".tmp")]
    finished = {k: v for k, v in results(tmp_path).items() if "task" in k}
    assert len(finished) == tasks
    assert finished.items() <= results(whole).items()
    calls = stop_at(monkeypatch, lambda call: False)
    make().run(tmp_path)
    assert calls[0] < CALLS  # what was finished or saved is not done again
    assert results(tmp_path) == results(whole)
    assert listing(tmp_path) == listing(whole)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "another seed"),
        ({"inversion": replace(INVERSION, lr=0.1)}, "another config"),
        ({"meta": replace(META, lr=0.1)}, "another config"),
        ({"bank": toys.bank(3)}, "another input"),
        ({"vit": toys.vit(seed=1)}, "another input"),  # of the same shape
        ({"bank": LoRABank([replace(x, name=y.name) for x, y in
                            zip(toys.bank(5)[1:], toys.bank(4))])}, "another input"),
        ({"prior": toys.prior(seed=1)}, "another input"),
        ({"prior": None}, "another input"),
    ],
)  # fmt: skip
def test_run_folder_of_another_run_is_refused(whole, changes, message):
    before = {p: sha256(p) for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=f"holds a run with .*{message}.*choose another folder"):
        make(**changes).run(whole)
    assert {p: sha256(p) for p in whole.rglob("*") if p.is_file()} == before


def test_stage_folders_answer_for_their_own_settings(whole, tmp_path):
    pool = make(meta=replace(META, lr=0.1)).invert(whole / "pool")  # any meta-training may use it
    assert len(pool) == 4 * 3 * 5
    with pytest.raises(ValueError, match="another config"):
        make(inversion=replace(INVERSION, lr=0.1)).invert(whole / "pool")
    with pytest.raises(ValueError, match="another input"):  # meta-training on another pool
        make().meta_train(toys.pool(), whole / "meta")


def test_packing_more_or_fewer_loras_together_is_the_same_to_rounding(whole):
    one = make(inversion=replace(INVERSION, group=1, iterations=5)).invert()
    two = make(inversion=replace(INVERSION, group=4, iterations=5)).invert()
    # 8-bit steps: 5 float32 iterations may round a pixel to the other side, hardly ever by more
    gap = (one.images.int() - two.images.int()).abs()
    assert (gap > 1).float().mean() < 0.01


def test_rejects_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="belongs to another model"):
        make(bank=LoRABank([toys.lora(config=replace(toys.CONFIG, width=32))]))
    with pytest.raises(ValueError, match="needs the LoRA's classification head"):
        make(bank=LoRABank([replace(toys.lora(), head=None, class_names=None)]))
    with pytest.raises(ValueError, match="no LoRAs to invert"):
        make(bank=()).invert(tmp_path / "pool")
    with pytest.raises(ValueError, match="ratio"):
        make(inversion=replace(INVERSION, prune={1: 1.5}))
    with pytest.raises(ValueError, match="needs the bank that the pool was inverted from"):
        make(bank=()).meta_train(toys.pool())
    with pytest.raises(ValueError, match="backend: expected"):
        MetaLoRARecycler(toys.vit(), toys.bank(), None, backend="cuda")
    with pytest.raises(ValueError, match='backend: "triton" needs a CUDA device, got cpu'):
        MetaLoRARecycler(toys.vit(), toys.bank(), None, device="cpu", backend="triton")
    with pytest.raises(ValueError, match="precision: expected"):
        MetaLoRARecycler(toys.vit(), toys.bank(), None, precision="fp16")
    few = replace(INVERSION, images_per_class=4, iterations=1)
    with pytest.raises(ValueError, match=r"needs 5 images a class, LoRA 0 class 0 has 4"):
        make(inversion=few).run(tmp_path / "few")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to be had")
def test_rejects_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="sees no CUDA device; use cpu"):
        MetaLoRARecycler(toys.vit(), toys.bank(), None, device="cuda")
    assert recycler.resolve_device(None) == torch.device("cpu")


def test_the_bank_and_the_backbone_stay_as_they_were(tmp_path):
    vit, bank = toys.vit(), toys.bank(4)
    short = replace(INVERSION, iterations=2), replace(META, steps=2)
    make(*short, vit=vit, bank=bank).run(tmp_path)
    assert all(map(torch.equal, vit.state_dict().values(), toys.vit().state_dict().values()))
    for lora, fresh in zip(bank, toys.bank(4), strict=True):
        assert all(map(torch.equal, lora.tensors(), fresh.tensors()))
        assert torch.equal(lora.head.weight, fresh.head.weight)


def test_a_backbone_that_learnt_is_saved(tmp_path):
    short = replace(INVERSION, iterations=2), replace(META, steps=2, learn="backbone", ema=0.0)
    rec = make(*short)
    rec.run(tmp_path)
    saved = ViT.from_pretrained(tmp_path / "vit.safetensors")
    assert saved.config == toys.CONFIG
    for name, tensor in rec.result.vit.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
        assert not torch.equal(tensor, rec.vit.state_dict()[name])

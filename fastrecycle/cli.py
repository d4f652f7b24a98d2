"""The command line: demo, pretune, invert, meta-train, recycle, eval, export, report, info, serve.

Options become the same dataclasses that the Python interface takes (`fastrecycle.options`); this
file wires stages, prints results and turns exceptions into one line and an exit status.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fastrecycle
from fastrecycle import options as o
from fastrecycle import run as runs

OK, BROKEN, FAILED, INTERRUPTED = 0, 1, 2, 130

Run = Callable[[Any], int]
LiveRun = Callable[[Any, Any], int]


@dataclass(frozen=True)
class Command:
    """A subcommand: its options, what it does, and what its help teaches."""

    options: type
    run: Run
    purpose: str
    example: str
    results: str

    @property
    def description(self) -> str:
        """The head of the help text."""
        return f"{self.purpose}\n\nExample:\n  {self.example}\n\nResults: {self.results}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    0: done. 1: `info` found something broken. 2: bad input, one line on stderr. 130: interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return OK if words else FAILED
    if words[0] in ("-V", "--version", "version"):
        print(f"fastrecycle {fastrecycle.__version__}")
        return OK
    name = words[0].replace("_", "-")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        return _fail(f"unknown command {words[0]!r}; {hint}")
    return _run(name, words[1:], prog=f"fastrecycle {name}")


def run_eval(arguments: Sequence[str]) -> int:
    """`python -m fastrecycle.eval`: returns the exit status."""
    return _run("eval", list(arguments), prog="python -m fastrecycle.eval")


def overview() -> str:
    """What `fastrecycle --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastrecycle COMMAND [OPTIONS]",
            "",
            "Recycle LoRAs that others trained into one meta-LoRA, with which a frozen vision",
            "transformer solves new few-shot tasks in a single forward pass.",
            "",
            *lines,
            "",
            "fastrecycle COMMAND --help explains a command; fastrecycle --version is known too.",
            "Start with: fastrecycle demo",
        ]
    )


# ---------------------------------------------------------------------- errors and messages


def _run(name: str, words: list[str], prog: str) -> int:
    command = COMMANDS[name]
    debug = "--debug" in words or os.environ.get("FASTRECYCLE_DEBUG", "") not in ("", "0")
    out: Path | None = None
    try:
        options: Any = o.parse(command.options, words, prog=prog, description=command.description)
        out = getattr(options, "store", None) or getattr(options, "out", None)
        with _messages(options.common.quiet):
            return command.run(options)
    except SystemExit as stop:  # tyro: help, or an option that it refuses
        return stop.code if isinstance(stop.code, int) else FAILED
    except KeyboardInterrupt:
        again = shlex.join([*prog.split(), *words])
        kept = f"; finished work is in {out}, go on with: {again}" if out and out.exists() else ""
        print(f"fastrecycle: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, TypeError, OSError, IndexError, RuntimeError, ImportError) as error:
        if debug:
            traceback.print_exc()
        return _fail(_reason(error, out))


def _reason(error: BaseException, out: Path | None) -> str:
    """One line that says what was wrong."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or out or "the disk"
        return (
            f"{where}: no space left on the disk; finished work is kept, make room and run the"
            " same command again to go on"
        )
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _fail(reason: str) -> int:
    print(f"fastrecycle: error: {reason}", file=sys.stderr)
    return FAILED


@contextlib.contextmanager
def _messages(quiet: bool) -> Iterator[None]:
    """The library's log on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("fastrecycle: %(message)s"))
    log = logging.getLogger("fastrecycle")
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


@contextlib.contextmanager
def image_progress(title: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over images whose number is known with the first of them."""
    with contextlib.ExitStack() as stack:
        bars: list[Callable[[int, dict[str, float]], None]] = []

        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(
                    stack.enter_context(runs.progress(title, total, unit="img", quiet=quiet))
                )
            bars[0](done, {})

        yield update


# ---------------------------------------------------------------------- what commands share


def _hidden(common: o.Common) -> bool:
    return common.quiet or common.no_progress


def _backbone(options: Any) -> tuple[Any, dict[str, Any]]:
    """The backbone on the CPU, and its line in the manifest."""
    from fastrecycle.inputs import network_input
    from fastrecycle.vit import ViT

    source = options.backbone.backbone
    config = o.backbone_config(options.backbone.backbone_config)
    vit = ViT.from_pretrained(source, config)
    told = {} if config is None else {"config": config}  # a report builds it again
    return vit, {**network_input(source, vit), **told}


def _text(options: Any) -> tuple[Any, dict[str, Any]]:
    """The text tower, and its line in the manifest; nothing where none is named."""
    from fastrecycle.inputs import text_input
    from fastrecycle.text import TextTower

    told = options.text
    if told.text is None:
        if told.templates:
            raise ValueError("templates: prompts are for a text tower, got none; give --text")
        return None, {}
    tower = TextTower.from_pretrained(told.text, told.templates)
    return tower, {"text": text_input(told.text, tower)}


def _packaged_alone(option: str, value: str, backbone: str) -> None:
    """Raise where the demo's LoRAs would meet another backbone, which shapes alone may not show."""
    if value in ("demo", "average:demo", "average-factors:demo") and backbone != "demo":
        raise ValueError(
            f"{option}: the packaged LoRAs belong to the packaged backbone, not to {backbone};"
            f" give --{option}" + (" a PEFT folder or none" if option == "lora" else " a folder")
        )


def _network(options: Any) -> tuple[Any, dict[str, Any]]:
    """The prior network, and its line in the manifest."""
    from fastrecycle.inputs import network_input
    from fastrecycle.prior import load_prior

    prior = options.prior
    network = load_prior(prior.prior, stride_in=prior.prior_stride_in, eps=prior.prior_eps)
    if network is None:
        return None, {"source": "none"}
    told = {k: v for k, v in dataclasses.asdict(prior).items() if v is not None}
    return network, {**network_input(prior.prior, network), **told}


def _bank(options: Any, vit: Any) -> tuple[Any, dict[str, Any]]:
    """The LoRAs of a bank that can be used, and their line in the manifest."""
    from fastrecycle.inputs import loras_input
    from fastrecycle.vetting import vetted_bank

    source = options.bank
    _packaged_alone("bank", source, options.backbone.backbone)
    # class texts take the place of whatever heads there are
    bank, left_out = vetted_bank(source, vit, heads=options.text.text is None)
    said: dict[str, Any] = {**loras_input(source, bank)}
    if left_out:
        print(f"left out of {source}: {len(left_out)} LoRAs, {', '.join(left_out)}")
        said["left_out"] = left_out
    return bank, said


def _validation(options: Any, vit: Any) -> tuple[Any, dict[str, Any]]:
    """Decoded validation images, and their line in the manifest; nothing where none are given."""
    from fastrecycle.data import episodes, load_dataset
    from fastrecycle.eval import decode
    from fastrecycle.inputs import dataset_input

    if options.validation is None:
        return None, {}
    root, meta = options.common.data_root, options.meta
    dataset = load_dataset(options.validation, "val", root)
    # raises now, not after hours, where its classes are too few or too small
    episodes(dataset.labels, meta.ways, meta.shots or 1, 15, 1, 0, class_names=dataset.class_names)
    with image_progress("validation images", _hidden(options.common)) as update:
        pixels = decode(vit, dataset, progress=update)
    return pixels, {"validation": dataset_input(options.validation, dataset, root)}


def _recycler(options: Any, vit: Any, bank: Any, prior: Any, **more: Any) -> Any:
    from fastrecycle.recycler import MetaLoRARecycler

    return MetaLoRARecycler(
        vit,
        bank,
        prior,
        getattr(options, "inversion", None),
        getattr(options, "meta", None),
        device=more.pop("device", options.common.device),
        backend=options.training.backend,
        precision=options.common.precision,
        seed=options.training.seed,
        screening=getattr(options, "screen", False),
        cluster=getattr(options, "cluster", None),
        quiet=_hidden(options.common),
        **more,
    )


def _live(run: LiveRun) -> Run:
    """A command that also takes where --log sends metrics; absent libraries show before it runs."""

    def command(options: Any) -> int:
        from fastrecycle.live import live_curves

        with live_curves(options.training.log, options.out) as on_metrics:
            return run(options, on_metrics)

    return command


def _save_backbone(recycler: Any, out: Path) -> None:
    """Where the backbone itself learned (--learn backbone), save that too."""
    if recycler.meta.learn == "backbone":
        recycler.result.vit.save(out / "backbone.safetensors")
        print(f"backbone: {out / 'backbone.safetensors'} (evaluate it with --lora none)")


def _say_meta(recycler: Any, out: Path, options: Any) -> None:
    result = recycler.result
    score = result.validation.get(result.best_step)
    chosen = "" if score is None else f", {score:.2f} % on validation tasks"
    print(f"meta-LoRA: {out / 'meta_lora'} (step {result.best_step}{chosen})")
    backbone = options.backbone.backbone
    zero = ""
    if recycler.meta.shots == 0:
        zero = f" --shots 0 --text {options.text.text or 'TOWER'}"
    print(
        f"next: fastrecycle eval --dataset NAME --backbone {backbone} --lora {out / 'meta_lora'}"
        f"{zero}"
    )


# ---------------------------------------------------------------------- commands


def _demo(options: o.Demo) -> int:
    from fastrecycle.demo import run_demo

    run_demo(
        options.out,
        schedule=options.schedule,
        data_root=options.common.data_root,
        seed=options.seed,
        device=options.common.device,
        precision=options.common.precision,
        quiet=_hidden(options.common),
    )
    return OK


def _pretune(options: o.Pretune) -> int:
    from fastrecycle.data import load_dataset
    from fastrecycle.eval import decode
    from fastrecycle.inputs import dataset_input
    from fastrecycle.ops import check_precision
    from fastrecycle.pretune import pretune
    from fastrecycle.recycler import resolve_device, resolve_precision

    config, out = options.pretune, options.out
    device = resolve_device(options.common.device)
    precision = resolve_precision(options.common.precision, device)
    check_precision(precision, "reference", device)
    vit, backbone = _backbone(options)
    text, tower = _text(options)
    root = options.common.data_root
    if not options.dataset:
        raise ValueError("dataset: expected a name or path, got none")
    datasets = [
        load_dataset(source, options.split, root, download=options.download)
        for source in options.dataset
    ]
    sources = {
        "dataset" if len(datasets) == 1 else f"dataset {dataset.name}": dataset_input(
            source, dataset, root
        )
        for source, dataset in zip(options.dataset, datasets, strict=True)
    }
    manifest = {
        "command": "pretune",
        "config": {
            "pretune": runs.settings(config),
            "split": options.split,
            "device": device.type,
            "precision": precision,
        },
        "seed": options.seed,
        "inputs": {"backbone": backbone, **sources, **tower},
    }
    folder = runs.RunFolder(out, manifest)
    # A group that was cut short trains again as a whole: who trains beside whom changes rounding.
    numbers = [
        range(start, min(start + config.group, config.num))
        for start in range(0, config.num, config.group)
    ]
    done = frozenset(
        i
        for group in numbers
        if all((out / f"{i:04d}" / "adapter_config.json").exists() for i in group)
        for i in group
    )
    if len(done) < config.num:
        hidden = _hidden(options.common)
        pixels = []
        for dataset in datasets:
            with image_progress(f"decoding {dataset.name}", hidden) as update:
                pixels.append(decode(vit, dataset, progress=update))
        total = config.num * config.steps
        with runs.progress("pre-tuning", total, quiet=hidden) as advance:

            def on_step(step: int, values: dict[str, float]) -> None:
                advance(step, values)
                folder.metrics("pretune", step, values)

            pretune(
                vit.to(device),
                pixels,
                config,
                seed=options.seed,
                precision=precision,
                on_step=on_step,
                on_lora=lambda number, lora: lora.save(out / f"{number:04d}"),
                done=done,
                text=None if text is None else text.to(device),
            )
    print(f"bank: {out} ({config.num} LoRAs)")
    zero = "" if text is None else " --meta.shots 0"
    print(f"next: fastrecycle recycle --backbone {options.backbone.backbone} --bank {out}{zero}")
    return OK


def _invert(options: o.Invert, on_metrics: Any) -> int:
    vit, backbone = _backbone(options)
    bank, loras = _bank(options, vit)
    prior, network = _network(options)
    text, tower = _text(options)
    inputs = {"backbone": backbone, "bank": loras, "prior": network, **tower}
    recycler = _recycler(options, vit, bank, prior, text=text, inputs=inputs, on_metrics=on_metrics)
    pool = recycler.invert(options.out)
    print(f"pool: {options.out} ({len(pool)} images of {len(pool.parts)} LoRAs)")
    print(
        f"next: fastrecycle meta-train --backbone {options.backbone.backbone} --bank {options.bank}"
        f" --pool {options.out}"
    )
    return OK


def _meta_train(options: o.MetaTrain, on_metrics: Any) -> int:
    from fastrecycle.inputs import pool_input
    from fastrecycle.parallel import torchrun_ranks
    from fastrecycle.pool import SyntheticPool
    from fastrecycle.recycler import resolve_device

    pool = SyntheticPool.load(options.pool)
    vit, backbone = _backbone(options)
    validation, extra = _validation(options, vit)
    text, tower = _text(options)
    extra |= tower
    inputs = {"backbone": backbone, "pool": pool_input(options.pool, pool), **extra}
    bank: Any = ()
    if options.bank is not None:
        bank, inputs["bank"] = _bank(options, vit)
    elif options.meta.start == "average" and options.meta.learn != "backbone":
        raise ValueError(
            "bank: the meta-LoRA starts from the average of the bank, which the pool does not hold;"
            " give --bank FOLDER (the one it was inverted from), or --start zero"
        )
    if options.screen and options.bank is None:
        raise ValueError(
            "screen: compares LoRAs, too; give --bank FOLDER, the one that was inverted"
        )
    with torchrun_ranks(resolve_device(options.common.device)) as (ranks, device):
        recycler = _recycler(
            options, vit, bank, None, validation=validation, text=text, inputs=inputs,
            on_metrics=on_metrics, ranks=ranks, device=device,
        )  # fmt: skip
        lora = recycler.meta_train(pool, options.out)
        if ranks.first:
            lora.save(options.out / "meta_lora")
            _save_backbone(recycler, options.out)
            _say_meta(recycler, options.out, options)
    return OK


def _recycle(options: o.Recycle, on_metrics: Any) -> int:
    vit, backbone = _backbone(options)
    bank, loras = _bank(options, vit)
    prior, network = _network(options)
    validation, extra = _validation(options, vit)
    text, tower = _text(options)
    inputs = {"backbone": backbone, "bank": loras, "prior": network, **extra, **tower}
    recycler = _recycler(
        options, vit, bank, prior, validation=validation, text=text, inputs=inputs,
        on_metrics=on_metrics,
    )  # fmt: skip
    recycler.run(options.out)
    _save_backbone(recycler, options.out)
    _say_meta(recycler, options.out, options)
    return OK


def _eval(options: o.Eval) -> int:
    from fastrecycle.cluster import cluster_features, ray_module
    from fastrecycle.data import load_dataset
    from fastrecycle.eval import Result, evaluate_meta_dataset, evaluate_shots
    from fastrecycle.files import write_json
    from fastrecycle.inputs import dataset_input
    from fastrecycle.recycler import resolve_device, resolve_precision
    from fastrecycle.report import text_table

    config, root = options.eval, options.common.data_root
    if options.cluster is not None:
        ray_module()  # raises now, not after weights are fetched
    device = resolve_device(options.common.device)
    precision = resolve_precision(options.common.precision, device)
    dataset = load_dataset(options.dataset, config.split, root, download=options.download)
    vit, backbone = _backbone(options)
    lora, inputs = _evaluated(options.lora, options.backbone.backbone, vit)
    text, tower = _text(options)
    if text is not None and 0 not in config.shots:
        raise ValueError(
            f"text: tasks with shots do not read it; add --shots 0, got {config.shots}"
        )
    inputs |= tower
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        features_of = None
        if options.cluster is not None:
            features_of = stack.enter_context(cluster_features(options.cluster))
        update = stack.enter_context(image_progress("embedding", _hidden(options.common)))
        shared: dict[str, Any] = {
            "tasks": config.tasks,
            "seed": config.seed,
            "distance": config.distance,
            "prune": config.prune or None,
            "batch_size": config.batch_size,
            "precision": precision,
            "progress": update,
            "embedding_cache": options.embedding_cache,
            "features_of": features_of,
        }
        vit = vit.to(device)
        results: list[tuple[str, int | None, Result]]
        if config.protocol == "fixed":
            of_shots = evaluate_shots(
                vit, lora, dataset, shots=config.shots, ways=config.ways, queries=config.queries,
                text=None if text is None else text.to(device), **shared,
            )  # fmt: skip
            results = [(f"{config.ways}-way {k}-shot", k, r) for k, r in of_shots.items()]
        else:
            varied = evaluate_meta_dataset(vit, lora, dataset, **shared)
            results = [("varying ways and shots", None, varied)]
    seconds = time.perf_counter() - start
    rows = [
        [title, f"{r.accuracy:.2f}", f"± {r.ci95:.2f}", str(config.tasks)]
        for title, _, r in results
    ]
    print(f"{dataset.name}, split {config.split}; LoRA: {options.lora}")
    print(text_table(["tasks", "accuracy (%)", "95 % interval", "number"], rows))
    where = "" if options.cluster is None else f", Ray cluster {options.cluster}"
    print(f"{seconds:.1f} s on {device}{where}")
    if options.json is not None:
        listed = [
            {
                "shots": shots,
                "accuracy": r.accuracy,
                "ci95": r.ci95,
                "per_task": r.per_task.tolist(),
            }
            for _, shots, r in results
        ]
        settings = {
            **runs.settings(config),
            "dataset": options.dataset,
            "backbone": options.backbone.backbone,
            "backbone_config": list(options.backbone.backbone_config),
            "lora": options.lora,
            "text": options.text.text,
            "templates": None if text is None else list(text.templates),
            "device": str(device),
            "precision": precision,
            "cluster": options.cluster,
        }
        content = {
            "results": listed,
            "settings": settings,
            "seconds": seconds,
            "versions": runs.versions(),
            "inputs": {
                "dataset": dataset_input(options.dataset, dataset, root),
                "backbone": backbone,
                **inputs,
            },
        }
        if len(listed) == 1:  # one result also stands at the top
            content |= listed[0]
        write_json(options.json, content)
        print(f"written: {options.json}")
    return OK


def _evaluated(source: str, backbone: str, vit: Any) -> tuple[Any, dict[str, Any]]:
    """The LoRA that --lora names, and its line in the results."""
    from fastrecycle.inputs import loras_input
    from fastrecycle.lora import LoRA, LoRABank

    if source == "none":
        return None, {}
    _packaged_alone("lora", source, backbone)
    kind, _, where = source.partition(":")
    if kind in ("average", "average-factors") and where:
        bank = LoRABank.load(where, vit)
        averaged = LoRA.average(bank, of="products" if kind == "average" else "factors")
        return averaged, {"lora": loras_input(source, bank)}
    lora = LoRA.load(source, vit)
    return lora, {"lora": loras_input(source, [lora])}


def _report(options: o.Report) -> int:
    from fastrecycle.bench_report import TABLES, write_benchmarks, write_table

    out, what = options.out or options.results, options.what
    by_hand = options.runs or (options.store is None and not options.smoke)
    if what == "benchmarks":
        written = write_benchmarks(options.results, out)
    elif what in TABLES and by_hand:
        written = write_table(what, options.results, options.runs, out, options.dataset)
    elif what in ("sensitivity", "gains") or (what.startswith("table") and not Path(what).is_dir()):
        from fastrecycle.tables.command import report_table

        written = report_table(options)
    else:
        written = _report_run(options)
    for path in written:
        print(path)
    return OK


def _export(options: o.Export) -> int:
    from fastrecycle.files import save_safetensors
    from fastrecycle.lora import LoRA
    from fastrecycle.weights import export

    _packaged_alone("lora", options.lora, options.backbone.backbone)
    if not options.merged:
        LoRA.load(options.lora).save(options.out, options.layout)
    elif options.out.suffix != ".safetensors":
        raise ValueError(f"out: merged weights are one .safetensors file, got {options.out}")
    else:
        vit, _ = _backbone(options)
        vit = vit.merged(LoRA.load(options.lora, vit))
        if options.layout is None:
            vit.save(options.out)
        else:
            tensors = export(vit, cast("Any", options.layout))
            save_safetensors(options.out, tensors, {"format": "pt"})
    print(options.out)
    return OK


def _report_run(options: o.Report) -> list[Path]:
    """A run's report.md and report.html."""
    from fastrecycle.recycler import resolve_device, resolve_precision
    from fastrecycle.report import PageOptions, read_run, write_page, write_report

    device = resolve_device(options.common.device)
    page = PageOptions(
        compare=options.compare,
        small_cnn=options.small_cnn,
        backbone=options.run_backbone,
        bank=options.run_bank,
        projection=options.projection,
        device=str(device),
        precision=resolve_precision(options.common.precision, device),
    )
    run = read_run(options.what)
    say = logging.getLogger("fastrecycle.report").info
    return [*write_report(run), write_page(run, page, say)]


def _serve(options: o.Serve) -> int:
    from fastrecycle.recycler import resolve_device, resolve_precision
    from fastrecycle.serve import Limits, Service, check_gradio, open_page

    check_gradio()
    device = resolve_device(options.common.device)
    vit, _ = _backbone(options)
    lora, _ = _evaluated(options.meta_lora, options.backbone.backbone, vit)
    limits = Limits(
        file_bytes=options.file_mb * 10**6,
        pixels=options.megapixels * 10**6,
        pictures=options.pictures,
    )
    precision = resolve_precision(options.common.precision, device)
    service = Service(vit.to(device), lora, limits, precision=precision)
    open_page(service, options.host, options.port, say=print)
    return OK


def _info(options: o.Info) -> int:
    from fastrecycle.info import describe

    found = describe(
        options.source,
        config=o.backbone_config(options.backbone.backbone_config),
        data_root=options.common.data_root,
        full=options.full,
    )
    print("\n".join(found.lines))
    for problem in found.problems:
        print(f"problem: {' '.join(problem.split())}")
    return BROKEN if found.problems else OK


COMMANDS: dict[str, Command] = {
    "demo": Command(
        o.Demo,
        _demo,
        "Recycle a part of the packaged bank on this machine and evaluate what comes out.",
        "fastrecycle demo",
        "a table; results.json, synthetic.png, the synthetic pool and the meta-LoRA in --out.",
    ),
    "pretune": Command(
        o.Pretune,
        _pretune,
        "Make a bank of LoRAs with heads, each trained on its own few-way task of a data set.",
        "fastrecycle pretune --dataset cifar_fs --num 100 --ways 5 --rank 4 --out runs/bank",
        "one PEFT folder a LoRA, run.json and metrics.jsonl in --out.",
    ),
    "invert": Command(
        o.Invert,
        _live(_invert),
        "Synthesise images from a bank of LoRAs (step 1 of LoRA Recycle).",
        "fastrecycle invert --bank runs/bank --iterations 300 --prune 6:0.75 --out runs/pool",
        "task-*.safetensors (images, labels, kept patches, teacher logits), run.json and"
        " metrics.jsonl in --out.",
    ),
    "meta-train": Command(
        o.MetaTrain,
        _live(_meta_train),
        "Meta-train one meta-LoRA on synthetic tasks (step 2 of LoRA Recycle).",
        "fastrecycle meta-train --pool runs/pool --bank runs/bank --out runs/meta",
        "meta_lora (a PEFT folder), run.json and metrics.jsonl in --out.",
    ),
    "recycle": Command(
        o.Recycle,
        _live(_recycle),
        "Turn a bank of LoRAs into one meta-LoRA: invert, then meta-train.",
        "fastrecycle recycle --bank runs/bank --inversion.iterations 300 --out runs/recycle",
        "meta_lora (a PEFT folder), pool, meta, run.json and metrics.jsonl in --out.",
    ),
    "eval": Command(
        o.Eval,
        _eval,
        "Evaluate a meta-LoRA on few-shot tasks, without fine-tuning.",
        "fastrecycle eval --dataset cifar_fs --lora runs/recycle/meta_lora --shots 1 5",
        "a table on stdout; with --json FILE also every task's accuracy, settings, versions and"
        " SHA-256 of the inputs.",
    ),
    "export": Command(
        o.Export,
        _export,
        "Write a LoRA for another library, or the backbone with it in its weights.",
        "fastrecycle export --lora runs/recycle/meta_lora --layout hf_clip --out meta_lora_hf",
        "a PEFT folder, or with --merged a .safetensors file.",
    ),
    "report": Command(
        o.Report,
        _report,
        "Draw a run's curves and synthetic images and list its settings and results; or the"
        " benchmarks' tables and plots (benchmarks); or run and write a table of the paper.",
        "fastrecycle report runs/recycle",
        "report.html, one page that needs nothing else, report.md, curves.png, synthetic.png and"
        " gallery.png in the run's folder; benchmarks.md and plots beside the records; TABLE.md,"
        " .csv and .tex in STORE/tables.",
    ),
    "info": Command(
        o.Info,
        _info,
        "Describe a backbone, LoRA, bank, pool, run or data set, and check it.",
        "fastrecycle info runs/bank",
        "a description on stdout; exit status 1 where something is broken.",
    ),
    "serve": Command(
        o.Serve,
        _serve,
        "Open a page on which a person shows a few labelled pictures and classifies others.",
        "fastrecycle serve runs/recycle/meta_lora",
        "a page at the address on stdout, until Ctrl-C; nothing is written.",
    ),
}

if __name__ == "__main__":
    sys.exit(main())

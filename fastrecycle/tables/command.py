"""`fastrecycle report TABLE`: from its options to a table's pages."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from fastrecycle.options import Report, backbone_config
from fastrecycle.tables.build import Request, build, find_table, write
from fastrecycle.tables.layout import MAIN
from fastrecycle.tables.store import Store
from fastrecycle.tables.toys import one_thread, toy_world
from fastrecycle.tables.world import Registered, World


def report_table(options: Report) -> list[Path]:
    """Run what is missing of a table, then write its pages; returns what was written.

    Raises:
        ValueError: unknown table or data set, or a further backbone that is not LABEL=SOURCE.
        FileNotFoundError: no data set of the table is there, or nothing to render.

    """
    find_table(options.what)  # raises before anything is read
    common, smoke = options.common, options.smoke or options.scale == "smoke"
    scale = "smoke" if smoke else options.scale
    store = Store(options.store or Path("runs/tables-smoke" if smoke else "runs/tables"))
    if not options.render:
        request = Request(
            options.what, scale, _command(options, scale), options.datasets, options.minutes,
            quiet=smoke or common.quiet or common.no_progress,
        )  # fmt: skip
        world = toy_world(options.training.seed) if smoke else _world(options)
        with one_thread() if smoke else contextlib.nullcontext():
            build(request, world, store, say=(lambda line: None) if common.quiet else print)
    return write(options.what, scale, store, options.out or store.root / "tables", options.results)


def _world(options: Report) -> World:
    """What a table runs on."""
    common, prior = options.common, options.prior
    return World(
        {MAIN: options.backbone.backbone, **labelled(options.backbones)},
        prior.prior,
        Registered(common.data_root),
        device=common.device,
        precision=common.precision,
        backend=options.training.backend,
        seed=options.training.seed,
        backbone_config=backbone_config(options.backbone.backbone_config),
        prior_options={"stride_in": prior.prior_stride_in, "eps": prior.prior_eps},
    )


def labelled(words: Sequence[str]) -> dict[str, str]:
    """{LABEL: SOURCE} of words LABEL=SOURCE.

    Raises:
        ValueError: a word of another form, or one label twice.

    """
    found: dict[str, str] = {}
    for word in words:
        label, equals, source = word.partition("=")
        if not (label and equals and source) or label == MAIN or label in found:
            raise ValueError(
                f"backbones: expected LABEL=SOURCE, each label once and none of them {MAIN}, got"
                f" {word!r}"
            )
        found[label] = source
    return found


def _command(options: Report, scale: str) -> str:
    """The command for a table's page, files by their names; folders and limits change no figure."""
    words = ["fastrecycle", "report", options.what, "--scale", scale]
    if scale != "smoke":
        words += ["--backbone", _name(options.backbone.backbone)]
        if options.backbone.backbone_config:
            words += ["--backbone-config", *options.backbone.backbone_config]
        words += ["--prior", _name(options.prior.prior)]
        for name in ("prior_stride_in", "prior_eps"):
            value = getattr(options.prior, name)
            words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        words += ["--seed", str(options.training.seed)]
    if options.datasets:
        words += ["--datasets", *options.datasets]
    if options.backbones:
        given = labelled(options.backbones).items()
        words += ["--backbones", *(f"{label}={_name(source)}" for label, source in given)]
    return shlex.join(words)


def _name(source: str) -> str:
    path = Path(source)
    return path.name if path.suffix in (".safetensors", ".pt", ".pth", ".bin") else source

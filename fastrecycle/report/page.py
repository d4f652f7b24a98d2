"""report.html: a run as one self-contained page, put together of its sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import fastrecycle
from fastrecycle.files import atomic_write
from fastrecycle.report import image_sections, network_sections, sections
from fastrecycle.report.contents import RunContents, read_run, sibling_without_prior
from fastrecycle.report.network import Projection, check_projection, load_networks
from fastrecycle.report.parts import Section
from fastrecycle.report.small_cnn import load_cnn

Say = Callable[[str], None]


@dataclass(frozen=True)
class PageOptions:
    """What a page shows beyond what lies in the run's folder."""

    compare: tuple[Path, ...] = ()  # runs on the same LoRAs, shown beside (Fig. 9)
    small_cnn: str | None = None  # a network for `load_cnn`, inverted for comparison (Fig. 7)
    backbone: str | None = None  # where the run's backbone is now; None: where the manifest says
    bank: str | None = None  # likewise
    projection: Projection = "tsne"
    device: str = "cpu"
    precision: str = "fp32"
    embedded: int = 400  # images in the projection, at most
    cnn_iterations: int = 200
    seed: int = 0


def write_page(
    run: str | Path | RunContents,
    options: PageOptions | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Write report.html into a run's folder: no network, no script or picture from elsewhere.

    A section whose networks are gone says so on the page, with the reason.

    Args:
        run: the folder, or what `read_run` returned.
        options: see `PageOptions`.
        say: takes a line as each longer computation begins.

    Raises:
        FileNotFoundError: no such run, or none at a path of `compare`.
        ImportError: UMAP was asked for and is not installed.
        ValueError: a damaged file, or a network that is no small CNN.

    """
    options = options or PageOptions()
    check_projection(options.projection)
    cnn = None if options.small_cnn is None else load_cnn(options.small_cnn).to(options.device)
    run = run if isinstance(run, RunContents) else read_run(run)
    others = [read_run(folder) for folder in options.compare]
    found = None if others else sibling_without_prior(run)
    others += [] if found is None else [read_run(found)]
    for other in others:
        if other.pool is None:
            raise FileNotFoundError(
                f"{other.folder}: holds no synthetic images; --compare takes the --out folder of"
                " fastrecycle invert or recycle"
            )
    networks, absent = None, ""
    try:
        networks = load_networks(run, options.backbone, options.bank, options.device)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        absent = " ".join(str(error).split())
        say(f"without the run's networks: {absent}")
    parts: list[Section | None] = [
        image_sections.synthetic(run),
        image_sections.beside_runs(run, others),
        image_sections.beside_cnn(run, cnn, others, options, say),
        network_sections.projected(run, networks, absent, options, say),
        network_sections.kept_over_layers(run, networks, absent, say),
        sections.curves(run),
        sections.accuracy(run),
        sections.cost(run, networks),
        sections.environment(run),
    ]
    path = run.folder / "report.html"
    atomic_write(path, render(run, [part for part in parts if part is not None]))
    return path


def render(run: RunContents, parts: Sequence[Section]) -> str:
    """The page's text."""
    from jinja2 import Environment, StrictUndefined

    files = resources.files("fastrecycle.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    from markupsafe import Markup

    template = environment.from_string((files / "page.html.jinja").read_text(encoding="utf-8"))
    own = {
        name: Markup((files / f"page.{name}").read_text(encoding="utf-8")) for name in ("css", "js")
    }
    return template.render(
        run=run, sections=parts, facts=sections.facts(run), version=fastrecycle.__version__, **own
    )

"""Pages of the site that lie outside docs/: README, changelog, licence, the model cards."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "LICENSE": "LICENSE"}

LINKS = {
    "docs/": "",
    "../fastrecycle/assets/": "assets/",
    "../benchmarks/results/": "benchmarks/",
    "benchmarks/results/": "benchmarks/",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them to what docs/ holds."""
    cards = {f"assets/{card.name}": str(card) for card in ROOT.glob("fastrecycle/assets/*.md")}
    results = ROOT / "benchmarks/results"
    figures = {
        f"benchmarks/{x.name}": str(x) for x in (results / "benchmarks.md", *results.glob("*.png"))
    }
    for page, source in {**PAGES, **cards, **figures}.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from the repository's root into docs/, and from docs/ to what lies outside."""
    for there, here in LINKS.items():
        markdown = markdown.replace(f"]({there}", f"]({here}")
    return markdown

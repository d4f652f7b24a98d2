"""Pages of the site that lie outside docs/: README, changelog, licence, the model cards."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "LICENSE": "LICENSE"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them to what docs/ holds."""
    cards = {f"assets/{card.name}": str(card) for card in ROOT.glob("fastrecycle/assets/*.md")}
    for page, source in {**PAGES, **cards}.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from the repository's root into docs/, and from docs/ to the model cards."""
    return markdown.replace("](docs/", "](").replace("](../fastrecycle/assets/", "](assets/")

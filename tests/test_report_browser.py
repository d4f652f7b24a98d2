"""A run's page in a real headless Chromium."""

import os
import shutil

import pytest
from tiny import make

from fastrecycle import cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# where Playwright has no browser of its own: one of the system's, or the one that is named
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    world = make(tmp_path_factory.mktemp("world"))
    out = world.root / ("a-run-with-a-rather-long-name-" * 3)
    assert cli.main([
        "recycle", "--backbone", str(world.backbone), "--bank", str(world.bank), "--prior",
        str(world.prior), "--out", str(out), "--quiet", "--device", "cpu",
        "--inversion.images-per-class", "4", "--inversion.iterations", "40",
        "--inversion.prune", "1:0.5", "--meta.steps", "40", "--meta.ways", "3",
        "--meta.queries", "2", "--meta.resolution", "8", "16",
    ]) == 0  # fmt: skip
    assert cli.main([
        "eval", "--dataset", str(world.images), "--backbone", str(world.backbone), "--lora", "none",
        "--ways", "3", "--queries", "3", "--tasks", "20", "--device", "cpu", "--quiet",
        "--json", str(out / "nn.json"),
    ]) == 0  # fmt: skip
    assert cli.main(["report", str(out), "--quiet", "--device", "cpu"]) == 0
    return out / "report.html"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason='needs playwright: pip install -e ".[test]"'
    )
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium
        found = os.environ.get("FASTRECYCLE_CHROMIUM")
        if not found and not os.path.exists(chromium.executable_path):
            found = next(filter(None, map(shutil.which, NAMES)), None)
            if found is None:
                pytest.skip("no Chromium: playwright install chromium, or FASTRECYCLE_CHROMIUM")
        # a container's root may not have the sandbox; the page is our own
        launched = chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, page_file):
    """Open the page in a window; `.requests` and `.problems` are what happened meanwhile."""
    contexts = []

    def open_page(width=1280, scheme="light", scripts=True):
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme,
            java_script_enabled=scripts,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.requests, page.problems = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(page_file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def colours(page):
    """Background and text of the page, as RGB."""
    text = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] }"
    )
    return [tuple(map(int, colour[4:-1].split(","))) for colour in text]


def contrast(one, other):
    """WCAG 2's ratio of two colours."""

    def luminance(colour):
        linear = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
            for c in (x / 255 for x in colour)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_page_opens_without_network_or_errors(opened, page_file):
    page = opened()
    assert [url for url in page.requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.problems == []
    broken = page.evaluate(
        "() => [...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).length"
    )
    assert broken == 0
    assert page.evaluate("() => document.images.length") > 30
    drawn = page.evaluate(
        "() => [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(drawn) > 5
    assert min(drawn) > 100


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_page_never_scrolls_sideways(opened, width):
    page = opened(width)
    page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    small = page.evaluate(
        "() => [...document.images].filter(i => i.getBoundingClientRect().width < 40).length"
    )
    assert small == 0


def test_themes_follow_the_system_and_the_button(opened):
    for scheme in ("light", "dark"):
        page = opened(scheme=scheme)
        paper, ink = colours(page)
        assert (sum(paper) < 384) == (scheme == "dark")
        assert contrast(paper, ink) >= 7
        page.click("#theme")
        other, ink = colours(page)
        assert (sum(other) < 384) != (scheme == "dark")
        assert contrast(other, ink) >= 7
        label = page.inner_text("#theme")
        page.click("#theme")
        assert colours(page)[0] == paper
        assert page.inner_text("#theme") != label
        assert page.problems == []


def test_drawings_change_with_the_theme(opened):
    page = opened()
    read = "() => getComputedStyle(document.querySelector('svg text')).fill"
    light = page.evaluate(read)
    page.click("#theme")
    assert page.evaluate(read) != light


def test_page_works_from_the_keyboard(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "theme"
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert sum(colours(page)[0]) < 384
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("() => document.activeElement.tagName"))
    assert {"A", "SUMMARY", "DIV", "PRE"} <= seen


def test_page_reads_without_scripts(opened):
    page = opened(scheme="dark", scripts=False)
    assert page.is_hidden("#theme")
    assert page.locator("main section").count() >= 8

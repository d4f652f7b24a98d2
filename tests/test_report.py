"""A run's folder as a page: what it shows, that it needs nothing else, and what it refuses."""

import importlib.util
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make, random_lora, write_prior
from torch import nn

from fastrecycle import cli
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.pool import SyntheticPool
from fastrecycle.prior import load_prior, moment_distance
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.report import PageOptions, figures, read_run, write_page, write_report
from fastrecycle.report.contents import sibling_without_prior
from fastrecycle.report.network import kept_by_block, load_networks, project
from fastrecycle.report.small_cnn import class_directions, invert_cnn
from fastrecycle.report.tables import evaluation_rows, read_evaluations
from fastrecycle.vit import ViT

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = "<script>alert('$x_')</script>"


class Page(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text += data

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def result(lora, accuracies, shots=1, **settings):
    per_task = np.asarray(accuracies, dtype=float)
    listed = {"shots": shots, "accuracy": per_task.mean(), "ci95": 1.0, "per_task": list(per_task)}
    shared = {"dataset": "images", "lora": lora, "seed": 0, "ways": 3, "tasks": len(per_task)}
    return {"results": [listed], "settings": {**shared, **settings}}


def recycled(world, out, alpha=0.01, **meta):
    """A run of the tiny world; one of its classes has a hostile name."""
    bank = LoRABank.load(world.bank)
    inputs = {
        "backbone": {"source": str(world.backbone)},
        "bank": {"source": str(world.bank)},
        "prior": {"source": str(world.prior)},
    }
    MetaLoRARecycler(
        ViT.from_pretrained(world.backbone), bank, world.prior,
        InversionConfig(images_per_class=4, iterations=4, prune={1: 0.5}, alpha=alpha, group=3),
        MetaConfig(steps=4, ways=3, queries=2, resolution=(8, 16), **meta),
        inputs=inputs, device="cpu", quiet=True,
    ).run(out)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make(tmp_path_factory.mktemp("world"))
    bank = LoRABank.load(world.bank)
    first = replace(bank[0], class_names=(HOSTILE, *bank[0].class_names[1:]))
    LoRABank([first, *bank[1:]]).save(world.root / "named")
    return replace(world, bank=world.root / "named")


@pytest.fixture(scope="module")
def run(world):
    out = world.root / "runs" / "first"
    recycled(world, out)
    (out / "nn.json").write_text(json.dumps(result("none", [40, 50, 60])))
    (out / "lora.json").write_text(json.dumps(result("meta_lora", [50, 61, 72])))
    return out


@pytest.fixture(scope="module")
def page(run):
    options = PageOptions(small_cnn="demo", cnn_iterations=2)
    return Page(write_page(run, options).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- the page


def test_page_loads_nothing_from_elsewhere(page):
    for attributes in page.all("img", "image", "script", "link", "iframe", "source", "use"):
        for name in ("src", "href", "xlink:href", "srcset"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), attributes
    for attributes in page.all("a"):
        assert attributes["href"].startswith("#")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    styles = page.text[: page.text.index("Skip to the report")]
    assert "url(" not in styles
    assert "@import" not in styles


def test_every_picture_is_described(page):
    pictures = page.all("img")
    assert len(pictures) > 50
    assert all(a["alt"].strip() for a in pictures)
    labelled = [a for a in page.all("div") if a.get("role") == "img"]
    drawings = page.all("svg")
    assert len(labelled) == len(drawings) > 5
    assert all(a["aria-label"].strip() for a in labelled)
    assert all(a["aria-hidden"] == "true" for a in drawings)


def test_page_can_be_read_and_operated_by_anyone(page):
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in next(
        a["content"] for a in page.all("meta") if a.get("name") == "viewport"
    )
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for attributes in page.all("a"):
        assert attributes["href"][1:] in ids
    assert all(a.get("tabindex") == "0" for a in page.all("pre"))
    assert all(a.get("tabindex") == "0" for a in page.all("div") if a.get("class") == "scroll")
    assert all("scope" in a for a in page.all("th"))
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) == 1


def test_page_shows_every_section(page):
    shown = {a["id"] for a in page.all("h2")}
    assert shown == {
        "synthetic", "prior", "cnn", "features", "layers", "curves", "accuracy", "cost",
        "environment",
    }  # fmt: skip
    for text in ("25% masked", "50% masked", "75% masked", "block 1 (prunes)", "CNN, no prior",
                 "plain backbone", "meta-LoRA", "config.inversion.iterations"):  # fmt: skip
        assert text in page.text, text
    assert "Inversion pruned each image down to 8 of 16 patches" in page.text


def test_names_of_strangers_stay_text(page):
    assert HOSTILE in page.text
    assert len(page.all("script")) == 1


def test_page_says_why_networks_are_missing(run, world, tmp_path):
    other = tmp_path / "other.safetensors"
    ViT.random(ViT.from_pretrained(world.backbone).config, seed=9).save(other)
    manifest = json.loads((run / "run.json").read_text())
    assert "sha256" not in manifest["inputs"]["backbone"]
    lines = []
    contents = read_run(run)
    gone = PageOptions(backbone=str(tmp_path / "gone.safetensors"))
    text = Page(write_page(contents, gone, lines.append).read_text()).text
    assert "Not drawn, for want of the networks" in text
    assert "gone.safetensors" in text
    assert any("gone.safetensors" in line for line in lines)


def test_another_backbone_than_the_runs_is_refused(world, run, tmp_path):
    contents = read_run(run)
    from fastrecycle.inputs import network_input

    told = network_input(str(world.backbone), ViT.from_pretrained(world.backbone))
    manifest = contents.manifest
    manifest["inputs"]["backbone"] = told
    other = tmp_path / "other.safetensors"
    ViT.random(ViT.from_pretrained(world.backbone).config, seed=9).save(other)
    assert load_networks(contents).vit.config.depth == 2
    with pytest.raises(ValueError, match=r"other contents than the run's.*--run-backbone"):
        load_networks(contents, backbone=str(other))


# ---------------------------------------------------------------------- runs beside each other


def test_a_sibling_without_the_prior_stands_beside(world, run, tmp_path):
    runs = tmp_path / "runs"
    for name, alpha in (("with", 0.01), ("without", 0.0)):
        recycled(world, runs / name, alpha)
    (runs / "stranger").mkdir()
    (runs / "stranger" / "run.json").write_text("no json")
    contents = read_run(runs / "with")
    assert sibling_without_prior(contents) == (runs / "without").resolve()
    assert sibling_without_prior(read_run(runs / "without")) is None
    text = Page(write_page(contents).read_text()).text
    assert "without: without the prior" in text
    assert text.count("no prior") >= 9  # of each class of each LoRA
    named = Page(write_page(run, PageOptions(compare=(runs / "without",))).read_text()).text
    assert "without: without the prior" in named


def test_alone_a_run_says_how_to_compare(page):
    assert "fastrecycle invert --alpha 0 --prior none" in page.text
    assert "--compare" in page.text


def test_a_run_without_images_is_no_comparison(world, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no synthetic images"):
        write_page(run, PageOptions(compare=(tmp_path / "empty",)))
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no run\.json"):
        write_page(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_a_run_that_only_trained_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text('{"config": {}, "inputs": {}, "versions": {"torch": "2"}}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "pretune", "step": 1, "time": 10.0, "loss": 1.5}\n'
        '{"stage": "pretune", "step": 21, "time": 20.0, "loss": 0.5}\n{"stage": "pre'
    )
    page = Page(write_page(tmp_path).read_text())
    assert {a["id"] for a in page.all("h2")} == {"curves", "accuracy", "cost", "environment"}
    (label,) = (a["aria-label"] for a in page.all("div") if a.get("role") == "img")
    assert label == "loss of pretune: 1.5 at step 1, 0.5 at step 21, between 0.5 and 1.5"
    assert re.search(r"pretune\s*21\s*10\.0\s*2", page.text)  # 20 steps in 10 s


# ---------------------------------------------------------------------- tables


def test_differences_are_paired_on_the_same_tasks(run):
    rows = {row[2]: row for row in evaluation_rows(read_evaluations(run))}
    gains = np.array([10.0, 11.0, 12.0])
    half = 1.96 * gains.std(ddof=1) / 3**0.5
    assert rows["meta_lora"][5] == f"+11.00 ± {half:.2f}"
    assert rows["none"][5] == ""


def test_other_tasks_are_not_paired(tmp_path):
    (tmp_path / "nn.json").write_text(json.dumps(result("none", [40, 50, 60], seed=1)))
    (tmp_path / "lora.json").write_text(json.dumps(result("meta_lora", [50, 61, 72])))
    assert [row[5] for row in evaluation_rows(read_evaluations(tmp_path))] == ["", ""]


# ---------------------------------------------------------------------- pictures


def test_masks_grey_the_least_important_patches(run):
    pool = SyntheticPool.load(run / "pool")
    whole, quarter = figures.masked_versions(pool, 3, (0.75,))
    assert torch.equal(whole, pool.images[3].float() / 255)
    patches = (quarter != 0.5).any(0).unflatten(1, (4, 4)).unflatten(0, (4, 4)).any(3).any(1)
    assert set(patches.flatten().nonzero()[:, 0].tolist()) <= set(pool.order[3, :4].tolist())
    kept = quarter != 0.5
    assert torch.equal(quarter[kept], whole[kept])


def test_small_pictures_are_kept_without_loss():
    import base64
    import io

    from PIL import Image

    image = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    data = base64.b64decode(figures.data_uri(image / 255).partition(",")[2])
    decoded = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decoded, image.permute(1, 2, 0).numpy())


def test_drawings_take_the_pages_colours():
    svg = figures.curve_svg("loss: $x <b>", [(1, 2.0), (2, 1.0), (3, 0.5)])
    assert re.findall(r"#[0-9a-f]{6}", svg) == []
    assert "var(--series-0)" in svg
    assert "loss: $x &lt;b&gt;" in svg
    assert "http" not in svg
    ids = set(re.findall(r'id="([^"]*)"', svg))
    assert set(re.findall(r"url\(#([^)]*)\)", svg)) <= ids


def test_kept_patches_are_those_of_the_pruned_forward(world):
    vit = ViT.from_pretrained(world.backbone)
    lora = random_lora(vit.config, 1)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = kept_by_block(vit, lora, images)
    assert maps.shape == (2, 3, 16)
    assert maps.sum(-1).eq(4).all()
    for block in range(2):
        kept = vit.encode(images, lora, prune={block: 0.75}).kept
        assert maps[block].nonzero()[:, 1].tolist() == kept.flatten().tolist()


def test_projection_keeps_groups_together():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), 20)
    features = (rng.normal(size=(3, 16)) * 20)[groups] + rng.normal(size=(60, 16))
    points = project(features.astype(np.float32))
    assert points.shape == (60, 2)
    centres = np.stack([points[groups == g].mean(0) for g in range(3)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(1)
    assert (nearest == groups).all()
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        project(features[:3])


def test_umap_is_asked_for_by_name(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "umap" else find(n))
    with pytest.raises(ImportError, match=r'pip install "fastrecycle\[umap\]"'):
        write_page(run, PageOptions(projection="umap"))
    with pytest.raises(ValueError, match="projection"):
        project(np.zeros((9, 2)), "pca")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the small CNN


def torch_features(prior, x):
    """The tiny prior's forward pass, written with torch's own layers."""
    get = prior._get
    x = (x - x.new_tensor(prior.spec.mean)[:, None, None]) / x.new_tensor(prior.spec.std)[
        :, None, None
    ]

    def conv_bn(x, conv, bn):
        y = nn.functional.conv2d(x, get(f"{conv}.weight"), padding=1)
        mu, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        stored = get(f"{bn}.running_mean"), get(f"{bn}.running_var")
        terms.append(moment_distance(mu[None], var[None], *stored))
        return nn.functional.batch_norm(
            y, *stored, get(f"{bn}.weight"), get(f"{bn}.bias"), eps=prior.spec.eps
        )

    terms = []
    x = conv_bn(x, "conv1", "bn1").relu()
    y = conv_bn(x, "layer1.0.conv1", "layer1.0.bn1").relu()
    x = (x + conv_bn(y, "layer1.0.conv2", "layer1.0.bn2")).relu()
    return x.mean((2, 3)), torch.stack(terms).sum(0)


def test_cnn_features_match_torchs_layers(tmp_path):
    write_prior(tmp_path / "prior.safetensors")
    prior = load_prior(tmp_path / "prior.safetensors")
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features, r_bn = prior.features(x)
    wanted, wanted_r_bn = torch_features(prior, x)
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(r_bn, wanted_r_bn, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(r_bn, prior(x), atol=0, rtol=0)


def test_inverting_a_cnn_lowers_what_it_is_told_to():
    cnn = load_prior("demo")
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[4:] = x[4:] * 0.3 + 0.6
    head = class_directions(cnn, x, torch.tensor([0, 0, 0, 0, 2, 2, 2, 2]))
    assert head.shape[0] == 2
    torch.testing.assert_close(head.norm(dim=1), torch.ones(2))
    start, _ = invert_cnn(cnn, head, 32, iterations=0)
    plain, right = invert_cnn(cnn, head, 32, iterations=20)
    natural, _ = invert_cnn(cnn, head, 32, alpha=0.01, iterations=20)
    assert right == 1.0
    assert plain.min() >= 0
    assert plain.max() <= 1
    assert cnn(natural) < 0.75 * cnn(start)
    assert cnn(natural) < cnn(plain)


def test_a_small_cnn_must_be_one(run, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        write_page(run, PageOptions(small_cnn="gone.safetensors"))
    with pytest.raises(ValueError, match="small_cnn: expected demo or a ResNet's file, got none"):
        write_page(run, PageOptions(small_cnn="none"))


# ---------------------------------------------------------------------- the command


def test_report_writes_the_page(run, capsys, world):
    for name in ("report.html", "gallery.png"):
        (run / name).unlink(missing_ok=True)
    arguments = ["report", str(run), "--quiet", "--device", "cpu", "--compare", str(run)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    for name in ("report.html", "gallery.png", "report.md"):
        assert str(run / name) in said
        assert (run / name).stat().st_size > 1000


def test_manifest_tells_what_weights_do_not(world, tmp_path):
    out = tmp_path / "pool"
    sizes = ["--images-per-class", "2", "--iterations", "1"]
    assert cli.main([
        "invert", "--backbone", str(world.backbone), "--backbone-config", "heads=2", "--bank",
        str(world.bank), "--prior", "none", "--out", str(out), "--quiet", "--device", "cpu", *sizes,
    ]) == 0  # fmt: skip
    contents = read_run(out)
    assert contents.input("backbone")["config"] == {"heads": 2}
    networks = load_networks(contents)
    assert isinstance(networks.bank[0], LoRA)
    assert networks.meta_lora is None
    assert contents.without_prior


def test_template_is_packaged():
    files = Path(figures.__file__).parent
    assert {f.name for f in files.glob("page.*")} == {
        "page.py", "page.html.jinja", "page.css", "page.js",
    }  # fmt: skip

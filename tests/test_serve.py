"""`fastrecycle serve`: what a visitor may hand in, what comes back, and where the page listens."""

import importlib.util
import io
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tiny import CLASSES, CONFIG, make, random_lora

from fastrecycle import cli
from fastrecycle.classifier import FewShotClassifier
from fastrecycle.lora import LoRABank
from fastrecycle.serve import Limits, Service, check_gradio, open_page, read_picture
from fastrecycle.serve.page import answered, escaped, summary
from fastrecycle.vit import ViT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def service(world):
    limits = Limits(file_bytes=200_000, pixels=10_000, pictures=12, name=20)
    return Service(ViT.from_pretrained(world.backbone), LoRABank.load(world.bank)[0], limits)


def shots(world, name, split="test", count=3):
    return sorted((world.images / split / name).glob("*.png"))[:count]


def example_set(service, world, names=("ant", "eel")):
    examples = ()
    for name in names:
        examples = service.add(examples, name, shots(world, name))
    return examples


def png_header(width, height):
    """A PNG of any claimed size with no pixels behind it: small on disk, huge when decoded."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------------- pictures


def test_picture_is_read_by_its_content(tmp_path):
    path = tmp_path / "a.txt"  # a name says nothing
    Image.new("RGBA", (8, 4), (255, 0, 0, 128)).save(path, format="PNG")
    picture = read_picture(path, Limits())
    assert (picture.mode, picture.size) == ("RGB", (8, 4))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a whole image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a whole image"),
        (b"", "not a whole image"),
        (png_header(40_000, 40_000), "more than 10,000 pixels"),
        (png_header(200, 100), "more than 10,000 pixels"),
        (b"x" * 300_000, r"0\.3 MB, at most 0\.2 MB"),
    ],
)
def test_picture_that_is_none_is_refused(content, reason, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"picture\.png.*{reason}"):
        read_picture(path, Limits(file_bytes=200_000, pixels=10_000))


def test_bomb_is_refused_without_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(20_000, 20_000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # not Pillow's doing
    monkeypatch.setattr(
        "PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded")
    )
    with pytest.raises(ValueError, match="more than 40,000,000 pixels"):
        read_picture(path, Limits())


def test_cut_picture_is_refused(tmp_path):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, format="JPEG")
    path = tmp_path / "cut.jpg"
    path.write_bytes(stream.getvalue()[:500])
    with pytest.raises(ValueError, match="not a whole image"):
        read_picture(path, Limits())


# ---------------------------------------------------------------------- the service


def test_answers_are_those_of_the_classifier(service, world):
    examples = example_set(service, world, CLASSES[:3])
    queries = [path for name in CLASSES[:3] for path in shots(world, name, "val")]
    answer = service.classify(examples, queries)
    direct = FewShotClassifier(service.vit, LoRABank.load(world.bank)[0]).fit(
        [Image.open(p) for name in CLASSES[:3] for p in shots(world, name)],
        np.repeat(CLASSES[:3], 3),
    )
    images = [Image.open(path) for path in queries]
    assert answer.classes == CLASSES[:3]
    assert answer.labels == tuple(direct.predict(images))
    np.testing.assert_allclose(answer.probabilities, direct.predict_proba(images), atol=1e-5)
    assert answer.examples == 9
    assert answer.adapting_ms > 0
    assert answer.classifying_ms > 0
    assert len(answer.pictures) == len(queries)


def test_examples_are_one_forward_pass(service, world, monkeypatch):
    batches = []
    forward = ViT.forward
    monkeypatch.setattr(
        ViT, "forward",
        lambda self, images, *a, **k: batches.append(len(images)) or forward(self, images, *a, **k),
    )  # fmt: skip
    examples = example_set(service, world, CLASSES[:4])
    service.classify(examples, shots(world, "bee", "val", 2))
    assert batches == [12, 2]


def test_visitors_do_not_meet(service, world):
    mine, other = example_set(service, world), example_set(service, world, ("bee", "cat"))
    queries = shots(world, "ant", "val")
    first = service.classify(mine, queries)
    assert service.classify(other, queries).classes == ("bee", "cat")
    again = service.classify(mine, queries)
    assert again.labels == first.labels
    np.testing.assert_array_equal(again.probabilities, first.probabilities)


def test_service_refuses_what_is_too_much_or_too_little(service, world, tmp_path):
    examples = example_set(service, world)
    ant = shots(world, "ant")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    for call, reason in (
        (lambda: service.add((), "  ", ant), "needs a name"),
        (lambda: service.add((), "x" * 21, ant), "at most 20 characters"),
        (lambda: service.add((), "ant", []), "none were given"),
        (lambda: service.add(examples, "ant", ant * 3), "at most 12 examples, got 15"),
        (lambda: service.add(examples, "ant", [*ant, bad]), "bad.png"),
        (lambda: service.classify(examples[:3], ant), "at least two classes are needed, got 1"),
        (lambda: service.classify(examples, []), "none to classify"),
        (lambda: service.classify(examples, ant * 5), "at most 12 at a time, got 15"),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        service.classify(examples, [tmp_path / "gone.png"])
    with pytest.raises(ValueError, match="pictures: must be at least 1, got 0"):
        Limits(pictures=0)


def test_lora_of_another_backbone_is_refused(world):
    from dataclasses import replace

    other = random_lora(replace(CONFIG, width=64), 0)
    with pytest.raises(ValueError, match=r"width|64"):
        Service(ViT.from_pretrained(world.backbone), other)


# ---------------------------------------------------------------------- the page


def test_page_shows_names_as_they_are(service, world):
    examples = service.add((), "<b>*x*", shots(world, "ant", count=2))
    assert summary(()) == "No examples yet."
    assert summary(examples) == f"Examples: {escaped('<b>*x*')}: 2"
    assert "<" not in escaped("<b>*x*")
    assert "*" not in escaped("<b>*x*")


def test_answer_says_how_long_it_took(service, world):
    files = [str(path) for path in shots(world, "ant", "val", 2)]
    answer = service.classify(example_set(service, world), files)
    gallery, table, sentence = answered(answer, files)
    assert [caption.partition(",")[0] for _, caption in gallery] == list(answer.labels)
    assert [row[0] for row in table] == ["0.png", "1.png"]
    assert "Adapted to 6 examples of 2 classes in **" in sentence
    assert "one forward pass" in sentence


def test_serve_says_that_gradio_is_absent(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gradio" else find(n))
    with pytest.raises(ImportError, match=r'pip install "fastrecycle\[serve\]"'):
        check_gradio()
    assert cli.main(["serve", "demo"]) == 2
    assert "gradio is not installed" in capsys.readouterr().err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening(port):
    """Addresses of this machine on which anything listens at a port, from Linux's own table."""
    with open("/proc/net/tcp", encoding="ascii") as table:
        rows = [line.split() for line in table][1:]
    found = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {
        socket.inet_ntoa(bytes.fromhex(address)[::-1])
        for address, number in found
        if int(number, 16) == port
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of Gradio and its server
def test_page_adapts_and_classifies_for_a_client(service, world, tmp_path):
    reason = 'needs gradio: pip install "fastrecycle[serve]"'
    pytest.importorskip("gradio", reason=reason)
    client = pytest.importorskip("gradio_client", reason=reason)
    said, port = [], free_port()
    page = open_page(service, port=port, say=said.append, block=False)
    try:
        assert said == [f"http://127.0.0.1:{port} (Ctrl-C ends it)"]
        assert listening(port) == {"127.0.0.1"}
        visitor = client.Client(f"http://127.0.0.1:{port}", verbose=False)
        files = {
            name: [client.handle_file(str(p)) for p in shots(world, name)]
            for name in ("ant", "eel")
        }
        for name in ("ant", "eel"):
            known = visitor.predict(name, files[name], api_name="/add")[1]
        assert known == "Examples: ant: 3, eel: 3"
        asked = [client.handle_file(str(p)) for p in shots(world, "eel", "val")]
        gallery, table, sentence = visitor.predict(asked, api_name="/classify")
        assert len(gallery) == len(table["data"]) == 3
        assert {row[1] for row in table["data"]} <= {"ant", "eel"}
        assert "one forward pass" in sentence

        stranger = client.Client(f"http://127.0.0.1:{port}", verbose=False)
        with pytest.raises(Exception, match="at least two classes"):
            stranger.predict(asked, api_name="/classify")
        bomb = tmp_path / "bomb.png"
        bomb.write_bytes(png_header(30_000, 30_000))
        with pytest.raises(Exception, match="more than 10,000 pixels"):
            visitor.predict("ant", [client.handle_file(str(bomb))], api_name="/add")
        large = tmp_path / "large.png"
        large.write_bytes(b"x" * 300_000)
        with pytest.raises(Exception):  # noqa: B017, PT011 - the server's own refusal
            visitor.predict("ant", [client.handle_file(str(large))], api_name="/add")
    finally:
        page.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_other_addresses_are_warned_of(service):
    pytest.importorskip("gradio", reason='needs gradio: pip install "fastrecycle[serve]"')
    said, port = [], free_port()
    open_page(service, host="0.0.0.0", port=port, say=said.append, block=False).close()
    assert "no password" in said[0]

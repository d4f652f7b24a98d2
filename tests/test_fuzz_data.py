"""Hostile image sets: archives, tables, class names and images of any content."""

import csv
import gzip
import io
import json
import tarfile
import tempfile
import warnings
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mangled import altered, attempt, damaged
from PIL import Image

from fastrecycle.data import load_dataset
from fastrecycle.data.images import decode, to_rgb
from fastrecycle.data.matlab import read_matrix


def picture(kind="PNG", mode="RGB", size=(6, 5)):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


FILES = {f"train/{c}/{i}.png": picture() for c in ("ant", "bee") for i in range(2)}


@cache
def packed(kind):
    """A good archive."""
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in FILES.items():
                archive.writestr(name, content)
        return stream.getvalue()
    long = {"train/" + "c" * 150 + "/0.png": picture()}  # with a header of its own
    form = tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in (FILES | long).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def read_all(name, content, beside=None):
    """Open a set from a file of this content, and decode its images."""
    with tempfile.TemporaryDirectory() as folder:
        for file, data in (beside or {}).items():
            (Path(folder) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / file).write_bytes(data)
        path = Path(folder) / name
        path.write_bytes(content)

        def load():
            dataset = load_dataset(path, "train")
            for index in range(len(dataset)):
                attempt(lambda index=index: dataset.open(index), names=[path.name, folder])
            return dataset

        dataset = attempt(load, names=[path.name])
        if dataset is not None:
            assert all(isinstance(x, str) for x in dataset.class_names)
            assert len(dataset.labels) == len(dataset.files)


@given(damaged(packed("zip")))
def test_fuzz_zip(content):
    read_all("set.zip", content)


@given(st.sampled_from(["gnu", "pax"]).flatmap(lambda kind: damaged(packed(kind))))
def test_fuzz_tar(content):
    read_all("set.tar", content)


@given(damaged(packed("pax")))
def test_fuzz_tar_within_gzip(content):
    read_all("set.tar.gz", gzip.compress(content, 1))


@given(damaged(gzip.compress(packed("gnu"), mtime=0)))
def test_fuzz_gzip(content):
    read_all("set.tgz", content)


NAMES = st.one_of(
    st.sampled_from([
        "../x.png", "/etc/x.png", "C:/x.png", "a/../../x.png", "..\\x.png", "train/ant/0.png", "",
        ".", "a/b/", "a/" * 300 + "x.png", "\0.png", "train/ant/é.png", "x.pkl",
    ]),
    st.text(max_size=12),
)  # fmt: skip


@given(st.lists(NAMES, max_size=5), st.sampled_from(["set.zip", "set.tar"]))
def test_fuzz_names_of_members(names, kind):
    stream = io.BytesIO()
    if kind.endswith("zip"):
        with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings(action="ignore"):
            for name in names:
                try:
                    archive.writestr(zipfile.ZipInfo(name), picture())
                except (UnicodeEncodeError, ValueError, IndexError):  # not to be written at all
                    return
    else:
        with tarfile.open(fileobj=stream, mode="w", errors="surrogateescape") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(picture())
                try:
                    archive.addfile(member, io.BytesIO(picture()))
                except UnicodeEncodeError:
                    return
    read_all(kind, stream.getvalue())


CELLS = st.one_of(
    st.sampled_from([
        "filename", "label", "split", "train", "test", "ant", "0.png", "../0.png",
        "x" * 300 + ".png", "images/0.png", "", " ", "\0.png", "/0.png",
        '"', "0.png\n", "x,y", "\x1c", "é",
    ]),
    st.text(max_size=5),
)  # fmt: skip


@given(st.lists(st.lists(CELLS, max_size=4), max_size=5), st.booleans(), st.data())
def test_fuzz_table(rows, headed, data):
    stream = io.StringIO()
    csv.writer(stream).writerows([["filename", "label", "split"], *rows] if headed else rows)
    content = stream.getvalue().encode("utf-8", "replace")
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    read_all("list.csv", content, {"0.png": picture(), "images/1.png": picture()})


@given(altered({"ant": "Ant", "bee": "Bee"}))
def test_fuzz_class_names(names):
    content = json.dumps(names).encode("utf-8", "replace")
    with tempfile.TemporaryDirectory() as folder:
        for file, data in {**FILES, "class_names.json": content}.items():
            (Path(folder) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / file).write_bytes(data)
        attempt(lambda: load_dataset(folder, "train"), names=["class_names.json"])


IMAGES = [
    picture("PNG"), picture("PNG", "P"), picture("PNG", "LA"), picture("PNG", "I;16"),
    picture("JPEG"), picture("JPEG", "CMYK"), picture("WEBP"), picture("WEBP", "RGBA"),
    picture("GIF", "P"), picture("BMP"), picture("TIFF", "F"), picture("TIFF", "LAB"),
    picture("TIFF", "CMYK"), picture("PPM", "L"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Pillow's, of odd metadata
@given(st.sampled_from(IMAGES).flatmap(damaged))
def test_fuzz_image(content):
    image = attempt(lambda: decode(content, "x.png"), names=["x.png"])
    if image is not None:
        assert to_rgb(image).mode == "RGB"


def matrix():
    """A MATLAB 5 file with one matrix, "labels", of 5 bytes."""
    word = lambda *x: np.array(x, "<u4").tobytes()  # noqa: E731
    inner = word(6, 8, 6, 0) + word(5, 8, 1, 5) + word(1, 6) + b"labels\0\0"
    inner += word(2, 5) + bytes(range(5)) + b"\0\0\0"
    return b" " * 124 + b"\x00\x01IM" + word(14, len(inner)) + inner


@given(damaged(matrix()[124:]))
def test_fuzz_matlab(content):
    assert read_matrix(matrix(), "labels").tolist() == [0, 1, 2, 3, 4]
    attempt(lambda: read_matrix(b" " * 124 + content, "labels"), names=[""])

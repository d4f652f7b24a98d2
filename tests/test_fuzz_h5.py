"""Hostile exports of Meta-Dataset: HDF5 files of any content, specifications that promise much."""

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mangled import altered, attempt, bounded_memory, damaged

from fastrecycle.data import load_dataset
from fastrecycle.data.h5 import H5Images

h5py = pytest.importorskip("h5py")

PIXELS = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
COUNT = 3  # images of a class


def written(write, **how):
    """Bytes of an HDF5 file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.h5"
        with h5py.File(path, "w", **how) as file:
            write(file)
        return path.read_bytes()


@cache
def good(kind):
    """A class as P>M>F writes it, or in forms of the format that are read by other code."""

    def write(file):
        for number in range(COUNT):
            group = file.create_group(str(number))
            how = {} if kind == "plain" else {"chunks": (2, 4, 3), "compression": "gzip"}
            group.create_dataset("image", data=PIXELS, **how)
            group.create_dataset("label", data=0)

    return written(write, libver="latest" if kind == "latest" else "earliest")


def read_all(content):
    """Open one class and decode its images."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.h5"
        path.write_bytes(content)
        images = attempt(lambda: H5Images([path], [None]), names=["0.h5"])
        for index in range(min(len(images or ()), 5)):
            image = attempt(lambda index=index: images.read(index), names=["0.h5"])
            assert image is None or (image.dtype, image.ndim) == (np.uint8, 3)


@given(st.sampled_from(["plain", "packed", "latest"]).flatmap(lambda kind: damaged(good(kind))))
def test_fuzz_h5(content):
    read_all(content)


# What may lie in the place of a group or an image.
OBJECTS = {
    "nothing": lambda g, name: None,
    "group": lambda g, name: g.create_group(name),
    "number": lambda g, name: g.create_dataset(name, data=3),
    "text": lambda g, name: g.create_dataset(name, data="0/image"),
    "floats": lambda g, name: g.create_dataset(name, data=PIXELS.astype(np.float32)),
    "rows": lambda g, name: g.create_dataset(name, data=np.array([(1, 2)], "u1,u1")),
    "empty": lambda g, name: g.create_dataset(name, dtype=np.uint8),
    "type": lambda g, name: g.file.__setitem__(f"{g.name}/{name}", np.dtype("u1,u1")),
    "reference": lambda g, name: g.create_dataset(name, data=g.ref, dtype=h5py.ref_dtype),
    "itself": lambda g, name: g.__setitem__(name, g),
    "soft link": lambda g, name: g.__setitem__(name, h5py.SoftLink("/0/image")),
    "external link": lambda g, name: g.__setitem__(name, h5py.ExternalLink("0.h5", "/")),
    "wide": lambda g, name: g.create_dataset(name, (2**20, 2**20, 3), np.uint8, chunks=(1, 1, 3)),
    "image": lambda g, name: g.create_dataset(name, data=PIXELS),
}  # fmt: skip


@given(st.sampled_from(sorted(OBJECTS)), st.sampled_from(sorted(OBJECTS)))
def test_fuzz_objects(outer, inner):
    def write(file):
        file.create_group("1").create_dataset("image", data=PIXELS)
        OBJECTS[outer](file, "0")
        if outer == "group":
            OBJECTS[inner](file["0"], "image")

    read_all(written(write))


SPEC = {
    "name": "mini",
    "classes_per_split": {"TRAIN": 0, "VALID": 0, "TEST": 1},
    "images_per_class": {"0": COUNT},
    "class_names": {"0": "banded"},
}
ALPHABETS = {
    "superclasses_per_split": {"TRAIN": 0, "VALID": 0, "TEST": 1},
    "classes_per_superclass": {"0": 1},
    "images_per_class": {"0": COUNT},
    "superclass_names": {"0": "ULOG"},
    "class_names": {"0": "ULOG-character01"},
}
WORDNET = {
    "split_subgraphs": {
        "TRAIN": [], "VALID": [],
        "TEST": [
            {"wn_id": "r", "words": "root", "children_ids": ["n1"], "parents_ids": []},
            {"wn_id": "n1", "words": "cat, tabby", "children_ids": [], "parents_ids": ["r"]},
        ],
    },
    "images_per_class": {"TRAIN": {}, "VALID": {}, "TEST": {"n1": COUNT}},
    "class_names": {"0": "n1"},
}  # fmt: skip
SPECS = {"dtd": SPEC, "omniglot": ALPHABETS, "ilsvrc_2012": WORDNET}


@given(st.sampled_from(sorted(SPECS)), st.data())
def test_fuzz_specification(source, data):
    content = json.dumps(SPECS[source]).encode()
    if data.draw(st.integers(0, 3)):
        content = json.dumps(data.draw(altered(SPECS[source]))).encode()
    else:
        content = data.draw(damaged(content))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "meta_dataset" / source
        root.mkdir(parents=True)
        (root / "0.h5").write_bytes(good("plain"))
        (root / "dataset_spec.json").write_bytes(content)
        found = attempt(
            lambda: load_dataset(f"meta_dataset/{source}", "test", folder), names=[root.name]
        )
        if found is not None:
            assert (len(found), len(found.class_names)) == (COUNT, 1)
            found.open(0)


# ------------------------------------------------------------------ found by fuzzing


@pytest.mark.parametrize("what", ["number", "text", "type"])
def test_an_image_group_that_is_none_is_refused(what, tmp_path):
    (tmp_path / "0.h5").write_bytes(written(lambda file: OBJECTS[what](file, "0")))
    images = H5Images([tmp_path / "0.h5"], [1])
    with pytest.raises(ValueError, match=r"0\.h5: 0/image is not a whole image \(/0 is no group"):
        images.read(0)


def test_a_small_image_in_a_chunk_of_gigabytes_is_refused(tmp_path):
    def write(file):
        most = (None, None, 3)
        image = file.create_group("0").create_dataset(
            "image", (5, 4, 3), np.uint8, maxshape=most, chunks=(40_000, 30_000, 3),
            compression="gzip",
        )  # fmt: skip
        image.id.write_direct_chunk((0, 0, 0), b"x" * 100)

    (tmp_path / "0.h5").write_bytes(written(write))
    images = H5Images([tmp_path / "0.h5"], [1])
    with bounded_memory(), pytest.raises(ValueError, match=r"chunks of \(40000, 30000, 3\)"):
        images.read(0)


def test_more_images_than_a_file_has_bytes_for_are_refused(tmp_path, monkeypatch):
    """A group beyond eight members keeps their number in a header of its own."""
    (tmp_path / "0.h5").write_bytes(good("plain"))
    monkeypatch.setattr(h5py.File, "__len__", lambda file: 10**12)
    with bounded_memory(), pytest.raises(ValueError, match=r"0\.h5 .*\(1000000000000 images in"):
        H5Images([tmp_path / "0.h5"], [10**12])


@pytest.mark.parametrize(
    "change",
    [
        {"classes_per_split": {"TRAIN": 10**12, "VALID": 0, "TEST": 1}},
        {"classes_per_split": {"TRAIN": -1, "VALID": 1, "TEST": 1}},
        {"classes_per_split": {"TRAIN": float("inf"), "VALID": 0, "TEST": 1}},
        {"images_per_class": {"0": float("inf")}},
    ],
    ids=str,
)
def test_specification_that_promises_too_much_is_refused(change, tmp_path):
    root = tmp_path / "meta_dataset" / "dtd"
    root.mkdir(parents=True)
    (root / "0.h5").write_bytes(good("plain"))
    (root / "dataset_spec.json").write_text(json.dumps(SPEC | change))
    with bounded_memory(), pytest.raises(ValueError, match=r"dataset_spec\.json is not Meta-Data"):
        load_dataset("meta_dataset/dtd", "test", tmp_path)

"""Meta-Dataset's sources on miniature trees: class folders, and the HDF5 export of P>M>F."""

import contextlib
import hashlib
import json
import pickle
import threading
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fastrecycle.data import DATASETS, load_dataset
from fastrecycle.data.groups import Groups, alphabets
from fastrecycle.data.h5 import H5Images
from fastrecycle.data.meta_dataset import SOURCES, class_splits, drawn_split

h5py = pytest.importorskip("h5py")


def write_images(root, *names):
    for red, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (red % 256, 0, 0)).save(root / name)


def write_spec(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_spec.json").write_text(json.dumps(content))


def flat_spec(names, sizes, images):
    """A specification as Meta-Dataset's converters write it for most sources."""
    return {
        "name": "mini",
        "classes_per_split": dict(zip(("TRAIN", "VALID", "TEST"), sizes, strict=True)),
        "images_per_class": {str(i): n for i, n in enumerate(images)},
        "class_names": {str(i): name for i, name in enumerate(names)},
        "path": "/records/mini",
        "file_pattern": "{}.tfrecords",
        "__class__": "DatasetSpecification",
    }


def write_h5(path, count, size=(5, 4), value=0):
    """N.h5 as P>M>F's conversion script writes it: image number -> image, label, id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for j in range(count):
            group = file.create_group(f"{j}")
            pixels = np.full((*size, 3), 0, np.uint8)
            pixels[..., 0] = value + j
            group.create_dataset("image", data=pixels)
            group.create_dataset("label", data=np.array(int(path.stem)))
            group.create_dataset("id", data=np.array(j))


def reds(dataset):
    return [dataset.open(index).getpixel((0, 0))[0] for index in range(len(dataset))]


# Class splits


def test_the_ten_sources_are_registered():
    names = "ilsvrc_2012 omniglot aircraft cu_birds dtd quickdraw fungi vgg_flower traffic_sign"
    assert set(SOURCES) == {*names.split(), "mscoco"}
    assert {f"meta_dataset/{name}" for name in SOURCES} <= set(DATASETS)


def test_drawn_splits_have_the_published_sizes():
    for source in SOURCES.values():
        counts = Counter(drawn_split(*source.classes))
        assert tuple(counts[split] for split in ("train", "val", "test")) == source.classes


@pytest.mark.parametrize(
    ("source", "digest"),
    [  # of the split files in Meta-Dataset's repository
        ("aircraft", "5c561090c51ab875"),
        ("cu_birds", "3e130546d81df493"),
        ("dtd", "2243f70ea3b15dea"),
        ("quickdraw", "3121d6c7bc296f5d"),
        ("fungi", "e9eaf6f105f6e33a"),
        ("mscoco", "2fad967d93a2c8ea"),
    ],
)
def test_drawn_splits_are_those_that_were_published(source, digest):
    drawn = "".join(split[1] for split in drawn_split(*SOURCES[source].classes))
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == digest


def test_the_draw_for_flowers_is_the_list_of_flowers_102():
    from fastrecycle.data.published import _FLOWERS

    drawn = drawn_split(*SOURCES["vgg_flower"].classes)
    for split, numbers in _FLOWERS.items():
        assert {i + 1 for i, of in enumerate(drawn) if of == split} == numbers


def test_some_classes_are_where_the_paper_has_them():
    birds = [f"{i:03d}.Bird" for i in range(1, 201)]
    of = class_splits("cu_birds", birds, "here")
    assert [b for b in birds if of[b] == "test"][:4] == [
        "008.Bird", "009.Bird", "015.Bird", "020.Bird",
    ]  # fmt: skip
    assert class_splits("mscoco", ["car", "person", "traffic_light"], "here") == {
        "car": "test", "person": "val", "traffic_light": "val",
    }  # fmt: skip
    characters = ["Tagalog_character01", "ULOG_character24", "Greek_character01"]
    assert class_splits("omniglot", characters, "here") == {
        "Tagalog_character01": "val", "ULOG_character24": "test", "Greek_character01": "train",
    }  # fmt: skip
    assert set(class_splits("traffic_sign", ["00000", "00042"], "here").values()) == {"test"}


@pytest.mark.parametrize(
    ("source", "folders", "text"),
    [
        ("dtd", ["banded", "braided"], "drawn over all 47 classes, got 2 class folders"),
        ("cu_birds", ["Auk"], "must begin with their number, 1 to 200, as in"),
        ("cu_birds", ["201.Auk"], "must begin with their number"),
        ("mscoco", ["auk"], "'auk' is none of COCO's 80 classes"),
        ("omniglot", ["Greek"], "must be ALPHABET_characterNN, got 'Greek'"),
        ("ilsvrc_2012", ["n01440764"], "follows WordNet; put Meta-Dataset's dataset_spec.json"),
    ],
)
def test_folders_that_are_not_a_source_s_are_rejected(source, folders, text):
    with pytest.raises(ValueError, match=text):
        class_splits(source, folders, "here")


# Class folders


def test_class_folders_are_split_as_published(tmp_path, caplog):
    names = [f"{i:03d}.Bird_{i}" for i in range(1, 201)]
    write_images(tmp_path / "meta_dataset/cu_birds", *(f"{n}/a.jpg" for n in names))
    sets = [load_dataset("meta_dataset/cu_birds", s, tmp_path) for s in ("train", "val", "test")]
    assert [len(d.class_names) for d in sets] == [140, 30, 30]
    assert sets[2].class_names[0] == "Bird 8"
    assert sets[2].name == "meta_dataset/cu_birds"
    assert "published split" not in caplog.text


def test_birds_as_their_authors_publish_them_get_meta_dataset_s_split(tmp_path):
    names = [f"{i:03d}.Bird_{i}" for i in (8, 44, 190)]
    root = tmp_path / "CUB_200_2011"
    write_images(root, *(f"images/{n}/a.jpg" for n in names))
    (root / "images.txt").write_text("1 008.Bird_8/a.jpg\n")
    (root / "image_class_labels.txt").write_text("1 8\n")
    (root / "classes.txt").write_text("8 008.Bird_8\n")
    assert load_dataset("meta_dataset/cu_birds", "val", tmp_path).class_names == ("Bird 44",)


def test_a_split_with_absent_classes_is_warned_about(tmp_path, caplog):
    write_images(tmp_path / "meta_dataset/mscoco", "car/0.jpg", "person/0.jpg")
    assert load_dataset("meta_dataset/mscoco", "test", tmp_path).class_names == ("car",)
    assert "mscoco, split test: 1 classes, the published split has 40" in caplog.text


def test_split_folders_are_taken_as_they_are(tmp_path, caplog):
    write_images(tmp_path / "meta_dataset/ilsvrc_2012", "test/n1/0.jpg", "train/n2/0.jpg")
    dataset = load_dataset("meta_dataset/ilsvrc_2012", "test", tmp_path)
    assert (dataset.class_names, dataset.groups) == (("n1",), None)
    assert "tasks are drawn without WordNet" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_traffic_signs_are_for_testing_alone(tmp_path, split):
    write_images(tmp_path / "GTSRB", "Final_Training/Images/00000/00000_00000.ppm", "Other/x/0.png")
    dataset = load_dataset("meta_dataset/traffic_sign", data_root=tmp_path)
    assert dataset.files == ["Final_Training/Images/00000/00000_00000.ppm"]
    with pytest.raises(ValueError, match=f"has no split '{split}', it has test"):
        load_dataset("meta_dataset/traffic_sign", split, tmp_path)


def test_omniglot_as_published_has_characters_and_alphabets(tmp_path):
    paths = [
        f"images_{part}/{alphabet}/character{n:02d}/{n:04d}_01.png"
        for part, alphabet in (("background", "Greek"), ("background", "Tagalog"),
                               ("evaluation", "ULOG"), ("evaluation", "Keble"))
        for n in (1, 2)
    ]  # fmt: skip
    write_images(tmp_path / "omniglot", *paths)
    write_images(tmp_path / "meta_dataset/omniglot", *paths)
    ours = load_dataset("omniglot", "train", tmp_path)
    assert ours.class_names == (
        "Greek_character01", "Greek_character02", "Tagalog_character01", "Tagalog_character02",
    )  # fmt: skip
    train, val, test = (
        load_dataset("meta_dataset/omniglot", s, tmp_path) for s in ("train", "val", "test")
    )
    assert train.class_names == ("Greek_character01", "Greek_character02")
    assert val.class_names == ("Tagalog_character01", "Tagalog_character02")
    assert test.groups == Groups(((0, 1), (2, 3)), "uniform")
    assert test.class_names[0] == "Keble_character01"
    assert load_dataset("omniglot", "test", tmp_path).class_names == test.class_names


def test_alphabets_need_names_of_characters():
    assert alphabets(["ULOG_character24", "x"]) is None
    assert alphabets(["A-character1", "B-character1", "A-character2"]).members == ((0, 2), (1,))


def test_flowers_as_published_are_meta_dataset_s_too(tmp_path):
    from scipy.io import savemat

    root = tmp_path / "vgg_flower"
    write_images(root, *(f"jpg/image_{i:05d}.jpg" for i in (1, 2, 3)))
    savemat(root / "imagelabels.mat", {"labels": np.array([[5, 10, 1]], np.uint8)})
    dataset = load_dataset("meta_dataset/vgg_flower", "test", tmp_path)
    assert (dataset.class_names, reds(dataset)) == (("english marigold",), [0])


# WordNet


def wordnet():
    """A small WordNet: two inner nodes of six leaves each under one root."""
    leaves = [f"n{i:08d}" for i in range(12)]

    def node(wn_id, children=(), words="w"):
        return {
            "wn_id": wn_id, "words": words, "children_ids": list(children), "parents_ids": [],
        }  # fmt: skip

    test = [
        node("r", ["b", "a"]),
        node("a", leaves[:6]),
        node("b", leaves[6:]),
        *(node(leaf, words=f"thing {leaf[-2:]}, other") for leaf in leaves),
    ]
    empty = {"TRAIN": {}, "VALID": {}}
    return leaves, {
        "name": "ilsvrc_2012",
        "split_subgraphs": {"TRAIN": [], "VALID": [], "TEST": test},
        "images_per_class": empty | {"TEST": dict.fromkeys([*leaves, "a", "b", "r"], 2)},
        "class_names": {str(i): leaf for i, leaf in enumerate(leaves)},
        "file_pattern": "{}.tfrecords",
        "__class__": "HierarchicalDatasetSpecification",
    }


@pytest.mark.parametrize("files", ["folders", "h5"])
def test_imagenet_is_drawn_from_branches_of_wordnet(tmp_path, files):
    root = tmp_path / "meta_dataset/ilsvrc_2012"
    leaves, spec = wordnet()
    write_spec(root, spec)
    for number, leaf in enumerate(leaves):
        if files == "h5":
            write_h5(root / f"{number}.h5", 2)
        else:
            write_images(root, f"{leaf}/0.JPEG", f"{leaf}/1.JPEG")
    dataset = load_dataset("meta_dataset/ilsvrc_2012", "test", tmp_path)
    assert dataset.class_names[3] == "thing 03"
    halves = tuple(range(6)), tuple(range(6, 12))
    assert dataset.groups == Groups((*halves, tuple(range(12))), "all")


def test_a_wordnet_that_goes_round_is_rejected(tmp_path):
    root = tmp_path / "meta_dataset/ilsvrc_2012"
    _, spec = wordnet()
    spec["split_subgraphs"]["TEST"][1]["children_ids"].append("r")
    write_spec(root, spec)
    write_h5(root / "0.h5", 1)
    with pytest.raises(ValueError, match="is below itself"):
        load_dataset("meta_dataset/ilsvrc_2012", "test", tmp_path)


# The HDF5 export


def export(tmp_path, images=(3, 2, 12, 4)):
    """Classes 2 (gauzy) and 3 (banded) are for testing."""
    root = tmp_path / "meta_dataset/dtd"
    names = ["chequered", "grid", "gauzy", "banded"]
    write_spec(root, flat_spec(names, (1, 1, 2), images))
    for number, count in enumerate(images):
        write_h5(root / f"{number}.h5", count, value=20 * number, size=(3 + number, 4))
    write_h5(root / "val_ep120_img128.h5", 0)  # P>M>F's validation tasks lie there too
    return root


def test_h5_exports_are_read_by_their_specification(tmp_path):
    export(tmp_path)
    dataset = load_dataset("meta_dataset/dtd", "test", tmp_path)
    assert dataset.class_names == ("banded", "gauzy")
    assert dataset.labels.tolist() == [0] * 4 + [1] * 12
    assert reds(dataset) == [60, 61, 62, 63, *range(40, 52)]  # 10 comes after 9
    assert dataset.open(0).size == (4, 6)
    assert dataset.files[5] == "2.h5/1"
    assert len(list(dataset.files)) == 16
    assert load_dataset("meta_dataset/dtd", "val", tmp_path).class_names == ("grid",)


def test_h5_images_are_read_by_many_threads_and_after_pickling(tmp_path):
    export(tmp_path)
    dataset = load_dataset("meta_dataset/dtd", "test", tmp_path)
    seen = {}
    threads = [
        threading.Thread(target=lambda t=t: seen.update({t: reds(dataset)})) for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen[t] == seen[0] for t in range(4))
    assert reds(pickle.loads(pickle.dumps(dataset))) == seen[0]


def test_few_h5_files_are_open_at_once(tmp_path, monkeypatch):
    from fastrecycle.data import h5

    monkeypatch.setattr(h5, "_MAX_OPEN", 1)
    export(tmp_path)
    dataset = load_dataset("meta_dataset/dtd", "test", tmp_path)
    assert [dataset.open(i).getpixel((0, 0))[0] for i in (0, 15, 1)] == [60, 51, 61]
    assert len(dataset.pixels._open) == 1


def test_h5_exports_without_a_specification_or_a_class_are_rejected(tmp_path):
    root = export(tmp_path)
    (root / "3.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*3\.h5; unpack the export again"):
        load_dataset("meta_dataset/dtd", "test", tmp_path)
    (root / "dataset_spec.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"HDF5 files but no dataset_spec.json"):
        load_dataset("meta_dataset/dtd", "test", tmp_path)


def test_h5_exports_in_archives_are_rejected(tmp_path):
    import zipfile

    root = export(tmp_path)
    with zipfile.ZipFile(tmp_path / "meta_dataset/omniglot.zip", "w") as archive:
        for path in root.iterdir():
            archive.write(path, path.name)
    with pytest.raises(ValueError, match="not read from archives; unpack it"):
        load_dataset("meta_dataset/omniglot", data_root=tmp_path)


def test_h5_without_h5py_says_what_to_install(tmp_path, monkeypatch):
    import sys

    export(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fastrecycle\[h5\]'"):
        load_dataset("meta_dataset/dtd", data_root=tmp_path)


@pytest.mark.parametrize("length", [0, 100, -1])
def test_h5_files_that_are_cut_short_are_rejected(tmp_path, length):
    path = export(tmp_path) / "3.h5"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"3\.h5 is not a whole HDF5 file"):
        load_dataset("meta_dataset/dtd", data_root=tmp_path)


@pytest.mark.parametrize(("count", "text"), [(0, "4 images, got 0"), (3, "4 images, got 3")])
def test_h5_classes_with_another_number_of_images_are_rejected(tmp_path, count, text):
    write_h5(export(tmp_path) / "3.h5", count)
    with pytest.raises(ValueError, match=text):
        load_dataset("meta_dataset/dtd", data_root=tmp_path)


def test_damaged_h5_files_raise_nothing_but_value_errors(tmp_path):
    write_h5(tmp_path / "0.h5", 3)
    whole = (tmp_path / "0.h5").read_bytes()
    rng = np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(damaged), 4):
            damaged[place] = rng.integers(256)
        path = tmp_path / f"{number}.h5"
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            images = H5Images([path], [None])
            for index in range(len(images)):
                images.read(index)


def outside(group, path):
    group["image"] = h5py.ExternalLink(str(path), "/0/image")


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda g, p: g.create_dataset("image", data=np.zeros((4, 4, 3), np.float32)), "float32"),
        (lambda g, p: g.create_dataset("image", data=np.zeros((4, 4), np.uint8)), r"\(4, 4\)"),
        (lambda g, p: g.create_dataset("image", data=np.zeros((0, 4, 3), np.uint8)), r"\(0, 4, 3"),
        (lambda g, p: g.create_dataset("image", (20000, 20000, 3), np.uint8), "more than"),
        (lambda g, p: g.create_group("image"), "a group, expected an array"),
        (lambda g, p: None, "it has no image"),
        (outside, "a link to another place; not read"),
        (lambda g, p: g.create_dataset("image", (4, 4, 3), np.uint8, external=str(p)),
         "lie in other files"),
    ],
)  # fmt: skip
def test_h5_images_of_another_kind_are_rejected(tmp_path, write, text):
    path = export(tmp_path) / "3.h5"
    with h5py.File(path, "a") as file:
        del file["1"]["image"]
        write(file["1"], tmp_path / "meta_dataset/dtd/2.h5")
    dataset = load_dataset("meta_dataset/dtd", data_root=tmp_path)
    dataset.open(0)
    with pytest.raises(ValueError, match=rf"3\.h5: 1/image is not a whole image \(.*{text}"):
        dataset.open(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.pop("class_names"),
        lambda spec: spec["class_names"].pop("0"),
        lambda spec: spec["class_names"].update({"0": "banded"}),
        lambda spec: spec["classes_per_split"].update(TEST=3),
        lambda spec: spec["images_per_class"].pop("2"),
        lambda spec: spec.update(images_per_class=[]),
    ],
)
def test_damaged_specifications_are_rejected(tmp_path, change):
    root = export(tmp_path)
    spec = json.loads((root / "dataset_spec.json").read_text())
    change(spec)
    write_spec(root, spec)
    with pytest.raises(ValueError, match=r"dataset_spec.json is not Meta-Dataset's specification"):
        load_dataset("meta_dataset/dtd", data_root=tmp_path)


def test_a_specification_by_alphabets_is_read(tmp_path):
    root = tmp_path / "meta_dataset/omniglot"
    spec = {
        "superclasses_per_split": {"TRAIN": 1, "VALID": 0, "TEST": 2},
        "classes_per_superclass": {"0": 1, "1": 2, "2": 1},
        "images_per_class": {str(i): 2 for i in range(4)},
        "superclass_names": {"0": "Greek", "1": "ULOG", "2": "Keble"},
        "class_names": {"0": "Greek-character01", "1": "ULOG-character01",
                        "2": "ULOG-character02", "3": "Keble-character01"},
        "file_pattern": "{}.tfrecords",
    }  # fmt: skip
    write_spec(root, spec)
    for number in range(4):
        write_h5(root / f"{number}.h5", 2)
    dataset = load_dataset("meta_dataset/omniglot", "test", tmp_path)
    assert dataset.class_names == (
        "Keble-character01", "ULOG-character01", "ULOG-character02",
    )  # fmt: skip
    assert dataset.groups.members == ((0,), (1, 2))


def test_a_specification_of_another_source_is_rejected(tmp_path):
    root = tmp_path / "meta_dataset/dtd"
    write_spec(root, flat_spec(["grid"], (0, 0, 1), [1]))
    write_images(root, "grid/0.jpg", "car/0.jpg")
    with pytest.raises(ValueError, match="has no class 'car'; it belongs to another source"):
        load_dataset("meta_dataset/dtd", data_root=tmp_path)


def test_slashes_of_aircraft_are_forgiven_in_folders(tmp_path):
    root = tmp_path / "meta_dataset/aircraft"
    write_spec(root, flat_spec(["F-16A/B", "A310"], (1, 0, 1), [1, 1]))
    write_images(root, "F-16A_B/0.jpg", "A310/0.jpg")
    assert load_dataset("meta_dataset/aircraft", "train", tmp_path).class_names == ("F-16A_B",)

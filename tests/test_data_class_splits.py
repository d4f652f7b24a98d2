"""Class splits that the package makes: their rule, and that folders of other splits give way."""

from importlib import resources

import numpy as np
import pytest
from PIL import Image

from fastrecycle.data import load_dataset
from fastrecycle.data.class_splits import read_class_split


def write_images(root, *names):
    for red, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (red, 0, 0)).save(root / name)


@pytest.mark.parametrize(
    ("name", "train", "val", "total"),
    [("tiny_imagenet", 114, 32, 178), ("omniglot_alphabets", 12, 3, 20)],
)
def test_recorded_splits_follow_their_rule(name, train, val, total):
    split_of = read_class_split(name)
    classes = sorted(split_of)
    assert len(classes) == total
    words = np.random.Philox(key=np.array([0, 0], np.uint64)).random_raw(total)
    order = [classes[i] for i in np.argsort(words, kind="stable")]
    assert {split_of[c] for c in order[:train]} == {"train"}
    assert {split_of[c] for c in order[train : train + val]} == {"val"}
    assert {split_of[c] for c in order[train + val :]} == {"test"}


def test_recorded_splits_say_their_rule():
    for file in resources.files("fastrecycle.data").joinpath("splits").iterdir():
        assert "# Rule:" in file.read_text("utf-8")


TRAIN, VAL, TEST = (
    next(c for c, of in read_class_split("tiny_imagenet").items() if of == split)
    for split in ("train", "val", "test")
)


def test_tiny_imagenet_as_published_is_split_by_class(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    of_22 = "n01698640"  # American alligator, in no split
    write_images(
        root,
        *(f"train/{c}/images/{c}_{i}.JPEG" for c in (TRAIN, VAL, TEST, of_22) for i in (0, 1)),
        "val/images/val_0.JPEG",
        "test/images/test_0.JPEG",
    )
    (root / "words.txt").write_text(f"{TEST}\tthing, other thing\n{TRAIN}\tone\n")
    (root / "val/val_annotations.txt").write_text(f"val_0.JPEG\t{TRAIN}\t0\t0\t62\t62\n")
    test = load_dataset("tiny_imagenet", "test", tmp_path)
    assert test.class_names == ("thing",)
    assert test.files == [f"train/{TEST}/images/{TEST}_{i}.JPEG" for i in (0, 1)]
    assert load_dataset("tiny_imagenet", "val", tmp_path).class_names == (VAL,)
    assert load_dataset("tiny_imagenet", "train", tmp_path).class_names == ("one",)
    # by its path, it is as it lies
    assert len(load_dataset(root, "train").class_names) == 4


def test_omniglot_s_evaluation_characters_are_split_by_alphabets(tmp_path):
    write_images(
        tmp_path / "omniglot",
        *(f"test/{of}_character01/{i}.png" for of in ("Keble", "Mongolian", "Tibetan")
          for i in (1, 2)),
    )  # fmt: skip
    names = [load_dataset("omniglot_alphabets", s, tmp_path).class_names
             for s in ("train", "val", "test")]  # fmt: skip
    assert names == [("Keble_character01",), ("Mongolian_character01",), ("Tibetan_character01",)]
    assert len(load_dataset("omniglot", "test", tmp_path).class_names) == 3


def test_a_set_without_any_listed_class_is_rejected(tmp_path):
    write_images(tmp_path / "tiny_imagenet", "train/cat/0.png")
    with pytest.raises(ValueError, match=r"none of the classes of the recorded split .* got cat"):
        load_dataset("tiny_imagenet", "train", tmp_path)


def test_absent_classes_are_warned_about(tmp_path, caplog):
    write_images(tmp_path / "tiny_imagenet", f"train/{TRAIN}/0.png")
    load_dataset("tiny_imagenet", "train", tmp_path)
    assert "tiny_imagenet, split train: 1 classes, the published split has 114" in caplog.text


def test_a_table_of_one_s_own_goes_before_the_recorded_split(tmp_path):
    write_images(tmp_path / "tiny_imagenet", "a.png")
    (tmp_path / "tiny_imagenet/mine.csv").write_text("filename,label,split\na.png,cat,test\n")
    assert load_dataset("tiny_imagenet", "test", tmp_path).class_names == ("cat",)

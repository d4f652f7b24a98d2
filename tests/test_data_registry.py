"""Registered sets: where they are looked for, what is said when absent, and downloads."""

import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fastrecycle.data import DATASETS, episodes, load_dataset


def class_folder(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)


def split_zip(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            with archive.open(name, "w") as file:
                Image.new("RGB", (4, 4)).save(file, "PNG")


@pytest.fixture(autouse=True)
def _no_data_root_from_outside(monkeypatch, request):
    if "data_root" not in request.fixturenames:
        monkeypatch.delenv("FASTRECYCLE_DATA", raising=False)


def test_the_paper_s_eight_sets_are_registered():
    sets = "cifar_fs mini_imagenet vgg_flower cub chestx isic eurosat crop_diseases"
    assert set(sets.split()) <= set(DATASETS)


def test_digits_are_packaged():
    dataset = load_dataset("digits")
    assert len(dataset) == 1797
    assert dataset.class_names == tuple("0123456789")
    image = dataset.open(0)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert np.array(image).max() in range(230, 256)


# Where files are looked for


def test_registered_sets_lie_under_the_data_root(tmp_path, monkeypatch):
    class_folder(tmp_path / "cub", "test/wren/0.png", "train/crow/0.png")
    assert load_dataset("cub", data_root=tmp_path).class_names == ("wren",)
    monkeypatch.setenv("FASTRECYCLE_DATA", str(tmp_path))
    assert load_dataset("cub", "train").class_names == ("crow",)


@pytest.mark.parametrize("file", ["cub_test.zip", "cub.zip"])
def test_registered_sets_are_found_as_archives(tmp_path, file):
    split_zip(tmp_path / file, "cub/test/wren/0.png")
    assert load_dataset("cub", data_root=tmp_path).name == "cub"


@pytest.mark.parametrize("file", ["cub_val.zip", "cub_validation.zip"])
def test_a_file_of_the_split_goes_before_one_of_all(tmp_path, file):
    split_zip(tmp_path / "cub.zip", "val/wren/0.png")
    split_zip(tmp_path / file, "val/crow/0.png")
    assert load_dataset("cub", "val", data_root=tmp_path).class_names == ("crow",)


def test_a_file_of_one_split_needs_no_split_folders(tmp_path, caplog):
    split_zip(tmp_path / "omniglot_test.zip", "a/0.png", "b/0.png")
    assert load_dataset("omniglot", data_root=tmp_path).class_names == ("a", "b")
    assert "no splits" not in caplog.text


def test_a_number_of_classes_unlike_the_published_is_warned_about(tmp_path, caplog):
    class_folder(tmp_path / "cub", "test/wren/0.png")
    load_dataset("cub", data_root=tmp_path)
    assert "cub, split test: 1 classes, the published split has 50" in caplog.text


# Absent sets and wrong arguments


def test_an_absent_set_says_what_to_put_where(tmp_path):
    split_zip(tmp_path / "cifar_fs_train.zip", "train/apple/0.png")
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("cifar_fs", "test", data_root=tmp_path)
    text = str(caught.value)
    assert f"looked in {tmp_path}, which has only cifar_fs_train.zip" in text
    assert "put cifar_fs/, cifar_fs.zip or cifar_fs_test.zip there" in text
    assert "SPLIT/CLASS/FILE" in text
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in text
    assert "download=True" in text
    assert "\n" not in text


def test_no_data_root_is_said():
    with pytest.raises(FileNotFoundError, match="give data_root or set FASTRECYCLE_DATA"):
        load_dataset("cub")


def test_a_data_root_that_is_no_folder_is_said(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="data_root must be a folder"):
        load_dataset("cub", data_root=tmp_path / "lost")
    monkeypatch.setenv("FASTRECYCLE_DATA", str(tmp_path / "lost"))
    with pytest.raises(FileNotFoundError, match="FASTRECYCLE_DATA must be a folder"):
        load_dataset("cub")


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(FileNotFoundError, match=r"one of cifar_fs, .*did you mean cifar_fs\?"):
        load_dataset("cifar-fs")


@pytest.mark.parametrize("split", ["dev", "", None, 3])
def test_an_unknown_split_is_rejected(split):
    with pytest.raises(ValueError, match="split must be one of train, val, test"):
        load_dataset("digits", split)


@pytest.mark.parametrize("source", [None, 3, {"images": []}])
def test_a_source_of_another_kind_is_rejected(source):
    with pytest.raises(TypeError, match="must be a registered name, a path or"):
        load_dataset(source)


def test_an_opened_set_is_returned_as_it_is():
    dataset = load_dataset("digits")
    assert load_dataset(dataset) is dataset


# Downloads: torchvision's place is taken by a stand-in that "downloads" a few files

CIFAR_NAMES = ["apple", "baby", "beaver", "train", "worm"]


def stand_in(calls):
    class CIFAR100:
        classes = CIFAR_NAMES

        def __init__(self, root, train, download):
            calls.append(("CIFAR100", train, download))
            (root / "cifar-100-python").mkdir(exist_ok=True)
            self.targets = [4, 3, 2, 1, 0, 1]
            red = np.arange(6, dtype=np.uint8) + 10 * train
            self.data = np.tile(red[:, None, None, None], (1, 32, 32, 3))

    def flowers(root, download):
        calls.append(("Flowers102", download))
        numbers = [1, 5, 9, 10, 5]
        class_folder(root / "flowers-102", *(f"jpg/image_{n:05d}.jpg" for n in range(1, 6)))
        savemat(root / "flowers-102" / "imagelabels.mat", {"labels": np.array([numbers])})

    def eurosat(root, download):
        calls.append(("EuroSAT", download))
        class_folder(root / "eurosat", "2750/River/River_1.jpg", "2750/Forest/Forest_1.jpg")

    datasets = types.ModuleType("torchvision.datasets")
    datasets.CIFAR100, datasets.Flowers102, datasets.EuroSAT = CIFAR100, flowers, eurosat
    package = types.ModuleType("torchvision")
    package.datasets = datasets
    return {"torchvision": package, "torchvision.datasets": datasets}


@pytest.fixture
def torchvision_calls(monkeypatch):
    calls = []
    for name, module in stand_in(calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_cifar_fs_is_downloaded_and_split_by_class(tmp_path, torchvision_calls):
    dataset = load_dataset("cifar_fs", "test", tmp_path, download=True)
    assert torchvision_calls == [("CIFAR100", True, True), ("CIFAR100", False, True)]
    assert dataset.class_names == ("baby", "worm")
    assert dataset.labels.tolist() == [1, 0, 0, 1, 0, 0]  # of both parts of CIFAR-100
    assert [dataset.open(i).getpixel((0, 0))[0] for i in range(6)] == [10, 13, 15, 0, 3, 5]
    assert dataset.files[4] == "cifar-100-python/test image 3"
    assert load_dataset("cifar_fs", "val", tmp_path).class_names == ("beaver",)
    assert load_dataset("cifar_fs", "train", tmp_path).class_names == ("apple", "train")
    assert torchvision_calls[-1] == ("CIFAR100", False, False)  # not downloaded again


def test_flowers_are_downloaded_and_split_by_class(tmp_path, torchvision_calls):
    dataset = load_dataset("vgg_flower", "test", tmp_path, download=True)
    assert torchvision_calls == [("Flowers102", True)]
    names = [dataset.class_names[label] for label in dataset.labels]
    assert names == ["english marigold", "monkshood", "english marigold"]
    assert dataset.files[2] == "jpg/image_00005.jpg"
    assert dataset.open(2).size == (4, 4)
    assert len(load_dataset("vgg_flower", "train", tmp_path)) == 1
    assert len(load_dataset("vgg_flower", "val", tmp_path)) == 1


def test_flowers_with_a_broken_table_are_rejected(tmp_path):
    (tmp_path / "flowers-102").mkdir()
    (tmp_path / "flowers-102" / "imagelabels.mat").write_bytes(b"x" * 200)
    with pytest.raises(ValueError, match=r"imagelabels.mat is not Flowers-102's"):
        load_dataset("vgg_flower", data_root=tmp_path)


def test_eurosat_is_downloaded(tmp_path, torchvision_calls):
    dataset = load_dataset("eurosat", "test", tmp_path, download=True)
    assert torchvision_calls == [("EuroSAT", True)]
    assert dataset.class_names == ("Forest", "River")
    assert dataset.labels.tolist() == [0, 1]
    assert load_dataset("eurosat", data_root=tmp_path).open(1).size == (4, 4)


def test_files_that_are_there_are_not_downloaded(tmp_path, torchvision_calls):
    split_zip(tmp_path / "cifar_fs_test.zip", "cifar_fs/test/baby/0.png")
    assert len(load_dataset("cifar_fs", "test", tmp_path, download=True)) == 1
    assert torchvision_calls == []


@pytest.mark.parametrize("error", [RuntimeError("File not found or corrupted"), OSError("no net")])
def test_a_download_that_fails_is_said(tmp_path, torchvision_calls, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(sys.modules["torchvision.datasets"], "CIFAR100", fail)
    with pytest.raises(OSError, match=f"cifar_fs could not be had from torchvision .{error}"):
        load_dataset("cifar_fs", data_root=tmp_path, download=True)


def test_a_download_without_torchvision_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RuntimeError, match="pip install torchvision"):
        load_dataset("cifar_fs", data_root=tmp_path, download=True)


def test_sets_without_a_direct_link_are_not_downloaded(tmp_path):
    with pytest.raises(ValueError, match="cub has no official direct link"):
        load_dataset("cub", data_root=tmp_path, download=True)
    with pytest.raises(ValueError, match="download=True takes one of cifar_fs, vgg_flower"):
        load_dataset(str(tmp_path), download=True)


def test_the_real_torchvision_takes_the_arguments_given_here():
    import inspect

    datasets = pytest.importorskip("torchvision.datasets")
    assert {"root", "train", "download"} <= set(inspect.signature(datasets.CIFAR100).parameters)
    for name in ("Flowers102", "EuroSAT"):
        assert {"root", "download"} <= set(inspect.signature(getattr(datasets, name)).parameters)


# The real archives


@pytest.mark.parametrize(
    ("name", "split", "images", "classes"),
    [
        ("cifar_fs", "train", 7680, 64),
        ("cifar_fs", "val", 1600, 16),
        ("cifar_fs", "test", 6000, 20),
        ("isic", "test", 1239, 5),
        ("omniglot", "test", 4000, 200),
        ("omniglot_alphabets", "train", 1880, 94),
        ("omniglot_alphabets", "val", 640, 32),
        ("omniglot_alphabets", "test", 1480, 74),
        ("tiny_imagenet", "train", 114 * 135, 114),
        ("tiny_imagenet", "val", 32 * 135, 32),
        ("tiny_imagenet", "test", 32 * 135, 32),
    ],
)
def test_real_archives_are_read_as_they_lie(data_root, name, split, images, classes):
    dataset = load_dataset(name, split, data_root)
    assert (len(dataset), len(dataset.class_names)) == (images, classes)
    assert np.unique(dataset.labels).tolist() == list(range(classes))
    assert dataset.open(len(dataset) - 1).mode == "RGB"


def test_real_archives_give_tasks(data_root):
    dataset = load_dataset("cifar_fs", "test", data_root)
    tasks = episodes(dataset.labels, ways=5, shots=5, queries=15, tasks=10, seed=0)
    sizes = {dataset.open(int(index)).size for index in tasks.images[:20]}
    assert sizes == {(32, 32)}


def test_real_class_folders_have_readable_names(data_root):
    assert "goldfish" in load_dataset("tiny_imagenet", "train", data_root).class_names


def test_the_class_split_of_downloads_is_that_of_the_archives(data_root):
    from fastrecycle.data.downloads import _CIFAR_FS

    for split, names in _CIFAR_FS.items():
        assert load_dataset("cifar_fs", split, data_root).class_names == tuple(names)


# The page for users


def table_rows():
    """First cell (without `), and the cell of class numbers, of the tables in docs/datasets.md."""
    page = Path(__file__).parents[1] / "docs" / "datasets.md"
    prefix = ""
    for line in page.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `meta_dataset/`"):
            prefix = "meta_dataset/"
        elif line.startswith("| name"):
            prefix = ""
        elif line.startswith("| `"):
            sizes = next((c for c in cells if re.fullmatch(r"[-\d]+ / [-\d]+ / [-\d]+", c)), None)
            yield prefix + cells[0].strip("`"), sizes


def test_the_page_lists_every_set_with_its_classes():
    listed = dict(table_rows())
    assert set(listed) == set(DATASETS)
    for name, info in DATASETS.items():
        if info.classes:
            sizes = (str(info.classes.get(split, "-")) for split in ("train", "val", "test"))
            assert listed[name] == " / ".join(sizes), name

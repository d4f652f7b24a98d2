"""Folders, archives and tables: layouts, and files that are unsafe or broken."""

import io
import json
import logging
import os
import pickle
import stat
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastrecycle.data import load_dataset, stores

SUFFIXES = ("", ".zip", ".tar", ".tar.gz")


def png(color=0, side=4):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tree(*names):
    """File -> bytes; each image has its position among the names as its red."""
    return {name: png(red) for red, name in enumerate(names)}


def pack(path, files):
    """Write files as the folder, zip, tar or tar.gz that the suffix of `path` says."""
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif path.name.endswith((".tar", ".gz", ".tgz")):
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def reds(dataset):
    return [dataset.open(index).getpixel((0, 0))[0] for index in range(len(dataset))]


SPLIT_TREE = tree(
    "test/cat/0.png", "test/cat/1.png", "test/dog/0.png", "train/fox/0.png", "val/owl/0.png"
)


# Layouts


@pytest.mark.parametrize("prefix", ["", "pets/", "a/b/"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_split_folders_are_read_from_any_container(tmp_path, suffix, prefix):
    files = {prefix + name: data for name, data in SPLIT_TREE.items()}
    path = pack(tmp_path / f"pets{suffix}", files)
    dataset = load_dataset(path, "test")
    assert (dataset.name, dataset.split, len(dataset)) == ("pets", "test", 3)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.files[2] == f"{prefix}test/dog/0.png"
    assert reds(dataset) == [0, 1, 2]
    assert load_dataset(str(path), "train").class_names == ("fox",)


@pytest.mark.parametrize("folder", ["val", "valid", "validation", "Validation"])
@pytest.mark.parametrize("asked", ["val", "valid", "validation"])
def test_split_names_have_synonyms(tmp_path, folder, asked):
    pack(tmp_path / "set", tree("train/cat/0.png", f"{folder}/dog/0.png"))
    dataset = load_dataset(tmp_path / "set", asked)
    assert (dataset.split, dataset.class_names) == ("val", ("dog",))


@pytest.mark.parametrize("prefix", ["", "pets/"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_class_folders_without_splits_are_all_splits_and_say_so_once(
    tmp_path, caplog, suffix, prefix
):
    # "train" is a class of CIFAR-100.
    path = pack(tmp_path / f"pets{suffix}", tree(f"{prefix}cat/0.png", f"{prefix}train/0.png"))
    for split in ("train", "val", "test"):
        dataset = load_dataset(path, split)
        assert dataset.class_names == ("cat", "train")
        assert dataset.split == split
    assert caplog.text.count("has no splits") == 1


def test_images_below_a_class_folder_belong_to_it(tmp_path):
    path = pack(tmp_path / "tiny", tree("train/n01/images/0.png", "train/n02/images/0.png"))
    assert load_dataset(path, "train").class_names == ("n01", "n02")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_junk_other_files_and_stray_images_are_ignored(tmp_path, caplog, suffix):
    caplog.set_level(logging.DEBUG, "fastrecycle")
    others = tree(
        "__MACOSX/test/cat/._0.png",
        "test/cat/._0.png",
        "test/.ipynb_checkpoints/0.png",
        "preview.png",
        "test/preview.png",
    ) | dict.fromkeys(("test/cat/.DS_Store", "test/cat/Thumbs.db", "README.md", "a.csv"), b"x,y")
    path = pack(tmp_path / f"pets{suffix}", SPLIT_TREE | others)
    assert load_dataset(path).files == ["test/cat/0.png", "test/cat/1.png", "test/dog/0.png"]
    assert "2 files are no images" in caplog.text
    assert "2 images lie in no class folder" in caplog.text


@pytest.mark.parametrize("place", ["class_names.json", "pets/class_names.json"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_class_names_are_read_and_repeated_ones_told_apart(tmp_path, suffix, place):
    names = {"n1": "tabby", "n2": "crane", "n3": "crane"}
    files = tree(*(f"pets/test/n{number}/0.png" for number in (4, 3, 2, 1)))
    path = pack(tmp_path / f"pets{suffix}", files | {place: json.dumps(names).encode()})
    # In the order of the folders' names.
    assert load_dataset(path).class_names == ("tabby", "crane (n2)", "crane (n3)", "n4")


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"cat": 3}', b"\xff\xfe"])
def test_class_names_that_are_no_names_are_rejected(tmp_path, content):
    path = pack(tmp_path / "pets", SPLIT_TREE | {"class_names.json": content})
    with pytest.raises(ValueError, match=r"class_names.json (is not JSON|must map)"):
        load_dataset(path)


def test_an_absent_split_is_an_error_that_lists_the_others(tmp_path):
    path = pack(tmp_path / "pets.zip", tree("pets/train/cat/0.png", "pets/val/dog/0.png"))
    with pytest.raises(ValueError, match=r"pets.zip has no split 'test', it has train, val"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["test/cat/0.png", "extra/dog/0.png"], "has extra beside the splits test"),
        (["test/0.png", "train/0.png"], "test, train must hold class folders"),
        (["0.png", "1.png"], r"no images in class folders \(2 outside"),
        (["cat/0.txt"], r"no images in class folders \(0 outside"),
    ],
)
def test_layouts_that_cannot_be_read_are_rejected(tmp_path, names, text):
    path = pack(tmp_path / "pets", tree(*names))
    with pytest.raises(ValueError, match=text):
        load_dataset(path)


def test_an_empty_folder_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="no images in class folders"):
        load_dataset(tmp_path)


def test_links_in_a_folder_are_followed_but_not_in_circles(tmp_path):
    pack(tmp_path / "images", tree("0.png", "1.png"))
    (tmp_path / "pets").mkdir()
    try:
        os.symlink(tmp_path / "images", tmp_path / "pets" / "cat")
        os.symlink(tmp_path / "pets", tmp_path / "images" / "loop")
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")
    assert load_dataset(tmp_path / "pets").files == ["cat/0.png", "cat/1.png"]


def test_names_outside_ascii_are_read(tmp_path):
    path = pack(tmp_path / "pets.zip", tree("pets/test/größe/ñ 0.png"))
    assert load_dataset(path).class_names == ("größe",)


# Tables

TABLE = "filename,label,split\na.png,cat,train\nb.png,dog,test\nsub/c.png,cat,validation\n"


def table_files(table, name="labels.csv", folder=""):
    return tree(f"{folder}a.png", f"{folder}b.png", f"{folder}sub/c.png") | {name: table.encode()}


@pytest.mark.parametrize("folder", ["", "images/"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tables_are_read_from_any_container(tmp_path, suffix, folder):
    path = pack(tmp_path / f"pets{suffix}", table_files(TABLE, folder=folder))
    assert load_dataset(path, "train").files == [f"{folder}a.png"]
    assert load_dataset(path, "val").files == [f"{folder}sub/c.png"]
    assert reds(load_dataset(path, "test")) == [1]


def test_a_table_is_read_by_its_path(tmp_path, caplog):
    content = "\ufeffLabel, FILENAME\r\n10,a.png\r\n\r\n9,b.png\r\n"
    pack(tmp_path, table_files(content, "few.csv") | {"other.csv": b"filename,label\n"})
    dataset = load_dataset(tmp_path / "few.csv")
    assert (dataset.name, dataset.files) == ("few", ["a.png", "b.png"])
    assert dataset.class_names == ("10", "9")
    assert "has no splits" in caplog.text


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tables_named_by_split_are_read(tmp_path, suffix):
    # mini-ImageNet as published: images/ and three tables.
    files = tree("mini/images/a.png", "mini/images/b.png", "mini/images/c.png")
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        files[f"mini/{split}.csv"] = f"filename,label\n{name}.png,n{name}\n".encode()
    path = pack(tmp_path / f"mini{suffix}", files)
    assert load_dataset(path, "val").class_names == ("nb",)
    assert load_dataset(path, "test").files == ["mini/images/c.png"]


def test_a_table_of_one_split_gives_no_other(tmp_path):
    pack(tmp_path, table_files("filename,label\na.png,cat\n", "train.csv"))
    with pytest.raises(ValueError, match=r"train.csv has no split 'test', it has train"):
        load_dataset(tmp_path / "train.csv", "test")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("file,label\na.png,cat\n", "must have the columns filename and label, got file, label"),
        ("", "got none"),
        ("filename,label\n", "has no rows"),
        ("filename,label\na.png\n", "line 2 must have 2 values, got 1"),
        ("filename,label\na.png, \n", "line 2: label is empty"),
        ("filename,label\na.png,cat\na.png,dog\n", "line 3: a.png is listed before, at .* line 2"),
        ("filename,label,split\na.png,cat,dev\n", "split must be train, val or test, got 'dev'"),
        ("filename,label\n../a.png,cat\n", r"'../a.png' lies outside"),
        ("filename,label\n/etc/a.png,cat\n", r"'/etc/a.png' lies outside"),
        ("filename,label\na.txt,cat\n", "filename must end in .jpg"),
        ('filename,label\n"a.png,cat\n', "is not a CSV in UTF-8"),
    ],
)
def test_tables_that_cannot_be_read_are_rejected(tmp_path, content, text):
    pack(tmp_path, table_files(content))
    with pytest.raises(ValueError, match=text):
        load_dataset(tmp_path / "labels.csv")


def test_a_table_in_another_encoding_is_rejected(tmp_path):
    pack(tmp_path, tree("a.png") | {"labels.csv": "filename,label\na.png,ñ\n".encode("utf-16")})
    with pytest.raises(ValueError, match=r"labels\.csv is not a CSV in UTF-8"):
        load_dataset(tmp_path / "labels.csv")


def test_a_table_names_the_image_that_is_absent(tmp_path):
    pack(tmp_path, table_files("filename,label\na.png,cat\nlost.png,dog\n"))
    with pytest.raises(FileNotFoundError, match=r"line 3: no file lost.png or images/lost.png"):
        load_dataset(tmp_path / "labels.csv")


def test_several_tables_need_a_choice(tmp_path):
    one = "filename,label\na.png,cat\n"
    pack(tmp_path, table_files(one, "one.csv") | table_files(one, "two.csv"))
    with pytest.raises(ValueError, match=r"several tables \(one.csv, two.csv\)"):
        load_dataset(tmp_path)


# Unsafe archives

ESCAPES = ["../evil.png", "pets/../../evil.png", "/etc/evil.png", "C:/evil.png", "..\\evil.png"]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
@pytest.mark.parametrize("name", ESCAPES)
def test_members_that_escape_are_refused(tmp_path, suffix, name):
    path = pack(tmp_path / f"pets{suffix}", SPLIT_TREE | {name: png()})
    with pytest.raises(ValueError, match=r"member '.*evil.png' lies outside its folder"):
        load_dataset(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # nothing is extracted


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (tarfile.SYMTYPE, "link"),
        (tarfile.LNKTYPE, "link"),
        (tarfile.CHRTYPE, "special file"),
        (tarfile.BLKTYPE, "special file"),
        (tarfile.FIFOTYPE, "special file"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, suffix, kind, text):
    path = tmp_path / f"pets{suffix}"
    with tarfile.open(path, "w" if suffix == ".tar" else "w:gz") as archive:
        member = tarfile.TarInfo("test/cat/evil.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ValueError, match=f"member 'test/cat/evil.png' is a {text}"):
        load_dataset(path)


@pytest.mark.parametrize(("kind", "text"), [(stat.S_IFLNK, "link"), (stat.S_IFCHR, "special file")])
def test_links_and_devices_in_a_zip_are_refused(tmp_path, kind, text):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        member = zipfile.ZipInfo("test/cat/evil.png")
        member.external_attr = (kind | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(ValueError, match=f"member 'test/cat/evil.png' is a {text}"):
        load_dataset(tmp_path / "pets.zip")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_inflate_too_far_are_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(stores, "MAX_FILE_BYTES", 2**20)
    path = pack(tmp_path / f"pets{suffix}", SPLIT_TREE | {"test/cat/big.png": bytes(2**20 + 1)})
    with pytest.raises(ValueError, match=r"big.png' has .*1,048,57[67].* bytes"):
        reds(load_dataset(path))  # archives are refused on opening, a folder's file on reading


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_archives_too_large_in_all_are_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(stores, "MAX_ARCHIVE_BYTES", 300)
    path = pack(tmp_path / f"pets{suffix}", SPLIT_TREE)
    with pytest.raises(ValueError, match="members have more than 300 bytes in all"):
        load_dataset(path)


def test_a_compressed_tar_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MAX_HELD_BYTES", 100)
    path = pack(tmp_path / "pets.tar.gz", SPLIT_TREE)
    with pytest.raises(ValueError, match=r"limit is 100; pack it as .zip or .tar"):
        load_dataset(path)


def test_a_zip_header_that_lies_about_the_size_is_found_out(tmp_path):
    path = pack(tmp_path / "pets.zip", {"test/cat/0.png": bytes(4000)})
    data = path.read_bytes()
    path.write_bytes(data.replace((4000).to_bytes(4, "little"), (9).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"pets.zip, member 'test/cat/0.png' is not a complete"):
        load_dataset(path).open(0)


def test_a_tar_header_of_gigabytes_is_refused(tmp_path, monkeypatch):
    # tarfile reads the name that follows such a header in one go.
    monkeypatch.setattr(stores, "MAX_FILE_BYTES", 2**16)
    path = tmp_path / "pets.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("x" * 2**17))
    with pytest.raises(ValueError, match=r"a header of .* bytes, the limit is 65,536"):
        load_dataset(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods_without_a_bound_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w", method) as archive:
        archive.writestr("test/cat/0.png", png())
    with pytest.raises(ValueError, match="must be stored or deflated"):
        load_dataset(tmp_path / "pets.zip")


def test_encrypted_members_are_refused(tmp_path):
    path = pack(tmp_path / "pets.zip", {"test/cat/0.png": png()})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"member 'test/cat/0\.png' is encrypted"):
        load_dataset(path)


def test_a_tar_with_holes_is_refused(tmp_path):
    path = tmp_path / "pets.tar"
    member = tarfile.TarInfo("test/cat/0.png")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(ValueError, match="is a special file"):
        load_dataset(path)


# Broken archives


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
@pytest.mark.parametrize("part", [0, 0.02, 0.3, 0.5, 0.7, 0.9])
def test_archives_cut_short_are_rejected(tmp_path, suffix, part):
    noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    files = {f"test/cat/{number}.png": noise for number in range(5)}
    path = pack(tmp_path / f"pets{suffix}", files)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=r"pets.* is not a complete (zip|tar) archive"):
        load_dataset(path)


def test_a_tar_cut_between_two_members_is_rejected(tmp_path):
    path = pack(tmp_path / "pets.tar", SPLIT_TREE)
    path.write_bytes(path.read_bytes()[: 2 * 1024])  # a header and a block of data each
    with pytest.raises(ValueError, match=r"its end mark is missing"):
        load_dataset(path)


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_files_that_are_no_archives_are_rejected(tmp_path, suffix):
    path = tmp_path / f"pets{suffix}"
    path.write_bytes(b"<html>404 not found</html>" * 100)
    with pytest.raises(ValueError, match=r"is not a complete (zip|tar) archive"):
        load_dataset(path)


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_damaged_archives_raise_nothing_but_clear_errors(tmp_path, suffix):
    data = pack(tmp_path / f"whole{suffix}", SPLIT_TREE).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f"pets{suffix}"
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            reds(load_dataset(path))
        except ValueError as error:
            unnamed = "pets" not in str(error)
            if unnamed:
                raise


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_broken_image_is_named(tmp_path, suffix):
    path = pack(tmp_path / f"pets{suffix}", SPLIT_TREE | {"test/cat/1.png": png(side=64)[:-30]})
    dataset = load_dataset(path)
    assert dataset.open(0).size == (4, 4)
    with pytest.raises(ValueError, match=r"test/cat/1.png in .*pets.* is not a whole image"):
        list(dataset.images([0, 1], lambda image: torch.zeros(1)))


def test_other_files_are_rejected(tmp_path):
    (tmp_path / "pets.rar").write_bytes(b"Rar!")
    with pytest.raises(ValueError, match=r"must be a folder, a .csv or an archive \(.zip, .tar"):
        load_dataset(tmp_path / "pets.rar")


# Threads and processes


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reading_is_safe_from_several_threads(tmp_path, suffix):
    path = pack(tmp_path / f"pets{suffix}", tree(*(f"test/cat/{n:03d}.png" for n in range(200))))
    dataset = load_dataset(path)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(reds(dataset) == list(range(200))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_datasets_of_files_can_be_pickled(tmp_path, monkeypatch, suffix):
    pack(tmp_path / f"pets{suffix}", SPLIT_TREE)
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(load_dataset(f"pets{suffix}"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # as another process may stand
    assert reds(pickle.loads(content)) == [0, 1, 2]

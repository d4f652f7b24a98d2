"""Files are whole or absent, and damaged ones are told from good ones."""

import errno
import hashlib
import os
import pickle

import numpy as np
import pytest
import torch

from fastrecycle import files


class Bomb:
    """Unpickling it would run code."""

    def __reduce__(self):
        return os.mkdir, ("pickle-was-executed",)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_atomic_write_takes_bytes_text_and_a_writer(tmp_path):
    for content in (b"abc", "abc", lambda stream: stream.write(b"abc")):
        files.atomic_write(tmp_path / "deep" / "file", content)
        assert (tmp_path / "deep" / "file").read_bytes() == b"abc"
    assert names(tmp_path / "deep") == ["file"]


def test_atomic_write_keeps_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "file"
    files.atomic_write(path, b"old")

    def fail(stream):
        stream.write(b"new, half")
        stream.flush()
        assert path.read_bytes() == b"old"  # nothing is visible before the end
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_save_safetensors_keeps_the_old_file_on_a_full_disk(tmp_path, monkeypatch, fails):
    path = tmp_path / "x.safetensors"
    files.save_safetensors(path, {"x": torch.ones(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            files.save_safetensors(path, {"x": torch.zeros(3)})
    assert files.load_safetensors(path)[0]["x"].tolist() == [1, 1, 1]
    assert names(tmp_path) == ["x.safetensors"]


def test_safetensors_round_trip_of_views_dtypes_and_metadata(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "all": base,
        "row": base[1],  # shares memory with the first, which safetensors itself refuses
        "column": base[:, 2],  # not contiguous
        "bytes": torch.arange(4, dtype=torch.uint8),
        "empty": torch.zeros(0, 2, dtype=torch.float64),
        "half": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    }
    files.save_safetensors(tmp_path / "x.safetensors", tensors, {"a": "ä"})
    loaded, metadata = files.load_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"a": "ä"}
    assert set(loaded) == set(tensors)
    for name, x in tensors.items():
        assert loaded[name].dtype == x.dtype
        assert torch.equal(loaded[name], x)


def test_load_safetensors_rejects_damaged_files(tmp_path):
    path = tmp_path / "x.safetensors"
    files.save_safetensors(path, {"x": torch.arange(64.0)})
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:20], whole[:-1], b"\xff" * 8 + whole[8:], b"PK" * 50):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected a complete safetensors file") as error:
            files.load_safetensors(path)
        assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.load_safetensors(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.load_safetensors(tmp_path)


def test_load_torch_never_executes_a_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "x": Bomb()}, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "bad.pt").read_bytes()[:100])
    for name in ("bad.pt", "plain.pt", "cut.pt"):
        with pytest.raises(ValueError, match="expected a checkpoint of plain tensors"):
            files.load_torch(tmp_path / name)
    assert not (tmp_path / "pickle-was-executed").exists()
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    assert files.load_torch(tmp_path / "good.pt")["w"].tolist() == [1, 1]
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.load_torch(tmp_path / "absent.pt")


def test_json_round_trip_and_damage(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"b": 1, "a": [1.5, None]})
    assert files.read_json(path) == {"a": [1.5, None], "b": 1}
    path.write_text("{")
    with pytest.raises(ValueError, match="expected a JSON file"):
        files.read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected a JSON file"):
        files.read_json(path)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "absent.json")


def test_sha256_of_files_and_folders(tmp_path):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "x"
    file.write_bytes(b"abc")  # the standard's own example
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(file) == known
    before = files.sha256(tmp_path)
    assert before != known
    file.rename(tmp_path / "a" / "y")
    assert files.sha256(tmp_path) != before  # names count
    big = np.random.default_rng(0).bytes((1 << 20) + 17)  # more than one read
    file.write_bytes(big)
    assert files.sha256(file) == hashlib.sha256(big).hexdigest()


def test_same_content_same_bytes(tmp_path):
    """safetensors itself orders metadata anew in every call."""
    tensors, metadata = {"x": torch.arange(5.0)}, {key: f"ä {key}" for key in "hgfedcba"}
    for i in range(4):
        files.save_safetensors(tmp_path / f"{i}", tensors, metadata)
    first = (tmp_path / "0").read_bytes()
    assert all((tmp_path / f"{i}").read_bytes() == first for i in range(4))
    loaded, told = files.load_safetensors(tmp_path / "0")
    assert told == metadata
    assert torch.equal(loaded["x"], tensors["x"])


def test_remove_unfinished_takes_nothing_else(tmp_path):
    kept = ["file", ".hidden", ".notes.tmp", "x.abcd1234.tmp", ".file.short.tmp"]
    for name in (*kept, ".file.abcd1234.tmp"):
        (tmp_path / name).touch()
    files.remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted(kept)

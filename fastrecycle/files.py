"""Files that are either whole or absent: atomic writes, checked safetensors reads, SHA-256."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor


@contextlib.contextmanager
def atomic_open(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` only once it is complete and on disk.

    A kill at any moment leaves either the old file or the new one. On an error (a full disk, say)
    the unfinished copy is removed and `path` keeps its old contents.

    Raises:
        OSError: the folder cannot be written, or the disk is full.

    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(unfinished, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


def atomic_write(path: str | Path, content: bytes | str | Callable[[IO[bytes]], Any]) -> None:
    """Write bytes, text, or whatever `content(stream)` writes, to `path`, atomically."""
    with atomic_open(path) as stream:
        if callable(content):
            content(stream)
        else:
            stream.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it is not JSON.

    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a JSON file, got {error}") from None
    return parse_json(text, f"{path}: expected a JSON file")


def parse_json(text: str, expected: str) -> Any:
    """The value of a JSON text from anywhere.

    Args:
        text: to be parsed.
        expected: begins the message, such as "FILE: expected a JSON file".

    Raises:
        ValueError: it is not JSON, nested too deeply, or has half a character, which nothing can
            write again.

    """
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # ValueError also of a number too long
        raise ValueError(f"{expected}, got {error}") from None


def safetensors_content(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Named tensors as the bytes of a safetensors file; the same content, the same bytes."""
    # .clone() of views: safetensors refuses tensors that share storage
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = safetensors_bytes(plain, dict(metadata) if metadata else None)
    if not metadata or len(metadata) < 2:
        return content
    # the library writes metadata in the order of a hash table, another one in every call
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[start:]


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as one safetensors file, atomically."""
    atomic_write(path, safetensors_content(tensors, metadata))


def is_url(path: str | Path) -> bool:
    """Whether a location is one of `fsspec`'s, such as s3://bucket/pool, not of this machine."""
    return "://" in str(path)


class Folder:
    """A folder of this machine, or of any file system that `fsspec` knows, by its URL.

    A file in it is whole or absent: written beside and renamed here, uploaded in one piece there.

    Raises:
        ImportError: a URL whose file system needs a package that is not installed.

    """

    def __init__(self, location: str | Path):
        self.location = str(location)
        self.url = is_url(location)
        if self.url:
            from fsspec.core import url_to_fs

            self.fs, self.root = url_to_fs(self.location)

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.location,)

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file directly in it; none where it does not exist."""
        if self.url:
            self.fs.invalidate_cache()
            if not self.fs.exists(self.root):
                return {}
            found = self.fs.ls(self.root, detail=True)
            return {x["name"].rpartition("/")[2]: x["size"] for x in found if x["type"] == "file"}
        if not os.path.isdir(self.location):
            return {}
        with os.scandir(self.location) as entries:
            return {e.name: e.stat().st_size for e in entries if e.is_file()}

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        if self.url:
            self.fs.invalidate_cache()
            return bool(self.fs.exists(f"{self.root}/{name}"))
        return os.path.isfile(os.path.join(self.location, name))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, atomically."""
        if not self.url:
            atomic_write(Path(self.location) / name, content)
            return
        self.fs.makedirs(self.root, exist_ok=True)
        self.fs.pipe_file(f"{self.root}/{name}", content)

    def read_json(self, name: str, absent: Any) -> Any:
        """The value in a JSON file, or `absent` where there is no such file."""
        try:
            return read_json(self.local(name))
        except FileNotFoundError:
            return absent

    def local(self, name: str) -> Path:
        """A file's path on this machine; from a URL it is copied into a cache, once.

        Raises:
            FileNotFoundError: it is absent.

        """
        if not self.url:
            return Path(self.location) / name
        path = f"{self.root}/{name}"
        try:
            when = self.fs.modified(path)
        except NotImplementedError:  # fsspec's, of a file system that keeps no times
            when = self.fs.ukey(path)
        # tells a file from one of the same name that was written again
        version = hashlib.sha256(f"{self.location} {when}".encode()).hexdigest()
        cached = _url_cache() / version / name
        if not cached.exists():
            with self.fs.open(path, "rb") as source, atomic_open(cached) as target:
                shutil.copyfileobj(source, target)
        return cached


@functools.cache
def _url_cache() -> Path:
    """A folder for copies of remote files, gone with this process."""
    folder = tempfile.mkdtemp(prefix="fastrecycle-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def remove_unfinished(folder: str | Path) -> None:
    """Remove the copies that a kill in the middle of `atomic_open` left in a folder."""
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}\.tmp", path.name):
            path.unlink(missing_ok=True)


def load_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file into (tensors on the CPU, metadata).

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it is truncated or not a safetensors file.

    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            return tensors, dict(stream.metadata() or {})
    except (SafetensorError, ValueError, OSError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected a complete safetensors file, got {path.stat().st_size} bytes that do"
            f" not parse ({error}); download or write it again"
        ) from None


def save_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the state of unfinished work as safetensors with a SHA-256 of it, atomically."""
    save_safetensors(path, tensors, {**metadata, "sha256": _state_sha256(tensors, metadata)})


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_checkpoint` wrote; a bit that changed on the disk shows.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it is damaged, or no checkpoint of this version.

    """
    try:
        tensors, metadata = load_safetensors(path)
    except ValueError as error:
        raise ValueError(f"{path}: a damaged checkpoint; remove it to restart ({error})") from None
    told = metadata.pop("sha256", None)
    if told != _state_sha256(tensors, metadata):
        raise ValueError(
            f"{path}: a damaged checkpoint, or one of another version: its SHA-256 does not match;"
            " remove it to restart what it was of"
        )
    return tensors, metadata


def _state_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = tensors_sha256(sorted(tensors.items()))
    return hashlib.sha256(f"{digest} {sorted(metadata.items())}".encode()).hexdigest()


def load_torch(path: str | Path) -> Any:
    """Read a `.pt`/`.bin` checkpoint with `weights_only=True`: nothing in it is ever executed.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it is damaged, holds pickled objects other than tensors and plain containers, or
            tensors without numbers of their own (sparse, meta, expanded beyond their storage), of
            which a small file could claim terabytes.

    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: expected a checkpoint of plain tensors, got a file that cannot be read with"
            f" weights_only=True ({reason}); save the state dict alone, as safetensors"
        ) from None
    for x in _tensors(content):
        if x.layout != torch.strided or x.is_meta or x.nbytes > x.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: expected a checkpoint of plain tensors, got a {x.layout} tensor of shape"
                f" {tuple(x.shape)} whose numbers are not in the file; save it .contiguous()"
            )
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in nested containers, which may hold themselves."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, or of a folder's files (names and contents, in sorted order)."""
    path = Path(path)
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hex SHA-256 of names, shapes and numbers, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in named:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\0".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())  # bfloat16 too
    return digest.hexdigest()

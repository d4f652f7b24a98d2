"""Where files lie: a folder, a zip or a tar, read in place; nothing is extracted to disk.

Archives are untrusted: names that leave the archive's folder, links and devices are refused, and
sizes are bounded by the headers and again while reading.
"""

from __future__ import annotations

import functools
import gzip
import os
import re
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

# The largest images of the registered sets (ISIC) are under 20 MiB.
MAX_FILE_BYTES = 64 * 2**20
# ChestX-ray14 is 45 GB.
MAX_ARCHIVE_BYTES = 64 * 2**30
# A compressed tar has no random access, so the files of a split are held in memory.
MAX_HELD_BYTES = 4 * 2**30

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
PICKLE_SUFFIXES = (".pkl", ".pickle")

_JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini"}
# A broken archive or a wrong file: what zipfile, tarfile and gzip raise.
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    struct.error,
    EOFError,
    RecursionError,  # tarfile's, of a thousand long-name headers in a row
    NotImplementedError,  # zipfile's, of a compression or encryption that it does not know
    UnicodeDecodeError,
)


class Store(Protocol):
    """A tree of files, named by relative paths with forward slashes."""

    path: Path

    @property
    def names(self) -> list[str]:
        """Of regular files, sorted, junk left out."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def hold(self, names: Iterable[str]) -> None:
        """Make reading these files fast, in one pass where the format has no random access."""
        ...

    def read(self, name: str) -> bytes:
        """All bytes of a file; safe to call from several threads."""
        ...


def open_store(path: Path) -> Store:
    """The folder or archive at `path`, told by its suffix.

    Raises:
        ValueError: another kind of file, or a broken or unsafe archive.

    """
    if path.is_dir():
        return Folder(path)
    name = path.name.lower()
    if name.endswith(".zip"):
        return Zip(path)
    if name.endswith((".tar.gz", ".tgz")):
        return CompressedTar(path)
    if name.endswith(".tar"):
        return Tar(path)
    if name.endswith(PICKLE_SUFFIXES):
        raise pickle_refused(path)
    raise ValueError(
        f"load_dataset: {path} must be a folder, a .csv or an archive "
        f"({', '.join(ARCHIVE_SUFFIXES)})"
    )


def pickle_refused(where: object) -> ValueError:
    """The error for a set that is a pickle, as some copies of mini-ImageNet are."""
    return ValueError(
        f"load_dataset: {where} is a pickle; not opened, as that runs whatever code it holds; give "
        "the images as class folders, or with train.csv, val.csv, test.csv (filename,label) beside "
        "images/"
    )


def safe_name(name: str, where: object) -> str:
    """`name` with forward slashes and without empty or '.' parts.

    Raises:
        ValueError: an absolute name, or one with '..' or a NUL in it.

    """
    path = name.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or re.match("[A-Za-z]:", path) or ".." in parts or "\0" in path:
        raise ValueError(
            f"load_dataset: {where}: member {name!r} lies outside its folder; not read"
        )
    return "/".join(parts)


def is_junk(name: str) -> bool:
    """Whether a file is an operating system's or an editor's own (hidden, __MACOSX, Thumbs.db)."""
    return any(part in _JUNK or part.startswith(".") for part in name.split("/"))


class Folder:
    """Files under a folder; links within it are followed, as the folder is the user's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @functools.cached_property
    def names(self) -> list[str]:
        """Relative paths of all files, sorted."""
        root = os.path.realpath(self.path)
        return sorted(self._walk("", (root,)))

    def _walk(self, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
        for entry in os.scandir(self.path / prefix):
            name = f"{prefix}{entry.name}"
            if is_junk(name):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in above:  # a link to a folder above: endless
                    yield from self._walk(f"{name}/", (*above, real))
            elif entry.is_file():
                yield name

    def __getstate__(self) -> dict[str, Any]:
        """Pickle with the whole path: the other process may stand in another folder."""
        return {**self.__dict__, "path": self.path.absolute()}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(self.path / name)  # also false of a name too long for the system

    def hold(self, names: Iterable[str]) -> None:
        """Nothing to do: files are read at random."""

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with open(self.path / name, "rb") as file:
            return _read_bounded(file, name, self.path)


class Zip:
    """A zip, read through one handle under a lock; images are decoded outside of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with _complete(path, "zip archive"):
            self._zip = zipfile.ZipFile(path)
        self._members: dict[str, zipfile.ZipInfo] = {}
        length = path.stat().st_size
        total = 0
        for info in self._zip.infolist():
            name = safe_name(info.orig_filename, path)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(
                    f"load_dataset: {path}: member {info.filename!r} is a "
                    f"{'link' if kind == stat.S_IFLNK else 'special file'}; not read"
                )
            if info.filename.endswith("/") or is_junk(name):
                continue
            if info.flag_bits & 1:
                raise ValueError(f"load_dataset: {path}: member {name!r} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # bz2 and lzma members inflate without a bound on one read.
                raise ValueError(
                    f"load_dataset: {path}: member {name!r} must be stored or deflated, got "
                    f"compression method {info.compress_type}; pack the archive again"
                )
            if not 0 <= info.header_offset < length:
                raise ValueError(
                    f"load_dataset: {path} is not a complete zip archive: member {name!r} starts "
                    "outside of it; copy or download it again"
                )
            total = _add_size(total, info.file_size, name, path)
            self._members[name] = info
        self.names = sorted(self._members)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the whole path: the handle is opened again, perhaps from another folder."""
        return Zip, (self.path.absolute(),)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._members

    def hold(self, names: Iterable[str]) -> None:
        """Nothing to do: files are read at random."""

    def read(self, name: str) -> bytes:
        """All bytes of a file; zipfile checks its CRC."""
        with (
            _complete(self.path, "zip archive", name),
            self._lock,
            self._zip.open(self._members[name]) as file,
        ):
            return _read_bounded(file, name, self.path)


class Tar:
    """An uncompressed tar: offsets from one pass over its headers, then read at random."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        with open(path, "rb") as file:
            for name, member, _ in _tar_members(file, path):
                self._places[name] = (member.offset_data, member.size)
        self.names = sorted(self._places)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle with the whole path: the other process may stand in another folder."""
        return {**self.__dict__, "path": self.path.absolute()}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._places

    def hold(self, names: Iterable[str]) -> None:
        """Nothing to do: files are read at random."""

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        offset, size = self._places[name]
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError(f"load_dataset: {self.path} is cut short within member {name!r}")
        return data


class CompressedTar:
    """A tar.gz: one pass lists it, another holds the files asked for in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sizes: dict[str, int] = {}
        self._held: dict[str, bytes] = {}
        with gzip.open(path, "rb") as file:
            for name, member, _ in _tar_members(file, path):
                self._sizes[name] = member.size
        self.names = sorted(self._sizes)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle with the whole path: the other process may stand in another folder."""
        return {**self.__dict__, "path": self.path.absolute()}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._sizes

    def hold(self, names: Iterable[str]) -> None:
        """Read these files into memory, in one pass.

        Raises:
            ValueError: together they are larger than MAX_HELD_BYTES.

        """
        wanted = set(names) - self._held.keys()
        total = sum(self._sizes[name] for name in wanted)
        if total > MAX_HELD_BYTES:
            raise ValueError(
                f"load_dataset: {self.path}: {total:,} bytes would be held in memory, the limit "
                f"is {MAX_HELD_BYTES:,}; pack it as .zip or .tar, which are read at random"
            )
        if not wanted:
            return
        with _complete(self.path, "tar archive"), gzip.open(self.path, "rb") as file:
            for name, member, tar in _tar_members(file, self.path):
                if name in wanted:
                    content = tar.extractfile(member)
                    assert content is not None  # a regular file: _tar_members yields no others
                    self._held[name] = _read_bounded(content, name, self.path)

    def read(self, name: str) -> bytes:
        """All bytes of a file, from memory once held."""
        if name not in self._held:
            self.hold([name])
        return self._held[name]


class _BoundedReads:
    """A file whose single reads are bounded: tarfile reads a long-name header in one go."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self.last = b""  # what the last read gave; a whole tar ends with a block of zeros
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_FILE_BYTES:
            raise ValueError(
                f"load_dataset: {self._path}: a header of {size:,} bytes, the limit is "
                f"{MAX_FILE_BYTES:,}; not read"
            )
        self.last = self._file.read(size)
        return self.last


def _tar_members(file: Any, path: Path) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
    """Regular files of a tar in its order, checked; the same name again replaces the first."""
    total = 0
    reads = _BoundedReads(file, path)
    with _complete(path, "tar archive"):
        with tarfile.TarFile(fileobj=reads, mode="r") as tar:  # type: ignore[arg-type]
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or every header is kept
                name = safe_name(member.name, path)
                if member.size < 0:  # tarfile would go back and read in circles
                    raise ValueError(
                        f"load_dataset: {path}: member {member.name!r} has {member.size} bytes"
                    )
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    kind = "link" if member.issym() or member.islnk() else "special file"
                    raise ValueError(
                        f"load_dataset: {path}: member {member.name!r} is a {kind}; not read"
                    )
                if is_junk(name):
                    continue
                total = _add_size(total, member.size, name, path)
                yield name, member, tar
        if len(reads.last) != tarfile.BLOCKSIZE or any(reads.last):
            # tarfile takes a broken header after the first for the end, without a word.
            raise ValueError(
                f"load_dataset: {path} is not a complete tar archive: its end mark is missing; "
                "copy or download it again"
            )


def _add_size(total: int, size: int, name: str, path: Path) -> int:
    """Total bytes with this member, bounded by what its header says."""
    if size > MAX_FILE_BYTES:
        raise ValueError(
            f"load_dataset: {path}: member {name!r} has {size:,} bytes, the limit is "
            f"{MAX_FILE_BYTES:,}; not read"
        )
    total += size
    if total > MAX_ARCHIVE_BYTES:
        raise ValueError(
            f"load_dataset: {path}: its members have more than {MAX_ARCHIVE_BYTES:,} bytes "
            "in all; not read"
        )
    return total


def _read_bounded(file: IO[bytes], name: str, path: Path) -> bytes:
    """All of a file, and an error if it is larger than its header may say."""
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(
            f"load_dataset: {path}: {name!r} has more than {MAX_FILE_BYTES:,} bytes; not read"
        )
    return data


@contextmanager
def _complete(path: Path, kind: str, name: str | None = None) -> Iterator[None]:
    """Turn a library's complaint about a broken archive into one that names the file."""
    try:
        yield
    except _BROKEN as error:
        member = "" if name is None else f", member {name!r}"
        raise ValueError(
            f"load_dataset: {path}{member} is not a complete {kind} ({error}); "
            "copy or download it again"
        ) from error

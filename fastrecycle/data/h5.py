"""The PMF export of Meta-Dataset: one HDF5 file a class, N.h5, an image a group: 0/image, 1/image.

Hu et al., "Pushing the Limits of Simple Pipelines for Few-Shot Learning", 2022, made it from
Meta-Dataset's records. Images are (H, W, 3) uint8. Files that point outside of themselves are
refused.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# A source has up to 1,394 classes, and systems allow as few as 256 open files.
_MAX_OPEN = 32


class H5Images(Sequence[Image.Image]):
    """Images of HDF5 files, class after class, read when asked for.

    Args:
        files: one a class.
        counts: images that each must hold; None: as many as it has.

    Raises:
        RuntimeError: h5py is missing.
        FileNotFoundError: no such file.
        ValueError: not a whole HDF5 file, no image in it, or another number than `counts` says.

    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int | None]) -> None:
        self._h5py()
        self.files = tuple(files)
        self._lock = threading.Lock()
        self._open: OrderedDict[int, Any] = OrderedDict()
        sizes = []
        for place, expected in enumerate(counts):
            with self._lock:
                found = self._count(place)
            if found == 0 or (expected is not None and found != expected):
                raise ValueError(
                    f"load_dataset: {self.files[place]} must hold "
                    f"{'images' if expected is None else f'{expected} images'}, got {found}; "
                    "copy it again"
                )
            sizes.append(found)
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as whole paths: files are opened again, perhaps from another folder."""
        return {"files": tuple(file.absolute() for file in self.files), "starts": self.starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _open=OrderedDict())

    def __len__(self) -> int:
        """Number of images."""
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> Any:
        """Image `index`, RGB."""
        return Image.fromarray(self.read(index))

    def place(self, index: int) -> tuple[int, int]:
        """(class, number within its file) of an image."""
        of = int(np.searchsorted(self.starts, index, side="right")) - 1
        return of, int(index - self.starts[of])

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8.

        Raises:
            ValueError: no such image, one of another shape or type, too large, or damaged.

        """
        of, number = self.place(index)
        h5py = self._h5py()
        where = f"{self.files[of]}: {number}/image"
        with self._lock:
            try:
                data = _inner(h5py, _inner(h5py, self._file(of), str(number)), "image")
                _check(h5py, data)
                return data[()]
            except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
                raise ValueError(
                    f"load_dataset: {where} is not a whole image ({error}); copy the file again"
                ) from error

    def _count(self, place: int) -> int:
        path = self.files[place]
        try:
            found = len(self._file(place))
        except (RuntimeError, OverflowError) as error:
            raise ValueError(
                f"load_dataset: {path} is not a whole HDF5 file ({error}); copy it again"
            ) from error
        if found > (size := path.stat().st_size):  # a header's word; labels are made from it
            raise ValueError(
                f"load_dataset: {path} is not a whole HDF5 file ({found} images in {size} bytes); "
                "copy it again"
            )
        return found

    def _file(self, place: int) -> Any:
        """The open file of a class; the one that was used least recently is closed for it."""
        if place in self._open:
            self._open.move_to_end(place)
            return self._open[place]
        path = self.files[place]
        if not path.is_file():
            raise FileNotFoundError(f"load_dataset: no file {path}; unpack the export again")
        try:
            file = self._h5py().File(path, "r")
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"load_dataset: {path} is not a whole HDF5 file ({error}); copy it again"
            ) from error
        self._open[place] = file
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return file

    @staticmethod
    def _h5py() -> Any:
        try:
            import h5py
        except ImportError as error:
            raise RuntimeError(
                "load_dataset: HDF5 files need h5py here: pip install 'fastrecycle[h5]'"
            ) from error
        return h5py


class H5Names(Sequence[str]):
    """Names of the images for messages, made when asked for: Quick, Draw! has fifty million."""

    def __init__(self, images: H5Images) -> None:
        self._images = images

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        """Such as 3.h5/17."""
        of, number = self._images.place(range(len(self))[index])
        return f"{self._images.files[of].name}/{number}"


def _inner(h5py: Any, group: Any, name: str) -> Any:
    """A member that lies in the same file."""
    if not isinstance(group, h5py.Group):
        raise ValueError(f"{group.name} is no group")
    link = group.get(name, getlink=True)
    if link is None:
        raise KeyError(f"it has no {name}")
    if not isinstance(link, h5py.HardLink):
        raise ValueError("a link to another place; not read")
    return group[name]


def _check(h5py: Any, data: Any) -> None:
    if not isinstance(data, h5py.Dataset):
        raise ValueError("a group, expected an array")
    if data.external or data.is_virtual:
        raise ValueError("its pixels lie in other files; not read")
    if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or 0 in data.shape:
        raise ValueError(f"expected uint8 (H, W, 3), got {data.dtype} {data.shape}")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and data.shape[0] * data.shape[1] > most:
        raise ValueError(f"more than {most:,} pixels; raise PIL.Image.MAX_IMAGE_PIXELS to trust it")
    # a chunk is read as a whole, and may be larger than the image where that could grow
    if most is not None and data.chunks and math.prod(data.chunks) > 3 * most:
        raise ValueError(f"chunks of {data.chunks}, more than {most:,} pixels; not read")

"""Few-shot tasks drawn as index arrays, frozen by a seed.

T tasks, each of `ways` classes with `shots` support and `queries` query images a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrecycle.ops import host


@dataclass(frozen=True, eq=False)
class Episodes:
    """Tasks as image indices (int64), rows class-major: all of the first class, then the next.

    Attributes:
        support: (T, ways * shots) indices into the data set.
        query: (T, ways * queries) indices, disjoint from the task's support.
        classes: (T, ways) labels of the data set; way w of a task is its column w.
        ways: classes in a task.
        shots: support images a class.
        queries: query images a class.
        seed: what the tasks were drawn with.

    """

    support: np.ndarray
    query: np.ndarray
    classes: np.ndarray
    ways: int
    shots: int
    queries: int
    seed: int

    def __len__(self) -> int:
        """Number of tasks, T."""
        return len(self.classes)

    @property
    def support_ways(self) -> np.ndarray:
        """Way of each support column, (ways * shots,) int64: the same for every task."""
        return np.repeat(np.arange(self.ways), self.shots)

    @property
    def query_ways(self) -> np.ndarray:
        """Way of each query column, (ways * queries,) int64: the same for every task."""
        return np.repeat(np.arange(self.ways), self.queries)

    @property
    def images(self) -> np.ndarray:
        """Sorted indices of all images that any task uses: what must be embedded, once each."""
        return np.unique(np.concatenate([self.support.ravel(), self.query.ravel()]))


def episodes(
    labels: Any,
    ways: int,
    shots: int,
    queries: int,
    tasks: int,
    seed: int,
    *,
    min_images: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Episodes:
    """Draw tasks uniformly: `ways` classes of all, then images of each, without replacement.

    Task t depends on (labels, ways, shots, queries, seed, t) alone, so a longer list begins with a
    shorter one. Only raw Philox bits are used, which NumPy keeps stable between versions.

    Args:
        labels: (N,) integer labels of the images.
        ways: classes in a task, at least 1.
        shots: support images a class, at least 1.
        queries: query images a class, at least 0.
        tasks: number of tasks, at least 1.
        seed: in [0, 2**64).
        min_images: leave out classes with fewer images than this. None: a class too small for
            shots + queries is an error, as leaving it out changes the protocol.
        class_names: names of labels 0, 1, ..., for the error text.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count out of range, fewer classes than `ways`, or a class too small.

    """
    check_counts(
        "episodes",
        ways=(ways, 1),
        shots=(shots, 1),
        queries=(queries, 0),
        tasks=(tasks, 1),
        seed=(seed, 0),
        min_images=(0 if min_images is None else min_images, 0),
    )

    members = members_of(labels)
    need = shots + queries
    if min_images is not None:
        members = {label: index for label, index in members.items() if len(index) >= min_images}
    if len(members) < ways:
        at_least = "" if min_images is None else f" with at least {min_images} images"
        raise ValueError(
            f"episodes: {ways} ways need at least {ways} classes, "
            f"the data set has {len(members)}{at_least}; lower ways"
        )
    for label, index in members.items():
        if len(index) < need:
            named = class_names is not None and 0 <= label < len(class_names)
            name = f"{class_names[label]!r}" if class_names is not None and named else f"{label}"
            raise ValueError(
                f"episodes: class {name} has {len(index)} images, a task takes {shots} shots + "
                f"{queries} queries = {need}; lower shots or queries, or leave out such classes "
                f"with min_images={need}"
            )

    names = np.fromiter(members, dtype=np.int64, count=len(members))
    images = list(members.values())
    classes, support, query = host.draw_episodes(
        names, images, int(ways), int(shots), int(queries), int(tasks), int(seed)
    )
    return Episodes(
        support=support,
        query=query,
        classes=classes,
        ways=int(ways),
        shots=int(shots),
        queries=int(queries),
        seed=int(seed),
    )


def check_counts(where: str, **counts: tuple[Any, int]) -> None:
    """Raise unless each (value, least) is an integer of at least this, and a seed fits 64 bits.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.

    """
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{where}: {name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{where}: {name} must be at least {least}, got {value}")
        if name == "seed" and value >= 2**64:
            raise ValueError(f"{where}: seed must be below 2**64, got {value}")


def members_of(labels: Any) -> dict[int, np.ndarray]:
    """Label -> (n,) indices of its images, both in rising order."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"episodes: labels must be a non-empty (N,) integer array, got shape {array.shape}, "
            f"{array.dtype}; ImageDataset.labels is one"
        )
    order = np.argsort(array, kind="stable")
    values, starts = np.unique(array[order], return_index=True)
    groups = np.split(order.astype(np.int64), starts[1:])
    return {int(value): group for value, group in zip(values, groups, strict=True)}

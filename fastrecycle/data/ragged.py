"""Tasks of Meta-Dataset's own protocol: ways and shots vary, also from class to class.

Triantafillou et al., "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples",
2020, Sec. 3.2 and App. B. T tasks; task t has W_t classes, S_t support and Q_t query images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrecycle.data.episodes import check_counts, members_of
from fastrecycle.data.groups import Groups

_LOG2 = float(np.log(2.0))


@dataclass(frozen=True, eq=False)
class RaggedTask:
    """One task, class-major.

    Attributes:
        support: (S,) image indices.
        support_ways: (S,) way of each, in [0, W).
        query: (Q,) image indices, disjoint from the support.
        query_ways: (Q,) way of each; every way has equally many.
        classes: (W,) labels of the data set.

    """

    support: np.ndarray
    support_ways: np.ndarray
    query: np.ndarray
    query_ways: np.ndarray
    classes: np.ndarray

    @property
    def shots(self) -> np.ndarray:
        """Support images of each way, (W,)."""
        return np.bincount(self.support_ways, minlength=len(self.classes))


@dataclass(frozen=True, eq=False)
class RaggedEpisodes:
    """Tasks of different sizes, one after the other in flat int64 arrays.

    Attributes:
        support: (sum S_t,) image indices; `support_starts` (T + 1,) says where a task begins.
        support_ways: (sum S_t,) way of each within its task.
        query: (sum Q_t,) image indices, with `query_starts` (T + 1,).
        query_ways: (sum Q_t,) way of each within its task.
        classes: (sum W_t,) labels of the data set, with `class_starts` (T + 1,).
        seed: what the tasks were drawn with.

    """

    support: np.ndarray
    support_ways: np.ndarray
    support_starts: np.ndarray
    query: np.ndarray
    query_ways: np.ndarray
    query_starts: np.ndarray
    classes: np.ndarray
    class_starts: np.ndarray
    seed: int

    @staticmethod
    def of(tasks: Sequence[RaggedTask], seed: int) -> RaggedEpisodes:
        """From tasks, in their order."""

        def flat(name: str) -> np.ndarray:
            return np.concatenate([getattr(task, name) for task in tasks]).astype(np.int64)

        def starts(name: str) -> np.ndarray:
            sizes = [len(getattr(task, name)) for task in tasks]
            return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

        return RaggedEpisodes(
            flat("support"), flat("support_ways"), starts("support"),
            flat("query"), flat("query_ways"), starts("query"),
            flat("classes"), starts("classes"), seed,
        )  # fmt: skip

    def __len__(self) -> int:
        """Number of tasks, T."""
        return len(self.class_starts) - 1

    def task(self, number: int) -> RaggedTask:
        """Task `number`, in [0, T), as views."""
        support = slice(*self.support_starts[number : number + 2])
        query = slice(*self.query_starts[number : number + 2])
        return RaggedTask(
            self.support[support],
            self.support_ways[support],
            self.query[query],
            self.query_ways[query],
            self.classes[slice(*self.class_starts[number : number + 2])],
        )

    @property
    def images(self) -> np.ndarray:
        """Sorted indices of all images that any task uses: what must be embedded, once each."""
        return np.unique(np.concatenate([self.support, self.query]))


@dataclass(frozen=True)
class TaskSizes:
    """Bounds of Meta-Dataset's tasks; the defaults are the published ones."""

    min_ways: int = 5
    max_ways: int = 50
    # of one class
    max_queries: int = 10
    # of a task
    max_support: int = 500
    # what one class may add to the size of the support set
    max_support_per_class: int = 100

    def __post_init__(self) -> None:
        check_counts("TaskSizes", **{name: (value, 1) for name, value in vars(self).items()})
        if self.max_ways < self.min_ways or self.max_support < self.max_ways:
            raise ValueError(
                "TaskSizes: expected min_ways <= max_ways <= max_support, got "
                f"{self.min_ways}, {self.max_ways}, {self.max_support}"
            )


def meta_dataset_episodes(
    labels: Any,
    tasks: int,
    seed: int,
    *,
    groups: Groups | None = None,
    sizes: TaskSizes | None = None,
    min_images: int | None = None,
    class_names: Sequence[str] | None = None,
) -> RaggedEpisodes:
    """Draw tasks by Meta-Dataset's rules.

    Ways are uniform in [min_ways, min(max_ways, classes)]; where the set has groups, one is drawn
    first, and the classes are of it. With n_c images of class c, each class has
    q = min(max_queries, floor(min_c n_c / 2)) queries. The support set's size is
    min(max_support, sum_c ceil(beta min(max_support_per_class, n_c - q))), beta uniform in (0, 1].
    Class c has min(1 + floor(R_c (size - ways)), n_c - q) shots, with R_c proportional to
    n_c exp(a_c), a_c uniform in [-log 2, log 2).

    Task t depends on everything but `tasks`, so a longer list begins with a shorter one. Only raw
    Philox bits are used, which NumPy keeps stable between versions.

    Args:
        labels: (N,) integer labels of the images.
        tasks: number of tasks, at least 1.
        seed: in [0, 2**64).
        groups: see `ImageDataset.groups`; those with fewer than min_ways classes are left out.
        sizes: None: the published ones.
        min_images: leave out classes with fewer images; None: one with a single image is an error.
        class_names: names of labels 0, 1, ..., for the error text.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count out of range, too few classes, or a class too small.

    """
    sizes = sizes or TaskSizes()
    check_counts(
        "meta_dataset_episodes", tasks=(tasks, 1), seed=(seed, 0), min_images=(min_images or 0, 0)
    )
    members = members_of(labels)
    if min_images is not None:
        members = {label: index for label, index in members.items() if len(index) >= min_images}
    for label, index in members.items():
        if len(index) < 2:
            name = f"{class_names[label]!r}" if class_names is not None else f"{label}"
            raise ValueError(
                f"meta_dataset_episodes: class {name} has 1 image, a task takes a support and a "
                "query image at least; leave out such classes with min_images=2"
            )
    pools = _pools(members, groups, sizes.min_ways)
    whole = groups is not None and groups.ways == "all"
    drawn = []
    for number in range(tasks):
        bits = np.random.Philox(key=np.array([seed, number], np.uint64))
        pool = pools[_below(bits, len(pools))]
        ways = min(sizes.max_ways, len(pool))
        if not whole:
            ways = sizes.min_ways + _below(bits, ways - sizes.min_ways + 1)
        classes = pool[_distinct(bits, len(pool), ways)]
        drawn.append(_task(bits, classes, [members[int(label)] for label in classes], sizes))
    return RaggedEpisodes.of(drawn, int(seed))


def _pools(
    members: dict[int, np.ndarray], groups: Groups | None, min_ways: int
) -> list[np.ndarray]:
    """The labels from which a task may take its classes: all, or those of each group."""
    if groups is None:
        found = [np.fromiter(members, dtype=np.int64, count=len(members))]
    else:
        found = [
            np.array([label for label in group if label in members], dtype=np.int64)
            for group in groups.members
        ]
    pools = [pool for pool in found if len(pool) >= min_ways]
    if not pools:
        of = "" if groups is None else " in one group (alphabet, branch)"
        raise ValueError(
            f"meta_dataset_episodes: a task takes at least {min_ways} classes{of}, the data set "
            f"has {max(map(len, found), default=0)}; lower min_ways"
        )
    return pools


def _task(
    bits: np.random.Philox, classes: np.ndarray, images: list[np.ndarray], sizes: TaskSizes
) -> RaggedTask:
    ways = len(classes)
    counts = np.array([len(index) for index in images])
    queries = min(sizes.max_queries, int(counts.min()) // 2)
    shots = support_shots(counts, queries, _uniform(bits, 1)[0], _uniform(bits, ways), sizes)
    chosen = [
        index[_distinct(bits, len(index), int(k) + queries)]
        for index, k in zip(images, shots, strict=True)
    ]
    return RaggedTask(
        support=np.concatenate([c[:k] for c, k in zip(chosen, shots, strict=True)]),
        support_ways=np.repeat(np.arange(ways), shots),
        query=np.concatenate([c[k:] for c, k in zip(chosen, shots, strict=True)]),
        query_ways=np.repeat(np.arange(ways), queries),
        classes=classes,
    )


def support_shots(
    counts: np.ndarray, queries: int, beta: float, noise: np.ndarray, sizes: TaskSizes
) -> np.ndarray:
    """Support images of each class of a task, (W,) int64, at least 1.

    Args:
        counts: (W,) images of each class.
        queries: of each class.
        beta: uniform in [0, 1); 1 + floor(beta n) is distributed as ceil(b n), b in (0, 1].
        noise: (W,) in [0, 1), which makes a_c.
        sizes: bounds of the task.

    """
    left = counts - queries
    added = np.floor(beta * np.minimum(sizes.max_support_per_class, left)) + 1
    total = min(int(added.sum()), sizes.max_support)
    weight = counts * np.exp((2 * noise - 1) * _LOG2)
    share = weight / weight.sum()
    return np.minimum(1 + np.floor(share * (total - len(counts))).astype(np.int64), left)


def _uniform(bits: np.random.Philox, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1)."""
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def _below(bits: np.random.Philox, bound: int) -> int:
    return int(_uniform(bits, 1)[0] * bound)


def _distinct(bits: np.random.Philox, population: int, count: int) -> np.ndarray:
    """`count` of range(population), without replacement, in random order."""
    if population <= 8 * count:
        return np.argsort(bits.random_raw(population), kind="stable")[:count]
    # A class of Quick, Draw! has 300,000 images: what was drawn before is drawn again instead.
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        more = (_uniform(bits, count) * population).astype(np.int64)
        drawn = np.concatenate([drawn, more])
        _, first = np.unique(drawn, return_index=True)
        drawn = drawn[np.sort(first)]
    return drawn[:count]

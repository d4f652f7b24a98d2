"""Host work in C++ where the extension `_host` was built, in NumPy where not; results are equal.

B images, n patches, N = prefix + n tokens an image, T' tokens of a packed batch, T tasks, W ways.
Arrays are NumPy's; CPU tensors are taken as well. The C++ releases the GIL and uses at most
`threads` threads, fewer where the work would not pay for them; None stands for PyTorch's number.

FASTRECYCLE_NO_EXTENSION=1 turns the extension off, at installation as at import.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

log = logging.getLogger(__name__)

_INTERFACE = 2  # of the compiled module; one left over from other sources is not used


def _load() -> ModuleType | None:
    if os.environ.get("FASTRECYCLE_NO_EXTENSION", "0") not in ("", "0"):
        return None
    try:
        _host = importlib.import_module("fastrecycle_kernels._host")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        log.warning("host work is done in Python: the compiled module does not load: %s", error)
        return None
    if _host.INTERFACE != _INTERFACE:
        log.warning("host work is done in Python: the compiled module is of another version")
        return None
    return _host


_host: Any = _load()
HAVE_EXTENSION: bool = _host is not None
"""Whether the functions below run in C++."""


def _array(name: str, value: Any, dtype: type, shape: str) -> np.ndarray:
    """A C-contiguous array of exactly this dtype and number of dimensions; `shape` names them."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
    array = np.asarray(value)
    if array.dtype != dtype or array.ndim != shape.count(",") + (not shape.endswith(",)")):
        raise ValueError(
            f"{name}: expected {shape} {np.dtype(dtype)}, got {array.shape} {array.dtype}"
        )
    return np.ascontiguousarray(array)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _threads(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    _at_least("threads", threads, 1)
    return threads


# ------------------------------------------------------------------ packed batches


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each token of a packed batch comes from, and where it goes.

    The batch holds image after image: the prefix tokens, then the kept patches, ascending.

    Attributes:
        cu_seqlens: (B + 1,) int32, starts of the images, ending with T'.
        gather: (T',) int64, position of each packed token among all B N tokens.
        scatter: (B N,) int64, the inverse: packed position of each token, -1 where it was dropped.
        merge: (T',) int64, position of each packed token in (all prefix tokens, all kept patches),
            for embeddings that are computed for kept patches only.
        patches: (T' - B prefix,) int64, the kept patches of all images.
        image: (T' - B prefix,) int64, the image of each kept patch.
        longest: tokens of the longest image, 0 for an empty batch.

    """

    cu_seqlens: np.ndarray
    gather: np.ndarray
    scatter: np.ndarray
    merge: np.ndarray
    patches: np.ndarray
    image: np.ndarray
    longest: int


def _check_plan(images: int, patches: int, prefix: int) -> None:
    _at_least("plan_packed: prefix", prefix, 0)
    _at_least("plan_packed: patches", patches, 0)
    if images * (prefix + patches) > np.iinfo(np.int32).max:
        raise ValueError(
            f"plan_packed: cu_seqlens (int32) counts to {np.iinfo(np.int32).max} tokens, "
            f"got {images} images of {prefix + patches}; use a smaller batch"
        )


def plan_packed(mask: Any, prefix: int = 1, *, threads: int | None = None) -> Packing:
    """Plan a packed batch of the patches that a mask keeps.

    Args:
        mask: (B, n) bool, True for the patches that stay.
        prefix: tokens before the patches of each image, which always stay.
        threads: see above.

    Raises:
        ValueError: another shape or dtype, or more tokens than cu_seqlens can count.

    """
    mask = _array("plan_packed: mask", mask, np.bool_, "(B, n)")
    _check_plan(*mask.shape, prefix)
    threads = _threads(threads)
    if HAVE_EXTENSION:
        return Packing(*_host.plan_masks(mask.view(np.uint8), prefix, threads))
    return _plan(mask, prefix)


def plan_packed_orders(
    order: Any, counts: Any, patches: int, prefix: int = 1, *, threads: int | None = None
) -> Packing:
    """Plan a packed batch of the first counts[i] patches of each row of `order`.

    Args:
        order: (B, K) int64 patch indices, the most important first.
        counts: (B,) int64 in [0, K].
        patches: n; patch indices lie in [0, n).
        prefix: tokens before the patches of each image, which always stay.
        threads: see above.

    Raises:
        ValueError: shapes, dtypes or counts that do not fit, a patch out of range or named twice.

    """
    order = _array("plan_packed: order", order, np.int64, "(B, K)")
    counts = _array("plan_packed: counts", counts, np.int64, "(B,)")
    width = order.shape[1]
    if len(counts) != len(order):
        raise ValueError(f"plan_packed: counts must be ({len(order)},), got {counts.shape}")
    if len(counts) and not 0 <= counts.min() <= counts.max() <= width:
        i = int(((counts < 0) | (counts > width)).argmax())
        raise ValueError(f"plan_packed: counts[{i}] must be in [0, {width}], got {counts[i]}")
    _check_plan(len(order), patches, prefix)
    threads = _threads(threads)
    if HAVE_EXTENSION:
        return Packing(*_host.plan_orders(order, counts, patches, prefix, threads))
    return _plan(_marked(order, counts, patches), prefix)


def _marked(order: np.ndarray, counts: np.ndarray, patches: int) -> np.ndarray:
    """The mask (B, n) of the first counts[i] patches of each row."""
    chosen = np.arange(order.shape[1]) < counts[:, None]
    image, patch = chosen.nonzero()[0], order[chosen]
    inside = (patch >= 0) & (patch < patches)
    mask = np.zeros((len(order), patches), np.bool_)
    mask[image[inside], patch[inside]] = True
    if np.count_nonzero(mask) == len(patch):
        return mask
    wrong = ~inside  # or named before
    position = image * patches + patch
    first = np.unique(position[inside], return_index=True)[1]
    again = np.ones(int(inside.sum()), np.bool_)
    again[first] = False
    wrong[inside] = again
    i = int(wrong.argmax())
    named = f"plan_packed: order[{image[i]}] names patch {patch[i]}"
    raise ValueError(
        f"{named} twice; expected each patch at most once"
        if inside[i]
        else f"{named}; expected patches 0 to {patches - 1}"
    )


def _plan(mask: np.ndarray, prefix: int) -> Packing:
    images, patches = mask.shape
    image, patch = mask.nonzero()
    lengths = np.bincount(image, minlength=images) + prefix
    cu_seqlens = np.zeros(images + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    tokens = np.ones((images, prefix + patches), np.bool_)
    tokens[:, prefix:] = mask
    gather = tokens.ravel().nonzero()[0]
    scatter = np.full(tokens.size, -1)
    scatter[gather] = np.arange(len(gather))
    first = (cu_seqlens[:-1, None] + np.arange(prefix)).ravel()  # packed prefix tokens
    behind = np.ones(len(gather), np.bool_)
    behind[first] = False
    merge = np.empty_like(gather)
    merge[first] = np.arange(images * prefix)
    merge[behind] = images * prefix + np.arange(len(patch))
    return Packing(cu_seqlens, gather, scatter, merge, patch, image, int(lengths.max(initial=0)))


# ------------------------------------------------------------------ tasks for evaluation


def draw_episodes(
    names: Any,
    members: Sequence[Any],
    ways: int,
    shots: int,
    queries: int,
    tasks: int,
    seed: int,
    *,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw few-shot tasks uniformly, without replacement, from raw Philox words.

    Each draw ranks one random 64-bit word a candidate, so it rests on nothing that NumPy may
    change. Task t depends on the classes, ways, shots + queries, seed and t alone.

    Args:
        names: (C,) int64 labels of the classes.
        members: for each class the indices of its images, (n_c,) int64.
        ways: classes in a task, in [1, C].
        shots, queries: images of each class; together at most those of the smallest class.
        tasks: T.
        seed: in [0, 2**64).
        threads: see above.

    Returns:
        classes (T, W), support (T, W shots) and query (T, W queries), int64, class-major.

    Raises:
        ValueError: counts that do not fit the classes.

    """
    names = _array("draw_episodes: names", names, np.int64, "(C,)")
    members = [_array(f"draw_episodes: members[{i}]", m, np.int64, "(n,)")
               for i, m in enumerate(members)]  # fmt: skip
    if len(members) != len(names):
        raise ValueError(
            f"draw_episodes: expected members of {len(names)} classes, got {len(members)}"
        )
    for name, value, least in (
        ("ways", ways, 1), ("shots", shots, 0), ("queries", queries, 0), ("tasks", tasks, 0)
    ):  # fmt: skip
        _at_least(f"draw_episodes: {name}", value, least)
    _check_key("draw_episodes", seed)
    if ways > len(names):
        raise ValueError(f"draw_episodes: ways must be in [1, {len(names)}], got {ways}")
    sizes = np.array([len(m) for m in members])
    if sizes.min() < shots + queries:
        i = int(sizes.argmin())
        raise ValueError(
            f"draw_episodes: members[{i}] must hold at least {shots + queries} images,"
            f" got {sizes[i]}"
        )
    threads = _threads(threads)
    if HAVE_EXTENSION:
        starts = np.zeros(len(names) + 1, np.int64)
        np.cumsum(sizes, out=starts[1:])
        return _host.draw_episodes(
            names, starts, np.concatenate(members), ways, shots, queries, tasks, seed, threads
        )
    classes = np.empty((tasks, ways), np.int64)
    support = np.empty((tasks, ways, shots), np.int64)
    query = np.empty((tasks, ways, queries), np.int64)
    for task in range(tasks):
        bits = np.random.Philox(key=np.array([seed, task], np.uint64))
        chosen = _ranked(bits, len(names), ways)
        classes[task] = names[chosen]
        for way, position in enumerate(chosen):
            drawn = members[position][_ranked(bits, sizes[position], shots + queries)]
            support[task, way], query[task, way] = drawn[:shots], drawn[shots:]
    return classes, support.reshape(tasks, ways * shots), query.reshape(tasks, ways * queries)


def _check_key(where: str, seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"{where}: seed must be in [0, 2**64), got {seed}")


def _ranked(bits: np.random.Philox, population: int, count: int) -> np.ndarray:
    """`count` of range(population): the ranks of random words."""
    return np.argsort(bits.random_raw(population), kind="stable")[:count]


# ------------------------------------------------------------------ tasks for meta-training


@dataclass(frozen=True, eq=False)
class TaskTables:
    """A pool's rows by LoRA and class, as offsets. A group: the rows of one class of one LoRA.

    Attributes:
        rows: (R,) int64, the rows of all groups, LoRA after LoRA, label after label.
        groups: (G + 1,) int64, starts of the groups within `rows`.
        labels: (G,) int64, column of the teacher's head.
        wide: (V, 2) int64, first group and number of groups of the LoRAs with enough classes.
        holders: (G,) int64, the groups again, class after class: LoRAs may share classes.
        classes: (C + 1,) int64, starts of the classes within `holders`.
        shown: (R,) int64, the rows again, class after class, group after group.
        shown_starts: (C + 1,) int64, starts of the classes within `shown`.

    """

    rows: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    wide: np.ndarray
    holders: np.ndarray
    classes: np.ndarray
    shown: np.ndarray
    shown_starts: np.ndarray

    @staticmethod
    def of_pool(tasks: Any, labels: Any, classes: Any, ways: int) -> TaskTables:
        """From a pool's columns, each (R,) int64: the LoRA, its label and the class of each image.

        Raises:
            ValueError: columns of different lengths or dtypes, or empty ones.

        """
        tasks, labels, classes = (
            _array(f"task_tables: {name}", column, np.int64, "(R,)")
            for name, column in (("tasks", tasks), ("labels", labels), ("classes", classes))
        )
        if not len(tasks) == len(labels) == len(classes) > 0:
            raise ValueError(
                "task_tables: expected columns of one length, at least 1, got"
                f" {len(tasks)}, {len(labels)} and {len(classes)}"
            )
        rows = np.lexsort((labels, tasks))
        edge = (np.diff(tasks[rows]) != 0) | (np.diff(labels[rows]) != 0)
        groups = np.concatenate(([0], edge.nonzero()[0] + 1, [len(rows)]))
        first = rows[groups[:-1]]
        starts, counts = np.unique(tasks[first], return_index=True, return_counts=True)[1:]
        enough = counts >= ways
        # classes in the order in which their first groups come
        _, seen, which = np.unique(classes[first], return_index=True, return_inverse=True)
        place = seen.argsort().argsort()[which]
        of_row = place.repeat(np.diff(groups))  # the class of each of `rows`
        return TaskTables(
            rows=rows,
            groups=groups,
            labels=labels[first],
            wide=np.stack((starts[enough], counts[enough]), axis=1),
            holders=place.argsort(kind="stable"),
            classes=np.concatenate(([0], np.bincount(place).cumsum())),
            shown=rows[of_row.argsort(kind="stable")],
            shown_starts=np.concatenate(([0], np.bincount(of_row).cumsum())),
        )


def draw_steps(
    tables: TaskTables,
    ways: int,
    need: int,
    tasks: int,
    interpolation: float,
    seed: int,
    first: int,
    steps: int,
    *,
    holders: Literal["one", "all"] = "one",
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the tasks of meta-training steps [first, first + steps): of one LoRA, or across LoRAs.

    Step t's tasks depend on the seed and t alone, and are what NumPy's Generator draws over
    Philox(key=[seed, t]); where a NumPy should draw otherwise than its versions to date, so does
    this function, through NumPy.

    Args:
        tables: the pool.
        ways: W, classes in a task.
        need: images of each class, shots + queries.
        tasks: E, tasks in a step.
        interpolation: share of tasks whose classes come from all LoRAs (LoRA Recycle, Eq. 4).
        seed: in [0, 2**64).
        first, steps: S steps from step `first` on.
        holders: whether the images of a class of such a task come from one LoRA that shows it,
            drawn anew for each task, or from all.
        threads: see above.

    Returns:
        rows (S, E, W, need) of the pool; labels (S, E, W): column of the teacher's head, -1 in
        interpolated tasks. int64.

    Raises:
        ValueError: counts out of range, or a pool too small for them.

    """
    for name, value, least in (
        ("ways", ways, 1), ("need", need, 1), ("tasks", tasks, 1), ("first", first, 0),
        ("steps", steps, 0),
    ):  # fmt: skip
        _at_least(f"draw_steps: {name}", value, least)
    _check_key("draw_steps", seed)
    sizes = np.diff(tables.groups)
    if sizes.min() < need:
        raise ValueError(
            f"draw_steps: need must be at most the {sizes.min()} images of the smallest class,"
            f" got {need}"
        )
    if interpolation > 0 and len(tables.classes) <= ways:
        raise ValueError(
            f"draw_steps: ways must be at most the {len(tables.classes) - 1} classes, got {ways}"
        )
    if holders not in ("one", "all"):
        raise ValueError(f'draw_steps: holders must be "one" or "all", got {holders!r}')
    widest = tables.wide[:, 1].min(initial=np.iinfo(np.int64).max)
    if interpolation < 1 and (len(tables.wide) == 0 or widest < ways):
        raise ValueError(f"draw_steps: tables must be made for {ways} ways, with a LoRA that wide")
    threads = _threads(threads)
    arguments = (tables, ways, need, tasks, interpolation, holders == "all", seed, first, steps)
    if HAVE_EXTENSION and _generator_is_known():
        return _draw_compiled(*arguments, threads)
    return _draw_steps(*arguments)


def _draw_compiled(
    tables: TaskTables, ways: int, need: int, tasks: int, interpolation: float, from_all: bool,
    seed: int, first: int, steps: int, threads: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    return _host.draw_steps(
        tables.rows, tables.groups, tables.labels, tables.wide, tables.classes, tables.holders,
        tables.shown, tables.shown_starts, ways, need, tasks, interpolation, from_all, seed, first,
        steps, threads,
    )  # fmt: skip


@functools.cache
def _generator_is_known() -> bool:
    """Whether this NumPy's Generator draws as the C++ does: it may change between versions."""
    column = np.arange(6)
    few = TaskTables.of_pool(column.repeat(9) // 3, column.repeat(9) % 3, column.repeat(9), 3)
    many = TaskTables.of_pool(*(np.zeros(10100, np.int64),) * 3, 1)  # choice's second method
    for tables, ways, need in ((few, 3, 7), (many, 1, 210)):
        arguments = (tables, ways, need, 2, 0.5, False, 2**63 + 5, 3, 8)
        ours, numpys = _draw_compiled(*arguments, 1), _draw_steps(*arguments)
        if not all(np.array_equal(x, y) for x, y in zip(ours, numpys, strict=True)):
            log.warning("NumPy %s draws otherwise than before: drawing with it", np.__version__)
            return False
    return True


def _draw_steps(
    tables: TaskTables, ways: int, need: int, tasks: int, interpolation: float, from_all: bool,
    seed: int, first: int, steps: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    rows = np.empty((steps, tasks, ways, need), np.int64)
    labels = np.full((steps, tasks, ways), -1)
    class_count = len(tables.classes) - 1
    for step in range(steps):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, first + step], np.uint64)))
        for task in range(tasks):
            sources = []  # the rows to choose from, for each way
            if rng.random() < interpolation:
                for c in rng.choice(class_count, ways, replace=False):
                    start, end = tables.classes[c : c + 2]
                    one = tables.holders[start + rng.integers(end - start)]
                    sources.append(
                        _cut(tables.shown, tables.shown_starts, c) if from_all
                        else _cut(tables.rows, tables.groups, one)
                    )  # fmt: skip
            else:
                start, count = tables.wide[rng.integers(len(tables.wide))]
                chosen = start + rng.choice(count, ways, replace=False)
                labels[step, task] = tables.labels[chosen]
                sources = [_cut(tables.rows, tables.groups, group) for group in chosen]
            for way, own in enumerate(sources):
                rows[step, task, way] = rng.choice(own, need, replace=False)
    return rows, labels


def _cut(rows: np.ndarray, starts: np.ndarray, i: int) -> np.ndarray:
    return rows[starts[i] : starts[i + 1]]


# ------------------------------------------------------------------ selection


def top_k(scores: Any, k: int, *, threads: int | None = None) -> np.ndarray:
    """Positions of the k highest scores of each row, ascending; of equal scores the first stay.

    Args:
        scores: (B, n) float32. NaN counts as the highest, as in `torch.sort`; -0.0 equals 0.0.
        k: in [0, n].
        threads: see above.

    Returns:
        (B, k) int64.

    Raises:
        ValueError: another shape or dtype, or k out of range.

    """
    scores = _array("top_k: scores", scores, np.float32, "(B, n)")
    images, patches = scores.shape
    if not 0 <= k <= patches:
        raise ValueError(f"top_k: k must be in [0, {patches}], got {k}")
    threads = _threads(threads)
    if HAVE_EXTENSION:
        return _host.top_k(scores, k, threads)
    if k == 0:
        return np.empty((images, 0), np.int64)
    # one integer a score that falls as the score rises, then as the position falls
    bits = scores.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    middle = np.uint32(0x80000000)
    rising = np.where(bits >= middle, middle - magnitude, middle + magnitude)
    rising[magnitude > 0x7F800000] = 0xFFFFFFFF
    keys = (~rising).astype(np.uint64) << np.uint64(32) | np.arange(patches, dtype=np.uint64)
    if k < patches:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    kept = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    kept.sort(axis=1)
    return kept


@torch.library.custom_op("fastrecycle::top_k_host", mutates_args=(), device_types="cpu")
def top_patches(scores: torch.Tensor, count: int) -> torch.Tensor:
    """`top_k` of a CPU tensor as a PyTorch operator: it traces and maps, with PyTorch's threads."""
    return torch.from_numpy(top_k(scores, count))


@top_patches.register_fake
def _(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.new_empty((scores.shape[0], count), dtype=torch.int64)


@top_patches.register_vmap
def _(info: Any, in_dims: Any, scores: torch.Tensor, count: int) -> tuple[torch.Tensor, int]:
    rows = scores.movedim(in_dims[0], 0)
    return top_patches(rows.flatten(0, 1), count).unflatten(0, rows.shape[:2]), 0

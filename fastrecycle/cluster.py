"""The stages on many machines, by Ray (`pip install "fastrecycle[cluster]"`).

Inversion groups are Ray tasks: a lost node or a killed worker costs the groups it had not finished.
Meta-training is Ray Train's TorchTrainer around the function that `torchrun` runs too. Evaluation
shares out the images to embed. Every node must reach the run's folder: a shared file system, or
for the pool a URL that `fsspec` knows.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrecycle.classifier import Embedder
from fastrecycle.config import InversionConfig, MetaConfig
from fastrecycle.data import ImageDataset
from fastrecycle.eval import FeaturesOf, Pixels, Result, batch_features, evaluate_shots
from fastrecycle.files import is_url, safetensors_content
from fastrecycle.grouping import ON_CPU, Batch, batches
from fastrecycle.inversion import Inverter, OnStep, check_inversion
from fastrecycle.lora import LoRA
from fastrecycle.metatrain import meta_train
from fastrecycle.ops import Resolved
from fastrecycle.parallel import joined
from fastrecycle.pool import SyntheticPool
from fastrecycle.pool_files import PoolFiles, task_name
from fastrecycle.vit import ViT

log = logging.getLogger(__name__)

RETRIES = 3  # of a group or share whose worker or node was lost, and of meta-training
SHARES = 4  # of images for each worker, so that a slow one is not waited for long


def ray_module() -> Any:
    """Ray, imported.

    Raises:
        ImportError: it is not installed.

    """
    try:
        import ray
    except ImportError:
        raise ImportError(
            'cluster: needs Ray; pip install "fastrecycle[cluster]", or leave out --cluster'
        ) from None
    return ray


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray for as long as the context lasts, or as before where the caller has connected it.

    Args:
        address: "auto": the cluster that runs here, or else one of this machine alone; or a
            cluster's address, such as ray://head:10001 or head:6379.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: no cluster at that address.

    """
    ray = ray_module()
    if ray.is_initialized():
        yield ray
        return
    _check_answers(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address, **quiet)
    except ConnectionError:
        if address != "auto":
            raise
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise where nothing listens at HOST:PORT, for which Ray itself waits over 5 minutes."""
    found = re.fullmatch(r"(?:ray://)?([^/,]+):(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"cluster: nothing answers at {address} ({error}); expected auto, or the HOST:PORT or"
            " ray://HOST:PORT that `ray start --head` says"
        ) from None


def _needs(device: torch.device) -> dict[str, int]:
    """What a worker takes of its node."""
    return {"num_cpus": 1, "num_gpus": 1} if device.type == "cuda" else {"num_cpus": 1}


def _slots(ray: Any, device: torch.device) -> int:
    """Workers that the cluster has room for now."""
    kind = "GPU" if device.type == "cuda" else "CPU"
    return max(1, int(ray.cluster_resources().get(kind, 0)))


# ---------------------------------------------------------------------- inversion


def cluster_invert(
    vit: ViT,
    bank: Sequence[LoRA],
    prior: nn.Module | None,
    config: InversionConfig | None = None,
    *,
    folder: str | Path,
    address: str = "auto",
    seed: int = 0,
    precision: str = "fp32",
    backend: Resolved = "reference",
    on_step: OnStep | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> PoolFiles:
    """`invert`, each group on whichever node is free.

    A group's images are written by its worker, so finished groups survive whatever happens to the
    nodes or to this process; a second call goes on with the rest. Groups and seeds are those of
    one machine, and so are the images (to rounding, on other devices).

    Args:
        vit, bank, prior, config, seed, precision, backend: see `invert`; the backbone's device is
            the kind that each worker takes.
        folder: of the pool, the same on every node, or a URL.
        address: see `connected`.
        on_step: called after each group with the iterations done in all.
        stop: asked every second; True gives up the groups under way and raises KeyboardInterrupt.

    Raises:
        ValueError: see `check_inversion`.
        KeyboardInterrupt: `stop` said so.
        RuntimeError: groups whose worker was lost again and again; all others are finished.
        OSError: a worker's files do not show up here.

    """
    config, device = config or InversionConfig(), vit.pos_embed.device
    for lora in bank:
        check_inversion(vit, [lora], config)
    stored = PoolFiles(folder)
    if stored.has(range(len(bank))):
        return stored.only(range(len(bank)))
    where = str(folder) if is_url(folder) else str(Path(folder).resolve())
    with connected(address) as ray:
        settings = {"seed": seed, "precision": precision, "backend": backend}
        world = ray.put(
            (vit.to("cpu"), list(bank), None if prior is None else prior.to("cpu"), config,
             settings, device.type)
        )  # fmt: skip
        vit.to(device)
        run = ray.remote(max_retries=RETRIES, **_needs(device))(_invert_group)
        size = config.group or ON_CPU
        if config.group is None and device.type == "cuda":
            size = ray.get(
                ray.remote(max_retries=RETRIES, **_needs(device))(_size).remote(world, where)
            )
        todo = [b for b in batches(bank, config, size) if not stored.has(b.tasks)]
        done = sum(
            len(b.tasks) * b.config(config).iterations for b in batches(bank, config, size)
        ) - sum(len(b.tasks) * b.config(config).iterations for b in todo)
        lost: list[str] = []
        # those that others start from go first, and all of them
        for stage in ([b for b in todo if not b.warm], [b for b in todo if b.warm]):
            if not stage or (stage[0].warm and not stored.has(range(config.warm))):
                continue
            slots = _slots(ray, device)
            for batch, error in _finished(ray, run, world, where, stage, slots, stop):
                if error is not None:
                    lost.append(f"{batch.tasks[0]} to {batch.tasks[-1]} ({error})")
                    log.warning("lost LoRAs %s", lost[-1])
                    continue
                done += len(batch.tasks) * batch.config(config).iterations
                if on_step is not None:
                    on_step(done, {})
            stored.refresh()
    stored.write_index()
    if lost:
        raise RuntimeError(
            f"inversion: {len(lost)} groups were lost with their workers, {RETRIES + 1} times each:"
            f" LoRAs {'; '.join(lost)}; all others are finished, run the same command to go on"
        )
    if not stored.has(range(len(bank))):
        raise OSError(
            f"{folder}: the workers' files do not show up here; every node must reach this folder:"
            " use a shared file system or a URL"
        )
    return stored.only(range(len(bank)))


def _finished(
    ray: Any,
    run: Any,
    world: Any,
    folder: str,
    todo: list[Batch],
    slots: int,
    stop: Callable[[], bool],
) -> Iterator[tuple[Batch, str | None]]:
    """Batches as they are done, or their error where their worker was lost once too often.

    Few are handed over at a time: Ray keeps what it knows of each, and a bank may be large.
    """
    running: dict[Any, Batch] = {}
    queue = list(reversed(todo))
    while queue or running:
        while queue and len(running) < 2 * slots:
            batch = queue.pop()
            running[run.remote(world, batch, folder)] = batch
        ready, _ = ray.wait(list(running), num_returns=1, timeout=1)
        if stop():
            for other in running:
                # not by force: Ray aborts this process when a task ends at that moment
                ray.cancel(other)
            raise KeyboardInterrupt
        if not ready:
            continue
        batch, error = running.pop(ready[0]), None
        try:
            ray.get(ready[0])
        except ray.exceptions.RayTaskError:
            raise  # the code's own errors would come again
        except ray.exceptions.RayError as found:
            error = type(found).__name__
        yield batch, error


_inverters: dict[str, Inverter] = {}  # of a worker process: the networks are moved once


def _inverter(world: Any, folder: str) -> Inverter:
    """What this worker needs for any group of a pool."""
    if folder not in _inverters:
        vit, bank, prior, config, settings, device = world
        prior = None if prior is None else prior.to(device)
        _inverters.clear()
        _inverters[folder] = Inverter(vit.to(device), bank, prior, config, **settings)
    return _inverters[folder]


def _size(world: Any, folder: str) -> int:
    return _inverter(world, folder).size()


def _invert_group(world: Any, batch: Batch, folder: str) -> None:
    """Run on a worker: invert a batch and write its files, where they are not there yet."""
    files = PoolFiles.beginning(folder)
    if all(files.folder.has(task_name(i)) for i in batch.tasks):
        return  # of a worker that was lost after it had written them
    inverter = _inverter(world, folder)
    earlier = []
    if batch.warm:
        pool = PoolFiles(folder)
        earlier = [pool.task(i) for i in range(inverter.config.warm)]
    state = None
    if not is_url(folder):
        state = Path(folder) / f"group-{batch.tasks[0]:06d}.state.safetensors"
        state.parent.mkdir(parents=True, exist_ok=True)
    for part in inverter(batch, earlier, state):
        files.folder.write(task_name(part.task), safetensors_content(*part.content()))
    if state is not None:
        state.unlink(missing_ok=True)


# ---------------------------------------------------------------------- meta-training


def cluster_meta_train(
    vit: ViT,
    pool: str | Path,
    config: MetaConfig,
    *,
    folder: str | Path,
    workers: int | None = None,
    address: str = "auto",
    seed: int = 0,
    precision: str = "fp32",
    backend: Resolved = "reference",
    start: LoRA | None = None,
    tasks: Sequence[int] | None = None,
) -> LoRA:
    """`meta_train` on several workers, each with a share of every step's tasks.

    After a lost worker all begin again at the last checkpoint.

    Args:
        vit, config, seed, precision, backend, start: see `meta_train`.
        pool: where the pool is, on every node.
        folder: of checkpoints, the same on every node.
        workers: processes, of which config.tasks must be a multiple; None: the most that the
            cluster has room for and the tasks divide by.
        address: see `connected`.
        tasks: LoRAs of the pool to use; None: all.

    Raises:
        ValueError: the tasks of a step do not divide evenly.
        RuntimeError: meta-training failed again and again.

    """
    folder, device = Path(folder).resolve(), vit.pos_embed.device
    where = str(pool) if is_url(pool) else str(Path(pool).resolve())
    with connected(address) as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        count = workers or workers_for(config.tasks, _slots(ray, device))
        arguments = {"seed": seed, "precision": precision, "backend": backend, "start": start,
                     "folder": str(folder)}  # fmt: skip
        world = ray.put((vit.to("cpu"), config, arguments, where, tasks, device.type))
        vit.to(device)
        TorchTrainer(
            _train,
            train_loop_config={"world": world, "meta_lora": str(folder / "meta_lora")},
            scaling_config=ScalingConfig(num_workers=count, use_gpu=device.type == "cuda"),
            run_config=RunConfig(
                name="ray", storage_path=str(folder),
                failure_config=FailureConfig(max_failures=RETRIES),
            ),
        ).fit()  # fmt: skip
    return LoRA.load(folder / "meta_lora")


def _train(loop: dict[str, Any]) -> None:
    """Run by every worker: its part of meta-training; the first saves the meta-LoRA."""
    import ray
    import ray.train.torch

    vit, config, arguments, where, tasks, kind = ray.get(loop["world"])
    device = ray.train.torch.get_device() if kind == "cuda" else torch.device("cpu")
    pool = SyntheticPool.load(where)
    if tasks is not None:
        assert isinstance(pool.parts, PoolFiles)
        pool = SyntheticPool(pool.parts.only(tasks))
    ranks = joined()
    result = meta_train(vit.to(device), pool, config, ranks=ranks, **arguments)
    if ranks.first:
        result.lora.save(loop["meta_lora"])


def workers_for(tasks: int, slots: int) -> int:
    """The most workers that share a step's tasks evenly: a divisor of `tasks`, at most `slots`."""
    return max(n for n in range(1, max(1, slots) + 1) if tasks % n == 0)


# ---------------------------------------------------------------------- evaluation


def cluster_evaluate_shots(
    vit: ViT,
    lora: LoRA | None,
    images: Any,
    *,
    shots: Sequence[int],
    address: str = "auto",
    **settings: Any,
) -> dict[int, Result]:
    """`evaluate_shots`, the images that the task lists use shared out among the workers.

    Args:
        vit, lora, shots: see `evaluate_shots`.
        images: its `dataset`. Files are opened by the workers, so every node must reach them; what
            `decode` returned, and arrays, are sent.
        address: see `connected`.
        settings: further named arguments of `evaluate_shots`.

    Raises:
        FileNotFoundError, ValueError: see `evaluate`.
        OSError: a worker cannot read the images.
        RuntimeError: images whose worker was lost again and again.

    """
    with cluster_features(address) as features_of:
        return evaluate_shots(vit, lora, images, shots=shots, features_of=features_of, **settings)


@contextmanager
def cluster_features(address: str) -> Iterator[FeaturesOf]:
    """What `embed` and its callers take as `features_of`, to have a cluster's workers embed.

    Workers get whole batches, so each image has the company that it has in one process, and its
    features are the same where processor, versions and threads are.

    Args:
        address: see `connected`.

    Raises:
        ImportError, ConnectionError: see `connected`.

    """
    with connected(address) as ray:
        yield functools.partial(_shared_features, ray)


def _shared_features(
    ray: Any,
    forward: Embedder,
    images: ImageDataset | Pixels,
    indices: np.ndarray,
    batch_size: int,
) -> Iterator[Tensor]:
    """Features of the images at `indices`, in their order, share by share: (n, F) float32."""
    if not len(indices):
        return
    vit, lora, device = forward.source, forward.lora, forward.device
    images = images.to("cpu") if isinstance(images, Pixels) else images
    settings = {"prune": forward.prune, "precision": forward.precision, "backend": forward.backend}
    world = ray.put(
        (vit.to("cpu"), None if lora is None else lora.to("cpu"), settings, images, batch_size,
         device.type)
    )  # fmt: skip
    vit.to(device)
    run = ray.remote(max_retries=RETRIES, **_needs(device))(_embed)
    slots = _slots(ray, device)
    each = batch_size * max(1, -(-len(indices) // batch_size) // (SHARES * slots))
    starts = iter(range(0, len(indices), each))
    running: deque[tuple[int, Any]] = deque()
    while True:
        # Few at a time, as what an error leaves runs to its end: Ray 2.60 aborts this process where
        # a task that is cancelled by force ends just then.
        for start in itertools.islice(starts, 2 * slots - len(running)):
            running.append((start, run.remote([world], indices[start : start + each])))
        if not running:
            return
        start, share = running.popleft()
        yield _answer(ray, share, f"images {start} to {start + each - 1}").to(device)


def _answer(ray: Any, share: Any, what: str) -> Tensor:
    """A share's features, or what went wrong as it would be raised here."""
    try:
        return ray.get(share)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise OSError(
                f"{error.cause}; every node must reach the files of the images: use a shared file"
                " system"
            ) from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"evaluation: {what} of those to embed were lost with their worker, {RETRIES + 1} times"
            f" ({type(error).__name__}); with --embedding-cache what is done is kept"
        ) from error


_embedders: dict[str, tuple[Embedder, Any, int]] = {}  # of a worker process, see `_inverters`


def _embed(world: list[Any], indices: np.ndarray) -> Tensor:
    """Run on a worker: features of some images, (n, F) on the CPU."""
    import ray

    (reference,) = world  # in a list, so that Ray leaves the fetching to us
    key = reference.hex()
    if key not in _embedders:
        vit, lora, settings, images, batch_size, device = ray.get(reference)
        _embedders.clear()
        _embedders[key] = Embedder(vit.to(device), lora, **settings), images, batch_size
    forward, images, batch_size = _embedders[key]
    return torch.cat([x.cpu() for x in batch_features(forward, images, indices, batch_size)])

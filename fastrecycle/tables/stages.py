"""The stages of a table, each run once: what is missing runs, what is in the store is read."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

from filelock import Timeout

from fastrecycle import run as runs
from fastrecycle.baselines import CAMLNetwork, train_caml
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.pool import SyntheticPool
from fastrecycle.pretune import pretune
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.tables import recipes
from fastrecycle.tables.recipes import Bank, Caml, Meta, Pool, Recipe, Score, plain
from fastrecycle.tables.store import Store
from fastrecycle.tables.world import World
from fastrecycle.vit import ViT

log = logging.getLogger(__name__)

# Seconds a unit of work on an H200 with ViT-Ti/16, for a first estimate: see `work`.
RATES = {"bank": 6e-3, "pool": 1.5e-4, "meta": 6e-3, "caml": 5e-3, "choice": 0.02, "score": 0.02}


class OutOfTime(Exception):
    """A stage was not started because it would not end in time; `stage` says which."""

    def __init__(self, stage: str, expected: float, left: float):
        super().__init__(f"{stage}: expected to take {expected:.0f} s, {left:.0f} s are left")
        self.stage = stage


class Stages:
    """Makes what recipes say, within a time budget.

    Args:
        world: inputs and device.
        store: of finished stages.
        minutes: after which no further stage starts; nor does one that is expected to end later.
        quiet: no progress bars.

    """

    def __init__(
        self, world: World, store: Store, *, minutes: float | None = None, quiet: bool = False
    ):
        self.world, self.store, self.quiet = world, store, quiet
        self.until = None if minutes is None else time.monotonic() + 60 * minutes
        self.ran: list[str] = []  # keys of what was made, in order
        self._loaded: dict[str, Any] = {}

    def key(self, recipe: Recipe) -> str:
        """Under which the store has a recipe's result."""
        return recipes.key(recipe, self.world.read, self.world.setting(label_of(recipe)))

    # ------------------------------------------------------------------ stages

    def bank(self, recipe: Bank) -> LoRABank:
        """Pre-tuned LoRAs; a group that was cut short trains again as a whole."""
        folder = self.store.folder(self.key(recipe))

        def make() -> dict[str, Any]:
            config = recipe.pretune
            starts = range(0, config.num, config.group)
            groups = [range(i, min(i + config.group, config.num)) for i in starts]
            done = frozenset(
                i
                for group in groups
                if all((folder / f"{i:04d}" / "adapter_config.json").exists() for i in group)
                for i in group
            )
            if len(done) == config.num:  # killed after the last LoRA, before its record
                return {}
            pixels = [self.world.pixels(name, "train", recipe.backbone) for name in recipe.sources]
            with runs.progress("pre-tuning", config.num * config.steps, quiet=self.quiet) as update:
                pretune(
                    self.world.vit(recipe.backbone), pixels, config, seed=self.world.seed,
                    precision=self.world.arithmetic, on_step=update, done=done,
                    on_lora=lambda number, lora: lora.save(folder / f"{number:04d}"),
                )  # fmt: skip
            self.world.forget("train")
            return {}

        return self._made(recipe, make, lambda: LoRABank.load(folder))

    def pool(self, recipe: Pool) -> SyntheticPool:
        """Images synthesised from a bank."""
        folder = self.store.folder(self.key(recipe))

        def make() -> dict[str, Any]:
            self._recycler(recipe).invert(folder)
            return {}

        return self._made(recipe, make, lambda: SyntheticPool.load(folder))

    def meta(self, recipe: Meta) -> LoRA | ViT:
        """A meta-LoRA, or the backbone where that learned."""
        folder = self.store.folder(self.key(recipe))
        whole = recipe.config.learn == "backbone"

        def make() -> dict[str, Any]:
            recycler = self._recycler(recipe.pool, recipe)
            lora = recycler.meta_train(self.pool(recipe.pool), folder)
            if whole:
                assert recycler.result is not None
                recycler.result.vit.save(folder / "backbone.safetensors")
            else:
                lora.save(folder / "meta_lora")
            return {}

        def read() -> LoRA | ViT:
            if whole:
                return ViT.from_pretrained(folder / "backbone.safetensors").to(self.world.where)
            return LoRA.load(folder / "meta_lora")

        return self._made(recipe, make, read)

    def caml(self, recipe: Caml) -> CAMLNetwork:
        """CAML's network; cut off, it starts over."""
        path = self.store.folder(self.key(recipe)) / "caml.safetensors"
        label = label_of(recipe)

        def make() -> dict[str, Any]:
            pool, config = self.pool(recipe.pool), recipe.config
            with runs.progress("CAML", config.steps, quiet=self.quiet) as update:
                network = train_caml(
                    self.world.vit(label), pool, config, seed=self.world.seed, on_step=update,
                    precision=self.world.arithmetic, backend=self.world.resolved(label),
                )  # fmt: skip
            network.save(path)
            return {}

        return self._made(recipe, make, lambda: CAMLNetwork.load(path).to(self.world.where))

    def trained(self, recipe: Meta | Caml) -> Any:
        """What a pool trained."""
        return self.caml(recipe) if isinstance(recipe, Caml) else self.meta(recipe)

    def recorded(self, recipe: Recipe, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a choice or score left; `make` runs where it is missing."""
        self._made(recipe, make, lambda: None)
        record = self.store.record(self.key(recipe))
        assert record is not None
        return record

    # ------------------------------------------------------------------ how

    def _recycler(self, pool: Pool, meta: Meta | None = None) -> MetaLoRARecycler:
        label = pool.bank.backbone
        inputs = {
            "backbone": self.world.told("backbone", label),
            "bank": self.key(pool.bank),
            "prior": self.world.told("prior", "") if pool.inversion.alpha > 0 else "none",
        }
        if meta is not None:
            inputs["pool"] = self.key(pool)
        return MetaLoRARecycler(
            self.world.vit(label), self.bank(pool.bank),
            self.world.network() if pool.inversion.alpha > 0 else None,
            pool.inversion, None if meta is None else meta.config, device=self.world.where,
            backend=self.world.resolved(label), precision=self.world.precision,
            seed=self.world.seed, inputs=inputs, quiet=self.quiet,
        )  # fmt: skip

    def _made(
        self, recipe: Any, make: Callable[[], dict[str, Any]], read: Callable[[], Any]
    ) -> Any:
        key = self.key(recipe)
        if key in self._loaded:
            return self._loaded[key]
        if not self.store.has(key):
            for part in parts(recipe):
                self._part(part)  # their time is theirs
            self._claimed(recipe, key, make)
        found = read()
        if isinstance(found, SyntheticPool):  # one pool at a time: they are large
            self._loaded = {k: v for k, v in self._loaded.items() if not k.startswith("pool-")}
        if found is not None:
            self._loaded[key] = found
        return found

    def _claimed(self, recipe: Any, key: str, make: Callable[[], dict[str, Any]]) -> None:
        """Make a stage, or wait for the process that is making it."""
        left = None if self.until is None else max(0.0, self.until - time.monotonic())
        try:
            with self.store.claim(key, left):
                if not self.store.has(key):
                    self._check_time(recipe)
                    self._make(recipe, key, make)
        except Timeout:
            raise OutOfTime(describe(recipe), self.expected(recipe), 0.0) from None

    def _make(self, recipe: Any, key: str, make: Callable[[], dict[str, Any]]) -> None:
        log.info("%s: %s", key, describe(recipe))
        start = time.perf_counter()
        left = make()
        seconds = time.perf_counter() - start
        self.world.empty_cache()
        self.store.finish(key, {
            **left,
            "recipe": plain(recipe), "inputs": self._inputs(recipe), "seconds": seconds,
            "work": work(recipe), "like": _like(recipe),
            "setting": self.world.setting(label_of(recipe)),
            "versions": runs.versions(),
        })  # fmt: skip
        self.ran.append(key)

    def _part(self, recipe: Any) -> None:
        makers: dict[type, Callable[[Any], Any]] = {
            Bank: self.bank, Pool: self.pool, Meta: self.meta, Caml: self.caml
        }  # fmt: skip
        if not self.store.has(self.key(recipe)):
            makers[type(recipe)](recipe)

    def _inputs(self, recipe: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def note(kind: str, name: str) -> str:
            found[f"{kind} {name}".strip()] = self.world.told(kind, name)
            return ""

        plain(recipe, note)
        return found

    def _check_time(self, recipe: Any) -> None:
        if self.until is None:
            return
        left = self.until - time.monotonic()
        expected = self.expected(recipe)
        if left <= 0 or expected > left:
            raise OutOfTime(describe(recipe), expected, max(0.0, left))

    def expected(self, recipe: Any) -> float:
        """Seconds that a stage may take: by those of its kind in the store, else by `RATES`."""
        kind = recipes.STAGES[type(recipe)]
        like = _like(recipe)
        known = [
            r["seconds"] / r["work"]
            for r in self.store.records()
            if r["recipe"]["stage"] == kind and r["work"] and r["like"] == like
        ]
        on_cuda = self.world.where.type == "cuda"
        return work(recipe) * (statistics.median(known) if known else RATES[kind] * on_cuda)


def _like(recipe: Any) -> str | None:
    """Stages of a kind that take alike."""
    if isinstance(recipe, Meta):
        return recipe.config.learn
    return recipe.method.kind if isinstance(recipe, Score | recipes.Choice) else None


def label_of(recipe: Any) -> str:
    """Label of the backbone that a recipe is of."""
    if isinstance(recipe, Bank | recipes.Method):
        return recipe.backbone
    for name in ("bank", "pool", "method"):
        if hasattr(recipe, name):
            return label_of(getattr(recipe, name))
    raise TypeError(f"recipe: expected a stage, got {type(recipe).__name__}")


def parts(recipe: Any) -> list[Any]:
    """The stages that one reads, the first first."""
    if isinstance(recipe, Pool):
        return [recipe.bank]
    if isinstance(recipe, Meta):
        return [recipe.pool.bank, recipe.pool]
    if isinstance(recipe, Caml):
        return [recipe.pool]
    if isinstance(recipe, Score | recipes.Choice):
        return [each for each in (recipe.method.bank, recipe.method.trained) if each is not None]
    return []


def work(recipe: Any) -> float:
    """Units of work of a stage: LoRAs x steps, images x iterations, tasks x steps, tasks."""
    if isinstance(recipe, Bank):
        return recipe.pretune.num * recipe.pretune.steps
    if isinstance(recipe, Pool):
        images = 5 * recipe.bank.pretune.num * recipe.inversion.images_per_class
        return images * recipe.inversion.iterations
    if isinstance(recipe, Meta | Caml):
        return recipe.config.steps * recipe.config.tasks
    if isinstance(recipe, recipes.Choice):
        points = 1
        for _, values in recipe.method.grid:
            points *= len(values)
        return points * sum(on.count for on in recipe.on)
    return recipe.on.count


def describe(recipe: Any) -> str:
    """A stage in a few words."""
    if isinstance(recipe, Bank):
        return f"bank of {recipe.pretune.num} LoRAs from {', '.join(recipe.sources)}"
    if isinstance(recipe, Pool):
        return f"inversion of a {describe(recipe.bank)}"
    if isinstance(recipe, Meta):
        config = recipe.config
        return (
            f"meta-training ({config.shots}-shot, sparsity {config.sparsity:.0%}, learns"
            f" {config.learn}) on the {describe(recipe.pool)}"
        )
    if isinstance(recipe, Caml):
        return f"CAML ({recipe.config.shots}-shot) on the {describe(recipe.pool)}"
    if isinstance(recipe, recipes.Choice):
        where = ", ".join(on.dataset for on in recipe.on)
        return f"choosing settings of {recipe.method.kind} at {recipe.on[0].shots}-shot on {where}"
    on = recipe.on
    return f"{recipe.method.kind} at {on.shots}-shot on {on.dataset}, split {on.split}"

"""The paper's figures, claims, keys and pages of a table, without running one."""

from dataclasses import replace

import numpy as np
import pytest

from fastrecycle import tables
from fastrecycle.baselines import BASELINES
from fastrecycle.config import InversionConfig, PretuneConfig
from fastrecycle.data import episodes
from fastrecycle.eval import Result
from fastrecycle.tables import recipes
from fastrecycle.tables.layout import BEST, Claim, Context, Domain, published
from fastrecycle.tables.recipes import RECYCLE, Bank, Pool
from fastrecycle.tables.render import tex
from fastrecycle.tables.toys import CONFIG
from fastrecycle.tables.verdicts import verdict
from fastrecycle.vit import ViT
from fastrecycle.vit_config import ViTConfig

PAPER = published()
CONTEXT = Context(tables.SCALES["paper"], ViTConfig())


def test_the_paper_has_fourteen_tables():
    assert list(PAPER) == [f"table{i}" for i in range(1, 15)]
    ours = {name for name in tables.TABLES if name.startswith("table")}
    assert ours | set(tables.SEPARATE) == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_every_row_has_a_figure_for_every_column(name):
    table = PAPER[name]
    for row, figures in table.rows.items():
        assert len(figures) == len(table.columns), row
        assert all(0 <= figure <= 100 for figure in figures)
    assert table.costs.keys() <= table.rows.keys() | {"Full Finetuning", "LoRA + Linear"}


# read off the paper's sentences, not off its tables
@pytest.mark.parametrize(
    ("name", "column", "over_tuned", "over_free"),
    [
        ("table2", "cifar_fs/1", (9.80, 10.01), (10.01, 10.01)),
        ("table2", "mini_imagenet/1", None, (6.71, 6.71)),
        ("table6", "cifar_fs/1", (8.93, 8.93), (10.39, 10.39)),
        ("table3", "crop_diseases/1", (4.31, 4.31), (3.92, 3.92)),
        ("table3", "isic/5", (2.17, 2.41), (7.02, 7.02)),
    ],
)
def test_gains_that_the_text_tells(name, column, over_tuned, over_free):
    table = PAPER[name]
    index = table.columns.index(column)
    best = max(table.rows[row][index] for row in table.rows if row.startswith(RECYCLE))

    def gain(tunes):
        of = [v[index] for row, v in table.rows.items()
              if row in BASELINES and BASELINES[row].tunes == tunes]  # fmt: skip
        return best - max(of)

    for told, found in ((over_tuned, gain(True)), (over_free, gain(False))):
        if told is not None:
            assert told[0] - 0.006 <= found <= told[1] + 0.006


@pytest.mark.parametrize("name", [n for n in tables.TABLES if n in PAPER and n != "table13"])
def test_the_papers_rows_are_among_ours(name):
    labels = {row.label for row in tables.TABLES[name].rows(CONTEXT)}
    assert set(PAPER[name].rows) <= labels


def test_table_13_takes_the_papers_labels():
    paper = ("ViT-B (CLIP)", "DeiT-B", "LV-ViT-M")
    context = Context(tables.SCALES["paper"], ViTConfig(), paper)
    labels = {row.label for row in tables.TABLES["table13"].rows(context)}
    assert set(PAPER["table13"].rows) <= labels


@pytest.mark.parametrize("table", tables.TABLES.values(), ids=lambda table: table.name)
def test_rows_and_claims_name_what_is_there(table):
    rows = table.rows(CONTEXT)
    labels = [row.label for row in rows]
    assert len(set(labels)) == len(labels)
    assert table.reference is None or table.reference in labels
    for row in rows:
        assert row.kind in (RECYCLE, BEST) or row.kind in BASELINES
        assert set(row.of) <= set(labels)
    for claim in table.claims:
        assert {claim.left, *claim.right} <= set(labels)


def test_scales_are_the_papers_and_smaller():
    paper, small = tables.SCALES["paper"], tables.SCALES["small"]
    assert (paper.pretune.num, paper.inversion.iterations, paper.meta.steps) == (100, 2000, 60_000)
    assert (paper.tasks, small.tasks) == (600, 600)
    assert 12 <= small.pretune.num <= 30
    assert small.inversion.iterations == 300
    five = small.of_shots(small.meta, 5, small.inversion.images_per_class)
    assert (five.shots, five.queries) == (5, 5)
    assert paper.of_shots(paper.meta, 1, 20).queries == 15
    with pytest.raises(ValueError, match="too few for 5 shots and a query"):
        small.of_shots(small.meta, 5, 5)


def test_pruning_of_the_paper_on_its_own_depth():
    rows = {row.label: row for row in tables.TABLES["table4"].rows(CONTEXT)}
    assert rows["{6: 0.75}"].inversion == {"prune": {6: 0.75}}
    many = rows["{3: 0.3, 6: 0.3, 8: 0.3, 11: 0.3}"]
    # 196 - 58 - 41 - 29 - 20 = 48 patches are left
    assert 196 - int(many.meta["sparsity"] * 196) == 48


# ------------------------------------------------------------------ keys


def key(recipe, sha="0", seed=0):
    return recipes.key(recipe, lambda kind, name: f"{kind} {name} {sha}", {"seed": seed})


def test_a_key_answers_for_settings_inputs_and_what_it_stands_on():
    bank = Bank("main", ("cifar_fs",), PretuneConfig(num=3))
    pool = Pool(bank, InversionConfig(iterations=5))
    assert key(pool) == key(Pool(Bank("main", ("cifar_fs",), PretuneConfig(num=3)),
                                 InversionConfig(iterations=5)))  # fmt: skip
    others = [
        Pool(bank, InversionConfig(iterations=6)),
        Pool(bank, InversionConfig(iterations=5, prune={1: 0.5})),
        Pool(Bank("main", ("cifar_fs",), PretuneConfig(num=4)), pool.inversion),
        Pool(Bank("main", ("cifar_fs", "cub"), PretuneConfig(num=3)), pool.inversion),
    ]
    keys = [key(each) for each in (pool, *others)]
    keys += [key(pool, sha="1"), key(pool, seed=1), key(bank)]
    assert len(set(keys)) == len(keys)


def test_a_backbones_label_is_no_part_of_a_key():
    def read(kind, name):
        return f"the same {kind}"

    banks = [Bank(label, ("cub",), PretuneConfig()) for label in ("main", "ViT-B (CLIP)")]
    assert len({recipes.key(bank, read, {}) for bank in banks}) == 1


def test_without_alpha_the_prior_is_no_part_of_a_key():
    bank = Bank("main", ("cub",), PretuneConfig())
    for alpha, same in ((0.0, True), (0.1, False)):
        pool = Pool(bank, InversionConfig(alpha=alpha))
        keys = {
            recipes.key(pool, lambda kind, name, p=prior: p if kind == "prior" else kind, {})
            for prior in ("one", "other")
        }
        assert (len(keys) == 1) == same


def test_what_was_told_beside_the_weights_is_part_of_a_key():
    vit = ViT.random(CONFIG)
    other = ViT(replace(CONFIG, mean=(0.4, 0.4, 0.4)))
    other.load_state_dict(vit.state_dict())
    worlds = [
        tables.World({"main": each}, None, Some(), device="cpu") for each in (vit, vit, other)
    ]
    same, again, changed = (each.read("backbone", "main") for each in worlds)
    assert same == again != changed


# ------------------------------------------------------------------ sources


class Some:
    """Data sets of which some are there."""

    def __init__(self, *names):
        self.names = names

    def load(self, name, split):
        if name not in self.names:
            raise FileNotFoundError(name)
        return object()

    def sha256(self, name, dataset):
        return name


def world(*names):
    return tables.World({"main": "demo"}, None, Some(*names), device="cpu")


def test_a_bank_across_domains_takes_the_sources_that_are_there():
    cross = Domain("isic", ("cifar_fs", "mini_imagenet", "cub"), whichever=True)
    here = world("cifar_fs", "tiny_imagenet")
    assert here.sources(cross) == ("cifar_fs", "tiny_imagenet")
    assert world("mini_imagenet", "tiny_imagenet").sources(cross) == ("mini_imagenet",)
    assert "none of cifar_fs, mini_imagenet, cub is there" in world("isic").sources(cross)
    exchanged = Domain("cub", ("cifar_fs", "mini_imagenet"))
    told = here.sources(exchanged)
    assert told.startswith("mini_imagenet: split train is not under the data root; get it from")


# ------------------------------------------------------------------ verdicts


def result(mean, spread=1.0):
    """40 tasks around a mean; the same noise in each, so that differences have no spread."""
    noise = np.tile([-spread, spread], 20)
    return Result.of(mean + noise)


def jittery(mean):
    return Result.of(mean + np.repeat([-8.0, 8.0], 20))


def holds(test, left, right, margin=0.0, paper=None):
    claim = Claim("so", "left", tuple(right), test, margin=margin)
    return verdict(claim, {"left": left, **right}, "cifar_fs", 1, paper)


def test_ahead_needs_every_interval_above_zero():
    assert holds("ahead", result(80), {"a": result(70), "b": result(79)})[0]
    found, told = holds("ahead", result(80), {"a": result(70), "b": jittery(79)})
    assert not found
    assert "not ahead of b" in told
    assert told.startswith("+1.00 ± 2.")
    assert not holds("ahead", result(80), {"a": result(80)})[0]


def test_ahead_of_the_best_compares_with_one():
    found, told = holds("ahead of the best", result(80), {"a": jittery(70), "b": result(79)})
    assert found
    assert told.endswith("over b")


def test_not_behind_within_and_missing():
    assert holds("not behind", result(79.5), {"a": jittery(80)})[0]
    assert not holds("not behind", result(79.5), {"a": result(80)})[0]
    assert holds("within", result(79.1), {"a": result(80)}, margin=1.0)[0]
    assert not holds("within", result(78.9), {"a": result(80)}, margin=1.0)[0]
    assert holds("ahead", result(80), {"a": None}) is None


def test_cheaper_than_in_the_paper():
    claim = Claim("so", "{6: 0.75}", ("{0: 0.0}",), "cheaper")

    def found(own):
        scores = {"{6: 0.75}": result(own), "{0: 0.0}": result(90)}
        return verdict(claim, scores, "cifar_fs", 1, PAPER["table4"])

    assert found(89)[0]
    assert found(89)[1] == "-1.00 ± 0.00 over {0: 0.0}, in the paper -8.61"
    assert not found(80)[0]
    assert verdict(claim, {"{6: 0.75}": result(1), "{0: 0.0}": result(2)}, "isic", 1,
                   PAPER["table4"]) is None  # fmt: skip


def test_tex_escapes():
    assert tex("P>M>F, 50 %: 4 & {6: 0.75}_x") == r"P$>$M$>$F, 50 \%: 4 \& \{6: 0.75\}\_x"


# ------------------------------------------------------------------ real sets


@pytest.fixture(scope="module")
def here(data_root):
    return tables.World({"main": "demo"}, None, tables.Registered(data_root), device="cpu")


@pytest.mark.parametrize(
    ("table", "dataset", "sources"),
    [
        ("table2", "cifar_fs", ("cifar_fs",)),
        ("table3", "isic", ("cifar_fs", "tiny_imagenet")),
        ("table3", "omniglot", ("cifar_fs", "tiny_imagenet")),
        ("table10", "cifar_fs", ("tiny_imagenet", "omniglot_alphabets")),
        ("table10", "tiny_imagenet", ("cifar_fs", "omniglot_alphabets")),
        ("table10", "omniglot_alphabets", ("cifar_fs", "tiny_imagenet")),
        ("table11", "digits", ("cifar_fs", "tiny_imagenet")),
    ],
)
def test_real_sets_have_the_tasks_of_a_table(table, dataset, sources, here):
    (domain,) = (d for d in tables.TABLES[table].domains if d.dataset == dataset)
    assert here.sources(domain) == sources
    needed = [(dataset, "test"), *((name, "val") for name in sources)]
    for name, split in needed:
        labels = here.dataset(name, split).labels
        assert episodes(labels, 5, 5, 15, 600, 0).support.shape == (600, 25)
    # no class that a bank or a choice has seen is tested
    if domain.within:
        names = [set(here.dataset(dataset, s).class_names) for s in ("train", "val", "test")]
        assert not names[0] & names[2]
        assert not names[1] & names[2]

"""LoRA, LoRAStack and LoRABank in memory."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrecycle.lora import TARGETS, Head, LoRA, LoRABank, LoRAStack, target_sizes
from fastrecycle.vit import ViT
from fastrecycle.vit_config import PRESETS, ViTConfig

CONFIG = ViTConfig(image_size=16, patch_size=8, width=12, depth=3, heads=2, mlp_dim=20)


def random_lora(ranks, alpha=2.0, seed=0, head=None):
    """Both factors random; `ranks`: {target: rank of each block}."""
    generator = torch.Generator().manual_seed(seed)
    a, b, scale = {}, {}, {}
    for t, (d_in, d_out) in target_sizes(CONFIG.width, CONFIG.mlp_dim).items():
        if t not in ranks:
            continue
        most = max(ranks[t])
        real = torch.arange(most) < torch.tensor(ranks[t])[:, None]  # (L, R)
        a[t] = torch.randn(CONFIG.depth, most, d_in, generator=generator) * real[..., None]
        b[t] = torch.randn(CONFIG.depth, d_out, most, generator=generator) * real[:, None]
        scale[t] = torch.tensor([alpha / r if r else 0.0 for r in ranks[t]])
    return LoRA(a, b, scale, {t: tuple(ranks[t]) for t in a}, head=head)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def vit():
    vit = ViT.random(CONFIG, seed=1)
    for p in vit.parameters():
        p.mul_(5)  # far from the linear regime
    return vit


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def test_init_changes_nothing_yet(vit, images):
    lora = LoRA.init(CONFIG, targets=TARGETS)
    torch.testing.assert_close(vit(images, lora), vit(images), rtol=0, atol=0)


def test_init_is_kaiming_uniform_like_peft():
    """a ~ U(-1/sqrt(d_in), 1/sqrt(d_in)): nn.Linear's own, Kaiming with a = sqrt(5)."""
    lora = LoRA.init(PRESETS["deit_b_16"], rank=4, alpha=8, targets=("q", "fc2"))
    for t, d_in in (("q", 768), ("fc2", 3072)):
        bound = d_in**-0.5
        a = lora.a[t]
        assert a.abs().max() <= bound
        assert a.abs().max() > 0.99 * bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert abs(a.mean().item()) < 0.02 * bound
        assert not lora.b[t].any()
        assert (lora.scale[t] == 2).all()
    assert lora.rank == 4
    assert lora.depth == 12


def test_init_is_seeded():
    one, same, other = (LoRA.init(CONFIG, seed=s).a["q"] for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_parameters_are_those_of_the_paper():
    """Rank 4 on q and v of 12 blocks of width 768: 2 x 12 x 4 x (768 + 768)."""
    assert LoRA.init(PRESETS["vit_b_16"], rank=4).parameters == 147_456
    assert LoRA.init(PRESETS["vit_b_16"], rank=4, blocks=range(6)).parameters == 73_728


def test_init_on_some_blocks_trains_no_other():
    lora = LoRA.init(CONFIG, rank=2, blocks=[1])
    assert lora.ranks["q"] == (0, 2, 0)
    assert not lora.a["q"][0].any()
    assert lora.scale["q"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"targets": ("query",)}, "targets"),
        ({"targets": ()}, "targets"),
        ({"blocks": [3]}, "blocks"),
        ({"blocks": [-1]}, "blocks"),
    ],
)
def test_init_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA.init(CONFIG, **options)


def test_delta_is_what_vit_computes(vit, images):
    """Merging scale b a into the weights gives the output of the LoRA."""
    lora = random_lora({t: (3, 1, 2) for t in TARGETS})
    wanted = vit(images, lora)
    d = CONFIG.width
    for i, block in enumerate(vit.blocks):
        for position, t in enumerate(("q", "k", "v")):
            block.qkv.weight[position * d : (position + 1) * d] += lora.delta(t)[i]
        for t in ("proj", "fc1", "fc2"):
            getattr(block, t).weight += lora.delta(t)[i]
    torch.testing.assert_close(vit(images), wanted, rtol=0, atol=1e-4)


MIXED = (
    {"q": (2, 2, 2), "v": (2, 2, 2)},
    {"k": (1, 0, 3), "proj": (4, 0, 1)},
    {"q": (5, 1, 0), "fc1": (2, 2, 2), "fc2": (0, 0, 1)},
)


def test_stack_of_mixed_ranks_equals_each_alone(vit, images):
    loras = [random_lora(ranks, seed=i) for i, ranks in enumerate(MIXED)]
    index = torch.tensor([2, 0, 1, 2])
    stack = LoRAStack.of(loras)
    assert len(stack) == 3
    got = vit(images, stack, lora_index=index)
    alone = torch.cat([vit(images[i : i + 1], loras[g]) for i, g in enumerate(index)])
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-4)


def test_stack_keeps_the_gradient_of_padding_zero(vit, images):
    lora = random_lora({"q": (2, 0, 1), "fc1": (1, 3, 0)})
    tensors = [x.requires_grad_() for x in lora.tensors()]
    vit(images, lora.stack()).square().sum().backward()
    for t in lora.a:
        for i, rank in enumerate(lora.ranks[t]):
            assert not lora.a[t].grad[i, rank:].any()
            assert not lora.b[t].grad[i, :, rank:].any()
            if rank:
                assert lora.a[t].grad[i, :rank].any()
    assert len(tensors) == 4


def test_stack_rejects_loras_of_several_models():
    small = LoRA.init(CONFIG)
    with pytest.raises(ValueError, match="one model"):
        LoRAStack.of([small, LoRA.init(dataclasses.replace(CONFIG, width=24))])
    with pytest.raises(ValueError, match=r"depths \[3, 4\].*fit"):
        LoRAStack.of([small, LoRA.init(dataclasses.replace(CONFIG, depth=4))])
    with pytest.raises(ValueError, match="at least one"):
        LoRAStack.of([])


def test_average_of_identical_loras_is_the_identity(vit, images):
    lora = random_lora(MIXED[1])
    mean = LoRA.average([lora] * 3)
    for t in lora.a:
        torch.testing.assert_close(mean.delta(t), lora.delta(t))
    torch.testing.assert_close(vit(images, mean), vit(images, lora), rtol=0, atol=1e-4)
    assert mean.head is None


def test_average_of_mixed_ranks_averages_the_changes():
    loras = [random_lora(ranks, alpha=1.0 + i, seed=i) for i, ranks in enumerate(MIXED)]
    mean = LoRA.average(loras)
    assert mean.ranks["q"] == (7, 3, 2)  # ranks add up
    assert mean.ranks["fc2"] == (0, 0, 1)
    for t in mean.a:
        wanted = sum(x.delta(t) for x in loras if t in x.a) / 3
        torch.testing.assert_close(mean.delta(t), wanted)
    assert LoRA.average([mean, mean]).parameters == 2 * mean.parameters - 2 * 2 * 12


def test_average_of_factors_is_the_mean_of_a_and_of_scaled_b():
    loras = [random_lora(ranks_of(2), seed=i) for i in range(3)]
    mean = LoRA.average(loras, of="factors")
    for target in mean.a:
        a = sum(x.a[target] for x in loras) / 3
        b = sum(x.b[target] * x.scale[target][:, None, None] for x in loras) / 3
        torch.testing.assert_close(mean.delta(target), b @ a)
        same = LoRA.average([loras[0]] * 2, of="factors").delta(target)
        torch.testing.assert_close(same, loras[0].delta(target))
    with pytest.raises(ValueError, match="needs LoRAs of one rank"):
        LoRA.average([loras[0], random_lora(ranks_of(3), seed=5)], of="factors")


def test_average_of_many_stays_no_larger_than_the_weights():
    loras = [random_lora({"q": (2, 2, 2), "fc1": (2, 0, 2)}, seed=i) for i in range(9)]
    mean = LoRA.average(loras)
    assert mean.ranks == {"q": (12, 12, 12), "fc1": (12, 0, 12)}  # 18, but the width is 12
    for t in mean.a:
        torch.testing.assert_close(mean.delta(t), sum(x.delta(t) for x in loras) / 9)


def test_fit_adds_the_blocks_a_folder_does_not_name(vit, images):
    whole = random_lora({"q": (2, 1, 0), "fc1": (1, 1, 0)})
    short = dataclasses.replace(
        whole,
        a={t: x[:2] for t, x in whole.a.items()},
        b={t: x[:2] for t, x in whole.b.items()},
        scale={t: x[:2] for t, x in whole.scale.items()},
        ranks={t: r[:2] for t, r in whole.ranks.items()},
    )
    with pytest.raises(ValueError, match=r"2 blocks.*3.*lora\.fit"):
        vit(images, short)
    with pytest.raises(ValueError, match=r"lora\.fit"):
        short.check(CONFIG)
    fitted = short.fit(CONFIG)
    assert fitted.ranks == whole.ranks
    torch.testing.assert_close(vit(images, fitted), vit(images, whole), rtol=0, atol=0)
    assert whole.fit(CONFIG) is whole
    with pytest.raises(ValueError, match="another model"):
        whole.fit(dataclasses.replace(CONFIG, depth=2))
    with pytest.raises(ValueError, match="another model"):
        vit(images, LoRA.init(dataclasses.replace(CONFIG, depth=4)))
    assert LoRABank([short, whole]).fit(CONFIG)[0].depth == 3


@pytest.mark.parametrize(
    ("head", "names", "message"),
    [
        (Head(torch.zeros(2, 9)), None, "9 features.*12"),
        (Head(torch.full((2, 12), float("nan"))), None, "NaN"),
        (Head(torch.zeros(2, 12), torch.full((2,), float("inf"))), None, "NaN"),
        (Head(torch.zeros(2, 12), torch.zeros(3)), None, "bias"),
        (Head(torch.zeros(2, 12)), ("a", "b", "c"), "2 classes.*3"),
    ],
)
def test_check_rejects_heads(head, names, message):
    lora = dataclasses.replace(LoRA.init(CONFIG), head=head, class_names=names)
    with pytest.raises(ValueError, match=message):
        lora.check(CONFIG)


def test_check_rejects_another_width_and_nan():
    with pytest.raises(ValueError, match="another model"):
        LoRA.init(dataclasses.replace(CONFIG, width=24)).check(CONFIG)
    lora = LoRA.init(CONFIG)
    lora.b["v"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mine.*on v.*NaN"):
        dataclasses.replace(lora, name="mine").check(CONFIG)
    with pytest.raises(ValueError, match="LoRA 1"):
        LoRABank([LoRA.init(CONFIG), lora]).check(CONFIG)


def test_clone_shares_no_memory():
    lora = dataclasses.replace(
        random_lora({"q": (1, 1, 1)}), head=Head(torch.zeros(2, 12), torch.zeros(2))
    )
    copy = lora.clone()
    for x in (*copy.tensors(), copy.head.weight, copy.head.bias, copy.scale["q"]):
        x.add_(1)
    assert not lora.head.weight.any()
    assert not lora.head.bias.any()
    assert not torch.equal(lora.a["q"], copy.a["q"])


def test_require_head():
    head = Head(torch.zeros(2, 12))
    assert dataclasses.replace(LoRA.init(CONFIG), head=head).require_head() is head
    with pytest.raises(ValueError, match="no head"):
        LoRA.init(CONFIG).require_head()


def test_bank_is_a_sequence():
    bank = LoRABank([LoRA.init(CONFIG, seed=i) for i in range(3)])
    assert len(bank) == 3
    assert bank[1] is list(bank)[1]
    assert isinstance(bank[1:], LoRABank)
    assert len(bank[1:]) == 2
    with pytest.raises(ValueError, match="at least one"):
        LoRABank([])


ranks_of_blocks = st.tuples(*[st.integers(0, 3)] * CONFIG.depth).filter(any)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    ranks=st.dictionaries(st.sampled_from(TARGETS), ranks_of_blocks, min_size=1),
    alpha=st.sampled_from([0.0, 0.1, 1.0, 3.0, 16.0]),
    layout=st.sampled_from(["hf_clip", "hf_vit", "hf_vit_v4", "timm", "open_clip"]),
    classes=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path_factory, ranks, alpha, layout, classes, seed):
    """Any ranks, targets, alpha and head in any layout: the same change and head come back."""
    head = Head(torch.randn(classes, 12), torch.randn(classes)) if classes else None
    lora = random_lora(ranks, alpha, seed, head)
    path = tmp_path_factory.mktemp("lora")
    lora.save(path, layout)
    again = LoRA.load(path).fit(CONFIG)
    assert again.ranks == lora.ranks
    assert again.layout == layout
    for t in lora.a:
        torch.testing.assert_close(again.delta(t), lora.delta(t))
        torch.testing.assert_close(again.a[t], lora.a[t], rtol=0, atol=0)
    assert (again.head is None) == (head is None)
    if head is not None:
        assert torch.equal(again.head.weight, head.weight)
        assert torch.equal(again.head.bias, head.bias)


# ---------------------------------------------------------------------- a smaller rank


def ranks_of(rank, targets=("q", "v")):
    return {t: (rank,) * CONFIG.depth for t in targets}


def test_compress_is_the_best_approximation_of_its_rank():
    lora = LoRA.average([random_lora(ranks_of(3), seed=i) for i in range(3)])
    small = lora.compress(4)
    for target in lora.a:
        change = lora.delta(target).double()
        singular = torch.linalg.svdvals(change)
        error = (change - small.delta(target)).square().sum((1, 2))
        # Eckart-Young: what is left are the singular values cut off; float32 factors
        torch.testing.assert_close(error, singular[:, 4:].square().sum(1), rtol=1e-4, atol=1e-6)
        assert set(small.ranks[target]) == {4}
    assert small.head is None


def test_compress_to_enough_rank_changes_nothing():
    lora = random_lora(ranks_of(3))
    for target in lora.a:
        torch.testing.assert_close(
            lora.compress(5).delta(target), lora.delta(target), rtol=1e-4, atol=1e-5
        )


def test_compress_rejects_rank_and_targets_it_cannot_meet():
    with pytest.raises(ValueError, match="compress: expected a rank >= 1"):
        random_lora(ranks_of(2)).compress(0)
    with pytest.raises(ValueError, match="targets of q, v"):
        random_lora(ranks_of(2)).compress(2, targets=("fc1",))


def test_factors_of_a_bank_of_one_average_to_itself():
    lora = random_lora({"q": (2, 0, 3)})
    one = LoRA.average(LoRABank([lora]), of="factors")
    torch.testing.assert_close(one.delta("q"), lora.delta("q"))

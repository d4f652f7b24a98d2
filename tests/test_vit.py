"""The backbone against an independent, plain implementation: loops, explicit softmax, float64."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastrecycle.lora import TARGETS, LoRA, LoRAStack, target_sizes
from fastrecycle.positions import rotary_table
from fastrecycle.pruning import masked_images, patches_after_blocks, top_patches
from fastrecycle.vit import ViT
from fastrecycle.vit_config import PRESETS, ViTConfig, flops

TINY = ViTConfig(image_size=20, patch_size=4, width=12, depth=4, heads=3, mlp_dim=20)  # 25 patches
CLIP_LIKE = ViTConfig(
    image_size=20, patch_size=4, width=12, depth=4, heads=2, mlp_dim=20, out_dim=7,
    activation="quick_gelu", norm_eps=1e-5, pre_norm=True, patch_bias=False,
)  # fmt: skip
TWO_TOKENS = ViTConfig(
    image_size=20, patch_size=4, width=12, depth=4, heads=3, mlp_dim=20, prefix_tokens=2
)
HALVED = ViTConfig(
    image_size=20, patch_size=4, width=12, depth=4, heads=3, mlp_dim=20, qkv_bias=False,
    residual_scale=0.5,
)  # fmt: skip
SHAPE = {"image_size": 20, "patch_size": 4, "width": 24, "depth": 4, "heads": 3, "mlp_dim": 20}
DINOV2_LIKE = ViTConfig(**SHAPE, prefix_tokens=4, registers=3, layer_scale=True)
DINOV3_LIKE = ViTConfig(
    **SHAPE, prefix_tokens=3, registers=2, layer_scale=True, rope="dinov3", pool="norm_mean"
)
SIGLIP_LIKE = ViTConfig(**SHAPE, prefix_tokens=0, pool="map", activation="gelu_tanh")
NORMALISED = ViTConfig(
    **SHAPE, prefix_tokens=2, registers=2, qk_norm=True, rope="dinov3", pool="mean_norm", out_dim=7
)
OTHERS = [DINOV2_LIKE, DINOV3_LIKE, SIGLIP_LIKE, NORMALISED]


def wild(config: ViTConfig, seed: int = 0) -> ViT:
    """A float64 model in which no weight is 0 or 1, so that no term goes untested."""
    vit = ViT(config).double()
    if config.rope != "none":
        vit.rotary = rotary_table(config.grid, config.prefix_tokens, config.width // config.heads)
    generator = torch.Generator().manual_seed(seed)
    for name, x in vit.named_parameters():
        draw = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if x.ndim > 1 and "pos" not in name and "prefix" not in name:
            x.data = 1.5 * draw / math.sqrt(x[0].numel())
        else:
            one = ("norm" in name and "weight" in name) or ".ls" in name
            x.data = 0.3 * draw + one
    return vit


def pixels(config: ViTConfig, count: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    return torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)


def wild_lora(config: ViTConfig, targets=("q", "v"), rank=2, alpha=3.0, seed=2, blocks=None):
    lora = LoRA.init(config, rank, alpha, targets, blocks, seed).to(torch.float64)
    generator = torch.Generator().manual_seed(seed + 100)
    for target in lora.b:
        on = torch.tensor([float(r > 0) for r in lora.ranks[target]], dtype=torch.float64)
        draw = torch.randn(lora.b[target].shape, generator=generator, dtype=torch.float64)
        lora.b[target].copy_(0.3 * draw * on[:, None, None])
    return lora


# ------------------------------------------------------------------ the plain implementation


def plain_norm(x, weight, bias, eps):
    rows = []
    for row in x:
        mu = row.sum() / len(row)
        variance = ((row - mu) ** 2).sum() / len(row)
        rows.append((row - mu) / (variance + eps) ** 0.5 * weight + bias)
    return torch.stack(rows)


def plain_activation(y, kind):
    if kind == "quick_gelu":
        return y / (1 + torch.exp(-1.702 * y))
    if kind == "gelu_tanh":
        return y * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))
    return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))


def plain_turn(x, patch, grid):
    """One head's query or key (d,) of a patch under DINOv3's rotary positions, pair by pair."""
    y, d = x.clone(), len(x)
    where = [(2 * i + 1) / grid - 1 for i in divmod(patch, grid)]
    for i in range(d // 2):
        axis, frequency = divmod(i, d // 4)
        angle = 2 * math.pi * where[axis] / 100 ** (4 * frequency / d)
        y[i] = x[i] * math.cos(angle) - x[i + d // 2] * math.sin(angle)
        y[i + d // 2] = x[i + d // 2] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def plain_softmax(logits):
    return torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)


def plain_pool(vit, x, w):
    """The feature before a projection, from the last block's tokens."""
    config = vit.config
    norm = (w["norm.weight"], w["norm.bias"], config.norm_eps)
    if config.pool == "cls":
        return plain_norm(x[:1], *norm)[0]
    x = x[config.prefix_tokens :]
    if config.pool == "mean_norm":
        return plain_norm(x.sum(0, keepdim=True) / len(x), *norm)[0]
    x = plain_norm(x, *norm)
    if config.pool == "norm_mean":
        return x.sum(0) / len(x)
    d, heads = config.width // config.heads, []
    q = w["pool.q.weight"] @ w["pool.probe"] + w["pool.q.bias"]
    k, v = (x @ w["pool.kv.weight"].T + w["pool.kv.bias"]).split(config.width, dim=1)
    for head in range(config.heads):
        part = slice(head * d, (head + 1) * d)
        heads.append(plain_softmax(k[:, part] @ q[part] / math.sqrt(d)) @ v[:, part])
    y = w["pool.proj.weight"] @ torch.cat(heads) + w["pool.proj.bias"]
    z = plain_norm(y[None], w["pool.norm.weight"], w["pool.norm.bias"], config.norm_eps)[0]
    z = plain_activation(w["pool.fc1.weight"] @ z + w["pool.fc1.bias"], config.activation)
    return y + w["pool.fc2.weight"] @ z + w["pool.fc2.bias"]


def plain_forward(vit, image, lora=None, prune=None, keep=None, bug=False):
    """(feature, surviving patches, CLS scores of the last block on its patches) of one image.

    With `bug`, the pruned layer takes its residual after the second LayerNorm.
    """
    config, w = vit.config, dict(vit.named_parameters())
    p, grid = config.patch_size, config.image_size // config.patch_size

    def weight(block, target):
        full = {
            "q": lambda: w[f"blocks.{block}.qkv.weight"][: config.width],
            "k": lambda: w[f"blocks.{block}.qkv.weight"][config.width : 2 * config.width],
            "v": lambda: w[f"blocks.{block}.qkv.weight"][2 * config.width :],
        }.get(target, lambda: w.get(f"blocks.{block}.{target}.weight"))()
        if lora is not None and target in lora.a:
            rank = lora.ranks[target][block]
            for r in range(rank):  # one outer product at a time
                outer = torch.outer(lora.b[target][block][:, r], lora.a[target][block][r])
                full = full + lora.scale[target][block] * outer
        return full

    def bias(block, target):
        third = {"q": 0, "k": 1, "v": 2}.get(target)
        if third is None:
            return w[f"blocks.{block}.{target}.bias"]
        if not config.qkv_bias:
            return torch.zeros(config.width, dtype=image.dtype)
        return w[f"blocks.{block}.qkv.bias"][third * config.width : (third + 1) * config.width]

    alive = list(range(grid * grid)) if keep is None else [int(i) for i in keep]
    tokens = [w["prefix"][i] + w["pos_embed"][i] for i in range(config.prefix_tokens)]
    for i in alive:
        row, column = divmod(i, grid)
        patch = image[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
        token = torch.stack([(kernel * patch).sum() for kernel in w["patch_embed.weight"]])
        if config.patch_bias:
            token = token + w["patch_embed.bias"]
        tokens.append(token + w["pos_embed"][config.prefix_tokens + i])
    x = torch.stack(tokens)
    if config.pre_norm:
        x = plain_norm(x, w["pre_norm.weight"], w["pre_norm.bias"], config.norm_eps)
    d, first = config.width // config.heads, config.prefix_tokens
    for block in range(config.depth):
        b = f"blocks.{block}."
        y = plain_norm(x, w[b + "norm1.weight"], w[b + "norm1.bias"], config.norm_eps)
        q, k, v = (y @ weight(block, t).T + bias(block, t) for t in ("q", "k", "v"))
        mixed, scores = [], 0
        for head in range(config.heads):
            part = slice(head * d, (head + 1) * d)
            turned = []
            for name, rows in (("q", q[:, part]), ("k", k[:, part])):
                if config.qk_norm:
                    gain, shift = (w[f"{b}{name}_norm.{x}"] for x in ("weight", "bias"))
                    rows = plain_norm(rows, gain, shift, config.norm_eps)
                if config.rope == "dinov3":
                    moved = [plain_turn(rows[first + i], n, grid) for i, n in enumerate(alive)]
                    rows = torch.stack([*rows[:first], *moved])
                turned.append(rows)
            attention = plain_softmax(turned[0] @ turned[1].T / math.sqrt(d))
            asking = turned[0][0] if config.pool == "cls" else turned[0][first:].mean(0)
            scores = scores + plain_softmax(turned[1] @ asking / math.sqrt(d)) / config.heads
            mixed.append(attention @ v[:, part])
        y = torch.cat(mixed, 1) @ weight(block, "proj").T + bias(block, "proj")
        y = y * w.get(b + "ls1", 1)
        x = x + config.residual_scale * y
        scores = scores[config.prefix_tokens :]
        dropped = int((prune or {}).get(block, 0) * len(alive))
        if dropped:
            ranked = sorted(range(len(alive)), key=lambda i: (-float(scores[i]), i))
            stay = sorted(ranked[: len(alive) - dropped])
            alive = [alive[i] for i in stay]
            x = x[list(range(config.prefix_tokens)) + [config.prefix_tokens + i for i in stay]]
        y = plain_norm(x, w[b + "norm2.weight"], w[b + "norm2.bias"], config.norm_eps)
        residual = y if bug and dropped else x
        y = y @ weight(block, "fc1").T + bias(block, "fc1")
        y = plain_activation(y, config.activation)
        y = y @ weight(block, "fc2").T + bias(block, "fc2")
        x = residual + config.residual_scale * y * w.get(b + "ls2", 1)
    x = plain_pool(vit, x, w)
    return (w["head_proj.weight"] @ x if config.out_dim else x), alive, scores


def plain_batch(vit, images, lora=None, **arguments):
    keep = arguments.pop("keep", None)
    loras = lora if isinstance(lora, list) else [lora] * len(images)
    return [
        plain_forward(vit, x, loras[i], keep=None if keep is None else keep[i], **arguments)
        for i, x in enumerate(images)
    ]


def assert_same(output, expected):
    features, kept, scores = output
    torch.testing.assert_close(features, torch.stack([x[0] for x in expected]))
    assert kept.tolist() == [x[1] for x in expected]
    if scores is not None:
        torch.testing.assert_close(scores, torch.stack([x[2] for x in expected]))


# ------------------------------------------------------------------ forward


@pytest.mark.parametrize("config", [TINY, CLIP_LIKE, TWO_TOKENS, HALVED])
@pytest.mark.parametrize(
    "prune",
    # {2: .75}: the paper's {6: .75} in the middle of 4 blocks; .99 leaves one patch;
    # .01 of 25 patches is none
    [None, {2: 0.75}, {0: 0.5}, {3: 0.75}, {0: 0.3, 1: 0.3, 2: 0.3, 3: 0.3}, {1: 0.99}, {1: 0.01}],
)
def test_forward_matches_plain(config, prune):
    vit, images = wild(config), pixels(config)
    assert_same(vit.encode(images, prune=prune), plain_batch(vit, images, prune=prune))


@pytest.mark.parametrize("config", OTHERS)
@pytest.mark.parametrize("prune", [None, {2: 0.75}, {3: 0.5}, {0: 0.3, 2: 0.3}])
@pytest.mark.parametrize("keep", [None, [[0, 4, 7, 8, 19, 24], [1, 2, 3, 11, 12, 20]]])
def test_other_backbones_match_plain(config, prune, keep):
    vit, images, lora = wild(config), pixels(config), wild_lora(config, TARGETS)
    arguments = {"prune": prune, "keep": None if keep is None else torch.tensor(keep)}
    output = vit.encode(images, lora, **arguments)
    assert_same(output, plain_batch(vit, images, lora, **arguments))


@pytest.mark.parametrize("config", [TINY, TWO_TOKENS])
@pytest.mark.parametrize("targets", [("q", "v"), TARGETS])
@pytest.mark.parametrize("prune", [None, {2: 0.75}])
def test_forward_with_lora_matches_plain(config, targets, prune):
    vit, images = wild(config), pixels(config)
    lora = wild_lora(config, targets)
    expected = plain_batch(vit, images, lora, prune=prune)
    assert_same(vit.encode(images, lora, prune=prune), expected)
    assert not torch.allclose(expected[0][0], plain_forward(vit, images[0], prune=prune)[0])


def test_fresh_lora_changes_nothing():
    vit, images = wild(TINY), pixels(TINY)
    lora = LoRA.init(TINY, targets=TARGETS).to(torch.float64)
    assert torch.equal(vit(images, lora), vit(images))


def test_without_an_index_each_lora_has_an_equal_share():
    vit, images = wild(TINY), pixels(TINY, 6)
    stack = LoRAStack.of([wild_lora(TINY, TARGETS, rank=2, alpha=3, seed=i) for i in range(3)])
    indexed = vit(images, stack, lora_index=torch.tensor([0, 0, 1, 1, 2, 2]))
    torch.testing.assert_close(vit(images, stack), indexed)


@pytest.mark.parametrize("prune", [None, {1: 0.5, 2: 0.5}])
def test_lora_index_matches_each_lora_alone(prune):
    vit, images = wild(TINY), pixels(TINY, 5)
    loras = [
        wild_lora(TINY, ("q", "v"), rank=1, alpha=1, seed=3),
        wild_lora(TINY, TARGETS, rank=3, alpha=5, seed=4),
        wild_lora(TINY, ("k", "fc2"), rank=2, alpha=4, seed=5, blocks=[1, 3]),
    ]
    index = torch.tensor([2, 0, 1, 1, 0])
    together = vit.encode(images, LoRAStack.of(loras), lora_index=index, prune=prune)
    for i, which in enumerate(index.tolist()):
        alone = vit.encode(images[i : i + 1], loras[which], prune=prune)
        torch.testing.assert_close(together.features[i], alone.features[0])
        assert together.kept[i].tolist() == alone.kept[0].tolist()
    assert_same(together, plain_batch(vit, images, [loras[i] for i in index], prune=prune))


def test_average_lora_is_the_mean_change():
    loras = [wild_lora(TINY, ("q", "v"), rank=r, alpha=2 * r, seed=r) for r in (1, 3)]
    mean = LoRA.average(loras)
    for target in ("q", "v"):
        expected = (loras[0].delta(target) + loras[1].delta(target)) / 2
        torch.testing.assert_close(mean.delta(target), expected)


def test_images_of_a_batch_do_not_mix():
    vit, images = wild(TINY), pixels(TINY, 3)
    lora, prune = wild_lora(TINY), {1: 0.5}
    for i in range(3):
        alone = vit(images[i : i + 1], lora, prune=prune)[0]
        torch.testing.assert_close(vit(images, lora, prune=prune)[i], alone)


def test_nothing_is_kept_between_calls():
    vit, images = wild(TINY), pixels(TINY)
    before = {name: x.clone() for name, x in vit.state_dict().items()}
    plain = vit(images)
    vit.encode(images, wild_lora(TINY), prune={1: 0.5})
    vit(images, keep=torch.tensor([[0, 3], [1, 2]]))
    assert torch.equal(vit(images), plain)
    assert all(torch.equal(x, before[name]) for name, x in vit.state_dict().items())
    assert not any(x.requires_grad for x in vit.parameters())


# ------------------------------------------------------------------ pruning and kept patches


def test_dropping_in_the_last_block_leaves_features_unchanged():
    vit, images = wild(TINY), pixels(TINY)
    torch.testing.assert_close(
        vit(images, prune={TINY.depth - 1: 0.75}), vit(images), rtol=0, atol=1e-13
    )


def test_survivors_keep_their_own_residual():
    vit, images, prune = wild(TINY), pixels(TINY), {1: 0.5}
    ours = vit(images, prune=prune)
    right = torch.stack([x[0] for x in plain_batch(vit, images, prune=prune)])
    wrong = torch.stack([x[0] for x in plain_batch(vit, images, prune=prune, bug=True)])
    torch.testing.assert_close(ours, right)
    assert (ours - wrong).norm() > 0.1 * right.norm()  # the test can tell the two apart


def test_ties_are_broken_by_position():
    scores = torch.tensor([[0.1, 0.3, 0.3, 0.1, 0.3, 0.1], [0.2] * 6])
    assert top_patches(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert top_patches(scores, 4).tolist() == [[0, 1, 2, 4], [0, 1, 2, 3]]
    many = torch.zeros(1, 4096)
    many[0, ::2] = 1  # long enough for an unstable sort to show
    assert top_patches(many, 1024).tolist() == [list(range(0, 2048, 2))]
    vit = wild(TINY)
    for block in vit.blocks:  # no queries: every score is the same
        block.qkv.weight.data[: TINY.width] = 0
        block.qkv.bias.data[: TINY.width] = 0
    kept = vit.encode(pixels(TINY), prune={1: 0.6}).kept
    assert kept.tolist() == [list(range(10))] * 2


@pytest.mark.parametrize("config", [TINY, CLIP_LIKE, TWO_TOKENS])
def test_keep_matches_plain_on_gathered_tokens(config):
    vit, images, lora = wild(config), pixels(config), wild_lora(config)
    keep = torch.tensor([[0, 4, 7, 8, 19, 24], [1, 2, 3, 11, 12, 20]])
    for prune in (None, {1: 0.5}):
        output = vit.encode(images, lora, keep=keep, prune=prune)
        assert_same(output, plain_batch(vit, images, lora, keep=keep, prune=prune))


def test_keep_of_all_patches_is_dense():
    vit, images = wild(TINY), pixels(TINY)
    every = torch.arange(TINY.patches).expand(2, -1)
    torch.testing.assert_close(vit(images, keep=every), vit(images))
    shuffled = torch.stack([torch.randperm(TINY.patches) for _ in range(2)])
    torch.testing.assert_close(vit(images, keep=shuffled), vit(images))


def test_keep_reads_only_the_kept_pixels():
    vit, images = wild(TINY), pixels(TINY).requires_grad_()
    keep = torch.tensor([[0, 6, 7], [3, 12, 24]])
    vit(images, keep=keep).square().sum().backward()
    reached = masked_images(torch.ones_like(images), keep, TINY.patch_size) > 0
    assert (images.grad[reached] != 0).all()
    assert (images.grad[~reached] == 0).all()
    masked = masked_images(images.detach(), keep, TINY.patch_size)
    torch.testing.assert_close(vit(masked, keep=keep), vit(images, keep=keep).detach())


def test_lvvit_keep_gathers_after_its_stem():
    config = ViTConfig(
        image_size=64, patch_size=16, width=16, depth=2, heads=2, mlp_dim=24, stem="lvvit"
    )
    vit = wild(config)
    images = pixels(config)
    keep = torch.tensor([[0, 5, 9], [1, 2, 15]])
    torch.testing.assert_close(
        vit.embed(images, keep)[:, 1:],
        torch.stack([vit.embed(images)[i, 1 + keep[i]] for i in range(2)]),
    )
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(vit(images, keep=every), vit(images))


def test_gradients_in_float64():
    config = ViTConfig(image_size=8, patch_size=4, width=6, depth=2, heads=2, mlp_dim=7)
    vit, images = wild(config), pixels(config).requires_grad_()
    lora = wild_lora(config, rank=1)
    factors = [x.requires_grad_() for x in lora.tensors()]
    prune = {0: 0.5}
    assert torch.autograd.gradcheck(
        lambda images, *_: vit(images, lora, prune=prune), (images, *factors), atol=1e-6
    )


def test_training_the_whole_vit_reaches_every_tensor():
    vit = wild(CLIP_LIKE).requires_grad_()
    vit(pixels(CLIP_LIKE), prune={1: 0.5}).square().sum().backward()
    idle = [name for name, x in vit.named_parameters() if x.grad is None or not x.grad.any()]
    assert idle == []


@pytest.mark.parametrize("prune", [None, {1: 0.5}])
def test_forward_traces_without_graph_breaks(prune):
    vit = wild(TINY).float()
    images = pixels(TINY).float()
    lora = wild_lora(TINY).to(torch.float32)
    stack = LoRAStack.of([lora, lora])
    index = torch.tensor([0, 1])

    def run(images):
        return vit(images, stack, lora_index=index, prune=prune)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), run(images))


# ------------------------------------------------------------------ FLOPs


@pytest.mark.parametrize(
    ("arguments", "expected"),  # the paper's Tables 4 and 5
    [
        ({}, 50.59),
        ({"prune": {11: 0.75}}, 48.51),
        ({"prune": {8: 0.75}}, 39.14),
        ({"prune": {6: 0.75}}, 32.89),
        ({"sparsity": 0.25}, 38.09),
        ({"sparsity": 0.5}, 25.60),
        ({"sparsity": 0.75}, 13.10),
    ],
)
def test_flops_match_paper(arguments, expected):
    assert round(flops("vit_b_16", **arguments), 2) == expected
    assert flops(PRESETS["vit_b_16"], **arguments) == flops("vit_b_16", **arguments)


def test_flops_of_a_model_and_bad_arguments():
    assert flops(ViT(TINY)) == flops(TINY)
    with pytest.raises(ValueError, match="flops: expected one of vit_b_16"):
        flops("vit_b_61")
    with pytest.raises(ValueError, match=r"sparsity: must be in \[0, 1\)"):
        flops("vit_b_16", sparsity=1.0)
    with pytest.raises(ValueError, match="prune: blocks are integers in"):
        flops("vit_b_16", prune={12: 0.5})


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({4: 0.5}, r"blocks are integers in \[0, 3\], got 4"),
        ({-1: 0.5}, "got -1"),
        ({"1": 0.5}, "got '1'"),
        ({1: 1.0}, r"ratio of block 1 must be in \[0, 1\), got 1.0"),
        ({1: 1.5}, "got 1.5"),
        ({1: -0.1}, "got -0.1"),
        ({1: float("nan")}, "got nan"),
    ],
)
def test_rejects_prune_schedules(prune, message):
    with pytest.raises(ValueError, match=message):
        wild(TINY)(pixels(TINY), prune=prune)


def test_prune_counts_drop_a_share_of_the_current_patches():
    assert patches_after_blocks(196, 12, {6: 0.75})[5:7] == (196, 49)
    assert patches_after_blocks(10, 3, {0: 0.5, 2: 0.5}) == (5, 5, 3)
    assert patches_after_blocks(1, 2, {0: 0.99}) == (1, 1)


def test_rejects_shapes():
    vit, images = wild(TINY), pixels(TINY)
    for bad in (images[0], images[:, :2], images[..., :16], pixels(PRESETS["demo"], 1)):
        with pytest.raises(ValueError, match=r"images: expected \(B, 3, 20, 20\), got"):
            vit(bad)
    for bad in (torch.arange(3), torch.zeros(3, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"keep: expected patch indices \(2, k\), got"):
            vit(images, keep=bad)
    stack = LoRAStack.of([wild_lora(TINY)] * 3)
    with pytest.raises(ValueError, match="2 images cannot be shared equally by 3 LoRAs; pass lora"):
        vit(images, stack)
    with pytest.raises(ValueError, match="lora_index must have shape"):
        vit(images, stack, lora_index=torch.tensor([0]))
    other = ViTConfig(image_size=20, patch_size=4, width=24, depth=4, heads=3, mlp_dim=20)
    with pytest.raises(ValueError, match="another width"):
        vit(images, wild_lora(other))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 30}, "multiple of patch_size 4"),
        ({"heads": 5}, "multiple of heads 5"),
        ({"heads": 0}, "multiple of heads 0"),
        ({"activation": "relu"}, "activation: must be"),
        ({"std": (0.0, 1.0, 1.0)}, "std: must be above 0"),
        ({"mean": (0.5,)}, "mean: must be a tuple of 3 numbers"),
    ],
)
def test_rejects_configs(fields, message):
    base = {"image_size": 20, "patch_size": 4, "width": 12, "heads": 3}
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**base, **fields})


def test_presets_have_their_shapes():
    assert PRESETS["vit_b_16"].patches == 196
    assert PRESETS["vit_b_32"].patches == 49
    assert PRESETS["vit_b_32"].features == 512
    assert PRESETS["deit_b_16"].features == 768
    assert PRESETS["lvvit_m"].patches == 196
    with pytest.raises(ValueError, match="preset: expected one of"):
        ViT.preset("vit_b_61")
    first, again, other = (ViT.preset("demo", seed).prefix for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sum(r for r in LoRA.init(PRESETS["vit_b_16"]).ranks["q"]) == 48
    assert LoRA.init(PRESETS["vit_b_16"]).parameters == 147456  # the release's LoRA
    assert target_sizes(768, 3072)["fc2"] == (3072, 768)


# ------------------------------------------------------------------ images


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


# small and large, odd margins, extreme shapes, already right
@pytest.mark.parametrize("size", [(32, 32), (500, 333), (301, 640), (224, 224), (20, 207)])
def test_transform_matches_torchvision(size):
    transforms = pytest.importorskip("torchvision.transforms")
    vit = ViT(PRESETS["demo"])
    side, image = vit.config.image_size, picture(*size)
    reference = transforms.Compose(
        [
            transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(vit.config.mean, vit.config.std),
        ]
    )
    torch.testing.assert_close(vit.transform(image), reference(image), rtol=0, atol=1e-6)


def test_transform_matches_timm():
    timm_data = pytest.importorskip("timm.data")
    vit, image = ViT(PRESETS["demo"]), picture(500, 333)
    reference = timm_data.create_transform(
        (3, 64, 64), interpolation="bicubic", mean=vit.config.mean, std=vit.config.std, crop_pct=1.0
    )
    worst = (vit.transform(image) - reference(image)).abs().max() * 0.5  # in [0, 1] pixels
    assert worst <= 1.01 / 255


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "HSV"])
def test_transform_takes_any_mode(mode):
    vit, image = ViT(PRESETS["demo"]), picture(80, 70)
    converted = image.convert(mode)
    result = vit.transform(converted)
    assert result.shape == (3, 64, 64)
    assert torch.equal(result, vit.transform(converted.convert("RGB")))


def test_transform_batches_and_normalises():
    vit = ViT(PRESETS["demo"])
    images = [picture(70, 90, seed) for seed in range(3)]
    batch = vit.transform(images)
    assert batch.shape == (3, 3, 64, 64)
    assert batch.dtype == torch.float32
    assert all(torch.equal(x, vit.transform(y)) for x, y in zip(batch, images, strict=True))
    white, black = (vit.transform(Image.new("L", (9, 9), x)) for x in (255, 0))
    torch.testing.assert_close(white, torch.ones(3, 64, 64))
    torch.testing.assert_close(black, -torch.ones(3, 64, 64))
    torch.testing.assert_close(vit.normalise(vit.pixels(batch)), batch)
    png = io.BytesIO()
    images[0].save(png, "png")
    assert torch.equal(vit.transform(Image.open(png)), batch[0])


@pytest.mark.parametrize("bad", [None, "image.png", [], np.zeros((4, 4, 3)), [np.zeros(3)]])
def test_transform_rejects_what_is_no_image(bad):
    with pytest.raises(TypeError, match="transform: expected a PIL image or a list of them"):
        ViT(PRESETS["demo"]).transform(bad)

"""Every operation against another formulation of the same equation.

Comparisons in float64 are to 1e-12 of the largest value: 1e4 roundings of 1e-16 at most. In
float32 two orders of summation differ by some sqrt(terms) roundings of 6e-8; sums here have at
most a thousand terms, so 1e-5 leaves a factor of five.
"""

import math
import sys
import types

import pytest
import torch
from fastrecycle_kernels import reference
from torch import nn

from fastrecycle import ops

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")
F64 = {"rtol": 1e-12, "atol": 1e-12}
F32 = {"rtol": 1e-5, "atol": 1e-5}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(g, rank, d_in, d_out, seed):
    return (
        randn(g, rank, d_in, seed=seed), randn(g, d_out, rank, seed=seed + 1),
        torch.linspace(0.5, 2, g, dtype=torch.float64),
    )  # fmt: skip


# ------------------------------------------------------------------ LoRA products


@pytest.mark.parametrize("targets", [(), ("q",), ("q", "v"), ("q", "k", "v")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("g", [1, 3])
def test_lora_qkv_matches_merged_dense_weights(targets, bias, g):
    b, n, d = 5, 4, 6  # more images than LoRAs, in no order
    x, weight = randn(b, n, d, seed=1), randn(3 * d, d, seed=2)
    offset = randn(3 * d, seed=3) if bias else None
    lora = {t: low_rank(g, 2, d, d, 10 * i) for i, t in enumerate(targets)}
    index = None if g == 1 else torch.tensor([2, 0, 1, 1, 2])
    y = ops.lora_qkv(x, weight, offset, lora, lora_index=index)
    assert y.shape == (b, n, 3, d)
    for i in range(b):
        which = 0 if index is None else int(index[i])
        merged = weight.clone()
        for t in targets:
            a, up, scale = (part[which] for part in lora[t])
            place = "qkv".index(t)
            merged[place * d : (place + 1) * d] += scale * (up @ a)
        expected = x[i] @ merged.T + (0 if offset is None else offset)
        torch.testing.assert_close(y[i].flatten(1), expected, **F64)


@pytest.mark.parametrize("g", [1, 2])
def test_lora_linear_matches_merged_dense_weights(g):
    x, weight, bias = randn(2, 4, 6, seed=1), randn(5, 6, seed=2), randn(5, seed=3)
    lora = low_rank(g, 3, 6, 5, 4)
    index = None if g == 1 else torch.tensor([1, 0])
    y = ops.lora_linear(x, weight, bias, lora, lora_index=index)
    for i in range(2):
        a, up, scale = (part[0 if index is None else int(index[i])] for part in lora)
        torch.testing.assert_close(y[i], x[i] @ (weight + scale * up @ a).T + bias, **F64)
    torch.testing.assert_close(ops.lora_linear(x, weight, bias), x @ weight.T + bias, **F64)


@pytest.mark.parametrize("g", [2, 3])
def test_loras_without_an_index_have_equal_consecutive_shares(g):
    x, weight = randn(6, 4, 5, seed=1), randn(15, 5, seed=2)
    index = torch.arange(g).repeat_interleave(6 // g)
    lora = {"q": low_rank(g, 2, 5, 5, 3), "v": low_rank(g, 1, 5, 5, 5)}
    y = ops.lora_qkv(x, weight, None, lora)
    torch.testing.assert_close(y, ops.lora_qkv(x, weight, None, lora, lora_index=index), **F64)
    y = ops.lora_linear(x, weight[:5], None, lora["q"])
    want = ops.lora_linear(x, weight[:5], None, lora["q"], lora_index=index)
    torch.testing.assert_close(y, want, **F64)


def gated(e, g, rank, d_in, d_out, seed):
    """The outputs of g LoRAs under e gates."""
    weight, bias = randn(e, g, d_in, seed=seed + 2), randn(e, g, seed=seed + 3)
    return ops.GatedLowRank(*low_rank(g, rank, d_in, d_out, seed), weight, bias)


@pytest.mark.parametrize("index", [None, [1, 0, 0, 1, 1, 0]])
def test_gated_loras_weigh_the_outputs_of_each(index):
    """Token by token, LoRA by LoRA; the factors of all are two products of rank G R."""
    x, weight, bias = randn(6, 4, 5, seed=1), randn(15, 5, seed=2), randn(15, seed=3)
    lora = {"q": gated(2, 3, 2, 5, 5, 10), "v": gated(2, 3, 1, 5, 5, 20)}
    gate_of = torch.tensor([0, 0, 0, 1, 1, 1] if index is None else index)
    given = None if index is None else gate_of
    y = ops.lora_qkv(x, weight, bias, lora, lora_index=given)
    plain = ops.lora_qkv(x, weight, bias)
    torch.testing.assert_close(y[:, :, 1], plain[:, :, 1], **F64)
    for place, target in ((0, "q"), (2, "v")):
        a, b, scale, gates, offset = lora[target]
        for i, tokens in enumerate(x):
            for n, token in enumerate(tokens):
                shares = (gates[gate_of[i]] @ token + offset[gate_of[i]]).softmax(0)
                extra = sum(shares[g] * scale[g] * (b[g] @ (a[g] @ token)) for g in range(3))
                torch.testing.assert_close(y[i, n, place] - plain[i, n, place], extra, **F64)
    alone = ops.lora_linear(x, weight[:5], bias[:5], lora["q"], lora_index=given)
    torch.testing.assert_close(alone, y[:, :, 0], **F64)


def test_gated_loras_gradient():
    x, weight, factors = randn(2, 3, 4, seed=1), randn(12, 4, seed=2), gated(2, 2, 2, 4, 4, 5)

    def run(x, *leaves):
        return ops.lora_qkv(x, weight, None, {"k": ops.GatedLowRank(*leaves)})

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in (x, *factors)])


def test_lora_padding_rows_get_no_gradient():
    """What keeps a LoRA of rank 1 at rank 1 beside one of rank 3."""
    a, b, scale = low_rank(1, 3, 6, 6, 4)
    a[:, 1:], b[:, :, 1:] = 0, 0
    a.requires_grad_(), b.requires_grad_()
    weight = randn(18, 6, seed=2)
    ops.lora_qkv(randn(2, 4, 6), weight, None, {"q": (a, b, scale)}).square().sum().backward()
    assert not a.grad[:, 1:].any()
    assert not b.grad[:, :, 1:].any()
    assert a.grad[:, 0].any()
    assert b.grad[:, :, 0].any()


def test_lora_qkv_gradient():
    x, weight = randn(2, 3, 4, seed=1), randn(12, 4, seed=2)
    factors = [low_rank(2, 2, 4, 4, seed) for seed in (3, 5)]
    leaves = [x, weight, *factors[0], *factors[1]]
    index = torch.tensor([1, 0])

    def run(x, weight, aq, bq, sq, av, bv, sv):
        lora = {"q": (aq, bq, sq), "v": (av, bv, sv)}
        return ops.lora_qkv(x, weight, None, lora, lora_index=index)

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])


def test_rejects_lora_shapes():
    x, weight = randn(2, 4, 6), randn(18, 6)
    a, b, scale = low_rank(2, 3, 6, 6, 0)
    index = torch.tensor([0, 1])

    def refused(match, lora, x=x, weight=weight, index=index):
        with pytest.raises(ValueError, match=match):
            ops.lora_qkv(x, weight, None, lora, lora_index=index)

    refused(r"weight must have shape \(18, 6\), got \(12, 6\)", {}, weight=randn(12, 6))
    refused(r'targets are "q", "k" and "v", got \'fc1\'', {"fc1": (a, b, scale)})
    refused("a model of another width", {"q": (a[..., :5], b, scale)})
    refused(r"b must have shape \(2, 6, 3\), got \(2, 5, 3\)", {"q": (a, b[:, :5], scale)})
    refused(r"scale must have shape \(2,\)", {"v": (a, b, scale[:1])})
    refused("3 images cannot be shared equally by 2 LoRAs; pass lora_index", {"q": (a, b, scale)},
            x=randn(3, 4, 6), index=None)  # fmt: skip
    refused(r"lora_index must have shape \(2,\), got \(3,\)", {"q": (a, b, scale)},
            index=torch.tensor([0, 1, 1]))  # fmt: skip
    gates = gated(3, 2, 3, 6, 6, 0)
    refused("2 images cannot be shared equally by 3 gates", {"q": gates}, index=None)
    refused(r"gates of 2 LoRAs must have weights \(E, 2, 6\)",
            {"q": gates._replace(weight=gates.weight[..., :5])})  # fmt: skip
    with pytest.raises(ValueError, match="gated LoRAs have no kernel"):
        ops.lora_qkv(x, weight, None, {"q": gates}, lora_index=index, impl="triton")


# ------------------------------------------------------------------ attention


def plain_attention(q, k, v):
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return weights, weights @ v


def test_cls_scores_match_full_attention():
    q, k = randn(3, 2, 7, 4, seed=1), randn(3, 2, 7, 4, seed=2)
    scores = ops.cls_scores(q[:, :, 0], k)
    torch.testing.assert_close(scores, plain_attention(q, k, k)[0][:, :, 0].mean(1), **F64)
    torch.testing.assert_close(scores.sum(1), torch.ones(3, dtype=torch.float64), **F64)


def test_cls_scores_of_extreme_logits_are_finite():
    q, k = 1e4 * randn(1, 2, 4, seed=1, dtype=torch.float32), randn(1, 2, 5, 4, dtype=torch.float32)
    scores = ops.cls_scores(q, k)
    assert scores.isfinite().all()
    assert scores.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("d", [4, 64])
def test_cls_scores_stay_in_float32_under_autocast(d):
    """Rounded to bf16, scores of a long image would tie, and survivors hang on the order."""
    q = randn(1, 2, d, seed=1, dtype=torch.float32)
    k = randn(1, 2, 300, d, seed=2, dtype=torch.float32)
    exact = ops.cls_scores(q.double(), k.double())
    with torch.autocast("cpu", torch.bfloat16):
        scores = ops.cls_scores(q, k)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, **F32)


LENGTHS = [5, 1, 9, 2]  # one token alone too


def packed(dtype=torch.float64, heads=2, d=4):
    q, k, v = (randn(sum(LENGTHS), heads, d, seed=s, dtype=dtype) for s in range(3))
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return q, k, v, starts


def test_varlen_attention_packed_matches_each_image_alone():
    q, k, v, starts = packed()
    y = ops.varlen_attention(q, k, v, cu_seqlens=starts, longest=9)
    for start, length in zip(starts.tolist(), LENGTHS):
        one = slice(start, start + length)
        alone = [x[one].transpose(0, 1)[None] for x in (q, k, v)]  # (1, H, N, d)
        expected = nn.functional.scaled_dot_product_attention(*alone)[0].transpose(0, 1)
        torch.testing.assert_close(y[one], expected, **F64)
        torch.testing.assert_close(y[one].transpose(0, 1)[None], plain_attention(*alone)[1], **F64)


def test_varlen_attention_of_equal_images_matches_plain():
    q, k, v = (randn(2, 3, 6, 4, seed=s) for s in range(3))
    expected = plain_attention(q, k, v)[1]
    torch.testing.assert_close(ops.varlen_attention(q, k, v), expected, **F64)
    torch.testing.assert_close(reference.attention(q, k, v), expected, **F64)


def test_varlen_attention_gradient_matches_each_image_alone():
    q, k, v, starts = packed()
    weights = randn(*q.shape, seed=9)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = ops.varlen_attention(q, k, v, cu_seqlens=starts, longest=9)
    together = torch.autograd.grad((weights * y).sum(), leaves)
    total = 0
    for start, length in zip(starts.tolist(), LENGTHS):
        one = slice(start, start + length)
        alone = plain_attention(*(x[one].transpose(0, 1) for x in leaves))[1]
        total = total + (weights[one].transpose(0, 1) * alone).sum()
    for got, expected in zip(together, torch.autograd.grad(total, leaves)):
        torch.testing.assert_close(got, expected, **F64)


def test_varlen_attention_stays_in_float32_under_autocast():
    q, k, v, starts = packed(torch.float32)
    exact = ops.varlen_attention(*(x.double() for x in (q, k, v)), cu_seqlens=starts)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.varlen_attention(q, k, v, cu_seqlens=starts)
    torch.testing.assert_close(y.double(), exact, **F32)


def test_rejects_attention_shapes():
    q, k, v, starts = packed()
    with pytest.raises(ValueError, match=r"expected q \(B, H, N, d\)"):
        ops.varlen_attention(q, k, v)
    with pytest.raises(ValueError, match=r"expected packed q \(T, H, d\)"):
        ops.varlen_attention(q[None], k[None], v[None], cu_seqlens=starts)
    with pytest.raises(ValueError, match="q, k and v must have one shape"):
        ops.varlen_attention(q, k[:-1], v, cu_seqlens=starts)
    with pytest.raises(ValueError, match=r"cu_seqlens must be \(B \+ 1,\) int32"):
        ops.varlen_attention(q, k, v, cu_seqlens=starts.long())
    with pytest.raises(ValueError, match=r"cls_scores: expected q_cls \(B, H, d\)"):
        ops.cls_scores(randn(2, 3, 4), randn(2, 4, 5, 4))


# ------------------------------------------------------------------ gather


def test_token_gather_matches_loops():
    x = randn(3, 5, 2)
    index = torch.tensor([[4, 0], [1, 1], [2, 3]])
    expected = torch.stack([torch.stack([x[b, i] for i in index[b]]) for b in range(3)])
    assert torch.equal(ops.token_gather(x, index), expected)
    flat = torch.tensor([14, 0, 7, 7])
    expected = torch.stack([x[i // 5, i % 5] for i in flat.tolist()])
    assert torch.equal(ops.token_gather(x, flat), expected)
    assert ops.token_gather(x, torch.zeros(3, 0, dtype=torch.long)).shape == (3, 0, 2)


def test_token_gather_gradient_counts_every_use():
    x = randn(2, 4, 3).requires_grad_()
    ops.token_gather(x, torch.tensor([[1, 1], [0, 3]])).sum().backward()
    uses = torch.tensor([[0.0, 2, 0, 0], [1, 0, 0, 1]], dtype=torch.float64)
    assert torch.equal(x.grad, uses[..., None].expand(2, 4, 3))
    x.grad = None
    ops.token_gather(x, torch.tensor([1, 1, 4, 7])).sum().backward()
    assert torch.equal(x.grad, uses[..., None].expand(2, 4, 3))


def test_rejects_gather_shapes():
    for x, index in (
        (randn(3, 5), torch.zeros(3, 1, dtype=torch.long)),
        (randn(3, 5, 2), torch.zeros(2, 1, dtype=torch.long)),
        (randn(3, 5, 2), torch.zeros(3, 1, 1, dtype=torch.long)),
    ):
        with pytest.raises(ValueError, match=r"token_gather: expected x \(B, N, D\)"):
            ops.token_gather(x, index)


# ------------------------------------------------------------------ BatchNorm of the prior


def stored(c, seed=5, dtype=torch.float64):
    return dict(
        mean=randn(c, seed=seed, dtype=dtype), var=randn(c, seed=seed + 1, dtype=dtype).square(),
        weight=randn(c, seed=seed + 2, dtype=dtype), bias=randn(c, seed=seed + 3, dtype=dtype),
    )  # fmt: skip


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("segments", [1, 3])
def test_bn_prior_matches_batch_norm_and_explicit_moments(relu, residual, segments):
    x, s = randn(6, 4, 3, 5, seed=1), stored(4)
    skip = randn(6, 4, 3, 5, seed=2) if residual else None
    y, mu, var = ops.bn_prior(x, **s, eps=1e-3, segments=segments, relu=relu, residual=skip)
    layer = nn.BatchNorm2d(4, eps=1e-3).double().eval()
    layer.load_state_dict(
        {
            "running_mean": s["mean"], "running_var": s["var"], "weight": s["weight"],
            "bias": s["bias"], "num_batches_tracked": torch.tensor(0),
        }
    )  # fmt: skip
    expected = layer(x) + (0 if skip is None else skip)
    torch.testing.assert_close(y, expected.relu() if relu else expected, **F64)
    size = 6 // segments
    for g in range(segments):
        for c in range(4):
            numbers = x[g * size : (g + 1) * size, c].flatten().tolist()
            average = sum(numbers) / len(numbers)
            assert mu[g, c].item() == pytest.approx(average, rel=1e-12)
            biased = sum((n - average) ** 2 for n in numbers) / len(numbers)
            assert var[g, c].item() == pytest.approx(biased, rel=1e-12)


def test_bn_prior_guards_a_stored_variance_of_zero():
    x, s = randn(2, 3, 2, 2, seed=1).requires_grad_(), stored(3)
    s["var"][1] = 0
    y, mu, var = ops.bn_prior(x, **s, eps=1e-5)
    assert torch.equal(y[:, 1], s["bias"][1].expand(2, 2, 2))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    assert not gradient[:, 1].any()
    assert gradient[:, 0].any()
    (gradient,) = torch.autograd.grad((mu + var).sum(), x)  # the moments still see the channel
    assert gradient[:, 1].any()


def test_bn_prior_moments_of_half_precision_are_summed_in_float32():
    x = (100 + randn(8, 2, 16, 16, seed=1)).to(torch.bfloat16)  # bf16 steps by .5 at 100
    s = stored(2, dtype=torch.float32)
    y, mu, var = ops.bn_prior(x, **s, eps=1e-5)
    assert y.dtype == torch.bfloat16
    assert mu.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mu[0].double(), x.double().mean((0, 2, 3)), **F32)
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(var[0].double(), exact, rtol=1e-4, atol=0)  # of numbers near 100


def test_bn_prior_gradient():
    x, skip, s = randn(4, 2, 2, 2, seed=1), randn(4, 2, 2, 2, seed=2), stored(2)

    def run(x, skip):
        return ops.bn_prior(x, **s, eps=1e-3, segments=2, relu=True, residual=skip)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), skip.requires_grad_()))


def test_rejects_bn_prior_shapes():
    x, s = randn(6, 4, 2, 2), stored(4)
    for segments in (0, 4, -1):
        with pytest.raises(ValueError, match=f"6 images cannot be split into {segments} equal"):
            ops.bn_prior(x, **s, eps=1e-5, segments=segments)
    with pytest.raises(ValueError, match=r"var must have shape \(4,\), got \(1,\)"):
        ops.bn_prior(x, **{**s, "var": s["var"][:1]}, eps=1e-5)
    with pytest.raises(ValueError, match="residual must have shape"):
        ops.bn_prior(x, **s, eps=1e-5, residual=x[:1])
    with pytest.raises(ValueError, match=r"expected x \(B, C, H, W\)"):
        ops.bn_prior(x[0], **s, eps=1e-5)


# ------------------------------------------------------------------ backends, tracing


def test_backend_is_resolved_by_device_and_precision(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert ops.resolve_backend("auto", cpu) == "reference"
    monkeypatch.setattr(ops, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ops.resolve_backend("auto", cuda) == "triton"
    assert ops.resolve_backend("auto", cuda, "fp32") == "compile"
    assert ops.resolve_backend("auto", cuda, suited=ops.kernels_suit(20, 4)) == "compile"
    assert ops.resolve_backend("auto", cuda, suited=ops.kernels_suit(768, 12, 65)) == "compile"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert ops.resolve_backend("auto", cuda) == "compile"
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert ops.resolve_backend("auto", cuda) == "reference"
    assert ops.resolve_backend("compile", cpu) == "compile"
    with pytest.raises(ValueError, match='backend: expected "auto", "triton", "compile" or "ref'):
        ops.resolve_backend("cuda", cpu)
    with pytest.raises(ValueError, match='"triton" needs a CUDA device, got cpu'):
        ops.resolve_backend("triton", cpu)
    assert ops.resolve_backend("triton", cuda) == "triton"
    assert [ops.impl_of(b) for b in ("reference", "compile", "triton")] == [
        "reference", "reference", "triton",
    ]  # fmt: skip


def test_operations_trace_as_one_graph():
    q, k, v, starts = packed(torch.float32)
    x = randn(4, 4, 2, 2, dtype=torch.float32)
    s = stored(4, dtype=torch.float32)

    def run(q, k, v, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.varlen_attention(q, k, v, cu_seqlens=starts, longest=9)
            z = ops.cls_scores(q[:2], k[:4].reshape(2, 2, -1, 4))
            w = ops.bn_prior(x, **s, eps=1e-5, segments=2, relu=True)
        return y, z, *w

    traced = torch.compile(run, fullgraph=True, backend="eager")
    for got, expected in zip(traced(q, k, v, x), run(q, k, v, x)):
        assert torch.equal(got, expected)


def test_xformers_is_used_only_where_its_operators_are_available(monkeypatch, caplog):
    fmha = types.ModuleType("xformers.ops.fmha")
    fmha.cutlass = types.ModuleType("xformers.ops.fmha.cutlass")
    there = types.SimpleNamespace(is_available=lambda: True)
    away = types.SimpleNamespace(is_available=lambda: False)
    above = types.ModuleType("xformers.ops")
    above.fmha = fmha
    for module in (types.ModuleType("xformers"), above, fmha, fmha.cutlass):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ops, "find_spec", lambda name: object())
    for forward, backward, usable in ((there, there, True), (there, away, False)):
        fmha.cutlass.FwOp, fmha.cutlass.BwOp = forward, backward
        ops.xformers_attention.cache_clear()
        assert (ops.xformers_attention() is fmha) == usable
    assert "not available for this PyTorch" in caplog.text
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    ops.xformers_attention.cache_clear()
    assert ops.xformers_attention() is None
    ops.xformers_attention.cache_clear()

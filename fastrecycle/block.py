"""A transformer block, its halves apart, so that tokens can be dropped between them.

B images, N tokens, D width, H heads.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastrecycle import ops
from fastrecycle.positions import rotated
from fastrecycle.vit_config import ViTConfig

# Products of a block that are in float8 where a backbone is prepared so. proj is not: at its size
# scaling the rows of x takes as long as float8 saves.
FP8_PRODUCTS = ("qkv", "fc1", "fc2")


class Fp8Linear(nn.Linear):
    """A frozen bf16 layer with its weight in float8 beside it; see `ops.lora_linear`."""

    def __init__(self, linear: nn.Linear):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        linear = copy.deepcopy(linear).requires_grad_(False)
        for name, tensor in ops.fp8_weight(linear.weight)._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        linear.to(torch.bfloat16)
        self.weight, self.bias = linear.weight, linear.bias

    def weight8(self) -> ops.Fp8Weight:
        """The weight in float8."""
        return ops.Fp8Weight(*(self.get_buffer(name) for name in ops.Fp8Weight._fields))


def _fp8(linear: nn.Linear) -> ops.Fp8Weight | None:
    return linear.weight8() if isinstance(linear, Fp8Linear) else None


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """A branch under its LayerScale, in its own dtype."""
    return branch if scale is None else branch * scale.to(branch.dtype)


class Block(nn.Module):
    """Pre-norm transformer block; tokens are dropped between its two halves.

    What a half adds to the residual stream is handed on beside it and added where the next norm
    reads the stream, in one operation.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads, self.activation = config.heads, config.activation
        self.residual_scale = config.residual_scale
        # first of the tokens whose mean query scores patches; None: CLS asks
        self.scored_from = None if config.pool == "cls" else config.prefix_tokens
        d = config.width
        of_head, eps = d // config.heads, config.norm_eps
        self.norm1 = nn.LayerNorm(d, eps=config.norm_eps)
        self.qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d, eps=config.norm_eps)
        self.fc1 = nn.Linear(d, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, d)
        self.q_norm = nn.LayerNorm(of_head, eps=eps) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(of_head, eps=eps) if config.qk_norm else None
        self.ls1 = nn.Parameter(torch.ones(d)) if config.layer_scale else None
        self.ls2 = nn.Parameter(torch.ones(d)) if config.layer_scale else None

    def _add_norm(
        self, norm: nn.LayerNorm, x: Tensor, branch: Tensor | None, impl: ops.Impl
    ) -> tuple[Tensor, Tensor]:
        """The stream with the branch added, and its norm."""
        return ops.residual_norm(
            x, branch, norm.weight, norm.bias, norm.eps, self.residual_scale, impl=impl
        )

    def _turn(self, qkv: Tensor, rotation: Tensor | None) -> Tensor:
        """Queries and keys normalised and turned, (B, N, 3, H, d)."""
        q, k, v = qkv.unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (
                norm(x.to(norm.weight.dtype)) for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        return torch.stack((q.to(v.dtype), k.to(v.dtype), v), dim=2)

    def _scores(self, qkv: Tensor, impl: ops.Impl) -> Tensor:
        """What the mean query of the patches attends to, without gradient: (B, N)."""
        q, k, _ = qkv.detach().unbind(2)
        # summed in float32: half precision loses the mean of hundreds of queries
        mean = q[:, self.scored_from :].mean(1, dtype=torch.promote_types(q.dtype, torch.float32))
        return ops.cls_scores(mean.to(k.dtype), k.transpose(1, 2), impl=impl)

    def attend(
        self,
        x: Tensor,
        branch: Tensor | None,
        lora: dict,
        lora_index: Tensor | None,
        *,
        queries: int | None = None,
        with_scores: bool = False,
        packing: tuple[Tensor, int] | None = None,
        rotation: Tensor | None = None,
        impl: ops.Impl = "reference",
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream; attention(norm1(stream)) of the first `queries` tokens, which the caller is
        to add; the scores over all tokens (see `ViT.encode`) if asked for.

        x and branch are (B, N, D), or (1, T, D) with packing = (cu_seqlens, longest); rotation, of
        rotary positions, is (2, B or 1, N, 1, d).
        """
        small = {t: lora[t] for t in ("q", "k", "v") if t in lora}
        norm = self.norm1
        x, qkv = ops.norm_qkv(
            x, branch, (norm.weight, norm.bias), self.qkv.weight, self.qkv.bias, small,
            eps=norm.eps, scale=self.residual_scale, lora_index=lora_index, fp8=_fp8(self.qkv),
            impl=impl,
        )  # fmt: skip
        qkv = qkv.unflatten(-1, (self.heads, -1))
        if self.q_norm is not None or rotation is not None:
            qkv = self._turn(qkv, rotation)
        scores = None
        if packing is not None:
            q, k, v = qkv[0].unbind(1)  # (T, H, d) each
            y = ops.varlen_attention(q, k, v, cu_seqlens=packing[0], longest=packing[1])
            y = y.flatten(1)[None]
        elif self.scored_from is None:
            y, scores = ops.attention(qkv, queries=queries, with_scores=with_scores, impl=impl)
        else:
            y, _ = ops.attention(qkv, queries=queries, impl=impl)
            scores = self._scores(qkv, impl) if with_scores else None
        y = ops.lora_linear(
            y, self.proj.weight, self.proj.bias, lora.get("proj"), lora_index=lora_index,
            fp8=_fp8(self.proj), impl=impl,
        )  # fmt: skip
        return x, _scaled(y, self.ls1), scores

    def transform(
        self,
        x: Tensor,
        branch: Tensor,
        lora: dict,
        lora_index: Tensor | None,
        impl: ops.Impl = "reference",
    ) -> tuple[Tensor, Tensor]:
        """The stream, and MLP(norm2(stream)), which the caller is to add."""
        first, second, norm = _fp8(self.fc1), _fp8(self.fc2), self.norm2
        if first and second and not lora.keys() & {"fc1", "fc2"}:
            x, y = ops.residual_mlp(
                x, branch, (norm.weight, norm.bias), norm.eps, self.residual_scale, first,
                self.fc1.bias, second, self.fc2.bias, self.activation, impl=impl,
            )  # fmt: skip
            return x, _scaled(y, self.ls2)
        x, y = self._add_norm(norm, x, branch, impl)
        y = ops.lora_linear(
            y, self.fc1.weight, self.fc1.bias, lora.get("fc1"), lora_index=lora_index, fp8=first,
            impl=impl,
        )  # fmt: skip
        y = ops.lora_linear(
            ops.activation(y, self.activation, impl=impl), self.fc2.weight, self.fc2.bias,
            lora.get("fc2"), lora_index=lora_index, fp8=second, impl=impl,
        )  # fmt: skip
        return x, _scaled(y, self.ls2)

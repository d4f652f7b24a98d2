"""From patch tokens to one feature where the CLS token is not it: their mean, or attention.

B images, k patches of each, T patches of all, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrecycle import ops


def patch_mean(tokens: Tensor, member: Tensor | None = None) -> Tensor:
    """Mean over each image's patches.

    Args:
        tokens: (B, k, D); packed (1, T, D) with `member`.
        member: (B, T) bool, which tokens are patches of which image.

    Returns:
        (B, D).

    """
    if member is None:
        return tokens.mean(1)
    share = member.to(
        tokens.dtype
    )  # one product: sums over ragged rows have no fixed order on CUDA
    return (share @ tokens[0]) / share.sum(1, keepdim=True)


class MapPool(nn.Module):
    """Multihead attention pooling: a learned probe attends to the patches, then a residual MLP.

    z = proj(attention(q(probe), kv(tokens))), feature = z + fc2(act(fc1(norm(z)))). "Scaling Vision
    Transformers" (Zhai et al. 2022), as in SigLIP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        activation: ops.ActivationKind,
        norm_eps: float,
    ):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.probe = nn.Parameter(torch.zeros(width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)  # rows in the order k, v
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(
        self, tokens: Tensor, member: Tensor | None = None, impl: ops.Impl = "reference"
    ) -> Tensor:
        """Features (B, D); tokens and member as in `patch_mean`."""
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.q(self.probe).to(k.dtype).view(1, self.heads, 1, -1)
        if member is None:
            q = q.expand(len(tokens), -1, -1, -1)
        else:
            q = q.expand(-1, -1, len(member), -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=member)
        y = y.transpose(1, 2).flatten(2)  # (B, 1, D), packed (1, B, D)
        y = self.proj(y[:, 0] if member is None else y[0])
        z = self.fc1(self.norm(y))
        return y + self.fc2(ops.activation(z, self.activation, impl=impl))

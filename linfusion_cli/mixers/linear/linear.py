"""Generalized linear attention: LinFusion, arXiv 2409.02097, section 3.2, with the normalisation of section 3.3.

    q = φ(W_q (x + f_q(x)))      k = φ(W_k (x + f_k(x)))      v = W_v x      φ(x) = elu(x) + 1
    out = W_o · [ q (Σ kᵀ v / N) ] / [ q · (Σ k / N) + 1e-4 ]

Each token depends on the others only through two sums, so the attention can be computed piece by piece.
Shape letters: B batch, N tokens, C channels, K heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-4
PIECE_TOKENS = 1 << 16  # tokens per fp32 copy: limits memory without slowing down the product


def feature_map(x: Tensor) -> Tensor:
    """Compute φ(x) = elu(x) + 1 elementwise, which is positive, [...] -> [...]."""
    return F.elu(x) + 1


@dataclass(frozen=True)
class KeyValueSums:
    """Sums over all tokens: `kv` = Σ kᵀv [B, K, D, D] and `k` = Σ k [B, K, D], both fp32 or wider."""

    kv: Tensor
    k: Tensor
    tokens: int

    @staticmethod
    def of(k: Tensor, v: Tensor) -> KeyValueSums:
        """Compute the sums for k and v, each [B, K, N, D]."""
        wide = torch.promote_types(k.dtype, torch.float32)
        return KeyValueSums(k.to(wide).mT @ v.to(wide), k.sum(dim=-2, dtype=wide), k.shape[-2])

    def __add__(self, other: KeyValueSums) -> KeyValueSums:
        return KeyValueSums(self.kv + other.kv, self.k + other.k, self.tokens + other.tokens)


def attend(q: Tensor, sums: KeyValueSums) -> Tensor:
    """Compute the attention output of q [B, K, n, D] from the sums over all N tokens -> [B, K, n, D], in q's dtype."""
    wide_q = q.to(sums.kv.dtype)
    mixed = wide_q @ (sums.kv / sums.tokens)
    weight = wide_q @ (sums.k / sums.tokens).unsqueeze(-1)
    return (mixed / (weight + EPSILON)).to(q.dtype)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute linear attention of q, k and v, each [B, K, N, D] with φ applied to q and k -> [B, K, N, D]."""
    pieces = zip(k.split(PIECE_TOKENS, -2), v.split(PIECE_TOKENS, -2), strict=True)
    first, *rest = (KeyValueSums.of(k_piece, v_piece) for k_piece, v_piece in pieces)
    sums = sum(rest, first)
    return torch.cat([attend(q_piece, sums) for q_piece in q.split(PIECE_TOKENS, -2)], dim=-2)


def build_projection(dim: int, mid_dim: int | None) -> nn.Sequential | nn.Identity:
    """Build f_q or f_k, [..., C] -> [..., C]; `mid_dim` None means C, -1 the identity (as in the published configs)."""
    if mid_dim == -1:
        return nn.Identity()
    mid = mid_dim or dim
    return nn.Sequential(nn.Linear(dim, mid), nn.LayerNorm(mid), nn.LeakyReLU(), nn.Linear(mid, dim))


class LinearAttention(nn.Module):
    """Replacement for a UNet's `attn1`, with the same names `to_q`, `to_k`, `to_v` and `to_out`, which LoRAs use."""

    def __init__(self, dim: int, heads: int, mid_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_q_ = build_projection(dim, mid_dim)
        self.to_k_ = build_projection(dim, mid_dim)

    def queries(self, x: Tensor) -> Tensor:
        """Compute the queries: x [B, N, C] -> q [B, K, N, D]."""
        return self._split(feature_map(self.to_q(x + self.to_q_(x))))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values: x [B, N, C] -> k and v, each [B, K, N, D]."""
        return self._split(feature_map(self.to_k(x + self.to_k_(x)))), self._split(self.to_v(x))

    def project_out(self, heads_out: Tensor) -> Tensor:
        """Merge the heads and apply the output projection: [B, K, N, D] -> [B, N, C]."""
        return self.to_out[0](heads_out.transpose(1, 2).flatten(2))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_unused) -> Tensor:
        """Compute self-attention over [B, N, C], with the arguments that diffusers passes to `attn1`."""
        if encoder_hidden_states is not None:
            raise ValueError("linear attention is self-attention: encoder_hidden_states must be None")
        q = self.queries(hidden_states)
        return self.project_out(linear_attention(q, *self.keys_values(hidden_states)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

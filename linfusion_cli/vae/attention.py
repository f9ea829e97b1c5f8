"""The self-attention in a VAE's middle, where every pixel looks at one fixed set of pixels of the whole map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from linfusion_cli.strips.stream import FrozenNorm, StreamStage

SCORES = 1 << 24  # products of a query with a key that are alive at once, where a kernel keeps them


class FixedAttention(StreamStage):
    """Softmax attention with its residual; keys and values are those of the pixels it was told to `look_at`."""

    pointwise = False

    def __init__(self, attention: Attention):
        self._attention = attention
        self.before = FrozenNorm(attention.group_norm)

    def look_at(self, pixels: Tensor) -> None:
        """From now on keys and values are those of these pixels [1, 1, K, C] of the map, before it is normalised."""
        attention, normal = self._attention, self._normal(pixels)
        self._keys, self._values = self._heads(attention.to_k(normal)), self._heads(attention.to_v(normal))

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        attention = self._attention
        queries = self._heads(attention.to_q(self._normal(rows)))
        parts = queries.split(max(1, SCORES // self._keys.shape[2]), dim=2)
        seen = torch.cat([F.scaled_dot_product_attention(part, self._keys, self._values) for part in parts], dim=2)
        out = attention.to_out[0](seen.transpose(1, 2).flatten(2)).view_as(rows)
        if attention.residual_connection:
            out = out.add_(rows)
        return out if attention.rescale_output_factor == 1 else out.div_(attention.rescale_output_factor)

    def _normal(self, rows: Tensor) -> Tensor:
        normal = torch.empty_like(rows)
        self.before.write(normal, rows)
        return normal

    def _heads(self, rows: Tensor) -> Tensor:
        """[B, n, W, C] -> [1, K, B · n · W, D]."""
        return rows.flatten(0, 2).unflatten(-1, (self._attention.heads, -1)).transpose(0, 1).unsqueeze(0)

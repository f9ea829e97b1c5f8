"""Self-attention of a VAE's middle block, with keys and values from a fixed set of pixels of the map."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from linfusion_cli.strips.stream import FrozenNorm, StreamStage

MAX_SCORES = 1 << 24  # limit of query-key products in memory, for kernels that store the attention matrix


class FixedAttention(StreamStage):
    """Softmax attention and its residual connection. `set_keys` must be called before the first rows."""

    is_pointwise = False

    def __init__(self, attention: Attention):
        self._attention = attention
        self._norm = self.norm = FrozenNorm(cast(nn.GroupNorm, attention.group_norm))
        self._to_k, self._to_v = cast(nn.Module, attention.to_k), cast(nn.Module, attention.to_v)
        self._to_out = cast(nn.ModuleList, attention.to_out)[0]

    def set_keys(self, pixels: Tensor) -> None:
        """Compute keys and values from pixels [1, 1, K, C] of the input map, before normalisation."""
        normal = self._normalise(pixels)
        self._keys, self._values = self._split_heads(self._to_k(normal)), self._split_heads(self._to_v(normal))

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        """Return the attention output of rows [B, n, W, C], with the residual added."""
        attention = self._attention
        queries = self._split_heads(attention.to_q(self._normalise(rows)))
        parts = queries.split(max(1, MAX_SCORES // self._keys.shape[2]), dim=2)
        attended = torch.cat([F.scaled_dot_product_attention(part, self._keys, self._values) for part in parts], dim=2)
        out = self._to_out(attended.transpose(1, 2).flatten(2)).view_as(rows)
        if attention.residual_connection:
            out = out.add_(rows)
        return out if attention.rescale_output_factor == 1 else out.div_(attention.rescale_output_factor)

    def _normalise(self, rows: Tensor) -> Tensor:
        normal = torch.empty_like(rows)
        self._norm.write(normal, rows)
        return normal

    def _split_heads(self, rows: Tensor) -> Tensor:
        """Reshape rows [B, n, W, C] to [1, heads, B · n · W, C / heads]."""
        return rows.flatten(0, 2).unflatten(-1, (self._attention.heads, -1)).transpose(0, 1).unsqueeze(0)

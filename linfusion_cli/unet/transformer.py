"""A transformer in strips: one in-place pass over all tokens per block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from linfusion_cli.core.geometry import split_evenly
from linfusion_cli.mixers.linear.linear import KeyValueSums, LinearAttention, attend
from linfusion_cli.strips.communicator import Communicator
from linfusion_cli.strips.cost import Cost, MetaMap
from linfusion_cli.strips.dilation import unwrap_lora
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import PIECE_MULTIPLE, MapWriter, StripContext, StripSize, as_nchw, as_nhwc
from linfusion_cli.strips.windows import NormalisedSource

TOKEN_LAYERS = (nn.Linear, nn.Conv2d)
PASSES_PER_BLOCK = 60  # reads and writes per channel and token, except in matrix products
PIECES_ALIVE = 20  # peak of live activations in the feed-forward, relative to a token's channels


class LinearBlock(Protocol):
    """A BasicTransformerBlock with linear self-attention, and with cross-attention."""

    norm1: nn.Module
    attn1: LinearAttention
    norm2: nn.Module
    attn2: Attention
    norm3: nn.Module
    ff: nn.Module


def get_blocks(transformer: Transformer2DModel) -> Sequence[LinearBlock]:
    """Return the transformer's blocks."""
    return cast(Sequence[LinearBlock], transformer.transformer_blocks)


@dataclass(frozen=True)
class TextKeyValues:
    """Keys and values of the text [B, K, T, D] for one cross-attention, computed once for all strips.

    `images` are the keys and values of the IP-Adapters' images, with values multiplied by the adapter's scale.
    """

    keys: Tensor
    values: Tensor
    images: tuple[tuple[Tensor, Tensor], ...] = ()

    @staticmethod
    def project(attention: Attention, hidden: Tensor, images: Sequence[Tensor] = ()) -> TextKeyValues:
        """Project the text encoders' `hidden` and the image tokens of IP-Adapters, each [B, T, C]."""
        projections = cast(nn.Module, attention.to_k), cast(nn.Module, attention.to_v)
        keys, values = (split_heads(layer(hidden), attention.heads) for layer in projections)
        return TextKeyValues(keys, values, tuple(compute_image_key_values(attention, images)) if images else ())


def compute_image_key_values(attention: Attention, images: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield keys and scaled values [B, K, T, D] of the images with a non-zero scale."""
    ip: Any = attention.processor  # an IPAdapterAttnProcessor
    for tokens, scale, to_k, to_v in zip(images, ip.scale, ip.to_k_ip, ip.to_v_ip, strict=True):
        if scale != 0:
            yield split_heads(to_k(tokens), attention.heads), scale * split_heads(to_v(tokens), attention.heads)


def run_transformer(
    context: StripContext, transformer: Transformer2DModel, x: FeatureMap, hidden: Tensor, images: Sequence[Tensor] = ()
) -> FeatureMap:
    """Apply `transformer`, which has linear self-attention, to `x` in place.

    `hidden` is the text and `images` are the IP-Adapters' tokens, all [B, T, C]. The last block's pass also applies the
    output projection and adds the residual.
    """
    blocks = get_blocks(transformer)
    pixels = x.flatten()
    tokens = context.storage.new(pixels.shape[0], pixels.height, 1, transformer.inner_dim)
    sums = project_in(context, transformer, x, tokens)
    for block, following in zip(blocks, blocks[1:], strict=False):
        sums = run_block(context, block, following, tokens, sums, TextKeyValues.project(block.attn2, hidden, images))
    x.moments = project_out(
        context, transformer, pixels, tokens, sums, TextKeyValues.project(blocks[-1].attn2, hidden, images)
    ).moments
    return x


def project_in(
    context: StripContext, transformer: Transformer2DModel, x: FeatureMap, tokens: FeatureMap
) -> KeyValueSums:
    """Normalise `x`, project it into `tokens`, and return the sums for the first block's attention."""
    source, pixels = NormalisedSource([x], context.communicator, 0, transformer.norm, None), x.flatten()
    sums = KeyValueAccumulator(get_blocks(transformer)[0])
    for start, stop in context.split_tokens(tokens):
        piece = source.normalise(pixels.read(start, stop)).to(context.storage.dtype)
        tokens.write(start, sums.add(apply_projection(transformer.proj_in, piece)))
    return sums.reduce(context.communicator)


def run_block(
    context: StripContext,
    block: LinearBlock,
    following: LinearBlock,
    tokens: FeatureMap,
    sums: KeyValueSums,
    text: TextKeyValues,
) -> KeyValueSums:
    """Finish `block` on each piece of the tokens and return the sums for the attention of the following block."""
    following_sums, apply = KeyValueAccumulator(following), select_apply_block(context)
    for start, stop in context.split_tokens(tokens):
        tokens.write(start, following_sums.add(apply(block, tokens.read(start, stop), sums, text)))
    return following_sums.reduce(context.communicator)


def project_out(
    context: StripContext,
    transformer: Transformer2DModel,
    x: FeatureMap,
    tokens: FeatureMap,
    sums: KeyValueSums,
    text: TextKeyValues,
) -> FeatureMap:
    """Finish the last block, project its tokens and add the result to `x`."""
    result, apply = MapWriter(x), select_apply_block(context)
    for start, stop in context.split_tokens(tokens):
        piece = apply(get_blocks(transformer)[-1], tokens.read(start, stop), sums, text)
        result.write(start, x.read(start, stop) + apply_projection(transformer.proj_out, piece))
    return result.close(context.communicator)


def apply_block(block: LinearBlock, piece: Tensor, sums: KeyValueSums, text: TextKeyValues) -> Tensor:
    """Apply `block` to a piece of the tokens [B, n, 1, C], given the sums over all tokens."""
    x = piece.squeeze(2)
    x = x + block.attn1.project_out(attend(block.attn1.queries(block.norm1(x)), sums))
    x = x + cross_attention(block.attn2, block.norm2(x), text)
    x = x + block.ff(block.norm3(x))
    return x.unsqueeze(2)


def select_apply_block(context: StripContext) -> Callable[..., Tensor]:
    """Return `apply_block`, compiled if the context requires it."""
    return compile_function(apply_block) if context.compiled else apply_block


@cache
def compile_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile `function` with torch.compile, once for all blocks with the same shapes."""
    return torch.compile(function, dynamic=False)


def cross_attention(attention: Attention, x: Tensor, text: TextKeyValues) -> Tensor:
    """Return the attention [B, n, C] of tokens x [B, n, C] to the text, and to images in addition."""
    queries = split_heads(attention.to_q(x), attention.heads)
    attended = F.scaled_dot_product_attention(queries, text.keys, text.values)
    for keys, values in text.images:
        attended = attended + F.scaled_dot_product_attention(queries, keys, values)
    projection = attention.to_out[0]  # pyright: ignore[reportOptionalSubscript]  # None only with pre_only
    return projection(attended.transpose(1, 2).flatten(2))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape [B, n, C] to [B, K, n, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def apply_projection(layer: nn.Module, piece: Tensor) -> Tensor:
    """Apply `proj_in` or `proj_out`, linear or a 1x1 convolution, to a piece of pixels or tokens [B, n, 1, C]."""
    if isinstance(unwrap_lora(layer), nn.Conv2d):
        return as_nhwc(layer(as_nchw(piece)))
    return layer(piece)


class KeyValueAccumulator:
    """Accumulates the sums over all tokens that the self-attention of `block` needs."""

    def __init__(self, block: LinearBlock):
        self._block = block
        self._sums: KeyValueSums | None = None

    def add(self, piece: Tensor) -> Tensor:
        """Add a piece of the tokens [B, n, 1, C] to the sums, and return it."""
        sums = KeyValueSums.of(*self._block.attn1.keys_values(self._block.norm1(piece.squeeze(2))))
        self._sums = sums if self._sums is None else self._sums + sums
        return piece

    def reduce(self, communicator: Communicator) -> KeyValueSums:
        """Return the sums over the tokens of all devices."""
        sums = self._sums
        assert sums is not None  # all tokens have been added
        tokens = communicator.all_reduce(torch.tensor(sums.tokens))
        return KeyValueSums(communicator.all_reduce(sums.kv), communicator.all_reduce(sums.k), int(tokens))


def count_weights(layer: nn.Module | None) -> int:
    """Return the number of weights of a linear layer, without those of LoRA."""
    return cast(nn.Linear, unwrap_lora(cast(nn.Module, layer))).weight.numel()


def list_processor_parameters(block: LinearBlock) -> list[nn.Parameter]:
    """Return the parameters of an IP-Adapter's attention processor."""
    return list(cast(nn.Module, block.attn2.processor).parameters())


def transformer_cost(
    size: StripSize, transformer: Transformer2DModel, x: MetaMap, tokens_map: MetaMap, text_tokens: int, itemsize: int
) -> Cost:
    """Return the cost of `run_transformer` on the map `x`.

    Each linear layer runs once per token, those for the text once per text token. The feed-forward has the largest
    strip: 8 C, half of which is gated, and their product.
    """
    shape = x.shape[:3]
    blocks, tokens, channels = get_blocks(transformer), math.prod(shape), transformer.inner_dim
    weights = sum(layer.weight.numel() for layer in transformer.modules() if isinstance(layer, TOKEN_LAYERS))
    text_weights = sum(count_weights(block.attn2.to_k) + count_weights(block.attn2.to_v) for block in blocks)
    weights -= text_weights
    processor: Any = blocks[0].attn2.processor
    if hasattr(processor, "to_k_ip"):  # the layers of an IP-Adapter process image tokens only
        weights -= sum(parameter.numel() for block in blocks for parameter in list_processor_parameters(block))
        text_tokens += sum(processor.num_tokens)
    text_flops = 2 * shape[0] * text_tokens * text_weights  # the layers for image tokens have the same shapes
    is_linear, heads = isinstance(blocks[0].attn1, LinearAttention), blocks[0].attn1.heads
    keys = channels // heads if is_linear else tokens // shape[0]  # columns that each query is multiplied with
    attention = len(blocks) * 4 * channels * (keys + text_tokens)
    passes = len(blocks) * PASSES_PER_BLOCK * tokens * channels
    largest = max(stop - start for start, stop in split_evenly(shape[1] * shape[2], size.tokens, PIECE_MULTIPLE))
    piece = shape[0] * largest * channels * itemsize
    rows = -(-largest // shape[2])
    extra = sum(each.read_bytes(rows) + each.write_bytes(rows) for each in (x, tokens_map))
    return Cost(tokens * (2 * weights + attention) + text_flops, passes, piece * PIECES_ALIVE + extra)

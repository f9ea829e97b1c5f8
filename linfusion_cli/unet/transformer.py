"""A transformer in strips: one visit to every token for each of its blocks, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from linfusion_cli.core.geometry import split_evenly
from linfusion_cli.mixers.linear.linear import KeyValueSums, LinearAttention, attend
from linfusion_cli.strips.communicator import Communicator
from linfusion_cli.strips.cost import Cost, MetaMap
from linfusion_cli.strips.dilation import inner
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import PIECE_MULTIPLE, Strips, StripSize, Writer, as_nchw, as_nhwc
from linfusion_cli.strips.windows import Normed

TOKEN_LAYERS = (nn.Linear, nn.Conv2d)
PASSES_PER_BLOCK = 60  # times that a token's channels are read or written beside matrix products, activations included
PIECES_ALIVE = 20  # how many times its channels are alive at once, in the feed-forward


@dataclass(frozen=True)
class Text:
    """Keys and values of the text [B, K, T, D] for one cross-attention, computed once for all strips.

    `pictures` are those of the pictures that IP-Adapters listen to, their values already times the adapter's scale.
    """

    keys: Tensor
    values: Tensor
    images: tuple[tuple[Tensor, Tensor], ...] = ()

    @staticmethod
    def of(attention: Attention, hidden: Tensor, images: Sequence[Tensor] = ()) -> Text:
        """What `attention` makes of the text encoders' `hidden` and of the tokens of `pictures`, each [B, T, C]."""
        keys, values = (split_heads(project(hidden), attention.heads) for project in (attention.to_k, attention.to_v))
        return Text(keys, values, tuple(image_key_values(attention, images)) if images else ())


def image_key_values(attention: Attention, images: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and scaled values [B, K, T, D] of the pictures that are heard at all."""
    ip = attention.processor
    for tokens, scale, to_k, to_v in zip(images, ip.scale, ip.to_k_ip, ip.to_v_ip, strict=True):
        if scale != 0:
            yield split_heads(to_k(tokens), attention.heads), scale * split_heads(to_v(tokens), attention.heads)


def run_transformer(
    run: Strips, transformer: Transformer2DModel, x: FeatureMap, hidden: Tensor, images: Sequence[Tensor] = ()
) -> FeatureMap:
    """`transformer`, whose self-attention is linear, over `x`; written over `x`.

    It hears the text's `hidden` and the tokens of `pictures`, all [B, T, C]. The last block's visit ends with the
    projection out and the residual.
    """
    blocks = transformer.transformer_blocks
    pixels = x.flattened()
    tokens = run.storage.new(pixels.shape[0], pixels.height, 1, transformer.inner_dim)
    sums = begin(run, transformer, x, tokens)
    for block, following in zip(blocks, blocks[1:], strict=False):
        sums = visit(run, block, following, tokens, sums, Text.of(block.attn2, hidden, images))
    x.moments = end(run, transformer, pixels, tokens, sums, Text.of(blocks[-1].attn2, hidden, images)).moments
    return x


def begin(run: Strips, transformer: Transformer2DModel, x: FeatureMap, tokens: FeatureMap) -> KeyValueSums:
    """Normalise `x` and project it into `tokens`; the sums of the first block's attention."""
    source, pixels = Normed([x], run.exchange, 0, transformer.norm, None), x.flattened()
    sums = Sums(transformer.transformer_blocks[0])
    for start, stop in run.pieces(tokens):
        piece = source.normed(pixels.read(start, stop)).to(run.storage.dtype)
        tokens.write(start, sums.add(projected(transformer.proj_in, piece)))
    return sums.over_all(run.exchange)


def visit(
    run: Strips,
    block: BasicTransformerBlock,
    following: BasicTransformerBlock,
    tokens: FeatureMap,
    sums: KeyValueSums,
    text: Text,
) -> KeyValueSums:
    """Finish `block` on each piece of the tokens and gather the sums of the following block's attention."""
    gathered, finish = Sums(following), compiled(finished) if run.compiled else finished
    for start, stop in run.pieces(tokens):
        tokens.write(start, gathered.add(finish(block, tokens.read(start, stop), sums, text)))
    return gathered.over_all(run.exchange)


def end(
    run: Strips, transformer: Transformer2DModel, x: FeatureMap, tokens: FeatureMap, sums: KeyValueSums, text: Text
) -> FeatureMap:
    """Finish the last block, project out of the tokens and add the result to `x`."""
    result, finish = Writer(x), compiled(finished) if run.compiled else finished
    for start, stop in run.pieces(tokens):
        piece = finish(transformer.transformer_blocks[-1], tokens.read(start, stop), sums, text)
        result.write(start, x.read(start, stop) + projected(transformer.proj_out, piece))
    return result.close(run.exchange)


def finished(block: BasicTransformerBlock, piece: Tensor, sums: KeyValueSums, text: Text) -> Tensor:
    """`block` on a piece of the tokens [B, n, 1, C], given the sums over all of them."""
    x = piece.squeeze(2)
    x = x + block.attn1.project_out(attend(block.attn1.queries(block.norm1(x)), sums))
    x = x + cross_attention(block.attn2, block.norm2(x), text)
    x = x + block.ff(block.norm3(x))
    return x.unsqueeze(2)


@cache
def compiled(function: Callable) -> Callable:
    """`function` compiled by torch: one program for all blocks of one shape."""
    return torch.compile(function, dynamic=False)


def cross_attention(attention: Attention, x: Tensor, text: Text) -> Tensor:
    """Tokens x [B, n, C] listen to the text, and to pictures beside it -> [B, n, C]."""
    queries = split_heads(attention.to_q(x), attention.heads)
    heard = F.scaled_dot_product_attention(queries, text.keys, text.values)
    for keys, values in text.images:
        heard = heard + F.scaled_dot_product_attention(queries, keys, values)
    return attention.to_out[0](heard.transpose(1, 2).flatten(2))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, C] -> [B, K, n, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def projected(layer: nn.Module, piece: Tensor) -> Tensor:
    """A piece of pixels or tokens [B, n, 1, C] through `proj_in` or `proj_out`: linear, or a 1x1 convolution."""
    if isinstance(inner(layer), nn.Conv2d):
        return as_nhwc(layer(as_nchw(piece)))
    return layer(piece)


class Sums:
    """Gathers what `block`'s self-attention needs of all tokens."""

    def __init__(self, block: BasicTransformerBlock):
        self._block = block
        self._sums: KeyValueSums | None = None

    def add(self, piece: Tensor) -> Tensor:
        """Take in a piece of the tokens [B, n, 1, C]; returns it."""
        seen = KeyValueSums.of(*self._block.attn1.keys_values(self._block.norm1(piece.squeeze(2))))
        self._sums = seen if self._sums is None else self._sums + seen
        return piece

    def over_all(self, exchange: Communicator) -> KeyValueSums:
        """The sums over the tokens of all devices."""
        tokens = exchange.sum(torch.tensor(self._sums.tokens))
        return KeyValueSums(exchange.sum(self._sums.kv), exchange.sum(self._sums.k), int(tokens))


def transformer_cost(
    size: StripSize, transformer: Transformer2DModel, x: MetaMap, tokens_map: MetaMap, text_tokens: int, itemsize: int
) -> Cost:
    """`run_transformer` on the map `x`: each linear layer once per token, but those of the text per token of that.

    The feed-forward's strip is the largest: 8 C wide, half of it through its gate, and their product.
    """
    shape = x.shape[:3]
    blocks, tokens, channels = transformer.transformer_blocks, math.prod(shape), transformer.inner_dim
    weights = sum(layer.weight.numel() for layer in transformer.modules() if isinstance(layer, TOKEN_LAYERS))
    of_text = sum(inner(layer).weight.numel() for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v))
    weights -= of_text
    processor = blocks[0].attn2.processor
    if hasattr(processor, "to_k_ip"):  # an IP-Adapter's: its layers see the picture's tokens alone
        weights -= sum(parameter.numel() for block in blocks for parameter in block.attn2.processor.parameters())
        text_tokens += sum(processor.num_tokens)
    text_flops = 2 * shape[0] * text_tokens * of_text  # the layers for a picture's tokens are of the same shapes
    is_linear, heads = isinstance(blocks[0].attn1, LinearAttention), blocks[0].attn1.heads
    seen = channels // heads if is_linear else tokens // shape[0]  # what a query is multiplied with
    attention = len(blocks) * 4 * channels * (seen + text_tokens)
    passes = len(blocks) * PASSES_PER_BLOCK * tokens * channels
    largest = max(stop - start for start, stop in split_evenly(shape[1] * shape[2], size.tokens, PIECE_MULTIPLE))
    piece = shape[0] * largest * channels * itemsize
    rows = -(-largest // shape[2])
    beside = sum(each.reading(rows) + each.writing(rows) for each in (x, tokens_map))
    return Cost(tokens * (2 * weights + attention) + text_flops, passes, piece * PIECES_ALIVE + beside)

"""Encode prompts; the text encoders are in memory only while they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from linfusion_cli.core.errors import NonFinite, UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.models.adapters.lora import merge_text_lora
from linfusion_cli.models.adapters.lora_file import check_parts
from linfusion_cli.models.adapters.textual_inversion import Inversion, add_tokens, check_widths
from linfusion_cli.models.families.facts import ModelFacts, read_config
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.load.networks import load_part
from linfusion_cli.models.text.tokens import load_tokenizer, tokenize

ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


@dataclass(frozen=True)
class PromptEmbedding:
    """Conditioning from one prompt: `hidden` [1, T, C], and `pooled` [1, C] for SDXL.

    `images` are the image embeddings of the IP-Adapters, [1, 1, D] or [1, 1, L, D] each.
    """

    hidden: Tensor
    pooled: Tensor | None
    images: tuple[Tensor, ...] = ()

    def make_zeros(self) -> PromptEmbedding:
        """Return zeros of the same shapes; SDXL was trained with zeros as the empty prompt."""
        return PromptEmbedding(
            torch.zeros_like(self.hidden), None if self.pooled is None else torch.zeros_like(self.pooled)
        )

    def concat(self, other: PromptEmbedding) -> PromptEmbedding:
        """Return both in one batch, this one first."""
        pooled = None if self.pooled is None else torch.cat([self.pooled, cast(Tensor, other.pooled)])
        images = tuple(torch.cat(pair) for pair in zip(self.images, other.images, strict=True))
        return PromptEmbedding(torch.cat([self.hidden, other.hidden]), pooled, images)

    def build_added_conditions(self, sizes: TimeIds) -> dict[str, Tensor | list[Tensor]] | None:
        """Return `added_cond_kwargs` of the UNet for SDXL and IP-Adapters, None if empty."""
        added: dict[str, Tensor | list[Tensor]] = {"image_embeds": list(self.images)} if self.images else {}
        if self.pooled is not None:
            time_ids = torch.tensor([sizes.values], dtype=torch.float32)
            added |= {"text_embeds": self.pooled, "time_ids": time_ids.repeat(len(self.pooled), 1)}
        return added or None


@dataclass(frozen=True)
class TimeIds:
    """Size conditioning of SDXL: original size, top left corner of the crop, and target size, in pixels."""

    original: Size
    crop_top_left: tuple[int, int]
    target: Size

    @property
    def values(self) -> list[int]:
        """The six values in the order of SDXL, heights first."""
        original, target = self.original, self.target
        return [original.height, original.width, *self.crop_top_left, target.height, target.width]


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of the prompt and the negative prompt, and problems with the texts.

    `truncated` has the ignored ends of texts over the token limit, by "prompt" and "negative prompt"; `unused_tokens`
    are the tokens of textual inversions that occur in neither.
    """

    positive: PromptEmbedding
    negative: PromptEmbedding
    truncated: dict[str, str]
    unused_tokens: tuple[str, ...]

    def with_images(self, embeds: Sequence[tuple[Tensor, Tensor]]) -> Conditioning:
        """Return a copy with image embeddings: pairs for the positive and the negative half, one per IP-Adapter."""
        positive, negative = zip(*embeds, strict=True)
        halves = replace(self.positive, images=positive), replace(self.negative, images=negative)
        return replace(self, positive=halves[0], negative=halves[1])

    def check_finite(self) -> None:
        """Raise NonFinite if embeddings contain NaN or Inf."""
        for half in (self.positive, self.negative):
            sources = {"prompts": (half.hidden, half.pooled), "image prompts": half.images}
            for name, tensors in sources.items():
                if not all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None):
                    raise NonFinite(f"The embeddings of the {name} contain NaN or Inf.")


@dataclass(frozen=True)
class TextEncoderChanges:
    """Changes of the text encoders: LoRA files with their weights, textual inversions, and the output layer.

    `clip_skip` is the output layer counted from the end, 1 for the last; None means the layer that the family uses.
    """

    loras: Sequence[tuple[Path, float]] = ()
    inversions: Sequence[Inversion] = ()
    clip_skip: int | None = None

    def check(self, model: Model, parts: Sequence[str]) -> None:
        """Raise DataError if a LoRA or textual inversion does not fit the text encoders `parts`, by their configs."""
        for file, _ in self.loras:
            check_parts(file, parts)
        for inversion in self.inversions:
            check_widths(
                inversion, {part: read_config(model.get_part(part).config_path).get("hidden_size") for part in parts}
            )


UNCHANGED = TextEncoderChanges()


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder and its tokenizer with all changes; `added_tokens` is the result of `add_tokens`."""

    network: PreTrainedModel
    tokenizer: CLIPTokenizer
    added_tokens: Mapping[str, tuple[int, list[int]]]

    @staticmethod
    def load(model: Model, part: str, dtype: torch.dtype, changes: TextEncoderChanges) -> TextEncoder:
        """Load the text encoder `part` of `model` on the CPU and apply `changes`."""
        network = load_part(ENCODERS[part], model.get_part(part), dtype, torch.device("cpu"))
        tokenizer = load_tokenizer(model.folder / part.replace("text_encoder", "tokenizer"), network.config)
        for file, weight in changes.loras:
            merge_text_lora(network, part, file, weight)
        return TextEncoder(network, tokenizer, add_tokens(network, tokenizer, part, changes.inversions))


EncoderProvider = Callable[[str, Callable[[], TextEncoder]], TextEncoder]  # (part, load) -> text encoder


def load_uncached(part: str, load: Callable[[], TextEncoder]) -> TextEncoder:
    """Load a text encoder that is freed after use."""
    return load()


def encode_prompts(
    model: Model,
    facts: ModelFacts,
    prompt: str,
    negative_prompt: str,
    dtype: torch.dtype,
    device: torch.device,
    changes: TextEncoderChanges = UNCHANGED,
    get_encoder: EncoderProvider = load_uncached,
) -> Conditioning:
    """Encode both prompts with all text encoders of `model`; `get_encoder` can return cached encoders.

    Raise DataError if the changes do not fit the model, UsageError for invalid tokens and layers.
    """
    texts = [prompt, negative_prompt]
    parts = list(ENCODERS)[: 2 if facts.is_xl else 1]
    changes.check(model, parts)
    encoded = []
    for part in parts:
        encoder = get_encoder(part, partial(TextEncoder.load, model, part, dtype, changes))
        layer = resolve_clip_layer(changes.clip_skip, facts.is_xl, part, encoder.network.config.num_hidden_layers)
        encoded.append(_run_encoder(encoder, texts, layer, device, facts.is_xl))
        del encoder  # frees it, unless it is cached, before the next one is loaded
    hidden = torch.cat([output.hidden for output in encoded], dim=-1)
    pooled = encoded[-1].pooled
    positive, negative = (
        PromptEmbedding(hidden[i : i + 1], None if pooled is None else pooled[i : i + 1]) for i in range(len(texts))
    )
    if facts.zeros_for_empty_prompt and not negative_prompt:
        negative = positive.make_zeros()
    ends = [max(text_ends, key=len) for text_ends in zip(*(output.truncated for output in encoded), strict=True)]
    truncated = {name: end for name, end in zip(("prompt", "negative prompt"), ends, strict=True) if end}
    return Conditioning(positive, negative, truncated, encoded[0].unused_tokens)


@dataclass(frozen=True)
class _EncoderOutput:
    """Output of one encoder for both texts: `hidden` [2, T, C], `pooled` [2, C]; other fields as in Conditioning."""

    hidden: Tensor
    pooled: Tensor | None
    truncated: tuple[str, ...]
    unused_tokens: tuple[str, ...]


def _run_encoder(
    encoder: TextEncoder, texts: list[str], layer: int, device: torch.device, is_xl: bool
) -> _EncoderOutput:
    """Encode `texts`; `layer` is the output layer counted from the end."""
    tokenizer, added = encoder.tokenizer, encoder.added_tokens
    network = cast(nn.Module, encoder.network).to(device)  # transformers hides the signature of `to`
    tokens = [tokenize(tokenizer, text, dict(added.values())) for text in texts]
    unused = tuple(
        token for token, (token_id, _) in added.items() if not any(token_id in text.token_ids for text in tokens)
    )
    with torch.inference_mode():
        out = network(torch.tensor([text.ids for text in tokens], device=device), output_hidden_states=True)
        hidden = out.hidden_states[-layer] if is_xl else apply_final_norm(network, out, layer)
    pooled = out.text_embeds.cpu() if "text_embeds" in out else None
    return _EncoderOutput(hidden.cpu(), pooled, tuple(text.truncated for text in tokens), unused)


def resolve_clip_layer(clip_skip: int | None, is_xl: bool, part: str, layers: int) -> int:
    """Return the output layer of an encoder, counted from the end; raise UsageError if it does not exist."""
    if clip_skip is None:
        return 2 if is_xl else 1
    if clip_skip > layers:
        reason = f"--clip-skip {clip_skip} exceeds the number of layers: {part} has {layers}."
        raise UsageError(reason, f"Use 1 to {layers}.", "clip_skip")
    return clip_skip


def apply_final_norm(encoder: nn.Module, out: BaseModelOutputWithPooling, layer: int) -> Tensor:
    """Return the output of a layer, counted from the end, after the final layer norm, as used by SD 1.5 and 2.1."""
    if layer == 1:
        return cast(Tensor, out.last_hidden_state)
    text_model = getattr(encoder, "text_model", encoder)
    return cast(nn.LayerNorm, text_model.final_layer_norm)(cast(tuple[Tensor, ...], out.hidden_states)[-layer])

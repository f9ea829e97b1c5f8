"""Prompt -> conditioning, with the text encoders in memory only for as long as it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
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
    """What the UNet hears of a prompt: `hidden` [1, T, C], and `pooled` [1, C] where the family has it.

    `images` is what it hears beside it, for each IP-Adapter: [1, 1, D], or [1, 1, L, D].
    """

    hidden: Tensor
    pooled: Tensor | None
    images: tuple[Tensor, ...] = ()

    def make_zeros(self) -> PromptEmbedding:
        """The same shapes, silent: what SDXL was trained to hear as "no prompt"."""
        return PromptEmbedding(
            torch.zeros_like(self.hidden), None if self.pooled is None else torch.zeros_like(self.pooled)
        )

    def concat(self, other: PromptEmbedding) -> PromptEmbedding:
        """Both in one batch, this one first."""
        pooled = None if self.pooled is None else torch.cat([self.pooled, other.pooled])
        images = tuple(torch.cat(pair) for pair in zip(self.images, other.images, strict=True))
        return PromptEmbedding(torch.cat([self.hidden, other.hidden]), pooled, images)

    def build_added_conditions(self, sizes: TimeIds) -> dict[str, Tensor | list[Tensor]] | None:
        """The conditions beside the text: SDXL's, and IP-Adapters'; None where there are none."""
        added: dict[str, Tensor | list[Tensor]] = {"image_embeds": list(self.images)} if self.images else {}
        if self.pooled is not None:
            time_ids = torch.tensor([sizes.values], dtype=torch.float32)
            added |= {"text_embeds": self.pooled, "time_ids": time_ids.repeat(len(self.pooled), 1)}
        return added or None


@dataclass(frozen=True)
class TimeIds:
    """What SDXL is told of a picture: its size before cropping, what was cropped above and to the left, and after."""

    original: Size
    crop_top_left: tuple[int, int]
    target: Size

    @property
    def values(self) -> list[int]:
        """In SDXL's order, heights first."""
        original, target = self.original, self.target
        return [original.height, original.width, *self.crop_top_left, target.height, target.width]


@dataclass(frozen=True)
class Conditioning:
    """Both halves of guidance, and what went wrong with their texts.

    `unheard` are the ends for which an encoder had no room, by "prompt" and "negative prompt"; `unused` the tokens of
    textual inversions that neither has.
    """

    positive: PromptEmbedding
    negative: PromptEmbedding
    truncated: dict[str, str]
    unused_tokens: tuple[str, ...]

    def with_images(self, heard: Sequence[tuple[Tensor, Tensor]]) -> Conditioning:
        """The same with what each IP-Adapter hears of its picture, and of none, in the two halves."""
        positive, negative = zip(*heard, strict=True)
        halves = replace(self.positive, images=positive), replace(self.negative, images=negative)
        return replace(self, positive=halves[0], negative=halves[1])

    def check_finite(self) -> None:
        """Raise NonFinite, naming what they were encoded from, where the embeddings contain NaN or Inf."""
        for half in (self.positive, self.negative):
            heard = {"prompts": (half.hidden, half.pooled), "image prompts": half.images}
            for name, tensors in heard.items():
                if not all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None):
                    raise NonFinite(f"The embeddings of the {name} contain NaN or Inf.")


@dataclass(frozen=True)
class TextEncoderChanges:
    """What is done to the text encoders before they listen.

    `loras` are files with their weights. `clip_skip` is the layer that is listened to, counted from the end: 1 is the
    last; None means the one that the family was trained with.
    """

    loras: Sequence[tuple[Path, float]] = ()
    inversions: Sequence[Inversion] = ()
    clip_skip: int | None = None

    def check(self, model: Model, parts: Sequence[str]) -> None:
        """Raise DataError for what does not fit a model with these text encoders, as far as its configs tell."""
        for file, _ in self.loras:
            check_parts(file, parts)
        for inversion in self.inversions:
            check_widths(
                inversion, {part: read_config(model.get_part(part).config_path).get("hidden_size") for part in parts}
            )


UNCHANGED = TextEncoderChanges()


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer, changed for good; `words` as `add_words` gives them."""

    network: PreTrainedModel
    tokenizer: CLIPTokenizer
    added_tokens: Mapping[str, tuple[int, list[int]]]

    @staticmethod
    def load(model: Model, part: str, dtype: torch.dtype, changes: TextEncoderChanges) -> TextEncoder:
        """The model's `part`, on the CPU."""
        network = load_part(ENCODERS[part], model.get_part(part), dtype, torch.device("cpu"))
        tokenizer = load_tokenizer(model.folder / part.replace("text_encoder", "tokenizer"), network.config)
        for file, weight in changes.loras:
            merge_text_lora(network, part, file, weight)
        return TextEncoder(network, tokenizer, add_tokens(network, tokenizer, part, changes.inversions))


EncoderProvider = Callable[
    [str, Callable[[], TextEncoder]], TextEncoder
]  # part of the model, how to load its encoder -> it


def load_uncached(part: str, load: Callable[[], TextEncoder]) -> TextEncoder:
    """The encoder of nobody but who asks for it: gone when it has been listened to."""
    return load()


def encode_prompts(
    model: Model,
    facts: ModelFacts,
    prompt: str,
    negative_prompt: str,
    dtype: torch.dtype,
    device: torch.device,
    changes: TextEncoderChanges = UNCHANGED,
    get: EncoderProvider = load_uncached,
) -> Conditioning:
    """Both prompts through all text encoders of `model`, changed like this; `get` may have them from before.

    Raises DataError for changes that do not fit the model, UsageError for tokens and layers that cannot be.
    """
    texts = [prompt, negative_prompt]
    parts = list(ENCODERS)[: 2 if facts.is_xl else 1]
    changes.check(model, parts)
    encoded = []
    for part in parts:
        encoder = get(part, partial(TextEncoder.load, model, part, dtype, changes))
        layer = resolve_clip_layer(changes.clip_skip, facts.is_xl, part, encoder.network.config.num_hidden_layers)
        encoded.append(_run_encoder(encoder, texts, layer, device, facts.is_xl))
        del encoder  # before the next one is loaded, if nobody else has it
    hidden = torch.cat([by_one.hidden for by_one in encoded], dim=-1)
    pooled = encoded[-1].pooled
    positive, negative = (
        PromptEmbedding(hidden[i : i + 1], None if pooled is None else pooled[i : i + 1]) for i in range(len(texts))
    )
    if facts.zeros_for_empty_prompt and not negative_prompt:
        negative = positive.make_zeros()
    ends = [max(by_all, key=len) for by_all in zip(*(by_one.truncated for by_one in encoded), strict=True)]
    unheard = {name: end for name, end in zip(("prompt", "negative prompt"), ends, strict=True) if end}
    return Conditioning(positive, negative, unheard, encoded[0].unused_tokens)


@dataclass(frozen=True)
class _EncoderOutput:
    """`texts` by one encoder: `hidden` [2, T, C], `pooled` [2, C]; the rest as in Conditioning."""

    hidden: Tensor
    pooled: Tensor | None
    truncated: tuple[str, ...]
    unused_tokens: tuple[str, ...]


def _run_encoder(
    encoder: TextEncoder, texts: list[str], layer: int, device: torch.device, is_xl: bool
) -> _EncoderOutput:
    """`texts` as this layer of `encoder` hears them, counted from the end."""
    network, tokenizer, words = encoder.network.to(device), encoder.tokenizer, encoder.added_tokens
    tokens = [tokenize(tokenizer, text, dict(words.values())) for text in texts]
    unused = tuple(word for word, (number, _) in words.items() if not any(number in text.token_ids for text in tokens))
    with torch.inference_mode():
        out = network(torch.tensor([text.ids for text in tokens], device=device), output_hidden_states=True)
        hidden = out.hidden_states[-layer] if is_xl else apply_final_norm(network, out, layer)
    pooled = out.text_embeds.cpu() if "text_embeds" in out else None
    return _EncoderOutput(hidden.cpu(), pooled, tuple(text.truncated for text in tokens), unused)


def resolve_clip_layer(clip_skip: int | None, is_xl: bool, part: str, layers: int) -> int:
    """Which layer of an encoder is listened to, counted from the end; raises UsageError for one that it lacks."""
    if clip_skip is None:
        return 2 if is_xl else 1
    if clip_skip > layers:
        reason = f"--clip-skip {clip_skip} is not possible: the model's {part} has {layers} layers."
        raise UsageError(reason, f"Use 1 to {layers}.", "clip_skip")
    return clip_skip


def apply_final_norm(encoder: CLIPTextModel, out: ModelOutput, layer: int) -> Tensor:
    """What SD 1.5 and 2.1 hear: a layer's output, counted from the end, after the encoder's last normalisation."""
    if layer == 1:
        return out.last_hidden_state
    return getattr(encoder, "text_model", encoder).final_layer_norm(out.hidden_states[-layer])

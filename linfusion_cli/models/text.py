"""Prompt -> conditioning, with the text encoders in memory only for as long as it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from linfusion_cli.errors import DataError
from linfusion_cli.geometry import Size
from linfusion_cli.models.families import ModelFacts
from linfusion_cli.models.load import load_part
from linfusion_cli.models.parts import Model

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


@dataclass(frozen=True)
class Embedding:
    """What the UNet hears of a prompt: `hidden` [1, T, C], and `pooled` [1, C] where the family has it."""

    hidden: Tensor
    pooled: Tensor | None

    def zeros(self) -> Embedding:
        """The same shapes, silent: what SDXL was trained to hear as "no prompt"."""
        return Embedding(torch.zeros_like(self.hidden), None if self.pooled is None else torch.zeros_like(self.pooled))

    def beside(self, other: Embedding) -> Embedding:
        """Both in one batch, this one first."""
        pooled = None if self.pooled is None else torch.cat([self.pooled, other.pooled])
        return Embedding(torch.cat([self.hidden, other.hidden]), pooled)

    def added(self, sizes: SizeConditioning) -> dict[str, Tensor] | None:
        """SDXL's further conditions beside the text, None for families that have none."""
        if self.pooled is None:
            return None
        time_ids = torch.tensor([sizes.numbers], dtype=torch.float32)
        return {"text_embeds": self.pooled, "time_ids": time_ids.repeat(len(self.pooled), 1)}


@dataclass(frozen=True)
class SizeConditioning:
    """What SDXL is told of a picture: its size before cropping, what was cropped above and to the left, and after."""

    original: Size
    crop_top_left: tuple[int, int]
    target: Size

    @property
    def numbers(self) -> list[int]:
        """In SDXL's order, heights first."""
        original, target = self.original, self.target
        return [original.height, original.width, *self.crop_top_left, target.height, target.width]


@dataclass(frozen=True)
class Conditioning:
    """Both halves of guidance, and what of the prompt was too long to be heard."""

    positive: Embedding
    negative: Embedding
    unheard: str


def encode_prompts(
    model: Model, facts: ModelFacts, prompt: str, negative_prompt: str, dtype: torch.dtype, device: torch.device
) -> Conditioning:
    """Both prompts through all text encoders of the model in `folder`; the encoders are gone afterwards."""
    texts = [prompt, negative_prompt]
    first = _encode(model, "", CLIPTextModel, texts, dtype, device, facts.is_xl)
    hidden, pooled = first.hidden, None
    if facts.is_xl:
        second = _encode(model, "_2", CLIPTextModelWithProjection, texts, dtype, device, facts.is_xl)
        hidden, pooled = torch.cat([first.hidden, second.hidden], dim=-1), second.pooled
    positive, negative = (
        Embedding(hidden[i : i + 1], None if pooled is None else pooled[i : i + 1]) for i in range(len(texts))
    )
    if facts.zeros_for_empty_prompt and not negative_prompt:
        negative = positive.zeros()
    return Conditioning(positive, negative, first.unheard)


@dataclass(frozen=True)
class _Encoded:
    hidden: Tensor
    pooled: Tensor | None
    unheard: str


def _encode(model: Model, suffix: str, kind: type, texts: list[str], dtype, device, penultimate: bool) -> _Encoded:
    """`texts` through one encoder; SDXL listens to the last layer but one, the others to the last, normalised."""
    encoder = load_part(kind, model.part(f"text_encoder{suffix}"), dtype, device)
    tokenizer = load_tokenizer(model.folder / f"tokenizer{suffix}", encoder.config)
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        out = encoder(tokens.input_ids.to(device), output_hidden_states=True)
    hidden = out.hidden_states[-2] if penultimate else out.last_hidden_state
    return _Encoded(hidden.cpu(), out.text_embeds.cpu() if "text_embeds" in out else None, cut_off(tokenizer, texts[0]))


def load_tokenizer(folder: Path, config: CLIPTextConfig) -> CLIPTokenizer:
    """The tokenizer in `folder` for an encoder with `config`; raises DataError when it is missing, broken or another's.

    transformers makes a tokenizer without words where the vocabulary is missing, so that is looked for first.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise DataError(f"The tokenizer in {folder} has no vocabulary.", "Download the model again.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"The tokenizer in {folder} could not be read.", "Download the model again.") from error
    if len(tokenizer) > config.vocab_size:
        reason = f"The tokenizer in {folder} has {len(tokenizer)} words, and its encoder knows {config.vocab_size}."
        raise DataError(reason, "Download the model again.")
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def cut_off(tokenizer: CLIPTokenizer, text: str) -> str:
    """The end of `text` that does not fit the tokenizer's window, "" if all of it does."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return tokenizer.decode(tokens[tokenizer.model_max_length - 2 :])

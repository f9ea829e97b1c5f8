"""Textual inversion: a new token with learned embedding vectors; arXiv 2208.01618, section 3.

A file has vectors [n, C] for each text encoder of width C. The tensor name is the token (diffusers), `emb_params`
(A1111), or `clip_l` and `clip_g` for the two encoders of SDXL.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel

from linfusion_cli.core.errors import DataError, UsageError
from linfusion_cli.models.files.header import Header, read_header

A1111_KEY = "emb_params"
ENCODER_KEYS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
WORD_END_SUFFIX = "</w>"
RENAME_HINT = "Set another token: FILE:TOKEN."


@dataclass(frozen=True)
class Inversion:
    """A token and its embedding `vectors`: text encoder to [n, C], any float dtype."""

    file: Path
    token: str
    vectors: dict[str, Tensor]


def read_inversions(files: Iterable[tuple[Path, str | None]]) -> list[Inversion]:
    """Read textual inversions from pairs of file and token; the default token is that of the file.

    Raise DataError if a file is not a textual inversion or is broken, UsageError if two have the same token.
    """
    inversions: dict[str, Inversion] = {}
    for file, token in files:
        inversion = read_inversion(file, token)
        other = inversions.setdefault(inversion.token.lower(), inversion)
        if other is not inversion:
            reason = f"{other.file} and {file} have the same token {inversion.token!r}."
            raise UsageError(reason, RENAME_HINT, "textual_inversion")
    return list(inversions.values())


def read_inversion(file: Path, token: str | None = None) -> Inversion:
    """Read one textual inversion like `read_inversions`."""
    header = read_header(file)
    parts = map_tensors_to_parts(header)
    first = next(iter(header.shapes))
    default_token = first if first not in (A1111_KEY, *ENCODER_KEYS) else file.stem
    try:
        with safe_open(file, framework="pt") as opened:
            vectors = {part: opened.get_tensor(name) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise build_broken_error(file, f"it cannot be read ({error}).") from error
    for name, part in parts.items():
        if not vectors[part].is_floating_point() or not bool(vectors[part].float().isfinite().all()):
            raise build_broken_error(file, f"{name} is not floating-point or contains NaN or Inf.")
    return Inversion(
        file, token or default_token, {part: values.reshape(-1, values.shape[-1]) for part, values in vectors.items()}
    )


def is_inversion(header: Header) -> bool:
    """Return whether the tensor names are those of a textual inversion: one per encoder, or a single token name."""
    names = header.shapes.keys()
    return bool(names) and (names <= ENCODER_KEYS.keys() or (len(names) == 1 and "." not in min(names)))


def map_tensors_to_parts(header: Header) -> dict[str, str]:
    """Return tensor name to text encoder; raise DataError if the file is not a textual inversion."""
    names = sorted(header.shapes)
    parts = {name: ENCODER_KEYS.get(name, "text_encoder") for name in names}
    is_single = len(names) == 1
    if not names or len(set(parts.values())) < len(names) or not (is_single or ENCODER_KEYS.keys() >= parts.keys()):
        reason = f"{header.file} is not a textual inversion (tensors: {', '.join(names[:3]) or 'none'})."
        raise DataError(reason, "Use the safetensors file of a textual inversion.")
    for name, shape in header.shapes.items():
        if len(shape) not in (1, 2) or 0 in shape:
            raise build_broken_error(header.file, f"{name} has the shape {shape}.")
    return parts


def check_widths(inversion: Inversion, widths: Mapping[str, int | None]) -> None:
    """Raise DataError unless the vectors have the widths of the model's text encoders, one tensor per encoder."""
    file_widths = {part: values.shape[-1] for part, values in inversion.vectors.items()}
    if file_widths != dict(widths):
        actual, expected = (
            " and ".join(f"{width} for {part}" for part, width in sorted(sizes.items()))
            for sizes in (file_widths, widths)
        )
        reason = f"The textual inversion {inversion.file} does not fit the model: its vector widths are {actual}"
        raise DataError(f"{reason}, but the model needs {expected}.", "Use one for the family of this model.")


@torch.no_grad()
def add_tokens(
    encoder: PreTrainedModel, tokenizer: CLIPTokenizer, part: str, inversions: Sequence[Inversion]
) -> dict[str, tuple[int, list[int]]]:
    """Add tokens to the text encoder `part` and its tokenizer; return token to its id and its embedding rows.

    Raise UsageError if the tokenizer already has a token.
    """
    vocabulary = tokenizer.get_vocab()
    embedding = cast(nn.Embedding, encoder.get_input_embeddings())
    added: dict[str, tuple[int, list[int]]] = {}
    rows: list[Tensor] = [embedding.weight]
    for inversion in inversions:
        token, vectors = inversion.token, inversion.vectors[part].to(embedding.weight)
        if any(text + end in vocabulary for text in (token, token.lower()) for end in ("", WORD_END_SUFFIX)):
            reason = f"The token {token!r} of the textual inversion {inversion.file} is in the model's vocabulary."
            raise UsageError(reason, RENAME_HINT, "textual_inversion")
        tokenizer.add_tokens([token])
        first = sum(map(len, rows))
        added[token] = cast(int, tokenizer.convert_tokens_to_ids(token)), list(range(first, first + len(vectors)))
        rows.append(vectors)
    if inversions:
        embedding.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
        set_eos_token_id(encoder, cast(int, tokenizer.eos_token_id))
    return added


def set_eos_token_id(encoder: PreTrainedModel, eos_token_id: int) -> None:
    """Set the id of the end token, at which the pooled embedding is taken.

    SDXL's config has a wrong id, for which transformers uses the largest token id; added tokens have larger ids.
    """
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = eos_token_id  # pyright: ignore[reportArgumentType]  # not a submodule


def build_broken_error(file: Path, reason: str) -> DataError:
    """Return the error for a textual inversion with invalid contents."""
    return DataError(f"The textual inversion {file} is broken: {reason}", "Download it again, or use another one.")

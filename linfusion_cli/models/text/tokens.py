"""Tokenize texts for a text encoder, and find the end of the text that exceeds its token limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTokenizer

from linfusion_cli.core.errors import DataError


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text: `ids` are the encoder's input, with start, end and padding tokens.

    `token_ids` has all tokens of the text, `truncated` is the end of the text that exceeds the limit.
    """

    ids: list[int]
    token_ids: frozenset[int]
    truncated: str


def load_tokenizer(folder: Path, config: CLIPTextConfig) -> CLIPTokenizer:
    """Load the tokenizer in `folder` for an encoder with `config`.

    Raise DataError if it is missing, broken or too large for the encoder. transformers would return a tokenizer with an
    empty vocabulary if the file is missing, so its existence is checked first.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise DataError(f"The tokenizer in {folder} has no vocabulary.", "Download the model again.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"The tokenizer in {folder} could not be read.", "Download the model again.") from error
    if len(tokenizer) > config.vocab_size:
        reason = f"The tokenizer in {folder} has {len(tokenizer)} tokens, but its encoder has {config.vocab_size}."
        raise DataError(reason, "Download the model again.")
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, text: str, rows: Mapping[int, Sequence[int]]) -> Tokens:
    """Tokenize `text`; `rows` maps added tokens to the embedding rows that replace them."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = []
    starts: list[int] = []
    for token, (start, _) in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
        token_rows = rows.get(token, (token,))
        ids += token_rows
        starts += [start] * len(token_rows)
    length = tokenizer.model_max_length
    max_text_tokens = length - 2
    kept = [tokenizer.bos_token_id, *ids[:max_text_tokens], tokenizer.eos_token_id]
    padding = [tokenizer.pad_token_id] * (length - len(kept))
    truncated = text[starts[max_text_tokens] :].strip() if len(ids) > max_text_tokens else ""
    return Tokens(kept + padding, frozenset(encoding.input_ids), truncated)

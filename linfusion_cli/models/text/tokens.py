"""Text -> the token ids that a text encoder takes, and what of the text does not fit its window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTokenizer

from linfusion_cli.core.errors import DataError


@dataclass(frozen=True)
class Tokens:
    """`ids` fill the window, begin, end and padding included; `unheard` is the end of the text that had no room.

    `words` are the ids of the text's own tokens, also of those that had no room.
    """

    ids: list[int]
    token_ids: frozenset[int]
    truncated: str


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


def tokenize(tokenizer: CLIPTokenizer, text: str, rows: Mapping[int, Sequence[int]]) -> Tokens:
    """`text` as the encoder takes it; a token in `rows` stands for these rows of its embedding, one after the other."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = []
    starts: list[int] = []
    for token, (start, _) in zip(found.input_ids, found.offset_mapping, strict=True):
        run = rows.get(token, (token,))
        ids += run
        starts += [start] * len(run)
    window = tokenizer.model_max_length
    room = window - 2
    heard = [tokenizer.bos_token_id, *ids[:room], tokenizer.eos_token_id]
    padding = [tokenizer.pad_token_id] * (window - len(heard))
    unheard = text[starts[room] :].strip() if len(ids) > room else ""
    return Tokens(heard + padding, frozenset(found.input_ids), unheard)

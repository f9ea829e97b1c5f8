"""Textual inversion: a new word for the prompt that stands for learned vectors; arXiv 2208.01618, section 3.

A file holds vectors [n, C] for each text encoder, C its width: as diffusers writes them, by the token; as A1111 does,
by `emb_params`; or for both encoders of SDXL, by `clip_l` and `clip_g`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
RENAME_HINT = "Give it another one: FILE:TOKEN."


@dataclass(frozen=True)
class Inversion:
    """`token` stands for `vectors`: part of the model -> [n, C] in any float."""

    file: Path
    token: str
    vectors: dict[str, Tensor]


def read_inversions(wanted: Iterable[tuple[Path, str | None]]) -> list[Inversion]:
    """The textual inversions in these files, by the token given, or by the file's own.

    Raises DataError for a file that is none or is broken, UsageError for two of one name.
    """
    found: dict[str, Inversion] = {}
    for file, token in wanted:
        inversion = read_inversion(file, token)
        other = found.setdefault(inversion.token.lower(), inversion)
        if other is not inversion:
            reason = f"Both {other.file} and {file} are called {inversion.token!r} in prompts."
            raise UsageError(reason, RENAME_HINT, "textual_inversion")
    return list(found.values())


def read_inversion(file: Path, token: str | None = None) -> Inversion:
    """As `read_inversions`, one file."""
    header = read_header(file)
    parts = map_tensors_to_parts(header)
    own = next(iter(header.shapes))
    named = own if own not in (A1111_KEY, *ENCODER_KEYS) else file.stem
    try:
        with safe_open(file, framework="pt") as opened:
            vectors = {part: opened.get_tensor(name) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise build_broken_error(file, f"it cannot be read ({error}).") from error
    for name, part in parts.items():
        if not vectors[part].is_floating_point() or not bool(vectors[part].float().isfinite().all()):
            raise build_broken_error(file, f"{name} is not all finite numbers.")
    return Inversion(
        file, token or named, {part: values.reshape(-1, values.shape[-1]) for part, values in vectors.items()}
    )


def is_inversion(header: Header) -> bool:
    """Whether a file has the look of one: a tensor for each encoder, or a single one, named after a token."""
    names = header.shapes.keys()
    return bool(names) and (names <= ENCODER_KEYS.keys() or (len(names) == 1 and "." not in min(names)))


def map_tensors_to_parts(header: Header) -> dict[str, str]:
    """The file's tensors, name -> part of the model that they are for; raises DataError for what they cannot be."""
    names = sorted(header.shapes)
    parts = {name: ENCODER_KEYS.get(name, "text_encoder") for name in names}
    alone = len(names) == 1
    if not names or len(set(parts.values())) < len(names) or not (alone or ENCODER_KEYS.keys() >= parts.keys()):
        holds = ", ".join(names[:3]) or "nothing"
        reason = f"{header.file} is no textual inversion: it holds {holds}."
        raise DataError(reason, "Name a textual inversion's safetensors file.")
    for name, shape in header.shapes.items():
        if len(shape) not in (1, 2) or 0 in shape:
            raise build_broken_error(header.file, f"{name} has the shape {shape}.")
    return parts


def check_widths(inversion: Inversion, widths: Mapping[str, int]) -> None:
    """Raise DataError unless there are vectors as wide as each of the model's text encoders, and no others."""
    found = {part: values.shape[-1] for part, values in inversion.vectors.items()}
    if found != dict(widths):
        has, takes = (
            " and ".join(f"{width} for {part}" for part, width in sorted(sizes.items())) for sizes in (found, widths)
        )
        reason = f"The textual inversion {inversion.file} does not fit the model: its vectors' widths are {has}"
        raise DataError(f"{reason}, and the model takes {takes}.", "Use one made for this model's family.")


@torch.no_grad()
def add_tokens(
    encoder: PreTrainedModel, tokenizer: CLIPTokenizer, part: str, inversions: Sequence[Inversion]
) -> dict[str, tuple[int, list[int]]]:
    """Teach the model's `part` and its tokenizer new words: token -> its id, and the embedding's rows it stands for.

    Raises UsageError for a token that the tokenizer knows already.
    """
    known = tokenizer.get_vocab()
    embedding = encoder.get_input_embeddings()
    words: dict[str, tuple[int, list[int]]] = {}
    rows = [embedding.weight]
    for inversion in inversions:
        token, vectors = inversion.token, inversion.vectors[part].to(embedding.weight)
        if any(text + end in known for text in (token, token.lower()) for end in ("", WORD_END_SUFFIX)):
            reason = f"The token {token!r} of the textual inversion {inversion.file} is a word of the model's own."
            raise UsageError(reason, RENAME_HINT, "textual_inversion")
        tokenizer.add_tokens([token])
        first = sum(map(len, rows))
        words[token] = tokenizer.convert_tokens_to_ids(token), list(range(first, first + len(vectors)))
        rows.append(vectors)
    if inversions:
        embedding.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
        set_eos_token_id(encoder, tokenizer.eos_token_id)
    return words


def set_eos_token_id(encoder: PreTrainedModel, eos_token_id: int) -> None:
    """Let the pooled embedding stand at the end of the text, also where the config says nonsense of it, as SDXL's does.

    transformers then takes the largest id for the end, which is that of a new word now.
    """
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = eos_token_id


def build_broken_error(file: Path, what: str) -> DataError:
    """The error for a textual inversion with which nothing can be done."""
    return DataError(f"The textual inversion {file} is broken: {what}", "Download it again, or use another one.")

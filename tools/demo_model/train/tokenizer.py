"""A small byte-level BPE vocabulary in CLIP's file format, learned from the captions; it can encode any text."""

import json
import re
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from tools.demo_model.scenes.captions import FILLERS
from tools.demo_model.store import WORK
from tools.demo_model.train.draw import GROUPS, load_captions

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 620
TOKENS = 77
FOLDER = WORK / "tokenizer"


def list_byte_characters() -> list[str]:
    """Return GPT-2's 256 printable characters for bytes 0 to 255."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Learn `count` merges by byte pair encoding (arXiv 1508.07909)."""
    words = Counter(word for text in texts for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()))
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        split = {word: _join(parts, best) for word, parts in split.items()}
    return merges


def _join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def make_tokenizer() -> CLIPTokenizer:
    """Load the tokenizer; learn its vocabulary first if it does not exist."""
    if not (FOLDER / "special_tokens_map.json").exists():
        texts = [words for name in GROUPS for words in load_captions(name)] + list(FILLERS) * 20
        write_tokenizer(FOLDER, learn_merges(texts, MERGES))
    return CLIPTokenizer.from_pretrained(FOLDER)


def write_tokenizer(folder: Path, merges: list[tuple[str, str]]) -> None:
    """Write the four files of an SDXL tokenizer folder."""
    letters = list_byte_characters()
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    _write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)

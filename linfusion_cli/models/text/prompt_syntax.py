"""Weights and other commands that some tools read in prompts, and that are plain text here. Needs no torch.

A1111 weighs words by brackets, `(word:1.3)`, `((word))`, `[word]`, mixes and splits prompts by the words AND and BREAK,
and loads LoRAs by `<lora:name:0.8>`; compel weighs them by signs and numbers, `word++`, `(two words)1.2`. In both a
backslash makes a bracket plain. Midjourney and A1111's lists of prompts take options, `--ar 16:9`, `--steps 20`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
WEIGHT = re.compile(rf":\s*{NUMBER}\s*$")
RATIO = re.compile(r"\d:\d+\s*$")  # 16:9, 10:30
TRAILING_WEIGHT = re.compile(rf"{NUMBER}(?!\w)|\++|-+(?![\w-])")
NETWORK_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>")
SIGN_WEIGHT = re.compile(r"\w{2,}(?:\+{2,}|-{2,}(?=[\s,.;:)]|$))")  # C++ is a language
OPTION = re.compile(r"(?<!\S)--[^\W\d_][\w-]*")  # not word--word, C-- or a dash of its own
SPLIT_WORD = re.compile(r"\b(?:BREAK|AND)\b")
CLOSING_BRACKETS = {"(": ")", "[": "]"}


@dataclass(frozen=True)
class Span:
    """Part of a prompt: prompt[start:end], a pair of brackets and what they hold, say."""

    start: int
    end: int


def find_commands(prompt: str) -> list[str]:
    """What of `prompt` other tools would read as commands, in order; a text in capitals has no AND and no BREAK.

    Single round brackets without a number are left out: they are emphasis for A1111, and far more often prose.
    """
    pairs = find_brackets(prompt)
    spans = [
        Span(pair.start, pair.end + measure_trailing_weight(prompt, pair))
        for pair in pairs
        if is_weight(prompt, pair, pairs)
    ]
    patterns = (
        (NETWORK_TAG, SIGN_WEIGHT, OPTION) if prompt.isupper() else (NETWORK_TAG, SIGN_WEIGHT, OPTION, SPLIT_WORD)
    )
    spans += [Span(*match.span()) for pattern in patterns for match in pattern.finditer(prompt)]
    return extract_spans(prompt, spans)


def find_option(prompt: str) -> str | None:
    """The first word of `prompt` that is written like an option, `--steps`."""
    match = OPTION.search(prompt)
    return match and match[0]


def find_plain_brackets(prompt: str) -> list[str]:
    """The round brackets that `commands_in` leaves out."""
    pairs = find_brackets(prompt)
    return extract_spans(prompt, [pair for pair in pairs if not is_weight(prompt, pair, pairs)])


def find_brackets(prompt: str) -> set[Span]:
    """All pairs of brackets that hold something and have no backslash before them."""
    found: set[Span] = set()
    opened: list[int] = []
    for match in re.finditer(r"\\.|[()\[\]]", prompt, re.DOTALL):
        if match[0] in CLOSING_BRACKETS:
            opened.append(match.start())
        elif opened and CLOSING_BRACKETS[prompt[opened[-1]]] == match[0]:
            found.add(Span(opened.pop(), match.end()))
    return {pair for pair in found if prompt[pair.start + 1 : pair.end - 1].strip()}


def is_weight(prompt: str, pair: Span, pairs: set[Span]) -> bool:
    """Whether these brackets are a weight for sure: square, double, or with a number in them or behind."""
    inside = prompt[pair.start + 1 : pair.end - 1]
    numbered = WEIGHT.search(inside) is not None and RATIO.search(inside) is None
    doubled = Span(pair.start + 1, pair.end - 1) in pairs
    return prompt[pair.start] == "[" or numbered or doubled or measure_trailing_weight(prompt, pair) > 0


def measure_trailing_weight(prompt: str, pair: Span) -> int:
    """How long the weight is that stands behind these brackets, 0 where there is none."""
    match = TRAILING_WEIGHT.match(prompt, pair.end)
    return 0 if match is None else len(match[0])


def extract_spans(prompt: str, spans: list[Span]) -> list[str]:
    """The texts at these places, in order, each once, without those that lie within another."""
    found: list[str] = []
    end = 0
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if span.end > end:
            found.append(prompt[span.start : span.end])
            end = span.end
    return list(dict.fromkeys(found))

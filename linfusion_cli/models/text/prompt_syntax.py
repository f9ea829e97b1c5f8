"""Detect prompt syntax of other tools, which is not interpreted here. Needs no torch.

A1111 has weights in brackets, `(word:1.3)`, `((word))`, `[word]`, the keywords AND and BREAK, and `<lora:name:0.8>`;
compel has weights as signs and numbers, `word++`, `(two words)1.2`. In both, a backslash escapes a bracket. Midjourney
and prompt lists of A1111 have options, `--ar 16:9`, `--steps 20`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
WEIGHT = re.compile(rf":\s*{NUMBER}\s*$")
RATIO = re.compile(r"\d:\d+\s*$")  # 16:9, 10:30
TRAILING_WEIGHT = re.compile(rf"{NUMBER}(?!\w)|\++|-+(?![\w-])")
NETWORK_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>")
SIGN_WEIGHT = re.compile(r"\w{2,}(?:\+{2,}|-{2,}(?=[\s,.;:)]|$))")  # not C++, which has one letter
OPTION = re.compile(r"(?<!\S)--[^\W\d_][\w-]*")  # not word--word, C-- or a separate dash
SPLIT_WORD = re.compile(r"\b(?:BREAK|AND)\b")
CLOSING_BRACKETS = {"(": ")", "[": "]"}


@dataclass(frozen=True)
class Span:
    """Part of a prompt, prompt[start:end], e.g. a pair of brackets with its contents."""

    start: int
    end: int


def find_commands(prompt: str) -> list[str]:
    """Return the parts of `prompt` that other tools interpret, in order; AND and BREAK are ignored in all-caps texts.

    Single round brackets without a number are excluded: A1111 interprets them as emphasis, but most are prose.
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
    """Return the first word of `prompt` that looks like an option, e.g. `--steps`, or None."""
    match = OPTION.search(prompt)
    return match and match[0]


def find_plain_brackets(prompt: str) -> list[str]:
    """Return the round brackets that `find_commands` excludes."""
    pairs = find_brackets(prompt)
    return extract_spans(prompt, [pair for pair in pairs if not is_weight(prompt, pair, pairs)])


def find_brackets(prompt: str) -> set[Span]:
    """Return all pairs of brackets that are neither empty nor escaped."""
    pairs: set[Span] = set()
    opened: list[int] = []
    for match in re.finditer(r"\\.|[()\[\]]", prompt, re.DOTALL):
        if match[0] in CLOSING_BRACKETS:
            opened.append(match.start())
        elif opened and CLOSING_BRACKETS[prompt[opened[-1]]] == match[0]:
            pairs.add(Span(opened.pop(), match.end()))
    return {pair for pair in pairs if prompt[pair.start + 1 : pair.end - 1].strip()}


def is_weight(prompt: str, pair: Span, pairs: set[Span]) -> bool:
    """Return whether brackets are certainly a weight: square, double, or with a number inside or after them."""
    inside = prompt[pair.start + 1 : pair.end - 1]
    has_number = WEIGHT.search(inside) is not None and RATIO.search(inside) is None
    is_double = Span(pair.start + 1, pair.end - 1) in pairs
    return prompt[pair.start] == "[" or has_number or is_double or measure_trailing_weight(prompt, pair) > 0


def measure_trailing_weight(prompt: str, pair: Span) -> int:
    """Return the length of the weight after these brackets, or 0."""
    match = TRAILING_WEIGHT.match(prompt, pair.end)
    return 0 if match is None else len(match[0])


def extract_spans(prompt: str, spans: list[Span]) -> list[str]:
    """Return the texts of `spans` in order, without duplicates and without spans inside others."""
    extracted: list[str] = []
    end = 0
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if span.end > end:
            extracted.append(prompt[span.start : span.end])
            end = span.end
    return list(dict.fromkeys(extracted))

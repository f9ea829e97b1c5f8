"""Prompt syntax of other tools is detected, and prose is not mistaken for it."""

import pytest

from linfusion_cli.models.text.prompt_syntax import find_commands, find_option, find_plain_brackets


@pytest.mark.parametrize(
    ("prompt", "result"),
    [
        ("a (word:1.3) b", ["(word:1.3)"]),
        ("(a, b : .5 ), (c:-1)", ["(a, b : .5 )", "(c:-1)"]),
        ("(year 2000:1.2)", ["(year 2000:1.2)"]),
        ("(over two\nlines:1.2)", ["(over two\nlines:1.2)"]),
        ("((a, b), c:1.2)", ["((a, b), c:1.2)"]),
        ("a (b (c:1.2) d)", ["(c:1.2)"]),
        ("((word)) and (((word)))", ["((word))", "(((word)))"]),
        ("[word], [from:to:0.5] [one|other]", ["[word]", "[from:to:0.5]", "[one|other]"]),
        ("(a [b] c:1.1)", ["(a [b] c:1.1)"]),
        ("word++, other-- and (word++)", ["word++", "other--"]),
        ("(two words)1.2 (b)++ (c)-", ["(two words)1.2", "(b)++", "(c)-"]),
        ("cats BREAK dogs, BREAK", ["BREAK"]),
        ("cats AND dogs", ["AND"]),
        ("a cat <lora:name:0.8> <hypernet:x:1>", ["<lora:name:0.8>", "<hypernet:x:1>"]),
        (r"\((a:1.2)\)", ["(a:1.2)"]),
        (r"(a \) b:1.2)", [r"(a \) b:1.2)"]),
        ("a hill --ar 16:9 --v 5 --ar 4:3", ["--ar", "--v"]),
        ('--prompt "a fjord" --negative_prompt "fog"\n--cfg-scale=7', ["--prompt", "--negative_prompt", "--cfg-scale"]),
        ("A HILL\t--NO FOG", ["--NO"]),
        ("(a hill:1.2) --größe 3", ["(a hill:1.2)", "--größe"]),
    ],
)
def test_commands_are_found(prompt, result):
    assert find_commands(prompt) == result


@pytest.mark.parametrize(
    "prompt",
    [
        "a house (old)",
        "(masterpiece) and (old)-fashioned, (one) 2 (three)4th",
        "((one) and (other))",
        "a screen (16:9) at noon (12:30)",
        r"artoria \(fate\), \(a:1.2\), \[word\]",
        "CATS AND DOGS",
        "SANDY beach, cats and dogs, break",
        "C++ code, 18+ only, rock-n-roll -- black, e-mail, a hill--ar",
        ":) :( (-: <3 a <b> [] ()",
        "(open:1.2",
        "a) [b",
        "it is 5:00, (:1 ratio",
        "\\",
        "a hill -- the sea, a hill--the sea, C--, C-- --, --- a, ---a, -v 5, --5, (--a), -- steps",
        "a hill — the sea –steps —steps",
        "",
    ],
)
def test_prose_has_no_commands(prompt):
    assert find_commands(prompt) == []


def test_plain_brackets_are_distinguished():
    assert find_plain_brackets(r"a house (old), (16:9), (word:1.3), \(x\), (a (b))") == ["(old)", "(16:9)", "(a (b))"]


def test_many_brackets_are_fast():
    assert find_commands("(" * 3_000 + "a" + ")" * 3_000)
    assert find_commands("[(" * 3_000) == []


@pytest.mark.parametrize(
    ("prompt", "word"), [("a hill --ar 16:9 --v 5", "--ar"), ("--v", "--v"), ("a hill--top C-- -- 5", None), ("", None)]
)
def test_the_first_option_is_found(prompt, word):
    assert find_option(prompt) == word


def test_many_dashes_are_fast():
    assert find_option("-" * 50_000 + " -" * 25_000 + "--" * 25_000) is None

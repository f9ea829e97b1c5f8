"""Job lists in every format, with hundreds of invalid lines that are reported by number and do not affect others."""

import io
import random
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from linfusion_cli.batch.parsers import line_reader
from linfusion_cli.batch.parsers.job_spec import MAX_PROBLEM_CHARS, JobSpec
from linfusion_cli.batch.parsers.line_reader import NOT_UTF8, TOO_LONG
from linfusion_cli.batch.parsers.reader import read_list
from linfusion_cli.batch.parsers.schema import FIELDS
from linfusion_cli.batch.parsers.toml import OUTSIDE_TABLE
from linfusion_cli.core.errors import DataError, InputNotFound
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.text import shorten
from linfusion_cli.settings.groups import Lora

GOOD = b'{"prompt": "a hill", "seed": 3}'
DEEP = 15_000


def hostile_json() -> list[tuple[bytes, str]]:
    """Return invalid lines, each with a part of its problem."""
    broken = [b"{", b"}", b'{"prompt"}', b'{"prompt": }', b'{"prompt": "a}', b"{'prompt': 'a'}", b"prompt: a", b"[1,"]
    broken += [b'{"prompt": "a",}', b'{"prompt": "a"} {"prompt": "b"}', b'{"prompt": "\t"}', b'{"seed": 01}', b"nul"]
    broken += [b'{"prompt": "\\x41"}', b'{"seed": NaN}', b'{"seed": Infinity}', b'{"seed": ' + b"9" * 5000 + b"}"]
    broken += [GOOD[:cut] for cut in range(1, len(GOOD))]
    others = [b"[]", b"1", b'"a hill"', b"null", b"true", b"[[]]", b'["prompt", "a"]', b"-0.5"]
    unknown = [b"promt", b"", b"__class__", b"overwrite", b"download", b"x" * 5000, b"..", b"0"]
    wrong = [b"null", b"true", b"[]", b"{}", b'"x"', b"[1, [2]]", b'{"a": 1}', b"1.5", b'""', b'"1e5"', b"1e400"]
    sizes = ["0", "-1", "63", "99999999", "1e9", "64x", "x64", "64x64x64", "64×0", "½", "inf", "١٢٨", "0x80", " "]
    truths = [b"2", b'"maybe"', b"null", b"[]", b"{}", b"1.0"]
    nul = [
        b'{"prompt": "a\\u0000b"}',
        b'{"model": "\\u0000"}',
        b'{"lora": ["a", "\\u0000"]}',
        b'{"output": "\\u0000.png"}',
    ]
    halves = [
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udfff a"}',
        b'{"negative_prompt": "\\ud83d"}',
        b'{"model": "\\udcff"}',
    ]
    bad_bytes = [
        b'{"prompt": "' + byte + b'"}' for byte in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"caf\xe9")
    ]
    deep = [opening * DEEP for opening in (b"[", b'{"a":')] + [b'{"steps": ' + b"[" * DEEP + b"]" * DEEP + b"}"]
    fields = [(name, value) for name in FIELDS if name != "prompt" for value in ("null", '{"a": []}')]
    return [
        (b"{}", "prompt is required"),
        *((f'{{"prompt": "a", "{name}": {value}}}'.encode(), name) for name, value in fields),
        *((line, "JSON") for line in broken),
        *((line, "Not a JSON object") for line in others),
        *((b'{"prompt": "a", "%s": 1}' % name, "Unknown field") for name in unknown),
        *((b'{"prompt": "a", "seed": %s}' % value, "seed") for value in wrong),
        *((b'{"prompt": %s}' % value, "prompt") for value in (b"null", b"1", b"[]", b"{}", b"true", b'""', b'"  "')),
        *((b'{"prompt": "a", "output": %s}' % value, "output") for value in (b"null", b"1", b"[]", b'""', b'"\\n"')),
        *((f'{{"prompt": "a", "size": "{size}"}}'.encode(), "size") for size in sizes),
        *((b'{"prompt": "a", "dither": %s}' % value, "dither") for value in truths),
        *((b'{"prompt": "a", "steps": %s}' % value, "steps") for value in (b"null", b'"a"', b"[1, null]", b"1.5")),
        *((b'{"prompt": "a", "dpi": %s}' % value, "dpi") for value in (b"null", b'"a"', b"[]", b"{}")),
        *((b'{"prompt": "a", "ram": %s}' % value, "ram") for value in (b"null", b'"much"', b'"-1GiB"', b"1e30")),
        *((line, "NUL") for line in nul),
        *((line, "surrogate") for line in halves),
        *((line, "not valid UTF-8") for line in bad_bytes),
        *((line, "nested") for line in deep),
        (b'{"prompt": "a", "prompt": "b"}', "given twice"),
        (b'{"seed": 1, "prompt": "a", "seed": 1}', "'seed' is given twice"),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', "longer than 100 kB"),
        (b'{"prompt": "' + b"a" * 100_000 + b'"}', "longer than 100 kB"),
        (b"\x1b[31mred", "JSON"),
    ]


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a list with the given content."""

    def read_data(data: bytes | str, name: str = "jobs.jsonl") -> list[JobSpec]:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return list(read_list(str(path)))

    return read_data


def summarise(specs: list[JobSpec]) -> list[tuple[int, object]]:
    """Return the line, and the values or the problem of each job."""
    return [(spec.line, spec.problem or spec.values) for spec in specs]


def test_two_hundred_hostile_lines_are_reported_by_number_and_affect_no_other(read):
    hostile = hostile_json()
    assert len(hostile) >= 200
    lines = list(hostile)
    random.Random(0).shuffle(lines)
    data = b"\n".join(piece for line, _ in lines for piece in (line, GOOD)) + b"\n"
    specs = read(data)
    assert len(specs) == 2 * len(lines)
    for number, (spec, (line, reason)) in enumerate(zip(specs[::2], lines, strict=True)):
        assert spec.line == 2 * number + 1 and reason in spec.problem, (line[:80], spec.problem)
        assert len(spec.problem) <= MAX_PROBLEM_CHARS and "\n" not in spec.problem and not spec.values
    for number, spec in enumerate(specs[1::2]):
        assert spec == JobSpec(2 * number + 2, {"prompt": "a hill", "seed": 3})


def test_jsonl(read):
    data = (
        '\ufeff{"prompt": "a [cat] 😀", "size": "128x64"}\r\n\n   \n{"image": "a.png", "size": 4096, "steps": [4, 2]}'
    )
    assert summarise(read(data)) == [
        (1, {"prompt": "a [cat] 😀", "size": Size(128, 64)}),
        (4, {"image": Path("a.png"), "size": Size(4096, 4096), "steps": (4, 2)}),
    ]


def test_text_is_one_prompt_per_line(read):
    data = b"a hill\n\n# not this\n  a sea, at dawn  \r\n\xff\n#nor this\na # sea\n" + b"x" * 200_000 + b"\nlast"
    assert summarise(read(data, "prompts.txt")) == [
        (1, {"prompt": "a hill"}),
        (4, {"prompt": "a sea, at dawn"}),
        (5, NOT_UTF8),
        (7, {"prompt": "a # sea"}),
        (8, TOO_LONG),
        (9, {"prompt": "last"}),
    ]


def test_csv_with_multiline_records_empty_cells_and_unclosed_quotes(read):
    data = (
        '\ufeffprompt, seed,size,lora\r\n"a hill,\nat dawn",3,,\na sea,,128x64,"a,b:0.5"\n,,,\n\n'
        'a,1,64,x,too many\n"never closed,1,64,\na wood,x,,\n"a ""quoted"" word",4,,\n"bad" end,5,,\nfew\n'
    )
    jobs = summarise(read(data, "jobs.csv"))
    assert jobs[:2] == [
        (2, {"prompt": "a hill,\nat dawn", "seed": 3}),
        (4, {"prompt": "a sea", "size": Size(128, 64), "lora": (Lora("a,b", 0.5),)}),
    ]
    assert [line for line, _ in jobs[2:]] == [7, 8, 9, 10, 11, 12]
    assert "5 cells" in jobs[2][1] and "CSV" in jobs[3][1] and "seed 'x'" in jobs[4][1] and "CSV" in jobs[6][1]
    assert jobs[5][1] == {"prompt": 'a "quoted" word', "seed": 4} and jobs[7][1] == {"prompt": "few"}


def test_hostile_csv(read):
    quote = b'"' + b"a\n" * 60_000
    jobs = summarise(read(b"prompt,seed\ngood,1\n" + quote + b"good,2\n\xff,3\ngood,4\n", "jobs.csv"))
    lines = 2 + 60_000
    assert jobs[0] == (2, {"prompt": "good", "seed": 1}) and jobs[1][0] == 3 and "CSV" in jobs[1][1]
    assert jobs[2] == (4, {"prompt": "a"}) and len(jobs) == 60_000 + 4
    assert jobs[-3:] == [
        (lines + 1, {"prompt": "good", "seed": 2}),
        (lines + 2, NOT_UTF8),
        (lines + 3, {"prompt": "good", "seed": 4}),
    ]


@pytest.mark.parametrize("head", ["promt,seed", "prompt,prompt", "prompt,,seed", "prompt;seed", '"prompt', "\udcff"])
def test_a_csv_with_an_invalid_header_is_rejected(read, head):
    with pytest.raises(DataError, match="header in line 1"):
        read(head.encode("utf-8", "surrogateescape") + b"\na,1\n", "jobs.csv")


def test_toml_tables_are_parsed_separately(read):
    data = (
        b"# mine\n\n[[job]]\nprompt = 'a hill'\nseed = 3\n\n[[job]] # broken\nprompt = \nseed = 4\n[[job]]\n[[ job ]]\n"
        b"prompt = '''\nover\nlines'''\nsize = '128x64'\n[[job]]\nprompt = 'a'\nprompt = 'b'\n[[job]]\nprompt = 'a'\n"
        b"[other]\nx = 1\n[[job]]\nprompt = '\xff'\n[[job]]\nseed = 1979-05-27\n[[job]]\nsteps = "
        + b"[" * 40_000
        + b"\n[[job]]\nprompt = '"
        + b"x\n" * 60_000
        + b"'\n[[job]]\nprompt = 'last'\nimage = 'a.png'\n"
    )
    jobs = summarise(read(data, "jobs.toml"))
    assert [line for line, _ in jobs][:9] == [3, 7, 10, 11, 16, 19, 23, 25, 27]
    assert jobs[0][1] == {"prompt": "a hill", "seed": 3}
    assert jobs[3][1] == {"prompt": "over\nlines", "size": Size(128, 64)}
    reasons = ["TOML", "prompt is required", None, "TOML", "Unknown field 'other'", "UTF-8", "seed", "nested", "100 kB"]
    for (_, problem), reason in zip(jobs[1:], reasons, strict=False):
        assert reason is None or reason in problem
    assert jobs[-1][1] == {"prompt": "last", "image": Path("a.png")} and len(jobs) == 11


def test_toml_settings_outside_of_a_table_are_one_invalid_job(read):
    assert summarise(read("\n# x\nprompt = 'a'\nseed = 2\n[[job]]\nprompt = 'b'\n", "jobs.toml")) == [
        (3, OUTSIDE_TABLE),
        (5, {"prompt": "b"}),
    ]


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b'\n\n  {"prompt": "a", "seed": 1}\n', [(3, {"prompt": "a", "seed": 1})]),
        (b"# first\n{a}\n", [(2, {"prompt": "{a}"})]),
        (b"a hill\n{b}\n", [(1, {"prompt": "a hill"}), (2, {"prompt": "{b}"})]),
    ],
)
def test_standard_input_is_json_if_it_starts_like_json(monkeypatch, data, values):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert summarise(list(read_list("-"))) == values


def test_sources_that_are_no_list(read, tmp_path):
    with pytest.raises(InputNotFound, match="cannot be read"):
        list(read_list(str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(InputNotFound):
        list(read_list("a\0b"))
    with pytest.raises(DataError, match="is a folder"):
        list(read_list(str(tmp_path)))


def test_long_lists_are_read_in_bounded_memory(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_bytes((GOOD + b"\n") * 20_000 + b'{"prompt": "' + b"a" * 10_000_000 + b'"}\n' + GOOD)
    tracemalloc.start()
    started = time.monotonic()
    count = sum(1 for _ in read_list(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_002 and peak < 2_000_000 and time.monotonic() - started < 20


def test_problems_are_short_keep_their_reason_and_contain_no_control_characters():
    assert shorten("a\n\x1b[31m b", 20) == "a \ufffd[31m b"
    problem = shorten(f"--model {'x' * 50_000}: there is no such folder.", MAX_PROBLEM_CHARS)
    assert (
        len(problem) < MAX_PROBLEM_CHARS
        and problem.startswith("--model xxx")
        and problem.endswith("there is no such folder.")
    )
    assert shorten("word " * 1000, 30) == "word word word word word word…"[:29] + "…"


def test_the_limits_are_those_of_the_lines(read):
    prompt = "a" * (line_reader.MAX_JOB_BYTES - len('{"prompt": ""}'))
    assert read(f'{{"prompt": "{prompt}"}}\n')[0].values == {"prompt": prompt}
    assert "longer than" in read(f'{{"prompt": "{prompt}a"}}\n')[0].problem

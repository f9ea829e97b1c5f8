"""Detect the format of a list by its suffix or first lines; reject other files and lists without jobs."""

import io
import os
import sys
import threading
import time
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from linfusion_cli.batch.parsers.line_reader import NOT_UTF8, TOO_LONG
from linfusion_cli.batch.parsers.reader import read_list
from linfusion_cli.core.errors import DataError

HILL = {"prompt": "a hill"}


def image(image_format: str) -> bytes:
    """Return an image file."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, image_format)
    return file.getvalue()


def from_file(tmp_path: Path, data: bytes, name: str) -> list:
    path = tmp_path / name
    path.write_bytes(data)
    return list(read_list(str(path)))


def from_stdin(data: bytes, monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return list(read_list("-"))


def from_pipe(data: bytes, pieces: int = 1) -> list:
    """Read /dev/fd/N while a thread writes `data` into the pipe, in several pieces."""
    reading, writing = os.pipe()

    def write() -> None:
        with suppress(BrokenPipeError), os.fdopen(writing, "wb", buffering=0) as file:
            for number in range(pieces):
                file.write(data[len(data) * number // pieces : len(data) * (number + 1) // pieces])
                time.sleep(0.02 if pieces > 1 else 0)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        return list(read_list(f"/dev/fd/{reading}"))
    finally:
        os.close(reading)
        writer.join()


def summarise(specs: list) -> list[tuple[int, object]]:
    return [(spec.line, spec.problem or spec.values) for spec in specs]


@pytest.mark.parametrize(
    "suffix", ["json", "tsv", "yaml", "yml", "md", "png", "jsonl~", "txt.bak", "gz", "xlsx", "list"]
)
def test_files_with_other_suffixes_are_no_lists(tmp_path, suffix):
    with pytest.raises(DataError, match=r"jobs\..* is not a job list: .*'\..*'.*\.jsonl or \.ndjson .*\.txt"):
        from_file(tmp_path, b'{"prompt": "a hill"}\n', f"jobs.{suffix}")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.JSONL", b'{"prompt": "a hill"}'),
        ("a.NdJson", b'\n{"prompt": "a hill"}'),
        ("a.CSV", b"prompt\r\na hill\r\n"),
        ("a.Toml", b"[[job]]\nprompt = 'a hill'"),
        ("a.TXT", b"a hill\r\n"),
        ("a.json.txt", b"a hill"),
    ],
)
def test_the_case_of_a_suffix_does_not_matter(tmp_path, name, data):
    assert [values for _, values in summarise(from_file(tmp_path, data, name))] == [HILL]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"prompt": "a hill"}\n', [(1, HILL)]),
        (b'\xef\xbb\xbf \n\n\t{"prompt": "a hill"}\r\n', [(3, HILL)]),
        (b'{"prompt": "' + b"a" * 200_000 + b'"}\n{"prompt": "a hill"}', [(1, TOO_LONG), (2, HILL)]),
        (b"[[job]]\nprompt = 'a hill'\n", [(1, HILL)]),
        (b"# mine\n\n  # and yours\n [[ job ]] # first\nprompt = 'a hill'\n", [(4, HILL)]),
        (b"prompt\na hill\n", [(2, HILL)]),
        (b'\xef\xbb\xbf"prompt", seed\r\na hill,3\r\n', [(2, HILL | {"seed": 3})]),
        (b"seed,prompt\n3,a hill\n", [(2, {"seed": 3, "prompt": "a hill"})]),
        (b"a hill\nprompt,seed\n", [(1, HILL), (2, {"prompt": "prompt,seed"})]),
        (b"# mine\n\na hill\n[[job]]\n", [(3, HILL), (4, {"prompt": "[[job]]"})]),
        (b"model\na sea, at dawn, seed", [(1, {"prompt": "model"}), (2, {"prompt": "a sea, at dawn, seed"})]),
        (b"a hill", [(1, HILL)]),
        (b"\xff\na hill", [(1, NOT_UTF8), (2, HILL)]),
    ],
)
def test_pipes_and_files_without_a_suffix_are_detected_by_their_first_lines(tmp_path, monkeypatch, data, expected):
    read = [from_stdin(data, monkeypatch), from_file(tmp_path, data, "jobs"), from_file(tmp_path, data, ".hidden")]
    for specs in [*read, from_pipe(data)]:
        found = summarise(specs)
        assert [line for line, _ in found] == [line for line, _ in expected]
        for (_, values), (_, wanted) in zip(found, expected, strict=True):
            assert values == wanted or (isinstance(wanted, str) and values.startswith(wanted))


ARRAYS = [
    b"[",
    b"[]",
    b"[  {",
    b'["a"',
    b"['a', 'b']",
    b"[[",
    b"[[1]]",
    b"[]]",
    b"[1,",
    b"[ -1.5e3 ]",
    b"[null,",
    b"[true]",
]
ARRAYS += [
    b"[False, 1]",
    b'[{"prompt": "a"}, {"prompt": "b"}]',
    b'["' + b"a" * 200_000 + b'"]',
    b'[{"prompt": "\xff"}]',
]
CONVERT = "iconv -f UTF-16 -t UTF-8"
BINARY = [
    ("a hill\n".encode("utf-16"), f"is UTF-16 text. Convert it: {CONVERT}"),
    (b"\xfe\xff" + "a hill\n".encode("utf-16-be"), f"is UTF-16 text. Convert it: {CONVERT}"),
    (b"\xff\xfe", "is UTF-16 text"),
    ("a hill\n".encode("utf-32"), "is UTF-32 text"),
    ("a hill\n".encode("utf-16-le"), "has a NUL byte in line 1"),
    (image("PNG"), "is a PNG image"),
    (image("JPEG"), "is a JPEG image"),
    (image("TIFF"), "is a TIFF image"),
    (image("WEBP"), "has a NUL byte"),
    (b"%PDF-1.4\n", "is a PDF document"),
    (b"\x1f\x8b\x08\x08" + zlib.compress(b"a hill"), "is compressed with gzip"),
    (b"a hill\n" * 20_000 + b"the sea\0\n", "has a NUL byte in line 20001"),
    (b"a hill\n" + b"a" * 500_000 + b"\0" + b"a" * 500_000, "has a NUL byte in line 2"),
]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ""])
@pytest.mark.parametrize("start", ARRAYS, ids=lambda data: data[:16].decode("utf-8", "replace"))
def test_an_array_is_no_list(tmp_path, suffix, start):
    with pytest.raises(DataError, match=r"looks like a JSON array \(line 3: .*Write JSONL, one object per line"):
        from_file(tmp_path, b"\n \n  " + start + b"\na hill\n", f"jobs{suffix}")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".toml", ""])
@pytest.mark.parametrize(("data", "message"), BINARY, ids=[message for _, message in BINARY])
def test_files_that_are_not_utf8_text_are_rejected_by_name(tmp_path, monkeypatch, suffix, data, message):
    if suffix == ".csv" and data.startswith(b"a hill"):
        data = data.replace(b"a hill", b"prompt", 1)  # otherwise its header is rejected first
    with pytest.raises(DataError) as caught:
        from_file(tmp_path, data, f"jobs{suffix}")
    assert message in str(caught.value) and f"jobs{suffix}" in str(caught.value) and "UTF-8" in str(caught.value)
    if not suffix:
        with pytest.raises(DataError, match="^Standard input "):
            from_stdin(data, monkeypatch)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("jobs", b"[cat:dog:0.5] in a hat", "looks like a JSON array .*in a hat.* into a .txt file"),
        ("jobs", b"# mine\n[cat:dog:0.5]", "looks like a JSON array"),
        ("jobs", b"[job]\nprompt = 'a'", "looks like a JSON array"),
        ("jobs", b'# mine\n{"prompt": "a"}', "looks like JSONL .*Remove the comments"),
        ("jobs", b"prompt\tseed\na\t3", r"'prompt\\tseed'. Separate the columns by commas"),
        ("jobs", b"prompt;seed\na;3", "'prompt;seed'. Separate the columns by commas"),
        ("jobs", b"promt,prompt\na,3", "'promt'"),
        ("jobs", b"prompt,prompt\na,3", "field is named twice"),
        ("jobs", b"- prompt: a\n  seed: 3", "looks like YAML"),
        ("jobs", b"---\nprompt: a", "looks like YAML"),
        ("jobs", b"<!DOCTYPE html>\n<p>", "looks like HTML"),
        ("jobs.txt", b'{"prompt": "a"}', "looks like JSONL .*suffix .jsonl"),
        ("jobs.txt", b"prompt,seed\na,3", "looks like CSV .*suffix .csv"),
        ("jobs.txt", b"prompt\tseed\na\t3", "looks like CSV .*separate the columns by commas"),
        ("jobs.txt", b"# mine\n[[job]]\nprompt = 'a'", r"looks like TOML \(line 2.*suffix .toml"),
        ("jobs.jsonl", b"[[job]]\nprompt = 'a'", "looks like TOML"),
        ("jobs.txt", b"- prompt: a", "looks like YAML"),
        ("jobs.csv", b'[{"prompt": "a"}]', "header in line 1"),
        ("jobs.csv", b"prompt;seed\na;3", "Separate the columns by commas"),
        ("jobs.toml", b'[{"prompt": "a"}]', "has no jobs. .*\\[\\[job\\]\\]"),
    ],
)
def test_a_list_in_another_format_than_expected_is_rejected(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        from_file(tmp_path, data, name)


@pytest.mark.parametrize(
    "prompt",
    [
        "[cat:dog:0.5] in a hat",
        "[1girl:2girls:0.5]",
        "[3 cats], [two dogs]",
        "[true love:hate:3]",
        "[nullity]",
        "[-blur]",
        "[.]",
        "{red|blue} house",
        "{a}",
        "image, model",
        "prompt",
        "a prompt, seed",
        "- a hill",
        "-- a hill",
        "<lora:x:1> a hill",
        "; no comment",
        "---- a line",
    ],
)
def test_a_text_file_has_any_other_prompt(tmp_path, prompt):
    assert summarise(from_file(tmp_path, f"# mine\n{prompt}\n".encode(), "jobs.txt")) == [(2, {"prompt": prompt})]


def test_only_the_first_prompt_determines_the_format(tmp_path):
    data = b'a hill\n["a"]\n{"prompt": "b"}\n[[job]]\nprompt,seed\n'
    assert len(from_file(tmp_path, data, "jobs.txt")) == len(from_file(tmp_path, data, "jobs")) == 5
    first, second = from_file(tmp_path, b'{"prompt": "a hill"}\n[{"prompt": "a"}]', "jobs.jsonl")
    assert first.values == HILL and "Not a JSON object" in second.problem


@pytest.mark.parametrize(
    ("name", "data", "hint"),
    [
        *(
            (f"jobs{suffix}", data, "")
            for suffix in (".txt", ".jsonl", ".csv", ".toml", "")
            for data in (b"", b"\n \r\n\t")
        ),
        ("jobs.txt", b"# nothing\n\n  # at all", "one prompt per line"),
        ("jobs", b"# nothing\n", "one prompt per line"),
        ("jobs.txt", b"\xef\xbb\xbf\n", ""),
        ("jobs.csv", b"prompt,seed\n", "below the names of the columns"),
        ("jobs.csv", b"\n\nprompt,seed\n\n,,\n  \n", "below the names of the columns"),
        ("jobs", b"prompt,seed\r\n", "below the names of the columns"),
        ("jobs.toml", b"# nothing\n", r"\[\[job\]\]"),
        ("jobs.toml", b"prompt = 'a'\n[job]\nprompt = 'b'\n", r"\[\[job\]\]"),
        ("jobs.toml", b"[[jobs]]\nprompt = 'a'\n", r"\[\[job\]\]"),
    ],
)
def test_a_list_without_jobs_is_rejected(tmp_path, name, data, hint):
    with pytest.raises(DataError, match=f"{name} has no jobs. .*{hint}"):
        from_file(tmp_path, data, name)


def test_standard_input_that_is_empty_closed_or_unreadable_is_refused(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="Standard input has no jobs"):
        from_stdin(b" \n", monkeypatch)
    sys.stdin.close()
    with pytest.raises(DataError, match="Standard input has no jobs"):
        list(read_list("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="Standard input has no jobs"):
        list(read_list("-"))
    with open(os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT)) as unreadable:  # noqa: PTH123 - of a descriptor
        monkeypatch.setattr(sys, "stdin", unreadable)
        with pytest.raises(DataError, match="Standard input cannot be read"):
            list(read_list("-"))


def test_standard_input_stays_open(monkeypatch):
    from_stdin(b"a hill\n", monkeypatch)
    assert not sys.stdin.buffer.closed


@pytest.mark.parametrize(
    ("name", "data"), [("jobs.csv", b"prompt\na hill\n"), ("jobs.json", b"\n[[job]]\nprompt='a hill'")]
)
def test_a_named_pipe_is_detected_by_its_suffix_or_first_lines(tmp_path, name, data):
    path = tmp_path / name
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[data])
    writer.start()
    assert [entry.values for entry in read_list(str(path))] == [HILL]
    writer.join()


def test_a_slow_pipe_is_detected_by_its_first_lines():
    assert summarise(from_pipe(b"# c\n\n[[job]]\nprompt = 'a hill'\n", pieces=16)) == [(3, HILL)]
    with pytest.raises(DataError, match="looks like a JSON array"):
        from_pipe(b"\n[1,\n2]\n", pieces=8)


def test_devices_are_no_lists():
    with pytest.raises(DataError, match="The list /dev/null has no jobs"):
        list(read_list("/dev/null"))
    with pytest.raises(DataError, match="The list /dev/zero has a NUL byte"):
        next(read_list("/dev/zero"))


def test_lines_before_the_first_job_need_no_memory(monkeypatch):
    data = b" \n" * 30_000 + b"# no job\n" * 30_000 + b"a hill\n"
    tracemalloc.start()
    found = summarise(from_stdin(data, monkeypatch))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(60_001, HILL)] and peak < 1_000_000

"""File names of a batch: all of them are inside the output folder, and no two jobs share one."""

import random
import string

import pytest

from linfusion_cli.batch.filenames import DEFAULT_TEMPLATE, FilenameRegistry, FilenameTemplate, slugify
from linfusion_cli.batch.seeds import parse_seeds
from linfusion_cli.batch.shard import Shard
from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.settings.request import Request
from tests.support.requests import make_request

ODD = [
    "../",
    "/",
    "..",
    ".",
    "\0",
    "\n",
    "~",
    "{",
    "}",
    "{index}",
    "{0}",
    "$HOME",
    "%s",
    "\\",
    "é",
    "猫",
    "😀",
    "\udcff",
    "-",
]


def request(prompt: str = "a hill", **more) -> Request:
    return make_request(prompt=prompt, size=Size(128, 64), output="x.tif", model="demo", **more)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A fjord, at 5 o'clock!", "a-fjord-at-5-o-clock"),
        ("Häuser am Meer", "hauser-am-meer"),
        ("../../etc/passwd", "etc-passwd"),
        ("猫", "picture"),
        ("", "picture"),
        ("{index.__class__}", "index-class"),
        ("word " * 50, "word-word-word-word-word-word-word-word-word"),
        ("x" * 1000, "x" * 48),
        ("a\0b\nc", "a-b-c"),
    ],
)
def test_slug(prompt, words):
    assert slugify(prompt) == words


def test_a_template_is_filled():
    assert FilenameTemplate.parse(DEFAULT_TEMPLATE).format(7, request(seed=3)) == "0007-a-hill-3.tif"
    template = FilenameTemplate.parse("{size}/{width:5}{height:<4d}{slug:>8s}{{}}{index}")
    assert template.format(7, request(format="jpeg")) == "128x64/  12864    a-hill{}7.jpg"
    assert FilenameTemplate.parse("{slug}.png").format(1, request()) == "a-hill.png"


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{0}",
        "{prompt}",
        "{index.real}",
        "{slug.__class__}",
        "{slug[0]}",
        "{index!r}",
        "{index!s}",
        "{",
        "}",
        "{index",
        "{index:{width}}",
        "{index:999999999}",
        "{index:x}",
        "{slug:d}",
        "{slug:04}x{slug:.5}",
        "{index:,}",
        "{index:\0}",
        "{index:%}",
        "{slug:<100}",
        "{__import__('os')}",
        "{index:04}{nothing}",
        "{self}",
        "{values}",
    ],
)
def test_a_template_cannot_run_code_or_read_attributes(text):
    with pytest.raises(UsageError, match="index, slug, seed, size, width, height"):
        FilenameTemplate.parse(text)


@pytest.mark.parametrize(
    "name",
    [
        "../x.png",
        "a/../../x.png",
        "..",
        ".",
        "/etc/x.png",
        "//x.png",
        "a//x.png",
        "a/",
        "",
        ".x.png",
        "a/.b/x.png",
        "./x.png",
        "a\0.png",
        "a\n.png",
        "\x7f.png",
        "\udcff.png",
        "x" * 241 + ".png",
        "猫" * 90 + ".png",
        "a/" * 600 + "x.png",
        "results.jsonl",
        "Results-1-of-2.jsonl",
    ],
)
def test_invalid_names(tmp_path, name):
    with pytest.raises(UsageError):
        FilenameRegistry(tmp_path).reserve(name, 1)


def test_no_two_jobs_have_one_file(tmp_path):
    names = FilenameRegistry(tmp_path)
    assert names.reserve("a/x.png", 3) == tmp_path / "a/x.png"
    for line in (3, 4):
        with pytest.raises(UsageError, match="'a/x.png'.*line 3"):
            names.reserve("a/x.png", line)


def test_no_link_leads_out_of_the_folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "away").symlink_to(tmp_path)
    (folder / "x.png").symlink_to(tmp_path / "y.png")
    (folder / "loop").symlink_to("loop")
    (folder / "b.png").symlink_to("a.png")
    for name in ("away/x.png", "x.png", "loop/x.png", "loop"):
        with pytest.raises(UsageError, match="outside --output-dir"):
            FilenameRegistry(folder).reserve(name, 1)
    assert FilenameRegistry(folder).reserve("b.png", 1) == folder / "b.png"


def test_random_prompts_templates_and_outputs_never_leave_the_folder(tmp_path):
    rng = random.Random(0)
    folder = (tmp_path / "out").resolve()
    pieces = [*ODD, *string.ascii_letters, *(f"{{{field}}}" for field in ("index", "slug", "seed", "size", "width"))]
    accepted = 0
    for index in range(4000):
        prompt, text = ("".join(rng.choices(pieces, k=rng.randint(1, 9))) for _ in range(2))
        try:
            wanted = request(prompt.replace("\udcff", "?"), seed=rng.randint(0, 2**62))
            name = text if index % 2 else FilenameTemplate.parse(text).format(index, wanted)
            path = FilenameRegistry(folder).reserve(name, index)
        except UsageError:
            continue
        accepted += 1
        assert path.resolve().is_relative_to(folder) and path.resolve() != folder and ".." not in path.parts
        assert all(0 < len(part.encode()) <= 255 and part.isprintable() for part in path.relative_to(folder).parts)
        assert not any(part.startswith(".") for part in path.relative_to(folder).parts)
    assert accepted > 400


def test_seeds():
    assert parse_seeds("1-3") == (1, 2, 3)
    assert parse_seeds(" 1, 5,9 - 12,10") == (1, 5, 9, 10, 11, 12)
    for text in (
        "",
        "a",
        "3-1",
        "1-",
        "-1",
        "1,,2",
        "1-99999999",
        "1-10001",
        "9223372036854775808",
        "1.5",
        "١",
        ",".join(["0-9999", "10000"]),
    ):
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds(text)


def test_every_job_is_in_exactly_one_shard():
    for count in (1, 2, 3, 7, 64):
        shards = [Shard.parse(f"{number}/{count}") for number in range(1, count + 1)]
        assert all(sum(shard.contains(index) for shard in shards) == 1 for index in range(200))
        assert len({shard.results_name for shard in shards}) == count
    for text in ("", "0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"):
        with pytest.raises(UsageError, match="--shard"):
            Shard.parse(text)

import pytest

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import (
    format_bytes,
    format_bytes_rounded_up,
    format_seconds,
    parse_bytes,
    parse_colour,
    parse_seconds,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16384", Size(16384, 16384)),
        ("16384x8192", Size(16384, 8192)),
        ("64X100", Size(64, 100)),
        (" 300 × 200 ", Size(300, 200)),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "abc", "0", "63", "64x63", "-5", "1e4", "12.5", "3x", "x3", "1x2x3", "9" * 400, "9" * 5000, "٣٠٠"]
)
def test_what_is_no_size_is_refused_with_a_way_out(text):
    with pytest.raises(ValueError, match="use 16384 for a square|at least 64 pixels"):
        parse_size(text)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (12 << 30, "12.0 GiB"), (5e14, "454.7 TiB")])
def test_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (95, "1 min 35 s"),
        (3599.9, "1 h 00 min"),
        (7322, "2 h 02 min"),
    ],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GiB", 12 << 30),
        ("12 GB", 12 * 10**9),
        ("1.5g", 3 << 29),
        ("800M", 800 << 20),
        ("64kib", 64 << 10),
        ("123B", 123),
        ("7B", 7),
        (" 2 TiB ", 2 << 40),
    ],
)
def test_bytes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "meanings"), [("12", "12GiB or 12MiB"), ("24576", "24576MiB or 24576B"), ("25769803776", "B, or about 24")]
)
def test_bytes_without_a_unit_are_rejected_with_the_likely_meanings(text, meanings):
    with pytest.raises(ValueError, match=f"has no unit: use .*{meanings}"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["5", "90", " 1.5 "])
def test_seconds_without_a_unit_are_rejected_with_the_likely_meanings(text):
    with pytest.raises(
        ValueError, match=f"has no unit: use {text.strip()}m for minutes or {text.strip()}s for seconds"
    ):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("50m", 3000), ("1h30m", 5400), ("1.5H", 5400), ("2h5s", 7205)]
)
def test_seconds_are_read(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "GiB", "12 gigs", "-1GiB", "1e9", "12GiBB", "nan", "1,5G", "٣GiB"])
def test_what_is_no_size_of_memory_is_refused(text):
    with pytest.raises(ValueError, match="12GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("count", [1, 1023, 1025, 12 << 30, (12 << 30) + 1, 10**12, 123456789])
def test_bytes_for_a_flag_are_never_less(count):
    assert count <= parse_bytes(format_bytes_rounded_up(count)) <= count * 1.1 + 1


@pytest.mark.parametrize(
    ("text", "rgb"),
    [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("#10203040", (16, 32, 48)), ("RGB(1, 2, 3)", (1, 2, 3))],
)
def test_colours_are_read(text, rgb):
    assert parse_colour(text) == rgb


@pytest.mark.parametrize("text", ["", "beige-ish", "#12", "rgb(1,2)", "x" * 200])
def test_what_is_no_colour_is_refused(text):
    with pytest.raises(UsageError, match="--background"):
        parse_colour(text)

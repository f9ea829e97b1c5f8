"""Texts for users only change deliberately, and are reviewed together."""

from tests.golden.messages import FILE, collect_messages, texts_in


def test_the_file_of_messages_is_current():
    now, recorded = collect_messages(), FILE.read_text(encoding="utf-8")
    changed = set(now.splitlines()) ^ set(recorded.splitlines())
    assert len(now.splitlines()) > 500
    assert now == recorded, f"run `python -m tests.golden.messages` and review: {sorted(changed)[:10]}"


def test_all_kinds_of_messages_are_collected(tmp_path):
    source = tmp_path / "commands" / "module.py"
    source.parent.mkdir()
    source.write_text(
        '''"""A docstring of the module."""
NOTICE = "The value {} is ignored."
def command():
    """Print what is there."""
    raise ValueError(f"{name!r} is too long: " f"{len(name)} letters.")
def other():
    """A docstring that is not a message."""
    return "one word", 3
''',
        encoding="utf-8",
    )
    assert list(texts_in(source)) == [
        "The value {} is ignored.",
        "Print what is there.",
        "{name} is too long: {len(name)} letters.",
    ]

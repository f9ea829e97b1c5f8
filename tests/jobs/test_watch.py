"""A watched folder: lists are taken when nobody writes them any more, and are put aside."""

import signal
from pathlib import Path

import pytest

from linfusion_cli.errors import Stopped
from linfusion_cli.jobs.watch import watch


@pytest.fixture
def lists(tmp_path):
    """A folder to be watched."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def watched(folder: Path, polls: list, carried_out) -> None:
    """Watch `folder`; between polls, what `polls` have happens; after the last the process is stopped."""
    waiting = iter(polls)

    def pause(seconds):
        happens = next(waiting, None)
        if happens is None:
            raise Stopped(signal.SIGTERM)
        happens()

    with pytest.raises(Stopped):
        watch(folder, carried_out, pause)


def nothing() -> None:
    """Happens."""


def test_lists_are_taken_when_they_stand_still_and_put_aside(lists):
    taken = []

    def carried_out(path):
        taken.append(path.name)
        return "bad" not in path.name

    (lists / "a.txt").write_text("a")
    for name in (".hidden", "b.part", "c.tmp"):
        (lists / name).write_text("x")
    (lists / "done").mkdir()
    (lists / "done/a.txt").write_text("older")
    (lists / "done/a-2.txt").write_text("older")
    grows = [lambda n=n: (lists / "bad.csv").write_text("x" * n) for n in (1, 2, 3)]
    again = [lambda: (lists / "a.txt").write_text("again")]
    watched(lists, [*grows, nothing, *again, nothing, nothing, nothing], carried_out)
    assert taken == ["a.txt", "bad.csv", "a.txt"]
    names = {str(path.relative_to(lists)) for path in lists.rglob("*") if path.is_file()}
    done = {f"done/{name}" for name in ("a.txt", "a-2.txt", "a-3.txt", "a-4.txt")}
    assert names == {".hidden", "b.part", "c.tmp", "failed/bad.csv"} | done
    assert (lists / "done/a.txt").read_text() == "older"


def test_a_list_that_changes_while_it_is_carried_out_is_taken_again(lists):
    taken = []

    def carried_out(path):
        taken.append(path.read_text())
        if len(taken) == 1:
            path.write_text("changed")
        return True

    (lists / "a.txt").write_text("a")
    watched(lists, [nothing] * 5, carried_out)
    assert taken == ["a", "changed"] and (lists / "done/a.txt").read_text() == "changed"


def test_a_list_that_cannot_be_put_aside_is_not_done_again(lists, monkeypatch):
    taken = []

    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr("linfusion_cli.jobs.watch.renamed", refuse)
    (lists / "a.txt").write_text("a")
    watched(lists, [nothing] * 5, lambda path: taken.append(path) or True)
    assert len(taken) == 1

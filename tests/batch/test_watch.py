"""A watched folder: lists are taken when nobody writes them any more, and are put aside."""

import signal
from functools import partial
from pathlib import Path

import pytest

from linfusion_cli.batch.watch import watch
from linfusion_cli.core.errors import Stopped
from linfusion_cli.core.events import Notice, Observer, ignore_event
from tests.support.fakes import Listener


@pytest.fixture
def lists(tmp_path):
    """A folder to be watched."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def watched(folder: Path, polls: list, carried_out, observer: Observer = ignore_event) -> None:
    """Watch `folder`; between polls, what `polls` have happens; after the last the process is stopped."""
    waiting = iter(polls)

    def pause(seconds):
        happens = next(waiting, None)
        if happens is None:
            raise Stopped(signal.SIGTERM)
        happens()

    with pytest.raises(Stopped):
        watch(folder, carried_out, pause, observer)


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

    monkeypatch.setattr("linfusion_cli.batch.watch.rename_noreplace", refuse)
    (lists / "a.txt").write_text("a")
    watched(lists, [nothing] * 5, lambda path: taken.append(path) or True)
    assert len(taken) == 1


NO_LISTS = ["README.md", "a.png", "b", "c.json", "d.tsv", "e.yaml", "f.txt.bak", "g.jsonl~"]
LISTS = ["a.jsonl", "b.NDJSON", "c.Csv", "d.toml", "e.TXT"]


def test_only_files_with_a_suffix_of_lists_are_taken_and_the_others_are_told_of_once(lists):
    taken, listener = [], Listener()
    for name in [*NO_LISTS, *LISTS, ".hidden", "h.json.part"]:
        (lists / name).write_text("x")
    (lists / "folder.txt").mkdir()
    watched(lists, [nothing] * 6, lambda path: taken.append(path.name) or True, listener)
    assert taken == LISTS
    said = [notice.text for notice in listener.of(Notice)]
    assert len(said) == len(NO_LISTS) and all("not a list of jobs" in text and "\n" not in text for text in said)
    assert [text.split()[0] for text in said] == [str(lists / name) for name in NO_LISTS]
    assert all((lists / name).read_text() == "x" for name in NO_LISTS)
    assert {path.name for path in (lists / "done").iterdir()} == set(LISTS) and not list((lists / "failed").iterdir())


def test_what_is_no_list_is_told_of_again_when_it_has_changed_and_stands_still(lists):
    listener = Listener()
    notes = lists / "notes.md"
    grows = [lambda n=n: notes.write_text("x" * n) for n in range(1, 6)]
    watched(lists, [*grows, nothing, nothing, nothing], lambda path: True, listener)
    assert len(listener.of(Notice)) == 1
    listener = Listener()
    changes, moves = partial(notes.write_text, "changed"), partial(notes.rename, lists / "notes.txt")
    taken = []
    polls = [nothing, nothing, changes, nothing, nothing, nothing, moves, nothing, nothing]
    watched(lists, polls, lambda path: taken.append(path.name) or True, listener)
    assert len(listener.of(Notice)) == 2 and taken == ["notes.txt"]


def test_the_record_of_a_batch_is_never_taken_for_a_list(lists):
    """Where pictures go into the watched folder itself."""
    taken, listener = [], Listener()
    for name in ("results.jsonl", "results-3-of-8.jsonl", "Results.JSONL", "my-results.jsonl"):
        (lists / name).write_text('{"list": "a.txt", "prompt": "a hill"}\n')
    watched(lists, [nothing, nothing, nothing], lambda path: not taken.append(path.name), listener)
    assert taken == ["my-results.jsonl"] and not listener.events
